"""Whatever the user calibrates on → batches of token ids with a mask of the tokens that count."""

import hashlib
import inspect
import logging
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from ..runtime.configuration import CompressionConfig
from ..runtime.errors import CompressionError
from .sampling import sample_sequences
from .texts import read_documents, token_stream, windows

LONGEST_SEQUENCE = 2048
TOKENS_PER_BATCH = 8192

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class TokenBatch:
    """What a model is given in calibration.

    Attributes:
        input_ids: token ids (B, T); (B, 0) for a model that reads none.
        attention_mask: (B, T) of those that are no padding; None if all count.
        others: the model's other inputs by name: `pixel_values`, `input_features`, `decoder_input_ids`, ...
    """

    input_ids: Tensor
    attention_mask: Tensor | None = None
    others: dict[str, Tensor] = field(default_factory=dict)

    @property
    def tokens(self) -> int:
        return self.input_ids.numel() if self.attention_mask is None else int(self.attention_mask.sum())

    def arguments(self, model: PreTrainedModel) -> dict[str, Any]:
        """The arguments for a forward pass of the model, on its device and in its dtype, without a cache."""
        given = {"input_ids": self.input_ids if self.input_ids.numel() else None, "attention_mask": self.attention_mask, **self.others}
        arguments: dict[str, Any] = {
            name: tensor.to(model.device, model.dtype if tensor.is_floating_point() else None)
            for name, tensor in given.items()
            if tensor is not None
        }
        return arguments | ({"use_cache": False} if "use_cache" in _accepted(model) else {})


def calibration_batches(
    model: PreTrainedModel, config: CompressionConfig, tokenizer: Any = None, calibration: Any = None
) -> list[TokenBatch]:
    """Make calibration batches from `calibration`, or from `config.calibration` if it is None.

    Args:
        calibration: "self", a dataset name, a text file, or an iterable of texts, token ids, chat conversations (lists of
            messages), or batches of the model's inputs (a DataLoader). An encoder-decoder model without `decoder_input_ids` gets
            the batch's `labels`, or else the text itself, one token late, as in its training.

    Raises:
        CompressionError: if there is nothing to calibrate on, or too little for one sequence.
    """
    source = config.calibration if calibration is None else calibration
    length = sequence_length(model, config)
    if isinstance(source, str) and source == "self":
        if model.config.is_encoder_decoder:
            raise CompressionError(
                f"{type(model).__name__} reads one text and writes another, and cannot calibrate on itself; give calibration= texts or batches"
            )
        return _rows_to_batches(sample_sequences(model, config.samples, length, config.seed))
    if isinstance(source, str):
        documents = read_documents(source, limit=8 * config.samples)
        return _rows_to_batches(_choose_windows(token_stream(_needed(tokenizer, source), documents), length, config))
    items = list(source)
    if not items:
        raise CompressionError("calibration: found an empty iterable, expected texts, token ids, chats or batches")
    if isinstance(items[0], str):
        return _rows_to_batches(_choose_windows(token_stream(_needed(tokenizer, "texts"), items), length, config))
    if isinstance(items[0], Mapping) and "input_ids" in items[0]:
        return [_batch_from_mapping(item) for item in items]
    if isinstance(items[0], Mapping) and "text" in items[0]:
        return calibration_batches(model, config, tokenizer, [item["text"] for item in items])
    rows = [_token_ids(item, tokenizer)[:length] for item in items[: config.samples]]
    return _pad_rows([row for row in rows if row.numel()])


def sequence_length(model: PreTrainedModel, config: CompressionConfig) -> int:
    """Tokens per calibration sequence: as asked, else the model's context, at most 2048.

    Raises:
        CompressionError: if more than the model's context is asked for.
    """
    context = getattr(model.config.get_text_config(), "max_position_embeddings", None) or LONGEST_SEQUENCE
    if config.sequence_length is not None and config.sequence_length > context:
        raise CompressionError(
            f"sequence_length: found {config.sequence_length}, but {type(model).__name__} has a context of {context} tokens"
        )
    return config.sequence_length or min(context, LONGEST_SEQUENCE)


def fingerprint(batches: Iterable[TokenBatch]) -> str:
    """sha256 over the token ids and masks, which names a calibration set in reports and guards a resumed run."""
    digest = hashlib.sha256()
    for batch in batches:
        digest.update(repr(tuple(batch.input_ids.shape)).encode())
        digest.update(batch.input_ids.cpu().to(torch.int64).numpy().tobytes())
        if batch.attention_mask is not None:
            digest.update(batch.attention_mask.cpu().to(torch.int64).numpy().tobytes())
    return digest.hexdigest()


def _choose_windows(stream: Tensor, length: int, config: CompressionConfig) -> Tensor:
    rows = windows(stream, length)
    if len(rows) < config.samples:
        logger.warning(
            "calibration text has %d sequences of %d tokens, fewer than the %d asked for; all are used", len(rows), length, config.samples
        )
    order = torch.randperm(len(rows), generator=torch.Generator().manual_seed(config.seed))
    return rows[order[: config.samples].sort().values]


def _rows_to_batches(rows: Tensor) -> list[TokenBatch]:
    return [TokenBatch(part) for part in rows.split(max(TOKENS_PER_BATCH // rows.shape[1], 1))]


def _pad_rows(rows: list[Tensor]) -> list[TokenBatch]:
    if not rows:
        raise CompressionError("calibration: all samples are empty")
    batches = []
    step = max(TOKENS_PER_BATCH // max(row.numel() for row in rows), 1)
    for first in range(0, len(rows), step):
        part = rows[first : first + step]
        input_ids = torch.nn.utils.rnn.pad_sequence(part, batch_first=True)
        mask = torch.nn.utils.rnn.pad_sequence([torch.ones_like(row) for row in part], batch_first=True)
        batches.append(TokenBatch(input_ids, None if bool(mask.all()) else mask))
    return batches


def _batch_from_mapping(item: Any) -> TokenBatch:
    input_ids = torch.as_tensor(item["input_ids"])
    mask = item.get("attention_mask")
    if input_ids.dim() == 1:
        input_ids = input_ids[None]
    if mask is not None:
        mask = torch.as_tensor(mask).reshape(input_ids.shape)
    return TokenBatch(input_ids, mask)


def _token_ids(item: Any, tokenizer: Any) -> Tensor:
    if isinstance(item, Tensor):
        return item.flatten().long()
    if isinstance(item, (list, tuple)) and item and isinstance(item[0], dict):
        encoded = _needed(tokenizer, "chats").apply_chat_template(list(item), tokenize=True, return_dict=True)
        return torch.tensor(encoded["input_ids"], dtype=torch.long).flatten()
    if isinstance(item, (list, tuple)) and all(isinstance(token, int) for token in item):
        return torch.tensor(item, dtype=torch.long)
    raise CompressionError(f"calibration: found a sample of type {type(item).__name__}, expected a text, token ids, a chat or a batch")


def _needed(tokenizer: Any, what: str) -> Any:
    if tokenizer is None:
        raise CompressionError(f"calibration on {what} needs a tokenizer: compress(model, config, tokenizer=...)")
    return tokenizer
