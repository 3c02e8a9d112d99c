"""The operations of `runtime.ops`, computed by Triton.

Each function takes its operation's arguments. It returns None where it does not apply, and plain torch computes then.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
import triton
from torch import Tensor

from ...runtime.plain_ops import as_matrix, row_tiles
from ..results import empty_result
from . import factors, packed
from .tuning import TunedKernel

FEW_TOKENS = 16
"""Largest number of tokens for which a matrix is multiplied from its packed form. For more, its rows are unpacked."""
VECTOR_TOKENS = 2
"""Largest number of tokens whose product is summed entry by entry. More go to the tensor cores, 16 at a time."""
FACTOR_TOKENS = 4
"""Largest number of tokens that low-rank factors are multiplied by in a kernel. More are left to torch."""

DTYPES = (torch.bfloat16, torch.float16, torch.float32)


def _configurations(*sizes: tuple[int, int, int], second: str, **further: Any) -> list[triton.Config]:
    """Return the configurations of a kernel, one for each of `sizes`.

    Args:
        sizes: rows of a program, its size in columns or spans, and its warps.
        second: name of the kernel's argument for the size in columns or spans.
        further: arguments of the kernel that all configurations share.
    """
    configurations = []
    for rows, width, warps in sizes:
        arguments = {"BLOCK_ROWS": rows, second: width, **further}
        configurations.append(triton.Config(arguments, num_warps=warps))
    return configurations


_COMPILED = isinstance(packed.multiply, triton.JITFunction)
"""False in Triton's interpreter."""
_FORM = ("rows", "columns", "stride", "HAS_VALUES", "HAS_MASK", "BITS", "GROUP", "BINARY_RANK")
"""Arguments that make a shape of packed matrices, for which the fastest configuration is measured."""
# Sizes are rows, spans (or columns) and warps of a program. The first of each list is what the interpreter runs.
_VECTOR_SIZES = ((4, 1, 1), (2, 1, 1), (4, 2, 2), (2, 2, 2), (4, 4, 4), (2, 4, 4))  # a warp for each span
_VECTORS = [
    *_configurations(*_VECTOR_SIZES, second="SPANS", FETCHED=True),
    *_configurations((4, 1, 1), (4, 4, 4), second="SPANS", FETCHED=False),
]
_multiply_vectors = TunedKernel(packed.multiply, _VECTORS, (*_FORM, "TOKENS"))
# Tensor cores take at least 16 rows, and a tile of one span. Tokens are always padded to 16, so that they make no
# shape.
_MATRICES = _configurations((16, 1, 4), (32, 1, 8), second="SPANS", FETCHED=True)
_multiply_matrices = TunedKernel(packed.multiply, _MATRICES, _FORM)
_UNPACKINGS = _configurations((4, 1, 1), (2, 1, 1), (4, 2, 2), (4, 4, 4), second="SPANS")
# Without the number of rows: tiles of all sizes take the same configuration.
_unpack = TunedKernel(packed.unpack, _UNPACKINGS, _FORM[1:])
_FACTOR_SIZES = ((4, 256, 1), (8, 256, 1), (4, 512, 2), (4, 1024, 4), (2, 1024, 4), (1, 1024, 4), (2, 2048, 8))
_FACTOR_FORM = ("rows", "columns", "PIVOTED", "TOKENS")
_multiply_factor = TunedKernel(factors.multiply, _configurations(*_FACTOR_SIZES, second="BLOCK_COLUMNS"), _FACTOR_FORM)


@dataclass(frozen=True)
class Parts:
    """The parts that a matrix is the sum of, as `kernels.triton.packed` describes them."""

    values: Tensor | None = None
    code_scale: Tensor | None = None
    mask: Tensor | None = None
    signs: Tensor | None = None
    scale_in: Tensor | None = None
    scale_out: Tensor | None = None
    bits: int = 0
    group: int = 1

    @property
    def packed(self) -> Tensor:
        """A tensor with as many rows as the matrix: the sign bits, or the values where there are none."""
        if self.signs is not None:
            return self.signs
        assert self.values is not None
        return self.values

    def tensors(self) -> dict[str, Tensor | None]:
        """Return the tensors by the names of the kernels' arguments."""
        return {
            "values": self.values,
            "code_scale": self.code_scale,
            "mask": self.mask,
            "signs": self.signs,
            "scale_in": self.scale_in,
            "scale_out": self.scale_out,
        }

    def arguments(self) -> dict[str, Any]:
        """Return the arguments that all kernels of packed matrices share."""
        # Eight codes make whole words only where their bits are a multiple of 4. With a bitmap, codes are read one by
        # one.
        words_of_codes = self.mask is None and self.bits % 4 == 0
        return {
            **self.tensors(),
            "values": _as_words(self.values) if words_of_codes else self.values,
            "mask": _as_words(self.mask),
            "signs": _as_words(self.signs),
            "COMPILED": _COMPILED,
            "stride": 0 if self.values is None else self.values.shape[1],
            "groups": 0 if self.code_scale is None else self.code_scale.shape[1],
            "HAS_VALUES": self.values is not None,
            "HAS_MASK": self.mask is not None,
            "BITS": self.bits,
            "GROUP": self.group,
            "BINARY_RANK": 0 if self.scale_in is None else self.scale_in.shape[0],
        }


