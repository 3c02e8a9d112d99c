"""Runs every test that asks for a compressed model with one of every layout."""

import pytest

from tests.support.compressed import RECIPES, Compressed, compressed_model


@pytest.fixture(scope="session", params=RECIPES)
def compressed(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Compressed:
    """A compressed model, which the tests share and leave as it is."""
    return compressed_model(request.param, tmp_path_factory)
