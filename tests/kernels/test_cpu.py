"""Laws of the CPU kernels: the float64 oracle, dense behaviour on infinities, independence of threads, forks and callers."""

import multiprocessing
import warnings
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from hf_lowrank import kernels
from hf_lowrank.kernels import cpu
from hf_lowrank.kernels.cpu import native, products
from hf_lowrank.runtime import ops, packing, quantized_ops

from .layers import FACTORED, FORMS, TRANSPOSED, operation_of, random_layer

pytestmark = pytest.mark.skipif(native.library_path() is None, reason="the C++ library is not built")
DTYPES = (torch.bfloat16, torch.float16, torch.float32)


def kernel(form: str) -> Callable[..., Tensor | None]:
    return products.KERNELS[operation_of(form)]


def declared(form: str) -> Callable[..., Tensor]:
    return getattr(quantized_ops if form.startswith("quantized") else ops, operation_of(form))


def multiplied(form: str, x: Tensor, *arguments: Any) -> Tensor:
    y = kernel(form)(x, *arguments)
    assert y is not None
    return y


def available() -> tuple[str, ...]:
    if native.library_path() is None:
        return ()
    return native.INSTRUCTION_SETS[: native.INSTRUCTION_SETS.index(native.best_instruction_set()) + 1]


@pytest.fixture(params=available())
def instruction_set(request: pytest.FixtureRequest) -> Iterator[str]:
    with native.forced_instruction_set(request.param):
        yield request.param


def tolerance(y: Tensor, x: Tensor, magnitudes: Tensor, tiled: bool) -> Tensor:
    """Twice the rounding error of the result's dtype, and that of float32 sums; tiles of many tokens round their entries too."""
    rounding = torch.finfo(y.dtype).eps / 2
    of_sums = x.double().abs() @ magnitudes.T * (rounding if tiled else 0) + x.double().abs() @ magnitudes.T * 2**-20
    return 2 * rounding * y.double().abs() + of_sums + torch.finfo(y.dtype).tiny


@settings(max_examples=60, deadline=None)
@given(
    rows=st.integers(1, 150),
    columns=st.integers(1, 300),
    density=st.floats(0, 1),
    binary_rank=st.integers(1, 3),
    tokens=st.integers(1, 40),
    dtype=st.sampled_from(DTYPES),
    bits=st.integers(2, 8),
    group=st.sampled_from([3, 8, 64, 1000]),
    form=st.sampled_from(FORMS),
    name=st.sampled_from(available() or ("portable",)),
)
def test_every_kernel_agrees_with_the_float64_oracle(
    rows: int, columns: int, density: float, binary_rank: int, tokens: int, dtype: torch.dtype, bits: int, group: int, form: str, name: str
) -> None:
    layer = random_layer(rows, columns, round(density * columns), dtype, binary_rank, bits=bits, group=group)
    x = torch.randn(tokens, columns, generator=torch.Generator().manual_seed(1)).to(dtype)
    with native.forced_instruction_set(name):
        y = kernel(form)(x, *layer.arguments(form))
    if y is None:
        assert form in FACTORED and tokens > products.FEW_TOKENS
        return
    dense, magnitudes = layer.dense(form)
    error = (y.double() - x.double() @ dense.T).abs()
    assert y.dtype == dtype and bool((error <= tolerance(y, x, magnitudes, tiled=tokens > products.FEW_TOKENS)).all())


