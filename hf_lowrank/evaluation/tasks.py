"""Zero-shot and few-shot tasks, run by lm-eval.

Tasks are those of lm-eval by name, task files (YAML), and local files of items (JSON lines). A local file becomes a
`ConfigurableTask` of lm-eval, which builds the requests, scores and aggregates as for its own tasks.
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

from ..execution.files import one_line
from ..runtime.errors import CompressionError, path_in_message, quoted
from ..runtime.privacy import public_names
from .items import Form, Item, read_items

BOOTSTRAPS = 1000
"""Number of resamplings for the standard errors that have no formula, such as the error of a perplexity."""


@dataclass(frozen=True)
class TaskResult:
    """Figures of one model on one task, or on a group of tasks that lm-eval aggregates.

    Attributes:
        task: name in lm-eval; of a local file, its name.
        dataset, config, split: id on the Hub, configuration and split, if the data come from there.
        items: number of items that were scored.
        shots: number of solved examples before each item.
        metrics: values by the metric's name in lm-eval.
        standard_errors: standard errors of the metrics that have one.
        reference: metrics of the reference model.
        lm_eval: version of lm-eval.
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
        tasks: names known to lm-eval, task files (.yaml), or files of items (.jsonl, .jsonl.gz; see `items.FORMS`).
        shots: number of solved examples before each item. The default is the task's own, and 0 for a local file.
        limit: maximum number of items of each task that are scored, from the first on.
        reference: model to compare with, such as the dense one.

    Raises:
        CompressionError: if lm-eval is not installed, a task is unknown, a file is damaged, or the data cannot be
            loaded.
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
    # Both models are measured by the same harness, with the same items and examples.
    harness = _Harness(tokenizer, tasks, shots=shots, limit=limit, batch_size=batch_size)
    rows = harness.evaluate(model)
    reference_metrics: dict[str, dict[str, float]] = {}
    if reference is not None:
        for row in harness.evaluate(reference):
            reference_metrics[row["task"]] = row["metrics"]
    return [TaskResult(**row, reference=reference_metrics.get(row["task"])) for row in rows]


class _Harness:
    """Tasks and settings that every model of an evaluation is measured with.

    Attributes:
        local: form and items of each local file, by its path.
        others: tasks that lm-eval finds by itself: names and task files.
        manager: lm-eval's index of tasks.
    """

    def __init__(
        self, tokenizer: Any, tasks: Sequence[str], *, shots: int | None, limit: int | None, batch_size: int
    ) -> None:
        self.tokenizer = tokenizer
        self.shots = shots
        self.limit = limit
        self.batch_size = batch_size
        self.local: dict[str, tuple[Form, list[Item]]] = {}
        self.others: list[str] = []
        for task in tasks:
            if task.endswith((".jsonl", ".jsonl.gz")):
                self.local[task] = read_items(Path(task))
            else:
                self.others.append(task)
        # Examples are other items of the same file, so there must be one more than the shots.
        for source, (_, items) in self.local.items():
            if shots is not None and shots >= len(items):
                raise CompressionError(
                    f"{source}: {len(items)} items, expected more than {shots}, the number of shots"
                )
        self.manager = self._index_tasks()

    def _index_tasks(self) -> Any:
        """Return lm-eval's index of tasks, in which all names must occur.

        Raises:
            CompressionError: if a task is unknown or a task file does not exist.
        """
        from lm_eval.tasks import TaskManager

        names = [task for task in self.others if Path(task).suffix not in (".yaml", ".yml")]
        with _quiet():
            # Reading the thousands of task files that lm-eval brings takes seconds, so it is done only for tasks by
            # name.
            manager = TaskManager(include_defaults=bool(names))
            for name in names:
                _check_known(name, manager.all_tasks)
        for task in self.others:
            if task not in names and not Path(task).is_file():
                raise CompressionError(f"{path_in_message(task)}: no such task file; check the path")
        return manager

    def evaluate(self, model: PreTrainedModel) -> list[dict[str, Any]]:
        """Return the fields of `TaskResult` without the reference, for each task.

        Raises:
            CompressionError: if the data of a task cannot be loaded.
        """
        from lm_eval import simple_evaluate
        from lm_eval.models.huggingface import HFLM

        with _quiet():
            subject = HFLM(pretrained=model, tokenizer=self.tokenizer, batch_size=self.batch_size)
            local_tasks = []
            for name, (form, items) in zip(public_names(self.local), self.local.values(), strict=True):
                local_tasks.append(_local_task(name, form, items))
            try:
                results = simple_evaluate(
                    subject,
                    tasks=[*self.others, *local_tasks],
                    num_fewshot=self.shots,
                    limit=self.limit,
                    bootstrap_iters=BOOTSTRAPS,
                    log_samples=False,
                    task_manager=self.manager,
                )
            # `datasets` raises OSError without network, and for data that do not exist or are not public.
            except OSError as error:
                raise CompressionError(
                    f"tasks {', '.join(self.others)}: the data cannot be loaded ({one_line(error)}); "
                    "give a local file instead"
                ) from error
        assert results is not None, "only the first of several processes gets results, and there is one"
        return [_row(results, name) for name in _top_level(results)]


