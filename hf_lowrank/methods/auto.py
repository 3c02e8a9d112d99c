"""The recipe that spends every byte where it helps most: per layer a quantised matrix, few values beside signs, or low rank."""

from dataclasses import dataclass, field, replace
from typing import ClassVar

from torch import Tensor

from ..budget import Layer
from ..runtime.configuration import LayerSpec
from ..runtime.quantization import Quantized
from .base import Choice, Decomposition, MixedMethod, Statistics
from .lowrank import LowRank
from .registry import register_method
from .rounding import INPUT_DAMPING, OUTPUT_DAMPING, compensated_both, gram_root, rounded_values, rounding_losses
from .second_order import damped, output_weights, refit_scales, row_errors, sampled_rows
from .slab_gram import Parts, SLaBGram, fit, interpolated_losses, kept_spec

GROUPS = (32, 64, 128)
"""Weights of a row that may share a scale."""
KEPT_BITS, KEPT_GROUP = 4, 32
"""Of quantised values kept beside signs."""
LARGEST_QUANTISED_SHARE = 0.3
"""Of values kept beside signs; from there on a quantised matrix is the better use of the bytes."""


@register_method("auto")
@dataclass
class Auto(MixedMethod):
    """Chooses for every layer, by expected loss per byte, between quantised weights, values beside signs, and low rank."""

    quantised: bool = field(
        default=True, metadata={"help": "whether values may be quantised, or are all stored in the model's dtype"}
    )

    source: ClassVar[str] = "this project; parts after YAQA, arXiv 2505.22988, SLaB, 3BASiL and IO-SVD"

    def min_spec(self, layer: Layer) -> LayerSpec:
        return SLaBGram().min_spec(layer)

    def next_spec(self, layer: Layer, spec: LayerSpec) -> LayerSpec:
        """One more rank, bit per weight, or kept value per row."""
        if spec.rank:
            return replace(spec, rank=spec.rank + 1)
        if spec.sparse == "full":
            return replace(spec, weight_bits=spec.weight_bits + 1)
        return SLaBGram().next_spec(layer, spec)

    def max_steps(self, layer: Layer) -> int:
        return SLaBGram().max_steps(layer)

    def choices(self, layer: Layer, weight: Tensor, statistics: Statistics, value_bits: int) -> list[Choice]:
        """All that a layer could become, with tr(G D C Dᵀ) of each, G diagonal where errors of different outputs are independent."""
        lowrank = LowRank().choices(layer, weight, statistics, value_bits)
        if not self.quantised:
            return [*SLaBGram().choices(layer, weight, statistics, value_bits), *lowrank]
        return [*self.full_choices(weight, statistics), *self.kept_choices(layer, weight, statistics), *lowrank]

    def full_choices(self, weight: Tensor, statistics: Statistics) -> list[Choice]:
        """Quantised matrices, at every number of bits."""
        inputs, outputs = self.roots(weight, statistics)
        rows, columns = outputs.diagonal() ** -2 / max(statistics.tokens, 1), inputs.diagonal() ** -2
        found: list[Choice] = []
        for group in sorted({min(group, weight.shape[1]) for group in GROUPS}):
            losses = rounding_losses(weight, group, rows, columns)
            found += [
                Choice(LayerSpec(sparse="full", weight_bits=bits, weight_group=group), loss)
                for bits, loss in losses.items()
            ]
        return found

    def kept_choices(self, layer: Layer, weight: Tensor, statistics: Statistics) -> list[Choice]:
        """Quantised values beside signs."""
        C, d = damped(statistics.require("gram", self.name))
        some, weights = sampled_rows(
            weight, output_weights(statistics.output_gram, weight.shape[0]) / max(statistics.tokens, 1)
        )

        def loss(parts: Parts) -> float:
            rounded, _ = with_rounded_values(some * d, C, d, parts, weights)
            return float((row_errors(some * d - rounded.values - rounded.binary(), C) * weights).sum())

        most = int(LARGEST_QUANTISED_SHARE * layer.in_features)
        losses = interpolated_losses(some * d, C, most, loss)
        return [Choice(kept_spec(kept, KEPT_BITS, KEPT_GROUP), value) for kept, value in enumerate(losses)]

    def roots(self, weight: Tensor, statistics: Statistics) -> tuple[Tensor, Tensor]:
        """Cholesky factors of the inverse Gram matrices of inputs and of output gradients."""
        m, n = weight.shape
        return (
            gram_root(statistics.require("gram", self.name), n, INPUT_DAMPING).to(weight),
            gram_root(statistics.output_gram, m, OUTPUT_DAMPING).to(weight),
        )

    def build(self, weight: Tensor, statistics: Statistics, spec: LayerSpec) -> Decomposition:
        """Decompose `weight` (m, n) by the means of the part that the spec asks for."""
        if spec.rank:
            return LowRank().build(weight, statistics, spec)
        if spec.sparse == "full":
            quantised = compensated_both(weight, *self.roots(weight, statistics), spec.weight_bits, spec.weight_group)
            return Decomposition(sparse="full", weight=quantised)
        if not spec.weight_bits:
            return SLaBGram().build(weight, statistics, spec)
        C, d = damped(statistics.require("gram", self.name))
        weights = output_weights(statistics.output_gram, weight.shape[0])
        parts, values = with_rounded_values(weight * d, C, d, fit(weight * d, C, spec.kept, weights), weights)
        return parts.decomposition(d, values)


def with_rounded_values(
    weight: Tensor, gram: Tensor, d: Tensor, parts: Parts, row_weights: Tensor
) -> tuple[Parts, Quantized | None]:
    """The parts with their values rounded and their scales fitted to that, and the codes of the values; none if nothing is kept.

    Args:
        weight, gram: scaled by the input norms `d` (n,), as for `fit`.
    """
    if not bool(parts.mask.any()):
        return parts, None
    quantised, values = rounded_values(
        weight - parts.binary(), gram, parts.mask, parts.values, 1 / d, KEPT_BITS, KEPT_GROUP
    )
    u, v = refit_scales(weight - values, gram, parts.signs, parts.scale_in, row_weights)
    return replace(parts, values=values, scale_out=u, scale_in=v), quantised
