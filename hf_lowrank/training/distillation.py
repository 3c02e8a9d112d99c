"""Distillation: a compressed model learns the predictions of the dense model that it was made from."""

import hashlib
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.utils.data import Dataset
from transformers import PreTrainedModel, PrinterCallback, Trainer, TrainingArguments
from transformers.trainer_utils import get_last_checkpoint

from ..calibration.batches import IGNORED_LABEL
from ..compression.resume import weights_fingerprint
from ..execution.work_folder import WorkFolder
from ..runtime.errors import CompressionError, quoted
from ..runtime.saving import CompleteSave

BATCH_TOKENS = 4096
"""Maximum number of tokens in one step of `distill`."""


class DistillationTrainer(Trainer):
    """A `Trainer` with the loss of knowledge distillation (Hinton, Vinyals and Dean, arXiv 1503.02531).

    The loss is (1 − λ) T² KL(teacher ‖ student) + λ L. Both distributions are at temperature T, and the divergence is
    averaged over the positions that have a label. L is the student's own loss on the labels. Training minimizes this
    loss and evaluation reports it. Everything else is as in `Trainer`.

    Args:
        args, kwargs: as for `Trainer`. The `model` is the student.
        teacher_model: the dense model, with the student's vocabulary. It is moved to the training device and frozen,
            and is not changed otherwise.
        temperature: T, above 0. A higher temperature gives unlikely tokens more weight.
        lm_weight: λ, from 0 (the teacher alone) to 1 (the labels alone).

    Raises:
        CompressionError: if a setting is out of its range, or the teacher's vocabulary is not as large as the
            student's.
    """

    def __init__(
        self,
        *args: Any,
        teacher_model: PreTrainedModel,
        temperature: float = 1.0,
        lm_weight: float = 0.0,
        **kwargs: Any,
    ) -> None:
        if not temperature > 0:
            raise CompressionError(f"temperature: found {quoted(temperature)}, expected a number above 0")
        if not 0 <= lm_weight <= 1:
            raise CompressionError(
                f"lm_weight: found {quoted(lm_weight)}, expected a number from 0 (the teacher alone) to 1 (the "
                "labels alone)"
            )
        super().__init__(*args, **kwargs)
        self.teacher_model = teacher_model.eval().requires_grad_(False).to(self.args.device)
        student_tokens = _vocabulary_size(self.model)
        teacher_tokens = _vocabulary_size(teacher_model)
        if student_tokens != teacher_tokens:
            raise CompressionError(
                f"teacher_model: its vocabulary has {teacher_tokens} tokens, the student's {student_tokens}; "
                "expected the dense model that the student was compressed from"
            )
        self.temperature = temperature
        self.lm_weight = lm_weight
        # Other models (encoders, encoder-decoders) predict the label at its own position.
        self.predicts_next_token = teacher_model.can_generate() and not teacher_model.config.is_encoder_decoder

    def compute_loss(
        self,
        model: torch.nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | int | None = None,
    ) -> Any:
        """Return the loss of a batch, scaled as `Trainer` scales its own.

        Where `Trainer` counted the labels of all batches of a step (`num_items_in_batch`), the loss is divided by
        these, so that accumulated batches give the gradient of one large batch.
        """
        scored = self.scored(inputs)
        # `Trainer` gets a copy, as label smoothing takes the labels out.
        loss, outputs = super().compute_loss(
            model, dict(inputs), return_outputs=True, num_items_in_batch=num_items_in_batch
        )
        teacher_inputs = {name: value for name, value in inputs.items() if "labels" not in name}
        with torch.no_grad(), self.accelerator.autocast():
            teacher_logits = self.teacher_model(**teacher_inputs).logits
        divergence = self.divergence(outputs.logits, teacher_logits, scored)
        if num_items_in_batch is None:
            divergence = divergence / scored.sum().clamp(min=1)
        else:
            # The count is then over all processes, whose gradients are averaged: each process's loss is multiplied
            # back.
            processes = self.accelerator.num_processes if self.args.average_tokens_across_devices else 1
            divergence = divergence * processes / num_items_in_batch
        loss = (1 - self.lm_weight) * divergence + self.lm_weight * loss
        return (loss, outputs) if return_outputs else loss

    def scored(self, inputs: dict[str, Any]) -> Tensor:
        """Return which predictions have a label, as booleans in the shape of the labels.

        Each is at the position that predicts, not at the one that is predicted.

        Raises:
            CompressionError: if the batch has no labels.
        """
        if "shift_labels" in inputs:
            return inputs["shift_labels"] != IGNORED_LABEL
        if "labels" not in inputs:
            raise CompressionError(
                f"the batches have {', '.join(inputs)} and no labels; use a data collator that makes them"
            )
        has_label: Tensor = inputs["labels"] != IGNORED_LABEL
        if self.predicts_next_token:
            has_label = F.pad(has_label[..., 1:], (0, 1))  # the last position predicts nothing
        return has_label

    def divergence(self, logits: Tensor, teacher_logits: Tensor, scored: Tensor) -> Tensor:
        """Return T² KL(teacher ‖ student) in nats, summed over the scored positions, in float32.

        Args:
            logits, teacher_logits: (..., classes).
            scored: (...), booleans.

        Raises:
            CompressionError: if the logits of the two models differ in shape.
        """
        if logits.shape != teacher_logits.shape:
            raise CompressionError(
                f"teacher_model: its logits are {tuple(teacher_logits.shape)}, the student's {tuple(logits.shape)}; "
                "expected the dense model that the student was compressed from"
            )
        student = F.log_softmax(logits[scored].float() / self.temperature, dim=-1)
        teacher = F.log_softmax(teacher_logits[scored].float() / self.temperature, dim=-1)
        # T² keeps the gradients of the same size at every temperature (arXiv 1503.02531).
        return F.kl_div(student, teacher, log_target=True, reduction="sum") * self.temperature**2


