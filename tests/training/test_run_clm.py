"""A training script that knows nothing of compressed models runs by the plugin and by remote code.

By remote code it pushes while it trains.
"""

import json
import subprocess
import sys
from pathlib import Path

import pytest
from huggingface_hub import ModelCard
from transformers import AutoModelForCausalLM, AutoTokenizer

from hf_lowrank.publishing.hub import check_complete
from hf_lowrank.runtime.checksums import LOADING_CODE
from tests.support.assets import PROJECT
from tests.support.hub_server import WRITE_TOKEN, HubServer
from tests.support.hub_storage import Repository
from tests.support.lm_eval_task import accuracy, write_task
from tests.support.prepared import Prepared

from .conftest import pattern, same

pytestmark = pytest.mark.xdist_group("prepared")  # one process serves them all

SCRIPT = Path(__file__).with_name("run_clm.py")
REMOTE = """
import runpy, sys
sys.modules["hf_lowrank"] = None
project, task, *sys.argv = sys.argv[1:]
try:
    runpy.run_path(sys.argv[0], run_name="__main__")
except SystemExit as ending:
    assert not ending.code
sys.path.append(project)
from pathlib import Path
from tests.support.lm_eval_task import accuracy
folder = sys.argv[sys.argv.index("--output_dir") + 1]
print(accuracy(f"pretrained={folder},trust_remote_code=True", Path(task)))
"""


def command(folder: Path, text: Path, output: Path, *more: str) -> list[str]:
    """Return the script with its arguments."""
    options = ["--model_name_or_path", folder, "--train_file", text, "--validation_file", text, "--output_dir", output]
    options += [
        "--do_train",
        "--do_eval",
        "--max_steps",
        "4",
        "--save_steps",
        "2",
        "--eval_strategy",
        "steps",
        "--eval_steps",
        "2",
    ]
    options += [
        "--per_device_train_batch_size",
        "4",
        "--learning_rate",
        "1e-3",
        "--use_cpu",
        "--report_to",
        "none",
        *more,
    ]
    return [str(part) for part in (SCRIPT, *options)]


@pytest.fixture(scope="module")
def runs(
    checkpoints: dict[str, Path], text_file: Path, prepared: Prepared, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Path, HubServer, Path, float]:
    """Run the script by the plugin, and by remote code, which pushes while it trains and then runs lm-eval."""
    root, folder = tmp_path_factory.mktemp("clm"), checkpoints["bitmask and signs"]
    prepared.run(command(folder, text_file, root / "plugin"), root)
    pushing = ["--trust_remote_code", "--push_to_hub", "--hub_model_id", "tester/tuned"]
    task = write_task(root)
    with HubServer(root / "hub") as hub:
        # The package may be registered as installed, and is not found there.
        without_package = {"PYTHONPATH": "", "TORCH_DEVICE_BACKEND_AUTOLOAD": "0"}
        environment = hub.environment(root / "home", WRITE_TOKEN) | {"OMP_NUM_THREADS": "1"} | without_package
        remote = [
            sys.executable,
            "-c",
            REMOTE,
            str(PROJECT),
            str(task),
            *command(folder, text_file, root / "remote", *pushing),
        ]
        done = subprocess.run(
            remote, cwd=root, env=environment, capture_output=True, text=True, timeout=300, check=False
        )
        assert done.returncode == 0, done.stderr[-3000:]
    return root, hub, task, float(done.stdout.splitlines()[-1])


def test_both_routes_train_alike_and_leave_whole_folders(
    runs: tuple[Path, HubServer, Path, float], checkpoints: dict[str, Path]
) -> None:
    root, *_ = runs
    results = [
        [json.loads((root / route / f"{of}_results.json").read_text()) for of in ("train", "eval")]
        for route in ("plugin", "remote")
    ]
    assert results[0][0]["train_loss"] == results[1][0]["train_loss"]
    assert results[0][1]["perplexity"] == results[1][1]["perplexity"] > 1
    masks = pattern(AutoModelForCausalLM.from_pretrained(checkpoints["bitmask and signs"]))
    for route in ("plugin", "remote"):
        for folder in (root / route, root / route / "checkpoint-2", root / route / "checkpoint-4"):
            check_complete(folder)
            assert same(pattern(AutoModelForCausalLM.from_pretrained(folder)), masks)
            assert AutoTokenizer.from_pretrained(folder).eos_token == "</s>"


def test_every_commit_of_the_training_opens_by_remote_code(runs: tuple[Path, HubServer, Path, float]) -> None:
    root, hub, *_ = runs
    repository = Repository(hub.root / "tester" / "tuned")
    commits = [commit for commit in repository.history("main") if commit.title != "initial commit"]
    assert any(commit.title.startswith("Training in progress") for commit in commits)
    for commit in commits:
        assert {"config.json", "model.safetensors", "tokenizer.json", LOADING_CODE} <= commit.files.keys(), (
            commit.title
        )
    assert "hf_lowrank" in ModelCard.load(root / "remote" / "README.md").data.tags


def test_lm_eval_finds_the_same_on_both_routes(runs: tuple[Path, HubServer, Path, float]) -> None:
    root, _, task, by_remote_code = runs
    assert accuracy(f"pretrained={root / 'remote'}", task) == by_remote_code
