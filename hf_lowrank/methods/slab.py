"""SLaB: sparse plus low-rank times binary (arXiv 2604.04493)."""

from dataclasses import dataclass, field, replace
from typing import ClassVar

import torch
from torch import Tensor

from ..budget import Budget, Layer
from ..models.linears import row_chunks
from ..runtime.configuration import LayerSpec
from ..runtime.errors import CompressionError
from .base import Decomposition, Method, Statistics, too_small
from .factorization import leading_components
from .registry import register_method
from .sparsity import PATTERN_HELP, largest_kept, largest_per_row, parse_pattern, relative_scales


@register_method("slab")
@dataclass
class SLaB(Method):
    """Sparse plus low-rank times binary: W ≈ W_S + W_L ⊙ W_B, training-free, layer by layer."""

    iterations: int = field(default=20, metadata={"help": "alternations between the binary and the sparse part"})
    binary_rank: int = field(default=1, metadata={"help": "rank of the magnitudes W_L"})
    weighted: bool = field(
        default=False, metadata={"help": "weight the fit of signs and magnitudes by ‖X_j‖₂, as the sparse step is"}
    )
    pattern: str = field(default="unstructured", metadata={"help": PATTERN_HELP})

    source: ClassVar[str] = "SLaB, arXiv 2604.04493"
    sequential: ClassVar[bool] = True
    factorizes: ClassVar[bool] = False

    def __post_init__(self) -> None:
        if self.iterations < 1 or self.binary_rank < 1:
            raise CompressionError(
                f"slab: iterations={self.iterations}, binary_rank={self.binary_rank}; both must be at least 1"
            )
        parse_pattern(self.pattern)

    def min_spec(self, layer: Layer) -> LayerSpec:
        return LayerSpec(kind="sparse_lowrank_binary", sparse="bitmask", kept=0, binary_rank=self.binary_rank)

    def next_spec(self, layer: Layer, spec: LayerSpec) -> LayerSpec:
        return replace(spec, kept=spec.kept + 1)

    def max_steps(self, layer: Layer) -> int:
        return largest_kept(self.pattern, layer.in_features)

    def decompose(self, weight: Tensor, statistics: Statistics, budget: Budget) -> Decomposition:
        """W ≈ W_S + W_L ⊙ W_B, minimizing ‖(W − Ŵ) diag(c)‖_F with c_j = ‖X_j‖₂ (arXiv 2604.04493).

        An alternation of the paper has these steps:

            R = W − W_S,   W_B = sign(R),   W_L = the best rank-r approximation of |R|,
            W_S = Y on the entries of each row with the largest |Y_ij| c_j,   Y = W − W_L ⊙ W_B.

        Here W_S starts at zero, and the signs are those of R ⊙ W_L. For r = 1 they are the paper's, because W_L ≥ 0
        (Perron–Frobenius), and signs and magnitudes are jointly optimal. For r > 1 magnitudes may be negative, and
        these signs are the best ones for them.

        R then keeps the signs of W: it is W where nothing is kept, and |W_L| with the sign that it had where a value
        is. So the alternation runs on magnitudes alone, with |Y| = ||W| − |W_L||, in float32. Values and signs follow
        at its end.

        With `weighted` the problem is solved for A = W diag(c), whose signs are those of W because c > 0, and c is
        divided out at the end. Every step then lowers the loss. Without it, as in the paper, magnitudes are fitted to
        |R| itself and only the sparse step sees c.
        """
        spec = LayerSpec(kind="sparse_lowrank_binary", sparse="bitmask", binary_rank=self.binary_rank)
        if budget.bits < budget.stored(spec):  # not even the signs and scales fit
            raise too_small(self.name, budget)
        kept = min(budget.kept_per_row(spec), largest_kept(self.pattern, weight.shape[1]))
        c = relative_scales(statistics.column_norms)
        A, score_weight = weight, c
        if self.weighted:
            A, score_weight = weight * c, torch.ones_like(c)

        magnitudes = A.abs()
        unit = magnitudes.mean().clamp(min=torch.finfo(A.dtype).tiny)  # squares of its multiples fit float32
        U, V, mask = self._alternate((magnitudes / unit).float(), score_weight.float(), kept)
        U, V = U.to(A) * unit.sqrt(), V.to(A) * unit.sqrt()
        S, signs = torch.empty_like(A), torch.empty_like(mask)  # W_S, and W_B with True for +1
        for rows in row_chunks(A):  # whole matrices of what follows would be most of the memory
            L = U[rows] @ V
            signs[rows] = (A[rows] >= 0) == (L >= 0)  # sign(0) := +1
            S[rows] = (A[rows] - torch.where(signs[rows], L, -L)) * mask[rows]
        if self.weighted:
            S, V = S / c, V / c
        return Decomposition(sparse="bitmask", weight=S, mask=mask, signs=signs, scale_in=V, scale_out=U)

    def _alternate(self, magnitudes: Tensor, score_weight: Tensor, kept: int) -> tuple[Tensor, Tensor, Tensor]:
        """Return U (m, r), V (r, n) and the mask (m, n) of the kept entries, for |A| (m, n) and weights (n,)."""
        residual = magnitudes.clone()  # |R|
        mask = torch.zeros(magnitudes.shape, dtype=torch.bool, device=magnitudes.device)
        U: Tensor | None = None
        V: Tensor | None = None
        for _ in range(self.iterations):
            # W_L = U V. Power iteration starts from the last V, as |R| changes little between alternations.
            U, V = leading_components(residual, self.binary_rank, V)
            for rows in row_chunks(magnitudes):
                L = (U[rows] @ V).abs_()
                Y = (magnitudes[rows] - L).abs_()
                mask[rows] = largest_per_row(Y.mul_(score_weight), kept, self.pattern)
                torch.lerp(magnitudes[rows], L, mask[rows].float(), out=residual[rows])  # |L| where a value is kept
        assert U is not None and V is not None, "there is at least one iteration"
        return U, V, mask
