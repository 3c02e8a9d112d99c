"""RTN and GPTQ: the promises of plain quantization of a whole weight."""

import pytest
import torch

from hf_lowrank import CompressionError
from hf_lowrank.budget import Budget, Layer
from hf_lowrank.methods import Statistics, make_method
from hf_lowrank.methods.factorization import inverse_cholesky
from hf_lowrank.methods.gptq import compensated
from hf_lowrank.runtime.configuration import LayerSpec
from hf_lowrank.runtime.quantization import Quantized, group_scales, quantize, spread_scale

METHODS = ["rtn", "gptq"]


def problem(m: int = 24, n: int = 100, seed: int = 0) -> tuple[torch.Tensor, Statistics]:
    """Return a weight (m, n) and statistics of correlated inputs. Channels differ much in size, and one is dead."""
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(m, n, dtype=torch.float64, generator=generator)
    mixing = torch.randn(n, n, dtype=torch.float64, generator=generator) + 2
    x = (
        torch.randn(4 * n, n, dtype=torch.float64, generator=generator)
        @ mixing
        * torch.logspace(-1, 1, n, dtype=torch.float64)
    )
    x[:, 7] = 0
    return weight, Statistics(len(x), x.norm(dim=0), x.mean(dim=0), x.abs().mean(dim=0), gram=x.T @ x)


def budget_for(bits: int, group: int = 32, m: int = 24, n: int = 100) -> Budget:
    return Budget(LayerSpec(sparse="full", weight_bits=bits, weight_group=group).stored_bits(m, n, 16), m, n, 16)


def loss(weight: torch.Tensor, restored: torch.Tensor, gram: torch.Tensor) -> float:
    difference = weight - restored
    return float(((difference @ gram) * difference).sum())


def restored(method: str, bits: int, **options) -> torch.Tensor:
    weight, statistics = problem()
    part = make_method(method, options).decompose(weight, statistics, budget_for(bits)).weight
    assert isinstance(part, Quantized)
    assert part.bits == bits
    return part.dequantize()


def loop(weight: torch.Tensor, gram: torch.Tensor, bits: int, group: int) -> torch.Tensor:
    """Return GPTQ's result by its definition: after each column the best change of all later ones."""
    n = weight.shape[1]
    W, out = weight.clone(), torch.zeros_like(weight)
    hessian = gram + 0.01 * gram.diagonal().mean() * torch.eye(n, dtype=gram.dtype)
    for j in range(n):
        if j % group == 0:
            cost = [1 / torch.linalg.inv(hessian[k:, k:])[0, 0] for k in range(j, min(j + group, n))]
            scale = group_scales(W[:, j : j + group], bits, torch.stack(cost))
        step = W[:, j] / torch.where(scale == 0, 1.0, scale)
        out[:, j] = ((step + 2 ** (bits - 1)).floor().clamp(0, 2**bits - 1) - (2**bits - 1) / 2) * scale
        rest = slice(j + 1, n)
        if j + 1 < n:  # min over δ of ‖(e_j, δ) X‖² is δ = −e_j H_{j,rest} H_rest⁻¹
            W[:, rest] += torch.outer(W[:, j] - out[:, j], torch.linalg.solve(hessian[rest, rest], hessian[rest, j]))
    return out


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_gptq_is_its_definition(bits):
    weight, statistics = problem(m=6, n=40)
    keep = [j for j in range(40) if j != 7]
    weight, gram = weight[:, keep], statistics.gram[keep][:, keep]
    torch.testing.assert_close(
        compensated(weight, gram, bits, group=8).dequantize(), loop(weight, gram, bits, group=8)
    )


def test_gptq_does_not_depend_on_how_columns_are_blocked(monkeypatch):
    weight, statistics = problem()
    results = []
    for block in (1, 32, 64, 1000):
        monkeypatch.setattr("hf_lowrank.methods.gptq.BLOCK", block)
        results.append(compensated(weight, statistics.gram, 4, group=16).dequantize())
    for result in results[1:]:
        torch.testing.assert_close(result, results[0])


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_compensation_beats_rounding(bits):
    weight, statistics = problem()
    assert loss(weight, restored("gptq", bits), statistics.gram) < 0.7 * loss(
        weight, restored("rtn", bits), statistics.gram
    )


