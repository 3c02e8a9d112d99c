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

from ..runtime.errors import CompressionError
from .files import atomic_file, system_message, write_atomically
from .locking import locked

IDENTITY = "run.json"
FINISHED = "finished"


class Record(NamedTuple):
    """What was finished: tensors by name, and facts as plain JSON values."""

    tensors: dict[str, Tensor]
    facts: dict[str, Any]


class WorkFolder:
    """One run's folder, locked while the run lives; a lock goes with its process, however that ends.

    Every file takes its name only when it is complete and on the disk, so a kill leaves each record whole or absent.

    Args:
        path: the folder; made if need be.

    Raises:
        CompressionError: if another run works in it, or it cannot be written.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        self._held = ExitStack()
        try:
            self.path.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise self._unwritable(error) from error
        self._held.enter_context(locked(self.path))

    def __enter__(self) -> "WorkFolder":
        return self

    def __exit__(self, *error: object) -> None:
        """Let other runs have the folder, or remove it if it holds nothing."""
        with suppress(OSError):
            self.path.rmdir()
        self._held.close()

    def claim(self, identity: dict[str, Any]) -> None:
        """Say what the run is: go on with what the folder holds of it, or start in a folder that is new or of a finished run.

        Args:
            identity: plain JSON values by what they describe: weights, calibration, config, versions.

        Raises:
            CompressionError: if the folder holds a run of something else that is not finished, naming what differs.
        """
        known = self._read_identity()
        wanted = json.loads(json.dumps(identity))
        if known is not None and known != wanted:
            if not (self.path / FINISHED).exists():
                raise CompressionError(
                    f"{self.path}: holds a run with other {difference(known, wanted)}; "
                    "repeat that one, or delete the folder, or name another"
                )
            self.clear()
            known = None
        if known is None:
            self._write(IDENTITY, json.dumps(wanted, indent=1).encode())

    def read(self, name: str) -> Record | None:
        """A record, in every process of the run; None if it was not finished.

        Raises:
            CompressionError: if it is damaged.
        """
        return self.read_here(name)

    def read_here(self, name: str) -> Record | None:
        """A record, in the process that holds the folder."""
        file = self.file(name)
        if not file.exists():
            return None
        try:
            with safe_open(file, "pt") as opened:
                tensors = {key: opened.get_tensor(key).clone() for key in opened.keys()}  # noqa: SIM118  (no mapping)
                recorded = opened.metadata() or {}
        except (OSError, SafetensorError) as error:
            raise self.damaged(name, str(error)) from error
        facts = recorded.get("facts", "")
        if recorded.get("sha256") != _checksum(name, tensors, facts):
            raise self.damaged(name, "its sha256 is not the recorded one")
        return Record(tensors, json.loads(facts))

    def write(self, name: str, record: Record) -> None:
        """Finish a record.

        Raises:
            CompressionError: if it cannot be written; what was finished before stays as it is.
        """
        tensors, seen = {}, set()
        for key, tensor in record.tensors.items():
            whole = tensor.detach().contiguous()
            storage = whole.untyped_storage().data_ptr()
            tensors[key] = whole.clone() if storage in seen else whole  # safetensors refuses tensors that share memory
            seen.add(storage)
        facts = json.dumps(record.facts)
        try:
            with atomic_file(self.file(name)) as partial:
                save_file(tensors, partial, metadata={"facts": facts, "sha256": _checksum(name, tensors, facts)})
        except (OSError, SafetensorError) as error:
            raise self._unwritable(error) from error

    def discard(self, name: str) -> None:
        """Remove a record, if it is there."""
        self.file(name).unlink(missing_ok=True)

    def finish(self) -> None:
        """Say that the run is done: its records stay, for a run that repeats it, until another run takes the folder."""
        self._write(FINISHED, b"")

    def clear(self) -> None:
        """Remove all that the run left."""
        left = (file for kind in ("safetensors", "partial", "bin") for file in self.path.glob(f"*.{kind}"))
        for file in (self.path / IDENTITY, self.path / FINISHED, *left):
            file.unlink(missing_ok=True)

    def file(self, name: str) -> Path:
        """Where a record is."""
        return self.path / f"{name}.safetensors"

    def damaged(self, name: str, found: str) -> CompressionError:
        """What to raise for a record that cannot be used; those of other blocks do not tell what it held."""
        return CompressionError(
            f"{self.file(name)}: is damaged ({found}); delete {self.path} and repeat the command, it starts over"
        )

    def _read_identity(self) -> dict[str, Any] | None:
        file = self.path / IDENTITY
        if not file.exists():
            return None
        try:
            known = json.loads(file.read_text(encoding="utf-8"))
            if not isinstance(known, dict):
                raise ValueError(f"found {type(known).__name__}, expected a dictionary")
        except (OSError, ValueError, RecursionError) as error:
            raise CompressionError(f"{file}: cannot be read ({error}); delete the folder or name another") from error
        return known

    def _write(self, name: str, content: bytes) -> None:
        try:
            write_atomically(self.path / name, content)
        except OSError as error:
            raise self._unwritable(error) from error

    def _unwritable(self, error: Exception) -> CompressionError:
        return CompressionError(
            f"{self.path}: cannot be written ({system_message(error)}); what is finished stays, repeat the command to go on"
        )


def tensors_checksum(tensors: Iterable[tuple[str, Tensor]], about: str = "") -> str:
    """sha256 over `about` and the names, dtypes, shapes and bytes of tensors, in their order."""
    digest = hashlib.sha256(about.encode())
    for name, tensor in tensors:
        digest.update(f"{name}{tensor.dtype}{tuple(tensor.shape)}".encode())
        digest.update(tensor.cpu().contiguous().flatten().view(torch.uint8).numpy().data)
    return digest.hexdigest()


def _checksum(name: str, tensors: dict[str, Tensor], facts: str) -> str:
    """sha256 of all that a record of this name holds."""
    return tensors_checksum(sorted(tensors.items()), f"{name} {facts}")


def difference(
    known: dict[str, Any], wanted: dict[str, Any], name: str = "", words: tuple[str, str] = ("then", "now")
) -> str:
    """The first of two identities' entries that differ: its name and both values, after the two words."""
    for key in [*known, *wanted]:
        was, now = known.get(key), wanted.get(key)
        if was != now:
            path = f"{name}.{key}" if name else key
            if isinstance(was, dict) and isinstance(now, dict):
                return difference(was, now, path, words)
            return f"{path} ({words[0]} {was!r}, {words[1]} {now!r})"
    return "identity"
