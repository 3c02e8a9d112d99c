"""Local files of test items, one JSON object per line, with the fields and the prompts of well-known tasks."""

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..calibration.files import UNREADABLE, open_text
from ..runtime.errors import CompressionError, path_in_message, quoted

Item = dict[str, Any]


@dataclass(frozen=True)
class Form:
    """A form of items in a local file, recognized by its fields.

    Attributes:
        fields: names that every item must have.
        convert: function from an item to `context`, and `choices` with `label`, or a `target` that completes the
            context.
        metrics: metrics of lm-eval, by its names.
    """

    fields: tuple[str, ...]
    convert: Callable[[Item], Item]
    metrics: tuple[str, ...] = ("acc", "acc_norm")


def read_items(file: Path) -> tuple[Form, list[Item]]:
    """Return the form of a local file and its items, converted.

    Raises:
        CompressionError: if the file cannot be read or an item has a wrong form. The message names the file, the line,
            what was found and what was expected.
    """
    if not file.is_file():
        raise CompressionError(f"{path_in_message(file)}: no such file of items; check the path")
    form: Form | None = None
    items = []
    try:
        with open_text(file) as lines:
            for number, line in enumerate(lines, 1):
                if line.strip():
                    where = f"{file}, line {number}"
                    item = _parsed(line, where)
                    form = form or _form(item, where)  # the first item decides for the whole file
                    items.append(_converted(form, item, where))
    except CompressionError:
        raise
    except UNREADABLE as error:
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
    forms = "; ".join(", ".join(form.fields) for form in FORMS)
    raise CompressionError(
        f"{where}: found the fields {', '.join(item)}, expected those of one of these forms: {forms}"
    )


def _converted(form: Form, item: Item, where: str) -> Item:
    """Convert an item and check the result, so that no damaged item reaches lm-eval."""
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
    # An empty choice has no tokens, and so no likelihood.
    texts = [converted["context"], *converted.get("choices", ()), converted.get("target", "")]
    if not all(isinstance(text, str) for text in texts) or "" in converted.get("choices", ()):
        raise CompressionError(f"{where}: found {item!r:.200}, expected texts, and choices that are not empty")
    if "choices" in converted:
        _check_label(converted["label"], len(converted["choices"]), where)
    return converted


def _check_label(label: Any, count: int, where: str) -> None:
    """Raise CompressionError if a label is not the position of one of at least two choices."""
    # The position is checked here, because -1 as an index would silently be the last choice.
    # `type` and not `isinstance`, because True and False are integers too.
    if type(label) is not int or not 0 <= label < count or count < 2:
        raise CompressionError(
            f"{where}: label {quoted(label)} of {count} choices, expected at least two and a label from 0 to "
            f"{count - 1}"
        )


# The conversions below give the prompts of the tasks in lm-eval, so that accuracies compare with those of its own
# data.


def _question(item: Item) -> Item:
    context = f"Question: {item['question']}\nAnswer:"
    return {"context": context, "choices": list(item["choices"]), "label": item["label"]}


def _lettered_question(item: Item) -> Item:
    """Convert a question whose choices stand in the prompt, so that the answer is a letter."""
    letters = [chr(ord("A") + position) for position in range(len(item["choices"]))]
    listed = "\n".join(f"{letter}. {choice}" for letter, choice in zip(letters, item["choices"], strict=True))
    return {"context": f"{item['question'].strip()}\n{listed}\nAnswer:", "choices": letters, "label": item["label"]}


def _ending(item: Item) -> Item:
    context = f"{item['activity_label']}: {item['ctx']}"
    return {"context": context, "choices": list(item["endings"]), "label": item["label"]}


def _continuation(item: Item) -> Item:
    return {"context": item["ctx"], "choices": list(item["choices"]), "label": item["label"]}


def _solution(item: Item) -> Item:
    context = f"Question: {item['goal']}\nAnswer:"
    return {"context": context, "choices": [item["sol1"], item["sol2"]], "label": item["label"]}


def _minimal_pair(item: Item) -> Item:
    """Convert two sentences without a prompt: the model should find the grammatical one more likely."""
    return {"context": "", "choices": [item["good"], item["bad"]], "label": 0}


def _last_word(item: Item) -> Item:
    context, _, word = item["text"].rstrip().rpartition(" ")
    return {"context": context, "target": f" {word}"}


FORMS = (
    Form(("good", "bad"), _minimal_pair, ("acc",)),  # BLiMP
    Form(("goal", "sol1", "sol2", "label"), _solution),  # PIQA
    Form(("activity_label", "ctx", "endings", "label"), _ending),  # HellaSwag
    Form(("ctx", "choices", "label"), _continuation),  # any text and its possible next sentences
    Form(("subject", "question", "choices", "label"), _lettered_question, ("acc",)),  # MMLU
    Form(("question", "choices", "label"), _question),  # ARC and OpenBookQA
    Form(("text",), _last_word, ("acc", "perplexity")),  # LAMBADA
)
"""Forms that are known, in the order in which they are tried. The first whose fields an item has is used."""
