"""Report of a compressed checkpoint as one HTML page that needs no network.

The page shows sizes, quality, layers, spectra, the training of the spectrum, and the Pareto front of a comparison.
"""

import json
from collections import Counter
from importlib.resources import files
from pathlib import Path
from typing import Any

import jinja2

from ..checkpoints.inspect import Inspection, inspect, read_checked_report
from ..evaluation import pareto
from ..execution.files import human_bytes, write_atomically
from ..methods import method_class, registered_methods
from ..models.architectures import find_blocks
from ..models.loading import load_config, skeleton
from ..runtime.configuration import LayerSpec
from ..runtime.errors import CompressionError, path_in_message
from ..runtime.privacy import public_name
from ..runtime.validation import resolve_layers
from . import charts
from .card_sections import calibration_source, option_list
from .heat_maps import heat_maps, layer_grid
from .model_card import is_hub_id, read_config
from .spectra import spectrum_charts

METRIC_NAMES = {
    "kl_divergence": "KL divergence, nats per token",
    "top1_agreement": "top-1 agreement, share of tokens",
}
"""Names of metrics as the page shows them. Other metrics are shown by their own names."""


def write_html_report(folder: str | Path, out: str | Path, comparison: Path | None = None) -> None:
    """Write the page of the compressed checkpoint in `folder`. The same files give the same page.

    Args:
        out: HTML file to write.
        comparison: output folder of `hf-lowrank compare`, or its results.json, to show its Pareto front.

    Raises:
        CompressionError: if there is no such checkpoint or comparison, or no matplotlib to draw with.
    """
    folder, out = Path(folder), Path(out)
    # What can be wrong with the arguments is found before the spectra are computed, which may take long.
    pareto.check_plotting()
    results = None
    if comparison is not None:
        results = _read_comparison(comparison)
    if out.is_dir():
        raise CompressionError(f"{out}: is a folder; name the file to write, such as {out / 'report.html'}")
    inspection = inspect(folder)
    report = read_checked_report(folder)
    recipe = read_config(folder)["quantization_config"]
    page = _template().render(
        name=folder.resolve().name,
        inspection=inspection,
        **_overview(inspection, report, recipe),
        **_layers(folder, inspection, report, recipe),
        **_comparison(results),
        **_origin(inspection, report, recipe),
    )
    out.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(out, page)


