"""Models and calibrations that do not fit are refused in one line, before any work."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from hf_lowrank import CompressionError, compress
from hf_lowrank.compression.dry_run import describe
from hf_lowrank.compression.from_disk import compress_checkpoint

from ..support.model_families import FAMILIES, pairs_of_texts, pictures, sounds_and_texts, text
from ..support.whole_models import recipe


@pytest.mark.parametrize("name", ["ViT", "Whisper"])
def test_a_text_for_a_model_that_reads_none_is_refused_before_anything_is_loaded(name: str, tmp_path: Path) -> None:
    FAMILIES[name].make().save_pretrained(tmp_path / "dense")
    for calibration in ("self", "texts.txt"):
        config = recipe()
        config.calibration = calibration
        with pytest.raises(CompressionError, match=f"takes .*, which '{calibration}' does not give"):
            describe(str(tmp_path / "dense"), config)
        with pytest.raises(CompressionError, match=f"takes .*, which '{calibration}' does not give"):
            compress_checkpoint(str(tmp_path / "dense"), tmp_path / "out", config, tokenizer=None)
    assert not (tmp_path / "out").exists()


def refusals() -> Iterator[tuple[str, str, Any, str, str]]:
    yield "T5", "slab", "self", "cannot calibrate on itself", "reads one text"
    yield "BERT", "slab", "self", "cannot generate text", "calibrate on itself"
    yield "ViT", "slab", "self", "takes pixel_values", "calibration=[{'pixel_values': ...}, ...]"
    yield "Whisper", "slab", "self", "takes input_features", "'decoder_input_ids': ..."
    yield "ViT", "slab", text(2).tolist(), "reads pixel_values", "found input_ids"
    yield (
        "Whisper",
        "slab",
        [{"input_features": sounds_and_texts()[0]["input_features"]}],
        "decoder_input_ids or labels",
        "Whisper",
    )
    yield "Llama", "slab", pictures(), "reads, such as input_ids", "fields pixel_values"
    yield "T5", "soco", pairs_of_texts(), "loss of the next token", "T5ForConditionalGeneration"
    yield "BERT", "fwsvd", text(2).tolist(), "loss of the next token", "BertForMaskedLM"


@pytest.mark.parametrize(("family", "method", "calibration", "what", "where"), refusals())
def test_what_cannot_be_is_refused_before_any_work(
    family: str, method: str, calibration: Any, what: str, where: str
) -> None:
    model, untouched = FAMILIES[family].make(), FAMILIES[family].make().state_dict()
    with pytest.raises(CompressionError, match=what) as raised:
        compress(model, recipe(method, 0.3), calibration=calibration, progress=False)
    assert where in str(raised.value)
    assert "\n" not in str(raised.value)
    assert all(torch.equal(tensor, untouched[name]) for name, tensor in model.state_dict().items())
