"""Commands that measure models: evaluate, inspect, verify, report, compare."""

import dataclasses
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from ..runtime.errors import CompressionError
from .base import app, one_line_errors, says_when_interrupted
from .options import RECIPE_HELP, Device, Dtype, Json, SeveralValues
from .output import kinds_summary, print_json, print_table, show_kinds, show_layers, show_totals

if TYPE_CHECKING:
    from ..evaluation.perplexity import Evaluation
    from ..evaluation.tasks import TaskResult


@app.command(cls=SeveralValues)
@one_line_errors
def evaluate(
    model: Annotated[str, typer.Argument(help="model to evaluate: a folder or a name on the Hub")],
    text: Annotated[list[str] | None, typer.Option(help="one or more text files or datasets (wikitext2, c4)")] = None,
    tasks: Annotated[
        list[str] | None,
        typer.Option(help="one or more of lm-eval's tasks, or files of items (.jsonl, packed or not)"),
    ] = None,
    window: Annotated[
        int | None, typer.Option(help="texts: tokens per window; default: the model's context, at most 2048")
    ] = None,
    stride: Annotated[
        int | None, typer.Option(help="texts: tokens between window starts; default: the window")
    ] = None,
    max_windows: Annotated[int | None, typer.Option(help="texts: score only the first windows")] = None,
    num_fewshot: Annotated[
        int | None, typer.Option(help="tasks: solved examples before each item; default: the task's own")
    ] = None,
    limit: Annotated[int | None, typer.Option(help="tasks: score only the first items")] = None,
    batch_size: Annotated[int, typer.Option(help="tasks: requests per batch")] = 8,
    reference: Annotated[str | None, typer.Option(help="model to compare with, such as the dense one")] = None,
    card: Annotated[
        bool, typer.Option("--card", help="write the figures into the model card of the checkpoint")
    ] = False,
    dtype: Dtype = "auto",
    device: Device = "cpu",
    as_json: Json = False,
) -> None:
    """Measure perplexity and tasks, and fidelity to a reference model.

    Options of several values take them one after the other: --text a.txt b.txt --tasks piqa items.jsonl.
    """
    from ..evaluation.perplexity import evaluate as evaluate_text
    from ..evaluation.tasks import evaluate_tasks
    from ..models.loading import load_model, load_tokenizer

    if not text and not tasks:
        raise CompressionError("evaluate: nothing to measure on; name a --text or --tasks")
    if card:
        from ..publishing.model_card import read_config

        read_config(Path(model))  # which refuses a folder that has no card to write into
    subject = load_model(model, dtype, device)
    tokenizer = load_tokenizer(model)
    dense = load_model(reference, dtype, device) if reference else None
    texts = []
    for source in text or []:
        texts.append(
            evaluate_text(
                subject, tokenizer, source, window=window, stride=stride, max_windows=max_windows, reference=dense
            )
        )
    scores = []
    if tasks:
        scores = evaluate_tasks(
            subject, tokenizer, tasks, shots=num_fewshot, limit=limit, batch_size=batch_size, reference=dense
        )
    if card:
        _write_into_card(Path(model), texts, scores)
    if as_json:
        print_json([result.to_dict() for result in texts] + [result.to_dict() for result in scores])
        return
    _show_stored(Path(model))  # what was measured, then the figures
    if texts:
        _show_texts(model, texts, with_reference=dense is not None)
    if scores:
        _show_tasks(model, scores, with_reference=dense is not None)


def _write_into_card(folder: Path, texts: list["Evaluation"], scores: list["TaskResult"]) -> None:
    """Add figures to the model card and the report of a checkpoint."""
    from ..publishing.measurements import task_quality, text_quality
    from ..publishing.model_card import record_quality
    from ..runtime.privacy import public_names

    rows = []
    for evaluation, name in zip(texts, public_names(evaluation.text for evaluation in texts), strict=True):
        rows += text_quality({**evaluation.to_dict(), "text": name})
    for score in scores:
        rows += task_quality(score.to_dict())
    record_quality(folder, rows)


