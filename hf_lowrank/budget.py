"""What may be stored: by one layer, and by a whole model. All ratios have one denominator: the block linears, dense, in their dtype."""

import math
from bisect import bisect_right
from dataclasses import dataclass, replace
from typing import Any

from .runtime.configuration import LayerSpec


@dataclass(frozen=True)
class Layer:
    """A linear layer of a model as methods see it.

    Attributes:
        name: module name.
        block, blocks: index of its block and number of blocks.
        role: "query", "key", "value", "output", "ffn_in", "ffn_out", "router" or "other" (see `architectures.py`).
        out_features, in_features: m and n.
    """

    name: str
    block: int
    blocks: int
    role: str
    out_features: int
    in_features: int


@dataclass(frozen=True)
class Budget:
    """The stored bits that one layer may take.

    Attributes:
        bits: stored bits, as `LayerSpec.stored_bits` counts them.
        out_features, in_features: m and n of the dense layer.
        value_bits: bits of one stored value (16 for bf16).
        accounting: "bits", or "paper" where mask bits are not counted.
    """

    bits: int
    out_features: int
    in_features: int
    value_bits: int
    accounting: str = "bits"

    def rank(self, spec: LayerSpec = LayerSpec()) -> int:  # noqa: B008  (frozen)
        """The largest rank with which a layer of this spec still fits."""
        return self._largest("rank", spec, min(spec.lowrank_shape(self.out_features, self.in_features)))

    def kept_per_row(self, spec: LayerSpec = LayerSpec(sparse="bitmask")) -> int:  # noqa: B008
        """The largest number of kept values per row with which a bitmask layer of this spec still fits."""
        return self._largest("kept", spec, self.in_features - 1)

    def stored(self, spec: LayerSpec) -> int:
        """Bits that a layer of this spec takes."""
        return spec.stored_bits(self.out_features, self.in_features, self.value_bits, self.accounting)

    def _largest(self, field: str, spec: LayerSpec, limit: int) -> int:
        def stored(value: int) -> int:
            fields: dict[str, Any] = {field: value}
            return self.stored(replace(spec, **fields))

        return max(bisect_right(range(limit + 1), self.bits, key=stored) - 1, 0)  # stored bits grow with either field


@dataclass(frozen=True)
class ModelBudget:
    """The stored bits of a whole model's block linears.

    Attributes:
        ratio: fraction of the dense bits to remove.
        value_bits: bits per value of each layer, by name (its dtype in the checkpoint).
        bias_bits: bits of each layer's own bias, by name (stored dense and compressed alike).
        accounting: "bits" or "paper".
    """

    ratio: float
    value_bits: dict[str, int]
    bias_bits: dict[str, int]
    accounting: str = "bits"

    def dense_bits(self, layer: Layer) -> int:
        """Bits of the dense layer, with its bias."""
        return layer.out_features * layer.in_features * self.value_bits[layer.name] + self.bias_bits[layer.name]

    def stored_bits(self, layer: Layer, spec: LayerSpec) -> int:
        """Bits of the compressed layer without its own bias; a bias that the method adds goes into that one where there is one."""
        if self.bias_bits[layer.name]:
            spec = replace(spec, bias=False)
        return spec.stored_bits(layer.out_features, layer.in_features, self.value_bits[layer.name], self.accounting)

    def available(self, compressed: list[Layer], dense: list[Layer]) -> int:
        """Bits that the compressed layers may take together, without their biases."""
        total = sum(self.dense_bits(layer) for layer in compressed + dense)
        unchanged = sum(self.dense_bits(layer) for layer in dense) + sum(
            self.bias_bits[layer.name] for layer in compressed
        )
        return math.floor((1 - self.ratio) * total + 1e-6) - unchanged

    def removed(self, bits: int, compressed: list[Layer], dense: list[Layer]) -> float:
        """The ratio that results if the compressed layers take `bits` together, without their biases."""
        total = sum(self.dense_bits(layer) for layer in compressed + dense)
        return (self.available(compressed, dense) - bits) / total + self.ratio

    def layer_budget(self, layer: Layer, bits: int) -> Budget:
        """A budget of `bits` for one layer."""
        return Budget(bits, layer.out_features, layer.in_features, self.value_bits[layer.name], self.accounting)
