"""docs/training.md, executed: its scripts under the names that it gives them, its commands as they stand, the rest as one program."""

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from hf_lowrank.hub import check_complete
from tests.support.assets import PROJECT

from .conftest import dense, pattern, same

GUIDE = PROJECT / "docs" / "training.md"
LAYOUT = "bitmask and signs"


def blocks(language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", GUIDE.read_text(encoding="utf-8"), flags=re.DOTALL)


def run(command: list[str], folder: Path) -> None:
    binaries = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    environment = os.environ | {"PATH": binaries, "PYTHONPATH": str(PROJECT), "OMP_NUM_THREADS": "1", "HF_HOME": str(folder / "home")}
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, timeout=500, check=False)
    assert done.returncode == 0, f"{command}\n{done.stderr[-5000:]}"


@pytest.fixture(scope="module")
def folder(checkpoints: dict[str, Path], text_file: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where the guide is followed: the models and the text that it names, and its scripts."""
    root = tmp_path_factory.mktemp("guide")
    shutil.copytree(checkpoints[LAYOUT], root / "compressed")
    shutil.copyfile(text_file, root / "text.txt")
    dense(LAYOUT).save_pretrained(root / "dense")
    for block in blocks("python"):
        if name := re.match(r"# (\w+\.py)\n", block):
            (root / name[1]).write_text(block, encoding="utf-8")
    return root


@pytest.fixture(scope="module")
def followed(folder: Path) -> Path:
    """The same folder after everything was run, what needs one process in one process."""
    program = ["import runpy, sys"]
    commands = [command.split() for block in blocks("bash") for command in block.splitlines()]
    for name, *arguments in (command[1:] for command in commands if command[0] == "python"):
        program.append(f"sys.argv = {[name, *arguments]!r}\nrunpy.run_path({name!r}, run_name='__main__')")
    program += [block for block in blocks("python") if not re.match(r"# \w+\.py\n", block)]
    run([sys.executable, "-c", "\n".join(program)], folder)
    for command in commands:
        if command[0] != "python":
            run(command, folder)
    return folder


def test_the_snippets_leave_whole_folders(followed: Path) -> None:
    masks = pattern(AutoModelForCausalLM.from_pretrained(followed / "compressed"))
    for output in ("tuned/checkpoint-5", "distilled", "distilled/checkpoint-5"):
        check_complete(followed / output)
        assert same(pattern(AutoModelForCausalLM.from_pretrained(followed / output)), masks)


def test_two_processes_are_one(followed: Path) -> None:
    """DDP and FSDP2: the losses of twenty steps to 1e-4, and on disk the same model."""
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
