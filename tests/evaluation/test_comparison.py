"""Comparisons record what lies on disk, measure nothing twice, and name what cannot be compressed with the reason."""

import json
import os
import shutil
import signal
import sys
import threading
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner, Result

from hf_lowrank import CompressionError, cli, reference_text
from hf_lowrank.checkpoints.inspect import inspect
from hf_lowrank.evaluation import comparison, pareto
from hf_lowrank.evaluation.comparison import Candidate, Comparison, candidates, parse_method
from hf_lowrank.evaluation.comparison_records import finished_record, write_json
from hf_lowrank.evaluation.perplexity import evaluate
from hf_lowrank.execution import child_process
from hf_lowrank.execution.child_process import ProcessError
from hf_lowrank.models.loading import load_model, load_tokenizer
from hf_lowrank.runtime.checksums import file_checksum

from ..support import tiny_models

pytestmark = pytest.mark.xdist_group("comparison")  # one process prepares the folder that all tests here read

METHOD, RATIO, TOO_MUCH = "slab[iterations=2]", 0.4, 0.95


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("comparison")
    tiny_models.saved(tiny_models.llama(), folder / "dense")
    (folder / "text.txt").write_text("\n<|endoftext|>\n".join(tiny_models.text(20)), encoding="utf-8")
    result = run(folder)
    assert result.exit_code == 0, result.output
    return folder


def run(folder: Path, *more: str) -> Result:
    arguments = ["--methods", METHOD, "--ratios", str(RATIO), str(TOO_MUCH), "--keep"]
    arguments += ["--samples", "4", "--sequence-length", "16", "--max-windows", "4"]
    arguments += ["--text", str(folder / "text.txt"), "--out", str(folder / "out")]
    return CliRunner().invoke(cli.app, ["compare", str(folder / "dense"), *arguments, *more])


def results(home: Path) -> Any:
    return json.loads((home / "out" / "results.json").read_text(encoding="utf-8"))


def test_figures_are_those_of_the_checkpoint(home: Path) -> None:
    """The figures of a record are those of an inspection and an evaluation of the kept checkpoint."""
    record = results(home)["combinations"][0]
    folder = home / "out" / "checkpoints" / Candidate("slab", RATIO, {"iterations": "2"}).file_name
    stored = inspect(folder)
    assert (record["ratio_stored"], record["disk_bytes"]) == (stored.ratio_stored, stored.disk_bytes)
    assert record["bits_per_weight"] == pytest.approx(32 * (1 - stored.ratio_stored))
    dense = load_model(str(home / "dense"), "float32")
    compressed, tokenizer = load_model(str(folder), "float32"), load_tokenizer(str(folder))
    evaluation = evaluate(compressed, tokenizer, str(home / "text.txt"), max_windows=4, reference=dense).to_dict()
    for name in ("perplexity", "nats_lost", "kl", "top1_agreement"):
        assert record["texts"][0][name] == pytest.approx(evaluation[name], abs=1e-5)
    assert record["seconds"] > 0
    assert record["peak_bytes"] is None or record["peak_bytes"] > stored.disk_bytes


def test_results_name_everything_they_depend_on(home: Path) -> None:
    content = results(home)
    assert content["model"]["model.safetensors"] == file_checksum(home / "dense" / "model.safetensors")
    assert content["texts"] == {"text.txt": file_checksum(home / "text.txt")}
    assert content["recipe"]["seed"] == 0
    assert set(content["versions"]) == {"hf_lowrank", "torch", "transformers"}
    assert len(content["combinations"][0]["calibration_sha256"]) == 64
    assert content["dense"]["texts"][0]["nats_lost"] == 0


def test_no_file_names_a_folder_of_this_machine(home: Path) -> None:
    for file in (home / "out").rglob("*"):
        if file.is_file():
            assert os.fsencode(home.name) not in file.read_bytes(), file


