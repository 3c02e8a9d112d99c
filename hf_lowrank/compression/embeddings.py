"""Embeddings and head: where a model has them, what they take, and their compression to quantized rows."""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from ..methods import Decomposition
from ..methods.gptq import compensated
from ..models.architectures import find_blocks, input_embeddings
from ..models.linears import replace_layer
from ..runtime.configuration import CompressionConfig
from ..runtime.embeddings import CHUNK_OF_ROWS, compress_embedding, is_embedding
from ..runtime.errors import CompressionError
from ..runtime.layer_spec import LayerSpec
from ..runtime.quantization import Quantized, quantize
from ..runtime.validation import dense_shape, is_linear, tied_heads

EMBEDDING_GROUP = 32
"""Values of a row that share a scale."""
USUAL_BITS = 8
"""Bits of a value where a recipe asks for compressed embeddings and says no more."""
HEAD_DAMPING = 0.01
"""λ that is added to the Gram matrix of the inputs of the head, as a share of its mean diagonal."""
CHOICES = (0, USUAL_BITS, 6, 4)
"""Bits of a value of the embeddings among which a size chooses. 0: they stay dense."""


@dataclass(frozen=True)
class Embeddings:
    """Where a model has its embeddings and its head.

    Attributes:
        name: module name of the embeddings.
        tied: the linear layers that multiply by the rows of the embeddings, by name.
        head: module name of a head with a weight of its own; None if there is none.
    """

    name: str
    tied: dict[str, nn.Module]
    head: str | None

    @property
    def own_weights(self) -> list[str]:
        """Names of the modules whose weights are compressed."""
        return [self.name, self.head] if self.head else [self.name]


def find_embeddings(model: PreTrainedModel) -> Embeddings:
    """Return where a model has its embeddings and its head.

    Raises:
        CompressionError: if it has no embeddings that can be compressed.
    """
    table = input_embeddings(model)
    names = {id(module): name for name, module in model.named_modules()}
    name = names.get(id(table), "")
    refused = f"embeddings: those of {type(model).__name__} stay dense; leave embeddings= out, or set it to false"
    if table is None or not is_embedding(table):
        raise CompressionError(f"{refused}: {type(table).__name__} is no plain embedding")
    tied = tied_heads(model, name)
    places = sum(module is table for module in model.modules())
    if tied is None or places != 1:
        raise CompressionError(f"{refused}: their weight has more uses than embeddings and head")
    output = model.get_output_embeddings()
    in_blocks = tuple(f"{block}." for block in find_blocks(model))
    head = names.get(id(output)) if output is not None and is_linear(output) else None
    if head is None or head in tied or head.startswith(in_blocks):
        return Embeddings(name, tied, None)
    return Embeddings(name, tied, head)


def embedding_bits(config: CompressionConfig, model: PreTrainedModel) -> list[int]:
    """Return the bits of a value of the embeddings that a recipe allows, 0 for embeddings that stay dense.

    Raises:
        CompressionError: if it asks for compressed embeddings, and the model has none that can be.
    """
    if config.embeddings is not None:
        bits = USUAL_BITS if config.embeddings is True else int(config.embeddings)
        if bits:
            find_embeddings(model)
        return [bits]
    if config.size is None:
        return [0]
    try:
        find_embeddings(model)
    except CompressionError:
        return [0]
    return list(CHOICES)


def embedding_spec(bits: int, columns: int) -> LayerSpec:
    """Return what embeddings of so many columns store at so many bits a value."""
    return LayerSpec(sparse="full", weight_bits=bits, weight_group=min(EMBEDDING_GROUP, columns))


def compressed_shapes(model: PreTrainedModel, bits: int) -> dict[str, dict[str, tuple[tuple[int, ...], str]]]:
    """Return shape and type of every tensor of compressed embeddings and head, by module name and name within it."""
    if not bits:
        return {}
    shapes = {}
    for name in find_embeddings(model).own_weights:
        rows, columns = dense_shape(model.get_submodule(name))
        shapes[name] = embedding_spec(bits, columns).tensors(rows, columns)
    return shapes


