"""Laws of every back end.

Results agree with the float64 oracle, infinities come out as in a dense layer, and shapes and strides are treated as
in `nn.functional.linear`.
"""

import math
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from itertools import permutations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from hf_lowrank.kernels.cpu import products as cpp
from hf_lowrank.runtime import ops, plain_ops

from .back_ends import DTYPES, NAMES, BackEnd, in_use
from .layers import FACTORED, FORMS, TRANSPOSED, operation_of, random_layer


@contextmanager
def small_tiles() -> Iterator[None]:
    """Have many tokens multiplied by several tiles of a matrix."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(cpp, "TILE_BYTES", 1 << 12)
        patch.setattr(plain_ops, "TILE_ELEMENTS", 1 << 8)
        yield


@pytest.fixture(params=NAMES)
def back_end(request: pytest.FixtureRequest) -> Iterator[BackEnd]:
    with in_use(request.param) as used:
        yield used


def tolerance(y: Tensor, x: Tensor, magnitudes: Tensor, rounded: bool, factored: bool = False) -> Tensor:
    """Return the largest error that is accepted.

    It is twice the rounding error of the result's dtype plus the error of float32 sums, with `rounded` the rounding
    errors of the matrix's entries, and with `factored` that of A x, which has 16 bits where the result has fewer.
    """
    rounding = torch.finfo(y.dtype).eps / 2
    of_products = 2**-17 if factored and y.dtype != torch.float32 else 2**-20
    of_entries = rounding if rounded else 0
    of_sums = x.double().abs() @ magnitudes.T * (of_entries + of_products)
    return 2 * rounding * y.double().abs() + of_sums + torch.finfo(y.dtype).tiny


@pytest.mark.parametrize("name", NAMES)
@settings(max_examples=30, deadline=None)
@given(
    data=st.data(),
    density=st.floats(0, 1),
    binary_rank=st.integers(1, 3),
    dtype=st.sampled_from(DTYPES),
    bits=st.integers(2, 8),
    group=st.sampled_from([3, 8, 32, 64, 96, 1000]),
    form=st.sampled_from(FORMS),
)
def test_every_kernel_agrees_with_the_float64_oracle(
    name: str,
    data: st.DataObject,
    density: float,
    binary_rank: int,
    dtype: torch.dtype,
    bits: int,
    group: int,
    form: str,
) -> None:
    with in_use(name) as back_end, small_tiles():
        rows, columns, tokens = (data.draw(st.integers(1, most)) for most in back_end.largest)
        layer = random_layer(rows, columns, round(density * columns), dtype, binary_rank, bits=bits, group=group)
        x = torch.randn(tokens, columns, generator=torch.Generator().manual_seed(1)).to(dtype)
        y = back_end.kernel(form, x, layer)
    assert (y is not None) == back_end.takes(form, tokens)
    if y is not None:
        dense, magnitudes = layer.dense(form)
        error = (y.double() - x.double() @ dense.T).abs()
        accepted = tolerance(y, x, magnitudes, back_end.rounds(form, tokens), form in FACTORED)
        assert y.dtype == dtype and bool((error <= accepted).all())


@pytest.mark.parametrize("name", NAMES)
@settings(max_examples=15, deadline=None)
@given(
    data=st.data(), density=st.floats(0, 1), dtype=st.sampled_from(DTYPES), form=st.sampled_from(sorted(TRANSPOSED))
)
def test_gradients_agree_with_the_float64_oracle(
    name: str, data: st.DataObject, density: float, dtype: torch.dtype, form: str
) -> None:
    with in_use(name) as back_end, small_tiles():
        rows, columns, tokens = (data.draw(st.integers(1, most)) for most in back_end.largest)
        layer = random_layer(rows, columns, round(density * columns), dtype)
        grad = torch.randn(tokens, rows, generator=torch.Generator().manual_seed(1)).to(dtype)
        further = (columns,) if form == "bitmask_linear" or form.startswith("quantized") else ()
        result = back_end.gradient(TRANSPOSED[form], grad, *layer.arguments(form), *further)
    dense, magnitudes = layer.dense(form)
    assert result.dtype == dtype
    error = (result.double() - grad.double() @ dense).abs()
    assert bool((error <= 2 * tolerance(result, grad, magnitudes.T, rounded=True)).all())


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize(("dtype", "x_dtype"), permutations(DTYPES, 2))
def test_input_and_weights_may_differ_in_dtype(
    back_end: BackEnd, form: str, dtype: torch.dtype, x_dtype: torch.dtype
) -> None:
    layer = random_layer(9, 77, 30, dtype)
    x = torch.randn(2, 77, generator=torch.Generator().manual_seed(1)).to(x_dtype)
    y = back_end.kernel(form, x, layer)
    dense, magnitudes = layer.dense(form)
    assert y is not None and y.dtype == x_dtype
    assert bool(((y.double() - x.double() @ dense.T).abs() <= tolerance(y, x, magnitudes, rounded=False)).all())


@pytest.mark.parametrize("form", [form for form in FORMS if form not in ("pivoted_linear", "quantized_linear")])
def test_rows_and_columns_without_values_contribute_nothing(back_end: BackEnd, form: str) -> None:
    layer = random_layer(10, 50, 0, torch.bfloat16)
    layer.scale_out[3], layer.scale_in[:, 7], layer.lowrank_b[3], layer.lowrank_a[:, 7] = 0, 0, 0, 0
    x = torch.ones(2, 50, dtype=torch.bfloat16)
    y, moved = back_end.kernel(form, x, layer), back_end.kernel(form, x.index_fill(1, torch.tensor([7]), 5), layer)
    assert y is not None and moved is not None
    assert bool((y[:, 3] == 0).all()) and torch.equal(y, moved)


@pytest.mark.parametrize(
    ("tokens", "value"), [(1, math.inf), (1, math.nan), (5, -math.inf), (40, math.inf), (40, math.nan)]
)
@pytest.mark.parametrize("form", FORMS)
def test_infinities_and_nans_come_out_as_dense_gives_them(
    back_end: BackEnd, form: str, value: float, tokens: int
) -> None:
    layer = random_layer(12, 64, 20, torch.float32, rank=2)
    x = torch.randn(tokens, 64)
    x[tokens // 2, 11] = value
    y = back_end.declared(form, x, layer)
    if form in FACTORED:
        dense = getattr(ops, f"plain_{form}")(x, *layer.arguments(form))
    else:
        dense = torch.nn.functional.linear(x, layer.dense(form)[0].float())
    torch.testing.assert_close(y, dense, rtol=1e-4, atol=1e-4, equal_nan=True)


@pytest.mark.parametrize("form", FORMS)
def test_leading_dimensions_zero_tokens_and_strides_are_those_of_linear(back_end: BackEnd, form: str) -> None:
    layer = random_layer(9, 33, 10, torch.float32)
    x = torch.randn(2, 3, 33)
    together = back_end.declared(form, x, layer)
    apart = torch.stack([back_end.declared(form, token, layer) for token in x.flatten(0, 1)]).view(2, 3, -1)
    torch.testing.assert_close(together, apart)
    assert back_end.declared(form, x[:0], layer).shape == (0, 3, together.shape[-1])
    torch.testing.assert_close(back_end.declared(form, x.transpose(0, 1), layer), together.transpose(0, 1))


@pytest.mark.parametrize("form", FORMS)
def test_a_result_is_no_view_of_another_tensor(back_end: BackEnd, form: str) -> None:
    """Torch forbids to change a view in place that was made while gradients were recorded."""
    layer = random_layer(9, 33, 10, torch.float32)
    arguments = back_end.placed(*layer.arguments(form))
    further = (33,) if form == "bitmask_linear" or form.startswith("quantized") else ()
    for shape in ((), (1,), (2, 3), (2, 17)):
        for columns, operation, others in ((33, operation_of(form), ()), (9, TRANSPOSED.get(form), further)):
            if operation is None:
                continue
            (x,) = back_end.placed(torch.randn(*shape, columns))
            for with_tiles in (nullcontext, small_tiles):
                with with_tiles():
                    result = back_end.kernels[operation](x, *arguments, *others)
                assert result is None or result._base is None, (operation, shape)


@pytest.mark.parametrize("change", ["float64", "strided"])
def test_what_a_kernel_cannot_read_is_left_to_torch(back_end: BackEnd, change: str) -> None:
    layer = random_layer(12, 40, 10, torch.float32)
    layer.weight = layer.weight.double() if change == "float64" else layer.weight.t().contiguous().t()
    assert back_end.kernel("bitmask_linear", torch.randn(1, 40), layer) is None
