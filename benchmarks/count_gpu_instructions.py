"""Counts the instructions of the compiled GPU kernels. It needs no GPU.

`python benchmarks/count_gpu_instructions.py [--tokens 1] [--capability 90]`

Each kernel is compiled for the shape of a real layer (4096 × 4096) in every configuration that the tuner would try,
and disassembled by the `nvdisasm` that comes with Triton. The program prints the instructions that a warp executes per
entry of the matrix and lane, of which a scheduler issues one per cycle at best. Short loops before the first product,
which prefetch rows, are counted once. Kinds of instructions that take longer are listed for the innermost loop.
"""

import argparse
import os
import re
import subprocess
import tempfile
from collections import Counter
from pathlib import Path
from typing import Any

os.environ["TRITON_INTERPRET"] = "0"

import torch
import triton
from torch import Tensor
from triton.backends.compiler import GPUTarget
from triton.runtime import driver

from hf_lowrank.kernels.triton import products
from hf_lowrank.kernels.triton.tuning import TunedKernel

ROWS = COLUMNS = 4096
RANK = 1433
"""Rank of factors that store 0.7 of the matrix."""
QUARTERS = 4
"""Number of passes of the loop within a span, where the compiler leaves it a loop."""
SLOW = ("LDG", "LDS", "LDSM", "STS", "SHFL", "POPC", "I2F", "BAR")
DISASSEMBLER = Path(triton.__file__).parent / "backends/nvidia/bin/nvdisasm"


class NoGPU:
    """A driver without a GPU, which answers what Triton's compiler asks of a driver."""

    def __init__(self, capability: int) -> None:
        self.capability = capability

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", self.capability, 32)

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int | None = None) -> int:
        return 0


def disassembled(cubin: bytes) -> tuple[list[str], list[tuple[int, int]]]:
    """Return the instructions, without predicates, and the indices of the first and last instruction of every loop."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        text = subprocess.run([DISASSEMBLER, "-c", file.name], capture_output=True, text=True, check=True).stdout
    instructions: list[str] = []
    labels: dict[str, int] = {}
    for line in text.splitlines():
        if label := re.match(r"(\.L_x_\d+):", line):
            labels[label[1]] = len(instructions)
        elif instruction := re.search(r"/\*[0-9a-f]+\*/\s+(?:@\S+\s+)?(.*?) ?;", line):
            instructions.append(instruction[1])
    loops = []
    for index, instruction in enumerate(instructions):
        jump = re.search(r"^BRA.*`\((\.L_x_\d+)\)", instruction)
        # A program ends with a jump to itself, which is no loop.
        if jump and labels[jump[1]] < index - 2:
            loops.append((labels[jump[1]], index))
    return instructions, loops


def count_only(self: TunedKernel, device: torch.device, grid: Any, **arguments: Any) -> None:
    """Compile the kernel in each configuration and print the counts, in place of `TunedKernel.launch`."""
    for configuration in self.configurations:
        sizes = configuration.kwargs
        compiled = self.kernel.warmup(**arguments, **sizes, num_warps=configuration.num_warps, grid=(1,))
        instructions, loops = disassembled(compiled.asm["cubin"])
        outer = max(loops, key=length)
        within = innermost(loops, outer)
        width = sizes["BLOCK_COLUMNS"] if "BLOCK_COLUMNS" in sizes else 1024 * sizes["SPANS"]
        passes = -(-arguments["columns"] // width)
        # The code holds each loop once. A pass of the outer one executes the inner one for every quarter.
        instructions_per_pass = length(outer)
        if within:
            instructions_per_pass += (QUARTERS - 1) * length(within)
        executed = len(instructions) - length(outer) + passes * instructions_per_pass
        entries = sizes["BLOCK_ROWS"] * arguments["columns"] / 32 / configuration.num_warps
        loop = within or outer
        print(
            f"  {self.kernel.__name__} {sizes}, {configuration.num_warps} warps: {executed / entries:.1f}; "
            f"loop of {length(loop)} ({slow_instructions(instructions, loop)})"
        )


def innermost(loops: list[tuple[int, int]], outer: tuple[int, int]) -> tuple[int, int] | None:
    """Return the longest loop within another, or None if there is none."""
    within = [loop for loop in loops if outer[0] < loop[0] and loop[1] < outer[1]]
    return max(within, key=length, default=None)


def slow_instructions(instructions: list[str], loop: tuple[int, int]) -> str:
    """Return how many instructions of each slow kind a loop has, as text."""
    first, last = loop
    kinds = Counter(re.split(r"[. ]", instruction)[0] for instruction in instructions[first : last + 1])
    return ", ".join(f"{kind} {kinds[kind]}" for kind in SLOW if kinds[kind])


def length(loop: tuple[int, int]) -> int:
    """Return the number of instructions of a loop."""
    return loop[1] - loop[0] + 1


def layers() -> dict[str, tuple[str, tuple[Any, ...]]]:
    """Return an operation and its tensors, all zeros, for each layer by what it stores."""

    def values(*shape: int) -> Tensor:
        return torch.zeros(shape, dtype=torch.bfloat16)

    def packed(*shape: int) -> Tensor:
        return torch.zeros(shape, dtype=torch.uint8)

    bitmap = packed(ROWS, COLUMNS // 8)
    binary = (packed(ROWS, COLUMNS // 8), values(1, COLUMNS), values(ROWS, 1))
    return {
        "bitmask 50 %": ("bitmask_linear", (values(ROWS, COLUMNS // 2), bitmap)),
        "SLaB 50 %": ("bitmask_binary_linear", (values(ROWS, 1788), bitmap, *binary)),
        "SLaB 80 %": ("bitmask_binary_linear", (values(ROWS, 559), bitmap, *binary)),
        "int4": (
            "quantized_linear",
            (packed(ROWS, COLUMNS // 2, 1), values(ROWS, COLUMNS // 64), None, 4, 64, COLUMNS),
        ),
        "int8": ("quantized_linear", (packed(ROWS, COLUMNS, 1), values(ROWS, COLUMNS // 64), None, 8, 64, COLUMNS)),
        "low rank 30 %": ("lowrank_linear", (values(RANK, COLUMNS), values(ROWS, RANK))),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        "--tokens", type=int, default=1, help="1 or 2: entry by entry; 3 to 16: tensor cores; more: unpacked"
    )
    parser.add_argument("--capability", type=int, default=90, help="compute capability of the GPU, without the point")
    arguments = parser.parse_args()
    driver.set_active(NoGPU(arguments.capability))
    TunedKernel.launch = count_only  # type: ignore[method-assign]
    for name, (operation, tensors) in layers().items():
        print(f"{name}, {arguments.tokens} tokens, sm_{arguments.capability}, Triton {triton.__version__}")
        products.KERNELS[operation](torch.zeros(arguments.tokens, COLUMNS, dtype=torch.bfloat16), *tensors)


if __name__ == "__main__":
    main()
