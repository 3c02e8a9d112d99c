"""Methods by name: any case, near matches, options, types."""

from dataclasses import dataclass, field
from typing import ClassVar

import pytest

from hf_lowrank import CompressionConfig, CompressionError
from hf_lowrank.methods import Method, make_method, method_class, register_method, registered_methods


def test_names_are_sorted_and_unique() -> None:
    names = registered_methods()
    assert names == sorted(set(names))
    assert all(method_class(name).name == name for name in names)


def test_the_published_rivals_are_registered() -> None:
    published = {"asvd", "fwsvd", "magnitude", "oats", "slab", "soco", "sola", "sparsegpt", "svd", "svd-llm", "wanda"}
    assert published <= set(registered_methods())


@pytest.mark.parametrize(
    ("written", "name"),
    [("SLaB", "slab"), ("SVD-LLM", "svd-llm"), ("SVD_LLM", "svd-llm"), ("SoLA", "sola"), ("slab_gram", "slab-gram")],
)
def test_a_name_is_understood_in_any_case_and_recorded_as_registered(written: str, name: str) -> None:
    assert method_class(written) is method_class(name)
    assert make_method(written).name == name
    assert CompressionConfig(method=written).method == name
    assert CompressionConfig.from_dict({"method": written}).method == name


@pytest.mark.parametrize(("written", "name"), [("SLaBB", "slab"), ("SVD_LLMM", "svd-llm"), ("SOLAA", "sola")])
def test_a_near_miss_suggests_the_name_in_any_case(written: str, name: str) -> None:
    with pytest.raises(CompressionError, match=f"unknown method '{written}'; did you mean .*'{name}'"):
        make_method(written)


def test_a_method_is_registered_in_any_case() -> None:
    with pytest.raises(CompressionError, match="'svd-llm' is registered already"):
        register_method("SVD_LLM")(Method)


def test_every_method_declares_its_strategy_and_whether_it_learns_from_the_loss() -> None:
    strategies = {name: method_class(name).strategy for name in registered_methods()}
    assert {name for name, strategy in strategies.items() if strategy == "spectral"} == {"soco", "sola"}
    assert {name for name, strategy in strategies.items() if strategy == "mixed"} == {"auto", "lowrank", "slab-gram"}
    assert set(strategies.values()) == {"layerwise", "spectral", "mixed"}
    assert [name for name in registered_methods() if method_class(name).trains] == ["soco"]
    learning = {name for name in registered_methods() if make_method(name).learns_from_loss}
    assert learning == {"auto", "fwsvd", "lowrank", "slab-gram", "soco"}


@pytest.mark.parametrize("name", registered_methods())
def test_a_near_miss_suggests_the_name(name: str) -> None:
    with pytest.raises(CompressionError, match="unknown method") as raised:
        method_class(name + "z")
    assert "did you mean" in str(raised.value)


def test_a_far_miss_suggests_nothing() -> None:
    with pytest.raises(CompressionError, match="unknown method 'qqqqqq' ") as raised:
        make_method("qqqqqq")
    assert "did you mean" not in str(raised.value)


def test_an_unknown_option_names_the_options() -> None:
    with pytest.raises(
        CompressionError, match=r"slab has no option 'iteration'; did you mean 'iterations'\?.*binary_rank"
    ):
        make_method("slab", {"iteration": 3})
    with pytest.raises(CompressionError, match="its options: none"):
        make_method("svd", {"rank": 3})


@pytest.mark.parametrize(
    ("name", "option", "text", "value"),
    [
        ("slab", "iterations", "3", 3),
        ("slab", "weighted", "False", False),
        ("asvd", "alpha", "0.25", 0.25),
        ("wanda", "pattern", "2:4", "2:4"),
    ],
)
def test_text_is_read_as_the_type_of_the_default(name: str, option: str, text: str, value: object) -> None:
    assert getattr(make_method(name, {option: text}), option) == value


@pytest.mark.parametrize(
    ("name", "option", "value"),
    [
        ("slab", "iterations", "three"),
        ("slab", "iterations", 2.5),
        ("slab", "weighted", "maybe"),
        ("slab", "weighted", 1),
        ("asvd", "alpha", "much"),
    ],
)
def test_a_value_of_the_wrong_type_is_an_error(name: str, option: str, value: object) -> None:
    with pytest.raises(CompressionError, match=f"{name}: option {option} is {value!r}"):
        make_method(name, {option: value})


@pytest.mark.parametrize(
    ("name", "option", "value"),
    [
        ("slab", "iterations", 0),
        ("slab", "binary_rank", 0),
        ("slab", "pattern", "4:2"),
        ("wanda", "pattern", "2of4"),
        ("magnitude", "pattern", "0:4"),
        ("sparsegpt", "damping", 0.0),
        ("sparsegpt", "damping", float("nan")),
        ("sparsegpt", "pattern", "4:4"),
        ("oats", "iterations", 0),
        ("oats", "rank_share", 1.0),
        ("oats", "rank_share", -0.1),
        ("asvd", "alpha", -0.5),
        ("asvd", "alpha", float("inf")),
    ],
)
def test_a_value_out_of_range_is_an_error(name: str, option: str, value: object) -> None:
    with pytest.raises(CompressionError, match=option):
        make_method(name, {option: value})


def test_a_name_is_taken_once() -> None:
    @dataclass
    class Another(Method):
        strength: int = field(default=1, metadata={"help": "none"})
        source: ClassVar[str] = "nowhere"

    with pytest.raises(CompressionError, match="'slab' is registered already"):
        register_method("slab")(Another)
    assert method_class("slab").__name__ == "SLaB"
