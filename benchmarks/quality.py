"""Put finished comparisons into benchmarks/quality.md.

    python benchmarks/quality.py NAME=FOLDER[,FOLDER...] ...

Each folder is the --out of a `hf-lowrank compare`; folders of one name measured the same model on the same texts and
share a table. A section with that name is replaced; a new one comes first. Commands, versions and figures go into the
page as they are.
"""

import json
import sys
from pathlib import Path
from typing import Any

from hf_lowrank.evaluation import pareto

PAGE = Path(__file__).with_suffix(".md")


def merged(folders: list[Path]) -> dict[str, Any]:
    """The results of several comparisons as one: all their combinations, and their commands one below the other."""
    results = [json.loads((folder / "results.json").read_text(encoding="utf-8")) for folder in folders]
    first = results[0]
    for other in results[1:]:
        assert (other["model"], other["versions"]) == (first["model"], first["versions"]), "other models or versions"
        assert other["dense"]["texts"] == first["dense"]["texts"], "other texts or windows"
    combinations = [combination for each in results for combination in each["combinations"]]
    return {**first, "combinations": combinations, "command": "\n".join(each["command"] for each in results)}


def section(name: str, folders: list[Path]) -> str:
    """A section of the page: commands, versions and table."""
    results = merged(folders)
    versions = ", ".join(f"{library} {version}" for library, version in results["versions"].items())
    return f"""## {name}

```bash
{results["command"]}
```

{versions}; {results["machine"]["processor"]}. model.safetensors: sha256
`{results["model"]["model.safetensors"]}`.

{pareto.markdown(results)}"""


def with_section(page: str, name: str, new: str) -> str:
    """The page with a section in the place of the one that has its name, or before all others."""
    introduction, *sections = page.split("\n## ")
    names = [text.partition("\n")[0] for text in sections]
    text = new.removeprefix("## ").rstrip("\n") + "\n"
    if name in names:
        sections[names.index(name)] = text
    else:
        sections.insert(0, text)
    return "\n## ".join([introduction, *sections])


if __name__ == "__main__":
    page = PAGE.read_text(encoding="utf-8")
    for argument in reversed(sys.argv[1:]):
        name, _, folders = argument.partition("=")
        page = with_section(page, name, section(name, [Path(folder) for folder in folders.split(",")]))
    PAGE.write_text(page, encoding="utf-8")
