"""The operations of `runtime.ops`, computed by the C++ library.

Each function takes its operation's arguments. It returns None where it does not apply, for example because of a dtype
or of a layout in memory, and plain torch computes then. For few tokens, where neither gradients nor a graph are
recorded, `runtime.ops` first asks the functions of direct.cpp. They give the same bits and spend less time on each
call.
"""

import ctypes
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from ..results import empty_result
from . import native

FEW_TOKENS = 16
"""Largest number of tokens for which a layer is multiplied from its packed form."""
FEW_TOKENS_BY_BFLOAT16 = 64
"""This limit is for kept values, and codes in groups of `UNIT`, where the processor multiplies bfloat16 itself."""
UNIT = 32
"""Codes whose groups are multiples of this are multiplied in units of this many."""
TILE_BYTES = 1 << 23
"""Size of the dense tile of rows that many tokens are multiplied by. It must stay in the processor's cache."""
SERIAL_BYTES = 1 << 17
"""Layers of fewer bytes are computed by one thread: waking others would cost more than it saves."""

_BYTES = {"mask", "signs", "pivots", "codes"}
"""Parts that are bitmaps and codes, uint8. The others have one of the floating-point dtypes that the loops read."""
_DTYPE_FIELDS = {
    "values": "values_dtype",
    "scale_in": "scale_dtype",
    "lowrank_b": "lowrank_dtype",
    "code_scale": "code_scale_dtype",
}
"""Fields of `native.Product` for the dtypes of parts. Parts that have the same dtype, such as A and B, share one."""


def bitmask_linear(x: Tensor, weight: Tensor, weight_mask: Tensor) -> Tensor | None:
    return _linear(x, weight_mask.shape[0], values=weight, mask=weight_mask, kept=weight.shape[1])


def binary_linear(x: Tensor, sign_bits: Tensor, scale_in: Tensor, scale_out: Tensor) -> Tensor | None:
    return _linear(x, sign_bits.shape[0], signs=sign_bits, scale_in=scale_in, scale_out=scale_out)


def bitmask_binary_linear(
    x: Tensor, weight: Tensor, weight_mask: Tensor, sign_bits: Tensor, scale_in: Tensor, scale_out: Tensor
) -> Tensor | None:
    binary = {"signs": sign_bits, "scale_in": scale_in, "scale_out": scale_out}
    return _linear(x, sign_bits.shape[0], values=weight, mask=weight_mask, kept=weight.shape[1], **binary)


def quantized_linear(
    x: Tensor, codes: Tensor, scale: Tensor, mask: Tensor | None, bits: int, group: int, kept: int
) -> Tensor | None:
    return _linear(x, codes.shape[0], codes=codes, code_scale=scale, mask=mask, code_bits=bits, group=group, kept=kept)


def lowrank_linear(x: Tensor, lowrank_a: Tensor, lowrank_b: Tensor) -> Tensor | None:
    """Return B (A x), or None for many tokens, whose two products are left to torch.

    A x keeps 16 significant bits, in float32 those of float32.
    """
    return _multiply_few(x, lowrank_b.shape[0], lowrank_a=lowrank_a, lowrank_b=lowrank_b)


def pivoted_linear(
    x: Tensor, lowrank_a: Tensor, lowrank_b: Tensor, lowrank_pivots: Tensor, rows: int
) -> Tensor | None:
    """Return P [I, B'ᵀ]ᵀ (A' x), with A' x as precise as in `lowrank_linear`, or None for many tokens."""
    return _multiply_few(
        x, lowrank_b.shape[0], lowrank_a=lowrank_a, lowrank_b=lowrank_b, pivots=lowrank_pivots, outputs=rows
    )


def dense_linear(x: Tensor, weight: Tensor) -> Tensor | None:
    """Return F.linear(x, weight) for few tokens, by the same loops. Benchmarks compare compressed layers with it."""
    return _multiply_few(x, weight.shape[0], lowrank_b=weight)


