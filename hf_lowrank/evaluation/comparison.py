"""Methods side by side at equal stored bytes: each compresses, is reloaded from disk and measured, in processes of its own."""

import glob
import hashlib
import json
import platform
import re
import shlex
import shutil
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import snapshot_download

from ..calibration.batches import sequence_length
from ..calibration.texts import DATASETS, context_length, read_documents, token_stream, windows
from ..checkpoints.inspect import inspect
from ..execution.child_process import ProcessError, run
from ..execution.files import file_checksum, one_line, write_atomically
from ..execution.locking import locked
from ..methods import make_method
from ..models.architectures import find_blocks, find_layers
from ..models.loading import compression_of, load_config, load_tokenizer, skeleton
from ..runtime.configuration import CompressionConfig
from ..runtime.errors import CompressionError
from ..version import library_versions
from .perplexity import LONGEST_WINDOW

REFINEMENT = "refinement_steps"
MODEL_FILES = ["*.json", "*.safetensors", "*.model", "*.txt", "*.jinja"]

Record = dict[str, Any]
"""What was measured on one combination, as it lies in its JSON file."""
Say = Callable[[str], None]


@dataclass(frozen=True)
class Candidate:
    """One method, with its options as a command line gives them, at one ratio."""

    method: str
    ratio: float
    options: dict[str, str] = field(default_factory=dict)

    @property
    def label(self) -> str:
        settings = ",".join(f"{key}={value}" for key, value in sorted(self.options.items()))
        return f"{self.method}[{settings}]" if settings else self.method

    @property
    def file_name(self) -> str:
        return re.sub(r"[^\w.=,-]+", "_", self.label).rstrip("_") + f"-{self.ratio}"


@dataclass(frozen=True)
class Comparison:
    """What all combinations of a comparison share.

    Attributes:
        model: dense model, a folder or a name on the Hub. texts: what it is measured on, files or datasets.
        calibration, samples, sequence_length, seed: as in `CompressionConfig`.
        dtype: of the compressed checkpoints; measuring computes in float32 always.
        window, max_windows: tokens per window, and how many are scored of each text.
    """

    model: str
    texts: list[str]
    calibration: str = "self"
    samples: int = 128
    sequence_length: int | None = None
    seed: int = 0
    dtype: str = "auto"
    device: str = "cpu"
    window: int | None = None
    max_windows: int | None = None

    def compress_command(self, candidate: Candidate, folder: Path, training: Path) -> list[str]:
        arguments = [
            "compress",
            self.model,
            "-o",
            str(folder),
            "--method",
            candidate.method,
            "--ratio",
            str(candidate.ratio),
        ]
        for key, value in candidate.options.items():
            arguments += ["--refinement-steps", value] if key == REFINEMENT else ["--set", f"{key}={value}"]
        arguments += ["--calibration", self.calibration, "--samples", str(self.samples), "--seed", str(self.seed)]
        if self.sequence_length is not None:
            arguments += ["--sequence-length", str(self.sequence_length)]
        return [*arguments, "--dtype", self.dtype, "--device", self.device, "--work-dir", str(training)]

    def evaluate_command(self, model: str) -> list[str]:
        arguments = [
            "evaluate",
            model,
            "--reference",
            self.model,
            "--dtype",
            "float32",
            "--device",
            self.device,
            "--json",
        ]
        for text in self.texts:
            arguments += ["--text", text]
        for option, value in (("--window", self.window), ("--max-windows", self.max_windows)):
            arguments += [option, str(value)] if value is not None else []
        return arguments

    def inputs(self) -> dict[str, Any]:
        """Everything that the figures depend on; a finished combination is valid as long as it does not change."""
        return {
            "model": model_sha256(self.model),
            "texts": {text: text_sha256(text) for text in self.texts},
            "calibration": {"source": self.calibration, "sha256": text_sha256(self.calibration)},
            "recipe": {
                "samples": self.samples,
                "sequence_length": self.sequence_length,
                "seed": self.seed,
                "dtype": self.dtype,
            },
            "windows": {"window": self.window, "max_windows": self.max_windows},
            "versions": library_versions(),
        }


def check_texts(comparison: Comparison) -> None:
    """Raise CompressionError if a text is shorter than the window that it is calibrated or measured on, before any work is done."""
    config = load_config(comparison.model)
    dense, tokenizer = skeleton(config), load_tokenizer(comparison.model)
    context = context_length(config) or LONGEST_WINDOW
    needed = dict.fromkeys(comparison.texts, comparison.window or min(context, LONGEST_WINDOW))
    recipe = CompressionConfig(
        samples=comparison.samples, sequence_length=comparison.sequence_length, seed=comparison.seed
    )
    for text, length in [*needed.items(), (comparison.calibration, sequence_length(dense, recipe))]:
        if text != "self" and text not in DATASETS:
            stream = token_stream(tokenizer, read_documents(text))
            try:
                windows(stream, length)
            except CompressionError as error:
                raise CompressionError(f"{text}: {error}") from None


