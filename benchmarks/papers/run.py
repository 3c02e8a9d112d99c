"""Fill the headline table of a paper: compress as the paper did, reload, measure, and put the published figures beside.

    python benchmarks/papers/run.py sola --models LLaMA-2-7B --device cuda --out out/papers/sola

A table is a JSON file in this folder, or of your own with the same fields. Every finished cell is a file in the output folder; the same
command run again goes on where it stopped, and `table.md` there is written anew after each.
"""

import argparse
import json
import re
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel

from hf_lowrank import CompressionConfig, CompressionError, compress
from hf_lowrank.checkpoints.inspect import inspect
from hf_lowrank.evaluation.comparison_records import finished_record, model_sha256, text_sha256, write_json
from hf_lowrank.evaluation.perplexity import evaluate
from hf_lowrank.execution.files import write_atomically
from hf_lowrank.models.architectures import find_blocks, find_layers
from hf_lowrank.models.loading import load_config, load_model, load_tokenizer, skeleton
from hf_lowrank.version import library_versions

Table = dict[str, Any]
Record = dict[str, Any]


def load_table(name: str) -> Table:
    """A table by its name in this folder, or from a file."""
    file = Path(__file__).with_name(f"{name}.json")
    file = file if file.is_file() else Path(name)
    if not file.is_file():
        known = ", ".join(sorted(each.stem for each in Path(__file__).parent.glob("*.json")))
        raise CompressionError(f"table {name!r}: no such file, and not one of {known}")
    table: Table = json.loads(file.read_text(encoding="utf-8"))
    return table


def block_ratio(table: Table, ratio: float, model: str) -> float:
    """The paper's ratio as a share of the block linears: a share of the whole model grows by (all parameters) / (block weights)."""
    if table["removed_share_of"] == "block linears":
        return ratio
    dense = skeleton(load_config(model))
    everything = sum(parameter.numel() for parameter in dense.parameters())
    return (
        ratio * everything / sum(layer.out_features * layer.in_features for layer in find_layers(find_blocks(dense)))
    )


def recipe(table: Table, model: str, setting: str, method: str) -> CompressionConfig:
    """How the paper compresses a model in one setting.

    Raises:
        CompressionError: if the paper's ratio is more than all of the block linears.
    """
    chosen, calibration = table["settings"][setting], table["calibration"]
    return CompressionConfig(
        method=method,
        ratio=block_ratio(table, chosen["ratio"], table["models"][model]["id"]),
        options={**table["methods"][method], **chosen.get("options", {})},
        calibration=calibration["source"],
        samples=calibration["samples"],
        sequence_length=calibration["sequence_length"],
        seed=calibration["seed"],
        accounting=table["accounting"],
    )


def run_cell(table: Table, model: str, setting: str, method: str, out: Path, **arguments: Any) -> Record:
    """Compress a model in one setting, reload it from disk and measure it; the dense model is only measured.

    Args:
        arguments: as for `measure`, with `device`.
    """
    source = table["models"][model]["id"]
    if method == "dense":
        return measure(table, model, source, **arguments)
    dense = load_model(source, device=arguments["device"])
    started = time.monotonic()
    compressed = compress(dense, recipe(table, model, setting, method), load_tokenizer(source))
    seconds = time.monotonic() - started
    with tempfile.TemporaryDirectory(dir=out) as folder:
        compressed.save_pretrained(folder)
        del dense, compressed
        stored = inspect(folder)
        ratios = {
            "ratio_stored": stored.ratio_stored,
            "ratio_paper": stored.ratio_paper,
            "model_ratio": stored.model_ratio,
        }
        return {"seconds": seconds, **ratios, **measure(table, model, folder, **arguments)}


