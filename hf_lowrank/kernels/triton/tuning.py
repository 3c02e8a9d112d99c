"""Launching a Triton kernel in the configuration that is fastest for its shape, which is measured once per process."""

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
import triton

from ...runtime.errors import CompressionError

Grid = Callable[[dict[str, Any]], tuple[int, ...]]


class TunedKernel:
    """A kernel that is timed in each configuration when a shape is new, and runs in the fastest from then on.

    Triton's interpreter always runs the first configuration, as its times say nothing about a GPU.

    Args:
        kernel: a function under `triton.jit`.
        configurations: the configurations to try.
        key: names of the arguments whose values make a shape.
    """

    def __init__(self, kernel: Any, configurations: Sequence[triton.Config], key: Sequence[str]) -> None:
        self.kernel = kernel
        self.configurations = list(configurations)
        self.key = list(key)
        self.tuned: Any = None
        interpreted = not isinstance(kernel, triton.JITFunction)
        if not interpreted:
            self.tuned = triton.autotune(self.configurations, self.key)(kernel)
        self.seen: set[tuple[Any, ...]] = set()

    def launch(self, device: torch.device, grid: Grid, **arguments: Any) -> None:
        """Run the kernel on `device`.

        Args:
            grid: returns the number of programs, given the arguments of a configuration.
            arguments: the arguments of the kernel that no configuration has.

        Raises:
            CompressionError: if a CUDA graph is being captured and the shape is new, as tuning cannot be captured.
        """
        if self.tuned is None:
            self.kernel[grid](**arguments, **self.configurations[0].kwargs)
            return
        shape = self._shape(device, arguments)
        if shape not in self.seen and torch.cuda.is_current_stream_capturing():
            raise CompressionError(
                "a compressed layer met a new shape while a CUDA graph is captured; run it once before the capture, "
                "as PyTorch asks"
            )
        with _current(device):
            self.tuned[grid](**arguments)
        # Only now: a launch that failed has not tuned the shape.
        self.seen.add(shape)

    def _shape(self, device: torch.device, arguments: dict[str, Any]) -> tuple[Any, ...]:
        """Return the shape of a launch: its device, the values of the key's arguments, and all tensors' dtypes."""
        values = [arguments[name] for name in self.key]
        dtypes = [argument.dtype for argument in arguments.values() if hasattr(argument, "dtype")]
        return (device, *values, *dtypes)


def _current(device: torch.device) -> AbstractContextManager[Any]:
    """Make `device` the current one, on which Triton launches. The CPU, where tests launch, needs nothing."""
    if device.type == "cuda":
        return torch.cuda.device(device)
    return nullcontext()
