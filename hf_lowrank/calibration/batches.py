"""Turn texts, token ids, chats or inputs into batches, with a mask of the tokens that count."""

import hashlib
import inspect
import logging
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from jinja2 import TemplateError
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from transformers import PreTrainedModel

from ..models.architectures import input_embeddings, main_input, without_head
from ..runtime.configuration import CompressionConfig
from ..runtime.errors import CompressionError
from .sampling import sample_sequences
from .texts import context_length, read_documents, token_stream, windows

LONGEST_SEQUENCE = 2048
"""Default sequence length, in tokens, of a model with a longer context or with an unknown one."""

TOKENS_PER_BATCH = 8192
"""Maximum number of tokens in a batch of several sequences."""

TOKENS_PER_PASS = 2048
"""Maximum number of tokens that go through a block at a time on a CPU.

Intermediate results of fewer tokens take less memory and stay in the caches of the processor.
"""

DOCUMENTS_PER_SAMPLE = 8
"""Number of documents that are read from a dataset for every calibration sequence."""

IGNORED_LABEL = -100
"""Label of a token that does not count in a loss, as in `transformers`."""

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class TokenBatch:
    """The inputs of a model for one forward pass of the calibration.

    Attributes:
        input_ids: token ids (B, T). Empty, (B, 0), for a model that reads no tokens.
        attention_mask: (B, T), nonzero where a token is not padding. None if all tokens count.
        others: the model's other inputs by name: `pixel_values`, `input_features`, `decoder_input_ids`, ...
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


def calibration_batches(
    model: PreTrainedModel, config: CompressionConfig, tokenizer: Any = None, calibration: Any = None
) -> list[TokenBatch]:
    """Make calibration batches from `calibration`, or from `config.calibration` if it is None.

    Args:
        calibration: "self", a dataset name, a file of texts, or an iterable. Its items are texts, token ids, chat
            conversations (lists of messages), rows with one of them as `text` or `messages`, or batches of the model's
            inputs (a DataLoader). An encoder-decoder model whose batches have no `decoder_input_ids` gets the batch's
            `labels`, or else the text itself, delayed by one token as in its training.

    Raises:
        CompressionError: if there is nothing to calibrate on, or too little for one sequence.
    """
    batches = _batches(model, config, tokenizer, config.calibration if calibration is None else calibration)
    # Some detectors call themselves encoder-decoders, too, and have no text to decode.
    if model.config.is_encoder_decoder and "decoder_input_ids" in inspect.signature(model.forward).parameters:
        batches = [_with_decoder_inputs(model, batch) for batch in batches]
    # An input that the model cannot read is an error before any work is done.
    for batch in batches:
        _check_inputs(model, batch)
    return batches


def _check_inputs(model: PreTrainedModel, batch: TokenBatch) -> None:
    """Raise CompressionError if the model cannot read a batch."""
    # Embeddings may stand in place of the main input.
    needed = main_input(model)
    if batch.inputs.keys().isdisjoint({needed, "inputs_embeds"}):
        raise CompressionError(
            f"calibration: {type(model).__name__} reads {needed}; give batches that have it "
            f"(found {', '.join(batch.inputs) or 'nothing'})"
        )
    context = context_length(model.config)
    if context is not None and batch.input_ids.shape[1] > context:
        raise CompressionError(
            f"calibration: found a sequence of {batch.input_ids.shape[1]} tokens, but {type(model).__name__} has a "
            f"context of {context}; cut it (truncation=True, max_length={context})"
        )
    vocabulary = getattr(input_embeddings(model), "num_embeddings", None)
    if vocabulary is None or not batch.input_ids.numel():
        return
    smallest, largest = map(int, batch.input_ids.aminmax())
    if smallest < 0 or largest >= vocabulary:
        raise CompressionError(
            f"calibration: found token id {smallest if smallest < 0 else largest}, expected 0 to {vocabulary - 1}, "
            f"the vocabulary of {type(model).__name__}; use the model's own tokenizer"
        )


def _batches(model: PreTrainedModel, config: CompressionConfig, tokenizer: Any, source: Any) -> list[TokenBatch]:
    """Make the batches from `source`: a name, or an iterable whose first item tells the kind of all."""
    length = sequence_length(model, config)
    if isinstance(source, str) and source == "self":
        return _batches_from_model(model, config, length)
    if isinstance(source, str):
        documents = read_documents(source, limit=DOCUMENTS_PER_SAMPLE * config.samples)
        return _batches_from_texts(_required(tokenizer, source), documents, length, config)
    items = list(source)
    if not items:
        raise CompressionError("calibration: found an empty iterable, expected texts, token ids, chats or batches")
    first = items[0]
    if isinstance(first, str):
        for item in items:
            if not isinstance(item, str):
                raise _unusable_sample(item)
        return _batches_from_texts(_required(tokenizer, "texts"), items, length, config)
    if isinstance(first, Mapping):
        column = _text_column(first)
        if column is not None:
            return _batches(model, config, tokenizer, [item[column] for item in items])
        return [_batch_from_mapping(item, model) for item in items]
    # With token ids and chats every item is a sequence by itself.
    rows = []
    for item in items[: config.samples]:
        row = _token_ids(item, tokenizer)[:length]
        if row.numel():
            rows.append(row)
    return _pad_rows(rows)


def _batches_from_model(model: PreTrainedModel, config: CompressionConfig, length: int) -> list[TokenBatch]:
    """Sample the calibration sequences from the model itself."""
    if model.config.is_encoder_decoder:
        raise CompressionError(
            f"{type(model).__name__} reads one text and writes another: it cannot calibrate on itself; "
            "give calibration= texts"
        )
    return _rows_to_batches(sample_sequences(model, config.samples, length, config.seed).cpu())


def _batches_from_texts(
    tokenizer: Any, documents: Iterable[str], length: int, config: CompressionConfig
) -> list[TokenBatch]:
    return _rows_to_batches(_choose_windows(token_stream(tokenizer, documents), length, config))


def _text_column(row: Mapping[str, Any]) -> str | None:
    """Return the column of a row of text or of a chat. None if the row holds the model's own inputs."""
    if "input_ids" in row:
        return None
    for column in ("text", "messages"):
        if column in row:
            return column
    return None


