"""Quantised parts: the format, the product, and a life like that of every other part of a layer."""

import copy
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM
from transformers.quantizers.auto import AUTO_QUANTIZATION_CONFIG_MAPPING, AUTO_QUANTIZER_MAPPING

from hf_lowrank import CheckpointError, CompressionConfig, CompressionError, LayerSpec, SparseLowRankLinear
from hf_lowrank.runtime.configuration import QUANT_METHOD
from hf_lowrank.runtime.layers import build_layer
from hf_lowrank.runtime.ops import register_kernel
from hf_lowrank.runtime.packing import pack_values
from hf_lowrank.runtime.pivoting import pivot
from hf_lowrank.runtime.quantization import (
    BITS,
    Quantized,
    group_sums,
    levels,
    nearest_codes,
    pack_codes,
    packed_shape,
    quantize,
    spread_scale,
    unpack_codes,
)
from hf_lowrank.runtime.quantizer import CompressionQuantizer, attach, swap_module


def random(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


# --- the format ---------------------------------------------------------------------------------------------------


@settings(deadline=None)
@given(st.sampled_from(BITS), st.integers(0, 9), st.integers(0, 70), st.integers(0, 1000))
def test_packing_keeps_every_code_in_the_fewest_bytes(bits, rows, columns, seed):
    codes = torch.randint(
        0, 2**bits, (rows, columns), dtype=torch.uint8, generator=torch.Generator().manual_seed(seed)
    )
    packed = pack_codes(codes, bits)
    assert packed.shape == packed_shape(rows, columns, bits)
    assert packed.dtype == torch.uint8
    assert torch.equal(unpack_codes(packed, bits, columns), codes)
    if rows:
        assert 0 <= packed[0].numel() * 8 - columns * bits < 8


def test_packing_by_hand():
    assert pack_codes(torch.tensor([[1, 2, 3]]), 8).tolist() == [[[1], [2], [3]]]
    assert pack_codes(torch.tensor([[1, 2, 15]]), 4).tolist() == [[[0x21], [0x0F]]]
    assert pack_codes(torch.tensor([[1, 2, 3, 0, 3]]), 2).tolist() == [[[0b00111001], [0b11]]]
    assert pack_codes(torch.tensor([[1, 2, 3, 4, 5, 6, 7, 0]]), 3).tolist() == [
        [[0b11010001], [0b01011000], [0b00011111]]
    ]
    assert pack_codes(torch.tensor([[1, 2, 3]]), 3).tolist() == [[[0b11010001], [0]]]


def test_quantising_by_hand():
    part = quantize(torch.tensor([[4.0, -4.0, 1.0, 0.0, 0.0]]), bits=2, group=4)
    assert part.scale.tolist() == [[2.0, 0.0]]
    assert part.codes.tolist()[0][:4] == [3, 0, 2, 2]
    assert part.dequantize().tolist() == [[3.0, -3.0, 1.0, 1.0, 0.0]]


@settings(deadline=None)
@given(st.sampled_from(BITS), st.integers(1, 40), st.integers(1, 50), st.booleans(), st.integers(0, 1000))
def test_rounding_is_to_the_nearest_level(bits, group, columns, search, seed):
    values = random(5, columns, seed=seed)
    part = quantize(values, bits, group, search)
    assert part.codes.shape == values.shape
    assert part.scale.shape == (5, math.ceil(columns / group))
    scale = spread_scale(part.scale, group, columns)
    every_level = levels(torch.arange(2**bits, dtype=torch.uint8), bits, torch.float64) * scale[..., None]
    nearest = (every_level - values[..., None]).abs().amin(dim=-1)
    torch.testing.assert_close((part.dequantize() - values).abs(), nearest)
    if not search:  # half a step, and what the rounding of the scale to 8 bits takes off the largest level
        assert bool(((part.dequantize() - values).abs() <= scale / 2 + 2 ** (bits - 1) * scale / 256).all())


@settings(deadline=None)
@given(st.sampled_from(BITS), st.integers(0, 1000))
def test_a_searched_scale_is_never_worse(bits, seed):
    values = random(8, 48, seed=seed)
    plain, searched = (quantize(values, bits, 16, search).dequantize() - values for search in (False, True))
    errors = [difference.view(8, 3, 16).square().sum(dim=2) for difference in (searched, plain)]
    assert bool((errors[0] <= errors[1] + 1e-12).all())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_scales_are_exact_in_every_dtype(dtype):
    part = quantize(random(16, 64), 4, 16)
    assert torch.equal(part.scale.to(dtype).double(), part.scale)


@settings(deadline=None)
@given(st.integers(0, 4), st.integers(1, 9), st.integers(0, 30), st.integers(0, 1000))
def test_group_sums_are_the_transpose_of_spreading(rows, group, columns, seed):
    values, scale = random(rows, columns, seed=seed), random(rows, math.ceil(columns / group), seed=seed + 1)
    torch.testing.assert_close(
        (values * spread_scale(scale, group, columns)).sum(), (group_sums(values, group) * scale).sum()
    )


def test_more_bits_never_hurt():
    values = random(32, 96)
    errors = [float((quantize(values, bits, 32).dequantize() - values).norm()) for bits in BITS]
    assert errors == sorted(errors, reverse=True)
    assert errors[-1] < 0.01 * float(values.norm())


# --- the layer ----------------------------------------------------------------------------------------------------

M, N = 15, 20
COMBINATIONS = [
    "full",
    "full+lowrank",
    "rows+pivoted",
    "columns+lowrank",
    "bitmask",
    "bitmask+binary",
    "lowrank",
    "pivoted",
]


def layer_of(
    combination: str, bits: int = 4, group: int = 8, dtype: torch.dtype = torch.float64
) -> tuple[SparseLowRankLinear, torch.Tensor]:
    """A layer 15 × 20 with quantised parts, and the matrix that it must stand for, summed from its dequantised parts."""
    first, _, second = combination.partition("+")
    sparse = first if first in ("full", "rows", "columns", "bitmask") else "none"
    other = second or first
    kept = {"rows": 4, "columns": 5}.get(sparse, 0)
    rows, columns = M - (kept if sparse == "rows" else 0), N - (kept if sparse == "columns" else 0)
    dense = torch.zeros(M, N, dtype=torch.float64)
    parts: dict = {"sparse": sparse}
    if sparse == "bitmask":
        mask = torch.zeros(M, N, dtype=torch.bool).scatter_(1, random(M, N, seed=3).argsort(1)[:, :7], True)
        part = quantize(pack_values(random(M, N), mask), bits, group)
        parts |= {"weight": part, "mask": mask}
        dense[mask] = part.dequantize().flatten()
    elif sparse != "none":
        part = parts["weight"] = quantize(
            random(*{"rows": (4, N), "columns": (M, 5), "full": (M, N)}[sparse]), bits, group
        )
        dense[: part.shape[0], : part.shape[1]] = part.dequantize()
    if other in ("lowrank", "pivoted"):
        a, b, pivots = random(3, columns, seed=1), random(rows, 3, seed=2), None
        if other == "pivoted":
            a, b, pivots = pivot(a, b)
        parts |= {"lowrank_a": quantize(a, bits, group), "lowrank_b": quantize(b, bits, group), "pivots": pivots}
        full = parts["lowrank_b"].dequantize()
        if pivots is not None:
            spread = torch.zeros(rows, 3, dtype=torch.float64)
            spread[pivots], spread[~pivots] = torch.eye(3, dtype=torch.float64), full
            full = spread
        dense[M - rows :, N - columns :] += full @ parts["lowrank_a"].dequantize()
    if other == "binary":
        signs, scale_in, scale_out = random(M, N, seed=4) > 0, random(1, N, seed=5).abs(), random(M, 1, seed=6).abs()
        parts |= {"signs": signs, "scale_in": scale_in, "scale_out": scale_out}
        dense += torch.where(signs, 1.0, -1.0) * (scale_out @ scale_in)
    return SparseLowRankLinear.from_parts(N, M, **parts, bias=random(M, seed=7), dtype=dtype), dense


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("combination", COMBINATIONS)
def test_the_layer_computes_with_its_dequantised_parts(combination, bits):
    layer, dense = layer_of(combination, bits)
    x = random(2, 3, N, seed=8)
    torch.testing.assert_close(layer.to_dense(), dense)
    torch.testing.assert_close(layer(x), nn.functional.linear(x, dense, layer.bias))


@pytest.mark.parametrize("combination", COMBINATIONS)
def test_every_stored_bit_is_counted(combination):
    for bits in BITS:
        layer, _ = layer_of(combination, bits, dtype=torch.bfloat16)
        assert layer.stored_bits() == sum(tensor.nbytes * 8 for tensor in layer.state_dict().values())


@pytest.mark.parametrize("group", [0, -1, 2**31, 2**63 - 1, 2**63, 10**40, 8.0, True, "8"])
def test_groups_that_no_kernel_counts_with(group):
    """A group may be longer than a row, but no sum of sizes may overflow."""
    LayerSpec(sparse="full", weight_bits=4, weight_group=2**31 - 1).validate("layer", 8, 8)
    with pytest.raises(CheckpointError, match="weight_group is .* expected 1 to 2147483647"):
        LayerSpec(sparse="full", weight_bits=4, weight_group=group).validate("layer", 8, 8)


def test_bits_of_a_whole_matrix():
    spec = LayerSpec(sparse="full", weight_bits=4, weight_group=32)
    assert spec.stored_bits(256, 704, 16) == 256 * 704 * 4 + 256 * 22 * 16
    assert spec.tensors(256, 704) == {"weight": ((256, 352, 1), "uint8"), "weight_scale": ((256, 22), "float")}


@pytest.mark.parametrize("combination", COMBINATIONS)
def test_gradients_reach_input_scales_and_bias(combination):
    layer, _ = layer_of(combination)
    names, values = zip(*layer.named_parameters(), strict=True)
    assert any(name.endswith("_scale") for name in names)
    assert "bias" in names
    x = random(3, N, seed=9).requires_grad_()

    def function(x, *values):
        return torch.func.functional_call(layer, dict(zip(names, values, strict=True)), (x,))

    assert torch.autograd.gradcheck(function, (x, *(value.detach().clone().requires_grad_() for value in values)))


@pytest.mark.parametrize("combination", COMBINATIONS)
def test_only_float_tensors_are_parameters(combination):
    layer, _ = layer_of(combination, dtype=torch.float32)
    assert all(parameter.is_floating_point() for parameter in layer.parameters())
    assert {buffer.dtype for buffer in layer.buffers() if buffer.numel()} == {torch.uint8}
    half = copy.deepcopy(layer).to(torch.bfloat16)
    assert half.dtype == torch.bfloat16
    assert {buffer.dtype for buffer in half.buffers() if buffer.numel()} == {torch.uint8}
    assert half(random(2, N).bfloat16()).dtype == torch.bfloat16


@pytest.mark.parametrize("combination", COMBINATIONS)
def test_compiles_copies_and_is_built_on_meta(combination):
    torch.compiler.reset()
    layer, _ = layer_of(combination, bits=3, dtype=torch.float32)
    x = random(3, N).float()
    torch.testing.assert_close(torch.compile(layer, fullgraph=True, backend="aot_eager")(x), layer(x))
    assert torch.equal(copy.deepcopy(layer)(x), layer(x))
    skeleton = build_layer(layer.spec, N, M, device="meta", dtype=torch.float32)
    assert {name: tensor.shape for name, tensor in skeleton.state_dict().items()} == {
        n: t.shape for n, t in layer.state_dict().items()
    }
    skeleton.load_state_dict(layer.state_dict(), assign=True)
    assert torch.equal(skeleton(x), layer(x))


def test_a_fresh_layer_is_valid_and_of_the_usual_scale():
    spec = LayerSpec(
        sparse="bitmask", kept=8, rank=3, pivoted=True, weight_bits=4, weight_group=4, lowrank_bits=8, lowrank_group=4
    )
    layer = build_layer(spec, N, M)
    assert float(layer.to_dense().abs().max()) < 1
    assert bool(layer(torch.ones(1, N)).isfinite().all())


def test_a_pivoted_part_of_full_rank_has_no_other_rows():
    a, b, pivots = pivot(random(6, 9), torch.eye(6, dtype=torch.float64))
    layer = SparseLowRankLinear.from_parts(
        9, 6, lowrank_a=quantize(a, 8, 4), lowrank_b=quantize(b, 8, 4), pivots=pivots
    )
    x = random(2, 9)
    torch.testing.assert_close(layer(x), x @ quantize(a, 8, 4).dequantize().T)
    layer(x).sum().backward()
    assert layer.lowrank_b_scale.grad.shape == (0, 2)


def test_a_kernel_is_asked_first_and_may_decline():
    layer, _ = layer_of("full")
    x, asked = random(2, N), []

    def declines(x, codes, scale, mask, bits, group, kept):
        asked.append((bits, group, kept, mask))

    expected = layer(x)
    register_kernel("quantized_linear", "cpu", "test", declines)
    assert torch.equal(layer(x), expected)
    assert asked == [(4, 8, N, None)]


def test_a_mask_and_its_quantised_values_belong_together():
    mask = torch.zeros(M, N, dtype=torch.bool)
    mask[:, :6] = True
    with pytest.raises(CompressionError, match="quantized values for a mask"):
        SparseLowRankLinear.from_parts(N, M, sparse="bitmask", weight=quantize(random(M, 7), 4, 8), mask=mask)
    mask[0, 6] = True
    with pytest.raises(CompressionError, match="the same number in every row"):
        SparseLowRankLinear.from_parts(N, M, sparse="bitmask", weight=quantize(random(M, 6), 4, 8), mask=mask)


def test_both_factors_are_quantised_alike():
    with pytest.raises(CompressionError, match="alike"):
        SparseLowRankLinear.from_parts(N, M, lowrank_a=quantize(random(3, N), 4, 8), lowrank_b=random(M, 3))


@pytest.mark.parametrize(
    ("change", "field"),
    [
        ({"weight_bits": 9}, "weight_bits"),
        ({"weight_bits": 4.0}, "weight_bits"),
        ({"weight_bits": True}, "weight_bits"),
        ({"weight_group": 0}, "weight_group"),
        ({"weight_bits": 0}, "weight_group"),
        ({"weight_bits": 0, "weight_group": 0}, "weight_bits"),
        ({"kept": 3}, "kept"),
        ({"sparse": "none"}, "weight_bits"),
        ({"lowrank_bits": 4, "lowrank_group": 8}, "lowrank_bits"),
        ({"rank": 2, "lowrank_bits": 1, "lowrank_group": 8}, "lowrank_bits"),
        ({"rank": 2, "lowrank_bits": 4}, "lowrank_group"),
    ],
)
def test_impossible_specs_are_refused(change, field):
    values = LayerSpec(sparse="full", weight_bits=4, weight_group=8).to_dict() | change
    with pytest.raises(CheckpointError, match=f"layer: {field} is"):
        LayerSpec.from_dict("layer", values).validate("layer", M, N)


def test_specs_survive_their_dictionary():
    for combination in COMBINATIONS:
        spec = layer_of(combination)[0].spec
        assert LayerSpec.from_dict("layer", spec.to_dict()) == spec


# --- the checkpoint -----------------------------------------------------------------------------------------------


def tiny_model(dtype: torch.dtype) -> LlamaForCausalLM:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=64,
        hidden_size=32,
        intermediate_size=44,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=64,
        attention_bias=True,
    )
    return AutoModelForCausalLM.from_config(config, dtype=dtype).eval()


