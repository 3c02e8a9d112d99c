"""A limit of the context is where the model's own positions end, and no number that says "none" is a limit."""

import math
from typing import Any

import pytest
import torch
from transformers import (
    BertConfig,
    BertForMaskedLM,
    GPT2Config,
    GPT2LMHeadModel,
    MambaConfig,
    MambaForCausalLM,
    MptConfig,
    MptForCausalLM,
    PreTrainedModel,
    RobertaConfig,
    RobertaForMaskedLM,
    WhisperConfig,
    XLNetConfig,
    XLNetLMHeadModel,
)
from transformers.models.whisper import WhisperForCausalLM

from hf_lowrank import CompressionConfig, CompressionError
from hf_lowrank.calibration import calibration_batches
from hf_lowrank.calibration.batches import LONGEST_SEQUENCE, sequence_length
from hf_lowrank.evaluation.perplexity import evaluate
from hf_lowrank.evaluation.speed_report import _prompt_length
from hf_lowrank.models.context import context_length

from ..support import tiny_models

SIZE: dict[str, Any] = {"vocab_size": 99, "hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 4}
LIMITED = {
    "BERT": lambda: BertForMaskedLM(BertConfig(**SIZE, intermediate_size=32, max_position_embeddings=20)),
    "RoBERTa": lambda: RobertaForMaskedLM(RobertaConfig(**SIZE, intermediate_size=32, max_position_embeddings=20)),
    "GPT-2": lambda: GPT2LMHeadModel(GPT2Config(vocab_size=99, n_embd=32, n_layer=1, n_head=4, n_positions=20)),
    "MPT": lambda: MptForCausalLM(MptConfig(vocab_size=99, d_model=32, n_layers=1, n_heads=4, max_seq_len=20)),
    "Whisper": lambda: WhisperForCausalLM(
        WhisperConfig(
            vocab_size=99, d_model=32, decoder_layers=1, decoder_attention_heads=4, max_target_positions=20,
            pad_token_id=0, bos_token_id=1, eos_token_id=2, decoder_start_token_id=1,
        )
    ),
}  # fmt: skip
UNLIMITED = {
    "Mamba": lambda: MambaForCausalLM(MambaConfig(vocab_size=99, hidden_size=32, num_hidden_layers=1)),
    "XLNet": lambda: XLNetLMHeadModel(XLNetConfig(vocab_size=99, d_model=32, n_layer=1, n_head=4, d_inner=32)),
}


def without_limit(value: Any) -> PreTrainedModel:
    model = tiny_models.llama(num_hidden_layers=1)
    model.config.__dict__["max_position_embeddings"] = value
    return model


@pytest.mark.parametrize("name", LIMITED)
def test_the_context_ends_where_the_positions_end(name: str) -> None:
    model = LIMITED[name]().eval()
    length = context_length(model)
    assert length is not None and length <= 20
    assert sequence_length(model, CompressionConfig(calibration="c4")) == length
    with torch.no_grad():
        model(input_ids=tiny_models.token_ids(1, length))
        with pytest.raises((IndexError, RuntimeError)):
            model(input_ids=tiny_models.token_ids(1, length + 1))
    with pytest.raises(CompressionError, match=f"has a context of {length} tokens"):
        sequence_length(model, CompressionConfig(sequence_length=length + 1))


@pytest.mark.parametrize("value", [-1, 0, None, math.inf, -1.0, "many"], ids=repr)
def test_a_number_that_says_no_limit_is_none(value: Any) -> None:
    assert context_length(without_limit(value)) is None


@pytest.mark.parametrize("value", [10**30, 1e30], ids=repr)
def test_a_huge_context_is_no_sequence_length(value: Any) -> None:
    model = without_limit(value)
    assert sequence_length(model, CompressionConfig(calibration="c4")) == LONGEST_SEQUENCE
    assert sequence_length(model, CompressionConfig(sequence_length=5000)) == 5000


@pytest.mark.parametrize("name", UNLIMITED)
def test_without_a_limit_any_length_is_read(name: str, tmp_path: Any) -> None:
    model = UNLIMITED[name]().eval()
    longer = LONGEST_SEQUENCE + 1
    assert sequence_length(model, CompressionConfig(calibration="c4")) == LONGEST_SEQUENCE
    (batch,) = calibration_batches(model, CompressionConfig(sequence_length=longer), None, [[5] * 3000])
    assert batch.input_ids.shape == (1, longer)
    assert _prompt_length("model", model, prompt=longer, new=4) == longer
    text = tmp_path / "text.txt"
    text.write_text("ab" * longer)
    if name == "Mamba":  # the attention of XLNet takes too much memory for that
        assert evaluate(model, tiny_models.tokenizer(), str(text), window=longer, max_windows=1).window == longer
    with pytest.raises(CompressionError, match="window: found 1, expected at least 2"):
        evaluate(model, tiny_models.tokenizer(), str(text), window=1)
