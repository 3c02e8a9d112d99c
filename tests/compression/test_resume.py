"""A run killed at any instant and started again gives the same bytes; one that was changed in between is refused."""

import errno
import hashlib
import multiprocessing
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import PreTrainedModel

from hf_lowrank import CompressionConfig, CompressionError, compress
from hf_lowrank.compression import soco_training as spectrum_training
from hf_lowrank.execution import work_folder
from hf_lowrank.execution.work_folder import Record, WorkFolder

from ..support import tiny_models
from ..support.model_families import FAMILIES

IDS = tiny_models.token_ids(4, 24).tolist()
RECIPES: dict[str, dict[str, Any]] = {
    "slab": {"iterations": 2},
    "svd-llm": {"update": True},
    "sola": {"skip_blocks": 0},
    "soco": {"steps": 6, "finish_steps": 2, "batch_tokens": 64},
    "lowrank": {},
    "auto": {},
}
REFINED = ["slab", "sola", "lowrank"]


class Killed(BaseException):
    """Stands for a process that ends."""


def recipe(method: str, **changes: Any) -> CompressionConfig:
    fields = {"ratio": 0.4, "options": RECIPES.get(method, {}), "samples": 4, "sequence_length": 24, **changes}
    return CompressionConfig(method=method, **fields)


def digests(folder: Path) -> dict[str, str]:
    return {file.name: hashlib.sha256(file.read_bytes()).hexdigest() for file in sorted(folder.iterdir())}


def saved(model: PreTrainedModel, folder: Path) -> dict[str, str]:
    model.save_pretrained(folder / "model")  # whose name is in the card
    return digests(folder / "model")


def killing(monkeypatch: pytest.MonkeyPatch, after: int, complete: bool) -> list[str]:
    """Let a run die in the write of a record, before or after it got its name; the names of those written."""
    written: list[str] = []
    usual = WorkFolder.write

    def write(self: WorkFolder, name: str, record: Record) -> None:
        if len(written) == after and not complete:
            raise Killed
        usual(self, name, record)
        written.append(name)
        if len(written) == after + 1 and complete:
            raise Killed

    monkeypatch.setattr(WorkFolder, "write", write)
    return written


@pytest.mark.parametrize(
    ("method", "steps"), [*((method, 0) for method in RECIPES), *((method, 3) for method in REFINED)]
)
def test_a_run_killed_at_every_record_goes_on_to_the_same_bytes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, method: str, steps: int
) -> None:
    monkeypatch.setattr(spectrum_training, "STATE_EVERY", 3)
    config = recipe(method, refinement_steps=steps)
    expected = saved(compress(tiny_models.llama(), config, calibration=IDS), tmp_path / "whole")
    work = tmp_path / "work"
    kills = 0
    for complete in (False, True):
        for _ in range(
            20
        ):  # each attempt comes one block further than the one before: its next inputs, and then itself
            with monkeypatch.context() as patch:
                killing(patch, 1 if complete else 2, complete)
                try:
                    resumed = compress(tiny_models.llama(), config, calibration=IDS, work_dir=work)
                    break
                except Killed:
                    kills += 1
        assert saved(resumed, tmp_path / f"resumed-{complete}") == expected
        with WorkFolder(work) as folder:
            folder.clear()
    assert kills >= 6


