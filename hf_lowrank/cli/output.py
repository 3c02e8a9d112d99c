"""Output of the commands: JSON, tables, and what a compressed checkpoint stores."""

import json
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

import typer

from ..runtime.errors import CompressionError

if TYPE_CHECKING:
    from ..checkpoints.inspect import Inspection, StoredLayer

LAYER_COLUMNS = [
    "layer",
    "kind",
    "sparse part",
    "rank",
    "binary rank",
    "density",
    "bits/weight",
    "relative error",
    "bytes",
]
KIND_COLUMNS = ["layers", "number", "left dense", *LAYER_COLUMNS[2:]]
WIDTH_WITHOUT_TERMINAL = 200


def print_json(value: Any) -> None:
    typer.echo(json.dumps(value, indent=1))


def print_table(title: str, columns: list[str], rows: list[list[str]]) -> None:
    from rich.console import Console
    from rich.table import Table

    table = Table(*columns, title=title, title_justify="left")
    for row in rows:
        table.add_row(*row)
    console = Console()
    # In a file or a pipe, rich would assume 80 columns and break the names of layers.
    if not console.is_terminal:
        console = Console(width=WIDTH_WITHOUT_TERMINAL)
    console.print(table)


def show_totals(inspection: "Inspection") -> None:
    """Print the sizes of a compressed checkpoint in three lines, and its warnings on standard error."""
    from ..checkpoints.inspect import asked_in_words

    asked = asked_in_words(inspection.ratio_asked, inspection.bits_asked, inspection.size_asked)
    dense_layers = sum(layer.kind == "dense" for layer in inspection.layers)
    typer.echo(
        f"block linears: asked {asked}, stored {inspection.ratio_stored:.2%} removed "
        f"({inspection.ratio_paper:.2%} without mask bits), {inspection.bits_per_weight:.2f} bits per weight: "
        f"{inspection.block_bytes:,} of {inspection.dense_block_bytes:,} bytes; "
        f"{len(inspection.layers) - dense_layers} layers compressed, {dense_layers} left dense"
    )
    if inspection.dense_embedding_bytes:
        removed = 1 - inspection.embedding_bytes / inspection.dense_embedding_bytes
        typer.echo(
            f"embeddings and head: {removed:.2%} removed, "
            f"{inspection.embedding_bytes:,} of {inspection.dense_embedding_bytes:,} bytes"
        )
    typer.echo(
        f"whole model: {inspection.model_ratio:.2%} removed, "
        f"{inspection.model_bytes:,} of {inspection.dense_model_bytes:,} bytes; "
        f"on disk {inspection.disk_bytes:,} bytes"
    )
    for warning in inspection.warnings:
        typer.echo(f"warning: {warning}", err=True)


def show_kinds(title: str, layers: "list[StoredLayer]") -> None:
    """Print one row for each kind of layer."""
    rows = []
    for name, group in by_kind(layers).items():
        dense_layers = sum(layer.kind == "dense" for layer in group)
        compressed = [layer for layer in group if layer.kind != "dense"]
        rows.append(
            [
                name,
                str(len(group)),
                str(dense_layers),
                ", ".join(sorted({layer.sparse for layer in compressed})),
                _range((layer.rank for layer in compressed), "d"),
                _range((layer.binary_rank for layer in compressed), "d"),
                _range((layer.density for layer in group), ".3f"),
                _range((layer.bits_per_weight for layer in group), ".2f"),
                _range((layer.relative_error for layer in compressed), ".4f"),
                f"{sum(layer.bytes for layer in group):,}",
            ]
        )
    print_table(title, KIND_COLUMNS, rows)


def show_layers(title: str, layers: "list[StoredLayer]") -> None:
    """Print one row for each layer."""
    rows = []
    for layer in layers:
        relative_error = "" if layer.relative_error is None else f"{layer.relative_error:.4f}"
        rows.append(
            [
                layer.name,
                layer.kind,
                layer.reason or layer.sparse,
                str(layer.rank),
                str(layer.binary_rank),
                f"{layer.density:.3f}",
                f"{layer.bits_per_weight:.2f}",
                relative_error,
                f"{layer.bytes:,}",
            ]
        )
    print_table(title, LAYER_COLUMNS, rows)


def kinds_summary(layers: "list[StoredLayer]") -> list[dict[str, Any]]:
    """Return the sums of each kind of layer as plain values for JSON."""
    summary = []
    for name, group in by_kind(layers).items():
        # The number of weights is not stored, but follows from two values that are.
        weights = sum(8 * layer.bytes / layer.bits_per_weight for layer in group)
        stored_bytes = sum(layer.bytes for layer in group)
        dense_layers = sum(layer.kind == "dense" for layer in group)
        summary.append(
            {
                "layers": name,
                "number": len(group),
                "dense": dense_layers,
                "bytes": stored_bytes,
                "bits_per_weight": 8 * stored_bytes / weights,
            }
        )
    return summary


def by_kind(layers: "list[StoredLayer]") -> "dict[str, list[StoredLayer]]":
    """Group the layers of all blocks by the last part of their names, such as `q_proj`, in the order of the model."""
    groups: dict[str, list[StoredLayer]] = {}
    for layer in layers:
        groups.setdefault(layer.name.rpartition(".")[2], []).append(layer)
    return groups


def tokenizer_or_none(source: str) -> Any:
    """Return the tokenizer beside a model, or None with a warning on standard error if there is none that opens."""
    from ..models.loading import load_tokenizer

    try:
        return load_tokenizer(source)
    except CompressionError as error:
        typer.echo(f"warning: {error}; going on without", err=True)
        return None


def _range(values: Iterable[float | None], form: str) -> str:
    """Return the smallest and the largest value, one of them if both look the same, or nothing without values."""
    known = [value for value in values if value is not None]
    if not known:
        return ""
    smallest = f"{min(known):{form}}"
    largest = f"{max(known):{form}}"
    return smallest if smallest == largest else f"{smallest} to {largest}"
