"""Turn whatever the user calibrates on into batches: texts, chats, token ids, rows of a dataset, batches of inputs."""

import itertools
import logging
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from ..models.architectures import codebooks, main_input
from ..runtime.configuration import CompressionConfig
from ..runtime.errors import CompressionError, listed
from .batches import (
    TokenBatch,
    batch_rows,
    batch_sequences,
    check_inputs,
    first_sequences,
    first_tokens,
    reads_labels,
    sequence_length,
    with_decoder_inputs,
)
from .model_inputs import as_ids, batch_from_inputs, readable_inputs
from .sampling import sample_sequences
from .sources import given_rows
from .texts import (
    chat_tokens,
    described,
    documents_of,
    is_chat,
    is_empty,
    read_rows,
    text_column,
    token_stream,
    windows,
)

DOCUMENTS_PER_SAMPLE = 8
"""Number of documents that are read from a dataset or a stream for every calibration sequence, to draw them from.

More are read only if these are too short together. Of a stream fewer are read if they hold this many sequences for
every one that is drawn.
"""

LOOKAHEAD = 1000
"""Maximum number of samples that are searched for the first one that holds something."""

Sequence = tuple[Tensor, Tensor | None]
"""Token ids (T,) and a mask (T,) of those that count, or None if all do."""

logger = logging.getLogger(__name__)


def calibration_batches(
    model: PreTrainedModel, config: CompressionConfig, tokenizer: Any = None, calibration: Any = None
) -> list[TokenBatch]:
    """Make calibration batches from `calibration`, or from `config.calibration` if it is None.

    Whatever is given, at most `config.samples` sequences of at most `config.sequence_length` tokens are used. What can
    be read only once, such as a generator or a streamed dataset, is read no further than they need: of texts, eight
    times what is drawn from them, in documents or in tokens, whichever comes first. Pictures, sounds and codes of
    sounds keep the length of the tokens that go along with them.

    Args:
        calibration: "self", a dataset name, a file of texts or rows, or an iterable. Its items are texts, token ids,
            chat conversations (lists of messages), rows with one of them as `text` or `messages`, or the model's
            inputs (rows of a tokenized dataset, batches of a DataLoader). Items that are empty are left out. An
            encoder-decoder model whose batches have no `decoder_input_ids` gets the batch's `labels`, or else the text
            itself, delayed by one token as in its training.

    Raises:
        CompressionError: if there is nothing to calibrate on, too little for one sequence, or a sample that is none of
            these, naming it.
    """
    batches = _batches(model, config, tokenizer, config.calibration if calibration is None else calibration)
    if reads_labels(model):
        batches = [with_decoder_inputs(model, batch) for batch in batches]
    # An input that the model cannot read is an error before any work is done.
    check_inputs(model, batches)
    return batches


def _batches(model: PreTrainedModel, config: CompressionConfig, tokenizer: Any, given: Any) -> list[TokenBatch]:
    """Make the batches from what is given: a name, or an iterable whose first item tells whether all are texts."""
    length = sequence_length(model, config)
    if isinstance(given, str) and given == "self":
        return _batches_from_model(model, config, length)
    most_documents = most_tokens = None
    if isinstance(given, str):
        source = given
        rows = read_rows(given, limit=DOCUMENTS_PER_SAMPLE * config.samples)
    else:
        source = "calibration"
        if codebooks(model) and (isinstance(given, Tensor) or (isinstance(given, Mapping) and "input_ids" in given)):
            given = [given]  # its rows belong together
        rows, is_stream = given_rows(given)
        if is_stream:
            most_documents = DOCUMENTS_PER_SAMPLE * config.samples
            most_tokens = most_documents * length
    first, rows = _first_sample(rows, model, source)
    if isinstance(first, str) or (isinstance(first, Mapping) and text_column(first) == "text"):
        _check_reads_tokens(model, source)
        stream = token_stream(
            _required(tokenizer, "texts" if source == "calibration" else source),
            documents_of(rows, source),
            config.samples * length,
            most_documents,
            most_tokens,
        )
        return batch_rows(_choose_windows(stream, length, config))
    samples = _Samples(model, tokenizer, length, config.samples)
    for number, row in enumerate(rows, 1):
        samples.add(row, f"{source}: row {number}")
        if samples.missing <= 0:
            break
    return samples.batches(source)


