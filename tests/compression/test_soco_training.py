"""SoCo's training starts at the dense model, goes on after a kill to the same bytes, and keeps the model's state."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import PreTrainedModel

from hf_lowrank import CompressionConfig, NumericalError, compress
from hf_lowrank.compression import pipeline, soco_training
from hf_lowrank.compression.spectral_linear import SpectralLinear
from hf_lowrank.methods.soco import SoCo, effective_score, gate, polarization, score, with_learned_scores
from hf_lowrank.methods.spectral import Measurement, factorize
from hf_lowrank.models.architectures import find_blocks, find_layers
from hf_lowrank.runtime.quantizer import swap_module

from ..support import tiny_models

IDS = tiny_models.token_ids(8, 24).tolist()
STEPS, FINISH = 8, 6
"""Number of steps that learn the scores, and of those that re-fit what is left after the cut."""
OPTIONS = {"steps": STEPS, "finish_steps": FINISH, "batch_tokens": 48}


def recipe(**options: object) -> CompressionConfig:
    return CompressionConfig(method="soco", ratio=0.4, options={**OPTIONS, **options}, samples=8, sequence_length=24)


def measurements_of(model: PreTrainedModel) -> dict[str, Measurement]:
    """Return the measurements of all layers, whitened at random, which must not matter while nothing is cut."""
    measurements = {}
    for layer in find_layers(find_blocks(model)):
        generator = torch.Generator().manual_seed(0)
        shape = (3 * layer.in_features, layer.in_features)
        x = torch.randn(shape, dtype=torch.float64, generator=generator)
        weight = model.get_submodule(layer.name).weight.detach().double()
        measurements[layer.name] = Measurement(layer, factorize(weight, x.T @ x))
    return measurements


def test_scores_of_one_are_the_dense_model() -> None:
    model = tiny_models.llama(dtype=torch.float64)
    ids = torch.tensor(IDS)
    with torch.no_grad():
        dense = model(ids).logits
        for name, measurement in measurements_of(model).items():
            layer = SpectralLinear(model.get_submodule(name), measurement, deviation=True)
            layer.effective = score(layer.a)
            assert torch.equal(layer.effective, torch.ones_like(layer.a))
            swap_module(model, name, layer)
        torch.testing.assert_close(model(ids).logits, dense, rtol=1e-9, atol=1e-9)


def test_scores_of_one_at_full_rank_store_the_dense_weight() -> None:
    model = tiny_models.llama(dtype=torch.float64)
    for name, measurement in measurements_of(model).items():
        weight = model.get_submodule(name).weight
        scores = torch.ones_like(measurement.factorization.sigma)
        full = with_learned_scores(measurement, scores, None).truncate(min(weight.shape))
        torch.testing.assert_close(full.lowrank_b @ full.lowrank_a, weight.detach(), rtol=1e-9, atol=1e-9)


def test_phases_follow_each_other_and_cover_all_steps() -> None:
    method = SoCo(steps=100)
    phases = [method.phase(step) for step in range(100)]
    assert [phase.number for phase in phases] == 30 * [1] + 40 * [2] + 30 * [3]
    for phase in phases[:70]:
        assert not phase.hard
        assert phase.polarization == 0
    for phase in phases[70:]:
        assert phase.hard
    temperatures = [phase.temperature for phase in phases]
    assert all(later <= earlier + 1e-12 for earlier, later in zip(temperatures, temperatures[1:], strict=False))
    assert 0.02 <= min(temperatures) <= 0.022


def test_the_hard_mask_has_the_gradient_of_the_soft_one() -> None:
    a = torch.linspace(-3, 3, 20, dtype=torch.float64, requires_grad=True)
    hard = SoCo(steps=10).phase(9)
    value = effective_score(score(a), hard)
    s = score(a)
    torch.testing.assert_close(value, torch.where(s > 0.5, s, 0.0))
    (gradient,) = torch.autograd.grad(value.sum(), a)
    (expected,) = torch.autograd.grad((score(a) * gate(score(a), hard.temperature)).sum(), a)
    torch.testing.assert_close(gradient, expected)


def test_polarization_vanishes_exactly_when_all_is_decided() -> None:
    assert float(polarization(torch.tensor([0.0, 1.0, 1.0]))) == 0
    assert float(polarization(torch.tensor([0.5, 0.5]))) == 1


def interrupting(after: int, steps_done: list[int]) -> Callable:
    """Return a progress bar that records the training steps and interrupts after one of them."""

    @contextmanager
    def bar(shown: bool) -> Iterator[Callable[[str, int, int], None]]:
        def step(what: str, done: int, total: int) -> None:
            if what == "learning the spectrum":
                steps_done.append(done)
                if done == after:
                    raise KeyboardInterrupt

        yield step

    return bar


@pytest.mark.parametrize("after", [4, STEPS, STEPS + FINISH - 1])
def test_a_killed_training_goes_on_to_the_same_bytes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, after: int
) -> None:
    monkeypatch.setattr(soco_training, "STEPS_BETWEEN_STATES", 3)
    work = tmp_path / "work"
    compress(tiny_models.llama(), recipe(), calibration=IDS).save_pretrained(tmp_path / "whole")

    model = tiny_models.llama()
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(pipeline, "progress_bar", interrupting(after, []))
        compress(model, recipe(), calibration=IDS, work_dir=work)
    for name, value in tiny_models.llama().state_dict().items():
        assert torch.equal(value, model.state_dict()[name])

    steps_done: list[int] = []
    with monkeypatch.context() as patch:
        patch.setattr(pipeline, "progress_bar", interrupting(-1, steps_done))
        resumed = compress(tiny_models.llama(), recipe(), calibration=IDS, work_dir=work)
    saved = max(step for step in range(0, after, 3) if step != STEPS)  # the last state that was written
    assert steps_done == list(range(saved + 1, STEPS + FINISH + 1))
    resumed.save_pretrained(tmp_path / "resumed")
    for name in ("model.safetensors", "config.json"):
        assert (tmp_path / "whole" / name).read_bytes() == (tmp_path / "resumed" / name).read_bytes()
    curve = resumed.compression_report["curve"]  # its part before the kill was in the saved state
    assert len(curve["loss"]) == len(curve["ratio"]) == len(curve["phase"]) == STEPS + FINISH


def test_the_training_lowers_the_divergence_it_ends_with() -> None:
    """After the cut, re-fitting what is left brings the model closer to the dense one."""
    model = compress(tiny_models.llama(), recipe(finish_steps=40), calibration=IDS)
    losses = model.compression_report["curve"]["loss"]
    assert sum(losses[-8:]) < sum(losses[STEPS : STEPS + 8])


@pytest.mark.parametrize(
    "options", [{"base": "plain"}, {"deviation": False}, {"loss": "cross_entropy"}, {"finish_steps": 0}]
)
def test_every_option_meets_the_budget(tmp_path: Path, options: dict) -> None:
    model = compress(tiny_models.llama(), recipe(**options), calibration=IDS)
    report = model.compression_report
    assert 0.4 <= report["ratio_stored"] <= 0.405
    biased = [entry["name"] for entry in report["layers"] if model.get_submodule(entry["name"]).bias is not None]
    assert bool(biased) == options.get("deviation", True)
    model.save_pretrained(tmp_path)
    assert any(name.endswith(".bias") for name in load_file(tmp_path / "model.safetensors")) == bool(biased)


@pytest.mark.parametrize(("kind", "predictions"), [("kl", (24, 9)), ("cross_entropy", (23, 8))])
def test_padding_does_not_count_in_the_loss(kind: str, predictions: tuple[int, int]) -> None:
    """The loss of rows of unequal length is the mean over all their predictions."""
    rows = [tiny_models.token_ids(1, length, seed=length)[0].tolist() for length in (24, 9)]

    def first_loss(rows: list[list[int]]) -> float:
        model = compress(tiny_models.llama(), recipe(steps=1, finish_steps=0, loss=kind), calibration=rows)
        return float(model.compression_report["curve"]["loss"][0])

    mean = sum(count * first_loss([row]) for count, row in zip(predictions, rows, strict=True)) / sum(predictions)
    assert first_loss(rows) == pytest.approx(mean, rel=1e-2 if kind == "kl" else 1e-5)


def test_a_loss_that_is_not_finite_is_an_error() -> None:
    with pytest.raises(NumericalError, match=r"soco: the loss is .* at step \d+; lower learning_rate"):
        compress(tiny_models.llama(), recipe(deviation_rate=1e30, steps=20), calibration=IDS)
