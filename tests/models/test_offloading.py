"""Compression from disk to disk gives the files of the model in memory, and has one block at a time in memory."""

import gc
import logging
import weakref
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import LlamaConfig, PreTrainedModel

from hf_lowrank import CompressionConfig, CompressionError, compress
from hf_lowrank.calibration.activations import ActivationCache
from hf_lowrank.compression import from_disk, loss
from hf_lowrank.compression.checks import whole_model_reason
from hf_lowrank.compression.estimate import estimate
from hf_lowrank.compression.from_disk import compress_checkpoint
from hf_lowrank.compression.session import Session
from hf_lowrank.execution.files import files_size
from hf_lowrank.execution.work_folder import Record, WorkFolder
from hf_lowrank.models.loading import load_config, load_model, skeleton
from hf_lowrank.models.offloading import LARGEST_SHARD, SMALLEST_SHARD, shard_size

from ..support import tiny_models
from ..support.files import digests

MODELS = {"llama": tiny_models.llama, "gpt2": tiny_models.gpt2, "opt": tiny_models.opt, "mixtral": tiny_models.mixtral}
OPTIONS: dict[str, dict[str, Any]] = {
    "slab": {"iterations": 2},
    "svd-llm": {"update": True},
    "sola": {"skip_blocks": 0},
    "fwsvd": {},
    "lowrank": {},
    "slab-gram": {},
    "auto": {},
}


@pytest.fixture
def words(tmp_path: Path) -> str:
    file = tmp_path / "words.txt"
    file.write_text("\n".join(tiny_models.text(40)))
    return str(file)


def recipe(method: str, calibration: str, **changes: Any) -> CompressionConfig:
    fields = {"ratio": 0.4, "options": OPTIONS.get(method, {}), "samples": 6, "sequence_length": 24, **changes}
    return CompressionConfig(method=method, calibration=calibration, **fields)


CASES = [("llama", method) for method in OPTIONS]
CASES += [(name, method) for name in MODELS if name != "llama" for method in ("slab", "sola", "auto")]
"""Every method on one model, and one method of every strategy on the others."""


@pytest.mark.parametrize(("name", "method"), CASES)
def test_the_files_are_those_of_the_model_in_memory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, words: str, name: str, method: str
) -> None:
    dense = str(tiny_models.saved(MODELS[name](), tmp_path / "dense"))
    config, tokenizer = recipe(method, words), tiny_models.tokenizer()
    monkeypatch.setattr("hf_lowrank.calibration.activations.ACTIVATIONS_IN_MEMORY", 5000)  # most wait in files
    compress_checkpoint(dense, tmp_path / "from-disk" / "model", config, tokenizer)
    monkeypatch.setattr(from_disk, "whole_model_reason", lambda *_: "the test wants it")
    compress_checkpoint(dense, tmp_path / "in-memory" / "model", config, tokenizer)
    assert digests(tmp_path / "from-disk") == digests(tmp_path / "in-memory")  # and nothing else is left there
    assert load_model(str(tmp_path / "from-disk" / "model")).config.quantization_config.layers


def test_a_loss_that_reads_more_than_the_last_block_gets_the_whole_model(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, words: str
) -> None:
    dense = str(tiny_models.saved(tiny_models.llama(num_hidden_layers=2), tmp_path / "dense"))
    config, tokenizer = recipe("lowrank", words), tiny_models.tokenizer()
    monkeypatch.setattr(loss, "chain_head", lambda *_: None)
    caplog.set_level(logging.INFO)
    compress_checkpoint(dense, tmp_path / "from-disk" / "model", config, tokenizer)
    assert "the whole model is in memory: LlamaForCausalLM has its blocks on disk" in caplog.text
    compress(load_model(dense), config, tokenizer).save_pretrained(tmp_path / "in-memory" / "model")
    assert digests(tmp_path / "from-disk") == digests(tmp_path / "in-memory")