def embedding_savings(model: PreTrainedModel, config: CompressionConfig) -> int:
    """Return how many bytes less compressed embeddings and head take.

    Args:
        config: a recipe that the plan has decided on (`Plan.config`).
    """
    bits = embedding_bits(config, model)[0]
    savings = 0
    for name, tensors in compressed_shapes(model, bits).items():
        weight = model.get_submodule(name).weight
        assert isinstance(weight, Tensor)
        savings += weight.numel() * weight.itemsize
        for shape, kind in tensors.values():
            savings -= math.prod(shape) * (1 if kind == "uint8" else weight.itemsize)
    return savings


@torch.no_grad()
def compress_embeddings(
    model: PreTrainedModel,
    bits: int,
    on_disk: Mapping[str, Tensor] | None = None,
    head_gram: Tensor | None = None,
) -> list[dict[str, Any]]:
    """Put compressed embeddings, and a compressed head, in the place of the dense ones.

    Args:
        bits: bits of a value, 0 to leave them dense.
        on_disk: the weights of the model that are not in memory, by name.
        head_gram: Gram matrix (n, n) of the inputs of the head. What it multiplies by is rounded to suit them.

    Returns:
        One entry for each weight that was compressed, as the report has it.
    """
    if not bits:
        return []
    found = find_embeddings(model)
    entries = []
    for name in found.own_weights:
        module = model.get_submodule(name)
        assert isinstance(module.weight, Tensor)
        weight = module.weight.detach()
        if weight.is_meta and on_disk is not None:
            weight = on_disk[f"{name}.weight"].clone()
        rows, columns = dense_shape(module)
        spec = embedding_spec(bits, columns)
        is_multiplied = name == found.head or bool(found.tied)
        quantized = _quantized_rows(weight, spec, head_gram if is_multiplied else None)
        stored: Any
        if name == found.name:
            stored = compress_embedding(model, name, spec, found.tied)
            stored.store(quantized)
        else:
            assert isinstance(module.bias, Tensor | None)
            stored = Decomposition(sparse="full", weight=quantized).to_layer(rows, columns, module.bias, weight.dtype)
            replace_layer(model, name, stored)
        lost = (stored.to_dense(torch.float32) - weight.float()).norm() / weight.float().norm().clamp(min=1e-30)
        entries.append(
            {
                "name": name,
                "weight_bits": bits,
                "dense_bytes": weight.numel() * weight.itemsize,
                "stored_bytes": spec.stored_bits(rows, columns, weight.itemsize * 8) // 8,
                "relative_error": float(lost),
            }
        )
    return entries


def _quantized_rows(weight: Tensor, spec: LayerSpec, gram: Tensor | None) -> Quantized:
    """Return a weight (V, n) quantized row by row.

    Args:
        gram: Gram matrix C (n, n) of what the rows are multiplied by. The error of a row is then made small in the
            metric of C, as by GPTQ. Without one each value goes to its nearest level, and few levels get the scales
            of least squared error.
    """
    bits, group = spec.weight_bits, spec.weight_group
    if gram is not None:
        # The rows of tied embeddings are looked up, too. Damping keeps each value near what it was.
        gram = gram + HEAD_DAMPING * gram.diagonal().mean() * torch.eye(len(gram), dtype=gram.dtype)
        gram = gram.to(weight.device)
    parts = []
    for rows in weight.split(CHUNK_OF_ROWS):
        if gram is None:
            parts.append(quantize(rows.float(), bits, group, search=bits < USUAL_BITS))
        else:
            parts.append(compensated(rows.double(), gram, bits, group))
    codes, scale = torch.cat([part.codes for part in parts]), torch.cat([part.scale for part in parts])
    return Quantized(codes, scale, spec.weight_bits, spec.weight_group)
