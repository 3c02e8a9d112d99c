"""Notebooks run, and the runtime is what may travel."""

import ast
import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


def code_cells(notebook: Path) -> str:
    cells = json.loads(notebook.read_text(encoding="utf-8"))["cells"]
    return "\n".join("".join(cell["source"]) for cell in cells if cell["cell_type"] == "code")


def run(code: str, folder: Path) -> None:
    (folder / "hf_lowrank").symlink_to(
        ROOT / "hf_lowrank"
    )  # README names the bundled model by its path in the project
    result = subprocess.run([sys.executable, "-c", code], cwd=folder, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr[-3000:]


@pytest.mark.parametrize("notebook", sorted((ROOT / "notebooks").glob("*.ipynb")), ids=lambda path: path.stem)
def test_notebooks_run(notebook: Path, tmp_path: Path) -> None:
    run(code_cells(notebook), tmp_path)


def test_the_runtime_imports_only_torch_transformers_and_itself() -> None:
    allowed = {"torch", "transformers", *sys.stdlib_module_names}
    for file in (ROOT / "hf_lowrank" / "runtime").glob("*.py"):
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Import):
                assert {alias.name.partition(".")[0] for alias in node.names} <= allowed, file.name
            elif isinstance(node, ast.ImportFrom) and node.level == 0:
                assert str(node.module).partition(".")[0] in allowed, file.name
            elif isinstance(node, ast.ImportFrom):
                assert node.level == 1 and node.module, f"{file.name}: transformers finds only `from .name import`"


def test_every_runtime_file_travels_with_a_checkpoint() -> None:
    from hf_lowrank.runtime.saving import RUNTIME_FILES

    assert {file.name for file in (ROOT / "hf_lowrank" / "runtime").glob("*.py")} - {"__init__.py"} == set(
        RUNTIME_FILES
    )


def test_the_entry_names_every_runtime_file() -> None:
    """Transformers 5.0 copies only the files that the entry itself imports."""
    from hf_lowrank.runtime.saving import ENTRY_MODULE, RUNTIME_FILES

    entry = (ROOT / "hf_lowrank" / "runtime" / f"{ENTRY_MODULE}.py").read_text(encoding="utf-8")
    named = set(re.findall(r"^\s*from\s+\.(\S+)\s+import", entry, flags=re.MULTILINE))
    assert {file.removesuffix(".py") for file in RUNTIME_FILES} - {ENTRY_MODULE} == named