def bitmask_input_grad(grad: Tensor, weight: Tensor, weight_mask: Tensor, columns: int) -> Tensor | None:
    return _input_grad(grad, columns, values=weight, mask=weight_mask, kept=weight.shape[1])


def binary_input_grad(grad: Tensor, sign_bits: Tensor, scale_in: Tensor, scale_out: Tensor) -> Tensor | None:
    return _input_grad(grad, scale_in.shape[1], signs=sign_bits, scale_in=scale_in, scale_out=scale_out)


def bitmask_binary_input_grad(
    grad: Tensor, weight: Tensor, weight_mask: Tensor, sign_bits: Tensor, scale_in: Tensor, scale_out: Tensor
) -> Tensor | None:
    binary = {"signs": sign_bits, "scale_in": scale_in, "scale_out": scale_out}
    return _input_grad(grad, scale_in.shape[1], values=weight, mask=weight_mask, kept=weight.shape[1], **binary)


def quantized_input_grad(
    grad: Tensor, codes: Tensor, scale: Tensor, mask: Tensor | None, bits: int, group: int, kept: int, columns: int
) -> Tensor | None:
    return _input_grad(grad, columns, codes=codes, code_scale=scale, mask=mask, code_bits=bits, group=group, kept=kept)


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


def _linear(x: Tensor, rows: int, **parts: Any) -> Tensor | None:
    """Return the product of the parts and x: few tokens from the packed form, many by dense tiles."""
    if _tokens(x) <= _few_tokens(x, parts):
        return _multiply(x, rows, **parts)
    return _multiply_tiles(x, rows, **parts)


def _few_tokens(x: Tensor, parts: dict[str, Any]) -> int:
    """Return up to how many tokens the packed form is faster than tiles."""
    # AVX-512 has an instruction that multiplies bfloat16.
    stored = "values" in parts or parts.get("group", 1) % UNIT == 0
    if stored and x.dtype == torch.bfloat16 and native.instruction_set_in_use() == "avx512":
        return FEW_TOKENS_BY_BFLOAT16
    return FEW_TOKENS


def _multiply_few(x: Tensor, rows: int, **parts: Any) -> Tensor | None:
    if _tokens(x) > FEW_TOKENS:
        return None
    return _multiply(x, rows, **parts)


def _multiply(x: Tensor, rows: int, outputs: int | None = None, **parts: Any) -> Tensor | None:
    """Return the product of x and the parts that are given, computed from their packed form.

    Args:
        rows: rows of the matrix that the parts store.
        outputs: rows of the product, where pivots give it more than `rows`.
    """
    y = x.new_empty(*x.shape[:-1], rows if outputs is None else outputs)
    x = x.contiguous()
    if not _is_aligned(x):
        return None
    product = _product(_tokens(x), x.shape[-1], rows, x.dtype, parts)
    if product is None:
        return None
    product.x = x.data_ptr()
    product.y = y.data_ptr()
    product.outputs = y.shape[-1]
    # The library declines values that are not finite, for example: zeros that are not stored make no NaN of an
    # infinity.
    declined = native.loaded().hf_lowrank_multiply(ctypes.byref(product))
    return None if declined else y


def _multiply_tiles(x: Tensor, rows: int, **parts: Any) -> Tensor | None:
    """Return the product for many tokens: torch multiplies tiles of unpacked rows while they are in the cache."""
    inputs = x.reshape(-1, x.shape[-1])
    tiles = _tiles(inputs, rows, x.shape[-1], parts)
    if tiles is None:
        return None
    y, y_matrix = empty_result(x, rows)
    for covered, tile in tiles:
        if tile.dtype == x.dtype:  # the product is written in its place, with no copy
            torch.mm(inputs, tile.T, out=y_matrix[:, covered])
        else:
            y_matrix[:, covered] = F.linear(inputs.to(tile.dtype), tile)
    return y


