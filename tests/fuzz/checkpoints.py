"""Saves small valid checkpoints of every layout for mutation.

They are of Llama and of GPT-2, in one file and in shards, with all kinds of parts.
"""

from pathlib import Path

import torch
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM, PreTrainedModel

from hf_lowrank import CompressionConfig, compress

VOCABULARY = 64
LLAMA = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
}


def save_checkpoints(folder: Path) -> list[Path]:
    """Save all checkpoints and return their folders."""
    return [
        _save(folder / "slab", llama(), "slab", 0.4),
        _save(folder / "shards", llama(), "slab", 0.4, max_shard_size="20KB"),
        _save(folder / "sola", llama(num_hidden_layers=3), "sola", 0.3),
        _save(folder / "bfloat16", llama(tie_word_embeddings=True).bfloat16(), "svd", 0.3),
        _save(folder / "quantised", llama(), "gptq", 0.8),
        _save(folder / "pivoted", llama(), "lowrank", 0.3),
        _save(folder / "gpt2", gpt2(), "slab", 0.4),
    ]


def llama(**changes: object) -> LlamaForCausalLM:
    torch.manual_seed(0)
    return LlamaForCausalLM(LlamaConfig(vocab_size=VOCABULARY, max_position_embeddings=64, **(LLAMA | changes))).eval()


def gpt2() -> GPT2LMHeadModel:
    torch.manual_seed(0)
    return GPT2LMHeadModel(GPT2Config(vocab_size=VOCABULARY, n_embd=32, n_layer=2, n_head=4, n_positions=64)).eval()


def _save(folder: Path, model: PreTrainedModel, method: str, ratio: float, **saving: object) -> Path:
    tokens = torch.randint(VOCABULARY, (4, 16), generator=torch.Generator().manual_seed(0)).tolist()
    options = {"iterations": 2} if method == "slab" else {}
    compress(
        model,
        CompressionConfig(method=method, ratio=ratio, options=options, samples=4, sequence_length=16),
        calibration=tokens,
        progress=False,
    )
    model.save_pretrained(folder, **saving)
    return folder
