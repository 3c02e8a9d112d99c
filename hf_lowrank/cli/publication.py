"""Commands that publish models: push."""

from pathlib import Path
from typing import Annotated

import typer

from ..execution.files import one_line
from ..runtime.errors import CompressionError
from .base import app, one_line_errors


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
