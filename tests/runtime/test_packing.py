"""Packing bits and kept values loses nothing at any width, pads with zeros, and has the documented bit order."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from hf_lowrank import CheckpointError
from hf_lowrank.runtime.packing import (
    pack_bits,
    pack_values,
    packed_width,
    signs_to_values,
    unpack_bits,
    unpack_values,
)

shapes = st.tuples(st.integers(0, 5), st.integers(0, 40))


def random_bits(shape: tuple[int, ...], seed: int) -> Tensor:
    return torch.rand(shape, generator=torch.Generator().manual_seed(seed)) < 0.5


@given(shape=shapes, seed=st.integers(0, 99))
def test_unpacking_inverts_packing(shape: tuple[int, int], seed: int) -> None:
    bits = random_bits(shape, seed)
    packed = pack_bits(bits)
    assert packed.dtype == torch.uint8
    assert packed.shape == (shape[0], packed_width(shape[1]))
    assert torch.equal(unpack_bits(packed, shape[1]), bits)


@given(shape=shapes, seed=st.integers(0, 99))
def test_packing_is_numpys_little_endian_bit_order(shape: tuple[int, int], seed: int) -> None:
    bits = random_bits(shape, seed)
    assert pack_bits(bits).numpy().tobytes() == np.packbits(bits.numpy(), axis=-1, bitorder="little").tobytes()


@given(columns=st.integers(1, 40))
def test_padding_bits_are_zero(columns: int) -> None:
    packed = pack_bits(torch.ones(2, columns, dtype=torch.bool))
    assert not unpack_bits(packed, packed_width(columns) * 8)[:, columns:].any()


def test_bytes_by_hand() -> None:
    bits = torch.zeros(2, 11, dtype=torch.bool)
    bits[0, [0, 3, 8]] = True
    bits[1, [7, 9, 10]] = True
    assert pack_bits(bits).tolist() == [[0b0000_1001, 0b0000_0001], [0b1000_0000, 0b0000_0110]]


def test_leading_dimensions_are_free() -> None:
    bits = random_bits((2, 3, 4, 13), seed=0)
    assert torch.equal(unpack_bits(pack_bits(bits), 13), bits)


@given(
    rows=st.integers(1, 5),
    columns=st.integers(1, 20),
    share=st.floats(0, 1),
    seed=st.integers(0, 99),
    dtype=st.sampled_from([torch.float64, torch.float32, torch.bfloat16, torch.float16]),
)
def test_kept_values_come_back_where_they_were(
    rows: int, columns: int, share: float, seed: int, dtype: torch.dtype
) -> None:
    generator = torch.Generator().manual_seed(seed)
    dense = torch.randn(rows, columns, generator=generator).to(dtype)
    kept = round(share * columns)
    order = torch.rand(rows, columns, generator=generator).argsort(dim=1)
    mask = torch.zeros(rows, columns, dtype=torch.bool).scatter_(1, order[:, :kept], True)
    values = pack_values(dense, mask)
    assert values.shape == (rows, kept)
    assert torch.equal(unpack_values(values, mask), torch.where(mask, dense, torch.zeros((), dtype=dtype)))


def test_kept_values_are_in_column_order() -> None:
    dense = torch.tensor([[1.0, 2.0, 3.0], [4.0, 5.0, 6.0]])
    mask = torch.tensor([[True, False, True], [False, True, True]])
    assert pack_values(dense, mask).tolist() == [[1.0, 3.0], [5.0, 6.0]]


def test_rows_that_keep_unequal_numbers_are_refused() -> None:
    mask = torch.tensor([[True, True], [True, False]])
    with pytest.raises(CheckpointError, match="between 1 and 2 values per row"):
        pack_values(torch.ones(2, 2), mask)


@given(columns=st.integers(1, 30), seed=st.integers(0, 99))
def test_signs_are_plus_one_where_the_bit_is_set(columns: int, seed: int) -> None:
    bits = random_bits((3, columns), seed)
    signs = signs_to_values(pack_bits(bits), columns, torch.float32)
    assert torch.equal(signs, torch.where(bits, 1.0, -1.0))
