"""Faster back ends for the operations of `runtime.ops`, registered where the machine has what they need.

They are loaded when a compressed layer is first computed, unless the environment variable `HF_LOWRANK_KERNELS` is "off". Results then
differ from plain torch's by rounding only, in the last bits; `unload()` goes back to plain torch, `load()` to the kernels.

A back end is a module with `register()`, which offers its kernels to `runtime.ops`, and `describe(operation)`, which says
(name, reason) of what it would do; plain torch computes whatever no kernel takes.
"""

import os
from dataclasses import dataclass
from importlib import import_module
from importlib.util import find_spec

import torch

from ..runtime import ops

OPERATIONS = (
    "bitmask_linear",
    "binary_linear",
    "bitmask_binary_linear",
    "quantized_linear",
    "lowrank_linear",
    "pivoted_linear",
    "bitmask_input_grad",
    "binary_input_grad",
    "bitmask_binary_input_grad",
    "quantized_input_grad",
)
ENVIRONMENT_VARIABLE = "HF_LOWRANK_KERNELS"


@dataclass(frozen=True)
class BackEnd:
    """Which back end computes an operation on a device, and why."""

    operation: str
    device: str
    name: str
    reason: str


def load() -> None:
    """Register every back end that this machine can run; they take over from plain torch."""
    for module in _modules().values():
        import_module(module).register()


def unload() -> None:
    """Plain torch computes every operation from here on, until `load()`."""
    ops.unregister_kernels()


def load_by_default() -> None:
    """`load()`, unless the environment says otherwise.

    Raises:
        ValueError: if the environment variable is neither "on" nor "off".
    """
    wanted = os.environ.get(ENVIRONMENT_VARIABLE, "on")
    if wanted not in ("on", "off"):
        raise ValueError(f"{ENVIRONMENT_VARIABLE}={wanted!r}, expected on or off; unset it to have the kernels on")
    if wanted == "on":
        load()


def describe() -> list[BackEnd]:
    """The back end that each operation is first offered to on each device of this machine; `hf-lowrank env` prints these."""
    off = os.environ.get(ENVIRONMENT_VARIABLE) == "off"
    because = f"the environment variable {ENVIRONMENT_VARIABLE} is off"
    return [
        BackEnd(operation, device, *(("torch", because) if off else import_module(module).describe(operation)))
        for device, module in _modules().items()
        for operation in OPERATIONS
    ]


def _modules() -> dict[str, str]:
    modules = {"cpu": f"{__name__}.cpu"}
    if torch.cuda.is_available() and find_spec("triton") is not None and find_spec(f"{__name__}.triton") is not None:
        modules["cuda"] = f"{__name__}.triton"
    return modules
