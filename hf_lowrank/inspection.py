"""What a compressed checkpoint stores, counted from its files."""

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from .architectures import find_blocks, find_layers
from .models import compression_of, load_config, skeleton
from .runtime.errors import CheckpointError, CompressionError
from .runtime.saving import REPORT_FILE
from .runtime.validation import read_header, resolve_layers

BITS = {"F64": 64, "F32": 32, "F16": 16, "BF16": 16, "U8": 8, "I8": 8, "I32": 32, "I64": 64, "BOOL": 8}


@dataclass(frozen=True)
class StoredLayer:
    """One linear layer of the blocks as it lies on disk."""

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
    """A compressed checkpoint.

    Attributes:
        ratio_asked, ratio_stored, ratio_paper: of the stored bits of the block linears; `paper` leaves mask bits out.
        block_bytes, dense_block_bytes: of the block linears, stored and dense.
        model_bytes, dense_model_bytes: of all tensors; model_ratio: the fraction removed of the whole model.
        disk_bytes: of the weight files.
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


def inspect_checkpoint(folder: str | Path) -> Inspection:
    """Count what a compressed checkpoint stores, from its safetensors headers, and add what its report measured.

    Raises:
        CompressionError: if the folder is no compressed checkpoint, or its files do not fit its config.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise CompressionError(f"{folder}: no such folder; inspect reads a checkpoint on this machine")
    config = load_config(str(folder))
    compression = compression_of(config)
    if compression is None:
        raise CompressionError(f"{folder}: is not compressed by hf_lowrank: its config.json has no such quantization_config")
    model = skeleton(config)
    specs = resolve_layers(model, compression.layers)
    report = read_report(folder)
    errors = {layer["name"]: layer["relative_error"] for layer in report.get("layers", [])}
    tensors = _stored_tensors(folder)
    value_bits = BITS[str(next(dtype for dtype, _ in tensors.values() if dtype in ("F64", "F32", "F16", "BF16")))]
    layers, stored_bits, paper_bits, dense_bits = [], 0, 0, 0
    for layer in find_layers(find_blocks(model)):
        own = {name: entry for name, entry in tensors.items() if name.rpartition(".")[0] == layer.name}
        bits = sum(BITS[dtype] * numel for dtype, numel in own.values())
        weights = layer.out_features * layer.in_features
        spec = specs.get(layer.name)
        has_own_bias = f"{layer.name}.bias" in own and not (spec is not None and model.get_submodule(layer.name).bias is None)
        dense_bits += value_bits * (weights + (layer.out_features if has_own_bias else 0))
        stored_bits += bits
        paper_bits += bits - sum(BITS[dtype] * numel for name, (dtype, numel) in own.items() if name.endswith(".weight_mask"))
        error = errors.get(layer.name)
        if spec is None:
            reason = report.get("dense", {}).get(layer.name, "left dense")
            layers.append(StoredLayer(layer.name, "dense", "–", 0, 0, 1.0, bits / weights, bits // 8, None, reason))
        else:
            kept = own.get(f"{layer.name}.weight", ("", 0))[1]
            layers.append(
                StoredLayer(
                    layer.name, spec.kind, spec.sparse, spec.rank, spec.binary_rank, kept / weights, bits / weights, bits // 8, error
                )
            )
    model_bits = sum(BITS[dtype] * numel for dtype, numel in tensors.values())
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
        disk_bytes=sum(file.stat().st_size for file in weight_files(folder)),
        layers=layers,
        warnings=report.get("warnings", []),
    )


def _stored_tensors(folder: Path) -> dict[str, tuple[str, int]]:
    tensors = {}
    for file in weight_files(folder):
        for name, (dtype, shape) in read_header(str(file)).items():
            numel = 1
            for side in shape:
                numel *= side
            tensors[name] = (dtype, numel)
    return tensors


def weight_files(folder: Path) -> list[Path]:
    """The shards that the index of a checkpoint names, or the one file that there must be.

    Raises:
        CheckpointError: if one of them is missing, or the index is damaged.
    """
    index = folder / "model.safetensors.index.json"
    files = [folder / "model.safetensors"]
    if index.is_file():
        try:
            files = sorted({folder / name for name in json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()})
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise CheckpointError(f"{index}: is damaged ({error!r}); download the checkpoint again") from error
    for file in files:
        if not file.is_file():
            raise CheckpointError(f"{file}: missing; save the model again, or download the checkpoint again")
    return files


def read_report(folder: Path) -> dict[str, Any]:
    """What was measured when the checkpoint in `folder` was made, and recorded since; {} if it has no report.

    Raises:
        CompressionError: if the report is damaged.
    """
    file = folder / REPORT_FILE
    if not file.is_file():
        return {}
    try:
        report = json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise CompressionError(f"{file}: is damaged ({error}); delete it to inspect without measured errors") from error
    return report if isinstance(report, dict) else {}
