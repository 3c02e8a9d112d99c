"""Installs the package as pip does, away from the checkout: modules, package data, entry points, and `hf-lowrank`."""

import os
import subprocess
import sys
from pathlib import Path

from .assets import PROJECT

COMMAND = """#!{python}
from hf_lowrank_command import main

raise SystemExit(main())
"""


def install(folder: Path) -> dict[str, str]:
    """Write what a wheel holds, except the compiled kernels, and return the environment in which programs find it.

    Programs that run in this environment see no network. setuptools decides which files belong to a wheel, so data
    that `pyproject.toml` forgets is missing here, too.
    """
    packages, programs = folder / "site-packages", folder / "bin"
    packages.mkdir(parents=True)
    programs.mkdir()
    to_packages = str(packages)
    setup = [sys.executable, "setup.py", "-q", "egg_info", "--egg-base", to_packages]
    setup += ["build_py", "--build-lib", to_packages, "dist_info", "--output-dir", to_packages]
    subprocess.run(setup, cwd=PROJECT, check=True, capture_output=True)
    command = programs / "hf-lowrank"
    command.write_text(COMMAND.format(python=sys.executable), encoding="utf-8")
    command.chmod(0o755)
    python = programs / "python"  # the documents call it by this name; a link would lose the virtual environment
    python.write_text(f'#!/bin/sh\nexec "{sys.executable}" "$@"\n', encoding="utf-8")
    python.chmod(0o755)
    return os.environ | {
        "PYTHONPATH": to_packages,
        "PATH": f"{programs}{os.pathsep}{os.environ['PATH']}",
        "HF_HUB_OFFLINE": "1",
    }


def run(command: list[str], folder: Path, environment: dict[str, str]) -> str:
    """Run a program that must succeed, and return what it prints."""
    result = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, check=False)
    assert result.returncode == 0, f"{command[:3]}\n{result.stdout[-2000:]}\n{result.stderr[-3000:]}"
    return result.stdout
