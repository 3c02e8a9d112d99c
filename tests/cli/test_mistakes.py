"""Every mistake is one line, exit code 1, and nothing left behind."""

import json
from pathlib import Path

import pytest
from datasets import Dataset
from transformers import BertConfig, BertForMaskedLM

from ..support import tiny_models
from .calls import QUICK, fails, run

MISTAKES = {
    "unknown method": ("unknown method 'slabs'; did you mean 'slab'", ["--method", "slabs"]),
    "ratio too large": ("ratio: found 1.0, expected a number between 0 and 1", ["--ratio", "1"]),
    "ratio of zero": ("ratio: found 0.0", ["--ratio", "0"]),
    "ratio in percent": ("ratio: found 30.0", ["--ratio", "30"]),
    "negative ratio": ("ratio: found -0.5", ["--ratio", "-0.5"]),
    "ratio out of reach": ("ratio 0.99 is out of reach of svd", ["--method", "svd", "--ratio", "0.99"]),
    "unknown option": (
        "slab has no option 'iteration'; did you mean 'iterations'?",
        ["--method", "slab", "--set", "iteration=3"],
    ),
    "value of another type": (
        "option iterations is 'many', expected a value of type int",
        ["--method", "slab", "--set", "iterations=many"],
    ),
    "no value": ("--set: found 'iterations', expected key=value", ["--set", "iterations"]),
    "unknown dtype": ("dtype: found 'int8', expected one of auto, float32, bfloat16, float16", ["--dtype", "int8"]),
    "unknown device": ("device: 'abacus' cannot be used on this machine", ["--device", "abacus"]),
    "no samples": ("samples: found 0", ["--samples", "0"]),
    "beyond the context": ("sequence_length: found 65", ["--sequence-length", "65"]),
    "missing text": ("no/such/text.txt: no such text file", ["--calibration", "no/such/text.txt"]),
    "unknown layer": ("modules_to_not_convert: 'w1' matches no linear layer", ["--skip", "w1"]),
    "unknown accounting": ("accounting: found 'bytes'", ["--accounting", "bytes"]),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_mistake_in_the_recipe_is_one_line(dense: Path, tmp_path: Path, mistake: str) -> None:
    message, arguments = MISTAKES[mistake]
    fails(
        message,
        "compress",
        dense,
        "-o",
        tmp_path / "output",
        *(QUICK if "--sequence-length" not in arguments else []),
        *arguments,
    )
    assert list(tmp_path.iterdir()) == []


def test_a_text_shorter_than_one_sequence_is_one_line(dense: Path, tmp_path: Path) -> None:
    short = tmp_path / "short.txt"
    short.write_text("hello", encoding="utf-8")
    arguments = ["--calibration", short, "--sequence-length", 32]
    fails(
        "the text has 6 tokens, fewer than one window of 32", "compress", dense, "-o", tmp_path / "output", *arguments
    )
    assert list(tmp_path.iterdir()) == [short]


def test_rows_of_any_format_are_measured_as_their_texts(dense: Path, tmp_path: Path) -> None:
    rows = Dataset.from_dict({"text": tiny_models.text(8), "url": [f"https://example.org/{i}" for i in range(8)]})
    rows.to_json(tmp_path / "rows.jsonl")
    rows.to_csv(tmp_path / "rows.csv")
    rows.to_parquet(tmp_path / "rows.parquet")
    (tmp_path / "ROWS.JSON").write_text(json.dumps(rows.to_list()))
    options = ["--window", 32, "--max-windows", 4, "--json"]
    for name in ("rows.jsonl", "rows.csv", "rows.parquet", "ROWS.JSON"):
        options += ["--text", tmp_path / name]
    figures = json.loads(run("evaluate", dense, *options).stdout)
    assert len({figure["nll"] for figure in figures}) == 1 and len(figures) == 4


def test_rows_that_are_no_text_are_one_line_in_every_command(
    dense: Path, compressed: Path, text: Path, tmp_path: Path
) -> None:
    bad, other, output = tmp_path / "bad.jsonl", tmp_path / "other.csv", tmp_path / "output"
    bad.write_text('{"text": "good"}\n{"text": ["a", "b"]}\n', encoding="utf-8")
    other.write_text("content,id\nwords,1\n", encoding="utf-8")
    messages = {
        bad: f"{bad}: row 2: the column text holds list (['a', 'b']), expected a text",
        other: "content, id",
        tmp_path: f"{tmp_path}: is a folder; name one file",
    }
    for file, message in messages.items():
        fails(message, "compress", dense, "-o", output, "--calibration", file, *QUICK)
        fails(message, "evaluate", dense, "--text", file)
        fails(message, "distill", compressed, "--teacher", dense, "--text", file, "-o", output)
        comparison = ["compare", dense, "--methods", "wanda", "--ratios", 0.3, "--out", output]
        fails(message, *comparison, "--text", file)
        fails(message, *comparison, "--text", text, "--calibration", file)
    assert sorted(tmp_path.iterdir()) == [bad, other]


def test_a_source_that_is_no_model_is_one_line(dense: Path, compressed: Path, text: Path, tmp_path: Path) -> None:
    broken = tmp_path / "broken"
    broken.mkdir()
    missing = tmp_path / "missing"
    sources = {missing: "no such folder", broken: "not a model: it has no config.json", text: "not a model"}
    for source, message in sources.items():
        fails(message, "compress", source, "-o", tmp_path / "output", "--calibration", text)
        fails(message, "evaluate", source, "--text", text)
        fails(message, "dense", source, "-o", tmp_path / "output")
    (broken / "config.json").write_text("{}")
    fails("cannot be opened as a model", "compress", broken, "-o", tmp_path / "output")
    (broken / "config.json").write_text("{not json")
    fails("cannot be opened as a model", "compress", broken, "-o", tmp_path / "output")
    (broken / "config.json").write_text((dense / "config.json").read_text())
    fails("cannot be loaded", "compress", broken, "-o", tmp_path / "output")
    (broken / "model.safetensors").write_bytes((dense / "model.safetensors").read_bytes()[:5000])
    fails("cannot be loaded", "compress", broken, "-o", tmp_path / "output")
    fails("nobody/nothing", "compress", "nobody/nothing", "-o", tmp_path / "output")
    fails("compressed already", "compress", compressed, "-o", tmp_path / "output", *QUICK)
    fails("is not compressed by hf_lowrank", "dense", dense, "-o", tmp_path / "output")
    fails("is not compressed by hf_lowrank", "inspect", dense)
    fails("is not compressed by hf_lowrank", "verify", dense)
    fails("no such folder", "inspect", missing)
    assert [path.name for path in tmp_path.iterdir()] == ["broken"]


def test_what_cannot_be_measured_is_one_line(compressed: Path, text: Path, tmp_path: Path) -> None:
    fails("--repeats: found 0, expected at least 1", "benchmark", compressed, "--repeats", 0)
    fails("a context of 64 tokens", "benchmark", compressed, "--prompt", 60, "--new", 5)
    fails("rank: found -1, expected at least 1", "recompress", compressed, "--rank", -1, "-o", tmp_path / "output")
    config = BertConfig(
        vocab_size=97, hidden_size=32, num_hidden_layers=1, num_attention_heads=2, intermediate_size=48
    )
    encoder = tiny_models.saved(BertForMaskedLM(config), tmp_path / "encoder")
    fails("BertForMaskedLM does not predict; use a causal model", "evaluate", encoder, "--text", text)
