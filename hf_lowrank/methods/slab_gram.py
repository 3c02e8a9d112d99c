"""Second-order SLaB: sparse plus rank-one times binary, fitted on the whole Gram matrix of a layer's inputs."""

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import ClassVar

import torch
from torch import Tensor

from ..budget import Layer
from ..runtime.configuration import LayerSpec
from ..runtime.quantization import Quantized
from .base import Decomposition, Statistics
from .factorization import leading_components
from .mixed import Choice, MixedMethod
from .registry import register_method
from .second_order import (
    admm_support,
    damped,
    eigenvectors,
    output_weights,
    refit_scales,
    refit_values,
    row_errors,
    sampled_rows,
    sign_descent,
)
from .sparsity import largest_per_row

FIRST_GUESS_ITERATIONS = 20
"""Iterations of plain SLaB, from which the alternation starts."""

ROUNDS = 2
"""Rounds of the alternation over support, values, signs and scales. A third gains about one percent of the error."""

ESTIMATED_SHARES = (0.0, 0.03, 0.1, 0.25, 0.5)
"""Shares of kept values at which the loss of a layer is measured before the budget is spread."""


@dataclass(frozen=True)
class Parts:
    """W ≈ S + (u vᵀ) ⊙ B.

    Attributes:
        values: S, (m, n), zero off the mask.
        mask: (m, n), boolean.
        scale_out, scale_in: u (m,) and v (n,).
        signs: B, ±1, (m, n).
    """

    values: Tensor
    mask: Tensor
    scale_out: Tensor
    scale_in: Tensor
    signs: Tensor

    def binary(self) -> Tensor:
        """Return (u vᵀ) ⊙ B."""
        return torch.outer(self.scale_out, self.scale_in) * self.signs

    def decomposition(self, d: Tensor, quantized: Quantized | None = None) -> Decomposition:
        """Return the parts of W from those of W diag(d), d (n,).

        Args:
            quantized: the values of W, if they are stored as codes.
        """
        signs, scale_in, scale_out = self.signs > 0, (self.scale_in / d)[None], self.scale_out[:, None]
        if not bool(self.mask.any()):
            return Decomposition(signs=signs, scale_in=scale_in, scale_out=scale_out)
        values: Tensor | Quantized
        if quantized is None:
            values = self.values / d
        else:
            values = quantized
        return Decomposition(
            sparse="bitmask", weight=values, mask=self.mask, signs=signs, scale_in=scale_in, scale_out=scale_out
        )


@register_method("slab-gram")
@dataclass
class SLaBGram(MixedMethod):
    """SLaB's layer by second-order means: ADMM support, least-squares values and scales, sign descent.

    Densities come from one budget for the model.
    """

    source: ClassVar[str] = "SLaB, arXiv 2604.04493, with the support step of 3BASiL"

    def min_spec(self, layer: Layer) -> LayerSpec:
        return kept_spec(0)

    def next_spec(self, layer: Layer, spec: LayerSpec) -> LayerSpec:
        return kept_spec(spec.kept + 1)

    def max_steps(self, layer: Layer) -> int:
        return layer.in_features - 1

    def choices(
        self, layer: Layer, weight: Tensor, statistics: Statistics, value_bits: int, affordable: float = 0.0
    ) -> list[Choice]:
        """Return every number of kept values per row, with losses from `interpolated_losses`."""
        C, d = damped(self.input_gram(statistics))
        row_weights = output_weights(statistics.output_gram, weight.shape[0]) / max(statistics.tokens, 1)
        sample, sample_weights = sampled_rows(weight, row_weights)

        def loss(parts: Parts) -> float:
            return float((row_errors(sample * d - parts.values - parts.binary(), C) * sample_weights).sum())

        losses = interpolated_losses(sample, C, d, layer.in_features - 1, loss=loss)
        return [Choice(kept_spec(kept), value) for kept, value in enumerate(losses)]

    def build(self, weight: Tensor, statistics: Statistics, spec: LayerSpec) -> Decomposition:
        """W ≈ W_S + (u vᵀ) ⊙ B, approximately minimizing ‖(W − Ŵ) X‖_F by `fit`."""
        C, d = damped(self.input_gram(statistics))
        row_weights = output_weights(statistics.output_gram, weight.shape[0])
        return fit(weight, C, d, spec.kept, row_weights).decomposition(d)


