"""The choice of the entries of a row that are kept."""

from itertools import combinations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from hf_lowrank import CompressionError
from hf_lowrank.budget import Layer
from hf_lowrank.methods import make_method
from hf_lowrank.methods.sparsity import largest_kept, largest_per_row, parse_pattern, relative_scales

from .problems import gaussian

patterns = st.sampled_from(["unstructured", "1:2", "2:4", "3:4", "4:8", "2:5"])


@settings(max_examples=100, deadline=None)
@given(pattern=patterns, columns=st.integers(1, 50), share=st.floats(0, 1), seed=st.integers(0, 999))
def test_mask_has_equal_rows_and_is_legal(pattern: str, columns: int, share: float, seed: int) -> None:
    kept = int(share * largest_kept(pattern, columns))
    mask = largest_per_row(gaussian(6, columns, seed=seed).abs(), kept, pattern)
    assert bool((mask.sum(dim=1) == kept).all())
    if pattern != "unstructured":
        n_of, m_of = parse_pattern(pattern)
        whole = columns // m_of * m_of
        assert int(mask[:, :whole].reshape(6, -1, m_of).sum(dim=2).amax(dim=(0, 1)) if whole else 0) <= n_of
        assert not bool(mask[:, whole:].any())


@settings(max_examples=60, deadline=None)
@given(columns=st.integers(2, 9), kept=st.integers(1, 8), seed=st.integers(0, 999))
def test_unstructured_mask_keeps_the_best_subset(columns: int, kept: int, seed: int) -> None:
    kept = min(kept, columns - 1)
    scores = gaussian(1, columns, seed=seed).abs()
    best = max(sum(float(scores[0, j]) for j in subset) for subset in combinations(range(columns), kept))
    assert float(scores[largest_per_row(scores, kept)].sum()) == pytest.approx(best)


def test_a_full_pattern_keeps_the_best_of_every_group() -> None:
    scores = gaussian(5, 24, seed=0).abs()
    mask = largest_per_row(scores, 12, "2:4")
    for row in range(5):
        for group in range(0, 24, 4):
            order = sorted(range(group, group + 4), key=lambda j: -float(scores[row, j]))
            assert {j for j in range(group, group + 4) if mask[row, j]} == set(order[:2])


@pytest.mark.parametrize("text", ["", "2", "2:", "2-4", "4:2", "0:4", "4:4", "-1:4", "2:4:8", "dense"])
def test_a_bad_pattern_is_an_error(text: str) -> None:
    with pytest.raises(CompressionError, match="pattern is"):
        parse_pattern(text)


def test_relative_scales_are_positive_and_free_of_units() -> None:
    scales = torch.tensor([0.0, 1.0, 3.0], dtype=torch.float64)
    assert bool((relative_scales(scales) > 0).all())
    torch.testing.assert_close(relative_scales(scales), relative_scales(scales * 1e30))
    assert torch.equal(relative_scales(torch.zeros(3)), torch.ones(3))


@pytest.mark.parametrize("pattern", ["unstructured", "2:4"])
def test_every_row_may_have_a_number_of_its_own(pattern: str) -> None:
    scores, kept = gaussian(5, 16, seed=0).abs(), torch.tensor([0, 1, 3, 8, 5])
    mask = largest_per_row(scores, kept, pattern)
    for row, count in enumerate(kept.tolist()):
        assert torch.equal(mask[row : row + 1], largest_per_row(scores[row : row + 1], count, pattern))


@pytest.mark.parametrize("method", ["magnitude", "wanda", "sparsegpt", "oats"])
def test_layers_without_room_for_the_pattern_stay_dense(method: str) -> None:
    """A method says so before any work is done, so that decomposing does not stop half-way."""
    pruning = make_method(method, {"pattern": "4:8"})
    narrow, wide = (Layer("layer", 0, 1, "other", 32, inputs) for inputs in (7, 8))
    assert "no room for the pattern 4:8" in (pruning.leaves_dense(narrow, 0.5) or "")
    assert pruning.leaves_dense(wide, 0.5) is None


@pytest.mark.parametrize("kept", [0, 1, 5, 11, 12])
@pytest.mark.parametrize("values", [1, 2, 3])
def test_equal_scores_are_kept_as_often_as_asked(kept: int, values: int) -> None:
    scores = (gaussian(20, 12, seed=0).abs() * values).floor()
    mask = largest_per_row(scores, kept)
    assert mask.sum(dim=1).eq(kept).all()
    smallest_kept = torch.where(mask, scores, torch.inf).amin(dim=1)
    assert bool((smallest_kept >= torch.where(mask, -1.0, scores).amax(dim=1)).all())
