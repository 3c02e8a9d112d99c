"""The whole job on the bundled model, offline: compress, save, reload, measure, compare."""

import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import typer

from ..calibration.batches import sequence_length
from ..calibration.sampling import sample_sequences
from ..checkpoints.inspect import inspect_checkpoint
from ..compression.pipeline import compress
from ..evaluation.perplexity import Evaluation
from ..execution.output_folder import files_size, new_folder
from ..models.loading import load_model, load_tokenizer
from ..runtime.configuration import CompressionConfig
from ..runtime.errors import CompressionError

BUNDLED_MODEL = Path(__file__).parents[1] / "data" / "reference-7m"
BUNDLED_TEXT = Path(__file__).parents[1] / "data" / "demo.txt"

SAMPLES, MEASURED_WINDOWS = 64, 60
"""Half of the default calibration and a part of the text, so that the demo takes minutes on two cores."""

RECIPES = {
    "svd-llm": CompressionConfig(method="svd-llm", ratio=0.3),
    "sola": CompressionConfig(method="sola", ratio=0.3),
    "soco": CompressionConfig(
        method="soco", ratio=0.3, options={"steps": 250, "batch_tokens": 256, "finish_steps": 25}
    ),
    "slab": CompressionConfig(method="slab", ratio=0.5),
}


def run_demo(output: Path | None = None, overwrite: bool = False) -> list[list[str]]:
    """Compress the bundled model by every recipe and measure each in a fresh process; the rows of the table.

    Args:
        output: folder in which the checkpoints are kept; without it they are deleted at the end.
    """
    if output is None:
        with tempfile.TemporaryDirectory() as folder:
            return _rows(Path(folder))
    with new_folder(output, overwrite) as folder:
        return _rows(folder)


def _rows(folder: Path) -> list[list[str]]:
    dense = _measure(BUNDLED_MODEL)
    rows = [_row("dense", None, 0.0, BUNDLED_MODEL, dense, 0.0)]
    tokenizer = load_tokenizer(str(BUNDLED_MODEL))
    typer.echo("sampling calibration text from the model itself ...", err=True)
    model = load_model(str(BUNDLED_MODEL))
    calibration = list(sample_sequences(model, SAMPLES, sequence_length(model, CompressionConfig()), seed=0))
    for name, config in RECIPES.items():
        typer.echo(f"{name}: removing {config.ratio:.0%} ...", err=True)
        started = time.monotonic()
        model = compress(load_model(str(BUNDLED_MODEL)), config, tokenizer, calibration)
        seconds = time.monotonic() - started
        model.save_pretrained(folder / name)
        stored = inspect_checkpoint(folder / name).ratio_stored
        rows.append(_row(name, config.ratio, stored, folder / name, _measure(folder / name), seconds))
    return rows


def _measure(checkpoint: Path) -> Evaluation:
    """Evaluate in a fresh process, which knows nothing but the files."""
    command = [sys.executable, "-m", "hf_lowrank", "evaluate", str(checkpoint), "--text", str(BUNDLED_TEXT)]
    command += [
        "--reference",
        str(BUNDLED_MODEL),
        "--max-windows",
        str(MEASURED_WINDOWS),
        "--dtype",
        "float32",
        "--json",
    ]
    result = subprocess.run(command, check=False, capture_output=True, text=True)
    if result.returncode:
        raise CompressionError(
            f"{checkpoint.name}: its evaluation in a fresh process failed ({(result.stderr.strip() or 'no message').splitlines()[-1]})"
        )
    return Evaluation(**json.loads(result.stdout)[0])


def _row(
    name: str, asked: float | None, stored: float, folder: Path, measured: Evaluation, seconds: float
) -> list[str]:
    return [
        name,
        "" if asked is None else f"{asked:.0%}",
        "" if asked is None else f"{stored:.2%}",
        f"{files_size(folder) / 1e6:.2f}",
        f"{measured.perplexity:.2f}",
        f"{measured.nats_lost:.4f}",
        f"{measured.kl:.4f}",
        f"{measured.top1_agreement:.1%}",
        f"{seconds:.0f}",
    ]
