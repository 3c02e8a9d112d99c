"""A run that is killed at any instant and started again gives the same bytes. A changed run is refused."""

import errno
import multiprocessing
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import PreTrainedModel

from hf_lowrank import CompressionConfig, CompressionError, compress
from hf_lowrank.compression import soco_training
from hf_lowrank.execution import work_folder
from hf_lowrank.execution.work_folder import Record, WorkFolder
from hf_lowrank.methods import Statistics, registry
from hf_lowrank.methods.registry import register_method
from hf_lowrank.methods.svd import SVD

from ..support import tiny_models
from ..support.files import digests
from ..support.model_families import FAMILIES

IDS = tiny_models.token_ids(4, 24).tolist()
RECIPES: dict[str, dict[str, Any]] = {
    "slab": {"iterations": 2},
    "svd-llm": {"update": True},
    "sola": {"skip_blocks": 0},
    "soco": {"steps": 6, "finish_steps": 2, "batch_tokens": 64},
    "fwsvd": {},
    "lowrank": {},
    "auto": {},
}
REFINED = ["slab", "sola", "lowrank"]
"""Methods that are tried with refinement too, one of every strategy."""


class Killed(BaseException):
    """Stands for a process that ends."""


def recipe(method: str, **changes: Any) -> CompressionConfig:
    fields = {"ratio": 0.4, "options": RECIPES.get(method, {}), "samples": 4, "sequence_length": 24, **changes}
    return CompressionConfig(method=method, **fields)


def saved(model: PreTrainedModel, folder: Path) -> dict[str, str]:
    """Save a model and return the digests of its files. The card names the folder, which is always called "model"."""
    model.save_pretrained(folder / "model")
    return digests(folder / "model")


def killing(monkeypatch: pytest.MonkeyPatch, after: int, complete: bool) -> list[str]:
    """Let a run die while it writes a record, and return the list of the records written, which grows as it goes on.

    Args:
        after: number of the records that are written before.
        complete: whether the record is complete when the run dies; otherwise it has not begun.
    """
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
    monkeypatch.setattr(soco_training, "STEPS_BETWEEN_STATES", 3)
    config = recipe(method, refinement_steps=steps)
    expected = saved(compress(tiny_models.llama(num_hidden_layers=3), config, calibration=IDS), tmp_path / "whole")
    work = tmp_path / "work"
    kills = 0
    for complete in (False, True):
        # Every attempt comes one block further than the one before: to its next inputs, and then to itself.
        for _ in range(20):
            with monkeypatch.context() as patch:
                killing(patch, 1 if complete else 2, complete)
                try:
                    resumed = compress(tiny_models.llama(num_hidden_layers=3), config, calibration=IDS, work_dir=work)
                    break
                except Killed:
                    kills += 1
        assert saved(resumed, tmp_path / f"resumed-{complete}") == expected
        with WorkFolder(work) as folder:
            folder.clear()
    assert kills >= 4  # two or more of both kinds


@dataclass
class Ordered(SVD):
    """A layerwise method that wants the neurons of feed-forward networks in another order."""

    def neuron_order(self, statistics: Statistics, weight: Tensor) -> Tensor:
        return statistics.mean_abs.argsort(descending=True)