def test_shards_are_those_of_save_pretrained(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, words: str) -> None:
    dense = str(tiny_models.saved(tiny_models.llama(), tmp_path / "dense"))
    config = recipe("slab", words)
    monkeypatch.setattr(from_disk, "shard_size", lambda dense: "40KB")
    compress_checkpoint(dense, tmp_path / "a" / "model", config, tiny_models.tokenizer())
    made = compress(load_model(dense), config, tiny_models.tokenizer())
    made.save_pretrained(tmp_path / "b" / "model", max_shard_size="40KB")
    assert len(list((tmp_path / "a" / "model").glob("*.safetensors"))) > 2
    found, expected = digests(tmp_path / "a" / "model"), digests(tmp_path / "b" / "model")
    assert found == expected


def test_one_block_at_a_time_is_in_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, words: str) -> None:
    dense = str(tiny_models.saved(tiny_models.llama(), tmp_path / "dense"))
    most: list[int] = []
    usual = Session.compressed_layer

    def compressed_layer(self: Session, *arguments: Any) -> Any:
        most.append(
            len(
                {
                    name
                    for name in self.plan.blocks
                    for tensor in self.model.get_submodule(name).parameters()
                    if tensor.device.type != "meta"
                }
            )
        )
        return usual(self, *arguments)

    monkeypatch.setattr(Session, "compressed_layer", compressed_layer)
    compress_checkpoint(dense, tmp_path / "model", recipe("slab", words), tiny_models.tokenizer())
    assert set(most) == {1}


def test_replaced_layers_are_gone_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, words: str) -> None:
    """They do not wait until Python looks for reference cycles, which may be after the next block."""
    dense = str(tiny_models.saved(tiny_models.llama(), tmp_path / "dense"))
    replaced: list[weakref.ref[torch.nn.Module]] = []
    usual = Session.compressed_layer

    def compressed_layer(self: Session, layer: Any, *arguments: Any) -> Any:
        gc.disable()
        replaced.append(weakref.ref(self.model.get_submodule(layer.name)))
        return usual(self, layer, *arguments)

    monkeypatch.setattr(Session, "compressed_layer", compressed_layer)
    try:
        compress_checkpoint(dense, tmp_path / "model", recipe("slab", words), tiny_models.tokenizer())
    finally:
        gc.enable()
    assert len(replaced) == 28
    assert not any(each() for each in replaced)


@pytest.mark.parametrize("place", ["output", "work folder"])
def test_a_folder_that_cannot_be_made_is_named(tmp_path: Path, words: str, place: str) -> None:
    dense = str(tiny_models.saved(tiny_models.llama(), tmp_path / "dense"))
    taken = tmp_path / "taken"
    taken.touch()
    output, work = (taken / "model", None) if place == "output" else (tmp_path / "model", taken / "work")
    with pytest.raises(CompressionError, match=rf"{work or output}: cannot be written"):
        compress_checkpoint(dense, output, recipe("slab", words), tiny_models.tokenizer(), work_dir=work)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["dense", "taken", "words.txt"]


def test_a_killed_run_goes_on_from_disk_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, words: str) -> None:
    dense = str(tiny_models.saved(tiny_models.llama(), tmp_path / "dense"))
    for method in OPTIONS:
        config = recipe(method, words)
        compress_checkpoint(dense, tmp_path / method / "whole" / "model", config, tiny_models.tokenizer())
        work, written = tmp_path / method / "work", []
        usual = WorkFolder.write

        def write(
            self: WorkFolder, name: str, record: Record, usual: Any = usual, written: list[str] = written
        ) -> None:
            usual(self, name, record)
            written.append(name)
            if name == "built-00001":
                raise KeyboardInterrupt

        with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
            patch.setattr(WorkFolder, "write", write)
            compress_checkpoint(dense, tmp_path / method / "model", config, tiny_models.tokenizer(), work_dir=work)
        assert not (tmp_path / method / "model").exists()
        compress_checkpoint(dense, tmp_path / method / "model", config, tiny_models.tokenizer(), work_dir=work)
        assert digests(tmp_path / method / "model") == digests(tmp_path / method / "whole" / "model")
        assert not work.exists()


