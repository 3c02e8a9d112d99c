"""Second-order SLaB: sparse plus rank-one times binary, fitted to the layer's outputs on the whole Gram matrix of its inputs."""

import math
from dataclasses import dataclass, replace
from typing import ClassVar

import torch
from torch import Tensor

from ..budget import Layer
from ..runtime.configuration import LayerSpec
from .base import Choice, ChoosingMethod, Decomposition, Statistics
from .registry import register_method
from .second_order import admm_support, damped, output_weights, refit_scales, refit_values, row_errors, sign_descent
from .sparsity import largest_per_row
from .spectral import leading_components

FIRST_GUESS_ITERATIONS = 20
"""Of plain SLaB, from which the alternation starts."""
ROUNDS = 4
"""Of the alternation over support, values, signs and scales; the objective is flat after that."""
ESTIMATED_SHARES = (0.0, 0.03, 0.1, 0.25, 0.5, 0.75)
"""Shares of kept values at which the loss of a layer is measured before the budget is spread; between them log loss is linear."""


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


@register_method("slab-gram")
@dataclass
class SLaBGram(ChoosingMethod):
    """SLaB's layer by second-order means: ADMM support, least-squares values and scales, sign descent; densities from one budget."""

    source: ClassVar[str] = "SLaB, arXiv 2604.04493, with the support step of 3BASiL"

    def smallest(self, layer: Layer) -> LayerSpec:
        return LayerSpec(kind="sparse_lowrank_binary", sparse="bitmask", kept=0, binary_rank=1)

    def grown(self, layer: Layer, spec: LayerSpec) -> LayerSpec:
        return replace(spec, kept=spec.kept + 1)

    def growth_limit(self, layer: Layer) -> int:
        return layer.in_features - 1

    def choices(self, layer: Layer, weight: Tensor, statistics: Statistics, value_bits: int) -> list[Choice]:
        """Every number of kept values per row; losses from one round of the alternation at a few numbers."""
        smallest, n = self.smallest(layer), layer.in_features
        levels = sorted({min(round(share * n), n - 1) for share in ESTIMATED_SHARES})
        C, d = damped(statistics.require("gram", self.name))
        weights = output_weights(statistics.output_gram, weight.shape[0]) / max(statistics.tokens, 1)
        logs = []
        for kept in levels:
            parts = fit(weight * d, C, kept, rounds=1)
            loss = (row_errors(weight * d - parts.values - parts.binary(), C) * weights).sum()
            logs.append(math.log(max(float(loss), torch.finfo(loss.dtype).tiny)))
        return [Choice(replace(smallest, kept=kept), math.exp(interpolated(levels, logs, kept))) for kept in range(n)]

    def build(self, weight: Tensor, statistics: Statistics, spec: LayerSpec) -> Decomposition:
        """W ≈ W_S + (u vᵀ) ⊙ B, approximately minimising ‖(W − Ŵ) X‖_F; see `fit`."""
        C, d = damped(statistics.require("gram", self.name))
        parts = fit(weight * d, C, spec.kept, output_weights(statistics.output_gram, weight.shape[0]))
        return Decomposition(
            sparse="bitmask",
            weight=parts.values / d,
            mask=parts.mask,
            signs=parts.signs > 0,
            scale_in=(parts.scale_in / d)[None],
            scale_out=parts.scale_out[:, None],
        )


def fit(weight: Tensor, gram: Tensor, kept: int, row_weights: Tensor | None = None, rounds: int = ROUNDS) -> Parts:
    """The parts of W (m, n) with `kept` values per row that make ‖(W − Ŵ) X‖_F small; no step of a round raises it.

    Args:
        gram: C = X Xᵀ (n, n), positive definite with a diagonal of ones: scale W and C by the input norms first.
        row_weights: what the squared error of each row counts in the fit of `scale_in`, (m,); all alike without them.
    """
    W, C = weight, gram
    parts = first_guess(W, kept)
    for _ in range(rounds):
        R = W - parts.binary()
        parts = replace(parts, values=refit_values(R, C, parts.mask))
        support = admm_support(R, C, kept, parts.values)
        values = refit_values(R, C, support)
        better = (row_errors(R - values, C) < row_errors(R - parts.values, C))[:, None]
        parts = replace(parts, values=torch.where(better, values, parts.values), mask=torch.where(better, support, parts.mask))
        R = W - parts.values
        parts = replace(parts, signs=sign_descent(R, C, parts.signs, torch.outer(parts.scale_out, parts.scale_in)))
        u, v = refit_scales(R, C, parts.signs, parts.scale_in, row_weights)
        parts = replace(parts, scale_out=u, scale_in=v)
    return replace(parts, values=refit_values(W - parts.binary(), C, parts.mask))


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


def interpolated(positions: list[int], values: list[float], at: int) -> float:
    """Piecewise linear through (position, value); beyond the last position along the last piece."""
    if len(positions) == 1:
        return values[0]
    piece = next((each for each in range(len(positions) - 1) if at <= positions[each + 1]), len(positions) - 2)
    (x0, x1), (y0, y1) = positions[piece : piece + 2], values[piece : piece + 2]
    return y0 + (y1 - y0) * (at - x0) / (x1 - x0)
