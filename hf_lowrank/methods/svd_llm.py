"""SVD-LLM: truncation-aware data whitening (arXiv 2403.07378)."""

from dataclasses import dataclass, field
from typing import ClassVar

import torch
from torch import Tensor

from ..budget import Budget, Layer
from .base import Decomposition, Method, Statistics
from .factorization import whitened_factors
from .registry import register_method
from .svd import affordable_rank

SMALLEST_RESPONSE = 1e-6
"""Smallest ‖A_i X̂‖ of a component that counts, relative to ‖A_i‖ ‖X̂‖."""


@register_method("svd-llm")
@dataclass
class SVDLLM(Method):
    """Truncation-aware whitening: the best rank-r matrix on the calibration tokens."""

    update: bool = field(
        default=False,
        metadata={"help": "refit the left factor by least squares on the inputs of the compressed model"},
    )

    source: ClassVar[str] = "SVD-LLM, arXiv 2403.07378"
    needs_gram: ClassVar[bool] = True

    @property
    def needs_compressed_inputs(self) -> bool:
        return self.update

    def working_memory(self, layer: Layer) -> int:
        # See `whitened_factors`, which decomposes the smaller of two square matrices.
        m, n = layer.out_features, layer.in_features
        return 8 * (m * n + max(m * n, 5 * min(m, n) ** 2))

    def decompose(self, weight: Tensor, statistics: Statistics, budget: Budget) -> Decomposition:
        """W ≈ B A, minimizing ‖(W − B A) X‖_F (arXiv 2403.07378).

        With `update` A stays, and B minimizes ‖W X − B A X̂‖_F. The update is the training-free one of the paper's
        first version. The update of the later versions, two LoRA runs, is training.
        """
        rank = affordable_rank(self.name, budget)
        a, b = whitened_factors(weight, statistics.require("gram", self.name), rank)
        if self.update:
            compressed_input_gram = statistics.require("compressed_input_gram", self.name)
            cross_gram = statistics.require("cross_gram", self.name)
            b = refit_left(weight, a, compressed_input_gram, cross_gram)
        return Decomposition(lowrank_a=a, lowrank_b=b)


def refit_left(weight: Tensor, right: Tensor, compressed_input_gram: Tensor, cross_gram: Tensor) -> Tensor:
    """Return the B (m, r) of smallest norm that minimizes ‖W X − B A X̂‖_F: B = (W X)(A X̂)⁺ = W M Aᵀ (A Ĉ Aᵀ)⁺.

    Args:
        weight: W, (m, n).
        right: A, (r, n).
        compressed_input_gram: Ĉ = X̂ X̂ᵀ, (n, n), of the compressed model's inputs.
        cross_gram: M = X X̂ᵀ, (n, n). With M = Ĉ the target is W X̂, which the authors' release fits.
    """
    normal = right @ compressed_input_gram @ right.T
    target = weight @ cross_gram @ right.T
    # The rows of A differ in size by orders of magnitude, so the normal equations are scaled to a diagonal of ones. A
    # row that the inputs reach by no more than rounding must not count as the others do: its scale does not fall below
    # `rounding`.
    rounding = SMALLEST_RESPONSE * right.norm(dim=1) * compressed_input_gram.diagonal().sum().sqrt()
    scale = torch.maximum(normal.diagonal().clamp(min=0).sqrt(), rounding).clamp(min=torch.finfo(normal.dtype).tiny)
    inverse = torch.linalg.pinv(normal / scale[:, None] / scale, hermitian=True)
    left: Tensor = target / scale @ inverse / scale
    return left
