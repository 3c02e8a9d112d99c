"""The estimated time of a compression is counted, and extrapolated from small pieces."""

from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hf_lowrank import CompressionConfig
from hf_lowrank.compression import time_estimate
from hf_lowrank.compression.dry_run import describe
from hf_lowrank.compression.time_estimate import TimeEstimate, estimate_time, extrapolated

from ..support import tiny_models

COEFFICIENT = st.floats(0.01, 100)


@given(st.lists(COEFFICIENT, min_size=3, max_size=3), st.sets(st.sampled_from([0, 1, 2]), min_size=1))
def test_times_that_follow_a_law_are_extrapolated_by_it(coefficients: list[float], powers: set[int]) -> None:
    """The law holds for linear, quadratic and cubic work, and for mixtures of two of them."""
    if len(powers) == 3:
        powers.pop()

    def law(side: float) -> float:
        return sum(coefficients[power] * side ** (power + 1) for power in powers)

    sides = [1 / 16, 1 / 8, 1 / 4]
    assert extrapolated(sides, [law(side) for side in sides], (1, 2, 3)) == pytest.approx(law(1.0), rel=1e-4)


@pytest.mark.parametrize("method", ["wanda", "svd-llm", "sola", "lowrank", "fwsvd"])
def test_more_of_anything_takes_longer(monkeypatch: pytest.MonkeyPatch, method: str) -> None:
    monkeypatch.setattr(time_estimate, "_timed", lambda task: 0.01)

    def estimated(samples: int = 4, options: dict[str, bool] | None = None, **shape: int) -> TimeEstimate:
        config = CompressionConfig(
            method=method, ratio=0.4, samples=samples, sequence_length=24, calibration="c4", options=options or {}
        )
        return estimate_time(tiny_models.llama(**shape), config)

    few = estimated()
    assert estimated(samples=8).calibration == pytest.approx(2 * few.calibration)
    assert estimated(num_hidden_layers=8).solving > few.solving
    assert estimated(num_hidden_layers=8).calibration == pytest.approx(2 * few.calibration)
    assert estimated(hidden_size=64).calibration > few.calibration
    assert few.total == few.start + few.calibration + few.solving + few.files
    if method == "svd-llm":
        assert estimated(options={"update": True}).calibration > few.calibration


def test_an_expert_sees_its_share_of_the_tokens(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two of four experts work on a token, so they cost what two dense networks of their size would cost."""
    monkeypatch.setattr(time_estimate, "_timed", lambda task: 0.01)
    recorded: list[dict[str, float]] = []
    usual = time_estimate._token_shares

    def record(*arguments: Any) -> dict[str, float]:
        recorded.append(usual(*arguments))
        return recorded[-1]

    monkeypatch.setattr(time_estimate, "_token_shares", record)
    config = CompressionConfig(method="wanda", ratio=0.4, calibration="c4", sequence_length=24)
    estimate_time(tiny_models.mixtral(), config)
    assert recorded[0]["model.layers.0.mlp.experts.3.gate_up"] == 0.5
    assert recorded[0]["model.layers.0.self_attn.q_proj"] == 1.0


def test_a_dry_run_counts_the_values_as_they_will_be_stored() -> None:
    config = CompressionConfig(method="soco", calibration="c4")
    size = "the whole model must be in memory, {} GB"
    assert size.format("0.01") in describe(str(tiny_models.BUNDLED), config)
    assert size.format("0.03") in describe(str(tiny_models.BUNDLED), config, dtype="float32")


def test_a_dry_run_says_the_time_or_why_it_is_not_known(tmp_path: Path) -> None:
    dense = str(tiny_models.BUNDLED)
    shown = describe(dense, CompressionConfig(method="wanda", calibration="c4"))
    assert "time if this machine has nothing else to do: " in shown
    mixture = str(tiny_models.saved(tiny_models.mixtral(), tmp_path / "mixture"))
    shown = describe(mixture, CompressionConfig(method="auto", ratio=0.7, calibration="c4", sequence_length=24))
    assert "memory above torch's own, at most: " in shown
    assert "calibration" in shown
    assert "time: not known for what trains" in describe(dense, CompressionConfig(method="soco", calibration="c4"))
    assert "time: not known for cuda" in describe(dense, CompressionConfig(method="wanda", calibration="c4"), "cuda")
    sampled = CompressionConfig(method="wanda", calibration="self")
    assert "sampling of the calibration text comes on top" in describe(dense, sampled)
