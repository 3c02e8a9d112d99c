"""Encoders: the base model, and heads of other tasks on it."""

from pathlib import Path

import pytest
import torch
from transformers import (
    AutoModel,
    AutoModelForMaskedLM,
    AutoModelForSequenceClassification,
    AutoModelForTokenClassification,
    BertForSequenceClassification,
    pipeline,
)

from hf_lowrank import CompressedLinear, CompressionConfig, compress
from tests.support import tiny_models
from tests.support.compressed import logits
from tests.support.fresh_process import INPUT_IDS
from tests.support.model_families import FAMILIES, texts

RECIPE = CompressionConfig(method="slab", ratio=0.5, samples=4, sequence_length=16)
IDS = torch.tensor(INPUT_IDS)


@pytest.fixture(scope="module")
def masked(tmp_path_factory: pytest.TempPathFactory) -> Path:
    model = FAMILIES["BERT"].make()
    compress(model, RECIPE, calibration=texts(), progress=False)
    folder = tmp_path_factory.mktemp("bert")
    model.save_pretrained(folder)
    return folder


def test_the_base_model_and_other_heads(masked: Path) -> None:
    full = AutoModelForMaskedLM.from_pretrained(masked)
    hidden = full.bert(IDS).last_hidden_state
    for auto_class, inner in (
        (AutoModel, None),
        (AutoModelForSequenceClassification, "bert"),
        (AutoModelForTokenClassification, "bert"),
    ):
        model = auto_class.from_pretrained(masked)
        base = model if inner is None else getattr(model, inner)
        assert any(isinstance(module, CompressedLinear) for module in base.modules())
        assert torch.equal(base(IDS).last_hidden_state, hidden)


def test_a_classifier(tmp_path: Path) -> None:
    torch.manual_seed(0)
    config = FAMILIES["BERT"].make().config
    config.vocab_size, config.num_labels = tiny_models.VOCABULARY, 3
    model = compress(
        BertForSequenceClassification(config).eval(),
        RECIPE,
        tiny_models.tokenizer(),
        tiny_models.text(),
        progress=False,
    )
    model.save_pretrained(tmp_path)
    again = AutoModelForSequenceClassification.from_pretrained(tmp_path)
    assert torch.equal(logits(again), logits(model))
    assert logits(again).shape == (2, 3)
    (answer,) = pipeline("text-classification", model=str(tmp_path))("the red cat")
    assert answer["label"] in config.id2label.values()
