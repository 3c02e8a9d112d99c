"""Zero-shot and few-shot tasks, run by lm-eval: its own by name, task files (YAML), and local multiple-choice files (JSON lines).

A local file becomes a `ConfigurableTask` of lm-eval, which builds the requests, scores and aggregates as for its own tasks.
"""

import difflib
import logging
import os
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, redirect_stdout
from dataclasses import asdict, dataclass
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel

from ..execution.files import one_line, short_path
from ..runtime.errors import CompressionError
from .items import Form, Item, read_items

BOOTSTRAPS = 1000
"""Resamplings for the standard errors that have no formula, such as that of a perplexity."""


@dataclass(frozen=True)
class TaskResult:
    """One task, or a group of tasks that lm-eval aggregates.

    Attributes:
        task: lm-eval's name, or of a local file the last two parts of its path.
        dataset, config, split: id on the Hub, configuration and split, where the data comes from there.
        items, shots: how many were scored, and with how many solved examples before each.
        metrics: values by lm-eval's name of the metric; standard_errors: of those that have one.
        reference: the metrics of the reference model.
        lm_eval: version.
    """

    task: str
    dataset: str | None
    config: str | None
    split: str | None
    items: int
    shots: int
    metrics: dict[str, float]
    standard_errors: dict[str, float]
    reference: dict[str, float] | None
    lm_eval: str

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


def evaluate_tasks(
    model: PreTrainedModel,
    tokenizer: Any,
    tasks: Sequence[str],
    *,
    shots: int | None = None,
    limit: int | None = None,
    batch_size: int = 8,
    reference: PreTrainedModel | None = None,
) -> list[TaskResult]:
    """Run tasks by lm-eval.

    Args:
        tasks: names known to lm-eval, files of tasks (.yaml), or files of items (.jsonl, .jsonl.gz; see `items.FORMS`).
        shots: solved examples before each item; default: the task's own, 0 for a local file.
        limit: score only the first items of each task.
        reference: the model to compare with, such as the dense one.

    Raises:
        CompressionError: without lm-eval, for an unknown task, a damaged file, or data that cannot be had.
    """
    if find_spec("lm_eval") is None:
        raise CompressionError("tasks need lm-eval: pip install 'hf_lowrank[eval]'")
    if not model.can_generate():
        raise CompressionError(
            f"tasks score text by its likelihood, which {type(model).__name__} does not give; use a causal model"
        )
    for name, value, least in (("shots", shots, 0), ("limit", limit, 1), ("batch_size", batch_size, 1)):
        if value is not None and value < least:
            raise CompressionError(f"{name}: found {value}, expected at least {least}")
    run = _Run(tokenizer, list(tasks), shots, limit, batch_size)
    results = run.results(model)
    if reference is None:
        return [TaskResult(**row, reference=None) for row in results]
    dense = {row["task"]: row["metrics"] for row in run.results(reference)}
    return [TaskResult(**row, reference=dense[row["task"]]) for row in results]


class _Run:
    """What every model of an evaluation is measured with."""

    def __init__(
        self, tokenizer: Any, tasks: list[str], shots: int | None, limit: int | None, batch_size: int
    ) -> None:
        from lm_eval.tasks import TaskManager

        self.tokenizer, self.shots, self.limit, self.batch_size = tokenizer, shots, limit, batch_size
        self.files = {source: read_items(Path(source)) for source in tasks if _is_items(source)}
        for source, (_, items) in self.files.items():
            if shots is not None and shots >= len(items):
                raise CompressionError(
                    f"{source}: {len(items)} items, expected more than {shots}, the number of shots"
                )
        self.others = [task for task in tasks if task not in self.files]
        with _quiet():
            named = [task for task in self.others if Path(task).suffix not in (".yaml", ".yml")]
            self.manager = TaskManager(include_defaults=bool(named))
            for task in named:
                _check_known(task, self.manager.all_tasks)
        for task in self.others:
            if task not in named and not Path(task).is_file():
                raise CompressionError(f"{task}: no such task file; check the path")

    def results(self, model: PreTrainedModel) -> list[dict[str, Any]]:
        """Fields of `TaskResult` but the reference, for each task."""
        from lm_eval import simple_evaluate
        from lm_eval.models.huggingface import HFLM

        with _quiet():
            subject = HFLM(pretrained=model, tokenizer=self.tokenizer, batch_size=self.batch_size)
            local = [_local_task(source, form, items) for source, (form, items) in self.files.items()]
            try:
                found = simple_evaluate(
                    subject,
                    tasks=[*self.others, *local],
                    num_fewshot=self.shots,
                    limit=self.limit,
                    bootstrap_iters=BOOTSTRAPS,
                    log_samples=False,
                    task_manager=self.manager,
                )
            except (
                OSError
            ) as error:  # what `datasets` raises offline, or for data that is not there or not open to all
                raise CompressionError(
                    f"tasks {', '.join(self.others)}: the data cannot be had ({one_line(error)}); give a local file instead"
                ) from error
        assert found is not None, "this is the only process"
        return [_row(found, name) for name in _top_level(found)]