def parts_of(weight: torch.Tensor, index: int) -> dict:
    """Another kind of quantised layer for every index."""
    W = weight.detach().double()
    bits = BITS[index % len(BITS)]
    mask = torch.zeros(W.shape, dtype=torch.bool).scatter_(1, W.abs().topk(9, dim=1).indices, True)
    U, S, Vh = torch.linalg.svd(W, full_matrices=False)
    a, b, pivots = pivot(S[:6, None] * Vh[:6], U[:, :6])
    kinds: list[dict] = [
        {"sparse": "full", "weight": quantize(W, bits, 16)},
        {"sparse": "bitmask", "weight": quantize(pack_values(W, mask), bits, 4), "mask": mask},
        {"lowrank_a": quantize(a, bits, 8), "lowrank_b": quantize(b, bits, 8), "pivots": pivots},
        {"sparse": "full", "weight": quantize(W, bits, 32), "lowrank_a": a, "lowrank_b": b, "pivots": pivots},
    ]
    return kinds[index % len(kinds)]


def compressed(model: LlamaForCausalLM) -> LlamaForCausalLM:
    layers = {}
    names = [name for name, module in model.named_modules() if isinstance(module, nn.Linear) and "layers" in name]
    for index, name in enumerate(names):
        module = model.get_submodule(name)
        layer = SparseLowRankLinear.from_parts(
            module.in_features,
            module.out_features,
            **parts_of(module.weight, index),
            bias=module.bias,
            dtype=model.dtype,
        )
        swap_module(model, name, layer)
        layers[name] = layer.spec
    attach(model, CompressionQuantizer(CompressionConfig(method="gptq", layers=layers), pre_quantized=True))
    return model


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_checkpoint_opens_with_the_same_logits(tmp_path, dtype):
    model = compressed(tiny_model(dtype))
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
    model = tiny_model(torch.float32)
    name = "model.layers.0.self_attn.q_proj"
    module = model.get_submodule(name)  # square, in 8 bits: as many codes as weights
    layer = SparseLowRankLinear.from_parts(
        32, 32, sparse="full", weight=quantize(module.weight.detach(), 8, 32), bias=module.bias
    )
    swap_module(model, name, layer)
    attach(model, CompressionQuantizer(CompressionConfig(method="rtn", layers={name: layer.spec}), pre_quantized=True))
    model.save_pretrained(tmp_path)
    monkeypatch.delitem(AUTO_QUANTIZATION_CONFIG_MAPPING, QUANT_METHOD)
    monkeypatch.delitem(AUTO_QUANTIZER_MAPPING, QUANT_METHOD)
    with pytest.raises(RuntimeError, match="size"):
        AutoModelForCausalLM.from_pretrained(tmp_path)


