"""Makes the end-to-end table of speed.md.

The model is a Llama of 1.1 B parameters with random weights, once dense and once with every linear layer of its blocks
compressed.

`python benchmarks/speed_model.py [--threads 4] [--layout "SLaB 50 % of the bits"] [--prompt 512] [--new 32]`

With `--cpu-time` (one thread) the clock is the thread's own, which other processes on a shared machine do not disturb.
"""

import argparse
import time
from collections.abc import Callable

import torch
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

from hf_lowrank.evaluation import speed
from hf_lowrank.evaluation.generation_speed import ModelSpeed, benchmark_model
from hf_lowrank.evaluation.speed import random_layer
from hf_lowrank.runtime.configuration import LayerSpec

CONFIG = LlamaConfig(
    hidden_size=2048,
    intermediate_size=5632,
    num_hidden_layers=22,
    num_attention_heads=32,
    num_key_value_heads=4,
    vocab_size=32000,
    max_position_embeddings=2048,
)
HEADER = (
    "| model | GB stored | GB resident | prefill tokens/s (spread s) | decode tokens/s (spread s) "
    "| × dense prefill | × dense decode |\n"
    "|---|---|---|---|---|---|---|"
)

LAYOUTS = {
    "SLaB 50 % of the bits": speed.layout("slab", 0.5, "bits"),
    "low rank 50 %": speed.layout("lowrank", 0.5),
    **speed.LAYOUTS,
}


def without_memory(layers: int) -> LlamaForCausalLM:
    """Return the model on the meta device, in bfloat16."""
    config = LlamaConfig.from_dict({**CONFIG.to_dict(), "num_hidden_layers": layers})
    with torch.device("meta"):
        return LlamaForCausalLM(config).to(torch.bfloat16)


def with_rotary_embedding(model: LlamaForCausalLM) -> LlamaForCausalLM:
    """Make the rotary embedding of a model again: it has buffers, which have no values after the meta device."""
    model.model.rotary_emb = type(model.model.rotary_emb)(model.config)
    return model


def dense(layers: int) -> LlamaForCausalLM:
    """Return the dense model with random weights."""
    model = without_memory(layers).to_empty(device="cpu")
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.02)
    return with_rotary_embedding(model)


def compressed(layers: int, layout: Callable[[int, int], LayerSpec]) -> LlamaForCausalLM:
    """Return the model with random compressed layers in its blocks. The dense layers never take memory."""
    model = without_memory(layers)
    for block in model.model.layers:
        for name, linear in list(block.named_modules()):
            if isinstance(linear, nn.Linear):
                rows, columns = linear.weight.shape
                block.set_submodule(name, random_layer(layout(rows, columns), rows, columns, torch.bfloat16))
    for module in model.modules():
        for name, parameter in list(module.named_parameters(recurse=False)):
            if parameter.is_meta:
                values = torch.empty(parameter.shape, dtype=parameter.dtype).normal_(std=0.02)
                setattr(module, name, nn.Parameter(values))
    return with_rotary_embedding(model)


def row(result: ModelSpeed, reference: ModelSpeed) -> str:
    resident = "–" if result.resident_bytes is None else f"{result.resident_bytes / 1e9:.2f}"
    return (
        f"| {result.name} | {result.stored_bytes / 1e9:.2f} | {resident} "
        f"| {result.prefill_tokens_per_second:.1f} ({result.prefill.spread:.2f}) "
        f"| {result.decode_tokens_per_second:.2f} ({result.decode.spread:.2f}) "
        f"| {reference.prefill.median / result.prefill.median:.2f} "
        f"| {reference.decode.median / result.decode.median:.2f} |"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--layout", default="SLaB 50 % of the bits", choices=LAYOUTS)
    parser.add_argument("--prompt", type=int, default=512)
    parser.add_argument("--new", type=int, default=32)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--layers", type=int, default=CONFIG.num_hidden_layers)
    parser.add_argument(
        "--cpu-time", action="store_true", help="processor time of the calling thread; for --threads 1"
    )
    arguments = parser.parse_args()
    layout = LAYOUTS[arguments.layout]
    results = benchmark_model(
        {"dense": lambda: dense(arguments.layers), arguments.layout: lambda: compressed(arguments.layers, layout)},
        prompt_tokens=arguments.prompt,
        new_tokens=arguments.new,
        threads=arguments.threads,
        repeats=arguments.repeats,
        clock=time.thread_time if arguments.cpu_time else time.perf_counter,
    )
    print(HEADER)
    for result in results:
        print(row(result, reference=results[0]))


if __name__ == "__main__":
    main()
