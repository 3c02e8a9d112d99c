"""LoRA adapters over compressed layers in vLLM, against PEFT."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import AutoModelForCausalLM
from vllm.lora.request import LoRARequest

from .running import assert_same, continued, engine, prompts, reference


def adapter(base: Path, folder: Path, seed: int) -> Path:
    """Write a LoRA adapter of rank 8 on all linear layers, which changes the model."""
    model = get_peft_model(AutoModelForCausalLM.from_pretrained(base), LoraConfig(r=8, target_modules="all-linear"))
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            parameter.data = torch.randn(parameter.shape, generator=generator) * 0.1
    model.save_pretrained(folder)
    return folder


@pytest.mark.parametrize("layout", ["bitmask and signs", "low rank", "mixed, quantized", "dense shards"])
def test_several_adapters_at_once_give_what_peft_gives(
    layout: str, checkpoint: Callable[[str, str], Path], tmp_path: Path
) -> None:
    base = checkpoint("Llama", layout)
    texts = prompts(4)
    folders = [adapter(base, tmp_path / name, seed) for seed, name in enumerate(["first", "second"])]
    adapted = [
        reference(PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), folder), texts)
        for folder in folders
    ]
    plain = reference(base, texts)
    first, second = (LoRARequest(folder.name, i, str(folder)) for i, folder in enumerate(folders, start=1))
    with engine(base, enable_lora=True, max_loras=2, max_lora_rank=8) as llm:
        # On CPUs, vLLM 0.32 computes texts without an adapter wrongly beside texts with one, for dense models, too.
        assert_same(continued(llm, texts), plain)
        found = continued(llm, texts, lora_request=[first, second, second, first])
    wanted = [adapted[0][0], adapted[1][1], adapted[1][2], adapted[0][3]]
    assert all(scores != other for (_, scores), (_, other) in zip(wanted, plain, strict=True))
    assert_same(found, wanted)
