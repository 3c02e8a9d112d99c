"""Finds the real weights and texts that some tests need, and skips a test with the reason where they are missing."""

import gzip
import lzma
import os
from pathlib import Path

import pytest

PROJECT = Path(__file__).resolve().parents[2]
BUNDLED = PROJECT / "hf_lowrank" / "data"
VARIABLE = "HF_LOWRANK_ASSETS"


def asset_model(name: str) -> Path:
    """Return the folder of a model.

    The model that the package brings is always there. Others skip the test where there are no assets.
    """
    folder = _assets() / "models" / name
    return folder if folder.is_dir() else _bundled(BUNDLED / name)


def asset_text(path: str) -> str:
    """Return a text, decompressed if need be, by its path below the folder `text`, such as "wikitext2/test.txt"."""
    file = _assets() / "text" / path
    if not file.is_file():
        file = _bundled(BUNDLED / path)
    opener = {".xz": lzma.open, ".gz": gzip.open}.get(file.suffix, open)
    with opener(file, "rt", encoding="utf-8") as stream:
        return str(stream.read())


def _assets() -> Path:
    return Path(os.environ.get(VARIABLE) or PROJECT.parent / "shared" / "assets")


def _bundled(path: Path) -> Path:
    if not path.exists():
        pytest.skip(f"{path.name} is not in {_assets()}; set {VARIABLE} to the folder of the assets")
    return path
