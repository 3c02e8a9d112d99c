"""Converts bitmaps, sign bits and kept values to dense matrices and back: the storage formats of a checkpoint.

Bit j % 8 of byte j // 8 in a row stands for column j (little-endian bit order). Padding bits are zero.
"""

import torch
from torch import Tensor

from .errors import CheckpointError
from .tracing import must_decompose


def packed_width(columns: int) -> int:
    """Return the number of bytes that one bit per column takes in a row."""
    return (columns + 7) // 8


def pack_bits(bits: Tensor) -> Tensor:
    """Pack booleans (..., n) into uint8 (..., ⌈n/8⌉)."""
    columns = bits.shape[-1]
    padded = torch.nn.functional.pad(bits.to(torch.uint8), (0, packed_width(columns) * 8 - columns))
    grouped = padded.unflatten(-1, (packed_width(columns), 8))
    return (grouped * _bit_values(bits.device)).sum(dim=-1, dtype=torch.uint8)


def unpack_bits(packed: Tensor, columns: int) -> Tensor:
    """Unpack uint8 (..., ⌈n/8⌉) into booleans (..., n)."""
    bits = packed.unsqueeze(-1) & _bit_values(packed.device)
    return bits.flatten(-2)[..., :columns].bool()


def pack_values(dense: Tensor, mask: Tensor) -> Tensor:
    """Return the values (m, k) of a dense matrix (m, n) where `mask` (m, n) is set, in column order.

    Raises:
        CheckpointError: if the rows do not all keep the same number of values.
    """
    kept = mask.sum(dim=1)
    if kept.numel() and not bool((kept == kept[0]).all()):
        raise CheckpointError(
            f"a bitmask keeps between {int(kept.min())} and {int(kept.max())} values per row, "
            "expected the same number in every row"
        )
    return dense[mask].view(dense.shape[0], int(kept[0]) if kept.numel() else 0)


def unpack_values(values: Tensor, mask: Tensor) -> Tensor:
    """Return the dense matrix (m, n) that has `values` (m, k) where `mask` (m, n) is set and zeros elsewhere."""
    if must_decompose():
        return _gather_values(values, mask)
    # `masked_scatter` fills the places of a mask in row-major order, the order in which `pack_values` reads them.
    return torch.zeros(mask.shape, dtype=values.dtype, device=values.device).masked_scatter(mask, values)


def _gather_values(values: Tensor, mask: Tensor) -> Tensor:
    """Return the same as `unpack_values` by steps that ONNX Runtime computes once, when it opens a file.

    It would compute what `masked_scatter` becomes in ONNX at every call, in 40 times the time of the product itself.
    """
    rows, kept = values.shape
    # Number the kept values from one, row by row. Zero is the number of a zero that is put before them.
    first = torch.arange(rows, dtype=torch.int32, device=mask.device) * kept
    numbers = (mask.cumsum(dim=1, dtype=torch.int32) + first.unsqueeze(1)).where(mask, 0).flatten().long()
    return torch.nn.functional.pad(values.flatten(), (1, 0)).index_select(0, numbers).view(mask.shape)


def signs_to_values(sign_bits: Tensor, columns: int, dtype: torch.dtype) -> Tensor:
    """Return ±1 (m, n) from packed sign bits, uint8 (m, ⌈n/8⌉). A set bit is +1."""
    bits = unpack_bits(sign_bits, columns).to(dtype)
    if must_decompose():  # the graphs of torch 2.6 refuse to change the result of `to` in place
        return bits * 2 - 1
    return bits.mul_(2).sub_(1)


def _bit_values(device: torch.device) -> Tensor:
    """Return 1 to 128, the values of the bits in a byte."""
    # A power and no shift, which ONNX has for signed integers only as torch translates it.
    return (2 ** torch.arange(8, device=device)).to(torch.uint8)
