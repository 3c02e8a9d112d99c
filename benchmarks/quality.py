"""Writes benchmarks/quality.md from finished comparisons.

`python benchmarks/quality.py out/quality/reference-7m out/quality/stories260K`

Each folder is the --out of `hf-lowrank compare`. Its command, versions and table go into the page as they are.
"""

import json
import sys
from pathlib import Path

from hf_lowrank.evaluation import pareto

INTRODUCTION = """# What is lost at a given size

Made by `benchmarks/quality.py` from the results of the commands below. No figure is typed. Every model is compressed
and measured in processes of its own, reloaded from disk. `assets/` is the folder that `HF_LOWRANK_ASSETS` names in the
tests.

- bits/weight: everything that is stored for the linear layers of the blocks (values, masks, signs, scales, factors),
  over the number of their weights;
- nats lost: log perplexity minus that of the dense model, per token;
- KL: the divergence of the compressed model's predictions from the dense model's, in nats per token;
- top-1: the share of tokens with the same most likely next token;
- seconds and peak MiB: time and memory of the whole compressing process, from start to end. Seconds vary with what
  else the machine does;
- ★: the best method at each size.
"""


def section(folder: Path) -> str:
    """Return the section of one comparison."""
    results = json.loads((folder / "results.json").read_text(encoding="utf-8"))
    versions = ", ".join(f"{name} {version}" for name, version in results["versions"].items())
    return f"""
## {folder.name}

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
