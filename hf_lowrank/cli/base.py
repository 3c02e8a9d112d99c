"""The application that the verbs register with, the options they share, and how they print and fail."""

import dataclasses
import json
import logging
import os
import signal
import sys
import threading
from collections.abc import Callable
from functools import wraps
from pathlib import Path
from typing import Annotated, Any

import typer
import typer.core

from ..execution.files import one_line, system_message
from ..execution.process_group import RemoteError, torchrun_rank
from ..runtime.configuration import CompressionConfig
from ..runtime.errors import CompressionError

app = typer.Typer(
    name="hf-lowrank",
    help="Turn Hugging Face language models into sparse + low-rank (+ binary) layers.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)

HELP = {field.name: field.metadata["help"] for field in dataclasses.fields(CompressionConfig)}

OUT_OF_MEMORY = "out of memory; use fewer --samples, a shorter --sequence-length or a smaller dtype"

Json = Annotated[bool, typer.Option("--json", help="print JSON for machines instead of a table")]
Dtype = Annotated[str, typer.Option(help="auto (as stored), float32, bfloat16 or float16")]
Device = Annotated[str, typer.Option(help="device to work on, such as cpu or cuda")]
Overwrite = Annotated[bool, typer.Option("--overwrite", help="replace the output folder if it is not empty")]
Output = Annotated[Path, typer.Option("-o", "--output", help="folder to write")]


def one_line_errors(command: Callable[..., None]) -> Callable[..., None]:
    """What goes wrong is one line on standard error and exit code 1, never a traceback."""

    @wraps(command)
    def run(*args: Any, **kwargs: Any) -> None:
        try:
            command(*args, **kwargs)
        except RemoteError:
            raise typer.Exit(1) from None
        except CompressionError as error:
            _fail(str(error))
        except MemoryError:
            _fail(OUT_OF_MEMORY)
        except RuntimeError as error:
            if str(error).startswith("CUDA error"):
                _fail(f"the device failed ({one_line(error)}); nothing was left behind")
            if not any(sign in str(error) for sign in ("out of memory", "DefaultCPUAllocator")):
                raise
            _fail(OUT_OF_MEMORY)
        except OSError as error:
            _fail(f"{error.filename or 'input/output'}: {system_message(error)}; check the path and the free space")
        except KeyboardInterrupt as error:
            terminated = isinstance(error, Terminated)
            what = "terminated" if terminated else "interrupted"
            if terminated and torchrun_rank() is not None:
                what = f"{_process()}terminated, as all are when one of them ends; the same command goes on from the work folder, if any"
            typer.echo(f"{what}; nothing was left behind", err=True)
            raise typer.Exit(143 if terminated else 130) from None

    return run


class Terminated(KeyboardInterrupt):
    """SIGTERM, which ends a command as Ctrl-C does: cleanly."""


def _terminate(*_: Any) -> None:
    raise Terminated


class SeveralValues(typer.core.TyperCommand):
    """Options of several values take them one after the other: `--ratios 0.2 0.3` is `--ratios 0.2 --ratios 0.3`.

    Only where the arguments without a name come first, which otherwise could not be told from one more value.
    """

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        several = {
            name for parameter in self.params if getattr(parameter, "multiple", False) for name in parameter.opts
        }
        spread: list[str] = []
        option = None
        for argument in args:
            if argument.startswith("-"):
                option = argument if argument in several else None
            elif option is not None and spread[-1] != option and not spread[0].startswith("-"):
                spread.append(option)
            spread.append(argument)
        return super().parse_args(ctx, spread)


@app.callback()
def main() -> None:
    """Quiet neighbours: only our own warnings reach the terminal."""
    import transformers

    if threading.current_thread() is threading.main_thread():  # the only one in which Python allows it
        for number, handler in ((signal.SIGINT, signal.default_int_handler), (signal.SIGTERM, _terminate)):
            if signal.getsignal(number) is not signal.SIG_IGN:
                signal.signal(number, handler)
    logging.basicConfig(
        level=logging.ERROR if torchrun_rank() else logging.WARNING, format="%(message)s", stream=sys.stderr
    )
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    logging.getLogger("accelerate").setLevel(logging.ERROR)
    logging.getLogger("datasets").setLevel(logging.CRITICAL)  # what it fails at is an error of ours
    os.environ.setdefault("HF_DATASETS_DISABLE_PROGRESS_BARS", "1")


def show_totals(found: Any) -> None:
    dense_layers = sum(layer.kind == "dense" for layer in found.layers)
    typer.echo(
        f"block linears: asked {found.ratio_asked:.1%} removed, stored {found.ratio_stored:.2%} removed "
        f"({found.ratio_paper:.2%} without mask bits): {found.block_bytes:,} of {found.dense_block_bytes:,} bytes; "
        f"{len(found.layers) - dense_layers} layers compressed, {dense_layers} left dense"
    )
    typer.echo(
        f"whole model: {found.model_ratio:.2%} removed, {found.model_bytes:,} of {found.dense_model_bytes:,} bytes; "
        f"on disk {found.disk_bytes:,} bytes"
    )
    for warning in found.warnings:
        typer.echo(f"warning: {warning}", err=True)


def tokenizer_or_none(source: str) -> Any:
    from ..models.loading import load_tokenizer

    try:
        return load_tokenizer(source)
    except CompressionError as error:
        typer.echo(f"warning: {error}; going on without", err=True)
        return None


def print_json(value: Any) -> None:
    typer.echo(json.dumps(value, indent=1))


def print_table(title: str, columns: list[str], rows: list[list[str]]) -> None:
    from rich.console import Console
    from rich.table import Table

    table = Table(*columns, title=title, title_justify="left")
    for row in rows:
        table.add_row(*row)
    console = Console()
    if not console.is_terminal:
        console = Console(width=200)
    console.print(table)


def _fail(message: str) -> None:
    typer.echo(f"{_process()}error: {message}", err=True)
    raise typer.Exit(1)


def _process() -> str:
    rank = torchrun_rank()
    return "" if rank is None else f"process {rank}: "
