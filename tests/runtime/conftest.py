"""Builds small compressed models of every layout, and saves them once for the tests of this folder."""

from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from torch import Tensor
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM, PreTrainedModel

from hf_lowrank import CompressionConfig, compress
from tests.support.fresh_process import INPUT_IDS

VOCABULARY = 64


@dataclass(frozen=True)
class Checkpoint:
    """A compressed model that was saved.

    Attributes:
        folder: the checkpoint.
        model: the model in memory that was saved.
        logits: its answer to `INPUT_IDS`.
    """

    folder: Path
    model: PreTrainedModel
    logits: Tensor

    def load(self, **arguments: object) -> PreTrainedModel:
        return type(self.model).from_pretrained(self.folder, **arguments)


def tiny_llama(seed: int = 0, **changes: object) -> LlamaForCausalLM:
    torch.manual_seed(seed)
    sizes = {
        "hidden_size": 64,
        "intermediate_size": 172,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
    }
    config = LlamaConfig(
        vocab_size=VOCABULARY, max_position_embeddings=64, tie_word_embeddings=True, **(sizes | changes)
    )
    return LlamaForCausalLM(config).eval()


def tiny_gpt2(blocks: int = 2) -> GPT2LMHeadModel:
    torch.manual_seed(0)
    config = GPT2Config(vocab_size=VOCABULARY, n_embd=64, n_layer=blocks, n_head=4, n_positions=64)
    return GPT2LMHeadModel(config).eval()


def calibration(samples: int = 4, length: int = 16) -> list[list[int]]:
    """Return random calibration sequences for these models."""
    generator = torch.Generator().manual_seed(0)
    return torch.randint(VOCABULARY, (samples, length), generator=generator).tolist()


def answer(model: PreTrainedModel) -> Tensor:
    """Return the first output of a model for `INPUT_IDS`: logits, or hidden states where it has no head."""
    with torch.no_grad():
        return model(torch.tensor(INPUT_IDS))[0]


def _checkpoint(factory: pytest.TempPathFactory, model: PreTrainedModel, method: str, ratio: float) -> Checkpoint:
    """Compress a model and save it."""
    config = CompressionConfig(method=method, ratio=ratio, samples=4, sequence_length=16)
    compress(model, config, calibration=calibration(), progress=False)
    folder = factory.mktemp("checkpoints") / f"{type(model).__name__.lower()}-{method}"
    model.save_pretrained(folder)
    return Checkpoint(folder, model, answer(model))


@pytest.fixture(scope="session")
def slab(tmp_path_factory: pytest.TempPathFactory) -> Checkpoint:
    """A Llama with bitmask and binary parts."""
    return _checkpoint(tmp_path_factory, tiny_llama(), "slab", 0.5)


@pytest.fixture(scope="session")
def sola(tmp_path_factory: pytest.TempPathFactory) -> Checkpoint:
    """A Llama with kept rows, kept columns and low-rank parts."""
    return _checkpoint(tmp_path_factory, tiny_llama(num_hidden_layers=3), "sola", 0.3)


@pytest.fixture(scope="session")
def svd(tmp_path_factory: pytest.TempPathFactory) -> Checkpoint:
    """A Llama with low-rank parts and nothing else."""
    return _checkpoint(tmp_path_factory, tiny_llama(), "svd", 0.4)


@pytest.fixture(scope="session")
def gpt2(tmp_path_factory: pytest.TempPathFactory) -> Checkpoint:
    """A GPT-2 with `Conv1D` layers and biases."""
    return _checkpoint(tmp_path_factory, tiny_gpt2(), "slab", 0.5)
