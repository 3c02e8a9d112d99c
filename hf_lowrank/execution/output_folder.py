"""Output folders that appear only when they are complete."""

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from safetensors import SafetensorError

from ..runtime.errors import CompressionError, path_in_message
from .files import flush_to_disk, system_message
from .locking import is_held, locked


@contextmanager
def new_folder(folder: str | Path, overwrite: bool = False) -> Iterator[Path]:
    """Yield a folder to write into, which takes its name only if the block ends well. Otherwise nothing is left of it.

    The next process that writes to the same name removes the files of a killed one, or puts them back if they were
    the old content.

    Raises:
        CompressionError: if `folder` exists and is not empty (unless `overwrite`), or cannot be written.
    """
    target = Path(folder).absolute()
    check_free(target, overwrite)
    partial = target.with_name(f".{target.name}.partial-{os.getpid()}")
    new_parents = [parent for parent in target.parents if not parent.exists()]
    try:
        partial.mkdir(parents=True)
        try:
            with locked(partial):  # by which other processes see that this one lives
                yield partial
                _publish(partial, target)
        finally:
            shutil.rmtree(partial, ignore_errors=True)
            for parent in new_parents:
                with suppress(OSError):  # it is not empty if it holds the result
                    parent.rmdir()
    except (OSError, SafetensorError) as error:  # safetensors reports a full disk by an error of its own
        raise CompressionError(
            f"{path_in_message(target)}: cannot be written ({system_message(error)}); nothing was left behind"
        ) from error


def check_free(folder: str | Path, overwrite: bool = False) -> None:
    """Raise CompressionError if an output folder is taken. The folders of killed processes are cleaned up first."""
    target = Path(folder)
    _clean_up_after_kills(target.absolute())
    if target.resolve() == Path.cwd():
        raise CompressionError(f"{folder}: is the current folder, which cannot be replaced; name a new one")
    if target.exists() and not overwrite and (target.is_file() or any(target.iterdir())):
        raise CompressionError(f"{target}: exists and is not empty; choose another folder or add --overwrite")


def _publish(partial: Path, target: Path) -> None:
    """Bring the files of a complete folder to the disk and give it its name. A folder that had it is replaced."""
    for file in partial.rglob("*"):
        if file.is_file():
            flush_to_disk(file)
    replaced = target.with_name(f".{target.name}.replaced-{os.getpid()}")
    if target.exists():  # it is moved aside first, so that a kill between the two renames loses neither
        target.replace(replaced)
    partial.replace(target)
    _remove(replaced)


def _clean_up_after_kills(target: Path) -> None:
    """Undo what killed processes left half done beside `target`: put old content back, and remove partial folders."""
    with suppress(OSError):
        for replaced in target.parent.glob(f".{target.name}.replaced-*"):
            if target.exists():
                _remove(replaced)
            else:
                replaced.replace(target)
        for partial in target.parent.glob(f".{target.name}.partial-*"):
            if not is_held(partial):
                shutil.rmtree(partial, ignore_errors=True)


def _remove(path: Path) -> None:
    """Remove a file or a folder, if it is there."""
    if path.is_dir():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)
