"""Adding a low-rank matrix to a layer is exact and changes nothing else, and the matrix can be taken out again."""

import copy
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load, save
from torch import Tensor

from hf_lowrank import CompressedLinear, CompressionError, LayerSpec, NumericalError
from hf_lowrank.peft.merging import add_lowrank, balanced, remove_lowrank
from hf_lowrank.runtime.content_checks import check_contents
from hf_lowrank.runtime.layers import build_layer
from tests.runtime.layer_cases import layer_cases, random_layer

M, N = 20, 27
QUANTIZED_FACTORS = {"lowrank_bits": 5, "lowrank_group": 8}
QUANTIZED_VALUES = {"weight_bits": 4, "weight_group": 8}
BINARY = {"kind": "sparse_lowrank_binary", "binary_rank": 2}

JOINED = {
    "low rank": LayerSpec(rank=4, bias=True),
    "nothing": LayerSpec(),
    "bitmask": LayerSpec(sparse="bitmask", kept=9),
    "bitmask and low rank": LayerSpec(sparse="bitmask", kept=9, rank=3, bias=True),
    "bitmask and signs": LayerSpec(sparse="bitmask", kept=9, **BINARY),
    "signs and low rank": LayerSpec(rank=2, **BINARY),
    "quantized": LayerSpec(sparse="full", **QUANTIZED_VALUES),
    "quantized bitmask": LayerSpec(sparse="bitmask", kept=9, **QUANTIZED_VALUES, **BINARY),
}
"""Layers whose own factors take the addition."""
BESIDE = {
    "rows": LayerSpec(sparse="rows", kept=6, rank=4, bias=True),
    "columns": LayerSpec(sparse="columns", kept=6, rank=4),
    "columns alone": LayerSpec(sparse="columns", kept=6),
    "quantized rows": LayerSpec(sparse="rows", kept=6, rank=4, **QUANTIZED_VALUES, **QUANTIZED_FACTORS),
    "pivoted": LayerSpec(rank=4, pivoted=True),
    "pivoted and bitmask": LayerSpec(sparse="bitmask", kept=9, rank=4, pivoted=True, bias=True),
    "quantized factors": LayerSpec(rank=4, **QUANTIZED_FACTORS),
    "all quantized": LayerSpec(
        sparse="bitmask", kept=9, rank=4, pivoted=True, **QUANTIZED_VALUES, **QUANTIZED_FACTORS
    ),
    "full rank": LayerSpec(rank=M),
}
"""Layers where the addition is stored beside the factors."""
ALL = JOINED | BESIDE


def layer_of(name: str, dtype: torch.dtype = torch.float32) -> CompressedLinear:
    layer = random_layer(ALL[name], M, N, dtype)
    generator = torch.Generator().manual_seed(3)
    for code in ("weight", "lowrank_a", "lowrank_b"):
        if (codes := getattr(layer, code)) is not None and codes.dtype == torch.uint8:
            codes.copy_(torch.randint(256, codes.shape, dtype=torch.uint8, generator=generator))
    return layer


def product(
    rank: int, dtype: torch.dtype = torch.float32, seed: int = 5, shape: tuple[int, int] = (M, N)
) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    a, b = torch.randn(rank, shape[1], generator=generator), torch.randn(shape[0], rank, generator=generator)
    return a.to(dtype), b.to(dtype)


def state(layer: CompressedLinear) -> dict[str, Tensor]:
    return {name: tensor.clone() for name, tensor in layer.state_dict().items()}


def assert_same_state(found: dict[str, Tensor], wanted: dict[str, Tensor]) -> None:
    assert found.keys() == wanted.keys()
    for name, tensor in wanted.items():
        assert found[name].dtype == tensor.dtype
        assert torch.equal(found[name], tensor), name


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", ALL)
def test_the_matrix_is_the_sum_and_nothing_stored_changes(name: str, dtype: torch.dtype) -> None:
    layer = layer_of(name, dtype)
    before, dense, spec = state(layer), layer.to_dense(torch.float64), layer.spec
    a, b = product(3, dtype)
    add_lowrank(layer, a, b)
    assert layer.spec.rank == spec.rank + 3
    assert layer.spec == replace(spec, rank=spec.rank + 3, adapter_rank=0 if name in JOINED else 3)
    torch.testing.assert_close(layer.to_dense(torch.float64), dense + b.double() @ a.double(), rtol=1e-12, atol=1e-12)
    for stored, tensor in before.items():
        grown = layer.state_dict()[stored]
        assert torch.equal(grown[tuple(slice(side) for side in tensor.shape)], tensor)
        assert grown.shape == tensor.shape or stored in ("lowrank_a", "lowrank_b")
    assert layer.stored_bits() == 8 * sum(tensor.numel() * tensor.itemsize for tensor in layer.state_dict().values())


