"""The command line answers, and the package is imported, without torch; every public name is there all the same."""

import dataclasses
import inspect
import json
import subprocess
import sys
from pathlib import Path

import pytest

import hf_lowrank
from hf_lowrank import CompressionConfig
from hf_lowrank.cli.compression import compress
from hf_lowrank.cli.options import RECIPE_HELP
from tests.support.fresh_process import PROJECT

HEAVY = ["accelerate", "datasets", "numpy", "peft", "torch", "transformers"]

COMMAND = """
import json, sys
import hf_lowrank_command
try:
    hf_lowrank_command.main()
except SystemExit as ending:
    print(json.dumps([ending.code, sorted({module.partition(".")[0] for module in sys.modules})]), file=sys.stderr)
"""


def in_a_fresh_process(code: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", code, *arguments], cwd=PROJECT, capture_output=True, text=True, timeout=120, check=True
    )


@pytest.mark.parametrize(
    ("arguments", "code", "shown"),
    [
        ([], 2, "compress"),
        (["--help"], 0, "compress"),
        (["compress", "--help"], 0, "--refinement-steps"),
        (["evaluate", "--help"], 0, "--max-windows"),
        (["compress", "model", "-o", "output", "--metod", "slab"], 2, "No such option"),
        (["compres"], 2, "No such command"),
    ],
    ids=str,
)
def test_help_and_wrong_options_import_nothing_heavy(arguments: list[str], code: int, shown: str) -> None:
    done = in_a_fresh_process(COMMAND, *arguments)
    *errors, last = done.stderr.splitlines()
    assert shown in done.stdout + "\n".join(errors)
    found, modules = json.loads(last)
    assert found == code
    assert {*modules}.isdisjoint(HEAVY)


def test_importing_the_package_imports_nothing_heavy() -> None:
    done = in_a_fresh_process(
        "import sys, hf_lowrank; print([name for name in sys.argv[1:] if name in sys.modules])", *HEAVY
    )
    assert done.stdout.strip() == "[]"


def test_every_public_name_is_there() -> None:
    assert sorted(hf_lowrank.__all__) == sorted(set(hf_lowrank.__all__))
    assert {*hf_lowrank.__all__} <= {*dir(hf_lowrank)}
    starred = in_a_fresh_process("from hf_lowrank import *; print(*sorted(globals()))").stdout.split()
    assert {*hf_lowrank.__all__} - {"__version__"} <= {*starred}
    for name in hf_lowrank.__all__:
        value = getattr(hf_lowrank, name)
        assert callable(value) == (name != "__version__")
        if callable(value):
            assert value.__name__ == name
            assert value.__module__.startswith("hf_lowrank.")
            assert value.__doc__
    with pytest.raises(AttributeError, match="module 'hf_lowrank' has no attribute 'decompress'"):
        hf_lowrank.decompress  # noqa: B018


def test_the_reference_model_and_text_are_installed() -> None:
    assert (Path(hf_lowrank.reference_model()) / "model.safetensors").is_file()
    assert len(Path(hf_lowrank.reference_text()).read_text(encoding="utf-8")) > 100_000


def test_the_options_of_compress_are_the_fields_of_the_recipe() -> None:
    """Help texts and defaults are repeated in the command line, which must not import the recipe before it runs."""
    fields = {field.name: field for field in dataclasses.fields(CompressionConfig)}
    assert {name: fields[name].metadata["help"] for name in RECIPE_HELP} == RECIPE_HELP
    parameters = inspect.signature(compress).parameters
    # Without a method the model decides. Without a ratio, the bits, the size or the options of the method do.
    for name in RECIPE_HELP.keys() - {"modules_to_not_convert", "ratio", "method"}:
        assert parameters[name].default == fields[name].default, name
    assert parameters["skip"].default is None