def _first_sample(rows: Iterable[Any], model: PreTrainedModel, source: str) -> tuple[Any, Iterable[Any]]:
    """Return the first sample that holds something, and all samples.

    Raises:
        CompressionError: if there is none.
    """
    rows = iter(rows)
    seen = []
    for row in itertools.islice(rows, LOOKAHEAD):
        seen.append(row)
        if not is_empty(_content(row, model)):
            return row, itertools.chain(seen, rows)
    if not seen:
        what = "an empty iterable" if source == "calibration" else "no text"
        raise CompressionError(f"{source}: found {what}, expected texts, token ids, chats or batches")
    for row in seen:
        if isinstance(row, Mapping) and text_column(row) is None:
            raise CompressionError(
                f"{source}: found samples with the fields {listed(row)}; expected text or messages, or "
                f"what {type(model).__name__} reads, such as {main_input(model)}"
            )
    raise CompressionError(f"{source}: all samples are empty")


def _content(row: Any, model: PreTrainedModel) -> Any:
    """Return what a sample holds: the text or the chat of a row, or the sample itself. None if that is nothing."""
    if not isinstance(row, Mapping):
        return row
    column = text_column(row)
    if column is not None:
        return row[column]
    if any(row[name] is not None for name in readable_inputs(model) & row.keys()):
        return row
    return None


def _batches_from_model(model: PreTrainedModel, config: CompressionConfig, length: int) -> list[TokenBatch]:
    """Sample the calibration sequences from the model itself."""
    if model.config.is_encoder_decoder:
        raise CompressionError(
            f"{type(model).__name__} reads one text and writes another: it cannot calibrate on itself; "
            "give calibration= texts"
        )
    return batch_rows(sample_sequences(model, config.samples, length, config.seed).cpu())


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


class _Samples:
    """Collects sequences and batches until there are enough."""

    def __init__(self, model: PreTrainedModel, tokenizer: Any, length: int, count: int) -> None:
        self.model = model
        self.tokenizer = tokenizer
        self.length = length
        self.count = count
        self.missing = count
        self.sequences: list[Sequence] = []
        self.whole_batches: list[TokenBatch] = []

    def add(self, row: Any, where: str) -> None:
        """Add what a sample holds, as far as it is needed."""
        content = _content(row, self.model)
        if isinstance(row, Mapping) and content is not row:
            where = f"{where}: the column {text_column(row)}"
        if not isinstance(content, Mapping) and codebooks(self.model):
            content = self._codes(content, where)
        if isinstance(content, Mapping):
            for part in _split_columns(content):
                self._add_inputs(part, where)
        elif not is_empty(content):
            self._add_sequences(self._token_ids(content, where))

    def batches(self, source: str) -> list[TokenBatch]:
        """Return all that was collected, in batches.

        Raises:
            CompressionError: if that is nothing.
        """
        batches = batch_sequences(self.sequences) + self.whole_batches
        if not batches:
            raise CompressionError(f"{source}: all samples are empty")
        if self.missing > 0:
            logger.warning(
                "calibration has %d sequences, fewer than the %d asked for; all are used",
                self.count - self.missing,
                self.count,
            )
        return batches

    def _add_sequences(self, sequences: Iterable[Sequence]) -> None:
        for ids, mask in sequences:
            if self.missing > 0 and ids.numel():
                self.sequences.append((ids[: self.length], None if mask is None else mask[: self.length]))
                self.missing -= 1

    def _add_inputs(self, inputs: Mapping[str, Any], where: str) -> None:
        """Add inputs of the model: a row of token ids as a sequence, anything else as a batch."""
        if self.missing <= 0:
            return
        batch, is_row = batch_from_inputs(inputs, self.model, where)
        if not batch.input_ids.numel() and not batch.others:
            return
        if is_row and not batch.others:
            self._add_sequences([_without_padding(batch)])
            return
        batch = first_tokens(first_sequences(batch, self.missing), self.length)
        self.whole_batches.append(batch)
        self.missing -= batch.sequences

    def _codes(self, sample: Any, where: str) -> Any:
        """Return a sample that is not by name as the inputs of a model that reads codes."""
        if is_empty(sample):
            return sample
        if is_chat(sample):
            _check_reads_tokens(self.model, where)
        return {"input_ids": sample}

    def _token_ids(self, sample: Any, where: str) -> list[Sequence]:
        """Return the sequences of a sample: a chat, or a tensor or list of token ids or of several such sequences."""
        if is_chat(sample):
            return [(chat_tokens(_required(self.tokenizer, "chats"), sample, where), None)]
        if not _is_tensor_or_list(sample) or (isinstance(sample, (list, tuple)) and _holds_no_numbers(sample)):
            raise _unusable_sample(sample, where)
        ids = as_ids(sample, where)
        if ids.dim() > 2:
            raise _unusable_sample(sample, where)
        return [(row, None) for row in ids.reshape(-1, ids.shape[-1])]


