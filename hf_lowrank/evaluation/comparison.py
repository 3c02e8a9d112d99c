"""Comparison of methods at equal stored bytes.

Each combination of a method and a ratio is compressed, saved, reloaded from disk and measured, in processes of its
own. So the figures are those of what lies on disk, one combination cannot leave state for the next, and a crash costs
one combination only.
"""

import glob
import hashlib
import json
import platform
import re
import shutil
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from ..calibration import calibration_batches
from ..calibration.batches import sequence_length
from ..calibration.texts import DATASETS, read_documents, token_stream, windows
from ..checkpoints.inspect import inspect
from ..execution.child_process import ProcessError, run
from ..execution.locking import locked
from ..methods import make_method
from ..models.architectures import find_blocks, find_layers
from ..models.context import context_length
from ..models.loading import compression_of, load_config, load_tokenizer, skeleton
from ..runtime.configuration import CompressionConfig
from ..runtime.errors import CompressionError, quoted
from ..runtime.privacy import public_command, public_name, public_names, public_text
from ..version import library_versions
from .comparison_records import ComparisonRecord, Log, finished_record, model_sha256, name_of, text_sha256, write_json
from .perplexity import LONGEST_WINDOW

REFINEMENT = "refinement_steps"
"""Setting of the compression, not of a method, that `--methods` accepts beside the options of the method."""


@dataclass(frozen=True)
class Candidate:
    """One method at one ratio, with its options as a command line gives them.

    Without a ratio the options decide, as for `hf-lowrank compress`.
    """

    method: str
    ratio: float | None
    options: dict[str, str] = field(default_factory=dict)

    @property
    def label(self) -> str:
        """The name in tables, which `parse_method` reads back: `name` or `name[option=value,...]`."""
        if not self.options:
            return self.method
        settings = ",".join(f"{key}={value}" for key, value in sorted(self.options.items()))
        return f"{self.method}[{settings}]"

    @property
    def file_name(self) -> str:
        """The label and the ratio as a file name without extension."""
        name = re.sub(r"[^\w.=,-]+", "_", self.label).rstrip("_")
        return name if self.ratio is None else f"{name}-{self.ratio}"


