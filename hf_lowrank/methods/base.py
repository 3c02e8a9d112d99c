"""What every method shares: the statistics it gets, the budget it must keep, the decomposition it returns."""

import dataclasses
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import torch
from torch import Tensor

from ..runtime.configuration import LayerSpec
from ..runtime.errors import CompressionError
from ..runtime.layers import SparseLowRankLinear


@dataclass(frozen=True)
class Statistics:
    """What calibration tokens say about the input x of a linear layer; linears that see the same input share one.

    Attributes:
        tokens: number T of tokens seen.
        gram: C = Σ_t x_t x_tᵀ, (n, n) float64; None if no method asked for it.
        column_norms: ‖X_j‖₂ = √(Σ_t x_tj²), (n,) float64.
        mean: (Σ_t x_t) / T, (n,) float64.
        mean_abs: (Σ_t |x_t|) / T, (n,) float64.
    """

    tokens: int
    column_norms: Tensor
    mean: Tensor
    mean_abs: Tensor
    gram: Tensor | None = None

    def select(self, order: Tensor) -> "Statistics":
        """The statistics of the inputs `order`, (k,) indices: a permutation or a part."""
        return replace(
            self,
            column_norms=self.column_norms[order],
            mean=self.mean[order],
            mean_abs=self.mean_abs[order],
            gram=None if self.gram is None else self.gram[order][:, order],
        )


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
        return self._largest("rank", spec, min(self.out_features, self.in_features))

    def kept_per_row(self, spec: LayerSpec = LayerSpec(sparse="bitmask")) -> int:  # noqa: B008
        """The largest number of kept values per row with which a bitmask layer of this spec still fits."""
        return self._largest("kept", spec, self.in_features - 1)

    def stored(self, spec: LayerSpec) -> int:
        """Bits that a layer of this spec takes."""
        return spec.stored_bits(self.out_features, self.in_features, self.value_bits, self.accounting)

    def _largest(self, field: str, spec: LayerSpec, limit: int) -> int:
        fixed = self.stored(replace(spec, **{field: 0}))
        price = self.stored(replace(spec, **{field: 1})) - fixed
        return max(min((self.bits - fixed) // price, limit), 0)


@dataclass(frozen=True)
class Decomposition:
    """The parts of one weight (m, n), in the precision of the method; see `SparseLowRankLinear.from_parts` for the shapes.

    Attributes:
        sparse: layout of the sparse part.
        weight: its values: (p, n), (m, p), or for a bitmask the dense (m, n) matrix that `mask` selects from.
        bias: what the method adds to the output (m,), beside the layer's own bias.
    """

    sparse: str = "none"
    weight: Tensor | None = None
    mask: Tensor | None = None
    lowrank_a: Tensor | None = None
    lowrank_b: Tensor | None = None
    signs: Tensor | None = None
    scale_in: Tensor | None = None
    scale_out: Tensor | None = None
    bias: Tensor | None = None

    def to_layer(self, out_features: int, in_features: int, bias: Tensor | None = None, dtype: torch.dtype | None = None) -> SparseLowRankLinear:
        """The compressed layer, rounded once to `dtype`; `bias` (m,) is that of the dense layer."""
        parts: dict[str, Any] = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        if bias is not None:
            parts["bias"] = bias if self.bias is None else bias.to(self.bias.dtype) + self.bias
        return SparseLowRankLinear.from_parts(in_features, out_features, **parts, dtype=dtype)


@dataclass(frozen=True)
class Layer:
    """A linear layer of a model as methods see it.

    Attributes:
        name: module name.
        block, blocks: index of its block and number of blocks.
        role: "query", "key", "value", "output", "ffn_in", "ffn_out" or "other" (see `architectures.py`).
        out_features, in_features: m and n.
    """

    name: str
    block: int
    blocks: int
    role: str
    out_features: int
    in_features: int


class Method:
    """A method is its mathematics: weight + statistics + budget → decomposition. No model, no I/O, no global state.

    Subclasses are dataclasses whose fields, with help texts in their metadata, are the method's options.

    Attributes:
        name: set by `register_method`.
        needs_gram: whether `Statistics.gram` is needed.
        sequential: whether a block sees the compressed blocks before it (else the dense ones).
        source: where it was published.
    """

    name: ClassVar[str]
    source: ClassVar[str]
    needs_gram: ClassVar[bool] = False
    sequential: ClassVar[bool] = False

    def leaves_dense(self, layer: Layer) -> str | None:
        """Why the method leaves a layer dense; None if it compresses it."""
        return None

    def smallest(self, layer: Layer) -> LayerSpec:
        """The smallest thing that the method makes of a layer, which bounds the ratios it can reach."""
        return LayerSpec(rank=1)

    def grown(self, layer: Layer, spec: LayerSpec) -> LayerSpec:
        """The next larger thing: one more rank, or one more value per row. Budgets are spread in these steps."""
        return replace(spec, rank=spec.rank + 1)

    def decompose(self, weight: Tensor, statistics: Statistics, budget: Budget) -> Decomposition:
        """Decompose `weight` (m, n), float64, within the budget.

        Raises:
            CompressionError: if the budget is too small for any decomposition of this method.
        """
        raise NotImplementedError


def too_small(method: str, budget: Budget) -> CompressionError:
    """The error of a budget in which a method cannot store anything useful."""
    dense = budget.out_features * budget.in_features * budget.value_bits
    return CompressionError(
        f"{method}: {budget.bits} bits for a {budget.out_features} × {budget.in_features} layer "
        f"({budget.bits / max(dense, 1):.1%} of dense) hold nothing; choose a smaller ratio"
    )
