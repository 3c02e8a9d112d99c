"""Sizes and layers of a compressed checkpoint, counted from its files."""

import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ..budget import Layer
from ..models.architectures import find_blocks, find_layers
from ..models.loading import compression_of, load_config, skeleton
from ..runtime.configuration import LayerSpec
from ..runtime.errors import CompressionError, path_in_message, printable
from ..runtime.reports import REPORT_FILE, read_current_report
from ..runtime.safetensors_headers import DTYPE_BITS, FLOAT_TYPES, StoredTensor, read_headers, weight_files
from ..runtime.validation import resolve_layers


@dataclass(frozen=True)
class StoredLayer:
    """One linear layer of the blocks as it lies on disk.

    Attributes:
        name: module name.
        kind, sparse, rank, binary_rank: as in `LayerSpec`; the kind of a layer left dense is "dense".
        density: stored values of the sparse part, per entry of the dense weight.
        bits_per_weight: bits of all tensors of the layer, per entry of the dense weight.
        bytes: bytes of all tensors of the layer.
        relative_error: as in `LayerReport`; None if it was not recorded.
        reason: why the layer was left dense; None if it is compressed.
    """

    name: str
    kind: str
    sparse: str
    rank: int
    binary_rank: int
    density: float
    bits_per_weight: float
    bytes: int
    relative_error: float | None
    reason: str | None = field(default=None)


@dataclass(frozen=True)
class Inspection:
    """A compressed checkpoint: its sizes, its layers, and the warnings of its report.

    Attributes:
        ratio_asked: fraction of the stored bits of the block linears that was to be removed.
        ratio_stored: fraction that is removed.
        ratio_paper: fraction that is removed if mask bits are not counted, as papers do.
        block_bytes, dense_block_bytes: size of the block linears, as stored and dense.
        model_bytes, dense_model_bytes: size of all tensors, as stored and with dense block linears.
        model_ratio: fraction removed of the whole model.
        disk_bytes: size of the weight files.
        layers: all linear layers of the blocks, in the order of the model.
        warnings: what the user must know about the compression.
    """

    folder: str
    method: str
    ratio_asked: float
    ratio_stored: float
    ratio_paper: float
    block_bytes: int
    dense_block_bytes: int
    model_bytes: int
    dense_model_bytes: int
    model_ratio: float
    disk_bytes: int
    layers: list[StoredLayer]
    warnings: list[str]


