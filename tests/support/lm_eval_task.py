"""Writes a small task for lm-eval, and runs it in this process."""

import json
from pathlib import Path

from lm_eval import simple_evaluate
from lm_eval.tasks import TaskManager

from tests.support import tiny_models

TASK = """
task: continuations
dataset_path: json
dataset_kwargs:
  data_files:
    test: {items}
test_split: test
output_type: multiple_choice
doc_to_text: "{{{{ctx}}}}"
doc_to_choice: "{{{{choices}}}}"
doc_to_target: label
metric_list:
  - metric: acc
    aggregation: mean
    higher_is_better: true
"""


def write_task(folder: Path) -> Path:
    """Write a task of ten items with two choices, for the tokenizer of `tiny_models`, and return its file."""
    words = tiny_models.text(30)
    items = []
    for i in range(10):
        choices = [words[i + 1][:9].strip(), words[i + 2][:14].strip()]
        items.append({"ctx": words[i][:20].strip(), "choices": choices, "label": i % 2})
    (folder / "items.jsonl").write_text("\n".join(json.dumps(item) for item in items))
    (folder / "task.yaml").write_text(TASK.format(items=folder / "items.jsonl"))
    return folder / "task.yaml"


def accuracy(model_args: str, task: Path) -> float:
    """Return the accuracy on a task, measured by lm-eval's own class for transformers' models."""
    tasks = TaskManager(include_defaults=False)  # listing the tasks that lm-eval brings takes seconds
    evaluation = simple_evaluate(
        "hf", model_args, tasks=[str(task)], device="cpu", batch_size=4, task_manager=tasks, log_samples=False
    )
    return float(evaluation["results"]["continuations"]["acc,none"])
