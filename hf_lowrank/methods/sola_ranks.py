"""SoLA's search for ranks (arXiv 2604.03258), as its authors' release does it: one rank for every type of layer.

The search has two stages. First every layer has a rank of its own, and the ranks of the layers that lose least energy
are lowered until the budget is met. Then every type takes the rank that a set share of its layers reaches. Where the
release counts in grids of 32 ranks of matrices of side 4096, here the grid is side / 128.
"""

import math

from ..budget import Layer, ModelBudget
from .spectral import Measurement, prices

GRID = 128
"""Number of grid steps in the smaller side of a layer."""

# Energies and falls of energy are in percent of a layer's total energy.
FULL_ENERGY = 99.9
"""Energy at which the search of a layer starts."""
LEAST_ENERGY = 90.0
"""Energy below which a layer is not lowered further, while others can be."""
FIRST_CLAMP = 0.1
"""Largest fall of energy that one step may cost, at the start."""
CLAMP_STEP = 0.02
"""How much the clamp is raised when no layer can be lowered within it."""

LOWERED_AT_ONCE = 3
"""Number of layers that are lowered between two comparisons with the budget."""

DENSE_WITHIN_STEPS = 5
"""Grid steps from the break-even rank within which a layer stays dense."""

LAYERS_REACHING = {"query": 0.30, "key": 0.30, "output": 0.55, "ffn_in": 0.65}
"""Share of the layers of a type that reach or exceed the type's common rank.

The release has 70 % for the gate and 60 % for the up matrix, whose common role is ffn_in here.
"""


def component_ranks(
    measurements: dict[str, Measurement], budget: ModelBudget, available: int
) -> dict[str, float | None]:
    """Return the rank of each layer, the same for all layers of a type, None for layers that stay dense.

    The output matrix of the feed-forward network is not searched. It gets the rank that the ratio itself stands for.
    """
    ranks = _ranks_away_from_dense(measurements, budget, available)
    result: dict[str, float | None] = dict.fromkeys(measurements)
    for names in _names_by_type(ranks).values():
        layer = measurements[names[0]].layer
        falling = sorted((ranks[name] for name in names), reverse=True)
        reaching = min(math.ceil(LAYERS_REACHING.get(layer.role, 0.5) * len(falling)), len(falling))
        result |= dict.fromkeys(names, float(falling[reaching - 1]))
    for name, measurement in measurements.items():
        if measurement.layer.role == "ffn_out":
            result[name] = (1 - budget.ratio) * _break_even(measurement.layer)
    return result


def total_energy(measurement: Measurement) -> float:
    """Return ‖W X‖² of the low-rank part, or 1 for a layer that sees only zeros. Divided by it, energies compare."""
    return float((measurement.factorization.sigma**2).sum()) or 1.0


def _ranks_away_from_dense(
    measurements: dict[str, Measurement], budget: ModelBudget, available: int
) -> dict[str, int]:
    """Return the searched ranks of the layers that stay low rank.

    Layers that end near break-even are excluded, and the search starts again.
    """
    excluded: set[str] = set()
    while True:
        ranks = _searched_ranks(measurements, excluded, budget, available)
        near_dense = {name for name, rank in ranks.items() if _is_near_dense(measurements[name], rank)}
        nothing_new = near_dense <= excluded
        nothing_left = len(excluded | near_dense) == len(ranks) + len(excluded)
        if nothing_new or nothing_left:
            return ranks
        excluded |= near_dense


def _searched_ranks(
    measurements: dict[str, Measurement], excluded: set[str], budget: ModelBudget, available: int
) -> dict[str, int]:
    """Return the rank of each layer that is neither excluded nor the output of a feed-forward network."""
    price, dense_price, fixed = prices(measurements, budget)
    unsearched_bits = sum(dense_price[name] for name in excluded)
    searched: dict[str, Measurement] = {}
    for name, measurement in measurements.items():
        if measurement.layer.role == "ffn_out":
            rank = int((1 - budget.ratio) * _break_even(measurement.layer))
            unsearched_bits += fixed[name] + rank * price[name]
        elif name not in excluded:
            searched[name] = measurement
    curves = {name: _EnergyCurve(measurement) for name, measurement in searched.items()}
    ranks = {name: curve.first_rank() for name, curve in curves.items()}

    clamp = FIRST_CLAMP
    while unsearched_bits + sum(fixed[name] + ranks[name] * price[name] for name in ranks) > available:
        falls: dict[str, float] = {}
        for name, curve in curves.items():
            if ranks[name] > curve.step:
                falls[name] = curve.energy(ranks[name]) - curve.energy(ranks[name] - curve.step)
        if not falls:  # every layer is at its first grid step
            break
        candidates = []
        for name, fall in falls.items():
            if fall <= clamp and curves[name].energy(ranks[name]) >= LEAST_ENERGY:
                candidates.append(name)
        if not candidates:
            clamp += CLAMP_STEP
            if clamp > 100:  # only layers below the least energy are left
                candidates = list(falls)
        for name in _least_loss_per_weight(candidates, falls, searched)[:LOWERED_AT_ONCE]:
            ranks[name] -= curves[name].step
    return ranks


class _EnergyCurve:
    """The retained energy of a layer, in percent, as a function of its rank.

    Attributes:
        step: ranks of one grid step.
    """

    def __init__(self, measurement: Measurement) -> None:
        energies = measurement.factorization.sigma**2
        self.step = _grid_step(measurement)
        self._layer = measurement.layer
        self._retained = (100 * energies.cumsum(0) / total_energy(measurement)).tolist()

    def energy(self, rank: int) -> float:
        """Return the energy that is retained at a rank."""
        if rank <= 0:
            return 0.0
        return self._retained[min(rank, len(self._retained)) - 1]

    def first_rank(self) -> int:
        """Return the first rank of the grid with `FULL_ENERGY`, at most the last one below break-even."""
        last = max(int(_break_even(self._layer)) // self.step * self.step, self.step)
        for rank in range(self.step, last, self.step):
            if self.energy(rank) >= FULL_ENERGY:
                return rank
        return last


def _least_loss_per_weight(
    candidates: list[str], falls: dict[str, float], measurements: dict[str, Measurement]
) -> list[str]:
    """Return the candidates in order of their fall of energy per weight of the matrix, as in the release."""

    def fall_per_weight(name: str) -> tuple[float, str]:
        layer = measurements[name].layer
        return falls[name] / (layer.out_features * layer.in_features), name

    return sorted(candidates, key=fall_per_weight)


def _names_by_type(ranks: dict[str, int]) -> dict[str, list[str]]:
    """Return the names of the layers by type, which is the last part of a module's name."""
    by_type: dict[str, list[str]] = {}
    for name in ranks:
        by_type.setdefault(name.rpartition(".")[2], []).append(name)
    return by_type


def _is_near_dense(measurement: Measurement, rank: int) -> bool:
    return rank + DENSE_WITHIN_STEPS * _grid_step(measurement) > _break_even(measurement.layer)


def _break_even(layer: Layer) -> float:
    """Return the rank at which the factors take as much as the dense matrix."""
    return layer.out_features * layer.in_features / (layer.out_features + layer.in_features)


def _grid_step(measurement: Measurement) -> int:
    return max(min(measurement.layer.out_features, measurement.layer.in_features) // GRID, 1)