def inspect(folder: str | Path) -> Inspection:
    """Count what a compressed checkpoint stores, from its safetensors headers, and add what its report measured.

    Raises:
        CompressionError: if the folder is not a compressed checkpoint, or its files do not fit its config.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise CompressionError(
            f"{path_in_message(folder)}: no such folder; inspect reads a checkpoint on this machine"
        )
    config = load_config(str(folder))
    compression = compression_of(config)
    if compression is None:
        raise CompressionError(
            f"{folder}: is not compressed by hf_lowrank: its config.json has no such quantization_config"
        )
    model = skeleton(config)
    specs = resolve_layers(model, compression.layers)
    report = read_checked_report(folder)
    errors = {layer["name"]: layer["relative_error"] for layer in report["layers"]}
    tensors = read_headers(weight_files(str(folder)))
    value_bits = _value_bits(tensors)
    tensors_of_layer = _tensors_by_layer(tensors)

    layers = []
    stored_bits = paper_bits = dense_bits = 0
    for layer in find_layers(find_blocks(model)):
        own_tensors = tensors_of_layer.get(layer.name, {})
        spec = specs.get(layer.name)
        has_bias = _has_dense_bias(layer, spec, own_tensors, model)
        dense_bits += value_bits * _dense_values(layer, has_bias)
        layer_bits = _total_bits(own_tensors)
        stored_bits += layer_bits
        # Papers count the values that a mask keeps, and not the mask.
        paper_bits += layer_bits - _mask_bits(own_tensors)
        if spec is None:
            reason = report["dense"].get(layer.name, "left dense")
            layers.append(_dense_layer(layer, layer_bits, reason))
        else:
            layers.append(_compressed_layer(layer, spec, own_tensors, errors.get(layer.name)))

    # Everything outside the block linears (embeddings, norms, head) is the same in the dense model.
    model_bits = _total_bits(tensors)
    dense_model_bits = model_bits - stored_bits + dense_bits
    return Inspection(
        folder=str(folder),
        method=compression.method,
        ratio_asked=compression.ratio,
        ratio_stored=1 - stored_bits / dense_bits,
        ratio_paper=1 - paper_bits / dense_bits,
        block_bytes=stored_bits // 8,
        dense_block_bytes=dense_bits // 8,
        model_bytes=model_bits // 8,
        dense_model_bytes=dense_model_bits // 8,
        model_ratio=1 - model_bits / dense_model_bits,
        disk_bytes=sum(file.stat().st_size for file in folder.glob("*.safetensors")),
        layers=layers,
        warnings=report["warnings"],
    )


def _value_bits(tensors: dict[str, StoredTensor]) -> int:
    """Return the bits of one value of the dense model: those of the first floating-point tensor of the checkpoint."""
    return DTYPE_BITS[next(tensor.dtype for tensor in tensors.values() if tensor.dtype in FLOAT_TYPES)]


def _tensors_by_layer(tensors: dict[str, StoredTensor]) -> dict[str, dict[str, StoredTensor]]:
    """Return the tensors of each module by their names within the module."""
    # Searching all tensors for those of each layer would take quadratic time.
    by_layer: dict[str, dict[str, StoredTensor]] = {}
    for name, tensor in tensors.items():
        module_name, _, tensor_name = name.rpartition(".")
        by_layer.setdefault(module_name, {})[tensor_name] = tensor
    return by_layer


def _has_dense_bias(layer: Layer, spec: LayerSpec | None, own_tensors: dict[str, StoredTensor], model: Any) -> bool:
    """Return whether a layer has a bias when it is dense. Compression may add one, as SoCo does for its deviation."""
    if "bias" not in own_tensors:
        return False
    return spec is None or model.get_submodule(layer.name).bias is not None


def _dense_values(layer: Layer, has_bias: bool) -> int:
    """Return the number of values of a layer when it is dense."""
    values = layer.out_features * layer.in_features
    if has_bias:
        values += layer.out_features
    return values


def _total_bits(tensors: dict[str, StoredTensor]) -> int:
    return sum(DTYPE_BITS[tensor.dtype] * math.prod(tensor.shape) for tensor in tensors.values())


def _mask_bits(own_tensors: dict[str, StoredTensor]) -> int:
    """Return the bits of the mask of a layer, 0 if it has none."""
    if "weight_mask" not in own_tensors:
        return 0
    return _total_bits({"weight_mask": own_tensors["weight_mask"]})


def _dense_layer(layer: Layer, bits: int, reason: str) -> StoredLayer:
    return StoredLayer(
        name=layer.name,
        kind="dense",
        sparse="–",
        rank=0,
        binary_rank=0,
        density=1.0,
        bits_per_weight=bits / (layer.out_features * layer.in_features),
        bytes=bits // 8,
        relative_error=None,
        reason=reason,
    )


def _compressed_layer(
    layer: Layer, spec: LayerSpec, own_tensors: dict[str, StoredTensor], error: float | None
) -> StoredLayer:
    weights = layer.out_features * layer.in_features
    bits = _total_bits(own_tensors)
    m, n = layer.out_features, layer.in_features
    # Counted by the spec, as quantized values are packed into bytes.
    kept = {"rows": spec.kept * n, "columns": m * spec.kept, "bitmask": m * spec.kept, "full": m * n}
    return StoredLayer(
        name=layer.name,
        kind=spec.kind,
        sparse=spec.sparse,
        rank=spec.rank,
        binary_rank=spec.binary_rank,
        density=kept.get(spec.sparse, 0) / weights,
        bits_per_weight=bits / weights,
        bytes=bits // 8,
        relative_error=error,
    )


def read_checked_report(folder: Path) -> dict[str, Any]:
    """Return the report of a checkpoint. Its "layers", "dense" and "warnings" are present and have the right types.

    Raises:
        CompressionError: if the report is damaged.
    """
    with damaged_report(folder):
        report = read_current_report(folder)
        layers = []
        for layer in report.get("layers", []):
            error = layer["relative_error"]
            if error is not None:
                error = float(error)
            layers.append({**layer, "name": str(layer["name"]), "relative_error": error})
        # A report may come from a stranger, so what it puts on a terminal or on a page is made printable.
        reasons = {}
        for name, reason in report.get("dense", {}).items():
            reasons[str(name)] = printable(str(reason))
        warnings = [printable(str(warning)) for warning in report.get("warnings", [])]
    return {**report, "layers": layers, "dense": reasons, "warnings": warnings}


@contextmanager
def damaged_report(folder: Path) -> Iterator[None]:
    """Turn errors of whatever reads a report of unexpected content into one that names the report.

    Raises:
        CompressionError: if the report in `folder` does not hold what it should.
    """
    try:
        yield
    except CompressionError:
        raise  # the message names the fault already
    except (AttributeError, LookupError, TypeError, ValueError) as error:
        raise CompressionError(
            f"{folder / REPORT_FILE}: is damaged ({type(error).__name__}: {error}); delete it to go on without "
            "measurements"
        ) from error
