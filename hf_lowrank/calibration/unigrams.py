"""Sequences without context among the calibration, so that a fit holds for text that is unlike it, too."""

from dataclasses import replace

import torch

from .batches import TokenBatch


def with_unigram_sequences(batches: list[TokenBatch], share: float, seed: int) -> list[TokenBatch]:
    """The same batches, with every 1/share-th sequence drawn anew from the unigram distribution of them all.

    Layers that are fitted to one kind of text give up the directions that it never uses. A context in which any token may stand beside
    any other uses them, and takes no text but the user's own. First tokens stay, as models know their start token only there.

    Args:
        batches: of token ids, (B, T) each.
        share: of the sequences that are drawn, from 0 to 1; they are spread evenly over the batches.
        seed: of the draws.
    """
    rows = sum(len(batch.input_ids) for batch in batches)
    drawn = (torch.arange(rows + 1, dtype=torch.float64) * share).floor().diff() > 0
    counted = [
        torch.ones_like(batch.input_ids) if batch.attention_mask is None else batch.attention_mask for batch in batches
    ]
    pool = torch.cat([batch.input_ids[mask.bool()] for batch, mask in zip(batches, counted, strict=True)])
    generator = torch.Generator().manual_seed(seed)
    found = []
    for batch, mask, chosen in zip(
        batches, counted, drawn.split([len(batch.input_ids) for batch in batches]), strict=True
    ):
        tokens = pool[torch.randint(len(pool), batch.input_ids.shape, generator=generator)]
        replaced = mask.bool() & chosen[:, None]
        replaced[:, 0] = False
        found.append(replace(batch, input_ids=torch.where(replaced, tokens, batch.input_ids)))
    return found
