"""The report of a compressed checkpoint as one HTML page that needs no network: sizes, quality, layers, spectra, training, frontier."""

import json
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from importlib.resources import files
from pathlib import Path
from typing import Any

import jinja2

from ..checkpoints.inspect import Inspection, StoredLayer, inspect, read_report
from ..evaluation import pareto
from ..execution.files import human_bytes, short_path, write_atomically
from ..methods import method_class, registered_methods
from ..models.architectures import find_blocks
from ..models.loading import load_config, skeleton
from ..runtime.configuration import LayerSpec
from ..runtime.errors import CompressionError
from ..runtime.validation import dense_shape, resolve_layers
from . import charts
from .model_card import is_hub_id, read_config
from .spectra import stored_spectra

LARGEST_WORK = 1e12
"""Multiplications for spectra that must be computed for the page (about m n min(m, n) each); beyond, three blocks stand for all."""
NUMBERED_BLOCKS = 16
"""Heat maps of at most so many blocks show numbers in their cells."""


@dataclass(frozen=True)
class Cell:
    """One layer in a heat map: shade from 0 to 1 (None: does not apply), what is written in it, and what a pointer is told."""

    shade: float | None
    text: str
    title: str


@dataclass(frozen=True)
class HeatMap:
    """One quantity of all layers: a row per component, a column per block."""

    title: str
    note: str
    low: str
    high: str
    blocks: list[str]
    rows: list[tuple[str, list[Cell]]]

    @property
    def is_numbered(self) -> bool:
        return len(self.blocks) <= NUMBERED_BLOCKS

    @property
    def has_gaps(self) -> bool:
        return any(cell.shade is None and cell.title for _, cells in self.rows for cell in cells)


@dataclass
class Grid:
    """The layers of a model by component and block.

    Attributes:
        blocks: what the columns are called. cells: layer by (component, column).
    """

    blocks: list[str] = field(default_factory=list)
    components: list[str] = field(default_factory=list)
    cells: dict[tuple[str, int], StoredLayer] = field(default_factory=dict)


