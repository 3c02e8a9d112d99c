"""A layer computes with the dequantized values of its quantized parts, which live like all other parts of a layer."""

import copy

import pytest
import torch
from torch import nn

from hf_lowrank import CheckpointError, CompressionError, LayerSpec, SparseLowRankLinear
from hf_lowrank.runtime.layers import build_layer
from hf_lowrank.runtime.ops import register_kernel
from hf_lowrank.runtime.packing import pack_values
from hf_lowrank.runtime.pivoting import pivot
from hf_lowrank.runtime.quantization import BITS, quantize

from .layer_cases import random_matrix, shapes_of

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
"""The layout of the sparse part, and the part beside it. "full" is a whole quantized matrix."""


def layer_of(
    combination: str, bits: int = 4, group: int = 8, dtype: torch.dtype = torch.float64
) -> tuple[SparseLowRankLinear, torch.Tensor]:
    """Build a layer 15 × 20 with quantized parts, and the matrix that it stands for, which is the sum of the parts."""
    first, _, second = combination.partition("+")
    sparse = first if first in ("full", "rows", "columns", "bitmask") else "none"
    beside = second or first
    rows = M - 4 if sparse == "rows" else M
    columns = N - 5 if sparse == "columns" else N
    dense = torch.zeros(M, N, dtype=torch.float64)
    parts: dict = {"sparse": sparse}
    if sparse == "bitmask":
        mask = torch.zeros(M, N, dtype=torch.bool).scatter_(1, random_matrix(M, N, seed=3).argsort(1)[:, :7], True)
        part = quantize(pack_values(random_matrix(M, N), mask), bits, group)
        parts |= {"weight": part, "mask": mask}
        dense[mask] = part.dequantize().flatten()
    elif sparse != "none":
        shape = {"rows": (4, N), "columns": (M, 5), "full": (M, N)}[sparse]
        part = parts["weight"] = quantize(random_matrix(*shape), bits, group)
        dense[: part.shape[0], : part.shape[1]] = part.dequantize()
    if beside in ("lowrank", "pivoted"):
        factors, product = quantized_factors(rows, columns, bits, group, pivoted=beside == "pivoted")
        parts |= factors
        dense[M - rows :, N - columns :] += product
    if beside == "binary":
        signs = random_matrix(M, N, seed=4) > 0
        scale_in, scale_out = random_matrix(1, N, seed=5).abs(), random_matrix(M, 1, seed=6).abs()
        parts |= {"signs": signs, "scale_in": scale_in, "scale_out": scale_out}
        dense += torch.where(signs, 1.0, -1.0) * (scale_out @ scale_in)
    return SparseLowRankLinear.from_parts(N, M, **parts, bias=random_matrix(M, seed=7), dtype=dtype), dense


def quantized_factors(rows: int, columns: int, bits: int, group: int, pivoted: bool) -> tuple[dict, torch.Tensor]:
    """Build quantized factors of rank 3, and the matrix (rows, columns) that they stand for."""
    a, b, pivots = random_matrix(3, columns, seed=1), random_matrix(rows, 3, seed=2), None
    if pivoted:
        a, b, pivots = pivot(a, b)
    quantized_a, quantized_b = quantize(a, bits, group), quantize(b, bits, group)
    full_b = quantized_b.dequantize()
    if pivots is not None:  # the rows at the pivots are those of the identity, and are not stored
        full_b = torch.zeros(rows, 3, dtype=torch.float64)
        full_b[pivots] = torch.eye(3, dtype=torch.float64)
        full_b[~pivots] = quantized_b.dequantize()
    factors = {"lowrank_a": quantized_a, "lowrank_b": quantized_b, "pivots": pivots}
    return factors, full_b @ quantized_a.dequantize()


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("combination", COMBINATIONS)
def test_the_layer_computes_with_its_dequantized_parts(combination, bits):
    layer, dense = layer_of(combination, bits)
    x = random_matrix(2, 3, N, seed=8)
    torch.testing.assert_close(layer.to_dense(), dense)
    torch.testing.assert_close(layer(x), nn.functional.linear(x, dense, layer.bias))


@pytest.mark.parametrize("combination", COMBINATIONS)
def test_every_stored_bit_is_counted(combination):
    for bits in BITS:
        layer, _ = layer_of(combination, bits, dtype=torch.bfloat16)
        assert layer.stored_bits() == sum(tensor.nbytes * 8 for tensor in layer.state_dict().values())


