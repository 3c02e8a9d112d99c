"""Batches of token ids, with a mask of the tokens that count: what they hold, and how long they may be."""

import hashlib
import inspect
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence
from transformers import PreTrainedModel

from ..models.architectures import forward_names, input_embeddings, main_inputs
from ..models.context import context_length
from ..runtime.configuration import CompressionConfig
from ..runtime.errors import CompressionError, listed

LONGEST_SEQUENCE = 2048
"""Default sequence length, in tokens, of a model with a longer context or without a limit."""

TOKENS_PER_BATCH = 8192
"""Maximum number of tokens in a batch of several sequences."""

TOKENS_PER_PASS = 2048
"""Maximum number of tokens that go through a block at a time.

Intermediate results of fewer tokens take less memory and stay in the caches of the processor.
"""

IGNORED_LABEL = -100
"""Label of a token that does not count in a loss, as in `transformers`."""

DECODER_INPUTS = ("labels", "decoder_input_ids", "decoder_attention_mask", "decoder_inputs_embeds")
"""Inputs (B, T, ...) that have a length of their own, that of the text which an encoder-decoder model writes."""


@dataclass(frozen=True)
class TokenBatch:
    """The inputs of a model for one forward pass of the calibration.

    Attributes:
        input_ids: token ids (B, T). Empty, (0, 0), for a model that reads no tokens of a text.
        attention_mask: (B, T), nonzero where a token is not padding. None if all tokens count.
        others: the model's other inputs by name: `pixel_values`, `input_features`, `decoder_input_ids`, ... The codes
            of several codebooks are one of them, as `input_ids` (B, codebooks, T) or (B, T, codebooks).
    """

    input_ids: Tensor
    attention_mask: Tensor | None = None
    others: dict[str, Tensor] = field(default_factory=dict)

    @property
    def tokens(self) -> int:
        """The number of tokens that count."""
        if self.attention_mask is None:
            return self.input_ids.numel()
        return int(self.attention_mask.sum())

    @property
    def sequences(self) -> int:
        """The number of sequences, or of whatever else the model reads."""
        if self.input_ids.numel():
            return len(self.input_ids)
        return len(next(iter(self.others.values())))

    @property
    def longest(self) -> int:
        """The number of tokens that count in the longest sequence. Zero for a model that reads no tokens."""
        tokens = self.others.get("inputs_embeds", self.input_ids)
        if self.attention_mask is None or not tokens.numel():
            return tokens.shape[1]
        return int((self.attention_mask != 0).sum(dim=1).max())

    @property
    def inputs(self) -> dict[str, Tensor]:
        """All inputs of the batch by name, without those that it does not have."""
        inputs: dict[str, Tensor] = {}
        if self.input_ids.numel():
            inputs["input_ids"] = self.input_ids
        if self.attention_mask is not None:
            inputs["attention_mask"] = self.attention_mask
        return inputs | self.others

    def arguments(self, model: PreTrainedModel) -> dict[str, Any]:
        """Return the arguments for a forward pass of the model, on its device and in its dtype.

        The pass fills no key-value cache.
        """
        arguments: dict[str, Any] = {}
        for name, tensor in self.inputs.items():
            dtype = model.dtype if tensor.is_floating_point() else None
            arguments[name] = tensor.to(model.device, dtype)
        if _accepts_use_cache(model):
            arguments["use_cache"] = False
        return arguments


def _accepts_use_cache(model: PreTrainedModel) -> bool:
    for parameter in inspect.signature(model.forward).parameters.values():
        if parameter.name == "use_cache" or parameter.kind is parameter.VAR_KEYWORD:
            return True
    return False


def check_inputs(model: PreTrainedModel, batches: Iterable[TokenBatch]) -> None:
    """Raise CompressionError if the model cannot read one of the batches."""
    context = context_length(model)
    vocabulary = getattr(input_embeddings(model), "num_embeddings", None)
    needed = main_inputs(model)
    for batch in batches:
        # Embeddings may stand in place of the main input.
        if batch.inputs.keys().isdisjoint({*needed, "inputs_embeds"}):
            raise CompressionError(
                f"calibration: {type(model).__name__} reads {' or '.join(needed)}; give batches that have it "
                f"(found {listed(batch.inputs) or 'nothing'})"
            )
        if context is not None and batch.input_ids.shape[1] > context:
            raise CompressionError(
                f"calibration: found a sequence of {batch.input_ids.shape[1]} tokens, but {type(model).__name__} has "
                f"a context of {context}; cut it (truncation=True, max_length={context})"
            )
        if vocabulary is None or not batch.input_ids.numel():
            continue
        smallest, largest = map(int, batch.input_ids.aminmax())
        if smallest < 0 or largest >= vocabulary:
            raise CompressionError(
                f"calibration: found token id {smallest if smallest < 0 else largest}, expected 0 to "
                f"{vocabulary - 1}, the vocabulary of {type(model).__name__}; use the model's own tokenizer"
            )


