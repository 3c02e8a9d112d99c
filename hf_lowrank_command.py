"""The entry of the command `hf-lowrank`: a signal that comes while torch is still being imported ends it in one line, too."""

import os
import signal
from typing import Any

WHAT = {signal.SIGINT: "interrupted", signal.SIGTERM: "terminated"}


def main() -> None:
    """Import the command line and run it."""
    before = {number: signal.getsignal(number) for number in WHAT}
    for number, handler in before.items():
        if handler is not signal.SIG_IGN:
            signal.signal(number, _end)
    from hf_lowrank.cli import app

    for number, handler in before.items():
        signal.signal(number, handler)
    app()


def _end(number: int, frame: Any) -> None:
    """At once: an exception could be lost in what is being imported, and nothing was begun that would have to be undone."""
    os.write(2, f"{WHAT[signal.Signals(number)]}; nothing was left behind\n".encode())
    os._exit(128 + number)
