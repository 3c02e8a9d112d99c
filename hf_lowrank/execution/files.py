"""Helpers for files and for messages about them: atomic writes, sizes and errors of one line."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from ..runtime.errors import printable

UNITS = {"GB": 1e9, "MB": 1e6, "kB": 1e3}


def human_bytes(count: float, smallest_unit: str = "bytes") -> str:
    """Return a number of bytes with two decimals in GB, MB or kB (powers of 1000), or as whole bytes below 1 kB.

    Args:
        smallest_unit: the unit below which no smaller one is used: with "MB", 40 kB are "0.04 MB".
    """
    for unit, size in UNITS.items():
        if count >= size or unit == smallest_unit:
            return f"{count / size:.2f} {unit}"
    return f"{count:.0f} bytes"


def flush_to_disk(path: Path) -> None:
    """Bring the content of a file, or the names in a folder, to the disk."""
    if os.name == "nt" and path.is_dir():  # Windows does not open folders, and keeps their names by itself
        return
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def files_size(folder: str | Path) -> int:
    """Return how many bytes a folder's weights take on disk."""
    return sum(file.stat().st_size for file in Path(folder).glob("*.safetensors"))


@contextmanager
def atomic_file(path: Path) -> Iterator[Path]:
    """Yield a partial file to write, which replaces `path` if the block ends well and is removed otherwise.

    The content is on the disk before it takes the name, and the name before this returns. A kill or a loss of power at
    any instant leaves the old file or the new one, never a part of it. Two processes may not write the same file at a
    time.
    """
    # In the same folder, because a file can be renamed only within its file system.
    partial = path.with_name(f"{path.name}.partial")
    try:
        yield partial
        flush_to_disk(partial)
        partial.replace(path)
        flush_to_disk(path.parent)
    finally:
        partial.unlink(missing_ok=True)  # after the rename there is none


def write_atomically(path: Path, content: str | bytes) -> None:
    """Write a file so that it is complete, or as it was before. Text is written as UTF-8."""
    if isinstance(content, str):
        content = content.encode("utf-8")
    with atomic_file(path) as partial:
        partial.write_bytes(content)


def one_line(error: BaseException, limit: int = 300) -> str:
    """Return the first line of an error's message without control characters, or its type if it has no message.

    Args:
        limit: maximum number of characters kept of the line.
    """
    message = str(error).strip()
    if not message:
        return type(error).__name__
    # A message may quote a file from a stranger, which must not control the terminal.
    return printable(message.splitlines()[0][:limit])


def system_message(error: Exception) -> str:
    """Return the operating system's message about an error, or the error's own message if there is none."""
    return getattr(error, "strerror", None) or str(error)
