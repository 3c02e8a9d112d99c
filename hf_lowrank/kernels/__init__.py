"""Faster back ends for the operations of `runtime.ops`, registered where the machine has what they need.

They are loaded when a compressed layer is first computed, unless the environment variable `HF_LOWRANK_KERNELS` is
"off". Their results differ from those of plain torch by rounding only, in the last bits. `unload()` goes back to plain
torch, `load()` to the kernels.

A back end is a module that has

- `register()`, which offers its kernels to `runtime.ops`;
- `describe(operation)`, which returns a name and a reason: what computes the operation here, and why;
- `ON_BY_DEFAULT`, which is False for a back end that has not run yet on the hardware it was written for. Such a back
  end is loaded only by `load()`, or where the environment variable is "on".

Plain torch computes whatever no kernel accepts.
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
    """States which back end computes an operation on a device, and why."""

    operation: str
    device: str
    name: str
    reason: str


def load() -> None:
    """Register every back end that this machine can run. They take over from plain torch."""
    for back_end in _back_ends().values():
        back_end.register()


def unload() -> None:
    """Have plain torch compute every operation from here on, until `load()`."""
    ops.unregister_kernels()
    _back_ends()["cpu"].withdraw()


def load_by_default() -> None:
    """Register the back ends that the environment asks for.

    These are all of them if the variable is "on", none if it is "off", and those that are on by default if it is not
    set.

    Raises:
        ValueError: if the environment variable is neither "on" nor "off".
    """
    switch = os.environ.get(ENVIRONMENT_VARIABLE)
    if switch not in ("on", "off", None):
        raise ValueError(f"{ENVIRONMENT_VARIABLE}={switch!r}, expected on or off; unset it to have the kernels on")
    for back_end in _back_ends().values():
        if switch == "on" or (switch is None and back_end.ON_BY_DEFAULT):
            back_end.register()


def describe() -> list[BackEnd]:
    """Return the back end that each operation is first offered to, by kind of device. `hf-lowrank env` prints it."""
    descriptions = []
    for device, back_end in _back_ends().items():
        for operation in OPERATIONS:
            name, reason = _name_and_reason(back_end, operation)
            descriptions.append(BackEnd(operation, device, name, reason))
    return descriptions


def _name_and_reason(back_end: Any, operation: str) -> tuple[str, str]:
    """Return what `back_end.describe` says, or plain torch where the environment keeps the back end off."""
    switch = os.environ.get(ENVIRONMENT_VARIABLE)
    if switch == "off":
        return "torch", f"the environment variable {ENVIRONMENT_VARIABLE} is off"
    # A back end says what it could do here. Whether it is loaded at all is decided by the same rule as in
    # `load_by_default`.
    name, reason = back_end.describe(operation)
    if name != "torch" and switch != "on" and not back_end.ON_BY_DEFAULT:
        return (
            "torch",
            f"{name} was never run on such a device and is off by default; {ENVIRONMENT_VARIABLE}=on takes it",
        )
    return name, reason


def _back_ends() -> dict[str, Any]:
    """Return the modules of the back ends by the kind of device they are for."""
    # Neither of these modules imports its compiler or its library before a kernel is registered.
    return {
        "cpu": import_module(f"{__name__}.cpu"),
        "cuda": import_module(f"{__name__}.triton"),
    }
