"""Line charts as inline SVG whose colours are CSS, so that they follow the light or dark theme of the page around them."""

import io
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from ..evaluation import pareto

SERIES = 6
"""Colours that the page has for lines that must be told apart: `--series-0` to `--series-5`."""
SMALLEST = 1e-3
"""Smallest relative singular value that is drawn."""

PHASES = {1: "exploration", 2: "oscillation", 3: "decision", 4: "re-fit"}
"""SoCo's phases (papers: SoCo §2.3), and the steps after the final cut."""


@dataclass(frozen=True)
class SpectrumLine:
    """Spectrum of one layer.

    Attributes:
        depth: 0 for the first block, 1 for the last.
        values: relative to the largest, at evenly spaced places.
        kept: fraction of the components that are kept; None if that is not what the values are of.
    """

    depth: float
    values: Sequence[float]
    kept: float | None


class Chart:
    """One chart; what is drawn on `axes` in a colour from `color` comes out in that CSS colour."""

    def __init__(self, name: str, width: float = 4.4, height: float = 2.8, rows: int = 1) -> None:
        from matplotlib.figure import Figure

        self.name, self.css = name, dict[str, str]()
        self.figure: Any = Figure(figsize=(width, height), layout="constrained", facecolor="none")
        self.panels: list[Any] = list(self.figure.subplots(rows, 1, sharex=True, squeeze=False)[:, 0])
        for axes in self.panels:
            axes.set_facecolor("none")
            axes.grid(color=self.color("var(--line)"), linewidth=0.6)
            axes.tick_params(which="both", length=0, labelsize=9, labelcolor=self.color("var(--muted)"))
            for spine in axes.spines.values():
                spine.set_visible(False)

    @property
    def axes(self) -> Any:
        return self.panels[0]

    def color(self, css: str) -> str:
        """A colour of matplotlib that stands for a CSS colour until `svg`."""
        return self.css.setdefault(css, f"#fe{len(self.css):04x}")

    def label(self, axes: Any, x: str = "", y: str = "") -> None:
        axes.set_xlabel(x, fontsize=9, color=self.color("var(--muted)"))
        axes.set_ylabel(y, fontsize=9, color=self.color("var(--muted)"))

    def svg(self) -> str:
        """The chart as an `<svg>` element; its ids begin with the name of the chart, and the same data give the same text."""
        stream = io.StringIO()
        with _svg_settings(self.name):
            self.figure.savefig(
                stream, format="svg", metadata={"Date": None, "Creator": None, "Format": None, "Type": None}
            )
        text = stream.getvalue()
        text = text[text.index("<svg") :]
        text = re.sub(r"<metadata>.*?</metadata>|<style.*?</style>|<!--.*?-->", "", text, flags=re.DOTALL)
        text = re.sub(r"font-family: [^;\"]*;? ?", "", text)  # the font of the page
        text = re.sub(r"\s*\n\s*", " ", text)
        text = re.sub(
            r'(<svg [^>]*?) width="[^"]*"',
            r"\1",
            re.sub(r'(<svg [^>]*?) height="[^"]*"', r"\1", text, count=1),
            count=1,
        )
        text = re.sub(r'\bid="([^"]+)"', rf'id="{self.name}-\1"', text)
        text = re.sub(r"url\(#([^)]+)\)", rf"url(#{self.name}-\1)", text)
        text = re.sub(r'href="#([^"]+)"', rf'href="#{self.name}-\1"', text)
        for css, placeholder in self.css.items():
            text = text.replace(placeholder, css)
        return text.strip()


def spectra(name: str, lines: list[SpectrumLine]) -> str:
    """Relative singular values over the fraction of the components, one line per block; a dot where the kept ones end."""
    chart = Chart(name, height=2.5)
    for line in lines:
        color = chart.color(depth_color(line.depth))
        places = [100 * position / max(len(line.values) - 1, 1) for position in range(len(line.values))]
        shown = [max(value, SMALLEST) for value in line.values]
        chart.axes.plot(places, shown, linewidth=1.1, color=color)
        if line.kept is not None:
            nearest = round(line.kept * (len(places) - 1))
            chart.axes.plot(100 * line.kept, shown[nearest], marker="o", markersize=3.5, color=color)
    chart.axes.set_yscale("log")
    chart.axes.yaxis.set_major_formatter("{x:g}")
    lowest = min(min(line.values) for line in lines)
    chart.axes.set_ylim(
        bottom=0.8 * max(SMALLEST, min(lowest, 0.1)), top=1.25
    )  # a decade at least, so that there are two ticks
    chart.axes.yaxis.set_minor_formatter("")
    chart.axes.set_xlim(-1, 101)
    chart.axes.xaxis.set_major_formatter("{x:.0f} %")
    return chart.svg()


def depth_color(depth: float) -> str:
    """The CSS colour of a block, by its depth from 0 to 1."""
    return f"color-mix(in oklab, var(--shallow), var(--deep) {100 * depth:.0f}%)"


def training(name: str, curve: dict[str, list[float]], asked: float) -> str:
    """SoCo's loss, and under it the removed ratio, over the steps; the phases named above."""
    chart = Chart(name, width=8.2, height=3.6, rows=2)
    loss, ratio = chart.panels
    steps = range(1, len(curve["loss"]) + 1)
    loss.plot(steps, curve["loss"], linewidth=0.9, color=chart.color("var(--accent)"))
    loss.set_yscale("log")
    loss.yaxis.set_major_formatter("{x:g}")
    chart.label(loss, y="loss, nats per token")
    ratio.plot(steps, [100 * value for value in curve["ratio"]], linewidth=1.2, color=chart.color("var(--accent)"))
    ratio.axhline(100 * asked, linewidth=0.8, linestyle="--", color=chart.color("var(--muted)"))
    ratio.yaxis.set_major_formatter("{x:.0f} %")
    chart.label(ratio, x="step", y="removed")
    for number in sorted(set(curve["phase"])):
        first = curve["phase"].index(number)
        for axes in chart.panels:
            axes.axvline(first + 1, linewidth=0.8, color=chart.color("var(--muted)"), alpha=0.6)
        where = {"xycoords": ("data", "axes fraction"), "xytext": (3, 0), "textcoords": "offset points"}
        loss.annotate(PHASES[int(number)], (first + 1, 1.03), fontsize=9, color=chart.color("var(--muted)"), **where)
    return chart.svg()


def frontier_panel(name: str, results: dict[str, Any], text: int) -> str:
    """What each method loses at which size on one text of a comparison."""
    chart = Chart(name, width=5.2, height=3.8)
    pareto.draw(
        chart.axes,
        results,
        text,
        [chart.color(f"var(--series-{i})") for i in range(SERIES)],
        chart.color("var(--ink)"),
    )
    chart.label(chart.axes, chart.axes.get_xlabel(), chart.axes.get_ylabel())
    for annotation in chart.axes.texts:
        annotation.set(color=chart.color("var(--ink)"), fontsize=9)
    legend = chart.axes.get_legend()
    if legend is not None:
        legend.set_frame_on(False)
        for entry in legend.get_texts():
            entry.set(color=chart.color("var(--ink)"), fontsize=9)
    return chart.svg()


@contextmanager
def _svg_settings(salt: str) -> Iterator[None]:
    """Text as text, in the font of the page, and ids that do not change from run to run."""
    import matplotlib

    with matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": salt, "font.family": "sans-serif"}):
        yield
