"""SparseGPT against optimal brain surgeon, stated column by column with every inverse computed anew."""

import pytest
import torch
from torch import Tensor

from hf_lowrank import CompressionError
from hf_lowrank.methods import make_method
from hf_lowrank.methods.sparsegpt import BLOCK

from .problems import budget_of, correlated_tokens, gaussian, problem, relative_error, statistics_of


def surgeon(weight: Tensor, gram: Tensor, kept: int, spans: list[tuple[int, int]], quota: int | None = None) -> Tensor:
    """Return the weight with entries removed from left to right, masks being chosen span by span of columns.

    Removing w_j costs w_j² / [H_FF⁻¹]_jj with F = {j, j+1, ...}, and changes the columns F by
    −w_j / [H_FF⁻¹]_jj · H_FF⁻¹[:, j].

    Args:
        kept: entries per row. Those that cost most in the whole row at the start say how many of a span stay.
        spans: first column and end of every span.
        quota: entries of every span that a row keeps, in place of `kept`.
    """
    n = weight.shape[1]
    H = gram + 0.01 * gram.diagonal().mean() * torch.eye(n, dtype=gram.dtype)
    W, mask = weight.clone(), torch.zeros(weight.shape, dtype=torch.bool)
    inverses = [torch.linalg.inv(H[j:, j:]) for j in range(n)]
    ends = dict(spans)
    first = [
        costs.argsort(descending=True)[:kept].tolist()
        for costs in W**2 / torch.stack([inverse[0, 0] for inverse in inverses])
    ]
    for j in range(n):
        if j in ends:
            cost = torch.stack([W[:, c] ** 2 / inverses[c][0, 0] for c in range(j, ends[j])], dim=1)
            for row in range(len(W)):
                here = sum(j <= c < ends[j] for c in first[row]) if quota is None else quota
                mask[row, j + cost[row].argsort(descending=True)[:here]] = True
        removed = torch.where(mask[:, j], 0.0, W[:, j])
        W[:, j:] -= torch.outer(removed / inverses[j][0, 0], inverses[j][0])
    return W * mask


def test_unstructured_is_the_surgeon_block_by_block() -> None:
    m, n = 20, 300
    weight, statistics = problem(m, n)
    budget = budget_of(m, n, 0.5)
    spans = [(start, min(start + BLOCK, n)) for start in range(0, n, BLOCK)]
    assert statistics.gram is not None
    decomposition = make_method("sparsegpt").decompose(weight, statistics, budget)
    assert decomposition.weight is not None
    expected = surgeon(weight, statistics.gram, budget.kept_per_row(), spans)
    torch.testing.assert_close(decomposition.weight, expected, rtol=1e-8, atol=1e-8)


@pytest.mark.parametrize(("pattern", "kept", "group"), [("2:4", 2, 4), ("4:8", 4, 8)])
@pytest.mark.parametrize("n", [160, 163])
def test_full_pattern_is_the_surgeon_group_by_group(pattern: str, kept: int, group: int, n: int) -> None:
    weight, statistics = problem(20, n)
    spans = [(start, start + group) for start in range(0, n - group + 1, group)]
    decomposition = make_method("sparsegpt", {"pattern": pattern}).decompose(weight, statistics, budget_of(20, n, 0.4))
    assert decomposition.weight is not None
    assert statistics.gram is not None
    torch.testing.assert_close(
        decomposition.weight, surgeon(weight, statistics.gram, 0, spans, kept), rtol=1e-8, atol=1e-8
    )


@pytest.mark.parametrize("pattern", ["2:4", "4:8", "2:5"])
@pytest.mark.parametrize("ratio", [0.4, 0.6, 0.8])
def test_patterns_are_legal(pattern: str, ratio: float) -> None:
    n_of, m_of = map(int, pattern.split(":"))
    weight, statistics = problem(16, 297)
    mask = make_method("sparsegpt", {"pattern": pattern}).decompose(weight, statistics, budget_of(16, 297, ratio)).mask
    assert mask is not None
    whole = 297 // m_of * m_of
    assert int(mask[:, :whole].reshape(16, -1, m_of).sum(dim=2).max()) <= n_of
    assert not bool(mask[:, whole:].any())


@pytest.mark.parametrize("ratio", [0.3, 0.5, 0.7])
@pytest.mark.parametrize("pattern", ["unstructured", "2:4"])
def test_compensation_beats_the_same_mask_without_it(ratio: float, pattern: str) -> None:
    weight, statistics = problem(64, 192)
    decomposition = make_method("sparsegpt", {"pattern": pattern}).decompose(
        weight, statistics, budget_of(64, 192, ratio)
    )
    assert decomposition.weight is not None
    assert decomposition.mask is not None
    assert statistics.gram is not None
    compensated = relative_error(decomposition.weight, weight, statistics.gram)
    assert compensated < relative_error(weight * decomposition.mask, weight, statistics.gram)


def test_uncorrelated_inputs_leave_nothing_to_compensate() -> None:
    """With a diagonal Gram matrix the kept values are the weight's own: Wanda's choice within every block."""
    weight, norms = gaussian(32, BLOCK, seed=1), gaussian(BLOCK, seed=2).abs() + 0.1
    statistics = statistics_of(torch.diag(norms))
    budget = budget_of(32, BLOCK, 0.5)
    ours = make_method("sparsegpt", {"damping": 1e-9}).decompose(weight, statistics, budget)
    wanda = make_method("wanda").decompose(weight, statistics, budget)
    assert ours.weight is not None
    assert wanda.weight is not None
    torch.testing.assert_close(ours.weight, wanda.weight * wanda.mask)


def test_too_little_damping_is_an_error() -> None:
    weight, statistics = gaussian(16, 64, seed=1), statistics_of(correlated_tokens(4, 64))
    with pytest.raises(CompressionError, match="damping=1e-30"):
        make_method("sparsegpt", {"damping": 1e-30}).decompose(weight, statistics, budget_of(16, 64, 0.5))