def _template() -> jinja2.Template:
    # Names and texts on the page may come from a stranger's checkpoint, so all of them are escaped.
    # A name that the template uses and no function below provides is an error, and not an empty place on the page.
    environment = jinja2.Environment(
        autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    return environment.from_string(files("hf_lowrank").joinpath("data/report.html").read_text(encoding="utf-8"))


def _read_comparison(path: Path) -> dict[str, Any]:
    """Return the results of a comparison from its folder or file.

    Raises:
        CompressionError: if there are none, or the file is not what `hf-lowrank compare` writes.
    """
    file = path / "results.json" if path.is_dir() else path
    if not file.is_file():
        raise CompressionError(
            f"{path_in_message(file)}: no such file; give the --out folder of a finished hf-lowrank compare"
        )
    try:
        results: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
        pareto.table(results)  # uses every field that the page needs, so a wrong file fails here
    except (ValueError, KeyError, TypeError, IndexError) as error:
        raise CompressionError(
            f"{file}: is not what hf-lowrank compare writes ({error!r}); run compare again"
        ) from error
    return results


def _overview(inspection: Inspection, report: dict[str, Any], recipe: dict[str, Any]) -> dict[str, Any]:
    """Return the values of the head of the page and of the section on quality."""
    source = ""
    if inspection.method in registered_methods():
        source = method_class(inspection.method).source
    quality = report.get("quality", [])
    return {
        "method": inspection.method,
        "source": source,
        "base": _base_model(recipe.get("provenance", {})),
        "sizes": [
            _size("linear layers of the blocks", inspection.dense_block_bytes, inspection.block_bytes),
            _size("whole model", inspection.dense_model_bytes, inspection.model_bytes),
        ],
        "bits_per_weight": 8 * inspection.block_bytes / _weight_count(inspection),
        "headline": _headline(quality),
        "quality": _by_dataset(quality),
    }


def _base_model(provenance: dict[str, Any]) -> str:
    """Return the id of the base model on the Hub, or the name of its folder without the path."""
    base: str = provenance.get("base_model", "")
    if not base or is_hub_id(base):
        return base
    return public_name(base)


def _size(subject: str, dense: int, stored: int) -> dict[str, Any]:
    return {
        "subject": subject,
        "dense": human_bytes(dense, smallest_unit="MB"),
        "stored": human_bytes(stored, smallest_unit="MB"),
        "left": stored / dense,
        "removed": f"{1 - stored / dense:.1%}",
    }


def _weight_count(inspection: Inspection) -> float:
    """Return the number of entries of the dense weights of the block linears."""
    # An inspection has no shapes, but bits and bits per weight of every layer give the same number.
    return sum(8 * layer.bytes / layer.bits_per_weight for layer in inspection.layers)


def _headline(quality: list[dict[str, Any]]) -> dict[str, str] | None:
    """Return the figure to show first: perplexity on a text beside the dense model's, or the nearest figure to it."""
    if not quality:
        return None
    # Tasks may have a metric called perplexity as well. Texts are known by their KL divergence, which no task has.
    texts = {row["dataset"] for row in quality if row["metric"] == "kl_divergence"}

    def distance(row: dict[str, Any]) -> tuple[bool, bool, bool]:
        # False sorts before True, so the first condition that holds for some rows excludes the others.
        return row.get("dense") is None, row["dataset"] not in texts, row["metric"] != "perplexity"

    row = min(quality, key=distance)
    name = _metric_name(row["metric"])
    dense = ""
    if row.get("dense") is not None:
        dense = f"{row['dense']:.4g}"
    return {
        "metric": name[0].upper() + name[1:],  # `capitalize` would write KL in small letters
        "dataset": row["dataset"],
        "value": f"{row['compressed']:.4g}",
        "dense": dense,
    }


def _metric_name(metric: str) -> str:
    return METRIC_NAMES.get(metric, metric.replace("_", " "))


def _by_dataset(quality: list[dict[str, Any]]) -> dict[str, list[dict[str, Any]]]:
    """Return the measurements by the data and the settings that they were made with."""
    groups: dict[str, list[dict[str, Any]]] = {}
    for row in quality:
        parts = [part for part in (row["dataset"], row.get("settings")) if part]
        # Rows without a dense value get the key all the same, because the template accepts no missing one.
        groups.setdefault(", ".join(parts), []).append({"dense": None, **row, "metric": _metric_name(row["metric"])})
    return groups


def _layers(folder: Path, inspection: Inspection, report: dict[str, Any], recipe: dict[str, Any]) -> dict[str, Any]:
    """Return the values of the sections on layers, spectra and training."""
    # The skeleton has the names and the shapes of the dense model, on the meta device and so without its memory.
    model = skeleton(load_config(str(folder)))
    grid = layer_grid(inspection, list(find_blocks(model)))
    dense_bits = 8 * inspection.dense_block_bytes / _weight_count(inspection)
    layer_specs = {name: LayerSpec.from_dict(name, spec) for name, spec in recipe["layers"].items()}
    spectra, spectra_note = spectrum_charts(folder, model, resolve_layers(model, layer_specs), grid, report)
    # Only SoCo trains a spectrum, and without steps there is nothing to draw.
    curve = report.get("curve")
    training = None
    if curve and curve["loss"]:
        training = charts.training_chart("training", curve, inspection.ratio_asked)
    return {
        "heat_maps": heat_maps(grid, dense_bits),
        "left_dense": Counter(layer.reason for layer in inspection.layers if layer.kind == "dense"),
        "spectra": spectra,
        "spectra_note": spectra_note,
        "training": training,
    }


def _comparison(results: dict[str, Any] | None) -> dict[str, Any]:
    """Return the values of the section on the comparison with other methods, which is left out without results."""
    if results is None:
        return {"pareto_charts": [], "failures": []}
    panels = []
    for number in range(len(results["dense"]["texts"])):
        chart = charts.pareto_chart(f"pareto-{number}", results, number)
        panels.append((pareto.panel_title(results, number), chart))
    return {"pareto_charts": panels, "failures": pareto.failures(results)}


def _origin(inspection: Inspection, report: dict[str, Any], recipe: dict[str, Any]) -> dict[str, Any]:
    """Return the values of the section on how the model was compressed."""
    provenance = recipe.get("provenance", {})
    tokens = provenance.get("calibration_tokens")
    rows = [
        ("options", option_list(recipe["options"])),
        ("calibration text", calibration_source(recipe["calibration"])),
        ("calibration tokens", f"{tokens:,}" if tokens else "not recorded"),
        ("seed", str(recipe["seed"])),
        ("data type", provenance.get("dtype", "not recorded")),
        ("weight files", f"{inspection.disk_bytes:,} bytes"),
    ]
    return {"recipe": rows, "command": report.get("command"), "versions": provenance.get("versions", {})}
