"""Measurements of speed for a list of shapes or for a checkpoint, and their tables."""

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import asdict
from functools import partial
from typing import Any

from transformers import PreTrainedModel

from ..models.context import context_length
from ..models.loading import load_model
from ..runtime.configuration import LayerSpec
from ..runtime.errors import CompressionError, quoted
from ..runtime.layers import CompressedLinear
from . import torch_products
from .generation_speed import ModelSpeed, benchmark_model
from .speed import LAYOUTS, LayerSpeed, Layout, Timing, benchmark_layers

Table = tuple[list[str], list[list[str]]]
"""Header and rows of a table."""
PROMPT = 512
"""Default number of tokens of the prompt."""
MODEL_REPEATS = 5
"""Maximum number of times that a prompt is prefilled and continued, because each time takes seconds."""


def parse_shape(text: str) -> tuple[int, int]:
    """Return (out, in) from "OUTxIN".

    Raises:
        CompressionError: if the text is not such a pair of positive numbers.
    """
    parts = text.lower().split("x")
    if len(parts) != 2 or not all(part.isdecimal() and int(part) > 0 for part in parts):
        raise CompressionError(f"--shapes: found {quoted(text)}, expected OUTxIN such as 4096x11008")
    return int(parts[0]), int(parts[1])


def of_shapes(
    shapes: Sequence[tuple[int, int]], tokens: Sequence[int], threads: int | None, repeats: int, device: str
) -> list[LayerSpeed]:
    """Measure layers of random content, with the layouts of the papers and with integers."""
    return benchmark_layers(shapes, LAYOUTS, tokens, _thread_counts(threads), device=device, repeats=repeats)


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
    """Measure every kind of layer that a checkpoint has, and the whole model beside its reference.

    Args:
        reference: "dense" for the model itself, decompressed, or the name of another model.
        prompt: tokens of the prompt. The default is `PROMPT`, or as many as the model's context holds beside the `new`
            ones.

    Raises:
        CompressionError: if the model has no compressed layer, cannot be opened, or has too short a context.
    """
    subject = load_model(source, dtype, device)
    # Layers of the same shape and description take the same time, so one of each kind is measured.
    layer_kinds = _count_layer_kinds(subject)
    if not layer_kinds:
        raise CompressionError(
            f"{source}: has no compressed layer; name a compressed checkpoint, and this one as --reference"
        )
    prompt = _prompt_length(source, subject, prompt, new)
    model_dtype = subject.dtype
    del subject  # the memory of the models is measured below, so none may be left from here
    layers = []
    # The key leaves the specs out, because they have no order.
    for (rows, columns, spec), count in sorted(layer_kinds.items(), key=lambda kind: kind[0][:2]):
        layouts: dict[str, Layout] = {f"{count} × {_describe(spec)}": partial(_constant_spec, spec)}
        layers += benchmark_layers(
            [(rows, columns)], layouts, tokens, _thread_counts(threads), model_dtype, device, repeats
        )
    models = _model_loaders(source, reference, dtype, device)
    if all(torch_products.fits(rows, columns) for rows, columns, _ in layer_kinds):
        for name, build in torch_products.available(device, model_dtype).items():
            models[name] = partial(_load_with_torch_products, source, dtype, device, build)
    return layers, benchmark_model(models, prompt, new, threads, min(repeats, MODEL_REPEATS))


def _count_layer_kinds(model: PreTrainedModel) -> Counter[tuple[int, int, LayerSpec]]:
    """Return how many compressed layers of each shape (out, in) and description a model has."""
    layer_kinds: Counter[tuple[int, int, LayerSpec]] = Counter()
    for module in model.modules():
        if isinstance(module, CompressedLinear):
            layer_kinds[module.out_features, module.in_features, module.spec] += 1
    return layer_kinds


def _prompt_length(source: str, model: PreTrainedModel, prompt: int | None, new: int) -> int:
    """Return the tokens of the prompt, which must leave room for the new ones in the model's context."""
    context = context_length(model)
    longest = None if context is None else context - new
    if prompt is None:
        prompt = PROMPT if longest is None else min(PROMPT, longest)
    if longest is not None and not 1 <= prompt <= longest:
        raise CompressionError(f"{source}: has a context of {context} tokens; give a --prompt and a --new that fit")
    if prompt < 1:
        raise CompressionError(f"--prompt: found {prompt}, expected at least 1")
    return prompt


def _model_loaders(source: str, reference: str, dtype: str, device: str) -> dict[str, Callable[[], PreTrainedModel]]:
    """Return the functions that load the reference and the compressed model, by the names that tables show."""
    load_reference = partial(load_model, reference, dtype, device)
    if reference == "dense":
        load_reference = partial(_load_decompressed, source, dtype, device)
    return {reference: load_reference, source: partial(load_model, source, dtype, device)}


