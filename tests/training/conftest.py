"""Compressed checkpoints of every layout, small enough to be trained in a second, and the text to train them on."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import Dataset
from transformers import PreTrainedModel, TrainingArguments

from hf_lowrank import CompressionConfig, compress
from tests.support import tiny_models
from tests.support.prepared import Prepared

LAYOUTS = {
    "bitmask and signs": ("slab", 0.4),
    "rows and columns": ("sola", 0.3),
    "pivoted": ("lowrank", 0.3),
    "quantized": ("rtn", 0.8),
    "Conv1D": ("slab", 0.4),
}
WINDOW = 24


class Windows(Dataset[dict[str, Tensor]]):
    """Random windows of tokens, the same ones in every process."""

    def __init__(self, rows: int = 32) -> None:
        self.tokens = tiny_models.token_ids(rows, WINDOW)

    def __len__(self) -> int:
        return len(self.tokens)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        return {"input_ids": self.tokens[index], "labels": self.tokens[index]}


def settings(folder: Path, **changes: Any) -> TrainingArguments:
    """Return settings for two steps of four windows each, with a checkpoint after each step."""
    fields: dict[str, Any] = {
        "max_steps": 2,
        "per_device_train_batch_size": 4,
        "learning_rate": 1e-3,
        "save_steps": 1,
        "logging_steps": 1,
    }
    fields |= {"use_cpu": True, "report_to": [], "disable_tqdm": True, "seed": 1}
    return TrainingArguments(str(folder), **fields | changes)


def pattern(model: nn.Module) -> dict[str, Tensor]:
    """Return copies of all masks, pivots, signs and codes."""
    return {name: buffer.clone() for name, buffer in model.named_buffers() if buffer.dtype == torch.uint8}


def weights(model: nn.Module) -> dict[str, Tensor]:
    """Return copies of all parameters."""
    return {name: parameter.detach().clone() for name, parameter in model.named_parameters()}


def same(one: dict[str, Tensor], other: dict[str, Tensor]) -> bool:
    """Return whether two sets of tensors are bit-identical."""
    return one.keys() == other.keys() and all(torch.equal(tensor, other[name]) for name, tensor in one.items())


def dense(layout: str) -> PreTrainedModel:
    """Return the dense model of a layout."""
    return tiny_models.gpt2() if layout == "Conv1D" else tiny_models.llama(num_hidden_layers=3)


@pytest.fixture(scope="session")
def checkpoints(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Return the folder of a checkpoint with a tokenizer for every layout."""
    root, folders = tmp_path_factory.mktemp("layouts"), {}
    for number, (layout, (method, ratio)) in enumerate(LAYOUTS.items()):
        config = CompressionConfig(method=method, ratio=ratio, samples=4, sequence_length=32)
        tokenizer = tiny_models.tokenizer()
        model = compress(dense(layout), config, tokenizer=tokenizer, calibration=tiny_models.text(8), progress=False)
        folders[layout] = root / f"{number}-{method}"
        model.save_pretrained(folders[layout])
    return folders


@pytest.fixture(scope="session")
def text_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a text with one document per line. The documents fill whole batches of eight."""
    file = tmp_path_factory.mktemp("text") / "text.txt"
    file.write_text("\n".join(tiny_models.text(64)) + "\n", encoding="utf-8")
    return file


@pytest.fixture(scope="session")
def prepared(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Prepared]:
    """Return the process that starts programs which need processes of their own."""
    with Prepared(tmp_path_factory.mktemp("prepared")) as process:
        yield process
