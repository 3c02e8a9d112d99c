"""The families of models that llama.cpp computes: what a GGUF file says of them, and how it orders their weights."""

import math
from collections.abc import Callable
from typing import Any

import torch
from gguf import MODEL_ARCH, GGUFWriter, RopeScalingType
from torch import Tensor

from ..runtime.errors import CompressionError

ARCHITECTURES = {
    "llama": MODEL_ARCH.LLAMA,
    "mistral": MODEL_ARCH.LLAMA,
    "qwen2": MODEL_ARCH.QWEN2,
    "qwen3": MODEL_ARCH.QWEN3,
    "gemma": MODEL_ARCH.GEMMA,
    "gemma3_text": MODEL_ARCH.GEMMA3,
}
"""llama.cpp's architecture for transformers' types of models."""
PAIRED_ROTATION = ("llama", "mistral")
"""Types whose queries and keys llama.cpp rotates in pairs of neighbors, and transformers in halves of a head."""
OFFSET_NORMS = ("gemma", "gemma3_text")
"""Types whose norms multiply by 1 + w."""
GEMMA3_PERIOD = 6
"""In llama.cpp, every so many-th block of a Gemma 3 attends to all tokens, and the others to a window."""
DENSE = "hf-lowrank dense DIR -o OUT writes a checkpoint that its own converter may take"


def architecture_of(config: Any) -> MODEL_ARCH:
    """Return llama.cpp's architecture of a model.

    Raises:
        CompressionError: if it has none that computes the same.
    """
    kind = config.model_type
    if kind not in ARCHITECTURES:
        raise CompressionError(
            f"gguf: models of type {kind} are not exported, only {', '.join(ARCHITECTURES)}; {DENSE}"
        )
    activation = getattr(config, "hidden_activation", None) or config.hidden_act
    expected = ("gelu_pytorch_tanh", "gelu") if kind in OFFSET_NORMS else ("silu",)
    _require(activation in expected, f"activation {activation}")
    if kind == "gemma3_text":
        period = [i % GEMMA3_PERIOD == GEMMA3_PERIOD - 1 for i in range(config.num_hidden_layers)]
        _require([layer == "full_attention" for layer in config.layer_types] == period, "order of windows")
        _require(config.query_pre_attn_scalar == config.head_dim, "query_pre_attn_scalar other than head_dim")
        _require(config.attn_logit_softcapping is None, "attn_logit_softcapping")
        _require(config.final_logit_softcapping is None, "final_logit_softcapping")
        _require(not getattr(config, "use_bidirectional_attention", False), "bidirectional attention")
    return ARCHITECTURES[kind]


def _require(condition: bool, what: str) -> None:
    if not condition:
        raise CompressionError(f"gguf: llama.cpp does not compute this model's {what}; {DENSE}")


def add_hyperparameters(writer: GGUFWriter, config: Any) -> None:
    """Write the sizes of a model, and its rotary embedding."""
    head_size = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    writer.add_context_length(_context(config))
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_key_length(head_size)
    writer.add_value_length(head_size)
    writer.add_rope_dimension_count(head_size)
    writer.add_vocab_size(config.vocab_size)
    if config.model_type == "gemma3_text":
        writer.add_sliding_window(config.sliding_window)
    rope = _rope(config)
    writer.add_rope_freq_base(rope["rope_theta"])
    if rope["rope_type"] == "linear":
        writer.add_rope_scaling_type(RopeScalingType.LINEAR)
        writer.add_rope_scaling_factor(rope["factor"])


def _context(config: Any) -> int:
    """Return how many tokens a model reads. For llama.cpp's models without windows, no more than a window."""
    context: int = config.max_position_embeddings
    window = getattr(config, "sliding_window", None)
    has_windows = config.model_type == "mistral" or getattr(config, "use_sliding_window", False)
    return min(context, window) if has_windows and window else context


def _rope(config: Any) -> dict[str, Any]:
    """Return the parameters of the rotary embedding, for Gemma 3 those of the blocks that attend to all tokens.

    Raises:
        CompressionError: for a kind that is not exported.
    """
    rope: dict[str, Any] = config.rope_parameters
    if config.model_type == "gemma3_text":
        local = rope["sliding_attention"]
        _require(local["rope_type"] == "default" and local["rope_theta"] == 10000, "rotation within windows")
        rope = rope["full_attention"]
    _require(rope["rope_type"] in ("default", "linear", "llama3"), f"rotary embedding of type {rope['rope_type']}")
    return rope


def rotation_factors(config: Any) -> Tensor | None:
    """Return by what every frequency of the rotary embedding is divided, or None if by nothing (Llama 3.1)."""
    rope = _rope(config)
    if rope["rope_type"] != "llama3":
        return None
    size = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    frequencies = rope["rope_theta"] ** -(torch.arange(0, size, 2, dtype=torch.float64) / size)
    turns = rope["original_max_position_embeddings"] * frequencies / (2 * math.pi)
    low, high, factor = rope["low_freq_factor"], rope["high_freq_factor"], rope["factor"]
    smooth = ((turns - low) / (high - low)).clamp(0, 1)
    return (1 / ((1 - smooth) / factor + smooth)).float()


def row_order(config: Any, name: str) -> Callable[[Tensor], Tensor]:
    """Return the function that brings the rows of a tensor, by its name in transformers, into llama.cpp's order."""
    heads = 0
    if config.model_type in PAIRED_ROTATION and ".self_attn." in name:
        if ".q_proj." in name:
            heads = config.num_attention_heads
        elif ".k_proj." in name:
            heads = config.num_key_value_heads
    if not heads:
        return lambda tensor: tensor
    return lambda tensor: tensor.unflatten(0, (heads, 2, -1)).transpose(1, 2).flatten(0, 2).contiguous()


def norm_offset(config: Any, name: str) -> int:
    """Return what is added to a tensor, by its name in transformers: 1 for the norms of Gemma."""
    return int(config.model_type in OFFSET_NORMS and name.endswith("norm.weight"))
