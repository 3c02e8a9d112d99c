"""SoLA: the strongest feed-forward neurons stay as they are, whitened low rank for the rest (arXiv 2604.03258)."""

import math
from dataclasses import dataclass, field
from typing import ClassVar

import torch
from torch import Tensor

from ..budget import ModelBudget
from ..runtime.configuration import LayerSpec
from ..runtime.errors import CompressionError
from .allocation import fitted_ranks, greedy_ranks
from .base import Layer, Statistics
from .registry import register_method
from .spectral import Measurement, SpectralMethod, factorize, prices

SKIPPED_SHARE = 2 / 32
"""The paper leaves two of 32 blocks dense at either end."""
LARGEST_INNER_RATIO = 0.6
"""Outer blocks stay dense only while the inner ones then lose no more than this; the paper's largest is 0.56."""
OUTPUT_DENSE_BELOW = 0.25
"""The paper compresses the attention's output matrix from 30 % on, not at 20 %."""

# The paper's search (§1.5), in its units: a grid of d / 128 ranks, energies in percent.
GRID = 128
FULL_ENERGY, LEAST_ENERGY = 99.9, 90.0
FIRST_CLAMP, CLAMP_STEP = 0.1, 0.02
LOWERED_AT_ONCE = 3
DENSE_WITHIN_STEPS = 5
LAYERS_REACHING = {"query": 0.30, "key": 0.30, "output": 0.55, "ffn_in": 0.65}
"""Share of the layers of a type that reach or exceed the type's common rank; ffn_in is the middle of gate (70 %) and up (60 %)."""


@register_method("sola")
@dataclass
class SoLA(SpectralMethod):
    """Soft activation sparsity: prime neurons exact, marginal neurons and attention by whitened low rank, adaptive ranks."""

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
            raise CompressionError(f"sola: allocation is {self.allocation!r}, expected 'exact' or 'components'")
        if self.neuron_score not in ("activation", "output"):
            raise CompressionError(f"sola: neuron_score is {self.neuron_score!r}, expected 'activation' or 'output'")

    def leaves_dense(self, layer: Layer, ratio: float) -> str | None:
        skipped = self._skipped_blocks(layer.blocks, ratio)
        if not skipped <= layer.block < layer.blocks - skipped:
            return f"sola leaves the first and last {skipped} block(s) dense"
        if layer.role == "value":
            return "sola leaves value projections dense"
        if layer.role == "key" and layer.out_features < layer.in_features:
            return "sola leaves the narrow key projections of grouped-query attention dense"
        if layer.role == "output" and ratio < OUTPUT_DENSE_BELOW:
            return f"sola leaves attention outputs dense below {OUTPUT_DENSE_BELOW:.0%}"
        return None

    def neuron_order(self, statistics: Statistics, weight: Tensor) -> Tensor:
        """Prime neurons P first, then the marginal ones M, both in their old order (§1.2)."""
        s = statistics.mean_abs  # s_j = mean |h_j|
        if self.neuron_score == "output":
            s = s * weight.norm(dim=0)
        prime = torch.zeros_like(s, dtype=torch.bool)
        prime[s.argsort(descending=True, stable=True)[: self._primes(len(s))]] = True
        return torch.cat([prime.nonzero().flatten(), (~prime).nonzero().flatten()])

    def measure(self, layer: Layer, weight: Tensor, statistics: Statistics) -> Measurement:
        """Whitened SVD of W_g[M,:], W_u[M,:], W_d[:,M] and of the attention's matrices; neurons are already in order."""
        C = statistics.gram
        assert C is not None
        if layer.role == "ffn_in" and (p := self._primes(layer.out_features)):
            return Measurement(layer, factorize(weight[p:], C), "rows", p, weight[:p])
        if layer.role == "ffn_out" and (p := self._primes(layer.in_features)):
            return Measurement(layer, factorize(weight[:, p:], C[p:, p:]), "columns", p, weight[:, :p])
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
        """Ranks by the exact greedy (§1.6), on relative energies so that layers compare, or by the paper's search (§1.5)."""
        wanted = component_ranks(measurements, budget, available) if self.allocation == "components" else None
        price, dense_price, fixed = prices(measurements, budget)
        if wanted is not None:
            return fitted_ranks(
                wanted,
                price,
                dense_price,
                fixed,
                {name: len(m.factorization.sigma) for name, m in measurements.items()},
                available,
            )
        energies = {name: (m.factorization.sigma**2 / total_energy(m)).tolist() for name, m in measurements.items()}
        return greedy_ranks(energies, price, dense_price, fixed, available)

    def _primes(self, neurons: int) -> int:
        return math.floor(self.prime_share * neurons)

    def _skipped_blocks(self, blocks: int, ratio: float) -> int:
        if self.skip_blocks is not None:
            return self.skip_blocks
        skipped = max(round(SKIPPED_SHARE * blocks), 1)
        while skipped and (blocks <= 2 * skipped or ratio * blocks / (blocks - 2 * skipped) > LARGEST_INNER_RATIO):
            skipped -= 1
        return skipped


