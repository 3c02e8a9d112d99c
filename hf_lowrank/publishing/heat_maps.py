"""Heat maps of the layers of a checkpoint: a row per component, a column per block."""

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial

from ..checkpoints.inspect import Inspection, StoredLayer

NUMBERED_BLOCKS = 16
"""Heat maps with at most this many blocks show numbers in their cells."""
LEFT_DENSE = "left dense"
"""Legend of the hatched cells of layers that are not compressed."""


@dataclass
class LayerGrid:
    """Layers of a model by component and block.

    Attributes:
        blocks: headers of the columns.
        components: names of the layers within their block, in the order of the model.
        cells: layer by (component, column).
    """

    blocks: list[str] = field(default_factory=list)
    components: list[str] = field(default_factory=list)
    cells: dict[tuple[str, int], StoredLayer] = field(default_factory=dict)

    def short_name(self, component: str) -> str:
        """Return the last part of a component's name if no other component ends like it, or else the whole name."""
        last_part = component.rpartition(".")[2]
        same_ending = [other for other in self.components if other.rpartition(".")[2] == last_part]
        if len(same_ending) == 1:
            return last_part
        return component

    def row(self, component: str) -> list[StoredLayer | None]:
        """Return the layers of a component, block by block. A block without the component has None."""
        return [self.cells.get((component, column)) for column in range(len(self.blocks))]


def layer_grid(inspection: Inspection, blocks: list[str]) -> LayerGrid:
    """Arrange the layers of a checkpoint by component and block.

    Args:
        blocks: module names of the blocks.
    """
    grid = LayerGrid()
    block_lists = {block.rpartition(".")[0] for block in blocks}
    for column, block in enumerate(blocks):
        header = block.rpartition(".")[2]
        # Where blocks lie in several lists, such as those of an encoder and a decoder, a number alone is ambiguous.
        if len(block_lists) > 1:
            header = f"{block.partition('.')[0][:3]} {header}"
        grid.blocks.append(header)
        for layer in inspection.layers:
            if layer.name.startswith(f"{block}."):
                component = layer.name.removeprefix(f"{block}.")
                # Blocks may differ, so every block can add components.
                if component not in grid.components:
                    grid.components.append(component)
                grid.cells[component, column] = layer
    return grid


@dataclass(frozen=True)
class Quantity:
    """A quantity of layers that a heat map shows.

    Attributes:
        title, note: heading of the map, and a sentence that explains the quantity.
        low, high: ends of the scale as text. The scale begins at zero.
        top: value at the dark end of the scale.
        value: function from a layer to its value, or to None where the quantity does not exist.
        text: function from a layer to the text in its cell.
        missing: function from a layer without a value to the reason, as the legend says it.
    """

    title: str
    note: str
    low: str
    high: str
    top: float
    value: Callable[[StoredLayer], float | None]
    text: Callable[[StoredLayer], str]
    missing: Callable[[StoredLayer], str]


@dataclass(frozen=True)
class Cell:
    """One layer in a heat map.

    Attributes:
        shade: shade from 0 to 1, or None for a hatched cell.
        text: the text in the cell.
        title: what a pointer over the cell is told.
        missing: why the cell is hatched, as the legend says it.
    """

    shade: float | None
    text: str
    title: str
    missing: str = ""


@dataclass(frozen=True)
class HeatMap:
    """One quantity of all layers, ready to be shown.

    Attributes:
        title, note, low, high: as in `Quantity`.
        blocks: headers of the columns.
        rows: name of a component and its cells, block by block.
    """

    title: str
    note: str
    low: str
    high: str
    blocks: list[str]
    rows: list[tuple[str, list[Cell]]]

    @property
    def is_numbered(self) -> bool:
        """Whether there is room for numbers in the cells."""
        return len(self.blocks) <= NUMBERED_BLOCKS

    @property
    def hatched_legend(self) -> str:
        """The reasons for hatched cells, empty if there are none."""
        reasons = []
        for _, cells in self.rows:
            for cell in cells:
                if cell.missing and cell.missing not in reasons:
                    reasons.append(cell.missing)
        return " or ".join(reasons)