def parse_method(text: str) -> tuple[str, dict[str, str]]:
    """`name` or `name[option=value,...]` → (name, options); `refinement_steps` is understood beside the method's own options.

    Raises:
        CompressionError: if it is neither, or the method does not know the option or the value.
    """
    match = re.fullmatch(r"([\w-]+)(?:\[([^\[\]]+)\])?", text)
    settings = match[2].split(",") if match and match[2] else []
    if match is None or not all(re.fullmatch(r"\w+=.+", setting) for setting in settings):
        raise CompressionError(f"--methods: found {text!r}, expected name or name[option=value,...]")
    options = dict(setting.split("=", 1) for setting in settings)
    steps = options.get(REFINEMENT, "0")
    if not steps.isdecimal():
        raise CompressionError(f"--methods: {REFINEMENT}: found {steps!r}, expected a whole number")
    make_method(match[1], {name: value for name, value in options.items() if name != REFINEMENT})
    return match[1], options


def candidates(methods: Sequence[str], ratios: Sequence[float]) -> list[Candidate]:
    """Every method at every ratio, each once.

    Raises:
        CompressionError: for a method, an option or a ratio that cannot be.
    """
    for ratio in ratios:
        CompressionConfig(ratio=ratio)
    made = [Candidate(name, ratio, options) for name, options in map(parse_method, methods) for ratio in ratios]
    return list({candidate.file_name: candidate for candidate in made}.values())


def compare(
    comparison: Comparison, wanted: list[Candidate], out: Path, *, keep: bool = False, say: Say = print
) -> dict[str, Any]:
    """Measure the dense model and every candidate, and write `results.json`; what an earlier run has finished is not done again.

    Args:
        out: `combinations/` in it takes one JSON file for each finished combination; with `keep`, `checkpoints/` the models;
            `training/` holds the state of a training that broke off.
        say: receives one line per combination.

    Returns:
        What `results.json` holds: what the figures depend on, the dense model's record, and the records of the candidates.

    Raises:
        CompressionError: if the dense model cannot be measured, or another process works in `out`. A candidate that fails is recorded with
            the reason instead.
    """
    if compression_of(load_config(comparison.model)) is not None:
        raise CompressionError(f"{comparison.model}: is compressed already; compare starts from the dense model")
    inputs = comparison.inputs()
    if finished(out / "combinations" / "dense.json", inputs, lambda line: None) is None:
        check_texts(comparison)
    out.mkdir(parents=True, exist_ok=True)
    with locked(out):
        return _compare(comparison, wanted, inputs, out, keep, say)


def _compare(
    comparison: Comparison, wanted: list[Candidate], inputs: dict[str, Any], out: Path, keep: bool, say: Say
) -> dict[str, Any]:
    finished_files, working = out / "combinations", out / "working"
    dense = finished(finished_files / "dense.json", inputs, say)
    if dense is None:
        finished_files.mkdir(parents=True, exist_ok=True)
        dense = {"inputs": inputs, **dense_storage(comparison), "texts": _evaluate(comparison, comparison.model)}
        write_json(finished_files / "dense.json", dense)
    say(f"dense: {_summary(dense)}")
    records = []
    for number, candidate in enumerate(wanted, 1):
        file = finished_files / f"{candidate.file_name}.json"
        record = finished(file, inputs, say)
        if record is None:
            shutil.rmtree(working, ignore_errors=True)  # what a killed run left
            record = {"inputs": inputs, "label": candidate.label, "ratio": candidate.ratio, "failed": None}
            try:
                record |= _measure(
                    comparison, candidate, working / candidate.file_name, training_folder(out, candidate, inputs)
                )
                if keep:
                    _move(working / candidate.file_name, out / "checkpoints" / candidate.file_name)
            except ProcessError as error:
                record["failed"] = str(error)
                if error.explained:
                    write_json(file, record)
            else:
                write_json(file, record)
                for folder in out.glob(f"training/{glob.escape(candidate.file_name)}@*"):
                    shutil.rmtree(folder)
            finally:
                shutil.rmtree(working, ignore_errors=True)
        records.append(record)
        say(
            f"{number}/{len(wanted)} {candidate.label} at {candidate.ratio:.0%}: {record['failed'] or _summary(record)}"
        )
    for record in (dense, *records):
        record.pop("inputs")
    results = {
        **inputs,
        "command": shlex.join(["hf-lowrank", *sys.argv[1:]]),
        "machine": {
            "processor": platform.machine(),
            "threads": torch.get_num_threads(),
            "python": platform.python_version(),
        },
        "dense": dense,
        "combinations": records,
    }
    write_json(out / "results.json", results)
    return results


