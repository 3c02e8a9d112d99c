"""What the documents tell people to run, runs: Python as one program per document, command lines as far as their options.

A block marked `py` instead of `python` is a fragment, which is shown and not run.
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
from tests.support.fresh_process import PROJECT

WITH_TESTS_OF_THEIR_OWN = ("training.md",)
DOCUMENTS = sorted(
    document
    for document in (PROJECT / "README.md", *(PROJECT / "docs").rglob("*.md"), PROJECT / "model_cards" / "README.md")
    if document.name not in WITH_TESTS_OF_THEIR_OWN
)


def blocks(document: Path, language: str) -> list[str]:
    return re.findall(
        rf"^```{language}[^\n]*\n(.*?)^```", document.read_text(encoding="utf-8"), flags=re.DOTALL | re.MULTILINE
    )


def named(document: Path) -> str:
    return str(document.relative_to(PROJECT))


@pytest.mark.parametrize("document", [d for d in DOCUMENTS if blocks(d, "python")], ids=named)
def test_python_blocks_run(document: Path, tmp_path: Path) -> None:
    (tmp_path / "hf_lowrank").symlink_to(
        PROJECT / "hf_lowrank"
    )  # documents name the bundled model by its path in the project
    environment = os.environ | {"PYTHONPATH": str(PROJECT)}
    code = "\n".join(blocks(document, "python"))
    result = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, env=environment, capture_output=True, text=True, check=False
    )
    assert result.returncode == 0, result.stderr[-3000:]


@pytest.mark.parametrize(
    "document", [d for d in [*DOCUMENTS, PROJECT / "CONTRIBUTING.md"] if blocks(d, "bash")], ids=named
)
def test_command_lines_are_understood(document: Path) -> None:
    """Verbs, options and arguments of `hf-lowrank` are those that it has; what `make` and `python -m` are told exists."""
    verbs = typer.main.get_command(cli.app).commands  # type: ignore[attr-defined]
    targets = re.findall(r"^([\w-]+):", (PROJECT / "Makefile").read_text(), flags=re.MULTILINE)
    for line in "\n".join(blocks(document, "bash")).replace("\\\n", " ").splitlines():
        words = shlex.split(line, comments=True)
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
    """CONTRIBUTING.md, followed to the letter in a copy of the project: the contract suite covers the method and passes."""
    (code,) = blocks(PROJECT / "CONTRIBUTING.md", "python")
    ignored = shutil.ignore_patterns("__pycache__", "reference-7m", "*.so")
    for part in ("hf_lowrank", "tests"):
        shutil.copytree(PROJECT / part, tmp_path / part, ignore=ignored)
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