def split_into_passes(batches: Iterable[TokenBatch]) -> list[TokenBatch]:
    """Split batches into the parts that go through a block at a time.

    A part is one or more whole sequences, of about `TOKENS_PER_PASS` tokens together. A batch that has inputs beside
    its tokens stays whole.
    """
    passes: list[TokenBatch] = []
    for batch in batches:
        if batch.others:
            passes.append(batch)
        else:
            passes += _parts(batch)
    return passes


def _parts(batch: TokenBatch) -> list[TokenBatch]:
    # A sequence longer than a pass is a part by itself.
    rows = max(TOKENS_PER_PASS // max(batch.input_ids.shape[1], 1), 1)
    ids = batch.input_ids.split(rows)
    if batch.attention_mask is None:
        return [TokenBatch(part) for part in ids]
    return list(map(TokenBatch, ids, batch.attention_mask.split(rows)))


def sequence_length(model: PreTrainedModel, config: CompressionConfig) -> int:
    """Return the number of tokens per calibration sequence: as asked for, else the model's context, at most 2048.

    Raises:
        CompressionError: if more than the model's context is asked for.
    """
    context = context_length(model)
    if config.sequence_length is None:
        return LONGEST_SEQUENCE if context is None else min(context, LONGEST_SEQUENCE)
    if context is not None and config.sequence_length > context:
        raise CompressionError(
            f"sequence_length: found {config.sequence_length}, but {type(model).__name__} has a context of {context} "
            "tokens"
        )
    return config.sequence_length


def fingerprint(batches: Iterable[TokenBatch]) -> str:
    """Return the sha256 over the token ids, masks and other inputs.

    It names a calibration set in reports. A resumed run is refused if it differs.
    """
    digest = hashlib.sha256()
    for batch in batches:
        # The shape keeps apart batches whose tokens are the same, in other rows.
        digest.update(repr(tuple(batch.input_ids.shape)).encode())
        digest.update(batch.input_ids.cpu().to(torch.int64).numpy().tobytes())
        if batch.attention_mask is not None:
            digest.update(batch.attention_mask.cpu().to(torch.int64).numpy().tobytes())
        for name, tensor in sorted(batch.others.items()):
            digest.update(f"{name}{tuple(tensor.shape)}".encode())
            digest.update(tensor.cpu().double().numpy().tobytes())
    return digest.hexdigest()


def batch_rows(rows: Tensor) -> list[TokenBatch]:
    """Batch sequences of one length, (rows, length)."""
    parts = rows.split(max(TOKENS_PER_BATCH // rows.shape[1], 1))
    return [TokenBatch(part) for part in parts]


def batch_sequences(sequences: Sequence[tuple[Tensor, Tensor | None]]) -> list[TokenBatch]:
    """Batch sequences of different lengths, padded on the right with a mask.

    Args:
        sequences: token ids (T,), each with a mask (T,) of those that count, or None if all do.
    """
    batches = []
    longest = max((len(ids) for ids, _ in sequences), default=1)
    step = max(TOKENS_PER_BATCH // longest, 1)
    for first in range(0, len(sequences), step):
        part = sequences[first : first + step]
        input_ids = pad_sequence([ids for ids, _ in part], batch_first=True)
        masks = [torch.ones_like(ids) if mask is None else mask for ids, mask in part]
        mask = pad_sequence(masks, batch_first=True)
        # A mask that masks nothing is left out.
        batches.append(TokenBatch(input_ids, None if bool(mask.all()) else mask))
    return batches


def first_sequences(batch: TokenBatch, count: int) -> TokenBatch:
    """Return a batch of the first sequences of a batch.

    A batch with an input that is not one tensor per sequence, such as the patches of all pictures together, stays
    whole.
    """
    sequences = batch.sequences
    if sequences <= count or any(len(tensor) != sequences for tensor in batch.inputs.values()):
        return batch
    mask = batch.attention_mask
    others = {name: tensor[:count] for name, tensor in batch.others.items()}
    return TokenBatch(batch.input_ids[:count], None if mask is None else mask[:count], others)


def first_tokens(batch: TokenBatch, length: int) -> TokenBatch:
    """Return a batch of at most `length` tokens of every sequence, from the first token that counts.

    A batch with an input that does not go along with the tokens, such as pictures, keeps its length.
    """
    others = dict(batch.others)
    decoder_inputs = {name: others.pop(name)[:, :length] for name in DECODER_INPUTS if name in others}
    tokens = others.get("inputs_embeds", batch.input_ids)
    batch_size, columns = tokens.shape[:2]
    if columns <= length or any(tensor.shape[:2] != tokens.shape[:2] for tensor in others.values()):
        return replace(batch, others=others | decoder_inputs)
    mask = batch.attention_mask
    start = torch.zeros(batch_size, dtype=torch.long)
    if mask is not None:  # padding may be on the left
        start = (mask != 0).long().argmax(dim=1).clamp(max=columns - length)
    rows = torch.arange(batch_size)[:, None]
    kept = start[:, None] + torch.arange(length)  # (B, length)
    others = {name: tensor[rows, kept] for name, tensor in others.items()}
    input_ids = batch.input_ids[rows, kept] if batch.input_ids.numel() else batch.input_ids
    return TokenBatch(input_ids, None if mask is None else mask[rows, kept], others | decoder_inputs)


def reads_labels(model: PreTrainedModel) -> bool:
    """Return whether a model reads labels as the inputs of its decoder, delayed, if it is given no others."""
    names = forward_names(model)
    if model.config.is_encoder_decoder and "decoder_input_ids" in names:
        return True
    # Detectors have decoders, too, and no text or sound to decode.
    return "labels" in names and any(name.startswith("decoder_input_") for name in names)


def with_decoder_inputs(model: PreTrainedModel, batch: TokenBatch) -> TokenBatch:
    """Return the batch with the inputs of the decoder, by teacher forcing.

    They are the labels, or else the encoder's own text, delayed by one token. Labels that are no text, such as sounds,
    stay as they are: the model delays them in its own way.

    Raises:
        CompressionError: if the batch has neither.
    """
    others = dict(batch.others)
    labels = others.pop("labels", None)
    if any(name.startswith("decoder_input") for name in others):
        return replace(batch, others=others)
    reads_text = model.config.is_encoder_decoder and "decoder_input_ids" in forward_names(model)
    if not reads_text or (labels is not None and (labels.dim() != 2 or labels.is_floating_point())):
        return batch
    if labels is None:
        text = batch.input_ids
        mask = batch.attention_mask
        if not _is_text_of(model.get_decoder(), text):
            text = text[:, :0]
    else:
        # Labels mark positions that do not count by a number that is not a token id.
        mask = labels != IGNORED_LABEL
        text = labels.masked_fill(~mask, 0)
    if not text.numel():
        raise CompressionError(
            f"calibration: the decoder of {type(model).__name__} reads text; give batches with decoder_input_ids or "
            "labels"
        )
    # T5 and others start their decoders with the padding token.
    start = getattr(model.config, "decoder_start_token_id", None)
    if start is None:
        start = getattr(model.config, "pad_token_id", None) or 0
    first = torch.full_like(text[:, :1], start)
    others["decoder_input_ids"] = torch.cat([first, text[:, :-1]], dim=1)
    if mask is not None and not bool(mask.all()):
        # The mask moves with the tokens, and the start token counts.
        others["decoder_attention_mask"] = torch.cat([torch.ones_like(first), mask[:, :-1].to(first.dtype)], dim=1)
    return replace(batch, others=others)


def _is_text_of(decoder: nn.Module, text: Tensor) -> bool:
    """Return whether token ids are in the vocabulary of a decoder. They may be for its encoder only."""
    embeddings = decoder.get_input_embeddings() if isinstance(decoder, PreTrainedModel) else None
    vocabulary = getattr(embeddings, "num_embeddings", None)
    return vocabulary is not None and text.numel() > 0 and int(text.max()) < vocabulary
