"""Spectral methods: the spectra of all layers are measured before the ranks are decided on.

`compress()` uses such a method in three steps (`compression/strategies/spectral.py`). The method factorizes every
layer once (`measure`), decides on the ranks of all layers under the budget of the model (`allocate`), and every
measurement is cut at its rank (`Measurement.truncate`). A method that `trains` learns a score for every component
between the first two steps.
"""

from dataclasses import dataclass, replace
from typing import ClassVar

from torch import Tensor

from ..budget import Budget, Layer, ModelBudget
from ..runtime.configuration import LayerSpec
from ..runtime.errors import CompressionError
from .base import Decomposition, Method, Statistics, single_layer, too_small
from .factorization import Factorization, factorize


@dataclass(frozen=True)
class Measurement:
    """A layer whose spectrum is measured and whose rank is not decided on yet.

    Attributes:
        layer: the layer.
        factorization: of the part of its weight that becomes low rank.
        sparse, kept, weight: layout, size and values of the part that is kept as it is (none, rows or columns).
        scores: learned importance of the components, (k,), falling; None if the components stand in order of energy.
        bias: learned deviation that is added to the output, (m,).
    """

    layer: Layer
    factorization: Factorization
    sparse: str = "none"
    kept: int = 0
    weight: Tensor | None = None
    scores: Tensor | None = None
    bias: Tensor | None = None

    def require_scores(self) -> Tensor:
        """Return the learned scores.

        Raises:
            CompressionError: if they are not learned yet.
        """
        if self.scores is None:
            raise CompressionError(
                f"{self.layer.name}: its spectrum has no learned scores yet; call `with_learned_scores` first"
            )
        return self.scores

    @property
    def spec(self) -> LayerSpec:
        """The spec of the layer at rank 0."""
        return LayerSpec(sparse=self.sparse, kept=self.kept, bias=self.bias is not None)

    def truncate(self, rank: int) -> Decomposition:
        """Return the decomposition that keeps the first `rank` components. Without any it may be a layer of zeros."""
        if rank == 0:
            weight = self.factorization.sigma[:0] if self.weight is None else self.weight
            return Decomposition(sparse=self.sparse, weight=weight, bias=self.bias)
        a, b = self.factorization.truncate(rank)
        return Decomposition(sparse=self.sparse, weight=self.weight, lowrank_a=a, lowrank_b=b, bias=self.bias)


class SpectralMethod(Method):
    """A method that measures the spectra of all layers before it decides on ranks. Subclasses implement `allocate`."""

    strategy: ClassVar[str] = "spectral"

    def measure(self, layer: Layer, weight: Tensor, statistics: Statistics) -> Measurement:
        """Factorize one weight (m, n), float64: by default all of it, whitened if the method `needs_gram`."""
        gram = None
        if self.needs_gram:
            gram = statistics.require("gram", self.name)
        return Measurement(layer, factorize(weight, gram))

    def allocate(
        self, measurements: dict[str, Measurement], budget: ModelBudget, available: int
    ) -> dict[str, int | None]:
        """Return the rank of each layer, None where it stays dense. Together they take at most `available` bits."""
        raise NotImplementedError

    def decompose(self, weight: Tensor, statistics: Statistics, budget: Budget) -> Decomposition:
        """Decompose one layer by itself, at the largest rank that its budget allows."""
        # This is checked before measuring, as factorizing without a Gram matrix raises no error: it is a plain SVD.
        if self.needs_gram:
            statistics.require("gram", self.name)
        measurement = self.measure(single_layer(weight), weight, statistics)
        rank = budget.rank(measurement.spec)
        if rank < 1:
            raise too_small(self.name, budget)
        return measurement.truncate(rank)


def prices(
    measurements: dict[str, Measurement], budget: ModelBudget
) -> tuple[dict[str, int], dict[str, int], dict[str, int]]:
    """Return the bits of one rank, of the dense layer, and of the parts beside the low rank, each by layer name."""
    price: dict[str, int] = {}
    dense_price: dict[str, int] = {}
    fixed: dict[str, int] = {}
    for name, measurement in measurements.items():
        layer, spec = measurement.layer, measurement.spec
        # A layer's own bias is stored dense and compressed alike, and is in none of the three.
        fixed[name] = budget.stored_bits(layer, spec)
        price[name] = budget.stored_bits(layer, replace(spec, rank=1)) - fixed[name]
        dense_price[name] = budget.dense_bits(layer) - budget.bias_bits[name]
    return price, dense_price, fixed
