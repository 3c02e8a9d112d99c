"""Trains in a process of its own: `python -m tests.training.killed CHECKPOINT OUTPUT [kill | resume]`."""

import os
import signal
import sys
from pathlib import Path
from typing import Any

from transformers import AutoModelForCausalLM, Trainer, TrainerCallback

import hf_lowrank  # noqa: F401

from .conftest import Windows, settings

STEPS, KILLED_AT = 4, 3


class Kill(TrainerCallback):
    """Kills the process without a warning and without a clean-up, as when the machine is taken away."""

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step == KILLED_AT:
            os.kill(os.getpid(), signal.SIGKILL)


def main(folder: str, output: str, *instructions: str) -> None:
    model = AutoModelForCausalLM.from_pretrained(folder)
    arguments = settings(
        Path(output), max_steps=STEPS, save_steps=2, gradient_accumulation_steps=2, lr_scheduler_type="cosine"
    )
    callbacks = [Kill()] if "kill" in instructions else []
    Trainer(model, arguments, train_dataset=Windows(), callbacks=callbacks).train(
        resume_from_checkpoint="resume" in instructions
    )


if __name__ == "__main__":
    main(*sys.argv[1:])