@pytest.mark.parametrize("group", [0, -1, 2**31, 2**63 - 1, 2**63, 10**40, 8.0, True, "8"])
def test_a_group_that_no_kernel_can_count_is_refused(group):
    """A group may be longer than a row, but no sum of sizes may overflow."""
    LayerSpec(sparse="full", weight_bits=4, weight_group=2**31 - 1).validate("layer", 8, 8)
    with pytest.raises(CheckpointError, match="weight_group is .* expected 1 to 2147483647"):
        LayerSpec(sparse="full", weight_bits=4, weight_group=group).validate("layer", 8, 8)


def test_the_bits_of_a_whole_matrix_are_those_of_codes_and_scales():
    spec = LayerSpec(sparse="full", weight_bits=4, weight_group=32)
    assert spec.stored_bits(256, 704, 16) == 256 * 704 * 4 + 256 * 22 * 16
    assert spec.tensors(256, 704) == {"weight": ((256, 352, 1), "uint8"), "weight_scale": ((256, 22), "float")}


@pytest.mark.parametrize("combination", COMBINATIONS)
def test_gradients_reach_input_scales_and_bias(combination):
    layer, _ = layer_of(combination)
    names, values = zip(*layer.named_parameters(), strict=True)
    assert any(name.endswith("_scale") for name in names)
    assert "bias" in names
    x = random_matrix(3, N, seed=9).requires_grad_()

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
    assert half(random_matrix(2, N).bfloat16()).dtype == torch.bfloat16


@pytest.mark.parametrize("combination", COMBINATIONS)
def test_a_layer_compiles_copies_and_is_built_on_meta(combination):
    torch.compiler.reset()
    layer, _ = layer_of(combination, bits=3, dtype=torch.float32)
    x = random_matrix(3, N).float()
    torch.testing.assert_close(torch.compile(layer, fullgraph=True, backend="aot_eager")(x), layer(x))
    assert torch.equal(copy.deepcopy(layer)(x), layer(x))
    skeleton = build_layer(layer.spec, N, M, device="meta", dtype=torch.float32)
    assert shapes_of(skeleton) == shapes_of(layer)
    skeleton.load_state_dict(layer.state_dict(), assign=True)
    assert torch.equal(skeleton(x), layer(x))


def test_a_fresh_layer_is_valid_and_of_the_usual_scale():
    quantization = {"weight_bits": 4, "weight_group": 4, "lowrank_bits": 8, "lowrank_group": 4}
    layer = build_layer(LayerSpec(sparse="bitmask", kept=8, rank=3, pivoted=True, **quantization), N, M)
    assert float(layer.to_dense().abs().max()) < 1
    assert bool(layer(torch.ones(1, N)).isfinite().all())


def test_a_pivoted_part_of_full_rank_has_no_other_rows():
    a, b, pivots = pivot(random_matrix(6, 9), torch.eye(6, dtype=torch.float64))
    factors = {"lowrank_a": quantize(a, 8, 4), "lowrank_b": quantize(b, 8, 4)}
    layer = SparseLowRankLinear.from_parts(9, 6, **factors, pivots=pivots)
    x = random_matrix(2, 9)
    torch.testing.assert_close(layer(x), x @ quantize(a, 8, 4).dequantize().T)
    layer(x).sum().backward()
    assert layer.lowrank_b_scale.grad.shape == (0, 2)


def test_a_kernel_is_asked_first_and_may_decline():
    layer, _ = layer_of("full")
    x, asked = random_matrix(2, N), []

    def declines(x, codes, scale, mask, bits, group, kept):
        asked.append((bits, group, kept, mask))

    expected = layer(x)
    register_kernel("quantized_linear", "cpu", "test", declines)
    assert torch.equal(layer(x), expected)
    assert asked == [(4, 8, N, None)]


def test_a_mask_and_its_quantized_values_belong_together():
    mask = torch.zeros(M, N, dtype=torch.bool)
    mask[:, :6] = True
    with pytest.raises(CompressionError, match="quantized values for a mask"):
        SparseLowRankLinear.from_parts(N, M, sparse="bitmask", weight=quantize(random_matrix(M, 7), 4, 8), mask=mask)
    mask[0, 6] = True
    with pytest.raises(CompressionError, match="the same number in every row"):
        SparseLowRankLinear.from_parts(N, M, sparse="bitmask", weight=quantize(random_matrix(M, 6), 4, 8), mask=mask)


def test_both_factors_are_quantized_alike():
    with pytest.raises(CompressionError, match="alike"):
        SparseLowRankLinear.from_parts(
            N, M, lowrank_a=quantize(random_matrix(3, N), 4, 8), lowrank_b=random_matrix(M, 3)
        )


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
