"""lm-eval scores local files as a plain computation of the likelihoods does, and mistakes in them give one line."""

import gzip
import json
from pathlib import Path
from typing import Any

import lm_eval.tasks
import pytest
import torch
from transformers import PreTrainedModel

from hf_lowrank import CompressionError
from hf_lowrank.evaluation import tasks
from hf_lowrank.evaluation.items import FORMS, read_items
from hf_lowrank.evaluation.tasks import evaluate_tasks
from tests.support import tiny_models

EXAMPLES: list[dict[str, Any]] = [
    {"uid": "a", "good": "the cats run", "bad": "the cats runs"},
    {"goal": "sleep", "sol1": "lie down", "sol2": "stand up", "label": 0},
    {"activity_label": "Cooking", "ctx": "a man", "endings": ["cooks", "flies"], "label": 0},
    {"ctx": "the cat sat", "choices": ["on the mat", "red blue"], "label": 1},
    {"subject": "anatomy", "question": " what? ", "choices": ["leg", "arm"], "label": 1},
    {"question": "what?", "choices": ["leg", "arm", "eye"], "label": 2},
    {"text": "the dog slept over there"},
]


def written(folder: Path, items: list[dict[str, Any]], name: str = "items.jsonl") -> str:
    file = folder / name
    text = "\n".join(json.dumps(item) for item in items)
    file.write_bytes(gzip.compress(text.encode()) if file.suffix == ".gz" else text.encode())
    return str(file)


def continuations(count: int = 12) -> list[dict[str, Any]]:
    words = tiny_models.text(3 * count)
    return [
        {
            "ctx": words[i][:20].strip(),
            "choices": [words[i + 1][:9].strip(), words[i + 2][:14].strip()],
            "label": i % 2,
        }
        for i in range(count)
    ]


@pytest.fixture(scope="module")
def model() -> PreTrainedModel:
    return tiny_models.llama()


def log_likelihood(model: PreTrainedModel, context: str, continuation: str) -> float:
    tokenizer = tiny_models.tokenizer()
    ids = tokenizer(context + continuation)["input_ids"]
    first = len(tokenizer(context)["input_ids"])
    with torch.no_grad():
        logs = model(torch.tensor([ids])).logits[0].log_softmax(dim=-1)
    return float(sum(logs[position - 1, ids[position]] for position in range(first, len(ids))))


def test_every_form_is_told_by_its_fields(tmp_path: Path) -> None:
    for form, example in zip(FORMS, EXAMPLES, strict=True):
        recognized, items = read_items(Path(written(tmp_path, [example] * 2)))
        assert recognized is form
        assert len(items) == 2


@pytest.mark.parametrize("name", ["items.jsonl", "items.jsonl.gz"])
def test_a_choice_is_the_continuation_of_the_highest_likelihood(
    model: PreTrainedModel, tmp_path: Path, name: str
) -> None:
    items = continuations()
    (result,) = evaluate_tasks(model, tiny_models.tokenizer(), [written(tmp_path, items, name)])
    right, right_per_character = 0, 0
    for item in items:
        scores = [log_likelihood(model, item["ctx"], f" {choice}") for choice in item["choices"]]
        per_character = [score / len(choice) for score, choice in zip(scores, item["choices"], strict=True)]
        right += scores.index(max(scores)) == item["label"]
        right_per_character += per_character.index(max(per_character)) == item["label"]
    assert result.metrics == {"acc": right / len(items), "acc_norm": right_per_character / len(items)}
    assert (result.task, result.items, result.shots, result.reference) == (name, len(items), 0, None)


