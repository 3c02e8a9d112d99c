"""Sequences are drawn from the unigram distribution of the calibration, as many as asked for and evenly spread."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from hf_lowrank import CompressionError
from hf_lowrank.calibration import TokenBatch, with_unigram_sequences
from hf_lowrank.methods import make_method
from tests.support import tiny_models


@given(
    st.lists(st.integers(1, 5), min_size=1, max_size=4),
    st.integers(1, 9),
    st.floats(0, 1),
    st.booleans(),
    st.integers(0, 3),
)
def test_a_share_of_the_sequences_is_drawn_from_all(
    sizes: list[int], length: int, share: float, padded: bool, seed: int
) -> None:
    generator = torch.Generator().manual_seed(seed)
    batches = []
    for size in sizes:
        mask = (
            (torch.arange(length) <= torch.randint(length, (size, 1), generator=generator)).long() if padded else None
        )
        ids = torch.randint(5, 1000, (size, length), generator=generator)
        batches.append(TokenBatch(ids if mask is None else ids * mask, mask))
    mixed = with_unigram_sequences(batches, share, seed)
    pool: set[int] = set()
    for batch in batches:
        pool.update(batch.input_ids.flatten().tolist())
    changed = 0
    for batch, before in zip(mixed, batches, strict=True):
        assert batch.attention_mask is before.attention_mask
        assert torch.equal(batch.input_ids[:, 0], before.input_ids[:, 0])
        if before.attention_mask is not None:
            assert not bool(batch.input_ids[before.attention_mask == 0].any())
        assert set(batch.input_ids.flatten().tolist()) <= pool
        changed += int((batch.input_ids != before.input_ids).any(1).sum())
    assert changed <= int(sum(sizes) * share)
    again = with_unigram_sequences(batches, share, seed)
    assert all(torch.equal(one.input_ids, other.input_ids) for one, other in zip(mixed, again, strict=True))


def test_drawn_sequences_are_spread_evenly() -> None:
    batches = [TokenBatch(tiny_models.token_ids(6, 40)), TokenBatch(tiny_models.token_ids(6, 40, seed=1))]
    before = torch.cat([batch.input_ids for batch in batches])
    after = torch.cat([batch.input_ids for batch in with_unigram_sequences(batches, 0.25, seed=0)])
    assert (after != before).any(1).nonzero().flatten().tolist() == [3, 7, 11]


@pytest.mark.parametrize("share", [-0.1, 1.5, float("nan")])
def test_a_share_that_is_none_is_refused(share: float) -> None:
    with pytest.raises(CompressionError, match="expected a number from 0 to 1"):
        make_method("slab-gram", {"unigram_share": share})
