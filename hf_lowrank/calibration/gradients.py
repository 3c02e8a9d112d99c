"""Squared gradients of the language-modelling loss, for methods that weigh weights by what they mean to it."""

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from ..execution.process_group import SINGLE_PROCESS, ProcessGroup
from ..runtime.errors import NumericalError
from .batches import TokenBatch


def squared_gradients(
    model: PreTrainedModel, layers: list[str], batches: list[TokenBatch], group: ProcessGroup = SINGLE_PROCESS
) -> dict[str, Tensor]:
    """Σ_i F_ij with F the mean over batches of (∂L/∂W_ij)², (n,) float64, for each of the linear layers named.

    L is the mean cross-entropy of the next token on the calibration text, in the dense model.

    Raises:
        NumericalError: if a gradient is not finite, naming the layer.
    """
    modules = {name: model.get_submodule(name) for name in layers}
    frozen = {parameter: parameter.requires_grad for parameter in model.parameters()}
    sums: dict[str, Tensor] = {}
    try:
        for parameter in frozen:
            parameter.requires_grad_(False)
        weights: dict[str, Any] = {name: module.weight for name, module in modules.items()}
        for weight in weights.values():
            weight.requires_grad_(True)
        for batch in group.split(batches):
            with torch.enable_grad():
                loss = _loss(model, batch)
                gradients = torch.autograd.grad(
                    loss, list(weights.values()), materialize_grads=True
                )  # zeros for experts without tokens
            for (name, module), gradient in zip(modules.items(), gradients, strict=True):
                per_input = gradient.double().square().sum(dim=1 if isinstance(module, Conv1D) else 0)
                sums[name] = sums.get(name, 0) + per_input / len(batches)
    finally:
        for parameter, required in frozen.items():
            parameter.requires_grad_(required)
    sums = group.all_reduce(sums)
    for name, total in sums.items():
        if not bool(total.isfinite().all()):
            raise NumericalError(
                f"{name}: the gradient of the loss is not finite; check the weights or use a wider dtype"
            )
    return sums


def _loss(model: PreTrainedModel, batch: TokenBatch) -> Tensor:
    input_ids = batch.input_ids.to(model.device)
    mask = None if batch.attention_mask is None else batch.attention_mask.to(model.device)
    logits = model(input_ids=input_ids, attention_mask=mask, use_cache=False).logits[:, :-1].float()
    targets = input_ids[:, 1:]
    if mask is not None:
        targets = targets.masked_fill(~(mask[:, 1:] * mask[:, :-1]).bool(), -100)
    return F.cross_entropy(logits.flatten(0, 1), targets.flatten(), ignore_index=-100)
