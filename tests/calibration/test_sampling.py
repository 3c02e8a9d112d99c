"""Text is sampled from the model by a seed, after a start token, and leaves the caller's random state unchanged."""

import pytest
import torch
from transformers import LlamaModel

from hf_lowrank import CompressionError
from hf_lowrank.calibration import sampling
from hf_lowrank.calibration.sampling import sample_sequences

from ..support import tiny_models

MODEL = tiny_models.llama()


def test_the_seed_alone_decides() -> None:
    torch.manual_seed(1)
    first = sample_sequences(MODEL, 6, 20, seed=3)
    torch.manual_seed(2)
    assert torch.equal(first, sample_sequences(MODEL, 6, 20, seed=3))
    assert not torch.equal(first, sample_sequences(MODEL, 6, 20, seed=4))


def test_the_global_generator_is_untouched() -> None:
    before = torch.get_rng_state()
    sample_sequences(MODEL, 2, 8, seed=0)
    assert torch.equal(before, torch.get_rng_state())


@pytest.mark.parametrize(("samples", "length"), [(1, 1), (5, 1), (3, 30), (35, 6), (1, tiny_models.CONTEXT)])
def test_shapes(samples: int, length: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sampling, "TOKENS_AT_ONCE", 50)  # several batches, some of a single sequence
    ids = sample_sequences(MODEL, samples, length, seed=0)
    assert ids.shape == (samples, length)
    assert ids.dtype == torch.int64
    assert bool((ids[:, 0] == MODEL.config.bos_token_id).all())
    assert 0 <= int(ids.min()) <= int(ids.max()) < MODEL.config.vocab_size


def test_the_end_token_is_not_sampled_unless_it_starts_documents() -> None:
    assert not bool((sample_sequences(MODEL, 20, 60, seed=0) == MODEL.config.eos_token_id).any())
    model = tiny_models.llama()
    model.generation_config.bos_token_id = model.config.bos_token_id = model.config.eos_token_id
    ids = sample_sequences(model, 20, 60, seed=0)
    assert bool((ids[:, 0] == model.config.eos_token_id).all())
    assert bool((ids[:, 1:] == model.config.eos_token_id).any())


def test_without_a_start_token_first_tokens_are_random() -> None:
    model = tiny_models.llama()
    model.generation_config.bos_token_id = model.config.bos_token_id = None
    ids = sample_sequences(model, 20, 4, seed=0)
    assert len(set(ids[:, 0].tolist())) > 5
    assert torch.equal(ids, sample_sequences(model, 20, 4, seed=0))


def test_special_tokens_outside_the_vocabulary_are_none() -> None:
    """Configs of small models often keep the default ids of large ones."""
    model = tiny_models.llama()
    size = model.config.vocab_size
    model.generation_config.bos_token_id = model.config.bos_token_id = size
    model.generation_config.eos_token_id = [size + 5, model.config.eos_token_id]
    ids = sample_sequences(model, 20, 8, seed=0)
    assert len(set(ids[:, 0].tolist())) > 5
    assert not bool((ids[:, 1:] == model.config.eos_token_id).any())


def test_samples_follow_the_distribution_of_the_model() -> None:
    """The mean loss of the model on its own samples is its mean entropy, up to the sampling error."""
    ids = sample_sequences(MODEL, 64, 40, seed=0)
    with torch.no_grad():
        logits = MODEL(ids).logits[:, :-1].double()
    logits[..., MODEL.config.eos_token_id] = -float("inf")
    logs = logits.log_softmax(dim=-1)
    entropy = -(logs.exp() * logs.clamp(min=-1e9)).sum(dim=-1)
    nll = -logs.gather(-1, ids[:, 1:, None])[..., 0]
    error = (nll - entropy).mean() / (nll - entropy).std() * nll.numel() ** 0.5
    assert abs(float(error)) < 5


def test_a_model_that_cannot_generate_is_an_error() -> None:
    with pytest.raises(CompressionError, match="LlamaModel cannot generate.*give calibration="):
        sample_sequences(LlamaModel(MODEL.config), 1, 4, seed=0)
