"""`samples` and `sequence_length` hold for whatever is given, no stream is read further than they need, and the config
records what was used."""

import itertools
from collections.abc import Callable, Iterator
from typing import Any

import numpy
import pandas
import pyarrow
import pytest
import torch
from datasets import Dataset, DatasetDict
from torch.utils.data import DataLoader, IterableDataset, TensorDataset
from torch.utils.data import Dataset as TorchDataset

from hf_lowrank import CompressionConfig, CompressionError, compress
from hf_lowrank.calibration import TokenBatch, calibration_batches, fingerprint
from hf_lowrank.calibration.samples import DOCUMENTS_PER_SAMPLE

from ..support import tiny_models
from ..support.model_families import FAMILIES

SAMPLES, LENGTH = 4, 24
MODEL = tiny_models.llama(num_hidden_layers=1)
TOKENIZER = tiny_models.tokenizer()
TOKENIZER.pad_token = "</s>"
TEXTS = tiny_models.text(60)
IDS = tiny_models.token_ids(60, 30)
TEXT_ROWS = Dataset.from_dict({"text": TEXTS, "id": [*range(60)]})
ID_ROWS = Dataset.from_dict({"input_ids": IDS.tolist(), "attention_mask": torch.ones_like(IDS).tolist()})
CHATS = [[{"role": "user", "content": text}] for text in TEXTS]


class Rows(TorchDataset):
    """A dataset of torch with rows of text, which ends by no IndexError."""

    def __len__(self) -> int:
        return len(TEXTS)

    def __getitem__(self, index: int) -> dict[str, str]:
        return {"text": TEXTS[index % len(TEXTS)]}


class Endless(IterableDataset):
    """A dataset of torch without an end."""

    def __init__(self, items: Any) -> None:
        self.items = items

    def __iter__(self) -> Iterator[Any]:
        return itertools.cycle(self.items)


def encoded(side: str = "right", **arguments: Any) -> Any:
    TOKENIZER.padding_side = side
    return TOKENIZER(TEXTS, **arguments)


TEXT_SOURCES: dict[str, Callable[[], Any]] = {
    "list": lambda: TEXTS,
    "tuple": lambda: tuple(TEXTS),
    "array": lambda: numpy.array(TEXTS),
    "column": lambda: TEXT_ROWS["text"],
    "dataset": lambda: TEXT_ROWS,
    "rows": lambda: TEXT_ROWS.to_list(),
    "columns": lambda: {"text": TEXTS},
    "split": lambda: DatasetDict(train=TEXT_ROWS, test=TEXT_ROWS.select([0])),
    "only split": lambda: DatasetDict(validation=TEXT_ROWS),
    "data frame": lambda: pandas.DataFrame({"text": [*TEXTS, None]}),
    "series": lambda: pandas.Series(TEXTS),
    "table": lambda: pyarrow.table({"text": TEXTS}),
    "torch dataset": Rows,
    "loader": lambda: DataLoader(TEXTS, batch_size=3),
    "loader of rows": lambda: DataLoader(Rows(), batch_size=3),
}
"""Sources that can be read again, of the same texts."""
ID_SOURCES: dict[str, Callable[[], Any]] = {
    "lists": lambda: IDS.tolist(),
    "tensor": lambda: IDS,
    "int32": lambda: IDS.int(),
    "array": lambda: IDS.numpy(),
    "rows of tensors": lambda: list(IDS),
    "batches of one": lambda: [row[None] for row in IDS],
    "arrays": lambda: [*IDS.numpy()],
    "dataset": lambda: ID_ROWS,
    "dataset of tensors": lambda: ID_ROWS.with_format("torch"),
    "dataset of arrays": lambda: ID_ROWS.with_format("numpy"),
    "streamed dataset": lambda: ID_ROWS.to_iterable_dataset(),
    "columns": lambda: {"input_ids": IDS.tolist()},
    "tensors by name": lambda: {"input_ids": IDS, "attention_mask": torch.ones_like(IDS)},
    "data frame": lambda: ID_ROWS.to_pandas(),
    "loader": lambda: DataLoader(IDS, batch_size=4),
    "loader of tuples": lambda: DataLoader(TensorDataset(IDS), batch_size=4),
    "loader of rows": lambda: DataLoader(ID_ROWS, batch_size=4),
    "loader of tensors": lambda: DataLoader(ID_ROWS.with_format("torch"), batch_size=4),
    "padded on the left": lambda: [{"input_ids": [2, *row], "attention_mask": [0] + [1] * 30} for row in IDS.tolist()],
    "padded on the right": lambda: [
        {"input_ids": [*row, 2], "attention_mask": [1] * 30 + [0]} for row in IDS.tolist()
    ],
    "endless": lambda: itertools.cycle(IDS.tolist()),
    "endless loader": lambda: DataLoader(Endless(IDS), batch_size=7),
    "generator function": lambda: lambda: (yield from IDS.tolist()),
}
"""Sources of the same sequences of token ids."""
OTHER_SOURCES: dict[str, Callable[[], Any]] = {
    "self": lambda: "self",
    "chats": lambda: CHATS,
    "rows of chats": lambda: [{"messages": chat} for chat in CHATS],
    "endless chats": lambda: itertools.cycle(CHATS),
    "encoding": encoded,
    "one encoding": lambda: [encoded()],
    "padded encoding": lambda: encoded("right", padding=True, return_tensors="pt"),
    "batches padded on the left": lambda: [encoded("left", padding=True, return_tensors="pt")],
    "encodings": lambda: [TOKENIZER(text, return_tensors="pt") for text in TEXTS],
    "embeddings": lambda: [{"inputs_embeds": torch.randn(3, 40, 32)}] * 3,
}


