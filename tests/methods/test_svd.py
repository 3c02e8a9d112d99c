"""Every truncated SVD is the best rank-r matrix in its own norm, and loses the tail of its spectrum."""

import pytest
import scipy.linalg
import torch
from torch import Tensor

from hf_lowrank.methods import Statistics, make_method
from hf_lowrank.methods.factorization import factorize, leading_components
from hf_lowrank.methods.svd_llm import refit_left

from .problems import budget_of, compressed_tokens, correlated_tokens, gaussian, problem, relative_error, statistics_of

SHAPES = [(64, 64), (172, 64), (64, 172), (33, 57)]


def best_projection(weight: Tensor, metric: Tensor, rank: int) -> Tensor:
    """Return U_r U_rᵀ W, the best for ‖(W − Ŵ) M^½‖_F, with U_r the leading eigenvectors of W M Wᵀ."""
    U = torch.linalg.eigh(weight @ metric @ weight.T).eigenvectors[:, -rank:]
    return U @ (U.T @ weight)


def dense(name: str, weight: Tensor, statistics: Statistics, ratio: float, **options: object) -> Tensor:
    m, n = weight.shape
    result = (
        make_method(name, options)
        .decompose(weight, statistics, budget_of(m, n, ratio))
        .to_layer(m, n)
        .to_dense(torch.float64)
    )
    return result.detach()


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("ratio", [0.2, 0.5, 0.8])
@pytest.mark.parametrize("name", ["svd", "asvd", "fwsvd", "svd-llm"])
def test_each_is_the_best_projection_in_its_norm(name: str, shape: tuple[int, int], ratio: float) -> None:
    m, n = shape
    weight, statistics = problem(m, n)
    rank = int((1 - ratio) * m * n / (m + n))
    assert statistics.gram is not None
    assert statistics.squared_gradients is not None
    metric = {
        "svd": torch.eye(n, dtype=torch.float64),
        "asvd": torch.diag(statistics.mean_abs),  # (mean |X_j|)^(2 α), α = ½
        "fwsvd": torch.diag(statistics.squared_gradients),  # Σ_i F_ij
        "svd-llm": statistics.gram,
    }[name]
    torch.testing.assert_close(
        dense(name, weight, statistics, ratio), best_projection(weight, metric, rank), rtol=1e-6, atol=1e-6
    )


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_svd_llm_solves_the_generalized_eigenproblem(shape: tuple[int, int]) -> None:
    """With Wᵀ W v = λ C⁻¹ v and vᵀ C⁻¹ v = 1, λ are the squared singular values and Ŵ = W Σ_r v vᵀ C⁻¹.

    The loss is the tail of λ.
    """
    m, n = shape
    weight, statistics = problem(m, n)
    assert statistics.gram is not None
    inverse = torch.linalg.inv(statistics.gram).numpy()
    values, vectors = scipy.linalg.eigh((weight.T @ weight).numpy(), (inverse + inverse.T) / 2)
    rank = int(0.5 * m * n / (m + n))
    leading = vectors[:, -rank:]
    expected = torch.from_numpy(weight.numpy() @ leading @ leading.T @ inverse)
    result = dense("svd-llm", weight, statistics, 0.5)
    torch.testing.assert_close(result, expected, rtol=1e-5, atol=1e-5)
    total = float(((weight @ statistics.gram) * weight).sum())
    assert relative_error(result, weight, statistics.gram) ** 2 == pytest.approx(
        values[:-rank].sum() / total, rel=1e-6
    )


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("tokens_per_channel", [4, 1])
def test_loss_on_the_tokens_is_the_tail_energy(shape: tuple[int, int], tokens_per_channel: int) -> None:
    """‖(W − W_r) X‖² = Σ_{i>r} σ_i², measured on the tokens themselves, for every rank."""
    m, n = shape
    weight, x = gaussian(m, n, seed=1), correlated_tokens(tokens_per_channel * n, n)
    factorization = factorize(weight, x.T @ x)
    energy = factorization.sigma.square()
    for rank in (1, min(m, n) // 2, min(m, n) - 1):
        a, b = factorization.truncate(rank)
        measured = float(((weight - b @ a) @ x.T).square().sum())
        assert measured == pytest.approx(
            float(energy[rank:].sum()), rel=1e-6, abs=1e-9 * float(energy.sum())
        )  # what the jitter costs


def test_fewer_tokens_than_channels_lose_nothing_at_their_rank() -> None:
    """Twenty tokens span twenty directions. At rank 20 their outputs are exact, to the rounding of the jitter."""
    weight, x = gaussian(64, 96, seed=1), correlated_tokens(20, 96)
    a, b = factorize(weight, x.T @ x).truncate(20)
    assert float(((weight - b @ a) @ x.T).norm() / (weight @ x.T).norm()) < 1e-4


def test_alpha_zero_and_equal_gradients_are_the_plain_svd() -> None:
    weight, statistics = problem(40, 56)
    plain = dense("svd", weight, statistics, 0.5)
    torch.testing.assert_close(dense("asvd", weight, statistics, 0.5, alpha=0.0), plain, rtol=1e-8, atol=1e-8)
    equal = statistics_of(correlated_tokens(200, 56), squared_gradients=torch.full((56,), 3.0, dtype=torch.float64))
    torch.testing.assert_close(dense("fwsvd", weight, equal, 0.5), plain, rtol=1e-8, atol=1e-8)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_update_is_the_least_squares_fit_of_the_left_factor(shape: tuple[int, int]) -> None:
    """On explicit tokens B = argmin ‖W X − B A X̂‖_F, and A is that of the method without the update."""
    m, n = shape
    weight, x = gaussian(m, n, seed=1), correlated_tokens(4 * n, n)
    compressed_inputs = compressed_tokens(x)
    statistics, budget = statistics_of(x, compressed_inputs), budget_of(m, n, 0.5)
    plain = make_method("svd-llm").decompose(weight, statistics, budget)
    updated = make_method("svd-llm", {"update": True}).decompose(weight, statistics, budget)
    assert plain.lowrank_a is not None
    assert updated.lowrank_a is not None
    assert updated.lowrank_b is not None
    assert torch.equal(plain.lowrank_a, updated.lowrank_a)
    expected = torch.linalg.lstsq(compressed_inputs @ plain.lowrank_a.T, x @ weight.T).solution.T
    torch.testing.assert_close(updated.lowrank_b, expected, rtol=1e-6, atol=1e-8)


def test_update_on_the_inputs_of_the_dense_model_changes_nothing() -> None:
    weight, x = gaussian(48, 64, seed=1), correlated_tokens(300, 64)
    statistics = statistics_of(x, compressed_inputs=x)
    torch.testing.assert_close(
        dense("svd-llm", weight, statistics, 0.5, update=True), dense("svd-llm", weight, statistics, 0.5)
    )


def test_refit_with_too_few_tokens_is_the_shortest_solution() -> None:
    weight, x = gaussian(24, 48, seed=1), correlated_tokens(6, 48)
    right = gaussian(12, 48, seed=2)
    left = refit_left(weight, right, x.T @ x, x.T @ x)
    assert bool(torch.isfinite(left).all())
    torch.testing.assert_close(left @ right @ x.T, weight @ x.T, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("rank", [1, 3, 10])
def test_leading_components_converge_to_the_best_approximation(rank: int) -> None:
    matrix = gaussian(60, 90, seed=1)
    matrix = matrix.abs() if rank == 1 else matrix
    left, right = leading_components(matrix, rank)
    for _ in range(30):
        left, right = leading_components(matrix, rank, right)
    best = torch.linalg.svdvals(matrix)[rank:].norm()
    assert float((matrix - left @ right).norm()) == pytest.approx(float(best), rel=1e-5)
    if rank == 1:
        assert bool((left >= 0).all())
        assert bool((right >= 0).all())


def test_an_update_on_fewer_tokens_than_ranks_survives_rounding() -> None:
    """Components that no token reaches respond by rounding alone, and weights fitted to that are noise once stored."""
    weight, x = gaussian(40, 48, seed=4), correlated_tokens(2, 48)
    decomposition = make_method("svd-llm", {"update": True}).decompose(
        weight, statistics_of(x, x), budget_of(40, 48, 0.5)
    )
    stored = decomposition.to_layer(40, 48, dtype=torch.float32).to_dense(torch.float64)
    assert relative_error(stored, weight, x.T @ x) < 1e-3
