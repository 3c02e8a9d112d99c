"""The entry of the command `hf-lowrank`. A signal while torch is being imported ends it in one line, too."""

import os
import signal
from typing import Any

ENDINGS = {signal.SIGINT: "interrupted", signal.SIGTERM: "terminated"}
"""The word for each signal that ends the command."""


def main() -> None:
    """Run the command line. Its commands handle signals themselves once they have imported torch."""
    for number in ENDINGS:
        if signal.getsignal(number) is not signal.SIG_IGN:  # whoever ignores it, `nohup` for one, wants that
            signal.signal(number, _end)
    from hf_lowrank.cli import app

    app()


def _end(number: int, frame: Any) -> None:
    """End at once: an import could swallow an exception, and nothing was begun that would have to be undone."""
    os.write(2, f"{ENDINGS[signal.Signals(number)]}; no output was written\n".encode())
    os._exit(128 + number)
