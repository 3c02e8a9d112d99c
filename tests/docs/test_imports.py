"""Imports between the subpackages of the package go down only, and no modules import each other in a circle.

A subpackage is a folder of `hf_lowrank`, or a module that lies loose beside these folders. The files define them, so a
new one must be given its level here on purpose. The files are parsed and not imported.
"""

import ast
import functools
import graphlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from tests.support.assets import PROJECT

PACKAGE = "hf_lowrank"
LEVELS = (
    ("cli", "serving"),
    ("publishing",),
    ("evaluation", "training"),
    ("checkpoints", "exporting"),
    ("compression",),
    ("calibration",),
    ("methods",),
    ("models",),
    ("execution",),
    ("budget",),
    ("kernels", "peft"),
    ("runtime",),
)
"""The subpackages from the top level to the lowest. A module imports from its own one and from the levels below it."""
ENTRY_POINTS = ("__init__", "__main__")
"""Modules outside the order, which may import every subpackage: the public names and the command."""
SHARED = ("registration", "version")
"""Modules outside the order, which every subpackage may import, and which import no subpackage themselves."""
MAX_LOOSE_MODULES = 10
"""Maximum number of modules at the top of the package, `__init__` included."""


@dataclass(frozen=True)
class Import:
    """One module that another one imports.

    Attributes:
        importer: dotted name of the module that has the statement.
        imported: dotted name of the imported module; for a name inside a module, that module.
        line: line number of the statement.
        runs_at_import: whether the statement runs when the importer is imported, as it does not in a function or under
            TYPE_CHECKING.
    """

    importer: str
    imported: str
    line: int
    runs_at_import: bool

    def __str__(self) -> str:
        return f"{self.importer}:{self.line} imports {self.imported}"


@functools.cache
def modules() -> dict[str, Path]:
    """Return the file of every module of the package, by dotted name."""
    files = {}
    for file in sorted((PROJECT / PACKAGE).rglob("*.py")):
        parts = file.relative_to(PROJECT).with_suffix("").parts
        if parts[-1] == "__init__":
            parts = parts[:-1]
        files[".".join(parts)] = file
    return files


@functools.cache
def parsed(file: Path) -> ast.Module:
    return ast.parse(file.read_text(encoding="utf-8"))


class ImportCollector(ast.NodeVisitor):
    """Collects the imports of one module, whose names start with that of the package."""

    def __init__(self, module: str) -> None:
        self.module = module
        self.imports: list[Import] = []
        self.is_deferred = False

    def visit_Import(self, node: ast.Import) -> None:
        for alias in node.names:
            self._add(alias.name, node.lineno)

    def visit_ImportFrom(self, node: ast.ImportFrom) -> None:
        source = self._absolute(node)
        for alias in node.names:
            submodule = f"{source}.{alias.name}"
            self._add(submodule if submodule in modules() else source, node.lineno)

    def visit_FunctionDef(self, node: ast.FunctionDef | ast.AsyncFunctionDef) -> None:
        self._visit_deferred(node.body)

    visit_AsyncFunctionDef = visit_FunctionDef

    def visit_If(self, node: ast.If) -> None:
        is_for_types = isinstance(node.test, ast.Name) and node.test.id == "TYPE_CHECKING"
        if not is_for_types:
            self.generic_visit(node)
            return
        self._visit_deferred(node.body)
        for statement in node.orelse:
            self.visit(statement)

    def _visit_deferred(self, statements: list[ast.stmt]) -> None:
        """Visit statements that do not run when the module is imported."""
        before, self.is_deferred = self.is_deferred, True
        for statement in statements:
            self.visit(statement)
        self.is_deferred = before

    def _absolute(self, node: ast.ImportFrom) -> str:
        """Return the dotted name after `from`, with the leading dots resolved."""
        if node.level == 0:
            return str(node.module)
        parts = self.module.split(".")
        is_package = modules()[self.module].name == "__init__.py"
        steps_up = node.level - 1 if is_package else node.level
        base = parts[: len(parts) - steps_up]
        return ".".join([*base, node.module] if node.module else base)

    def _add(self, imported: str, line: int) -> None:
        if imported.partition(".")[0] == PACKAGE:
            self.imports.append(Import(self.module, imported, line, runs_at_import=not self.is_deferred))


@functools.cache
def all_imports() -> list[Import]:
    """Return every import of a module of the package by another one."""
    imports = []
    for module, file in modules().items():
        collector = ImportCollector(module)
        collector.visit(parsed(file))
        imports += collector.imports
    return imports


def subpackage_of(module: str) -> str:
    """Return the folder or the loose module that a module belongs to: "methods" for "hf_lowrank.methods.slab"."""
    parts = module.split(".")
    return parts[1] if len(parts) > 1 else "__init__"


def level_of(subpackage: str) -> int:
    """Return the height of a subpackage above the lowest level."""
    height = len(LEVELS)
    for subpackages in LEVELS:
        height -= 1
        if subpackage in subpackages:
            return height
    raise AssertionError(f"{subpackage} has no level; add it to LEVELS of {Path(__file__).name}")


