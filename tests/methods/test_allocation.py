"""Budgets are never exceeded, used to within one unit, and optimal where that can be enumerated."""

import itertools
import re

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hf_lowrank import CompressionError, LayerSpec
from hf_lowrank.budget import Layer, ModelBudget
from hf_lowrank.methods import make_method, registered_methods
from hf_lowrank.methods.allocation import (
    cheapest_choices,
    fitted_ranks,
    greedy_ranks,
    uniform_budgets,
)
from hf_lowrank.methods.reach import check_reachable

SHAPES = [(64, 64), (32, 64), (172, 64), (64, 172), (352, 128), (128, 352), (48, 96)]
METHODS = [("svd", {}), ("svd-llm", {}), ("slab", {}), ("slab", {"binary_rank": 2})]


def layers_of(shapes: list[tuple[int, int]]) -> list[Layer]:
    return [Layer(f"layers.{i}", i, len(shapes), "other", m, n) for i, (m, n) in enumerate(shapes)]


def budget_of(
    layers: list[Layer], ratio: float, value_bits: int = 16, bias: bool = False, accounting: str = "bits"
) -> ModelBudget:
    return ModelBudget(
        ratio,
        {layer.name: value_bits for layer in layers},
        {layer.name: value_bits * layer.out_features if bias else 0 for layer in layers},
        accounting,
    )


@settings(max_examples=60, deadline=None)
@given(
    shapes=st.lists(st.sampled_from(SHAPES), min_size=1, max_size=8),
    ratio=st.floats(0.05, 0.9),
    method=st.sampled_from(METHODS),
    value_bits=st.sampled_from([16, 32]),
    bias=st.booleans(),
    left_dense=st.integers(0, 2),
)
def test_uniform_budgets_stay_within_one_step_below_the_budget(
    shapes: list[tuple[int, int]], ratio: float, method: tuple[str, dict], value_bits: int, bias: bool, left_dense: int
) -> None:
    layers = layers_of(shapes)
    compressed, dense = layers[left_dense:], layers[:left_dense]
    if not compressed:
        return
    chosen, budget = make_method(*method), budget_of(layers, ratio, value_bits, bias)
    try:
        budgets = uniform_budgets(chosen, compressed, dense, budget)
    except CompressionError:
        return
    available = budget.available(compressed, dense)
    spent = sum(layer_budget.bits for layer_budget in budgets.values())
    assert spent <= available

    def step(layer: Layer) -> int:
        smallest = chosen.min_spec(layer)
        return budget.stored_bits(layer, chosen.next_spec(layer, smallest)) - budget.stored_bits(layer, smallest)

    def is_full(layer: Layer) -> bool:
        smallest = budget.stored_bits(layer, chosen.min_spec(layer))
        return budgets[layer.name].bits >= smallest + step(layer) * chosen.max_steps(layer)

    growable = [step(layer) for layer in compressed if not is_full(layer)]
    assert not growable or available - spent < min(growable)  # no layer could take one more


@settings(max_examples=60, deadline=None)
@given(ratio=st.floats(0.1, 0.8), count=st.integers(1, 12), method=st.sampled_from(METHODS))
def test_layers_of_one_shape_get_budgets_one_step_apart_at_most(
    ratio: float, count: int, method: tuple[str, dict]
) -> None:
    layers = layers_of([(172, 64)] * count)
    chosen, budget = make_method(*method), budget_of(layers, ratio)
    try:
        budgets = uniform_budgets(chosen, layers, [], budget)
    except CompressionError:
        return
    bits = [layer_budget.bits for layer_budget in budgets.values()]
    smallest = chosen.min_spec(layers[0])
    step = budget.stored_bits(layers[0], chosen.next_spec(layers[0], smallest)) - budget.stored_bits(
        layers[0], smallest
    )
    assert max(bits) - min(bits) <= step


@pytest.mark.parametrize("accounting", ["bits", "paper"])
def test_ratios_just_inside_what_the_error_names_are_reachable(accounting: str) -> None:
    layers = layers_of(SHAPES)
    for name, options in METHODS:
        method = make_method(name, options)
        with pytest.raises(CompressionError, match="out of reach") as raised:
            check_reachable(method, layers, [], budget_of(layers, 0.999, accounting=accounting))
        least, most = map(float, re.search(r"remove ([\d.]+) to ([\d.]+)", str(raised.value)).groups())  # type: ignore[union-attr]
        for ratio in (least + 0.001, (least + most) / 2, most - 0.001):
            uniform_budgets(method, layers, [], budget_of(layers, ratio, accounting=accounting))
        with pytest.raises(CompressionError, match=name):
            uniform_budgets(method, layers, [], budget_of(layers, most + 0.001, accounting=accounting))