@pytest.mark.parametrize(
    ("model", "method", "calibration", "reason"),
    [
        (tiny_models.llama(), "soco", "c4", "trains through the whole model"),
        (tiny_models.llama(), "slab", "self", "sampled from the model"),
    ],
)
def test_what_needs_the_whole_model_says_so_and_gets_it(
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
    words: str,
    model: PreTrainedModel,
    method: str,
    calibration: str,
    reason: str,
) -> None:
    assert reason in (whole_model_reason(recipe(method, calibration), model) or "")
    offloaded = load_model(str(tiny_models.saved(model, tmp_path / "opened")), offload_folder=tmp_path / "offloaded")
    ids = None if calibration == "self" else tiny_models.token_ids(2, 24).tolist()
    with pytest.raises(CompressionError, match=f"has its blocks on disk and must be in memory as a whole: .*{reason}"):
        compress(offloaded, recipe(method, calibration), calibration=ids, work_dir=tmp_path / "work")
    assert not (tmp_path / "work").exists()
    if calibration == "self":
        caplog.set_level(logging.INFO)
        dense = str(tiny_models.saved(model, tmp_path / "dense"))
        compress_checkpoint(dense, tmp_path / "model", recipe(method, calibration), None)
        assert reason in caplog.text


def test_a_damaged_weight_is_found_before_the_work(tmp_path: Path, words: str) -> None:
    model = tiny_models.llama()
    model.model.layers[2].mlp.up_proj.weight.data[3, 4] = float("nan")
    dense = str(tiny_models.saved(model, tmp_path / "dense"))
    with pytest.raises(CompressionError, match=r"model\.layers\.2\.mlp\.up_proj\.weight: the weight is not finite"):
        compress_checkpoint(dense, tmp_path / "model", recipe("slab", words), tiny_models.tokenizer())
    assert not (tmp_path / "model").exists()


def test_what_waits_in_files_comes_back_bit_for_bit_and_leaves_nothing(tmp_path: Path) -> None:
    makes = enumerate((torch.float32, torch.bfloat16))
    tensors = [torch.randn(3, 5, 7, generator=torch.Generator().manual_seed(seed)).to(dtype) for seed, dtype in makes]
    cache = ActivationCache(tmp_path, limit=3 * 5 * 7 * 4)
    waiting = [cache.put(tensor) for tensor in tensors * 2]
    assert cache.bytes_in_memory == 3 * 5 * 7 * 4
    assert len(list(tmp_path.iterdir())) == 3
    assert all(torch.equal(each.tensor, tensor) for each, tensor in zip(waiting, tensors * 2, strict=True))
    waiting.clear()
    assert cache.bytes_in_memory == 0
    assert not list(tmp_path.iterdir())


def test_files_of_the_output_are_as_large_as_what_a_block_takes_within_limits() -> None:
    def size(width: int, inner: int) -> int:
        config = LlamaConfig(
            num_hidden_layers=1, vocab_size=64, dtype="bfloat16", hidden_size=width, intermediate_size=inner
        )
        return shard_size(skeleton(config))

    assert size(64, 128) == SMALLEST_SHARD
    assert size(4096, 11008) == 4 * (4 * 4096**2 + 3 * 4096 * 11008 + 2 * 4096)
    assert size(8192, 28672) == LARGEST_SHARD


def test_what_the_forecast_says_of_the_disk_is_what_the_files_take(tmp_path: Path, words: str) -> None:
    dense = str(tiny_models.saved(tiny_models.llama(hidden_size=64, intermediate_size=160), tmp_path / "dense"))
    for method in ("slab", "svd-llm"):
        config = recipe(method, words)
        expected = estimate(skeleton(load_config(dense)), config)
        compress_checkpoint(dense, tmp_path / method, config, tiny_models.tokenizer())
        assert files_size(tmp_path / method) == pytest.approx(expected.output, rel=0.05)  # headers of small files
        assert expected.peak == expected.resident + expected.block + expected.activations + expected.working


def test_more_of_anything_takes_more() -> None:
    def peak(method: str = "svd-llm", samples: int = 4, **shape: int) -> int:
        return estimate(tiny_models.llama(**shape), recipe(method, "words.txt", samples=samples)).peak

    assert peak() < peak(intermediate_size=160) < peak(intermediate_size=160, hidden_size=64)
    assert peak(samples=4) < peak(samples=8)
    assert peak(num_hidden_layers=4) == peak(num_hidden_layers=8)  # the model's depth does not count
    assert peak("svd") < peak("svd-llm")  # which needs Gram matrices
