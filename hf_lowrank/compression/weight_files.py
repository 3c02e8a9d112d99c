"""The bytes of the weight files, before they are written."""

import json
import math
from dataclasses import replace

from torch import Tensor
from transformers import PreTrainedModel

from ..budget import Layer
from ..methods import Method
from .embeddings import compressed_shapes

FIXED_HEADER_BYTES = 128
"""Most bytes of a safetensors file that belong to no tensor: the length, the braces, the metadata and the padding."""


def bytes_beside(model: PreTrainedModel, layers: list[Layer], method: Method, embeddings: int = 0) -> int:
    """Return the bytes of the weight files beside the tensors of the linear layers of the blocks.

    That is everything else that the model saves, such as embeddings and norms, and the headers of the files. Headers
    name every tensor. They count with as many tensors as the method stores at most.

    Args:
        model: the model, or its skeleton.
        layers: all linear layers of the blocks.
        embeddings: bits of a value of the embeddings and the head, 0 if they stay dense.
    """
    inside = {f"{layer.name}.{name}" for layer in layers for name in ("weight", "bias")}
    tensors = saved_tensors(model)
    total = sum(tensor.numel() * tensor.itemsize for tensor in tensors.values())
    outside = {name: tensor for name, tensor in tensors.items() if name not in inside}
    header = FIXED_HEADER_BYTES
    stored = 0
    for module, compressed in compressed_shapes(model, embeddings).items():
        weight = outside.pop(f"{module}.weight")
        for name, (shape, kind) in compressed.items():
            header += header_bytes(f"{module}.{name}", shape, total)
            stored += math.prod(shape) * (1 if kind == "uint8" else weight.itemsize)
    for name, tensor in outside.items():
        header += header_bytes(name, tensor.shape, total)
        stored += tensor.numel() * tensor.itemsize
    for layer in layers:
        header += _largest_header(layer, method, total)
        if f"{layer.name}.bias" in tensors:
            header += header_bytes(f"{layer.name}.bias", (layer.out_features,), total)
    return header + stored


def saved_tensors(model: PreTrainedModel) -> dict[str, Tensor]:
    """Return the tensors that a save of the model writes, by name. Tied ones have one name."""
    left_out = set(getattr(model, "_keys_to_ignore_on_save", None) or ())
    seen: set[int] = set()
    tensors = {}
    for name, tensor in model.state_dict(keep_vars=True).items():
        if id(tensor) not in seen and name not in left_out:
            seen.add(id(tensor))
            tensors[name] = tensor
    return tensors


def header_bytes(name: str, shape: tuple[int, ...], total: int) -> int:
    """Return the most bytes that a tensor takes in the header of a safetensors file.

    Args:
        total: bytes of all tensors, before which the tensor begins and ends.
    """
    entry = {name: {"dtype": "BF16", "shape": list(shape), "data_offsets": [total, total]}}
    return len(json.dumps(entry, separators=(",", ":"), ensure_ascii=False).encode()) - 1  # braces, but a comma


def _largest_header(layer: Layer, method: Method, total: int) -> int:
    """Return the most bytes that the names of a layer's tensors take, compressed or dense."""
    m, n = layer.out_features, layer.in_features
    spec = method.fullest_spec(layer)
    if spec.rank:
        spec = replace(spec, pivoted=True)
    compressed = 0
    for name, (shape, _) in spec.tensors(m, n).items():
        compressed += header_bytes(f"{layer.name}.{name}", shape, total)
    return max(compressed, header_bytes(f"{layer.name}.weight", (m, n), total))
