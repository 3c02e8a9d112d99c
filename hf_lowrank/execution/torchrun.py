"""The processes that `torchrun` or `accelerate launch` started: which of them this is, and how it joins them.

Nothing heavy is imported here before it is needed, because the command line asks for its rank before it does anything
else.
"""

import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta

from ..runtime.errors import CompressionError

STARTUP_TIMEOUT = timedelta(minutes=5)
"""How long the processes may take to start."""


class RemoteError(CompressionError):
    """An error that another process of the run raised. That process reports it, so the others need not."""


def torchrun_rank() -> int | None:
    """Return the rank that `torchrun` or `accelerate launch` gave this process, or None if it was started alone."""
    # The environment is asked before torch, which takes seconds to import.
    is_alone = int(os.environ.get("WORLD_SIZE", "1")) <= 1
    if is_alone or not {"RANK", "MASTER_ADDR"} <= os.environ.keys():
        return None
    import torch.distributed as dist

    return int(os.environ["RANK"]) if dist.is_available() else None


@contextmanager
def torchrun_group() -> Iterator[None]:
    """While active, let this process belong to the group that `torchrun` or `accelerate launch` started, if one did.

    Each process on a machine uses the accelerator whose number is its local rank.

    Raises:
        CompressionError: if the processes do not find each other in time.
    """
    if torchrun_rank() is None:
        yield
        return
    import torch
    import torch.distributed as dist

    if torch.cuda.is_available():  # before the group is made, because NCCL ties a process to its device
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", "0")))
    try:
        dist.init_process_group(distributed_backends(), timeout=STARTUP_TIMEOUT)
    except (RuntimeError, ValueError) as error:
        raise CompressionError(
            f"the {os.environ['WORLD_SIZE']} processes announced by WORLD_SIZE did not come together "
            f"({first_sentence(error)}); start all of them by torchrun, or unset WORLD_SIZE to work with one"
        ) from error
    yield
    dist.destroy_process_group()  # not after an error, because it would wait for processes that are gone


def distributed_backends() -> str:
    """Return the back ends of torch.distributed on this machine: NCCL for GPUs, if it has any, and Gloo for CPUs."""
    import torch
    import torch.distributed as dist

    if torch.cuda.is_available() and dist.is_nccl_available():
        return "cpu:gloo,cuda:nccl"
    return "gloo"


def first_sentence(error: Exception) -> str:
    """Return the first sentence of an error of torch.distributed, without the place in the code before it."""
    return re.sub(r"^\[\S*\] ", "", str(error)).split(". ")[0].strip()