def _vocabulary_size(model: Any) -> int | None:
    """Return the number of tokens that a model knows, or None for a model without a vocabulary."""
    return getattr(model.config.get_text_config(), "vocab_size", None)


class Windows(Dataset[dict[str, Tensor]]):
    """Windows of tokens (rows, length), as a causal language model is trained on them: tokens are their own labels."""

    def __init__(self, rows: Tensor) -> None:
        self.rows = rows

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        return {"input_ids": self.rows[index], "labels": self.rows[index]}


def distill(
    student: PreTrainedModel,
    teacher: PreTrainedModel,
    rows: Tensor,
    folder: str | Path,
    *,
    steps: int,
    learning_rate: float,
    seed: int = 0,
) -> list[float]:
    """Train the stored values of a compressed model towards the teacher's predictions, by `DistillationTrainer`.

    The student is changed in place.

    Args:
        student: the compressed model, in the dtype to train in.
        teacher: the dense model.
        rows: windows of token ids, (count, length), to train on. The seed decides the order in which they are drawn.
        folder: folder for the trainer's checkpoints. A training that was killed is resumed from the last of them.
        steps: number of optimizer steps of at most `BATCH_TOKENS` tokens.
        learning_rate: learning rate of AdamW, which a cosine schedule takes to zero.

    Returns:
        The mean KL divergence per token over each tenth of the training.

    Raises:
        CompressionError: if the folder holds a training with other settings, text or weights, or another process works
            in it.
    """
    batch_size = max(min(BATCH_TOKENS // rows.shape[1], len(rows)), 1)
    tenth = max(steps // 10, 1)
    settings = TrainingArguments(
        str(folder),
        max_steps=steps,
        per_device_train_batch_size=batch_size,
        learning_rate=learning_rate,
        lr_scheduler_type="cosine",
        warmup_steps=steps // 20,
        logging_steps=tenth,
        save_steps=tenth,
        save_total_limit=1,
        seed=seed,
        disable_tqdm=True,
        report_to=[],
        use_cpu=student.device.type == "cpu",
    )
    # Everything that the result follows from. A training with another identity must not be resumed from this folder.
    identity = {
        "weights": weights_fingerprint(student),
        "text": hashlib.sha256(rows.cpu().numpy().tobytes()).hexdigest(),
        "settings": {"steps": steps, "learning_rate": learning_rate, "seed": seed, "batch_size": batch_size},
    }
    with WorkFolder(folder) as work:
        work.claim(identity)
        trainer = DistillationTrainer(student, settings, train_dataset=Windows(rows), teacher_model=teacher)
        trainer.remove_callback(PrinterCallback)  # it prints every entry of the log
        save = CompleteSave.attach(student)
        save.intended_dtype = student.dtype  # of the trainer's checkpoints, from which the training goes on
        trainer.train(resume_from_checkpoint=get_last_checkpoint(str(folder)))
        save.intended_dtype = None
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
