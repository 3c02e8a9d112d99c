"""The Gram matrix of output gradients stands for what an error of a weight costs."""

import pytest
import torch
from torch import nn

from hf_lowrank.calibration.curvature import OutputGramSums, relative_energies

TOKENS, INPUTS, OUTPUTS = 4096, 24, 16


@pytest.mark.parametrize("power", [-2.0, -1.0, 0.0, 1.0])
def test_the_cost_of_an_error_is_that_on_the_tokens_where_it_matters(power: float) -> None:
    """For random D, tr(G D C Dᵀ) / T is Σ (g · D x)², also where large gradients have small inputs."""
    generator = torch.Generator().manual_seed(0)
    size = torch.exp(0.5 * torch.randn(TOKENS, 1, generator=generator))
    channels = torch.exp(torch.randn(INPUTS, generator=generator))  # no channel counts more for being large
    x = size * channels * torch.randn(TOKENS, INPUTS, generator=generator)
    g = size**power * torch.randn(TOKENS, OUTPUTS, generator=generator)
    sums = OutputGramSums({"layer": nn.Linear(INPUTS, OUTPUTS)})
    sums._add("layer", x, g)
    C, G = x.T @ x, sums.totals()["layer"]
    exact = estimate = 0.0
    for _ in range(20):
        D = torch.randn(OUTPUTS, INPUTS, generator=generator) / channels
        exact += float(((x @ D.T) * g).sum(dim=1).square().sum())
        estimate += float(((G @ D @ C) * D).sum()) / TOKENS
    assert estimate == pytest.approx(exact, rel=0.1)


def test_energies_are_one_on_average_and_dead_channels_have_no_say() -> None:
    x = torch.randn(50, 6, generator=torch.Generator().manual_seed(0))
    found = relative_energies(x)
    assert found.mean() == pytest.approx(1, rel=1e-5)
    torch.testing.assert_close(relative_energies(torch.cat([x, torch.zeros(50, 3)], dim=1)), found)
    assert not relative_energies(torch.zeros(4, 3)).any()
