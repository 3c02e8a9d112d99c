"""One process at a time in a folder: a lock that the system takes back when the process that holds it is gone, however it went."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from ..runtime.errors import CompressionError

try:
    import fcntl
except ImportError:  # Windows cannot lock a folder; two processes that share one there are not told apart
    fcntl = None  # type: ignore[assignment]


@contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Hold a folder; nothing is written into it for that.

    Raises:
        CompressionError: if another process holds it.
    """
    if fcntl is None:
        yield
        return
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise CompressionError(
                f"{folder}: another process is working in it; wait until it ends, or name another folder"
            ) from None
        yield
    finally:
        os.close(descriptor)


def is_held(folder: Path) -> bool:
    """Whether a process holds a folder."""
    try:
        with locked(folder):
            return fcntl is None
    except CompressionError:
        return True
