"""Compresses, saves and opens again a tiny random model of every model class that transformers' Auto classes know.

    python -m benchmarks.model_sweep.run results.json [--only WORD ...] [--again STATUS ...]

Every class runs in a process of its own, with a time limit. Results are written as they come, so that a run that was
stopped goes on where it was. `--table` prints the page of the documentation from them.
"""

import argparse
import json
import math
import os
import resource
import signal
import sys
import tempfile
import time
import traceback
import warnings
from collections import Counter
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor
from transformers import PreTrainedModel

from hf_lowrank import CompressedLinear, CompressionConfig, CompressionError, compress

from . import tiny
from .inputs import inputs_of
from .overrides import OVERRIDES

SECONDS = 60
"""Time limit of a class, in seconds of computation."""
WAITING = 300
"""Time limit of a class, in seconds by the clock, as other programs may run beside it."""
AUTO_CLASSES = {
    "AutoModelForCausalLM": "causal language models",
    "AutoModelForSeq2SeqLM": "encoder-decoders",
    "AutoModelForImageTextToText": "pictures and text",
    "AutoModelForMultimodalLM": "several inputs",
    "AutoModelForMaskedLM": "masked language models",
    "AutoModelForSpeechSeq2Seq": "speech to text",
    "AutoModelForCTC": "speech to text",
    "AutoModelForAudioClassification": "sounds",
    "AutoModelForTextToWaveform": "text to sound",
    "AutoModelForImageClassification": "pictures",
    "AutoModelForObjectDetection": "pictures",
    "AutoModelForVideoClassification": "videos",
    "AutoModelForTimeSeriesPrediction": "time series",
    "AutoModel": "models without a head",
}
"""The Auto classes that are gone through, with what their models are. A class that several know counts for the first.
"""
WITH_OTHER_METHODS = ("AutoModelForCausalLM",)
"""Auto classes of whose models every eighth is compressed by other methods, too."""
OTHER_METHODS = ("svd-llm", "gptq", "auto")


def model_classes() -> dict[str, str]:
    """Return the Auto class of every model class by its name."""
    found: dict[str, str] = {}
    for auto_name in AUTO_CLASSES:
        mapping = getattr(transformers, auto_name)._model_mapping
        for names in mapping._model_mapping.values():
            for name in [names] if isinstance(names, str) else names:
                found.setdefault(name, auto_name)
    return found


class Outcome(Exception):
    """Ends the trial of a class, with its status and what is to be said about it."""

    def __init__(self, status: str, detail: str) -> None:
        super().__init__(status)
        self.status = status
        self.detail = detail


def tensors_of(output: Any) -> list[Tensor]:
    """Return all tensors of a model's output."""
    if isinstance(output, Tensor):
        return [output]
    parts = output.values() if isinstance(output, dict) else output if isinstance(output, (list, tuple)) else ()
    return [tensor for part in parts for tensor in tensors_of(part)]


@torch.no_grad()
def answers(model: PreTrainedModel, inputs: dict[str, Tensor]) -> list[Tensor]:
    torch.manual_seed(1)  # some models draw masks or noise
    return tensors_of(model.eval()(**inputs))


def distance(one: list[Tensor], other: list[Tensor]) -> float:
    """Return the norm of the difference of two outputs, infinity if they have different shapes."""
    if [tensor.shape for tensor in one] != [tensor.shape for tensor in other]:
        return math.inf
    total = 0.0
    for left, right in zip(one, other, strict=True):
        # What is infinite or no number in both is the same in both.
        difference = (left.double() - right.double()).nan_to_num(0.0, posinf=1e30, neginf=-1e30)
        total += float(difference.square().sum())
    return total**0.5


def same(one: list[Tensor], other: list[Tensor], scale: float) -> bool:
    """Return whether two outputs are the same, but for the rounding of sums over memory that is aligned otherwise.

    Args:
        scale: how far apart outputs are that are not the same.
    """
    return distance(one, other) <= 1e-2 * min(scale, 1.0)


