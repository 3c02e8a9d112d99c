"""Every test runs offline, on two threads, in plain torch."""

import gc
import os
import signal
from collections.abc import Iterator

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["OMP_WAIT_POLICY"] = "passive"
# Plugin and remote code are compared bit for bit, so no test loads kernels but those in tests/kernels.
os.environ["HF_LOWRANK_KERNELS"] = "off"
# Triton reads this when it is first imported. On a machine with a GPU, 0 lets the GPU compute.
os.environ.setdefault("TRITON_INTERPRET", "1")
os.environ["TOKENIZERS_PARALLELISM"] = "false"

import pytest
import torch

torch.set_num_threads(2)
# A shell starts its background jobs and their children deaf to this signal, which some tests send.
signal.signal(signal.SIGINT, signal.default_int_handler)


def pytest_collection_finish() -> None:
    """Take what the imports left out of garbage collection, which is otherwise a third of the time of the tests."""
    gc.collect()
    gc.freeze()


@pytest.fixture
def kept_logging() -> Iterator[None]:
    """Give transformers' logging back as it was, which the command line quiets."""
    import transformers  # not for the tests that need no models

    verbosity, bars = transformers.utils.logging.get_verbosity(), transformers.utils.logging.is_progress_bar_enabled()
    yield
    transformers.utils.logging.set_verbosity(verbosity)
    if bars:
        transformers.utils.logging.enable_progress_bar()