def _local_task(name: str, form: Form, items: list[Item]) -> Any:
    """Return a task of lm-eval over the items of a local file. Examples for shots are other items of the same file."""
    from datasets import Dataset
    from lm_eval.api.task import ConfigurableTask

    config: dict[str, Any] = {
        "task": name,
        # Lm-eval passes its own arguments for loading data. None of them is needed here.
        "custom_dataset": lambda **_: {"test": Dataset.from_list(items)},
        "test_split": "test",
        "fewshot_split": "test",
        "doc_to_text": "context",
        "metric_list": [_metric_config(metric) for metric in form.metrics],
        "metadata": {"version": 1.0},
    }
    if "choices" in items[0]:
        config |= {"output_type": "multiple_choice", "doc_to_choice": "choices", "doc_to_target": "label"}
    else:
        config |= {"output_type": "loglikelihood", "doc_to_target": "target"}
    return ConfigurableTask(config=config)


def _metric_config(metric: str) -> dict[str, Any]:
    if metric == "perplexity":
        return {"metric": metric, "aggregation": "perplexity", "higher_is_better": False}
    return {"metric": metric, "aggregation": "mean", "higher_is_better": True}


def _top_level(results: Any) -> list[str]:
    """Return the names to show: a group that lm-eval aggregates stands for its tasks."""
    inside: set[str] = set()
    for group, values in results.get("groups", {}).items():
        if _split_metrics(values)[0]:
            inside.update(results.get("group_subtasks", {}).get(group, []))
    return [name for name, values in results["results"].items() if name not in inside and _split_metrics(values)[0]]


def _row(results: Any, name: str) -> dict[str, Any]:
    """Return the fields of `TaskResult` without the reference, for one task or group."""
    metrics, errors = _split_metrics(results["results"][name])
    # A group has no samples of its own. Its tasks have them.
    tasks = [name]
    if name not in results["n-samples"]:
        tasks = results["group_subtasks"][name]
    config = results["configs"].get(name, {})
    # Data from a local file have no id on the Hub, and what stands in their place must not look like one.
    if "custom_dataset" in config or "data_files" in (config.get("dataset_kwargs") or {}):
        config = {}
    samples = results["n-samples"]
    return {
        "task": name,
        "dataset": config.get("dataset_path"),
        "config": config.get("dataset_name"),
        "split": config.get("test_split") or config.get("validation_split"),
        "items": sum(samples[task]["effective"] for task in tasks if task in samples),
        "shots": max(int(results["n-shot"].get(task, 0)) for task in tasks),
        "metrics": metrics,
        "standard_errors": errors,
        "lm_eval": version("lm_eval"),
    }


def _split_metrics(values: dict[str, Any]) -> tuple[dict[str, float], dict[str, float]]:
    """Return values and standard errors by metric, from lm-eval's keys "metric,filter" and "metric_stderr,filter"."""
    metrics: dict[str, float] = {}
    errors: dict[str, float] = {}
    for key, value in values.items():
        metric, comma, used_filter = key.partition(",")
        # Keys without a filter are not metrics ("alias"), and a text stands for an error that was not computed
        # ("N/A").
        if not comma or isinstance(value, str):
            continue
        name = metric.removesuffix("_stderr")
        if used_filter != "none":
            name += f" ({used_filter})"
        if metric.endswith("_stderr"):
            errors[name] = float(value)
        else:
            metrics[name] = float(value)
    return metrics, errors


def _check_known(task: str, all_tasks: Sequence[str]) -> None:
    if task not in all_tasks:
        near = difflib.get_close_matches(task, all_tasks, n=1)
        hint = f"; did you mean {near[0]!r}?" if near else ""
        raise CompressionError(
            f"unknown task {quoted(task)}{hint} (`lm_eval ls tasks` lists all; files of items end in .jsonl "
            "or .jsonl.gz)"
        )


@contextmanager
def _quiet() -> Iterator[None]:
    """Keep lm-eval quiet and in this process while the context is active.

    Its warnings about things done here on purpose (a model that is loaded already) are not shown, and what it prints
    goes to stderr. Its bootstrap runs in this process, because a fork of a process whose torch runs threads may never
    come back.
    """
    logger = logging.getLogger("lm_eval")
    level = logger.level
    multiprocessing_switch = os.environ.get("DISABLE_MULTIPROC")
    logger.setLevel(logging.ERROR)
    os.environ["DISABLE_MULTIPROC"] = "1"
    try:
        with redirect_stdout(sys.stderr):
            yield
    finally:
        logger.setLevel(level)
        os.environ.pop("DISABLE_MULTIPROC")
        if multiprocessing_switch is not None:
            os.environ["DISABLE_MULTIPROC"] = multiprocessing_switch
