"""Measures the quantizers that people use, at the bits that they store, on the windows on which ours are measured.

    python -m venv RIVALS && RIVALS/bin/pip install -r benchmarks/rivals.txt
    PYTHONPATH=. RIVALS/bin/python benchmarks/rivals.py MODEL --rivals hqq,3,32 nf4 quanto,4 autoround,3,32 \
        --text wikitext2/test.txt --calibration c4/calib.txt --samples 48 --sequence-length 512 \
        --window 512 --max-windows 12 --out out/rivals/MODEL

A rival is a name with its bits and the number of weights that share a scale. Each quantizes the linear layers of the
blocks by its own code. The values that it stores are then put into an ordinary model in float32: none of its kernels
is measured. Bits count what it stores for these weights: codes, scales and zero points in its own types.
`--section NAME` puts the table of all measurements in the folder into `benchmarks/quality.md`.
"""

import argparse
import importlib.metadata
import json
import shlex
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from quality import PAGE, with_section
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

from hf_lowrank import CompressionConfig, evaluate
from hf_lowrank.calibration import calibration_batches
from hf_lowrank.models.architectures import find_blocks

PACKAGES = {"hqq": "hqq", "nf4": "bitsandbytes", "quanto": "optimum-quanto", "autoround": "auto-round"}
STEPS_OF_AUTOROUND = 50


def linear_layers(model: nn.Module) -> dict[str, nn.Linear]:
    """Return the linear layers of the blocks, by name."""
    found = {}
    for name, block in find_blocks(model).items():
        for local, module in block.named_modules():
            if isinstance(module, nn.Linear):
                found[f"{name}.{local}"] = module
    return found


def hqq(weight: Tensor, bits: int, group: int) -> tuple[Tensor, float]:
    """Return a weight as HQQ stores it, and its stored bits. Scales and zero points are of 16 bits."""
    from hqq.core.quantize import Quantizer

    codes, meta = Quantizer.quantize(
        weight, nbits=bits, group_size=group, axis=1, optimize=True, device="cpu", compute_dtype=torch.float32
    )
    stored = bits * weight.numel() + 16 * (meta["scale"].numel() + meta["zero"].numel())
    return Quantizer.dequantize(codes, meta).view_as(weight), stored


def nf4(weight: Tensor, bits: int, group: int) -> tuple[Tensor, float]:
    """Return a weight as bitsandbytes stores it in its type NF4, with scales of 32 bits for `group` weights."""
    from bitsandbytes import functional

    codes, state = functional.quantize_4bit(weight.contiguous(), blocksize=group, quant_type="nf4")
    return functional.dequantize_4bit(codes, state).view_as(weight), 4 * weight.numel() + 32 * state.absmax.numel()


def quanto(weight: Tensor, bits: int, group: int) -> tuple[Tensor, float]:
    """Return a weight as optimum-quanto stores it, with scales and shifts of 16 bits."""
    from optimum.quanto import MaxOptimizer, qint2, qint4
    from optimum.quanto.tensor import quantize_weight

    kind = {2: qint2, 4: qint4}[bits]
    scale, shift = MaxOptimizer()(weight, kind, 0, group)
    quantized = quantize_weight(weight, kind, 0, scale, shift, group_size=group, optimized=False)
    stored = bits * weight.numel() + 16 * (scale.numel() + shift.numel())
    return quantized.dequantize(), stored


LAYERWISE: dict[str, Callable[[Tensor, int, int], tuple[Tensor, float]]] = {"hqq": hqq, "nf4": nf4, "quanto": quanto}
USUAL_GROUP = {"hqq": 64, "nf4": 64, "quanto": 128, "autoround": 128}


def autoround(model: PreTrainedModel, tokenizer: Any, tokens: list[Tensor], bits: int, group: int) -> float:
    """Let AutoRound round a model in place, and return the bits that it stores: scales of 16, no zero points."""
    from auto_round import AutoRound

    layers = linear_layers(model)
    rounding = AutoRound(
        model,
        tokenizer,
        bits=bits,
        group_size=group,
        sym=True,
        dataset=tokens,
        nsamples=len(tokens),
        seqlen=tokens[0].shape[1],
        iters=STEPS_OF_AUTOROUND,
        batch_size=4,
        device_map="cpu",
        enable_torch_compile=False,
    )
    rounding.quantize()
    return sum(bits * layer.weight.numel() + 16 * layer.weight.numel() / group for layer in layers.values())


