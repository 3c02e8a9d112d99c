"""A lock on a folder for one process at a time. The system releases it when the process is gone, however it ended."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from ..runtime.errors import CompressionError

try:
    import fcntl
except ImportError:  # Windows cannot lock a folder, so two processes in one folder go unnoticed there
    fcntl = None  # type: ignore[assignment]


@contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Hold the lock of a folder, without writing anything into it.

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
        os.close(descriptor)  # which releases the lock


def is_held(folder: Path) -> bool:
    """Return whether a process holds the lock of a folder. Where folders cannot be locked, assume that one does."""
    try:
        with locked(folder):
            return fcntl is None
    except CompressionError:
        return True
