"""The ways into a checkpoint, and what each may do with one that has been tampered with: open it, or raise the one exception type."""

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

SECONDS = 10
SPARE_BYTES = 160 << 20
"""What an attempt may take beside twice the files: the process itself grows, and models make tables of up to 64 MiB."""
INPUT_IDS = [[1, 5, 9, 2, 60, 33, 7, 4]]


@dataclass
class Outcome:
    """What an attempt ended in: "opened", "refused", or what must not be ("crash: ...")."""

    verdict: str
    detail: str = ""

    @property
    def allowed(self) -> bool:
        return self.verdict in ("opened", "refused")


def plugin(folder: Path) -> str:
    model = AutoModelForCausalLM.from_pretrained(folder)
    with torch.no_grad():
        model(torch.tensor(INPUT_IDS))
    return type(model).__name__


def trusting(folder: Path) -> str:
    return type(AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True)).__name__


def config(folder: Path) -> str:
    return type(AutoConfig.from_pretrained(folder)).__name__


def verify(folder: Path) -> str:
    found = hf_lowrank.verify(folder)
    if not found.sound:
        assert all("\n" not in problem for problem in found.problems)
        raise CompressionError(found.problems[0])
    return "sound"


def inspect(folder: Path) -> str:
    return hf_lowrank.inspect(folder).method


def command(*arguments: str) -> str:
    result = CliRunner().invoke(cli.app, list(arguments))
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    if result.exit_code:
        lines = [line for line in result.stderr.splitlines() if line.startswith("error: ")]
        assert result.exit_code == 1 and len(lines) == 1, (result.exit_code, result.stderr[-2000:])
        raise CompressionError(lines[0])
    return "done"


def command_line(folder: Path) -> str:
    """`inspect`, `verify` and `dense`, one after the other."""
    outcomes = []
    for arguments in (
        ["inspect", str(folder)],
        ["verify", str(folder)],
        ["dense", str(folder), "-o", f"{folder}-dense"],
    ):
        try:
            outcomes.append(command(*arguments))
        except CompressionError as error:
            outcomes.append(str(error))
    return "; ".join(outcomes)


ROUTES: dict[str, Callable[[Path], str]] = {
    route.__name__: route for route in (plugin, trusting, config, verify, inspect, command_line)
}


def attempt(route: Callable[[Path], str], folder: Path) -> Outcome:
    """Take a route with a limit on time and memory, and a trap for code that runs."""
    canary = Path(f"{folder}.canary")
    os.environ[CANARY] = str(canary)
    size = sum(file.stat().st_size for file in folder.iterdir() if file.is_file())
    before, started = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024, time.monotonic()
    signal.signal(signal.SIGALRM, _too_long)
    signal.alarm(SECONDS)
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
    grown = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 - before
    if canary.exists():
        canary.unlink()
        return Outcome("code was run", outcome.detail)
    if grown > 2 * size + SPARE_BYTES:
        return Outcome(f"took {grown >> 20} MiB for {size >> 10} KiB", outcome.detail)
    if outcome.allowed and time.monotonic() - started > SECONDS:
        return Outcome(f"took {time.monotonic() - started:.0f} seconds", outcome.detail)
    return outcome


def same_model(folder: Path, other: Path) -> bool:
    """Whether two folders open to the same tensors."""
    state, known = (AutoModelForCausalLM.from_pretrained(each).state_dict() for each in (folder, other))
    return state.keys() == known.keys() and all(torch.equal(state[name], known[name]) for name in state)


def _too_long(*_: Any) -> None:
    raise TimeoutError(f"more than {SECONDS} seconds")


def summary(outcomes: dict[str, int]) -> str:
    return json.dumps(dict(sorted(outcomes.items(), key=lambda item: -item[1])))
