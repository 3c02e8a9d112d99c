"""Finds the documents of the project, and takes their code blocks apart from their prose."""

import re
from pathlib import Path

from .assets import PROJECT

FENCED = re.compile(r"^```[^\n]*\n.*?^```", flags=re.DOTALL | re.MULTILINE)


def documents() -> list[Path]:
    """Return every Markdown file that people read, except the generated model cards."""
    files = [*PROJECT.glob("*.md"), PROJECT / "model_cards" / "README.md"]
    for folder in ("docs", "benchmarks"):
        files += (PROJECT / folder).rglob("*.md")
    return sorted(files)


def relative_name(document: Path) -> str:
    """Return the path of a document within the project, as the name of a test's case."""
    return str(document.relative_to(PROJECT))


def blocks(document: Path, *languages: str) -> list[tuple[str, str]]:
    """Return the fenced blocks of these languages in order, as pairs of language and code."""
    text = document.read_text(encoding="utf-8")
    pattern = rf"^```({'|'.join(languages)})\b[^\n]*\n(.*?)^```"
    return re.findall(pattern, text, flags=re.DOTALL | re.MULTILINE)


def prose(document: Path) -> str:
    """Return a document with empty lines in the place of its fenced blocks, so that line numbers stay."""
    text = document.read_text(encoding="utf-8")
    return FENCED.sub(lambda block: "\n" * block[0].count("\n"), text)
