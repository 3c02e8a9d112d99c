"""`hf-lowrank` in a process of its own, with its time and its peak memory. No child outlives this process."""

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
"""Time between two looks at a running child."""


class ProcessError(CompressionError):
    """A child process that ended badly.

    Attributes:
        explained: whether the child said why. Then it would say the same again, whereas a crash or a kill may not
            happen twice.
    """

    def __init__(self, reason: str, explained: bool) -> None:
        super().__init__(reason)
        self.explained = explained


def run(arguments: list[str]) -> tuple[str, float, int | None]:
    """Run `hf-lowrank` in a process of its own.

    Returns:
        Its output, its seconds from start to end, and the high-water mark of its resident memory in bytes. The mark is
        read from /proc every 20 ms, because the figure of `wait4` is never less than the memory of the process that
        started the child. It is None where there is no /proc.

    Raises:
        ProcessError: if it fails, with its last line as the reason.
    """
    started = time.monotonic()
    peak = None
    with (
        tempfile.TemporaryFile("w+", encoding="utf-8") as output,
        tempfile.TemporaryFile("w+", encoding="utf-8") as errors,
        deferred_signals() as signals,
    ):
        process = subprocess.Popen([sys.executable, "-m", "hf_lowrank", *arguments], stdout=output, stderr=errors)
        try:
            # The output goes to files, not pipes, so that a child that prints much does not block.
            while process.poll() is None and not signals:
                peak = _peak_memory(process.pid) or peak
                time.sleep(POLL_SECONDS)
        finally:
            process.kill()  # which does nothing to a child that has ended
            process.wait()
        if signals:
            _act_on(signals[0])
        seconds = time.monotonic() - started
        output.seek(0)
        errors.seek(0)
        if process.returncode == 0:
            return output.read(), seconds, peak
        last_line = _last_line(errors.read())
    # The command line puts this before what it says on purpose; anything else is the end of a crash.
    if last_line.startswith("error: "):
        raise ProcessError(last_line.removeprefix("error: "), explained=True)
    raise ProcessError(f"{arguments[0]} ended with exit status {process.returncode}: {last_line}", explained=False)


@contextmanager
def deferred_signals() -> Iterator[list[int]]:
    """Yield a list to which SIGINT and SIGTERM are added while active, instead of ending the process.

    A signal that raised an exception while a child is being started would leave that child behind.
    """
    received: list[int] = []
    if threading.current_thread() is not threading.main_thread():  # only the main thread receives signals
        yield received
        return
    handlers = {}
    for number in (signal.SIGINT, signal.SIGTERM):
        handlers[number] = signal.signal(number, lambda number, frame: received.append(number))
    try:
        yield received
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)


def _act_on(number: int) -> None:
    """Raise the exception that a signal would have raised when it came."""
    if number == signal.SIGINT:
        raise KeyboardInterrupt
    raise SystemExit(128 + number)


def _last_line(errors: str) -> str:
    """Return the last line of a child's standard error that is not blank."""
    lines = [line.strip() for line in errors.splitlines() if line.strip()]
    return lines[-1] if lines else "it gave no reason"


def _peak_memory(process: int) -> int | None:
    """Return the high-water mark of a process's resident memory in bytes, or None if it cannot be read."""
    try:
        status = Path(f"/proc/{process}/status").read_text(encoding="utf-8")
    except OSError:
        return None
    match = re.search(r"VmHWM:\s*(\d+) kB", status)
    return int(match[1]) * 1024 if match else None
