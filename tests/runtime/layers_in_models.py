"""Builds a small Llama and puts compressed layers into it that are made from its own weights."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

from hf_lowrank import CompressionConfig, SparseLowRankLinear
from hf_lowrank.runtime.quantizer import CompressionQuantizer, attach, swap_module


def llama_of(dtype: torch.dtype, **changes: Any) -> LlamaForCausalLM:
    """Build a Llama of two blocks with random weights in a dtype."""
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 44, "num_hidden_layers": 2}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2}
    config = LlamaConfig(vocab_size=64, max_position_embeddings=64, **sizes, **heads, **changes)
    return AutoModelForCausalLM.from_config(config, dtype=dtype).eval()


def replace_linears(model: LlamaForCausalLM, method: str, parts_of: Callable[[Tensor, int], dict[str, Any]]) -> None:
    """Replace all linear layers of the blocks, as if `method` had compressed the model.

    Args:
        parts_of: returns the parts, as `SparseLowRankLinear.from_parts` takes them, for a weight (m, n) in float64 and
            the number of its layer.
    """
    specs = {}
    names = [name for name, module in model.named_modules() if isinstance(module, nn.Linear) and "layers" in name]
    for index, name in enumerate(names):
        module = model.get_submodule(name)
        parts = parts_of(module.weight.detach().double(), index)
        shape = (module.in_features, module.out_features)
        layer = SparseLowRankLinear.from_parts(*shape, **parts, bias=module.bias, dtype=model.dtype)
        swap_module(model, name, layer)
        specs[name] = layer.spec
    attach(model, CompressionQuantizer(CompressionConfig(method=method, layers=specs), pre_quantized=True))