def measure(
    table: Table, model: str, folder: str, *, device: str, batch_size: int, tasks: bool, task_folder: Path | None
) -> Record:
    """Perplexities and accuracies in percent, by the names of the table's columns.

    Args:
        model: name of the model in the table, which sets the window. folder: where the model to measure is.
        batch_size: sequences per batch of the tasks. tasks: whether to run them. task_folder: where lm-eval finds tasks of your own.
    """
    subject, tokenizer = load_model(folder, device=device), load_tokenizer(folder)
    window = table["models"][model]["window"]
    found: dict[str, float] = {}
    for name, text in table["texts"].items():
        found[name] = evaluate(
            subject, tokenizer, text["source"], window=window, max_windows=text.get("max_windows")
        ).perplexity
    if tasks and table["tasks"]:
        found |= accuracies(subject, tokenizer, table["tasks"], device, batch_size, task_folder)
        if table["mean_of"]:
            found["mean"] = sum(found[name] for name in table["mean_of"]) / len(table["mean_of"])
    return {"measured": found}


def accuracies(
    model: PreTrainedModel,
    tokenizer: Any,
    tasks: dict[str, Any],
    device: str,
    batch_size: int,
    task_folder: Path | None,
) -> dict[str, float]:
    """Accuracies in percent by lm-eval, in one run for all tasks with the same number of examples in the prompt."""
    from lm_eval import simple_evaluate
    from lm_eval.models.huggingface import HFLM
    from lm_eval.tasks import TaskManager

    subject = HFLM(pretrained=model, tokenizer=tokenizer, batch_size=batch_size, device=device)
    manager = TaskManager(include_path=task_folder)
    found: dict[str, float] = {}
    for shots in sorted({task.get("shots", 0) for task in tasks.values()}):
        chosen = {name: task for name, task in tasks.items() if task.get("shots", 0) == shots}
        results = simple_evaluate(
            subject, tasks=[task["task"] for task in chosen.values()], num_fewshot=shots, task_manager=manager, bootstrap_iters=0,
            log_samples=False,
        )  # fmt: skip
        assert results is not None, "only the first of several processes gets None"
        found |= {
            name: 100 * float(results["results"][task["task"]][f"{task['metric']},none"])
            for name, task in chosen.items()
        }
    return found


def inputs(table: Table, model: str, setting: str, method: str, tasks: bool) -> dict[str, Any]:
    """Everything that the figures of a cell depend on."""
    import lm_eval

    found = {
        "model": model_sha256(table["models"][model]["id"]),
        "window": table["models"][model]["window"],
        "texts": {name: {**text, "sha256": text_sha256(text["source"])} for name, text in table["texts"].items()},
        "tasks": table["tasks"] if tasks else {},
        "versions": {**library_versions(), "lm_eval": lm_eval.__version__},
    }
    if method == "dense":
        return found
    fields = ("removed_share_of", "accounting", "calibration")
    compression = {name: table[name] for name in fields} | {
        "options": table["methods"][method],
        "setting": table["settings"][setting],
    }
    return {**found, "compression": {**compression, "calibration_sha256": text_sha256(table["calibration"]["source"])}}


def fill(
    table: Table,
    out: Path,
    models: Sequence[str],
    settings: Sequence[str],
    methods: Sequence[str],
    *,
    tasks: bool = True,
    **arguments: Any,
) -> Path:
    """Run every cell that is not finished, the dense models first, and write `table.md`; its path."""
    out.mkdir(parents=True, exist_ok=True)
    cells = [(model, "dense", "dense") for model in models]
    cells += [(model, setting, method) for model in models for setting in settings for method in methods]
    for model, setting, method in cells:
        file = cell_file(out, model, setting, method)
        needed = inputs(table, model, setting, method, tasks)
        if finished_record(file, needed, log=say) is None:
            say(f"{model}, {setting}, {method} ...")
            try:
                record = run_cell(table, model, setting, method, out, tasks=tasks, **arguments)
            except CompressionError as error:
                if method == "dense":
                    raise
                record = {"failed": str(error)}
            write_json(file, {"inputs": needed, **record})
        write_atomically(out / "table.md", markdown(table, out))
    return out / "table.md"


