"""Checkpoint, kill, resume: bit for bit the weights of a run that nobody disturbed."""

import os
import subprocess
import sys
from pathlib import Path

from safetensors.torch import load_file

from tests.support.assets import PROJECT

from .conftest import same


def test_a_killed_run_goes_on_as_if_nothing_had_happened(checkpoints: dict[str, Path], tmp_path: Path) -> None:
    command = [sys.executable, "-m", "tests.training.killed", str(tmp_path), *map(str, checkpoints.values())]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(PROJECT)}
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=500, check=False)
    assert done.returncode == 0, done.stderr
    for folder in checkpoints.values():
        whole, killed = (tmp_path / run / folder.name / "checkpoint-6" / "model.safetensors" for run in ("whole", "killed"))
        assert same(load_file(whole), load_file(killed)), folder.name
        assert not same(load_file(whole), load_file(folder / "model.safetensors")), folder.name