def batches(given: Any, samples: int = SAMPLES, length: int = LENGTH, model: Any = MODEL) -> list[TokenBatch]:
    recipe = CompressionConfig(samples=samples, sequence_length=length)
    return calibration_batches(model, recipe, TOKENIZER, given)


@pytest.mark.parametrize("kind", TEXT_SOURCES)
def test_texts_are_the_same_however_they_are_given(kind: str) -> None:
    (batch,) = batches(TEXT_SOURCES[kind]())
    assert batch.input_ids.shape == (SAMPLES, LENGTH) and batch.attention_mask is None
    assert fingerprint([batch]) == fingerprint(batches(TEXTS))


@pytest.mark.parametrize("kind", ID_SOURCES)
def test_token_ids_are_cut_and_counted_however_they_are_given(kind: str) -> None:
    found = batches(ID_SOURCES[kind]())
    assert all(batch.attention_mask is None or bool(batch.attention_mask.all()) for batch in found)
    assert torch.equal(torch.cat([batch.input_ids for batch in found]), IDS[:SAMPLES, :LENGTH])


@pytest.mark.parametrize("kind", OTHER_SOURCES)
def test_samples_and_length_hold_for_every_kind(kind: str) -> None:
    found = batches(OTHER_SOURCES[kind]())
    assert sum(batch.sequences for batch in found) == SAMPLES
    assert {batch.longest for batch in found} == {LENGTH}
    for batch in found:
        assert batch.attention_mask is None or bool(batch.attention_mask.all())


@pytest.mark.parametrize(
    ("item", "per_sample"),
    [
        (TEXTS[0], DOCUMENTS_PER_SAMPLE),
        ({"text": TEXTS[0]}, DOCUMENTS_PER_SAMPLE),
        ("ab", LENGTH),
        (IDS[0].tolist(), 1),
        ({"input_ids": IDS[0]}, 1),
        ({"input_ids": IDS[:2], "attention_mask": torch.ones_like(IDS[:2])}, 1 / 2),
        (CHATS[0], 1),
        ({"messages": CHATS[0]}, 1),
    ],
    ids=["texts", "rows", "short texts", "ids", "tokenized rows", "batches", "chats", "rows of chats"],
)
def test_a_stream_is_read_no_further_than_the_samples_need(item: Any, per_sample: float) -> None:
    read = 0

    def stream() -> Iterator[Any]:
        nonlocal read
        while True:
            read += 1
            yield item

    batches(stream())
    assert read <= per_sample * SAMPLES
    # Of what may hold nothing more is read, too.
    batches(item if index % 2 else None for index, item in enumerate(stream()))


@pytest.mark.parametrize("repeats", [1, 5, 40, 400])
def test_a_stream_of_texts_of_any_length_is_read_to_a_number_of_tokens(repeats: int) -> None:
    text = " ".join(TEXTS[:1] * repeats)
    per_document = len(TOKENIZER(text).input_ids)
    read = 0

    def stream() -> Iterator[str]:
        nonlocal read
        while True:
            read += 1
            yield text

    (batch,) = batches(stream())
    assert batch.input_ids.shape == (SAMPLES, LENGTH)
    assert (read - 1) * per_document < DOCUMENTS_PER_SAMPLE * SAMPLES * LENGTH
    assert read <= DOCUMENTS_PER_SAMPLE * SAMPLES


def test_padding_stays_padding_where_a_batch_is_kept() -> None:
    ids = torch.arange(3, 33).reshape(3, 10)
    mask = torch.tensor([[1] * 10, [0] * 4 + [1] * 6, [1] * 2 + [0] * 8])
    (batch,) = batches([{"input_ids": ids, "attention_mask": mask, "token_type_ids": ids}], length=5)
    assert batch.input_ids.tolist() == [[3, 4, 5, 6, 7], [17, 18, 19, 20, 21], [23, 24, 25, 26, 27]]
    assert batch.attention_mask is not None
    assert batch.attention_mask.tolist() == [[1] * 5, [1] * 5, [1, 1, 0, 0, 0]]
    (row,) = batches([{"input_ids": ids[0], "attention_mask": [0, 1, 1, 0, 1, 1, 0, 0, 0, 0]}], length=5)
    assert (row.input_ids.tolist(), row.attention_mask.tolist()) == ([[4, 5, 6, 7, 8]], [[1, 1, 0, 1, 1]])


