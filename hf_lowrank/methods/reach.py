"""What a method can reach: the least and the most bits that it stores, and the ratios, bits or sizes between them."""

import math
from collections.abc import Callable
from dataclasses import dataclass, replace

from ..budget import RATIO, Layer, ModelBudget, Unit
from ..runtime.errors import CompressionError
from .base import Method

TOLERANCE = 0.005
"""How many bits fewer than asked for a method may store for want of larger layers.

It is a share of the dense bits where a ratio is asked for, and of the bits that are asked for elsewhere.
"""


@dataclass(frozen=True)
class Reach:
    """The ratios that a method can reach by compressing some layers and leaving others dense.

    Attributes:
        budget: counts the bits of a layer. Its own ratio plays no part.
        lowest, highest: the fewest and the most bits that the compressed layers take together, without their biases.
        unit: the unit that the recipe uses.
    """

    method: Method
    compressed: list[Layer]
    dense: list[Layer]
    budget: ModelBudget
    lowest: int
    highest: int
    unit: Unit = RATIO

    @property
    def least(self) -> float:
        """The ratio that is removed where every layer is as large as the method makes it."""
        return self.budget.removed(self.highest, self.compressed, self.dense)

    @property
    def most(self) -> float:
        """The ratio that is removed where every layer is as small as the method makes it."""
        return self.budget.removed(self.lowest, self.compressed, self.dense)

    def available(self, ratio: float) -> int:
        """Return the bits that the compressed layers may take together at a ratio, without their biases."""
        return replace(self.budget, ratio=ratio).available(self.compressed, self.dense)

    def holds(self, ratio: float) -> bool:
        """Return whether a ratio is within reach: the layers can be small enough, and fill it up to `TOLERANCE`."""
        slack = TOLERANCE * self.budget.total_dense_bits(self.compressed + self.dense)
        if self.unit is not RATIO:
            slack *= 1 - ratio
        return 0 < ratio < 1 and self.lowest <= self.available(ratio) <= self.highest + slack

    def bounds(self) -> tuple[float, float] | None:
        """Return the least and the greatest value within reach, in the decimals of the unit, or None without any."""
        least = self.least - TOLERANCE
        if self.unit is not RATIO:
            least = 1 - (1 - self.least) / (1 - TOLERANCE)
        values = sorted(self.unit.value(min(max(ratio, 0.0), 1.0)) for ratio in (least, self.most))
        steps = 10**self.unit.decimals
        first, last = max(math.floor(values[0] * steps), 1), math.ceil(values[1] * steps)
        # They are rounded outward, and then put back by a step, or two where the products above are rounded as well.
        for _ in range(2):
            first += not self._holds_value(first / steps)
            last -= not self._holds_value(last / steps)
        if self._holds_value(first / steps) and self._holds_value(last / steps):
            return first / steps, last / steps
        return None

    def _holds_value(self, value: float) -> bool:
        return self.holds(self.unit.ratio(value))


def reach_of(
    method: Method, compressed: list[Layer], dense: list[Layer], budget: ModelBudget, unit: Unit = RATIO
) -> Reach:
    """Return the ratios that a method can reach on these layers."""
    highest = 0
    # The largest layer of a method may be larger than the dense one, which then stays in its place.
    for layer in compressed:
        largest = min_bits(method, layer, budget) + bits_of_step(method, layer, budget) * method.max_steps(layer)
        highest += min(largest, budget.dense_bits(layer))
    return Reach(method, compressed, dense, budget, total_min_bits(method, compressed, budget), highest, unit)


def check_reachable(method: Method, compressed: list[Layer], dense: list[Layer], budget: ModelBudget) -> int:
    """Return the bits that the compressed layers may take together.

    Raises:
        CompressionError: if the method cannot reach the ratio. The message names the ratios that it can.
    """
    return bits_at(reach_of(method, compressed, dense, budget), budget.ratio)


def bits_at(reach: Reach, ratio: float, bounds: Callable[[], tuple[float, float] | None] | None = None) -> int:
    """Return the bits that the compressed layers may take together at a ratio.

    Args:
        bounds: gives the values that the message names, where other layers than those of `reach` are compressed at
            another ratio.

    Raises:
        CompressionError: if the method cannot reach the ratio. The message names what it can, in the unit of `reach`.
    """
    if reach.holds(ratio):
        return reach.available(ratio)
    method, unit = reach.method, reach.unit
    within_reach = (bounds or reach.bounds)()
    if within_reach is None:
        possible = f"no {unit.name} is within reach"
    else:
        possible = unit.reach.format(*map(unit.text, within_reach))
    asked = str(ratio) if unit is RATIO else unit.text(unit.value(ratio))
    if unit.decimals:
        asked = asked.rstrip("0").rstrip(".")
    hint = f"; leave the {unit.name} out to get what the options give" if method.size_is_set else ""
    raise CompressionError(
        f"{unit.name} {asked} is out of reach of {method.name} with these options: it compresses "
        f"{len(reach.compressed)} layers, leaves {len(reach.dense)} dense, and {possible}{hint}"
    )


def total_min_bits(method: Method, layers: list[Layer], budget: ModelBudget) -> int:
    """Return the bits of the smallest specs of several layers together."""
    return sum(min_bits(method, layer, budget) for layer in layers)


def min_bits(method: Method, layer: Layer, budget: ModelBudget) -> int:
    """Return the bits of the smallest spec of a layer."""
    return budget.stored_bits(layer, method.min_spec(layer))


def bits_of_step(method: Method, layer: Layer, budget: ModelBudget) -> int:
    """Return the bits of the first step of a layer, which stands for those of all its steps.

    Steps of a quantized layer are unequal, as its packed rows end at whole bytes. Their mean stands for them.
    """
    spec = method.min_spec(layer)
    smallest = budget.stored_bits(layer, spec)
    counted = method.max_steps(layer) if spec.weight_bits else 1
    for _ in range(counted):
        spec = method.next_spec(layer, spec)
    return max(math.ceil((budget.stored_bits(layer, spec) - smallest) / max(counted, 1)), 1)
