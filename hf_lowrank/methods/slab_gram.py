"""Second-order SLaB: sparse plus rank-one times binary, fitted to the layer's outputs on the whole Gram matrix of its inputs."""

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
from .base import Choice, Decomposition, MixedMethod, Statistics
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
from .spectral import leading_components

FIRST_GUESS_ITERATIONS = 10
"""Of plain SLaB, from which the alternation starts."""
ROUNDS = 2
"""Of the alternation over support, values, signs and scales; a third one gains about one percent of the error."""
ESTIMATED_SHARES = (0.0, 0.03, 0.1, 0.25, 0.5)
"""BudgetShares of kept values at which the loss of a layer is measured before the budget is spread; log loss is linear elsewhere."""


@dataclass(frozen=True)
class Parts:
    """W ≈ S + (u vᵀ) ⊙ B: values (m, n) on a mask, scales u (m,) and v (n,), signs B = ±1 (m, n)."""

    values: Tensor
    mask: Tensor
    scale_out: Tensor
    scale_in: Tensor
    signs: Tensor

    def binary(self) -> Tensor:
        """(u vᵀ) ⊙ B."""
        return torch.outer(self.scale_out, self.scale_in) * self.signs

    def decomposition(self, d: Tensor, quantised: Quantized | None = None) -> Decomposition:
        """The parts of W from those of W diag(d), d (n,); `quantised` holds the values if they are stored as codes."""
        kept = bool(self.mask.any())
        return Decomposition(
            sparse="bitmask" if kept else "none",
            weight=None if not kept else self.values / d if quantised is None else quantised,
            mask=self.mask if kept else None,
            signs=self.signs > 0,
            scale_in=(self.scale_in / d)[None],
            scale_out=self.scale_out[:, None],
        )


@register_method("slab-gram")
@dataclass
class SLaBGram(MixedMethod):
    """SLaB's layer by second-order means: ADMM support, least-squares values and scales, sign descent; densities from one budget."""

    source: ClassVar[str] = "SLaB, arXiv 2604.04493, with the support step of 3BASiL"

    def min_spec(self, layer: Layer) -> LayerSpec:
        return kept_spec(0)

    def next_spec(self, layer: Layer, spec: LayerSpec) -> LayerSpec:
        return kept_spec(spec.kept + 1)

    def max_steps(self, layer: Layer) -> int:
        return layer.in_features - 1

    def choices(self, layer: Layer, weight: Tensor, statistics: Statistics, value_bits: int) -> list[Choice]:
        """Every number of kept values per row; see `interpolated_losses`."""
        C, d = damped(statistics.require("gram", self.name))
        some, weights = sampled_rows(
            weight, output_weights(statistics.output_gram, weight.shape[0]) / max(statistics.tokens, 1)
        )

        def loss(parts: Parts) -> float:
            return float((row_errors(some * d - parts.values - parts.binary(), C) * weights).sum())

        losses = interpolated_losses(some * d, C, layer.in_features - 1, loss)
        return [Choice(kept_spec(kept), value) for kept, value in enumerate(losses)]

    def build(self, weight: Tensor, statistics: Statistics, spec: LayerSpec) -> Decomposition:
        """W ≈ W_S + (u vᵀ) ⊙ B, approximately minimising ‖(W − Ŵ) X‖_F; see `fit`."""
        C, d = damped(statistics.require("gram", self.name))
        return fit(weight * d, C, spec.kept, output_weights(statistics.output_gram, weight.shape[0])).decomposition(d)


def kept_spec(kept: int, bits: int = 0, group: int = 0) -> LayerSpec:
    """Signs and scales, and `kept` values per row beside them, quantised if `bits` are given."""
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


def fit(weight: Tensor, gram: Tensor, kept: int, row_weights: Tensor | None = None, rounds: int = ROUNDS) -> Parts:
    """The parts of W (m, n) with `kept` values per row that make ‖(W − Ŵ) X‖_F small; no step of a round raises it.

    Args:
        gram: C = X Xᵀ (n, n), positive definite with a diagonal of ones: scale W and C by the input norms first.
        row_weights: what the squared error of each row counts in the fit of `scale_in`, (m,); all alike without them.
    """
    parts = first_guess(weight, kept)
    if rounds:
        parts = _alternate(weight, gram, kept, parts, row_weights, rounds)
    return replace(parts, values=refit_values(weight - parts.binary(), gram, parts.mask, parts.values))


def _alternate(W: Tensor, C: Tensor, kept: int, parts: Parts, row_weights: Tensor | None, rounds: int) -> Parts:
    """Support, values, signs and scales in turn; see `fit`."""
    eigen = eigenvectors(C)
    for _ in range(rounds):
        R = W - parts.binary()
        parts = replace(parts, values=refit_values(R, C, parts.mask, parts.values, rough=True))
        support = admm_support(R, C, eigen, kept, parts.values)
        values = refit_values(R, C, support, rough=True)
        better = (row_errors(R - values, C) < row_errors(R - parts.values, C))[:, None]
        parts = replace(
            parts, values=torch.where(better, values, parts.values), mask=torch.where(better, support, parts.mask)
        )
        R = W - parts.values
        parts = replace(parts, signs=sign_descent(R, C, parts.signs, torch.outer(parts.scale_out, parts.scale_in)))
        u, v = refit_scales(R, C, parts.signs, parts.scale_in, row_weights)
        parts = replace(parts, scale_out=u, scale_in=v)
    return parts


def first_guess(weight: Tensor, kept: int) -> Parts:
    """Plain SLaB of a weight that is scaled by its input norms already."""
    S = torch.zeros_like(weight)
    V: Tensor | None = None
    for _ in range(FIRST_GUESS_ITERATIONS):
        R = weight - S
        U, V = leading_components(R.abs(), 1, V)
        B = torch.where(R >= 0, 1.0, -1.0).to(weight)
        Y = weight - U @ V * B
        mask = largest_per_row(Y.abs(), kept)
        S = torch.where(mask, Y, 0.0)
    assert V is not None
    return Parts(S, mask, U[:, 0], V[0], B)


def interpolated_losses(weight: Tensor, gram: Tensor, most: int, loss: Callable[[Parts], float]) -> list[float]:
    """The loss with 0 to `most` kept values per row: by `loss` at a few numbers, on refitted plain SLaB; log-linear elsewhere."""
    positions = sorted({min(round(share * weight.shape[1]), most) for share in ESTIMATED_SHARES})
    tiny = torch.finfo(weight.dtype).tiny
    logs = [math.log(max(loss(fit(weight, gram, kept, rounds=0)), tiny)) for kept in positions]
    found, slope = [math.exp(logs[0])], 0.0
    for (start, end), (low, high) in zip(pairwise(positions), pairwise(logs), strict=True):
        slope = (high - low) / (end - start)
        found += [math.exp(low + slope * (kept - start)) for kept in range(start + 1, end + 1)]
    return found + [math.exp(logs[-1] + slope * (kept - positions[-1])) for kept in range(positions[-1] + 1, most + 1)]