def split_into_passes(batches: Iterable[TokenBatch], device: torch.device) -> list[TokenBatch]:
    """Split batches into the parts that go through a block at a time.

    On a CPU a part is one or more whole sequences, of about `TOKENS_PER_PASS` tokens together. A batch that has inputs
    beside its tokens stays whole. On other devices every batch stays whole.
    """
    if device.type != "cpu":
        return list(batches)
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
    context = context_length(model.config) or LONGEST_SEQUENCE
    if config.sequence_length is not None and config.sequence_length > context:
        raise CompressionError(
            f"sequence_length: found {config.sequence_length}, but {type(model).__name__} has a context of {context} "
            "tokens"
        )
    return config.sequence_length or min(context, LONGEST_SEQUENCE)


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


def _choose_windows(stream: Tensor, length: int, config: CompressionConfig) -> Tensor:
    """Draw `config.samples` windows of the stream by the seed, in the order of the text, (samples, length)."""
    rows = windows(stream, length)
    if len(rows) < config.samples:
        logger.warning(
            "calibration text has %d sequences of %d tokens, fewer than the %d asked for; all are used",
            len(rows),
            length,
            config.samples,
        )
    # Windows are drawn without repetition. They are sorted, so that a larger sample only adds rows between those of a
    # smaller one.
    order = torch.randperm(len(rows), generator=torch.Generator().manual_seed(config.seed))
    return rows[order[: config.samples].sort().values]


