"""The table of assisted_generation.md: a model generating by itself, and with its compressed self as a draft (`assistant_model`).

`python benchmarks/assisted_generation.py [--model hf_lowrank/data/reference-7m] [--method slab] [--ratio 0.5] [--threads 2] [--kernels]`

Greedy, so the text must be the same, which is checked. Both are run in turn on the same prompts; the times are the fastest of the rounds.
"""

import argparse
import time
from collections import Counter
from importlib.resources import files
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

import hf_lowrank.kernels
from hf_lowrank import CompressionConfig, compress


def prompts(tokenizer: Any, count: int, length: int) -> list[torch.Tensor]:
    """Token ids (1, length) from the bundled text."""
    text = files("hf_lowrank").joinpath("data/demo.txt").read_text(encoding="utf-8")
    ids = tokenizer(text, return_tensors="pt").input_ids[0]
    return [window[None] for window in ids[: count * length].split(length)]


def generate(
    model: PreTrainedModel, ids: list[torch.Tensor], new: int, **arguments: Any
) -> tuple[list[torch.Tensor], float]:
    """What is written after each prompt, and the seconds that took."""
    start = time.perf_counter()
    length = {"max_new_tokens": new, "min_new_tokens": new, "do_sample": False, "pad_token_id": 0}
    with torch.no_grad():
        outputs = [
            model.generate(prompt, attention_mask=torch.ones_like(prompt), **length, **arguments) for prompt in ids
        ]
    return outputs, time.perf_counter() - start


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default=str(files("hf_lowrank").joinpath("data/reference-7m")))
    parser.add_argument("--method", default="slab")
    parser.add_argument("--ratio", type=float, default=0.5)
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--prompts", type=int, default=8)
    parser.add_argument("--prompt", type=int, default=64)
    parser.add_argument("--new", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--kernels", action="store_true", help="compute with the C++ kernels")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    if arguments.kernels:
        hf_lowrank.kernels.load()
    tokenizer = AutoTokenizer.from_pretrained(arguments.model)
    dense, draft = (
        AutoModelForCausalLM.from_pretrained(arguments.model, dtype=getattr(torch, arguments.dtype)).eval()
        for _ in range(2)
    )
    compress(draft, CompressionConfig(method=arguments.method, ratio=arguments.ratio), tokenizer, progress=False)
    ids = prompts(tokenizer, arguments.prompts, arguments.prompt)
    passes: Counter[str] = Counter()
    for name, model in (("dense", dense), ("draft", draft)):
        model.register_forward_hook(lambda *_, name=name: passes.update([name]))
    seconds: dict[str, list[float]] = {"alone": [], "assisted": [], "draft": []}
    for _ in range(arguments.rounds):
        alone, elapsed = generate(dense, ids, arguments.new)
        seconds["alone"].append(elapsed)
        passes.clear()
        assisted, elapsed = generate(dense, ids, arguments.new, assistant_model=draft)
        seconds["assisted"].append(elapsed)
        assert all(map(torch.equal, alone, assisted)), "a draft must not change what is written"
        counted = Counter(passes)
        seconds["draft"].append(generate(draft, ids, arguments.new)[1])
    tokens = arguments.new * len(ids)
    rate = {name: tokens / min(times) for name, times in seconds.items()}
    print(
        "| draft | dense alone | draft alone | dense with its draft | speed-up | tokens per dense pass | draft passes per token |"
    )
    print("|---|---|---|---|---|---|---|")
    print(
        f"| {arguments.method} {arguments.ratio:.0%} | {rate['alone']:.0f} tokens/s | {rate['draft']:.0f} tokens/s | "
        f"{rate['assisted']:.0f} tokens/s | {rate['assisted'] / rate['alone']:.2f}× | {tokens / counted['dense']:.2f} | "
        f"{counted['draft'] / tokens:.2f} |"
    )


if __name__ == "__main__":
    main()
