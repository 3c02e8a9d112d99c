"""Fill the main table of a paper: compress as the paper did, reload, measure, and put the published figures beside.

    python benchmarks/papers/run.py sola --models LLaMA-2-7B --device cuda --out out/papers/sola

A table is a JSON file in this folder, or one of your own with the same fields. Every finished cell is a file in the
output folder. The same command, run again, goes on where it stopped. `table.md` in that folder is written anew after
each cell.
"""

import argparse
import itertools
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
    """Return a table by its name in this folder, or from a file.

    Raises:
        CompressionError: if there is neither.
    """
    file = Path(__file__).with_name(f"{name}.json")
    if not file.is_file():
        file = Path(name)
    if not file.is_file():
        names = ", ".join(sorted(table.stem for table in Path(__file__).parent.glob("*.json")))
        raise CompressionError(f"table {name!r}: no such file, and not one of {names}")
    table: Table = json.loads(file.read_text(encoding="utf-8"))
    return table


def block_ratio(table: Table, ratio: float, model: str) -> float:
    """Return the paper's ratio as a share of the weights of the blocks' linear layers.

    A share of the whole model grows by (all parameters) / (weights of these layers).
    """
    if table["removed_share_of"] == "block linears":
        return ratio
    dense = skeleton(load_config(model))
    parameters = sum(parameter.numel() for parameter in dense.parameters())
    block_weights = sum(layer.out_features * layer.in_features for layer in find_layers(find_blocks(dense)))
    return ratio * parameters / block_weights


def recipe(table: Table, model: str, setting: str, method: str) -> CompressionConfig:
    """Return the config by which the paper compresses a model in one setting.

    Raises:
        CompressionError: if the paper's ratio is more than all of the blocks' linear layers.
    """
    table_setting = table["settings"][setting]
    calibration = table["calibration"]
    return CompressionConfig(
        method=method,
        ratio=block_ratio(table, table_setting["ratio"], table["models"][model]["id"]),
        options={**table["methods"][method], **table_setting.get("options", {})},
        calibration=calibration["source"],
        samples=calibration["samples"],
        sequence_length=calibration["sequence_length"],
        seed=calibration["seed"],
        accounting=table["accounting"],
    )


