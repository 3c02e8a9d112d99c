"""Low rank by what the loss cares about: whitened on both sides, pivoted factors, one budget for the model."""

from dataclasses import dataclass, replace
from typing import ClassVar

import torch
from torch import Tensor

from ..budget import Layer
from ..runtime.configuration import LayerSpec
from ..runtime.pivoting import pivot
from .base import Choice, Decomposition, MixedMethod, Statistics
from .registry import register_method
from .spectral import factorize

OUTPUT_DAMPING = 0.1
"""Added to the output Gram matrix, as a share of its mean eigenvalue: no direction is given away for nothing."""


@register_method("lowrank")
@dataclass
class LowRank(MixedMethod):
    """Low rank only, whitened by inputs and by output gradients; pivoted factors; ranks from one budget by loss per byte."""

    source: ClassVar[str] = "after IO-SVD, arXiv 2605.15626, and SAES-SVD, arXiv 2602.03051"

    def min_spec(self, layer: Layer) -> LayerSpec:
        return LayerSpec(rank=1, pivoted=True)

    def max_steps(self, layer: Layer) -> int:
        """Up to the last rank that is below full: with pivots, r (m + n − r) < m n for all of them."""
        return max(min(layer.out_features, layer.in_features) - 2, 0)

    def choices(self, layer: Layer, weight: Tensor, statistics: Statistics, value_bits: int) -> list[Choice]:
        """Every rank; truncation loses tr(G D C Dᵀ) = Σ_{i>r} σ_i² of G^½ W C^½."""
        root = output_root(statistics.output_gram, weight.shape[0]).to(weight)
        sigma = factorize(root @ weight, statistics.require("gram", self.name)).sigma
        energy = sigma.square().flip(0).cumsum(0).flip(0) / max(statistics.tokens, 1)
        return [
            Choice(replace(self.min_spec(layer), rank=rank), float(energy[rank]))
            for rank in range(1, self.max_steps(layer) + 2)
            if rank < len(energy)
        ]

    def build(self, weight: Tensor, statistics: Statistics, spec: LayerSpec) -> Decomposition:
        """W ≈ B A of rank r, minimising tr(G D C Dᵀ): the whitened SVD of G^½ W, and G^½ undone in B."""
        root = output_root(statistics.output_gram, weight.shape[0]).to(weight)
        a, b = factorize(root @ weight, statistics.require("gram", self.name)).truncate(spec.rank)
        lowrank_a, lowrank_b, pivots = pivot(a, torch.linalg.solve(root, b))
        return Decomposition(lowrank_a=lowrank_a, lowrank_b=lowrank_b, pivots=pivots)


def output_root(gram: Tensor | None, features: int) -> Tensor:
    """(G + λ I)^½, (m, m), symmetric, λ = `OUTPUT_DAMPING` · mean G_ii; the identity if there is no G or it is zero."""
    if gram is None or not float(mean := gram.diagonal().mean()) > 0:
        return torch.eye(features, dtype=torch.float64)
    eigenvalues, vectors = torch.linalg.eigh(gram / mean)
    root: Tensor = (vectors * (eigenvalues.clamp(min=0) + OUTPUT_DAMPING).sqrt()) @ vectors.T * mean.sqrt()
    return root
