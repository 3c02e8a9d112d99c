"""Low rank by what the loss depends on: whitened on both sides, pivoted factors, ranks from the model's budget."""

from dataclasses import dataclass, replace
from typing import ClassVar

import torch
from torch import Tensor

from ..budget import Layer
from ..runtime.configuration import LayerSpec
from ..runtime.pivoting import pivot
from .base import Decomposition, Statistics
from .factorization import whitened_energies, whitened_factors
from .mixed import Choice, MixedMethod
from .registry import register_method

OUTPUT_DAMPING = 0.1
"""λ that is added to the output Gram matrix, as a share of its mean eigenvalue. No direction is then free to err."""


@register_method("lowrank")
@dataclass
class LowRank(MixedMethod):
    """Low rank only, whitened by inputs and output gradients, pivoted factors, ranks chosen by loss per byte."""

    source: ClassVar[str] = "after IO-SVD, arXiv 2605.15626, and SAES-SVD, arXiv 2602.03051"

    def min_spec(self, layer: Layer) -> LayerSpec:
        return LayerSpec(rank=1, pivoted=True)

    def max_steps(self, layer: Layer) -> int:
        """Return the steps up to the last rank below full. With pivots r (m + n − r) < m n holds for all of them."""
        return max(min(layer.out_features, layer.in_features) - 2, 0)

    def choices(
        self, layer: Layer, weight: Tensor, statistics: Statistics, value_bits: int, affordable: float = 0.0
    ) -> list[Choice]:
        """Return every rank r. Truncation loses tr(G D C Dᵀ) = Σ_{i>r} σ_i², with σ the spectrum of G^½ W C^½.

        Whitening both sides is IO-SVD's (arXiv 2605.15626).
        """
        root = output_root(statistics.output_gram, weight.shape[0]).to(weight)
        energies = whitened_energies(root @ weight, self.input_gram(statistics)) / max(statistics.tokens, 1)
        tails = energies.cumsum(0).flip(0).tolist()  # entry r: Σ_{i>r} σ_i²
        choices = []
        for rank in range(1, min(self.max_steps(layer) + 2, len(tails))):
            choices.append(Choice(replace(self.min_spec(layer), rank=rank), tails[rank]))
        return choices

    def build(self, weight: Tensor, statistics: Statistics, spec: LayerSpec) -> Decomposition:
        """W ≈ B A of rank r, minimizing tr(G D C Dᵀ): the whitened SVD of G^½ W, with G^½ undone in B."""
        root = output_root(statistics.output_gram, weight.shape[0]).to(weight)
        a, b = whitened_factors(root @ weight, self.input_gram(statistics), spec.rank)
        # Pivoted factors store r (m + n − r) values in place of r (m + n): r rows of B become the identity.
        lowrank_a, lowrank_b, pivots = pivot(a, torch.linalg.solve_triangular(root, b, upper=True))
        return Decomposition(lowrank_a=lowrank_a, lowrank_b=lowrank_b, pivots=pivots)


def output_root(gram: Tensor | None, features: int) -> Tensor:
    """Return the upper triangular R of G + λ I = Rᵀ R, (m, m), λ = `OUTPUT_DAMPING` · mean G_ii.

    It is the identity without a G. Any root does: tr(G D C Dᵀ) = ‖R D C^½‖².
    """
    if gram is None or not float(mean := gram.diagonal().mean()) > 0:
        return torch.eye(features, dtype=torch.float64)
    damped = gram.clone()
    damped.diagonal().add_(OUTPUT_DAMPING * mean)
    root, failed = torch.linalg.cholesky_ex(damped, upper=True)
    if int(failed):  # where rounding made G indefinite by more than λ
        eigenvalues, vectors = torch.linalg.eigh(gram)
        roots = (eigenvalues.clamp(min=0) + OUTPUT_DAMPING * mean).sqrt()
        root = torch.linalg.qr(roots[:, None] * vectors.T).R
    return root
