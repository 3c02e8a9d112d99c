"""What the GPU kernels' compiled code says, without a GPU: `python benchmarks/count_gpu_instructions.py [--tokens 1] [--capability 90]`.

Each kernel is compiled for the shapes of real layers (4096 × 4096) in every configuration that the tuner would try, and disassembled by
the `nvdisasm` that comes with Triton. Printed are the instructions that a warp executes per entry of the matrix and lane: a scheduler
issues one per cycle at best. Short loops before the first product, which ask for rows ahead, are counted once. Kinds of instructions
that take longer are listed for the innermost loop.
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
"""Of factors that store 0.7 of the matrix."""
QUARTERS = 4
"""Passes of the loop within a span, where the compiler leaves it a loop."""
SLOW = ("LDG", "LDS", "LDSM", "STS", "SHFL", "POPC", "I2F", "BAR")
DISASSEMBLER = Path(triton.__file__).parent / "backends/nvidia/bin/nvdisasm"


class NoGPU:
    """What the compiler asks of a driver."""

    def __init__(self, capability: int) -> None:
        self.capability = capability

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", self.capability, 32)

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int | None = None) -> int:
        return 0


def disassembled(cubin: bytes) -> tuple[list[str], list[tuple[int, int]]]:
    """The instructions, without predicates, and the first and last of every loop."""
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
    jumps = [
        (index, re.search(r"^BRA.*`\((\.L_x_\d+)\)", instruction)) for index, instruction in enumerate(instructions)
    ]
    loops = [
        (labels[jump[1]], index) for index, jump in jumps if jump and labels[jump[1]] < index - 2
    ]  # not the end's jump to itself
    return instructions, loops


def count_only(self: TunedKernel, device: torch.device, grid: Any, **arguments: Any) -> None:
    for configuration in self.configurations:
        sizes = configuration.kwargs
        compiled = self.kernel.warmup(**arguments, **sizes, num_warps=configuration.num_warps, grid=(1,))
        instructions, loops = disassembled(compiled.asm["cubin"])
        outer = max(loops, key=length)
        within = max((loop for loop in loops if outer[0] < loop[0] and loop[1] < outer[1]), key=length, default=None)
        width = sizes["BLOCK_COLUMNS"] if "BLOCK_COLUMNS" in sizes else 1024 * sizes["SPANS"]
        entries = sizes["BLOCK_ROWS"] * arguments["columns"] / 32 / configuration.num_warps
        body = length(outer) + ((QUARTERS - 1) * length(within) if within else 0)
        count = (len(instructions) - length(outer) + -(-arguments["columns"] // width) * body) / entries
        first, last = within or outer
        kinds = Counter(re.split(r"[. ]", instruction)[0] for instruction in instructions[first : last + 1])
        slow = ", ".join(f"{kind} {kinds[kind]}" for kind in SLOW if kinds[kind])
        print(
            f"  {self.kernel.__name__} {sizes}, {configuration.num_warps} warps: {count:.1f}; loop of {last - first + 1} ({slow})"
        )


def length(loop: tuple[int, int]) -> int:
    return loop[1] - loop[0] + 1


def layers() -> dict[str, tuple[str, tuple[Any, ...]]]:
    """Operation and tensors, all zeros, by what a layer stores."""

    def values(*shape: int) -> Tensor:
        return torch.zeros(shape, dtype=torch.bfloat16)

    def packed(*shape: int) -> Tensor:
        return torch.zeros(shape, dtype=torch.uint8)

    bitmap, binary = packed(ROWS, COLUMNS // 8), (packed(ROWS, COLUMNS // 8), values(1, COLUMNS), values(ROWS, 1))
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
