"""Faster back ends for the operations of `runtime.ops`, registered where the machine has what they need."""

from dataclasses import dataclass
from functools import cache
from importlib.util import find_spec

from ..runtime import ops

OPERATIONS = ("bitmask_linear", "binary_linear", "bitmask_binary_linear", "lowrank_linear")


@dataclass(frozen=True)
class BackEnd:
    """Which back end computes an operation on a device, and why; `hf-lowrank env` prints these."""

    operation: str
    device: str
    name: str
    reason: str


@cache
def load() -> None:
    """Register every back end this machine can run; a second call does nothing."""
    from . import cpu

    cpu.register()
    if find_spec("triton") is not None:
        from . import triton

        triton.register()


def describe() -> list[BackEnd]:
    """The back end that each operation is first offered to, per device, and the reason."""
    load()
    from .cpu import describe as describe_cpu

    return [BackEnd(operation, "cpu", *describe_cpu(operation)) for operation in OPERATIONS]
