"""Self-calibration: sequences sampled from the model itself, which need no data at all."""

import logging
import time
from typing import Any

import torch
from torch import Tensor
from transformers import LogitsProcessor, LogitsProcessorList, PreTrainedModel, StaticCache

from ..runtime.errors import CompressionError, NumericalError

TOKENS_AT_ONCE = 32_768
"""Maximum number of tokens that are sampled together. It bounds the memory of the key-value caches."""

TIMED_STEPS = 4
"""Number of steps by which the time of all is foretold."""

WORTH_TELLING = 5.0
"""Number of seconds from which on the time is foretold."""

logger = logging.getLogger(__name__)


class _FiniteLogits(LogitsProcessor):
    """Raises NumericalError for logits that cannot be sampled from.

    A logit of −∞ is allowed, as suppressed tokens have it.
    """

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        if not bool((scores < float("inf")).all()):  # the comparison is false for NaN, too
            raise NumericalError(
                f"self-calibration: the logits of token {input_ids.shape[1]} are not finite; check the weights or use "
                "a wider dtype"
            )
        return scores


def sample_sequences(model: PreTrainedModel, samples: int, length: int, seed: int) -> Tensor:
    """Sample sequences from the model at temperature 1, (samples, length) int64, each after its start token.

    A model without a start token gets a random first token. An end token is sampled only if it is also the start token
    and so separates documents. Any other end token is suppressed: in the text that the model knows nothing follows it.

    Raises:
        CompressionError: if the model cannot generate.
        NumericalError: if a logit is not finite.
    """
    if not model.can_generate():
        raise CompressionError(
            f"{type(model).__name__} cannot generate text to calibrate on itself; give calibration= texts or a file"
        )
    starts = _start_tokens(model)
    suppressed = _suppressed_tokens(model, starts)
    batches = []
    # `generate()` draws from torch's global generators, whose states are the caller's and are put back.
    cuda_devices = [model.device] if model.device.type == "cuda" else []
    with torch.random.fork_rng(devices=cuda_devices):
        batch_size = min(max(TOKENS_AT_ONCE // length, 1), samples)
        if length > 2 * TIMED_STEPS:
            _foretell(model, _prompts(model, batch_size, starts), samples, length, suppressed)
        torch.manual_seed(seed)
        for first in range(0, samples, batch_size):
            prompts = _prompts(model, min(batch_size, samples - first), starts)
            batches.append(_continued(model, prompts, length, suppressed))
    return torch.cat(batches)


def _prompts(model: PreTrainedModel, count: int, starts: list[int]) -> Tensor:
    """Return the first tokens of sequences, (count, 1)."""
    if starts:
        return torch.full((count, 1), starts[0], device=model.device)
    # Without a start token any token begins a sequence with equal probability.
    return torch.randint(model.config.get_text_config().vocab_size, (count, 1), device=model.device)


def _foretell(model: PreTrainedModel, prompts: Tensor, samples: int, length: int, suppressed: list[int]) -> None:
    """Say how long the sampling will take, by the first steps of a batch, unless it is done in an instant."""
    seconds = []
    # What is done once for every batch, before its first step, is left out by the difference.
    for steps in (1, 1 + TIMED_STEPS):
        start = time.monotonic()
        _continued(model, prompts, 1 + steps, suppressed, cache_length=length)
        seconds.append(time.monotonic() - start)
    batches = -(-samples // len(prompts))
    total = max(seconds[1] - seconds[0], 0.0) / TIMED_STEPS * (length - 1) * batches
    if total >= WORTH_TELLING:
        logger.warning(
            "sampling %d sequences of %d tokens from the model takes about %d s (the bundled text takes none)",
            samples,
            length,
            round(total),
        )


def _start_tokens(model: PreTrainedModel) -> list[int]:
    """Return the start tokens that the model's configs name. The first one starts the sequences."""
    return _in_vocabulary(model, [model.generation_config.bos_token_id, model.config.get_text_config().bos_token_id])


def _suppressed_tokens(model: PreTrainedModel, starts: list[int]) -> list[int]:
    """Return the end tokens that do not start a document, too."""
    ends = model.generation_config.eos_token_id
    if not isinstance(ends, list):
        ends = [ends]
    return [token for token in _in_vocabulary(model, ends) if token not in starts]


def _in_vocabulary(model: PreTrainedModel, tokens: list[Any]) -> list[int]:
    """Return the token ids that the model has. Configs of small models often keep the default ids of large ones."""
    size = model.config.get_text_config().vocab_size
    return [token for token in tokens if isinstance(token, int) and 0 <= token < size]


def _continued(
    model: PreTrainedModel, prompt: Tensor, length: int, suppressed: list[int], cache_length: int | None = None
) -> Tensor:
    """Continue prompts (B, 1) to sequences (B, length), with a cache for `length` tokens, or for more."""
    if length == 1:  # generate() refuses to add no token
        return prompt
    # Tokens follow the model's own distribution: sampling is not sharpened and not cut off, whatever the generation
    # config says.
    settings: dict[str, Any] = {
        "do_sample": True,
        "temperature": 1.0,
        "top_k": 0,
        "top_p": 1.0,
        "eos_token_id": None,
        "pad_token_id": 0,
        "suppress_tokens": suppressed or None,
        "logits_processor": LogitsProcessorList([_FiniteLogits()]),
    }
    # A cache that is allocated once spares a copy of all of it at every step. Transformers marks the models that can
    # use it as those that compile, which nothing is to do here.
    if getattr(model, "_can_compile_fullgraph", False):
        text_config = model.config.get_text_config(decoder=True)
        settings["past_key_values"] = StaticCache(config=text_config, max_cache_len=cache_length or length)
        settings["disable_compile"] = True
    sequences: Tensor = model.generate(  # type: ignore[operator]
        prompt, attention_mask=torch.ones_like(prompt), max_new_tokens=length - 1, **settings
    )
    return sequences
