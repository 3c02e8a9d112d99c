"""Every checkpoint that a released format has ever allowed opens, and answers as it did."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from hf_lowrank.checkpoints.verify import verify
from hf_lowrank.runtime.configuration import FORMAT_VERSION

HERE = Path(__file__).parent
FOLDERS = sorted(folder for folder in HERE.glob("format_*/*") if folder.is_dir())


@pytest.mark.parametrize("folder", FOLDERS, ids=lambda folder: f"{folder.parent.name}-{folder.name}")
def test_it_opens_and_answers_as_it_did(folder: Path) -> None:
    golden = load_file(folder / "golden_logits")
    with torch.no_grad():
        logits = AutoModelForCausalLM.from_pretrained(folder)(golden["input_ids"]).logits
    tolerance = 0.05 if logits.dtype == torch.bfloat16 else 1e-4
    torch.testing.assert_close(logits, golden["logits"], rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("folder", FOLDERS, ids=lambda folder: f"{folder.parent.name}-{folder.name}")
def test_nobody_has_changed_it(folder: Path) -> None:
    """Golden checkpoints come without loading code, so its sums are all that is missing."""
    assert all(".py: missing" in problem for problem in verify(folder).problems)


def test_every_version_of_the_format_has_golden_checkpoints() -> None:
    versions = [f"format_{version}" for version in range(1, FORMAT_VERSION + 1)]
    assert {folder.parent.name for folder in FOLDERS} == set(versions)
