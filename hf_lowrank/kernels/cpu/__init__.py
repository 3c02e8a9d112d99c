"""CPU back end in C++: fused products for a few tokens, unpacked tiles for many."""

import ctypes

import torch
from torch import Tensor
from torch.nn import functional as F

from ...runtime.ops import register_kernel
from . import native

FEW_TOKENS = 16
"""Up to this many tokens the layer is multiplied from its packed form."""
TILE_BYTES = 1 << 22
"""Size of the dense tile that many tokens are multiplied by."""
SERIAL_BYTES = 1 << 17
"""Below this many bytes waking other threads costs more than it saves."""

_STORED = {*native.DTYPES, torch.uint8}


def register() -> None:
    """Offer the kernels for the "cpu" device, if the library was built."""
    if native.library() is None:
        return
    for operation, kernel in (
        ("bitmask_linear", bitmask_linear),
        ("binary_linear", binary_linear),
        ("bitmask_binary_linear", bitmask_binary_linear),
        ("lowrank_linear", lowrank_linear),
    ):
        register_kernel(operation, "cpu", "cpp", kernel)


def describe(operation: str) -> tuple[str, str]:
    """Name of the back end of an operation, and what it does here or why it cannot."""
    if native.library() is None:
        return "torch", "the C++ library was not built; install a C++ compiler and reinstall hf_lowrank"
    many = "torch" if operation == "lowrank_linear" else "tiles unpacked in C++ and multiplied by torch"
    name = native.INSTRUCTION_SETS[native.instruction_set()]
    return f"cpp ({name})", f"up to {FEW_TOKENS} tokens from the packed form, more: {many}; bfloat16, float16, float32"


def bitmask_linear(x: Tensor, weight: Tensor, weight_mask: Tensor) -> Tensor | None:
    multiply = _multiply if _tokens(x) <= FEW_TOKENS else _multiply_tiles
    return multiply(x, weight_mask.shape[0], weight, weight_mask)


def binary_linear(x: Tensor, sign_bits: Tensor, scale_in: Tensor, scale_out: Tensor) -> Tensor | None:
    multiply = _multiply if _tokens(x) <= FEW_TOKENS else _multiply_tiles
    return multiply(x, sign_bits.shape[0], None, None, sign_bits, scale_in, scale_out)


def bitmask_binary_linear(
    x: Tensor, weight: Tensor, weight_mask: Tensor, sign_bits: Tensor, scale_in: Tensor, scale_out: Tensor
) -> Tensor | None:
    multiply = _multiply if _tokens(x) <= FEW_TOKENS else _multiply_tiles
    return multiply(x, sign_bits.shape[0], weight, weight_mask, sign_bits, scale_in, scale_out)


def lowrank_linear(x: Tensor, lowrank_a: Tensor, lowrank_b: Tensor) -> Tensor | None:
    """B (A x), A x kept in float32; None for many tokens, whose two products are torch's own."""
    return _multiply(x, lowrank_b.shape[0], lowrank_a=lowrank_a, lowrank_b=lowrank_b) if _tokens(x) <= FEW_TOKENS else None


def dense_linear(x: Tensor, weight: Tensor) -> Tensor | None:
    """F.linear(x, weight) for few tokens by the same loops: the yardstick of the benchmark."""
    return _multiply(x, weight.shape[0], lowrank_b=weight) if _tokens(x) <= FEW_TOKENS else None


def _multiply(x: Tensor, rows: int, *parts: Tensor | None, **lowrank: Tensor) -> Tensor | None:
    """The product of whichever parts are given, or None where it is not for these loops."""
    y = x.new_empty(*x.shape[:-1], rows)
    x = x.contiguous()
    product = _product(x, y, x.dtype, rows, *parts, **lowrank)
    if product is None or native.loaded().hf_lowrank_multiply(ctypes.byref(product)):
        return None
    return y


def _multiply_tiles(x: Tensor, rows: int, *parts: Tensor | None) -> Tensor | None:
    """The same for many tokens: tiles of rows are unpacked, and multiplied by torch while they are in the cache."""
    columns, dtype = x.shape[-1], _tile_dtype(x)
    tile = torch.empty(max(TILE_BYTES // (columns * dtype.itemsize), 1), columns, dtype=dtype)
    product = _product(x, tile, dtype, rows, *parts)
    if product is None:
        return None
    inputs = x.reshape(-1, columns).to(dtype)
    y = x.new_empty(inputs.shape[0], rows)
    for first in range(0, rows, len(tile)):
        count = min(len(tile), rows - first)
        native.loaded().hf_lowrank_unpack(ctypes.byref(product), ctypes.c_int64(first), ctypes.c_int64(count))
        y[:, first : first + count] = F.linear(inputs, tile[:count])
    return y.view(*x.shape[:-1], rows)


def _tile_dtype(x: Tensor) -> torch.dtype:
    """bfloat16 where the processor multiplies it faster than float32."""
    fast = x.dtype == torch.bfloat16 and native.best_instruction_set() == "avx512"
    return torch.bfloat16 if fast else torch.promote_types(x.dtype, torch.float32)


def _product(
    x: Tensor,
    y: Tensor,
    dtype: torch.dtype,
    rows: int,
    weight: Tensor | None = None,
    weight_mask: Tensor | None = None,
    sign_bits: Tensor | None = None,
    scale_in: Tensor | None = None,
    scale_out: Tensor | None = None,
    lowrank_a: Tensor | None = None,
    lowrank_b: Tensor | None = None,
) -> native.Product | None:
    """The arguments of the C interface; None if a dtype or a layout in memory is not for it, or there is nothing to compute."""
    parts = [part for part in (weight, weight_mask, sign_bits, scale_in, scale_out, lowrank_a, lowrank_b) if part is not None]
    if dtype not in native.DTYPES or not x.numel() or not rows:
        return None
    if not all(part.is_contiguous() and part.dtype in _STORED for part in parts):
        return None
    return native.Product(
        _tokens(x),
        x.shape[-1],
        rows,
        x.data_ptr(),
        y.data_ptr(),
        _pointer(weight),
        _pointer(weight_mask),
        0 if weight is None else weight.shape[1],
        _pointer(sign_bits),
        _pointer(scale_in),
        _pointer(scale_out),
        0 if scale_in is None else scale_in.shape[0],
        _pointer(lowrank_a),
        _pointer(lowrank_b),
        0 if lowrank_b is None else lowrank_b.shape[1],
        None,
        native.DTYPES[dtype],
        _dtype(weight),
        _dtype(scale_in),
        _dtype(lowrank_b),
        0,
        1 if sum(part.nbytes for part in parts) < SERIAL_BYTES else torch.get_num_threads(),
        native.instruction_set(),
    )


def _tokens(x: Tensor) -> int:
    return x.numel() // max(x.shape[-1], 1)


def _pointer(tensor: Tensor | None) -> int | None:
    return None if tensor is None else tensor.data_ptr()


def _dtype(tensor: Tensor | None) -> int:
    return 0 if tensor is None else native.DTYPES[tensor.dtype]
