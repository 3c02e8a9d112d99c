"""The kernels are loaded for the tests of this folder only: they change the last bits of a logit."""

from collections.abc import Iterator

import pytest

from hf_lowrank import kernels
from hf_lowrank.runtime import ops


@pytest.fixture(autouse=True, scope="package")
def _kernels_stay_here() -> Iterator[None]:
    before = {key: list(offered) for key, offered in ops._kernels.items()}
    yield
    ops._kernels.clear()
    ops._kernels.update(before)
    kernels.load.cache_clear()
