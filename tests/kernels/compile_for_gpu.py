"""Compiles the Triton kernels for an H100 (or the capability named) without a GPU, in a process of its own.

The interpreter accepts programs that the compiler refuses, and therefore both are tested.
"""

import sys
from typing import Any

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.runtime import driver

from hf_lowrank.kernels.triton import products
from hf_lowrank.kernels.triton.tuning import TunedKernel
from tests.kernels.layers import operation_of, random_layer

CASES = (
    ("bitmask_binary_linear", 1, 77, 4, torch.bfloat16),
    ("bitmask_binary_linear", 8, 96, 4, torch.bfloat16),
    ("bitmask_linear", 2, 77, 4, torch.float16),
    ("quantized_linear", 1, 96, 4, torch.bfloat16),
    ("quantized_linear, bitmask", 20, 77, 5, torch.float32),
    ("pivoted_linear", 1, 77, 4, torch.bfloat16),
)
"""Form, tokens, columns, bits of codes and dtype of each case. With 96 columns a bitmap's rows are whole words."""


class NoGPU:
    """A driver without a GPU, which answers what Triton's compiler asks of a driver."""

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", int(sys.argv[1]) if sys.argv[1:] else 90, 32)

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
    for form, tokens, columns, bits, dtype in CASES:
        layer = random_layer(24, columns, 20, dtype, bits=bits)
        products.KERNELS[operation_of(form)](torch.randn(tokens, columns).to(dtype), *layer.arguments(form))


if __name__ == "__main__":
    main()
