"""Budgets in stored bits: for one layer and for a whole model.

All ratios have one denominator: the stored bits of the linear layers of the model's blocks, dense, in their dtype in
the checkpoint.
"""

import math
from bisect import bisect_right
from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import Any

from .runtime.configuration import LayerSpec


@dataclass(frozen=True)
class Layer:
    """A linear layer of a model as methods see it.

    Attributes:
        name: module name.
        block, blocks: index of its block and number of blocks.
        role: "query", "key", "value", "output", "ffn_in", "ffn_out", "router" or "other" (see
            `models/architectures.py`).
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
        """Return the largest rank with which a layer of this spec still fits."""
        return self._largest("rank", spec, min(spec.lowrank_shape(self.out_features, self.in_features)))

    def kept_per_row(self, spec: LayerSpec = LayerSpec(sparse="bitmask")) -> int:  # noqa: B008
        """Return the largest number of kept values per row with which a bitmask layer of this spec still fits."""
        return self._largest("kept", spec, self.in_features - 1)

    def stored(self, spec: LayerSpec) -> int:
        """Return the bits that a layer of this spec takes."""
        return spec.stored_bits(self.out_features, self.in_features, self.value_bits, self.accounting)

    def _largest(self, field: str, spec: LayerSpec, limit: int) -> int:
        """Return the largest value from 0 to `limit` of a field of `spec` that fits, or 0 if none does."""

        def stored_with(value: int) -> int:
            fields: dict[str, Any] = {field: value}
            return self.stored(replace(spec, **fields))

        # Stored bits grow with either field, so the largest value that fits can be found by bisection.
        return max(bisect_right(range(limit + 1), self.bits, key=stored_with) - 1, 0)


@dataclass(frozen=True)
class ModelBudget:
    """The stored bits of the linear layers of all blocks of a model.

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
        """Return the bits of the dense layer, its bias included."""
        return layer.out_features * layer.in_features * self.value_bits[layer.name] + self.bias_bits[layer.name]

    def total_dense_bits(self, layers: Iterable[Layer]) -> int:
        """Return the bits of several dense layers together."""
        return sum(self.dense_bits(layer) for layer in layers)

    def stored_bits(self, layer: Layer, spec: LayerSpec) -> int:
        """Return the bits of the compressed layer without its own bias.

        A bias that the method adds costs nothing where the layer has a bias of its own, into which it is added.
        """
        if self.bias_bits[layer.name]:
            spec = replace(spec, bias=False)
        return spec.stored_bits(layer.out_features, layer.in_features, self.value_bits[layer.name], self.accounting)

    def available(self, compressed: list[Layer], dense: list[Layer]) -> int:
        """Return the bits that the compressed layers may take together, without their biases."""
        total = self.total_dense_bits(compressed + dense)
        # The small number makes up for the rounding of a product that would be whole, such as 0.3 · 10. It grows with
        # the product, which has 53 bits.
        return math.floor((1 - self.ratio) * total + max(1e-6, total * 2**-50)) - self._unchanged(compressed, dense)

    def removed(self, bits: int, compressed: list[Layer], dense: list[Layer]) -> float:
        """Return the ratio that results if the compressed layers take `bits` together, without their biases."""
        return 1 - (self._unchanged(compressed, dense) + bits) / self.total_dense_bits(compressed + dense)

    def _unchanged(self, compressed: list[Layer], dense: list[Layer]) -> int:
        """Return the bits that are stored in any case: the dense layers, and the biases of the compressed ones."""
        return self.total_dense_bits(dense) + sum(self.bias_bits[layer.name] for layer in compressed)

    def layer_budget(self, layer: Layer, bits: int) -> Budget:
        """Return a budget of `bits` for one layer."""
        return Budget(bits, layer.out_features, layer.in_features, self.value_bits[layer.name], self.accounting)
