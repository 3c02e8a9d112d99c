"""A save is complete or leaves everything as it was, and says so if it makes a checkpoint larger than it need be."""

import logging
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoConfig, PreTrainedModel, modeling_utils

from hf_lowrank import CompressionConfig, CompressionError, compress
from hf_lowrank.runtime import saving, staging
from hf_lowrank.runtime.companions import Companions
from tests.support.files import digests

from .conftest import Checkpoint, answer, calibration, tiny_llama


def full_disk(*_: Any, **__: Any) -> None:
    raise OSError(28, "No space left on device")


class SafetensorError(Exception):
    """Stands for the error of that name, by which safetensors reports a full disk."""


def full_disk_of_safetensors(*_: Any, **__: Any) -> None:
    raise SafetensorError("I/O error: No space left on device (os error 28)")


def interrupted(*_: Any, **__: Any) -> None:
    raise KeyboardInterrupt


PLACES: dict[str, tuple[Any, str]] = {
    "weights": (modeling_utils, "safe_save_file"),
    "what lies beside them": (Companions, "write"),
    "loading code": (saving, "write_loading_code"),
    "checksums": (saving, "record_checksums"),
    "card": (saving.CompleteSave, "write_card"),
}
"""Functions that each write a part of a checkpoint."""


@pytest.mark.parametrize("fault", [full_disk, full_disk_of_safetensors, interrupted])
@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("occupied", [True, False], ids=["over another", "new"])
def test_a_save_that_fails_leaves_everything_as_it_was(
    occupied: bool,
    place: str,
    fault: Callable[..., None],
    slab: Checkpoint,
    svd: Checkpoint,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    folder = tmp_path / "parent" / "model"
    if occupied:
        svd.load().save_pretrained(folder)
        (folder / "notes.txt").write_text("mine")
    before = digests(tmp_path)
    model = slab.load()
    monkeypatch.setattr(*PLACES[place], fault)
    with pytest.raises(KeyboardInterrupt if fault is interrupted else CompressionError) as raised:
        model.save_pretrained(folder, max_shard_size="20KB")
    monkeypatch.undo()
    if fault is not interrupted:
        assert str(folder) in str(raised.value) and "No space left on device" in str(raised.value)
        assert isinstance(raised.value, OSError)
    assert digests(tmp_path) == before
    assert (tmp_path / "parent").exists() == occupied
    model.save_pretrained(folder)
    assert not list(folder.glob(f"{staging.PREFIX}*"))
    assert answer(type(model).from_pretrained(folder)).equal(answer(model))


@pytest.mark.parametrize("place", ["a file", "below a file", "read-only"])
def test_a_folder_that_cannot_be_is_refused_in_one_line(
    place: str, slab: Checkpoint, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "file"
    file.write_text("mine")
    folder = {"a file": file, "below a file": file / "model", "read-only": tmp_path / "model"}[place]
    if place == "read-only":  # whoever runs the tests may be allowed to write everywhere

        def refuse(*_: Any, **__: Any) -> str:
            raise PermissionError(13, "Permission denied")

        monkeypatch.setattr(staging.tempfile, "mkdtemp", refuse)
    with pytest.raises(CompressionError, match="cannot be saved") as raised:
        slab.load().save_pretrained(folder)
    assert str(folder) in str(raised.value) and "\n" not in str(raised.value)
    assert [entry.name for entry in tmp_path.iterdir()] == ["file"] and file.read_text() == "mine"


def test_what_a_killed_save_has_left_is_removed_a_day_later(slab: Checkpoint, tmp_path: Path) -> None:
    for name, age in (("old", 2 * staging.ABANDONED), ("young", 0)):
        left = tmp_path / f"{staging.PREFIX}{name}"
        left.mkdir()
        os.utime(left, (left.stat().st_mtime - age,) * 2)
    slab.load().save_pretrained(tmp_path)
    assert [entry.name for entry in tmp_path.glob(".*")] == [f"{staging.PREFIX}young"]


FLOATS = [torch.float16, torch.bfloat16, torch.float32, torch.float64]


@pytest.mark.parametrize("opened", FLOATS[:3], ids=str)
@pytest.mark.parametrize("compressed", FLOATS[:3], ids=str)
def test_a_save_warns_exactly_if_its_dtype_is_wider_than_that_of_the_model(
    compressed: torch.dtype, opened: torch.dtype, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """The model as it was compressed, or as it was loaded, and however it is saved."""

    def warned(model: PreTrainedModel, name: str, **options: Any) -> bool:
        caplog.clear()
        model.save_pretrained(tmp_path / name, **options)
        lines = [record.message for record in caplog.records if "saved in" in record.message]
        assert len(lines) <= 1
        if lines:
            assert "model.to(torch." in lines[0]
        return bool(lines)

    caplog.set_level(logging.WARNING)
    config = CompressionConfig("magnitude", 0.4)
    model = compress(
        tiny_llama(num_hidden_layers=1).to(compressed), config, calibration=calibration(1), progress=False
    )
    assert not warned(model, "compressed")
    for dtype in FLOATS[:3]:
        assert warned(model.to(dtype), "cast") == (dtype.itemsize > compressed.itemsize)
    model = type(model).from_pretrained(tmp_path / "compressed", dtype=opened)
    wider = opened.itemsize > compressed.itemsize
    assert warned(model, "trained") == wider
    assert warned(model, "state", state_dict=model.state_dict()) == wider
    # It stays wider, wherever it goes, until it is cast as the warning says.
    again = type(model).from_pretrained(tmp_path / "trained")
    assert warned(again, "again") == wider
    assert not warned(again.to(compressed if wider else opened), "cured")
    # A narrow checkpoint of a wide model is what it was loaded from.
    narrow = type(model).from_pretrained(tmp_path / "cured", dtype=torch.float64)
    assert warned(narrow, "wide")


@pytest.mark.parametrize("origin", ["made", "of a state dict", "compressed, of a state dict"])
def test_a_model_that_comes_from_no_place_asks_for_nothing_and_names_none(
    origin: str, svd: Checkpoint, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    model = tiny_llama()
    if origin == "of a state dict":
        model = type(model).from_pretrained(None, config=model.config, state_dict=model.state_dict())
    if origin.startswith("compressed"):
        config = AutoConfig.from_pretrained(svd.folder)
        model = type(model).from_pretrained(None, config=config, state_dict=svd.model.state_dict())
        assert torch.equal(answer(model), answer(svd.model))
    else:
        recipe = CompressionConfig("magnitude", 0.4, samples=2, sequence_length=16)
        compress(model, recipe, calibration=torch.ones(2, 16, dtype=torch.long), progress=False)
        assert model.config.quantization_config.provenance["base_model"] == ""
    model.save_pretrained(tmp_path)
    assert "None" not in caplog.text
    assert "`None`" not in (tmp_path / "README.md").read_text(encoding="utf-8")
    assert not (tmp_path / "tokenizer.json").exists()
