"""The loading code of a checkpoint is all of the runtime in one file of plain Python, and the same file every time."""

import ast
import builtins
import random
import shutil
import subprocess
import symtable
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from transformers.dynamic_module_utils import get_imports, get_relative_imports

from hf_lowrank.checkpoints.loading_code import ENTRY, FIRST, generate, loading_code, runtime_sources
from hf_lowrank.runtime.checksums import LOADING_CODE
from hf_lowrank.version import __version__
from tests.support.assets import PROJECT

RUNTIME = PROJECT / "hf_lowrank" / "runtime"
ALLOWED = {"torch", "transformers", "huggingface_hub", *sys.stdlib_module_names}
"""What the loading code may import, as it must run where nothing else is installed but what these need themselves."""


class WithoutImports(ast.NodeTransformer):
    """Takes imports and blocks for type checkers out of modules, and what stands for nothing."""

    def visit_ImportFrom(self, node: ast.ImportFrom) -> ast.ImportFrom | None:
        return node if node.level == 0 and node.col_offset else None

    def visit_Import(self, node: ast.Import) -> ast.Import | None:
        return node if node.col_offset else None

    def visit_If(self, node: ast.If) -> ast.AST | None:
        return None if ast.unparse(node.test) == "TYPE_CHECKING" else self.generic_visit(node)

    def visit_Pass(self, node: ast.Pass) -> None:
        return None


def statements(text: str) -> list[str]:
    """Return what the statements of a module do, without its docstring and its imports."""
    tree = WithoutImports().visit(ast.parse(text))
    if ast.get_docstring(tree) is not None:
        tree.body.pop(0)
    return [ast.dump(node) for node in tree.body]


def test_every_module_of_the_runtime_is_in_it_unchanged() -> None:
    sources = runtime_sources()
    assert {f"{name}.py" for name in sources} == {file.name for file in RUNTIME.glob("*.py")} - {"__init__.py"}
    code = loading_code().decode()
    written = statements(code)
    expected = [statement for text in sources.values() for statement in statements(text)]
    assert sorted(written) == sorted(expected)
    # Comments, too: but for imports and docstrings of modules, its lines are those of the modules.
    lines = set(code.splitlines())
    for name, text in sources.items():
        assert f"# {name}.py" in lines
        tree = ast.parse(text)
        for node in tree.body[1:]:
            if isinstance(node, ast.ClassDef):
                assert ast.get_source_segment(text, node) in code


def test_it_imports_only_torch_transformers_and_the_standard_library() -> None:
    code = loading_code().decode()
    for node in ast.walk(ast.parse(code)):
        if isinstance(node, ast.Import):
            assert {alias.name.partition(".")[0] for alias in node.names} <= ALLOWED
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0 and str(node.module).partition(".")[0] in ALLOWED


def test_transformers_fetches_nothing_else_and_requires_nothing_else(tmp_path: Path) -> None:
    file = tmp_path / LOADING_CODE
    file.write_bytes(loading_code())
    assert get_relative_imports(file) == []
    assert set(get_imports(file)) <= ALLOWED


def scopes(table: symtable.SymbolTable) -> Iterator[symtable.SymbolTable]:
    yield table
    for child in table.get_children():
        yield from scopes(child)


def test_every_name_in_it_is_defined() -> None:
    module = symtable.symtable(loading_code().decode(), LOADING_CODE, "exec")
    defined = {symbol.get_name() for symbol in module.get_symbols() if symbol.is_assigned() or symbol.is_namespace()}
    defined |= {symbol.get_name() for symbol in module.get_symbols() if symbol.is_imported()}
    used = {symbol.get_name() for scope in scopes(module) for symbol in scope.get_symbols() if symbol.is_global()}
    assert used - defined - set(dir(builtins)) <= {"__file__", "__name__"}


def test_it_depends_on_the_sources_alone(tmp_path: Path) -> None:
    """Neither the order in which a folder lists its files, nor the ends of lines, nor a zip change a byte."""
    sources = list(runtime_sources().items())
    random.Random(0).shuffle(sources)
    assert generate(dict(sources), __version__).encode() == loading_code()
    site = tmp_path / "site"
    ignored = shutil.ignore_patterns("data", "*.so", "__pycache__")
    shutil.copytree(PROJECT / "hf_lowrank", site / "hf_lowrank", ignore=ignored)
    for file in (site / "hf_lowrank" / "runtime").glob("*.py"):
        file.write_bytes(file.read_bytes().replace(b"\n", b"\r\n"))
    packed = shutil.make_archive(str(tmp_path / "packed"), "zip", site, "hf_lowrank")
    program = (
        f"import sys; sys.path.insert(0, {packed!r})\n"
        "from hf_lowrank.checkpoints import loading_code; assert '.zip' in loading_code.__file__\n"
        "sys.stdout.buffer.write(loading_code.loading_code())"
    )
    environment = {"PYTHONHASHSEED": "7", "TORCH_DEVICE_BACKEND_AUTOLOAD": "0", "PATH": ""}
    finished = subprocess.run([sys.executable, "-c", program], env=environment, capture_output=True, check=False)
    assert finished.returncode == 0, finished.stderr
    assert finished.stdout == loading_code()


BASE = {FIRST: '"""First."""\n', ENTRY: '"""Entry."""\n'}
REFUSED = {
    "the same function in two modules": ({"one": "def f(): pass\n", "two": "def f(): pass\n"}, "f: means"),
    "the same name assigned in two modules": ({"one": "X = 1\n", "two": "if True:\n    X = 2\n"}, "X: means"),
    "a name of two imports": ({"one": "import copy\n", "two": "from torch import copy\n"}, "copy: means"),
    "a name defined and imported": ({"one": "import json\n", "two": "json = 1\n"}, "json: means"),
    "a name of Python's own": ({"one": "def compile(): pass\n"}, "compile: defined in one.py"),
    "another name for an import": ({"one": "from .two import f as g\n", "two": "def f(): pass\n"}, "from .two import"),
    "a module as a whole": ({"one": "def f():\n    from . import two\n", "two": ""}, "from . import two"),
    "a module above": ({"one": "from ..two import f\n"}, "from ..two import f"),
    "all names": ({"one": "from .two import *\n", "two": ""}, r"from .two import \*"),
    "modules that need each other": ({"one": "from .two import f\n", "two": "from .one import g\n"}, "cycle"),
}  # fmt: skip
"""What works in modules and would not work in one file."""


@pytest.mark.parametrize("what", REFUSED)
def test_what_only_works_in_a_file_of_its_own_is_refused(what: str) -> None:
    sources, message = REFUSED[what]
    with pytest.raises(ValueError, match=message):
        generate(BASE | sources, "1")


LATE = """
import importlib.util

from .other import g


def f():
    # Imported late.
    from .other import (
        g,
    )
    return g()
"""
OTHER = """
def g():
    try:
        from .late import f
    except ImportError:
        raise
    return f
"""


def test_imports_inside_functions_leave_code_that_runs() -> None:
    code = generate(BASE | {"late": LATE, "other": OTHER}, "1")
    assert "Imported late" not in code and "import importlib.util\n" in code
    names: dict[str, Any] = {}
    exec(compile(code, "code", "exec"), names)
    assert names["f"]() is names["f"]
