"""Messages quote no more than the beginning and the end of what a user gave."""

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset, DatasetDict
from hypothesis import given
from hypothesis import strategies as st

from hf_lowrank import CompressionConfig, CompressionError, compress
from hf_lowrank.calibration import calibration_batches
from hf_lowrank.checkpoints.inspect import inspect
from hf_lowrank.checkpoints.verify import verify
from hf_lowrank.evaluation.perplexity import evaluate
from hf_lowrank.methods import make_method
from hf_lowrank.models.loading import load_model
from hf_lowrank.runtime.errors import LONGEST_QUOTE, MOST_LISTED, listed, quoted, shortened

from ..support import tiny_models
from ..support.model_families import FAMILIES

MODEL = tiny_models.llama(num_hidden_layers=1)
TOKENIZER = tiny_models.tokenizer()
WORD = "xyzzy"
PROSE = f"{WORD} " * 2000
ONE_WORD = WORD * 2000


def calibrated_on(source: Any) -> Any:
    return calibration_batches(MODEL, CompressionConfig(samples=2, sequence_length=16), TOKENIZER, source)


def compressed(model: Any = MODEL, calibration: Any = None, work_dir: Any = None, **fields: Any) -> Any:
    recipe = CompressionConfig(**{"method": "magnitude", "ratio": 0.4, **fields})
    return compress(model, recipe, TOKENIZER, calibration, work_dir=work_dir, progress=False)


REFUSALS: dict[str, Callable[[str], Any]] = {
    "a text for a file": calibrated_on,
    "a text for a file, in the config": lambda text: compress(
        MODEL, CompressionConfig("magnitude", 0.4, calibration=text.strip()), TOKENIZER
    ),
    "a text for pictures": lambda text: compressed(FAMILIES["ViT"].make(), text),
    "a text to measure on": lambda text: evaluate(MODEL, TOKENIZER, text),
    "a field": lambda text: calibrated_on([{text: 1}]),
    "many fields": lambda text: calibrated_on([{f"{text[:50]}{number}": 1 for number in range(2000)}]),
    "a row of another kind": lambda text: calibrated_on([[5, 6], text]),
    "a text in a list": lambda text: calibrated_on(["a text", {"text": [text]}]),
    "a text for token ids": lambda text: calibrated_on([{"input_ids": [text]}]),
    "a field of a message": lambda text: calibrated_on([[{text: text}]]),
    "a split": lambda text: calibrated_on(DatasetDict({text[:500]: Dataset.from_dict({"text": ["a"]}), "b": []})),
    "a method": lambda text: make_method(text),
    "an option": lambda text: make_method("slab", {text: 1}),
    "the value of an option": lambda text: make_method("slab", {"iterations": text}),
    "a choice": lambda text: make_method("sola", {"allocation": text}),
    "a ratio": lambda text: CompressionConfig("slab", text),  # type: ignore[arg-type]
    "a number": lambda text: CompressionConfig("slab", 0.4, samples=text),  # type: ignore[arg-type]
    "a pattern": lambda text: compressed(modules_to_not_convert=[text]),
    "a model": load_model,
    "a dtype": lambda text: load_model(".", dtype=text),
    "a work folder": lambda text: compressed(calibration=torch.ones(4, 20).long(), work_dir=text),
}


@pytest.mark.parametrize("text", [PROSE, ONE_WORD], ids=["prose", "one word"])
@pytest.mark.parametrize("case", REFUSALS)
def test_a_refusal_quotes_little(case: str, text: str) -> None:
    with pytest.raises(CompressionError) as raised:
        REFUSALS[case](text)
    message = str(raised.value)
    assert message.count(WORD) * len(WORD) <= LONGEST_QUOTE * (MOST_LISTED if case == "many fields" else 1)
    assert "\n" not in message


@pytest.mark.parametrize("read", [inspect, verify])
def test_a_path_stands_in_a_message_as_a_whole(tmp_path: Path, read: Callable[[Path], Any]) -> None:
    folder = tmp_path / ("a-long-name-" * 12) / "model"
    with pytest.raises(CompressionError, match=re.escape(str(folder))):
        read(folder)


@given(st.text(max_size=300))
def test_what_is_short_is_quoted_whole_and_what_is_long_by_its_ends(text: str) -> None:
    short = shortened(text)
    assert len(short) <= LONGEST_QUOTE + len(" … ")
    assert short == text or (short[:30] == text[:30] and short[-30:] == text[-30:] and len(text) > LONGEST_QUOTE)
    assert quoted(text) == shortened(repr(text))


@given(st.lists(st.text(min_size=1, max_size=5, alphabet="ab"), max_size=20))
def test_a_list_says_how_many_it_leaves_out(names: list[str]) -> None:
    found = listed(names)
    shown = found.partition(" and ")[0]
    assert shown == ", ".join(names[:MOST_LISTED])
    assert found.endswith(f" and {len(names) - MOST_LISTED} more") == (len(names) > MOST_LISTED)
