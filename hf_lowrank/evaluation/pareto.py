"""What is lost at a given size: the table and the plot of a comparison, with the best method at each size marked."""

from importlib.util import find_spec
from pathlib import Path
from typing import Any

from ..execution.files import short_path
from ..runtime.errors import CompressionError

Record = dict[str, Any]

COLUMNS = ["text", "method", "removed", "bits/weight", "perplexity", "nats lost", "KL", "top-1", "seconds", "peak MiB"]
LINEAR_BELOW = 0.01
"""Nats: losses below are drawn on a linear scale, because they may be zero or, on a text unlike the training text, negative."""


def check_plotting() -> None:
    """Raise CompressionError if there is nothing to plot with."""
    if find_spec("matplotlib") is None:
        raise CompressionError("plots need matplotlib: pip install 'hf_lowrank[eval]'")


def best(records: list[Record], text: int) -> dict[float, Record]:
    """The record that loses the fewest nats on a text, for each ratio asked for."""
    winners: dict[float, Record] = {}
    for record in _measured(records):
        rival = winners.get(record["ratio"])
        if rival is None or _lost(record, text) < _lost(rival, text):
            winners[record["ratio"]] = record
    return winners


def table(results: dict[str, Any]) -> list[list[str]]:
    """Rows for `COLUMNS`: text by text, the dense model first, then from large to small; the best method at each size has a star."""
    rows = []
    dense, records = results["dense"], results["combinations"]
    for number, measured in enumerate(dense["texts"]):
        name = short_path(measured["text"])
        winners = best(records, number)
        rows.append(
            [name, "dense", "", f"{dense['bits_per_weight']:.2f}", f"{measured['perplexity']:.4g}", "", "", "", "", ""]
        )
        for record in sorted(_measured(records), key=lambda record: (record["ratio"], _lost(record, number))):
            found = record["texts"][number]
            star = " ★" if winners[record["ratio"]] is record else ""
            peak = "–" if record["peak_bytes"] is None else f"{record['peak_bytes'] / 2**20:.0f}"
            rows.append(
                [
                    name,
                    record["label"] + star,
                    f"{record['ratio_stored']:.2%}",
                    f"{record['bits_per_weight']:.2f}",
                    f"{found['perplexity']:.4g}",
                    f"{found['nats_lost']:.4f}",
                    f"{found['kl']:.4f}",
                    f"{found['top1_agreement']:.1%}",
                    f"{record['seconds']:.0f}",
                    peak,
                ]
            )
    return rows


def failures(results: dict[str, Any]) -> list[str]:
    """One line for each combination that could not be made, with the reason."""
    failed = [record for record in results["combinations"] if record["failed"] is not None]
    return [f"{record['label']} at {record['ratio']:.0%}: {record['failed']}" for record in failed]


def markdown(results: dict[str, Any]) -> str:
    """The table and the failures, as Markdown."""
    lines = [COLUMNS, ["---"] * len(COLUMNS), *table(results)]
    text = "\n".join(f"| {' | '.join(line)} |" for line in lines) + "\n"
    reasons = failures(results)
    return text + ("\nNot reached:\n\n" + "\n".join(f"- {reason}" for reason in reasons) + "\n" if reasons else "")


def plot(results: dict[str, Any], file: Path) -> None:
    """Draw stored bits per weight against nats lost per token, one panel per text; a ring marks the best method at each size."""
    from matplotlib.figure import Figure

    texts = results["dense"]["texts"]
    figure = Figure(figsize=(6.4 * len(texts), 4.8), layout="constrained")
    for number, axes in enumerate(figure.subplots(1, len(texts), squeeze=False)[0]):
        draw(axes, results, number, [f"C{position}" for position in range(10)], "black")
        axes.set_title(
            f"{short_path(texts[number]['text'])}, dense perplexity {texts[number]['perplexity']:.4g}", fontsize=10
        )
        axes.grid(alpha=0.3)
    figure.savefig(file, dpi=150, metadata={"Software": None})


def draw(axes: Any, results: dict[str, Any], text: int, colors: list[str], ink: str) -> None:
    """Draw the panel of one text on the axes of matplotlib; `colors` of the methods in turn, `ink` of the rings."""
    records = results["combinations"]
    for position, label in enumerate(sorted({record["label"] for record in records})):
        points = sorted(
            (each["bits_per_weight"], _lost(each, text)) for each in _measured(records) if each["label"] == label
        )
        if points:
            color = colors[position % len(colors)]
            axes.plot(*zip(*points, strict=True), marker="o", markersize=4, linewidth=1, color=color, label=label)
    for winner in best(records, text).values():
        point = (winner["bits_per_weight"], _lost(winner, text))
        axes.plot(*point, marker="o", markersize=11, fillstyle="none", color=ink, linestyle="none")
        axes.annotate(winner["label"], point, xytext=(0, -14), textcoords="offset points", ha="center", fontsize=7)
    axes.set_yscale("symlog", linthresh=LINEAR_BELOW)
    axes.yaxis.set_major_formatter("{x:g}")
    axes.set_xlabel("stored bits per weight of the block linears")
    axes.set_ylabel("nats lost per token")
    axes.margins(0.15)
    if axes.lines:
        axes.legend(fontsize=7)


def _measured(records: list[Record]) -> list[Record]:
    return [record for record in records if record["failed"] is None]


def _lost(record: Record, text: int) -> float:
    return float(record["texts"][text]["nats_lost"])
