"""Faster back ends for the operations of `runtime.ops`, registered where the machine has what they need.

A back end is a module with `register()`, which offers its kernels to `runtime.ops`, and `describe(operation)`, which says
(name, reason) of what it would do; plain torch computes whatever no kernel takes.
"""

from dataclasses import dataclass
from functools import cache
from importlib import import_module
from importlib.util import find_spec

import torch

OPERATIONS = ("bitmask_linear", "binary_linear", "bitmask_binary_linear", "lowrank_linear")


@dataclass(frozen=True)
class BackEnd:
    """Which back end computes an operation on a device, and why."""

    operation: str
    device: str
    name: str
    reason: str


@cache
def load() -> None:
    """Register every back end that this machine can run; a second call does nothing."""
    for module in _modules().values():
        import_module(module).register()


def describe() -> list[BackEnd]:
    """The back end that each operation is first offered to on each device of this machine; `hf-lowrank env` prints these."""
    load()
    return [
        BackEnd(operation, device, *import_module(module).describe(operation))
        for device, module in _modules().items()
        for operation in OPERATIONS
    ]


def _modules() -> dict[str, str]:
    modules = {"cpu": f"{__name__}.cpu"}
    if torch.cuda.is_available() and find_spec("triton") is not None:
        modules["cuda"] = f"{__name__}.triton"
    return modules
