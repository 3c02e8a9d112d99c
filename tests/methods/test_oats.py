"""OATS against its alternation with a full singular value decomposition in every step."""

import pytest
import torch
from torch import Tensor

from hf_lowrank.methods import make_method
from hf_lowrank.methods.oats import OATS, truncated

from .problems import budget_of, gaussian, problem


def alternation(scaled: Tensor, rank: int, kept: int, iterations: int) -> Tensor:
    """Return S + L after `iterations` of L = SVD_r(A − S), S = the largest `kept` entries of every row of A − L."""
    S = torch.zeros_like(scaled)
    L = S
    for _ in range(iterations):
        U, sigma, Vt = torch.linalg.svd(scaled - S, full_matrices=False)
        L = (U[:, :rank] * sigma[:rank]) @ Vt[:rank]
        S = torch.zeros_like(scaled)
        for row, residual in enumerate(scaled - L):
            largest = residual.abs().argsort(descending=True)[:kept]
            S[row, largest] = residual[largest]
    return S + L


@pytest.mark.parametrize("hidden_rank", [0, 6])
def test_objective_is_that_of_the_full_alternation(hidden_rank: int) -> None:
    """Both are local searches and may part on the way.

    Each ends within two percent of the other, and all together within half a percent.
    """
    quotients = []
    for seed, (m, n, ratio) in enumerate(
        [(40, 72, 0.3), (72, 40, 0.3), (40, 72, 0.5), (72, 40, 0.5), (56, 56, 0.5), (56, 56, 0.7)]
    ):
        weight, statistics = problem(m, n, seed)
        if hidden_rank:
            weight = weight + gaussian(m, hidden_rank, seed=20) @ gaussian(hidden_rank, n, seed=21)
        method, budget = OATS(), budget_of(m, n, ratio)
        scaled = weight * statistics.column_norms
        full = alternation(scaled, *method.split(budget), method.iterations)
        ours = (
            method.decompose(weight, statistics, budget).to_layer(m, n).to_dense(torch.float64)
            * statistics.column_norms
        )
        quotients.append(float((scaled - ours).norm() / (scaled - full).norm()))
    assert all(0.98 < quotient < 1.02 for quotient in quotients)
    assert sum(quotients) / len(quotients) == pytest.approx(1, abs=0.005)


def test_without_rank_it_is_wanda() -> None:
    weight, statistics = problem(48, 96)
    budget = budget_of(48, 96, 0.5)
    oats = make_method("oats", {"rank_share": 0.0}).decompose(weight, statistics, budget)
    wanda = make_method("wanda").decompose(weight, statistics, budget)
    assert oats.lowrank_a is None
    assert oats.weight is not None
    assert wanda.weight is not None
    torch.testing.assert_close(oats.weight, wanda.weight * wanda.mask)


@pytest.mark.parametrize(("ratio", "share"), [(0.5, 0.25), (0.3, 0.3), (0.7, 0.25)])
def test_rank_takes_its_share_of_the_values(ratio: float, share: float) -> None:
    m, n = 352, 128
    budget = budget_of(m, n, ratio)
    rank, kept = OATS(rank_share=share).split(budget)
    values = budget.bits / 16 - m * n / 16
    assert rank == int(share * values / (m + n))
    assert values - m < rank * (m + n) + kept * m <= values


def test_a_pattern_is_filled_before_the_rank() -> None:
    m, n = 64, 128
    assert OATS(pattern="2:4").split(budget_of(m, n, 0.3))[1] == n // 2
    rank, kept = OATS(pattern="2:4").split(budget_of(m, n, 0.6))
    assert rank == 0
    assert kept < n // 2


@pytest.mark.parametrize("rank", [1, 5, 40])
def test_subspace_iteration_converges_to_the_truncated_svd(rank: int) -> None:
    matrix, basis = gaussian(60, 90, seed=1), None
    for _ in range(80):
        U, V, basis = truncated(matrix, rank, basis)
    best = torch.linalg.svdvals(matrix)[rank:].norm()
    assert float((matrix - U @ V).norm()) == pytest.approx(float(best), rel=1e-6)
