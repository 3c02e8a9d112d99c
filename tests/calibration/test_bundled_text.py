"""The text in the package is free, the same everywhere, and what a compression calibrates on if nothing is named."""

import gzip
import hashlib
import json
import logging
import re
import socket
from collections import Counter
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, BertTokenizer, ByT5Tokenizer, PreTrainedModel

from hf_lowrank import CompressionConfig, CompressionError, compress, reference_model, reference_text
from hf_lowrank.calibration import calibration_batches
from hf_lowrank.calibration import sampling as sampling_module
from hf_lowrank.calibration.batches import LONGEST_SEQUENCE, SHORTER_SEQUENCES, sequence_length
from hf_lowrank.calibration.sampling import sample_sequences
from hf_lowrank.calibration.texts import BUNDLED
from hf_lowrank.compression.checks import whole_model_reason
from hf_lowrank.models.reference import calibration_text

from ..support import tiny_models
from ..support.assets import asset_text
from ..support.model_families import FAMILIES

FILE = Path(calibration_text())
LICENSES = FILE.with_name("CALIBRATION.md")
FREE = {"public domain", "CC0 1.0", "Unlicense"}
GRAM = 13
"""Number of words in a row that no text of this length shares by chance."""
EVALUATED = ["c4/eval.txt", "wikitext2/test.txt", "wikitext2/valid_100kb.txt", "tinystories/eval.txt"]


def rows() -> list[dict[str, str]]:
    return [json.loads(line) for line in gzip.decompress(FILE.read_bytes()).decode().split("\n") if line]


def table() -> dict[str, list[str]]:
    """The rows of the table of licenses, by part."""
    lines = re.findall(r"^\| `([\w-]+)` \|(.*)\|$", LICENSES.read_text(encoding="utf-8"), re.MULTILINE)
    return {part: [cell.strip() for cell in cells.split("|")] for part, cells in lines}


def grams(text: str) -> Iterator[tuple[str, ...]]:
    words = re.findall(r"[a-z0-9']+", text.lower())
    return (tuple(words[start : start + GRAM]) for start in range(len(words) - GRAM + 1))


# --- the file --------------------------------------------------------------------------------------------------------


def test_every_part_has_a_free_license_and_the_size_that_the_table_says() -> None:
    listed = table()
    excerpts = Counter(row["part"] for row in rows())
    characters = Counter()
    for row in rows():
        characters[row["part"]] += len(row["text"])
    assert listed.keys() == excerpts.keys()
    for part, (_, _, license_name, count, size) in listed.items():
        assert license_name in FREE, part
        assert int(count) == excerpts[part], part
        assert int(size.replace(",", "")) == characters[part], part


def test_the_rows_are_the_recorded_ones() -> None:
    recorded = re.search(r"`([0-9a-f]{64})`", LICENSES.read_text(encoding="utf-8"))
    assert recorded is not None
    assert hashlib.sha256(gzip.decompress(FILE.read_bytes())).hexdigest() == recorded[1]
    assert FILE.stat().st_size < 600_000


def test_it_shares_no_passage_with_the_text_of_the_examples() -> None:
    assert not has_passage_of(Path(reference_text()).read_text(encoding="utf-8"))


@pytest.mark.parametrize("name", [*EVALUATED, "openwebtext/sample.txt.gz"])
def test_it_shares_no_passage_with_the_texts_that_are_reported_on(name: str) -> None:
    assert not has_passage_of(asset_text(name))


def has_passage_of(text: str) -> bool:
    own = own_grams()
    assert len(own) > 50_000
    return any(gram in own for gram in grams(text))


@cache
def own_grams() -> set[tuple[str, ...]]:
    return {gram for row in rows() for gram in grams(row["text"])}


# --- the default -----------------------------------------------------------------------------------------------------


def compressed(seed: int = 0) -> PreTrainedModel:
    model = AutoModelForCausalLM.from_pretrained(reference_model())
    return compress(model, CompressionConfig("rtn", samples=3, sequence_length=32, seed=seed), progress=False)


def test_the_default_needs_no_network_and_is_recorded(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: Any) -> None:
        raise AssertionError("a connection")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    configs = [compressed().config.quantization_config for _ in range(2)]
    assert all(config.calibration == BUNDLED for config in configs)
    assert configs[0].provenance["calibration_tokens"] == 96
    first, second = (config.provenance["calibration_sha256"] for config in configs)
    assert first == second
    assert first != compressed(seed=1).config.quantization_config.provenance["calibration_sha256"]


