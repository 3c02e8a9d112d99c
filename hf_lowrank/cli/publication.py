"""Commands that hand models on: export, push."""

from pathlib import Path
from typing import Annotated

import typer

from ..execution.files import one_line
from ..runtime.errors import CompressionError
from .base import app, one_line_errors
from .options import Overwrite
from .output import print_table


@app.command()
@one_line_errors
def export(
    folder: Annotated[str, typer.Argument(help="compressed checkpoint")],
    output: Annotated[Path, typer.Option("-o", "--output", help="folder to write; for gguf, the file")],
    format: Annotated[str, typer.Option("--format", help="compressed-tensors or gguf")],
    exact: Annotated[
        bool, typer.Option("--exact", help="refuse if a layer would get other values than the checkpoint has")
    ] = False,
    dense_type: Annotated[
        str, typer.Option(help="for gguf, type of what is not stored as integers: auto, f32, f16, bf16 or q8_0")
    ] = "auto",
    overwrite: Overwrite = False,
) -> None:
    """Write a compressed model in a format of other engines, which need nothing of this package."""
    from ..exporting.export import export as write

    result = write(folder, output, format, exact=exact, dense_type=dense_type, overwrite=overwrite)
    rows = [[str(count), form, loss] for count, form, loss in result.summary()]
    print_table("compressed layers in the exported model", ["layers", "form", "values"], rows)
    typer.echo(f"wrote {output}: {result.bytes:,} bytes of weights")


@app.command()
@one_line_errors
def push(
    folder: Annotated[Path, typer.Argument(help="compressed checkpoint")],
    repo: Annotated[str, typer.Argument(help="repository on the Hub: owner/name")],
    private: Annotated[
        bool, typer.Option("--private", help="make the repository private, if it does not exist yet")
    ] = False,
    revision: Annotated[str | None, typer.Option(help="branch to push to")] = None,
    message: Annotated[str | None, typer.Option(help="commit message")] = None,
) -> None:
    """Push a compressed checkpoint to the Hub, with its card and loading code. Repeat a push that broke off."""
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalTokenNotFoundError

    from ..publishing.hub import push_folder

    try:
        commit = push_folder(
            folder,
            repo,
            private=private or None,
            revision=revision,
            commit_message=message,
            announce=lambda line: typer.echo(line, err=line.startswith("warning: ")),
        )
    except (HfHubHTTPError, HFValidationError, LocalTokenNotFoundError) as error:
        raise CompressionError(f"{repo}: the Hub refused the push ({one_line(error)}); see `hf auth login`") from error
    except Exception as error:
        # The error is of offline mode, or of whichever version of httpx huggingface_hub uses.
        if not isinstance(error, ConnectionError) and not type(error).__module__.startswith("httpx"):
            raise
        raise CompressionError(
            f"{repo}: the Hub cannot be reached ({error}); push again when there is a connection"
        ) from error
    typer.echo(f"pushed {folder} to {commit.repo_url} ({commit.oid[:7]})")
