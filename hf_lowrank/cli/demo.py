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
from ..checkpoints.inspect import inspect
from ..compression.pipeline import compress
from ..evaluation.perplexity import Evaluation
from ..execution.files import files_size
from ..execution.output_folder import new_folder
from ..models.loading import load_model, load_tokenizer
from ..models.reference import reference_model, reference_text
from ..runtime.configuration import CompressionConfig
from ..runtime.errors import CompressionError

SAMPLES = 64
"""Number of calibration sequences, half of the default, so that the demo takes minutes on two cores."""
MEASURED_WINDOWS = 60
"""Number of windows of the text that are scored, for the same reason."""

RECIPES = {
    "svd-llm": CompressionConfig(method="svd-llm", ratio=0.3),
    "sola": CompressionConfig(method="sola", ratio=0.3),
    "soco": CompressionConfig(
        method="soco", ratio=0.3, options={"steps": 250, "batch_tokens": 256, "finish_steps": 25}
    ),
    "slab": CompressionConfig(method="slab", ratio=0.5),
}


def run_demo(output: Path | None = None, overwrite: bool = False) -> list[list[str]]:
    """Compress the bundled model by every recipe, measure each in a fresh process, and return the rows of the table.

    Args:
        output: folder in which the checkpoints are kept. Without it they are deleted at the end.
    """
    if output is None:
        with tempfile.TemporaryDirectory() as folder:
            return _rows(Path(folder))
    with new_folder(output, overwrite) as folder:
        return _rows(folder)


def _rows(folder: Path) -> list[list[str]]:
    source = reference_model()
    rows = [_row("dense", None, 0.0, Path(source), _measure(Path(source)), 0.0)]
    tokenizer = load_tokenizer(source)
    # The text is sampled once, so that all recipes are calibrated on the same.
    typer.echo("sampling calibration text from the model itself ...", err=True)
    model = load_model(source)
    calibration = list(sample_sequences(model, SAMPLES, sequence_length(model, CompressionConfig()), seed=0))
    for name, config in RECIPES.items():
        typer.echo(f"{name}: removing {config.ratio:.0%} ...", err=True)
        started = time.monotonic()
        model = compress(load_model(source), config, tokenizer, calibration)
        seconds = time.monotonic() - started
        model.save_pretrained(folder / name)
        ratio_stored = inspect(folder / name).ratio_stored
        rows.append(_row(name, config.ratio, ratio_stored, folder / name, _measure(folder / name), seconds))
    return rows


def _measure(checkpoint: Path) -> Evaluation:
    """Evaluate a checkpoint in a fresh process, which knows nothing but its files."""
    command = [sys.executable, "-m", "hf_lowrank", "evaluate", str(checkpoint), "--json"]
    command += ["--text", reference_text(), "--max-windows", str(MEASURED_WINDOWS)]
    command += ["--reference", reference_model(), "--dtype", "float32"]
    result = subprocess.run(command, check=False, capture_output=True, text=True)
    if result.returncode:
        last_line = (result.stderr.strip() or "no message").splitlines()[-1]
        raise CompressionError(f"{checkpoint.name}: its evaluation in a fresh process failed ({last_line})")
    return Evaluation(**json.loads(result.stdout)[0])


def _row(
    name: str, asked: float | None, stored: float, folder: Path, measured: Evaluation, seconds: float
) -> list[str]:
    """Return the cells of one model. The dense one was not asked to be smaller."""
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