def test_uncorrelated_inputs_leave_nothing_to_compensate():
    weight, _ = problem()
    assert torch.equal(
        compensated(weight, torch.eye(100, dtype=torch.float64), 3, 32).codes,
        quantize(weight, 3, 32, search=True).codes,
    )


@pytest.mark.parametrize("method", METHODS)
def test_more_bits_never_hurt(method):
    weight, statistics = problem()
    errors = [loss(weight, restored(method, bits), statistics.gram) for bits in range(2, 9)]
    assert errors == sorted(errors, reverse=True)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("group", [8, 32, 128])
def test_the_budget_is_kept_and_used(method, group):
    weight, statistics = problem()
    for bits in range(2, 9):
        for spare in (0, 1000):
            exact = budget_for(bits, group)
            budget = Budget(exact.bits + spare, 24, 100, 16)
            layer = (
                make_method(method, {"group_size": group})
                .decompose(weight, statistics, budget)
                .to_layer(24, 100, dtype=torch.bfloat16)
            )
            assert layer.stored_bits() == exact.bits
            assert layer.spec.weight_bits == bits


@pytest.mark.parametrize("method", METHODS)
def test_the_checkpoint_holds_what_the_method_made(method):
    weight, statistics = problem()
    for dtype in (torch.bfloat16, torch.float32):
        decomposition = make_method(method).decompose(weight, statistics, budget_for(3))
        layer = decomposition.to_layer(24, 100, dtype=dtype)
        assert torch.equal(layer.to_dense(torch.float64), decomposition.weight.dequantize())


@pytest.mark.parametrize("method", METHODS)
def test_growth_is_in_bits(method):
    layer = Layer("layer", 0, 1, "other", 24, 100)
    free, fixed = make_method(method), make_method(method, {"bits": "4"})
    spec = free.min_spec(layer)
    assert spec.weight_bits == 2
    assert free.max_steps(layer) == 6
    assert fixed.min_spec(layer).weight_bits == 4
    assert fixed.max_steps(layer) == 0
    for _ in range(free.max_steps(layer)):
        spec = free.next_spec(layer, spec)
    spec.validate("layer", 24, 100)
    assert spec.weight_bits == 8


@pytest.mark.parametrize("method", METHODS)
def test_what_cannot_be_is_refused(method):
    weight, statistics = problem()
    with pytest.raises(CompressionError, match="hold nothing"):
        make_method(method).decompose(weight, statistics, Budget(24 * 100, 24, 100, 16))
    with pytest.raises(CompressionError, match="hold nothing"):
        make_method(method, {"bits": 8}).decompose(weight, statistics, budget_for(4))
    for options in ({"bits": 9}, {"bits": 1}, {"group_size": 0}):
        with pytest.raises(CompressionError, match=f"{method}: {next(iter(options))}"):
            make_method(method, options)


def test_the_inverse_is_factored():
    _, statistics = problem()
    U = inverse_cholesky(statistics.gram, 0.01)
    diagonal = statistics.gram.diagonal()
    mean = diagonal[diagonal > 0].mean()
    hessian = statistics.gram + torch.diag(torch.where(diagonal > 0, 0.0, mean) + 0.01 * mean)
    assert torch.equal(U, U.triu())
    torch.testing.assert_close(U.T @ U @ hessian, torch.eye(100, dtype=torch.float64), rtol=0, atol=1e-6)


def test_a_group_longer_than_a_row_has_one_scale():
    weight, statistics = problem()
    part = compensated(weight, statistics.gram, 4, group=1000)
    assert part.scale.shape == (24, 1)
    assert spread_scale(part.scale, 1000, 100).shape == (24, 100)
