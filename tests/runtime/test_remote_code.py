"""A checkpoint opens with the package or with the code that it carries, and never as noise."""

import importlib.util
import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM
from transformers.quantizers.auto import AUTO_QUANTIZER_MAPPING

from hf_lowrank import CheckpointError, __version__
from hf_lowrank.checkpoints.loading_code import runtime_sources
from hf_lowrank.checkpoints.verify import verify
from hf_lowrank.publishing.hub import check_complete
from hf_lowrank.runtime.checksums import LOADING_CODE, file_checksum
from hf_lowrank.runtime.quantizer import CompressionQuantizer
from hf_lowrank.runtime.reports import REPORT_FILE
from tests.support.assets import PROJECT
from tests.support.fresh_process import INPUT_IDS, open_elsewhere
from tests.support.hub_server import READ_TOKEN, HubServer
from tests.support.hub_storage import Repository

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
    tampered = {"folder": str(with_changed_code(slab, tmp_path)), "arguments": REMOTE}
    newer = {"folder": str(of_a_newer_format(slab, tmp_path)), "arguments": REMOTE}
    unprepared = [{"folder": str(checkpoint.folder)} for checkpoint in checkpoints]
    config = {"folder": str(slab.folder), "auto_class": "AutoConfig", "arguments": REMOTE}
    remote = []
    for checkpoint in (slab, gpt2):
        task = {"folder": str(checkpoint.folder), "arguments": REMOTE}
        remote.append(task | {"save_to": str(tmp_path / checkpoint.folder.name)})
    base = {"folder": str(slab.folder), "auto_class": "AutoModel", "arguments": REMOTE}
    reopened = [{"folder": task["save_to"], "arguments": REMOTE} for task in remote]
    nested = {"folder": str(in_a_subfolder(slab, tmp_path)), "arguments": REMOTE | {"subfolder": "inner"}}
    home = tmp_path / "home"
    home.mkdir()
    tasks = [*unprepared, tampered, config, *remote, base, *reopened, nested, newer]
    answers = open_elsewhere(tasks, home, installed=False, imported=False)

    for refused in answers[:4]:
        assert refused["error"] == "RuntimeError", refused
    for refused, words in (
        (answers.pop(4), f"{LOADING_CODE}: sha256 is"),
        (answers.pop(), "needs a newer hf_lowrank"),
    ):
        assert refused["error"] == "CheckpointError" and words in refused["message"], refused
        assert "\n" not in refused["message"]
    assert answers[4]["class"].endswith("LlamaConfig")
    for opened, checkpoint in zip((*answers[5:7], *answers[8:]), (slab, gpt2, slab, gpt2, slab), strict=True):
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


def with_changed_code(checkpoint: Checkpoint, folder: Path) -> Path:
    """Copy a checkpoint, with one line more in its code."""
    copied = Path(shutil.copytree(checkpoint.folder, folder / "tampered"))
    with (copied / LOADING_CODE).open("a") as code:
        code.write("# one more line\n")
    return copied


def in_a_subfolder(checkpoint: Checkpoint, folder: Path) -> Path:
    """Return a folder that holds a checkpoint in a subfolder, and its code, where transformers looks for that."""
    shutil.copytree(checkpoint.folder, folder / "nested" / "inner")
    shutil.copyfile(checkpoint.folder / LOADING_CODE, folder / "nested" / LOADING_CODE)
    return folder / "nested"


def of_a_newer_format(checkpoint: Checkpoint, folder: Path) -> Path:
    """Copy a checkpoint, as if it were of a format to come."""
    copied = Path(shutil.copytree(checkpoint.folder, folder / "newer"))
    values = json.loads((copied / "config.json").read_text())
    values["quantization_config"]["format_version"] = 99
    (copied / "config.json").write_text(json.dumps(values))
    return copied


def executed(file: Path, name: str) -> Any:
    """Execute the code of a checkpoint as transformers does, in this process, where the package is."""
    spec = importlib.util.spec_from_file_location(name, file)
    assert spec is not None and spec.loader is not None
    module = sys.modules[name] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_code_that_differs_from_its_checksum_refuses_itself(slab: Checkpoint, tmp_path: Path) -> None:
    """Ends of lines are no difference, as git may change them. Whoever changes the code deletes its checksum."""
    config = json.loads((slab.folder / "config.json").read_text())
    unrecorded = json.loads(json.dumps(config))
    del unrecorded["quantization_config"]["checksums"][LOADING_CODE]
    code = (slab.folder / LOADING_CODE).read_bytes()
    with_other_ends = tmp_path / "windows.py"
    with_other_ends.write_bytes(code.replace(b"\n", b"\r\n"))
    for file in (slab.folder / LOADING_CODE, with_other_ends):
        same = executed(file, f"same_{file.stem}")
        same._check_own_code(config)
        assert same.loading_code() == code
    changed = executed(with_changed_code(slab, tmp_path) / LOADING_CODE, "changed")
    with pytest.raises(changed.CheckpointError, match="sha256 is .* delete its line under checksums in config.json"):
        changed._check_own_code(config)
    changed._check_own_code(unrecorded)
    # Where the package is, its operations and its entries are the ones that stay.
    assert AUTO_QUANTIZER_MAPPING["hf_lowrank"] is CompressionQuantizer


