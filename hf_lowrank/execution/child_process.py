"""`hf-lowrank` in a process of its own: its output or its one-line reason, its time and its peak memory; no child outlives us."""

import re
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from ..runtime.errors import CompressionError

POLL_SECONDS = 0.02


class ProcessError(CompressionError):
    """A process of ours ended badly.

    Attributes:
        explained: whether it said why, so that it would say the same again; a crash or a kill may not happen twice.
    """

    def __init__(self, reason: str, explained: bool) -> None:
        super().__init__(reason)
        self.explained = explained


def run(arguments: list[str]) -> tuple[str, float, int | None]:
    """Run `hf-lowrank` in a process of its own.

    Returns:
        Its output, its seconds from start to end, and the high-water mark of its resident memory in bytes. The mark is read from /proc
        every 20 ms: what `wait4` reports is never less than the memory of the process that started it. None where there is no /proc.

    Raises:
        ProcessError: with the one line that it gave as the reason.
    """
    started, peak = time.monotonic(), None
    with (
        tempfile.TemporaryFile("w+", encoding="utf-8") as output,
        tempfile.TemporaryFile("w+", encoding="utf-8") as errors,
        noted_signals() as noted,
    ):
        process = subprocess.Popen([sys.executable, "-m", "hf_lowrank", *arguments], stdout=output, stderr=errors)
        try:
            while process.poll() is None and not noted:
                peak = _peak_memory(process.pid) or peak
                time.sleep(POLL_SECONDS)
        finally:
            process.kill()
            process.wait()
        if noted:
            raise KeyboardInterrupt if noted[0] == signal.SIGINT else SystemExit(128 + noted[0])
        seconds = time.monotonic() - started
        output.seek(0)
        errors.seek(0)
        if process.returncode == 0:
            return output.read(), seconds, peak
        lines = [line.strip() for line in errors.read().splitlines() if line.strip()] or ["it gave no reason"]
    if lines[-1].startswith("error: "):
        raise ProcessError(lines[-1].removeprefix("error: "), explained=True)
    raise ProcessError(f"{arguments[0]} ended with exit status {process.returncode}: {lines[-1]}", explained=False)


@contextmanager
def noted_signals() -> Iterator[list[int]]:
    """While active, SIGINT and SIGTERM are only noted: one that comes while a child is started would leave it behind."""
    noted: list[int] = []
    if threading.current_thread() is not threading.main_thread():  # only the main thread gets signals
        yield noted
        return
    before = {
        number: signal.signal(number, lambda number, frame: noted.append(number))
        for number in (signal.SIGINT, signal.SIGTERM)
    }
    try:
        yield noted
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _peak_memory(process: int) -> int | None:
    try:
        status = Path(f"/proc/{process}/status").read_text(encoding="utf-8")
    except OSError:
        return None
    found = re.search(r"VmHWM:\s*(\d+) kB", status)
    return int(found[1]) * 1024 if found else None
