"""Calls the command line within this process."""

from typing import Any

from typer.testing import CliRunner, Result

from hf_lowrank import cli

QUICK = ["--samples", "4", "--sequence-length", "16"]


def run(*arguments: Any) -> Result:
    return CliRunner().invoke(cli.app, [str(argument) for argument in arguments])


def fails(message: str, *arguments: Any) -> None:
    """The command ends with exit code 1 and one line that holds the message."""
    result = run(*arguments)
    assert isinstance(result.exception, SystemExit), repr(result.exception)
    assert result.exit_code == 1
    lines = [line for line in result.stderr.splitlines() if not line.startswith("warning:")]
    assert len(lines) == 1, result.stderr
    assert lines[0].startswith("error: ")
    assert message in lines[0]
    assert result.stdout == ""
