"""Round to nearest: plain weight quantization, the baseline of every compressor."""

from dataclasses import dataclass, field, replace
from typing import ClassVar

from torch import Tensor

from ..budget import Budget, Layer
from ..runtime.configuration import LayerSpec
from ..runtime.errors import CompressionError
from ..runtime.quantization import BITS, quantize
from .base import Decomposition, Method, Statistics, too_small
from .registry import register_method


@register_method("rtn")
@dataclass
class RTN(Method):
    """Every weight to the nearest of 2ᵇ even levels of its group, blind to the activations."""

    bits: int | None = field(
        default=None, metadata={"help": "bits per weight, 2 to 8; default: the most that the budget holds"}
    )
    group_size: int = field(default=32, metadata={"help": "weights of a row that share a scale"})

    source: ClassVar[str] = "round to nearest; grouped as in GPTQ, arXiv 2210.17323"
    factorizes: ClassVar[bool] = False
    quantizes: ClassVar[bool] = True

    def __post_init__(self) -> None:
        if self.bits is not None and self.bits not in BITS:
            raise CompressionError(
                f"{self.name}: bits={self.bits}, expected {BITS[0]} to {BITS[-1]}, or none to follow the budget"
            )
        if self.group_size < 1:
            raise CompressionError(f"{self.name}: group_size={self.group_size}, expected at least 1")

    @property
    def size_is_set(self) -> bool:
        """Whether the number of bits is set."""
        return self.bits is not None

    def min_spec(self, layer: Layer) -> LayerSpec:
        return self.spec(self.bits or BITS[0])

    def next_spec(self, layer: Layer, spec: LayerSpec) -> LayerSpec:
        """Return the spec with one more bit per weight."""
        return replace(spec, weight_bits=spec.weight_bits + 1)

    def max_steps(self, layer: Layer) -> int:
        """Return how many bits a weight can grow by."""
        if self.bits:
            return 0
        return BITS[-1] - BITS[0]

    def spec(self, bits: int) -> LayerSpec:
        """Return the spec of a layer at so many bits per weight."""
        return LayerSpec(sparse="full", weight_bits=bits, weight_group=self.group_size)

    def affordable_bits(self, budget: Budget) -> int:
        """Return the bits per weight that were asked for, or else the most that fit.

        Raises:
            CompressionError: if they do not fit.
        """
        candidates: tuple[int, ...] = BITS
        if self.bits:
            candidates = (self.bits,)
        affordable = [bits for bits in candidates if budget.stored(self.spec(bits)) <= budget.bits]
        if not affordable:
            raise too_small(self.name, budget)
        return max(affordable)

    def decompose(self, weight: Tensor, statistics: Statistics, budget: Budget) -> Decomposition:
        """ŵ = (⌊w/s⌋ + ½) s, clamped to 2ᵇ levels, with the scale s at which they just cover the group."""
        return Decomposition(sparse="full", weight=quantize(weight, self.affordable_bits(budget), self.group_size))
