"""A checkpoint that was tampered with opens, or raises a CompressionError.

`python -m tests.fuzz.run` tries thousands more.
"""

import os
import random
import shutil
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests.fuzz.checkpoints import save_checkpoints
from tests.fuzz.mutations import copy_mutated, mutate
from tests.fuzz.routes import ROUTES, attempt, same_model


@pytest.fixture(scope="module")
def sources(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    return save_checkpoints(tmp_path_factory.mktemp("sources"))


PAST_FINDINGS = {
    28: "a generation_config.json that is a list",
    86: "an integer of 100,000 digits in generation_config.json",
    87: "lists nested 200,000 deep in generation_config.json",
    112: "config.json and generation_config.json swapped",
    161: "dictionaries nested 100,000 deep in the report",
    421: "config.json without its compression, but with an auto map that names other code",
    509: "a report whose layers have no names",
    1017: "a report whose errors are words",
    1019: "a report that is a list",
    1907: "shards without their index",
    701242: "config.json cut short, and its entry file removed",
    701396: "config.json that is no JSON, and a folder in the place of its entry file",
    900175: "a number in the place of a dtype's name",
}
"""Seeds with which an attempt once ended otherwise, and what they change."""


@pytest.mark.parametrize("seed", PAST_FINDINGS, ids=PAST_FINDINGS.get)
def test_past_findings_stay_mended(sources: list[Path], tmp_path: Path, seed: int) -> None:
    copy_mutated(seed, sources, tmp_path / "mutated")
    for route in ROUTES.values():
        outcome = attempt(route, tmp_path / "mutated")
        assert outcome.allowed, outcome


@pytest.mark.parametrize("kind", ["link", "pipe"])
def test_damage_goes_no_further_than_the_folder(sources: list[Path], tmp_path: Path, kind: str) -> None:
    """No mutation follows one that leaves a link or a pipe: it would write through the link or wait for the pipe."""
    folder, outside = Path(shutil.copytree(sources[0], tmp_path / "mutated")), tmp_path / "outside.json"
    outside.write_text("{}")
    (folder / "config.json").unlink()
    if kind == "link":
        (folder / "config.json").symlink_to(outside)
    else:
        os.mkfifo(folder / "config.json")
    assert all(mutate(random.Random(seed), folder) == "" for seed in range(50))
    assert outside.read_text() == "{}"


@settings(max_examples=30, deadline=None, suppress_health_check=list(HealthCheck))
@given(rng=st.randoms(use_true_random=False), route=st.sampled_from(sorted(ROUTES)))
def test_any_mutation_is_opened_or_refused(
    sources: list[Path], tmp_path: Path, rng: random.Random, route: str
) -> None:
    for left in tmp_path.iterdir():  # hypothesis runs all examples in one folder
        shutil.rmtree(left, ignore_errors=True)
    source = rng.choice(sources)
    folder = tmp_path / "mutated"
    shutil.copytree(source, folder)
    mutate(rng, folder)
    outcome = attempt(ROUTES[route], folder)
    assert outcome.allowed, outcome
    if outcome.verdict == "opened" and route == "verify":
        assert same_model(folder, source), "it verifies as sound, and is another model"
