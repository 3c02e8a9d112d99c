"""How much the model's loss cares about the outputs of each linear layer: Gram matrices of output gradients."""

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from transformers import PreTrainedModel

from ..distributed import ALONE, Team
from ..runtime.errors import NumericalError
from .batches import TokenBatch


def output_grams(model: PreTrainedModel, layers: list[str], batches: list[TokenBatch], seed: int, team: Team = ALONE) -> dict[str, Tensor]:
    """G = Σ_t g_t g_tᵀ, (m, m) float64, of each linear layer named, g_t = ∂L/∂y_t of its output y at token t.

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
    vocabulary = model.get_output_embeddings().weight.shape[0]
    try:
        for parameter in frozen:
            parameter.requires_grad_(False)
        mine = set(team.share(range(len(batches))))
        for position, batch in enumerate(batches):
            if position not in mine:  # drawn elsewhere; drawn here for nothing, so that our next batch gets what it gets in one process
                torch.multinomial(torch.ones(1, 1).expand(batch.input_ids.numel(), vocabulary), 1, generator=generator)
                continue
            input_ids = batch.input_ids.to(model.device)
            attended = None if batch.attention_mask is None else batch.attention_mask.to(model.device)
            mask = None if attended is None else attended.bool()
            with torch.enable_grad():
                logits = model(input_ids=input_ids, attention_mask=attended, use_cache=False).logits.float().flatten(0, 1)
                drawn = torch.multinomial(logits.detach().softmax(dim=1).cpu(), 1, generator=generator).squeeze(1).to(logits.device)
                counted = drawn if mask is None else drawn.masked_fill(~mask.flatten(), -100)
                F.cross_entropy(logits, counted, ignore_index=-100, reduction="sum").backward()
    finally:
        for handle in handles:
            handle.remove()
        for parameter, required in frozen.items():
            parameter.requires_grad_(required)
    grams = team.summed(grams)
    for name, gram in grams.items():
        if not bool(gram.isfinite().all()):
            raise NumericalError(f"{name}: the gradient of the loss is not finite; check the weights or use a wider dtype")
    return grams