def dense_model(name: str) -> tuple[PreTrainedModel, dict[str, Tensor]]:
    """Return a tiny model of a class, and inputs that it runs on."""
    model_class = getattr(transformers, name, None)
    if model_class is None:
        raise Outcome("dense", "transformers does not export it")
    try:
        config_class = model_class.config_class
    except ImportError as error:  # of a library that the class needs
        raise Outcome("dense", str(error).strip()) from error
    overrides = OVERRIDES.get(name) or OVERRIDES.get(getattr(config_class, "model_type", ""), {})
    reasons = []
    try:
        makers = list(tiny.configs(config_class, overrides))
    except Exception as error:
        raise Outcome("dense", f"its default config: {type(error).__name__}: {error}") from error
    for make_config in makers:
        try:
            model = tiny.build(model_class, make_config())
        except Exception as error:
            reasons.append(f"{type(error).__name__}: {error}")
            continue
        for inputs in inputs_of(model):
            try:
                if answers(model, inputs):
                    return model, inputs
            except Exception as error:
                reasons.append(f"{'+'.join(inputs)}: {type(error).__name__}: {error}")
    distinct = dict.fromkeys(reason.replace("\n", " ")[:160] for reason in reasons)
    raise Outcome("dense", " | ".join(list(distinct)[:8]))


def compress_somewhat(model: PreTrainedModel, inputs: dict[str, Tensor], method: str) -> None:
    """Compress a model at the first of some ratios that its layers allow."""
    options = {"slab": {"iterations": 1}, "svd-llm": {"update": True}}.get(method, {})
    ratios = (0.75, 0.5, 0.25) if method == "gptq" else (0.25, 0.1, 0.02)
    for ratio in ratios:
        config = CompressionConfig(method, ratio, samples=2, sequence_length=tiny.TOKENS, options=options)
        try:
            compress(model, config, calibration=[inputs], progress=False)
            return
        except CompressionError as error:
            if "out of reach" not in str(error) or ratio == ratios[-1]:
                raise


def trial(name: str, auto_name: str, method: str) -> tuple[str, str]:
    """Return status and detail of a class: compress, save, open by class and by Auto class, compare."""
    model, inputs = dense_model(name)
    before = {key: value.clone() for key, value in model.state_dict().items()}
    expected_dense = answers(model, inputs)
    try:
        compress_somewhat(model, inputs, method)
    except CompressionError as error:
        after = model.state_dict()
        untouched = before.keys() == after.keys() and all(torch.equal(before[key], after[key]) for key in before)
        one_line = "\n" not in str(error)
        return "refused" if untouched and one_line else "FAILS", f"compress: {error}"
    compressed = sum(isinstance(module, CompressedLinear) for module in model.modules())
    report = model.save_pretrained.report
    reasons = ", ".join(f"{count} dense: {reason}" for reason, count in Counter(report["dense"].values()).items())
    detail = "; ".join([f"{compressed} layers", *filter(None, [reasons]), *report["warnings"]])
    expected = answers(model, inputs)
    scale = distance(expected, expected_dense)
    if scale == 0:
        return "no verdict", "its outputs do not depend on the layers that were compressed"
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder)
        for opener in (type(model), getattr(transformers, auto_name)):
            opened = opener.from_pretrained(folder)
            if type(opened) is not type(model):
                return "FAILS", f"{opener.__name__} opens {type(opened).__name__}"
            if not same(answers(opened, inputs), expected, scale):
                return "FAILS", f"{opener.__name__}: other values after opening"
    return "round-trips", detail


def dense_control(name: str, auto_name: str) -> str:
    """Return what fails with the dense model, saved and opened alike. Empty if nothing does."""
    model, inputs = dense_model(name)
    expected = answers(model, inputs)
    with tempfile.TemporaryDirectory() as folder:
        try:
            model.save_pretrained(folder)
            for opener in (type(model), getattr(transformers, auto_name)):
                opened = opener.from_pretrained(folder)
                if type(opened) is not type(model):
                    return f"{opener.__name__} opens {type(opened).__name__}"
                if not same(answers(opened, inputs), expected, scale=0.1):
                    return f"{opener.__name__}: other values after opening"
        except Exception as error:
            return f"{type(error).__name__}: {str(error)[:200]}"
    return ""


