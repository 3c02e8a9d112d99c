"""Draw the picture of README from finished comparisons: nats lost against stored bits per weight.

    python benchmarks/pictures.py FOLDER... [--out docs/images/loss-against-size.png]

Each folder is the --out of a `hf-lowrank compare` of one and the same model on the same texts. Points of quantized
methods above `--quantized-below` bits are left out, for a checkpoint that was itself restored from a quantized file.
"""

import argparse
import json
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator

from hf_lowrank.runtime.privacy import public_name

OURS = ("lowrank", "slab-gram", "auto")
SYSTEMS = {"slab": "SLaB", "sola": "SoLA", "soco": "SoCo"}
BASELINES = {
    "svd-llm": "SVD-LLM",
    "sparsegpt": "SparseGPT",
    "wanda": "Wanda",
    "gptq": "GPTQ",
    "magnitude": "magnitude",
}
QUANTIZED = ("gptq", "rtn", "auto")
COLORS = {
    "lowrank": "#c0392b",
    "slab-gram": "#8e44ad",
    "auto": "#d35400",
    "slab": "#1f618d",
    "sola": "#148f77",
    "soco": "#7d6608",
}
GRAYS = ("#444444", "#707070", "#8c8c8c")

Points = dict[str, list[tuple[float, float]]]


def points(results: list[dict[str, Any]], text: int, quantized_below: float) -> Points:
    """Return the stored bits per weight and the nats lost of every method, from small to large."""
    by_method: Points = {}
    for comparison in results:
        for record in comparison["combinations"]:
            too_large = record["label"] in QUANTIZED and record["bits_per_weight"] >= quantized_below
            if record["failed"] is None and not too_large:
                point = (record["bits_per_weight"], record["texts"][text]["nats_lost"])
                by_method.setdefault(record["label"], []).append(point)
    return {label: sorted(measured) for label, measured in by_method.items()}


def draw(axes: Axes, measured: Points) -> None:
    """Draw one named line per method: the systems and our methods in color, baselines in gray."""
    grays = 0
    for label in sorted(measured, key=lambda label: label in BASELINES):
        bits, lost = zip(*measured[label], strict=True)
        name = SYSTEMS.get(label) or BASELINES.get(label) or f"{label} (ours)"
        if label in COLORS:
            style = {"color": COLORS[label], "linewidth": 2.0, "marker": "o", "markersize": 6}
        else:
            style = {"color": GRAYS[grays % len(GRAYS)], "linewidth": 1.2, "marker": "s", "markersize": 4.5}
            grays += 1
        axes.plot(bits, lost, **style)
        axes.annotate(
            name,
            (bits[-1], lost[-1]),
            xytext=(7, 0),
            textcoords="offset points",
            va="center",
            fontsize=9,
            color=style["color"],
        )
    axes.set_yscale("log")
    axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axes.yaxis.set_major_formatter("{x:g}")
    axes.yaxis.set_minor_formatter("")
    axes.grid(alpha=0.25)
    axes.spines[["top", "right"]].set_visible(False)
    axes.set_xlabel("stored bits per weight of the compressed layers (16 = dense)")


def main() -> None:
    parser = argparse.ArgumentParser(description="Draw loss against size from finished comparisons.")
    parser.add_argument("folders", nargs="+", type=Path, help="folders of `hf-lowrank compare`")
    parser.add_argument("--out", type=Path, default=Path("docs/images/loss-against-size.png"))
    parser.add_argument("--title", default="SmolLM2-135M-Instruct, calibrated on C4")
    parser.add_argument(
        "--quantized-below", type=float, default=4.0, help="bits from which quantized points are left out"
    )
    arguments = parser.parse_args()
    results = [json.loads((folder / "results.json").read_text(encoding="utf-8")) for folder in arguments.folders]
    texts = [measured["text"] for measured in results[0]["dense"]["texts"]]
    figure = Figure(figsize=(5.2 * len(texts), 3.9), layout="constrained", facecolor="white")
    panels = figure.subplots(1, len(texts), squeeze=False, sharey=True)[0]
    for number, (axes, text) in enumerate(zip(panels, texts, strict=True)):
        draw(axes, points(results, number, arguments.quantized_below))
        axes.set_title(public_name(text), fontsize=10)
        axes.margins(x=0.12, y=0.1)
    panels[0].set_ylabel("nats lost per token (lower is better)")
    figure.suptitle(arguments.title, fontsize=11)
    arguments.out.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(arguments.out, dpi=110, metadata={"Software": None})


if __name__ == "__main__":
    main()
