"""The promises of every registered method. A new method is covered by being registered."""

import dataclasses
from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st
from torch import Tensor

from hf_lowrank import CompressionError
from hf_lowrank.budget import Budget, Layer
from hf_lowrank.methods import Decomposition, Method, Statistics, make_method, method_class, registered_methods
from hf_lowrank.runtime.layers import SparseLowRankLinear
from hf_lowrank.runtime.pivoting import unpivot
from hf_lowrank.runtime.quantization import BITS, Quantized

from .problems import VALUE_BITS, budget_of, correlated_tokens, gaussian, problem, relative_error, statistics_of

SHAPES = [(64, 64), (172, 64), (64, 172), (352, 64), (33, 57), (57, 33), (24, 352)]
PARTS = ("weight", "mask", "lowrank_a", "lowrank_b", "pivots", "signs", "scale_in", "scale_out", "bias")


def variants() -> list[tuple[str, dict[str, str | bool]]]:
    """Return every method as it is, with every N:M pattern that it takes, and with every switch turned over."""
    cases: list[tuple[str, dict[str, str | bool]]] = []
    for name in registered_methods():
        cases.append((name, {}))
        for option in dataclasses.fields(make_method(name)):  # type: ignore[arg-type]
            if option.name == "pattern":
                cases += [(name, {"pattern": "2:4"}), (name, {"pattern": "4:8"})]
            elif isinstance(option.default, bool):
                cases.append((name, {option.name: not option.default}))
    return cases


VARIANTS = [
    pytest.param(name, options, id="-".join([name, *map(str, options.values())])) for name, options in variants()
]
CASES = [
    "few tokens",
    "one token",
    "dead channels",
    "no token",
    "zero weight",
    "zero rows",
    "rank one weight",
    "repeated channel",
]
every_variant = pytest.mark.parametrize(("name", "options"), VARIANTS)
every_method = pytest.mark.parametrize("name", registered_methods())


def parts_of(decomposition: Decomposition) -> dict[str, Tensor]:
    """Return every tensor of a decomposition, a quantized part as its codes and scales."""
    parts: dict[str, Tensor] = {}
    for name in PARTS:
        part = getattr(decomposition, name)
        if isinstance(part, Quantized):
            parts |= {f"{name} codes": part.codes, f"{name} scale": part.scale}
        elif part is not None:
            parts[name] = part
    return parts


def values_of(part: Tensor | Quantized | None) -> Tensor:
    assert part is not None
    return part.dequantize() if isinstance(part, Quantized) else part


def dense_of(decomposition: Decomposition, out_features: int, in_features: int) -> Tensor:
    """Return the matrix that the parts stand for, by their definition."""
    d = decomposition
    dense = torch.zeros(out_features, in_features, dtype=torch.float64)
    rows, columns = slice(0, None), slice(0, None)
    if d.sparse == "bitmask":
        assert d.mask is not None
        dense += values_of(d.weight) * d.mask
    elif d.sparse == "full":
        dense += values_of(d.weight)
    elif d.sparse == "rows":
        kept = values_of(d.weight)
        rows = slice(len(kept), None)
        dense[: len(kept)] = kept
    elif d.sparse == "columns":
        kept = values_of(d.weight)
        columns = slice(kept.shape[1], None)
        dense[:, : kept.shape[1]] = kept
    if d.lowrank_a is not None:
        left = values_of(d.lowrank_b)
        dense[rows, columns] += (left if d.pivots is None else unpivot(left, d.pivots)) @ values_of(d.lowrank_a)
    if d.scale_in is not None and d.scale_out is not None and d.signs is not None:
        dense += torch.where(d.signs, 1.0, -1.0) * (d.scale_out @ d.scale_in)
    return dense


def stored_bits(layer: SparseLowRankLinear, accounting: str = "bits") -> int:
    return layer.spec.stored_bits(layer.out_features, layer.in_features, VALUE_BITS, accounting)


def compressed(method: Method, weight: Tensor, statistics: Statistics, budget: Budget) -> SparseLowRankLinear:
    return method.decompose(weight, statistics, budget).to_layer(*weight.shape)


def smallest_budget(method: Method, out_features: int, in_features: int) -> Budget:
    """Return the budget of the smallest layer that the method makes and that says anything about the weight."""
    layer = Layer("layer", 0, 1, "other", out_features, in_features)
    spec = method.min_spec(layer)
    if not (spec.kept or spec.rank or spec.binary_rank):
        spec = method.next_spec(layer, spec)
    return Budget(spec.stored_bits(out_features, in_features, VALUE_BITS), out_features, in_features, VALUE_BITS)