def quantized(name: str, model_name: str, arguments: argparse.Namespace) -> tuple[PreTrainedModel, float, float]:
    """Return the model as a rival stores it, its bits per weight, and the CPU seconds that this took."""
    rival, _, settings = name.partition(",")
    numbers = [int(number) for number in settings.split(",") if number]
    bits = numbers[0] if numbers else 4
    group = numbers[1] if len(numbers) > 1 else USUAL_GROUP[rival]
    model = AutoModelForCausalLM.from_pretrained(model_name, dtype="float32").eval()
    tokenizer = AutoTokenizer.from_pretrained(model_name)
    weights = sum(layer.weight.numel() for layer in linear_layers(model).values())
    start, stored = time.process_time(), 0.0
    if rival == "autoround":
        config = CompressionConfig(
            calibration=arguments.calibration, samples=arguments.samples, sequence_length=arguments.sequence_length
        )
        batches = calibration_batches(model, config, tokenizer)
        rows = [row[None] for batch in batches for row in batch.input_ids]
        stored = autoround(model, tokenizer, rows, bits, group)
    else:
        with torch.no_grad():
            for layer in linear_layers(model).values():
                values, layer_bits = LAYERWISE[rival](layer.weight.data, bits, group)
                layer.weight.data = values.float().contiguous()
                stored += layer_bits
    return model, stored / weights, time.process_time() - start


def measure(name: str, arguments: argparse.Namespace, dense: dict[str, float]) -> dict[str, Any]:
    """Measure a rival on all texts."""
    model, bits, seconds = quantized(name, arguments.model, arguments)
    tokenizer = AutoTokenizer.from_pretrained(arguments.model)
    lost = {}
    for text in arguments.text:
        found = evaluate(model, tokenizer, text, window=arguments.window, max_windows=arguments.max_windows)
        lost[text] = found.nll - dense[text]
        print(f"{name} at {bits:.3f} bits: {text} +{lost[text]:.4f} nats, {seconds:.0f} s", flush=True)
    version = importlib.metadata.version(PACKAGES[name.partition(",")[0]])
    return {"rival": name, "version": version, "bits": bits, "lost": lost, "seconds": seconds}


def table(folder: Path) -> str:
    """Return the command and the measurements of a folder as Markdown."""
    results = [json.loads(file.read_text(encoding="utf-8")) for file in sorted(folder.glob("*.json"))]
    found = [result for result in results if "rival" in result]
    commands = dict.fromkeys(result["command"] for result in found)
    lines = ["```bash", *commands, "```", "", "| text | quantizer | bits/weight | nats lost | core-seconds |"]
    lines.append("| --- | --- | --- | --- | --- |")
    for text in found[0]["lost"]:
        for result in sorted(found, key=lambda one: -one["bits"]):
            name = f"{PACKAGES[result['rival'].partition(',')[0]]} {result['version']} ({result['rival']})"
            short = "/".join(Path(text).parts[-2:])
            lines.append(
                f"| {short} | {name} | {result['bits']:.2f} | {result['lost'][text]:.4f} | {result['seconds']:.0f} |"
            )
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("model")
    parser.add_argument("--rivals", nargs="*", default=[])
    parser.add_argument("--text", nargs="+", default=[])
    parser.add_argument("--calibration", default="bundled")
    parser.add_argument("--samples", type=int, default=128)
    parser.add_argument("--sequence-length", type=int, default=512)
    parser.add_argument("--window", type=int, default=512)
    parser.add_argument("--max-windows", type=int, default=12)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--section", help="the section of benchmarks/quality.md that gets the table")
    arguments = parser.parse_args()
    arguments.out.mkdir(parents=True, exist_ok=True)
    dense_file = arguments.out / "dense.json"
    if arguments.rivals and not dense_file.exists():
        model = AutoModelForCausalLM.from_pretrained(arguments.model, dtype="float32").eval()
        tokenizer = AutoTokenizer.from_pretrained(arguments.model)
        dense = {}
        for text in arguments.text:
            dense[text] = evaluate(
                model, tokenizer, text, window=arguments.window, max_windows=arguments.max_windows
            ).nll
        dense_file.write_text(json.dumps(dense), encoding="utf-8")
    for name in arguments.rivals:
        file = arguments.out / f"{name}.json"
        if not file.exists():  # an interrupted command goes on where it was
            found = measure(name, arguments, json.loads(dense_file.read_text(encoding="utf-8")))
            found["command"] = shlex.join(["python", "benchmarks/rivals.py", *sys.argv[1:]])
            file.write_text(json.dumps(found, indent=1), encoding="utf-8")
    if arguments.section:
        page = PAGE.read_text(encoding="utf-8")
        section = f"## {arguments.section}\n\n{table(arguments.out)}"
        PAGE.write_text(with_section(page, arguments.section, section), encoding="utf-8")


if __name__ == "__main__":
    main()
