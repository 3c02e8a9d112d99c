"""Layers to compress with the statistics of explicit tokens, and the error by which methods are judged."""

import torch
from torch import Tensor

from hf_lowrank.budget import Budget
from hf_lowrank.methods import Statistics

VALUE_BITS = 16


def generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def gaussian(*shape: int, seed: int) -> Tensor:
    """Return standard normal values, float64."""
    return torch.randn(*shape, generator=generator(seed), dtype=torch.float64)


def correlated_tokens(tokens: int, features: int, seed: int = 0) -> Tensor:
    """Return inputs (T, n) of very unequal, correlated channels with a mean, like those of a language model."""
    mixing = gaussian(features, features, seed=seed) / features**0.5
    spread = torch.exp(0.7 * gaussian(features, seed=seed + 1))
    return (gaussian(tokens, features, seed=seed + 2) @ mixing + 0.3 * gaussian(features, seed=seed + 3)) * spread


def compressed_tokens(x: Tensor, seed: int = 0) -> Tensor:
    """Return inputs (T, n) as compressed layers in front could change the inputs x (T, n)."""
    return 0.9 * x + 0.1 * x.abs().mean() * gaussian(*x.shape, seed=seed + 4)


def statistics_of(
    x: Tensor, compressed_inputs: Tensor | None = None, squared_gradients: Tensor | None = None
) -> Statistics:
    """Return all statistics of the tokens x (T, n)."""
    compressed_inputs = compressed_tokens(x) if compressed_inputs is None else compressed_inputs
    return Statistics(
        tokens=x.shape[0],
        column_norms=x.norm(dim=0),
        mean=x.mean(dim=0),
        mean_abs=x.abs().mean(dim=0),
        gram=x.T @ x,
        squared_gradients=torch.linspace(0.1, 1, x.shape[1], dtype=torch.float64)
        if squared_gradients is None
        else squared_gradients,
        compressed_input_gram=compressed_inputs.T @ compressed_inputs,
        cross_gram=x.T @ compressed_inputs,
    )


def problem(out_features: int, in_features: int, seed: int = 0) -> tuple[Tensor, Statistics]:
    """Return a weight (m, n) and statistics of four tokens per channel."""
    return gaussian(out_features, in_features, seed=seed + 5), statistics_of(
        correlated_tokens(4 * in_features, in_features, seed)
    )


def budget_of(out_features: int, in_features: int, ratio: float, accounting: str = "bits") -> Budget:
    """Return the budget that is left when `ratio` of the dense bits is removed."""
    bits = int((1 - ratio) * out_features * in_features * VALUE_BITS)
    return Budget(bits, out_features, in_features, VALUE_BITS, accounting)


def relative_error(approximation: Tensor, weight: Tensor, gram: Tensor) -> float:
    """Return ‖(W − Ŵ) X‖ / ‖W X‖."""
    difference = weight - approximation.detach()
    return float((((difference @ gram) * difference).sum() / ((weight @ gram) * weight).sum()).sqrt())
