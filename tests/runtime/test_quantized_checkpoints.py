"""Models with quantized layers are saved, opened, dequantized, and trained like others."""

import pytest
import torch
from transformers import AutoModelForCausalLM, LlamaForCausalLM
from transformers.quantizers.auto import AUTO_QUANTIZATION_CONFIG_MAPPING, AUTO_QUANTIZER_MAPPING

from hf_lowrank import CompressionConfig, SparseLowRankLinear
from hf_lowrank.runtime.configuration import QUANT_METHOD
from hf_lowrank.runtime.packing import pack_values
from hf_lowrank.runtime.pivoting import pivot
from hf_lowrank.runtime.quantization import BITS, quantize
from hf_lowrank.runtime.quantizer import CompressionQuantizer, attach, swap_module

from .layers_in_models import llama_of, replace_linears


def parts_of(weight: torch.Tensor, index: int) -> dict:
    """Return the parts of a quantized layer for a weight, of another kind for every index."""
    bits = BITS[index % len(BITS)]
    mask = torch.zeros(weight.shape, dtype=torch.bool).scatter_(1, weight.abs().topk(9, dim=1).indices, True)
    U, S, Vh = torch.linalg.svd(weight, full_matrices=False)
    a, b, pivots = pivot(S[:6, None] * Vh[:6], U[:, :6])
    kinds: list[dict] = [
        {"sparse": "full", "weight": quantize(weight, bits, 16)},
        {"sparse": "bitmask", "weight": quantize(pack_values(weight, mask), bits, 4), "mask": mask},
        {"lowrank_a": quantize(a, bits, 8), "lowrank_b": quantize(b, bits, 8), "pivots": pivots},
        {"sparse": "full", "weight": quantize(weight, bits, 32), "lowrank_a": a, "lowrank_b": b, "pivots": pivots},
    ]
    return kinds[index % len(kinds)]


def quantized_llama(dtype: torch.dtype) -> LlamaForCausalLM:
    """Build a Llama whose linear layers have biases, and are quantized."""
    model = llama_of(dtype, attention_bias=True)
    replace_linears(model, "gptq", parts_of=parts_of)
    return model


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_checkpoint_opens_with_the_same_logits(tmp_path, dtype):
    model = quantized_llama(dtype)
    tokens = torch.randint(0, 64, (2, 9))
    logits = model(tokens).logits
    model.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=dtype)
    assert type(loaded) is LlamaForCausalLM
    assert loaded.dtype == dtype
    assert torch.equal(loaded(tokens).logits, logits)
    assert loaded.generate(tokens[:1], max_new_tokens=3, do_sample=False).shape == (1, 12)
    dense = loaded.dequantize()
    torch.testing.assert_close(dense(tokens).logits, logits, rtol=0.05, atol=0.05 if dtype == torch.bfloat16 else 1e-5)


@pytest.mark.filterwarnings("ignore")
def test_a_load_without_the_plugin_raises(tmp_path, monkeypatch):
    """The case is the hardest: a square layer in 8 bits has as many codes as the dense layer has weights."""
    model = llama_of(torch.float32, attention_bias=True)
    name = "model.layers.0.self_attn.q_proj"
    module = model.get_submodule(name)
    weight = quantize(module.weight.detach(), 8, 32)
    layer = SparseLowRankLinear.from_parts(32, 32, sparse="full", weight=weight, bias=module.bias)
    swap_module(model, name, layer)
    attach(model, CompressionQuantizer(CompressionConfig(method="rtn", layers={name: layer.spec}), pre_quantized=True))
    model.save_pretrained(tmp_path)
    monkeypatch.delitem(AUTO_QUANTIZATION_CONFIG_MAPPING, QUANT_METHOD)
    monkeypatch.delitem(AUTO_QUANTIZER_MAPPING, QUANT_METHOD)
    with pytest.raises(RuntimeError, match="size"):
        AutoModelForCausalLM.from_pretrained(tmp_path)


def test_training_moves_scales_and_biases_and_keeps_the_codes():
    model = quantized_llama(torch.float32).train()
    codes = {name: buffer.clone() for name, buffer in model.named_buffers() if buffer.dtype == torch.uint8}
    tokens = torch.randint(0, 64, (4, 16))
    trained = [value for name, value in model.named_parameters() if name.endswith(("_scale", "bias"))]
    optimizer = torch.optim.Adam(trained, lr=1e-3)
    losses = []
    for _ in range(8):
        loss = model(tokens, labels=tokens).loss
        losses.append(loss.item())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert losses[-1] < losses[0]
    assert codes  # or the comparison would say nothing
    assert all(torch.equal(dict(model.named_buffers())[name], value) for name, value in codes.items())


def test_a_lora_trains_on_top_of_quantized_layers():
    peft = pytest.importorskip("peft")
    model = quantized_llama(torch.bfloat16)
    tokens = torch.randint(0, 64, (2, 9))
    logits = model(tokens).logits
    config = peft.LoraConfig(target_modules=["q_proj", "down_proj"], init_lora_weights=True)
    adapted = peft.get_peft_model(model, config)
    assert torch.equal(adapted(tokens).logits, logits)
    adapted(tokens, labels=tokens).loss.backward()
    trained = [parameter for parameter in adapted.parameters() if parameter.requires_grad]
    assert trained
    assert all(parameter.grad is not None for parameter in trained)
