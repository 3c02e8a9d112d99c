"""Magnitude and Wanda against a plain statement: sort every row, keep the best."""

import pytest
import torch
from torch import Tensor

from hf_lowrank import CompressionError
from hf_lowrank.methods import make_method

from .problems import budget_of, problem


def best_by_sorting(weight: Tensor, scores: Tensor, kept: int, group: tuple[int, int] | None) -> Tensor:
    """Return the weight, row by row, with only the N best of every M and of those the `kept` best."""
    result = torch.zeros_like(weight)
    for i in range(weight.shape[0]):
        allowed = list(range(weight.shape[1]))
        if group is not None:
            n_of, m_of = group
            allowed = []
            for start in range(0, weight.shape[1] - m_of + 1, m_of):
                allowed += sorted(range(start, start + m_of), key=lambda j: -float(scores[i, j]))[:n_of]
        for j in sorted(allowed, key=lambda j: -float(scores[i, j]))[:kept]:
            result[i, j] = weight[i, j]
    return result


@pytest.mark.parametrize("name", ["magnitude", "wanda"])
@pytest.mark.parametrize(("pattern", "group"), [("unstructured", None), ("2:4", (2, 4)), ("4:8", (4, 8))])
@pytest.mark.parametrize("ratio", [0.3, 0.44, 0.6])
def test_same_entries_as_sorting(name: str, pattern: str, group: tuple[int, int] | None, ratio: float) -> None:
    weight, statistics = problem(24, 61)
    budget = budget_of(24, 61, ratio)
    decomposition = make_method(name, {"pattern": pattern}).decompose(weight, statistics, budget)
    scores = weight.abs() * (statistics.column_norms if name == "wanda" else 1)
    kept = (budget.bits - 24 * 8 * 8) // (24 * 16)  # less the mask: eight bytes in each of 24 rows
    if group is not None:
        kept = min(kept, 61 // group[1] * group[0])
    assert decomposition.weight is not None
    assert torch.equal(decomposition.weight * decomposition.mask, best_by_sorting(weight, scores, kept, group))


@pytest.mark.parametrize("name", ["magnitude", "wanda", "sparsegpt", "oats"])
def test_a_layer_narrower_than_the_pattern_is_an_error(name: str) -> None:
    weight, statistics = problem(16, 6)
    with pytest.raises(CompressionError, match=f"{name}: .*'4:8'"):
        make_method(name, {"pattern": "4:8"}).decompose(weight, statistics, budget_of(16, 6, 0.2))
