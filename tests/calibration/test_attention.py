"""Tests of causal attention on a CPU."""

import pytest
import torch
from torch.nn import functional as F

from hf_lowrank.calibration.attention import QUERIES_AT_ONCE, CausalAttention

LENGTHS = (1, QUERIES_AT_ONCE, 2 * QUERIES_AT_ONCE + 7)


def heads(number: int, length: int, width: int, seed: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(2, number, length, width, generator=generator).bfloat16()


@pytest.mark.parametrize("length", LENGTHS)
@pytest.mark.parametrize("own_heads", [1, 2, 4])
@pytest.mark.parametrize("scale", [None, 0.3])
def test_it_errs_no_more_than_pytorch(length: int, own_heads: int, scale: float | None) -> None:
    q, k, v = heads(4, length, 16, 0), heads(own_heads, length, 16, 1), heads(own_heads, length, 24, 2)
    arguments = {"is_causal": True, "scale": scale, "enable_gqa": True}
    exact = F.scaled_dot_product_attention(q.double(), k.double(), v.double(), **arguments)
    usual = F.scaled_dot_product_attention(q, k, v, **arguments)
    with CausalAttention():
        found = F.scaled_dot_product_attention(q, k, v, **arguments)
    assert found.dtype == q.dtype
    assert float((found - exact).norm()) <= 1.1 * float((usual - exact).norm())


def test_other_attention_is_left_to_pytorch() -> None:
    q, mask = heads(2, 96, 16, 0), torch.rand(96, 96, generator=torch.Generator().manual_seed(1)) < 0.9
    mask.fill_diagonal_(True)
    cases = [
        ((q, q, q), {}),
        ((q, q, q), {"attn_mask": mask}),
        ((q.float(), q.float(), q.float()), {"is_causal": True}),
        ((q[:, :, :40], q, q), {"is_causal": True}),
        ((q.clone().requires_grad_(), q, q), {"is_causal": True}),
    ]
    for tensors, arguments in cases:
        usual = F.scaled_dot_product_attention(*tensors, **arguments)
        with CausalAttention():
            found = F.scaled_dot_product_attention(*tensors, **arguments)
        assert torch.equal(found, usual)
