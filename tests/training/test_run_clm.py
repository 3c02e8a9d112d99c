"""A training script that knows nothing of compressed models, run as it stands on both routes, and pushing while it trains."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from huggingface_hub import ModelCard
from transformers import AutoModelForCausalLM, AutoTokenizer

from hf_lowrank.hub import check_complete
from hf_lowrank.runtime.saving import RUNTIME_FILES
from tests.support.assets import PROJECT
from tests.support.hub_server import WRITE_TOKEN, HubServer
from tests.support.hub_storage import Repository

from .conftest import pattern, same

SCRIPT = Path(__file__).with_name("run_clm.py")
PLUGIN = "import runpy, sys, hf_lowrank; sys.argv = sys.argv[1:]; runpy.run_path(sys.argv[0], run_name='__main__')"
REMOTE = "import runpy, sys; sys.modules['hf_lowrank'] = None; sys.argv = sys.argv[1:]; runpy.run_path(sys.argv[0], run_name='__main__')"


def run_clm(route: str, folder: Path, text: Path, output: Path, environment: dict[str, str], *more: str) -> float:
    """Run the script and return its training loss."""
    options = ["--model_name_or_path", str(folder), "--train_file", str(text), "--validation_file", str(text), "--output_dir", str(output)]
    options += ["--do_train", "--do_eval", "--max_steps", "4", "--save_steps", "2", "--eval_strategy", "steps", "--eval_steps", "2"]
    options += ["--per_device_train_batch_size", "4", "--learning_rate", "1e-3", "--use_cpu", "--report_to", "none", *more]
    command = [sys.executable, "-c", route, str(SCRIPT), *options]
    environment = environment | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(PROJECT) if route == PLUGIN else ""}
    done = subprocess.run(command, cwd=output.parent, env=environment, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    assert json.loads((output / "eval_results.json").read_text())["perplexity"] > 1
    return float(json.loads((output / "train_results.json").read_text())["train_loss"])


@pytest.fixture(scope="module")
def runs(checkpoints: dict[str, Path], text_file: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, HubServer, list[float]]:
    root = tmp_path_factory.mktemp("clm")
    folder = checkpoints["bitmask and signs"]
    with HubServer(root / "hub") as hub:
        environment = hub.environment(root / "home", WRITE_TOKEN)
        plugin = run_clm(PLUGIN, folder, text_file, root / "plugin", environment, "--push_to_hub", "--hub_model_id", "tester/tuned")
    remote = run_clm(REMOTE, folder, text_file, root / "remote", dict(os.environ) | {"HF_HOME": str(root / "home")}, "--trust_remote_code")
    return root, hub, [plugin, remote]


def test_both_routes_train_alike_and_leave_whole_folders(runs: tuple[Path, HubServer, list[float]], checkpoints: dict[str, Path]) -> None:
    root, _, losses = runs
    assert losses[0] == losses[1]
    masks = pattern(AutoModelForCausalLM.from_pretrained(checkpoints["bitmask and signs"]))
    for route in ("plugin", "remote"):
        for folder in (root / route, root / route / "checkpoint-2", root / route / "checkpoint-4"):
            check_complete(folder)
            assert same(pattern(AutoModelForCausalLM.from_pretrained(folder)), masks)
            assert AutoTokenizer.from_pretrained(folder).eos_token == "</s>"


def test_every_commit_of_the_training_opens_by_remote_code(runs: tuple[Path, HubServer, list[float]]) -> None:
    root, hub, _ = runs
    repository = Repository(hub.root / "tester" / "tuned")
    commits = [commit for commit in repository.history("main") if commit.title != "initial commit"]
    assert any(commit.title.startswith("Training in progress") for commit in commits)
    for commit in commits:
        assert {"config.json", "model.safetensors", "tokenizer.json", *RUNTIME_FILES} <= commit.files.keys(), commit.title
    assert "hf_lowrank" in ModelCard.load(root / "plugin" / "README.md").data.tags
