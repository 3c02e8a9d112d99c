"""Laws of the CPU kernels alone: they do not depend on threads, forks and callers, and the library may be missing."""

import multiprocessing
import warnings
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch
from torch import Tensor

from hf_lowrank import kernels
from hf_lowrank.kernels import cpu
from hf_lowrank.kernels.cpu import native, products
from hf_lowrank.runtime import ops, packing

from .back_ends import instruction_sets
from .layers import FORMS, operation_of, random_layer

pytestmark = pytest.mark.skipif(native.library_path() is None, reason="the C++ library is not built")


def multiplied(form: str, x: Tensor, *arguments: Any) -> Tensor:
    y = products.KERNELS[operation_of(form)](x, *arguments)
    assert y is not None
    return y


@pytest.fixture(params=instruction_sets())
def instruction_set(request: pytest.FixtureRequest) -> Iterator[str]:
    with native.forced_instruction_set(request.param):
        yield request.param


@pytest.mark.parametrize("form", ["bitmask_linear", "bitmask_binary_linear"])
def test_few_values_side_by_side_and_infinite_neighbours(instruction_set: str, form: str) -> None:
    layer = random_layer(70, 320, 75, torch.bfloat16)
    columns = torch.arange(320).expand(70, -1)
    # Four rows of five have their values side by side, so that 64 columns are full of them. The fifth row has them
    # everywhere, and they are infinite.
    infinite = torch.arange(70) % 5 == 4
    mask = torch.where(infinite[:, None], (columns % 4 == 1) & (columns < 300), (columns >= 100) & (columns < 175))
    layer.weight_mask.copy_(packing.pack_bits(mask))
    layer.weight[infinite] = float("inf")
    x = torch.rand(1, 320, generator=torch.Generator().manual_seed(1)).bfloat16() + 1
    y = multiplied(form, x, *layer.arguments(form))
    expected = (x.double() @ layer.dense(form)[0].T).bfloat16()
    torch.testing.assert_close(y[:, ~infinite], expected[:, ~infinite], rtol=2**-7, atol=2**-10)
    assert not bool(y[:, infinite].isfinite().any())


@pytest.mark.parametrize("kept", [150, 480, 900])
@pytest.mark.parametrize("tokens", [1, 2, 7, 9, 32])
def test_values_and_signs_of_wide_rows_agree_with_the_oracle(instruction_set: str, tokens: int, kept: int) -> None:
    """Columns fill several tiles and a part of one, rows several blocks. Few, half or most columns have values."""
    layer = random_layer(131, 1100, kept, torch.bfloat16)
    x = torch.randn(tokens, 1100, generator=torch.Generator().manual_seed(1)).bfloat16()
    y = multiplied("bitmask_binary_linear", x, *layer.arguments("bitmask_binary_linear"))
    dense, magnitudes = layer.dense("bitmask_binary_linear")
    # Each entry is rounded once, and so is the result.
    assert bool(
        (
            (y.double() - x.double() @ dense.T).abs()
            <= 2**-8 * (y.double().abs() + x.double().abs() @ magnitudes.T / 2)
        ).all()
    )


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
