"""The loss of distillation is its formula, and training reduces it: the student comes nearer to the teacher."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F
from transformers import AutoModelForCausalLM, BertConfig, BertForSequenceClassification, PreTrainedModel, Trainer

from hf_lowrank import CompressionError, DistillationTrainer
from hf_lowrank.publishing.hub import check_complete
from tests.support import tiny_models

from .conftest import LAYOUTS, Windows, dense, pattern, same, settings, weights

SLAB = "bitmask and signs"


def distiller(
    folder: Path, output: Path, teacher: PreTrainedModel | None = None, **changes: Any
) -> DistillationTrainer:
    own = {name: changes.pop(name) for name in ("temperature", "lm_weight") if name in changes}
    student = AutoModelForCausalLM.from_pretrained(folder)
    teacher = teacher or dense(SLAB)
    return DistillationTrainer(
        student, settings(output, **changes), train_dataset=Windows(), teacher_model=teacher, **own
    )


def batch(labels: Tensor | None = None) -> dict[str, Tensor]:
    tokens = torch.stack([Windows()[i]["input_ids"] for i in range(4)])
    return {"input_ids": tokens, "labels": tokens.clone() if labels is None else labels}


def test_the_loss_is_the_formula(checkpoints: dict[str, Path], tmp_path: Path) -> None:
    trainer = distiller(checkpoints[SLAB], tmp_path, temperature=2.0, lm_weight=0.25)
    inputs = batch()
    inputs["labels"][:, :9] = -100  # a prompt: positions 8 to 22 predict a label
    loss = trainer.compute_loss(trainer.model, inputs)
    with torch.no_grad():
        student, teacher = (
            model(inputs["input_ids"]).logits[:, 8:-1].double() for model in (trainer.model, trainer.teacher_model)
        )
    p, q = (F.softmax(logits / 2, dim=-1) for logits in (teacher, student))
    divergence = 4 * (p * (p / q).log()).sum(-1).mean()
    labels = F.cross_entropy(student.flatten(0, 1), inputs["labels"][:, 9:].flatten())
    torch.testing.assert_close(loss.double(), 0.75 * divergence + 0.25 * labels)
    assert set(inputs) == {"input_ids", "labels"}


def test_the_dense_model_has_nothing_to_learn_from_itself(tmp_path: Path) -> None:
    model = dense(SLAB)
    trainer = DistillationTrainer(model, settings(tmp_path), train_dataset=Windows(), teacher_model=dense(SLAB))
    assert float(trainer.compute_loss(model, batch())) == pytest.approx(0, abs=1e-6)


def test_labels_alone_are_the_trainer(checkpoints: dict[str, Path], tmp_path: Path) -> None:
    distilled = distiller(
        checkpoints[SLAB], tmp_path, lm_weight=1.0, gradient_accumulation_steps=2, save_strategy="no"
    )
    plain = Trainer(
        AutoModelForCausalLM.from_pretrained(checkpoints[SLAB]),
        settings(tmp_path, gradient_accumulation_steps=2, save_strategy="no"),
        train_dataset=Windows(),
    )
    for trainer in (distilled, plain):
        trainer.train()
    assert same(weights(distilled.model), weights(plain.model))


def test_accumulated_batches_are_one_batch(checkpoints: dict[str, Path], tmp_path: Path) -> None:
    whole = distiller(checkpoints[SLAB], tmp_path, save_strategy="no")
    parts = distiller(
        checkpoints[SLAB], tmp_path, save_strategy="no", gradient_accumulation_steps=4, per_device_train_batch_size=1
    )
    for trainer in (whole, parts):
        trainer.train()
    for name, tensor in weights(whole.model).items():
        torch.testing.assert_close(weights(parts.model)[name], tensor, rtol=0, atol=1e-4)


@pytest.mark.parametrize("layout", [layout for layout in LAYOUTS if layout != "Conv1D"])
def test_every_layout_comes_nearer_to_the_teacher(layout: str, checkpoints: dict[str, Path], tmp_path: Path) -> None:
    trainer = distiller(
        checkpoints[layout], tmp_path, max_steps=20, save_steps=20, learning_rate=3e-4, gradient_checkpointing=True
    )
    before, masks, teacher = trainer.evaluate(Windows(8)), pattern(trainer.model), weights(trainer.teacher_model)
    trainer.train()
    assert trainer.evaluate(Windows(8))["eval_loss"] < before["eval_loss"]
    assert same(pattern(trainer.model), masks)
    assert same(weights(trainer.teacher_model), teacher)
    check_complete(tmp_path / "checkpoint-20")


def test_classes_are_not_shifted(tmp_path: Path) -> None:
    config = BertConfig(
        vocab_size=50, hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16, num_labels=3
    )
    student, teacher = BertForSequenceClassification(config).eval(), BertForSequenceClassification(config)
    trainer = DistillationTrainer(student, settings(tmp_path), teacher_model=teacher)
    inputs = {"input_ids": torch.randint(50, (4, 7)), "labels": torch.tensor([0, 1, 2, -100])}
    loss = trainer.compute_loss(student, inputs)
    logits = [model(inputs["input_ids"]).logits[:3].log_softmax(-1) for model in (student, teacher)]
    torch.testing.assert_close(loss, F.kl_div(*logits, log_target=True, reduction="batchmean"))


@pytest.mark.parametrize(("own", "message"), [({"temperature": 0}, "temperature"), ({"lm_weight": 1.5}, "lm_weight")])
def test_settings_out_of_range(
    own: dict[str, float], message: str, checkpoints: dict[str, Path], tmp_path: Path
) -> None:
    with pytest.raises(CompressionError, match=message):
        distiller(checkpoints[SLAB], tmp_path, **own)


def test_a_teacher_with_another_vocabulary_is_refused(checkpoints: dict[str, Path], tmp_path: Path) -> None:
    teacher = tiny_models.llama(num_hidden_layers=1)
    teacher.resize_token_embeddings(tiny_models.VOCABULARY + 1)
    with pytest.raises(CompressionError, match="compressed from"):
        distiller(checkpoints[SLAB], tmp_path, teacher)


def test_batches_without_labels_are_refused(checkpoints: dict[str, Path], tmp_path: Path) -> None:
    trainer = distiller(checkpoints[SLAB], tmp_path)
    with pytest.raises(CompressionError, match="no labels"):
        trainer.compute_loss(trainer.model, {"input_ids": batch()["input_ids"]})
