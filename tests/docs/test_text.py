"""Documents point to what exists, quote messages that the package has, and stay readable in an editor."""

import ast
import re
from pathlib import Path

import pytest

from tests.support.assets import PROJECT
from tests.support.markdown import documents, prose, relative_name

ARCHITECTURE = PROJECT / "docs" / "architecture.md"
LONGEST_LINE = 160
MADE_BY_SCRIPTS = ("quality.md", "models.md", "model_classes.md")
"""Names of pages whose long lines no one wraps."""
LINK = re.compile(r"!?\[[^\]]*\]\(([^)\s]+)\)")


@pytest.mark.parametrize("document", documents(), ids=relative_name)
def test_links_within_the_project_lead_somewhere(document: Path) -> None:
    for target in LINK.findall(prose(document)):
        if re.match(r"[a-z]+:", target):
            continue
        path, _, anchor = target.partition("#")
        file = (document.parent / path).resolve() if path else document
        assert file.exists(), target
        assert not anchor or anchor in _anchors(file), target


@pytest.mark.parametrize("document", documents(), ids=relative_name)
def test_files_that_are_named_exist(document: Path) -> None:
    """Paths in code type, such as `docs/trust.md` or `tests/serving`, are files and folders of the project."""
    rooms = "|".join(("docs", "benchmarks", "tests", "notebooks", "model_cards", "hf_lowrank"))
    for path in re.findall(rf"`((?:{rooms})/[\w./-]+)`", prose(document)):
        assert (PROJECT / path).exists(), path


def test_the_tree_of_the_architecture_is_that_of_the_project() -> None:
    """Every module that it shows exists, and it shows every folder of the package."""
    ((_, tree), *_) = re.findall(
        r"^```(\w*)\n(.*?)^```", ARCHITECTURE.read_text(encoding="utf-8"), re.DOTALL | re.MULTILINE
    )
    modules = {file.name for file in [*PROJECT.glob("*.py"), *(PROJECT / "hf_lowrank").rglob("*.py")]}
    assert set(re.findall(r"\w+\.py", tree)) <= modules
    folders = {file.parent.name for file in (PROJECT / "hf_lowrank").glob("*/*.py")}
    assert folders <= set(re.findall(r"(\w+)/", tree))


@pytest.mark.parametrize("document", [d for d in documents() if d.name not in MADE_BY_SCRIPTS], ids=relative_name)
def test_lines_of_prose_are_short(document: Path) -> None:
    for number, line in enumerate(prose(document).splitlines(), 1):
        assert len(line) <= LONGEST_LINE or line.startswith("|"), f"{document.name}:{number}"


def test_troubleshooting_quotes_messages_of_the_package() -> None:
    """Its headings in code type are parts of messages, with … for filled-in parts. One message is of transformers."""
    text = (PROJECT / "docs" / "troubleshooting.md").read_text(encoding="utf-8")
    headings = re.findall(r"^### `(.*)`$", text, flags=re.MULTILINE)
    assert len(headings) > 20
    messages = _messages()
    for heading in headings[1:]:
        quoted = heading.strip("…: ")
        assert any(quoted in message for message in messages), heading


def _anchors(document: Path) -> set[str]:
    """The anchors of a document's headings, as code hosts and mkdocs make them."""
    headings = re.findall(r"^#+ (.*)$", prose(document), flags=re.MULTILINE)
    kept = (re.sub(r"[^\w\- ]", "", heading.lower()) for heading in headings)
    return {heading.strip().replace(" ", "-") for heading in kept}


def _messages() -> set[str]:
    """Every text in the package's code, with … in the place of what is filled in, except constants that are texts."""
    trees = [ast.parse(file.read_text(encoding="utf-8")) for file in (PROJECT / "hf_lowrank").rglob("*.py")]
    everywhere: dict[str, str] = {}
    for tree in trees:
        everywhere |= _constants(tree)
    found: set[str] = set()
    for tree in trees:
        constants = everywhere | _constants(tree)  # its own first, then those that it may have imported
        found |= {_text(node, constants) for node in ast.walk(tree) if isinstance(node, ast.expr)}
    return found


def _constants(tree: ast.Module) -> dict[str, str]:
    """The texts that a module gives names in capitals."""
    constants = {}
    for node in tree.body:
        if isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Name) and node.targets[0].id.isupper():
            constants[node.targets[0].id] = _text(node.value, {})
    return constants


def _text(node: ast.expr, constants: dict[str, str]) -> str:
    """Return a string or an f-string as text, with … for other expressions and for logging's %s and %d."""
    if isinstance(node, ast.Constant) and isinstance(node.value, str):
        return re.sub(r"%[sd]", "…", node.value)
    if isinstance(node, ast.JoinedStr):
        return "".join(_text(part, constants) for part in node.values)
    if isinstance(node, ast.FormattedValue):
        return _text(node.value, constants)
    if isinstance(node, ast.Name):
        return constants.get(node.id, "…")
    return "…"
