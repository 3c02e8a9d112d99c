"""Rounding to grouped levels by second-order means: compensation along inputs and outputs, descent over codes."""

from collections.abc import Iterator

import torch
from torch import Tensor
from torch.nn import functional as F

from ..runtime.quantization import BITS, Quantized, group_scales, nearest_codes, nearest_levels, spread_scale
from .factorization import inverse_cholesky
from .second_order import COLUMNS_AT_ONCE, sampled_rows

INPUT_DAMPING = 0.01
"""λ that is added to the diagonal of the Gram matrix of the inputs, as a share of its mean."""

OUTPUT_DAMPING = 0.3
"""λ that is added to the diagonal of the Gram matrix of the output gradients, as a share of its mean."""

TILE = 64
"""Side of the tiles of `compensated_both`. What one tile leaves to others is a product of matrices."""

LARGEST_MEASURED_BITS = 4
"""Largest number of bits at which the loss of rounding is measured. Beyond it the law of fine rounding holds."""


def searched_scales(weight: Tensor, bits: int, group: int, importance: Tensor) -> Tensor:
    """Return the scales (m, ⌈n/group⌉) of the groups of `weight` (m, n) that make the weighted squared error least.

    Args:
        importance: weights (n,) of the squared errors.
    """
    # The last group of a row may be shorter. Zeros fill it up, which have no say in its scale.
    padding = (0, -weight.shape[1] % group)
    groups = F.pad(weight, padding).float().unflatten(1, (-1, group))
    return group_scales(groups, bits, F.pad(importance, padding).float().view(-1, group)).to(weight)


def rounding_losses(weight: Tensor, group: int, rows: Tensor, columns: Tensor) -> dict[int, float]:
    """Return about tr(G D C Dᵀ) after `compensated_both`, by bits.

    It is Σ_ij δ_ij² / (U_ii² U_jj²), with δ the errors of rounding each weight by itself, measured on a sample of the
    rows. From `LARGEST_MEASURED_BITS` on each bit halves the distance between levels and divides the loss by four.

    Args:
        weight: (m, n).
        rows, columns: U_ii⁻² (m,) and U_jj⁻² (n,), see `compensated_both`.
    """
    sample, row_weights = sampled_rows(weight, rows)
    # Scales are searched as in `compensated_both`. Its compensation is what the weights U_ii⁻² and U_jj⁻² stand for.
    losses: dict[int, float] = {}
    for bits in BITS:
        if bits > LARGEST_MEASURED_BITS:
            losses[bits] = losses[bits - 1] / 4
            continue
        scale = spread_scale(searched_scales(sample, bits, group, columns), group, weight.shape[1])
        losses[bits] = float(row_weights @ (sample - nearest_levels(sample, scale, bits)).square() @ columns)
    return losses


def compensated_both(weight: Tensor, input_root: Tensor, output_root: Tensor, bits: int, group: int) -> Quantized:
    """Return `weight` (m, n) quantized so that tr(G D C Dᵀ) is small. Entries not yet rounded make up for each error.

    With upper triangular U of (C + λ I)⁻¹ = Uᵀ U and likewise for G, and each divided by its diagonal row by row to
    L_C and L_G, entry (i, j) is rounded from w_ij − (L_Gᵀ E L_C)_ij, E the errors of the entries with i' ≤ i, j' ≤ j.
    The loss that remains is Σ E_ij² / (U_ii² U_jj²), as in GPTQ for G = I (two-sided adaptive rounding: YAQA, arXiv
    2505.22988).

    Args:
        input_root, output_root: U of C, (n, n), and of G, (m, m), see `inverse_cholesky`.
    """
    m, n = weight.shape
    scale = searched_scales(weight, bits, group, input_root.diagonal() ** -2)
    spread = spread_scale(scale, group, n)
    # Float32 is enough, as codes are coarse. Zeros fill up the last tiles: they are rounded to zeros.
    rows, columns = (0, -m % TILE), (0, -n % TILE)
    W, scales = (F.pad(each.float(), columns + rows) for each in (weight, spread))
    L_C = F.pad(_unit_diagonal(input_root), columns + columns)
    L_G = F.pad(_unit_diagonal(output_root), rows + rows)
    E = torch.zeros_like(W)
    pushed = torch.zeros_like(W)  # E L_C
    restored = torch.zeros_like(W)  # the levels that the codes stand for
    for tiles in _independent_tiles(*W.shape):
        # What the tiles to the left and above have left; the tiles' own errors follow entry by entry.
        pushed_before = torch.stack([E[i, : j.start] @ L_C[: j.start, j] for i, j in tiles])
        targets = torch.stack([W[i, j] - L_G[: i.start, i].T @ pushed[: i.start, j] for i, j in tiles])
        levels, errors = _rounded_tiles(
            targets,
            torch.stack([scales[tile] for tile in tiles]),
            pushed_before,
            torch.stack([L_C[j, j] for _, j in tiles]),
            torch.stack([L_G[i, i] for i, _ in tiles]),
            bits,
        )
        for number, (i, j) in enumerate(tiles):
            restored[i, j], E[i, j] = levels[number], errors[number]
            pushed[i, j] = pushed_before[number] + errors[number] @ L_C[j, j]
    codes = nearest_codes(restored[:m, :n].to(weight), spread, bits)
    return Quantized(codes, scale, bits, group)