def heat_maps(grid: LayerGrid, dense_bits: float) -> list[HeatMap]:
    """Return the maps of rank, density, bits and error, without those that would show nothing.

    Args:
        dense_bits: bits per weight of the dense layers.
    """
    layers = list(grid.cells.values())
    quantities = []
    # A map in which every cell is hatched, or every density is 0 or 1, says nothing.
    if any(layer.rank for layer in layers):
        quantities.append(_rank(layers))
    if any(0 < layer.density < 1 for layer in layers):
        quantities.append(_density())
    quantities.append(_bits(layers, dense_bits))
    if any(layer.relative_error is not None for layer in layers):
        quantities.append(_error(layers))
    return [_heat_map(grid, quantity) for quantity in quantities]


def _rank(layers: list[StoredLayer]) -> Quantity:
    top = max(layer.rank for layer in layers)
    return Quantity(
        title="Rank",
        note="Rank of the low-rank part.",
        low="0",
        high=str(top),
        top=top,
        value=lambda layer: layer.rank or None,
        text=lambda layer: str(layer.rank),
        missing=partial(_why_missing, "no low-rank part"),
    )


def _density() -> Quantity:
    def density(layer: StoredLayer) -> float | None:
        if layer.kind == "dense" or layer.sparse == "none":
            return None
        return layer.density

    return Quantity(
        title="Density",
        note="Entries that the sparse part stores, in percent of all entries of the layer.",
        low="0 %",
        high="100 %",
        top=1.0,
        value=density,
        text=lambda layer: f"{100 * layer.density:.0f}",
        missing=partial(_why_missing, "no sparse part"),
    )


def _bits(layers: list[StoredLayer], dense_bits: float) -> Quantity:
    # A layer may take more bits than the dense one, and its shade must not exceed 1.
    top = max(dense_bits, *(layer.bits_per_weight for layer in layers))
    return Quantity(
        title="Bits per weight",
        note="All stored bits, those of masks, signs and scales too, per entry of the dense layer.",
        low="0",
        high=f"{top:.3g}",
        top=top,
        value=lambda layer: layer.bits_per_weight,
        text=lambda layer: f"{layer.bits_per_weight:.1f}",
        missing=partial(_why_missing, ""),
    )


def _error(layers: list[StoredLayer]) -> Quantity:
    # If all errors are zero, any scale is right, but it may not end at zero.
    worst = max(layer.relative_error or 0.0 for layer in layers) or 1.0
    return Quantity(
        title="Relative error",
        note="Error of the layer's output on the calibration text, relative to the size of that output.",
        low="0",
        high=f"{worst:.2g}",
        top=worst,
        value=lambda layer: layer.relative_error,
        text=lambda layer: f"{layer.relative_error:.2f}"[-3:],  # ".12": the zero before the point takes room
        missing=partial(_why_missing, "not measured"),
    )


def _why_missing(reason: str, layer: StoredLayer) -> str:
    """Return why a layer has no value, where `reason` is the one for compressed layers."""
    if layer.kind == "dense":
        return LEFT_DENSE
    return reason


def _heat_map(grid: LayerGrid, quantity: Quantity) -> HeatMap:
    rows = []
    for component in grid.components:
        cells = []
        for block, layer in zip(grid.blocks, grid.row(component), strict=True):
            # A decoder has cross-attention, for example, and an encoder does not.
            if layer is None:
                cells.append(Cell(None, "", f"block {block}: no such layer", missing="no such layer"))
            else:
                cells.append(_cell(layer, quantity))
        rows.append((grid.short_name(component), cells))
    return HeatMap(quantity.title, quantity.note, quantity.low, quantity.high, grid.blocks, rows)


def _cell(layer: StoredLayer, quantity: Quantity) -> Cell:
    value = quantity.value(layer)
    if value is None:
        missing = quantity.missing(layer)
        # The reason from the report is longer than the one for the legend and names the method or the option.
        return Cell(None, "", f"{layer.name}: {layer.reason or missing}", missing)
    return Cell(value / quantity.top, quantity.text(layer), _about(layer))


def _about(layer: StoredLayer) -> str:
    """Return all figures of a layer on one line."""
    if layer.kind == "dense":
        return f"{layer.name}: {layer.reason}"
    figures = [f"rank {layer.rank}"]
    if layer.binary_rank:
        figures.append(f"binary rank {layer.binary_rank}")
    figures += [f"{layer.density:.1%} kept", f"{layer.bits_per_weight:.2f} bits per weight"]
    if layer.relative_error is not None:
        figures.append(f"error {layer.relative_error:.4f}")
    return f"{layer.name}: {', '.join(figures)}"
