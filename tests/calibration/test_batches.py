"""Whatever the user calibrates on becomes batches of the tokens that it holds, and of nothing else."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils.data import DataLoader

from hf_lowrank import CompressionConfig, CompressionError, compress
from hf_lowrank.calibration import TokenBatch, calibration_batches, fingerprint
from hf_lowrank.calibration.samples import DOCUMENTS_PER_SAMPLE

from ..support import tiny_models

MODEL = tiny_models.llama()
TOKENIZER = tiny_models.tokenizer()


def config(samples: int = 8, length: int | None = 32, **changes: Any) -> CompressionConfig:
    return CompressionConfig(samples=samples, sequence_length=length, **changes)


def rows_of(batches: list[TokenBatch]) -> list[list[int]]:
    """Return the tokens that count, row by row."""
    rows = []
    for batch in batches:
        mask = torch.ones_like(batch.input_ids) if batch.attention_mask is None else batch.attention_mask
        for ids, row_mask in zip(batch.input_ids, mask, strict=True):
            rows.append(ids[row_mask.bool()].tolist())
    return rows


def stream(documents: list[str]) -> list[int]:
    """Return the tokens of all documents, one after the other."""
    tokens: list[int] = []
    for document in documents:
        tokens += TOKENIZER(document).input_ids
    return tokens


def test_texts_become_windows_of_their_stream() -> None:
    texts = tiny_models.text()
    rows = rows_of(calibration_batches(MODEL, config(), TOKENIZER, texts))
    tokens = stream(texts)
    possible = [tokens[i : i + 32] for i in range(0, len(tokens) - 31, 32)]
    assert len(rows) == 8
    assert all(row in possible for row in rows)
    assert len({tuple(row) for row in rows}) == 8


def test_a_file_a_generator_and_a_dataset_give_what_the_list_gives(tmp_path: Path) -> None:
    from datasets import Dataset

    texts = tiny_models.text(12)
    assert 8 * 32 < len(stream(texts)) < DOCUMENTS_PER_SAMPLE * 8 * 32  # what is read of a generator at most
    file = tmp_path / "texts.txt"
    file.write_text("\n<|endoftext|>\n".join(texts), encoding="utf-8")
    expected = rows_of(calibration_batches(MODEL, config(), TOKENIZER, texts))
    for source in (str(file), iter(texts), Dataset.from_dict({"text": texts}), tuple(texts)):
        assert rows_of(calibration_batches(MODEL, config(), TOKENIZER, source)) == expected
    assert rows_of(calibration_batches(MODEL, config(calibration=str(file)), TOKENIZER)) == expected


def test_the_seed_chooses_the_windows() -> None:
    texts = tiny_models.text()
    first, second = (rows_of(calibration_batches(MODEL, config(seed=seed), TOKENIZER, texts)) for seed in (0, 1))
    assert first != second
    assert first == rows_of(calibration_batches(MODEL, config(seed=0), TOKENIZER, texts))


def test_fewer_windows_than_asked_are_all_used_and_said(caplog: pytest.LogCaptureFixture) -> None:
    texts = tiny_models.text(3)
    rows = rows_of(calibration_batches(MODEL, config(samples=100), TOKENIZER, texts))
    assert len(rows) == len(stream(texts)) // 32
    assert "fewer than the 100 asked for" in caplog.text


def test_token_ids_are_rows_as_they_are() -> None:
    ids = [[5, 6, 7, 8], [9, 10], list(range(3, 90))]
    expected = [[5, 6, 7, 8], [9, 10], list(range(3, 35))]
    for source in (
        ids,
        [torch.tensor(row) for row in ids],
        [torch.tensor([row]) for row in ids],
        [tuple(row) for row in ids],
    ):
        assert rows_of(calibration_batches(MODEL, config(), None, source)) == expected


def test_chats_go_through_the_chat_template() -> None:
    chats = [
        [{"role": "user", "content": "hello"}, {"role": "assistant", "content": "hi there"}],
        [{"role": "user", "content": "bye"}],
    ]
    rows = rows_of(calibration_batches(MODEL, config(), TOKENIZER, chats))
    assert rows == rows_of(calibration_batches(MODEL, config(), TOKENIZER, [{"messages": chat} for chat in chats]))
    assert [TOKENIZER.decode(row).replace("<s>", "") for row in rows] == ["u:hello\na:hi there\n", "u:bye\n"]


def test_batches_of_a_data_loader_keep_their_masks() -> None:
    texts = ["a much longer text than the others", "short", "of middle length"]
    TOKENIZER.pad_token = "</s>"
    loader = DataLoader(
        texts, batch_size=2, collate_fn=lambda part: TOKENIZER(part, padding=True, return_tensors="pt")
    )
    batches = calibration_batches(MODEL, config(length=None), TOKENIZER, loader)
    assert [batch.input_ids.shape[0] for batch in batches] == [2, 1]
    assert rows_of(batches) == [TOKENIZER(text).input_ids for text in texts]
    assert sum(batch.tokens for batch in batches) == len(stream(texts))


def test_tokenized_dataset_rows_are_batches() -> None:
    from datasets import Dataset

    rows = Dataset.from_dict({"input_ids": [[5, 6, 7], [8, 9]], "attention_mask": [[1, 1, 0], [1, 1]]})
    assert rows_of(calibration_batches(MODEL, config(), None, rows)) == [[5, 6], [8, 9]]


def test_self_needs_nothing_but_the_model() -> None:
    rows = rows_of(calibration_batches(MODEL, config()))
    assert [len(row) for row in rows] == [32] * 8
    assert all(row[0] == 1 for row in rows)


@pytest.mark.parametrize(
    ("source", "tokenizer", "message"),
    [
        (["some text"], None, "needs a tokenizer"),
        ([[{"role": "user", "content": "hi"}]], None, "needs a tokenizer"),
        ([], TOKENIZER, "empty iterable"),
        ([[], []], TOKENIZER, "empty"),
        ([3.5], TOKENIZER, "found a sample of type float"),
        (["text", 3], TOKENIZER, "calibration: row 2 holds int .3., expected a text or a chat"),
        (
            [{"content": "text"}],
            TOKENIZER,
            "fields content; expected text or messages, or what LlamaForCausalLM reads",
        ),
        ([[5, 1_000]], None, "token id 1000, expected 0 to"),
        (["too short"], TOKENIZER, "fewer than one window of 32"),
        ("no/such/file.txt", TOKENIZER, "no such text file"),
    ],
)
def test_unusable_calibration_is_an_error_before_any_work(source: Any, tokenizer: Any, message: str) -> None:
    model = tiny_models.llama()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    with pytest.raises(CompressionError, match=message) as raised:
        compress(model, config(method="svd", ratio=0.3), tokenizer, source)
    assert "\n" not in str(raised.value)
    assert not model.training
    assert all(torch.equal(value, model.state_dict()[name]) for name, value in before.items())


def test_sequences_longer_than_the_context_are_an_error() -> None:
    with pytest.raises(
        CompressionError,
        match=f"sequence_length: found 65, but LlamaForCausalLM has a context of {tiny_models.CONTEXT}",
    ):
        calibration_batches(MODEL, config(length=65))
    assert calibration_batches(MODEL, config(samples=1, length=None))[0].input_ids.shape == (1, tiny_models.CONTEXT)


def test_the_fingerprint_tells_calibration_sets_apart() -> None:
    ids = torch.arange(12).reshape(2, 6)
    mask = torch.ones_like(ids)
    same = [TokenBatch(ids), TokenBatch(ids.to(torch.int32))]
    other = [TokenBatch(ids + 1), TokenBatch(ids.reshape(3, 4)), TokenBatch(ids, mask), TokenBatch(ids, mask.tril())]
    assert len({fingerprint([batch]) for batch in same}) == 1
    assert len({fingerprint([batch]) for batch in [same[0], *other]}) == 5
