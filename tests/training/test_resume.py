"""A training that is killed and resumed from a checkpoint has, bit for bit, the weights of an undisturbed one."""

import signal
from pathlib import Path

import pytest
from safetensors.torch import load_file

from tests.support.prepared import Prepared

from .conftest import same

pytestmark = pytest.mark.xdist_group("prepared")  # one process serves them all


@pytest.mark.parametrize("layout", ["bitmask and signs", "quantized", "Conv1D"])
def test_a_killed_run_goes_on_as_if_nothing_had_happened(
    layout: str, checkpoints: dict[str, Path], prepared: Prepared, tmp_path: Path
) -> None:
    train = ["-m", "tests.training.killed", checkpoints[layout]]
    prepared.run([*train, tmp_path / "whole"], tmp_path)
    assert prepared.codes([*train, tmp_path / "killed", "kill"], tmp_path) == [-signal.SIGKILL]
    assert not (tmp_path / "killed" / "checkpoint-4").exists()
    prepared.run([*train, tmp_path / "killed", "resume"], tmp_path)
    whole, killed = (load_file(tmp_path / run / "checkpoint-4" / "model.safetensors") for run in ("whole", "killed"))
    assert same(whole, killed)
    assert not same(whole, load_file(checkpoints[layout] / "model.safetensors"))