def run_cell(table: Table, model: str, setting: str, method: str, out: Path, **arguments: Any) -> Record:
    """Compress a model in one setting, reload it from disk and measure it. The dense model is only measured.

    Args:
        arguments: the arguments of `measure`, `device` among them.
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
        del dense, compressed  # the reloaded model needs their memory
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
    """Return perplexities, and accuracies in percent, by the names of the table's columns.

    Args:
        model: name of the model in the table, which sets the window.
        folder: folder or name of the model to measure.
        batch_size: sequences per batch of the tasks.
        tasks: whether to run the tasks.
        task_folder: folder in which lm-eval finds tasks of your own.
    """
    subject, tokenizer = load_model(folder, device=device), load_tokenizer(folder)
    window = table["models"][model]["window"]
    figures: dict[str, float] = {}
    for name, text in table["texts"].items():
        evaluation = evaluate(subject, tokenizer, text["source"], window=window, max_windows=text.get("max_windows"))
        figures[name] = evaluation.perplexity
    if tasks and table["tasks"]:
        figures |= accuracies(subject, tokenizer, table["tasks"], device, batch_size, task_folder)
        if table["mean_of"]:
            figures["mean"] = sum(figures[name] for name in table["mean_of"]) / len(table["mean_of"])
    return {"measured": figures}


def accuracies(
    model: PreTrainedModel,
    tokenizer: Any,
    tasks: dict[str, Any],
    device: str,
    batch_size: int,
    task_folder: Path | None,
) -> dict[str, float]:
    """Return accuracies in percent by lm-eval, with one run for all tasks of the same number of examples (shots)."""
    # Imported here, as perplexities can be measured without lm-eval.
    from lm_eval import simple_evaluate
    from lm_eval.models.huggingface import HFLM
    from lm_eval.tasks import TaskManager

    subject = HFLM(pretrained=model, tokenizer=tokenizer, batch_size=batch_size, device=device)
    manager = TaskManager(include_path=task_folder)
    by_shots: dict[int, dict[str, Any]] = {}
    for name, task in tasks.items():
        by_shots.setdefault(task.get("shots", 0), {})[name] = task
    percent: dict[str, float] = {}
    for shots in sorted(by_shots):
        results = simple_evaluate(
            subject,
            tasks=[task["task"] for task in by_shots[shots].values()],
            num_fewshot=shots,
            task_manager=manager,
            bootstrap_iters=0,
            log_samples=False,
        )
        assert results is not None, "of several processes only the first gets results, and here is one"
        for name, task in by_shots[shots].items():
            percent[name] = 100 * float(results["results"][task["task"]][f"{task['metric']},none"])
    return percent


def inputs(table: Table, model: str, setting: str, method: str, tasks: bool) -> dict[str, Any]:
    """Return everything that the figures of a cell depend on."""
    import lm_eval

    texts = {}
    for name, text in table["texts"].items():
        texts[name] = {**text, "sha256": text_sha256(text["source"])}
    measurement = {
        "model": model_sha256(table["models"][model]["id"]),
        "window": table["models"][model]["window"],
        "texts": texts,
        "tasks": table["tasks"] if tasks else {},
        "versions": {**library_versions(), "lm_eval": lm_eval.__version__},
    }
    if method == "dense":
        return measurement
    compression = {
        "removed_share_of": table["removed_share_of"],
        "accounting": table["accounting"],
        "calibration": table["calibration"],
        "options": table["methods"][method],
        "setting": table["settings"][setting],
        "calibration_sha256": text_sha256(table["calibration"]["source"]),
    }
    return {**measurement, "compression": compression}


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
    """Run every cell that is not finished, the dense models first, and write `table.md`.

    Returns:
        The path of `table.md`.
    """
    out.mkdir(parents=True, exist_ok=True)
    cells = [(model, "dense", "dense") for model in models]
    cells += itertools.product(models, settings, methods)
    for model, setting, method in cells:
        file = cell_file(out, model, setting, method)
        cell_inputs = inputs(table, model, setting, method, tasks)
        if finished_record(file, cell_inputs, log=say) is None:
            say(f"{model}, {setting}, {method} ...")
            try:
                record = run_cell(table, model, setting, method, out, tasks=tasks, **arguments)
            except CompressionError as error:
                if method == "dense":  # without the dense model's figures the rest says nothing
                    raise
                record = {"failed": str(error)}
            write_json(file, {"inputs": cell_inputs, **record})
        write_atomically(out / "table.md", markdown(table, out))
    return out / "table.md"


def markdown(table: Table, out: Path) -> str:
    """Return the table as Markdown. In every cell stands the published figure, then ours."""
    metrics = [*table["texts"], *table["tasks"]]
    if table["mean_of"]:
        metrics.append("mean")
    heads = [
        "model",
        "setting",
        "method",
        "removed from blocks",
        "without masks",
        "from the model",
        *metrics,
        "seconds",
    ]
    lines = [heads, ["---"] * len(heads)]
    failures = []
    published = published_figures(table)
    for model, setting, method in rows(table, out):
        file = cell_file(out, model, setting, method)
        record = json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {}
        if "failed" in record:
            failures.append(f"- {model}, {setting}, {method}: {record['failed']}")
        line = [model, setting, method]
        for name in ("ratio_stored", "ratio_paper", "model_ratio"):
            line.append(f"{record[name]:.2%}" if name in record else "")
        for metric in metrics:
            measured = record.get("measured", {}).get(metric)
            line.append(published_and_measured(published.get((model, setting, method, metric)), measured))
        line.append(f"{record['seconds']:.0f}" if "seconds" in record else "")
        lines.append(line)
    text = f"# {table['title']}\n\nIn every cell: published · measured. Perplexities, and accuracies in percent. "
    text += f"The paper's ratio is a share of the {table['removed_share_of']}.\n"
    text += "?: not known. –: not run. †: second-hand, or from the paper of a rival.\n\n"
    text += "\n".join(f"| {' | '.join(line)} |" for line in lines) + "\n"
    if failures:
        text += "\nNot reached:\n\n" + "\n".join(failures) + "\n"
    return text + "\n" + "\n".join(f"- {note}" for note in table["notes"]) + "\n"


def published_figures(table: Table) -> dict[tuple[str, str, str, str], Record]:
    """Return the published figures of a table by model, setting, method and metric."""
    figures = {}
    for figure in table["published"]:
        figures[figure["model"], figure["setting"], figure["method"], figure["metric"]] = figure
    return figures


def published_and_measured(figure: Record | None, measured: float | None) -> str:
    """Return the text of a cell: the published figure, or "?", and the measured one, or "–"."""
    published = "?"
    if figure is not None:
        published = str(figure["value"])
        if figure["source"] != "paper":
            published += "†"
    return f"{published} · " + ("–" if measured is None else f"{measured:.4g}")


def rows(table: Table, out: Path) -> list[tuple[str, str, str]]:
    """Return model, setting and method of every row.

    The paper's method has a row everywhere, other methods where something is published or was run.
    """
    published = {cell[:3] for cell in published_figures(table)}
    cells = []
    for model in table["models"]:
        for setting in ("dense", *table["settings"]):
            for method in methods_of_rows(table, published, model, setting):
                cell = (model, setting, method)
                if method in (table["method"], "dense") or cell in published or cell_file(out, *cell).is_file():
                    cells.append(cell)
    return cells


def methods_of_rows(table: Table, published: set[tuple[str, str, str]], model: str, setting: str) -> list[str]:
    """Return the table's methods, then others that are published for a model in a setting, in alphabetical order."""
    methods = ["dense"] if setting == "dense" else list(table["methods"])
    only_published = []
    for published_model, published_setting, method in published:
        if (published_model, published_setting) == (model, setting) and method not in methods:
            only_published.append(method)
    return methods + sorted(only_published)


def cell_file(out: Path, model: str, setting: str, method: str) -> Path:
    """Return the file of a cell, whose name has no space, percent sign or colon."""
    setting_in_name = re.sub(r"[ %]", "", setting).replace(":", "of")
    return out / f"{model}_{setting_in_name}_{method}.json"


def say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


def parse_arguments() -> argparse.Namespace:
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
    return parser.parse_args()


def check_names(table: Table, field: str, names: Sequence[str]) -> None:
    """Raise CompressionError if a name is not one of a field of the table."""
    for name in names:
        if name not in table[field]:
            raise CompressionError(f"{name!r} is not one of the table's {field}: {', '.join(table[field])}")


def main() -> None:
    arguments = parse_arguments()
    try:
        table = load_table(arguments.table)
        models = arguments.models or list(table["models"])
        settings = arguments.settings or list(table["settings"])
        methods = arguments.methods or [table["method"]]
        check_names(table, "models", models)
        check_names(table, "settings", settings)
        check_names(table, "methods", methods)
        file = fill(
            table,
            arguments.out,
            models,
            settings,
            methods,
            tasks=not arguments.no_tasks,
            device=arguments.device,
            batch_size=arguments.batch_size,
            task_folder=arguments.task_folder,
        )
    except CompressionError as error:
        sys.exit(f"error: {error}")
    print(file.read_text(encoding="utf-8"))


if __name__ == "__main__":
    main()
