"""Checkpoints and texts that commands are tried on."""

from collections.abc import Iterator
from pathlib import Path

import pytest
import transformers

from ..support import tiny_models
from .calls import QUICK, run


@pytest.fixture(autouse=True)
def _logging() -> Iterator[None]:
    """The command line quiets transformers, which other tests must not notice."""
    verbosity, bars = transformers.utils.logging.get_verbosity(), transformers.utils.logging.is_progress_bar_enabled()
    yield
    transformers.utils.logging.set_verbosity(verbosity)
    if bars:
        transformers.utils.logging.enable_progress_bar()


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
