"""The Triton back end beside its arithmetic: off unless asked for, by reasons that are told; compiled for a GPU; captured with care."""

import importlib.util
import os
import subprocess
import sys
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from hf_lowrank import kernels
from hf_lowrank.kernels import triton as back_end
from hf_lowrank.runtime import ops
from hf_lowrank.runtime.errors import CompressionError
from tests.support.fresh_process import PROJECT

from .back_ends import in_use
from .layers import random_layer

needs_triton = pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="the package triton is not installed")


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """A machine with an H100 and Triton, as far as questions go."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (9, 0))
    monkeypatch.setattr(back_end, "find_spec", lambda name: object())


@pytest.fixture
def _registered_again() -> Iterator[None]:
    yield
    kernels.unload()
    kernels.load()


def described() -> set[tuple[str, str]]:
    return {(row.name, row.reason) for row in kernels.describe() if row.device == "cuda"}


def test_a_machine_without_a_gpu_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(kernels.ENVIRONMENT_VARIABLE, "on")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert described() == {("torch", "no CUDA device")}


@needs_triton
@pytest.mark.usefixtures("gpu", "_registered_again")
@pytest.mark.parametrize(("switch", "registered"), [(None, []), ("off", []), ("on", ["triton"])])
def test_what_no_gpu_has_run_is_off_unless_asked_for(monkeypatch: pytest.MonkeyPatch, switch: str | None, registered: list[str]) -> None:
    kernels.unload()
    monkeypatch.delenv(kernels.ENVIRONMENT_VARIABLE)
    if switch is not None:
        monkeypatch.setenv(kernels.ENVIRONMENT_VARIABLE, switch)
    kernels.load_by_default()
    assert all(ops.registered_kernels(operation, "cuda") == registered for operation in kernels.OPERATIONS)
    assert {name for name, _ in described()} == {"triton" if registered else "torch"}
    assert all("HF_LOWRANK_KERNELS" in reason or "never run" in reason for _, reason in described())


@pytest.mark.usefixtures("gpu")
@pytest.mark.parametrize(
    ("name", "value", "reason"),
    [(back_end, "find_spec", "the package triton is not installed"), (torch.cuda, "get_device_capability", "compute capability 7.5")],
)
def test_a_gpu_without_what_the_kernels_need_means_a_warning(monkeypatch: pytest.MonkeyPatch, name: Any, value: str, reason: str) -> None:
    monkeypatch.setattr(name, value, lambda *_: None if value == "find_spec" else (7, 5))
    with pytest.warns(UserWarning, match=reason):
        back_end.register()
    assert all(name == "torch" and reason in why for name, why in (back_end.describe(operation) for operation in kernels.OPERATIONS))


@needs_triton
def test_the_compiler_for_gpus_takes_every_kernel(tmp_path: Path) -> None:
    environment = os.environ | {"PYTHONPATH": str(PROJECT), "TRITON_INTERPRET": "0", "TRITON_CACHE_DIR": str(tmp_path)}
    command = [sys.executable, "-W", "ignore", str(Path(__file__).with_name("compile_for_gpu.py"))]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr
    assert {line.split()[0] for line in done.stdout.splitlines()} == {"multiply", "unpack"}


@needs_triton
def test_a_shape_that_is_new_in_a_captured_graph_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    from hf_lowrank.kernels.triton import factors, tuning

    kernel = tuning.TunedKernel(factors.multiply, [None], ["rows"])
    launched: list[int] = []
    kernel.tuned = defaultdict(lambda: lambda rows: launched.append(rows))
    capturing = [False]
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: capturing[0])
    for rows, capturing[0] in ((3, False), (3, True)):
        kernel.launch(torch.device("cpu"), lambda _: (1,), rows=rows)
    with pytest.raises(CompressionError, match="new shape while a CUDA graph is captured"):
        kernel.launch(torch.device("cpu"), lambda _: (1,), rows=4)
    assert launched == [3, 3]


@needs_triton
@pytest.mark.parametrize("tokens", [2, 20])
def test_gradients_and_compiled_graphs_reach_the_kernels(tokens: int) -> None:
    layer = random_layer(9, 40, 11, torch.float32)
    arguments = layer.arguments("bitmask_binary_linear")

    def gradient(x: torch.Tensor) -> torch.Tensor:
        x = x.detach().requires_grad_()
        return torch.autograd.grad(ops.bitmask_binary_linear(x, *arguments).square().sum(), x)[0]

    x = torch.randn(tokens, 40)
    expected = gradient(x)
    with in_use("triton") as used:
        arguments = tuple(used.placed(*arguments))
        x = x.to(used.device)
        torch.testing.assert_close(gradient(x).cpu(), expected)
        compiled = torch.compile(ops.bitmask_binary_linear, backend="aot_eager", fullgraph=True)
        torch.testing.assert_close(compiled(x, *arguments), ops.bitmask_binary_linear(x, *arguments))
