"""What the progress bar and the log say about the time that is left, and how often they say it."""

import logging
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


@pytest.fixture
def now(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """The time that the log reads, in a process whose standard error is no terminal."""
    now = [0.0]
    monkeypatch.setattr(progress.time, "monotonic", lambda: now[0])
    monkeypatch.setattr(sys.stderr, "isatty", lambda: False)
    return now


def test_without_a_terminal_there_is_one_line_per_block(now: list[float], caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, logger=progress.__name__)
    with progress.progress_bar(True) as step:
        step("capturing block inputs", 0, 4)
        now[0] += 5
        for _ in range(2):  # passes over the model
            for block in range(2):
                step(f"blocks.{block}", 2 * block, 4)
                for layer in range(2):
                    step(f"blocks.{block}.layer_{layer}", 2 * block, 4)
                    now[0] += 10
    assert caplog.messages == [
        "capturing block inputs: 0 of 4 done, 0:00 elapsed",
        "blocks.0: 0 of 4 done, 0:05 elapsed",
        "blocks.1: 2 of 4 done, 0:25 elapsed, about 0:20 remaining",
        "blocks.0: 0 of 4 done, 0:45 elapsed",
        "blocks.1: 2 of 4 done, 1:05 elapsed, about 0:20 remaining",
    ]


def test_work_that_takes_long_is_named_again(now: list[float], caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, logger=progress.__name__)
    with progress.progress_bar(True) as step:
        for done in range(0, 3000, 10):
            step("learning the spectrum", done, 3000)
            now[0] += 15
    assert len(caplog.messages) == 3000 // 10 * 15 // progress.REPEAT_AFTER
    assert caplog.messages[0] == "learning the spectrum: 0 of 3000 done, 0:00 elapsed"
    assert caplog.messages[-1] == "learning the spectrum: 2960 of 3000 done, 1:14:00 elapsed, about 1:00 remaining"


@pytest.mark.parametrize("shown", [True, False])
def test_a_library_is_silent_unless_it_is_asked(
    shown: bool, now: list[float], caplog: pytest.LogCaptureFixture, capsys: pytest.CaptureFixture[str]
) -> None:
    """Whoever wants the lines sets the level of the logger; `progress=False` silences them even then."""
    caplog.set_level(logging.NOTSET if shown else logging.INFO, logger=progress.__name__)
    with progress.progress_bar(shown) as step:
        step("blocks.0", 0, 1)
    assert caplog.messages == []
    assert capsys.readouterr().err == ""
