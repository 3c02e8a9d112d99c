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
"""Directions carried along beside the rank, so that a slowly falling spectrum is still cut in the right place."""
FIRST_PASSES, PASSES = 4, 2
"""Of subspace iteration: from random directions, and from the basis of the last alternation, whose matrix differs little."""


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
        return layer.in_features - 2  # what an N:M pattern does not let be kept goes into the rank

    def decompose(self, weight: Tensor, statistics: Statistics, budget: Budget) -> Decomposition:
        """W ≈ S + B A with A_scaled = W D, D ∝ diag(√mean x_j²): L = SVD_r(W D − S), then S = the largest entries per row of W D − L."""
        rank, kept = self.split(budget)
        d = relative_scales(statistics.column_norms)
        scaled = weight * d
        S, L = torch.zeros_like(scaled), torch.zeros_like(scaled)
        U, V, basis = None, None, None
        for _ in range(self.iterations):
            if rank:
                U, V, basis = truncated(scaled - S, rank, basis)
                L = U @ V
            mask = largest_per_row((scaled - L).abs(), kept, self.pattern)
            S = torch.where(mask, scaled - L, 0.0)
        return Decomposition(
            sparse="bitmask", weight=S / d, mask=mask, lowrank_a=None if V is None else V / d, lowrank_b=U
        )

    def split(self, budget: Budget) -> tuple[int, int]:
        """Rank and kept values per row: r = κ · values / (m + n), the rest sparse; an N:M part is filled first, the rest is rank.

        Raises:
            CompressionError: if no value is left for the sparse part.
        """
        if self.pattern == "unstructured":
            values = (budget.bits - budget.stored(LayerSpec(sparse="bitmask"))) / budget.value_bits
            rank = max(int(self.rank_share * values / (budget.out_features + budget.in_features)), 0)
            kept = budget.kept_per_row(LayerSpec(sparse="bitmask", rank=rank))
            if kept < 1:
                raise too_small(self.name, budget)
            return rank, kept
        kept = self.kept_per_row(budget)
        return budget.rank(LayerSpec(sparse="bitmask", kept=kept)), kept


def truncated(matrix: Tensor, rank: int, basis: Tensor | None = None) -> tuple[Tensor, Tensor, Tensor]:
    """U (m, r) and V (r, n) with U V ≈ SVD_r(matrix), by subspace iteration; and the basis (r + p, n) to start the next call from."""
    passes = FIRST_PASSES if basis is None else PASSES
    if basis is None:
        width = min(rank + OVERSAMPLING, *matrix.shape)
        basis = torch.rand(width, matrix.shape[1], dtype=matrix.dtype, generator=torch.Generator().manual_seed(0)).to(
            matrix.device
        )
    for _ in range(passes):
        Q = torch.linalg.qr(matrix @ basis.T).Q
        basis = Q.T @ matrix
    energies, rotation = torch.linalg.eigh(basis @ basis.T)
    P = rotation[:, -rank:]
    root = energies[-rank:].clamp(min=torch.finfo(energies.dtype).tiny) ** 0.25  # √σ: half of the scale to either side
    return Q @ P * root, P.T @ basis / root[:, None], basis