def training_folder(out: Path, candidate: Candidate, inputs: dict[str, Any]) -> Path:
    """Where the state of a candidate's training lies: another folder for other inputs, as it would not go on from the old state."""
    return (
        out
        / "training"
        / f"{candidate.file_name}@{hashlib.sha256(json.dumps(inputs, sort_keys=True).encode()).hexdigest()[:12]}"
    )


def finished(file: Path, inputs: dict[str, Any], say: Say) -> Record | None:
    """The record in a file, if there is one and what it depends on is still the same; says what has changed if not."""
    if not file.is_file():
        return None
    try:
        record: Record = json.loads(file.read_text(encoding="utf-8"))
        recorded = record["inputs"]
    except (ValueError, KeyError, TypeError):
        say(f"{file.stem}: the record {file} is damaged; computed again")
        return None
    changed = sorted(name for name in inputs.keys() | recorded.keys() if inputs.get(name) != recorded.get(name))
    if not changed:
        return record
    say(f"{file.stem}: {', '.join(changed)} changed since the record was written; computed again")
    return None


def write_json(file: Path, value: Any) -> None:
    write_atomically(file, json.dumps(value, indent=1))


def model_sha256(source: str) -> dict[str, str]:
    """sha256 of a model's files, by name; a model on the Hub is downloaded if it is not there yet.

    Raises:
        CompressionError: if there is no such model, or it cannot be downloaded.
    """
    try:
        folder = Path(source) if Path(source).is_dir() else Path(snapshot_download(source, allow_patterns=MODEL_FILES))
    except (OSError, ValueError) as error:
        raise CompressionError(
            f"{source}: no such folder, and not to be had from the Hub ({one_line(error)})"
        ) from error
    files = sorted({file for pattern in MODEL_FILES for file in folder.glob(pattern)})
    return {file.name: file_checksum(file) for file in files}


def text_sha256(source: str) -> str | None:
    """sha256 of a text file; None for "self", and for a dataset, which its name fixes.

    Raises:
        CompressionError: if it is none of these, or cannot be read as text.
    """
    if source == "self" or source in DATASETS:
        return None
    read_documents(source)
    return file_checksum(source)


def dense_storage(comparison: Comparison) -> Record:
    """Bits per weight of the dense model in the dtype that the compressed ones are stored in."""
    name = load_config(comparison.model).dtype if comparison.dtype == "auto" else getattr(torch, comparison.dtype)
    return {
        "label": "dense",
        "ratio": 0.0,
        "failed": None,
        "bits_per_weight": float((name or torch.float32).itemsize * 8),
    }


def _measure(comparison: Comparison, candidate: Candidate, folder: Path, training: Path) -> Record:
    arguments = comparison.compress_command(candidate, folder, training)
    _, seconds, peak = run(arguments)
    stored = inspect(folder)
    config = load_config(str(folder))
    compression = compression_of(config)
    assert compression is not None, "inspect has read it"
    weights = sum(layer.out_features * layer.in_features for layer in find_layers(find_blocks(skeleton(config))))
    return {
        "command": shlex.join(["hf-lowrank", *arguments]),
        "ratio_stored": stored.ratio_stored,
        "bits_per_weight": 8 * stored.block_bytes / weights,
        "model_ratio": stored.model_ratio,
        "disk_bytes": stored.disk_bytes,
        "calibration_sha256": compression.provenance["calibration_sha256"],
        "seconds": seconds,
        "peak_bytes": peak,
        "texts": _evaluate(comparison, str(folder)),
    }


def _evaluate(comparison: Comparison, model: str) -> list[Record]:
    output, _, _ = run(comparison.evaluate_command(model))
    measured: list[Record] = json.loads(output)
    return measured


def _move(folder: Path, target: Path) -> None:
    shutil.rmtree(target, ignore_errors=True)
    target.parent.mkdir(exist_ok=True)
    folder.replace(target)


def _summary(record: Record) -> str:
    losses = ", ".join(
        f"{Path(text['text']).stem} {text['perplexity']:.4g} ({text['nats_lost']:+.4f} nats)"
        for text in record["texts"]
    )
    return f"{record['bits_per_weight']:.2f} bits/weight; perplexity {losses}"