def _check_reads_tokens(model: PreTrainedModel, source: str) -> None:
    """Raise CompressionError if a model is given text, and reads the codes of several codebooks."""
    count = codebooks(model)
    if count:
        raise CompressionError(
            f"{source}: {type(model).__name__} reads the codes of {count} codebooks, not text; give batches of them, "
            "calibration=[{'input_ids': ...}, ...]"
        )


def _without_padding(batch: TokenBatch) -> Sequence:
    """Return the only sequence of a batch without the padding around it."""
    ids, mask = batch.input_ids[0], batch.attention_mask
    if mask is None:
        return ids, None
    counted = mask[0].nonzero().flatten()
    if not counted.numel():
        return ids[:0], None
    inner = slice(int(counted[0]), int(counted[-1]) + 1)
    if len(counted) == inner.stop - inner.start:
        return ids[inner], None
    return ids[inner], (mask[0][inner] != 0).long()


def _split_columns(item: Mapping[str, Any]) -> Iterator[Mapping[str, Any]]:
    """Yield the rows of a mapping whose sequences, given as lists, differ in length. Any other mapping is yielded."""
    ids = item.get("input_ids")
    if not isinstance(ids, (list, tuple)) or len({len(row) for row in ids if _is_tensor_or_list(row)}) < 2:
        yield item
        return
    columns = {}
    for name, values in item.items():
        if _is_tensor_or_list(values) and len(values) == len(ids):
            columns[name] = values
    for row in range(len(ids)):
        yield {name: values[row] for name, values in columns.items()}


def _holds_no_numbers(values: Iterable[Any]) -> bool:
    return any(value is None or isinstance(value, (str, Mapping)) for value in values)


def _is_tensor_or_list(value: Any) -> bool:
    return isinstance(value, (list, tuple)) or (hasattr(value, "__array__") and getattr(value, "ndim", 0) > 0)


def _unusable_sample(item: Any, where: str) -> CompressionError:
    return CompressionError(
        f"{where}: found a sample of type {described(item)}, expected a text, token ids, a chat or a batch"
    )


def _required(tokenizer: Any, source: str) -> Any:
    """Return the tokenizer, or raise CompressionError if there is none."""
    if tokenizer is None:
        raise CompressionError(f"calibration on {source} needs a tokenizer: compress(model, config, tokenizer=...)")
    return tokenizer
