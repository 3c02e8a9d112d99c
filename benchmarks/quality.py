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


if __name__ == "__main__":
    page = INTRODUCTION + "".join(section(Path(folder)) for folder in sys.argv[1:])
    Path(__file__).with_suffix(".md").write_text(page, encoding="utf-8")
