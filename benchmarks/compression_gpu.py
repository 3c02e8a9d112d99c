"""Measures the time of compressing a model of 7 B parameters on one GPU, and splits it into stages.

python benchmarks/compression_gpu.py slab 0.5          # Llama-2 7B, random weights, 128 × 2048 random tokens
python benchmarks/compression_gpu.py svd-llm 0.3 --blocks 2
"""

import argparse
import cProfile
import os
import pstats
import time

import torch
from make_checkpoint import SHAPES
from transformers import LlamaConfig, LlamaForCausalLM

from hf_lowrank import CompressionConfig, compress

STAGES = {
    "inputs of the first block": ("block_inputs.py", "capture"),
    "calibration passes and statistics": ("blocks.py", "block_statistics"),
    "passes through compressed blocks": ("blocks.py", "run_block"),
    "solving: layer by layer": ("", "decompose"),
    "solving: spectra": ("", "measure"),
    "packing": ("base.py", "to_layer"),
    "errors for the report": ("report.py", "layer_report"),
}
"""The stages that are printed: a file and a function's name. A function's time contains that of those it calls."""


def seconds(profile: cProfile.Profile, file: str, name: str) -> float:
    """Return the cumulative seconds of the functions that have a name, in files that have one."""
    total = 0.0
    for (path, _, function), (*_, cumulative, _) in pstats.Stats(profile).stats.items():  # type: ignore[attr-defined]
        if function == name and "hf_lowrank" in path and file in path:
            total += cumulative
    return total


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("method")
    parser.add_argument("ratio", type=float)
    parser.add_argument("--size", choices=SHAPES, default="7b")
    parser.add_argument("--blocks", type=int, help="number of blocks; default: all of the model's")
    parser.add_argument("--samples", type=int, default=128)
    parser.add_argument("--length", type=int, default=2048)
    parser.add_argument("--device", default="cuda")
    arguments = parser.parse_args()
    # Kernels are waited for, so that each stage pays for its own.
    os.environ["CUDA_LAUNCH_BLOCKING"] = "1"
    if arguments.device == "cuda" and not torch.cuda.is_available():
        parser.error("no CUDA device; --device cpu measures this machine")
    shape = dict(SHAPES[arguments.size])
    if arguments.blocks:
        shape["num_hidden_layers"] = arguments.blocks
    config = LlamaConfig(vocab_size=32000, max_position_embeddings=4096, **shape)
    torch.manual_seed(0)
    with torch.device(arguments.device):
        model = LlamaForCausalLM(config).to(torch.bfloat16).eval()
    tokens = torch.randint(32000, (arguments.samples, arguments.length)).tolist()
    recipe = CompressionConfig(
        method=arguments.method, ratio=arguments.ratio, samples=arguments.samples, sequence_length=arguments.length
    )
    profile = cProfile.Profile()
    start = time.perf_counter()
    profile.runcall(compress, model, recipe, calibration=tokens)
    print(f"{arguments.method} {arguments.ratio:.0%}: {time.perf_counter() - start:.1f} s")
    if arguments.device == "cuda":
        print(f"{torch.cuda.get_device_name()}, at most {torch.cuda.max_memory_allocated() / 1e9:.1f} GB")
    for stage, (file, name) in STAGES.items():
        print(f"{stage:36} {seconds(profile, file, name):8.1f} s")


if __name__ == "__main__":
    main()
