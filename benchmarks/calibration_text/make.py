"""Make hf_lowrank/data/calibration.jsonl.gz, the text that a compression calibrates on by default, from its sources.

    python -m benchmarks.calibration_text.make SOURCES

SOURCES is a folder with the unpacked sources of the table in hf_lowrank/data/CALIBRATION.md, each under the name that
stands there. The same sources give the same rows: excerpts of about 4,000 characters, taken at even distances from
each source, and mixed.
"""

import argparse
import gzip
import hashlib
import json
import lzma
import random
import re
from collections.abc import Callable, Iterator
from html.parser import HTMLParser
from pathlib import Path

OUTPUT = Path(__file__).parents[2] / "hf_lowrank" / "data" / "calibration.jsonl.gz"
EXCERPT = 4000
"""Number of characters beyond which an excerpt ends with its paragraph."""
LONGEST = 6000
"""Maximum number of characters of an excerpt."""

SENTENCES = re.compile(r"[a-z)]\.? [A-Z].{60}.*[a-z)]\. [A-Z]")
"""Matches what is several sentences, and no list."""

NO_TEXT = {"script", "style", "title", "svg", "head"}
BLOCKS = {"p", "li", "h1", "h2", "h3", "h4", "dt", "dd", "tr", "pre", "div", "blockquote", "br", "table", "ul", "ol"}


def gutenberg(folder: Path) -> Iterator[str]:
    """Novels: the text between what stands before the first and after the last chapter."""
    for file in sorted(folder.glob("*.xz")):
        text = lzma.decompress(file.read_bytes()).decode()
        yield text[10_000 : len(text) - 10_000]


def addresses(folder: Path) -> Iterator[str]:
    """Annual messages of the presidents since 1945, a sentence or a few on each line."""
    for file in sorted(folder.glob("data/*.txt")):
        if int(file.name[:4]) >= 1945:
            text = " ".join(file.read_text(encoding="utf-8").split())
            yield re.sub(r"((?:[^.?!]+[.?!]+\s){4})", r"\1\n\n", text)


def factbook(folder: Path) -> Iterator[str]:
    """Whatever the profile of a country says in whole sentences."""
    for file in sorted(folder.glob("*/*.json")):
        profile = json.loads(file.read_text(encoding="utf-8"))
        yield "\n\n".join(filter(SENTENCES.search, _strings(profile)))


def _strings(value: object) -> Iterator[str]:
    if isinstance(value, str):
        yield value.strip()
    elif isinstance(value, dict):
        for inner in value.values():
            yield from _strings(inner)


def sqlite(folder: Path) -> Iterator[str]:
    """The pages of SQLite's documentation that are prose."""
    for file in sorted(folder.glob("*.html")):
        parser = _Paragraphs()
        parser.feed(file.read_text(encoding="utf-8", errors="ignore"))
        paragraphs = [" ".join(paragraph.split()) for paragraph in parser.text.split("\n\n")]
        prose = [paragraph for paragraph in paragraphs if len(paragraph) > 40]
        if sum(map(len, prose)) > 8000:
            yield "\n\n".join(prose[6:])  # the first are the navigation of every page


class _Paragraphs(HTMLParser):
    """Collects the text of a page, with an empty line between blocks."""

    def __init__(self) -> None:
        super().__init__()
        self.text = ""
        self.hidden = 0

    def handle_starttag(self, tag: str, attributes: object) -> None:
        if tag in NO_TEXT:
            self.hidden += 1
        if tag in BLOCKS:
            self.text += "\n\n"

    def handle_endtag(self, tag: str) -> None:
        if tag in NO_TEXT:
            self.hidden = max(self.hidden - 1, 0)
        if tag in BLOCKS:
            self.text += "\n\n"

    def handle_data(self, data: str) -> None:
        if not self.hidden:
            self.text += data


def peps(folder: Path) -> Iterator[str]:
    """The PEPs that say they are in the public domain or under CC0, without their headers."""
    text = lzma.decompress((folder / "peps.txt.xz").read_bytes()).decode()
    for pep in re.split(r"(?m)^(?=PEP: \d+\n)", text)[1:]:
        ending = " ".join(pep[pep.rfind("Copyright\n") :][:400].split())
        if "public domain" in ending or "CC0" in ending:
            body = re.split(r"\nAbstract\n=+\n", pep)[-1]
            yield _unwrapped(body[: body.rfind("Copyright\n")])


def jargon(folder: Path) -> Iterator[str]:
    """The Jargon File from its first chapter on."""
    text = gzip.decompress((folder / "jargon.txt.gz").read_bytes()).decode(errors="ignore")
    paragraphs = [" ".join(paragraph.split()) for paragraph in text.split("\n\n")]
    first = next(index for index, paragraph in enumerate(paragraphs) if len(paragraph) > 300)
    prose = [paragraph for paragraph in paragraphs[first:] if len(paragraph) > 25 and "____" not in paragraph]
    yield "\n\n".join(prose)


