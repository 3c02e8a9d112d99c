"""Encoder-decoders: the decoder is calibrated on what the compressed encoder gives."""

from typing import Any

import pytest
import torch
from torch import Tensor

from hf_lowrank import compress
from hf_lowrank.budget import Budget
from hf_lowrank.calibration import calibration_batches
from hf_lowrank.methods import Decomposition, Statistics
from hf_lowrank.methods.svd_llm import SVDLLM

from ..support.model_families import FAMILIES, text
from ..support.whole_models import counted, recipe, seen_by_layers


@pytest.mark.parametrize("family", ["T5", "BART", "Whisper"])
def test_a_decoder_is_calibrated_on_the_compressed_encoder(family: str) -> None:
    """A sequential method measures keys and values on the encoder of the model that it makes."""
    batches, original, model = FAMILIES[family].batches(), FAMILIES[family].make(), FAMILIES[family].make()
    compress(model, recipe(), calibration=batches, progress=False)
    reported = {entry["name"]: entry["relative_error"] for entry in model.save_pretrained.report["layers"]}
    keys = [name for name in reported if name.endswith(("EncDecAttention.k", "encoder_attn.k_proj"))]
    assert len(keys) == 2
    now, before = seen_by_layers(model, keys, batches), seen_by_layers(original, keys, batches)
    for key in keys:
        weight = original.get_submodule(key).weight.double()
        lost = weight - model.get_submodule(key).to_dense(weight.dtype)
        errors = []
        for seen in (now, before):
            norms = torch.cat([counted(key, x, batch) for x, batch in zip(seen[key], batches, strict=True)]).norm(
                dim=0
            )
            errors.append(float((lost * norms).norm() / (weight * norms).norm()))
        assert reported[key] == pytest.approx(errors[0], rel=1e-5)
        assert reported[key] != pytest.approx(errors[1], rel=1e-5)


def test_compressed_inputs_of_a_decoder_are_those_of_the_compressed_encoder(monkeypatch: pytest.MonkeyPatch) -> None:
    measured: list[tuple[Tensor, Statistics]] = []
    decompose = SVDLLM.decompose

    def spy(self: SVDLLM, weight: Tensor, statistics: Statistics, budget: Budget) -> Decomposition:
        measured.append((weight, statistics))
        return decompose(self, weight, statistics, budget)

    monkeypatch.setattr(SVDLLM, "decompose", spy)
    batches, original, model = FAMILIES["T5"].batches(), FAMILIES["T5"].make(), FAMILIES["T5"].make()
    compress(model, recipe("svd-llm", 0.3, update=True), calibration=batches, progress=False)
    keys = [f"decoder.block.{index}.layer.1.EncDecAttention.k" for index in range(2)]
    now, before = seen_by_layers(model, keys, batches), seen_by_layers(original, keys, batches)
    for key in keys:
        weight = original.get_submodule(key).weight.double()
        (statistics,) = (entry for dense, entry in measured if torch.equal(dense, weight))
        x_hat = counted(key, now[key][0], batches[0])
        x = counted(key, before[key][0], batches[0])
        for gram, expected in (
            (statistics.gram, x.T @ x),
            (statistics.compressed_input_gram, x_hat.T @ x_hat),
            (statistics.cross_gram, x.T @ x_hat),
        ):
            torch.testing.assert_close(gram, expected, rtol=1e-4, atol=1e-6)
        assert not torch.allclose(statistics.gram, statistics.compressed_input_gram, rtol=1e-2)


@pytest.mark.parametrize("batch", [{}, {"labels": text(4, seed=1)}], ids=["text", "labels"])
def test_a_decoder_without_inputs_reads_labels_or_the_text_one_token_late(batch: dict[str, Tensor]) -> None:
    family = FAMILIES["T5"]
    written = batch.get("labels", text(4))
    late = torch.cat([torch.zeros(4, 1, dtype=torch.long), written[:, :-1]], dim=1)
    given: list[Any] = [[{"input_ids": text(4), **batch}], [{"input_ids": text(4), "decoder_input_ids": late}]]
    if not batch:
        given.append(text(4).tolist())
    states = [compress(family.make(), recipe(), calibration=each, progress=False).state_dict() for each in given]
    for state in states[1:]:
        assert all(torch.equal(state[name], tensor) for name, tensor in states[0].items())


def test_labels_that_do_not_count_are_padding_for_the_decoder() -> None:
    labels = text(4, seed=1)
    labels[2, 5:] = -100
    (batch,) = calibration_batches(
        FAMILIES["T5"].make(), recipe(), calibration=[{"input_ids": text(4), "labels": labels}]
    )
    ids, mask = batch.others["decoder_input_ids"], batch.others["decoder_attention_mask"]
    assert torch.equal(ids[:2, 1:], labels[:2, :-1])
    assert mask.sum(dim=1).tolist() == [12, 12, 6, 12]
    assert bool((ids >= 0).all())
    assert "labels" not in batch.others