def test_a_newer_format_is_one_line_with_the_package(slab: Checkpoint, tmp_path: Path) -> None:
    for arguments in ({}, REMOTE):
        folder = of_a_newer_format(slab, tmp_path / str(len(arguments)))
        with pytest.raises(CheckpointError, match="^[^\n]*format_version.*needs a newer hf_lowrank[^\n]*$"):
            AutoModelForCausalLM.from_pretrained(folder, **arguments)


def of_many_files(checkpoint: Checkpoint, folder: Path) -> Path:
    """Copy a checkpoint, with its code in one file for every module, as it was before there was one for all."""
    copied = Path(shutil.copytree(checkpoint.folder, folder / "many"))
    sources = {f"{name}.py": text for name, text in runtime_sources().items()}
    for name, text in sources.items():
        (copied / name).write_text(text, encoding="utf-8")
    values = json.loads((copied / "config.json").read_text())
    sums = {name: file_checksum(copied / name) for name in sources}
    values["quantization_config"]["checksums"].update(sums)
    (copied / "config.json").write_text(json.dumps(values))
    return copied


def test_checkpoints_with_many_files_of_code_are_as_good_as_ever(
    slab: Checkpoint, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    many = of_many_files(slab, tmp_path)
    (home := tmp_path / "home").mkdir()
    (opened,) = open_elsewhere([{"folder": str(many), "arguments": REMOTE}], home, installed=False, imported=False)
    assert torch.equal(torch.tensor(opened["logits"]), slab.logits.flatten()), opened
    assert opened["layers"][0].endswith(".layers")
    assert torch.equal(answer(AutoModelForCausalLM.from_pretrained(many)), slab.logits)

    # Its files are known as those of a release, or else told to be unknown.
    files = {file.name: file_checksum(file) for file in many.glob("*.py")}
    assert len(files) > 20 and [problem for problem in verify(many).problems if LOADING_CODE in problem]
    monkeypatch.setattr("hf_lowrank.checkpoints.verify.released_runtimes", lambda: {"0": files, __version__: {}})
    assert verify(many).problems == [] and verify(many).runtime == "hf_lowrank 0"
    monkeypatch.undo()
    check_complete(many)

    # A save into the same folder leaves the one file, and what is the user's own.
    (many / "mine.py").write_text("mine = 1\n")
    (many / "layers.py").write_text("changed = 1\n")
    with pytest.raises(CheckpointError, match="ops.py: missing"):
        (many / "ops.py").unlink()
        check_complete(many)
    AutoModelForCausalLM.from_pretrained(many).save_pretrained(many)
    assert {file.name for file in many.glob("*.py")} == {LOADING_CODE, "mine.py", "layers.py"}
    assert verify(many).problems == []


FROM_THE_HUB = """
import logging, pickle, sys
sys.modules["hf_lowrank"] = None
import torch, transformers
from torch.utils.data import DataLoader
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM

told = []
class Listener(logging.Handler):
    def emit(self, record):
        if "new version of the following files" in record.getMessage(): told.append(record.getMessage())
logging.getLogger("transformers").addHandler(Listener())
for auto_class in (AutoModelForCausalLM, AutoConfig, AutoModel, AutoModelForCausalLM):
    model = auto_class.from_pretrained("tester/slab", trust_remote_code=True)
print(len(told), told[0].count(".py"))
ids, folder = torch.load(sys.argv[1])
copies = [model, pickle.loads(pickle.dumps(model))]
torch.save(model, folder + "/model.pt")
copies.append(torch.load(folder + "/model.pt", weights_only=False))
print([torch.equal(copy(ids)[0], torch.load(folder + "/logits.pt")) for copy in copies])
layer = model.model.layers[0].mlp.up_proj.requires_grad_(False)
x = torch.ones(1, 64)
(y,) = DataLoader([x], batch_size=None, num_workers=1, multiprocessing_context="spawn", collate_fn=layer)
print(type(layer).__module__.rpartition(".")[2], torch.equal(y, layer(x)))
copies[-1].save_pretrained(folder + "/again")
"""


def test_from_the_hub_there_is_one_file_of_code_and_one_warning(slab: Checkpoint, tmp_path: Path) -> None:
    """The model that comes back can be pickled, computes in spawned processes, and saves the same file of code."""
    torch.save((torch.tensor(INPUT_IDS), str(tmp_path)), tmp_path / "arguments.pt")
    torch.save(slab.logits, tmp_path / "logits.pt")
    with HubServer(tmp_path / "hub") as hub:
        repository = Repository.create(hub.root / "tester/slab", private=False, author="tester")
        files = {file.name: repository.add_blob(file.read_bytes()) for file in slab.folder.iterdir()}
        repository.commit("main", files, title="model", message="", author="tester")
        printed = hub.client(FROM_THE_HUB, tmp_path / "arguments.pt", home=tmp_path / "home", token=READ_TOKEN)
        fetched = {exchange.path.rpartition("/")[2] for exchange in hub.served("GET", r"resolve/.*\.py$")}
    assert printed.splitlines() == ["1 1", "[True, True, True]", "modeling_hf_lowrank True"]
    assert fetched == {LOADING_CODE}
    for name in (LOADING_CODE, "model.safetensors"):
        assert (tmp_path / "again" / name).read_bytes() == (slab.folder / name).read_bytes()


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
