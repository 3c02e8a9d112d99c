"""Mixed methods: every layer becomes one of several things, and one budget for the model decides which.

`compress()` uses such a method in three steps (`compression/strategies/mixed.py`). It asks for the `choices` of every
layer, measured on the dense model. It takes the choices with the least sum of losses within the budget
(`cheapest_choices` in allocation.py). Then it lets the method `build` the layers in the order in which data pass
through them, each fitted to the dense outputs on the inputs that the compressed layers before it give
(`calibration/correction.py`).
"""

from dataclasses import dataclass, field
from typing import ClassVar

from torch import Tensor

from ..budget import Budget, Layer
from ..runtime.configuration import LayerSpec
from ..runtime.errors import CompressionError
from .base import Decomposition, Method, Statistics, single_layer, too_small
from .second_order import shrunk


@dataclass(frozen=True)
class Choice:
    """One thing that a layer could become.

    Attributes:
        spec: the spec that the layer would have.
        loss: expected rise of the model's loss, comparable between layers.
    """

    spec: LayerSpec
    loss: float


@dataclass
class MixedMethod(Method):
    """A method that chooses from one budget what each layer becomes, by measurements of the dense model.

    Layers are built in turn after that. Subclasses implement `choices` and `build`.

    Attributes:
        unigram_share: share of the calibration sequences whose tokens are drawn one by one from all tokens of the
            calibration text. Layers that are fitted to one kind of text give up the directions of their inputs that it
            never uses; these sequences use them (`calibration/unigrams.py`).

    Raises:
        CompressionError: if `unigram_share` is not a share.
    """

    unigram_share: float = field(
        default=0.1,
        metadata={
            "help": "share of the calibration sequences whose tokens are drawn at random from all of them, "
            "for text unlike it"
        },
    )

    strategy: ClassVar[str] = "mixed"
    needs_gram: ClassVar[bool] = True
    needs_output_gram: ClassVar[bool] = True

    def __post_init__(self) -> None:
        if not 0 <= self.unigram_share <= 1:
            raise CompressionError(
                f"{self.name}: option unigram_share is {self.unigram_share}, expected a number from 0 to 1"
            )

    def input_gram(self, statistics: Statistics) -> Tensor:
        """Return the Gram matrix C of the inputs, (n, n), as layers are fitted to it: with its correlations shrunk."""
        return shrunk(statistics.require("gram", self.name), statistics.tokens)

    def choices(
        self, layer: Layer, weight: Tensor, statistics: Statistics, value_bits: int, affordable: float = 0.0
    ) -> list[Choice]:
        """Return what the layer could become, in any order. The dense layer is always possible and not listed.

        Args:
            weight: (m, n), float64, of the dense layer.
            statistics: of the dense model.
            value_bits: bits of one value in the checkpoint's dtype.
            affordable: stored bits per weight that all layers may take on average, 0 if that is not known. What would
                not be chosen at so many bits need not be measured.
        """
        raise NotImplementedError

    def build(self, weight: Tensor, statistics: Statistics, spec: LayerSpec) -> Decomposition:
        """Return the decomposition of `weight` (m, n), float64, that `spec` describes.

        Args:
            spec: the spec of one of the layer's choices.
        """
        raise NotImplementedError

    def decompose(self, weight: Tensor, statistics: Statistics, budget: Budget) -> Decomposition:
        """Build the choice of least loss within the budget of this one layer."""
        statistics.require("gram", self.name)
        choices = self.choices(single_layer(weight), weight, statistics, budget.value_bits)
        # Between choices of the same loss the smaller one wins.
        affordable = [choice for choice in choices if budget.stored(choice.spec) <= budget.bits]
        if not affordable:
            raise too_small(self.name, budget)
        best = min(affordable, key=lambda choice: (choice.loss, budget.stored(choice.spec)))
        return self.build(weight, statistics, best.spec)