def markdown(table: Table, out: Path) -> str:
    """The table: in every cell the published figure, then ours."""
    metrics = [*table["texts"], *table["tasks"], *(["mean"] if table["mean_of"] else [])]
    published = {(each["model"], each["setting"], each["method"], each["metric"]): each for each in table["published"]}
    lines = [
        ["model", "setting", "method", "removed from blocks", "without masks", "from the model", *metrics, "seconds"],
    ]
    lines.append(["---"] * len(lines[0]))
    failures = []
    for model, setting, method in rows(table, out):
        file = cell_file(out, model, setting, method)
        record = json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {}
        if "failed" in record:
            failures.append(f"- {model}, {setting}, {method}: {record['failed']}")
        ratios = [
            f"{record[name]:.2%}" if name in record else "" for name in ("ratio_stored", "ratio_paper", "model_ratio")
        ]
        figures = []
        for metric in metrics:
            figure = published.get((model, setting, method, metric))
            known = "?" if figure is None else str(figure["value"]) + ("" if figure["source"] == "paper" else "†")
            measured = record.get("measured", {}).get(metric)
            figures.append(f"{known} · " + ("–" if measured is None else f"{measured:.4g}"))
        lines.append(
            [model, setting, method, *ratios, *figures, f"{record['seconds']:.0f}" if "seconds" in record else ""]
        )
    text = f"# {table['title']}\n\nIn every cell: published · measured. Perplexities, and accuracies in percent. "
    text += f"The paper's ratio is a share of the {table['removed_share_of']}.\n"
    text += "?: not known. –: not run. †: second-hand, or from the paper of a rival.\n\n"
    text += "\n".join(f"| {' | '.join(line)} |" for line in lines) + "\n"
    if failures:
        text += "\nNot reached:\n\n" + "\n".join(failures) + "\n"
    return text + "\n" + "\n".join(f"- {note}" for note in table["notes"]) + "\n"


def rows(table: Table, out: Path) -> list[tuple[str, str, str]]:
    """Model, setting and method of every row: the paper's method everywhere, others where something is published or was run."""
    known = {(each["model"], each["setting"], each["method"]) for each in table["published"]}
    found = []
    for model in table["models"]:
        for setting in ("dense", *table["settings"]):
            methods = ["dense"] if setting == "dense" else list(table["methods"])
            others = sorted(
                method for one, two, method in known if (one, two) == (model, setting) and method not in methods
            )
            for method in (*methods, *others):
                cell = (model, setting, method)
                if method in (table["method"], "dense") or cell in known or cell_file(out, *cell).is_file():
                    found.append(cell)
    return found


def cell_file(out: Path, model: str, setting: str, method: str) -> Path:
    return out / f"{'_'.join((model, re.sub(r'[ %]', '', setting).replace(':', 'of'), method))}.json"


def say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("table", help="sola, soco, slab, or a JSON file of the same form")
    parser.add_argument("--out", type=Path, required=True, help="folder for the finished cells and table.md")
    parser.add_argument("--models", nargs="+", help="names in the table; default: all")
    parser.add_argument("--settings", nargs="+", help="such as '20 %%' or 2:4; default: all")
    parser.add_argument("--methods", nargs="+", help="default: the paper's own")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--batch-size", type=int, default=8, help="sequences per batch of the tasks")
    parser.add_argument("--no-tasks", action="store_true", help="perplexities only")
    parser.add_argument("--task-folder", type=Path, help="folder of lm-eval tasks of your own")
    arguments = parser.parse_args()
    try:
        table = load_table(arguments.table)
        models, settings = arguments.models or list(table["models"]), arguments.settings or list(table["settings"])
        methods = arguments.methods or [table["method"]]
        for chosen, known in ((models, "models"), (settings, "settings"), (methods, "methods")):
            for name in chosen:
                if name not in table[known]:
                    raise CompressionError(f"{name!r} is not one of the table's {known}: {', '.join(table[known])}")
        file = fill(
            table, arguments.out, models, settings, methods, tasks=not arguments.no_tasks,
            device=arguments.device, batch_size=arguments.batch_size, task_folder=arguments.task_folder,
        )  # fmt: skip
    except CompressionError as error:
        sys.exit(f"error: {error}")
    print(file.read_text(encoding="utf-8"))


if __name__ == "__main__":
    main()
