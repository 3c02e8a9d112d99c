"""A checkpoint is untrusted input: its config is checked against the model, its files against its config, before anything is allocated."""

import json
import os
import struct
from collections.abc import Iterable, Mapping

from torch import nn
from transformers.pytorch_utils import Conv1D

from .configuration import CompressionConfig, LayerSpec
from .errors import CheckpointError

FLOAT_TYPES = ("F64", "F32", "F16", "BF16")
MAX_HEADER_BYTES = 100_000_000
SUBCLASSES_OF_LINEAR = ("FalconLinear",)
"""Subclasses of `nn.Linear` that compute just what it does; others may not, and are no linear layers here."""


def is_linear(module: nn.Module | None) -> bool:
    """Whether a module is a dense linear layer that can be compressed."""
    return type(module) in (nn.Linear, Conv1D) or (isinstance(module, nn.Linear) and type(module).__name__ in SUBCLASSES_OF_LINEAR)


def dense_shape(module: nn.Module) -> tuple[int, int]:
    """(out_features, in_features) of a dense `nn.Linear` or `Conv1D`."""
    if isinstance(module, Conv1D):
        return module.weight.shape[1], module.weight.shape[0]
    assert isinstance(module, nn.Linear)
    return module.out_features, module.in_features


def resolve_layers(model: nn.Module, layers: Mapping[str, LayerSpec]) -> dict[str, LayerSpec]:
    """The layers of a config under the names that they have in `model`, each checked against the dense module it replaces.

    A checkpoint of a full model may be opened as its base model and the other way round, so the base model's prefix may differ.

    Raises:
        CheckpointError: for a layer that the model does not have, or that is not a linear layer, or does not fit.
    """
    modules = dict(model.named_modules())
    prefix = f"{getattr(model, 'base_model_prefix', '')}."
    names = list(layers)
    if names and prefix != "." and not any(name in modules for name in names):
        if all(name.startswith(prefix) for name in names):
            layers = {name.removeprefix(prefix): spec for name, spec in layers.items()}
        else:
            layers = {prefix + name: spec for name, spec in layers.items()}
    for name, spec in layers.items():
        module = modules.get(name)
        if not is_linear(module):
            found = "no such module" if module is None else type(module).__name__
            raise CheckpointError(
                f"{name}: found {found} in {type(model).__name__}, expected a linear layer; the config was made for another model"
            )
        spec.validate(name, *dense_shape(module))  # type: ignore[arg-type]
    return dict(layers)


def validate_files(config: CompressionConfig, shapes: Mapping[str, tuple[int, int]], files: Iterable[str]) -> None:
    """Check every stored tensor of the compressed layers, from the safetensors headers alone.

    Args:
        config: the config of the checkpoint, with the layer names as they are in its files.
        shapes: (out_features, in_features) of each dense layer, by the same names.
        files: the checkpoint's safetensors files.

    Raises:
        CheckpointError: naming the tensor, what was found and what was expected.
    """
    headers: dict[str, tuple[str, tuple[int, ...], str]] = {}
    for file in files:
        for name, (dtype, shape) in read_header(file).items():
            headers[name] = (dtype, shape, os.path.basename(file))
    stored: dict[str, set[str]] = {}
    for name in headers:
        layer, _, tensor = name.rpartition(".")
        stored.setdefault(layer, set()).add(tensor)
    for layer, spec in config.layers.items():
        expected = spec.tensors(*shapes[layer])
        if spec.bias is False:
            stored.get(layer, set()).discard("bias")
        for tensor, (shape, kind) in expected.items():
            if f"{layer}.{tensor}" not in headers:
                raise CheckpointError(
                    f"{layer}.{tensor}: missing in the checkpoint's files, expected a {kind} tensor {shape}; download it again"
                )
            dtype, found, file = headers[f"{layer}.{tensor}"]
            if found != shape or dtype not in (FLOAT_TYPES if kind == "float" else ("U8",)):
                raise CheckpointError(
                    f"{layer}.{tensor}: {file} has {dtype} {found}, expected {kind} {shape}; the file and the config do not belong together"
                )
        extra = stored.get(layer, set()) - expected.keys()
        if extra:
            raise CheckpointError(
                f"{layer}: unexpected tensors {sorted(extra)} in the checkpoint's files; they do not belong to its config"
            )


def read_header(file: str) -> dict[str, tuple[str, tuple[int, ...]]]:
    """dtype and shape of every tensor of a safetensors file, by name, without reading any of them.

    Raises:
        CheckpointError: if there is no such file, it is truncated, or its header cannot be read.
    """
    if not os.path.isfile(file):
        raise CheckpointError(f"{file}: missing, though the checkpoint's index names it; download it again")
    try:
        with open(file, "rb") as stream:
            (length,) = struct.unpack("<Q", stream.read(8))
            if length > MAX_HEADER_BYTES:
                raise ValueError(f"a header of {length} bytes")
            header = json.loads(stream.read(length))
        tensors = {name: entry for name, entry in header.items() if name != "__metadata__"}
        size = 8 + length + max((entry["data_offsets"][1] for entry in tensors.values()), default=0)
        result = {name: (str(entry["dtype"]), tuple(int(side) for side in entry["shape"])) for name, entry in tensors.items()}
    except (ValueError, KeyError, TypeError, AttributeError, IndexError, OverflowError, struct.error, RecursionError) as error:
        raise CheckpointError(f"{file}: not a safetensors file ({error}); download it again") from error
    if os.path.getsize(file) != size:
        raise CheckpointError(
            f"{file}: {os.path.getsize(file)} bytes, expected {size}; the file is truncated or damaged, download it again"
        )
    return result
