"""The product with a quantised matrix, declared once; plain torch is its meaning (see `ops`).

One operation serves every layout: without a bitmap the codes are those of a dense matrix (a kept slice, a factor, a whole weight), with
one they are those of the kept values. Codes are unpacked a tile of rows at a time and never saved for the backward pass; gradients
reach the input and the scales, codes stay as they are.
"""

import torch
from torch import Tensor
from torch.nn import functional as F

from .ops import NAMESPACE, as_matrix, compute_dtype, dispatch, operation, outputs, row_tiles, sum_over_tiles
from .packing import unpack_bits, unpack_values
from .quantization import group_sums, levels, spread_scale, unpack_codes


def plain_quantized_linear(
    x: Tensor, codes: Tensor, scale: Tensor, mask: Tensor | None, bits: int, group: int, kept: int
) -> Tensor:
    """Q x for a quantised Q (m, n); x (..., n).

    Args:
        codes: packed codes of `kept` values per row, uint8 (m, ⌈kept·bits/8⌉, 1).
        scale: (m, ⌈kept/group⌉).
        mask: bitmap of where the values lie in their row, uint8 (m, ⌈n/8⌉); None where `kept` is n.
        bits, group: of the codes, see `quantization`.
    """
    compute = compute_dtype(x)
    y = []
    for rows in row_tiles(codes, x):
        y.append(F.linear(x.to(compute), _unpacked(codes, scale, mask, rows, bits, group, kept, x.shape[-1], compute)))
    return torch.cat(y, dim=-1).to(x.dtype)


def plain_quantized_input_grad(
    grad: Tensor, codes: Tensor, scale: Tensor, mask: Tensor | None, bits: int, group: int, kept: int, columns: int
) -> Tensor:
    """Qᵀ g for g (..., m): the gradient of `quantized_linear` in x (..., n), n = `columns`."""
    return sum_over_tiles(
        grad,
        codes,
        columns,
        lambda rows, dtype: _unpacked(codes, scale, mask, rows, bits, group, kept, columns, dtype),
    )


def plain_quantized_scale_grad(
    grad: Tensor, x: Tensor, codes: Tensor, mask: Tensor | None, bits: int, group: int, kept: int
) -> Tensor:
    """The gradient of `quantized_linear` in the scales, (m, ⌈kept/group⌉): over each group, levels times the entries of g xᵀ."""
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
    values = levels(unpack_codes(codes[rows], bits, kept), bits, dtype) * spread_scale(
        scale[rows].to(dtype), group, kept
    )
    return values if mask is None else unpack_values(values, unpack_bits(mask[rows], columns))


def _declare() -> None:
    @torch.library.custom_op(f"{NAMESPACE}::quantized_input_grad", mutates_args=())
    def quantized_input_grad(
        grad: Tensor, codes: Tensor, scale: Tensor, mask: Tensor | None, bits: int, group: int, kept: int, columns: int
    ) -> Tensor:
        arguments = (codes, scale, mask, bits, group, kept, columns)
        return dispatch("quantized_input_grad", plain_quantized_input_grad, grad, *arguments)

    @torch.library.custom_op(f"{NAMESPACE}::quantized_scale_grad", mutates_args=())
    def quantized_scale_grad(
        grad: Tensor, x: Tensor, codes: Tensor, mask: Tensor | None, bits: int, group: int, kept: int
    ) -> Tensor:
        return plain_quantized_scale_grad(grad, x, codes, mask, bits, group, kept)

    @torch.library.custom_op(f"{NAMESPACE}::quantized_linear", mutates_args=())
    def quantized_linear(
        x: Tensor, codes: Tensor, scale: Tensor, mask: Tensor | None, bits: int, group: int, kept: int
    ) -> Tensor:
        return dispatch("quantized_linear", plain_quantized_linear, x, codes, scale, mask, bits, group, kept)

    quantized_input_grad.register_fake(
        lambda grad, codes, scale, mask, bits, group, kept, columns: outputs(grad, columns)
    )
    quantized_scale_grad.register_fake(
        lambda grad, x, codes, mask, bits, group, kept: x.new_empty(
            codes.shape[0], -(-kept // group), dtype=torch.promote_types(x.dtype, torch.float32)
        )
    )
    quantized_linear.register_fake(lambda x, codes, scale, mask, bits, group, kept: outputs(x, codes.shape[0]))
    quantized_linear.register_autograd(_backward, setup_context=_save)


def _save(ctx, inputs, output) -> None:  # type: ignore[no-untyped-def]
    x, codes, scale, mask, ctx.bits, ctx.group, ctx.kept = inputs
    ctx.save_for_backward(x, codes, scale, mask)


def _backward(ctx, grad):  # type: ignore[no-untyped-def]
    x, codes, scale, mask = ctx.saved_tensors
    form = (ctx.bits, ctx.group, ctx.kept)
    grad_x = grad_scale = None
    if ctx.needs_input_grad[0]:
        grad_x = torch.ops.hf_lowrank.quantized_input_grad(grad, codes, scale, mask, *form, x.shape[-1])
    if ctx.needs_input_grad[2]:
        grad_scale = torch.ops.hf_lowrank.quantized_scale_grad(grad, x, codes, mask, *form).to(scale.dtype)
    return grad_x, None, grad_scale, None, None, None, None


if not hasattr(getattr(torch.ops, NAMESPACE), "quantized_linear"):
    _declare()

quantized_linear = operation("quantized_linear")
