"""Laws of the operations that compiled graphs call: the C++ kernels of torch's dispatcher.

They give the same bits as the general kernels and leave to these whatever they do not read, errors included.
"""

from typing import Any

import pytest
import torch
from torch import Tensor

from hf_lowrank import kernels
from hf_lowrank.kernels.cpu import native, operators, products
from hf_lowrank.runtime import ops, quantized_ops

from .back_ends import DIRECT
from .layers import FORMS, operation_of, random_layer
from .test_direct import misaligned

M, N = 40, 70
each_form = pytest.mark.parametrize("form", FORMS)
with_operators = pytest.mark.skipif(
    native.module() is None or not operators.registered(), reason="no C++ library, or torch is older than 2.10"
)


def inference(form: str) -> Any:
    return getattr(torch.ops.hf_lowrank, operation_of(form) + ops.INFERENCE).default


def arguments_of(form: str, dtype: torch.dtype = torch.bfloat16) -> tuple[Any, ...]:
    return random_layer(M, N, 20, dtype).arguments(form)


def inputs(*leading: int, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    return torch.randn(*leading, N, generator=torch.Generator().manual_seed(1)).to(dtype)


@each_form
def test_declarations_pass_torchs_own_check(form: str) -> None:
    with torch.no_grad():
        torch.library.opcheck(inference(form), (inputs(2, 1), *arguments_of(form)))


@each_form
def test_graphs_without_gradients_call_it_and_graphs_with_gradients_do_not(form: str) -> None:
    called: list[str] = []

    def record(graph: torch.fx.GraphModule, inputs: list[Tensor]) -> Any:
        called.extend(str(node.target) for node in graph.graph.nodes if "hf_lowrank" in str(node.target))
        return graph.forward

    operation = operation_of(form)
    function = getattr(quantized_ops if operation == "quantized_linear" else ops, operation)
    parts, x = arguments_of(form), inputs(2)
    torch.compiler.reset()
    compiled = torch.compile(lambda x: function(x, *parts), fullgraph=True, backend=record)
    with torch.no_grad():
        assert torch.equal(compiled(x), function(x, *parts))
    compiled(x.requires_grad_())
    assert called == [f"hf_lowrank.{operation}{ops.INFERENCE}", f"hf_lowrank.{operation}"]


@with_operators
@each_form
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
def test_it_gives_the_bits_of_the_general_kernel(form: str, dtype: torch.dtype, monkeypatch) -> None:
    parts = arguments_of(form, dtype)
    with monkeypatch.context() as patch, torch.inference_mode():
        # None of the kernels that Python knows is asked.
        patch.setattr(ops, "_kernels", {})
        patch.setattr(ops, "_direct", {})
        few = [inference(form)(inputs(*leading, dtype=dtype), *parts) for leading in ((), (1,), (1, 3), (4, 2, 2))]
    kernel = products.KERNELS[operation_of(form)]
    for y, leading in zip(few, ((), (1,), (1, 3), (4, 2, 2)), strict=True):
        assert torch.equal(y, kernel(inputs(*leading, dtype=dtype), *parts)) and y.shape[:-1] == leading
    with torch.inference_mode():
        for x in (inputs(0, dtype=dtype), inputs(70, dtype=dtype), inputs(2, 3, dtype=dtype).transpose(0, 1)):
            expected = getattr(torch.ops.hf_lowrank, operation_of(form))(x, *parts)
            assert torch.equal(inference(form)(x, *parts), expected)


@each_form
def test_what_does_not_fit_is_as_it_is_for_the_other_operation(form: str) -> None:
    """Each tensor in turn is misaligned or of another dtype."""
    parts, x = arguments_of(form), inputs(2)
    other = getattr(torch.ops.hf_lowrank, operation_of(form))
    given = [x, *parts]
    for index, part in enumerate(given):
        if not isinstance(part, Tensor):
            continue
        changes = [part.double() if part.is_floating_point() else part.float()]
        if part.itemsize > 1:
            changes.append(misaligned(part))
        for changed in changes:
            arguments = [*given[:index], changed, *given[index + 1 :]]
            with torch.inference_mode():
                expected, found = outcome(other, arguments), outcome(inference(form), arguments)
            assert type(expected) is type(found)
            if isinstance(expected, Tensor):
                assert torch.equal(expected, found)


def outcome(function: Any, arguments: list[Any]) -> Tensor | None:
    """Return the result of a call, None where it raises one of the errors for which Python has a class."""
    try:
        result: Tensor = function(*arguments)
    except (RuntimeError, NotImplementedError, TypeError, ValueError):
        return None
    return result


@with_operators
@each_form
def test_no_call_keeps_a_tensor_alive(form: str) -> None:
    for tokens in (1, 40):
        given = [inputs(tokens), *arguments_of(form)]
        tensors = [argument for argument in given if isinstance(argument, Tensor)]
        users = [tensor._use_count() for tensor in tensors]
        for _ in range(3):
            with torch.inference_mode():
                inference(form)(*given)
        assert [tensor._use_count() for tensor in tensors] == users


@with_operators
def test_unloaded_plain_torch_computes() -> None:
    x, parts = inputs(2), arguments_of("bitmask_binary_linear")
    try:
        kernels.unload()
        with torch.no_grad():
            plain = inference("bitmask_binary_linear")(x, *parts)
    finally:
        kernels.load()
    assert torch.equal(plain, ops.plain_bitmask_binary_linear(x, *parts))


def test_every_product_has_one() -> None:
    assert {operation_of(form) for form in FORMS} == set(DIRECT)
