"""A compressed encoder opens as its base model, and with heads for other tasks."""

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
    """A compressed BERT with a head for masked tokens."""
    model = FAMILIES["BERT"].make()
    compress(model, RECIPE, calibration=texts(), progress=False)
    folder = tmp_path_factory.mktemp("bert")
    model.save_pretrained(folder)
    return folder


def test_the_base_model_has_the_same_layers_under_any_head(masked: Path) -> None:
    full = AutoModelForMaskedLM.from_pretrained(masked)
    hidden = full.bert(IDS).last_hidden_state
    for auto_class in (AutoModel, AutoModelForSequenceClassification, AutoModelForTokenClassification):
        base = auto_class.from_pretrained(masked).base_model
        assert any(isinstance(module, CompressedLinear) for module in base.modules())
        assert torch.equal(base(IDS).last_hidden_state, hidden)


def test_a_compressed_classifier_comes_back_and_classifies(tmp_path: Path) -> None:
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
    reopened = AutoModelForSequenceClassification.from_pretrained(tmp_path)
    assert torch.equal(logits(reopened), logits(model))
    assert logits(reopened).shape == (2, 3)
    (answer,) = pipeline("text-classification", model=str(tmp_path))("the red cat")
    assert answer["label"] in config.id2label.values()
