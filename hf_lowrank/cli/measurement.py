"""Verbs that measure models: evaluate, inspect, compare."""

import dataclasses
from pathlib import Path
from typing import Annotated

import typer

from .base import HELP, Device, Dtype, Json, SeveralValues, app, one_line_errors, print_json, print_table, show_totals


@app.command()
@one_line_errors
def evaluate(
    model: Annotated[str, typer.Argument(help="model to evaluate: a folder or a name on the Hub")],
    text: Annotated[list[str], typer.Option(help="text file, or a dataset (wikitext2, c4); may be repeated")],
    window: Annotated[int | None, typer.Option(help="tokens per window; default: the model's context, at most 2048")] = None,
    stride: Annotated[int | None, typer.Option(help="tokens between window starts; default: the window")] = None,
    max_windows: Annotated[int | None, typer.Option(help="score only the first windows")] = None,
    reference: Annotated[str | None, typer.Option(help="model to compare with: KL, top-1 agreement, nats lost per token")] = None,
    card: Annotated[bool, typer.Option("--card", help="write the figures into the model card of the checkpoint")] = False,
    dtype: Dtype = "auto",
    device: Device = "cpu",
    as_json: Json = False,
) -> None:
    """Measure perplexity, and fidelity to a reference model."""
    from ..evaluation.perplexity import evaluate_text
    from ..models import load_model, load_tokenizer

    subject, tokenizer = load_model(model, dtype, device), load_tokenizer(model)
    dense = load_model(reference, dtype, device) if reference else None
    results = [
        evaluate_text(subject, tokenizer, source, window=window, stride=stride, max_windows=max_windows, reference=dense) for source in text
    ]
    if card:
        from ..model_card import record, text_quality

        record(Path(model), quality=[row for result in results for row in text_quality(result.to_dict())])
    if as_json:
        print_json([result.to_dict() for result in results])
        return
    columns = ["text", "windows", "perplexity", "nll"] + (["nats lost", "KL", "top-1 agreement"] if dense else [])
    rows = []
    for result in results:
        row = [result.text, str(result.windows), f"{result.perplexity:.4g}", f"{result.nll:.4f}"]
        if dense:
            row += [f"{result.nats_lost:.4f}", f"{result.kl:.4f}", f"{result.top1_agreement:.2%}"]
        rows.append(row)
    print_table(f"{model}", columns, rows)


@app.command()
@one_line_errors
def inspect(folder: Annotated[Path, typer.Argument(help="compressed checkpoint")], as_json: Json = False) -> None:
    """Show what a compressed checkpoint stores, layer by layer, counted from its files."""
    from ..inspection import inspect_checkpoint

    found = inspect_checkpoint(folder)
    if as_json:
        print_json(dataclasses.asdict(found))
        return
    rows = []
    for layer in found.layers:
        error = "" if layer.relative_error is None else f"{layer.relative_error:.4f}"
        what = layer.reason or layer.sparse
        rows.append(
            [
                layer.name,
                layer.kind,
                what,
                str(layer.rank),
                str(layer.binary_rank),
                f"{layer.density:.3f}",
                f"{layer.bits_per_weight:.2f}",
                error,
                f"{layer.bytes:,}",
            ]
        )
    columns = ["layer", "kind", "sparse part", "rank", "binary rank", "density", "bits/weight", "relative error", "bytes"]
    print_table(f"{folder}: {found.method}", columns, rows)
    show_totals(found)


@app.command(cls=SeveralValues)
@one_line_errors
def compare(
    model: Annotated[str, typer.Argument(help="dense model, before the options: a folder or a name on the Hub")],
    method_names: Annotated[list[str], typer.Option("--methods", help=r"one or more, as name or 'name\[option=value,...]'")],
    ratios: Annotated[list[float], typer.Option(help="one or more fractions of stored bits to remove")],
    text: Annotated[list[str], typer.Option(help="one or more text files or datasets (wikitext2, c4) to measure on")],
    out: Annotated[Path, typer.Option(help="folder for the table, the plot and results.json; a run that broke off goes on in it")],
    calibration: Annotated[str, typer.Option(help=HELP["calibration"])] = "self",
    samples: Annotated[int, typer.Option(help=HELP["samples"])] = 128,
    sequence_length: Annotated[int | None, typer.Option(help=HELP["sequence_length"])] = None,
    seed: Annotated[int, typer.Option(help=HELP["seed"])] = 0,
    window: Annotated[int | None, typer.Option(help="tokens per window; default: the model's context, at most 2048")] = None,
    max_windows: Annotated[int | None, typer.Option(help="score only the first windows of each text")] = None,
    keep: Annotated[bool, typer.Option("--keep", help="keep the compressed checkpoints; otherwise they are deleted once measured")] = False,
    dtype: Annotated[str, typer.Option(help="of the checkpoints: auto (as stored), float32, bfloat16 or float16")] = "auto",
    device: Device = "cpu",
) -> None:
    """Compress by several methods at several ratios; one table and one plot of what each loses at which size.

    Options of several values take them one after the other: --methods slab sola --ratios 0.2 0.3.
    """
    from rich.markup import escape

    from .. import frontier
    from ..comparison import Comparison, candidates, compare, write_text

    frontier.check_plotting()
    comparison = Comparison(model, text, calibration, samples, sequence_length, seed, dtype, device, window, max_windows)
    wanted = candidates(method_names, ratios)
    results = compare(comparison, wanted, out, keep=keep, say=lambda line: typer.echo(line, err=True))
    write_text(out / "table.md", frontier.markdown(results))
    frontier.plot(results, out / "frontier.png")
    rows = [[escape(cell) for cell in row] for row in frontier.table(results)]
    print_table(f"{model} (★ the best method at each size)", frontier.COLUMNS, rows)
    for failure in frontier.failures(results):
        typer.echo(f"not reached: {failure}")
    typer.echo(f"wrote {out / 'table.md'}, {out / 'frontier.png'}, {out / 'results.json'}")
