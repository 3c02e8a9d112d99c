"""The notebooks run from an installed package in an empty folder. Their stored outputs show nothing of a machine."""

import json
import re
from pathlib import Path
from typing import Any

import pytest

from tests.support.notebooks import NOTEBOOKS, code_cells, run_notebook

LARGEST = 2**20
"""Maximum number of bytes of all notebooks together."""
OF_A_MACHINE = (
    r"/(?:tmp|home|root|Users|usr|work|mnt|var)/|0x[0-9a-f]{6,}|127\.0\.0\.1|localhost|\d+(?:\.\d+)?(?:it/s|s/it)"
)
"""Matches absolute paths, addresses in memory, hosts and speeds."""


def stored_outputs(path: Path) -> list[list[dict[str, Any]]]:
    return [cell["outputs"] for cell in code_cells(json.loads(path.read_text(encoding="utf-8")))]


def kinds(outputs: list[list[dict[str, Any]]]) -> list[list[str]]:
    """Which outputs each cell has: prints, pictures, values."""
    return [[output["output_type"] for output in cell] for cell in outputs]


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_notebooks_run_and_show_what_is_stored(path: Path, tmp_path: Path, installed: dict[str, str]) -> None:
    """Every cell runs and has outputs of the kinds that are stored. `make notebooks` stores them after a change."""
    outputs = run_notebook(path, tmp_path, installed)
    assert any(kinds(outputs))
    assert kinds(outputs) == kinds(stored_outputs(path))


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_stored_outputs_tell_of_no_machine(path: Path) -> None:
    for cell in stored_outputs(path):
        for output in cell:
            texts = output.get("text", []) + output.get("data", {}).get("text/plain", [])
            assert not re.search(OF_A_MACHINE, "".join(texts)), texts


def test_notebooks_are_small_and_one_has_pictures() -> None:
    assert sum(path.stat().st_size for path in NOTEBOOKS) < LARGEST
    assert any("display_data" in cell for path in NOTEBOOKS for cell in kinds(stored_outputs(path)))
