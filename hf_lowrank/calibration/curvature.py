"""Curvature of the model's loss by the outputs of each linear layer: Gram matrices of output gradients.

For a layer with outputs y, G = Σ_t g_t g_tᵀ with g_t = ∂L/∂y_t. L is the cross-entropy, summed over tokens, of next
tokens drawn from the dense model's own distribution. With such tokens the mean of gradient products is the Fisher
matrix, the curvature of KL(dense ‖ compressed). With C = Σ x xᵀ of the layer's inputs, a change D of its weight costs
about tr(G D C Dᵀ) / 2T. G and C are the Kronecker factors of K-FAC (Martens and Grosse, arXiv 1503.05671). IO-SVD
(arXiv 2605.15626) truncates by both.

K-FAC takes inputs and gradients to be independent. They are not where attention sinks: all queries look at the first
token, so that its value has a gradient larger than all others together, and its normalized input is nearly zero. So
each g_t g_tᵀ is weighted by how large x_t is among the inputs. With the errors of SLaB on a model of 135 million
parameters, tr(G D C Dᵀ) / 2T then is within about 10 percent of Σ_t (g_tᵀ D x_t)² / 2T for each kind of layer. Without
weights it is six times as much for the value projections.
"""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from ..execution.process_group import SINGLE_PROCESS, ProcessGroup
from .batches import TokenBatch
from .gradients import GradientSums, check_finite_gradients
from .grams import add_product, fill_upper_triangle, products_of

ENOUGH_TOKENS = 16384
"""Number of tokens after which no further batches are used, as they add little to the estimate."""


class OutputGramSums(GradientSums):
    """G, (m, m) float32, for each layer, scaled from the tokens that were used to those of all batches.

    Args:
        layers: the linear layers by module name.
        share: the share of the tokens that is used.
    """

    def __init__(self, layers: Mapping[str, nn.Module], share: float = 1.0) -> None:
        super().__init__(layers)
        self.share = share
        self._sums: dict[str, Tensor] = {}

    def _add(self, name: str, x: Tensor, gradient: Tensor) -> None:
        if self.mask is not None and gradient.shape[:2] == self.mask.shape:
            g, x = gradient[self.mask], x[self.mask]
        else:  # the layer of an expert, whose tokens are a part of the batch in an order of their own
            g, x = gradient.flatten(0, -2), x.flatten(0, -2)
        if name not in self._sums:
            self._sums[name] = torch.zeros(g.shape[1], g.shape[1], device=g.device)
        # Float32 is precise enough: the matrix is damped wherever it is used.
        with products_of(g.dtype):
            add_product(self._sums[name], g.float() * relative_energies(x).sqrt()[:, None])

    def end_batch(self, group: ProcessGroup = SINGLE_PROCESS) -> None:
        """Nothing is done between two batches, as the sums are over tokens."""

    def totals(self, group: ProcessGroup = SINGLE_PROCESS) -> dict[str, Tensor]:
        totals = group.all_reduce(self._sums)
        for total in totals.values():
            fill_upper_triangle(total)
            total /= self.share
        # This is checked after the sum over processes, so that all of them raise the same error.
        check_finite_gradients(totals)
        return totals


def relative_energies(x: Tensor) -> Tensor:
    """Return the energy of each input in x (T, n), (T,) float32: 1 on average, with all channels counted alike."""
    squares = x.float().square()
    means = squares.mean(dim=0)
    return squares @ torch.where(means > 0, 1 / means, 0.0) / (means > 0).sum().clamp(min=1)


def first_batches(batches: Sequence[TokenBatch]) -> list[TokenBatch]:
    """Return the first batches that have `ENOUGH_TOKENS` tokens together, or all."""
    used: list[TokenBatch] = []
    for batch in batches:
        if sum(earlier.tokens for earlier in used) >= ENOUGH_TOKENS:
            break
        used.append(batch)
    return used