def _input_grad(grad: Tensor, columns: int, **parts: Any) -> Tensor | None:
    """Return Mᵀ g for the matrix M (m, n) of the parts and g (..., m).

    It is computed tile by tile. The tiles' products are added in float32 or better.
    """
    gradients = grad.reshape(-1, grad.shape[-1])
    tiles = _tiles(gradients, grad.shape[-1], columns, parts)
    if tiles is None:
        return None
    # Rounding the sum after every tile would lose what small gradients add.
    total, total_matrix = empty_result(grad, columns, torch.promote_types(grad.dtype, torch.float32))
    total_matrix.zero_()
    for covered, tile in tiles:
        total_matrix += gradients[:, covered].to(tile.dtype) @ tile
    return total.to(grad.dtype)


def _tiles(x: Tensor, rows: int, columns: int, parts: dict[str, Any]) -> Iterator[tuple[slice, Tensor]] | None:
    """Return an iterator over the tiles of the unpacked matrix, each with the rows that it covers.

    All tiles use the same memory: one is valid until the next is asked for.
    """
    dtype = _tile_dtype(x)
    product = _product(_tokens(x), columns, rows, dtype, parts)
    if product is None:
        return None
    return _unpacked(product, rows, columns, dtype)


def _unpacked(product: native.Product, rows: int, columns: int, dtype: torch.dtype) -> Iterator[tuple[slice, Tensor]]:
    """Yield the tiles of a product's matrix, all in the same memory, each with the rows that it covers."""
    tile = torch.empty(max(TILE_BYTES // (columns * dtype.itemsize), 1), columns, dtype=dtype, device="cpu")
    product.y = tile.data_ptr()
    unpack = partial(native.loaded().hf_lowrank_unpack, ctypes.byref(product))
    for first in range(0, rows, len(tile)):
        count = min(len(tile), rows - first)
        unpack(ctypes.c_int64(first), ctypes.c_int64(count))
        yield slice(first, first + count), tile[:count]


def _tile_dtype(x: Tensor) -> torch.dtype:
    """Return bfloat16 where the processor multiplies it faster than float32, otherwise at least float32."""
    if x.dtype == torch.bfloat16 and native.best_instruction_set() == "avx512":
        return torch.bfloat16
    return torch.promote_types(x.dtype, torch.float32)


def _product(tokens: int, columns: int, rows: int, dtype: torch.dtype, parts: dict[str, Any]) -> native.Product | None:
    """Return the arguments of the C interface, with x and y left out.

    It is None if a dtype or a layout in memory is not one that the loops read, or if there is nothing to compute.

    Args:
        dtype: dtype of x, and of the unpacked tiles.
        parts: tensors and numbers by their names in `Product`.
    """
    if dtype not in native.DTYPES or not tokens or not columns or not rows:
        return None
    product = native.Product(tokens=tokens, columns=columns, rows=rows, outputs=rows, x_dtype=native.DTYPES[dtype])
    stored_bytes = 0
    for name, part in parts.items():
        if isinstance(part, Tensor):
            readable = part.dtype == torch.uint8 if name in _BYTES else part.dtype in native.DTYPES
            if not readable or not part.is_contiguous() or not _is_aligned(part):
                return None
            stored_bytes += part.nbytes
            setattr(product, name, part.data_ptr())
            if name in _DTYPE_FIELDS:
                setattr(product, _DTYPE_FIELDS[name], native.DTYPES[part.dtype])
        elif part is not None:
            setattr(product, name, part)
    # The library reads sizes from the product only, and these are sizes of tensors.
    if product.scale_in:
        product.binary_rank = parts["scale_in"].shape[0]
    if product.lowrank_b:
        product.rank = parts["lowrank_b"].shape[1]
    product.threads = 1 if stored_bytes < SERIAL_BYTES else torch.get_num_threads()
    product.instruction_set = native.instruction_set()
    return product


def _is_aligned(tensor: Tensor) -> bool:
    """Return whether the values lie at a multiple of their size. In memory mapped from a file they need not."""
    return tensor.data_ptr() % tensor.itemsize == 0


def _tokens(x: Tensor) -> int:
    """Return the number of vectors in x (..., n)."""
    return x.numel() // max(x.shape[-1], 1)
