"""A product of rank r, (m, n), in r (m + n − r) values instead of r (m + n): r of its rows, and every other row as a mixture of these.

B A = P [I; B'] A' with A' = the pivot rows of B A, (r, n), and B', (m − r, r). The identity is not stored; P only says which rows are the
pivots, one bit per row. Nothing is lost.
"""

import torch
from torch import Tensor

from .errors import CompressionError, NumericalError
from .packing import unpack_bits

LARGEST_ENTRY = 1.02
"""Bound on |B'|: every swap multiplies a volume by more than this, so there are few; a bound below 1 cannot always be met."""


def pivot(lowrank_a: Tensor, lowrank_b: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The pivoted form of B A, computed in float64 and given in the dtype of the factors.

    The pivots are the rows of B whose determinant, made from the LU factorization's by swaps of one row, no other swap increases by more
    than `LARGEST_ENTRY`; that is what bounds the entries of B', whatever the singular values of B A (Goreinov, Oseledets, Savostyanov,
    Tyrtyshnikov and Zamarashkin, How to find a good submatrix, 2010). B may be rank-deficient.

    Args:
        lowrank_a: A, (r, n).
        lowrank_b: B, (m, r), r ≤ m.

    Returns:
        A' (r, n), B' (m − r, r), and the pivots, (m,) booleans of which r are True. Rows of both are in their order in B A.

    Raises:
        CompressionError: if r > m.
        NumericalError: if B is not finite.
    """
    a, b = lowrank_a.double(), lowrank_b.double()
    if b.shape[1] > b.shape[0]:
        raise CompressionError(
            f"a factor B of shape {tuple(b.shape)} has more columns than rows; its product is smaller as a plain matrix"
        )
    if not bool(b.isfinite().all()):
        raise NumericalError(
            "a factor B to be pivoted has entries that are not finite; look at the layer's weight and statistics"
        )
    Q = torch.linalg.qr(b).Q  # the same column space, well conditioned
    chosen, mixture = _dominant_rows(Q)
    chosen, order = chosen.sort()
    pivots = torch.zeros(b.shape[0], dtype=torch.bool, device=b.device)
    pivots[chosen] = True
    return (b[chosen] @ a).to(lowrank_a.dtype), mixture[~pivots][:, order].to(lowrank_b.dtype), pivots


def unpivot(lowrank_b: Tensor, pivots: Tensor) -> Tensor:
    """P [I; B'], (m, r), from B' (m − r, r) and the pivots (m,): the ordinary left factor, whose right factor is A'."""
    rank = lowrank_b.shape[1]
    dense = lowrank_b.new_zeros(pivots.shape[0], rank)
    dense[pivots] = torch.eye(rank, dtype=dense.dtype, device=dense.device)
    dense[~pivots] = lowrank_b
    return dense


def row_sources(lowrank_pivots: Tensor, rows: int, rank: int) -> Tensor:
    """Where each of m rows lies among first the pivots, then the others: (m,) int64, from uint8 (⌈m/8⌉,). No device is waited for."""
    pivots = unpack_bits(lowrank_pivots, rows)
    before = pivots.cumsum(dim=0)  # pivots up to and including this row
    return torch.where(pivots, before - 1, rank + torch.arange(rows, device=pivots.device) - before)


def _dominant_rows(Q: Tensor) -> tuple[Tensor, Tensor]:
    """The rows (r,) of Q (m, r) with a locally largest determinant, and Q Q_chosen⁻¹, (m, r)."""
    rows, rank = Q.shape
    if rank == 0:
        return torch.zeros(0, dtype=torch.int64, device=Q.device), Q
    _, swaps = torch.linalg.lu_factor(Q)
    order = list(range(rows))
    for step, row in enumerate(swaps.tolist()):  # LAPACK's interchanges, counted from one
        order[step], order[row - 1] = order[row - 1], order[step]
    chosen = torch.tensor(order[:rank], device=Q.device)
    mixture = torch.linalg.solve(Q[chosen], Q, left=False)
    while True:
        row, column = divmod(int(mixture.abs().argmax()), rank)
        largest = mixture[row, column]
        if abs(float(largest)) <= LARGEST_ENTRY:
            return chosen, torch.linalg.solve(Q[chosen], Q, left=False)
        change = mixture[row].clone()
        change[column] -= 1
        mixture -= torch.outer(mixture[:, column] / largest, change)
        chosen[column] = row
