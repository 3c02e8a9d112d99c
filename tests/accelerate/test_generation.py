"""A compressed model writes what the dense model with its weights writes, by every mode and in pipelines."""

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoTokenizer, pipeline

from hf_lowrank import CompressionConfig, compress
from tests.support import tiny_models
from tests.support.compressed import Compressed, logits
from tests.support.fresh_process import INPUT_IDS

MODES: dict[str, dict[str, Any]] = {
    "greedy": {"do_sample": False},
    "sampling": {"do_sample": True, "top_k": 5},
    "beams": {"num_beams": 3},
    "static cache": {"do_sample": False, "cache_implementation": "static"},
    "prompt lookup": {"do_sample": False, "prompt_lookup_num_tokens": 2},
}
LENGTH: dict[str, Any] = {"max_new_tokens": 6, "min_new_tokens": 6, "pad_token_id": 0}
PROMPT = torch.tensor(INPUT_IDS[:1])


def written(model: Any, **mode: Any) -> list[int]:
    """Return the tokens that a model generates."""
    torch.manual_seed(0)
    return model.generate(PROMPT, **LENGTH, **mode)[0].tolist()


@pytest.mark.parametrize("mode", MODES)
def test_every_mode_writes_what_the_dense_model_writes(compressed: Compressed, mode: str) -> None:
    assert written(compressed.saved, **MODES[mode]) == written(compressed.model().dequantize(), **MODES[mode])


def test_the_compressed_model_drafts_for_the_dense_one(compressed: Compressed) -> None:
    """Whatever the draft proposes, the text is the dense model's own."""
    dense = compressed.model().dequantize()
    # The dense model becomes another one, so that it does not accept all that is drafted.
    with torch.no_grad():
        dense.get_output_embeddings().weight.add_(0.05 * torch.randn_like(dense.get_output_embeddings().weight))
    assert not torch.allclose(logits(dense), logits(compressed.saved), atol=1e-3)
    assert written(dense, do_sample=False, assistant_model=compressed.model()) == written(dense, do_sample=False)


@pytest.fixture(scope="module")
def chatty(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A compressed model with a tokenizer that has a chat template."""
    model, folder = tiny_models.llama(), tmp_path_factory.mktemp("chatty")
    recipe = CompressionConfig(method="slab", ratio=0.5, samples=4, sequence_length=32)
    compress(model, recipe, tiny_models.tokenizer(), tiny_models.text(), progress=False)
    model.save_pretrained(folder)
    return folder


def test_a_pipeline_writes_text(chatty: Path) -> None:
    generator = pipeline("text-generation", model=str(chatty))
    (answer,) = generator("the cat", max_new_tokens=5, do_sample=False)
    # The pipeline must write what `generate` writes for the same tokens.
    ids = AutoTokenizer.from_pretrained(chatty)("the cat", return_tensors="pt")
    expected = generator.model.generate(**ids, max_new_tokens=5, do_sample=False)
    assert answer["generated_text"] == generator.tokenizer.decode(expected[0], skip_special_tokens=True)
    assert len(generator(["a", "the dog ran"], max_new_tokens=2, batch_size=1)) == 2


def test_a_pipeline_chats(chatty: Path) -> None:
    chat = [{"role": "user", "content": "the dog"}]
    tokenizer = AutoTokenizer.from_pretrained(chatty)
    assert tokenizer.apply_chat_template(chat, tokenize=False) == "u:the dog\n"
    (answer,) = pipeline("text-generation", model=str(chatty))(chat, max_new_tokens=3, do_sample=False)
    assert answer["generated_text"][:-1] == chat
    assert answer["generated_text"][-1]["role"] == "assistant"