def devil(folder: Path) -> Iterator[str]:
    """The Devil's Dictionary."""
    text = gzip.decompress((folder / "devil.dict.dz").read_bytes()).decode(errors="ignore")
    yield _unwrapped(text[20_000:])


def youtube_dl(folder: Path) -> Iterator[str]:
    """The manual of a program."""
    yield (folder / "README.md").read_text(encoding="utf-8")


def python_code(folder: Path) -> Iterator[str]:
    """Python."""
    for file in sorted(folder.glob("youtube_dl/*.py")) + sorted(folder.glob("youtube_dl/extractor/*.py")):
        text = file.read_text(encoding="utf-8")
        if len(text) > 8000 and file.name != "extractors.py":
            yield text


def c_code(folder: Path) -> Iterator[str]:
    """C."""
    for file in sorted(folder.glob("*.h")):
        yield file.read_text(encoding="utf-8", errors="ignore")


def written(name: str) -> Callable[[Path], Iterator[str]]:
    """Texts that were written for this project, and lie beside this file."""

    def read(folder: Path) -> Iterator[str]:
        yield from (Path(__file__).parent / name).read_text(encoding="utf-8").split("<|endoftext|>")

    return read


def _unwrapped(text: str) -> str:
    """Join the lines of every paragraph that is not indented and no list or table."""
    paragraphs = []
    for paragraph in re.split(r"\n\s*\n", text):
        lines = paragraph.split("\n")
        if len(lines) > 1 and all(re.match(r"[A-Za-z`\"'(]", line) for line in lines):
            paragraph = " ".join(lines)
        paragraphs.append(paragraph)
    return "\n\n".join(paragraphs)


PARTS: dict[str, tuple[str, Callable[[Path], Iterator[str]], int]] = {
    "novels": ("gutenberg", gutenberg, 85_000),
    "addresses": ("addresses", addresses, 84_000),
    "factbook": ("factbook", factbook, 84_000),
    "sqlite": ("sqlite", sqlite, 63_000),
    "peps": ("peps", peps, 45_000),
    "jargon": ("jargon", jargon, 66_000),
    "devil": ("devil", devil, 10_000),
    "manual": ("youtube-dl", youtube_dl, 15_000),
    "python": ("youtube-dl", python_code, 30_000),
    "c": ("stb", c_code, 24_000),
    "written-english": ("", written("english.txt"), 200_000),
    "written-languages": ("", written("languages.txt"), 200_000),
}
"""The folder of a part in SOURCES, the function that reads it, and the maximum number of its characters."""


def excerpts(text: str) -> list[str]:
    """Cut a text at its paragraphs into parts of about `EXCERPT` characters. A short rest is dropped."""
    found, current = [], ""
    for paragraph in re.split(r"\n\s*\n", text):
        current = f"{current}\n\n{paragraph}" if current else paragraph.strip("\n")
        if len(current) >= EXCERPT:
            found.append(current[:LONGEST].strip())
            current = ""
    if len(current) > EXCERPT / 4 or not found:
        found.append(current.strip())
    return [excerpt for excerpt in found if excerpt]


def rows(sources: Path, scale: dict[str, float] | None = None) -> list[dict[str, str]]:
    """Return the excerpts of all parts, mixed."""
    chosen = []
    for part, (folder, read, characters) in PARTS.items():
        found = [excerpt for text in read(sources / folder) for excerpt in excerpts(text)]
        mean = sum(map(len, found)) / len(found)
        count = min(round(characters * (scale or {}).get(part, 1.0) / mean), len(found))
        chosen += [{"text": found[index * len(found) // count], "part": part} for index in range(count)]
    random.Random(0).shuffle(chosen)
    return chosen


def write(chosen: list[dict[str, str]], file: Path) -> None:
    """Write rows without the time of writing, so that the same rows are the same bytes."""
    lines = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in chosen)
    file.write_bytes(gzip.compress(lines.encode(), compresslevel=9, mtime=0))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("sources", type=Path)
    parser.add_argument("--output", type=Path, default=OUTPUT)
    arguments = parser.parse_args()
    chosen = rows(arguments.sources)
    write(chosen, arguments.output)
    for part in PARTS:
        texts = [row["text"] for row in chosen if row["part"] == part]
        print(f"| `{part}` | {len(texts)} | {sum(map(len, texts)):,} |")
    digest = hashlib.sha256(gzip.decompress(arguments.output.read_bytes())).hexdigest()
    print(f"{arguments.output}: {arguments.output.stat().st_size:,} bytes, sha256 of the rows {digest}")


if __name__ == "__main__":
    main()
