"""Measurements as reports and model cards hold them."""

import math
from typing import Any, TypedDict

from ..calibration.texts import DATASETS
from ..runtime.privacy import public_name


class Quality(TypedDict, total=False):
    """One metric on one text or task.

    Attributes:
        metric: name of the metric, such as "perplexity" or "acc_norm".
        dataset: name of the data to show.
        dataset_id, dataset_config, split: id of the data on the Hub, with configuration and split, if they come from
            there.
        settings: how it was measured, in a few words.
        dense, compressed: values of the two models. `dense` is left out where the metric itself compares the two.
    """

    metric: str
    dataset: str
    dataset_id: str
    dataset_config: str
    split: str
    settings: str
    dense: float
    compressed: float


class Speed(TypedDict):
    """One measured speed: what was run, on which device, and the values of the two models with their unit."""

    what: str
    device: str
    unit: str
    dense: float
    compressed: float


def text_quality(evaluation: dict[str, Any]) -> list[Quality]:
    """Return the metrics of an evaluation on one text.

    Args:
        evaluation: `evaluation.perplexity.Evaluation` as a dictionary.
    """
    text = evaluation["text"]
    settings = f"{evaluation['windows']:,} windows of {evaluation['window']:,} tokens"
    if evaluation["stride"] < evaluation["window"]:
        settings += f", {evaluation['stride']:,} apart"
    source: Quality = {"dataset": public_name(text), "settings": settings}
    # The folders of a file are of this machine only.
    if text in DATASETS:
        source |= {"dataset": text, "dataset_id": DATASETS[text]["path"], "split": "test"}
    rows: list[Quality] = [{**source, "metric": "perplexity", "compressed": evaluation["perplexity"]}]
    if evaluation["reference_nll"] is not None:
        rows[0]["dense"] = math.exp(evaluation["reference_nll"])
        rows.append({**source, "metric": "kl_divergence", "compressed": evaluation["kl"]})
        rows.append({**source, "metric": "top1_agreement", "compressed": evaluation["top1_agreement"]})
    return rows


def task_quality(result: dict[str, Any]) -> list[Quality]:
    """Return the metrics of one task.

    Args:
        result: `evaluation.tasks.TaskResult` as a dictionary.
    """
    settings = f"{result['shots']}-shot, {result['items']:,} items, lm-eval {result['lm_eval']}"
    source: Quality = {"dataset": result["task"], "settings": settings}
    # The id of data on the Hub lets the Hub group the results of all models on them.
    if result["dataset"] is not None:
        on_hub: Quality = {
            "dataset_id": result["dataset"],
            "dataset_config": result["config"] or "default",
            "split": result["split"],
        }
        source |= on_hub
    rows: list[Quality] = []
    for metric, value in result["metrics"].items():
        row: Quality = {**source, "metric": metric, "compressed": value}
        if result["reference"] is not None:
            row["dense"] = result["reference"][metric]
        rows.append(row)
    return rows
