"""Commands that train: distill."""

import tempfile
import time
from pathlib import Path
from typing import Annotated

import typer

from ..runtime.errors import CompressionError
from .base import app, one_line_errors
from .options import RECIPE_HELP, Device, Dtype, Output, Overwrite


@app.command()
@one_line_errors
def distill(
    folder: Annotated[Path, typer.Argument(help="compressed checkpoint")],
    output: Output,
    teacher: Annotated[str, typer.Option(help="the dense model: a folder or a name on the Hub")],
    text: Annotated[str, typer.Option(help="file of texts or rows, or a dataset (wikitext2, c4), to train on")],
    steps: Annotated[int, typer.Option(help="optimizer steps")] = 200,
    learning_rate: Annotated[float, typer.Option(help="of AdamW; a cosine takes it to zero")] = 1e-3,
    sequence_length: Annotated[
        int | None, typer.Option(help="tokens per window; default: the model's context, at most 2048")
    ] = None,
    seed: Annotated[int, typer.Option(help=RECIPE_HELP["seed"])] = 0,
    dtype: Dtype = "auto",
    device: Device = "cpu",
    work_dir: Annotated[Path | None, typer.Option(help="folder in which a killed training goes on")] = None,
    overwrite: Overwrite = False,
) -> None:
    """Train a compressed model's values towards the dense model's predictions. Masks and signs stay as they are."""
    from ..calibration.batches import sequence_length as window_length
    from ..calibration.texts import read_documents, token_stream, windows
    from ..execution.output_folder import check_free, new_folder
    from ..models.loading import compression_of, load_config, load_model, load_tokenizer
    from ..runtime.configuration import CompressionConfig
    from ..training.distillation import BATCH_TOKENS
    from ..training.distillation import distill as train

    if steps < 1 or not learning_rate > 0:
        raise CompressionError(
            f"distill: found {steps} steps at a learning rate of {learning_rate}; both must be above zero"
        )
    check_free(output, overwrite)
    if compression_of(load_config(str(folder))) is None:
        raise CompressionError(
            f"{folder}: is not compressed by hf_lowrank; "
            "name a compressed checkpoint, and the dense model as --teacher"
        )
    # The student trains in float32 and is saved as it was stored, which is known only after a load.
    stored_dtype = load_model(str(folder), dtype, device).dtype
    student = load_model(str(folder), "float32", device)
    tokenizer = load_tokenizer(str(folder))
    length = window_length(student, CompressionConfig(sequence_length=sequence_length, seed=seed))
    rows = windows(token_stream(tokenizer, read_documents(text), enough=steps * BATCH_TOKENS), length)
    start = time.monotonic()
    # The trainer needs a folder for its state even if nobody wants to go on from there.
    with tempfile.TemporaryDirectory() as scratch:
        losses = train(
            student,
            load_model(teacher, "float32", device),
            rows,
            work_dir or scratch,
            steps=steps,
            learning_rate=learning_rate,
            seed=seed,
        )
    student.to(stored_dtype)  # type: ignore[arg-type]  # transformers wraps `to` without its types
    with new_folder(output, overwrite) as target:
        student.save_pretrained(target)
    seconds = time.monotonic() - start
    typer.echo(
        f"KL per token {losses[0]:.4f} → {losses[-1]:.4f} "
        f"over {steps} steps of {length}-token windows, {seconds:.0f} s"
    )
    typer.echo(f"wrote {output}")
