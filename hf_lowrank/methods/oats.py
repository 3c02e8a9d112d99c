"""OATS: outlier-aware sparse plus low rank (arXiv 2409.13652)."""

from dataclasses import dataclass, field
from typing import ClassVar

import torch
from torch import Tensor

from ..budget import Budget, Layer
from ..runtime.configuration import LayerSpec
from ..runtime.errors import CompressionError
from .base import Decomposition, Statistics, too_small
from .registry import register_method
from .sparsity import PATTERN_HELP, SparseMethod, largest_per_row, relative_scales

OVERSAMPLING = 16
"""Number of directions carried along beside the rank. A slowly falling spectrum is then cut in the right place."""

FIRST_PASSES = 4
"""Passes of subspace iteration from random directions."""

PASSES = 2
"""Passes of subspace iteration from the basis of the last alternation, whose matrix differs little."""


@register_method("oats")
@dataclass
class OATS(SparseMethod):
    """Sparse plus low rank, alternating thresholding on the weight scaled by the root mean square of its inputs."""

    pattern: str = field(default="unstructured", metadata={"help": PATTERN_HELP})
    iterations: int = field(default=80, metadata={"help": "alternations between the low-rank and the sparse part"})
    rank_share: float = field(
        default=0.25, metadata={"help": "κ, share of the stored values that is low rank; N:M sets it by itself"}
    )

    source: ClassVar[str] = "OATS, arXiv 2409.13652"
    sequential: ClassVar[bool] = True

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.iterations < 1 or not 0 <= self.rank_share < 1:
            raise CompressionError(
                f"oats: iterations={self.iterations} must be at least 1, rank_share={self.rank_share} in [0, 1)"
            )

    def max_steps(self, layer: Layer) -> int:
        # What an N:M pattern does not let be kept goes into the rank, so the pattern sets no limit here.
        return layer.in_features - 2

    def decompose(self, weight: Tensor, statistics: Statistics, budget: Budget) -> Decomposition:
        """W ≈ S + L by alternating thresholding of A = W D, D ∝ diag(√mean x_j²) (arXiv 2409.13652).

        L = SVD_r(A − S), then S = the largest entries per row of A − L. Both are multiplied by D⁻¹ at the end.
        """
        rank, kept = self.split(budget)
        # Column norms are √T times the root mean square, and a common factor of D cancels.
        d = relative_scales(statistics.column_norms)
        A = weight * d
        S, L = torch.zeros_like(A), torch.zeros_like(A)
        U, V, basis = None, None, None
        for _ in range(self.iterations):
            # Each call starts from the last basis, as A − S changes little between alternations.
            if rank:
                U, V, basis = truncated(A - S, rank, basis)
                L = U @ V
            mask = largest_per_row((A - L).abs(), kept, self.pattern)
            S = torch.where(mask, A - L, 0.0)
        if V is not None:
            V = V / d
        return Decomposition(sparse="bitmask", weight=S / d, mask=mask, lowrank_a=V, lowrank_b=U)

    def split(self, budget: Budget) -> tuple[int, int]:
        """Return the rank and the kept values per row.

        Without a pattern r = κ · values / (m + n), and the rest is sparse. With an N:M pattern the sparse part is
        filled first, and the rest is rank.

        Raises:
            CompressionError: if no value is left for the sparse part.
        """
        if self.pattern == "unstructured":
            values = (budget.bits - budget.stored(LayerSpec(sparse="bitmask"))) / budget.value_bits
            rank = max(int(self.rank_share * values / (budget.out_features + budget.in_features)), 0)
            # A row keeps at least one value beside the rank.
            rank = min(rank, budget.rank(LayerSpec(sparse="bitmask", kept=1)))
            kept = budget.kept_per_row(LayerSpec(sparse="bitmask", rank=rank))
            if kept < 1:
                raise too_small(self.name, budget)
            return rank, kept
        kept = self.kept_per_row(budget)
        return budget.rank(LayerSpec(sparse="bitmask", kept=kept)), kept


def truncated(matrix: Tensor, rank: int, basis: Tensor | None = None) -> tuple[Tensor, Tensor, Tensor]:
    """Return U (m, r) and V (r, n) with U V ≈ SVD_r(matrix), by subspace iteration, and the basis for the next call.

    Args:
        basis: (r + p, n), p = `OVERSAMPLING`, from the last call, to start from; random without one.
    """
    passes = PASSES
    if basis is None:
        passes = FIRST_PASSES
        width = min(rank + OVERSAMPLING, *matrix.shape)
        generator = torch.Generator().manual_seed(0)
        basis = torch.rand(width, matrix.shape[1], dtype=matrix.dtype, generator=generator).to(matrix.device)
    for _ in range(passes):
        Q = torch.linalg.qr(matrix @ basis.T).Q
        basis = Q.T @ matrix
    # Within the span of Q the truncated SVD is exact: the eigenvectors of (Qᵀ M)(Qᵀ M)ᵀ are its left singular vectors.
    energies, rotation = torch.linalg.eigh(basis @ basis.T)
    P = rotation[:, -rank:]
    root = energies[-rank:].clamp(min=torch.finfo(energies.dtype).tiny) ** 0.25  # √σ: half of the scale to either side
    return Q @ P * root, P.T @ basis / root[:, None], basis
