"""Tries the ways into a checkpoint that was tampered with.

A way may open it, or raise a CompressionError, and nothing else.
"""

import json
import os
import resource
import signal
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM
from typer.testing import CliRunner

import hf_lowrank
from hf_lowrank import CompressionError, cli
from tests.fuzz.mutations import CANARY
from tests.support.fresh_process import INPUT_IDS

SECONDS = 10
"""Maximum number of seconds of an attempt."""
SPARE_BYTES = 160 << 20
"""Maximum number of bytes that an attempt takes besides twice the files.

The process itself grows, and models make tables of up to 64 MiB.
"""


@dataclass
class Outcome:
    """The end of an attempt.

    Attributes:
        verdict: "opened", "refused", or what must not happen ("crash: ...").
        detail: what the route returned, or the message of the error.
    """

    verdict: str
    detail: str = ""

    @property
    def allowed(self) -> bool:
        return self.verdict in ("opened", "refused")


def plugin(folder: Path) -> str:
    model = AutoModelForCausalLM.from_pretrained(folder)
    with torch.no_grad():
        model(torch.tensor(INPUT_IDS[:1]))
    return type(model).__name__


def trusting(folder: Path) -> str:
    return type(AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True)).__name__


def config(folder: Path) -> str:
    return type(AutoConfig.from_pretrained(folder)).__name__


def verify(folder: Path) -> str:
    verification = hf_lowrank.verify(folder)
    if not verification.sound:
        assert all("\n" not in problem for problem in verification.problems)
        raise CompressionError(verification.problems[0])
    return "sound"


def inspect(folder: Path) -> str:
    return hf_lowrank.inspect(folder).method


def command(*arguments: str) -> str:
    """Run a command of `hf-lowrank` in this process, and raise its error line as a CompressionError if it fails."""
    result = CliRunner().invoke(cli.app, list(arguments))
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    if result.exit_code:
        lines = [line for line in result.stderr.splitlines() if line.startswith("error: ")]
        assert result.exit_code == 1 and len(lines) == 1, (result.exit_code, result.stderr[-2000:])
        raise CompressionError(lines[0])
    return "done"


def command_line(folder: Path) -> str:
    """Run `inspect`, `verify` and `dense`, one after the other."""
    outcomes = []
    commands = [["inspect", str(folder)], ["verify", str(folder)], ["dense", str(folder), "-o", f"{folder}-dense"]]
    for arguments in commands:
        try:
            outcomes.append(command(*arguments))
        except CompressionError as error:
            outcomes.append(str(error))
    return "; ".join(outcomes)


_ALL_ROUTES = (plugin, trusting, config, verify, inspect, command_line)
ROUTES: dict[str, Callable[[Path], str]] = {route.__name__: route for route in _ALL_ROUTES}
"""Every way into a checkpoint by its name. It opens the folder and returns a word about it, or raises an error."""


def attempt(route: Callable[[Path], str], folder: Path) -> Outcome:
    """Take a route, with limits on time and memory and a trap for code that runs."""
    canary = Path(f"{folder}.canary")
    os.environ[CANARY] = str(canary)
    size = sum(file.stat().st_size for file in folder.iterdir() if file.is_file())
    before, started = _peak_memory(), time.monotonic()
    signal.signal(signal.SIGALRM, _too_long)
    signal.alarm(SECONDS)  # raises TimeoutError in the middle of the route
    try:
        outcome = Outcome("opened", route(folder))
    except CompressionError as error:
        outcome = Outcome("refused", str(error))
        if "\n" in str(error):
            outcome = Outcome("several lines", str(error))
    except Exception as error:
        outcome = Outcome(f"crash: {type(error).__name__}", str(error).strip()[:400])
    finally:
        signal.alarm(0)
    grown = _peak_memory() - before
    if canary.exists():  # code of the checkpoint ran, whatever came of the attempt
        canary.unlink()
        return Outcome("code was run", outcome.detail)
    if grown > 2 * size + SPARE_BYTES:
        return Outcome(f"took {grown >> 20} MiB for {size >> 10} KiB", outcome.detail)
    # C code does not see the alarm, so the time is also measured afterwards.
    if outcome.allowed and time.monotonic() - started > SECONDS:
        return Outcome(f"took {time.monotonic() - started:.0f} seconds", outcome.detail)
    return outcome


def same_model(folder: Path, other: Path) -> bool:
    """Return whether two folders open to the same tensors."""
    first = AutoModelForCausalLM.from_pretrained(folder).state_dict()
    second = AutoModelForCausalLM.from_pretrained(other).state_dict()
    return first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)


def _peak_memory() -> int:
    """Return the largest number of bytes that this process has held so far."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def _too_long(*_: Any) -> None:
    raise TimeoutError(f"more than {SECONDS} seconds")


def summary(outcomes: dict[str, int]) -> str:
    """Return how often attempts came to every verdict, the most frequent first."""
    return json.dumps(dict(sorted(outcomes.items(), key=lambda item: -item[1])))