def _independent_tiles(rows: int, columns: int) -> Iterator[list[tuple[slice, slice]]]:
    """Yield the tiles of a matrix by antidiagonals. Those of one do not depend on each other."""
    down, across = rows // TILE, columns // TILE
    for number in range(down + across - 1):
        first, last = max(0, number - across + 1), min(down, number + 1)
        starts = [(a * TILE, (number - a) * TILE) for a in range(first, last)]
        yield [(slice(i, i + TILE), slice(j, j + TILE)) for i, j in starts]


def _rounded_tiles(
    targets: Tensor, scales: Tensor, pushed: Tensor, L_C: Tensor, L_G: Tensor, bits: int
) -> tuple[Tensor, Tensor]:
    """Return the levels of tiles and their errors E, by `compensated_both` within each tile.

    All arguments and results are (tiles, t, t).

    Args:
        targets: the tiles of W less what the rows above have left.
        pushed: the tiles of E L_C that the columns to the left have left.
    """
    # Entries of an antidiagonal do not depend on each other and are rounded together. Transposed, and with columns
    # from last to first, an antidiagonal is a diagonal.
    W, spread, pushed = (each.mT.flip(1).contiguous() for each in (targets, scales, pushed))
    L_C, L_G = L_C.flip(1, 2), L_G.mT.contiguous()
    restored, E = torch.zeros_like(W), torch.zeros_like(W)
    for diagonal in range(1 - TILE, TILE):
        i = slice(max(0, diagonal), min(TILE, TILE + diagonal))
        j = slice(max(0, -diagonal), min(TILE, TILE - diagonal))
        compensation = torch.linalg.vecdot(L_G[:, i, : i.stop], pushed[:, j, : i.stop])
        adjusted = W.diagonal(diagonal, 1, 2) - compensation
        rounded = nearest_levels(adjusted, spread.diagonal(diagonal, 1, 2), bits)
        errors = adjusted - rounded
        restored.diagonal(diagonal, 1, 2).copy_(rounded)
        E.diagonal(diagonal, 1, 2).copy_(errors)
        pushed[:, : j.stop, i] += L_C[:, j, : j.stop].mT * errors[:, None]
    return restored.flip(1).mT, E.flip(1).mT


def _unit_diagonal(root: Tensor) -> Tensor:
    """Return a matrix with every row divided by its entry on the diagonal, in float32."""
    root = root.float()
    return root / root.diagonal()[:, None]


def rounded_values(
    target: Tensor, gram: Tensor, mask: Tensor, values: Tensor, unscale: Tensor, bits: int, group: int
) -> tuple[Quantized, Tensor]:
    """Return kept values rounded, as codes (m, k) and dense (m, n).

    Each goes to its nearest level. Then one pass of coordinate descent over the columns improves the codes.

    Args:
        target: the matrix that the values stand for in the metric of `gram`, (m, n).
        mask: (m, n), with k entries True in each row.
        values: (m, n), zero off the mask.
        unscale: (n,); the values are stored as values · unscale.
    """
    m, n = mask.shape
    stored = (values * unscale)[mask].view(m, -1)
    kept = stored.shape[1]
    group = min(group, kept)
    scale = searched_scales(stored, bits, group, torch.ones_like(stored[0]))
    # The scale of every kept value, at its place in the matrix and without `unscale`, as the descent is on W diag(d).
    stored_scale = spread_scale(scale, group, kept).contiguous()
    spread = torch.zeros_like(values).masked_scatter(mask, stored_scale) / unscale
    S = nearest_levels(values, spread, bits) * mask
    # The matrices are transposed: a column of the problem is a row here, which lies together in memory.
    E = ((target - S) @ gram).float().T.contiguous()
    S = S.float().T.contiguous()
    spread = spread.float().T.contiguous()
    is_kept = mask.T.contiguous()
    C = gram.float()
    for start in range(0, n, COLUMNS_AT_ONCE):
        end = min(start + COLUMNS_AT_ONCE, n)
        before = S[start:end].clone()
        # The best value for entry j, all others fixed, is S_j + E_j / C_jj. Its nearest level is the best code.
        for j in range(start, end):
            new = nearest_levels(S[j] + E[j] / C[j, j], spread[j], bits) * is_kept[j]
            E[j:end] -= torch.outer(C[j:end, j], new - S[j])
            S[j] = new
        E[end:] -= C[end:, start:end] @ (S[start:end] - before)
    codes = nearest_codes(S, spread, bits).T[mask].view(m, kept)
    quantized = Quantized(codes, scale, bits, group)
    dense = torch.zeros_like(values).masked_scatter(mask, quantized.dequantize()) / unscale
    return quantized, dense


def gram_root(gram: Tensor | None, features: int, damping: float) -> Tensor:
    """Return the upper triangular U of (G + λ I)⁻¹ = Uᵀ U, or the identity without a G or for G = 0."""
    if gram is None or not float(gram.diagonal().mean()) > 0:
        return torch.eye(features, dtype=torch.float64)
    return inverse_cholesky(gram, damping)
