"""Faster back ends for the operations of `runtime.ops`, registered where the machine has what they need.

They are loaded when a compressed layer is first computed, unless the environment variable `HF_LOWRANK_KERNELS` is "off". Results then
differ from plain torch's by rounding only, in the last bits; `unload()` goes back to plain torch, `load()` to the kernels.

A back end is a module with `register()`, which offers its kernels to `runtime.ops`, `describe(operation)`, which says (name, reason) of
what it would do, and `ON_BY_DEFAULT`: one that has not run on the hardware it is for is loaded only where the variable is "on", or by
`load()`. Plain torch computes whatever no kernel takes.
"""

import os
from dataclasses import dataclass
from importlib import import_module
from typing import Any

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
    for back_end in _back_ends().values():
        back_end.register()


def unload() -> None:
    """Plain torch computes every operation from here on, until `load()`."""
    ops.unregister_kernels()


def load_by_default() -> None:
    """Register the back ends that the environment asks for: all if it says "on", none if "off", else those that are on by default.

    Raises:
        ValueError: if the environment variable is neither "on" nor "off".
    """
    wanted = os.environ.get(ENVIRONMENT_VARIABLE)
    if wanted not in ("on", "off", None):
        raise ValueError(f"{ENVIRONMENT_VARIABLE}={wanted!r}, expected on or off; unset it to have the kernels on")
    for back_end in _back_ends().values():
        if wanted == "on" or (wanted is None and back_end.ON_BY_DEFAULT):
            back_end.register()


def describe() -> list[BackEnd]:
    """The back end that each operation is first offered to on each kind of device; `hf-lowrank env` prints these."""
    return [
        BackEnd(operation, device, *_described(back_end, operation))
        for device, back_end in _back_ends().items()
        for operation in OPERATIONS
    ]


def _described(back_end: Any, operation: str) -> tuple[str, str]:
    wanted = os.environ.get(ENVIRONMENT_VARIABLE)
    if wanted == "off":
        return "torch", f"the environment variable {ENVIRONMENT_VARIABLE} is off"
    name, reason = back_end.describe(operation)
    if name != "torch" and wanted != "on" and not back_end.ON_BY_DEFAULT:
        return (
            "torch",
            f"{name} was never run on such a device and is off by default; {ENVIRONMENT_VARIABLE}=on takes it",
        )
    return name, reason


def _back_ends() -> dict[str, Any]:
    """The modules of the back ends by the device they are for."""
    return {device: import_module(f"{__name__}.{folder}") for device, folder in (("cpu", "cpu"), ("cuda", "triton"))}
