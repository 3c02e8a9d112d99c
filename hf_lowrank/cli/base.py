"""The application that the commands register with, and how a command starts and fails."""

import logging
import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import wraps
from typing import Any

import typer

from ..execution.files import one_line, system_message
from ..execution.torchrun import RemoteError, torchrun_rank
from ..runtime.errors import CompressionError

app = typer.Typer(
    name="hf-lowrank",
    help="Turn Hugging Face language models into sparse + low-rank (+ binary) layers.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)

OUT_OF_MEMORY = (
    "out of memory; use fewer --samples, a shorter --sequence-length or a smaller dtype; "
    "name a --calibration text, or a method without gradients (--dry-run)"
)
"""Message for a lack of memory, with the cures. `--dry-run` says how much memory each of them takes."""
MEMORY_SIGNS = ("out of memory", "DefaultCPUAllocator")
"""Parts of the messages by which torch says that memory ran out."""

SHOWN_LOGGERS = ("hf_lowrank.execution.progress", "hf_lowrank.compression.from_disk")
"""Loggers of what a user of the command line shall know though it is no warning.

That is how far a run has come, and whether all of the model is in memory or a block at a time.
"""


class Terminated(KeyboardInterrupt):
    """SIGTERM. It ends a command as Ctrl-C does, with everything cleaned up."""


@app.callback()
def main() -> None:
    """Let warnings and progress of this package reach the terminal, and only errors of other packages."""
    # Of several processes all have the same warnings, so only the main one prints them.
    level = logging.ERROR if torchrun_rank() else logging.WARNING
    logging.basicConfig(level=level, format="%(message)s", stream=sys.stderr)
    if not torchrun_rank():
        for name in SHOWN_LOGGERS:
            logging.getLogger(name).setLevel(logging.INFO)
    logging.getLogger("accelerate").setLevel(logging.ERROR)
    logging.getLogger("datasets").setLevel(logging.CRITICAL)  # where it fails, an error of ours says so
    os.environ.setdefault("HF_DATASETS_DISABLE_PROGRESS_BARS", "1")


def one_line_errors(command: Callable[..., None]) -> Callable[..., None]:
    """Make a function a command: an error in it is one line on standard error and exit code 1, never a traceback.

    The libraries are imported when the command begins, so that help texts and mistakes in options are shown at once.
    """

    @wraps(command)
    def run(*args: Any, **kwargs: Any) -> None:
        try:
            # Until both are done, a signal ends the process at once (`hf_lowrank_command`).
            _import_libraries()
            _handle_signals()
            command(*args, **kwargs)
        except RemoteError:  # the process that raised it has said why
            raise typer.Exit(1) from None
        except CompressionError as error:
            _fail(str(error))
        except MemoryError:
            _fail(OUT_OF_MEMORY)
        except RuntimeError as error:
            message = _runtime_error(error)
            if message is None:  # a fault of ours, which shall be seen with its traceback
                raise
            _fail(message)
        except OSError as error:
            place = error.filename or "input/output"
            _fail(f"{place}: {system_message(error)}; check the path and the free space")
        except KeyboardInterrupt as error:
            _end(isinstance(error, Terminated), str(error) or "no output was written")

    return run


def _import_libraries() -> None:
    """Import torch, transformers and the plugin, which takes seconds, and keep transformers quiet."""
    import transformers

    from ..runtime import layers  # noqa: F401

    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()


def _handle_signals() -> None:
    """From now on, let SIGINT and SIGTERM raise exceptions, so that the command cleans up after itself."""
    if threading.current_thread() is not threading.main_thread():  # the only one in which Python allows it
        return
    for number, handler in ((signal.SIGINT, signal.default_int_handler), (signal.SIGTERM, _terminate)):
        if signal.getsignal(number) is not signal.SIG_IGN:  # `nohup` and shells ignore some on purpose
            signal.signal(number, handler)


def _terminate(*_: Any) -> None:
    raise Terminated


def _runtime_error(error: RuntimeError) -> str | None:
    """Return the message for an error of the device or its memory, or None for an error in the program."""
    if str(error).startswith("CUDA error"):
        return f"the device failed ({one_line(error)}); no output was written"
    if any(sign in str(error) for sign in MEMORY_SIGNS):
        return OUT_OF_MEMORY
    return None


def _fail(message: str) -> None:
    typer.echo(f"{_process()}error: {message}", err=True)
    raise typer.Exit(1)


@contextmanager
def says_when_interrupted(outcome: str) -> Iterator[None]:
    """Let a command that a signal ends say what is left of its work, where that is more than nothing."""
    try:
        yield
    except KeyboardInterrupt as error:
        raise type(error)(outcome) from None


def _end(terminated: bool, outcome: str) -> None:
    """End the command after a signal, and say what is left of its work."""
    what = "terminated" if terminated else "interrupted"
    if terminated and torchrun_rank() is not None:
        what = (
            f"{_process()}terminated, as all are when one of them ends; "
            "the same command goes on from the work folder, if any"
        )
    typer.echo(f"{what}; {outcome}", err=True)
    raise typer.Exit(143 if terminated else 130) from None


def _process() -> str:
    """Return the beginning of a line that names this process, if there are several."""
    rank = torchrun_rank()
    return "" if rank is None else f"process {rank}: "
