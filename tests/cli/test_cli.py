"""Every command does its job, and every mistake is one line, exit code 1, and nothing left behind."""

import errno
import json
import os
import resource
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from datasets import Dataset
from transformers import AutoModelForCausalLM, BertConfig, BertForMaskedLM
from typer.testing import CliRunner, Result

import hf_lowrank.cli.demo
from hf_lowrank import CompressedLinear, CompressionConfig, cli
from hf_lowrank.calibration import blocks
from hf_lowrank.cli.base import Terminated
from hf_lowrank.methods import registered_methods

from ..support import tiny_models

QUICK = ["--samples", "4", "--sequence-length", "16"]


@pytest.fixture(autouse=True)
def _logging() -> Iterator[None]:
    """The command line quiets transformers, which other tests must not notice."""
    verbosity, bars = transformers.utils.logging.get_verbosity(), transformers.utils.logging.is_progress_bar_enabled()
    yield
    transformers.utils.logging.set_verbosity(verbosity)
    if bars:
        transformers.utils.logging.enable_progress_bar()


@pytest.fixture(scope="module")
def dense(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_models.saved(tiny_models.llama(), tmp_path_factory.mktemp("models") / "dense")


@pytest.fixture(scope="module")
def compressed(dense: Path) -> Path:
    output = dense.parent / "compressed"
    assert (
        run(
            "compress", dense, "--method", "slab", "--ratio", 0.4, "--set", "iterations=2", *QUICK, "-o", output
        ).exit_code
        == 0
    )
    return output


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    file = tmp_path_factory.mktemp("texts") / "text.txt"
    file.write_text("\n<|endoftext|>\n".join(tiny_models.text(20)), encoding="utf-8")
    return file


def run(*arguments: Any) -> Result:
    return CliRunner().invoke(cli.app, [str(argument) for argument in arguments])


def fails(message: str, *arguments: Any) -> None:
    """The command ends with exit code 1 and one line that holds the message."""
    result = run(*arguments)
    assert isinstance(result.exception, SystemExit), repr(result.exception)
    assert result.exit_code == 1
    lines = [line for line in result.stderr.splitlines() if not line.startswith("warning:")]
    assert len(lines) == 1, result.stderr
    assert lines[0].startswith("error: ")
    assert message in lines[0]
    assert result.stdout == ""


def test_methods_lists_every_method_with_its_options() -> None:
    shown = run("methods").stdout
    assert all(name in shown for name in registered_methods())
    assert "iterations=20" in shown
    rows = json.loads(run("methods", "--json").stdout)
    assert [row["method"] for row in rows] == registered_methods()
    assert all(row["summary"] and row["source"] for row in rows)
    assert all(help_text for row in rows for _, help_text in row["options"].values())


@pytest.mark.parametrize("command", ["methods", "compress", "evaluate", "inspect", "dense", "demo"])
def test_every_command_explains_itself(command: str) -> None:
    assert command in run("--help").stdout
    result = run(command, "--help")
    assert result.exit_code == 0
    assert "Usage" in result.stdout


def test_compress_writes_a_checkpoint_of_the_recipe(dense: Path, text: Path, tmp_path: Path) -> None:
    output = tmp_path / "deep" / "er"
    result = run(
        "compress", dense, "--method", "svd-llm", "--ratio", 0.35, "--calibration", text, "--seed", 3,
        "--dtype", "bfloat16", "--skip", "down_proj", *QUICK, "-o", output,
    )  # fmt: skip
    assert result.exit_code == 0, result.output
    assert f"wrote {output}" in result.stdout
    config = json.loads((output / "config.json").read_text())["quantization_config"]
    wanted = {
        "method": "svd-llm",
        "ratio": 0.35,
        "seed": 3,
        "samples": 4,
        "sequence_length": 16,
        "calibration": text.name,
    }
    assert {key: config[key] for key in wanted} == wanted
    assert len(config["layers"]) == 24
    model = AutoModelForCausalLM.from_pretrained(output)
    assert model.dtype == torch.bfloat16
    assert {path.name for path in tmp_path.iterdir()} == {"deep"}
    assert [path.name for path in output.parent.iterdir()] == ["er"]


def test_inspect_counts_what_is_stored(compressed: Path) -> None:
    found = json.loads(run("inspect", compressed, "--json").stdout)
    assert (found["method"], found["ratio_asked"]) == ("slab", 0.4)
    assert 0.4 <= found["ratio_stored"] <= 0.405
    assert sum(layer["bytes"] for layer in found["layers"]) == found["block_bytes"]
    assert found["disk_bytes"] == (compressed / "model.safetensors").stat().st_size >= found["model_bytes"]
    shown = run("inspect", compressed).stdout
    assert all(layer["name"] in shown for layer in found["layers"])
    assert "asked 40.0% removed" in shown


def test_inspect_sums_up_by_kind_of_layer_before_it_lists_all(compressed: Path) -> None:
    found = json.loads(run("inspect", compressed, "--json").stdout)
    kinds = {kind["layers"]: kind for kind in found["layer_kinds"]}
    assert [*kinds] == ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
    for name, kind in kinds.items():
        layers = [layer for layer in found["layers"] if layer["name"].endswith(name)]
        assert (kind["number"], kind["dense"]) == (len(layers), 0)
        assert kind["bytes"] == sum(layer["bytes"] for layer in layers)
        assert kind["bits_per_weight"] == pytest.approx(layers[0]["bits_per_weight"], rel=0.01)
    shown = run("inspect", compressed).stdout
    assert shown.index("by kind of layer") < shown.index("down_proj") < shown.index("every layer")
    assert shown.index("every layer") < shown.index("model.layers.0.self_attn.q_proj")


def test_evaluate_measures_against_a_reference(dense: Path, compressed: Path, text: Path) -> None:
    options = ["--text", text, "--window", 32, "--max-windows", 6]
    (alone,) = json.loads(run("evaluate", dense, *options, "--json").stdout)
    assert alone["kl"] is None
    assert alone["windows"] == 6
    (found,) = json.loads(run("evaluate", compressed, *options, "--reference", dense, "--json").stdout)
    assert found["reference_nll"] == alone["nll"]
    assert found["kl"] > 0
    shown = run("evaluate", compressed, *options, "--text", text, "--reference", dense).stdout
    assert shown.count(f"{found['perplexity']:.4g}") >= 2
    assert "top-1 agreement" in shown
    assert shown.index("by kind of layer") < shown.index("q_proj") < shown.index("perplexity")
    assert "by kind of layer" not in run("evaluate", dense, *options).stdout


def test_dense_writes_what_any_engine_opens(compressed: Path, tmp_path: Path) -> None:
    assert run("dense", compressed, "-o", tmp_path / "dense").exit_code == 0
    assert "quantization_config" not in json.loads((tmp_path / "dense" / "config.json").read_text())
    assert not list((tmp_path / "dense").glob("*.py"))
    ids = tiny_models.token_ids(2, 16)
    with torch.no_grad():
        opened = [AutoModelForCausalLM.from_pretrained(folder) for folder in (tmp_path / "dense", compressed)]
        assert not any(isinstance(module, CompressedLinear) for module in opened[0].modules())
        logits = [model(ids).logits for model in opened]
    torch.testing.assert_close(*logits, rtol=1e-4, atol=1e-4)
    assert (tmp_path / "dense" / "tokenizer.json").exists()


MISTAKES = {
    "unknown method": ("unknown method 'slabs'; did you mean 'slab'", ["--method", "slabs"]),
    "ratio too large": ("ratio: found 1.0, expected a number between 0 and 1", ["--ratio", "1"]),
    "ratio of zero": ("ratio: found 0.0", ["--ratio", "0"]),
    "ratio in percent": ("ratio: found 30.0", ["--ratio", "30"]),
    "negative ratio": ("ratio: found -0.5", ["--ratio", "-0.5"]),
    "ratio out of reach": ("ratio 0.99 is out of reach of svd", ["--method", "svd", "--ratio", "0.99"]),
    "unknown option": ("slab has no option 'iteration'; did you mean 'iterations'?", ["--set", "iteration=3"]),
    "value of another type": (
        "option iterations is 'many', expected a value of type int",
        ["--set", "iterations=many"],
    ),
    "no value": ("--set: found 'iterations', expected key=value", ["--set", "iterations"]),
    "unknown dtype": ("dtype: found 'int8', expected one of auto, float32, bfloat16, float16", ["--dtype", "int8"]),
    "unknown device": ("cannot be loaded", ["--device", "abacus"]),
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


def test_an_output_that_is_not_empty_stays_unless_overwritten(dense: Path, compressed: Path, tmp_path: Path) -> None:
    output = tmp_path / "output"
    output.mkdir()
    (output / "thesis.tex").write_text("years of work")
    svd = ["--method", "svd", *QUICK]
    fails("not empty; choose another folder or add --overwrite", "compress", dense, *svd, "-o", output)
    fails("not empty", "dense", compressed, "-o", output)
    fails("not empty", "demo", "-o", output)
    fails("not empty", "compress", dense, *svd, "-o", output / "thesis.tex")
    assert [path.name for path in output.iterdir()] == ["thesis.tex"]
    assert run("compress", dense, *svd, "-o", output, "--overwrite").exit_code == 0
    assert not (output / "thesis.tex").exists()
    assert (output / "model.safetensors").exists()
    assert [path.name for path in tmp_path.iterdir()] == ["output"]


def test_an_empty_output_folder_may_be_used(dense: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "empty").mkdir()
    assert run("compress", dense, "--method", "svd", *QUICK, "-o", "empty").exit_code == 0
    assert (tmp_path / "empty" / "model.safetensors").exists()
    assert [path.name for path in tmp_path.iterdir()] == ["empty"]


def test_the_current_folder_is_not_replaced(dense: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for options in ([], ["--overwrite"]):
        fails(
            "is the current folder, which cannot be replaced",
            "compress",
            dense,
            "--method",
            "svd",
            *QUICK,
            "-o",
            ".",
            *options,
        )
    assert list(tmp_path.iterdir()) == []


def test_a_full_disk_leaves_nothing_behind(dense: Path, tmp_path: Path) -> None:
    """Files may not grow beyond 60 kB, which the companions keep and the weights do not."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (60_000, hard))
    try:
        fails(
            "nothing was left behind", "compress", dense, "--method", "svd", *QUICK, "-o", tmp_path / "new" / "output"
        )
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert list(tmp_path.iterdir()) == []


def test_a_disk_that_fills_up_keeps_what_would_have_been_overwritten(
    dense: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    output = tmp_path / "output"
    assert run("compress", dense, "--method", "svd", *QUICK, "-o", output).exit_code == 0
    before = {path.name: path.read_bytes() for path in output.iterdir() if path.is_file()}

    def full(*arguments: object, **options: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr("hf_lowrank.runtime.saving.write_report", full)
    fails(
        "No space left on device",
        "compress",
        dense,
        "--method",
        "svd",
        "--ratio",
        0.6,
        *QUICK,
        "-o",
        output,
        "--overwrite",
    )
    assert {path.name: path.read_bytes() for path in output.iterdir() if path.is_file()} == before
    assert [path.name for path in tmp_path.iterdir()] == ["output"]


def test_memory_that_runs_out_is_one_line(dense: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def exhausted(*arguments: object) -> None:
        raise MemoryError

    monkeypatch.setattr(blocks, "run_block", exhausted)
    fails(
        "out of memory; use fewer --samples", "compress", dense, "--method", "svd", *QUICK, "-o", tmp_path / "output"
    )
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("error", [KeyboardInterrupt, Terminated])
def test_a_comparison_that_is_interrupted_says_what_it_leaves(
    dense: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: type[BaseException]
) -> None:
    def interrupted(*arguments: object, **options: object) -> None:
        raise error

    monkeypatch.setattr("hf_lowrank.evaluation.comparison.compare", interrupted)
    result = run("compare", dense, "--methods", "svd", "--ratios", 0.3, "--text", "text.txt", "--out", tmp_path)
    assert result.exit_code in (130, 143)
    assert f"what is finished stays in {tmp_path}" in result.stderr
    assert "no output was written" not in result.stderr


def test_a_run_says_whether_all_of_the_model_is_in_memory(dense: Path, tmp_path: Path) -> None:
    command = ["compress", str(dense), "--method", "svd", "--ratio", "0.5", *QUICK, "-o", str(tmp_path / "new")]
    command += ["--calibration", "self"]
    done = subprocess.run([sys.executable, "-m", "hf_lowrank", *command], check=True, capture_output=True, text=True)
    assert "the whole model is in memory: the calibration text is sampled from the model" in done.stderr


def test_ctrl_c_leaves_nothing_but_the_work_folder(dense: Path, tmp_path: Path) -> None:
    """In a process of its own, interrupted in the middle of SoCo's training."""
    work = tmp_path / "work"
    command = [
        sys.executable,
        "-m",
        "hf_lowrank",
        "compress",
        str(dense),
        "--method",
        "soco",
        "--ratio",
        "0.3",
        "--set",
        "steps=1000000",
    ]
    command += ["--work-dir", str(work), "-o", str(tmp_path / "new" / "output"), "--set", "batch_tokens=16", *QUICK]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    try:
        while process.poll() is None and not list(work.glob("*.safetensors")):
            time.sleep(0.05)
        process.send_signal(signal.SIGINT)
        output, errors = process.communicate()
    finally:
        process.kill()
    assert process.returncode == 130
    assert errors.strip().splitlines()[-1].startswith("interrupted")
    assert "Traceback" not in errors
    assert output == ""
    assert [path.name for path in tmp_path.iterdir()] == ["work"]


def test_the_demo_compresses_reopens_measures_and_keeps(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Reduced to one recipe at few samples on the tiny model; the command itself runs four on the bundled one."""
    texts = tmp_path / "texts"
    texts.write_text("\n<|endoftext|>\n".join(tiny_models.text(20)), encoding="utf-8")
    dense = str(tiny_models.saved(tiny_models.llama(), tmp_path / "dense"))
    monkeypatch.setattr(hf_lowrank.cli.demo, "reference_model", lambda: dense)
    monkeypatch.setattr(hf_lowrank.cli.demo, "reference_text", lambda: str(texts))
    recipe = CompressionConfig(method="slab", ratio=0.5, samples=4, sequence_length=16, options={"iterations": 2})
    monkeypatch.setattr(hf_lowrank.cli.demo, "RECIPES", {"slab": recipe})
    result = run("demo", "-o", tmp_path / "kept")
    assert result.exit_code == 0, result.output
    rows = [line.split() for line in result.stdout.splitlines() if "dense" in line or "slab" in line]
    assert len(rows) == 2
    assert any("50%" in row for row in rows)
    assert [path.name for path in (tmp_path / "kept").iterdir()] == ["slab"]


def test_the_demo_covers_the_three_systems_and_their_baseline() -> None:
    recipes = hf_lowrank.cli.demo.RECIPES
    assert {name: (recipe.method, recipe.ratio) for name, recipe in recipes.items()} == {
        "svd-llm": ("svd-llm", 0.3),
        "sola": ("sola", 0.3),
        "soco": ("soco", 0.3),
        "slab": ("slab", 0.5),
    }
    assert Path(hf_lowrank.reference_model()).is_dir()
    assert Path(hf_lowrank.reference_text()).is_file()