def kept_spec(kept: int, bits: int = 0, group: int = 0) -> LayerSpec:
    """Return the spec of signs and scales with `kept` values per row beside them, quantized if `bits` are given."""
    if not kept:
        return LayerSpec(kind="sparse_lowrank_binary", binary_rank=1)
    return LayerSpec(
        kind="sparse_lowrank_binary",
        sparse="bitmask",
        kept=kept,
        binary_rank=1,
        weight_bits=bits,
        weight_group=min(group, kept),
    )


def fit(
    weight: Tensor, gram: Tensor, d: Tensor, kept: int, row_weights: Tensor | None = None, rounds: int = ROUNDS
) -> Parts:
    """Return the parts of W diag(d), with `kept` values per row, that make ‖(W − Ŵ) X‖_F small. No step raises it.

    Args:
        weight: W, (m, n).
        gram: D⁻¹ X Xᵀ D⁻¹ (n, n), D = diag(d), positive definite with a diagonal of ones (`damped`).
        d: the input norms, (n,).
        row_weights: weights (m,) of the squared errors of the rows in the fit of `scale_in`; all count alike without
            them.
    """
    parts = first_guess(weight, d, kept)
    scaled = weight * d
    if rounds:
        parts = _alternate(scaled, gram, kept, parts, row_weights, rounds)
    return replace(parts, values=refit_values(scaled - parts.binary(), gram, parts.mask, parts.values))


def _alternate(W: Tensor, C: Tensor, kept: int, parts: Parts, row_weights: Tensor | None, rounds: int) -> Parts:
    """Improve support, values, signs and scales in turn."""
    eigen = eigenvectors(C)  # of the third power of n, and the same in every round
    for _ in range(rounds):
        R = W - parts.binary()
        parts = replace(parts, values=refit_values(R, C, parts.mask, parts.values, rough=True))
        # ADMM does not always find a better support. Each row takes the new one only if it lowers the row's error.
        support = admm_support(R, C, eigen, kept, parts.values)
        values = refit_values(R, C, support, rough=True)
        better = (row_errors(R - values, C) < row_errors(R - parts.values, C))[:, None]
        values = torch.where(better, values, parts.values)
        parts = replace(parts, values=values, mask=torch.where(better, support, parts.mask))

        R = W - parts.values
        magnitudes = torch.outer(parts.scale_out, parts.scale_in)
        parts = replace(parts, signs=sign_descent(R, C, parts.signs, magnitudes))
        u, v = refit_scales(R, C, parts.signs, parts.scale_in, row_weights)
        parts = replace(parts, scale_out=u, scale_in=v)
    return parts


def first_guess(weight: Tensor, d: Tensor, kept: int) -> Parts:
    """Return the parts of W diag(d) by plain SLaB (arXiv 2604.04493) of W, with entries scored by |Y_ij| d_j^½.

    The end of the alternation depends on where it starts. From here it is 3 to 8 percent lower than from SLaB of
    W diag(d), and never higher than from SLaB with its own scores |Y_ij| d_j.
    """
    importance = d.sqrt()
    S = torch.zeros_like(weight)
    V: Tensor | None = None
    for _ in range(FIRST_GUESS_ITERATIONS):
        R = weight - S
        U, V = leading_components(R.abs(), 1, V)
        B = torch.where(R >= 0, 1.0, -1.0).to(weight)
        Y = weight - U @ V * B
        mask = largest_per_row(Y.abs() * importance, kept)
        S = torch.where(mask, Y, 0.0)
    assert V is not None, "there is at least one iteration"
    return Parts(S * d, mask, U[:, 0], V[0] * d, B)


def interpolated_losses(
    weight: Tensor, gram: Tensor, d: Tensor, most: int, loss: Callable[[Parts], float]
) -> list[float]:
    """Return the losses with 0 to `most` kept values per row.

    They are measured by `loss` at a few numbers, on plain SLaB with refitted values, and log-linear elsewhere.
    """
    # The rounds of the alternation are left out, which would take most of the time.
    positions = sorted({min(round(share * weight.shape[1]), most) for share in ESTIMATED_SHARES})
    tiny = torch.finfo(weight.dtype).tiny  # a loss of zero has no logarithm
    logs = [math.log(max(loss(fit(weight, gram, d, kept, rounds=0)), tiny)) for kept in positions]
    losses, slope = [math.exp(logs[0])], 0.0
    for (start, end), (first, last) in zip(pairwise(positions), pairwise(logs), strict=True):
        slope = (last - first) / (end - start)
        losses += [math.exp(first + slope * (kept - start)) for kept in range(start + 1, end + 1)]
    # Beyond the last measured number the last slope goes on.
    losses += [math.exp(logs[-1] + slope * (kept - positions[-1])) for kept in range(positions[-1] + 1, most + 1)]
    return losses
