"""Laws of the kernels that take a layer's tensors themselves.

They give the same bits as the general kernels, remember nothing between calls, and keep out of the way of torch's
modes.
"""

from collections.abc import Callable
from copy import deepcopy
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils.parametrize import register_parametrization

from hf_lowrank import SparseLowRankBinaryLinear, SparseLowRankLinear
from hf_lowrank.kernels.cpu import native, products
from hf_lowrank.runtime import ops

from .back_ends import DIRECT
from .layers import FORMS, operation_of, random_layer

pytestmark = pytest.mark.skipif(
    native.module() is None, reason="the C++ library is not built, or torch has no C functions for DLPack"
)
M, N = 40, 70


def inputs(*leading: int, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    return torch.randn(*leading, N, generator=torch.Generator().manual_seed(1)).to(dtype)


def slab(dtype: torch.dtype = torch.bfloat16, bias: bool = False) -> SparseLowRankBinaryLinear:
    parts = random_layer(M, N, 20, dtype)
    layer = SparseLowRankBinaryLinear(N, M, sparse="bitmask", kept=20, binary_rank=1, bias=bias, dtype=dtype)
    names = ("weight", "weight_mask", "sign_bits", "scale_in", "scale_out")
    tensors = {name: getattr(parts, name) for name in names} | ({"bias": torch.ones(M, dtype=dtype)} if bias else {})
    layer.load_state_dict(tensors)
    return layer.requires_grad_(False)


@pytest.fixture
def answered(monkeypatch: pytest.MonkeyPatch) -> list[bool]:
    """Return a list that tells of each call of a direct kernel whether it answered."""
    answers: list[bool] = []

    def watched(kernel: Callable[..., Tensor | None]) -> Callable[..., Tensor | None]:
        def answer(*arguments: Any) -> Tensor | None:
            result = kernel(*arguments)
            answers.append(result is not None)
            return result

        return answer

    monkeypatch.setattr(ops, "_direct", {name: watched(kernel) for name, kernel in ops._direct.items()})
    return answers


@pytest.mark.parametrize("form", FORMS)
def test_it_gives_the_bits_of_the_kernel_that_autograd_reaches(form: str) -> None:
    arguments = random_layer(M, N, 20, torch.bfloat16).arguments(form)
    operation = operation_of(form)
    for leading in ((), (1,), (1, 3), (4, 2, 2)):
        with torch.inference_mode():
            direct = getattr(native.module(), operation)(inputs(*leading), *arguments)
            general = products.KERNELS[operation](inputs(*leading), *arguments)
        assert torch.equal(direct, general) and direct.shape == general.shape and direct.is_contiguous()
        assert direct.is_inference() and not direct.requires_grad


@pytest.mark.parametrize("form", FORMS)
def test_tensors_that_do_not_fit_are_left_to_torch(form: str) -> None:
    kernel = getattr(native.module(), operation_of(form))
    arguments = random_layer(M, N, 20, torch.bfloat16).arguments(form)
    tensors = [index for index, argument in enumerate(arguments) if isinstance(argument, Tensor)]
    assert kernel(inputs(1), *arguments) is not None
    for x in (
        inputs(65),
        inputs(0),
        inputs(1)[:, 9:],
        inputs(1).double(),
        inputs(1).to("meta"),
        torch.tensor(1.0),
        None,
    ):
        assert kernel(x, *arguments) is None
    for index in tensors:
        part = arguments[index]
        # A bitmask may have any number of values, a low-rank part any number of rows.
        short = part[:0] if form == "lowrank_linear" else part[1:]
        narrow = part[..., :-1].contiguous() if index else part[:0]
        for changed in (short, narrow, part.double(), part.to("meta"), part.as_subclass(Named), part.tolist()):
            assert kernel(inputs(1), *arguments[:index], changed, *arguments[index + 1 :]) is None
    assert kernel(inputs(1)) is None


@pytest.mark.parametrize("form", FORMS)
def test_misaligned_memory_is_left_to_torch(form: str) -> None:
    """Tensors that were mapped from a file may begin anywhere."""
    operation, x = operation_of(form), inputs(1)
    arguments = [x, *random_layer(M, N, 20, torch.bfloat16).arguments(form)]
    for index, part in enumerate(arguments):
        if isinstance(part, Tensor) and part.itemsize > 1:
            given = [*arguments[:index], misaligned(part), *arguments[index + 1 :]]
            assert getattr(native.module(), operation)(*given) is None
            assert products.KERNELS[operation](*given) is None


def misaligned(tensor: Tensor) -> Tensor:
    """Return the same values in memory that begins one byte beside a multiple of their size."""
    memory = torch.frombuffer(bytearray(tensor.nbytes + 1), dtype=tensor.dtype, offset=1, count=tensor.numel())
    return memory.view(tensor.shape).copy_(tensor)


@pytest.mark.parametrize(
    ("position", "number"),
    [(3, 2**32 + 4), (3, 2**70), (3, 4.0), (4, 0), (4, 2**31), (4, 2**63 - 1), (5, -1), (5, 2**61), (5, None)],
)
def test_numbers_of_a_quantized_layer_that_do_not_fit(position: int, number: object) -> None:
    """Bits, group and count come from the caller. No product of them may overflow to one that fits."""
    arguments = list(random_layer(M, N, 20, torch.bfloat16, group=2**20).arguments("quantized_linear, bitmask"))
    kernel = native.module().quantized_linear
    assert kernel(inputs(1), *arguments) is not None
    if number == 2**61:
        arguments[0] = arguments[0][:, :0].contiguous()
    arguments[position] = number
    assert kernel(inputs(1), *arguments) is None


class Named(Tensor):
    """A subclass of tensors."""


def test_nothing_is_remembered_of_a_layer(answered: list[bool]) -> None:
    """However a layer's tensors are changed, the next call computes with what they are then."""
    other = slab()
    with torch.no_grad():
        for name, tensor in (*other.named_parameters(), *other.named_buffers()):
            tensor.copy_(tensor.flip(0) if name != "scale_in" else tensor.flip(1))

    def replaced(layer: nn.Module) -> None:
        layer.scale_out = nn.Parameter(-layer.scale_out)
        layer.sign_bits = layer.sign_bits ^ 5

    def repointed(layer: nn.Module) -> None:
        layer.weight.data = layer.weight.data.flip(1)

    def narrowed_twice(layer: nn.Module) -> None:
        layer.half().bfloat16()
        layer.weight.data.mul_(3)

    changes: list[Callable[[nn.Module], Any]] = [
        lambda layer: layer.load_state_dict(other.state_dict()),
        lambda layer: layer.load_state_dict(other.state_dict(), assign=True),
        lambda layer: layer.half(),
        replaced,
        repointed,
        narrowed_twice,
        lambda layer: register_parametrization(layer, "scale_in", nn.Tanh()),
    ]
    x = inputs(1)
    for change in changes:
        layer = slab()
        with torch.no_grad():
            before = layer(x)
            change(layer)
            x = x.to(layer.weight.dtype)
            after = layer(x)
            expected = products.bitmask_binary_linear(
                x, layer.weight, layer.weight_mask, layer.sign_bits, layer.scale_in, layer.scale_out
            )
        assert expected is not None and torch.equal(after, expected) and not torch.equal(after, before.to(after.dtype))
        x = x.bfloat16()
    assert all(answered) and len(answered) == 2 * len(changes)


def test_gradients_wrappers_and_autocast_go_their_own_way(answered: list[bool]) -> None:
    layer, x = slab(torch.float32), inputs(2, dtype=torch.float32)
    with torch.no_grad():
        expected = layer(x)
    assert answered == [True]
    assert torch.equal(layer(x), expected) and layer(x.clone().requires_grad_()).requires_grad and answered == [True]
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        narrow = layer(x)
    assert torch.equal(narrow, deepcopy(layer)(x.bfloat16())) and narrow.dtype == torch.bfloat16
    with torch.no_grad():
        kept = layer(x.as_subclass(Named))
        doubled = torch.func.functional_call(
            layer, {"scale_out": 2 * layer.scale_out, "weight": 2 * layer.weight}, (x,)
        )
    assert type(kept) is Named and torch.equal(doubled, 2 * expected)
    assert answered == [True, False, False, True]


def test_a_compiled_layer_keeps_to_the_declared_operations(answered: list[bool]) -> None:
    with torch.no_grad():
        for layer in (slab(bias=True), SparseLowRankLinear(N, M, rank=9, dtype=torch.bfloat16)):
            compiled = torch.compile(layer, fullgraph=True, backend="eager")
            assert torch.equal(compiled(inputs(2)), layer(inputs(2)))
    assert answered == [True, True]


def test_every_operation_has_one() -> None:
    assert set(ops._direct) == set(DIRECT)
