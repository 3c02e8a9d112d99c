"""A checkpoint opens with the package or with the code that it carries, and never as noise."""

import importlib.util
import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from hf_lowrank.runtime.checksums import LOADING_CODE
from hf_lowrank.runtime.reports import REPORT_FILE
from tests.support.assets import PROJECT
from tests.support.fresh_process import open_elsewhere

from .conftest import Checkpoint, answer

REMOTE = {"trust_remote_code": True}
"""Arguments of `from_pretrained` with which a checkpoint may bring its own code."""


def test_the_auto_map_names_the_config_and_every_class_that_can_open_it(slab: Checkpoint) -> None:
    auto_map = json.loads((slab.folder / "config.json").read_text())["auto_map"]
    assert {"AutoConfig", "AutoModel", "AutoModelForCausalLM", "AutoModelForSequenceClassification"} <= auto_map.keys()
    assert all(entry == f"modeling_hf_lowrank.Compressed{name}" for name, entry in auto_map.items())


@pytest.mark.parametrize("method", ["slab", "sola", "svd", "gpt2"])
def test_every_layer_stores_a_weight_that_no_dense_layer_can_take(method: str, request: pytest.FixtureRequest) -> None:
    """This shape makes a load without the plugin fail."""
    model = request.getfixturevalue(method).model
    for name in model.config.quantization_config.layers:
        layer = model.get_submodule(name)
        shape = (layer.out_features, layer.in_features)
        assert layer.weight.shape not in (shape, shape[::-1])


def test_a_checkpoint_opens_without_the_package_by_its_own_code_alone(
    slab: Checkpoint, sola: Checkpoint, svd: Checkpoint, gpt2: Checkpoint, tmp_path: Path
) -> None:
    """All is tried in one process.

    At first it does not know the format. Then two checkpoints bring their code, and are saved and opened again.
    """
    checkpoints = (slab, sola, svd, gpt2)
    unprepared = [{"folder": str(checkpoint.folder)} for checkpoint in checkpoints]
    config = {"folder": str(slab.folder), "auto_class": "AutoConfig", "arguments": REMOTE}
    remote = []
    for checkpoint in (slab, gpt2):
        task = {"folder": str(checkpoint.folder), "arguments": REMOTE}
        remote.append(task | {"save_to": str(tmp_path / checkpoint.folder.name)})
    base = {"folder": str(slab.folder), "auto_class": "AutoModel", "arguments": REMOTE}
    reopened = [{"folder": task["save_to"], "arguments": REMOTE} for task in remote]
    home = tmp_path / "home"
    home.mkdir()
    answers = open_elsewhere([*unprepared, config, *remote, base, *reopened], home, installed=False, imported=False)

    for refused in answers[:4]:
        assert refused["error"] == "RuntimeError", refused
    assert answers[4]["class"].endswith("LlamaConfig")
    for opened, checkpoint in zip((*answers[5:7], *answers[8:]), (slab, gpt2) * 2, strict=True):
        assert opened["class"].rpartition(".")[2] == type(checkpoint.model).__name__, opened
        assert all(module.startswith("transformers_modules.") for module in opened["layers"])
        assert torch.equal(torch.tensor(opened["logits"]), checkpoint.logits.flatten())
        assert opened["report"] == json.loads((checkpoint.folder / REPORT_FILE).read_text())
    assert answers[7]["class"].endswith(".LlamaModel")

    for task, checkpoint in zip(remote, (slab, gpt2), strict=True):
        saved = Path(task["save_to"])
        for file in ("model.safetensors", LOADING_CODE):
            assert (saved / file).read_bytes() == (checkpoint.folder / file).read_bytes()
        assert torch.equal(answer(AutoModelForCausalLM.from_pretrained(saved)), checkpoint.logits)


@pytest.mark.parametrize("imported", [False, True], ids=["found", "imported"])
def test_the_package_is_used_where_it_is_installed(
    slab: Checkpoint, gpt2: Checkpoint, tmp_path: Path, imported: bool
) -> None:
    tasks = [{"folder": str(checkpoint.folder), "arguments": REMOTE} for checkpoint in (slab, gpt2)]
    answers = open_elsewhere(tasks, tmp_path, installed=True, imported=imported)
    for opened, checkpoint in zip(answers, (slab, gpt2), strict=True):
        assert opened["class"].rpartition(".")[2] == type(checkpoint.model).__name__, opened
        assert opened["layers"] == ["hf_lowrank.runtime.layers"]
        assert torch.equal(torch.tensor(opened["logits"]), checkpoint.logits.flatten())


def test_importing_the_package_imports_no_more_than_it_needs() -> None:
    """Beyond torch and transformers, it imports nothing that only compressing, training or the command line uses."""
    heavy = ["accelerate", "datasets", "lm_eval", "matplotlib", "pandas", "peft", "rich", "scipy", "sklearn"]
    heavy += ["triton", "trl", "typer"]
    code = (
        "import sys, torch, transformers\n"
        "before = set(sys.modules)\n"
        "import hf_lowrank\n"
        f"print(sorted({{name.partition('.')[0] for name in set(sys.modules) - before}} & set({heavy!r})))"
    )
    finished = subprocess.run(
        [sys.executable, "-c", code], cwd=PROJECT, capture_output=True, text=True, timeout=120, check=True
    )
    assert finished.stdout.strip() == "[]"
    assert importlib.util.find_spec("datasets") is not None  # else its absence above would say nothing
