"""Saves that are complete or did not happen: files are written beside their places, and moved there in the end."""

import os
import shutil
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from .checksums import CONFIG
from .errors import SaveError

PREFIX = ".partial-save-"
"""Beginning of the name of the hidden folder, inside the target, that files are written to."""
ABANDONED = 24 * 60 * 60
"""Seconds after which such a folder is what a killed process has left."""


@contextmanager
def staged(folder: Path) -> Iterator[Path]:
    """Yield an empty folder to write to, and remove it in the end. What is to stay, `move` puts into its place before.

    Raises:
        SaveError: if the folder cannot be written, or something in the block cannot.
    """
    if folder.exists() and not folder.is_dir():
        raise SaveError(folder, "it is a file; name a folder")
    created = [parent for parent in (folder, *folder.parents) if not parent.exists()]
    try:
        folder.mkdir(parents=True, exist_ok=True)
        _remove_abandoned(folder)
        partial = Path(tempfile.mkdtemp(prefix=PREFIX, dir=folder))
        try:
            yield partial
        finally:
            shutil.rmtree(partial, ignore_errors=True)
    except SaveError:
        raise
    except Exception as error:
        # safetensors reports a full disk by an error of its own.
        if not isinstance(error, OSError) and type(error).__name__ != "SafetensorError":
            raise
        reason = getattr(error, "strerror", None) or str(error)
        raise SaveError(folder, reason) from error
    finally:
        for parent in created:
            with suppress(OSError):  # it is not empty if it holds the result
                parent.rmdir()


def move(partial: Path, folder: Path) -> None:
    """Move all files of a staged save to their places, where they replace what has their names."""
    files = [file for file in partial.rglob("*") if file.is_file()]
    # The config comes last: it names the others and has their checksums.
    for file in sorted(files, key=lambda file: (file == partial / CONFIG, file)):
        target = folder / file.relative_to(partial)
        target.parent.mkdir(parents=True, exist_ok=True)
        os.replace(file, target)


def _remove_abandoned(folder: Path) -> None:
    for left in folder.glob(f"{PREFIX}*"):
        with suppress(OSError):
            if time.time() - left.stat().st_mtime > ABANDONED:
                shutil.rmtree(left)