@pytest.mark.parametrize("name", ALL)
def test_the_output_is_the_sum(name: str) -> None:
    layer = layer_of(name)
    a, b = product(3)
    bias = torch.arange(M, dtype=torch.float32)
    x = torch.randn(5, N, generator=torch.Generator().manual_seed(1))
    wanted = layer(x) + x @ a.T @ b.T + bias
    add_lowrank(layer, a, b, bias)
    torch.testing.assert_close(layer(x), wanted, rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("name", ALL)
def test_removing_gives_the_layer_back_bit_for_bit(name: str) -> None:
    layer = layer_of(name, torch.bfloat16)
    states, specs, additions = [], [], []
    for seed, bias in enumerate((None, torch.ones(M) / 3, torch.ones(M) / 7)):
        states.append(state(layer))
        specs.append(layer.spec)
        additions.append(add_lowrank(layer, *product(seed + 1, seed=seed), bias))
    for before, spec, addition in zip(states[::-1], specs[::-1], additions[::-1], strict=True):
        remove_lowrank(layer, addition)
        assert layer.spec == spec
        assert_same_state(state(layer), before)


@pytest.mark.parametrize("name", ALL)
def test_it_is_an_ordinary_layer_afterwards(name: str) -> None:
    layer = layer_of(name)
    add_lowrank(layer, *product(3), torch.ones(M))
    x = torch.randn(4, N)
    spec = LayerSpec.from_dict(name, layer.spec.to_dict())
    skeleton = build_layer(spec, N, M, device="meta")
    skeleton.load_state_dict(load(save(layer.state_dict())), strict=True, assign=True)
    assert torch.equal(skeleton(x), layer(x))
    assert torch.equal(copy.deepcopy(layer)(x), layer(x))
    y = layer.requires_grad_()(x)
    y.sum().backward()
    assert all(parameter.grad is not None for parameter in layer.parameters())


@pytest.mark.parametrize("name", ALL)
def test_what_it_stores_is_what_a_checkpoint_may_hold(name: str) -> None:
    layer = random_layer(ALL[name], M, N)
    add_lowrank(layer, *product(3))
    layer.spec.validate(name, M, N)
    check_contents(name, layer.spec, M, N, layer.state_dict())


@given(case=layer_cases(max_side=12), rank=st.integers(1, 12), seed=st.integers(0, 99))
@settings(max_examples=60, deadline=None)
def test_any_rank_into_any_layer(case: tuple[LayerSpec, int, int], rank: int, seed: int) -> None:
    spec, m, n = case
    layer = random_layer(spec, m, n, torch.float64, seed)
    before, dense = state(layer), layer.to_dense()
    a, b = product(rank, torch.float64, seed, (m, n))
    if spec.adapter_rank + rank > m + n:
        return
    addition = add_lowrank(layer, a, b)
    assert layer.spec.rank == spec.rank + rank
    torch.testing.assert_close(layer.to_dense(), dense + b @ a, rtol=1e-12, atol=1e-12)
    remove_lowrank(layer, addition)
    assert layer.spec == spec
    assert_same_state(state(layer), before)


@given(st.integers(0, 5), st.integers(1, 6), st.integers(1, 6), st.integers(0, 99), st.floats(-8, 8))
@settings(deadline=None)
def test_balancing_changes_no_digit(rank: int, m: int, n: int, seed: int, decades: float) -> None:
    a, b = product(rank, torch.float64, seed, (m, n))
    b *= 10**decades
    if rank > 1:
        b[:, 1] = 0
    balanced_a, balanced_b = balanced(a, b)
    for term in range(rank):
        assert torch.equal(torch.outer(balanced_b[:, term], balanced_a[term]), torch.outer(b[:, term], a[term]))
    sizes = balanced_a.abs().amax(dim=1) / balanced_b.abs().amax(dim=0)
    assert bool(((sizes >= 0.5) & (sizes <= 2.0) | sizes.isinf()).all())


def test_float16_keeps_the_digits_of_a_young_adapter() -> None:
    layer = layer_of("nothing", torch.float16)
    a, b = product(2)
    b *= 1e-7  # below float16's smallest normal number
    add_lowrank(layer, a, b)
    error = (layer.to_dense(torch.float64) - b.double() @ a.double()).norm() / (b.double() @ a.double()).norm()
    assert error < 1e-3


@pytest.mark.parametrize("broken", [float("nan"), float("inf"), 1e30])
@pytest.mark.parametrize("part", [0, 1, 2])
def test_what_is_not_finite_is_refused(part: int, broken: float) -> None:
    layer = layer_of("low rank", torch.float16)
    before, spec = state(layer), layer.spec
    parts = [*product(3), torch.zeros(M)]
    parts[part].view(-1)[2] = broken
    with pytest.raises(NumericalError, match=r"q_proj: the adapter's .* is not finite in torch.float16"):
        add_lowrank(layer, *parts, name="q_proj")
    assert layer.spec == spec
    assert_same_state(state(layer), before)


def test_more_than_the_format_takes_is_refused() -> None:
    layer = layer_of("rows")
    add_lowrank(layer, *product(M + N))
    with pytest.raises(
        CompressionError,
        match=r"layer: merged adapters of rank 48 in a 20 × 27 layer, expected at most 47; merge fewer",
    ):
        add_lowrank(layer, *product(1))


def test_an_offloaded_layer_is_refused() -> None:
    layer = build_layer(LayerSpec(rank=2), N, M, device="meta")
    with pytest.raises(CompressionError, match="offloaded; open model and adapter without"):
        add_lowrank(layer, *product(1))


def test_frozen_layers_stay_frozen_and_others_train() -> None:
    for trains in (True, False):
        layer = layer_of("bitmask").requires_grad_(trains)
        add_lowrank(layer, *product(3))
        assert {parameter.requires_grad for parameter in layer.parameters()} == {trains}
