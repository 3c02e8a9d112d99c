"""A value that is not finite is noticed in any place of a matrix."""

import pytest
import torch

from hf_lowrank.models.linears import is_finite


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_a_value_that_is_not_finite_is_found_wherever_it_is(dtype: torch.dtype, bad: float) -> None:
    matrix = torch.full((37, 91), torch.finfo(dtype).max, dtype=dtype)
    assert is_finite(matrix)
    assert is_finite(matrix[:0])
    for place in ((0, 0), (17, 45), (36, 90)):
        damaged = matrix.clone()
        damaged[place] = bad
        assert not is_finite(damaged)
        assert not is_finite(damaged.T)
