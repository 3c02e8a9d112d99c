"""Auto: spends every byte where it helps most, per layer on a quantized matrix, values beside signs, or low rank."""

from dataclasses import dataclass, field, replace
from typing import ClassVar

from torch import Tensor

from ..budget import Layer
from ..runtime.configuration import LayerSpec
from ..runtime.quantization import Quantized
from .base import Decomposition, Statistics
from .lowrank import LowRank
from .mixed import Choice, MixedMethod
from .registry import register_method
from .rounding import INPUT_DAMPING, OUTPUT_DAMPING, compensated_both, gram_root, rounded_values, rounding_losses
from .second_order import damped, output_weights, refit_scales, row_errors, sampled_rows
from .slab_gram import Parts, SLaBGram, fit, interpolated_losses, kept_spec

GROUPS = (32, 64, 128)
"""Numbers of weights of a row that may share a scale."""

KEPT_BITS = 4
"""Bits of the quantized values that are kept beside signs."""

KEPT_GROUP = 32
"""Number of quantized values kept beside signs that share a scale."""

LARGEST_QUANTIZED_SHARE = 0.3
"""Largest share of values kept beside signs. Beyond it a quantized matrix is the better use of the bytes."""

FOR_QUANTIZED = (5.0, 8.0)
"""Stored bits per weight between which quantized matrices are all that is measured: they are what is chosen there.

On a model of 135 million parameters at 5 bits, one layer of 210 is chosen otherwise. Above, they leave bits unused.
"""


@register_method("auto")
@dataclass
class Auto(MixedMethod):
    """Chooses per layer, by expected loss per byte, between a quantized matrix, values beside signs and low rank."""

    quantised: bool = field(
        default=True, metadata={"help": "whether values may be quantized, or are all stored in the model's dtype"}
    )

    source: ClassVar[str] = "this project; parts after YAQA, arXiv 2505.22988, SLaB, 3BASiL and IO-SVD"
    quantizes: ClassVar[bool] = True

    # Signs and scales alone are the smallest choice. Upward the budget is bounded as for slab-gram.
    def min_spec(self, layer: Layer) -> LayerSpec:
        return SLaBGram().min_spec(layer)

    def next_spec(self, layer: Layer, spec: LayerSpec) -> LayerSpec:
        """Return the spec with one more rank, bit per weight, or kept value per row, whichever it has."""
        if spec.rank:
            return replace(spec, rank=spec.rank + 1)
        if spec.sparse == "full":
            return replace(spec, weight_bits=spec.weight_bits + 1)
        return SLaBGram().next_spec(layer, spec)

    def max_steps(self, layer: Layer) -> int:
        return SLaBGram().max_steps(layer)

    def fullest_spec(self, layer: Layer) -> LayerSpec:
        return kept_spec(1, KEPT_BITS, KEPT_GROUP) if self.quantised else kept_spec(1)

    def choices(
        self, layer: Layer, weight: Tensor, statistics: Statistics, value_bits: int, affordable: float = 0.0
    ) -> list[Choice]:
        """Return all that the layer could become, with tr(G D C Dᵀ) of each.

        G is taken as diagonal where the errors of different outputs are independent.
        """
        fewest, most = FOR_QUANTIZED
        if self.quantised and fewest <= affordable <= most:
            return self.full_choices(weight, statistics)
        lowrank = LowRank().choices(layer, weight, statistics, value_bits)
        if not self.quantised:
            return [*SLaBGram().choices(layer, weight, statistics, value_bits), *lowrank]
        return [*self.full_choices(weight, statistics), *self.kept_choices(layer, weight, statistics), *lowrank]

    def full_choices(self, weight: Tensor, statistics: Statistics) -> list[Choice]:
        """Return the choices of a quantized matrix, at every number of bits and several sizes of groups."""
        inputs, outputs = self.roots(weight, statistics)
        rows, columns = outputs.diagonal() ** -2 / max(statistics.tokens, 1), inputs.diagonal() ** -2
        choices: list[Choice] = []
        # A group is no longer than a row, so that in a narrow layer several sizes are one.
        for group in sorted({min(group, weight.shape[1]) for group in GROUPS}):
            for bits, loss in rounding_losses(weight, group, rows, columns).items():
                choices.append(Choice(LayerSpec(sparse="full", weight_bits=bits, weight_group=group), loss))
        return choices

    def kept_choices(self, layer: Layer, weight: Tensor, statistics: Statistics) -> list[Choice]:
        """Return the choices of quantized values beside signs."""
        C, d = damped(self.input_gram(statistics))
        row_weights = output_weights(statistics.output_gram, weight.shape[0]) / max(statistics.tokens, 1)
        sample, sample_weights = sampled_rows(weight, row_weights)

        # Values are kept at a few bits each, so the loss includes the loss of rounding them.
        def loss(parts: Parts) -> float:
            rounded, _ = with_rounded_values(sample * d, C, d, parts, sample_weights)
            return float((row_errors(sample * d - rounded.values - rounded.binary(), C) * sample_weights).sum())

        most = int(LARGEST_QUANTIZED_SHARE * layer.in_features)
        losses = interpolated_losses(sample, C, d, most, loss=loss)
        return [Choice(kept_spec(kept, KEPT_BITS, KEPT_GROUP), value) for kept, value in enumerate(losses)]

    def roots(self, weight: Tensor, statistics: Statistics) -> tuple[Tensor, Tensor]:
        """Return the Cholesky factors, (n, n) and (m, m), of the inverse Gram matrices of inputs and outputs."""
        m, n = weight.shape
        return (
            gram_root(self.input_gram(statistics), n, INPUT_DAMPING).to(weight),
            gram_root(statistics.output_gram, m, OUTPUT_DAMPING).to(weight),
        )

    def build(self, weight: Tensor, statistics: Statistics, spec: LayerSpec) -> Decomposition:
        """Decompose `weight` (m, n) by the method that makes such a spec."""
        if spec.rank:
            return LowRank().build(weight, statistics, spec)
        if spec.sparse == "full":
            inputs, outputs = self.roots(weight, statistics)
            quantized = compensated_both(weight, inputs, outputs, spec.weight_bits, spec.weight_group)
            return Decomposition(sparse="full", weight=quantized)
        if not spec.weight_bits:
            return SLaBGram().build(weight, statistics, spec)
        C, d = damped(self.input_gram(statistics))
        row_weights = output_weights(statistics.output_gram, weight.shape[0])
        parts = fit(weight, C, d, spec.kept, row_weights)
        parts, values = with_rounded_values(weight * d, C, d, parts, row_weights)
        return parts.decomposition(d, values)


def with_rounded_values(
    weight: Tensor, gram: Tensor, d: Tensor, parts: Parts, row_weights: Tensor
) -> tuple[Parts, Quantized | None]:
    """Return the parts with values rounded and scales fitted to that, and the codes of the values.

    The codes are None if nothing is kept.

    Args:
        weight, gram: scaled by the input norms `d` (n,), as for `fit`.
    """
    if not bool(parts.mask.any()):
        return parts, None
    # Rounding errors of the values are errors of the target to which the scales are fitted again.
    residual = weight - parts.binary()
    quantized, values = rounded_values(residual, gram, parts.mask, parts.values, 1 / d, KEPT_BITS, KEPT_GROUP)
    u, v = refit_scales(weight - values, gram, parts.signs, parts.scale_in, row_weights)
    return replace(parts, values=values, scale_out=u, scale_in=v), quantized
