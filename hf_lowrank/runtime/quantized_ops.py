"""Declares the product with a quantized matrix. The plain torch functions define its meaning (see `ops`).

One operation serves every layout. Without a bitmap the codes are those of a dense matrix (a kept slice, a factor, a
whole weight). With a bitmap they are those of the kept values. Codes are unpacked one tile of rows at a time and never
saved for the backward pass. Gradients reach the input and the scales, while the codes stay as they are.
"""

import torch
from torch import Tensor
from torch.nn import functional as F

from .ops import INFERENCE, NAMESPACE, declare_inference, dispatch, empty_output, gradient, operation
from .packing import unpack_bits, unpack_values
from .plain_ops import as_matrix, compute_dtype, row_tiles, sum_over_tiles
from .quantization import group_sums, levels, spread_scale, unpack_codes


def plain_quantized_linear(
    x: Tensor, codes: Tensor, scale: Tensor, mask: Tensor | None, bits: int, group: int, kept: int
) -> Tensor:
    """Return Q x for a quantized Q (m, n) and x (..., n).

    Args:
        codes: packed codes of `kept` values per row, uint8 (m, ⌈kept·bits/8⌉, 1).
        scale: (m, ⌈kept/group⌉).
        mask: bitmap that says where the values lie in their row, uint8 (m, ⌈n/8⌉). None where `kept` is n.
        bits, group: bits per code and values per scale, see `quantization`.
    """
    compute = compute_dtype(x)
    y = []
    for rows in row_tiles(codes, x):
        y.append(F.linear(x.to(compute), _unpacked(codes, scale, mask, rows, bits, group, kept, x.shape[-1], compute)))
    return torch.cat(y, dim=-1).to(x.dtype)


def plain_quantized_input_grad(
    grad: Tensor, codes: Tensor, scale: Tensor, mask: Tensor | None, bits: int, group: int, kept: int, columns: int
) -> Tensor:
    """Return Qᵀ g for g (..., m): the gradient of `quantized_linear` in x (..., n), n = `columns`."""

    def unpack_rows(rows: slice, dtype: torch.dtype) -> Tensor:
        return _unpacked(codes, scale, mask, rows, bits, group, kept, columns, dtype)

    return sum_over_tiles(grad, codes, columns, unpack_rows=unpack_rows)


def plain_quantized_scale_grad(
    grad: Tensor, x: Tensor, codes: Tensor, mask: Tensor | None, bits: int, group: int, kept: int
) -> Tensor:
    """Return the gradient of `quantized_linear` in the scales, (m, ⌈kept/group⌉).

    It sums levels times entries of g xᵀ over each group.
    """
    compute = torch.promote_types(x.dtype, torch.float32)
    g, inputs = as_matrix(grad).to(compute), as_matrix(x).to(compute)
    sums = []
    for rows in row_tiles(codes, x):
        outer = g[:, rows].T @ inputs
        if mask is not None:
            outer = outer[unpack_bits(mask[rows], x.shape[-1])].view(-1, kept)
        sums.append(group_sums(outer * levels(unpack_codes(codes[rows], bits, kept), bits, compute), group))
    return torch.cat(sums)


def _unpacked(
    codes: Tensor,
    scale: Tensor,
    mask: Tensor | None,
    rows: slice,
    bits: int,
    group: int,
    kept: int,
    columns: int,
    dtype: torch.dtype,
) -> Tensor:
    """Return some rows of Q as a dense matrix (rows, n), n = `columns`."""
    scale_of_values = spread_scale(scale[rows].to(dtype), group, kept)
    values = levels(unpack_codes(codes[rows], bits, kept), bits, dtype) * scale_of_values
    return values if mask is None else unpack_values(values, unpack_bits(mask[rows], columns))


def _declare() -> None:
    """Declare the operations with torch.library: implementation, fake (for torch.compile) and gradient."""

    @torch.library.custom_op(f"{NAMESPACE}::quantized_input_grad", mutates_args=())
    def quantized_input_grad(
        grad: Tensor, codes: Tensor, scale: Tensor, mask: Tensor | None, bits: int, group: int, kept: int, columns: int
    ) -> Tensor:
        arguments = (codes, scale, mask, bits, group, kept, columns)
        return dispatch("quantized_input_grad", grad, *arguments, plain=plain_quantized_input_grad)

    @torch.library.custom_op(f"{NAMESPACE}::quantized_scale_grad", mutates_args=())
    def quantized_scale_grad(
        grad: Tensor, x: Tensor, codes: Tensor, mask: Tensor | None, bits: int, group: int, kept: int
    ) -> Tensor:
        return plain_quantized_scale_grad(grad, x, codes, mask, bits, group, kept)

    @torch.library.custom_op(f"{NAMESPACE}::quantized_linear", mutates_args=())
    def quantized_linear(
        x: Tensor, codes: Tensor, scale: Tensor, mask: Tensor | None, bits: int, group: int, kept: int
    ) -> Tensor:
        arguments = (codes, scale, mask, bits, group, kept)
        return dispatch("quantized_linear", x, *arguments, plain=plain_quantized_linear)

    @quantized_input_grad.register_fake
    def _(
        grad: Tensor, codes: Tensor, scale: Tensor, mask: Tensor | None, bits: int, group: int, kept: int, columns: int
    ) -> Tensor:
        return empty_output(grad, columns)

    @quantized_scale_grad.register_fake
    def _(grad: Tensor, x: Tensor, codes: Tensor, mask: Tensor | None, bits: int, group: int, kept: int) -> Tensor:
        compute = torch.promote_types(x.dtype, torch.float32)
        return x.new_empty(codes.shape[0], -(-kept // group), dtype=compute)

    @quantized_linear.register_fake
    def _(x: Tensor, codes: Tensor, scale: Tensor, mask: Tensor | None, bits: int, group: int, kept: int) -> Tensor:
        return empty_output(x, codes.shape[0])

    quantized_linear.register_autograd(_backward, setup_context=_save)


def _save(ctx, inputs, output) -> None:  # type: ignore[no-untyped-def]
    """Keep the arguments of the operation for the backward pass, which unpacks the dense matrix again."""
    x, codes, scale, mask, ctx.bits, ctx.group, ctx.kept = inputs
    ctx.save_for_backward(x, codes, scale, mask)


def _backward(ctx, grad):  # type: ignore[no-untyped-def]
    """Return the gradients in x and the scales, None for all other arguments."""
    x, codes, scale, mask = ctx.saved_tensors
    layout = (ctx.bits, ctx.group, ctx.kept)
    grad_x = grad_scale = None
    if ctx.needs_input_grad[0]:
        grad_x = gradient(plain_quantized_input_grad, grad, codes, scale, mask, *layout, x.shape[-1])
    if ctx.needs_input_grad[2]:
        grad_scale = gradient(plain_quantized_scale_grad, grad, x, codes, mask, *layout).to(scale.dtype)
    return grad_x, None, grad_scale, None, None, None, None


# The operations belong to the process, see the end of `ops`.
if not hasattr(getattr(torch.ops, NAMESPACE), "quantized_linear"):
    _declare()
if not hasattr(getattr(torch.ops, NAMESPACE), "quantized_linear" + INFERENCE):
    declare_inference({"quantized_linear": plain_quantized_linear})

quantized_linear = operation("quantized_linear", plain_quantized_linear)