@settings(max_examples=150, deadline=None)
@given(
    shapes=st.lists(st.tuples(st.integers(1, 70), st.integers(1, 70)), min_size=1, max_size=5),
    method=st.sampled_from([*METHODS, *[(name, {}) for name in registered_methods()], ("rtn", {"bits": 3})]),
    value_bits=st.sampled_from([16, 32]),
    bias=st.booleans(),
    left_dense=st.integers(0, 2),
    accounting=st.sampled_from(["bits", "paper"]),
)
def test_the_bounds_that_the_error_names_are_the_ends_of_what_is_reachable(
    shapes: list[tuple[int, int]],
    method: tuple[str, dict],
    value_bits: int,
    bias: bool,
    left_dense: int,
    accounting: str,
) -> None:
    layers = layers_of(shapes)
    compressed, dense = layers[left_dense:], layers[:left_dense]
    chosen = make_method(*method)
    if not compressed or any(chosen.leaves_dense(layer, 0.5) for layer in compressed):
        return

    def error(ratio: float) -> str:
        try:
            check_reachable(chosen, compressed, dense, budget_of(layers, ratio, value_bits, bias, accounting))
        except CompressionError as raised:
            return str(raised)
        return ""

    # One bit is a larger step than those of the message where there are few.
    hair = max(1e-4, 2 / (value_bits * sum(m * n for m, n in shapes)))
    for message in filter(None, (error(1e-5), error(1 - 1e-5))):
        bounds = re.search(r"remove ([\d.]+) to ([\d.]+) of", message)
        if bounds is None:
            assert "no ratio is within reach" in message
            continue
        least, most = map(float, bounds.groups())
        assert not error(least) and not error(most)
        assert most + hair >= 1 or "out of reach" in error(most + hair)
        assert least - hair <= 0 or "out of reach" in error(least - hair)


def test_layers_left_dense_narrow_the_reachable_ratios() -> None:
    layers = layers_of([(64, 64)] * 4)
    method = make_method("svd")
    uniform_budgets(method, layers, [], budget_of(layers, 0.6))
    with pytest.raises(CompressionError, match="compresses 2 layers, leaves 2 dense, and can remove"):
        uniform_budgets(method, layers[:2], layers[2:], budget_of(layers, 0.6))


problems = st.lists(
    st.tuples(st.lists(st.integers(1, 1000), min_size=1, max_size=4), st.integers(1, 4)),
    min_size=1,
    max_size=3,
)


@settings(max_examples=200, deadline=None)
@given(problem=problems, available=st.integers(0, 40), equal_price=st.booleans())
def test_greedy_ranks_lose_the_least_energy(
    problem: list[tuple[list[int], int]], available: int, equal_price: bool
) -> None:
    energies = {str(i): sorted(map(float, energy), reverse=True) for i, (energy, _) in enumerate(problem)}
    price = {str(i): 2 if equal_price else own_price for i, (_, own_price) in enumerate(problem)}
    ranks = greedy_ranks(energies, price, dict.fromkeys(energies, 10**6), dict.fromkeys(energies, 0), available)
    spent = sum(rank * price[name] for name, rank in ranks.items() if rank is not None)
    assert None not in ranks.values()
    assert spent <= available

    def kept(choice: dict[str, int]) -> float:
        return sum(sum(energies[name][:rank]) for name, rank in choice.items())

    names = list(energies)
    options = (
        dict(zip(names, counts, strict=True))
        for counts in itertools.product(*(range(len(energies[name]) + 1) for name in names))
    )
    best = max(
        kept(choice) for choice in options if sum(rank * price[name] for name, rank in choice.items()) <= available
    )
    kept_energy = kept(ranks)  # type: ignore[arg-type]
    if equal_price:
        assert kept_energy == best
    # with unequal prices it is optimal up to the one component that no longer fits
    assert best - kept_energy <= max(
        (energies[name][rank] for name, rank in ranks.items() if rank < len(energies[name])), default=0.0
    )  # type: ignore[index, operator]


