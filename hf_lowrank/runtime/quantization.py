"""Stores values as small integers with grouped scales: the form of the quantized parts of a layer.

The c values of a row are cut into groups of `group` consecutive ones, the last of which may be shorter. Each group has
a scale s. A code q of b bits stands for (q − (2ᵇ − 1)/2) · s: 2ᵇ evenly spaced levels, symmetric about zero, none of
which is zero. So all levels are used, and no zero point is stored. The codes of a row are a little-endian bit stream.
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from .tracing import must_decompose

BITS = (2, 3, 4, 5, 6, 7, 8)
SCALE_FACTORS = tuple(0.4 + 0.02 * step for step in range(36))
"""Scales that a search tries, relative to the one that just covers a group.

A smaller scale clips the tails of a group and makes the levels finer everywhere else.
"""


@dataclass(frozen=True)
class Quantized:
    """A matrix (rows, c) as codes and scales.

    Attributes:
        codes: uint8 (rows, c), all below 2^bits.
        scale: float (rows, ⌈c/group⌉).
        bits: bits per code, one of `BITS`.
        group: values per scale.
    """

    codes: Tensor
    scale: Tensor
    bits: int
    group: int

    @property
    def shape(self) -> torch.Size:
        """Shape of the matrix, (rows, c)."""
        return self.codes.shape

    @property
    def dtype(self) -> torch.dtype:
        """Data type of the scales."""
        return self.scale.dtype

    @property
    def device(self) -> torch.device:
        """Device of the scales."""
        return self.scale.device

    def dequantize(self) -> Tensor:
        """Return the values (rows, c), in the dtype of the scales."""
        columns = self.codes.shape[1]
        return levels(self.codes, self.bits, self.scale.dtype) * spread_scale(self.scale, self.group, columns)


def quantize(values: Tensor, bits: int, group: int, search: bool = False) -> Quantized:
    """Round `values` (rows, c) to the nearest level of their group.

    Args:
        search: whether to take the scale with the least squared error among `SCALE_FACTORS`. Without it, the scale is
            the one that just covers the group.
    """
    rows, columns = values.shape
    groups = math.ceil(columns / group)
    padded = torch.nn.functional.pad(values, (0, groups * group - columns)).reshape(rows * groups, group)
    importance = torch.ones(1, dtype=values.dtype, device=values.device) if search else None
    scale = group_scales(padded, bits, importance).view(rows, groups)
    return Quantized(nearest_codes(values, spread_scale(scale, group, columns), bits), scale, bits, group)


def group_scales(values: Tensor, bits: int, importance: Tensor | None = None) -> Tensor:
    """Return the scale (...) of each group of g `values` (..., g). The scale of a group of zeros is zero.

    A scale is rounded to the eight significant bits of bfloat16, so that a checkpoint of any dtype holds it exactly.
    Zeros that pad a group do not influence its scale.

    Args:
        importance: weights of the squared errors, in a shape that broadcasts to `values`. The scale is then the one of
            `SCALE_FACTORS` with the least weighted sum. Without weights, it is the one that just covers the group.
    """
    # The scale at which the outermost cell just holds the largest value.
    covering = values.abs().amax(dim=-1) / 2 ** (bits - 1)
    best = _rounded(covering)
    if importance is None:
        return best
    # Zeros may be padding, which no scale has to serve.
    importance = torch.where(values == 0, 0.0, importance)
    least = torch.full_like(best, math.inf)
    for factor in SCALE_FACTORS:
        scale = _rounded(covering * factor)
        error = (nearest_levels(values, scale[..., None], bits).sub_(values).square_() * importance).sum(dim=-1)
        best = torch.where(error < least, scale, best)
        least = torch.minimum(error, least)
    return best


def nearest_codes(values: Tensor, scale: Tensor, bits: int) -> Tensor:
    """Return the codes, uint8, of the levels nearest to `values`. Where the scale is zero, any code may come back.

    Args:
        scale: in a shape that broadcasts to `values`.
    """
    return _cells(values, scale, bits).add_(2 ** (bits - 1)).to(torch.uint8)


def nearest_levels(values: Tensor, scale: Tensor, bits: int) -> Tensor:
    """Return the levels nearest to `values`, times their scale, in a new tensor."""
    return _cells(values, scale, bits).add_(0.5).mul_(scale)


def _cells(values: Tensor, scale: Tensor, bits: int) -> Tensor:
    """Return ⌊values / scale⌋, limited to the 2ᵇ cells from −2ᵇ⁻¹ on, in a new tensor."""
    # A scale is zero only where all values are, and any code will do.
    steps = values / torch.where(scale == 0, 1.0, scale)
    return steps.floor_().clamp_(-(2 ** (bits - 1)), 2 ** (bits - 1) - 1)


def levels(codes: Tensor, bits: int, dtype: torch.dtype) -> Tensor:
    """Return the values that codes stand for at a scale of one: q − (2ᵇ − 1)/2.

    Every floating point dtype holds them exactly.
    """
    return codes.to(dtype) - (2**bits - 1) / 2


def spread_scale(scale: Tensor, group: int, columns: int) -> Tensor:
    """Return the scale (rows, c) of every value, from the scales of the groups (rows, ⌈c/group⌉)."""
    # A single group needs no copy.
    if scale.shape[1] == 1:
        return scale.expand(-1, columns)
    return scale.repeat_interleave(group, dim=1, output_size=scale.shape[1] * group)[:, :columns]


def group_sums(values: Tensor, group: int) -> Tensor:
    """Return the sums (rows, ⌈c/group⌉) of `values` (rows, c) over their groups: the transpose of `spread_scale`."""
    columns = values.shape[1]
    if not columns:
        return values
    if columns <= group:
        return values.sum(dim=1, keepdim=True)
    padded = torch.nn.functional.pad(values, (0, -columns % group))
    return padded.unflatten(1, (-1, group)).sum(dim=2)


def packed_shape(rows: int, columns: int, bits: int) -> tuple[int, int, int]:
    """Return the shape of packed codes: rows, bytes per row, 1.

    The third dimension makes sure that the shape is never the one of the dense matrix.
    """
    return rows, math.ceil(columns * bits / 8), 1


def pack_codes(codes: Tensor, bits: int) -> Tensor:
    """Pack codes (rows, c) into uint8 (rows, ⌈c·bits/8⌉, 1). Padding bits are zero."""
    rows, width, _ = packed_shape(codes.shape[0], codes.shape[1], bits)
    word_bytes, word_codes = _word(bits)
    words = math.ceil(codes.shape[1] / word_codes)
    padded = torch.nn.functional.pad(codes.to(torch.int64), (0, words * word_codes - codes.shape[1]))
    # Put the codes of a word side by side in one integer, then cut that into bytes.
    packed = (padded.view(rows, words, word_codes) << _positions(word_codes, bits, padded)).sum(dim=2, keepdim=True)
    stream = ((packed >> _positions(word_bytes, 8, packed)) & 255).to(torch.uint8).flatten(1)
    return stream[:, :width].unsqueeze(2).contiguous()


def unpack_codes(packed: Tensor, bits: int, columns: int) -> Tensor:
    """Return the codes, uint8 (rows, c), from uint8 (rows, ⌈c·bits/8⌉, 1)."""
    word_bytes, word_codes = _word(bits)
    words = packed
    if must_decompose():
        words = packed.to(torch.int32)  # ONNX shifts signed integers only, as torch translates it
    if word_bytes > 1:
        stream = torch.nn.functional.pad(packed.squeeze(2), (0, -packed.shape[1] % word_bytes))
        word_dtype = torch.int32 if word_bytes <= 3 else torch.int64  # 24 bits or fewer fit int32
        parts = stream.unflatten(1, (stream.shape[1] // word_bytes, word_bytes)).to(word_dtype)
        places = torch.bitwise_left_shift(parts, _positions(word_bytes, 8, parts))
        words = places.sum(dim=2, keepdim=True, dtype=parts.dtype)
    if word_codes == 1:
        return words.squeeze(2)
    codes = torch.bitwise_right_shift(words, _positions(word_codes, bits, words)) & (2**bits - 1)
    return codes.flatten(1)[:, :columns].to(torch.uint8)


def _word(bits: int) -> tuple[int, int]:
    """Return the number of bytes of the smallest word that holds whole codes, and the number of its codes."""
    common = math.gcd(bits, 8)
    return bits // common, 8 // common


def _positions(count: int, step: int, like: Tensor) -> Tensor:
    """Return the first bits of `count` fields of `step` bits in a word, with dtype and device of `like`."""
    return torch.arange(0, count * step, step, dtype=like.dtype, device=like.device)


def _rounded(scale: Tensor) -> Tensor:
    """Return a scale rounded to bfloat16, in its own dtype."""
    return scale.to(torch.bfloat16).to(scale.dtype)
