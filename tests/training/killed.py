"""Trains each checkpoint in a process of its own, which is killed in the middle, then goes on from what it left.

Run as `python -m tests.training.killed OUTPUT FOLDER...`; one layout after the other, so that transformers is imported once.
"""

import os
import signal
import sys
from pathlib import Path
from typing import Any

from transformers import AutoModelForCausalLM, Trainer, TrainerCallback

import hf_lowrank  # noqa: F401

from .conftest import Windows, settings

KILLED_AT = 5


class Kill(TrainerCallback):
    """No warning, no clean-up: what a machine that is taken away does."""

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step == KILLED_AT:
            os.kill(os.getpid(), signal.SIGKILL)


def run(folder: str, output: Path, callbacks: list[TrainerCallback], resume: bool) -> None:
    model = AutoModelForCausalLM.from_pretrained(folder)
    arguments = settings(output, gradient_accumulation_steps=2, lr_scheduler_type="cosine")
    Trainer(model, arguments, train_dataset=Windows(), callbacks=callbacks).train(resume_from_checkpoint=resume)


def in_a_process(*arguments: Any) -> int:
    """Run in a fork of this process and return its wait status."""
    process = os.fork()
    if process == 0:
        try:
            run(*arguments)
        except BaseException as error:
            print(error, file=sys.stderr)
            os._exit(1)
        os._exit(0)
    return os.waitpid(process, 0)[1]


def main() -> None:
    output = Path(sys.argv[1])
    for folder in sys.argv[2:]:
        name = Path(folder).name
        assert in_a_process(folder, output / "whole" / name, [], False) == 0
        killed = in_a_process(folder, output / "killed" / name, [Kill()], False)
        assert os.WIFSIGNALED(killed) and os.WTERMSIG(killed) == signal.SIGKILL
        assert in_a_process(folder, output / "killed" / name, [], True) == 0


if __name__ == "__main__":
    main()