def _load_decompressed(source: str, dtype: str, device: str) -> PreTrainedModel:
    model: Any = load_model(source, dtype, device)
    model.dequantize()
    return model


def _load_with_torch_products(source: str, dtype: str, device: str, build: torch_products.Builder) -> PreTrainedModel:
    """Return a model in which layers of torch's own, rounded without care, stand for the compressed ones.

    They have no bias: this model is there to be timed.
    """
    model = load_model(source, dtype, device)
    for name, module in list(model.named_modules()):
        if isinstance(module, CompressedLinear):
            model.set_submodule(name, build(module.to_dense()))
    return model


def _constant_spec(spec: LayerSpec, rows: int, columns: int) -> LayerSpec:
    """Return `spec` for any shape, as a layout of `benchmark_layers`."""
    return spec


def _thread_counts(threads: int | None) -> list[int]:
    """Return the numbers of threads for `benchmark_layers`: none if torch's own number is to be used."""
    if not threads:
        return []
    return [threads]


def _describe(spec: LayerSpec) -> str:
    """Describe in a few words the parts that are stored for a layer, such as "bitmask 512 + rank 16"."""
    parts = []
    if spec.sparse == "full":
        parts.append("full")
    elif spec.sparse != "none":
        parts.append(f"{spec.sparse} {spec.kept}")
    if spec.weight_bits:
        parts.append(f"int{spec.weight_bits}")
    if spec.rank:
        pivoted = "pivoted " if spec.pivoted else ""
        parts.append(f"{pivoted}rank {spec.rank}")
    if spec.lowrank_bits:
        parts.append(f"int{spec.lowrank_bits}")
    if spec.binary_rank:
        parts.append(f"binary {spec.binary_rank}")
    return " + ".join(parts)


def layer_fields(row: LayerSpeed) -> dict[str, Any]:
    """Return a measurement with the figures that follow from it. Times are in seconds."""
    derived = {
        "ratio": row.ratio,
        "bytes_limit": row.bytes_limit,
        "share_of_limit": row.share_of_limit,
        "bandwidth": row.bandwidth,
    }
    return asdict(row) | {"dtype": str(row.dtype)} | derived


def model_fields(row: ModelSpeed) -> dict[str, Any]:
    """Return a measurement with the figures that follow from it. Times are in seconds."""
    derived = {
        "prefill_tokens_per_second": row.prefill_tokens_per_second,
        "decode_tokens_per_second": row.decode_tokens_per_second,
    }
    return asdict(row) | derived


def layer_table(rows: Sequence[LayerSpeed]) -> Table:
    """Return the table of layers: times in milliseconds as median (spread)."""
    # "share" is how much of the bytes limit is reached, against the package's own dense product.
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
    return columns, [_layer_cells(row) for row in rows]


def _layer_cells(row: LayerSpeed) -> list[str]:
    share = ""
    if row.share_of_limit is not None:
        share = f"{row.share_of_limit:.2f}"
    return [
        row.layout,
        f"{row.rows} × {row.columns}",
        str(row.tokens),
        str(row.threads),
        _milliseconds(row.dense),
        _milliseconds(row.compressed),
        f"{row.ratio:.2f}",
        f"{row.bytes_limit:.2f}",
        share,
        f"{row.bandwidth / 1e9:.1f}",
    ]


def model_table(rows: Sequence[ModelSpeed]) -> Table:
    """Return the table of models. The first row is the reference of the others.

    "share" is how much of the bytes limit decoding reaches, against the reference.
    """
    columns = [
        "model",
        "GB stored",
        "GB resident",
        "prefill tokens/s",
        "decode tokens/s",
        "× prefill",
        "× decode",
        "bytes limit",
        "share",
    ]
    return columns, [_model_cells(row, rows[0]) for row in rows]


def _model_cells(row: ModelSpeed, reference: ModelSpeed) -> list[str]:
    limit = reference.stored_bytes / row.stored_bytes
    decode_ratio = reference.decode.median / row.decode.median
    resident = ""
    if row.resident_bytes is not None:
        resident = f"{row.resident_bytes / 1e9:.3f}"
    return [
        row.name,
        f"{row.stored_bytes / 1e9:.3f}",
        resident,
        f"{row.prefill_tokens_per_second:.1f}",
        f"{row.decode_tokens_per_second:.1f}",
        f"{reference.prefill.median / row.prefill.median:.2f}",
        f"{decode_ratio:.2f}",
        f"{limit:.2f}",
        f"{decode_ratio / limit:.2f}",
    ]


def _milliseconds(timing: Timing) -> str:
    return f"{timing.median * 1e3:.3f} ({timing.spread * 1e3:.3f})"