def _rows_to_batches(rows: Tensor) -> list[TokenBatch]:
    """Batch sequences of one length, (rows, length)."""
    parts = rows.split(max(TOKENS_PER_BATCH // rows.shape[1], 1))
    return [TokenBatch(part) for part in parts]


def _pad_rows(rows: list[Tensor]) -> list[TokenBatch]:
    """Batch sequences of different lengths, padded on the right with a mask.

    Raises:
        CompressionError: if there are none.
    """
    if not rows:
        raise CompressionError("calibration: all samples are empty")
    batches = []
    longest = max(map(len, rows))
    step = max(TOKENS_PER_BATCH // longest, 1)
    for first in range(0, len(rows), step):
        part = rows[first : first + step]
        input_ids = pad_sequence(part, batch_first=True)
        mask = pad_sequence(list(map(torch.ones_like, part)), batch_first=True)
        # A mask that masks nothing is left out.
        batches.append(TokenBatch(input_ids, None if bool(mask.all()) else mask))
    return batches


def _batch_from_mapping(item: Any, model: PreTrainedModel) -> TokenBatch:
    """Make a batch of the inputs that the model reads. Other entries are for the model's head or for the user."""
    readable = {*inspect.signature(without_head(model).forward).parameters} - {"input_ids", "attention_mask"}
    # An encoder-decoder model reads labels as the inputs of its decoder, others read them only to compute a loss.
    if model.config.is_encoder_decoder:
        readable.add("labels")
    else:
        readable.discard("labels")
    others = {}
    # The names are sorted, as a set of names has another order in every process.
    for name in sorted(readable & {*item}):
        if item[name] is not None:
            others[name] = torch.as_tensor(item[name])
    if not others and item.get("input_ids") is None:
        raise CompressionError(
            f"calibration: found samples with the fields {', '.join(map(str, item))}; expected text or messages, or "
            f"what {type(model).__name__} reads, such as {main_input(model)}"
        )
    mask = item.get("attention_mask")
    if mask is not None:
        mask = torch.as_tensor(mask)
    if item.get("input_ids") is None:
        return TokenBatch(torch.empty(0, 0, dtype=torch.long), mask, others)
    input_ids = torch.as_tensor(item["input_ids"])
    if input_ids.dim() == 1:  # a row of a tokenized dataset is a batch of one sequence
        input_ids = input_ids[None]
    if mask is not None:
        mask = mask.reshape(input_ids.shape)
    return TokenBatch(input_ids, mask, others)


def _with_decoder_inputs(model: PreTrainedModel, batch: TokenBatch) -> TokenBatch:
    """Return the batch with the inputs of the decoder, by teacher forcing.

    They are the labels, or else the encoder's own text, delayed by one token.

    Raises:
        CompressionError: if the batch has neither.
    """
    others = dict(batch.others)
    labels = others.pop("labels", None)
    if not others.keys().isdisjoint({"decoder_input_ids", "decoder_inputs_embeds"}):
        return replace(batch, others=others)
    if labels is None:
        text = batch.input_ids
        mask = batch.attention_mask
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


def _token_ids(item: Any, tokenizer: Any) -> Tensor:
    """Return the token ids of a sample, (T,) int64. The sample is a tensor or a sequence of ids, or a chat.

    Raises:
        CompressionError: for any other sample, or if the tokenizer has no chat template.
    """
    if isinstance(item, Tensor):
        return item.flatten().long()
    if isinstance(item, (list, tuple)) and item and isinstance(item[0], dict):
        try:
            encoded = _required(tokenizer, "chats").apply_chat_template(list(item), tokenize=True, return_dict=True)
        except (ValueError, TemplateError) as error:
            raise CompressionError(f"calibration: the tokenizer makes no tokens of a chat ({error})") from error
        return torch.tensor(encoded["input_ids"], dtype=torch.long).flatten()
    if isinstance(item, (list, tuple)) and all(isinstance(token, int) for token in item):
        return torch.tensor(item, dtype=torch.long)
    raise _unusable_sample(item)


def _unusable_sample(item: Any) -> CompressionError:
    return CompressionError(
        f"calibration: found a sample of type {type(item).__name__}, expected a text, token ids, a chat or a batch"
    )


def _required(tokenizer: Any, source: str) -> Any:
    """Return the tokenizer, or raise CompressionError if there is none."""
    if tokenizer is None:
        raise CompressionError(f"calibration on {source} needs a tokenizer: compress(model, config, tokenizer=...)")
    return tokenizer
