"""Sets vLLM up for a CPU with little memory, and makes every checkpoint once."""

import importlib.util
import os
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

if importlib.util.find_spec("vllm") is None:
    collect_ignore_glob = ["test_*.py"]  # the normal suite, whose environment has no room for vLLM's own versions

# vLLM reads both when it is imported: one GiB for keys and values, and the engine in the process of the test.
os.environ["VLLM_CPU_KVCACHE_SPACE"] = "1"
os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"


@pytest.fixture(autouse=True, scope="session")
def kernels() -> Iterator[None]:
    """Let compressed layers compute as they do for users, with the kernels for CPUs."""
    before = os.environ.pop("HF_LOWRANK_KERNELS", None)
    yield
    if before is not None:
        os.environ["HF_LOWRANK_KERNELS"] = before


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str, str], Path]:
    """Return the function that gives the folder of a checkpoint by family and layout."""
    from .checkpoints import make

    root, made = tmp_path_factory.mktemp("served"), {}

    def folder(family: str, layout: str) -> Path:
        if (family, layout) not in made:
            made[family, layout] = make(family, layout, root / str(len(made)))
        return made[family, layout]

    return folder
