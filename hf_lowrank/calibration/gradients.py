"""Squared gradients of the language-modeling loss, for methods that weigh weights by their importance to it."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from ..execution.process_group import SINGLE_PROCESS, ProcessGroup
from ..runtime.errors import NumericalError
from .batches import IGNORED_LABEL, TokenBatch


def squared_gradients(
    model: PreTrainedModel, layers: list[str], batches: list[TokenBatch], group: ProcessGroup = SINGLE_PROCESS
) -> dict[str, Tensor]:
    """Return Σ_i F_ij, (n,) float64, for each of the named linear layers, F the mean over batches of (∂L/∂W_ij)².

    L is the mean cross-entropy of the next token on the calibration text, in the dense model.

    Raises:
        NumericalError: if a gradient is not finite, naming the layer.
    """
    modules = {name: model.get_submodule(name) for name in layers}
    weights: list[Any] = [module.weight for module in modules.values()]
    sums: dict[str, Tensor] = {}
    with frozen_parameters(model):
        # Only these weights get gradients: those of embeddings and head would take memory for nothing.
        for weight in weights:
            weight.requires_grad_(True)
        for batch in group.split(batches):
            if not has_next_token(batch):
                continue
            with torch.enable_grad():
                loss = _next_token_loss(model, batch)
                # An expert that no token of the batch reaches has no gradient: zeros stand for it.
                gradients = torch.autograd.grad(loss, weights, materialize_grads=True)
            for (name, module), gradient in zip(modules.items(), gradients, strict=True):
                # (∂L/∂W)² summed over the outputs i leaves one value per input j.
                output_dimension = 1 if isinstance(module, Conv1D) else 0  # Conv1D stores (n, m)
                per_input = gradient.double().square().sum(dim=output_dimension)
                sums[name] = sums.get(name, 0) + per_input / len(batches)
    sums = group.all_reduce(sums)
    check_finite_gradients(sums)
    return sums


def has_next_token(batch: TokenBatch) -> bool:
    """Return whether in any sequence of a batch a token that counts follows another one that does."""
    if batch.attention_mask is None:
        return batch.input_ids.shape[1] > 1
    counts = batch.attention_mask.bool()
    return bool((counts[:, 1:] & counts[:, :-1]).any())


@contextmanager
def frozen_parameters(model: PreTrainedModel) -> Iterator[None]:
    """Turn off the gradients of all parameters while active, and set `requires_grad` back afterwards."""
    required = {parameter: parameter.requires_grad for parameter in model.parameters()}
    try:
        for parameter in required:
            parameter.requires_grad_(False)
        yield
    finally:
        for parameter, before in required.items():
            parameter.requires_grad_(before)


def check_finite_gradients(sums: Mapping[str, Tensor]) -> None:
    """Raise NumericalError, naming the layer, if a sum over gradients is not finite."""
    for name, total in sums.items():
        if not bool(total.isfinite().all()):
            raise NumericalError(
                f"{name}: the gradient of the loss is not finite; check the weights or use a wider dtype"
            )


def _next_token_loss(model: PreTrainedModel, batch: TokenBatch) -> Tensor:
    """Return the mean cross-entropy of the next token, over the pairs of tokens that both count."""
    input_ids = batch.input_ids.to(model.device)
    mask = None if batch.attention_mask is None else batch.attention_mask.to(model.device)
    logits = model(input_ids=input_ids, attention_mask=mask, use_cache=False).logits[:, :-1].float()
    targets = input_ids[:, 1:]
    if mask is not None:
        both_count = (mask[:, 1:] * mask[:, :-1]).bool()
        targets = targets.masked_fill(~both_count, IGNORED_LABEL)
    return F.cross_entropy(logits.flatten(0, 1), targets.flatten(), ignore_index=IGNORED_LABEL)
