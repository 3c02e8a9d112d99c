"""TRL's `SFTTrainer` trains compressed checkpoints without a change."""

from pathlib import Path
from typing import Any

import pytest
from datasets import Dataset
from transformers import AutoModelForCausalLM
from trl import SFTConfig, SFTTrainer

from hf_lowrank.publishing.hub import check_complete
from tests.support import tiny_models

from .conftest import LAYOUTS, pattern, same, weights

CHATS = [
    {"messages": [{"role": "user", "content": document[:20]}, {"role": "assistant", "content": document[20:40]}]}
    for document in tiny_models.text(12)
]


def fine_tuned(folder: Path, output: Path, data: Dataset, **changes: Any) -> SFTTrainer:
    fields: dict[str, Any] = {
        "max_steps": 2,
        "per_device_train_batch_size": 2,
        "save_steps": 1,
        "bf16": True,
        "max_length": 48,
    }
    fields |= {"use_cpu": True, "report_to": [], "disable_tqdm": True}
    trainer = SFTTrainer(model=str(folder), args=SFTConfig(str(output), **fields | changes), train_dataset=data)
    before, start = pattern(trainer.model), weights(trainer.model)
    trainer.train()
    assert same(pattern(trainer.model), before)
    assert not same(weights(trainer.model), start)
    check_complete(output / "checkpoint-1")
    assert same(weights(AutoModelForCausalLM.from_pretrained(output / "checkpoint-2")), weights(trainer.model))
    return trainer


@pytest.mark.parametrize("layout", LAYOUTS)
def test_texts(layout: str, checkpoints: dict[str, Path], tmp_path: Path) -> None:
    """The trainer opens the checkpoint itself, with TRL's defaults (gradient checkpointing) and bfloat16 autocast."""
    fine_tuned(checkpoints[layout], tmp_path, Dataset.from_dict({"text": tiny_models.text(12)}))


def test_packed_chats(checkpoints: dict[str, Path], tmp_path: Path) -> None:
    fine_tuned(checkpoints["bitmask and signs"], tmp_path, Dataset.from_list(CHATS), packing=True, bf16=False)