@settings(max_examples=40, deadline=None)
@given(
    rows=st.integers(1, 150),
    columns=st.integers(1, 300),
    density=st.floats(0, 1),
    tokens=st.integers(1, 40),
    dtype=st.sampled_from(DTYPES),
    form=st.sampled_from(sorted(TRANSPOSED)),
    name=st.sampled_from(available() or ("portable",)),
)
def test_gradients_agree_with_the_float64_oracle(
    rows: int, columns: int, density: float, tokens: int, dtype: torch.dtype, form: str, name: str
) -> None:
    layer = random_layer(rows, columns, round(density * columns), dtype)
    grad = torch.randn(tokens, rows, generator=torch.Generator().manual_seed(1)).to(dtype)
    further = (columns,) if form == "bitmask_linear" or form.startswith("quantized") else ()
    with native.forced_instruction_set(name), pytest.MonkeyPatch.context() as patch:
        patch.setattr(products, "TILE_BYTES", 40 * columns)
        result = products.KERNELS[TRANSPOSED[form]](grad, *layer.arguments(form), *further)
    dense, magnitudes = layer.dense(form)
    assert result is not None and result.dtype == dtype
    error = (result.double() - grad.double() @ dense).abs()
    assert bool((error <= 2 * tolerance(result, grad, magnitudes.T, tiled=True)).all())


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("x_dtype", DTYPES)
@pytest.mark.parametrize("dtype", DTYPES)
def test_input_and_weights_may_differ_in_dtype(instruction_set: str, form: str, dtype: torch.dtype, x_dtype: torch.dtype) -> None:
    layer = random_layer(20, 77, 30, dtype)
    x = torch.randn(3, 77, generator=torch.Generator().manual_seed(1)).to(x_dtype)
    y = multiplied(form, x, *layer.arguments(form))
    dense, magnitudes = layer.dense(form)
    assert y.dtype == x_dtype
    assert bool(((y.double() - x.double() @ dense.T).abs() <= tolerance(y, x, magnitudes, tiled=False)).all())


@pytest.mark.parametrize("form", [form for form in FORMS if form not in ("pivoted_linear", "quantized_linear")])
def test_rows_and_columns_without_values_contribute_nothing(instruction_set: str, form: str) -> None:
    layer = random_layer(40, 50, 0, torch.bfloat16)
    layer.scale_out[3], layer.scale_in[:, 7], layer.lowrank_b[3], layer.lowrank_a[:, 7] = 0, 0, 0, 0
    x = torch.ones(2, 50, dtype=torch.bfloat16)
    y = multiplied(form, x, *layer.arguments(form))
    moved = x.index_fill(1, torch.tensor([7]), 5)
    assert bool((y[:, 3] == 0).all())
    assert torch.equal(y, multiplied(form, moved, *layer.arguments(form)))


