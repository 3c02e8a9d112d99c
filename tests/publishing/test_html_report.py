"""The page needs no other file and no network, shows what the files say, and is the same every time."""

import json
import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from hf_lowrank import CompressionConfig, CompressionError, cli, compress
from hf_lowrank.checkpoints.inspect import inspect
from hf_lowrank.evaluation import pareto
from hf_lowrank.publishing.html_report import write_html_report
from hf_lowrank.publishing.model_card import record

from ..support import tiny_models

pytestmark = pytest.mark.usefixtures("kept_logging")

VOID = {"meta", "col", "br", "use", "path", "rect", "stop"}


class Page(HTMLParser):
    """Ids, attributes and texts of a page, whose tags must be closed in the order in which they were opened."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.ids: list[str] = []
        self.attributes: list[tuple[str, str, str]] = []
        self.classes: list[str] = []
        self.texts: list[str] = []
        self.feed(text)
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        if tag not in VOID:
            self.open.append(tag)
        self._note(tag, attrs)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self._note(tag, attrs)

    def _note(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        for name, value in attrs:
            self.attributes.append((tag, name, value or ""))
            if name == "id":
                self.ids.append(value or "")
            if name == "class":
                self.classes += (value or "").split()

    def handle_endtag(self, tag: str) -> None:
        if tag not in VOID:
            assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.texts.append(data)


def compressed(folder: Path, model: Any, method: str, ratio: float = 0.4, **options: Any) -> Path:
    config = CompressionConfig(method=method, ratio=ratio, samples=4, sequence_length=16, options=options)
    compress(model, config, tiny_models.tokenizer(), tiny_models.text(8), progress=False).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def slab(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = compressed(tmp_path_factory.mktemp("pages") / "slab", tiny_models.llama(), "slab", iterations=2)
    quality = [
        {
            "metric": "perplexity",
            "dataset": "books/<b>.txt",
            "settings": "3 windows",
            "dense": 10.0,
            "compressed": 11.5,
        }
    ]
    record(folder, quality=quality, command="hf-lowrank compress MODEL")
    return folder


@pytest.fixture(scope="module")
def soco(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return compressed(
        tmp_path_factory.mktemp("pages") / "soco",
        tiny_models.llama(),
        "soco",
        0.3,
        steps=8,
        finish_steps=2,
        batch_tokens=32,
    )


@pytest.fixture(scope="module")
def sola(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return compressed(tmp_path_factory.mktemp("pages") / "sola", tiny_models.llama(), "sola", 0.2)


@pytest.fixture(scope="module")
def slab_page(slab: Path) -> tuple[str, Page]:
    return page(slab, slab.parent / "slab.html")


def combination(label: str, nats_lost: tuple[float, float]) -> dict[str, Any]:
    """Return the record of a method at 50 %, with its losses on two texts."""
    figures = {"perplexity": 25.0, "kl": 0.1, "top1_agreement": 0.9}
    return {
        "label": label,
        "ratio": 0.5,
        "ratio_stored": 0.5,
        "failed": None,
        "bits_per_weight": 8.0,
        "peak_bytes": None,
        "seconds": 1.0,
        "texts": [{**figures, "nats_lost": nats} for nats in nats_lost],
    }


def comparison(folder: Path) -> Path:
    """Write the results of a comparison of three methods on two texts and return their folder. One method failed."""
    texts = [{"text": "a/one.txt", "perplexity": 20.0}, {"text": "a/two.txt", "perplexity": 30.0}]
    combinations: list[dict[str, Any]] = [
        combination("slab", nats_lost=(0.1, 0.2)),
        combination("svd", nats_lost=(0.4, 0.3)),
        {"label": "wanda", "ratio": 0.99, "failed": "out of reach"},
    ]
    results = {"dense": {"bits_per_weight": 16.0, "texts": texts}, "combinations": combinations}
    (folder / "results.json").write_text(json.dumps(results))
    return folder


def page(folder: Path, out: Path, **options: Any) -> tuple[str, Page]:
    """Write the page of a checkpoint and return its text and its parsed content."""
    write_html_report(folder, out, **options)
    text = out.read_text(encoding="utf-8")
    return text, Page(text)


def heat_maps(text: str) -> dict[str, list[list[str]]]:
    """Return the content of the cells row by row, for each map by its title."""
    maps = {}
    pattern = r"<h3>([^<]+)</h3>\s*<figcaption>.*?<tbody>(.*?)</tbody>"
    for title, body in re.findall(pattern, text, flags=re.DOTALL):
        rows = body.split("</tr>")[:-1]
        maps[title] = [re.findall(r"<td[^>]*>([^<]*)</td>", row) for row in rows]
    return maps


def test_the_page_needs_nothing_but_itself(slab_page: tuple[str, Page]) -> None:
    text, parsed = slab_page
    for tag, name, value in parsed.attributes:
        assert tag not in ("script", "link", "img", "iframe", "object")
        if name.endswith(("href", "src")):
            assert value.startswith("#")
    assert all(target.startswith("#") for target in re.findall(r"url\(([^)]+)\)", text))
    assert "@import" not in text
    assert len(parsed.ids) == len(set(parsed.ids)) > 0
    assert "prefers-color-scheme: dark" in text and 'name="viewport"' in text


def test_colors_are_those_of_the_page(slab_page: tuple[str, Page]) -> None:
    """A color that a chart sets by itself would be wrong in one of the two themes."""
    text, _ = slab_page
    for chart in re.findall(r"<svg.*?</svg>", text, flags=re.DOTALL):
        used = set(re.findall(r"(?:fill|stroke): ([^;\"]+)", chart))
        colors_of_the_page = set(re.findall(r"(?:var|color-mix)\((?:[^()]|\([^()]*\))*\)", chart))
        assert used <= {"none"} | colors_of_the_page


def test_the_same_files_give_the_same_page(soco: Path, tmp_path: Path) -> None:
    first, _ = page(soco, tmp_path / "first.html")
    second, _ = page(soco, tmp_path / "second.html")
    assert first == second


def test_it_says_what_the_files_say(slab: Path, slab_page: tuple[str, Page]) -> None:
    inspection = inspect(slab)
    text, parsed = slab_page
    shown = " ".join(parsed.texts)
    assert all(layer.name in shown for layer in inspection.layers)
    assert f"{inspection.ratio_stored:.2%}" in shown
    assert f"{inspection.disk_bytes:,} bytes" in shown
    maps = heat_maps(text)
    assert maps.keys() == {"Density", "Bits per weight", "Relative error"}  # no low-rank part, no map of ranks
    blocks = []
    for block in range(4):
        blocks.append([layer for layer in inspection.layers if f".layers.{block}." in layer.name])
    rows = list(zip(*blocks, strict=True))
    assert maps["Density"] == [[f"{100 * layer.density:.0f}" for layer in row] for row in rows]
    assert maps["Bits per weight"] == [[f"{layer.bits_per_weight:.1f}" for layer in row] for row in rows]
    assert "books/<b>.txt, 3 windows" in shown and "<b>" not in text
    assert "+1.5" in shown and "hf-lowrank compress MODEL" in shown


def test_spectra_training_and_ranks_of_a_learned_spectrum(soco: Path, tmp_path: Path) -> None:
    report = json.loads((soco / "compression_report.json").read_text())
    for layer in report["layers"]:
        values = layer["spectrum"]
        assert values[0] == 1.0 and values == sorted(values, reverse=True)
        assert len(values) == min(48, layer["in_features"], layer["out_features"])
    text, parsed = page(soco, tmp_path / "page.html")
    assert "Rank" in heat_maps(text)
    shown = " ".join(parsed.texts)
    assert "in the calibration metric" in shown
    assert "exploration" in shown and "re-fit" in shown
    for label in ("singular value / largest", "components, from the largest on", "training step", "removed bits"):
        assert label in shown


def test_the_pareto_front_of_a_comparison(slab: Path, slab_page: tuple[str, Page], tmp_path: Path) -> None:
    _, parsed = page(slab, tmp_path / "page.html", comparison=comparison(tmp_path))
    shown = " ".join(parsed.texts)
    assert "a/one.txt, dense perplexity 20" in shown and "a/two.txt, dense perplexity 30" in shown
    assert "wanda at 99%: out of reach" in shown
    assert "Comparison with other methods" not in slab_page[0]


@pytest.mark.parametrize("model", ["gpt2", "opt"])
def test_other_architectures_and_a_checkpoint_without_report(tmp_path: Path, model: str) -> None:
    folder = compressed(tmp_path / model, getattr(tiny_models, model)(), "svd-llm")
    (folder / "compression_report.json").unlink()
    text, parsed = page(folder, tmp_path / "page.html")
    assert heat_maps(text).keys() == {"Rank", "Bits per weight"}
    assert "that the stored layers multiply by" in " ".join(parsed.texts)
    assert text.count("<svg") == len(heat_maps(text)["Rank"])


def test_mistakes_are_one_line(slab: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    dense = tiny_models.saved(tiny_models.llama(), tmp_path / "dense")
    broken = tmp_path / "broken"
    broken.mkdir()
    (broken / "results.json").write_text('{"dense": {}}')
    out = tmp_path / "page.html"
    for arguments, message in (
        ([dense, "--out", out], "is not compressed by hf_lowrank"),
        ([tmp_path / "missing", "--out", out], "no such folder"),
        ([slab, "--out", tmp_path], "is a folder; name the file to write"),
        (
            [slab, "--out", out, "--comparison", tmp_path / "missing"],
            "no such file; give the --out folder of a finished hf-lowrank compare",
        ),
        ([slab, "--out", out, "--comparison", broken], "is not what hf-lowrank compare writes"),
    ):
        result = CliRunner().invoke(cli.app, ["report", *map(str, arguments)])
        assert result.exit_code == 1
        (line,) = result.stderr.splitlines()
        assert line.startswith("error: ") and message in line
    assert not out.exists()
    monkeypatch.setattr(pareto, "find_spec", lambda name: None)
    with pytest.raises(CompressionError, match="plots need matplotlib: pip install 'hf_lowrank\\[eval\\]'"):
        write_html_report(slab, out)


def test_cells_of_parts_that_do_not_exist_are_hatched(sola: Path, tmp_path: Path) -> None:
    """SoLA leaves layers dense, and gives a sparse part to some layers only. The legends say so."""
    _, parsed = page(sola, tmp_path / "page.html")
    layers = inspect(sola).layers
    without_rank = sum(layer.rank == 0 for layer in layers)
    without_sparse_part = sum(layer.kind == "dense" or layer.sparse == "none" for layer in layers)
    without_error = sum(layer.relative_error is None for layer in layers)
    assert 0 < without_rank < without_sparse_part < len(layers)
    assert parsed.classes.count("none") == without_rank + without_sparse_part + without_error
    shown = " ".join(parsed.texts)
    assert "left dense or no sparse part" in shown
