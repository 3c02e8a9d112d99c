"""Declares each operation of a compressed layer once, with torch.library, and finds the fastest kernel for it.

The functions of `plain_ops` define what an operation means. A faster back end registers itself with `register_kernel`
for an operation and a type of device.
"""

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any, cast

import torch
from torch import Tensor, is_grad_enabled
from torch.compiler import is_compiling, is_dynamo_compiling
from torch.nn import functional as F

from .errors import CompressionError
from .pivoting import row_sources
from .plain_ops import (
    as_matrix,
    plain_binary_input_grad,
    plain_binary_linear,
    plain_binary_scale_grads,
    plain_bitmask_binary_input_grad,
    plain_bitmask_binary_linear,
    plain_bitmask_input_grad,
    plain_bitmask_linear,
    plain_bitmask_weight_grad,
    plain_lowrank_linear,
    plain_pivoted_linear,
)
from .tracing import dispatch_modes, must_decompose

NAMESPACE = "hf_lowrank"
"""Namespace of the operations in `torch.ops`."""
INFERENCE = "_inference"
"""Ending of the operations that graphs without gradients call, see `declare_inference`."""

Kernel = Callable[..., Tensor | None]
_kernels: dict[tuple[str, str], list[tuple[str, Kernel]]] = {}
"""Names and kernels by operation and type of device. The last one of a list is asked first."""
_direct: dict[str, Kernel] = {}
"""The kernel of an operation that is asked before all others, see `register_direct`."""
_first_use: list[Callable[[], None]] = []
"""Functions to call before the first operation is computed."""


# --- kernels ------------------------------------------------------------------------------------------------------


def register_kernel(operation: str, device_type: str, name: str, kernel: Kernel) -> None:
    """Offer `kernel` for an operation on a type of device. The kernel registered last is asked first.

    A kernel takes the operation's arguments and returns its result, or None where it does not apply (because of
    dtype, CPU features, or the number of tokens). Then the next kernel is asked, and plain torch last of all.
    """
    offered = _kernels.setdefault((operation, device_type), [])
    # A second registration under the same name replaces the first one.
    others = [entry for entry in offered if entry[0] != name]
    offered[:] = [*others, (name, kernel)]


def register_direct(operation: str, kernel: Kernel) -> None:
    """Let `kernel` be asked before all others where neither gradients nor a graph are recorded.

    Such a kernel must cope with any arguments of the operation: it checks their devices, their layouts in memory and
    autocast by itself.
    """
    _direct[operation] = kernel


def unregister_kernels() -> None:
    """Withdraw every kernel, so that plain torch computes from here on."""
    _first_use.clear()
    _kernels.clear()
    _direct.clear()


def on_first_use(load: Callable[[], None]) -> None:
    """Call `load`, which registers kernels, when an operation is first computed."""
    _first_use.append(load)


def registered_kernels(operation: str, device_type: str) -> list[str]:
    """Return the names of the kernels for an operation on a type of device, in the order in which they are asked."""
    return [name for name, _ in reversed(_kernels.get((operation, device_type), []))]


def dispatch(operation: str, x: Tensor, *arguments: Any, plain: Callable[..., Tensor]) -> Tensor:
    """Return the result of the first kernel that takes these arguments, or else of the plain function."""
    result = _by_kernel(operation, x, *arguments)
    return plain(x, *arguments) if result is None else result


def _by_kernel(operation: str, x: Tensor, *arguments: Any) -> Tensor | None:
    """Return the result of the first kernel that takes these arguments, None if there is no such kernel."""
    # Cleared before the call, as a function that registers kernels may compute an operation itself.
    for load in list(_first_use):
        _first_use.clear()
        load()
    for _, kernel in reversed(_kernels.get((operation, x.device.type), ())):
        result = kernel(x, *arguments)
        if result is not None:
            return result
    return None


def autocast(x: Tensor) -> Tensor:
    """Cast x as autocast casts the input of `nn.Linear`, and leave float64 as it is.

    Autocast does not do that by itself for operations that it does not know.
    """
    device_type = x.device.type
    if device_type == "meta":  # a device that autocast does not know
        return x
    if torch.is_autocast_enabled(device_type) and x.is_floating_point() and x.dtype != torch.float64:
        return x.to(torch.get_autocast_dtype(device_type))
    return x


