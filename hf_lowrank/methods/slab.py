"""SLaB: sparse plus low-rank times binary (arXiv 2604.04493)."""

import re
from dataclasses import dataclass, field, replace
from typing import ClassVar

import torch
from torch import Tensor

from ..runtime.configuration import LayerSpec
from ..runtime.errors import CompressionError
from .base import Budget, Decomposition, Layer, Method, Statistics, too_small
from .registry import register_method

POWER_ITERATIONS = 2
"""Per alternation, started from the last one's vectors; |R| is non-negative, so its first singular value stands far apart."""


@register_method("slab")
@dataclass
class SLaB(Method):
    """Sparse plus low-rank times binary: W ≈ W_S + W_L ⊙ W_B, training-free, layer by layer."""

    iterations: int = field(default=20, metadata={"help": "alternations between the binary and the sparse part"})
    binary_rank: int = field(default=1, metadata={"help": "rank of the magnitudes W_L"})
    weighted: bool = field(default=True, metadata={"help": "weight the fit of signs and magnitudes by ‖X_j‖₂, as the sparse step is"})
    pattern: str = field(default="unstructured", metadata={"help": "unstructured, or N:M: at most N of every M consecutive inputs (2:4, 4:8)"})

    source: ClassVar[str] = "SLaB, arXiv 2604.04493"
    sequential: ClassVar[bool] = True

    def __post_init__(self) -> None:
        if self.iterations < 1 or self.binary_rank < 1:
            raise CompressionError(f"slab: iterations={self.iterations}, binary_rank={self.binary_rank}; both must be at least 1")
        parse_pattern(self.pattern)

    def smallest(self, layer: Layer) -> LayerSpec:
        return LayerSpec(kind="sparse_lowrank_binary", sparse="bitmask", kept=0, binary_rank=self.binary_rank)

    def grown(self, layer: Layer, spec: LayerSpec) -> LayerSpec:
        return replace(spec, kept=spec.kept + 1)

    def decompose(self, weight: Tensor, statistics: Statistics, budget: Budget) -> Decomposition:
        """W ≈ W_S + W_L ⊙ W_B, minimising ‖(W − Ŵ) diag(c)‖_F with c_j = ‖X_j‖₂ (papers §3.2, §3.3 item 5).

        With `weighted` the problem is solved for A = W diag(c), whose signs are those of W as c > 0, and c is divided out at the
        end; every step then lowers the loss. Without it, magnitudes are fitted to |R| itself and only the sparse step sees c.
        """
        layer = LayerSpec(kind="sparse_lowrank_binary", sparse="bitmask", binary_rank=self.binary_rank)
        if budget.bits < budget.stored(layer):
            raise too_small(self.name, budget)
        kept = min(budget.kept_per_row(layer), largest_kept(self.pattern, weight.shape[1]))
        c = positive(statistics.column_norms)
        A, score_weight = (weight * c, torch.ones_like(c)) if self.weighted else (weight, c)

        S = torch.zeros_like(A)  # W_S
        V = None
        for _ in range(self.iterations):
            R = A - S
            U, V = leading_components(R.abs(), self.binary_rank, V)  # W_L = U V ≥ 0 for rank 1 (Perron–Frobenius)
            L = U @ V
            B = torch.where((R >= 0) == (L >= 0), 1.0, -1.0)  # sign(R ⊙ W_L), sign(0) := +1
            Y = A - L * B
            mask = largest_per_row((Y * score_weight).abs(), kept, self.pattern)
            S = torch.where(mask, Y, 0.0)

        unweight = c if self.weighted else torch.ones_like(c)
        return Decomposition(sparse="bitmask", weight=S / unweight, mask=mask, signs=B > 0, scale_in=V / unweight, scale_out=U)


def leading_components(matrix: Tensor, rank: int, start: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """U (m, r) and V (r, n) with U V ≈ the best rank-r approximation, by power iteration from `start` (r, n).

    U carries half of the scale of each component, so that both fit a 16-bit range.
    """
    if start is None:
        start = _first_guess(matrix, rank)
    V = start
    for _ in range(POWER_ITERATIONS):
        Q = torch.linalg.qr((matrix @ V.T)).Q if rank > 1 else _normalised(matrix @ V.T)
        V = Q.T @ matrix  # (r, n): Q V is the projection of the matrix onto the span of Q
    scale = V.norm(dim=1).clamp(min=torch.finfo(V.dtype).tiny).sqrt()
    if rank == 1:
        Q, V = Q.abs(), V.abs()
    return Q * scale, V / scale[:, None]


def largest_per_row(scores: Tensor, kept: int, pattern: str = "unstructured") -> Tensor:
    """Mask (m, n) of the `kept` largest scores of every row; under N:M only the N largest of every M inputs may be kept."""
    if pattern != "unstructured":
        n_of, m_of = parse_pattern(pattern)
        groups = scores[:, : scores.shape[1] // m_of * m_of].unflatten(1, (-1, m_of))
        allowed = torch.zeros_like(groups, dtype=torch.bool).scatter_(2, groups.topk(n_of, dim=2).indices, True).flatten(1)
        scores = torch.where(torch.nn.functional.pad(allowed, (0, scores.shape[1] - allowed.shape[1])), scores, -1.0)
    chosen = scores.topk(kept, dim=1, sorted=False).indices
    return torch.zeros(scores.shape, dtype=torch.bool, device=scores.device).scatter_(1, chosen, True)


def largest_kept(pattern: str, in_features: int) -> int:
    """The most values per row that a pattern allows; one less than all of them without a pattern."""
    if pattern == "unstructured":
        return in_features - 1
    n_of, m_of = parse_pattern(pattern)
    return in_features // m_of * n_of


def parse_pattern(pattern: str) -> tuple[int, int]:
    """(N, M) of an N:M pattern; (1, 1) for unstructured.

    Raises:
        CompressionError: if the text is neither "unstructured" nor N:M with 0 < N < M.
    """
    if pattern == "unstructured":
        return 1, 1
    match = re.fullmatch(r"(\d+):(\d+)", pattern)
    if match is None or not 0 < int(match[1]) < int(match[2]):
        raise CompressionError(f"pattern is {pattern!r}, expected 'unstructured' or N:M with 0 < N < M, like 2:4")
    return int(match[1]), int(match[2])


def positive(column_norms: Tensor) -> Tensor:
    """Column norms with zeros (dead channels) raised to a tiny fraction of the mean; ones if all are zero."""
    mean = float(column_norms.mean())
    return column_norms.clamp(min=1e-6 * mean) if mean > 0 else torch.ones_like(column_norms)


def _first_guess(matrix: Tensor, rank: int) -> Tensor:
    guess = torch.rand(rank, matrix.shape[1], dtype=matrix.dtype, generator=torch.Generator().manual_seed(0)).to(matrix.device)
    guess[0] = matrix.sum(dim=0) + torch.finfo(matrix.dtype).tiny  # close to the first right singular vector of a non-negative matrix
    return guess


def _normalised(columns: Tensor) -> Tensor:
    return columns / columns.norm(dim=0).clamp(min=torch.finfo(columns.dtype).tiny)