def bitmask_linear(x: Tensor, weight: Tensor, weight_mask: Tensor) -> Tensor | None:
    return _linear(x, Parts(weight, mask=weight_mask))


def binary_linear(x: Tensor, sign_bits: Tensor, scale_in: Tensor, scale_out: Tensor) -> Tensor | None:
    return _linear(x, Parts(signs=sign_bits, scale_in=scale_in, scale_out=scale_out))


def bitmask_binary_linear(
    x: Tensor, weight: Tensor, weight_mask: Tensor, sign_bits: Tensor, scale_in: Tensor, scale_out: Tensor
) -> Tensor | None:
    return _linear(x, Parts(weight, None, weight_mask, sign_bits, scale_in, scale_out))


def quantized_linear(
    x: Tensor, codes: Tensor, scale: Tensor, mask: Tensor | None, bits: int, group: int, kept: int
) -> Tensor | None:
    return _linear(x, Parts(codes, scale, mask, bits=bits, group=group))


def lowrank_linear(x: Tensor, lowrank_a: Tensor, lowrank_b: Tensor) -> Tensor | None:
    """Return B (A x), with A x kept in float32, or None for more than `FACTOR_TOKENS`, which are left to torch."""
    return _lowrank(x, lowrank_a, lowrank_b, None, lowrank_b.shape[0])


def pivoted_linear(
    x: Tensor, lowrank_a: Tensor, lowrank_b: Tensor, lowrank_pivots: Tensor, rows: int
) -> Tensor | None:
    """Return P [I, B'ᵀ]ᵀ (A' x), with A' x kept in float32, or None for more than `FACTOR_TOKENS`."""
    return _lowrank(x, lowrank_a, lowrank_b, lowrank_pivots, rows)


def bitmask_input_grad(grad: Tensor, weight: Tensor, weight_mask: Tensor, columns: int) -> Tensor | None:
    return _input_grad(grad, columns, Parts(weight, mask=weight_mask))


def binary_input_grad(grad: Tensor, sign_bits: Tensor, scale_in: Tensor, scale_out: Tensor) -> Tensor | None:
    return _input_grad(grad, scale_in.shape[1], Parts(signs=sign_bits, scale_in=scale_in, scale_out=scale_out))


def bitmask_binary_input_grad(
    grad: Tensor, weight: Tensor, weight_mask: Tensor, sign_bits: Tensor, scale_in: Tensor, scale_out: Tensor
) -> Tensor | None:
    return _input_grad(grad, scale_in.shape[1], Parts(weight, None, weight_mask, sign_bits, scale_in, scale_out))


def quantized_input_grad(
    grad: Tensor, codes: Tensor, scale: Tensor, mask: Tensor | None, bits: int, group: int, kept: int, columns: int
) -> Tensor | None:
    return _input_grad(grad, columns, Parts(codes, scale, mask, bits=bits, group=group))


_OPERATIONS: tuple[Callable[..., Tensor | None], ...] = (
    bitmask_linear,
    binary_linear,
    bitmask_binary_linear,
    quantized_linear,
    lowrank_linear,
    pivoted_linear,
    bitmask_input_grad,
    binary_input_grad,
    bitmask_binary_input_grad,
    quantized_input_grad,
)
KERNELS = {kernel.__name__: kernel for kernel in _OPERATIONS}
"""The kernel of each operation that this back end offers."""


def _linear(x: Tensor, parts: Parts) -> Tensor | None:
    """Return the product of the parts and x: few tokens from the packed form, many by unpacked rows."""
    rows = parts.packed.shape[0]
    if not rows or not _readable(x, *parts.tensors().values()):
        return None
    inputs = as_matrix(x).contiguous()
    y, y_matrix = empty_result(x, rows)
    if inputs.shape[0] <= FEW_TOKENS:
        _multiply(inputs, y_matrix, parts)
    else:
        for covered, tile in _tiles(inputs, x.shape[-1], parts):
            torch.mm(inputs, tile.T, out=y_matrix[:, covered])  # straight into its columns, without a copy
    return y


