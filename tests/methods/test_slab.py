"""SLaB: errors on Gaussian matrices, monotone loss, legal patterns, and agreement with a loop of full SVDs."""

from itertools import pairwise

import pytest
import torch
from torch import Tensor

from hf_lowrank.methods import Statistics, make_method

from .problems import budget_of, gaussian, problem


def column_statistics(c: Tensor) -> Statistics:
    """Return statistics of which only the column norms matter."""
    return Statistics(tokens=1, column_norms=c, mean=torch.zeros_like(c), mean_abs=c)


def weighted_error(weight: Tensor, c: Tensor, ratio: float, **options: object) -> float:
    """‖(W − Ŵ) diag(c)‖_F / ‖W diag(c)‖_F at a compression ratio that, as the paper's, does not count the mask."""
    m, n = weight.shape
    decomposition = make_method("slab", options).decompose(
        weight, column_statistics(c), budget_of(m, n, ratio, "paper")
    )
    dense = decomposition.to_layer(m, n).to_dense(torch.float64).detach()
    return float(((weight - dense) * c).norm() / (weight * c).norm())


def student_t(degrees: int, *shape: int, seed: int) -> Tensor:
    chi_squared = gaussian(degrees, *shape, seed=seed).square().sum(dim=0)
    return gaussian(*shape, seed=seed + 1) / (chi_squared / degrees).sqrt()


def spread(n: int, seed: int = 11) -> Tensor:
    return torch.exp(0.7 * gaussian(n, seed=seed))


# Ratio, and relative weighted errors after 1 and after 20 iterations at rank 1, measured by a loop of full SVDs
# outside this package.
TABLE = [(0.5, 0.213, 0.172), (0.6, 0.274, 0.224), (0.7, 0.339, 0.291), (0.8, 0.409, 0.378)]


@pytest.mark.parametrize(("ratio", "first", "last"), TABLE)
def test_errors_on_a_gaussian_matrix_are_those_of_the_table(ratio: float, first: float, last: float) -> None:
    weight, c = gaussian(512, 512, seed=0), torch.ones(512, dtype=torch.float64)
    assert weighted_error(weight, c, ratio, iterations=1) == pytest.approx(first, rel=0.03)
    assert weighted_error(weight, c, ratio) == pytest.approx(last, rel=0.03)


def full_svd_loop(A: Tensor, importance: Tensor, kept: int, iterations: int) -> Tensor:
    """Return the result of SLaB's alternation (arXiv 2604.04493), one row at a time where rows matter.

    Args:
        importance: weights (n,) in the choice of the entries that are kept.
    """
    S = torch.zeros_like(A)
    approximation = S
    for _ in range(iterations):
        R = A - S
        signs = torch.ones_like(R)
        signs[R < 0] = -1
        U, sigma, Vt = torch.linalg.svd(R.abs(), full_matrices=False)
        binary = sigma[0] * torch.outer(U[:, 0], Vt[0]) * signs
        Y = A - binary
        S = torch.zeros_like(A)
        for row in range(len(A)):
            places = (Y[row].abs() * importance).argsort(descending=True)[:kept]
            S[row, places] = Y[row, places]
        approximation = binary + S
    return approximation


@pytest.mark.parametrize("shape", [(64, 172), (128, 128), (172, 64)], ids=str)
@pytest.mark.parametrize("ratio", [0.5, 0.7, 0.9])
@pytest.mark.parametrize("weighted", [True, False])
def test_objective_is_that_of_the_loop_with_full_svds(shape: tuple[int, int], ratio: float, weighted: bool) -> None:
    m, n = shape
    weight, c = student_t(5, m, n, seed=1), spread(n)
    kept = int(((1 - ratio) * m * n * 16 - m * ((n + 7) // 8) * 8 - 16 * (m + n)) // (16 * m))  # signs and scales paid
    ones = torch.ones_like(c)
    reference = full_svd_loop(weight * c, ones, kept, 20) if weighted else full_svd_loop(weight, c, kept, 20) * c
    expected = float((weight * c - reference).norm() / (weight * c).norm())
    assert weighted_error(weight, c, ratio, weighted=weighted) == pytest.approx(expected, rel=1e-3)


@pytest.mark.parametrize("ratio", [0.5, 0.8])
@pytest.mark.parametrize("weighted", [True, False])
@pytest.mark.parametrize("kind", ["gaussian", "student", "rescaled"])
def test_loss_never_rises(ratio: float, weighted: bool, kind: str) -> None:
    weight = {
        "gaussian": gaussian(96, 128, seed=0),
        "student": student_t(5, 96, 128, seed=1),
        "rescaled": torch.exp(gaussian(96, 1, seed=2)) * gaussian(96, 128, seed=3) * torch.exp(gaussian(128, seed=4)),
    }[kind]
    c = spread(128) if weighted else torch.ones(128, dtype=torch.float64)
    losses = [weighted_error(weight, c, ratio, iterations=count, weighted=weighted) for count in range(1, 21)]
    for before, after in pairwise(losses):
        assert after <= before * (1 + 1e-6)
    assert losses[-1] < 0.98 * losses[0]


@pytest.mark.parametrize("ratio", [0.5, 0.7, 0.8])
def test_weighted_and_unweighted_fits_end_close(ratio: float) -> None:
    weight, c = gaussian(256, 256, seed=0), spread(256)
    assert weighted_error(weight, c, ratio, weighted=False) == pytest.approx(
        weighted_error(weight, c, ratio, weighted=True), rel=0.05
    )


@pytest.mark.parametrize("pattern", ["2:4", "4:8"])
@pytest.mark.parametrize("ratio", [0.3, 0.5, 0.8])
@pytest.mark.parametrize("shape", [(64, 172), (40, 57)], ids=str)
def test_patterns_are_legal_and_cost_no_more_than_the_budget(
    pattern: str, ratio: float, shape: tuple[int, int]
) -> None:
    m, n = shape
    n_of, m_of = map(int, pattern.split(":"))
    weight, statistics = problem(m, n)
    mask = make_method("slab", {"pattern": pattern}).decompose(weight, statistics, budget_of(m, n, ratio)).mask
    assert mask is not None
    whole = n // m_of * m_of
    assert int(mask[:, :whole].reshape(m, -1, m_of).sum(dim=2).max()) <= n_of
    assert not bool(mask[:, whole:].any())


@pytest.mark.parametrize(
    ("shape", "ratio", "density"), [((512, 512), 0.5, 0.4336), ((288, 768), 0.6, 0.3327), ((64, 172), 0.8, 0.1161)]
)
def test_density_of_the_sparse_part(shape: tuple[int, int], ratio: float, density: float) -> None:
    """The density is k / (m n) = (1 − CR) − 1/b − r (1/m + 1/n) for compression ratio CR, b bits per value and rank r.

    It holds to within one value per row and the padding of sign bits to bytes.
    """
    m, n = shape
    weight, statistics = problem(m, n)
    mask = make_method("slab").decompose(weight, statistics, budget_of(m, n, ratio, "paper")).mask
    assert mask is not None
    assert density - 2 / n < float(mask.double().mean()) <= density + 5e-5


def test_what_fits_the_form_is_recovered() -> None:
    """±1 times a positive matrix of rank one, with any column weights."""
    magnitudes = torch.outer(gaussian(64, seed=1).abs() + 0.5, gaussian(96, seed=2).abs() + 0.5)
    weight = torch.where(gaussian(64, 96, seed=3) > 0, magnitudes, -magnitudes)
    assert weighted_error(weight, spread(96), 0.9) < 1e-6  # the precision of float32
