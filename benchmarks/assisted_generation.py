"""Makes the table of assisted_generation.md: a model that generates alone, and with its compressed self as a draft.

`python benchmarks/assisted_generation.py [--method slab] [--ratio 0.5] [--threads 2] [--kernels]`

The draft is transformers' `assistant_model`. Generation is greedy, so that both texts must be the same, which is
checked. Both are run in turn on the same prompts. The times are those of the fastest round.
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
    """Return the token ids (1, length) of prompts from the bundled text."""
    text = files("hf_lowrank").joinpath("data/demo.txt").read_text(encoding="utf-8")
    ids = tokenizer(text, return_tensors="pt").input_ids[0]
    return [window[None] for window in ids[: count * length].split(length)]


def generate(
    model: PreTrainedModel, ids: list[torch.Tensor], new: int, **arguments: Any
) -> tuple[list[torch.Tensor], float]:
    """Return the token ids of each prompt with `new` tokens more, and the seconds that this took."""
    start = time.perf_counter()
    length = {"max_new_tokens": new, "min_new_tokens": new, "do_sample": False, "pad_token_id": 0}
    outputs = []
    with torch.no_grad():
        for prompt in ids:
            outputs.append(model.generate(prompt, attention_mask=torch.ones_like(prompt), **length, **arguments))
    return outputs, time.perf_counter() - start


def count_passes(model: PreTrainedModel, name: str, passes: Counter[str]) -> None:
    """Have every forward pass of a model counted under a name."""

    def count(*_: Any) -> None:
        passes[name] += 1

    model.register_forward_hook(count)


def parse_arguments() -> argparse.Namespace:
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
    return parser.parse_args()


def main() -> None:
    arguments = parse_arguments()
    torch.set_num_threads(arguments.threads)
    if arguments.kernels:
        hf_lowrank.kernels.load()
    tokenizer = AutoTokenizer.from_pretrained(arguments.model)
    dtype = getattr(torch, arguments.dtype)
    dense = AutoModelForCausalLM.from_pretrained(arguments.model, dtype=dtype).eval()
    draft = AutoModelForCausalLM.from_pretrained(arguments.model, dtype=dtype).eval()
    compress(draft, CompressionConfig(method=arguments.method, ratio=arguments.ratio), tokenizer, progress=False)
    ids = prompts(tokenizer, arguments.prompts, arguments.prompt)
    passes: Counter[str] = Counter()
    count_passes(dense, "dense", passes)
    count_passes(draft, "draft", passes)
    seconds: dict[str, list[float]] = {"alone": [], "assisted": [], "draft": []}
    for _ in range(arguments.rounds):
        alone, elapsed = generate(dense, ids, arguments.new)
        seconds["alone"].append(elapsed)
        passes.clear()
        assisted, elapsed = generate(dense, ids, arguments.new, assistant_model=draft)
        seconds["assisted"].append(elapsed)
        assert all(map(torch.equal, alone, assisted)), "a draft must not change what is written"
        passes_when_assisted = Counter(passes)
        seconds["draft"].append(generate(draft, ids, arguments.new)[1])
    tokens = arguments.new * len(ids)
    rate = {name: tokens / min(times) for name, times in seconds.items()}
    columns = {
        "draft": f"{arguments.method} {arguments.ratio:.0%}",
        "dense alone": f"{rate['alone']:.0f} tokens/s",
        "draft alone": f"{rate['draft']:.0f} tokens/s",
        "dense with its draft": f"{rate['assisted']:.0f} tokens/s",
        "speed-up": f"{rate['assisted'] / rate['alone']:.2f}×",
        "tokens per dense pass": f"{tokens / passes_when_assisted['dense']:.2f}",
        "draft passes per token": f"{passes_when_assisted['draft'] / tokens:.2f}",
    }
    print(f"| {' | '.join(columns)} |")
    print("|---" * len(columns) + "|")
    print(f"| {' | '.join(columns.values())} |")


if __name__ == "__main__":
    main()
