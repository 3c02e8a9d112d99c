"""Exports to GGUF, the file that llama.cpp and what is built on it open."""

import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from gguf import (
    GGML_QUANT_VERSION,
    MODEL_ARCH,
    MODEL_ARCH_NAMES,
    GGMLQuantizationType,
    GGUFWriter,
    LlamaFileType,
    get_tensor_name_map,
    quants,
)
from torch import Tensor
from transformers import PreTrainedModel

from ..runtime.errors import CompressionError
from ..runtime.layers import CompressedLinear
from .gguf_blocks import BLOCK, Blocks, blocks_of
from .gguf_families import add_hyperparameters, architecture_of, norm_offset, rotation_factors, row_order
from .gguf_tokenizer import add_tokenizer
from .integers import Integers, integers_of, reason_against
from .report import ExportedLayer, check_exact

TARGET = "gguf"
STORED = {
    torch.float32: GGMLQuantizationType.F32,
    torch.float16: GGMLQuantizationType.F16,
    torch.bfloat16: GGMLQuantizationType.BF16,
}


def write(
    model: PreTrainedModel, tokenizer: Any, file: Path, name: str, exact: bool = False, dense_type: str = "auto"
) -> list[ExportedLayer]:
    """Write a compressed model, which becomes dense by that, and return what became of its layers.

    Args:
        name: the name of the model in the file.
        dense_type: one of `DENSE_TYPES` of `export`.

    Raises:
        CompressionError: for a model or a tokenizer that llama.cpp does not know, or if a layer has other values than
            the checkpoint though `exact` was asked for.
    """
    config = model.config.get_text_config()
    architecture = architecture_of(config)
    writer = GGUFWriter(path=None, arch=MODEL_ARCH_NAMES[architecture])
    writer.add_name(name)
    writer.add_quantization_version(GGML_QUANT_VERSION)
    writer.add_file_type(LlamaFileType.GUESSED)
    add_hyperparameters(writer, config)
    add_tokenizer(writer, tokenizer, config.vocab_size)
    blocks, layers = _blocks(model, exact, dense_type)
    if exact:
        check_exact(layers, TARGET)
    model.dequantize()
    _add_tensors(writer, model, architecture, blocks, dense_type)
    try:
        writer.write_header_to_file(path=file)
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
    finally:
        writer.close()
    return layers


def _blocks(model: PreTrainedModel, exact: bool, dense_type: str) -> tuple[dict[str, Blocks], list[ExportedLayer]]:
    """Return the layers that are stored as integers, by the names of their weights, and what becomes of all layers."""
    config = model.config.get_text_config()
    held, layers = {}, []
    for name, layer in model.named_modules():
        if not isinstance(layer, CompressedLinear):
            continue
        integers = integers_of(layer)
        blocks = None if integers is None else blocks_of(_reordered(integers, config, f"{name}.weight"), exact)
        if blocks is None:
            form = _dense_type(dense_type, layer.dtype, layer.in_features).name
            layers.append(
                ExportedLayer(name, f"dense, {form}", f"the format does not hold {reason_against(layer.spec)}")
            )
        else:
            held[f"{name}.weight"] = blocks
            layers.append(ExportedLayer(name, blocks.type.name, _loss(blocks.error)))
    return held, layers


def _reordered(integers: Integers, config: Any, name: str) -> Integers:
    order = row_order(config, name)
    return replace(integers, values=order(integers.values), steps=order(integers.steps))


def _loss(error: float) -> str | None:
    """Say what rounding to float16 has changed."""
    if not error:
        return None
    percent = math.ceil(error * 1000) / 10
    return f"rounded by at most {percent} % of the distance between two levels"


def _add_tensors(
    writer: GGUFWriter, model: PreTrainedModel, architecture: MODEL_ARCH, blocks: dict[str, Blocks], dense_type: str
) -> None:
    """Add every tensor of a model that is dense by now, from blocks where there are some.

    Raises:
        CompressionError: for a tensor that the architecture does not have.
    """
    config = model.config.get_text_config()
    names = get_tensor_name_map(architecture, config.num_hidden_layers)
    for key, tensor in model.state_dict().items():
        if key == "lm_head.weight" and config.tie_word_embeddings:
            continue
        target = names.get_name(key, try_suffixes=(".weight", ".bias"))
        if target is None:
            raise CompressionError(f"{TARGET}: {key} has no place in a file of the architecture {writer.arch}")
        if key in blocks:
            writer.add_tensor(target, blocks[key].data, raw_dtype=blocks[key].type)
        else:
            _add_dense(writer, target, row_order(config, key)(tensor) + norm_offset(config, key), dense_type)
    factors = rotation_factors(config)
    if factors is not None:
        writer.add_tensor("rope_freqs.weight", factors.numpy())


def _add_dense(writer: GGUFWriter, name: str, tensor: Tensor, dense_type: str) -> None:
    """Add a tensor that is not stored as integers. Vectors are in float32, as llama.cpp wants them."""
    if tensor.dim() < 2:
        writer.add_tensor(name, tensor.float().numpy())
        return
    kind = _dense_type(dense_type, tensor.dtype, tensor.shape[1])
    writer.add_tensor(name, quants.quantize(tensor.float().numpy(), kind), raw_dtype=kind)


def _dense_type(asked: str, dtype: torch.dtype, columns: int) -> GGMLQuantizationType:
    """Return the type of a matrix that is not stored as integers."""
    stored = STORED.get(dtype, GGMLQuantizationType.F32)
    if asked == "auto" or (asked == "q8_0" and columns % BLOCK):
        return stored
    return GGMLQuantizationType[asked.upper()]
