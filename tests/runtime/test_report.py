"""`model.compression_report` is the report of the compression, wherever the model comes from."""

import copy
import json
import pickle
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from transformers import AutoModelForCausalLM, PreTrainedModel

from hf_lowrank import CheckpointError, CompressionConfig, compress
from hf_lowrank.runtime.reports import REPORT_FILE
from hf_lowrank.runtime.saving import CompleteSave

from .conftest import Checkpoint, answer, calibration, tiny_llama

COPIES: dict[str, Callable[[PreTrainedModel], PreTrainedModel]] = {
    "deepcopy": copy.deepcopy,
    "pickle": lambda model: pickle.loads(pickle.dumps(model)),
}


def stored_report(folder: Path) -> dict:
    """Return the report in a checkpoint."""
    return json.loads((folder / REPORT_FILE).read_text())


def test_a_compressed_model_has_the_report_that_it_saves(slab: Checkpoint) -> None:
    report = slab.model.compression_report
    assert report is slab.model.save_pretrained.report
    assert json.loads(json.dumps(report)) == stored_report(slab.folder)


@pytest.mark.parametrize("name", ["slab", "sola", "gpt2"])
def test_a_loaded_model_has_the_report_of_its_checkpoint(name: str, request: pytest.FixtureRequest) -> None:
    checkpoint = request.getfixturevalue(name)
    model = checkpoint.load()
    assert model.compression_report == stored_report(checkpoint.folder)
    assert model.compression_report is model.compression_report  # the file is read once


@pytest.mark.parametrize("copied", COPIES)
def test_a_copy_has_the_report_of_the_model(copied: str, slab: Checkpoint, monkeypatch: pytest.MonkeyPatch) -> None:
    """A process that unpickles a model has never seen a compressed one before."""
    for model in (slab.model, slab.load()):
        twin = COPIES[copied](model)
        assert twin.compression_report == model.compression_report
    parts = pickle.dumps(slab.load())
    monkeypatch.delattr(PreTrainedModel, "compression_report")
    assert pickle.loads(parts).compression_report == stored_report(slab.folder)


def test_a_model_compressed_on_load_has_a_report(tmp_path: Path) -> None:
    tiny_llama().save_pretrained(tmp_path)
    config = CompressionConfig(method="slab", ratio=0.5, samples=2, sequence_length=16)
    model = AutoModelForCausalLM.from_pretrained(tmp_path, quantization_config=config)
    assert len(model.compression_report["layers"]) == len(model.config.quantization_config.layers)


def test_a_checkpoint_without_a_report_gives_an_empty_one(slab: Checkpoint, tmp_path: Path) -> None:
    folder = shutil.copytree(slab.folder, tmp_path / "model")
    (folder / REPORT_FILE).unlink()
    assert AutoModelForCausalLM.from_pretrained(folder).compression_report == {}


@pytest.mark.parametrize("content", ["[]", "{", '"text"'])
def test_a_damaged_report_is_an_error_only_when_it_is_asked_for(
    slab: Checkpoint, tmp_path: Path, content: str
) -> None:
    folder = shutil.copytree(slab.folder, tmp_path / "model")
    (folder / REPORT_FILE).write_text(content)
    model = AutoModelForCausalLM.from_pretrained(folder)
    assert answer(model).equal(slab.logits)
    with pytest.raises(CheckpointError, match=REPORT_FILE):
        _ = model.compression_report


def test_a_dense_model_has_no_report(slab: Checkpoint) -> None:
    assert not hasattr(tiny_llama(), "compression_report")
    assert not hasattr(slab.load().dequantize(), "compression_report")
    with pytest.raises(AttributeError, match="'LlamaForCausalLM' object has no attribute 'compression_report'"):
        _ = tiny_llama().compression_report


@pytest.mark.parametrize("package", [True, False], ids=["package", "runtime alone"])
def test_changing_the_report_of_a_loaded_model_changes_no_save(
    package: bool, slab: Checkpoint, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if not package:
        monkeypatch.setattr(CompleteSave, "publisher", None)
    untouched, touched = tmp_path / "untouched" / "model", tmp_path / "touched" / "model"
    slab.load().save_pretrained(untouched)
    model = slab.load()
    model.compression_report["ratio"] = "changed"
    model.save_pretrained(touched)
    assert {file.name for file in touched.iterdir()} == {file.name for file in untouched.iterdir()}
    for file in untouched.iterdir():
        assert (touched / file.name).read_bytes() == file.read_bytes(), file.name


def test_an_entry_added_after_compressing_is_saved(tmp_path: Path) -> None:
    config = CompressionConfig(method="svd", ratio=0.4, samples=2, sequence_length=16)
    model = compress(tiny_llama(), config, calibration=calibration(2), progress=False)
    model.compression_report["command"] = "hf-lowrank compress"
    model.save_pretrained(tmp_path)
    assert stored_report(tmp_path)["command"] == "hf-lowrank compress"
