"""Rows that a head multiplies by are rounded to suit what it reads, and alike however the model is compressed."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor
from transformers import PreTrainedModel

from hf_lowrank import CompressionConfig, compress
from hf_lowrank.compression import pipeline
from hf_lowrank.compression.embeddings import find_embeddings
from hf_lowrank.compression.from_disk import compress_checkpoint

from ..support import tiny_models
from .test_resume import Killed, killing


def model(tied: bool) -> PreTrainedModel:
    return tiny_models.llama(num_hidden_layers=2, tie_word_embeddings=tied)


def tensors(made: PreTrainedModel, folder: Path) -> dict[str, Tensor]:
    made.save_pretrained(folder)
    return load_file(folder / "model.safetensors")


def recipe(tmp_path: Path) -> CompressionConfig:
    words = tmp_path / "words.txt"
    words.write_text("\n".join(tiny_models.text(40)))
    return CompressionConfig("rtn", bits=8.5, embeddings=4, calibration=str(words), samples=4, sequence_length=24)


@pytest.mark.parametrize("tied", [True, False])
def test_in_memory_from_disk_and_resumed_they_are_the_same(
    tied: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config, tokenizer = recipe(tmp_path), tiny_models.tokenizer()
    expected = tensors(compress(model(tied), config, tokenizer), tmp_path / "memory")
    compress_checkpoint(str(tiny_models.saved(model(tied), tmp_path / "dense")), tmp_path / "disk", config, tokenizer)
    found = {"from disk": load_file(tmp_path / "disk" / "model.safetensors")}
    for complete in (False, True):
        for kill in range(8):
            with monkeypatch.context() as patch:
                killing(patch, kill, complete)
                try:
                    resumed = compress(model(tied), config, tokenizer, work_dir=tmp_path / f"work-{complete}")
                    break
                except Killed:
                    continue
        found[f"resumed {complete}"] = tensors(resumed, tmp_path / f"resumed-{complete}")
    for how, other in found.items():
        assert other.keys() == expected.keys(), how
        assert all(torch.equal(other[name], expected[name]) for name in expected), how


@pytest.mark.parametrize("tied", [True, False])
def test_the_logits_come_nearer_than_with_every_value_at_its_nearest_level(
    tied: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    config, ids = CompressionConfig("rtn", bits=8.5, embeddings=4), tiny_models.token_ids(8, 48)
    name = "lm_head" if not tied else find_embeddings(model(tied)).name
    read: list[Tensor] = []
    dense = model(tied)
    dense.get_output_embeddings().register_forward_pre_hook(lambda module, inputs: read.append(inputs[0]))
    with torch.no_grad():
        dense(ids)
    x, weight = read[0].flatten(0, 1), dense.get_submodule(name).weight.detach()
    errors = []
    for knows_inputs in (True, False):
        if not knows_inputs:
            monkeypatch.setattr(pipeline, "head_gram", lambda session, batches: None)
        made = compress(model(tied), config, calibration=ids, progress=False)
        rows = made.get_submodule(name).to_dense(torch.float32).detach()
        errors.append(float((x @ (rows - weight).T).norm()))
    assert errors[0] < 0.9 * errors[1]
