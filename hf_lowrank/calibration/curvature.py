"""Curvature of the model's loss by the outputs of each linear layer: Gram matrices of output gradients."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import PreTrainedModel

from ..execution.process_group import SINGLE_PROCESS, ProcessGroup
from .batches import IGNORED_LABEL, TokenBatch
from .gradients import check_finite_gradients, frozen_parameters

ENOUGH_TOKENS = 16384
"""Number of tokens after which no further batches are used, as they add little to the estimate."""


def output_grams(
    model: PreTrainedModel,
    layers: list[str],
    batches: list[TokenBatch],
    seed: int,
    group: ProcessGroup = SINGLE_PROCESS,
) -> dict[str, Tensor]:
    """Estimate G = Σ_t g_t g_tᵀ, (m, m) float64, for each of the named linear layers, g_t = ∂L/∂y_t at its output y_t.

    L is the cross-entropy, summed over tokens, of next tokens drawn from the dense model's own distribution. With such
    tokens the mean of gradient products is the Fisher matrix, the curvature of KL(dense ‖ compressed). With C = Σ x xᵀ
    of the layer's inputs, a change D of its weight costs about tr(G D C Dᵀ) / 2T. G and C are the Kronecker factors of
    K-FAC (Martens and Grosse, arXiv 1503.05671). IO-SVD (arXiv 2605.15626) truncates by both.

    The sums over the first `ENOUGH_TOKENS` tokens are scaled to the number of tokens in all batches.

    Args:
        seed: the seed of the drawn tokens.

    Raises:
        NumericalError: if a gradient is not finite, naming the layer.
    """
    used, used_tokens = _first_batches(batches)
    generator = torch.Generator().manual_seed(seed)
    own_positions = set(group.split(range(len(used))))
    collector = _OutputGramCollector(model, layers)
    with collector.collecting(), frozen_parameters(model):
        for position, batch in enumerate(used):
            if position in own_positions:
                _backpropagate_drawn_tokens(model, batch, collector, generator)
            else:
                # Another process draws the tokens of this batch: skip its numbers, so that our next batch gets its
                # own.
                torch.rand(batch.input_ids.numel(), 1, generator=generator)
    grams = group.all_reduce(collector.grams)
    share = used_tokens / sum(batch.tokens for batch in batches)
    for gram in grams.values():
        gram /= share
    # This is checked after the sum over processes, so that all of them raise the same error.
    check_finite_gradients(grams)
    return grams


def _first_batches(batches: list[TokenBatch]) -> tuple[list[TokenBatch], int]:
    """Return the first batches that have `ENOUGH_TOKENS` tokens together, and the number of tokens in them."""
    used = []
    tokens = 0
    for batch in batches:
        if tokens >= ENOUGH_TOKENS:
            break
        used.append(batch)
        tokens += batch.tokens
    return used, tokens


class _OutputGramCollector:
    """Sums the Gram matrices of the gradients at the outputs of linear layers.

    Attributes:
        grams: the sums so far by layer name, (m, m) float64.
        mask: (B, T) bool of the tokens of the current batch that count. None if all count.
    """

    def __init__(self, model: PreTrainedModel, layers: list[str]) -> None:
        self.grams: dict[str, Tensor] = {}
        self.mask: Tensor | None = None
        self._model = model
        self._layers = layers

    @contextmanager
    def collecting(self) -> Iterator[None]:
        """Add the gradients of every backward pass to the sums while active."""
        handles = []
        for name in self._layers:
            handles.append(self._model.get_submodule(name).register_forward_hook(self._hook(name)))
        # No parameter requires a gradient: the embeddings' output does, so that gradients reach all layers.
        embeddings = self._model.get_input_embeddings()
        handles.append(embeddings.register_forward_hook(_require_gradient))
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    def _hook(self, name: str) -> Callable[..., None]:
        def add(gradient: Tensor) -> None:
            self._add(name, gradient)

        def hook(module: nn.Module, inputs: tuple[Any, ...], output: Tensor) -> None:
            # A layer that does not depend on the embeddings has no gradient.
            if output.requires_grad:
                output.register_hook(add)

        return hook

    def _add(self, name: str, gradient: Tensor) -> None:
        if self.mask is not None and gradient.shape[:2] == self.mask.shape:
            g = gradient[self.mask]
        else:  # the layer of an expert, whose tokens are a part of the batch in an order of their own
            g = gradient.flatten(0, -2)
        g = g.float()
        # Float32 is precise enough for the product of one batch, the sum over batches is float64.
        self.grams[name] = self.grams.get(name, 0) + (g.T @ g).double()


def _require_gradient(module: nn.Module, inputs: tuple[Any, ...], output: Tensor) -> Tensor:
    return output.detach().requires_grad_()


def _backpropagate_drawn_tokens(
    model: PreTrainedModel, batch: TokenBatch, collector: _OutputGramCollector, generator: torch.Generator
) -> None:
    """Run the model forward, draw a next token at every position, and run backward from their cross-entropy."""
    input_ids = batch.input_ids.to(model.device)
    attention_mask = None
    collector.mask = None
    if batch.attention_mask is not None:
        attention_mask = batch.attention_mask.to(model.device)
        collector.mask = attention_mask.bool()
    with torch.enable_grad():
        output = model(input_ids=input_ids, attention_mask=attention_mask, use_cache=False)
        logits = output.logits.float().flatten(0, 1)
        targets = _draw(logits.detach(), generator)
        if collector.mask is not None:
            targets = targets.masked_fill(~collector.mask.flatten(), IGNORED_LABEL)
        # A mean would scale the gradients by the number of tokens in the batch.
        F.cross_entropy(logits, targets, ignore_index=IGNORED_LABEL, reduction="sum").backward()


def _draw(logits: Tensor, generator: torch.Generator) -> Tensor:
    """Draw one token from the distribution of each row of `logits` (T, V), (T,) int64."""
    cumulated = logits.softmax(dim=1).cumsum(dim=1)
    # This is inverse transform sampling. The generator is on the CPU, so that all devices draw the same numbers.
    uniform = torch.rand(len(logits), 1, generator=generator).to(logits.device)
    tokens = torch.searchsorted(cumulated, uniform * cumulated[:, -1:], right=True).squeeze(1)
    # A product that rounds up to the last sum would give a token after the last one.
    return tokens.clamp(max=logits.shape[1] - 1)
