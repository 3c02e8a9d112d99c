"""Builds small compressed models of every layout, and saves each of them once in a test session."""

import copy
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from torch import Tensor
from transformers import PreTrainedModel

from hf_lowrank import CompressionConfig, compress
from tests.runtime.conftest import calibration, tiny_gpt2, tiny_llama

from .fresh_process import INPUT_IDS

RECIPES = {
    "sola": ("sola", 0.3, {}),
    "soco": ("soco", 0.3, {"steps": 6, "finish_steps": 2, "batch_tokens": 64}),
    "slab": ("slab", 0.5, {}),
    "slab-gpt2": ("slab", 0.5, {}),
    "pivoted": ("lowrank", 0.3, {}),
    "quantised": ("auto", 0.7, {}),
}
"""Method, ratio and options of every model, by its name."""


@dataclass(frozen=True)
class Compressed:
    """A compressed model that was saved.

    Attributes:
        name: its key in `RECIPES`.
        folder: the checkpoint.
        saved: the model as the checkpoint gives it. Tests share it and leave it as it is.
    """

    name: str
    folder: Path
    saved: PreTrainedModel

    def model(self) -> PreTrainedModel:
        """Return a copy of the model that a test may change."""
        return copy.deepcopy(self.saved)


_saved_models: dict[str, Compressed] = {}


def compressed_model(name: str, factory: pytest.TempPathFactory) -> Compressed:
    """Return the compressed model of this name in `RECIPES`."""
    if name not in _saved_models:
        method, ratio, options = RECIPES[name]
        model = tiny_gpt2() if name.endswith("gpt2") else tiny_llama(num_hidden_layers=3)
        config = CompressionConfig(method=method, ratio=ratio, options=options, samples=4, sequence_length=16)
        compress(model, config, calibration=calibration(), progress=False)
        folder = factory.mktemp("compressed") / name
        model.save_pretrained(folder)
        _saved_models[name] = Compressed(name, folder, type(model).from_pretrained(folder))
    return _saved_models[name]


def logits(model: torch.nn.Module) -> Tensor:
    """Return the first output of a model for `INPUT_IDS`: logits, or hidden states where it has no head."""
    with torch.no_grad():
        return model(torch.tensor(INPUT_IDS))[0]