def _local_task(source: str, form: Form, items: list[Item]) -> Any:
    """A task of lm-eval over the items of a local file; examples for shots are other items of the same file."""
    from datasets import Dataset
    from lm_eval.api.task import ConfigurableTask

    is_choice = "choices" in items[0]
    asked = {"output_type": "multiple_choice", "doc_to_choice": "choices", "doc_to_target": "label"}
    completed = {"output_type": "loglikelihood", "doc_to_target": "target"}
    metrics = [
        {
            "metric": metric,
            "aggregation": "perplexity" if metric == "perplexity" else "mean",
            "higher_is_better": metric != "perplexity",
        }
        for metric in form.metrics
    ]
    return ConfigurableTask(
        config={
            "task": short_path(source),
            "custom_dataset": lambda **_: {"test": Dataset.from_list(items)},
            "test_split": "test",
            "fewshot_split": "test",
            "doc_to_text": "context",
            "metric_list": metrics,
            "metadata": {"version": 1.0},
            **(asked if is_choice else completed),
        }
    )


def _top_level(found: Any) -> list[str]:
    """Groups that lm-eval aggregates stand for their tasks."""
    aggregated = {name for name in found.get("groups", {}) if _metrics(found["groups"][name])[0]}
    inside = {child for name in aggregated for child in found.get("group_subtasks", {}).get(name, [])}
    return [name for name, values in found["results"].items() if name not in inside and _metrics(values)[0]]


def _row(found: Any, name: str) -> dict[str, Any]:
    metrics, errors = _metrics(found["results"][name])
    leaves = [name] if name in found["n-samples"] else found["group_subtasks"][name]
    config = found["configs"].get(name, {})
    if "custom_dataset" in config or "data_files" in (config.get("dataset_kwargs") or {}):
        config = {}
    return {
        "task": name,
        "dataset": config.get("dataset_path"),
        "config": config.get("dataset_name"),
        "split": config.get("test_split") or config.get("validation_split"),
        "items": sum(found["n-samples"][leaf]["effective"] for leaf in leaves if leaf in found["n-samples"]),
        "shots": max(int(found["n-shot"].get(leaf, 0)) for leaf in leaves),
        "metrics": metrics,
        "standard_errors": errors,
        "lm_eval": version("lm_eval"),
    }


def _metrics(values: dict[str, Any]) -> tuple[dict[str, float], dict[str, float]]:
    """Values and standard errors by metric, from lm-eval's "metric,filter" keys."""
    metrics: dict[str, float] = {}
    errors: dict[str, float] = {}
    for key, value in values.items():
        metric, comma, used = key.partition(",")
        if not comma or isinstance(value, str):
            continue
        is_error = metric.endswith("_stderr")
        name = metric.removesuffix("_stderr") + ("" if used == "none" else f" ({used})")
        (errors if is_error else metrics)[name] = float(value)
    return metrics, errors


def _check_known(task: str, known: Sequence[str]) -> None:
    if task not in known:
        near = difflib.get_close_matches(task, known, n=1)
        hint = f"; did you mean {near[0]!r}?" if near else ""
        raise CompressionError(
            f"unknown task {task!r}{hint} (`lm_eval ls tasks` lists all; files of items end in .jsonl or .jsonl.gz)"
        )


def _is_items(source: str) -> bool:
    return source.endswith((".jsonl", ".jsonl.gz"))


@contextmanager
def _quiet() -> Iterator[None]:
    """Around lm-eval: its remarks on what is done here on purpose (a model that is loaded already) are not shown, what it prints goes to
    stderr, and its bootstrap stays in this process: a fork of a process whose torch runs threads may never come back.
    """
    logger = logging.getLogger("lm_eval")
    before, forks = logger.level, os.environ.get("DISABLE_MULTIPROC")
    logger.setLevel(logging.ERROR)
    os.environ["DISABLE_MULTIPROC"] = "1"
    try:
        with redirect_stdout(sys.stderr):
            yield
    finally:
        logger.setLevel(before)
        os.environ.pop("DISABLE_MULTIPROC")
        if forks is not None:
            os.environ["DISABLE_MULTIPROC"] = forks
