"""Spectra of a compressed checkpoint: those that its report recorded, or else those of the stored layers."""

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open

from ..compression.report import sampled_spectrum
from ..runtime.configuration import LayerSpec
from ..runtime.layers import CompressedLinear, build_layer
from ..runtime.safetensors_headers import weight_files
from ..runtime.validation import dense_shape
from .charts import SpectrumLine, spectra_chart
from .heat_maps import LayerGrid

LARGEST_WORK = 1e12
"""Maximum number of multiplications for spectra that are computed for a page. Above it, three blocks are shown."""
RECORDED_NOTE = (
    "Singular values, relative to the largest, of the part of each dense layer that becomes low rank, in the "
    "calibration metric. The dot marks how many are kept."
)
STORED_NOTE = "Singular values, relative to the largest, of the matrices that the stored layers multiply by."


def stored_spectra(
    folder: Path, model: Any, specs: dict[str, LayerSpec], names: Iterable[str]
) -> dict[str, list[float]]:
    """Return the spectra of the matrices that compressed layers multiply by (see `sampled_spectrum`), by layer name.

    Args:
        model: dense skeleton of the checkpoint, on the meta device.
        specs: what its layers store, by name.
        names: layers whose spectra are computed. Only these are read.
    """
    # The tensors of a layer may lie in several shards.
    file_of_tensor: dict[str, str] = {}
    for file in weight_files(str(folder)):
        with safe_open(file, "pt") as tensors:
            file_of_tensor |= dict.fromkeys(tensors.keys(), file)
    spectra = {}
    for name in names:
        # One layer is in memory at a time, however large the model is.
        layer = _read_layer(model, name, specs[name], file_of_tensor)
        spectra[name] = sampled_spectrum(torch.linalg.svdvals(layer.to_dense(torch.float32)))
    return spectra


@torch.no_grad()
def _read_layer(model: Any, name: str, spec: LayerSpec, file_of_tensor: dict[str, str]) -> CompressedLinear:
    """Return one compressed layer with its tensors from the files, and in float32."""
    out_features, in_features = dense_shape(model.get_submodule(name))
    layer = build_layer(spec, in_features, out_features, dtype=torch.float32)
    for tensor_name, target in layer.state_dict(keep_vars=True).items():
        # Parts that the layer does not have are empty tensors, which are not stored.
        if target.numel():
            stored_name = f"{name}.{tensor_name}"
            with safe_open(file_of_tensor[stored_name], "pt") as tensors:
                target.copy_(tensors.get_tensor(stored_name))
    return layer


def _recorded_spectra(report: dict[str, Any]) -> dict[str, list[float]]:
    """Return the spectra that the method measured before it decided on the ranks, by layer name."""
    spectra = {}
    for layer in report.get("layers", []):
        if layer.get("spectrum"):
            spectra[layer["name"]] = layer["spectrum"]
    return spectra


def spectrum_charts(
    folder: Path, model: Any, specs: dict[str, LayerSpec], grid: LayerGrid, report: dict[str, Any]
) -> tuple[list[tuple[str, str]], str]:
    """Return one chart per component with its name, and a sentence that says what the charts show.

    They show the dense layers as the method measured them, or else the stored layers.

    Args:
        model: dense skeleton of the checkpoint, on the meta device.
        specs: what its layers store, by name.
    """
    spectra = _recorded_spectra(report)
    kept: dict[str, float] = {}
    if spectra:
        for name in spectra:
            # A layer may have been measured and left dense afterwards.
            if name in specs:
                kept[name] = _kept_fraction(model, name, specs[name])
        note = RECORDED_NOTE
    else:
        columns = set(range(len(grid.blocks)))
        note = STORED_NOTE
        if sum(_svd_work(model, name) for name in specs) > LARGEST_WORK:
            columns = {0, _last_column(grid) // 2, _last_column(grid)}
            note += " Only the first, the middle and the last block are shown."
        names = []
        for (_, column), layer in grid.cells.items():
            if column in columns and layer.name in specs:
                names.append(layer.name)
        spectra = stored_spectra(folder, model, specs, names)
    charts = []
    for number, component in enumerate(grid.components):
        lines = _spectrum_lines(grid, component, spectra, kept)
        if lines:
            charts.append((grid.short_name(component), spectra_chart(f"spectrum-{number}", lines)))
    return charts, note


def _spectrum_lines(
    grid: LayerGrid, component: str, spectra: dict[str, list[float]], kept: dict[str, float]
) -> list[SpectrumLine]:
    """Return the spectra of a component, one line for each block that has one."""
    lines = []
    for column, layer in enumerate(grid.row(component)):
        if layer is not None and layer.name in spectra:
            depth = column / _last_column(grid)
            lines.append(SpectrumLine(depth, spectra[layer.name], kept.get(layer.name)))
    return lines


def _last_column(grid: LayerGrid) -> int:
    """Return the index of the last block, at least 1 because depths are relative to it."""
    return max(len(grid.blocks) - 1, 1)


def _kept_fraction(model: Any, name: str, spec: LayerSpec) -> float:
    """Return the fraction of the components of a layer's low-rank part that are kept."""
    return spec.factor_rank / min(spec.lowrank_shape(*dense_shape(model.get_submodule(name))))


def _svd_work(model: Any, name: str) -> float:
    """Return about how many multiplications the singular values of a layer take: m n min(m, n)."""
    rows, columns = dense_shape(model.get_submodule(name))
    return float(rows * columns * min(rows, columns))