@every_variant
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("accounting", ["bits", "paper"])
def test_budget_is_kept_and_used(
    name: str, options: dict[str, str | bool], shape: tuple[int, int], accounting: str
) -> None:
    """Stored bits never exceed the budget, and less than the price of a rank or of a step is left unused.

    An N:M part, or eight bits for every weight, may be all that a method can use.
    """
    weight, statistics = problem(*shape)
    method = make_method(name, options)
    for ratio in (0.4, 0.55, 0.7):
        budget = budget_of(*shape, ratio, accounting)
        layer = compressed(method, weight, statistics, budget)
        layer.spec.validate(name, *shape)
        stored = stored_bits(layer, accounting)
        assert stored <= budget.bits
        if "pattern" not in options and layer.spec.weight_bits < BITS[-1]:
            step = method.next_spec(Layer("layer", 0, 1, "other", *shape), layer.spec).stored_bits(
                *shape, VALUE_BITS
            ) - stored_bits(layer)
            assert budget.bits - stored < max(sum(shape) * VALUE_BITS, step)


@every_variant
@pytest.mark.parametrize("shape", SHAPES[:5], ids=str)
def test_more_budget_never_hurts(name: str, options: dict[str, str | bool], shape: tuple[int, int]) -> None:
    weight, statistics = problem(*shape, seed=7)
    assert statistics.gram is not None
    method = make_method(name, options)
    errors = []
    for ratio in (0.8, 0.65, 0.5, 0.35):
        layer = compressed(method, weight, statistics, budget_of(*shape, ratio))
        errors.append(relative_error(layer.to_dense(torch.float64), weight, statistics.gram))
    assert errors == sorted(errors, reverse=True)
    assert errors[-1] < 1


@every_variant
def test_same_input_same_bytes(name: str, options: dict[str, str | bool]) -> None:
    weight, statistics = problem(48, 100)
    first, second = (
        parts_of(make_method(name, options).decompose(weight, statistics, budget_of(48, 100, 0.5))) for _ in range(2)
    )
    assert first.keys() == second.keys()
    for part in first:
        assert torch.equal(first[part], second[part]), part


@every_variant
def test_inputs_are_left_alone(name: str, options: dict[str, str | bool]) -> None:
    weight, statistics = problem(40, 48)
    copies = {field.name: getattr(statistics, field.name) for field in dataclasses.fields(statistics)}
    copies = {field: value.clone() for field, value in copies.items() if isinstance(value, Tensor)}
    weight_copy = weight.clone()
    make_method(name, options).decompose(weight, statistics, budget_of(40, 48, 0.5))
    assert torch.equal(weight, weight_copy)
    for field, value in copies.items():
        assert torch.equal(getattr(statistics, field), value), field


@every_variant
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_layer_is_its_parts(name: str, options: dict[str, str | bool], shape: tuple[int, int]) -> None:
    weight, statistics = problem(*shape)
    decomposition = make_method(name, options).decompose(weight, statistics, budget_of(*shape, 0.5))
    layer = decomposition.to_layer(*shape)
    expected = dense_of(decomposition, *shape)
    torch.testing.assert_close(layer.to_dense(torch.float64), expected, rtol=1e-12, atol=1e-12)
    x = gaussian(3, shape[1], seed=9)
    bias = 0.0 if layer.bias is None else layer.bias
    torch.testing.assert_close(layer(x), x @ expected.T + bias, rtol=1e-10, atol=1e-10)


