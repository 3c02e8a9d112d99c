"""Laws of the Triton back end beside its arithmetic.

It is off unless it is asked for, and says why. Its kernels compile for a GPU, and refuse to be tuned in a captured
graph.
"""

import importlib.util
import os
import re
import subprocess
import sys
from collections import defaultdict
from collections.abc import Callable, Iterator
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

needs_triton = pytest.mark.skipif(
    importlib.util.find_spec("triton") is None, reason="the package triton is not installed"
)


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """Have this machine answer questions as one with an H100 and Triton would."""
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
def test_what_no_gpu_has_run_is_off_unless_asked_for(
    monkeypatch: pytest.MonkeyPatch, switch: str | None, registered: list[str]
) -> None:
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
    [
        (back_end, "find_spec", "the package triton is not installed"),
        (torch.cuda, "get_device_capability", "compute capability 7.5"),
    ],
)
def test_a_gpu_without_what_the_kernels_need_means_a_warning(
    monkeypatch: pytest.MonkeyPatch, name: Any, value: str, reason: str
) -> None:
    monkeypatch.setattr(name, value, lambda *_: None if value == "find_spec" else (7, 5))
    with pytest.warns(UserWarning, match=reason):
        back_end.register()
    assert all(
        name == "torch" and reason in why
        for name, why in (back_end.describe(operation) for operation in kernels.OPERATIONS)
    )


@needs_triton
def test_the_compiler_for_gpus_takes_every_kernel(tmp_path: Path) -> None:
    environment = os.environ | {"PYTHONPATH": str(PROJECT), "TRITON_INTERPRET": "0", "TRITON_CACHE_DIR": str(tmp_path)}
    command = [sys.executable, "-W", "ignore", str(Path(__file__).with_name("compile_for_gpu.py"))]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr
    assert {line.split()[0] for line in done.stdout.splitlines()} == {"multiply", "unpack"}


def kept_by_ptx(byte: int, memory: list[int]) -> list[int]:
    """Interpret `PTX_OF_KEPT_VALUES` and return its eight results for a byte.

    Args:
        memory: the values from the address on.
    """
    from hf_lowrank.kernels.triton.bits import PTX_OF_KEPT_VALUES

    registers: dict[str, int] = {"$8": byte, "$9": 1 << 40}
    act: dict[str, Callable[..., int]] = {
        "and.b32": lambda a, b: a & b,
        "setp.ne.u32": lambda a, b: int(a != b),
        "mov.b32": int,
        "mov.b64": int,
        "shl.b32": lambda a, b: (a << b) & 0xFFFFFFFF,
        "shr.u32": lambda a, b: a >> b,
        "cvt.u64.u32": int,
        "add.u64": lambda a, b: a + b,
        "ld.global.u16": lambda address: memory[(address - (1 << 40)) // 2],
    }
    for statement in PTX_OF_KEPT_VALUES.value.strip("{}").split(";"):
        match = re.fullmatch(r"\s*(?:@(\w+) )?([\w.:]*) ?(.*)", statement, re.S)
        assert match is not None
        predicate, name, operands = match.groups()
        if not name or name == ".reg" or (predicate and not registers[predicate]):
            continue
        target, *sources = (operand.strip(" []") for operand in operands.split(","))
        registers[target] = act[name](
            *(registers[source] if source in registers else int(source) for source in sources)
        )
    return [registers[f"${column}"] for column in range(8)]


@needs_triton
def test_the_instructions_in_ptx_spread_the_values_of_a_byte() -> None:
    values = list(range(1, 9))
    for byte in range(256):
        kept = iter(values[: byte.bit_count()])
        memory = values[: byte.bit_count()]  # what follows is another row's, and is not read
        assert kept_by_ptx(byte, memory) == [next(kept) << 16 if byte >> column & 1 else 0 for column in range(8)]


@needs_triton
@pytest.mark.parametrize(("spans", "tokens"), [(1, 1), (2, 2), (4, 1), (1, 3)])
@pytest.mark.parametrize("form", ["bitmask_binary_linear", "quantized_linear", "quantized_linear, bitmask"])
def test_matrices_of_many_columns_are_summed_by_spans(
    monkeypatch: pytest.MonkeyPatch, form: str, spans: int, tokens: int
) -> None:
    from hf_lowrank.kernels.triton import products

    fitting = [each for each in products._multiply_vectors.configurations if each.kwargs["SPANS"] == spans]
    monkeypatch.setattr(products._multiply_vectors, "configurations", fitting)
    layer = random_layer(3, 4500, 1800, torch.float32)
    x = torch.randn(tokens, 4500, generator=torch.Generator().manual_seed(1))
    with in_use("triton") as used:
        y = used.kernel(form, x, layer)
    assert y is not None
    dense, magnitudes = layer.dense(form)
    assert bool(((y.double() - x.double() @ dense.T).abs() <= x.double().abs() @ magnitudes.T * 2**-20).all())


@needs_triton
def test_a_shape_that_is_new_in_a_captured_graph_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    from hf_lowrank.kernels.triton import factors, tuning

    kernel = tuning.TunedKernel(factors.multiply, [None], ["rows"])
    launched_rows: list[int] = []
    kernel.tuned = defaultdict(lambda: lambda rows: launched_rows.append(rows))
    capturing = [False]
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: capturing[0])
    for rows, capturing[0] in ((3, False), (3, True)):
        kernel.launch(torch.device("cpu"), lambda _: (1,), rows=rows)
    with pytest.raises(CompressionError, match="new shape while a CUDA graph is captured"):
        kernel.launch(torch.device("cpu"), lambda _: (1,), rows=4)
    assert launched_rows == [3, 3]


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
