"""Self-calibration: sequences sampled from the model itself, which need no data at all."""

from typing import Any

import torch
from torch import Tensor
from transformers import LogitsProcessor, LogitsProcessorList, PreTrainedModel

from ..runtime.errors import CompressionError, NumericalError

TOKENS_AT_ONCE = 65_536
"""Of the sequences that are sampled together; bounds the memory of their caches."""


class _FiniteLogits(LogitsProcessor):
    """Lets only logits pass that can be sampled from; suppressed tokens have −∞."""

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        if not bool((scores < float("inf")).all()):
            raise NumericalError(
                f"self-calibration: the logits of token {input_ids.shape[1]} are not finite; check the weights or use a wider dtype"
            )
        return scores


def sample_sequences(model: PreTrainedModel, samples: int, length: int, seed: int) -> Tensor:
    """Sequences sampled from the model at temperature 1, (samples, length) int64, each after its start token.

    A model without a start token gets a random first token. An end token only separates documents when it is also the
    start token; otherwise it is not sampled, as nothing follows it in the text that the model knows.

    Raises:
        CompressionError: if the model cannot generate.
        NumericalError: if a logit is not finite.
    """
    if not model.can_generate():
        raise CompressionError(
            f"{type(model).__name__} cannot generate text to calibrate on itself; give calibration= texts or a file"
        )
    config = model.generation_config
    starts = [
        token for token in (config.bos_token_id, model.config.get_text_config().bos_token_id) if isinstance(token, int)
    ]
    ends = config.eos_token_id if isinstance(config.eos_token_id, list) else [config.eos_token_id]
    suppressed = [token for token in ends if token is not None and token not in starts]
    arguments: dict[str, Any] = {
        "do_sample": True,
        "temperature": 1.0,
        "top_k": 0,
        "top_p": 1.0,
        "eos_token_id": None,
        "pad_token_id": 0,
    }
    batches = []
    # generate() draws from torch's global generator; its state is the caller's and is put back
    with torch.random.fork_rng(devices=[model.device] if model.device.type == "cuda" else []):
        torch.manual_seed(seed)
        parallel_slots = max(TOKENS_AT_ONCE // length, 1)
        for first in range(0, samples, parallel_slots):
            count = min(parallel_slots, samples - first)
            if starts:
                prompt = torch.full((count, 1), starts[0], device=model.device)
            else:
                prompt = torch.randint(model.config.get_text_config().vocab_size, (count, 1), device=model.device)
            batches.append(
                model.generate(  # type: ignore[operator]
                    prompt,
                    attention_mask=torch.ones_like(prompt),
                    max_new_tokens=length - 1,
                    suppress_tokens=suppressed or None,
                    logits_processor=LogitsProcessorList([_FiniteLogits()]),
                    **arguments,
                )
                if length > 1
                else prompt
            )
    return torch.cat(batches)
