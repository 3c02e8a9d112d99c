"""What tests of whole models share: short recipes, the outputs of a model, and the inputs of its layers."""

import copy
from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from hf_lowrank import CompressionConfig
from hf_lowrank.calibration import block_statistics, calibration_batches, capture
from hf_lowrank.methods import Statistics
from hf_lowrank.models.architectures import find_blocks, find_layers

from .model_families import Batches

OPTIONS = {"slab": {"iterations": 2}}


def recipe(method: str = "slab", ratio: float = 0.5, **options: Any) -> CompressionConfig:
    return CompressionConfig(
        method=method, ratio=ratio, samples=9, sequence_length=28, options=OPTIONS.get(method, {}) | options
    )


def answers(model: PreTrainedModel, batches: Batches) -> list[Tensor]:
    with torch.no_grad():
        return [model(**batch)[0] for batch in batches]


def in_fresh_memory(model: PreTrainedModel) -> PreTrainedModel:
    """Return a copy whose weights do not lie in the mapped file any more.

    Products may round otherwise in the last bit where weights are not aligned in memory.
    """
    return copy.deepcopy(model)


def seen_by_layers(model: PreTrainedModel, layers: Iterable[str], batches: Batches) -> dict[str, list[Tensor]]:
    """Return the input of every layer, (..., n) per batch, in the model's own forward."""
    seen: dict[str, list[Tensor]] = {}
    handles = [
        model.get_submodule(layer).register_forward_pre_hook(
            lambda module, inputs, name=layer: seen.setdefault(name, []).append(inputs[0])
        )
        for layer in layers
    ]
    answers(model, batches)
    for handle in handles:
        handle.remove()
    return seen


def statistics_of_layers(model: PreTrainedModel, batches: Batches) -> Iterator[tuple[str, Statistics | None]]:
    """Yield the name of every layer and the statistics of its inputs, collected block by block."""
    blocks = find_blocks(model)
    layers = find_layers(blocks)
    captured = capture(model, blocks, calibration_batches(model, recipe(), calibration=batches))
    for index, block in enumerate(blocks.values()):
        for batch in captured:
            batch.enter_block_list(index)
        modules = {layer.name: model.get_submodule(layer.name) for layer in layers if layer.block == index}
        yield from block_statistics(block, index, captured, modules, needs_gram=True, move=True).items()


def counted(name: str, x: Tensor, batch: dict[str, Tensor]) -> Tensor:
    """Return the tokens of a layer's input that are no padding.

    It looks at the names of layers, which the package does not.
    """
    mask = batch.get("attention_mask")
    cross = any(part in name for part in ("EncDecAttention", "encoder_attn"))
    if (
        "decoder" in name
        and "decoder_input_ids" in batch
        and not (cross and name.endswith(("k", "v", "k_proj", "v_proj")))
    ):
        mask = batch.get("decoder_attention_mask")
    x = x.double()
    return x.flatten(0, -2) if mask is None else x.reshape(*mask.shape, -1)[mask.bool()]
