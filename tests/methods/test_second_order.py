"""The steps of second-order compression against independent statements of what they solve."""

import itertools

import pytest
import torch
from torch import Tensor

from hf_lowrank.budget import Layer
from hf_lowrank.methods import make_method, mixed
from hf_lowrank.methods.factorization import inverse_cholesky
from hf_lowrank.methods.lowrank import output_root
from hf_lowrank.methods.rounding import compensated_both, rounded_values
from hf_lowrank.methods.second_order import (
    admm_support,
    damped,
    eigenvectors,
    refit_scales,
    refit_values,
    row_errors,
    shrunk,
    sign_descent,
)
from hf_lowrank.methods.slab_gram import first_guess, fit
from hf_lowrank.methods.sparsity import largest_per_row
from hf_lowrank.runtime.quantization import levels, nearest_codes, quantize, spread_scale

from .problems import VALUE_BITS, budget_of, correlated_tokens, gaussian, problem, relative_error, statistics_of


def scaled_problem(out_features: int = 24, in_features: int = 40, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Return a weight and a Gram matrix with a diagonal of ones."""
    weight, statistics = problem(out_features, in_features, seed)
    assert statistics.gram is not None
    C, d = damped(statistics.gram)
    return weight * d, C


def output_gram(features: int) -> Tensor:
    g = correlated_tokens(3 * features, features, seed=11)
    return g.T @ g


def test_damped_gram_has_a_unit_diagonal_and_its_scale() -> None:
    x = correlated_tokens(100, 20)
    C, d = damped(x.T @ x)
    torch.testing.assert_close(C.diagonal(), torch.ones(20, dtype=torch.float64))
    torch.testing.assert_close(
        (C * torch.outer(d, d) - x.T @ x).abs().sum(), (1e-3 * x.square().sum() / 20) * 20, rtol=1e-6, atol=0
    )


def test_refitted_values_are_those_of_least_squares() -> None:
    weight, C = scaled_problem()
    mask = largest_per_row(gaussian(*weight.shape, seed=3).abs(), 7)
    S = refit_values(weight, C, mask)
    assert not bool(S[~mask].any())
    root = torch.linalg.cholesky(C)
    for row in range(len(weight)):
        expected = torch.linalg.lstsq(root.T[:, mask[row]], root.T @ weight[row]).solution
        torch.testing.assert_close(S[row, mask[row]], expected, rtol=1e-5, atol=1e-6)


def test_refitted_scale_in_is_that_of_least_squares() -> None:
    """For u as returned, no other v fits the weighted rows better."""
    weight, C = scaled_problem()
    signs = torch.where(weight > 0, 1.0, -1.0).double()
    omega = torch.linspace(0.2, 2, len(weight), dtype=torch.float64)
    u, v = refit_scales(weight, C, signs, weight.abs().mean(dim=0), omega)
    root = torch.linalg.cholesky(C).T
    design = torch.cat([(omega[i].sqrt() * u[i]) * root * signs[i] for i in range(len(weight))])
    target = torch.cat([omega[i].sqrt() * root @ weight[i] for i in range(len(weight))])
    torch.testing.assert_close(v, torch.linalg.lstsq(design, target[:, None]).solution[:, 0], rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("kept", [0, 3, 12])
def test_no_step_raises_the_error(kept: int) -> None:
    weight, C = scaled_problem()
    parts = first_guess(weight, torch.ones(weight.shape[1], dtype=weight.dtype), kept)

    def error(values: Tensor, binary: Tensor) -> float:
        return float(row_errors(weight - values - binary, C).sum())

    errors = [error(parts.values, parts.binary())]
    values = refit_values(weight - parts.binary(), C, parts.mask)
    errors.append(error(values, parts.binary()))
    magnitudes = torch.outer(parts.scale_out, parts.scale_in)
    signs = sign_descent(weight - values, C, parts.signs, magnitudes)
    errors.append(error(values, magnitudes * signs))
    u, v = refit_scales(weight - values, C, signs, parts.scale_in)
    errors.append(error(values, torch.outer(u, v) * signs))
    for rounds in (1, 2, 3):
        fitted = fit(weight, C, torch.ones(len(C), dtype=C.dtype), kept, rounds=rounds)
        errors.append(error(fitted.values, fitted.binary()))
    assert all(later <= earlier * (1 + 1e-9) for earlier, later in itertools.pairwise(errors))
    assert errors[-1] < errors[0]


def test_admm_finds_a_better_support_than_magnitudes() -> None:
    weight, C = scaled_problem(24, 64)
    mask = largest_per_row(weight.abs(), 16)
    start = refit_values(weight, C, mask)
    support = admm_support(weight, C, eigenvectors(C), 16, start)
    assert bool((support.sum(dim=1) == 16).all())
    assert float(row_errors(weight - refit_values(weight, C, support), C).sum()) < float(
        row_errors(weight - start, C).sum()
    )


def test_lowrank_loses_the_tail_of_the_two_sided_spectrum() -> None:
    weight, statistics = problem(30, 22)
    assert statistics.gram is not None
    root = output_root(output_gram(30), 30)
    layer = Layer("layer", 0, 1, "other", 30, 22)
    method = make_method("lowrank")
    statistics = type(statistics)(**{**statistics.__dict__, "output_gram": output_gram(30)})
    for choice in method.choices(layer, weight, statistics, VALUE_BITS)[::5]:  # type: ignore[attr-defined]
        layer_built = method.build(weight, statistics, choice.spec).to_layer(30, 22)  # type: ignore[attr-defined]
        difference = root @ (weight - layer_built.to_dense(torch.float64))
        C = shrunk(statistics.gram, statistics.tokens)
        assert float(row_errors(difference, C).sum()) / statistics.tokens == pytest.approx(choice.loss, rel=1e-6)
        rank = choice.spec.rank
        assert (
            layer_built.stored_bits() == rank * (30 + 22 - rank) * 64 + 32
        )  # float64 values here, and a bitmap of 30 rows in 4 bytes


def test_two_sided_rounding_is_its_definition() -> None:
    """The codes are those of a plain double loop over w_ij − (L_Gᵀ E L_C)_ij."""
    weight, statistics = problem(9, 20)
    assert statistics.gram is not None
    U, V = inverse_cholesky(statistics.gram, 0.01), inverse_cholesky(output_gram(9), 0.3)
    quantized = compensated_both(weight, U, V, bits=3, group=8)
    L_C, L_G, scale = U / U.diagonal()[:, None], V / V.diagonal()[:, None], spread_scale(quantized.scale, 8, 20)
    E = torch.zeros_like(weight)
    for i in range(9):
        for j in range(20):
            adjusted = weight[i, j] - (L_G.T @ E @ L_C)[i, j]
            code = nearest_codes(adjusted, scale[i, j], 3)
            assert int(code) == int(quantized.codes[i, j])
            E[i, j] = adjusted - levels(code, 3, weight.dtype) * scale[i, j]


@pytest.mark.parametrize("bits", [2, 3, 4])
def test_two_sided_rounding_beats_nearest(bits: int) -> None:
    weight, statistics = problem(40, 48)
    assert statistics.gram is not None
    G = output_gram(40)
    quantized = compensated_both(weight, inverse_cholesky(statistics.gram, 0.01), inverse_cholesky(G, 0.01), bits, 16)
    nearest = quantize(weight, bits, 16, search=True)
    losses = [
        float(((D @ statistics.gram) * (G @ D)).sum())
        for D in (weight - quantized.dequantize(), weight - nearest.dequantize())
    ]
    assert losses[0] < 0.8 * losses[1]


def test_rounded_values_are_their_codes_and_descend() -> None:
    weight, C = scaled_problem()
    mask = largest_per_row(weight.abs(), 10)
    values, unscale = refit_values(weight, C, mask), torch.linspace(0.5, 2, weight.shape[1], dtype=torch.float64)
    quantized, dense = rounded_values(weight, C, mask, values, unscale, bits=4, group=8)
    torch.testing.assert_close((dense * unscale)[mask].view(-1, 10), quantized.dequantize())
    nearest = torch.zeros_like(weight).masked_scatter(
        mask, quantize((values * unscale)[mask].view(-1, 10), 4, 8, search=True).dequantize()
    )
    assert float(row_errors(weight - dense, C).sum()) <= float(row_errors(weight - nearest / unscale, C).sum()) * (
        1 + 1e-9
    )


@pytest.mark.parametrize("method", ["slab-gram", "auto"])
def test_a_fit_to_few_tokens_serves_other_text_better_than_one_to_their_own_correlations(
    method: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    weight, few = gaussian(48, 64, seed=5), statistics_of(correlated_tokens(96, 64))
    x = correlated_tokens(9000, 64)[96:]
    errors = []
    for shrinks in (True, False):
        if not shrinks:
            monkeypatch.setattr(mixed, "shrunk", lambda gram, tokens: gram)
        built = make_method(method).decompose(weight, few, budget_of(48, 64, 0.5)).to_layer(48, 64)
        errors.append(relative_error(built.to_dense(torch.float64), weight, x.T @ x))
    assert errors[0] < errors[1]