@pytest.mark.parametrize("tokens", [1, 5, 40])
@pytest.mark.parametrize("value", [float("inf"), -float("inf"), float("nan")])
@pytest.mark.parametrize("form", FORMS)
def test_infinities_and_nans_come_out_as_dense_gives_them(instruction_set: str, form: str, value: float, tokens: int) -> None:
    layer = random_layer(30, 64, 20, torch.float32, rank=2)
    x = torch.randn(tokens, 64)
    x[tokens // 2, 11] = value
    y = declared(form)(x, *layer.arguments(form))
    if form in FACTORED:
        dense = getattr(ops, f"plain_{form}")(x, *layer.arguments(form))
    else:
        dense = torch.nn.functional.linear(x, layer.dense(form)[0].float())
    torch.testing.assert_close(y, dense, rtol=1e-4, atol=1e-4, equal_nan=True)


def test_few_values_close_together_and_infinite_neighbours(instruction_set: str) -> None:
    layer = random_layer(70, 320, 75, torch.bfloat16)
    columns = torch.arange(320).expand(70, -1)
    # Four rows of five have their values side by side, 64 columns full of them; the fifth has them everywhere, and they are infinite.
    infinite = torch.arange(70) % 5 == 4
    mask = torch.where(infinite[:, None], columns % 4 == 1, (columns >= 100) & (columns < 175))
    layer.weight_mask.copy_(packing.pack_bits(mask & (mask.cumsum(1) <= 75)))
    layer.weight[infinite] = float("inf")
    x = torch.rand(1, 320, generator=torch.Generator().manual_seed(1)).bfloat16() + 1
    for form in ("bitmask_linear", "bitmask_binary_linear"):
        dense, magnitudes = layer.dense(form)
        finite = ~infinite
        y = multiplied(form, x, *layer.arguments(form))
        error = (y.double() - x.double() @ dense.T)[:, finite].abs()
        assert bool((error <= tolerance(y[:, finite], x, magnitudes[finite], tiled=False)).all())
        assert not bool(y[:, infinite].isfinite().any())


@pytest.mark.parametrize("form", FORMS)
def test_leading_dimensions_zero_tokens_and_strides_are_those_of_linear(instruction_set: str, form: str) -> None:
    arguments = random_layer(9, 33, 10, torch.float32).arguments(form)
    x = torch.randn(2, 3, 33)
    together = declared(form)(x, *arguments)
    apart = torch.stack([declared(form)(token, *arguments) for token in x.flatten(0, 1)]).view(2, 3, -1)
    torch.testing.assert_close(together, apart)
    assert declared(form)(x[:0], *arguments).shape == (0, 3, together.shape[-1])
    strided = x.transpose(0, 1)
    torch.testing.assert_close(declared(form)(strided, *arguments), together.transpose(0, 1))


@pytest.mark.parametrize("tokens", [1, 7, 16])
def test_the_result_does_not_depend_on_the_number_of_threads(instruction_set: str, tokens: int) -> None:
    layer = random_layer(700, 520, 200, torch.bfloat16)
    x = torch.randn(tokens, 520).bfloat16()
    threads = torch.get_num_threads()
    try:
        results = []
        for count in (1, 2, 4):
            torch.set_num_threads(count)
            results.append(multiplied("bitmask_binary_linear", x, *layer.arguments("bitmask_binary_linear")))
    finally:
        torch.set_num_threads(threads)
    assert all(torch.equal(results[0], other) for other in results[1:])


@pytest.mark.parametrize("form", FORMS)
def test_concurrent_callers_get_what_a_single_one_gets(form: str) -> None:
    layer = random_layer(500, 512, 220, torch.bfloat16, rank=64)
    inputs = [torch.randn(1 + i % 16, 512).bfloat16() for i in range(64)]
    alone = [multiplied(form, x, *layer.arguments(form)) for x in inputs]
    with ThreadPoolExecutor(4) as pool:
        together = list(pool.map(lambda x: multiplied(form, x, *layer.arguments(form)), inputs))
    assert all(torch.equal(a, b) for a, b in zip(alone, together, strict=True))


def _in_child(x: Tensor, arguments: tuple[Tensor, ...], queue: "multiprocessing.Queue[list[float]]") -> None:
    queue.put(multiplied("bitmask_binary_linear", x, *arguments).float().flatten().tolist())


def test_a_forked_child_computes_the_same() -> None:
    layer = random_layer(600, 512, 220, torch.bfloat16)
    arguments = layer.arguments("bitmask_binary_linear")
    x = torch.randn(2, 512).bfloat16()
    expected = multiplied("bitmask_binary_linear", x, *arguments)
    context = multiprocessing.get_context("fork")
    queue = context.Queue()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        child = context.Process(target=_in_child, args=(x, arguments, queue))
        child.start()
    result = queue.get(timeout=60)
    child.join(60)
    assert child.exitcode == 0 and result == expected.float().flatten().tolist()


@pytest.mark.parametrize("change", ["float64", "strided"])
def test_what_the_library_cannot_read_is_left_to_torch(change: str) -> None:
    layer = random_layer(12, 40, 10, torch.float32)
    weight, mask = layer.bitmask
    weight = weight.double() if change == "float64" else weight.t().contiguous().t()
    assert products.bitmask_linear(torch.randn(1, 40), weight, mask) is None


def test_pivots_that_are_not_as_many_as_the_rank_are_left_to_torch() -> None:
    layer = random_layer(12, 40, 10, torch.float32)
    a, b, pivots, rows = layer.arguments("pivoted_linear")
    assert products.pivoted_linear(torch.randn(1, 40), a, b, pivots | 0xF, rows) is None


def test_an_unknown_instruction_set_is_refused() -> None:
    with pytest.raises(ValueError, match="'sse9' is not available here"), native.forced_instruction_set("sse9"):
        pass


def test_every_operation_has_a_described_back_end() -> None:
    described = {row.operation: row for row in kernels.describe() if row.device == "cpu"}
    assert set(described) == set(kernels.OPERATIONS)
    assert all(row.name and row.reason for row in described.values())
    assert all("cpp" in ops.registered_kernels(operation, "cpu") for operation in kernels.OPERATIONS)


def test_a_missing_library_means_one_warning_and_plain_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(native, "library_path", lambda: None)
    native.library.cache_clear()
    try:
        with pytest.warns(UserWarning, match="install a C\\+\\+ compiler"):
            cpu.register()
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            cpu.register()
        assert cpu.describe("bitmask_linear")[0] == "torch"
    finally:
        native.library.cache_clear()
