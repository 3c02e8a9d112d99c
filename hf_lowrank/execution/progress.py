"""The progress of a compression: a bar on a terminal, or one line per block in a log.

Both name the block or the kind of work, and estimate how long the pass over the model still takes.
"""

import logging
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Protocol

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

logger = logging.getLogger(__name__)

REPEAT_AFTER = 60.0
"""Seconds after which a block that is not finished yet is logged again."""


class Step(Protocol):
    """A callable that reports progress: `done` of `total` steps are done.

    `what` is next: a block, a layer in it, or a kind of work.
    """

    def __call__(self, what: str, done: int, total: int) -> None: ...


@contextmanager
def progress_bar(shown: bool) -> Iterator[Step]:
    """Yield a function that reports progress.

    Where standard error is a terminal, it draws a bar there. Elsewhere it logs one line per block at level INFO.
    Python shows such lines only to programs that ask for them. The command line does.

    Args:
        shown: whether anything is reported. Among several processes, only the main one should report.
    """
    if not shown:
        yield lambda what, done, total: None
    elif sys.stderr.isatty():
        with _bar() as step:
            yield step
    else:
        yield _Log().step


@contextmanager
def _bar() -> Iterator[Step]:
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
    )
    # The estimate looks back over the whole pass, because one layer may take longer than the 30 seconds of rich.
    with Progress(*columns, console=Console(stderr=True), transient=True, speed_estimate_period=float("inf")) as bar:
        task = bar.add_task("", total=None)

        def step(what: str, done: int, total: int) -> None:
            if done < bar.tasks[0].completed:
                bar.reset(task)  # another pass over the model, at a pace of its own
            bar.update(task, description=what, completed=done, total=total)

        yield step


class _Log:
    """Logs a line when a block begins, and again only if it takes long. A layer gets no line."""

    def __init__(self) -> None:
        self.started = time.monotonic()
        self.pass_started = self.started
        self.logged = self.started
        self.block = ""
        self.done = 0

    def step(self, what: str, done: int, total: int) -> None:
        now = time.monotonic()
        is_layer = bool(self.block) and what.startswith(f"{self.block}.")
        is_new = what != self.block and not is_layer
        if not is_layer:
            if done == 0 or done < self.done:
                self.pass_started = now  # another pass over the model, at a pace of its own
            self.block = what
            self.done = done
        # Work of one name, such as training, may take hours, so it is named again from time to time.
        if not is_new and now - self.logged < REPEAT_AFTER:
            return
        self.logged = now
        line = f"{self.block}: {self.done} of {total} done, {_clock(now - self.started)} elapsed"
        if 0 < self.done < total:  # before the first block is done, nothing is known about its pace
            remaining = (now - self.pass_started) / self.done * (total - self.done)
            line += f", about {_clock(remaining)} remaining"
        logger.info(line)


def _clock(seconds: float) -> str:
    """Return a time as minutes and seconds, with hours before them if there are any."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    if hours:
        return f"{hours}:{minutes:02}:{rest:02}"
    return f"{minutes}:{rest:02}"