def test_combination_out_of_reach_is_a_line_with_its_reason(home: Path) -> None:
    record = results(home)["combinations"][1]
    assert (record["ratio"], "out of reach of slab" in record["failed"]) == (TOO_MUCH, True)
    assert f"- {METHOD} at 95%: {record['failed']}\n" in (home / "out" / "table.md").read_text(encoding="utf-8")


def test_second_run_does_nothing_again(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Combinations that were out of reach are not tried again either, and the tables stay the same."""
    table, plot = (home / "out" / "table.md").read_bytes(), (home / "out" / "pareto.png").read_bytes()

    def refuse(arguments: list[str]) -> None:
        raise AssertionError(arguments)

    monkeypatch.setattr(comparison, "run", refuse)
    assert run(home).exit_code == 0
    assert ((home / "out" / "table.md").read_bytes(), (home / "out" / "pareto.png").read_bytes()) == (table, plot)
    assert not (home / "out" / "working").exists()
    assert not list(home.glob("out/training/*"))


def test_run_that_broke_off_goes_on(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The next run tries a combination that crashed again, and no other one, and clears what was left of it."""
    again = home / "broken"
    shutil.copytree(home / "out", again)
    files = {file.name: file for file in (again / "combinations").iterdir()}
    files[Candidate("slab", RATIO, {"iterations": "2"}).file_name + ".json"].unlink()
    (again / "working" / "left").mkdir(parents=True)
    tried = []

    def crash(arguments: list[str]) -> None:
        tried.append(arguments[0])
        raise ProcessError("killed", explained=False)

    monkeypatch.setattr(comparison, "run", crash)
    for _ in range(2):
        result = run(home, "--out", str(again))
        assert result.exit_code == 0
        assert f"{METHOD} at 40%: killed" in result.stdout
    assert tried == ["compress", "compress"]
    assert not (again / "working").exists()


def test_training_that_broke_off_goes_on_in_its_folder(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The next run gets the same folder with its content, and a run with other inputs another one.

    Both are gone after a success.
    """
    again = home / "trained"
    shutil.copytree(home / "out", again)
    (again / "combinations" / (Candidate("slab", RATIO, {"iterations": "2"}).file_name + ".json")).unlink()
    folders: list[Path] = []
    failing = True

    def pretend(arguments: list[str]) -> tuple[str, float, int | None]:
        if arguments[0] == "evaluate":
            return json.dumps(results(home)["combinations"][0]["texts"]), 1.0, None
        folders.append(Path(arguments[arguments.index("--work-dir") + 1]))
        folders[-1].mkdir(parents=True, exist_ok=True)
        (folders[-1] / str(len(folders))).touch()
        if failing:
            raise ProcessError("killed", explained=False)
        shutil.copytree(
            home / "out" / "checkpoints" / Candidate("slab", RATIO, {"iterations": "2"}).file_name, arguments[3]
        )
        return "", 1.0, None

    monkeypatch.setattr(comparison, "run", pretend)
    assert run(home, "--out", str(again)).exit_code == 0
    other = run(home, "--out", str(again), "--calibration", str(home / "text.txt"))
    assert other.exit_code == 0
    failing = False
    assert run(home, "--out", str(again)).exit_code == 0
    first, second, last = (folder for folder in folders if str(TOO_MUCH) not in folder.name)
    assert first.is_relative_to(again)
    assert (first == last, first == second) == (True, False)
    assert not any(folder.exists() for folder in (first, second))


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT], ids=lambda number: number.name)
def test_no_child_process_is_left_by_a_signal(
    number: signal.Signals, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    stand_in, started = tmp_path / "python", tmp_path / "started"
    stand_in.write_text(
        f'#!/bin/sh\necho $$ > "{started}.partial"\nmv "{started}.partial" "{started}"\nexec sleep 60\n',
        encoding="utf-8",
    )
    stand_in.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(stand_in))
    before = signal.getsignal(signal.SIGTERM)

    def interrupt() -> None:
        while not started.exists():
            pass
        os.kill(os.getpid(), number)

    threading.Thread(target=interrupt, daemon=True).start()
    with pytest.raises(SystemExit if number is signal.SIGTERM else KeyboardInterrupt):
        child_process.run(["compress"])
    with pytest.raises(ProcessLookupError):
        os.kill(int(started.read_text(encoding="utf-8")), 0)
    assert signal.getsignal(signal.SIGTERM) is before


def test_changed_input_is_named_and_computed_again(tmp_path: Path) -> None:
    file = tmp_path / "one.json"
    lines: list[str] = []
    write_json(file, {"inputs": {"model": "a", "texts": "b"}, "value": 1})
    assert finished_record(file, {"model": "a", "texts": "b"}, lines.append) == {
        "inputs": {"model": "a", "texts": "b"},
        "value": 1,
    }
    assert lines == []
    assert finished_record(file, {"model": "a", "texts": "c"}, lines.append) is None
    assert "texts changed" in lines[-1]
    file.write_text("{", encoding="utf-8")
    assert finished_record(file, {"model": "a"}, lines.append) is None
    assert "damaged" in lines[-1]
    assert finished_record(tmp_path / "none.json", {}, lines.append) is None


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (["--methods", "slabb"], "did you mean 'slab'"),
        (["--methods", "slab[binary=1]"], "has no option 'binary'"),
        (["--methods", "slab["], "name[option=value,...]"),
        (["--ratios", "1.5"], "ratio: found 1.5"),
        (["--calibration", "/no/such/text"], "no such text file"),
        (["--calibration", "{short}"], "short.txt: the text has 6 tokens, fewer than one window of 16"),
        (["--text", "{short}"], "short.txt: the text has 6 tokens, fewer than one window of 64"),
    ],
)
def test_mistakes_are_found_before_any_work(changes: list[str], message: str, home: Path, tmp_path: Path) -> None:
    out, short = tmp_path / "out", tmp_path / "short.txt"
    short.write_text("hello", encoding="utf-8")
    result = run(home, *(change.format(short=short) for change in changes), "--out", str(out))
    assert result.exit_code == 1
    assert message in result.stderr
    assert result.stderr.count("\n") == 1
    assert not out.exists()


def test_inputs_change_with_whatever_the_figures_depend_on(home: Path) -> None:
    model, text = str(home / "dense"), str(home / "text.txt")
    base = Comparison(model, [text])
    variants = [
        Comparison(model, [text], calibration=text),
        Comparison(model, [text], seed=1),
        Comparison(model, [text], samples=3),
        Comparison(model, [text], sequence_length=8),
        Comparison(model, [text], dtype="bfloat16"),
        Comparison(model, [text], window=8),
        Comparison(model, [text], max_windows=2),
        Comparison(model, [text, reference_text()]),
    ]
    inputs = [json.dumps(variant.inputs(), sort_keys=True) for variant in (base, *variants)]
    assert len(set(inputs)) == len(inputs)


def test_method_with_options_reads_back_from_its_label() -> None:
    """A label can be given to `--methods` again, and different candidates have different files."""
    combinations = candidates(
        ["slab", "slab[weighted=true,iterations=3]", "slab[refinement_steps=8]", "wanda[pattern=2:4]", "slab"],
        [0.3, 0.5],
    )
    assert len(combinations) == 8
    assert len({candidate.file_name for candidate in combinations}) == 8
    for candidate in combinations:
        assert parse_method(candidate.label) == (candidate.method, candidate.options)


def test_best_at_each_size_loses_least() -> None:
    records = [
        {"label": label, "ratio": ratio, "failed": None, "texts": [{"nats_lost": lost}]}
        for label, ratio, lost in [("a", 0.3, 0.2), ("b", 0.3, 0.1), ("a", 0.5, 0.4), ("b", 0.5, 0.9)]
    ]
    records.append({"label": "c", "ratio": 0.3, "failed": "reason"})
    assert {ratio: record["label"] for ratio, record in pareto.best(records, 0).items()} == {0.3: "b", 0.5: "a"}


def test_missing_plotting_library_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pareto, "find_spec", lambda name: None)
    with pytest.raises(CompressionError, match=r"pip install 'hf_lowrank\[eval\]'"):
        pareto.check_plotting()
