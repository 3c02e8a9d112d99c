"""Runs the notebooks from an installed package in empty folders, and stores their outputs.

    python -m tests.support.notebooks [NOTEBOOK...]

Without names it runs all of them, as `make notebooks` does.
"""

import json
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from .assets import PROJECT
from .hub_server import WRITE_TOKEN, HubServer
from .installed_package import install
from .notebook_process import Output

NOTEBOOKS = sorted((PROJECT / "notebooks").glob("*.ipynb"))
PROCESS = Path(__file__).with_name("notebook_process.py")
PLAIN = {"MPLBACKEND": "agg", "OMP_NUM_THREADS": "2"}
"""Variables with which a notebook gives the same outputs on every machine."""


def code_cells(notebook: dict[str, Any]) -> list[dict[str, Any]]:
    """Return the cells of code, as they stand in the notebook."""
    return [cell for cell in notebook["cells"] if cell["cell_type"] == "code"]


def run_notebook(path: Path, folder: Path, environment: dict[str, str]) -> list[list[Output]]:
    """Run a notebook in a folder, beside a Hub on this machine, and return the outputs of every code cell.

    Args:
        environment: what `installed_package.install` returns.

    Raises:
        AssertionError: if a cell fails; the message is its traceback.
    """
    sources = ["".join(cell["source"]) for cell in code_cells(json.loads(path.read_text(encoding="utf-8")))]
    with tempfile.TemporaryDirectory() as elsewhere, HubServer(Path(elsewhere, "hub")) as hub:
        reachable = hub.environment(Path(elsewhere, "home"), WRITE_TOKEN)
        variables = reachable | {name: environment[name] for name in ("PATH", "PYTHONPATH")} | PLAIN
        result = subprocess.run(
            [sys.executable, str(PROCESS)],
            cwd=folder,
            env=variables,
            input=json.dumps(sources),
            capture_output=True,
            text=True,
            check=False,
        )
    assert result.returncode == 0, f"{path.name}\n{result.stderr[-3000:]}"
    outputs: list[list[Output]] = json.loads(result.stdout)
    return outputs


def store(path: Path, outputs: list[list[Output]]) -> None:
    """Write the outputs into a notebook, in the place of those that it has."""
    notebook = json.loads(path.read_text(encoding="utf-8"))
    for number, (cell, new) in enumerate(zip(code_cells(notebook), outputs, strict=True), 1):
        cell["execution_count"], cell["outputs"] = number, new
    text = json.dumps(notebook, indent=1, ensure_ascii=False, sort_keys=True)
    path.write_text(text + "\n", encoding="utf-8")


def main() -> None:
    """Run the notebooks that the command names, or all, and store their outputs."""
    with tempfile.TemporaryDirectory() as root:
        environment = install(Path(root, "installed"))
        for path in [Path(name) for name in sys.argv[1:]] or NOTEBOOKS:
            folder = Path(root, path.stem)
            folder.mkdir()
            store(path, run_notebook(path, folder, environment))
            print(path.name, flush=True)


if __name__ == "__main__":
    main()
