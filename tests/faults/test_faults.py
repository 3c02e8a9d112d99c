"""Whatever strikes a command ends in one line and the right exit code.

The output is absent or complete, and the next run is unharmed.
"""

import json
import os
import random
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from hf_lowrank.execution.locking import locked
from tests.support import tiny_models
from tests.support.assets import PROJECT

QUICK = ["--samples", "4", "--sequence-length", "16"]
"""Options with which a compression takes seconds."""
Ending = dict[str, Any]
"""The exit code of a command as "code", and what it wrote to standard error as "stderr"."""
Run = Callable[..., Ending]
"""Runs a command. Its options say which fault strikes (see `tests/faults/zygote.py`)."""


@pytest.fixture(scope="module")
def dense(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_models.saved(tiny_models.llama(), tmp_path_factory.mktemp("models") / "dense")


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Run]:
    """A function that runs a command with a fault. All commands run in forks of one process."""
    errors = str(tmp_path_factory.mktemp("errors") / "stderr")
    environment = os.environ | {"PYTHONPATH": str(PROJECT), "OMP_NUM_THREADS": "1"}
    zygote = subprocess.Popen(
        [sys.executable, "-m", "tests.faults.zygote"],
        cwd=PROJECT,
        env=environment,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    assert zygote.stdin is not None and zygote.stdout is not None

    def ask(*command: object, **case: object) -> Ending:
        request = {"command": [str(part) for part in command], "errors": errors, **case}
        print(json.dumps(request), file=zygote.stdin, flush=True)
        ending: Ending = json.loads(zygote.stdout.readline())
        return ending

    yield ask
    zygote.stdin.close()
    zygote.wait(timeout=60)


@pytest.fixture(scope="module")
def undisturbed(run: Run, dense: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    """The files that a compression writes when nothing strikes."""
    output = tmp_path_factory.mktemp("undisturbed") / "output"
    assert run("compress", dense, "--method", "svd-llm", *QUICK, "-o", output)["code"] == 0
    return contents(output)


def contents(folder: Path) -> dict[str, bytes]:
    """Return the files that a seed decides: all but the report and the card, which name the output folder."""
    decided = [*folder.glob("*.safetensors"), *folder.glob("*.py"), *folder.glob("config.json")]
    return {file.name: file.read_bytes() for file in decided}


FAULTS = {
    "SIGINT": (130, "interrupted; no output was written"),
    "SIGTERM": (143, "terminated; no output was written"),
    "SIGKILL": (-9, None),
    "ENOSPC": (1, "No space left on device"),
    "EROFS": (1, "Read-only file system"),
    "EACCES": (1, "Permission denied"),
    "MemoryError": (1, "out of memory"),
    "CUDA error": (1, "the device failed (CUDA error: an illegal memory access was encountered)"),
}
"""The exit code after every fault, and what the last line of standard error says, if there is one."""

STAGES = {
    "calibration": ["SIGINT", "ENOSPC", "CUDA error"],
    "decomposition": list(FAULTS),
    "saving": list(FAULTS),
    "saved": ["SIGTERM", "SIGKILL"],
}
"""The faults that strike in every stage of a compression."""


@pytest.mark.parametrize(("stage", "fault"), [(stage, fault) for stage, faults in STAGES.items() for fault in faults])
def test_a_fault_in_any_stage_ends_in_one_line_and_its_exit_code(
    run: Run, dense: Path, undisturbed: dict[str, bytes], tmp_path: Path, stage: str, fault: str
) -> None:
    code, line = FAULTS[fault]
    command = ("compress", dense, "--method", "svd-llm", *QUICK, "-o", tmp_path / "new" / "output")
    ending = run(*command, stage=stage, fault=fault, call=3 if stage == "decomposition" else 1)
    assert ending["code"] == code, ending
    assert "Traceback" not in ending["stderr"]
    if line is not None:
        assert line in ending["stderr"].splitlines()[-1]
        assert list(tmp_path.iterdir()) == []
    assert not (tmp_path / "new" / "output").exists()
    # A second run is tried where the first one may have left most behind.
    if (stage, fault) in (("saved", "SIGKILL"), ("saving", "ENOSPC"), ("decomposition", "SIGKILL")):
        assert run(*command)["code"] == 0
        assert contents(tmp_path / "new" / "output") == undisturbed
        assert [path.name for path in (tmp_path / "new").iterdir()] == ["output"]


@pytest.mark.parametrize("fault", ["RLIMIT_FSIZE", "RLIMIT_AS"])
@pytest.mark.parametrize("stage", ["calibration", "saving"])
def test_a_limit_of_the_system_ends_in_one_line(run: Run, dense: Path, tmp_path: Path, stage: str, fault: str) -> None:
    """Files or memory may not grow, and the system refuses wherever that comes up first."""
    # Text is not sampled by the tokenizer, whose library aborts the process where it gets no memory.
    recipe = ["--method", "svd-llm", *QUICK, "--calibration", "self"]
    ending = run("compress", dense, *recipe, "-o", tmp_path / "output", stage=stage, fault=fault)
    if ending["code"] == 0:  # the memory that was left sufficed
        assert fault == "RLIMIT_AS"
        return
    assert ending["code"] == 1, ending
    assert "Traceback" not in ending["stderr"]
    assert ending["stderr"].splitlines()[-1].startswith("error: ")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("verb", ["inspect", "verify", "dense"])
def test_a_shard_that_vanishes_while_it_is_read_is_one_line(run: Run, dense: Path, tmp_path: Path, verb: str) -> None:
    assert run("compress", dense, "--method", "svd-llm", *QUICK, "-o", tmp_path / "output")["code"] == 0
    output = ["-o", tmp_path / "dense"] if verb == "dense" else []
    shard = tmp_path / "output" / "model.safetensors"
    if verb == "verify":  # reads every file anew in an order of its own, so the shard is gone before it starts
        shard.unlink()
    stage = "inspecting" if verb == "inspect" else "loading"
    ending = run(verb, tmp_path / "output", *output, stage=stage, fault="vanishing", vanishing=str(shard))
    assert ending["code"] == 1
    assert ending["stderr"].splitlines()[-1].startswith("error: ")
    assert "Traceback" not in ending["stderr"]
    assert not (tmp_path / "dense").exists()


@pytest.mark.parametrize("fault", ["SIGTERM", "ENOSPC"])
def test_a_fault_while_pushing_leaves_the_checkpoint_alone(run: Run, dense: Path, tmp_path: Path, fault: str) -> None:
    output = tmp_path / "output"
    assert run("compress", dense, "--method", "svd-llm", *QUICK, "-o", output)["code"] == 0
    before = contents(output)
    ending = run("push", output, "somebody/model", stage="pushing", fault=fault)
    assert ending["code"] in (1, FAULTS[fault][0]), ending  # offline, the push may end before the fault strikes
    assert "Traceback" not in ending["stderr"]
    assert contents(output) == before


SOCO = ["--method", "soco", "--ratio", "0.3"]
SOCO += ["--set", "steps=52", "--set", "finish_steps=4", "--set", "batch_tokens=16"]


def test_a_training_killed_at_any_time_still_ends_in_the_same_bytes(run: Run, dense: Path, tmp_path: Path) -> None:
    def command(name: str) -> list[object]:
        return ["compress", dense, *SOCO, *QUICK, "--work-dir", tmp_path / f"work-{name}", "-o", tmp_path / name]

    assert run(*command("whole"))["code"] == 0
    # A number of kills by hand makes this a long test of random instants.
    rng, kills = random.Random(0), int(os.environ.get("HF_LOWRANK_KILLS", "2"))
    for _ in range(kills):
        ending = run(*command("killed"), kill_after=rng.uniform(0.1, 2))
        assert ending["code"] in (-9, 0)
        if (tmp_path / "killed").exists():  # the run was through before the signal came, and its output is complete
            assert contents(tmp_path / "killed") == contents(tmp_path / "whole")
            shutil.rmtree(tmp_path / "killed")
    assert run(*command("killed"))["code"] == 0
    assert contents(tmp_path / "killed") == contents(tmp_path / "whole")
    assert not (tmp_path / "work-killed").exists()


def test_a_work_folder_serves_one_process_at_a_time(run: Run, dense: Path, tmp_path: Path) -> None:
    work = tmp_path / "work"
    work.mkdir()
    command = ["compress", dense, *SOCO, *QUICK, "--work-dir", work, "-o", tmp_path / "output"]
    with locked(work):  # as another process would hold it
        ending = run(*command)
        assert ending["code"] == 1
        assert f"error: {work}: another process is working in it" in ending["stderr"]
    assert run(*command, stage="training", fault="SIGKILL")["code"] == -9
    assert run(*command)["code"] == 0


def test_a_damaged_state_of_a_training_is_one_line(run: Run, dense: Path, tmp_path: Path) -> None:
    work = tmp_path / "work"
    work.mkdir()
    (work / "soco_state.safetensors").write_bytes(b"\x10")  # shorter than the length of a header
    ending = run("compress", dense, *SOCO, *QUICK, "--work-dir", work, "-o", tmp_path / "output")
    assert ending["code"] == 1
    assert "soco_state.safetensors: is damaged (" in ending["stderr"].splitlines()[-1]


def test_a_kill_between_the_renames_loses_nothing(run: Run, dense: Path, tmp_path: Path) -> None:
    """The old content comes back that a process had moved aside before it was killed."""
    output = tmp_path / "output"
    aside = tmp_path / ".output.replaced-1"
    aside.mkdir()
    (aside / "precious").write_text("yes")
    ending = run("compress", dense, "--method", "svd", *QUICK, "-o", output)
    assert ending["code"] == 1 and "exists and is not empty" in ending["stderr"]
    assert (output / "precious").read_text() == "yes"
    assert not aside.exists()


@pytest.mark.parametrize(("fault", "word"), [("SIGINT", "interrupted"), ("SIGTERM", "terminated")])
def test_a_signal_while_torch_is_being_imported_is_one_line(fault: str, word: str) -> None:
    interruption = f"""
import os, signal, sys
class Interruption:
    def find_spec(self, name, *arguments):
        if name == "torch":
            os.kill(os.getpid(), signal.{fault})
sys.meta_path.insert(0, Interruption())
sys.argv = ["hf-lowrank", "methods"]
import hf_lowrank_command
hf_lowrank_command.main()
"""
    finished = subprocess.run(
        [sys.executable, "-c", interruption], cwd=PROJECT, capture_output=True, text=True, check=False
    )
    assert (finished.returncode, finished.stderr) == (FAULTS[fault][0], f"{word}; no output was written\n")
