"""Exports to compressed-tensors in the engines that open them: Transformers without this package, and vLLM."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from hf_lowrank import CompressionConfig, compress, export
from tests.support import tiny_models

from .checkpoints import build
from .running import continued, engine, prompts

BFLOAT16 = 0.1
"""How far the log-probability of a token may be from the reference in bfloat16."""
OPEN = """
import sys, torch
from transformers import AutoModelForCausalLM
model = AutoModelForCausalLM.from_pretrained(sys.argv[1])
tokens = torch.tensor(eval(sys.argv[2]))
torch.save(model(tokens).logits, sys.argv[3])
assert not [name for name in sys.modules if name.startswith("hf_lowrank")]
"""
"""Opens a model and stores its logits. `TORCH_DEVICE_BACKEND_AUTOLOAD=0` keeps the installed package out of it."""


def exported(folder: Path, family: str, bits: int, dtype: torch.dtype = torch.float32) -> None:
    """Write a quantized model to `folder / "model"` and its export to `folder / "export"`."""
    model = build(family).to(dtype)
    config = CompressionConfig(method="rtn", options={"bits": bits}, samples=2, sequence_length=16)
    compress(model, config, tokenizer=tiny_models.tokenizer(), calibration=tiny_models.text(4), progress=False)
    model.save_pretrained(folder / "model")
    export(folder / "model", folder / "export", "compressed-tensors", exact=True)


@pytest.mark.parametrize("bits", [3, 4])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_transformers_gives_equal_logits_without_this_package(bits: int, dtype: torch.dtype, tmp_path: Path) -> None:
    exported(tmp_path, "Llama", bits, dtype)
    tokens = tiny_models.token_ids(2, 20)
    answer = tmp_path / "logits.pt"
    command = [sys.executable, "-c", OPEN, str(tmp_path / "export"), json.dumps(tokens.tolist()), str(answer)]
    subprocess.run(command, check=True, env={**os.environ, "TORCH_DEVICE_BACKEND_AUTOLOAD": "0"})
    dense = AutoModelForCausalLM.from_pretrained(tmp_path / "model").dequantize()
    assert torch.equal(torch.load(answer), dense(tokens).logits)


def test_vllm_computes_them_by_its_own_kernel(tmp_path: Path) -> None:
    """On CPUs it has one for integers of 4 bits, in bfloat16; those of 8 bits are for GPUs."""
    exported(tmp_path, "Llama", 3, torch.bfloat16)
    texts = prompts(8)
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "model", dtype=torch.float32)
    with engine(tmp_path / "export", dtype="bfloat16") as llm:
        found = continued(llm, texts)
    for text, (tokens, scores) in zip(texts, found, strict=True):
        with torch.no_grad():
            wanted = model(torch.tensor([text])).logits[0, -1].log_softmax(-1)
        assert scores[0] == pytest.approx(float(wanted[tokens[0]]), abs=BFLOAT16)
