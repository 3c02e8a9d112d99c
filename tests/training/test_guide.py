"""Follows docs/training.md.

Its scripts are run under the names that the guide gives them, its commands as they are, and the rest as one program.
"""

import json
import re
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from hf_lowrank.publishing.hub import check_complete
from tests.support.assets import PROJECT
from tests.support.prepared import Prepared

from .conftest import dense, pattern, same

pytestmark = pytest.mark.xdist_group("prepared")  # one process serves them all

GUIDE = PROJECT / "docs" / "training.md"
LAYOUT = "bitmask and signs"


def blocks(language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", GUIDE.read_text(encoding="utf-8"), flags=re.DOTALL)


@pytest.fixture(scope="module")
def folder(checkpoints: dict[str, Path], text_file: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder with the models and the text that the guide names, and with its scripts."""
    root = tmp_path_factory.mktemp("guide")
    shutil.copytree(checkpoints[LAYOUT], root / "compressed")
    shutil.copyfile(text_file, root / "text.txt")
    dense(LAYOUT).save_pretrained(root / "dense")
    for block in blocks("python"):
        if name := re.match(r"# (\w+\.py)\n", block):
            (root / name[1]).write_text(block, encoding="utf-8")
    return root


@pytest.fixture(scope="module")
def followed(folder: Path, prepared: Prepared) -> Path:
    """Return this folder after everything was run, `torchrun` by as many processes as it would start."""
    for command in (line.split() for block in blocks("bash") for line in block.splitlines()):
        if command[:2] == ["torchrun", "--nproc-per-node"]:
            prepared.run(command[3:], folder, processes=int(command[2]))
        else:
            assert command[0] == "python"
            prepared.run(command[1:], folder)
    program = "\n".join(block for block in blocks("python") if not re.match(r"# \w+\.py\n", block))
    (folder / "program.py").write_text(program, encoding="utf-8")
    prepared.run(["program.py"], folder)
    return folder


def test_the_snippets_leave_whole_folders(followed: Path) -> None:
    masks = pattern(AutoModelForCausalLM.from_pretrained(followed / "compressed"))
    for output in ("tuned/checkpoint-5", "distilled", "distilled/checkpoint-5"):
        check_complete(followed / output)
        assert same(pattern(AutoModelForCausalLM.from_pretrained(followed / output)), masks)


def test_two_processes_are_one(followed: Path) -> None:
    """With DDP and with FSDP2 the losses of twenty steps agree to 1e-4, and so do the models on disk."""
    losses, stored = {}, {}
    for output in ("trained", "trained-ddp", "trained-fsdp2"):
        history = json.loads((followed / output / "trainer_state.json").read_text())["log_history"]
        losses[output] = torch.tensor([entry["loss"] for entry in history if "loss" in entry])
        check_complete(followed / output)
        stored[output] = load_file(followed / output / "model.safetensors")
    start = load_file(followed / "compressed" / "model.safetensors")
    for output in losses:
        assert len(losses[output]) == 20
        torch.testing.assert_close(losses[output], losses["trained"], rtol=0, atol=1e-4)
        for name, tensor in stored["trained"].items():
            torch.testing.assert_close(stored[output][name], tensor, rtol=0, atol=1e-3)
            assert tensor.dtype != torch.uint8 or torch.equal(stored[output][name], start[name])
