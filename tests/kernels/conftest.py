"""Loads the kernels for the tests of this folder only, as they change the last bits of a logit."""

from collections.abc import Iterator

import pytest

from hf_lowrank import kernels


@pytest.fixture(autouse=True, scope="package")
def _kernels_stay_here() -> Iterator[None]:
    kernels.load()
    yield
    kernels.unload()