def test_training_moves_scales_and_biases_and_keeps_the_codes():
    model = compressed(tiny_model(torch.float32)).train()
    codes = {name: buffer.clone() for name, buffer in model.named_buffers() if buffer.dtype == torch.uint8}
    tokens = torch.randint(0, 64, (4, 16))
    optimizer = torch.optim.Adam([p for n, p in model.named_parameters() if n.endswith(("_scale", "bias"))], lr=1e-3)
    losses = []
    for _ in range(8):
        loss = model(tokens, labels=tokens).loss
        losses.append(loss.item())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert losses[-1] < losses[0]
    assert codes
    assert all(torch.equal(dict(model.named_buffers())[name], value) for name, value in codes.items())


def test_a_lora_trains_on_top():
    peft = pytest.importorskip("peft")
    model = compressed(tiny_model(torch.bfloat16))
    tokens = torch.randint(0, 64, (2, 9))
    logits = model(tokens).logits
    adapted = peft.get_peft_model(
        model, peft.LoraConfig(target_modules=["q_proj", "down_proj"], init_lora_weights=True)
    )
    assert torch.equal(adapted(tokens).logits, logits)
    adapted(tokens, labels=tokens).loss.backward()
    trained = [parameter for parameter in adapted.parameters() if parameter.requires_grad]
    assert trained
    assert all(parameter.grad is not None for parameter in trained)


def test_codes_of_a_group_of_zeros_stand_for_zero():
    zeros = torch.zeros(2, 8)
    assert torch.equal(quantize(zeros, 4, 4, search=True).dequantize(), zeros)
    assert nearest_codes(zeros, torch.zeros(2, 1), 4).dtype == torch.uint8
    assert Quantized(torch.zeros(0, 8, dtype=torch.uint8), torch.zeros(0, 1), 4, 8).dequantize().shape == (0, 8)
