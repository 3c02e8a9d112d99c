"""How many tokens a model reads at most."""

import math
from typing import Any

from torch import nn
from transformers import PreTrainedModel

LIMITS = ("max_position_embeddings", "max_seq_len", "max_target_positions", "max_encoder_position_embeddings")
"""Names by which configs of text models give the number of their positions. Other names are mapped to the first one by
transformers itself."""


def context_length(model: PreTrainedModel) -> int | None:
    """Return the maximum number of tokens for which a model was made. None if it has no limit, or none is known."""
    try:
        config: Any = model.config.get_text_config()
    except ValueError:  # several text models in one
        return None
    limits = []
    for name in LIMITS:
        limit = getattr(config, name, None)
        # Zero, -1 and infinity say that there is none.
        if isinstance(limit, (int, float)) and 0 < limit < math.inf:
            limits.append(int(limit))
    if not limits:
        return None
    return min(limits) - _reserved_positions(model, min(limits))


def _reserved_positions(model: PreTrainedModel, positions: int) -> int:
    """Return how many positions are there for no token.

    RoBERTa and its relatives count from the position after the one that stands for padding.
    """
    for name, module in model.named_modules():
        is_learned = isinstance(module, nn.Embedding) and "position" in name.rpartition(".")[2]
        if is_learned and module.num_embeddings == positions and module.padding_idx is not None:
            return int(module.padding_idx) + 1
    return 0
