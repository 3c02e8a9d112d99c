"""Rounding to grouped levels by second-order means: compensation along inputs and outputs, then descent over single codes."""

import torch
from torch import Tensor

from ..runtime.quantization import BITS, Quantized, group_scales, levels, nearest_codes, spread_scale
from .second_order import sampled_rows
from .spectral import inverse_cholesky

INPUT_DAMPING = 0.01
OUTPUT_DAMPING = 0.3
"""Added to the diagonals of the Gram matrices of inputs and output gradients, as shares of their means."""
LARGEST_MEASURED_BITS = 4
"""Of the estimates that the allocation goes by; at more bits errors follow the law of fine rounding."""


def searched_scales(weight: Tensor, bits: int, group: int, importance: Tensor) -> Tensor:
    """The best scales (m, ⌈n/group⌉) of the groups of `weight` (m, n) for squared errors weighted by `importance` (n,)."""
    starts = range(0, weight.shape[1], group)
    return torch.stack([group_scales(weight[:, at : at + group], bits, importance[at : at + group]) for at in starts], dim=1)


def rounding_losses(weight: Tensor, group: int, rows: Tensor, columns: Tensor) -> dict[int, float]:
    """About tr(G D C Dᵀ) after `compensated_both`, by bits: Σ_ij δ_ij² / (U_ii² U_jj²), δ the errors of rounding each weight by itself.

    Measured on a sample of the rows up to `LARGEST_MEASURED_BITS`; from there on each bit divides the loss by four.

    Args:
        weight: (m, n).
        rows, columns: U_ii⁻² (m,) and U_jj⁻² (n,), see `compensated_both`.
    """
    some, row_weights = sampled_rows(weight, rows)
    found: dict[int, float] = {}
    for bits in BITS:
        if bits > LARGEST_MEASURED_BITS:
            found[bits] = found[bits - 1] / 4
            continue
        scale = spread_scale(searched_scales(some, bits, group, columns), group, weight.shape[1])
        restored = levels(nearest_codes(some, scale, bits), bits, weight.dtype) * scale
        found[bits] = float(row_weights @ (some - restored).square() @ columns)
    return found


def compensated_both(weight: Tensor, input_root: Tensor, output_root: Tensor, bits: int, group: int) -> Quantized:
    """`weight` (m, n) quantised so that tr(G D C Dᵀ) is small: inputs and outputs not yet rounded make up for each error.

    With upper triangular U of (C + λ I)⁻¹ = Uᵀ U and likewise for G, and each divided by its diagonal row by row to L_C and L_G, entry
    (i, j) is rounded from w_ij − (L_Gᵀ E L_C)_ij, E the errors of the entries with i' ≤ i, j' ≤ j. What remains is
    Σ E_ij² / (U_ii² U_jj²), as in GPTQ for G = I (two-sided adaptive rounding: YAQA, arXiv 2505.22988). Antidiagonals are independent.

    Args:
        input_root, output_root: U of C, (n, n), and of G, (m, m), see `inverse_cholesky`.
    """
    m, n = weight.shape
    scale = searched_scales(weight, bits, group, input_root.diagonal() ** -2)
    spread = spread_scale(scale, group, n)
    L_C, L_G = (root / root.diagonal()[:, None] for root in (input_root, output_root))
    pushed = torch.zeros_like(weight)  # E L_C
    codes = torch.zeros(m, n, dtype=torch.uint8, device=weight.device)
    for diagonal in range(m + n - 1):
        first, last = max(0, diagonal - n + 1), min(m, diagonal + 1)
        i = torch.arange(first, last, device=weight.device)
        j = diagonal - i
        made_up = (L_G[:last, first:last] * pushed[:last, diagonal - last + 1 : diagonal - first + 1].flip(1)).sum(dim=0)
        wanted = weight[i, j] - made_up
        codes[i, j] = nearest_codes(wanted, spread[i, j], bits)
        error = wanted - levels(codes[i, j], bits, weight.dtype) * spread[i, j]
        pushed[first:last] += error[:, None] * L_C[j]
    return Quantized(codes, scale, bits, group)


def rounded_values(
    target: Tensor, gram: Tensor, mask: Tensor, values: Tensor, unscale: Tensor, bits: int, group: int
) -> tuple[Quantized, Tensor]:
    """Kept values as codes, (m, k), and dense, (m, n): each to its nearest level, then one pass of descent over columns of codes.

    Args:
        target: what the values stand for in the metric of `gram`, (m, n).
        mask: (m, n), k True per row. values: (m, n), zero elsewhere.
        unscale: (n,); what is stored is values · unscale.
    """
    m, n = mask.shape
    stored = (values * unscale)[mask].view(m, -1)
    kept = stored.shape[1]
    scale = searched_scales(stored, bits, min(group, kept), torch.ones_like(stored[0]))
    spread = torch.zeros_like(values).masked_scatter(mask, spread_scale(scale, min(group, kept), kept).contiguous()) / unscale
    codes = nearest_codes(values, spread, bits)
    S = torch.where(mask, levels(codes, bits, values.dtype) * spread, 0.0)
    E = (target - S) @ gram
    for j in range(n):
        wanted = S[:, j] + E[:, j] / gram[j, j]
        codes[:, j] = nearest_codes(wanted, spread[:, j], bits)
        new = torch.where(mask[:, j], levels(codes[:, j], bits, values.dtype) * spread[:, j], 0.0)
        E -= torch.outer(new - S[:, j], gram[j])
        S[:, j] = new
    return Quantized(codes[mask].view(m, kept), scale, bits, min(group, kept)), S


def gram_root(gram: Tensor | None, features: int, damping: float) -> Tensor:
    """U of (G + λ I)⁻¹ = Uᵀ U, upper triangular; the identity if there is no G or it is zero."""
    if gram is None or not float(gram.diagonal().mean()) > 0:
        return torch.eye(features, dtype=torch.float64)
    return inverse_cholesky(gram, damping)