def enclosing_packages(module: str) -> set[str]:
    """Return the packages that a module lies in: "a" and "a.b" for "a.b.c"."""
    parts = module.split(".")
    return {".".join(parts[:length]) for length in range(1, len(parts))}


def test_imports_of_every_kind_are_seen() -> None:
    source = (
        "from ..budget import Layer\n"
        "if TYPE_CHECKING:\n    from . import base\n"
        "try:\n    import torch\nexcept ImportError:\n    import hf_lowrank.runtime.ops\n"
        "def function():\n    from hf_lowrank.methods.registry import register_method\n"
    )
    collector = ImportCollector("hf_lowrank.methods.slab")
    collector.visit(ast.parse(source))
    assert {entry.imported: entry.runs_at_import for entry in collector.imports} == {
        "hf_lowrank.budget": True,
        "hf_lowrank.methods.base": False,
        "hf_lowrank.runtime.ops": True,
        "hf_lowrank.methods.registry": False,
    }


def test_every_subpackage_has_one_level() -> None:
    subpackages = {subpackage_of(module) for module in modules()}
    listed = [subpackage for level in LEVELS for subpackage in level]
    assert sorted([*listed, *ENTRY_POINTS, *SHARED]) == sorted(subpackages)


def test_imports_between_subpackages_go_down_only() -> None:
    """Imports inside functions and under TYPE_CHECKING count too."""
    climbing = []
    for entry in all_imports():
        importer, imported = subpackage_of(entry.importer), subpackage_of(entry.imported)
        is_outside = importer in ENTRY_POINTS or imported in (*ENTRY_POINTS, *SHARED)
        if importer == imported or is_outside:
            continue
        if importer in SHARED or level_of(imported) >= level_of(importer):
            climbing.append(str(entry))
    assert not climbing, "\n".join(climbing)


def test_no_circle_of_modules_is_imported() -> None:
    """A module's import also runs the packages that it lies in, except those that are being imported at that time."""
    graph: dict[str, set[str]] = {}
    for entry in all_imports():
        if entry.runs_at_import:
            packages = enclosing_packages(entry.imported) - enclosing_packages(entry.importer) - {entry.importer}
            graph.setdefault(entry.importer, set()).update(packages, [entry.imported])
    circle: list[str] = []
    try:
        graphlib.TopologicalSorter(graph).prepare()
    except graphlib.CycleError as error:
        circle = error.args[1]
    assert not circle, " -> ".join(circle)


def test_few_modules_lie_loose_at_the_top_of_the_package() -> None:
    loose = sorted(file.name for file in (PROJECT / PACKAGE).glob("*.py"))
    assert len(loose) <= MAX_LOOSE_MODULES, loose


def test_no_test_lies_loose_at_the_top_of_the_tests() -> None:
    loose = {file.name for file in (PROJECT / "tests").glob("*.py")}
    assert loose <= {"__init__.py", "conftest.py"}


def method_classes() -> set[str]:
    """Return the names of all classes that derive from `Method`, which is judged by the names of their bases."""
    bases: dict[str, set[str]] = {}
    for module, file in modules().items():
        if subpackage_of(module) == "methods":
            for node in ast.walk(parsed(file)):
                if isinstance(node, ast.ClassDef):
                    bases[node.name] = {name_of(base) for base in node.bases}

    derived: set[str] = set()
    count = -1
    while len(derived) > count:  # until a pass over all classes adds none
        count = len(derived)
        for name, names_of_bases in bases.items():
            if names_of_bases & {"Method", *derived}:
                derived.add(name)
    return derived


def name_of(node: ast.expr) -> str:
    """Return the last part of a dotted name, or an empty string for other expressions."""
    if isinstance(node, ast.Attribute):
        return node.attr
    return node.id if isinstance(node, ast.Name) else ""


def classes_asked_about(tree: ast.Module) -> Iterator[tuple[str, int]]:
    """Yield the name and the line of every class that `isinstance`, `issubclass` or a `match` statement asks about."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Call) and name_of(node.func) in ("isinstance", "issubclass"):
            for part in ast.walk(node.args[1]):  # a class, a tuple or a union of classes
                if isinstance(part, (ast.Name, ast.Attribute)):
                    yield name_of(part), node.lineno
        elif isinstance(node, ast.MatchClass):
            yield name_of(node.cls), node.lineno


def test_only_methods_know_the_classes_of_methods() -> None:
    """Elsewhere a method is asked what it needs and declares, so that a new kind of method needs no change there."""
    classes = method_classes()
    assert {"SpectralMethod", "MixedMethod", "SoCo", "SLaB"} <= classes
    asked = []
    for module, file in modules().items():
        if subpackage_of(module) != "methods":
            for name, line in classes_asked_about(parsed(file)):
                if name in classes:
                    asked.append(f"{module}:{line} asks for {name}")
    assert not asked, "\n".join(asked)
