"""The operations are declared whole, unpack tile by tile, are frugal with memory, and ask faster kernels first."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from hf_lowrank.runtime import ops, plain_ops

from .layer_cases import make_spec, random_layer

M, N, KEPT = 24, 21, 6  # N is no multiple of 8, so packed rows end in padding
LAYER = random_layer(make_spec("bitmask", KEPT, rank=3, binary_rank=2, bias=False), M, N)
SPARSE = (LAYER.weight, LAYER.weight_mask)
BINARY = (LAYER.sign_bits, LAYER.scale_in, LAYER.scale_out)
LOWRANK = (LAYER.lowrank_a, LAYER.lowrank_b)
OPERATIONS: dict[str, tuple[Any, ...]] = {
    "bitmask_linear": SPARSE,
    "binary_linear": BINARY,
    "bitmask_binary_linear": (*SPARSE, *BINARY),
    "lowrank_linear": LOWRANK,
}
"""The stored parts that every operation takes after its input."""


def inputs(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(0)).to(dtype)


@pytest.fixture
def kernels(monkeypatch: pytest.MonkeyPatch) -> dict:
    """The registry of kernels, which is empty for one test."""
    registry: dict = {}
    monkeypatch.setattr(ops, "_kernels", registry)
    return registry


@pytest.fixture
def small_tiles(monkeypatch: pytest.MonkeyPatch) -> Callable[[int], None]:
    """Lets operations unpack so many rows at a time, instead of all."""
    return lambda rows: monkeypatch.setattr(plain_ops, "TILE_ELEMENTS", rows * N)


@pytest.mark.parametrize("shape", [(2, 5, N), (0, N)])
@pytest.mark.parametrize("name", OPERATIONS)
def test_declarations_pass_torchs_own_check(name: str, shape: tuple[int, ...]) -> None:
    operation = getattr(torch.ops.hf_lowrank, name).default
    parts = [part.detach().clone().requires_grad_(part.is_floating_point()) for part in OPERATIONS[name]]
    torch.library.opcheck(operation, (inputs(*shape).requires_grad_(), *parts))


def test_declarations_of_gradients_pass_torchs_own_check() -> None:
    with torch.no_grad():
        x, grad = inputs(5, N), inputs(5, M)
        torch.library.opcheck(torch.ops.hf_lowrank.bitmask_input_grad.default, (grad, *SPARSE, N))
        torch.library.opcheck(torch.ops.hf_lowrank.bitmask_weight_grad.default, (grad, x, LAYER.weight_mask, KEPT))
        torch.library.opcheck(torch.ops.hf_lowrank.binary_input_grad.default, (grad, *BINARY))
        torch.library.opcheck(torch.ops.hf_lowrank.binary_scale_grads.default, (grad, x, *BINARY))


@pytest.mark.parametrize("rows", [1, 5, M])
@pytest.mark.parametrize("name", OPERATIONS)
def test_tiles_do_not_change_the_result(name: str, rows: int, small_tiles: Callable, kernels: dict) -> None:
    def results() -> list[Tensor]:
        x = inputs(4, N, dtype=torch.float64).requires_grad_()
        parts, trainable = [], [x]
        for part in OPERATIONS[name]:
            if part.is_floating_point():
                part = part.detach().double().requires_grad_()
                trainable.append(part)
            parts.append(part)
        y = getattr(ops, name)(x, *parts)
        return [y, *torch.autograd.grad(y.square().sum(), trainable)]

    whole = results()
    small_tiles(rows)
    for tiled, reference in zip(results(), whole, strict=True):
        assert torch.allclose(tiled, reference, rtol=1e-12, atol=1e-12)


def test_the_sum_of_two_parts_is_one_operation(kernels: dict) -> None:
    x = inputs(4, N, dtype=torch.float64)
    parts = [part.double() if part.is_floating_point() else part for part in (*SPARSE, *BINARY)]
    both = ops.bitmask_binary_linear(x, *parts)
    assert torch.allclose(both, ops.bitmask_linear(x, *parts[:2]) + ops.binary_linear(x, *parts[2:]))


class LargestTensor(TorchDispatchMode):
    """Records the number of elements of the largest tensor that any operation creates."""

    def __init__(self) -> None:
        super().__init__()
        self.elements = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        result = func(*args, **(kwargs or {}))
        for tensor in result if isinstance(result, (tuple, list)) else [result]:
            if isinstance(tensor, Tensor):
                self.elements = max(self.elements, tensor.numel())
        return result


@pytest.mark.parametrize("tokens", [1, 64, 4096])
@pytest.mark.parametrize("name", OPERATIONS)
def test_no_tensor_is_larger_than_a_tile_or_the_activations(name: str, tokens: int, small_tiles: Callable) -> None:
    rows = 4
    small_tiles(rows)
    with torch.no_grad(), LargestTensor() as largest:
        getattr(ops, f"plain_{name}")(inputs(tokens, N), *OPERATIONS[name])
    bits_of_a_tile = rows * 8 * LAYER.sign_bits.shape[1]  # unpacked together with their padding
    assert largest.elements <= max(bits_of_a_tile, tokens * max(M, N))


@pytest.mark.parametrize("name", OPERATIONS)
def test_no_unpacked_matrix_waits_for_the_backward_pass(name: str) -> None:
    saved: list[Tensor] = []

    def record(tensor: Tensor) -> Tensor:
        saved.append(tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack_hook=record, unpack_hook=lambda tensor: tensor):
        getattr(ops, name)(inputs(2, N).requires_grad_(), *OPERATIONS[name])
    assert max(tensor.numel() for tensor in saved) < M * N


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", ["bitmask_linear", "binary_linear", "bitmask_binary_linear"])
def test_half_precision_rounds_once(name: str, dtype: torch.dtype) -> None:
    """The plain product of half-precision parts is within one rounding, and float32's, of the exact one."""
    x = inputs(64, N, dtype=dtype)
    parts = [part.detach().to(dtype) if part.is_floating_point() else part for part in OPERATIONS[name]]
    plain = getattr(ops, f"plain_{name}")
    exact = plain(x.double(), *(part.double() if part.is_floating_point() else part for part in parts))
    tolerance = torch.finfo(dtype).eps / 2 * exact.abs() + 1e-5  # the summand is for sums in float32
    assert torch.all((plain(x, *parts).double() - exact).abs() <= tolerance)