def _multiply(x: Tensor, y: Tensor, parts: Parts) -> None:
    """Write the product with x (tokens, columns) to y (tokens, rows), for few tokens."""
    tokens, rows = y.shape
    size = {"tokens": tokens, "rows": rows, "columns": x.shape[1]}
    if tokens <= VECTOR_TOKENS:
        kernel = _multiply_vectors
        form = {"TOKENS": triton.next_power_of_2(tokens), "TENSOR_CORES": False}
    else:
        kernel = _multiply_matrices
        form = {"TOKENS": FEW_TOKENS, "TENSOR_CORES": True}
    kernel.launch(x.device, _programs(rows), x=x, y=y, **size, **form, **parts.arguments())


def _input_grad(grad: Tensor, columns: int, parts: Parts) -> Tensor | None:
    """Return Mᵀ g for the matrix M (m, n) of the parts and g (..., m).

    It is computed tile by tile. The tiles' products are added in float32.
    """
    if not columns or not _readable(grad, *parts.tensors().values()):
        return None
    gradients = as_matrix(grad)
    total, total_matrix = empty_result(grad, columns, torch.float32)
    total_matrix.zero_()
    for covered, tile in _tiles(gradients, columns, parts):
        total_matrix += gradients[:, covered] @ tile
    return total.to(grad.dtype)


def _tiles(x: Tensor, columns: int, parts: Parts) -> Iterator[tuple[slice, Tensor]]:
    """Yield the tiles of the unpacked matrix, in the dtype of x, each with the rows that it covers.

    All tiles use the same memory: one is valid until the next is asked for.
    """
    tiles = list(row_tiles(parts.packed, x.new_empty(0, columns)))
    memory = x.new_empty(tiles[0].stop, columns)
    for rows in tiles:
        count = rows.stop - rows.start
        size = {"first_row": rows.start, "rows": rows.stop, "columns": columns}
        _unpack.launch(x.device, _programs(count), dense=memory, **size, **parts.arguments())
        yield rows, memory[:count]


def _lowrank(x: Tensor, a: Tensor, b: Tensor, pivots: Tensor | None, rows: int) -> Tensor | None:
    """Return B (A x) for two factors. With `pivots`, B has only those rows of the product that are not A x itself."""
    inputs = as_matrix(x).contiguous()
    rank = a.shape[0]
    tokens = inputs.shape[0]
    if tokens > FACTOR_TOKENS or not rank or not rows or not _readable(x, a, b, pivots):
        return None
    z = inputs.new_empty(tokens, rank, dtype=torch.float32)  # A x is not rounded before B multiplies it
    y, y_matrix = empty_result(x, rows)
    _multiply_by_factor(inputs, z, a, None)
    _multiply_by_factor(z, y_matrix, b, pivots)
    return y


def _multiply_by_factor(x: Tensor, y: Tensor, weight: Tensor, pivots: Tensor | None) -> None:
    tokens, rows = y.shape
    _multiply_factor.launch(
        x.device,
        _programs(rows),
        x=x,
        y=y,
        weight=weight,
        pivots=pivots,
        tokens=tokens,
        rows=rows,
        columns=x.shape[1],
        PIVOTED=pivots is not None,
        BITMAP_BYTES=0 if pivots is None else triton.next_power_of_2(pivots.shape[0]),
        TOKENS=triton.next_power_of_2(tokens),
    )


def _as_words(packed: Tensor | None) -> Tensor | None:
    """Return rows of bytes as rows of int32 where their length and their place in memory allow it."""
    if packed is None or packed.dtype != torch.uint8 or packed.shape[1] % 4 or packed.data_ptr() % 4:
        return packed
    return packed.flatten(1).view(torch.int32)


def _programs(rows: int) -> Callable[[dict[str, Any]], tuple[int]]:
    """Return the grid of a launch: Triton calls it with a configuration's arguments, for the number of programs."""

    def grid(arguments: dict[str, Any]) -> tuple[int]:
        return (triton.cdiv(rows, arguments["BLOCK_ROWS"]),)

    return grid


def _readable(x: Tensor, *parts: Tensor | None) -> bool:
    """Return whether all tensors have a dtype and a layout in memory that the kernels read, and x is not empty."""
    for part in parts:
        if part is None:
            continue
        if not part.is_contiguous() or part.device != x.device or part.dtype not in (*DTYPES, torch.uint8):
            return False
    return x.dtype in DTYPES and x.numel() > 0
