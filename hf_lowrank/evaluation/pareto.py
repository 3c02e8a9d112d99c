"""Pareto front of a comparison: a table and a plot of loss against stored bits, with the best method at each ratio."""

from importlib.util import find_spec
from pathlib import Path
from typing import Any

from ..runtime.errors import CompressionError
from ..runtime.privacy import public_name
from .comparison_records import ComparisonRecord, name_of

COLUMNS = ["text", "method", "removed", "bits/weight", "perplexity", "nats lost", "KL", "top-1", "seconds", "peak MiB"]
"""Header of the table."""
LINEAR_BELOW = 0.01
"""Losses below this many nats are drawn on a linear scale, because they may be zero or negative."""


def check_plotting() -> None:
    """Raise CompressionError if the library to plot with is missing."""
    if find_spec("matplotlib") is None:
        raise CompressionError("plots need matplotlib: pip install 'hf_lowrank[eval]'")


def best(records: list[ComparisonRecord], text: int) -> dict[float, ComparisonRecord]:
    """Return the record that loses the fewest nats on a text, for each ratio asked for.

    Args:
        text: position of the text among those of the comparison.
    """
    # Ratios are compared as they were asked for, because the stored ones of two methods are never quite equal.
    winners: dict[float, ComparisonRecord] = {}
    for record in _measured(records):
        rival = winners.get(record["ratio"])
        if rival is None or _lost(record, text) < _lost(rival, text):
            winners[record["ratio"]] = record
    return winners


def table(results: dict[str, Any]) -> list[list[str]]:
    """Return the rows under `COLUMNS`, text by text: the dense model, then the others from large to small.

    Rows of one ratio are ordered by their loss. A star marks the best method at each ratio.
    """
    rows = []
    dense, records = results["dense"], results["combinations"]
    for number, figures in enumerate(dense["texts"]):
        name = public_name(figures["text"])
        winners = best(records, number)
        dense_cells = [name, "dense", "", f"{dense['bits_per_weight']:.2f}", f"{figures['perplexity']:.4g}"]
        rows.append(dense_cells + [""] * (len(COLUMNS) - len(dense_cells)))
        for record in sorted(_measured(records), key=lambda record: (record["ratio"], _lost(record, number))):
            is_best = winners[record["ratio"]] is record
            rows.append([name, *_cells(record, number, is_best)])
    return rows


def _cells(record: ComparisonRecord, text: int, is_best: bool) -> list[str]:
    """Return the cells of one combination on one text, after the name of the text."""
    figures = record["texts"][text]
    label = record["label"]
    if is_best:
        label += " ★"
    peak = "–"  # the peak memory is not known on every system
    if record["peak_bytes"] is not None:
        peak = f"{record['peak_bytes'] / 2**20:.0f}"
    return [
        label,
        f"{record['ratio_stored']:.2%}",
        f"{record['bits_per_weight']:.2f}",
        f"{figures['perplexity']:.4g}",
        f"{figures['nats_lost']:.4f}",
        f"{figures['kl']:.4f}",
        f"{figures['top1_agreement']:.1%}",
        f"{record['seconds']:.0f}",
        peak,
    ]


def failures(results: dict[str, Any]) -> list[str]:
    """Return one line for each combination that could not be compressed, with the reason."""
    lines = []
    for record in results["combinations"]:
        if record["failed"] is not None:
            lines.append(f"{name_of(record)}: {record['failed']}")
    return lines


def markdown(results: dict[str, Any]) -> str:
    """Return the table and the failures as Markdown."""
    text = ""
    for cells in (COLUMNS, ["---"] * len(COLUMNS), *table(results)):
        text += f"| {' | '.join(cells)} |\n"
    reasons = failures(results)
    if reasons:
        text += "\nNot reached:\n\n"
        for reason in reasons:
            text += f"- {reason}\n"
    return text


def plot(results: dict[str, Any], file: Path) -> None:
    """Draw nats lost per token against stored bits per weight into an image file, one panel per text.

    A ring marks the best method at each ratio.
    """
    from matplotlib.figure import Figure

    texts = results["dense"]["texts"]
    colors = [f"C{position}" for position in range(10)]  # the color cycle of matplotlib
    figure = Figure(figsize=(6.4 * len(texts), 4.8), layout="constrained")
    panels = figure.subplots(1, len(texts), squeeze=False)[0]
    for number, axes in enumerate(panels):
        draw(axes, results, number, colors, ink="black")
        axes.set_title(panel_title(results, number), fontsize=10)
        axes.grid(alpha=0.3)
    # Without the name of the software and its version, the same results give the same bytes.
    figure.savefig(file, dpi=150, metadata={"Software": None})


def panel_title(results: dict[str, Any], text: int) -> str:
    """Return the title of the panel of one text."""
    figures = results["dense"]["texts"][text]
    return f"{public_name(figures['text'])}, dense perplexity {figures['perplexity']:.4g}"


def draw(axes: Any, results: dict[str, Any], text: int, colors: list[str], ink: str) -> None:
    """Draw the panel of one text.

    Args:
        axes: the axes of matplotlib to draw on.
        text: position of the text among those of the comparison.
        colors: colors of the methods, used in turn.
        ink: color of the rings.
    """
    records = _measured(results["combinations"])
    # Methods without a single success take a color too, so that a method keeps its color in every panel and run.
    labels = sorted({record["label"] for record in results["combinations"]})
    for position, label in enumerate(labels):
        points = sorted(_point(record, text) for record in records if record["label"] == label)
        if points:
            sizes, losses = zip(*points, strict=True)
            color = colors[position % len(colors)]
            axes.plot(sizes, losses, marker="o", markersize=4, linewidth=1, color=color, label=label)
    for winner in best(records, text).values():
        point = _point(winner, text)
        axes.plot(*point, marker="o", markersize=11, fillstyle="none", color=ink, linestyle="none")
        axes.annotate(winner["label"], point, xytext=(0, -14), textcoords="offset points", ha="center", fontsize=7)
    # The loss spans several orders of magnitude between small and large ratios.
    axes.set_yscale("symlog", linthresh=LINEAR_BELOW)
    axes.yaxis.set_major_formatter("{x:g}")
    axes.set_xlabel("stored bits per weight of the block linears")
    axes.set_ylabel("nats lost per token")
    axes.margins(0.15)
    if axes.lines:
        axes.legend(fontsize=7)


def _measured(records: list[ComparisonRecord]) -> list[ComparisonRecord]:
    return [record for record in records if record["failed"] is None]


def _point(record: ComparisonRecord, text: int) -> tuple[float, float]:
    """Return the stored bits per weight of a combination and its loss on a text."""
    return record["bits_per_weight"], _lost(record, text)


def _lost(record: ComparisonRecord, text: int) -> float:
    """Return the nats per token that a combination loses on a text."""
    return float(record["texts"][text]["nats_lost"])
