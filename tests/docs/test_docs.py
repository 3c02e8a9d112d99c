"""What the documents tell people to run, runs: from an installed package, in an empty folder, without network.

Python blocks run as one program per document; those of README one by one, and its bash blocks, too. Command lines of
all other documents are checked as far as their options. A block marked `py` instead of `python` is a fragment, and one
marked `console` needs the network, a checkout or hours: both are shown and not run.
"""

import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import typer.main

from hf_lowrank import cli
from tests.support.assets import PROJECT
from tests.support.installed_package import run
from tests.support.markdown import blocks, documents, relative_name

README = PROJECT / "README.md"
GUIDES = [document for document in documents() if document.name != "training.md"]  # tests/training follows that one
PROGRAMS = [document for document in GUIDES if document.name not in ("README.md", "CONTRIBUTING.md")]


@pytest.mark.parametrize("document", [d for d in PROGRAMS if blocks(d, "python")], ids=relative_name)
def test_python_blocks_run(document: Path, tmp_path: Path, installed: dict[str, str]) -> None:
    code = "\n".join(code for _, code in blocks(document, "python"))
    if "onnx" in code:
        pytest.importorskip("onnxscript")
        pytest.importorskip("onnxruntime")
    run(["python", "-c", code], tmp_path, installed)


@pytest.mark.timeout(600)  # ten processes that import torch and transformers
def test_the_readme_runs_from_top_to_bottom(tmp_path: Path, installed: dict[str, str]) -> None:
    """Every Python block is a program, every bash block a script. Later ones find the folders of earlier ones."""
    for language, code in blocks(README, "python", "bash"):
        command = ["python", "-c", code] if language == "python" else ["bash", "-euo", "pipefail", "-c", code]
        run(command, tmp_path, installed)


def test_documents_run_the_installed_package(tmp_path: Path, installed: dict[str, str]) -> None:
    """The tests above see no file of the checkout."""
    code = "import importlib.util; print(importlib.util.find_spec('hf_lowrank').origin)"
    assert run(["python", "-c", code], tmp_path, installed).startswith(installed["PYTHONPATH"])


@pytest.mark.parametrize("document", [d for d in GUIDES if blocks(d, "bash", "console")], ids=relative_name)
def test_command_lines_are_understood(document: Path) -> None:
    """Verbs, options and arguments of `hf-lowrank` are those that it has; what `make` and `python` are told exists."""
    verbs = typer.main.get_command(cli.app).commands  # type: ignore[attr-defined]
    targets = re.findall(r"^([\w-]+):", (PROJECT / "Makefile").read_text(), flags=re.MULTILINE)
    scripts = "\n".join(code for _, code in blocks(document, "bash", "console"))
    for line in scripts.replace("\\\n", " ").splitlines():
        words = shlex.split(line.removeprefix("$ "), comments=True)
        while words and "=" in words[0]:
            words.pop(0)
        if words[:1] == ["hf-lowrank"]:
            assert words[1] in verbs, line
            verbs[words[1]].make_context(words[1], words[2:]).close()
        elif words[:1] == ["make"]:
            assert set(words[1:]) <= set(targets), line
        elif words[:2] == ["python", "-m"] and words[2].startswith("tests."):
            assert (PROJECT / words[2].replace(".", "/")).with_suffix(".py").is_file(), line
        elif words[:1] == ["python"] and words[1].endswith(".py"):
            assert (PROJECT / words[1]).is_file(), line


def test_a_method_is_one_file_and_one_registration(tmp_path: Path) -> None:
    """CONTRIBUTING.md is followed to the letter in a copy of the project. The contract suite covers the method."""
    ((_, code),) = blocks(PROJECT / "CONTRIBUTING.md", "python")
    ignored = shutil.ignore_patterns("__pycache__", "reference-7m", "*.so")
    for part in ("hf_lowrank", "tests"):
        shutil.copytree(PROJECT / part, tmp_path / part, ignore=ignored)
    shutil.copyfile(PROJECT / "hf_lowrank_autoload.py", tmp_path / "hf_lowrank_autoload.py")
    (tmp_path / "hf_lowrank" / "methods" / "loudest.py").write_text(code, encoding="utf-8")
    init = tmp_path / "hf_lowrank" / "methods" / "__init__.py"
    text = init.read_text(encoding="utf-8")
    init.write_text(text.replace("    asvd,\n", "    asvd,\n    loudest,\n", 1), encoding="utf-8")
    command = [
        sys.executable,
        "-m",
        "pytest",
        "-q",
        "-p",
        "no:cacheprovider",
        "tests/methods/test_contract.py",
        "-k",
        "loudest",
    ]
    environment = os.environ | {"PYTHONPATH": str(tmp_path)}
    result = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stdout[-3000:]
    assert re.search(r"\d\d+ passed", result.stdout), result.stdout