def test_a_layerwise_method_that_orders_neurons_goes_on_to_the_same_bytes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The report of the refinement compares layers with those of the dense model, whose neurons get the order, too."""
    with monkeypatch.context() as patch:
        patch.setattr(registry, "_methods", {**registry._methods})
        register_method("ordered")(Ordered)
        config = recipe("ordered", refinement_steps=2)
        expected = saved(compress(tiny_models.llama(), config, calibration=IDS), tmp_path / "whole")
        with patch.context() as killed, pytest.raises(Killed):
            killing(killed, 3, complete=True)
            compress(tiny_models.llama(), config, calibration=IDS, work_dir=tmp_path / "work")
        resumed = compress(tiny_models.llama(), config, calibration=IDS, work_dir=tmp_path / "work")
        assert saved(resumed, tmp_path / "resumed") == expected


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
    assert written == ["built-inputs-00004", "built-00003"]  # only the last of the four blocks


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
    assert f"differs in {changed}" in str(refused.value)
    compress(tiny_models.llama(), recipe("slab"), calibration=IDS, work_dir=tmp_path)  # the refusal cost nothing
    compress(model, config, calibration=ids, work_dir=tmp_path)  # a folder whose run is finished is free for another


def test_another_version_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as patch, pytest.raises(Killed):
        killing(patch, 0, complete=True)
        compress(tiny_models.llama(), recipe("slab"), calibration=IDS, work_dir=tmp_path)
    monkeypatch.setattr("hf_lowrank.version.__version__", "0.0.0")
    with pytest.raises(CompressionError, match=r"differs in versions\.hf_lowrank .*now '0\.0\.0'"):
        compress(tiny_models.llama(), recipe("slab"), calibration=IDS, work_dir=tmp_path)


def test_a_work_folder_serves_one_run_at_a_time(tmp_path: Path) -> None:
    with WorkFolder(tmp_path), pytest.raises(CompressionError, match="another process is working in it"):
        compress(tiny_models.llama(), recipe("slab"), calibration=IDS, work_dir=tmp_path)
    holder = multiprocessing.get_context("fork").Process(target=_hold_folder, args=(tmp_path,))
    holder.start()
    while not (tmp_path / "held").exists():
        time.sleep(0.01)
    with pytest.raises(CompressionError, match="another process is working in it"):
        WorkFolder(tmp_path)
    holder.kill()
    holder.join()
    with WorkFolder(tmp_path):  # a dead process holds no lock
        pass


def _hold_folder(folder: Path) -> None:
    with WorkFolder(folder):
        (folder / "held").touch()
        time.sleep(60)


def test_a_full_disk_loses_nothing_that_was_finished(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    expected = saved(compress(tiny_models.llama(), recipe("slab"), calibration=IDS), tmp_path / "whole")
    writes: list[Path] = []

    def save_until_full(tensors: dict[str, torch.Tensor], file: Path, metadata: dict[str, str]) -> None:
        writes.append(file)
        if len(writes) == 4:  # in the middle of the run, with part of the file written
            file.write_bytes(b"half of it")
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        save_file(tensors, file, metadata)

    work = tmp_path / "work"
    with (
        monkeypatch.context() as patch,
        pytest.raises(CompressionError, match=r"cannot be written \(No space left on device\)"),
    ):
        patch.setattr(work_folder, "save_file", save_until_full)
        compress(tiny_models.llama(), recipe("slab"), calibration=IDS, work_dir=work)
    records = ["built-00000", "built-inputs-00001", "built-inputs-00002"]
    assert {file.name for file in work.iterdir()} == {"run.json", *(f"{record}.safetensors" for record in records)}
    resumed = compress(tiny_models.llama(), recipe("slab"), calibration=IDS, work_dir=work)
    assert saved(resumed, tmp_path / "resumed") == expected


def flip_one_bit(file: Path) -> None:
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(content)


@pytest.mark.parametrize(
    "damage",
    [
        lambda file: file.write_bytes(b"damaged"),
        flip_one_bit,
        lambda file: shutil.copy(file.with_name("built-00002.safetensors"), file),
        lambda file: save_file(load_file(file), file, {"facts": "{}"}),
    ],
    ids=["no safetensors", "one bit", "that of another block", "other facts"],
)
def test_a_damaged_record_is_named(tmp_path: Path, damage: Callable[[Path], Any]) -> None:
    """The run cannot build the block again, as its inputs are deleted once its record is written."""
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
        calibration = ["--calibration", str(words), "--samples", "4", "--sequence-length", "24"]
        return [sys.executable, "-m", "hf_lowrank", "compress", str(dense), "-o", output, *calibration, *more]

    subprocess.run(command("result"), cwd=new_folder(tmp_path / "whole"), check=True, capture_output=True)
    here, work = new_folder(tmp_path / "killed"), tmp_path / "killed" / "work"
    options = ["--work-dir", "work"]
    running = subprocess.Popen(
        command("result", *options), cwd=here, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    while not (work / "built-00001.safetensors").exists():  # until the second block is finished
        time.sleep(0.001)
    running.send_signal(signal.SIGKILL)  # which no handler sees
    running.wait()
    assert not (here / "result").exists()
    subprocess.run(command("result", *options), cwd=here, check=True, capture_output=True)
    expected, resumed = digests(tmp_path / "whole" / "result"), digests(here / "result")
    for name in ("compression_report.json", "README.md"):  # they name the command, whose options differ
        assert expected.pop(name)
        assert resumed.pop(name)
    assert resumed == expected
    assert not work.exists()


def new_folder(path: Path) -> Path:
    path.mkdir()
    return path
