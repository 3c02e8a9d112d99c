"""The kernels load when a layer is first computed, never by an import. They can be switched off and on."""

import json
import os
import subprocess
import sys
from typing import Any

import pytest
import torch

from hf_lowrank import kernels
from hf_lowrank.kernels.cpu import native
from hf_lowrank.runtime import ops
from tests.support.fresh_process import PROJECT

from .layers import random_layer

built = pytest.mark.skipif(native.library_path() is None, reason="the C++ library is not built")
FORM = "bitmask_binary_linear"
PROGRAM = """
import json, sys, torch
import hf_lowrank
from hf_lowrank.runtime import ops
after_import = "hf_lowrank.kernels" in sys.modules
layer = hf_lowrank.SparseLowRankLinear(8, 8, sparse="bitmask", kept=3)
with torch.no_grad():
    layer(torch.ones(1, 8))
print(json.dumps([after_import, ops.registered_kernels("bitmask_linear", "cpu")]))
"""


def in_a_fresh_process(switch: str | None) -> subprocess.CompletedProcess[str]:
    environment = {name: value for name, value in os.environ.items() if name != kernels.ENVIRONMENT_VARIABLE}
    environment |= {"PYTHONPATH": str(PROJECT)} | ({} if switch is None else {kernels.ENVIRONMENT_VARIABLE: switch})
    return subprocess.run(
        [sys.executable, "-c", PROGRAM], env=environment, capture_output=True, text=True, timeout=120, check=False
    )


@built
@pytest.mark.parametrize(("switch", "expected"), [(None, ["cpp"]), ("on", ["cpp"]), ("off", [])])
def test_the_first_product_loads_them_unless_the_environment_says_off(switch: str | None, expected: list[str]) -> None:
    done = in_a_fresh_process(switch)
    assert json.loads(done.stdout) == [False, expected], done.stderr


def test_another_word_in_the_environment_is_refused_in_one_line() -> None:
    done = in_a_fresh_process("maybe")
    assert (
        done.stderr.strip()
        .splitlines()[-1]
        .endswith("HF_LOWRANK_KERNELS='maybe', expected on or off; unset it to have the kernels on")
    )


def computed(**options: Any) -> torch.Tensor:
    layer = random_layer(40, 70, 20, torch.bfloat16)
    x = torch.randn(2, 70, generator=torch.Generator().manual_seed(1)).bfloat16()
    return ops.bitmask_binary_linear(x.requires_grad_(bool(options.get("recorded"))), *layer.arguments(FORM))


@built
def test_unloaded_plain_torch_computes_and_loaded_the_kernels_do() -> None:
    kernels.unload()
    try:
        assert ops.registered_kernels(FORM, "cpu") == []
        plain = computed()
        layer = random_layer(40, 70, 20, torch.bfloat16)
        x = torch.randn(2, 70, generator=torch.Generator().manual_seed(1)).bfloat16()
        assert torch.equal(plain, ops.plain_bitmask_binary_linear(x, *layer.arguments(FORM)))
    finally:
        kernels.load()
    assert ops.registered_kernels(FORM, "cpu") == ["cpp"]
    torch.testing.assert_close(computed(), plain)


@built
def test_a_product_is_the_same_with_and_without_gradients_recorded() -> None:
    with torch.no_grad():
        direct = computed()
    recorded = computed(recorded=True)
    assert recorded.requires_grad and torch.equal(direct, recorded.detach())
