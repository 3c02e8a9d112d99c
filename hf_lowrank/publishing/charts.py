"""Charts as inline SVG whose colors are those of the page around them, in its light and in its dark theme."""

import io
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from ..evaluation import pareto

SERIES = 6
"""Number of colors that the page has for lines that must be told apart: `--series-0` to `--series-5`."""
SMALLEST = 1e-3
"""Smallest relative singular value that is drawn. Smaller ones are drawn at this value."""
FONT_SIZE = 9
"""Size of all text in a chart, in points."""

PHASES = {1: "exploration", 2: "oscillation", 3: "decision", 4: "re-fit"}
"""Names of the three phases of SoCo's training (arXiv 2502.15092) and of the steps after the final cut."""


@dataclass(frozen=True)
class SpectrumLine:
    """Spectrum of one layer.

    Attributes:
        depth: 0 for the first block, 1 for the last.
        values: singular values relative to the largest, at evenly spaced places.
        kept: fraction of the components that are kept, or None if the values are those of the stored layer.
    """

    depth: float
    values: Sequence[float]
    kept: float | None


class Chart:
    """A chart with one or more panels above each other.

    matplotlib knows no CSS, so `color` gives it a placeholder for each CSS color, and `svg` puts the CSS in its place.
    """

    def __init__(self, name: str, width: float = 4.4, height: float = 2.8, rows: int = 1) -> None:
        from matplotlib.figure import Figure  # imported late, because it is an optional dependency

        self.name = name
        self.placeholders: dict[str, str] = {}
        self.figure: Any = Figure(figsize=(width, height), layout="constrained", facecolor="none")
        self.panels: list[Any] = list(self.figure.subplots(rows, 1, sharex=True, squeeze=False)[:, 0])
        for axes in self.panels:
            axes.set_facecolor("none")
            axes.grid(color=self.color("var(--line)"), linewidth=0.6)
            axes.tick_params(which="both", length=0, labelsize=FONT_SIZE, labelcolor=self.color("var(--muted)"))
            for spine in axes.spines.values():
                spine.set_visible(False)

    @property
    def axes(self) -> Any:
        """The axes of the first panel."""
        return self.panels[0]

    def color(self, css: str) -> str:
        """Return a color for matplotlib that stands for a CSS color until `svg`."""
        return self.placeholders.setdefault(css, f"#fe{len(self.placeholders):04x}")

    def label(self, axes: Any, x: str = "", y: str = "") -> None:
        """Label the axes of a panel."""
        axes.set_xlabel(x, fontsize=FONT_SIZE, color=self.color("var(--muted)"))
        axes.set_ylabel(y, fontsize=FONT_SIZE, color=self.color("var(--muted)"))

    def svg(self) -> str:
        """Return the chart as an `<svg>` element. The same data give the same text."""
        stream = io.StringIO()
        metadata = {"Date": None, "Creator": None, "Format": None, "Type": None}
        with _svg_settings(self.name):
            self.figure.savefig(stream, format="svg", metadata=metadata)
        text = stream.getvalue()
        text = text[text.index("<svg") :]
        text = re.sub(r"<metadata>.*?</metadata>|<style.*?</style>|<!--.*?-->", "", text, flags=re.DOTALL)
        text = re.sub(r"font-family: [^;\"]*;? ?", "", text)  # so that the font of the page applies
        text = re.sub(r"\s*\n\s*", " ", text)
        # Without a size of its own, the element takes the width of the column that it stands in.
        text = re.sub(r'(<svg [^>]*?) height="[^"]*"', r"\1", text, count=1)
        text = re.sub(r'(<svg [^>]*?) width="[^"]*"', r"\1", text, count=1)
        # Every chart of matplotlib has the same ids, and a page may have each id only once.
        text = re.sub(r'\bid="([^"]+)"', rf'id="{self.name}-\1"', text)
        text = re.sub(r"url\(#([^)]+)\)", rf"url(#{self.name}-\1)", text)
        text = re.sub(r'href="#([^"]+)"', rf'href="#{self.name}-\1"', text)
        for css, placeholder in self.placeholders.items():
            text = text.replace(placeholder, css)
        return text.strip()


