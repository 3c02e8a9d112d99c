"""What the progress bar says about the time that is left."""

import sys
from typing import Any

import pytest
from rich.progress import Progress

from hf_lowrank.execution import progress


def test_slow_layers_have_an_estimate_and_every_pass_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    now, bars = [0.0], []

    class Timed(Progress):
        def __init__(self, *columns: Any, **options: Any) -> None:
            super().__init__(*columns, **options, get_time=lambda: now[0], disable=True)
            bars.append(self)

    monkeypatch.setattr(progress, "Progress", Timed)
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    with progress.progress_bar(True) as step:
        for seconds in (100, 1000):  # per layer
            for done in range(5):
                step(f"layer {done}", done, 10)
                now[0] += seconds
            assert bars[0].tasks[0].time_remaining == 6 * seconds
