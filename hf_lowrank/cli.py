"""`hf-lowrank`: the command line."""

import dataclasses
import json
import logging
import shlex
import sys
from collections.abc import Callable
from functools import wraps
from pathlib import Path
from typing import Annotated, Any

import typer
import typer.core

from .runtime.configuration import CompressionConfig
from .runtime.errors import CompressionError

app = typer.Typer(
    name="hf-lowrank",
    help="Turn Hugging Face language models into sparse + low-rank (+ binary) layers.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)

HELP = {field.name: field.metadata["help"] for field in dataclasses.fields(CompressionConfig)}

OUT_OF_MEMORY = "out of memory; use fewer --samples, a shorter --sequence-length or a smaller dtype"

Json = Annotated[bool, typer.Option("--json", help="print JSON for machines instead of a table")]
Dtype = Annotated[str, typer.Option(help="auto (as stored), float32, bfloat16 or float16")]
Device = Annotated[str, typer.Option(help="device to work on, such as cpu or cuda")]
Overwrite = Annotated[bool, typer.Option("--overwrite", help="replace the output folder if it is not empty")]
Output = Annotated[Path, typer.Option("-o", "--output", help="folder to write")]


def one_line_errors(command: Callable[..., None]) -> Callable[..., None]:
    """What goes wrong is one line on standard error and exit code 1, never a traceback."""

    @wraps(command)
    def run(*args: Any, **kwargs: Any) -> None:
        try:
            command(*args, **kwargs)
        except CompressionError as error:
            _fail(str(error))
        except MemoryError:
            _fail(OUT_OF_MEMORY)
        except RuntimeError as error:
            if not any(sign in str(error) for sign in ("out of memory", "DefaultCPUAllocator")):
                raise
            _fail(OUT_OF_MEMORY)
        except OSError as error:
            _fail(f"{error.filename or 'input/output'}: {error.strerror or error}; check the path and the free space")
        except KeyboardInterrupt:
            typer.echo("interrupted; nothing was left behind", err=True)
            raise typer.Exit(130) from None

    return run


class SeveralValues(typer.core.TyperCommand):
    """Options of several values take them one after the other: `--ratios 0.2 0.3` is `--ratios 0.2 --ratios 0.3`."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        several = {name for parameter in self.params if getattr(parameter, "multiple", False) for name in parameter.opts}
        spread: list[str] = []
        option = None
        for argument in args:
            if argument.startswith("-"):
                option = argument if argument in several else None
            elif option is not None and spread[-1] != option:
                spread.append(option)
            spread.append(argument)
        return super().parse_args(ctx, spread)


@app.callback()
def main() -> None:
    """Quiet neighbours: only our own warnings reach the terminal."""
    import transformers

    logging.basicConfig(level=logging.WARNING, format="%(message)s", stream=sys.stderr)
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()


@app.command()
@one_line_errors
def methods(as_json: Json = False) -> None:
    """List the compression methods and their options."""
    from .methods import method_class, registered_methods

    rows = []
    for name in registered_methods():
        cls: Any = method_class(name)
        options = {field.name: (field.default, field.metadata["help"]) for field in dataclasses.fields(cls)}
        summary = (cls.__doc__ or "").strip().splitlines()[0]
        rows.append({"method": name, "summary": summary, "source": cls.source, "options": options})
    if as_json:
        _print_json(rows)
        return
    for row in rows:
        typer.secho(row["method"], bold=True, nl=False)
        typer.echo(f"  {row['summary']}  [{row['source']}]")
        for option, (default, text) in row["options"].items():
            typer.echo(f"    {option}={default}  {text}")


@app.command()
@one_line_errors
def compress(
    model: Annotated[str, typer.Argument(help="dense model: a folder or a name on the Hub")],
    output: Output,
    method: Annotated[str, typer.Option(help=HELP["method"])] = "slab",
    ratio: Annotated[float, typer.Option(help=HELP["ratio"])] = 0.5,
    calibration: Annotated[str, typer.Option(help=HELP["calibration"])] = "self",
    samples: Annotated[int, typer.Option(help=HELP["samples"])] = 128,
    sequence_length: Annotated[int | None, typer.Option(help=HELP["sequence_length"])] = None,
    seed: Annotated[int, typer.Option(help=HELP["seed"])] = 0,
    accounting: Annotated[str, typer.Option(help=HELP["accounting"])] = "bits",
    skip: Annotated[list[str] | None, typer.Option(help=HELP["modules_to_not_convert"])] = None,
    settings: Annotated[list[str] | None, typer.Option("--set", help="a setting of the method, as key=value")] = None,
    dtype: Dtype = "auto",
    device: Device = "cpu",
    work_dir: Annotated[Path | None, typer.Option(help="folder that records what is finished; a killed run goes on from there")] = None,
    overwrite: Overwrite = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="only say how much memory and disk it takes")] = False,
) -> None:
    """Compress a model and write a complete checkpoint."""
    from .disk_to_disk import compress_checkpoint, describe
    from .methods import make_method
    from .models import check_free, load_tokenizer

    config = CompressionConfig(
        method=method, ratio=ratio, options=_key_values(settings or []), calibration=calibration, samples=samples,
        sequence_length=sequence_length, seed=seed, accounting=accounting, modules_to_not_convert=skip or [],
    )  # fmt: skip
    make_method(config.method, config.options)
    check_free(output, overwrite)
    if dry_run:
        typer.echo(describe(model, config, device))
        return
    tokenizer = load_tokenizer(model) if calibration != "self" else _tokenizer_or_none(model)
    compress_checkpoint(
        model, output, config, tokenizer, dtype=dtype, device=device, work_dir=work_dir, overwrite=overwrite,
        command=shlex.join(["hf-lowrank", *sys.argv[1:]]),
    )  # fmt: skip
    _show_summary(output)


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
    from .evaluation.perplexity import evaluate_text
    from .models import load_model, load_tokenizer

    subject, tokenizer = load_model(model, dtype, device), load_tokenizer(model)
    dense = load_model(reference, dtype, device) if reference else None
    results = [
        evaluate_text(subject, tokenizer, source, window=window, stride=stride, max_windows=max_windows, reference=dense) for source in text
    ]
    if card:
        from .model_card import record, text_quality

        record(Path(model), quality=[row for result in results for row in text_quality(result.to_dict())])
    if as_json:
        _print_json([result.to_dict() for result in results])
        return
    columns = ["text", "windows", "perplexity", "nll"] + (["nats lost", "KL", "top-1 agreement"] if dense else [])
    rows = []
    for result in results:
        row = [result.text, str(result.windows), f"{result.perplexity:.4g}", f"{result.nll:.4f}"]
        if dense:
            row += [f"{result.nats_lost:.4f}", f"{result.kl:.4f}", f"{result.top1_agreement:.2%}"]
        rows.append(row)
    _print_table(f"{model}", columns, rows)


@app.command()
@one_line_errors
def inspect(folder: Annotated[Path, typer.Argument(help="compressed checkpoint")], as_json: Json = False) -> None:
    """Show what a compressed checkpoint stores, layer by layer, counted from its files."""
    from .inspection import inspect_checkpoint

    found = inspect_checkpoint(folder)
    if as_json:
        _print_json(dataclasses.asdict(found))
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
    _print_table(f"{folder}: {found.method}", columns, rows)
    _show_totals(found)


@app.command()
@one_line_errors
def dense(
    folder: Annotated[str, typer.Argument(help="compressed checkpoint")],
    output: Output,
    dtype: Dtype = "auto",
    overwrite: Overwrite = False,
) -> None:
    """Write a compressed model as a dense one, for engines that know no compressed layers."""
    from .models import check_free, compression_of, load_config, load_model, new_folder

    check_free(output, overwrite)
    if compression_of(load_config(folder)) is None:
        raise CompressionError(f"{folder}: is not compressed by hf_lowrank; it is dense already")
    model, tokenizer = load_model(folder, dtype), _tokenizer_or_none(folder)
    model.dequantize()
    with new_folder(output, overwrite) as target:
        model.save_pretrained(target)
        if tokenizer is not None:
            tokenizer.save_pretrained(target)
    typer.echo(f"wrote {output}: dense, {sum(p.numel() for p in model.parameters()):,} parameters")


@app.command()
@one_line_errors
def push(
    folder: Annotated[Path, typer.Argument(help="compressed checkpoint")],
    repo: Annotated[str, typer.Argument(help="repository on the Hub: owner/name")],
    private: Annotated[bool, typer.Option("--private", help="make the repository private, if it does not exist yet")] = False,
    revision: Annotated[str | None, typer.Option(help="branch to push to")] = None,
    message: Annotated[str | None, typer.Option(help="commit message")] = None,
) -> None:
    """Push a compressed checkpoint to the Hub, with its card and loading code; a push that broke off is simply repeated."""
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalTokenNotFoundError

    from .hub import push_folder

    try:
        commit = push_folder(folder, repo, private=private or None, revision=revision, commit_message=message)
    except (HfHubHTTPError, HFValidationError, LocalTokenNotFoundError) as error:
        raise CompressionError(f"{repo}: the Hub refused the push ({str(error).strip().splitlines()[0]}); see `hf auth login`") from error
    typer.echo(f"pushed {folder} to {commit.repo_url} ({commit.oid[:7]})")


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

    from . import frontier
    from .comparison import Comparison, candidates, compare, write_text

    frontier.check_plotting()
    comparison = Comparison(model, text, calibration, samples, sequence_length, seed, dtype, device, window, max_windows)
    wanted = candidates(method_names, ratios)
    results = compare(comparison, wanted, out, keep=keep, say=lambda line: typer.echo(line, err=True))
    write_text(out / "table.md", frontier.markdown(results))
    frontier.plot(results, out / "frontier.png")
    rows = [[escape(cell) for cell in row] for row in frontier.table(results)]
    _print_table(f"{model} (★ the best method at each size)", frontier.COLUMNS, rows)
    for failure in frontier.failures(results):
        typer.echo(f"not reached: {failure}")
    typer.echo(f"wrote {out / 'table.md'}, {out / 'frontier.png'}, {out / 'results.json'}")


@app.command()
@one_line_errors
def demo(
    output: Annotated[Path | None, typer.Option("-o", "--output", help="keep the checkpoints in this folder")] = None,
    overwrite: Overwrite = False,
) -> None:
    """Run the whole job offline on the bundled model: SoLA, SoCo, SLaB and SVD-LLM, saved, reloaded, measured."""
    from .demo import run_demo

    rows = run_demo(output, overwrite)
    columns = ["model", "asked", "stored", "MB on disk", "perplexity", "nats lost", "KL", "top-1", "seconds"]
    _print_table("hf-lowrank demo (bundled reference model; text it was not calibrated on)", columns, rows)


def _show_summary(folder: Path) -> None:
    from .inspection import inspect_checkpoint

    found = inspect_checkpoint(folder)
    typer.echo(f"wrote {folder}")
    _show_totals(found)


def _show_totals(found: Any) -> None:
    dense_layers = sum(layer.kind == "dense" for layer in found.layers)
    typer.echo(
        f"block linears: asked {found.ratio_asked:.1%} removed, stored {found.ratio_stored:.2%} removed "
        f"({found.ratio_paper:.2%} without mask bits): {found.block_bytes:,} of {found.dense_block_bytes:,} bytes; "
        f"{len(found.layers) - dense_layers} layers compressed, {dense_layers} left dense"
    )
    typer.echo(
        f"whole model: {found.model_ratio:.2%} removed, {found.model_bytes:,} of {found.dense_model_bytes:,} bytes; "
        f"on disk {found.disk_bytes:,} bytes"
    )
    for warning in found.warnings:
        typer.echo(f"warning: {warning}", err=True)


def _tokenizer_or_none(source: str) -> Any:
    from .models import load_tokenizer

    try:
        return load_tokenizer(source)
    except CompressionError as error:
        typer.echo(f"warning: {error}; going on without", err=True)
        return None


def _key_values(settings: list[str]) -> dict[str, str]:
    values = {}
    for setting in settings:
        key, equals, value = setting.partition("=")
        if not equals or not key:
            raise CompressionError(f"--set: found {setting!r}, expected key=value")
        values[key] = value
    return values


def _print_json(value: Any) -> None:
    typer.echo(json.dumps(value, indent=1))


def _print_table(title: str, columns: list[str], rows: list[list[str]]) -> None:
    from rich.console import Console
    from rich.table import Table

    table = Table(*columns, title=title, title_justify="left")
    for row in rows:
        table.add_row(*row)
    console = Console()
    if not console.is_terminal:
        console = Console(width=200)
    console.print(table)


def _fail(message: str) -> None:
    typer.echo(f"error: {message}", err=True)
    raise typer.Exit(1)