def _show_stored(folder: Path) -> None:
    """Print what a compressed checkpoint on this machine stores, by kind of layer. Other models print nothing."""
    from ..checkpoints.inspect import inspect
    from ..models.loading import compression_of, load_config

    if not folder.is_dir() or compression_of(load_config(str(folder))) is None:
        return
    try:
        inspection = inspect(folder)
    except CompressionError as error:  # a damaged report says nothing against the figures
        typer.echo(f"warning: {error}", err=True)
        return
    show_kinds(f"{folder}: {inspection.method}, by kind of layer", inspection.layers)


def _show_texts(model: str, results: list["Evaluation"], with_reference: bool) -> None:
    columns = ["text", "windows", "perplexity", "nll"]
    if with_reference:
        columns += ["nats lost", "KL", "top-1 agreement"]
    rows = []
    for result in results:
        row = [result.text, str(result.windows), f"{result.perplexity:.4g}", f"{result.nll:.4f}"]
        if with_reference:
            row += [f"{result.nats_lost:.4f}", f"{result.kl:.4f}", f"{result.top1_agreement:.2%}"]
        rows.append(row)
    print_table(model, columns, rows)


def _show_tasks(model: str, results: list["TaskResult"], with_reference: bool) -> None:
    columns = ["task", "items", "shots", "metric", "value"]
    if with_reference:
        columns.append("reference")
    rows: list[list[str]] = []
    for result in results:
        rows += _task_rows(result)
    print_table(model, columns, rows)


def _task_rows(result: "TaskResult") -> Iterator[list[str]]:
    """Yield one row for each metric of a task."""
    for metric, value in result.metrics.items():
        shown = f"{value:.4g}"
        if (error := result.standard_errors.get(metric)) is not None:
            shown += f" ± {error:.2g}"
        row = [result.task, str(result.items), str(result.shots), metric, shown]
        if result.reference is not None:
            row.append(f"{result.reference[metric]:.4g}")
        yield row


@app.command()
@one_line_errors
def inspect(folder: Annotated[Path, typer.Argument(help="compressed checkpoint")], as_json: Json = False) -> None:
    """Show what a compressed checkpoint stores, by kind of layer and layer by layer, counted from its files."""
    from ..checkpoints.inspect import inspect as inspect_checkpoint

    inspection = inspect_checkpoint(folder)
    if as_json:
        print_json({**dataclasses.asdict(inspection), "layer_kinds": kinds_summary(inspection.layers)})
        return
    show_totals(inspection)
    show_kinds(f"{folder}: {inspection.method}, by kind of layer", inspection.layers)
    show_layers("every layer", inspection.layers)


@app.command()
@one_line_errors
def verify(folder: Annotated[Path, typer.Argument(help="compressed checkpoint")], as_json: Json = False) -> None:
    """Check, byte by byte and without running its code, that a compressed checkpoint is what its author saved."""
    from ..checkpoints.verify import verify as verify_checkpoint

    verification = verify_checkpoint(folder)
    if as_json:
        print_json(dataclasses.asdict(verification))
    else:
        for problem in verification.problems:
            typer.echo(problem)
        typer.echo(
            f"{folder}: {verification.layers} compressed layers, {verification.tensors} tensors; "
            f"loading code of {verification.runtime}"
        )
    if not verification.sound:
        raise CompressionError(f"{folder}: verdict: not sound, problems: {len(verification.problems)}")
    if not as_json:
        typer.echo(f"{folder}: verdict: sound, as it was saved")


