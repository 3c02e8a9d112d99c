"""Commands that make models: methods, compress, recompress, dense, demo."""

import dataclasses
import sys
from pathlib import Path
from typing import Annotated, Any

import typer

from ..execution.torchrun import torchrun_group, torchrun_rank
from ..runtime.errors import CompressionError
from .base import app, one_line_errors
from .options import RECIPE_HELP, Device, Dtype, Json, Output, Overwrite
from .output import print_json, print_table, show_totals, tokenizer_or_none


@app.command()
@one_line_errors
def methods(as_json: Json = False) -> None:
    """List the compression methods and their options."""
    from ..methods import method_class, registered_methods

    rows = []
    for name in registered_methods():
        cls: Any = method_class(name)
        options = {field.name: (field.default, field.metadata["help"]) for field in dataclasses.fields(cls)}
        summary = (cls.__doc__ or "").strip().splitlines()[0]
        rows.append({"method": name, "summary": summary, "source": cls.source, "options": options})
    if as_json:
        print_json(rows)
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
    method: Annotated[str | None, typer.Option(help=RECIPE_HELP["method"])] = None,
    ratio: Annotated[float | None, typer.Option(help=RECIPE_HELP["ratio"])] = None,
    bits: Annotated[float | None, typer.Option(help=RECIPE_HELP["bits"])] = None,
    size: Annotated[str | None, typer.Option(help=RECIPE_HELP["size"])] = None,
    embeddings: Annotated[str | None, typer.Option(help=RECIPE_HELP["embeddings"])] = None,
    calibration: Annotated[str, typer.Option(help=RECIPE_HELP["calibration"])] = "bundled",
    samples: Annotated[int, typer.Option(help=RECIPE_HELP["samples"])] = 128,
    sequence_length: Annotated[int | None, typer.Option(help=RECIPE_HELP["sequence_length"])] = None,
    seed: Annotated[int, typer.Option(help=RECIPE_HELP["seed"])] = 0,
    refinement_steps: Annotated[int, typer.Option(help=RECIPE_HELP["refinement_steps"])] = 0,
    accounting: Annotated[str, typer.Option(help=RECIPE_HELP["accounting"])] = "bits",
    skip: Annotated[list[str] | None, typer.Option(help=RECIPE_HELP["modules_to_not_convert"])] = None,
    settings: Annotated[list[str] | None, typer.Option("--set", help="a setting of the method, as key=value")] = None,
    dtype: Dtype = "auto",
    device: Device = "cpu",
    work_dir: Annotated[
        Path | None, typer.Option(help="folder that records what is finished; a killed run goes on from there")
    ] = None,
    overwrite: Overwrite = False,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="only say how much memory, disk and time it takes")
    ] = False,
) -> None:
    """Compress a model and write a complete checkpoint."""
    from ..compression.calibration_source import SAMPLES_INSTEAD
    from ..compression.dry_run import describe
    from ..compression.from_disk import compress_checkpoint
    from ..execution.output_folder import check_free
    from ..methods import make_method
    from ..models.loading import compression_of, load_config, load_tokenizer
    from ..runtime.configuration import CompressionConfig
    from ..runtime.privacy import public_command

    config = CompressionConfig(
        method=CompressionConfig.method if method is None else method,
        ratio=CompressionConfig.ratio if ratio is None else ratio,
        options=_key_values(settings or []),
        calibration=calibration,
        samples=samples,
        sequence_length=sequence_length,
        seed=seed,
        refinement_steps=refinement_steps,
        accounting=accounting,
        modules_to_not_convert=skip or [],
        bits=bits,
        size=size,
        embeddings=None if embeddings is None else _bits_of_embeddings(embeddings),
    )
    make_method(config.method, config.options)  # which refuses unknown methods and options
    check_free(output, overwrite)  # before hours of work, not after them
    if compression_of(load_config(model)) is not None:
        raise CompressionError(
            f"{model}: is compressed already; "
            "compress the dense model it came from, or what `hf-lowrank dense` makes of it"
        )
    # Text needs a tokenizer. Sequences that the model samples from itself do not.
    tokenizer = tokenizer_or_none(model) if calibration in ("bundled", "self") else load_tokenizer(model)
    if tokenizer is None and calibration == "bundled":
        typer.echo(f"warning: {SAMPLES_INSTEAD}", err=True)
        config = dataclasses.replace(config, calibration="self")
    if dry_run:
        typer.echo(describe(model, config, device, dtype))
        return
    with torchrun_group():
        compress_checkpoint(
            model,
            output,
            config,
            tokenizer,
            dtype=dtype,
            device=device,
            work_dir=work_dir,
            overwrite=overwrite,
            command=public_command(["hf-lowrank", *sys.argv[1:]]),
        )
    if not torchrun_rank():  # 0 or None: the main process, or the only one
        _show_summary(output)