@dataclass(frozen=True)
class Comparison:
    """Settings that all combinations of a comparison share.

    Attributes:
        model: dense model, a folder or a name on the Hub.
        texts: files or datasets that the models are measured on.
        calibration, samples, sequence_length, seed: as in `CompressionConfig`.
        dtype: data type of the compressed checkpoints. Measurements always compute in float32.
        window, max_windows: tokens per window, and how many windows of each text are scored.
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
        """Return the arguments of `hf-lowrank` that compress a candidate.

        Args:
            folder: where the checkpoint goes.
            training: where the state of a training is kept, so that one that broke off can go on.
        """
        arguments = ["compress", self.model, "-o", str(folder)]
        arguments += ["--method", candidate.method]
        if candidate.ratio is not None:
            arguments += ["--ratio", str(candidate.ratio)]
        for key, value in candidate.options.items():
            # Refinement is an option of the command, and all others are options of the method.
            if key == REFINEMENT:
                arguments += ["--refinement-steps", value]
            else:
                arguments += ["--set", f"{key}={value}"]
        arguments += ["--calibration", self.calibration, "--samples", str(self.samples), "--seed", str(self.seed)]
        if self.sequence_length is not None:
            arguments += ["--sequence-length", str(self.sequence_length)]
        return [*arguments, "--dtype", self.dtype, "--device", self.device, "--work-dir", str(training)]

    def evaluate_command(self, model: str) -> list[str]:
        """Return the arguments of `hf-lowrank` that measure a model beside the dense one and print JSON."""
        arguments = ["evaluate", model, "--reference", self.model]
        arguments += ["--dtype", "float32", "--device", self.device, "--json"]
        for text in self.texts:
            arguments += ["--text", text]
        if self.window is not None:
            arguments += ["--window", str(self.window)]
        if self.max_windows is not None:
            arguments += ["--max-windows", str(self.max_windows)]
        return arguments

    def names(self) -> list[str]:
        """Return the names of the texts, as results have them."""
        return public_names(self.texts)

    def inputs(self) -> dict[str, Any]:
        """Return everything that the figures depend on.

        The record of a finished combination is valid as long as this does not change.
        """
        return {
            "model": model_sha256(self.model),
            "texts": {name: text_sha256(text) for name, text in zip(self.names(), self.texts, strict=True)},
            "calibration": {"source": public_name(self.calibration), "sha256": text_sha256(self.calibration)},
            "recipe": {
                "samples": self.samples,
                "sequence_length": self.sequence_length,
                "seed": self.seed,
                "dtype": self.dtype,
            },
            "windows": {"window": self.window, "max_windows": self.max_windows},
            "versions": library_versions(),
        }


def parse_method(text: str) -> tuple[str, dict[str, str]]:
    """Return the name and the options of a method from `name` or `name[option=value,...]`.

    `refinement_steps` is accepted beside the method's own options.

    Raises:
        CompressionError: if the text has neither form, or the method does not know the option or the value.
    """
    malformed = CompressionError(f"--methods: found {quoted(text)}, expected name or name[option=value,...]")
    match = re.fullmatch(r"([\w-]+)(?:\[([^\[\]]+)\])?", text)
    if match is None:
        raise malformed
    name, settings = match.groups()
    options: dict[str, str] = {}
    if settings is not None:
        for setting in settings.split(","):
            if not re.fullmatch(r"\w+=.+", setting):
                raise malformed
            option, value = setting.split("=", 1)
            options[option] = value
    # The number is checked here, because the method below does not know this option.
    steps = options.get(REFINEMENT, "0")
    if not steps.isdecimal():
        raise CompressionError(f"--methods: {REFINEMENT}: found {quoted(steps)}, expected a whole number")
    make_method(name, {option: value for option, value in options.items() if option != REFINEMENT})
    return name, options


def candidates(methods: Sequence[str], ratios: Sequence[float]) -> list[Candidate]:
    """Return every method at every ratio, without duplicates. Without ratios the options of each method decide.

    Raises:
        CompressionError: if a method, an option or a ratio is not valid.
    """
    for ratio in ratios:
        CompressionConfig(ratio=ratio)  # raises if no compression can have this ratio
    by_file_name: dict[str, Candidate] = {}
    choices: Sequence[float | None] = ratios or [None]
    for text in methods:
        method, options = parse_method(text)
        for choice in choices:
            candidate = Candidate(method, choice, options)
            by_file_name[candidate.file_name] = candidate
    return list(by_file_name.values())


def check_texts(comparison: Comparison) -> None:
    """Raise CompressionError if a text is shorter than one window of its use, before any work is done."""
    config = load_config(comparison.model)
    dense, tokenizer = skeleton(config), load_tokenizer(comparison.model)
    window = comparison.window or min(context_length(dense) or LONGEST_WINDOW, LONGEST_WINDOW)
    recipe = CompressionConfig(
        calibration=comparison.calibration,
        samples=comparison.samples,
        sequence_length=comparison.sequence_length,
        seed=comparison.seed,
    )
    sequence_length(dense, recipe)  # raises if it is beyond the context
    # Datasets are longer than any window.
    for text in dict.fromkeys(comparison.texts):
        if text not in DATASETS:
            with _naming(text):
                windows(token_stream(tokenizer, read_documents(text), enough=window, most_documents=0), window)
    if comparison.calibration not in ("self", *DATASETS):
        with _naming(comparison.calibration):
            calibration_batches(dense, recipe, tokenizer)


@contextmanager
def _naming(text: str) -> Iterator[None]:
    """Put the name of a text before the message of an error that does not begin with it."""
    try:
        yield
    except CompressionError as error:
        message = str(error)
        raise CompressionError(message if message.startswith(text) else f"{text}: {message}") from None


def compare(
    comparison: Comparison, combinations: list[Candidate], out: Path, *, keep: bool = False, log: Log = print
) -> dict[str, Any]:
    """Measure the dense model and every candidate, and write `results.json`.

    A combination that an earlier run finished is not measured again, unless its inputs have changed.

    Args:
        out: output folder. `combinations/` in it receives one JSON file for each finished combination, `checkpoints/`
            the compressed models if `keep` is set, and `training/` the state of a training that broke off.
        log: receives one line per combination.

    Returns:
        What `results.json` holds: what the figures depend on, the dense model's record, and the records of the
        candidates.

    Raises:
        CompressionError: if the dense model cannot be measured, or another process works in `out`. A candidate that
            fails is recorded with the reason instead.
    """
    if compression_of(load_config(comparison.model)) is not None:
        raise CompressionError(f"{comparison.model}: is compressed already; compare starts from the dense model")
    inputs = comparison.inputs()
    # A dense model that was measured on these texts before proves that they are long enough.
    if finished_record(_record_file(out, "dense"), inputs, log=lambda line: None) is None:
        check_texts(comparison)
    out.mkdir(parents=True, exist_ok=True)
    with locked(out):
        dense = _measure_dense(comparison, inputs, out, log)
        log(f"dense: {_summary(dense)}")
        records = []
        for number, candidate in enumerate(combinations, 1):
            record = _measure_candidate(comparison, candidate, inputs, out, keep=keep, log=log)
            records.append(record)
            outcome = record["failed"] or _summary(record)
            log(f"{number}/{len(combinations)} {name_of(record)}: {outcome}")
        results = _results(inputs, dense, records)
        write_json(out / "results.json", results)
    return results


def _record_file(out: Path, name: str) -> Path:
    return out / "combinations" / f"{name}.json"


def _measure_dense(comparison: Comparison, inputs: dict[str, Any], out: Path, log: Log) -> ComparisonRecord:
    """Return the record of the dense model, from an earlier run if that still holds."""
    file = _record_file(out, "dense")
    record = finished_record(file, inputs, log)
    if record is None:
        file.parent.mkdir(parents=True, exist_ok=True)
        record = {"inputs": inputs, **dense_storage(comparison), "texts": _evaluate(comparison, comparison.model)}
        write_json(file, record)
    return record


def _measure_candidate(
    comparison: Comparison, candidate: Candidate, inputs: dict[str, Any], out: Path, *, keep: bool, log: Log
) -> ComparisonRecord:
    """Return the record of a candidate, from an earlier run if that still holds. A failure is recorded as well."""
    file = _record_file(out, candidate.file_name)
    finished = finished_record(file, inputs, log)
    if finished is not None:
        return finished
    working = out / "working"
    shutil.rmtree(working, ignore_errors=True)  # a run that was killed may have left its checkpoint
    record = {"inputs": inputs, "label": candidate.label, "ratio": candidate.ratio, "failed": None}
    try:
        checkpoint = working / candidate.file_name
        record |= _compress_and_measure(comparison, candidate, checkpoint, training_folder(out, candidate, inputs))
        if keep:
            _move(checkpoint, out / "checkpoints" / candidate.file_name)
    except ProcessError as error:
        paths = [comparison.model, comparison.calibration, *comparison.texts, str(out)]
        record["failed"] = public_text(str(error), paths)
        # A process that gave a reason would give it again. One that crashed or was killed may succeed in the next run.
        if error.explained:
            write_json(file, record)
    else:
        write_json(file, record)
        # Trainings of this candidate with other inputs are obsolete too, hence the pattern in place of one folder.
        for folder in out.glob(f"training/{glob.escape(candidate.file_name)}@*"):
            shutil.rmtree(folder)
    finally:
        shutil.rmtree(working, ignore_errors=True)
    return record


def _results(inputs: dict[str, Any], dense: ComparisonRecord, records: list[ComparisonRecord]) -> dict[str, Any]:
    """Return the content of `results.json`, where the inputs stand once and not in every record."""
    for record in (dense, *records):
        record.pop("inputs")
    machine = {
        "processor": platform.machine(),
        "threads": torch.get_num_threads(),
        "python": platform.python_version(),
    }
    command = public_command(["hf-lowrank", *sys.argv[1:]])
    return {**inputs, "command": command, "machine": machine, "dense": dense, "combinations": records}


def training_folder(out: Path, candidate: Candidate, inputs: dict[str, Any]) -> Path:
    """Return the folder for the state of a candidate's training.

    Its name depends on the inputs, because a training cannot go on from a state that was reached with other inputs.
    """
    # Twelve digits are enough to tell apart the few trainings of one candidate.
    digest = hashlib.sha256(json.dumps(inputs, sort_keys=True).encode()).hexdigest()
    return out / "training" / f"{candidate.file_name}@{digest[:12]}"


def dense_storage(comparison: Comparison) -> ComparisonRecord:
    """Return the record of the dense model without its measurements, stored in the data type of the checkpoints."""
    if comparison.dtype == "auto":
        dtype = load_config(comparison.model).dtype or torch.float32
    else:
        dtype = getattr(torch, comparison.dtype)
    return {"label": "dense", "ratio": 0.0, "failed": None, "bits_per_weight": float(dtype.itemsize * 8)}


def _compress_and_measure(
    comparison: Comparison, candidate: Candidate, folder: Path, training: Path
) -> ComparisonRecord:
    # A process of its own has a peak memory of its own.
    arguments = comparison.compress_command(candidate, folder, training)
    _, seconds, peak = run(arguments)
    stored = inspect(folder)
    config = load_config(str(folder))
    compression = compression_of(config)
    assert compression is not None, "inspect has read it"
    weights = 0
    for layer in find_layers(find_blocks(skeleton(config))):
        weights += layer.out_features * layer.in_features
    return {
        "command": public_command(["hf-lowrank", *arguments]),
        "ratio": compression.ratio,
        "ratio_stored": stored.ratio_stored,
        "bits_per_weight": 8 * stored.block_bytes / weights,
        "model_ratio": stored.model_ratio,
        "disk_bytes": stored.disk_bytes,
        "calibration_sha256": compression.provenance["calibration_sha256"],
        "seconds": seconds,
        "peak_bytes": peak,
        "texts": _evaluate(comparison, str(folder)),
    }


def _evaluate(comparison: Comparison, model: str) -> list[ComparisonRecord]:
    """Return the figures of a model on each text, measured in a process of its own."""
    output, _, _ = run(comparison.evaluate_command(model))
    figures: list[ComparisonRecord] = json.loads(output)
    return [{**row, "text": name} for row, name in zip(figures, comparison.names(), strict=True)]


def _move(folder: Path, target: Path) -> None:
    # A folder cannot be renamed to one that has content, such as the checkpoint of an earlier run.
    shutil.rmtree(target, ignore_errors=True)
    target.parent.mkdir(exist_ok=True)
    folder.replace(target)


def _summary(record: ComparisonRecord) -> str:
    losses = []
    for text in record["texts"]:
        losses.append(f"{Path(text['text']).stem} {text['perplexity']:.4g} ({text['nats_lost']:+.4f} nats)")
    return f"{record['bits_per_weight']:.2f} bits/weight; perplexity {', '.join(losses)}"