@app.command()
@one_line_errors
def report(
    folder: Annotated[Path, typer.Argument(help="compressed checkpoint")],
    out: Annotated[Path, typer.Option(help="HTML file to write")],
    comparison: Annotated[
        Path | None, typer.Option(help="folder that compare wrote, to show its Pareto front")
    ] = None,
) -> None:
    """Show a compressed checkpoint on an HTML page: sizes, quality, layers, spectra, training. It needs no network."""
    from ..publishing.html_report import write_html_report

    write_html_report(folder, out, comparison)
    typer.echo(f"wrote {out} ({out.stat().st_size:,} bytes)")


@app.command(cls=SeveralValues)
@one_line_errors
def compare(
    model: Annotated[str, typer.Argument(help="dense model, before the options: a folder or a name on the Hub")],
    method_names: Annotated[
        list[str], typer.Option("--methods", help=r"one or more, as name or 'name\[option=value,...]'")
    ],
    text: Annotated[list[str], typer.Option(help="one or more text files or datasets (wikitext2, c4) to measure on")],
    out: Annotated[
        Path, typer.Option(help="folder for the table, the plot and results.json; a run that broke off goes on in it")
    ],
    ratios: Annotated[
        list[float] | None,
        typer.Option(help="one or more fractions of stored bits to remove; default: as each method's options say"),
    ] = None,
    bits: Annotated[
        list[float] | None, typer.Option(help="one or more numbers of stored bits per weight of the block linears")
    ] = None,
    sizes: Annotated[
        list[str] | None, typer.Option(help="one or more sizes of the weight files, such as 80MB")
    ] = None,
    calibration: Annotated[str, typer.Option(help=RECIPE_HELP["calibration"])] = "bundled",
    samples: Annotated[int, typer.Option(help=RECIPE_HELP["samples"])] = 128,
    sequence_length: Annotated[int | None, typer.Option(help=RECIPE_HELP["sequence_length"])] = None,
    seed: Annotated[int, typer.Option(help=RECIPE_HELP["seed"])] = 0,
    window: Annotated[
        int | None, typer.Option(help="tokens per window; default: the model's context, at most 2048")
    ] = None,
    max_windows: Annotated[int | None, typer.Option(help="score only the first windows of each text")] = None,
    keep: Annotated[
        bool, typer.Option("--keep", help="keep the compressed checkpoints; otherwise they are deleted once measured")
    ] = False,
    dtype: Annotated[
        str, typer.Option(help="of the checkpoints: auto (as stored), float32, bfloat16 or float16")
    ] = "auto",
    device: Device = "cpu",
) -> None:
    """Compress by several methods at several sizes, and show in a table and a plot what each loses at which size.

    Options of several values take them one after the other: --methods slab sola --ratios 0.2 0.3.
    """
    from rich.markup import escape

    from ..evaluation import pareto
    from ..evaluation.candidates import candidates
    from ..evaluation.comparison import Comparison, compare
    from ..execution.files import write_atomically

    pareto.check_plotting()  # before hours of work, not after them
    comparison = Comparison(
        model,
        text,
        calibration=calibration,
        samples=samples,
        sequence_length=sequence_length,
        seed=seed,
        dtype=dtype,
        device=device,
        window=window,
        max_windows=max_windows,
    )
    combinations = candidates(method_names, ratios or [], bits or [], sizes or [])
    outcome = f"what is finished stays in {out}, and the same command goes on from there"
    with says_when_interrupted(outcome):
        results = compare(comparison, combinations, out, keep=keep, log=lambda line: typer.echo(line, err=True))
    write_atomically(out / "table.md", pareto.markdown(results))
    pareto.plot(results, out / "pareto.png")
    rows = []
    for row in pareto.table(results):
        rows.append([escape(cell) for cell in row])  # rich would read `[option=value]` as markup
    print_table(f"{model} (★ the best method at each size)", pareto.COLUMNS, rows)
    for failure in pareto.failures(results):
        typer.echo(f"not reached: {failure}")
    typer.echo(f"wrote {out / 'table.md'}, {out / 'pareto.png'}, {out / 'results.json'}")
