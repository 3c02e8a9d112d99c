"""What a command writes is there as a whole or not at all, whatever stops it."""

import errno
import os
import resource
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from hf_lowrank.calibration import blocks
from hf_lowrank.cli.base import Terminated

from .calls import QUICK, fails, run


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