def spectra_chart(name: str, lines: list[SpectrumLine]) -> str:
    """Draw relative singular values, one line per block, with a dot where the kept components end."""
    chart = Chart(name, height=2.7)
    for line in lines:
        color = chart.color(depth_color(line.depth))
        intervals = max(len(line.values) - 1, 1)
        places = [100 * position / intervals for position in range(len(line.values))]
        shown = [max(value, SMALLEST) for value in line.values]
        chart.axes.plot(places, shown, linewidth=1.1, color=color)
        if line.kept is not None:
            nearest = round(line.kept * (len(places) - 1))
            chart.axes.plot(100 * line.kept, shown[nearest], marker="o", markersize=3.5, color=color)
    lowest = min(min(line.values) for line in lines)
    chart.axes.set_yscale("log")
    # The axis spans at least a decade, so that it has two ticks.
    chart.axes.set_ylim(bottom=0.8 * max(SMALLEST, min(lowest, 0.1)), top=1.25)
    chart.axes.yaxis.set_major_formatter("{x:g}")
    chart.axes.yaxis.set_minor_formatter("")  # numbers between the decades would overlap
    chart.axes.set_xlim(-1, 101)  # a little more than the data, so that dots at the ends are whole
    chart.axes.xaxis.set_major_formatter("{x:.0f} %")
    chart.label(chart.axes, x="components, from the largest on", y="singular value / largest")
    return chart.svg()


def depth_color(depth: float) -> str:
    """Return the CSS color of a block by its depth from 0 to 1."""
    return f"color-mix(in oklab, var(--shallow), var(--deep) {100 * depth:.0f}%)"


def training_chart(name: str, curve: dict[str, list[float]], asked: float) -> str:
    """Draw the loss of SoCo's training, and under it the removed ratio, over the steps, with the phases named.

    Args:
        curve: "loss", "ratio" and "phase" of each step.
        asked: the ratio that was asked for.
    """
    chart = Chart(name, width=8.2, height=3.6, rows=2)
    loss, ratio = chart.panels
    steps = range(1, len(curve["loss"]) + 1)
    loss.plot(steps, curve["loss"], linewidth=0.9, color=chart.color("var(--accent)"))
    loss.set_yscale("log")
    loss.yaxis.set_major_formatter("{x:g}")
    chart.label(loss, y="loss, nats per token")
    percentages = [100 * value for value in curve["ratio"]]
    ratio.plot(steps, percentages, linewidth=1.2, color=chart.color("var(--accent)"))
    ratio.axhline(100 * asked, linewidth=0.8, linestyle="--", color=chart.color("var(--muted)"))
    ratio.yaxis.set_major_formatter("{x:.0f} %")
    chart.label(ratio, x="training step", y="removed bits")
    for phase in sorted(set(curve["phase"])):
        first_step = curve["phase"].index(phase) + 1
        for axes in chart.panels:
            axes.axvline(first_step, linewidth=0.8, color=chart.color("var(--muted)"), alpha=0.6)
        loss.annotate(
            PHASES[int(phase)],
            (first_step, 1.03),  # just above the panel
            xycoords=("data", "axes fraction"),
            xytext=(3, 0),
            textcoords="offset points",
            fontsize=FONT_SIZE,
            color=chart.color("var(--muted)"),
        )
    return chart.svg()


def pareto_chart(name: str, results: dict[str, Any], text: int) -> str:
    """Draw the Pareto front of a comparison on one text: loss against stored bits, in the colors of the page.

    Args:
        text: position of the text among those of the comparison.
    """
    chart = Chart(name, width=5.2, height=3.8)
    ink = chart.color("var(--ink)")
    colors = [chart.color(f"var(--series-{number})") for number in range(SERIES)]
    pareto.draw(chart.axes, results, text, colors, ink)
    # `pareto.draw` sets texts for a plain image. Here they take the size and the colors of the page.
    chart.label(chart.axes, chart.axes.get_xlabel(), chart.axes.get_ylabel())
    for annotation in chart.axes.texts:
        annotation.set(color=ink, fontsize=FONT_SIZE)
    legend = chart.axes.get_legend()
    if legend is not None:
        legend.set_frame_on(False)
        for entry in legend.get_texts():
            entry.set(color=ink, fontsize=FONT_SIZE)
    return chart.svg()


@contextmanager
def _svg_settings(salt: str) -> Iterator[None]:
    """Make matplotlib write text as text, and ids that do not change from run to run, while the context is active."""
    import matplotlib

    with matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": salt, "font.family": "sans-serif"}):
        yield
