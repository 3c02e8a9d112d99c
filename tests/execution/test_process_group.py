"""Several processes are one: the same layers, one that writes, and a run that goes on after one of them was killed."""

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file

from hf_lowrank.execution.process_group import SINGLE_PROCESS, balanced, current_process_group
from hf_lowrank.execution.torchrun import torchrun_rank
from tests.support.assets import PROJECT
from tests.support.files import digests
from tests.support.processes import RECIPES

pytestmark = pytest.mark.xdist_group("distributed")  # one process makes what all its tests look at

TOLERANCE = {"soco": 1e-3, "refined": 1e-3}
"""Relative tolerance where layers are trained, as rounding in float32 grows from step to step.

Elsewhere, sums in float64 differ in their last bits only.
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What `tests/support/processes.py` leaves."""
    folder = tmp_path_factory.mktemp("processes")
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(PROJECT)}
    command = [sys.executable, "-m", "tests.support.processes", str(folder)]
    done = subprocess.run(
        command, cwd=folder, env=environment, capture_output=True, text=True, timeout=300, check=False
    )
    assert done.returncode == 0, done.stderr[-5000:]
    assert (folder / "process-1.pt").exists(), done.stderr[-5000:]
    return folder


def left_by(folder: Path, who: str) -> dict[str, Any]:
    found: dict[str, Any] = torch.load(folder / f"{who}.pt")
    return found


@pytest.mark.parametrize("model", [*RECIPES, "refined", "broken", "T5"])
def test_two_processes_make_the_layers_of_one(folder: Path, model: str) -> None:
    expected = left_by(folder, "alone")["models"][model]
    first, second = (left_by(folder, f"process-{rank}")["models"][model] for rank in (0, 1))
    assert [*first] == [*second] == [*expected]
    for name, tensor in expected.items():
        assert torch.equal(first[name], second[name])
        lost = (first[name].double() - tensor.double()).norm()
        assert lost <= TOLERANCE.get(model, 1e-5) * tensor.double().norm(), name


def test_the_checkpoint_of_two_processes_is_that_of_one(folder: Path) -> None:
    expected, found = (load_file(folder / run / "result" / "model.safetensors") for run in ("alone", "whole"))
    assert [*found] == [*expected]
    for name, tensor in expected.items():
        assert (found[name].double() - tensor.double()).norm() <= 1e-5 * tensor.double().norm(), name
    assert {*digests(folder / "alone" / "result")} == {*digests(folder / "whole" / "result")}


def test_processes_that_cannot_go_on_say_why(folder: Path) -> None:
    first, second = (left_by(folder, f"process-{rank}")["refusals"] for rank in (0, 1))
    assert first["calibration"] == second["calibration"]
    assert first["calibration"].startswith("process 1 differs in calibration (process 0 has '")
    assert (first["error"], second["error"]) == ("process 1 fails", "process 1 fails")


def test_after_a_killed_process_the_same_command_goes_on_to_the_same_files(folder: Path) -> None:
    statuses = left_by(folder, "alone")["statuses"]
    assert statuses == {"work": [0, 0], "alone": [0], "whole": [0, 0], "killed": [1, -9], "resumed": [0, 0]}
    left = torch.load(folder / "left.pt")
    assert "built-00000.safetensors" in left
    assert "built-00003.safetensors" not in left
    assert digests(folder / "killed" / "result") == digests(folder / "whole" / "result")
    for run in ("whole", "killed"):
        assert not (folder / run / "work").exists()


def test_the_other_of_a_killed_process_says_so_in_one_line(folder: Path) -> None:
    said = [line for line in (folder / "killed" / "errors-0-killed").read_text().splitlines() if "error" in line]
    assert len(said) == 1
    assert said[0].startswith("process 0: error: another of the 2 processes ended or cannot be reached (")
    assert said[0].endswith("the same command goes on from what is finished in its work folder, if it has one")


def test_one_process_is_by_itself(monkeypatch: pytest.MonkeyPatch) -> None:
    assert current_process_group() is SINGLE_PROCESS
    assert SINGLE_PROCESS.is_main
    sums = {"gram": torch.ones(2, 2)}
    assert SINGLE_PROCESS.all_reduce(sums) is sums
    assert SINGLE_PROCESS.split([1, 2, 3]) == [1, 2, 3]
    for name in ("WORLD_SIZE", "RANK", "MASTER_ADDR"):
        monkeypatch.delenv(name, raising=False)
    assert torchrun_rank() is None
    monkeypatch.setenv("WORLD_SIZE", "1")
    monkeypatch.setenv("MASTER_ADDR", "127.0.0.1")
    assert torchrun_rank() is None


@given(st.lists(st.integers(1, 100), min_size=1, max_size=12), st.integers(1, 5))
def test_work_is_balanced(costs: list[int], size: int) -> None:
    """No process has more than the even share and one task more; the order of the tasks stays."""
    tasks = {str(name): float(cost) for name, cost in enumerate(costs)}
    owners = balanced(tasks, size)
    assert [*owners] == [*tasks]
    load = [sum(cost for name, cost in tasks.items() if owners[name] == rank) for rank in range(size)]
    assert max(load) <= sum(costs) / size + max(costs)
