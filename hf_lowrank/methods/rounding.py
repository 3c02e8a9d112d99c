"""Rounding to grouped levels by second-order means: compensation along inputs and outputs, then descent over single codes."""

import torch
from torch import Tensor
from torch.nn import functional as F

from ..runtime.quantization import BITS, Quantized, group_scales, nearest_codes, nearest_levels, spread_scale
from .second_order import COLUMNS_AT_ONCE, sampled_rows
from .spectral import inverse_cholesky

INPUT_DAMPING = 0.01
OUTPUT_DAMPING = 0.3
"""Added to the diagonals of the Gram matrices of inputs and output gradients, as shares of their means."""
LARGEST_MEASURED_BITS = 4
"""Of the estimates that the allocation goes by; at more bits errors follow the law of fine rounding."""


def searched_scales(weight: Tensor, bits: int, group: int, importance: Tensor) -> Tensor:
    """The best scales (m, ⌈n/group⌉) of the groups of `weight` (m, n) for squared errors weighted by `importance` (n,)."""
    padding = (0, -weight.shape[1] % group)
    groups = F.pad(weight, padding).float().unflatten(1, (-1, group))
    return group_scales(groups, bits, F.pad(importance, padding).float().view(-1, group)).to(weight)


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
        found[bits] = float(row_weights @ (some - nearest_levels(some, scale, bits)).square() @ columns)
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
    # transposed and columns from last to first, so that an antidiagonal is a diagonal; in float32, against which codes are coarse
    W, spread = (each.T.flip(0).float() for each in (weight, spread_scale(scale, group, n)))
    L_C, L_G = (root.float() / root.float().diagonal()[:, None] for root in (input_root, output_root))
    L_C, L_G = L_C.flip(0, 1), L_G.T.contiguous()
    pushed, restored = torch.zeros_like(W), torch.zeros_like(W)  # (E L_C)ᵀ, and what the codes stand for
    for diagonal in range(1 - n, m):
        i, j = slice(max(0, diagonal), min(m, n + diagonal)), slice(max(0, -diagonal), min(n, m - diagonal))
        made_up = torch.linalg.vecdot(L_G[i, : i.stop], pushed[j, : i.stop])
        wanted = W.diagonal(diagonal) - made_up
        rounded = nearest_levels(wanted, spread.diagonal(diagonal), bits)
        restored.diagonal(diagonal).copy_(rounded)
        pushed[: j.stop, i] += L_C[j, : j.stop].T * (wanted - rounded)
    codes = nearest_codes(restored.flip(0).T.to(weight), spread_scale(scale, group, n), bits)
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
    spread = (
        torch.zeros_like(values).masked_scatter(mask, spread_scale(scale, min(group, kept), kept).contiguous())
        / unscale
    )
    S = nearest_levels(values, spread, bits) * mask
    E = ((target - S) @ gram).float().T.contiguous()  # columns as rows, which lie together
    S, spread, kept_here, C = (
        S.float().T.contiguous(),
        spread.float().T.contiguous(),
        mask.T.contiguous(),
        gram.float(),
    )
    for start in range(0, n, COLUMNS_AT_ONCE):
        end = min(start + COLUMNS_AT_ONCE, n)
        before = S[start:end].clone()
        for j in range(start, end):
            new = nearest_levels(S[j] + E[j] / C[j, j], spread[j], bits) * kept_here[j]
            E[j:end] -= torch.outer(C[j:end, j], new - S[j])
            S[j] = new
        E[end:] -= C[end:, start:end] @ (S[start:end] - before)
    quantised = Quantized(nearest_codes(S, spread, bits).T[mask].view(m, kept), scale, bits, min(group, kept))
    return quantised, torch.zeros_like(values).masked_scatter(mask, quantised.dequantize()) / unscale


def gram_root(gram: Tensor | None, features: int, damping: float) -> Tensor:
    """U of (G + λ I)⁻¹ = Uᵀ U, upper triangular; the identity if there is no G or it is zero."""
    if gram is None or not float(gram.diagonal().mean()) > 0:
        return torch.eye(features, dtype=torch.float64)
    return inverse_cholesky(gram, damping)