@app.command()
@one_line_errors
def recompress(
    folder: Annotated[str, typer.Argument(help="compressed checkpoint that adapters were merged into")],
    output: Output,
    rank: Annotated[
        int | None, typer.Option(help="what no layer may exceed; by default each layer's own when it was compressed")
    ] = None,
    dtype: Dtype = "auto",
    overwrite: Overwrite = False,
    as_json: Json = False,
) -> None:
    """Truncate layers whose rank has grown by merged adapters to their former rank, and say what that loses."""
    from .. import peft
    from ..execution.output_folder import check_free, new_folder
    from ..models.loading import compression_of, load_config, load_model

    check_free(output, overwrite)
    if compression_of(load_config(folder)) is None:
        raise CompressionError(f"{folder}: is not compressed by hf_lowrank; name a compressed checkpoint")
    model = load_model(folder, dtype)
    truncations = peft.recompress(model, rank)
    if not truncations:
        raise CompressionError(f"{folder}: no layer has a larger rank than asked for; there is nothing to recompress")
    with new_folder(output, overwrite) as target:
        model.save_pretrained(target)
    if as_json:
        print_json([dataclasses.asdict(layer) for layer in truncations])
        return
    rows = []
    for layer in truncations:
        rows.append([layer.name, str(layer.rank_before), str(layer.rank), f"{layer.relative_error:.3g}"])
    print_table(
        "truncated layers, error of the whole matrix in the Frobenius norm",
        ["layer", "rank", "now", "relative error"],
        rows,
    )
    _show_summary(output)


@app.command()
@one_line_errors
def dense(
    folder: Annotated[str, typer.Argument(help="compressed checkpoint")],
    output: Output,
    dtype: Dtype = "auto",
    overwrite: Overwrite = False,
) -> None:
    """Write a compressed model as a dense one, for engines that know no compressed layers."""
    from ..execution.output_folder import check_free, new_folder
    from ..models.loading import compression_of, load_config, load_model
    from ..runtime.companions import carry_over

    check_free(output, overwrite)
    if compression_of(load_config(folder)) is None:
        raise CompressionError(f"{folder}: is not compressed by hf_lowrank; it is dense already")
    model = load_model(folder, dtype)
    model.dequantize()
    with new_folder(output, overwrite) as target:
        model.save_pretrained(target)
        carry_over(model, target)
    parameters = sum(parameter.numel() for parameter in model.parameters())
    typer.echo(f"wrote {output}: dense, {parameters:,} parameters")


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
    print_table("hf-lowrank demo (bundled reference model; text it was not calibrated on)", columns, rows)


def _show_summary(folder: Path) -> None:
    """Print what was written, counted from its files."""
    from .. import inspect

    inspection = inspect(folder)
    typer.echo(f"wrote {folder}")
    show_totals(inspection)


def _bits_of_embeddings(text: str) -> Any:
    """Read true, false or a number. What is none of these is left to the recipe, which refuses it."""
    words = {"true": True, "false": False}
    return words.get(text.lower(), int(text) if text.isdecimal() else text)


def _key_values(settings: list[str]) -> dict[str, str]:
    """Read settings of the form key=value."""
    values = {}
    for setting in settings:
        key, equals, value = setting.partition("=")
        if not equals or not key:
            raise CompressionError(f"--set: found {setting!r}, expected key=value")
        values[key] = value
    return values
