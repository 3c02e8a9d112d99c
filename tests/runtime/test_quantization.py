"""Quantization rounds to the nearest level, and packs every code in the fewest bytes."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

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

from .layer_cases import random_matrix


@settings(deadline=None)
@given(st.sampled_from(BITS), st.integers(0, 9), st.integers(0, 70), st.integers(0, 1000))
def test_packing_keeps_every_code_in_the_fewest_bytes(bits, rows, columns, seed):
    generator = torch.Generator().manual_seed(seed)
    codes = torch.randint(0, 2**bits, (rows, columns), dtype=torch.uint8, generator=generator)
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


def test_quantizing_by_hand():
    part = quantize(torch.tensor([[4.0, -4.0, 1.0, 0.0, 0.0]]), bits=2, group=4)
    assert part.scale.tolist() == [[2.0, 0.0]]
    assert part.codes.tolist()[0][:4] == [3, 0, 2, 2]
    assert part.dequantize().tolist() == [[3.0, -3.0, 1.0, 1.0, 0.0]]


@settings(deadline=None)
@given(st.sampled_from(BITS), st.integers(1, 40), st.integers(1, 50), st.booleans(), st.integers(0, 1000))
def test_rounding_is_to_the_nearest_level(bits, group, columns, search, seed):
    values = random_matrix(5, columns, seed=seed)
    part = quantize(values, bits, group, search)
    assert part.codes.shape == values.shape
    assert part.scale.shape == (5, math.ceil(columns / group))
    scale = spread_scale(part.scale, group, columns)
    every_level = levels(torch.arange(2**bits, dtype=torch.uint8), bits, torch.float64) * scale[..., None]
    nearest = (every_level - values[..., None]).abs().amin(dim=-1)
    torch.testing.assert_close((part.dequantize() - values).abs(), nearest)
    if not search:
        # The error is at most half a step, and what rounding the scale to 8 bits takes off the largest level.
        assert bool(((part.dequantize() - values).abs() <= scale / 2 + 2 ** (bits - 1) * scale / 256).all())


@settings(deadline=None)
@given(st.sampled_from(BITS), st.integers(0, 1000))
def test_a_searched_scale_is_never_worse(bits, seed):
    values = random_matrix(8, 48, seed=seed)
    plain = quantize(values, bits, 16, search=False).dequantize() - values
    searched = quantize(values, bits, 16, search=True).dequantize() - values
    plain_errors = plain.view(8, 3, 16).square().sum(dim=2)  # one for every group of 16
    searched_errors = searched.view(8, 3, 16).square().sum(dim=2)
    assert bool((searched_errors <= plain_errors + 1e-12).all())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_scales_are_exact_in_every_dtype(dtype):
    part = quantize(random_matrix(16, 64), 4, 16)  # scales have 8 bits, as many as bfloat16 keeps
    assert torch.equal(part.scale.to(dtype).double(), part.scale)


@settings(deadline=None)
@given(st.integers(0, 4), st.integers(1, 9), st.integers(0, 30), st.integers(0, 1000))
def test_group_sums_are_the_transpose_of_spreading(rows, group, columns, seed):
    values, scale = (
        random_matrix(rows, columns, seed=seed),
        random_matrix(rows, math.ceil(columns / group), seed=seed + 1),
    )
    torch.testing.assert_close(
        (values * spread_scale(scale, group, columns)).sum(), (group_sums(values, group) * scale).sum()
    )


def test_more_bits_never_hurt():
    values = random_matrix(32, 96)
    errors = [float((quantize(values, bits, 32).dequantize() - values).norm()) for bits in BITS]
    assert errors == sorted(errors, reverse=True)
    assert errors[-1] < 0.01 * float(values.norm())


def test_codes_of_a_group_of_zeros_stand_for_zero():
    zeros = torch.zeros(2, 8)
    assert torch.equal(quantize(zeros, 4, 4, search=True).dequantize(), zeros)
    assert nearest_codes(zeros, torch.zeros(2, 1), 4).dtype == torch.uint8
    assert Quantized(torch.zeros(0, 8, dtype=torch.uint8), torch.zeros(0, 1), 4, 8).dequantize().shape == (0, 8)
