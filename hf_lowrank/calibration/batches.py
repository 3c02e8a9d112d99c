"""Whatever the user calibrates on → batches of token ids with a mask of the tokens that count."""

import hashlib
import inspect
import logging
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from jinja2 import TemplateError
from torch import Tensor
from transformers import PreTrainedModel

from ..runtime.configuration import CompressionConfig
from ..runtime.errors import CompressionError
from .sampling import sample_sequences
from .texts import context_length, read_documents, token_stream, windows

LONGEST_SEQUENCE = 2048
TOKENS_PER_BATCH = 8192
TOKENS_PER_PASS = 2048
"""Through a block on a CPU: what it computes for fewer tokens takes less memory, and stays closer to the processor."""
IGNORED_LABEL = -100

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

    @property
    def inputs(self) -> dict[str, Tensor]:
        """All that there is, by name."""
        given = {
            "input_ids": self.input_ids if self.input_ids.numel() else None,
            "attention_mask": self.attention_mask,
            **self.others,
        }
        return {name: tensor for name, tensor in given.items() if tensor is not None}

    def arguments(self, model: PreTrainedModel) -> dict[str, Any]:
        """The arguments for a forward pass of the model, on its device and in its dtype, without a cache."""
        arguments: dict[str, Any] = {
            name: tensor.to(model.device, model.dtype if tensor.is_floating_point() else None)
            for name, tensor in self.inputs.items()
        }
        parameters = inspect.signature(model.forward).parameters.values()
        if any(parameter.name == "use_cache" or parameter.kind is parameter.VAR_KEYWORD for parameter in parameters):
            arguments["use_cache"] = False
        return arguments


def calibration_batches(
    model: PreTrainedModel, config: CompressionConfig, tokenizer: Any = None, calibration: Any = None
) -> list[TokenBatch]:
    """Make calibration batches from `calibration`, or from `config.calibration` if it is None.

    Args:
        calibration: "self", a dataset name, a file of texts, or an iterable of texts, token ids, chat conversations (lists of
            messages), rows with one of them as `text` or `messages`, or batches of the model's inputs (a DataLoader). An
            encoder-decoder model without `decoder_input_ids` gets the batch's `labels`, or else the text itself, one token late, as
            in its training.

    Raises:
        CompressionError: if there is nothing to calibrate on, or too little for one sequence.
    """
    batches = _batches(model, config, tokenizer, config.calibration if calibration is None else calibration)
    if model.config.is_encoder_decoder:
        batches = [_with_decoder_inputs(model, batch) for batch in batches]
    for batch in batches:
        _check_inputs(model, batch)
    return batches


def _check_inputs(model: PreTrainedModel, batch: TokenBatch) -> None:
    """Raise CompressionError if a batch is not what the model can read."""
    if batch.inputs.keys().isdisjoint({model.main_input_name, "inputs_embeds"}):
        raise CompressionError(
            f"calibration: {type(model).__name__} reads {model.main_input_name}; give batches that have it "
            f"(found {', '.join(batch.inputs) or 'nothing'})"
        )
    context = context_length(model.config)
    if context is not None and batch.input_ids.shape[1] > context:
        raise CompressionError(
            f"calibration: found a sequence of {batch.input_ids.shape[1]} tokens, but {type(model).__name__} has a context of {context}; "
            f"cut it (truncation=True, max_length={context})"
        )
    vocabulary = getattr(model.get_input_embeddings(), "num_embeddings", None)
    if vocabulary is None or not batch.input_ids.numel():
        return
    least, most = (int(bound) for bound in batch.input_ids.aminmax())
    if least < 0 or most >= vocabulary:
        raise CompressionError(
            f"calibration: found token id {least if least < 0 else most}, expected 0 to {vocabulary - 1}, the vocabulary of "
            f"{type(model).__name__}; use the model's own tokenizer"
        )


def _batches(model: PreTrainedModel, config: CompressionConfig, tokenizer: Any, source: Any) -> list[TokenBatch]:
    length = sequence_length(model, config)
    if isinstance(source, str) and source == "self":
        if model.config.is_encoder_decoder:
            raise CompressionError(
                f"{type(model).__name__} reads one text and writes another: it cannot calibrate on itself; give calibration= texts"
            )
        return _rows_to_batches(sample_sequences(model, config.samples, length, config.seed).cpu())
    if isinstance(source, str):
        documents = read_documents(source, limit=8 * config.samples)
        return _rows_to_batches(_choose_windows(token_stream(_needed(tokenizer, source), documents), length, config))
    items = list(source)
    if not items:
        raise CompressionError("calibration: found an empty iterable, expected texts, token ids, chats or batches")
    if isinstance(items[0], str):
        for item in items:
            if not isinstance(item, str):
                raise _no_sample(item)
        return _rows_to_batches(_choose_windows(token_stream(_needed(tokenizer, "texts"), items), length, config))
    if isinstance(items[0], Mapping) and "input_ids" not in items[0]:
        if (column := next((name for name in ("text", "messages") if name in items[0]), None)) is not None:
            return _batches(model, config, tokenizer, [item[column] for item in items])
    if isinstance(items[0], Mapping):
        return [_batch_from_mapping(item, model) for item in items]
    rows = [_token_ids(item, tokenizer)[:length] for item in items[: config.samples]]
    return _pad_rows([row for row in rows if row.numel()])


def split_into_passes(batches: Iterable[TokenBatch], device: torch.device) -> list[TokenBatch]:
    """The batches as they go through the blocks: on a CPU in parts of whole sequences; those with inputs beside tokens stay whole."""
    if device.type != "cpu":
        return list(batches)
    return [part for batch in batches for part in ([batch] if batch.others else _parts(batch))]


