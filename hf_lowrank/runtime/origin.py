"""Where a model came from: the folder or the repo on the Hub whose other files belong to it."""

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from huggingface_hub import snapshot_download
from transformers.utils import cached_file

from .errors import logger

REMEMBERED = "_loaded_from"
"""Attribute of a model: what `from_pretrained` was told and the config does not keep, as a dictionary of strings.

No class of ours, so that a model that was pickled as a whole opens where this package is not installed.
"""
_READING: ContextVar[dict[str, str] | None] = ContextVar("reading", default=None)
"""The same of the model whose config was read last, or that is being loaded."""


@contextmanager
def loading(source: Any, arguments: dict[str, Any]) -> Iterator[dict[str, str]]:
    """Yield what is to be remembered of a model that is being loaded, which `Origin.of` knows while it is."""
    told = _told(source, arguments)
    token = _READING.set(told)
    try:
        yield told
    finally:
        _READING.reset(token)


def note_source(source: Any, arguments: dict[str, Any]) -> None:
    """Note where a config was read from, for a model that is being loaded without `loading`."""
    reading = _READING.get()
    if reading is None or reading["source"] != str(source):
        _READING.set(_told(source, arguments))


def _told(source: Any, arguments: dict[str, Any]) -> dict[str, str]:
    told = {name: os.fspath(arguments[name]) for name in ("subfolder", "cache_dir") if arguments.get(name)}
    told["source"] = str(source)
    if os.path.isdir(told["source"]):
        told["folder"] = os.path.abspath(told["source"])  # the current folder may be another one when it is saved
    return told


def source_of(config: Any) -> str:
    """Return what transformers was told to load a model from. Empty if it was made, or loaded from a state dict.

    For the folder of an adapter, that is the adapter's base model.
    """
    source = str(getattr(config, "_name_or_path", "") or "")
    # Of `from_pretrained(None, config=..., state_dict=...)`, the config keeps the name of nothing as a text.
    return "" if source == str(None) and not os.path.isdir(source) else source


def file_of_repo(repo: Any, name: str, **options: Any) -> str | None:
    """Return the path of a file of a repo on the Hub in the cache. None if there is none, or none within reach.

    Args:
        options: those of transformers' `cached_file`.
    """
    for fault in ("missing_entries", "gated_repo", "connection_errors"):
        options[f"_raise_exceptions_for_{fault}"] = False
    try:
        return cached_file(repo, name, **options)
    except (OSError, ValueError):
        return None


@dataclass(frozen=True)
class Origin:
    """The place that a model was loaded from.

    Attributes:
        source: what `from_pretrained` was given: a folder or the name of a repo on the Hub. Empty if the model was not
            loaded.
        folder: the absolute path of the source, if that was a folder.
        subfolder: where in the source the model lies.
        revision: the commit of a repo.
        cache_dir: the cache that the repo was downloaded to, if not the usual one.
    """

    source: str
    folder: str | None = None
    subfolder: str = ""
    revision: str | None = None
    cache_dir: str | None = None

    @classmethod
    def of(cls, model: Any) -> "Origin":
        """Return where a model came from."""
        source = source_of(model.config)
        told: dict[str, str] = model.__dict__.get(REMEMBERED) or _READING.get() or {}
        if told.get("source") != source:
            told = {}
        folder = told.get("folder")
        if folder is None and os.path.isdir(source):
            folder = os.path.abspath(source)
        revision = getattr(model.config, "_commit_hash", None)
        return cls(source, folder, told.get("subfolder", ""), revision, told.get("cache_dir"))

    def find(self, name: str) -> Path | None:
        """Return a file beside the model, fetching it from the Hub if need be. None if there is none within reach."""
        if self.folder is not None:
            path = Path(self.folder, self.subfolder, name)
            return path if path.is_file() else None
        if not self.source:
            return None
        place = {"revision": self.revision, "cache_dir": self.cache_dir, "subfolder": self.subfolder}
        # What is in the cache needs no connection.
        file = file_of_repo(self.source, name, local_files_only=True, **place)
        file = file or file_of_repo(self.source, name, **place)
        return Path(file) if file else None

    def fetch(self, patterns: Sequence[str]) -> Path | None:
        """Return a folder on this machine that holds the model's files of these patterns, as far as there are any.

        From the Hub, exactly these are downloaded. Without a connection they come from its cache.

        Returns:
            None, with a warning, if a model that was loaded cannot be reached any more.
        """
        if self.folder is not None:
            path = Path(self.folder, self.subfolder)
            if not path.is_dir():
                logger.warning(
                    "%s: is gone, so tokenizer and processor of the model are not carried over; save them, too", path
                )
                return None
            return path
        if not self.source:
            return None
        try:
            snapshot = self._snapshot(patterns)
        except Exception as error:  # of the Hub, of whatever client it has, or of the cache
            logger.warning(
                "%s: cannot be reached (%s), so tokenizer and processor of the model are not carried over; "
                "save them, too",
                self.source,
                type(error).__name__,
            )
            return None
        return Path(snapshot, self.subfolder)

    def _snapshot(self, patterns: Sequence[str]) -> str:
        """Return the folder in the Hub's cache with the files of these patterns, after downloading what is missing."""
        prefix = f"{self.subfolder}/" if self.subfolder else ""
        options: dict[str, Any] = {
            "revision": self.revision,
            "cache_dir": self.cache_dir,
            "allow_patterns": [prefix + pattern for pattern in patterns],
        }
        try:
            return snapshot_download(self.source, **options)
        except Exception as error:
            # Versions 1.x of huggingface_hub do not look into the cache by themselves if the commit is known.
            try:
                return snapshot_download(self.source, local_files_only=True, **options)
            except Exception:
                raise error from None
