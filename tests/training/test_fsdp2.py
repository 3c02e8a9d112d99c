"""FSDP2 over two processes, as accelerate and as PyTorch do it: the same losses, and models that are saved and loaded whole."""

import json
import os
import subprocess
import sys
from pathlib import Path

import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, Trainer

from hf_lowrank.hub import check_complete
from tests.support.assets import PROJECT

from .conftest import Windows, pattern, same, settings


def test_two_processes_are_one(checkpoints: dict[str, Path], tmp_path: Path) -> None:
    folders = [checkpoints[layout] for layout in ("bitmask and signs", "quantised")]
    command = [sys.executable, "-m", "tests.training.fsdp2", str(tmp_path), *map(str, folders)]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(PROJECT)}
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr[-5000:]
    for folder in folders:
        two, one = tmp_path / folder.name, tmp_path / f"{folder.name}-alone"
        found = json.loads((two / "found.json").read_text())
        arguments = settings(one, max_steps=20, save_steps=20, per_device_train_batch_size=8)
        trainer = Trainer(AutoModelForCausalLM.from_pretrained(folder), arguments, train_dataset=Windows(64))
        before = pattern(trainer.model)
        trainer.train()
        losses = torch.tensor([entry["loss"] for entry in trainer.state.log_history if "loss" in entry])
        for run in ("losses", "resumed"):
            torch.testing.assert_close(torch.tensor(found[run]), losses, rtol=0, atol=1e-4)
        assert found["same"] == {"sharded": True, "broadcast": True, "full": True}
        stored = load_file(two / "model.safetensors")
        for name, tensor in load_file(one / "checkpoint-20" / "model.safetensors").items():
            torch.testing.assert_close(stored[name], tensor, rtol=0, atol=1e-3)
        for output in (two, two / "checkpoint-10", two / "full"):
            check_complete(output)
            assert same(pattern(AutoModelForCausalLM.from_pretrained(output)), before)
