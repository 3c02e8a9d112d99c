"""Commands about speed: env, benchmark."""

import dataclasses
from typing import Annotated

import typer

from ..runtime.errors import CompressionError
from .base import app, one_line_errors
from .options import Device, Dtype, Json, SeveralValues
from .output import print_json, print_table


@app.command()
@one_line_errors
def env(as_json: Json = False) -> None:
    """Show versions, the machine, and which back end computes each operation and why."""
    from .. import kernels
    from ..evaluation.machine import machine

    facts = machine()
    back_ends = kernels.describe()
    if as_json:
        print_json({**facts, "operations": [dataclasses.asdict(row) for row in back_ends]})
        return
    for name, value in facts.items():
        typer.echo(f"{name}: {value}")
    rows = [[row.operation, row.device, row.name, row.reason] for row in back_ends]
    print_table("back ends (plain torch takes what they do not)", ["operation", "device", "back end", "why"], rows)


@app.command(cls=SeveralValues)
@one_line_errors
def benchmark(
    model: Annotated[
        str | None, typer.Argument(help="compressed checkpoint, before the options; without one, layers of --shapes")
    ] = None,
    shapes: Annotated[
        list[str] | None, typer.Option(help="one or more shapes of layers, OUTxIN; default 4096x4096")
    ] = None,
    reference: Annotated[
        str, typer.Option(help="what MODEL is compared with: dense (itself, decompressed) or another model")
    ] = "dense",
    tokens: Annotated[
        list[int] | None, typer.Option(help="one or more numbers of input rows; default 1 8 512")
    ] = None,
    threads: Annotated[int | None, typer.Option(help="torch's threads; default: as many as it uses by itself")] = None,
    prompt: Annotated[
        int | None, typer.Option(help="tokens of the prompt, end to end; default: 512, or what the context holds")
    ] = None,
    new: Annotated[int, typer.Option(help="tokens generated after the first, end to end")] = 32,
    repeats: Annotated[int, typer.Option(help="times that every variant is measured, in turn")] = 20,
    dtype: Dtype = "auto",
    device: Device = "cpu",
    as_json: Json = False,
) -> None:
    """Time compressed layers beside dense ones and, given a model, its prefill and decoding, in turn within one run.

    On a CPU, torch's own packed int4 and int8 products stand beside them where this torch has them.

    Layers of --shapes have random content, in bfloat16, with the layouts of the papers. "bytes limit" is dense bytes
    per stored byte; "share" says how much of it is reached, against a plain dense product written with the same care
    as the compressed one.
    """
    from ..evaluation import speed_report, torch_products
    from ..evaluation.generation_speed import ModelSpeed
    from ..evaluation.machine import machine

    if model is not None and shapes:
        raise CompressionError("benchmark: found a model and --shapes, expected one of the two; run it twice")
    batches = tokens or [1, 8, 512]
    counts = {"--tokens": min(batches), "--threads": threads, "--prompt": prompt, "--new": new, "--repeats": repeats}
    for option, value in counts.items():
        if value is not None and value < 1:
            raise CompressionError(f"{option}: found {value}, expected at least 1")
    # Without a model there is nothing to generate with, so only layers are timed.
    if model is None:
        parsed_shapes = [speed_report.parse_shape(shape) for shape in shapes or ["4096x4096"]]
        layers = speed_report.of_shapes(parsed_shapes, batches, threads, repeats, device)
        models: list[ModelSpeed] = []
    else:
        layers, models = speed_report.of_model(model, reference, batches, threads, repeats, prompt, new, dtype, device)
    if as_json:
        rows = {
            "layers": [speed_report.layer_fields(row) for row in layers],
            "models": [speed_report.model_fields(row) for row in models],
        }
        print_json({"machine": machine(), **rows})
        return
    print_table("layers: milliseconds, median (range of the middle half)", *speed_report.layer_table(layers))
    for line in {torch_products.why_missing(device, row.dtype) for row in layers} - {""}:
        typer.echo(line)
    if models:
        print_table(
            f"end to end: prompt of {models[0].prompt_tokens} tokens, {new} more generated",
            *speed_report.model_table(models),
        )
