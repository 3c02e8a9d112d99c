"""FSDP2 over two processes, as accelerate and as PyTorch do it.

The losses are those of one process, and models are saved and loaded whole.
"""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, Trainer

from hf_lowrank.publishing.hub import check_complete
from tests.support.prepared import Prepared

from .conftest import Windows, pattern, same, settings
from .fsdp2 import STEPS

pytestmark = pytest.mark.xdist_group("prepared")  # one process serves them all


@pytest.mark.parametrize("layout", ["bitmask and signs", "quantized"])
def test_two_processes_are_one(layout: str, checkpoints: dict[str, Path], prepared: Prepared, tmp_path: Path) -> None:
    folder, two, one = checkpoints[layout], tmp_path / "two", tmp_path / "one"
    prepared.run(["-m", "tests.training.fsdp2", two, folder], tmp_path, processes=2)
    found = json.loads((two / "found.json").read_text())
    arguments = settings(one, max_steps=STEPS, save_steps=STEPS, per_device_train_batch_size=8)
    trainer = Trainer(AutoModelForCausalLM.from_pretrained(folder), arguments, train_dataset=Windows())
    before = pattern(trainer.model)
    trainer.train()
    losses = torch.tensor([entry["loss"] for entry in trainer.state.log_history if "loss" in entry])
    for run in ("losses", "resumed"):
        torch.testing.assert_close(torch.tensor(found[run]), losses, rtol=0, atol=1e-4)
    assert found["same"] == {"sharded": True, "broadcast": True, "full": True}
    stored = load_file(two / "model.safetensors")
    for name, tensor in load_file(one / f"checkpoint-{STEPS}" / "model.safetensors").items():
        torch.testing.assert_close(stored[name], tensor, rtol=0, atol=1e-3)
    for output in (two, two / "checkpoint-2", two / "full"):
        check_complete(output)
        assert same(pattern(AutoModelForCausalLM.from_pretrained(output)), before)
