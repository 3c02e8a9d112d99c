"""Checkpoints of every family and layout, small, with heads as wide as vLLM's attention on CPUs wants them."""

from pathlib import Path
from typing import Any

import torch
import transformers
from torch import nn
from transformers import AutoModelForCausalLM, PreTrainedModel

from hf_lowrank import CompressionConfig, compress
from hf_lowrank.peft.merging import add_lowrank
from tests.support import tiny_models

CONTEXT = 128
SIZES = {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "max_position_embeddings": CONTEXT}
GROUPED: dict[str, Any] = {**SIZES, "intermediate_size": 96, "num_key_value_heads": 2, "head_dim": 32}
FAMILIES: dict[str, dict[str, Any]] = {
    "Llama": GROUPED,
    "Mistral": {**GROUPED, "sliding_window": 16},
    "Qwen2": {**GROUPED, "hidden_size": 128},
    "Qwen3": GROUPED,
    "Gemma3": {**GROUPED, "sliding_window": 16},
    "OPT": {**SIZES, "hidden_size": 128, "ffn_dim": 96, "word_embed_proj_dim": 128},
    "Phi3": {**SIZES, "hidden_size": 128, "intermediate_size": 96, "num_key_value_heads": 2},
    "Mixtral": {**GROUPED, "num_local_experts": 4},
    "GPT2": {"n_embd": 128, "n_layer": 2, "n_head": 4, "n_positions": CONTEXT},
}
"""Fields of the config of every family, by the beginning of its class's name."""
REFUSED = ("Mixtral", "GPT2")
"""Families that vLLM does not serve compressed."""

LAYOUTS: dict[str, tuple[str, float | None, dict[str, Any]]] = {
    "bitmask and signs": ("slab", 0.4, {}),
    "bitmask of second order": ("slab-gram", 0.4, {}),
    "rows and columns": ("sola", 0.3, {}),
    "low rank": ("svd-llm", 0.3, {}),
    "pivoted, merged adapters": ("lowrank", 0.3, {}),
    "bitmask": ("wanda", 0.4, {}),
    "full, quantized": ("gptq", None, {"options": {"bits": 4}}),
    "mixed, quantized": ("auto", 0.7, {}),
    "dense shards": ("slab", 0.4, {"modules_to_not_convert": ["k_proj", "up_proj"]}),
}
"""Method, ratio and other fields of the recipe that gives a layout."""


def make(family: str, layout: str, folder: Path) -> Path:
    """Write a compressed model of a family, or the dense one for the layout `dense`, and return its folder."""
    model = build(family)
    tokenizer = tiny_models.tokenizer()
    if layout == "dense":
        tokenizer.save_pretrained(folder)
    else:
        method, ratio, changes = LAYOUTS[layout]
        size = {} if ratio is None else {"ratio": ratio}
        config = CompressionConfig(method=method, samples=4, sequence_length=32, **size, **changes)
        compress(model, config, tokenizer=tokenizer, calibration=tiny_models.text(8), progress=False)
        if "adapters" in layout:
            merge_adapters(model)
    model.save_pretrained(folder)
    return folder


def build(family: str, seed: int = 0) -> PreTrainedModel:
    """Return a dense model of random weights and biases."""
    config_class = getattr(transformers, f"{family}TextConfig" if family == "Gemma3" else f"{family}Config")
    fields = {"vocab_size": tiny_models.VOCABULARY, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
    torch.manual_seed(seed)
    config = config_class(**fields, initializer_range=0.1, **FAMILIES[family])
    model = AutoModelForCausalLM.from_config(config).eval()
    for name, parameter in model.named_parameters():
        if name.endswith("bias"):
            nn.init.normal_(parameter, std=0.1)
    return model


def merge_adapters(model: PreTrainedModel) -> None:
    """Add a product of rank 3 to every compressed layer."""
    for name in model.config.quantization_config.layers:
        layer = model.get_submodule(name)
        a, b = torch.randn(3, layer.in_features), torch.randn(layer.out_features, 3) / 9
        add_lowrank(layer, a, b, name=name)
