"""Sequences without context for the calibration, so that a fit also holds for text that is unlike it."""

from dataclasses import replace

import torch
from torch import Tensor

from .batches import TokenBatch


def with_unigram_sequences(batches: list[TokenBatch], share: float, seed: int) -> list[TokenBatch]:
    """Replace every 1/share-th sequence of the batches by tokens drawn from the unigram distribution of all batches.

    Layers that are fitted to one kind of text give up the directions that it never uses. A context in which any token
    may stand beside any other uses them, and needs no text but the user's own. First tokens are kept, as models know
    their start token only there. Padding is kept, too.

    Args:
        batches: batches of token ids, (B, T) each.
        share: the share of sequences to replace, from 0 to 1. They are spread evenly over the batches.
        seed: the seed of the draws.
    """
    sizes = [len(batch.input_ids) for batch in batches]
    replaced_rows = _evenly_spread(sum(sizes), share).split(sizes)
    masks = [_mask(batch) for batch in batches]
    pool = torch.cat([batch.input_ids[mask] for batch, mask in zip(batches, masks, strict=True)])
    # There is one pool over all batches: drawing uniformly from it is drawing from the unigram distribution.
    generator = torch.Generator().manual_seed(seed)
    mixed = []
    for batch, mask, rows in zip(batches, masks, replaced_rows, strict=True):
        # Rows that stay are drawn, too, so that the share does not change the tokens of a row.
        tokens = pool[torch.randint(len(pool), batch.input_ids.shape, generator=generator)]
        replaced = mask & rows[:, None]
        replaced[:, 0] = False
        mixed.append(replace(batch, input_ids=torch.where(replaced, tokens, batch.input_ids)))
    return mixed


def _evenly_spread(rows: int, share: float) -> Tensor:
    """Mark a share of the rows at even distances, (rows,) bool."""
    # A row is marked where the running sum of the share reaches the next integer.
    return (torch.arange(rows + 1, dtype=torch.float64) * share).floor().diff() > 0


def _mask(batch: TokenBatch) -> Tensor:
    """Return which tokens are not padding, (B, T) bool."""
    if batch.attention_mask is None:
        return torch.ones_like(batch.input_ids, dtype=torch.bool)
    return batch.attention_mask.bool()
