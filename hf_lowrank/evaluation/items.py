"""Local files of test items, one JSON object per line, in the forms of well-known tasks, with the prompts that lm-eval gives those."""

import gzip
import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..runtime.errors import CompressionError

Item = dict[str, Any]


@dataclass(frozen=True)
class Form:
    """A form of items in a local file, known by its fields.

    Attributes:
        fields: what an item must have.
        convert: item → `context`, and `choices` with `label`, or a `target` to be completed to.
        metrics: of lm-eval, by its names.
    """

    fields: tuple[str, ...]
    convert: Callable[[Item], Item]
    metrics: tuple[str, ...] = ("acc", "acc_norm")


def read_items(file: Path) -> tuple[Form, list[Item]]:
    """The form of a local file and its items, converted.

    Raises:
        CompressionError: naming the file, the line, what was found and what was expected.
    """
    if not file.is_file():
        raise CompressionError(f"{file}: no such file of items; check the path")
    form: Form | None = None
    items = []
    try:
        with (gzip.open if file.suffix == ".gz" else open)(file, "rt", encoding="utf-8") as lines:
            for number, line in enumerate(lines, 1):
                if line.strip():
                    where = f"{file}, line {number}"
                    item = _parsed(line, where)
                    form = form or _form(item, where)
                    items.append(_converted(form, item, where))
    except (OSError, EOFError, UnicodeDecodeError) as error:
        raise CompressionError(f"{file}: cannot be read as lines of JSON ({error}); get the file again") from error
    if form is None:
        raise CompressionError(f"{file}: holds no items, expected one JSON object per line")
    return form, items


def _parsed(line: str, where: str) -> Item:
    try:
        item = json.loads(line)
    except ValueError as error:
        raise CompressionError(f"{where}: not JSON ({error}); every line must be one object") from error
    if not isinstance(item, dict):
        raise CompressionError(f"{where}: found {type(item).__name__}, expected a JSON object")
    return item


def _form(item: Item, where: str) -> Form:
    for form in FORMS:
        if item.keys() >= set(form.fields):
            return form
    known = "; ".join(", ".join(form.fields) for form in FORMS)
    raise CompressionError(
        f"{where}: found the fields {', '.join(item)}, expected those of one of these forms: {known}"
    )


def _converted(form: Form, item: Item, where: str) -> Item:
    missing = [field for field in form.fields if field not in item]
    if missing:
        raise CompressionError(
            f"{where}: {', '.join(missing)} missing; every line must have {', '.join(form.fields)}, as the first has"
        )
    try:
        converted = form.convert(item)
    except (TypeError, AttributeError, IndexError, ValueError) as error:
        raise CompressionError(
            f"{where}: fields of the wrong type ({error}); expected texts, a list of texts for the choices"
        ) from error
    texts = [converted["context"], *converted.get("choices", ()), converted.get("target", "")]
    if not all(isinstance(text, str) for text in texts) or "" in converted.get("choices", ()):
        raise CompressionError(f"{where}: found {item!r:.200}, expected texts, and choices that are not empty")
    if "choices" in converted:
        label, count = converted["label"], len(converted["choices"])
        if type(label) is not int or not 0 <= label < count or count < 2:
            raise CompressionError(
                f"{where}: label {label!r} of {count} choices, expected at least two and a label from 0 to {count - 1}"
            )
    return converted


def _question(item: Item) -> Item:
    return {
        "context": f"Question: {item['question']}\nAnswer:",
        "choices": list(item["choices"]),
        "label": item["label"],
    }


def _lettered_question(item: Item) -> Item:
    letters = [chr(ord("A") + position) for position in range(len(item["choices"]))]
    listed = "\n".join(f"{letter}. {choice}" for letter, choice in zip(letters, item["choices"], strict=True))
    return {"context": f"{item['question'].strip()}\n{listed}\nAnswer:", "choices": letters, "label": item["label"]}


def _ending(item: Item) -> Item:
    return {
        "context": f"{item['activity_label']}: {item['ctx']}",
        "choices": list(item["endings"]),
        "label": item["label"],
    }


def _continuation(item: Item) -> Item:
    return {"context": item["ctx"], "choices": list(item["choices"]), "label": item["label"]}


def _solution(item: Item) -> Item:
    return {
        "context": f"Question: {item['goal']}\nAnswer:",
        "choices": [item["sol1"], item["sol2"]],
        "label": item["label"],
    }


def _minimal_pair(item: Item) -> Item:
    return {"context": "", "choices": [item["good"], item["bad"]], "label": 0}


def _last_word(item: Item) -> Item:
    context, _, word = item["text"].rstrip().rpartition(" ")
    return {"context": context, "target": f" {word}"}


FORMS = (
    Form(("good", "bad"), _minimal_pair, ("acc",)),
    Form(("goal", "sol1", "sol2", "label"), _solution),
    Form(("activity_label", "ctx", "endings", "label"), _ending),
    Form(("ctx", "choices", "label"), _continuation),
    Form(("subject", "question", "choices", "label"), _lettered_question, ("acc",)),
    Form(("question", "choices", "label"), _question),
    Form(("text",), _last_word, ("acc", "perplexity")),
)
"""The forms of BLiMP, PIQA, HellaSwag, a next sentence, MMLU, ARC and OpenBookQA, and LAMBADA; the first that fits is taken."""