def test_by_default_one_block_at_a_time_is_enough() -> None:
    assert whole_model_reason(CompressionConfig("slab"), tiny_models.llama(), "cpu") is None


def words(folder: Path) -> BertTokenizer:
    file = folder / "vocab.txt"
    file.write_text("\n".join(["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "the", "of", "##s", *"abcdefgh"]))
    return BertTokenizer(str(file))


TOKENIZERS: dict[str, Any] = {
    "bytes": lambda folder: ByT5Tokenizer(),
    "words": words,
    "pairs": lambda folder: AutoTokenizer.from_pretrained(reference_model()),
}


@pytest.mark.parametrize(
    ("family", "context", "tokenizer"),
    [
        ("Llama", 16, "bytes"),
        ("Llama", 4096, "pairs"),
        ("BERT", 512, "words"),
        ("BERT", 16, "pairs"),
        ("T5", 4096, "bytes"),
        ("T5", 512, "words"),
    ],
)
def test_it_fills_the_sequences_of_every_model_and_tokenizer(
    family: str, context: int, tokenizer: str, tmp_path: Path
) -> None:
    model = FAMILIES[family].make()
    reader = TOKENIZERS[tokenizer](tmp_path)
    model.resize_token_embeddings(len(reader))
    model.config.get_text_config().max_position_embeddings = context
    batches = calibration_batches(model, CompressionConfig(samples=5), reader)
    ids = torch.cat([batch.input_ids for batch in batches])
    assert ids.shape == (5, min(context, SHORTER_SEQUENCES[BUNDLED]))
    assert all(batch.attention_mask is None for batch in batches)


@pytest.mark.parametrize("context", [16, 300, 10_000])
@pytest.mark.parametrize("source", [BUNDLED, "self", "text.txt", ["a text"], None])
def test_the_length_follows_from_what_is_calibrated_on(source: Any, context: int) -> None:
    model = tiny_models.llama()
    model.config.max_position_embeddings = context
    named = BUNDLED if source is None else source
    longest = SHORTER_SEQUENCES.get(named, LONGEST_SEQUENCE) if isinstance(named, str) else LONGEST_SEQUENCE
    assert sequence_length(model, CompressionConfig(), source) == min(context, longest)
    assert sequence_length(model, CompressionConfig(sequence_length=7), source) == 7


# --- without a tokenizer ---------------------------------------------------------------------------------------------


def test_without_a_tokenizer_the_model_is_sampled_and_that_is_said(caplog: pytest.LogCaptureFixture) -> None:
    model = compress(tiny_models.llama(), CompressionConfig("rtn", samples=2, sequence_length=8), progress=False)
    assert sum("sampled from the model itself" in message for message in caplog.messages) == 1
    assert model.config.quantization_config.calibration == "self"


@pytest.mark.parametrize("family", ["BERT", "T5"])
def test_what_cannot_be_sampled_either_is_refused_in_one_line(family: str) -> None:
    with pytest.raises(CompressionError, match="no tokenizer to read the bundled text") as raised:
        compress(FAMILIES[family].make(), CompressionConfig("rtn"), progress=False)
    assert "\n" not in str(raised.value)


# --- sampling --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("is_long", [True, False])
def test_a_long_sampling_says_what_it_takes_before_it_starts(
    is_long: bool, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(sampling_module, "WORTH_TELLING", 0.0 if is_long else 1e9)
    model = tiny_models.llama()
    expected = sample_sequences(model, 3, 20, seed=0)
    caplog.clear()
    with caplog.at_level(logging.WARNING):
        assert torch.equal(sample_sequences(model, 3, 20, seed=0), expected)
    assert len([message for message in caplog.messages if "takes about" in message]) == is_long


@pytest.mark.parametrize("family", [name for name in FAMILIES if "ForCausalLM" in FAMILIES[name].model])
def test_a_cache_that_is_allocated_once_samples_the_same(family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model = FAMILIES[family].make()
    sampled = sample_sequences(model, 2, 12, seed=0)
    monkeypatch.setattr(type(model), "_can_compile_fullgraph", False)
    assert torch.equal(sampled, sample_sequences(model, 2, 12, seed=0))
