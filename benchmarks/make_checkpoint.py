"""Writes a Llama checkpoint of any size with random bf16 weights, to measure memory and time at scale on.

Shards are written one by one, so that a large checkpoint needs little memory.

python benchmarks/make_checkpoint.py 7b OUT        # 13.5 GB
python benchmarks/make_checkpoint.py 7b OUT --blocks 2
"""

import argparse
import json
import shutil
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

import hf_lowrank

SHAPES = {
    "1b": {
        "hidden_size": 2048,
        "intermediate_size": 5632,
        "num_hidden_layers": 22,
        "num_attention_heads": 32,
        "num_key_value_heads": 4,
    },
    "3b": {
        "hidden_size": 3200,
        "intermediate_size": 8640,
        "num_hidden_layers": 26,
        "num_attention_heads": 32,
        "num_key_value_heads": 32,
    },
    "7b": {
        "hidden_size": 4096,
        "intermediate_size": 11008,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "num_key_value_heads": 32,
    },
}
"""The shapes of TinyLlama 1.1B, OpenLLaMA 3B and Llama-2 7B."""
BUNDLED = Path(hf_lowrank.__file__).parent / "data" / "reference-7m"
STANDARD_DEVIATION = 0.02
"""Standard deviation of the random weights, which is that of Llama's initialization."""


def make(size: str, folder: Path, blocks: int | None, seed: int) -> None:
    """Write the checkpoint, with the tokenizer of the bundled model.

    The tokens of that tokenizer are the first ones of the vocabulary.
    """
    config = LlamaConfig(
        vocab_size=32000,
        max_position_embeddings=4096,
        dtype="bfloat16",
        bos_token_id=1,
        eos_token_id=2,
        **SHAPES[size],
    )
    config.num_hidden_layers = blocks or config.num_hidden_layers
    with torch.device("meta"):
        shapes = {name: tensor.shape for name, tensor in LlamaForCausalLM(config).state_dict().items()}
    config.architectures = ["LlamaForCausalLM"]
    folder.mkdir(parents=True)
    config.save_pretrained(folder)
    for file in BUNDLED.glob("tokenizer*"):
        shutil.copyfile(file, folder / file.name)
    shards: dict[str, list[str]] = {}
    for name in shapes:
        shards.setdefault(shard_of(name), []).append(name)
    generator = torch.Generator().manual_seed(seed)
    weight_map = {}
    for file, names in shards.items():
        # One shard is in memory at a time.
        save_file({name: weight(shapes[name], generator) for name in names}, folder / file, metadata={"format": "pt"})
        weight_map |= dict.fromkeys(names, file)
    total_bytes = sum(shape.numel() * 2 for shape in shapes.values())
    index = {"metadata": {"total_size": total_bytes}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=1))
    print(f"{folder}: {total_bytes / 1e9:.2f} GB in {len(shards)} files")


def shard_of(name: str) -> str:
    """Return the file of a tensor: there is one for each block, and one for each layer outside of the blocks."""
    parts = name.split(".")
    if "layers" in parts:
        return f"model-block-{int(parts[2]):03}.safetensors"
    return f"model-{parts[-2]}.safetensors"


def weight(shape: torch.Size, generator: torch.Generator) -> Tensor:
    """Return normal values for a matrix and ones for a norm, in bf16."""
    if len(shape) == 1:
        return torch.ones(shape, dtype=torch.bfloat16)
    return torch.randn(shape, generator=generator).mul_(STANDARD_DEVIATION).bfloat16()


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("size", choices=SHAPES)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--blocks", type=int, help="fewer blocks of the same shape")
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    make(arguments.size, arguments.folder, arguments.blocks, arguments.seed)
