"""A folder in which a run records what it has finished, so that a run killed at any instant goes on from there."""

import hashlib
import json
from collections.abc import Iterable
from contextlib import ExitStack, suppress
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from ..runtime.errors import CompressionError, path_in_message, quoted
from .files import atomic_file, system_message, write_atomically
from .locking import locked

IDENTITY = "run.json"
"""Name of the file that says which run the records belong to."""
FINISHED = "finished"
"""Name of the empty file that says that the run is done."""
RUN_FILE_PATTERNS = ("*.safetensors", "*.partial", "*.bin")
"""Patterns of the other files that a run writes into its folder."""


class Record(NamedTuple):
    """A finished part of a run: tensors by name, and facts as plain JSON values."""

    tensors: dict[str, Tensor]
    facts: dict[str, Any]


class WorkFolder:
    """The folder of one run, locked as long as the run's process lives.

    Every file takes its name only when it is complete and on the disk, so a kill leaves each record whole or absent.

    Args:
        path: the folder, which is created if it does not exist.

    Raises:
        CompressionError: if another run works in it, or it cannot be written.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        self._lock = ExitStack()  # released in `__exit__`, or by the system when the process is gone
        try:
            self.path.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise self._unwritable(error) from error
        self._lock.enter_context(locked(self.path))

    def __enter__(self) -> "WorkFolder":
        return self

    def __exit__(self, *error: object) -> None:
        """Release the folder for other runs, and remove it if it is empty."""
        with suppress(OSError):  # which says that it is not empty
            self.path.rmdir()
        self._lock.close()

    def claim(self, identity: dict[str, Any]) -> None:
        """Say which run this is, and go on with its records if the folder holds them.

        A folder that is new, or holds another run that is finished, is taken over.

        Args:
            identity: plain JSON values that describe the run: weights, calibration, config, versions.

        Raises:
            CompressionError: if the folder holds another run that is not finished; the message names what differs.
        """
        recorded = self._read_identity()
        current = json.loads(json.dumps(identity))  # as it will be read back
        if recorded is not None and recorded != current:
            if not (self.path / FINISHED).exists():
                raise CompressionError(
                    f"{self.path}: holds a run that differs in {difference(recorded, current)}; "
                    "repeat that one, or delete the folder, or name another"
                )
            self.clear()  # a run that is finished no longer needs its records
            recorded = None
        if recorded is None:
            self._write(IDENTITY, json.dumps(current, indent=1).encode())

    def read(self, name: str) -> Record | None:
        """Return a record on every process of the run, or None if it was not finished.

        A subclass for several processes overrides this method: all processes call it, and the main one sends the
        record to the others.

        Raises:
            CompressionError: if it is damaged.
        """
        return self.read_here(name)

    def read_here(self, name: str) -> Record | None:
        """Return a record on the process that calls, or None if it was not finished.

        Where several processes share the folder, only the main one calls this method: it reads the file and sends
        nothing. So the caller can split the record before it is sent.

        Raises:
            CompressionError: if it is damaged.
        """
        file = self.file(name)
        if not file.exists():
            return None
        try:
            with safe_open(file, "pt") as stored:
                # The tensors are copied, because the file may be replaced while they are in use.
                tensors = {key: stored.get_tensor(key).clone() for key in stored.keys()}  # noqa: SIM118  (no mapping)
                metadata = stored.metadata() or {}
        except (OSError, SafetensorError) as error:
            raise self.damaged(name, str(error)) from error
        # A disk may damage a file that was complete, so the content is compared with what was written.
        facts = metadata.get("facts", "")
        if metadata.get("sha256") != _checksum(name, tensors, facts):
            raise self.damaged(name, "its sha256 is not the recorded one")
        return Record(tensors, json.loads(facts))

    def write(self, name: str, record: Record) -> None:
        """Write a finished record.

        Raises:
            CompressionError: if it cannot be written; what was finished before stays as it is.
        """
        tensors = _without_shared_memory(record.tensors)
        facts = json.dumps(record.facts)
        metadata = {"facts": facts, "sha256": _checksum(name, tensors, facts)}
        try:
            with atomic_file(self.file(name)) as partial:
                save_file(tensors, partial, metadata=metadata)
        except (OSError, SafetensorError) as error:
            raise self._unwritable(error) from error

    def discard(self, name: str) -> None:
        """Remove a record, if it exists."""
        self.file(name).unlink(missing_ok=True)

    def finish(self) -> None:
        """Say that the run is done. Its records stay for a repetition until another run takes the folder over."""
        self._write(FINISHED, b"")

    def clear(self) -> None:
        """Remove everything that the run left."""
        files = [self.path / IDENTITY, self.path / FINISHED]
        for pattern in RUN_FILE_PATTERNS:
            files += self.path.glob(pattern)
        for file in files:
            file.unlink(missing_ok=True)

    def file(self, name: str) -> Path:
        """Return the path of a record."""
        return self.path / f"{name}.safetensors"

    def damaged(self, name: str, reason: str) -> CompressionError:
        """Return the error for a record that cannot be used. The records of other blocks cannot replace it."""
        return CompressionError(
            f"{self.file(name)}: is damaged ({reason}); delete {self.path} and repeat the command, it starts over"
        )

    def _read_identity(self) -> dict[str, Any] | None:
        """Return the recorded identity of the run in this folder, or None if there is none."""
        file = self.path / IDENTITY
        if not file.exists():
            return None
        try:
            identity = json.loads(file.read_text(encoding="utf-8"))
            if not isinstance(identity, dict):
                raise ValueError(f"found {type(identity).__name__}, expected a dictionary")
        except (OSError, ValueError, RecursionError) as error:
            raise CompressionError(f"{file}: cannot be read ({error}); delete the folder or name another") from error
        return identity

    def _write(self, name: str, content: bytes) -> None:
        try:
            write_atomically(self.path / name, content)
        except OSError as error:
            raise self._unwritable(error) from error

    def _unwritable(self, error: Exception) -> CompressionError:
        return CompressionError(
            f"{path_in_message(self.path)}: cannot be written ({system_message(error)}); "
            "finished parts stay, repeat the command to go on"
        )


def tensors_checksum(tensors: Iterable[tuple[str, Tensor]], about: str = "") -> str:
    """Return the sha256 of `about` and of the names, dtypes, shapes and bytes of tensors, in their order."""
    digest = hashlib.sha256(about.encode())
    for name, tensor in tensors:
        digest.update(f"{name}{tensor.dtype}{tuple(tensor.shape)}".encode())
        digest.update(tensor.cpu().contiguous().flatten().view(torch.uint8).numpy().data)
    return digest.hexdigest()


def difference(
    before: dict[str, Any], after: dict[str, Any], name: str = "", words: tuple[str, str] = ("then", "now")
) -> str:
    """Describe the first entry in which two identities differ, by its name and both values.

    Args:
        name: name of the entry that holds the two, if they are parts of larger identities.
        words: the words before the two values.
    """
    for key in [*before, *after]:
        old, new = before.get(key), after.get(key)
        if old != new:
            path = f"{name}.{key}" if name else key
            if isinstance(old, dict) and isinstance(new, dict):
                return difference(old, new, path, words)
            return f"{path} ({words[0]} {quoted(old)}, {words[1]} {quoted(new)})"
    return "identity"


def _checksum(name: str, tensors: dict[str, Tensor], facts: str) -> str:
    """Return the sha256 of everything that a record of this name holds."""
    return tensors_checksum(sorted(tensors.items()), f"{name} {facts}")


def _without_shared_memory(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Return contiguous tensors on the host that share no memory with each other, which safetensors refuses."""
    separate: dict[str, Tensor] = {}
    storages: set[int] = set()
    for name, tensor in tensors.items():
        whole = tensor.detach().cpu().contiguous()
        storage = whole.untyped_storage().data_ptr()
        separate[name] = whole.clone() if storage in storages else whole
        storages.add(storage)
    return separate
