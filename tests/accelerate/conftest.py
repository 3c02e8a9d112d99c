"""Compressed models."""

import pytest

from tests.support.compressed import RECIPES, Compressed, compressed_model


@pytest.fixture(scope="session", params=RECIPES)
def compressed(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Compressed:
    return compressed_model(request.param, tmp_path_factory)