def test_a_layer_whose_rank_costs_as_much_as_dense_stays_dense() -> None:
    energies = {"flat": [1.0] * 64, "steep": [100.0] + [1e-6] * 63}
    price, dense_price = dict.fromkeys(energies, 128), dict.fromkeys(energies, 64 * 64)
    available = 64 * 64 + 10 * 128
    ranks = greedy_ranks(energies, price, dense_price, dict.fromkeys(energies, 0), available)
    assert ranks["flat"] is None
    assert ranks["steep"] == 10  # all that is left after the dense layer


@settings(max_examples=100, deadline=None)
@given(
    targets=st.lists(st.one_of(st.none(), st.floats(0, 40)), min_size=1, max_size=6).filter(lambda all: any(all)),
    share=st.floats(0.1, 0.9),
)
def test_fitted_ranks_never_exceed_the_budget(targets: list[float | None], share: float) -> None:
    names = [f"layer {i}" for i in range(len(targets))]
    price, dense_price = dict.fromkeys(names, 128), dict.fromkeys(names, 64 * 64)
    fixed, limit = dict.fromkeys(names, 64), dict.fromkeys(names, 64)
    dense = sum(dense_price[name] for name, rank in zip(names, targets, strict=True) if rank is None)
    available = dense + int(share * sum(64 * 64 for rank in targets if rank is not None))
    ranks = fitted_ranks(dict(zip(names, targets, strict=True)), price, dense_price, fixed, limit, available)
    spent = sum(
        dense_price[name] if rank is None else fixed[name] + rank * price[name] for name, rank in ranks.items()
    )
    assert spent <= available
    assert all(ranks[name] is None for name, rank in zip(names, targets, strict=True) if rank is None)


@settings(max_examples=100, deadline=None)
@given(
    shape=st.sampled_from(SHAPES),
    bits=st.integers(0, 2_000_000),
    value_bits=st.sampled_from([16, 32]),
    kept=st.booleans(),
)
def test_a_layer_budget_buys_the_largest_thing_that_fits(
    shape: tuple[int, int], bits: int, value_bits: int, kept: bool
) -> None:
    layer = Layer("layer", 0, 1, "other", *shape)
    budget = ModelBudget(0.5, {"layer": value_bits}, {"layer": 0}).layer_budget(layer, bits)
    if kept:
        count, spec_with = budget.kept_per_row(), lambda count: LayerSpec(sparse="bitmask", kept=count)
        limit = shape[1] - 1
    else:
        count, spec_with = budget.rank(), lambda count: LayerSpec(rank=count)
        limit = min(shape)
    assert count == 0 or budget.stored(spec_with(count)) <= bits
    assert count == limit or budget.stored(spec_with(count + 1)) > bits


@given(data=st.data())
def test_chosen_options_fit_and_no_others_on_the_hulls_lose_less(data: st.DataObject) -> None:
    """The choice is within the bits, and optimal among all combinations where the bits are a greedy solution's."""
    pair = st.tuples(st.integers(1, 50), st.floats(0, 100))
    options = {
        str(index): data.draw(st.lists(pair, min_size=1, max_size=4), label=f"layer {index}") for index in range(3)
    }
    least = sum(min(bits for bits, _ in pairs) for pairs in options.values())
    available = least + data.draw(st.integers(0, 100), label="spare")
    chosen = cheapest_choices(options, available)
    chosen_options = [options[name][index] for name, index in chosen.items()]
    bits, loss = sum(bits for bits, _ in chosen_options), sum(loss for _, loss in chosen_options)
    assert bits <= available
    for combination in itertools.product(*options.values()):
        if sum(other_bits for other_bits, _ in combination) <= bits:
            largest_loss = max(other_loss for pairs in options.values() for _, other_loss in pairs)
            assert loss <= sum(other_loss for _, other_loss in combination) + largest_loss
    again = cheapest_choices(options, bits)
    assert sum(options[name][index][1] for name, index in again.items()) == pytest.approx(loss)


def test_too_few_bits_for_the_smallest_options_is_an_error() -> None:
    with pytest.raises(CompressionError, match="3 bits more than the 7"):
        cheapest_choices({"a": [(4, 1.0)], "b": [(6, 1.0), (9, 0.0)]}, 7)
