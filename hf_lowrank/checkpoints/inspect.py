"""What a compressed checkpoint stores, counted from its files."""

import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ..models.architectures import find_blocks, find_layers
from ..models.loading import compression_of, load_config, skeleton
from ..runtime.errors import CompressionError, one_line
from ..runtime.reports import REPORT_FILE, read_current_report
from ..runtime.safetensors_headers import DTYPE_BITS, read_headers, weight_files
from ..runtime.validation import resolve_layers


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
        raise CompressionError(
            f"{folder}: is not compressed by hf_lowrank: its config.json has no such quantization_config"
        )
    model = skeleton(config)
    specs = resolve_layers(model, compression.layers)
    report = read_report(folder)
    errors = {layer["name"]: layer["relative_error"] for layer in report["layers"]}
    tensors = {
        name: (tensor.dtype, math.prod(tensor.shape))
        for name, tensor in read_headers(weight_files(str(folder))).items()
    }
    value_bits = DTYPE_BITS[
        str(next(dtype for dtype, _ in tensors.values() if dtype in ("F64", "F32", "F16", "BF16")))
    ]
    layers, stored_bits, paper_bits, dense_bits = [], 0, 0, 0
    for layer in find_layers(find_blocks(model)):
        own = {name: entry for name, entry in tensors.items() if name.rpartition(".")[0] == layer.name}
        bits = sum(DTYPE_BITS[dtype] * numel for dtype, numel in own.values())
        weights = layer.out_features * layer.in_features
        spec = specs.get(layer.name)
        has_own_bias = f"{layer.name}.bias" in own and not (
            spec is not None and model.get_submodule(layer.name).bias is None
        )
        dense_bits += value_bits * (weights + (layer.out_features if has_own_bias else 0))
        stored_bits += bits
        paper_bits += bits - sum(
            DTYPE_BITS[dtype] * numel for name, (dtype, numel) in own.items() if name.endswith(".weight_mask")
        )
        error = errors.get(layer.name)
        if spec is None:
            reason = report["dense"].get(layer.name, "left dense")
            layers.append(StoredLayer(layer.name, "dense", "–", 0, 0, 1.0, bits / weights, bits // 8, None, reason))
        else:
            kept = own.get(f"{layer.name}.weight", ("", 0))[1]
            layers.append(
                StoredLayer(
                    layer.name,
                    spec.kind,
                    spec.sparse,
                    spec.rank,
                    spec.binary_rank,
                    kept / weights,
                    bits / weights,
                    bits // 8,
                    error,
                )
            )
    model_bits = sum(DTYPE_BITS[dtype] * numel for dtype, numel in tensors.values())
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


def read_report(folder: Path) -> dict[str, Any]:
    """What was measured when the checkpoint in `folder` was made, and recorded since; "layers", "dense" and "warnings" at the least.

    Raises:
        CompressionError: if the report is damaged.
    """
    with damaged_report(folder):
        report = read_current_report(folder)
        layers = [
            {**layer, "name": str(layer["name"]), "relative_error": _number(layer["relative_error"])}
            for layer in report.get("layers", [])
        ]
        reasons = {str(name): one_line(str(reason)) for name, reason in report.get("dense", {}).items()}
        warnings = [one_line(str(warning)) for warning in report.get("warnings", [])]
    return {**report, "layers": layers, "dense": reasons, "warnings": warnings}


@contextmanager
def damaged_report(folder: Path) -> Iterator[None]:
    """While active, whatever fails because the report in `folder` does not hold what it should is an error that says so."""
    try:
        yield
    except CompressionError:
        raise
    except (AttributeError, LookupError, TypeError, ValueError) as error:
        raise CompressionError(
            f"{folder / REPORT_FILE}: is damaged ({type(error).__name__}: {error}); delete it to go on without measurements"
        ) from error


def _number(value: Any) -> float | None:
    return None if value is None else float(value)
