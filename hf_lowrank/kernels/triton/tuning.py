"""Launching a Triton kernel in the configuration that is fastest for its shape, found once per process."""

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
import triton

from ...runtime.errors import CompressionError

Grid = Callable[[dict[str, Any]], tuple[int, ...]]


class TunedKernel:
    """A kernel that is timed in each configuration when a shape is new, and runs in the fastest from then on.

    Triton's interpreter, which has no time worth measuring, runs the first configuration.

    Args:
        kernel: a function under `triton.jit`.
        configurations: which to try.
        key: names of the arguments that make a shape.
    """

    def __init__(self, kernel: Any, configurations: Sequence[triton.Config], key: Sequence[str]) -> None:
        self.kernel, self.configurations, self.key = kernel, list(configurations), list(key)
        interpreted = not isinstance(kernel, triton.JITFunction)
        self.tuned = None if interpreted else triton.autotune(self.configurations, self.key)(kernel)
        self.seen: set[tuple[Any, ...]] = set()

    def launch(self, device: torch.device, grid: Grid, **arguments: Any) -> None:
        """Run the kernel on `device`; `grid` gives the number of programs from the arguments of the configuration.

        Raises:
            CompressionError: if a CUDA graph is being captured and the shape is new, as tuning cannot be captured.
        """
        if self.tuned is None:
            self.kernel[grid](**arguments, **self.configurations[0].kwargs)
            return
        shape = (
            device,
            *(arguments[name] for name in self.key),
            *(part.dtype for part in arguments.values() if hasattr(part, "dtype")),
        )
        if shape not in self.seen and torch.cuda.is_current_stream_capturing():
            raise CompressionError(
                "a compressed layer met a new shape while a CUDA graph is captured; run it once before, as PyTorch asks"
            )
        with _current(device):
            self.tuned[grid](**arguments)
        self.seen.add(shape)


def _current(device: torch.device) -> AbstractContextManager[Any]:
    return torch.cuda.device(device) if device.type == "cuda" else nullcontext()
