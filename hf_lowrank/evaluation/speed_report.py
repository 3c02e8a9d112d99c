"""The measurements of `evaluation.speed` for a list of shapes or for a checkpoint, and their tables."""

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import asdict
from functools import partial
from typing import Any

from transformers import PreTrainedModel

from ..calibration.texts import context_length
from ..models.loading import load_model
from ..runtime.configuration import LayerSpec
from ..runtime.errors import CompressionError
from ..runtime.layers import CompressedLinear
from .speed import PAPER_LAYOUTS, LayerSpeed, ModelSpeed, Timing, benchmark_layers, benchmark_model

Table = tuple[list[str], list[list[str]]]
PROMPT = 512
"""Tokens of the prompt by default."""
MODEL_REPEATS = 5
"""Times that a prompt is prefilled and continued, at most: these take seconds each."""


def parse_shape(text: str) -> tuple[int, int]:
    """(out, in) from "OUTxIN".

    Raises:
        CompressionError: if it is no such pair of positive numbers.
    """
    parts = text.lower().split("x")
    if len(parts) != 2 or not all(part.isdecimal() and int(part) > 0 for part in parts):
        raise CompressionError(f"--shapes: found {text!r}, expected OUTxIN such as 4096x11008")
    return int(parts[0]), int(parts[1])


def of_shapes(
    shapes: Sequence[tuple[int, int]], tokens: Sequence[int], threads: int | None, repeats: int, device: str
) -> list[LayerSpeed]:
    """Layers of random content with the papers' layouts."""
    return benchmark_layers(
        shapes, PAPER_LAYOUTS, tokens, [threads] if threads else (), device=device, repeats=repeats
    )


def of_model(
    source: str,
    reference: str,
    tokens: Sequence[int],
    threads: int | None,
    repeats: int,
    prompt: int | None,
    new: int,
    dtype: str,
    device: str,
) -> tuple[list[LayerSpeed], list[ModelSpeed]]:
    """Every kind of layer that a checkpoint has, and the whole model beside its reference.

    Args:
        reference: "dense", the model itself decompressed, or another model.
        prompt: tokens of the prompt; by default `PROMPT`, or what the model's context holds beside the `new` ones.

    Raises:
        CompressionError: if the model has no compressed layer, cannot be opened, or has too short a context.
    """
    subject = load_model(source, dtype, device)
    kinds = Counter(
        (m.out_features, m.in_features, m.spec) for m in subject.modules() if isinstance(m, CompressedLinear)
    )
    if not kinds:
        raise CompressionError(
            f"{source}: has no compressed layer; name a compressed checkpoint, and this one as --reference"
        )
    context = context_length(subject.config) or PROMPT + new
    prompt = min(PROMPT, context - new) if prompt is None else prompt
    if not 1 <= prompt <= context - new:
        raise CompressionError(f"{source}: has a context of {context} tokens; give a --prompt and a --new that fit")
    model_dtype = subject.dtype
    del subject
    layers = []
    for (rows, columns, spec), count in sorted(kinds.items(), key=lambda kind: kind[0][:2]):
        layout: dict[str, Callable[[int, int], LayerSpec]] = {f"{count} × {_name(spec)}": partial(_always, spec)}
        layers += benchmark_layers(
            [(rows, columns)], layout, tokens, [threads] if threads else (), model_dtype, device, repeats
        )
    other = (
        partial(_decompressed, source, dtype, device)
        if reference == "dense"
        else partial(load_model, reference, dtype, device)
    )
    models = {
        "dense" if reference == "dense" else reference: other,
        source: partial(load_model, source, dtype, device),
    }
    return layers, benchmark_model(models, prompt, new, threads, min(repeats, MODEL_REPEATS))


def _always(spec: LayerSpec, rows: int, columns: int) -> LayerSpec:
    return spec


def _decompressed(source: str, dtype: str, device: str) -> PreTrainedModel:
    model: Any = load_model(source, dtype, device)
    model.dequantize()
    return model


def _name(spec: LayerSpec) -> str:
    """What a layer stores, in a few words."""
    parts = [] if spec.sparse == "none" else [spec.sparse if spec.sparse == "full" else f"{spec.sparse} {spec.kept}"]
    parts += [f"int{spec.weight_bits}"] if spec.weight_bits else []
    parts += [f"{'pivoted ' if spec.pivoted else ''}rank {spec.rank}"] if spec.rank else []
    parts += [f"int{spec.lowrank_bits}"] if spec.lowrank_bits else []
    parts += [f"binary {spec.binary_rank}"] if spec.binary_rank else []
    return " + ".join(parts)


def layer_fields(row: LayerSpeed) -> dict[str, Any]:
    """A measurement with what follows from it; times in seconds."""
    derived = {
        "ratio": row.ratio,
        "bytes_limit": row.bytes_limit,
        "share_of_limit": row.share_of_limit,
        "bandwidth": row.bandwidth,
    }
    return asdict(row) | derived


def model_fields(row: ModelSpeed) -> dict[str, Any]:
    """A measurement with what follows from it; times in seconds."""
    speeds = {
        "prefill_tokens_per_second": row.prefill_tokens_per_second,
        "decode_tokens_per_second": row.decode_tokens_per_second,
    }
    return asdict(row) | speeds


def layer_table(rows: Sequence[LayerSpeed]) -> Table:
    """Columns and cells."""
    columns = [
        "layer",
        "out × in",
        "tokens",
        "threads",
        "dense",
        "compressed",
        "× dense",
        "bytes limit",
        "share",
        "GB/s",
    ]
    cells = [
        [
            row.layout,
            f"{row.rows} × {row.columns}",
            str(row.tokens),
            str(row.threads),
            _milliseconds(row.dense),
            _milliseconds(row.compressed),
            f"{row.ratio:.2f}",
            f"{row.bytes_limit:.2f}",
            "" if row.share_of_limit is None else f"{row.share_of_limit:.2f}",
            f"{row.bandwidth / 1e9:.1f}",
        ]
        for row in rows
    ]
    return columns, cells


def model_table(rows: Sequence[ModelSpeed]) -> Table:
    """Columns and cells; the first row is the reference."""
    columns = ["model", "GB stored", "GB resident", "prefill tokens/s", "decode tokens/s", "× prefill", "× decode"]
    first = rows[0]
    cells = [
        [
            row.name,
            f"{row.stored_bytes / 1e9:.3f}",
            "" if row.resident_bytes is None else f"{row.resident_bytes / 1e9:.3f}",
            f"{row.prefill_tokens_per_second:.1f}",
            f"{row.decode_tokens_per_second:.1f}",
            f"{first.prefill.median / row.prefill.median:.2f}",
            f"{first.decode.median / row.decode.median:.2f}",
        ]
        for row in rows
    ]
    return columns, cells


def _milliseconds(timing: Timing) -> str:
    return f"{timing.median * 1e3:.3f} ({timing.spread * 1e3:.3f})"