@every_variant
@pytest.mark.parametrize("factor", [2.0**-40, 2.0**40])
def test_scales_do_not_matter(name: str, options: dict[str, str | bool], factor: float) -> None:
    """A factor of the weight is a factor of the result, and a common factor of all inputs changes nothing."""
    weight, x = gaussian(40, 56, seed=1), correlated_tokens(200, 56)
    method, budget = make_method(name, options), budget_of(40, 56, 0.5)
    plain = compressed(method, weight, statistics_of(x), budget).to_dense(torch.float64)
    large_weight = compressed(method, weight * factor, statistics_of(x), budget).to_dense(torch.float64)
    large_inputs = compressed(method, weight, statistics_of(x * factor), budget).to_dense(torch.float64)
    torch.testing.assert_close(large_weight / factor, plain, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(large_inputs, plain, rtol=1e-6, atol=1e-6)


@every_variant
@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("shape", [(40, 48), (24, 65)], ids=str)
def test_degenerate_input_gives_finite_output(
    name: str, options: dict[str, str | bool], case: str, shape: tuple[int, int]
) -> None:
    m, n = shape
    weight, x = gaussian(m, n, seed=2), correlated_tokens(4 * n, n)
    if case == "few tokens":
        x = x[: n // 4]
    elif case == "one token":
        x = x[:1]
    elif case == "dead channels":
        x[:, ::3] = 0
    elif case == "no token":
        x = torch.zeros_like(x)
    elif case == "zero weight":
        weight = torch.zeros_like(weight)
    elif case == "zero rows":
        weight[::3] = 0
    elif case == "rank one weight":
        weight = torch.outer(weight[:, 0], weight[0])
    elif case == "repeated channel":
        x[:, 1::2] = x[:, 0:1]
    statistics = statistics_of(x, squared_gradients=x.square().mean(dim=0))
    decomposition = make_method(name, options).decompose(weight, statistics, budget_of(m, n, 0.5))
    for part, value in parts_of(decomposition).items():
        assert bool(torch.isfinite(value.double()).all()), part
    layer = decomposition.to_layer(m, n, dtype=torch.bfloat16)
    dense = layer.to_dense(torch.float64).detach()
    assert bool(torch.isfinite(dense).all())
    if case == "zero weight":
        assert float(dense.abs().max()) <= 1e-12


@every_variant
@hypothesis_settings(max_examples=20, deadline=None)
@given(data=st.data())
def test_any_layer_gives_a_legal_result_or_an_error(
    name: str, options: dict[str, str | bool], data: st.DataObject
) -> None:
    """For any shape, budget, number of tokens and scale the result is within the budget and finite, or an error."""
    m, n = data.draw(st.integers(1, 40), label="m"), data.draw(st.integers(1, 40), label="n")
    ratio = data.draw(st.floats(0.01, 0.99), label="ratio")
    tokens = data.draw(st.integers(1, 80), label="tokens")
    seed = data.draw(st.integers(0, 1000), label="seed")
    weight_scale, input_scale = (
        10.0 ** data.draw(st.integers(-12, 12), label=label) for label in ("weight scale", "input scale")
    )
    x = correlated_tokens(tokens, n, seed) * input_scale
    x = x * (torch.rand(n, generator=torch.Generator().manual_seed(seed)) < data.draw(st.floats(0, 1), label="alive"))
    budget = budget_of(m, n, ratio)
    try:
        decomposition = make_method(name, options).decompose(
            gaussian(m, n, seed=seed) * weight_scale, statistics_of(x), budget
        )
    except CompressionError:
        return
    layer = decomposition.to_layer(m, n, dtype=torch.float32)
    layer.spec.validate(name, m, n)
    assert stored_bits(layer) <= budget.bits
    assert bool(torch.isfinite(layer.to_dense()).all())


@every_method
@pytest.mark.parametrize("shape", [(64, 64), (33, 57), (57, 33)], ids=str)
def test_smallest_budget_is_enough_and_less_is_an_error(name: str, shape: tuple[int, int]) -> None:
    weight, statistics = problem(*shape)
    method = make_method(name)
    smallest = smallest_budget(method, *shape)
    assert stored_bits(compressed(method, weight, statistics, smallest)) <= smallest.bits
    for bits in (0, smallest.bits // 4):
        with pytest.raises(CompressionError, match=name) as raised:
            method.decompose(weight, statistics, replace(smallest, bits=bits))
        assert str(bits) in str(raised.value)
        assert "\n" not in str(raised.value)


@every_method
def test_growth_is_monotone_and_bounded(name: str) -> None:
    """Each step of `next_spec` costs bits, and `max_steps` of them end below twice the dense layer.

    So budgets can be spread in steps.
    """
    m, n = 48, 100
    method, layer = make_method(name), Layer("layer", 0, 1, "other", 48, 100)
    spec = method.min_spec(layer)
    for _ in range(method.max_steps(layer)):
        larger = method.next_spec(layer, spec)
        assert larger.stored_bits(m, n, VALUE_BITS) > spec.stored_bits(m, n, VALUE_BITS)
        spec = larger
    spec.validate(name, m, n)
    assert spec.stored_bits(m, n, VALUE_BITS) < 2 * m * n * VALUE_BITS


@every_method
def test_what_a_method_needs_and_lacks_is_an_error(name: str) -> None:
    weight, statistics = problem(40, 48)
    method = make_method(name)
    bare = replace(statistics, gram=None, squared_gradients=None, compressed_input_gram=None, cross_gram=None)
    if method.needs_gram or method.needs_gradients or method.needs_compressed_inputs:
        with pytest.raises(CompressionError, match=name):
            method.decompose(weight, bare, budget_of(40, 48, 0.5))
    else:
        method.decompose(weight, bare, budget_of(40, 48, 0.5))


@every_method
def test_every_option_is_described(name: str) -> None:
    cls = method_class(name)
    assert cls.__doc__
    assert cls.source
    for option in dataclasses.fields(cls):  # type: ignore[arg-type]
        assert option.metadata.get("help"), f"{name}.{option.name}"
        assert option.default is not dataclasses.MISSING, f"{name}.{option.name}"


@every_method
def test_statistics_are_selected_as_tokens_are(name: str) -> None:
    """Statistics of selected inputs are the selected statistics, so a method may be given a part of the columns."""
    weight, x = gaussian(40, 48, seed=3), correlated_tokens(200, 48)
    order = torch.randperm(48, generator=torch.Generator().manual_seed(0))[:33]
    compressed_inputs = correlated_tokens(200, 48, seed=50)
    gradients = x.square().mean(dim=0)
    selected = statistics_of(x, compressed_inputs, gradients).select(order)
    direct = statistics_of(x[:, order], compressed_inputs[:, order], gradients[order])
    method, budget = make_method(name), budget_of(40, 33, 0.5)
    first, second = (
        compressed(method, weight[:, order], given, budget).to_dense(torch.float64) for given in (selected, direct)
    )
    torch.testing.assert_close(first, second, rtol=1e-6, atol=1e-6)
