"""Documents of the project, and what is in them."""

import re
from pathlib import Path

from .assets import PROJECT

FENCED = re.compile(r"^```[^\n]*\n.*?^```", flags=re.DOTALL | re.MULTILINE)


def documents() -> list[Path]:
    """Every Markdown file that people read, except the generated model cards."""
    found = [*PROJECT.glob("*.md"), *(PROJECT / "docs").rglob("*.md"), *(PROJECT / "benchmarks").rglob("*.md")]
    return sorted([*found, PROJECT / "model_cards" / "README.md"])


def relative_name(document: Path) -> str:
    """The path of a document within the project, as the name of a test's case."""
    return str(document.relative_to(PROJECT))


def blocks(document: Path, *languages: str) -> list[tuple[str, str]]:
    """The fenced blocks of these languages in order, as pairs of language and code."""
    text = document.read_text(encoding="utf-8")
    pattern = rf"^```({'|'.join(languages)})\b[^\n]*\n(.*?)^```"
    return re.findall(pattern, text, flags=re.DOTALL | re.MULTILINE)


def prose(document: Path) -> str:
    """A document without its fenced blocks, whose lines are left empty so that line numbers stay."""
    text = document.read_text(encoding="utf-8")
    return FENCED.sub(lambda block: "\n" * block[0].count("\n"), text)