def total_energy(measurement: Measurement) -> float:
    """‖W X‖² of the low-rank part, which makes energies comparable between layers; 1 for a layer that sees only zeros."""
    return float((measurement.factorization.sigma**2).sum()) or 1.0


def component_ranks(
    measurements: dict[str, Measurement], budget: ModelBudget, available: int
) -> dict[str, float | None]:
    """The paper's search (§1.5): one rank for every type of layer, shared by all blocks; None for layers that stay dense.

    Lowers the rank of the three layers whose energy falls least per weight, until the budget is met; then every type takes
    the rank that a set share of its layers reaches. The output matrix of the feed-forward network is not searched.
    """
    excluded: set[str] = set()
    while True:
        ranks = _searched_ranks(measurements, excluded, budget, available)
        near_dense = {
            name
            for name, rank in ranks.items()
            if rank + DENSE_WITHIN_STEPS * _grid(measurements[name]) > _break_even(measurements[name].layer)
        }
        if near_dense <= excluded or len(excluded | near_dense) == len(ranks) + len(excluded):
            break
        excluded |= near_dense
    by_type: dict[str, list[str]] = {}
    for name in ranks:
        by_type.setdefault(name.rpartition(".")[2], []).append(name)
    result: dict[str, float | None] = dict.fromkeys(measurements)
    for names in by_type.values():
        layer = measurements[names[0]].layer
        falling = sorted((ranks[name] for name in names), reverse=True)
        common = falling[min(math.ceil(LAYERS_REACHING.get(layer.role, 0.5) * len(falling)), len(falling)) - 1]
        result |= dict.fromkeys(names, float(common))
    for name, measurement in measurements.items():
        if measurement.layer.role == "ffn_out":
            result[name] = (1 - budget.ratio) * _break_even(measurement.layer)
    return result


def _searched_ranks(
    measurements: dict[str, Measurement], excluded: set[str], budget: ModelBudget, available: int
) -> dict[str, int]:
    searched = {name: m for name, m in measurements.items() if name not in excluded and m.layer.role != "ffn_out"}
    price, dense_price, fixed = prices(measurements, budget)
    curves = {
        name: (100 * (m.factorization.sigma**2).cumsum(0) / total_energy(m)).tolist() for name, m in searched.items()
    }

    def energy(name: str, rank: int) -> float:
        return curves[name][min(rank, len(curves[name])) - 1] if rank > 0 else 0.0

    ranks = {}
    for name, m in searched.items():
        step = _grid(m)
        last = max(int(_break_even(m.layer)) // step * step, step)
        ranks[name] = next((rank for rank in range(step, last, step) if energy(name, rank) >= FULL_ENERGY), last)
    unsearched = sum(dense_price[name] for name in excluded)
    for name, m in measurements.items():
        if m.layer.role == "ffn_out":
            unsearched += fixed[name] + int((1 - budget.ratio) * _break_even(m.layer)) * price[name]
    clamp = FIRST_CLAMP
    while unsearched + sum(fixed[name] + ranks[name] * price[name] for name in ranks) > available:
        falls = {
            name: energy(name, ranks[name]) - energy(name, ranks[name] - _grid(m))
            for name, m in searched.items()
            if ranks[name] > _grid(m)
        }
        if not falls:
            break
        candidates = [
            name for name, fall in falls.items() if fall <= clamp and energy(name, ranks[name]) >= LEAST_ENERGY
        ]
        if not candidates:
            clamp += CLAMP_STEP
            if clamp > 100:
                candidates = list(falls)
        weights = {name: searched[name].layer.out_features * searched[name].layer.in_features for name in candidates}
        for name in sorted(candidates, key=lambda each: (falls[each] / weights[each], each))[:LOWERED_AT_ONCE]:
            ranks[name] -= _grid(searched[name])
    return ranks


def _break_even(layer: Layer) -> float:
    return layer.out_features * layer.in_features / (layer.out_features + layer.in_features)


def _grid(measurement: Measurement) -> int:
    return max(min(measurement.layer.out_features, measurement.layer.in_features) // GRID, 1)