def test_several_tasks_shots_a_limit_and_a_reference(model: PreTrainedModel, tmp_path: Path) -> None:
    choices = written(tmp_path, continuations(), "choices.jsonl")
    words = written(tmp_path, [{"text": text[:30]} for text in tiny_models.text(6)], "words.jsonl")
    other = tiny_models.llama(seed=1)
    results = evaluate_tasks(model, tiny_models.tokenizer(), [choices, words], shots=1, limit=4, reference=other)
    assert [(row.task.rpartition("/")[2], row.items, row.shots) for row in results] == [
        ("choices.jsonl", 4, 1),
        ("words.jsonl", 4, 1),
    ]
    assert results[1].metrics.keys() == {"acc", "perplexity"}
    alone = evaluate_tasks(other, tiny_models.tokenizer(), [choices, words], shots=1, limit=4)
    assert [row.reference for row in results] == [row.metrics for row in alone]


MISTAKES = {
    "not JSON": ("{oops", "line 1: not JSON"),
    "no object": ("[1]", "line 1: found list, expected a JSON object"),
    "unknown form": ('{"prompt": "a"}', "line 1: found the fields prompt, expected those of one of these forms"),
    "two forms": ('{"good": "a", "bad": "b"}\n{"text": "a b"}', "line 2: good, bad missing"),
    "label too large": ('{"ctx": "a", "choices": ["b", "c"], "label": 2}', "line 1: label 2 of 2 choices"),
    "label as text": ('{"ctx": "a", "choices": ["b", "c"], "label": "1"}', "line 1: label '1' of 2 choices"),
    "one choice": ('{"ctx": "a", "choices": ["b"], "label": 0}', "expected at least two"),
    "number as text": ('{"ctx": 1, "choices": ["b", "c"], "label": 0}', "expected texts"),
    "no list": ('{"question": "a", "choices": 5, "label": 0}', "line 1: fields of the wrong type"),
    "empty": ("\n", "holds no items"),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_damaged_file_is_named_with_its_line(tmp_path: Path, mistake: str) -> None:
    content, message = MISTAKES[mistake]
    file = tmp_path / "items.jsonl"
    file.write_text(content)
    with pytest.raises(CompressionError, match="items.jsonl") as error:
        read_items(file)
    assert message in str(error.value)
    assert "\n" not in str(error.value)


def test_a_truncated_archive_is_an_error(tmp_path: Path) -> None:
    file = Path(written(tmp_path, continuations(), "items.jsonl.gz"))
    file.write_bytes(file.read_bytes()[:60])
    with pytest.raises(CompressionError, match="cannot be read as lines of JSON"):
        read_items(file)


def test_what_cannot_be_run_is_said_before_anything_is(
    model: PreTrainedModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tokenizer = tiny_models.tokenizer()
    few = written(tmp_path, continuations(2))
    for arguments, message in (
        ({"tasks": [few], "shots": 2}, "expected more than 2"),
        ({"tasks": [few], "limit": 0}, "limit: found 0"),
        ({"tasks": [str(tmp_path / "missing.jsonl")]}, "no such file of items"),
        ({"tasks": [str(tmp_path / "missing.yaml")]}, "no such task file"),
    ):
        with pytest.raises(CompressionError, match=message):
            evaluate_tasks(model, tokenizer, **arguments)  # type: ignore[arg-type]
    monkeypatch.setattr(tasks, "find_spec", lambda name: None)
    with pytest.raises(CompressionError, match="pip install 'hf_lowrank\\[eval\\]'"):
        evaluate_tasks(model, tokenizer, [few])


def test_an_unknown_task_is_told_what_it_may_mean(
    model: PreTrainedModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Only the tasks of one folder are searched, because listing all that lm-eval brings takes seconds."""
    (tmp_path / "task.yaml").write_text("task: continuations\ndataset_path: json\n")
    manager = lm_eval.tasks.TaskManager(include_path=tmp_path, include_defaults=False)
    monkeypatch.setattr(lm_eval.tasks, "TaskManager", lambda include_defaults: manager)
    with pytest.raises(CompressionError, match="unknown task 'continuation'; did you mean 'continuations'"):
        evaluate_tasks(model, tiny_models.tokenizer(), ["continuation"])