def test_the_decoder_is_cut_as_the_encoder_is() -> None:
    model = FAMILIES["T5"].make()
    rows = [{"input_ids": [5] * 20, "labels": [*range(3, 33)]}] * 9
    found = batches(rows, length=8, model=model)
    assert sum(batch.sequences for batch in found) == SAMPLES
    assert {batch.input_ids.shape for batch in found} == {(1, 8)}
    assert [batch.others["decoder_input_ids"].tolist()[0][1:] for batch in found] == [[*range(3, 10)]] * SAMPLES


def test_pictures_keep_the_length_of_their_tokens() -> None:
    family = FAMILIES["LLaVA"]
    (given,) = family.batches()
    (batch,) = calibration_batches(family.make(), CompressionConfig(samples=2, sequence_length=5), None, [given])
    assert batch.input_ids.shape == (2, given["input_ids"].shape[1])
    assert len(batch.others["pixel_values"]) == 2


@pytest.mark.parametrize("samples", [3, 100])
@pytest.mark.parametrize(
    "given",
    [TEXTS[:5], IDS[:5], ID_ROWS.select(range(5)), CHATS[:5], DataLoader(IDS[:5], batch_size=2), "self"],
    ids=["texts", "ids", "tokenized rows", "chats", "loader", "self"],
)
def test_the_config_records_what_was_used(given: Any, samples: int, caplog: pytest.LogCaptureFixture) -> None:
    samples = min(samples, 8) if isinstance(given, str) else samples
    recipe = CompressionConfig("magnitude", 0.4, samples=samples, sequence_length=LENGTH)
    model = compress(tiny_models.llama(num_hidden_layers=1), recipe, TOKENIZER, given, progress=False)
    recorded = model.config.quantization_config
    used = batches(given, samples)
    assert recorded.samples == sum(batch.sequences for batch in used) <= samples
    assert recorded.sequence_length == max(batch.longest for batch in used) == LENGTH
    assert recorded.provenance["calibration_tokens"] == recorded.samples * LENGTH
    assert ("fewer than the 100 asked for; all are used" in caplog.text) == (recorded.samples < samples)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (7, r"found int \(7\), expected the name of a text, or texts"),
        (b"bytes", "found bytes"),
        ([b"bytes"], "row 1: found a sample of type bytes"),
        (torch.arange(5), r"a tensor of the shape \(5,\), expected \(sequences, tokens\)"),
        ([5, 6, 7], "row 1: found a sample of type int"),
        ([[5, 6], [0.5]], "row 2: found token ids of the type torch.float32, expected whole numbers"),
        (torch.ones(2, 5), "token ids of the type torch.float32"),
        ([[True, False]], "token ids of the type torch.bool"),
        ([[5, -1]], "token id -1, expected 0 to"),
        ([{"input_ids": [5, 1_000]}], "token id 1000, expected 0 to"),
        ([{"input_ids": ["a"]}], "row 1: input_ids: found list"),
        ([{"input_ids": [5, 6]}, {"input_ids": [5], "attention_mask": [1, 1]}], "row 2: found input_ids of the shape"),
        ([[[5, 6], [7]]], "row 1: found list .*expected numbers in rows of one length"),
        ([[5, 6], "text"], "row 2: found a sample of type str"),
        (["text " * 50, [5, 6]], "row 2 holds list"),
        (DatasetDict(a=TEXT_ROWS, b=TEXT_ROWS), "a dataset with the splits a, b; give one of them"),
        (DataLoader(TensorDataset(IDS, IDS), batch_size=2), "row 1: found a sample of type list"),
        (iter(()), "found an empty iterable"),
        ({"input_ids": torch.empty(0, 5, dtype=torch.long)}, "empty"),
        ([None, "", [], {"text": None}, {"messages": []}], "all samples are empty"),
        ({"pixels": [1]}, "the fields pixels; expected text or messages, or what LlamaForCausalLM reads"),
        ("The river.\n" * 500, "no such text file"),
        (".", "is a folder; name one file"),
    ],
    ids=lambda value: (
        value[:40] if isinstance(value, str) else type(value).__name__
    ),  # no address: every process has its own
)
def test_what_holds_no_samples_is_one_line(given: Any, message: str) -> None:
    with pytest.raises(CompressionError, match=message) as raised:
        batches(given)
    assert "\n" not in str(raised.value)
