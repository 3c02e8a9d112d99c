"""GGUF files in llama.cpp: its text and its perplexity are those of Transformers."""

from pathlib import Path

import numpy as np
import pytest
import torch
from llama_cpp import Llama
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

from hf_lowrank import CompressionConfig, compress, export, reference_model, reference_text
from tests.exporting.test_gguf import build, saved
from tests.support import tiny_models

CONTEXT = 256
NATS = 0.002
"""How far the mean log-probability of a token may be from the reference."""

RANDOM_NATS = 0.02
"""The same for weights that are random and large, with which rounded inputs matter more."""
NEAR_TIE = 0.05
"""Nats between two tokens of which llama.cpp may take the other one: it rounds the inputs of products to 8 bits."""


def opened(file: Path) -> Llama:
    return Llama(str(file), n_ctx=CONTEXT, logits_all=True, n_threads=1, verbose=False)


def logits(model: Llama, tokens: list[int]) -> Tensor:
    """Return llama.cpp's logits (tokens, vocabulary)."""
    model.reset()
    model.eval(tokens)
    return torch.from_numpy(np.array(model.scores[: len(tokens)]))


def worst_choice(served: Llama, model: PreTrainedModel, prompt: list[int], count: int = 8) -> float:
    """Return how far, in nats, a token of llama.cpp's greedy continuation is from Transformers' best at its place."""
    tokens = list(prompt)
    for _ in range(count):
        tokens.append(int(logits(served, tokens)[-1].argmax()))
    with torch.no_grad():
        expected = model(torch.tensor([tokens])).logits[0, len(prompt) - 1 : -1].log_softmax(-1)
    chosen = expected.gather(1, torch.tensor(tokens[len(prompt) :])[:, None])[:, 0]
    return float((expected.max(dim=1).values - chosen).max())


@pytest.fixture(scope="module", params=[3, 4, 8])
def checkpoint(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the folder of the bundled model in so many bits."""
    folder = tmp_path_factory.mktemp("reference") / str(request.param)
    model, tokenizer = (auto.from_pretrained(reference_model()) for auto in (AutoModelForCausalLM, AutoTokenizer))
    config = CompressionConfig(method="rtn", options={"bits": request.param}, samples=2, sequence_length=32)
    compress(model, config, tokenizer=tokenizer, progress=False)
    model.save_pretrained(folder)
    return folder


def test_text_and_perplexity_of_a_trained_model(checkpoint: Path, tmp_path: Path) -> None:
    export(checkpoint, tmp_path / "model.gguf", "gguf")
    served = opened(tmp_path / "model.gguf")
    model = AutoModelForCausalLM.from_pretrained(checkpoint, dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(checkpoint)
    text = Path(reference_text()).read_text(encoding="utf-8")
    assert served.tokenize(text[:3000].encode(), add_bos=True) == tokenizer(text[:3000])["input_ids"]
    tokens = tokenizer(text[:8000])["input_ids"]
    windows = [tokens[start : start + CONTEXT] for start in range(0, 4 * CONTEXT, CONTEXT)]
    losses = []
    for window in windows:
        with torch.no_grad():
            expected = model(torch.tensor([window])).logits[0]
        wanted = torch.tensor(window[1:])
        pair = [torch.nn.functional.cross_entropy(found[:-1], wanted) for found in (logits(served, window), expected)]
        losses.append(torch.stack(pair))
    found, expected = torch.stack(losses).mean(dim=0)
    assert abs(float(found - expected)) < NATS
    assert max(worst_choice(served, model, window[:16]) for window in windows[:2]) < NEAR_TIE


@pytest.mark.parametrize("kind", ["llama", "mistral", "qwen2", "qwen3", "gemma", "gemma3_text"])
def test_every_family_computes_the_same(kind: str, tmp_path: Path) -> None:
    """The layers are exact, and everything else is in float32. llama.cpp rounds the inputs of products to 8 bits."""
    changes = {"num_hidden_layers": 2, "initializer_range": 0.3}  # so that some tokens are much likelier than others
    folder = saved(build(kind, **changes), tmp_path / "model")
    export(folder, tmp_path / "model.gguf", "gguf", exact=True)
    tokens = tiny_models.token_ids(1, 40)[0].tolist()
    with torch.no_grad():
        expected = AutoModelForCausalLM.from_pretrained(folder)(torch.tensor([tokens])).logits[0].log_softmax(-1)
    found = logits(opened(tmp_path / "model.gguf"), tokens).log_softmax(-1)
    assert float((found.exp() * (found - expected)).sum(-1).mean()) < RANDOM_NATS
