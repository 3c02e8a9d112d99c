"""The progress bar of a compression; it names the block and the layer."""

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
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(), TimeRemainingColumn())
    with Progress(*columns, console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task("", total=None)
        yield lambda what, done, total: bar.update(task, description=what, completed=done, total=total)
