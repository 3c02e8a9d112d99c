"""SoLA: the strongest feed-forward neurons stay as they are, whitened low rank for the rest (arXiv 2604.03258).

The network y = W_d (SiLU(W_g x) ⊙ (W_u x)) has intermediate neurons h of very uneven magnitude. The prime neurons P,
those with the largest s_j = mean |h_j|, are kept exactly. The slices of the marginal neurons M, that is W_g[M,:],
W_u[M,:] and W_d[:,M], and the attention's query, key and output matrices become low rank by truncation-aware whitening
(factorization.py).
"""

import math
from dataclasses import dataclass, field
from typing import ClassVar

import torch
from torch import Tensor

from ..budget import Layer, ModelBudget
from ..runtime.configuration import LayerSpec
from ..runtime.errors import CompressionError, quoted
from .allocation import fitted_ranks, greedy_ranks
from .base import Statistics
from .factorization import factorize
from .registry import register_method
from .sola_ranks import component_ranks, total_energy
from .spectral import Measurement, SpectralMethod, prices

SKIPPED_SHARE = 2 / 32
"""Share of the blocks that stay dense at either end: two of 32 in the paper."""

LARGEST_INNER_RATIO = 0.6
"""Largest ratio of the inner blocks at which outer blocks still stay dense. The largest in the paper is 0.56."""

OUTPUT_DENSE_BELOW = 0.25
"""Ratio below which the attention's output matrix stays dense. The paper compresses it at 30 % and not at 20 %."""


@register_method("sola")
@dataclass
class SoLA(SpectralMethod):
    """Soft activation sparsity: prime neurons exact, whitened low rank for all else, adaptive ranks."""

    prime_share: float = field(
        default=0.15, metadata={"help": "share of the feed-forward neurons that are kept exactly"}
    )
    allocation: str = field(
        default="exact",
        metadata={
            "help": "'exact' greedy over all layers, or 'components': the paper's rule, one rank per type of layer"
        },
    )
    skip_blocks: int | None = field(
        default=None,
        metadata={"help": "dense blocks at either end; default: the paper's 2 of 32, scaled to the model"},
    )
    neuron_score: str = field(
        default="activation", metadata={"help": "'activation': mean |h_j|; 'output': mean |h_j| ‖W_d[:, j]‖₂"}
    )

    source: ClassVar[str] = "SoLA, arXiv 2604.03258"
    needs_gram: ClassVar[bool] = True

    def __post_init__(self) -> None:
        if not 0 <= self.prime_share <= 1:
            raise CompressionError(f"sola: prime_share is {self.prime_share}, expected a share from 0 to 1")
        if self.allocation not in ("exact", "components"):
            raise CompressionError(f"sola: allocation is {quoted(self.allocation)}, expected 'exact' or 'components'")
        if self.neuron_score not in ("activation", "output"):
            raise CompressionError(
                f"sola: neuron_score is {quoted(self.neuron_score)}, expected 'activation' or 'output'"
            )

    def leaves_dense(self, layer: Layer, ratio: float) -> str | None:
        skipped = self._skipped_blocks(layer.blocks, ratio)
        if not skipped <= layer.block < layer.blocks - skipped:
            return f"sola leaves the first and last {skipped} block(s) dense"
        if layer.role == "value":
            return "sola leaves value projections dense"
        # A narrow matrix breaks even at a small rank, so there is little to save.
        if layer.role == "key" and layer.out_features < layer.in_features:
            return "sola leaves the narrow key projections of grouped-query attention dense"
        if layer.role == "output" and ratio < OUTPUT_DENSE_BELOW:
            return f"sola leaves attention outputs dense below {OUTPUT_DENSE_BELOW:.0%}"
        return None

    def neuron_order(self, statistics: Statistics, weight: Tensor) -> Tensor:
        """Return the prime neurons P first, then the marginal ones M, both in their old order."""
        s = statistics.mean_abs  # s_j = mean |h_j|
        if self.neuron_score == "output":
            # Without neuron j the output changes by h_j W_d[:, j]. The authors' release leaves the second factor out.
            s = s * weight.norm(dim=0)
        prime = torch.zeros_like(s, dtype=torch.bool)
        prime[s.argsort(descending=True, stable=True)[: self._primes(len(s))]] = True
        return torch.cat([prime.nonzero().flatten(), (~prime).nonzero().flatten()])

    def measure(self, layer: Layer, weight: Tensor, statistics: Statistics) -> Measurement:
        """Factorize W_g[M,:], W_u[M,:], W_d[:,M] or a matrix of the attention, whitened. Neurons are in order."""
        C = statistics.gram
        assert C is not None
        # Prime neurons are rows of W_g and W_u, and columns of W_d, whose inputs they are.
        if layer.role == "ffn_in" and (p := self._primes(layer.out_features)):
            return Measurement(layer, factorize(weight[p:], C), sparse="rows", kept=p, weight=weight[:p])
        if layer.role == "ffn_out" and (p := self._primes(layer.in_features)):
            marginal = factorize(weight[:, p:], C[p:, p:])
            return Measurement(layer, marginal, sparse="columns", kept=p, weight=weight[:, :p])
        return Measurement(layer, factorize(weight, C))

    def min_spec(self, layer: Layer) -> LayerSpec:
        if layer.role == "ffn_in":
            return LayerSpec(sparse="rows", kept=self._primes(layer.out_features))
        if layer.role == "ffn_out":
            return LayerSpec(sparse="columns", kept=self._primes(layer.in_features))
        return LayerSpec()

    def allocate(
        self, measurements: dict[str, Measurement], budget: ModelBudget, available: int
    ) -> dict[str, int | None]:
        """Decide on the ranks, by the exact greedy or by the paper's search."""
        price, dense_price, fixed = prices(measurements, budget)
        if self.allocation == "components":
            targets = component_ranks(measurements, budget, available)
            left = available
            for name, target in targets.items():
                left -= dense_price[name] if target is None else fixed[name]
            # The rule of the paper may leave more layers dense than the budget holds. They are ranked with the others
            # then, from the rank on that would cost as much as the dense layer.
            if left < 0:
                for name, target in targets.items():
                    if target is None:
                        targets[name] = (dense_price[name] - fixed[name]) / price[name]
            limits = {name: len(m.factorization.sigma) for name, m in measurements.items()}
            return fitted_ranks(targets, price, dense_price, fixed, limits, available)
        # Relative energies compare between layers, as SoLA's percentages do.
        energies = {}
        for name, measurement in measurements.items():
            energies[name] = (measurement.factorization.sigma**2 / total_energy(measurement)).tolist()
        return greedy_ranks(energies, price, dense_price, fixed, available)

    def _primes(self, neurons: int) -> int:
        """Return the number of prime neurons."""
        return math.floor(self.prime_share * neurons)

    def _skipped_blocks(self, blocks: int, ratio: float) -> int:
        """Return how many blocks stay dense at either end: fewer where the inner blocks could not make up for them."""
        if self.skip_blocks is not None:
            return self.skip_blocks
        skipped = max(round(SKIPPED_SHARE * blocks), 1)
        while skipped and (blocks <= 2 * skipped or ratio * blocks / (blocks - 2 * skipped) > LARGEST_INNER_RATIO):
            skipped -= 1
        return skipped
