"""What a method makes of a matrix does not depend on the number of threads: each matrix is solved by one."""

import threading
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

from hf_lowrank import CompressionConfig, compress
from hf_lowrank.execution.threads import MAX_PARALLEL_BYTES, parallel_slots, solve_in_threads
from hf_lowrank.methods import make_method, method_class, registered_methods
from hf_lowrank.methods.mixed import MixedMethod
from hf_lowrank.methods.spectral import SpectralMethod
from tests.methods.problems import budget_of, problem
from tests.methods.test_contract import parts_of
from tests.support import tiny_models

SHAPES = {"small": (40, 48), "tall": (176, 64), "wide": (64, 176)}
"""Large enough for LAPACK to share the last two among threads."""


@pytest.fixture(autouse=True)
def threads() -> Iterator[None]:
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


@pytest.mark.parametrize("name", registered_methods())
def test_same_bytes_whatever_the_number_of_threads(name: str) -> None:
    problems = {each: problem(*shape) for each, shape in SHAPES.items()}

    def solve(each: str) -> dict[str, Tensor]:
        weight, statistics = problems[each]
        return parts_of(make_method(name).decompose(weight, statistics, budget_of(*weight.shape, 0.5)))

    found = {}
    for count in (1, 3):
        torch.set_num_threads(count)
        found[count] = dict(solve_in_threads(dict.fromkeys(SHAPES, 1.0), solve, parallel_slots(0)))
        assert torch.get_num_threads() == count
    assert [*found[1]] == [*found[3]] == [*SHAPES]
    for each in SHAPES:
        assert found[1][each].keys() == found[3][each].keys()
        for part, tensor in found[1][each].items():
            assert torch.equal(tensor, found[3][each][part]), (each, part)


@pytest.mark.parametrize("name", ["wanda", "svd-llm", "lowrank"])
def test_every_strategy_solves_with_one_thread(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also where a matrix takes so much memory that it is solved alone; if it takes more, it gets all threads."""
    cls: Any = method_class(name)
    steps = (
        ["measure"]
        if issubclass(cls, SpectralMethod)
        else ["choices", "build"]
        if issubclass(cls, MixedMethod)
        else ["decompose"]
    )
    seen = set()

    def noted(original: Callable[..., Any]) -> Callable[..., Any]:
        def step(*arguments: Any) -> Any:
            seen.add(
                (
                    torch.get_num_threads(),
                    torch.is_grad_enabled(),
                    threading.current_thread() is threading.main_thread(),
                )
            )
            return original(*arguments)

        return step

    for step in steps:
        monkeypatch.setattr(cls, step, noted(getattr(cls, step)))
    torch.set_num_threads(2)
    recipe = CompressionConfig(method=name, ratio=0.4, samples=2, sequence_length=16)
    for working_memory, count, alone in (
        (0, 1, False),
        (MAX_PARALLEL_BYTES, 1, True),
        (MAX_PARALLEL_BYTES + 1, 2, True),
    ):
        seen.clear()
        monkeypatch.setattr(cls, "working_memory", lambda self, layer, value=working_memory: value)
        compress(tiny_models.llama(), recipe, calibration=tiny_models.token_ids(2, 16).tolist(), progress=False)
        assert (count, False, alone) in seen
        assert {(threads, gradients) for threads, gradients, _ in seen} == {(count, False)}
        assert torch.get_num_threads() == 2


def test_the_first_error_in_order_is_raised() -> None:
    torch.set_num_threads(2)

    def solve(name: str) -> None:
        raise ValueError(name)

    for count in (1, 2):
        with pytest.raises(ValueError, match="first"):
            dict(solve_in_threads({"first": 1.0, "second": 2.0}, solve, count))
        assert torch.get_num_threads() == 2