def result_of(name: str, auto_name: str, method: str) -> dict[str, Any]:
    """Try a class, whatever happens."""
    started = time.monotonic()
    trace = ""
    try:
        status, detail = trial(name, auto_name, method)
    except Outcome as outcome:
        status, detail = outcome.status, outcome.detail
    except BaseException as error:
        status, detail = "FAILS", f"{type(error).__name__}: {str(error)[:300]}"
        frames = traceback.extract_tb(error.__traceback__)
        trace = " < ".join(f"{Path(frame.filename).name}:{frame.lineno}" for frame in reversed(frames[-8:]))
    if status == "FAILS":
        control = dense_control(name, auto_name)
        if control:
            status, detail = "dense fails alike", f"{control} (compressed: {detail})"
    seconds = round(time.monotonic() - started, 1)
    result = {"auto": auto_name, "status": status, "detail": detail, "seconds": seconds}
    return result | ({"trace": trace} if trace else {})


def in_child(name: str, auto_name: str, method: str) -> dict[str, Any]:
    """Try a class in a forked process, and end it when its time is over."""
    reader, writer = os.pipe()
    child = os.fork()
    if child == 0:
        os.close(reader)
        resource.setrlimit(resource.RLIMIT_CPU, (SECONDS, SECONDS))
        null = open(os.devnull, "w")  # noqa: SIM115
        os.dup2(null.fileno(), 2)
        with redirect_stdout(null), redirect_stderr(null):
            result = result_of(name, auto_name, method)
        os.write(writer, json.dumps(result).encode())
        os._exit(0)
    os.close(writer)
    signal.signal(signal.SIGALRM, lambda *_: os.kill(child, signal.SIGKILL))
    signal.alarm(WAITING)
    with open(reader, "rb") as pipe:
        content = pipe.read()
    signal.alarm(0)
    _, ending = os.waitpid(child, 0)
    if not content and os.WTERMSIG(ending) not in (signal.SIGKILL, signal.SIGXCPU):
        detail = f"its process ends with status {ending}"
        return {"auto": auto_name, "status": "no verdict", "detail": detail, "seconds": SECONDS}
    if not content:
        return {
            "auto": auto_name,
            "status": "too slow",
            "detail": f"killed, or no end in {SECONDS} s",
            "seconds": SECONDS,
        }
    result: dict[str, Any] = json.loads(content)
    return result


def trials() -> list[tuple[str, str, str, str]]:
    """Return what is tried: key, class, Auto class and method."""
    classes = model_classes()
    tried = [(name, name, auto_name, "slab") for name, auto_name in classes.items()]
    for position, (name, auto_name) in enumerate(classes.items()):
        if auto_name in WITH_OTHER_METHODS and position % 8 == 0:
            tried += [(f"{name} {method}", name, auto_name, method) for method in OTHER_METHODS]
    return tried


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("results", type=Path)
    parser.add_argument("--only", nargs="+", default=(), help="only classes whose name contains one of these")
    parser.add_argument("--again", nargs="+", default=(), help="try classes with these results again")
    parser.add_argument("--inline", action="store_true", help="in this process, with tracebacks")
    arguments = parser.parse_args()
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    results: dict[str, Any] = json.loads(arguments.results.read_text()) if arguments.results.exists() else {}
    for key, name, auto_name, method in trials():
        chosen = not arguments.only or any(word in key for word in arguments.only)
        known = key in results and results[key]["status"] not in arguments.again
        if not chosen or (known and not arguments.only):
            continue
        if arguments.inline:
            print(key, trial(name, auto_name, method), file=sys.stderr)
            continue
        results[key] = in_child(name, auto_name, method)
        print(key, results[key]["status"], results[key]["detail"][:200], flush=True)
        lines = ",\n".join(f"{json.dumps(key)}: {json.dumps(result)}" for key, result in results.items())
        arguments.results.write_text(f"{{\n{lines}\n}}\n", encoding="utf-8")


if __name__ == "__main__":
    main()
