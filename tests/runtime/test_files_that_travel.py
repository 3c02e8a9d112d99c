"""The runtime may travel: it imports nothing that another machine lacks, and every file of it is in a checkpoint."""

import ast
import re
import sys

from hf_lowrank.runtime.saving import ENTRY_MODULE, RUNTIME_FILES
from tests.support.assets import PROJECT

RUNTIME = PROJECT / "hf_lowrank" / "runtime"


def test_the_runtime_imports_only_torch_transformers_and_itself() -> None:
    # transformers needs huggingface_hub itself, so it is wherever that is.
    allowed = {"torch", "transformers", "huggingface_hub", *sys.stdlib_module_names}
    for file in RUNTIME.glob("*.py"):
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Import):
                assert {alias.name.partition(".")[0] for alias in node.names} <= allowed, file.name
            elif isinstance(node, ast.ImportFrom) and node.level == 0:
                assert str(node.module).partition(".")[0] in allowed, file.name
            elif isinstance(node, ast.ImportFrom):
                assert node.level == 1 and node.module, f"{file.name}: transformers finds only `from .name import`"


def test_every_runtime_file_travels_with_a_checkpoint() -> None:
    files = {file.name for file in RUNTIME.glob("*.py")}
    assert files - {"__init__.py"} == set(RUNTIME_FILES)


def test_the_entry_names_every_runtime_file() -> None:
    """Transformers 5.0 copies only the files that the entry itself imports."""
    entry = (RUNTIME / f"{ENTRY_MODULE}.py").read_text(encoding="utf-8")
    named = set(re.findall(r"^\s*from\s+\.(\S+)\s+import", entry, flags=re.MULTILINE))
    assert {file.removesuffix(".py") for file in RUNTIME_FILES} - {ENTRY_MODULE} == named
