"""The progress bar of a compression; it names the block and the layer, and estimates how long the pass over the model still takes."""

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Protocol

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn


class Step(Protocol):
    """Report that `done` of `total` steps are behind, now at `what`."""

    def __call__(self, what: str, done: int, total: int) -> None: ...


@contextmanager
def progress_bar(shown: bool) -> Iterator[Step]:
    """A bar on the terminal's standard error; silent if not `shown`, or where standard error is no terminal."""
    if not shown or not sys.stderr.isatty():
        yield lambda what, done, total: None
        return
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
    )
    # seconds that the estimate of what remains looks back: a layer may take longer than the 30 of rich
    with Progress(*columns, console=Console(stderr=True), transient=True, speed_estimate_period=float("inf")) as bar:
        task = bar.add_task("", total=None)

        def step(what: str, done: int, total: int) -> None:
            if done < bar.tasks[0].completed:
                bar.reset(task)  # another pass over the model, at a pace of its own
            bar.update(task, description=what, completed=done, total=total)

        yield step