def _parts(batch: TokenBatch) -> list[TokenBatch]:
    rows = max(TOKENS_PER_PASS // max(batch.input_ids.shape[1], 1), 1)
    ids = batch.input_ids.split(rows)
    masks = [None] * len(ids) if batch.attention_mask is None else batch.attention_mask.split(rows)
    return [TokenBatch(part, mask) for part, mask in zip(ids, masks, strict=True)]


def sequence_length(model: PreTrainedModel, config: CompressionConfig) -> int:
    """Tokens per calibration sequence: as asked, else the model's context, at most 2048.

    Raises:
        CompressionError: if more than the model's context is asked for.
    """
    context = context_length(model.config) or LONGEST_SEQUENCE
    if config.sequence_length is not None and config.sequence_length > context:
        raise CompressionError(
            f"sequence_length: found {config.sequence_length}, but {type(model).__name__} has a context of {context} tokens"
        )
    return config.sequence_length or min(context, LONGEST_SEQUENCE)


def fingerprint(batches: Iterable[TokenBatch]) -> str:
    """sha256 over the token ids, masks and other inputs, which names a calibration set in reports and guards a resumed run."""
    digest = hashlib.sha256()
    for batch in batches:
        digest.update(repr(tuple(batch.input_ids.shape)).encode())
        digest.update(batch.input_ids.cpu().to(torch.int64).numpy().tobytes())
        if batch.attention_mask is not None:
            digest.update(batch.attention_mask.cpu().to(torch.int64).numpy().tobytes())
        for name, tensor in sorted(batch.others.items()):
            digest.update(f"{name}{tuple(tensor.shape)}".encode())
            digest.update(tensor.cpu().double().numpy().tobytes())
    return digest.hexdigest()


def _choose_windows(stream: Tensor, length: int, config: CompressionConfig) -> Tensor:
    rows = windows(stream, length)
    if len(rows) < config.samples:
        logger.warning(
            "calibration text has %d sequences of %d tokens, fewer than the %d asked for; all are used",
            len(rows),
            length,
            config.samples,
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


def _batch_from_mapping(item: Any, model: PreTrainedModel) -> TokenBatch:
    """A batch of the inputs that the model reads; what else the mapping holds is for its head or for the user."""
    read = {*inspect.signature(model.base_model.forward).parameters} - {"input_ids", "attention_mask"}
    if model.config.is_encoder_decoder:
        read.add("labels")
    else:
        read.discard("labels")
    others = {name: torch.as_tensor(item[name]) for name in sorted(read & {*item}) if item[name] is not None}
    if not others and item.get("input_ids") is None:
        raise CompressionError(
            f"calibration: found samples with the fields {', '.join(map(str, item))}; expected text or messages, or what "
            f"{type(model).__name__} reads, such as {model.main_input_name}"
        )
    mask = None if item.get("attention_mask") is None else torch.as_tensor(item["attention_mask"])
    if item.get("input_ids") is None:
        return TokenBatch(torch.empty(0, 0, dtype=torch.long), mask, others)
    input_ids = torch.as_tensor(item["input_ids"])
    if input_ids.dim() == 1:
        input_ids = input_ids[None]
    return TokenBatch(input_ids, None if mask is None else mask.reshape(input_ids.shape), others)


def _with_decoder_inputs(model: PreTrainedModel, batch: TokenBatch) -> TokenBatch:
    """The batch with what the decoder reads, by teacher forcing: the labels, or else the encoder's own text, one token late."""
    others = {name: tensor for name, tensor in batch.others.items() if name != "labels"}
    if not others.keys().isdisjoint({"decoder_input_ids", "decoder_inputs_embeds"}):
        return replace(batch, others=others)
    text, counted = batch.input_ids, batch.attention_mask
    if "labels" in batch.others:
        text = batch.others["labels"]
        counted = text != IGNORED_LABEL
        text = text.masked_fill(~counted, 0)
    if not text.numel():
        raise CompressionError(
            f"calibration: the decoder of {type(model).__name__} reads text; give batches with decoder_input_ids or labels"
        )
    start = getattr(model.config, "decoder_start_token_id", None)
    first = torch.full_like(text[:, :1], model.config.pad_token_id or 0 if start is None else start)
    others["decoder_input_ids"] = torch.cat([first, text[:, :-1]], dim=1)
    if counted is not None and not bool(counted.all()):
        others["decoder_attention_mask"] = torch.cat([torch.ones_like(first), counted[:, :-1].to(first.dtype)], dim=1)
    return replace(batch, others=others)


def _token_ids(item: Any, tokenizer: Any) -> Tensor:
    if isinstance(item, Tensor):
        return item.flatten().long()
    if isinstance(item, (list, tuple)) and item and isinstance(item[0], dict):
        try:
            encoded = _needed(tokenizer, "chats").apply_chat_template(list(item), tokenize=True, return_dict=True)
        except (ValueError, TemplateError) as error:
            raise CompressionError(f"calibration: the tokenizer makes no tokens of a chat ({error})") from error
        return torch.tensor(encoded["input_ids"], dtype=torch.long).flatten()
    if isinstance(item, (list, tuple)) and all(isinstance(token, int) for token in item):
        return torch.tensor(item, dtype=torch.long)
    raise _no_sample(item)


def _no_sample(item: Any) -> CompressionError:
    return CompressionError(
        f"calibration: found a sample of type {type(item).__name__}, expected a text, token ids, a chat or a batch"
    )


def _needed(tokenizer: Any, what: str) -> Any:
    if tokenizer is None:
        raise CompressionError(f"calibration on {what} needs a tokenizer: compress(model, config, tokenizer=...)")
    return tokenizer