def test_the_last_kernel_registered_is_asked_first_and_may_decline(kernels: dict) -> None:
    asked = []

    def kernel(name: str, result: float | None) -> Callable[..., Tensor | None]:
        def answer(x: Tensor, *arguments: Tensor) -> Tensor | None:
            asked.append(name)
            return None if result is None else torch.full((*x.shape[:-1], M), result)

        return answer

    ops.register_kernel("lowrank_linear", "cpu", "first", kernel("first", 1.0))
    ops.register_kernel("lowrank_linear", "cpu", "declines", kernel("declines", None))
    assert ops.registered_kernels("lowrank_linear", "cpu") == ["declines", "first"]
    x = inputs(2, N)
    assert torch.equal(ops.lowrank_linear(x, *LOWRANK), torch.ones(2, M))
    assert asked == ["declines", "first"]


def test_plain_torch_answers_where_every_kernel_declines(kernels: dict) -> None:
    ops.register_kernel("lowrank_linear", "cpu", "declines", lambda *arguments: None)
    x = inputs(2, N)
    assert torch.equal(ops.lowrank_linear(x, *LOWRANK), ops.plain_lowrank_linear(x, *LOWRANK))


def test_a_name_registered_again_replaces_the_first(kernels: dict) -> None:
    ops.register_kernel("lowrank_linear", "cpu", "same", lambda x, *rest: torch.zeros(*x.shape[:-1], M))
    ops.register_kernel("lowrank_linear", "cpu", "same", lambda x, *rest: torch.ones(*x.shape[:-1], M))
    assert ops.registered_kernels("lowrank_linear", "cpu") == ["same"]
    assert torch.equal(ops.lowrank_linear(inputs(2, N), *LOWRANK), torch.ones(2, M))


def test_kernels_of_other_devices_are_not_asked(kernels: dict) -> None:
    def never(*arguments: Tensor) -> Tensor:
        raise AssertionError("a kernel of another device was asked")

    ops.register_kernel("lowrank_linear", "cuda", "never", never)
    ops.lowrank_linear(inputs(2, N), *LOWRANK)
