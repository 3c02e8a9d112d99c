"""How much the model's loss cares about the outputs of each linear layer: Gram matrices of output gradients."""

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from transformers import PreTrainedModel

from ..execution.process_group import SINGLE_PROCESS, ProcessGroup
from ..runtime.errors import NumericalError
from .batches import TokenBatch

ENOUGH_TOKENS = 16384
"""Once so many tokens were seen, the batches that are left add little to the estimate."""


def output_grams(
    model: PreTrainedModel,
    layers: list[str],
    batches: list[TokenBatch],
    seed: int,
    group: ProcessGroup = SINGLE_PROCESS,
) -> dict[str, Tensor]:
    """G = Σ_t g_t g_tᵀ, (m, m) float64, of each linear layer named, g_t = ∂L/∂y_t of its output y at token t; estimated from some.

    L is the cross-entropy, summed over tokens, of next tokens drawn from the dense model's own distribution: then the mean of
    gradient products is the Fisher matrix, the curvature of KL(dense ‖ compressed). With C = Σ x xᵀ of the inputs, a change D of the
    weight costs about tr(G D C Dᵀ) / 2T (Kronecker factors: Martens and Grosse, 2015; for truncation: IO-SVD, papers §6).

    Raises:
        NumericalError: if a gradient is not finite, naming the layer.
    """
    grams: dict[str, Tensor] = {}
    mask: Tensor | None = None

    def watch(name: str) -> Any:
        def count(gradient: Tensor) -> None:
            g = gradient[mask] if mask is not None and gradient.shape[:2] == mask.shape else gradient.flatten(0, -2)
            g = g.float()
            grams[name] = grams.get(name, 0) + (g.T @ g).double()  # the product of one batch; the sum is float64

        def hook(module: torch.nn.Module, inputs: tuple[Any, ...], output: Tensor) -> None:
            if output.requires_grad:
                output.register_hook(count)

        return hook

    embeddings = model.get_input_embeddings()
    handles = [model.get_submodule(name).register_forward_hook(watch(name)) for name in layers]
    handles.append(embeddings.register_forward_hook(lambda module, inputs, output: output.detach().requires_grad_()))
    frozen = {parameter: parameter.requires_grad for parameter in model.parameters()}
    generator = torch.Generator().manual_seed(seed)
    try:
        for parameter in frozen:
            parameter.requires_grad_(False)
        used: list[TokenBatch] = []
        seen = 0
        for batch in batches:
            if seen < ENOUGH_TOKENS:
                used.append(batch)
                seen += batch.tokens
        mine = set(group.split(range(len(used))))
        for position, batch in enumerate(used):
            if position not in mine:
                torch.rand(
                    batch.input_ids.numel(), 1, generator=generator
                )  # as drawn elsewhere, so that our next batch gets its own
                continue
            input_ids = batch.input_ids.to(model.device)
            attended = None if batch.attention_mask is None else batch.attention_mask.to(model.device)
            mask = None if attended is None else attended.bool()
            with torch.enable_grad():
                logits = (
                    model(input_ids=input_ids, attention_mask=attended, use_cache=False).logits.float().flatten(0, 1)
                )
                drawn = _draw(logits.detach(), generator)
                counted = drawn if mask is None else drawn.masked_fill(~mask.flatten(), -100)
                F.cross_entropy(logits, counted, ignore_index=-100, reduction="sum").backward()
    finally:
        for handle in handles:
            handle.remove()
        for parameter, required in frozen.items():
            parameter.requires_grad_(required)
    grams = group.all_reduce(grams)
    share = seen / sum(batch.tokens for batch in batches)
    for name, gram in grams.items():
        gram /= share
        if not bool(gram.isfinite().all()):
            raise NumericalError(
                f"{name}: the gradient of the loss is not finite; check the weights or use a wider dtype"
            )
    return grams


def _draw(logits: Tensor, generator: torch.Generator) -> Tensor:
    """One token from the distribution of each row of `logits` (T, V), (T,): where its cumulative sum passes a uniform number."""
    cumulated = logits.softmax(dim=1).cumsum(dim=1)
    uniform = torch.rand(len(logits), 1, generator=generator).to(logits.device)
    return (
        torch.searchsorted(cumulated, uniform * cumulated[:, -1:], right=True)
        .squeeze(1)
        .clamp(max=logits.shape[1] - 1)
    )