def write_html_report(folder: str | Path, out: str | Path, comparison: Path | None = None) -> None:
    """Write the page of the compressed checkpoint in `folder`; the same files give the same page.

    Args:
        comparison: the output folder of `hf-lowrank compare`, or its results.json, for the frontier.

    Raises:
        CompressionError: if there is no such checkpoint or comparison, or no matplotlib to draw with.
    """
    folder, out = Path(folder), Path(out)
    pareto.check_plotting()
    results = _comparison(comparison) if comparison is not None else None
    if out.is_dir():
        raise CompressionError(f"{out}: is a folder; name the file to write, such as {out / 'report.html'}")
    found, report, recipe = inspect(folder), read_report(folder), read_config(folder)["quantization_config"]
    model = skeleton(load_config(str(folder)))
    grid = _grid(found, list(find_blocks(model)))
    specs = resolve_layers(model, {name: LayerSpec.from_dict(name, spec) for name, spec in recipe["layers"].items()})
    weights = sum(8 * layer.bytes / layer.bits_per_weight for layer in found.layers)
    spectra, spectra_note = _spectra(folder, model, specs, grid, report)
    environment = jinja2.Environment(
        autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    template = environment.from_string(files("hf_lowrank").joinpath("data/report.html").read_text(encoding="utf-8"))
    curve = report.get("curve")
    page = template.render(
        name=folder.resolve().name,
        method=found.method,
        source=method_class(found.method).source if found.method in registered_methods() else "",
        base=_base_model(recipe.get("provenance", {})),
        found=found,
        sizes=_sizes(found),
        bits_per_weight=8 * found.block_bytes / weights,
        quality=_by_dataset(report.get("quality", [])),
        headline=_headline(report.get("quality", [])),
        recipe=_recipe(recipe, found.disk_bytes),
        heat_maps=_heat_maps(grid, 8 * found.dense_block_bytes / weights),
        spectra=spectra,
        spectra_note=spectra_note,
        training=charts.training("training", curve, found.ratio_asked) if curve and curve["loss"] else None,
        panels=_frontier(results),
        failures=pareto.failures(results) if results else [],
        left_dense=Counter(layer.reason for layer in found.layers if layer.kind == "dense"),
        command=report.get("command"),
        versions=recipe.get("provenance", {}).get("versions", {}),
    )
    out.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(out, page)


def _comparison(path: Path) -> dict[str, Any]:
    file = path / "results.json" if path.is_dir() else path
    if not file.is_file():
        raise CompressionError(f"{file}: no such file; give the --out folder of a finished hf-lowrank compare")
    try:
        results: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
        pareto.table(results)
    except (ValueError, KeyError, TypeError, IndexError) as error:
        raise CompressionError(
            f"{file}: is not what hf-lowrank compare writes ({error!r}); run compare again"
        ) from error
    return results


def _base_model(provenance: dict[str, Any]) -> str:
    base = provenance.get("base_model", "")
    return base if not base or is_hub_id(base) else Path(base).name


def _sizes(found: Inspection) -> list[dict[str, Any]]:
    rows = [
        ("linear layers of the blocks", found.dense_block_bytes, found.block_bytes),
        ("whole model", found.dense_model_bytes, found.model_bytes),
    ]
    return [
        {
            "what": what,
            "dense": human_bytes(dense, smallest_unit="MB"),
            "stored": human_bytes(stored, smallest_unit="MB"),
            "left": stored / dense,
            "removed": f"{1 - stored / dense:.1%}",
        }
        for what, dense, stored in rows
    ]


def _headline(quality: list[dict[str, Any]]) -> dict[str, str] | None:
    """The figure to show first: the perplexity of a text beside the dense model's, or whatever comes nearest to that."""
    if not quality:
        return None
    texts = {row["dataset"] for row in quality if row["metric"] == "kl_divergence"}
    row = min(
        quality, key=lambda row: (row.get("dense") is None, row["dataset"] not in texts, row["metric"] != "perplexity")
    )
    dense = "" if row.get("dense") is None else f"dense {row['dense']:.4g}"
    return {
        "metric": row["metric"].replace("_", " "),
        "dataset": row["dataset"],
        "value": f"{row['compressed']:.4g}",
        "dense": dense,
    }


def _by_dataset(quality: list[dict[str, Any]]) -> dict[str, list[dict[str, Any]]]:
    """Measurements under what they were made on and how."""
    groups: dict[str, list[dict[str, Any]]] = {}
    for row in quality:
        about = ", ".join(part for part in (row["dataset"], row.get("settings")) if part)
        groups.setdefault(about, []).append({"dense": None, **row, "metric": row["metric"].replace("_", " ")})
    return groups


def _recipe(recipe: dict[str, Any], disk_bytes: int) -> list[tuple[str, str]]:
    text, provenance = recipe["calibration"], recipe.get("provenance", {})
    tokens = provenance.get("calibration_tokens")
    return [
        ("options", ", ".join(f"{name} {value}" for name, value in sorted(recipe["options"].items())) or "none"),
        ("calibration", "text sampled from the model itself" if text == "self" else short_path(text)),
        ("calibration tokens", f"{tokens:,}" if tokens else "not recorded"),
        ("seed", str(recipe["seed"])),
        ("values", provenance.get("dtype", "not recorded")),
        ("weight files", f"{disk_bytes:,} bytes"),
    ]


def _grid(found: Inspection, blocks: list[str]) -> Grid:
    """Layers by what they are called within their block; blocks of several lists (encoder, decoder) by list and number."""
    lists = {block.rpartition(".")[0] for block in blocks}
    grid = Grid()
    for column, block in enumerate(blocks):
        grid.blocks.append(
            block.rpartition(".")[2]
            if len(lists) == 1
            else f"{block.partition('.')[0][:3]} {block.rpartition('.')[2]}"
        )
        for layer in found.layers:
            if layer.name.startswith(f"{block}."):
                component = layer.name.removeprefix(f"{block}.")
                if component not in grid.components:
                    grid.components.append(component)
                grid.cells[component, column] = layer
    return grid


def _heat_maps(grid: Grid, dense_bits: float) -> list[HeatMap]:
    """Those of rank, kept values, bits and error that differ between layers or say anything at all."""
    layers = list(grid.cells.values())
    maps = []
    if any(layer.rank for layer in layers):
        note = "Rank of the low-rank part."
        top = max(layer.rank for layer in layers)
        ranks = {id(layer): layer.rank / top if layer.kind != "dense" else None for layer in layers}
        maps.append(_heat_map(grid, "Rank", note, "0", str(top), ranks, lambda layer: str(layer.rank)))
    if any(0 < layer.density < 1 for layer in layers):
        kept = {id(layer): layer.density if layer.kind != "dense" else None for layer in layers}
        note = "Percentage of the entries that the sparse part stores as they are."
        maps.append(_heat_map(grid, "Density", note, "0 %", "100 %", kept, lambda layer: f"{100 * layer.density:.0f}"))
    top_bits = max(dense_bits, *(layer.bits_per_weight for layer in layers))
    bits = {id(layer): layer.bits_per_weight / top_bits for layer in layers}
    note = "Everything that is stored, masks, signs and scales too, divided by the entries of the dense layer."
    maps.append(
        _heat_map(
            grid, "Bits per weight", note, "0", f"{top_bits:.3g}", bits, lambda layer: f"{layer.bits_per_weight:.1f}"
        )
    )
    errors = [layer.relative_error for layer in layers if layer.relative_error is not None]
    if errors:
        worst = max(errors) or 1.0
        lost = {id(layer): None if layer.relative_error is None else layer.relative_error / worst for layer in layers}
        note = (
            "What the layer's output is off by on the calibration text, relative to its size, when it was compressed."
        )
        maps.append(
            _heat_map(
                grid,
                "Relative error",
                note,
                "0",
                f"{worst:.2g}",
                lost,
                lambda layer: f"{layer.relative_error:.2f}"[-3:],
            )
        )
    return maps


def _heat_map(
    grid: Grid, title: str, note: str, low: str, high: str, shades: Mapping[int, float | None], text: Any
) -> HeatMap:
    rows = []
    for component in grid.components:
        cells = []
        for column in range(len(grid.blocks)):
            layer = grid.cells.get((component, column))
            shade = None if layer is None else shades[id(layer)]
            if layer is None:
                cells.append(Cell(None, "", ""))
            elif shade is None:
                cells.append(Cell(None, "", f"{layer.name}: {layer.reason or 'not measured'}"))
            else:
                cells.append(Cell(shade, text(layer), _about(layer)))
        rows.append((_short(component, grid.components), cells))
    return HeatMap(title, note, low, high, grid.blocks, rows)


def _short(component: str, components: list[str]) -> str:
    """The last part of a component's name, if no other ends like it."""
    last = component.rpartition(".")[2]
    return last if sum(other.rpartition(".")[2] == last for other in components) == 1 else component


def _about(layer: StoredLayer) -> str:
    if layer.kind == "dense":
        return f"{layer.name}: {layer.reason}"
    error = "" if layer.relative_error is None else f", error {layer.relative_error:.4f}"
    binary = f", binary rank {layer.binary_rank}" if layer.binary_rank else ""
    return (
        f"{layer.name}: rank {layer.rank}{binary}, {layer.density:.1%} kept, {layer.bits_per_weight:.2f} bits{error}"
    )


def _spectra(
    folder: Path, model: Any, specs: dict[str, LayerSpec], grid: Grid, report: dict[str, Any]
) -> tuple[list[Any], str]:
    """One chart per component, and what they show: the dense layers as the method measured them, or else the stored ones."""
    spectra = {layer["name"]: layer["spectrum"] for layer in report.get("layers", []) if layer.get("spectrum")}
    last = max(len(grid.blocks) - 1, 1)
    kept: dict[str, float] = {}
    if spectra:
        kept = {name: _kept_fraction(model, name, specs[name]) for name in spectra if name in specs}
        note = (
            "Singular values of the part of the dense layer that becomes low rank, in the calibration metric, "
            "relative to the largest. The dot marks how many are kept."
        )
    else:
        is_too_much = sum(_work(model, name) for name in specs) > LARGEST_WORK
        columns = {0, last // 2, last} if is_too_much else set(range(len(grid.blocks)))
        names = [layer.name for (_, column), layer in grid.cells.items() if column in columns and layer.name in specs]
        spectra = stored_spectra(folder, model, specs, names)
        note = "Singular values of the matrices that the stored layers multiply by, relative to the largest."
        note += " First, middle and last block." if is_too_much else ""
    charted = []
    for number, component in enumerate(grid.components):
        layers = [(column, grid.cells.get((component, column))) for column in range(len(grid.blocks))]
        lines = [
            charts.SpectrumLine(column / last, spectra[layer.name], kept.get(layer.name))
            for column, layer in layers
            if layer is not None and layer.name in spectra
        ]
        if lines:
            charted.append((_short(component, grid.components), charts.spectra(f"spectrum-{number}", lines)))
    return charted, note


def _work(model: Any, name: str) -> float:
    rows, columns = dense_shape(model.get_submodule(name))
    return float(rows * columns * min(rows, columns))


def _kept_fraction(model: Any, name: str, spec: LayerSpec) -> float:
    return spec.factor_rank / min(spec.lowrank_shape(*dense_shape(model.get_submodule(name))))


def _frontier(results: dict[str, Any] | None) -> list[tuple[str, str]]:
    if results is None:
        return []
    return [
        (
            f"{short_path(text['text'])}, dense perplexity {text['perplexity']:.4g}",
            charts.frontier_panel(f"frontier-{number}", results, number),
        )
        for number, text in enumerate(results["dense"]["texts"])
    ]
