"""Prints docs/model_classes.md from the results of the sweep.

python -m benchmarks.model_sweep.table > docs/model_classes.md
"""

import json
from collections import Counter
from pathlib import Path
from typing import Any

from .run import AUTO_CLASSES

RESULTS = Path(__file__).parent / "results.json"
MEANINGS = {
    "round-trips": "compressed, saved, opened again by its own class and by the Auto class, with the same outputs",
    "refused": "refused in one line before any block is compressed, the weights untouched",
    "dense fails alike": "the dense model, saved and opened in the same way, fails, too",
    "dense": "no tiny model of it could be built and run here, so that nothing is known",
    "too slow": "not known: it takes longer than the script waits",
    "no verdict": "not known: its process ended early, or its outputs do not depend on what was compressed",
    "FAILS": "fails: a fault",
}
INTRODUCTION = """# Model classes

Every model class that the Auto classes of Transformers 5.23.0 know was tried once: a tiny model with random weights is
compressed with `slab`, saved, opened again and compared. [Models](models.md) says how blocks and layers are found, and
what models are calibrated on. The script goes on where it was stopped.

```
python -m benchmarks.model_sweep.run benchmarks/model_sweep/results.json
python -m benchmarks.model_sweep.table > docs/model_classes.md
```

"""
LONGEST = 180
"""Maximum number of characters of a remark."""


def page(results: dict[str, Any]) -> str:
    """Return the text of docs/model_classes.md."""
    by_class = {key: result for key, result in results.items() if " " not in key}
    counts = Counter(result["status"] for result in by_class.values())
    lines = [INTRODUCTION, "| result | classes | meaning |\n|---|---|---|\n"]
    for status, meaning in MEANINGS.items():
        if counts[status]:
            lines.append(f"| {status} | {counts[status]} | {meaning} |\n")
    others = [result for key, result in results.items() if " " in key]
    passed = sum(result["status"] == "round-trips" for result in others)
    methods = ", ".join(f"`{name}`" for name in sorted({key.split()[1] for key in results if " " in key}))
    if others:
        lines.append(f"\nOf {len(others)} trials with other methods ({methods}), {passed} round-trip; ")
        lines.append("the others are refused for their ratio, or as with `slab`.\n")
    for auto_name, kind in AUTO_CLASSES.items():
        rows = {key: result for key, result in by_class.items() if result["auto"] == auto_name}
        if rows:
            lines.append(
                f"\n## {kind[0].upper()}{kind[1:]}: `{auto_name}`\n\n| class | result | remark |\n|---|---|---|\n"
            )
            lines += [_row(key, result) for key, result in sorted(rows.items(), key=lambda row: row[0].lower())]
    return "".join(lines)


def _row(name: str, result: dict[str, Any]) -> str:
    remark = " ".join(result["detail"].split()).replace("|", "/").replace("<", "&lt;").replace("`", "")
    if len(remark) > LONGEST:
        remark = remark[:LONGEST].rsplit(" ", 1)[0] + " …"
    return f"| `{name}` | {result['status']} | {remark} |\n"


if __name__ == "__main__":
    print(page(json.loads(RESULTS.read_text(encoding="utf-8"))), end="")
