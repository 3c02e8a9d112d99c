"""Stores a product of rank r, (m, n), in r (m + n − r) values instead of r (m + n), without any loss.

Of the m rows, r are stored as they are, the pivots. Every other row is stored as a mixture of these:
B A = P [I; B'] A', where A' (r, n) holds the pivot rows of B A, and B' (m − r, r) the mixtures. The identity block is
not stored. The permutation P says which rows are the pivots, in one bit per row.
"""

import torch
from torch import Tensor

from .errors import CompressionError, NumericalError
from .packing import unpack_bits

LARGEST_ENTRY = 1.02
"""Bound on the entries of B'. A bound below 1 cannot always be met.

Every swap of `_dominant_rows` multiplies a determinant by more than this bound, so there are only a few swaps.
"""


def pivot(lowrank_a: Tensor, lowrank_b: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return the pivoted form of B A, computed in float64 and given in the dtype of the factors.

    The pivots start with those of an LU factorization. One row at a time is then swapped, as long as a swap increases
    their determinant by more than the factor `LARGEST_ENTRY`. That bounds the entries of B', whatever the singular
    values of B A are (Goreinov, Oseledets, Savostyanov, Tyrtyshnikov and Zamarashkin, How to find a good submatrix,
    2010). B may be rank-deficient.

    Args:
        lowrank_a: A, (r, n).
        lowrank_b: B, (m, r), r ≤ m.

    Returns:
        A' (r, n), B' (m − r, r), and the pivots, (m,) booleans of which r are True. The rows of A' and of B' are in
        the order that they have in B A.

    Raises:
        CompressionError: if r > m.
        NumericalError: if B is not finite.
    """
    a, b = lowrank_a.double(), lowrank_b.double()
    if b.shape[1] > b.shape[0]:
        raise CompressionError(
            f"a factor B of shape {tuple(b.shape)} has more columns than rows; "
            "its product is smaller as a plain matrix"
        )
    if not bool(b.isfinite().all()):
        raise NumericalError(
            "a factor B to be pivoted has entries that are not finite; look at the layer's weight and statistics"
        )
    Q = torch.linalg.qr(b).Q  # the same column space as B's, well conditioned
    chosen, mixture = _dominant_rows(Q)
    # The stored rows are in their order in B A, so that the bitmap of the pivots is all that has to be kept.
    chosen, order = chosen.sort()
    pivots = torch.zeros(b.shape[0], dtype=torch.bool, device=b.device)
    pivots[chosen] = True
    return (b[chosen] @ a).to(lowrank_a.dtype), mixture[~pivots][:, order].to(lowrank_b.dtype), pivots


def unpivot(lowrank_b: Tensor, pivots: Tensor) -> Tensor:
    """Return the ordinary left factor (m, r) that belongs to the right factor A': P times I above B'.

    Args:
        lowrank_b: B', (m − r, r).
        pivots: (m,) booleans of which r are True.
    """
    rank = lowrank_b.shape[1]
    dense = lowrank_b.new_zeros(pivots.shape[0], rank)
    dense[pivots] = torch.eye(rank, dtype=dense.dtype, device=dense.device)
    dense[~pivots] = lowrank_b
    return dense


def row_sources(lowrank_pivots: Tensor, rows: int, rank: int) -> Tensor:
    """Return where each of the m rows lies in a list that has the pivots first and the other rows after them.

    No device has to be waited for, as no value is read on the host.

    Args:
        lowrank_pivots: bitmap of the pivots, uint8 (⌈m/8⌉,).
        rows, rank: m and r.

    Returns:
        (m,) int64.
    """
    pivots = unpack_bits(lowrank_pivots, rows)
    before = pivots.cumsum(dim=0, dtype=torch.int64)  # number of pivots up to and including this row
    return torch.where(pivots, before - 1, rank + torch.arange(rows, device=pivots.device) - before)


def _dominant_rows(Q: Tensor) -> tuple[Tensor, Tensor]:
    """Return the rows (r,) of Q (m, r) with a locally largest determinant, and Q Q_chosen⁻¹, (m, r)."""
    rows, rank = Q.shape
    if rank == 0:
        return torch.zeros(0, dtype=torch.int64, device=Q.device), Q
    # Start from the rows that partial pivoting moves to the top. LAPACK lists its interchanges, rows counted from one.
    _, swaps = torch.linalg.lu_factor(Q)
    order = list(range(rows))
    for step, row in enumerate(swaps.tolist()):
        order[step], order[row - 1] = order[row - 1], order[step]
    chosen = torch.tensor(order[:rank], device=Q.device)
    mixture = torch.linalg.solve(Q[chosen], Q, left=False)
    while True:
        # Entry (i, j) is the factor by which the determinant grows if row i takes the place of the j-th chosen row.
        row, column = divmod(int(mixture.abs().argmax()), rank)
        largest = mixture[row, column]
        if abs(float(largest)) <= LARGEST_ENTRY:
            return chosen, torch.linalg.solve(Q[chosen], Q, left=False)
        # Swap the two rows; the mixtures change by a matrix of rank one (Sherman and Morrison's formula).
        change = mixture[row].clone()
        change[column] -= 1
        mixture -= torch.outer(mixture[:, column] / largest, change)
        chosen[column] = row