def check_floating_point(x: Tensor) -> None:
    """Raise CompressionError if an input is not of a floating-point type, whose product would be cut to integers."""
    if not x.is_floating_point():
        raise CompressionError(f"the input of a compressed layer is {x.dtype}, expected a floating-point tensor")


def operation(name: str, plain: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """Return a function that computes a declared operation.

    Where neither a graph nor gradients are recorded, it calls a kernel by itself and saves the cost of torch's own
    dispatcher. Where `must_decompose` holds, it computes by `plain`, whose steps are torch's own operations.
    """
    declared = getattr(getattr(torch.ops, NAMESPACE), name)
    inference = getattr(getattr(torch.ops, NAMESPACE), name + INFERENCE)

    # This function is kept short by measurement. A product takes a few hundred microseconds and reads more memory than
    # the caches hold. So every check, attribute or Python frame between two products has to be read from memory again,
    # which costs one to ten microseconds. Hence the direct kernel comes first of all, and autocast only after it.
    def compute(x: Tensor, *arguments: Any) -> Tensor:
        recorded = is_dynamo_compiling() or is_grad_enabled()
        if not recorded and name in _direct:
            result = _direct[name](x, *arguments)
            if result is not None:
                return result
        x = autocast(x)
        check_floating_point(x)
        if must_decompose():
            return plain(x, *arguments)
        if not recorded and not is_compiling() and type(x) is Tensor and not dispatch_modes():
            result = _by_kernel(name, x, *arguments)
            if result is not None:
                return result
        result = declared(x, *arguments) if is_grad_enabled() else inference(x, *arguments)
        return cast(Tensor, result)

    compute.__name__ = name
    return compute


def declare_inference(plain: Mapping[str, Callable[..., Tensor]]) -> None:
    """Declare `<name>_inference` beside each operation: the same without gradients, which compiled graphs call.

    A call of an operation of `torch.library.custom_op` takes three functions of Python, for gradients, for checks and
    for the operation itself, which cost a compiled graph more than its fusions gain. This one is a kernel of the
    dispatcher and nothing else. The C++ back end puts its own in place of it.
    """
    namespace = getattr(torch.ops, NAMESPACE)
    library = torch.library.Library(NAMESPACE, "FRAGMENT")
    for name, function in plain.items():
        declared = getattr(namespace, name).default
        _, _, signature = str(declared._schema).partition("(")
        library.define(f"{name}{INFERENCE}({signature}", tags=(torch.Tag.pt2_compliant_tag,))
        library.impl(name + INFERENCE, partial(_without_gradient, name, function), "CompositeExplicitAutograd")
        torch.library.register_fake(f"{NAMESPACE}::{name}{INFERENCE}", declared, lib=library)
    # The declarations end with the library, which has to stay for as long as the process does.
    setattr(namespace, f"_library_of_{'_and_'.join(plain)}", library)


def _without_gradient(name: str, plain: Callable[..., Tensor], x: Tensor, *arguments: Any) -> Tensor:
    """Compute an operation for a graph without gradients, where C++ has no kernel of the dispatcher for it."""
    result = _direct[name](x, *arguments) if name in _direct else None
    return dispatch(name, x, *arguments, plain=plain) if result is None else result


# --- declarations: implementation, fake (the shape of the result, for torch.compile) and gradient ------------------


def empty_output(x: Tensor, out_features: int) -> Tensor:
    """Return an empty tensor of the shape (..., m), m = `out_features`, for x (..., n)."""
    return x.new_empty(*x.shape[:-1], out_features)


def _declare_bitmask() -> None:
    """Declare the product with a bitmask and its kept values."""

    @torch.library.custom_op(f"{NAMESPACE}::bitmask_linear", mutates_args=())
    def bitmask_linear(x: Tensor, weight: Tensor, weight_mask: Tensor) -> Tensor:
        return dispatch("bitmask_linear", x, weight, weight_mask, plain=plain_bitmask_linear)

    @torch.library.custom_op(f"{NAMESPACE}::bitmask_input_grad", mutates_args=())
    def bitmask_input_grad(grad: Tensor, weight: Tensor, weight_mask: Tensor, columns: int) -> Tensor:
        return dispatch("bitmask_input_grad", grad, weight, weight_mask, columns, plain=plain_bitmask_input_grad)

    @torch.library.custom_op(f"{NAMESPACE}::bitmask_weight_grad", mutates_args=())
    def bitmask_weight_grad(grad: Tensor, x: Tensor, weight_mask: Tensor, kept: int) -> Tensor:
        return plain_bitmask_weight_grad(grad, x, weight_mask, kept)

    @bitmask_linear.register_fake
    def _(x: Tensor, weight: Tensor, weight_mask: Tensor) -> Tensor:
        return empty_output(x, weight_mask.shape[0])

    @bitmask_input_grad.register_fake
    def _(grad: Tensor, weight: Tensor, weight_mask: Tensor, columns: int) -> Tensor:
        return empty_output(grad, columns)

    @bitmask_weight_grad.register_fake
    def _(grad: Tensor, x: Tensor, weight_mask: Tensor, kept: int) -> Tensor:
        return x.new_empty(weight_mask.shape[0], kept, dtype=torch.promote_types(x.dtype, torch.float32))

    bitmask_linear.register_autograd(_bitmask_backward, setup_context=_save_inputs)


def _declare_binary() -> None:
    """Declare the product with signs and scales."""

    @torch.library.custom_op(f"{NAMESPACE}::binary_linear", mutates_args=())
    def binary_linear(x: Tensor, sign_bits: Tensor, scale_in: Tensor, scale_out: Tensor) -> Tensor:
        return dispatch("binary_linear", x, sign_bits, scale_in, scale_out, plain=plain_binary_linear)

    @torch.library.custom_op(f"{NAMESPACE}::binary_input_grad", mutates_args=())
    def binary_input_grad(grad: Tensor, sign_bits: Tensor, scale_in: Tensor, scale_out: Tensor) -> Tensor:
        return dispatch("binary_input_grad", grad, sign_bits, scale_in, scale_out, plain=plain_binary_input_grad)

    @torch.library.custom_op(f"{NAMESPACE}::binary_scale_grads", mutates_args=())
    def binary_scale_grads(
        grad: Tensor, x: Tensor, sign_bits: Tensor, scale_in: Tensor, scale_out: Tensor
    ) -> tuple[Tensor, Tensor]:
        return plain_binary_scale_grads(grad, x, sign_bits, scale_in, scale_out)

    @binary_linear.register_fake
    def _(x: Tensor, sign_bits: Tensor, scale_in: Tensor, scale_out: Tensor) -> Tensor:
        return empty_output(x, sign_bits.shape[0])

    @binary_input_grad.register_fake
    def _(grad: Tensor, sign_bits: Tensor, scale_in: Tensor, scale_out: Tensor) -> Tensor:
        return empty_output(grad, scale_in.shape[1])

    @binary_scale_grads.register_fake
    def _(grad: Tensor, x: Tensor, sign_bits: Tensor, scale_in: Tensor, scale_out: Tensor) -> tuple[Tensor, Tensor]:
        compute = torch.promote_types(x.dtype, torch.float32)
        return torch.empty_like(scale_in, dtype=compute), torch.empty_like(scale_out, dtype=compute)

    binary_linear.register_autograd(_binary_backward, setup_context=_save_inputs)


def _declare_bitmask_binary() -> None:
    """Declare the sum of both products as one operation."""

    @torch.library.custom_op(f"{NAMESPACE}::bitmask_binary_linear", mutates_args=())
    def bitmask_binary_linear(
        x: Tensor, weight: Tensor, weight_mask: Tensor, sign_bits: Tensor, scale_in: Tensor, scale_out: Tensor
    ) -> Tensor:
        parts = (weight, weight_mask, sign_bits, scale_in, scale_out)
        return dispatch("bitmask_binary_linear", x, *parts, plain=plain_bitmask_binary_linear)

    @torch.library.custom_op(f"{NAMESPACE}::bitmask_binary_input_grad", mutates_args=())
    def bitmask_binary_input_grad(
        grad: Tensor, weight: Tensor, weight_mask: Tensor, sign_bits: Tensor, scale_in: Tensor, scale_out: Tensor
    ) -> Tensor:
        parts = (weight, weight_mask, sign_bits, scale_in, scale_out)
        return dispatch("bitmask_binary_input_grad", grad, *parts, plain=plain_bitmask_binary_input_grad)

    @bitmask_binary_linear.register_fake
    def _(
        x: Tensor, weight: Tensor, weight_mask: Tensor, sign_bits: Tensor, scale_in: Tensor, scale_out: Tensor
    ) -> Tensor:
        return empty_output(x, sign_bits.shape[0])

    @bitmask_binary_input_grad.register_fake
    def _(
        grad: Tensor, weight: Tensor, weight_mask: Tensor, sign_bits: Tensor, scale_in: Tensor, scale_out: Tensor
    ) -> Tensor:
        return empty_output(grad, scale_in.shape[1])

    bitmask_binary_linear.register_autograd(_bitmask_binary_backward, setup_context=_save_inputs)


def _declare_lowrank() -> None:
    """Declare the products with ordinary and with pivoted factors."""

    @torch.library.custom_op(f"{NAMESPACE}::lowrank_linear", mutates_args=())
    def lowrank_linear(x: Tensor, lowrank_a: Tensor, lowrank_b: Tensor) -> Tensor:
        return dispatch("lowrank_linear", x, lowrank_a, lowrank_b, plain=plain_lowrank_linear)

    @torch.library.custom_op(f"{NAMESPACE}::pivoted_linear", mutates_args=())
    def pivoted_linear(x: Tensor, lowrank_a: Tensor, lowrank_b: Tensor, lowrank_pivots: Tensor, rows: int) -> Tensor:
        return dispatch("pivoted_linear", x, lowrank_a, lowrank_b, lowrank_pivots, rows, plain=plain_pivoted_linear)

    @lowrank_linear.register_fake
    def _(x: Tensor, lowrank_a: Tensor, lowrank_b: Tensor) -> Tensor:
        return empty_output(x, lowrank_b.shape[0])

    @pivoted_linear.register_fake
    def _(x: Tensor, lowrank_a: Tensor, lowrank_b: Tensor, lowrank_pivots: Tensor, rows: int) -> Tensor:
        return empty_output(x, rows)

    lowrank_linear.register_autograd(_lowrank_backward, setup_context=_save_inputs)
    pivoted_linear.register_autograd(_pivoted_backward, setup_context=_save_pivoted)


# --- backward passes: they keep the packed tensors only, and return None for what has no gradient -------------------


def gradient(plain: Callable[..., Any], *arguments: Any) -> Any:
    """Return what the declared operation of a plain function computes, or the function itself where that is recorded.

    A gradient is recorded to be differentiated in its turn, as by `create_graph=True`. The declared gradients have no
    derivatives of their own, while torch knows those of the plain function's steps.
    """
    if is_grad_enabled():
        return plain(*arguments)
    declared = getattr(getattr(torch.ops, NAMESPACE), plain.__name__.removeprefix("plain_"))
    return declared(*arguments)


def _save_inputs(ctx, inputs, output) -> None:  # type: ignore[no-untyped-def]
    """Keep all arguments of an operation, which are tensors, for its backward pass."""
    ctx.save_for_backward(*inputs)


def _bitmask_backward(ctx, grad):  # type: ignore[no-untyped-def]
    """Return the gradients in x and the kept values."""
    x, weight, weight_mask = ctx.saved_tensors
    grad_x = grad_weight = None
    if ctx.needs_input_grad[0]:
        grad_x = gradient(plain_bitmask_input_grad, grad, weight, weight_mask, x.shape[-1])
    if ctx.needs_input_grad[1]:
        grad_weight = gradient(plain_bitmask_weight_grad, grad, x, weight_mask, weight.shape[1]).to(weight.dtype)
    return grad_x, grad_weight, None


def _binary_backward(ctx, grad):  # type: ignore[no-untyped-def]
    """Return the gradients in x and both scales."""
    x, sign_bits, scale_in, scale_out = ctx.saved_tensors
    grad_x = grad_in = grad_out = None
    if ctx.needs_input_grad[0]:
        grad_x = gradient(plain_binary_input_grad, grad, sign_bits, scale_in, scale_out)
    if ctx.needs_input_grad[2] or ctx.needs_input_grad[3]:
        grad_in, grad_out = gradient(plain_binary_scale_grads, grad, x, sign_bits, scale_in, scale_out)
        grad_in, grad_out = grad_in.to(scale_in.dtype), grad_out.to(scale_out.dtype)
    return grad_x, None, grad_in, grad_out


def _bitmask_binary_backward(ctx, grad):  # type: ignore[no-untyped-def]
    """Return the gradients in x, the kept values and both scales."""
    x, weight, weight_mask, sign_bits, scale_in, scale_out = ctx.saved_tensors
    grad_x = grad_weight = grad_in = grad_out = None
    if ctx.needs_input_grad[0]:
        parts = (weight, weight_mask, sign_bits, scale_in, scale_out)
        grad_x = gradient(plain_bitmask_binary_input_grad, grad, *parts)
    if ctx.needs_input_grad[1]:
        grad_weight = gradient(plain_bitmask_weight_grad, grad, x, weight_mask, weight.shape[1]).to(weight.dtype)
    if ctx.needs_input_grad[4] or ctx.needs_input_grad[5]:
        grad_in, grad_out = gradient(plain_binary_scale_grads, grad, x, sign_bits, scale_in, scale_out)
        grad_in, grad_out = grad_in.to(scale_in.dtype), grad_out.to(scale_out.dtype)
    return grad_x, grad_weight, None, None, grad_in, grad_out


def _lowrank_backward(ctx, grad):  # type: ignore[no-untyped-def]
    """Return the gradients in x, A and B."""
    x, lowrank_a, lowrank_b = ctx.saved_tensors
    inner_grad = grad @ lowrank_b.to(grad.dtype)
    grad_x = inner_grad @ lowrank_a.to(grad.dtype) if ctx.needs_input_grad[0] else None
    grad_a = grad_b = None
    if ctx.needs_input_grad[1]:
        grad_a = (as_matrix(inner_grad).T @ as_matrix(x)).to(lowrank_a.dtype)
    if ctx.needs_input_grad[2]:
        inner = F.linear(x, lowrank_a.to(x.dtype))
        grad_b = (as_matrix(grad).T @ as_matrix(inner)).to(lowrank_b.dtype)
    return grad_x, grad_a, grad_b


def _save_pivoted(ctx, inputs, output) -> None:  # type: ignore[no-untyped-def]
    """Keep the tensors among the arguments of `pivoted_linear` for its backward pass."""
    ctx.save_for_backward(*inputs[:4])


def _pivoted_backward(ctx, grad):  # type: ignore[no-untyped-def]
    """Return the gradients in x, A' and B'."""
    x, lowrank_a, lowrank_b, lowrank_pivots = ctx.saved_tensors
    rows, rank = grad.shape[-1], lowrank_a.shape[0]
    # Bring the entries into the order of the stored factors: first the pivots, then the other rows.
    sorted_grad = grad.index_select(-1, row_sources(lowrank_pivots, rows, rank).argsort())
    pivot_grad, other_grad = sorted_grad[..., :rank], sorted_grad[..., rank:]
    inner_grad = pivot_grad + other_grad @ lowrank_b.to(grad.dtype)
    grad_x = inner_grad @ lowrank_a.to(grad.dtype) if ctx.needs_input_grad[0] else None
    grad_a = grad_b = None
    if ctx.needs_input_grad[1]:
        grad_a = (as_matrix(inner_grad).T @ as_matrix(x)).to(lowrank_a.dtype)
    if ctx.needs_input_grad[2]:
        inner = F.linear(x, lowrank_a.to(x.dtype))
        grad_b = (as_matrix(other_grad).T @ as_matrix(inner)).to(lowrank_b.dtype)
    return grad_x, grad_a, grad_b, None, None


# Operations can be declared only once in a process. A checkpoint's copy of this file finds those of the package, or of
# another checkpoint, and uses them.
if not hasattr(getattr(torch.ops, NAMESPACE), "lowrank_linear"):
    _declare_bitmask()
    _declare_binary()
    _declare_bitmask_binary()
    _declare_lowrank()

if not hasattr(getattr(torch.ops, NAMESPACE), "lowrank_linear" + INFERENCE):
    declare_inference(
        {
            "bitmask_linear": plain_bitmask_linear,
            "binary_linear": plain_binary_linear,
            "bitmask_binary_linear": plain_bitmask_binary_linear,
            "lowrank_linear": plain_lowrank_linear,
            "pivoted_linear": plain_pivoted_linear,
        }
    )

bitmask_linear = operation("bitmask_linear", plain_bitmask_linear)
binary_linear = operation("binary_linear", plain_binary_linear)
bitmask_binary_linear = operation("bitmask_binary_linear", plain_bitmask_binary_linear)
lowrank_linear = operation("lowrank_linear", plain_lowrank_linear)
pivoted_linear = operation("pivoted_linear", plain_pivoted_linear)
