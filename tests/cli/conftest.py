"""Checkpoints and texts that commands are tried on."""

from pathlib import Path

import pytest

from ..support import tiny_models
from .calls import QUICK, run


@pytest.fixture(autouse=True)
def _logging(kept_logging: None) -> None:
    """Every test here runs commands."""


@pytest.fixture(scope="module")
def dense(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_models.saved(tiny_models.llama(), tmp_path_factory.mktemp("models") / "dense")


@pytest.fixture(scope="module")
def compressed(dense: Path) -> Path:
    output = dense.parent / "compressed"
    assert (
        run(
            "compress", dense, "--method", "slab", "--ratio", 0.4, "--set", "iterations=2", *QUICK, "-o", output
        ).exit_code
        == 0
    )
    return output


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    file = tmp_path_factory.mktemp("texts") / "text.txt"
    file.write_text("\n<|endoftext|>\n".join(tiny_models.text(20)), encoding="utf-8")
    return file