def test_a_decoder_that_reads_a_compressed_encoder_goes_on_too(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    family = FAMILIES["T5"]
    config = recipe("slab", sequence_length=12)
    expected = saved(compress(family.make(), config, calibration=family.batches()), tmp_path / "whole")
    for after in (1, 5, 7):
        with monkeypatch.context() as patch, pytest.raises(Killed):
            killing(patch, after, complete=True)
            compress(family.make(), config, calibration=family.batches(), work_dir=tmp_path / "work")
        resumed = compress(family.make(), config, calibration=family.batches(), work_dir=tmp_path / "work")
        assert saved(resumed, tmp_path / f"resumed-{after}") == expected
        with WorkFolder(tmp_path / "work") as folder:
            folder.clear()


def test_what_is_finished_is_not_done_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as patch, pytest.raises(Killed):
        killing(patch, 5, complete=True)
        compress(tiny_models.llama(), recipe("slab"), calibration=IDS, work_dir=tmp_path)
    written = killing(monkeypatch, 100, complete=False)
    compress(tiny_models.llama(), recipe("slab"), calibration=IDS, work_dir=tmp_path)
    assert written == ["built-inputs-00004", "built-00003"]


@pytest.mark.parametrize(
    ("model", "config", "ids", "changed"),
    [
        (tiny_models.llama(seed=1), recipe("slab"), IDS, "weights"),
        (tiny_models.llama(), recipe("slab", ratio=0.45), IDS, "config.ratio (then 0.4, now 0.45)"),
        (
            tiny_models.llama(),
            recipe("slab", options={"iterations": 3}),
            IDS,
            "config.options.iterations (then 2, now 3)",
        ),
        (tiny_models.llama(), recipe("slab"), tiny_models.token_ids(4, 24, seed=1).tolist(), "calibration"),
    ],
)
def test_a_changed_input_is_refused_by_its_name(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    model: PreTrainedModel,
    config: CompressionConfig,
    ids: list[list[int]],
    changed: str,
) -> None:
    with monkeypatch.context() as patch, pytest.raises(Killed):
        killing(patch, 3, complete=True)
        compress(tiny_models.llama(), recipe("slab"), calibration=IDS, work_dir=tmp_path)
    with pytest.raises(CompressionError) as refused:
        compress(model, config, calibration=ids, work_dir=tmp_path)
    assert f"other {changed}" in str(refused.value)
    compress(tiny_models.llama(), recipe("slab"), calibration=IDS, work_dir=tmp_path)  # the refusal cost nothing
    compress(model, config, calibration=ids, work_dir=tmp_path)  # a folder whose run is finished is free for another


def test_another_version_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as patch, pytest.raises(Killed):
        killing(patch, 0, complete=True)
        compress(tiny_models.llama(), recipe("slab"), calibration=IDS, work_dir=tmp_path)
    monkeypatch.setattr("hf_lowrank.version.__version__", "0.0.0")
    with pytest.raises(CompressionError, match=r"other versions\.hf_lowrank .*now '0\.0\.0'"):
        compress(tiny_models.llama(), recipe("slab"), calibration=IDS, work_dir=tmp_path)


def test_a_folder_is_for_one_run_at_a_time(tmp_path: Path) -> None:
    with WorkFolder(tmp_path), pytest.raises(CompressionError, match="another process is working in it"):
        compress(tiny_models.llama(), recipe("slab"), calibration=IDS, work_dir=tmp_path)
    holder = multiprocessing.get_context("fork").Process(target=_hold, args=(tmp_path,))
    holder.start()
    while not (tmp_path / "held").exists():
        time.sleep(0.01)
    with pytest.raises(CompressionError, match="another process is working in it"):
        WorkFolder(tmp_path)
    holder.kill()
    holder.join()
    with WorkFolder(tmp_path):  # a dead process holds no lock
        pass


def _hold(folder: Path) -> None:
    with WorkFolder(folder):
        (folder / "held").touch()
        time.sleep(60)


def test_a_full_disk_loses_nothing_that_was_finished(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    expected = saved(compress(tiny_models.llama(), recipe("slab"), calibration=IDS), tmp_path / "whole")
    writes: list[Path] = []

    def full(tensors: dict[str, torch.Tensor], file: Path, metadata: dict[str, str]) -> None:
        writes.append(file)
        if len(writes) == 4:
            file.write_bytes(b"half of it")
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        save_file(tensors, file, metadata)

    work = tmp_path / "work"
    with (
        monkeypatch.context() as patch,
        pytest.raises(CompressionError, match=r"cannot be written \(No space left on device\)"),
    ):
        patch.setattr(work_folder, "save_file", full)
        compress(tiny_models.llama(), recipe("slab"), calibration=IDS, work_dir=work)
    assert {file.name for file in work.iterdir()} == {"run.json", "built-00000.safetensors", "built-inputs-00001.safetensors",
                                                      "built-inputs-00002.safetensors"}  # fmt: skip
    assert (
        saved(compress(tiny_models.llama(), recipe("slab"), calibration=IDS, work_dir=work), tmp_path / "resumed")
        == expected
    )


def one_bit(file: Path) -> None:
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(content)


@pytest.mark.parametrize(
    "damage",
    [
        lambda file: file.write_bytes(b"damaged"),
        one_bit,
        lambda file: shutil.copy(file.with_name("built-00002.safetensors"), file),
        lambda file: save_file(load_file(file), file, {"facts": "{}"}),
    ],
    ids=["no safetensors", "one bit", "that of another block", "other facts"],
)
def test_a_damaged_record_is_named(tmp_path: Path, damage: Callable[[Path], Any]) -> None:
    """It cannot be made again: the inputs of its block are gone, once it is finished."""
    compress(tiny_models.llama(), recipe("slab"), calibration=IDS, work_dir=tmp_path)
    damage(tmp_path / "built-00001.safetensors")
    with pytest.raises(CompressionError, match=r"built-00001\.safetensors: is damaged \(.*\); delete .* starts over"):
        compress(tiny_models.llama(), recipe("slab"), calibration=IDS, work_dir=tmp_path)


def test_a_missing_record_is_named(tmp_path: Path) -> None:
    compress(tiny_models.llama(), recipe("slab"), calibration=IDS, work_dir=tmp_path)
    (tmp_path / "built-00001.safetensors").unlink()
    with pytest.raises(CompressionError, match=r"built-inputs-00001\.safetensors: is damaged \(missing"):
        compress(tiny_models.llama(), recipe("slab"), calibration=IDS, work_dir=tmp_path)


@pytest.mark.parametrize("content", ["", "[]", "[" * 100_000, "{"])
def test_a_damaged_identity_is_named(tmp_path: Path, content: str) -> None:
    (tmp_path / "run.json").write_text(content)
    with (
        WorkFolder(tmp_path) as work,
        pytest.raises(CompressionError, match=r"run\.json: cannot be read .* delete the folder"),
    ):
        work.claim({"weights": "a"})


def test_a_killed_command_leaves_no_output_and_goes_on_to_the_same_files(tmp_path: Path) -> None:
    dense = tiny_models.saved(tiny_models.llama(), tmp_path / "dense")
    words = tmp_path / "words.txt"
    words.write_text("\n".join(tiny_models.text(40)))

    def command(output: str, *more: str) -> list[str]:
        arguments = [
            str(dense),
            "-o",
            output,
            "--calibration",
            str(words),
            "--samples",
            "4",
            "--sequence-length",
            "24",
            *more,
        ]
        return [sys.executable, "-m", "hf_lowrank", "compress", *arguments]

    subprocess.run(command("result"), cwd=_folder(tmp_path / "whole"), check=True, capture_output=True)
    here, work = _folder(tmp_path / "killed"), tmp_path / "killed" / "work"
    options = ["--work-dir", "work"]
    running = subprocess.Popen(
        command("result", *options), cwd=here, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    while not (work / "built-00001.safetensors").exists():
        time.sleep(0.001)
    running.send_signal(signal.SIGKILL)
    running.wait()
    assert not (here / "result").exists()
    subprocess.run(command("result", *options), cwd=here, check=True, capture_output=True)
    expected, found = digests(tmp_path / "whole" / "result"), digests(here / "result")
    for name in ("compression_report.json", "README.md"):  # they name the command, whose options differ
        assert expected.pop(name)
        assert found.pop(name)
    assert found == expected
    assert not work.exists()


def _folder(path: Path) -> Path:
    path.mkdir()
    return path
