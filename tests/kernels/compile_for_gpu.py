"""Compiles Triton's kernels for an H100 where there is no GPU, with the arguments of real layers; run in a process of its own.

The interpreter takes programs that the compiler refuses, so that both have a say.
"""

from typing import Any

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.runtime import driver

from hf_lowrank.kernels.triton import products
from hf_lowrank.kernels.triton.tuning import TunedKernel
from tests.kernels.layers import operation_of, random_layer

CASES = (
    ("bitmask_binary_linear", 1, 4),
    ("bitmask_binary_linear", 8, 4),
    ("quantized_linear", 3, 4),
    ("quantized_linear, bitmask", 20, 5),
    ("pivoted_linear", 1, 4),
)
"""A form, a number of tokens, and the bits of codes."""


class NoGPU:
    """What the compiler asks of a driver."""

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", 90, 32)

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int | None = None) -> int:
        return 0


def compile_only(self: TunedKernel, device: torch.device, grid: Any, **arguments: Any) -> None:
    configuration = self.configurations[0]
    compiled = self.kernel.warmup(**arguments, **configuration.kwargs, num_warps=configuration.num_warps, grid=(1,))
    print(self.kernel.__name__, len(compiled.asm["cubin"]))


def main() -> None:
    assert isinstance(products.packed.multiply, triton.JITFunction), "TRITON_INTERPRET is set"
    driver.set_active(NoGPU())
    TunedKernel.launch = compile_only  # type: ignore[method-assign]
    for form, tokens, bits in CASES:
        layer = random_layer(24, 77, 20, torch.bfloat16, bits=bits)
        products.KERNELS[operation_of(form)](torch.randn(tokens, 77).bfloat16(), *layer.arguments(form))


if __name__ == "__main__":
    main()
