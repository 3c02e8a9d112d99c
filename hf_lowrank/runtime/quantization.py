"""Values as small integers with grouped scales: how the quantised parts of a layer are stored.

The c values of a row are cut into groups of `group` consecutive ones, the last of which may be shorter; each group has a scale s.
A code q of b bits stands for (q − (2ᵇ − 1)/2) · s: 2ᵇ evenly spaced levels, symmetric about zero, none of which is zero. All levels
are used and no zero point is stored. The codes of a row are a little-endian bit stream.
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

BITS = (2, 3, 4, 5, 6, 7, 8)
SCALE_FACTORS = tuple(0.4 + 0.02 * step for step in range(36))
"""Scales tried by a search, relative to the one that just covers a group: clipping its tails makes the other cells finer."""


@dataclass(frozen=True)
class Quantized:
    """A matrix (rows, c) as codes and scales.

    Attributes:
        codes: uint8 (rows, c), each below 2^bits.
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
        """(rows, c)."""
        return self.codes.shape

    @property
    def dtype(self) -> torch.dtype:
        """That of the scales."""
        return self.scale.dtype

    @property
    def device(self) -> torch.device:
        """That of the scales."""
        return self.scale.device

    def dequantize(self) -> Tensor:
        """The values (rows, c), in the dtype of the scales."""
        return levels(self.codes, self.bits, self.scale.dtype) * spread_scale(
            self.scale, self.group, self.codes.shape[1]
        )


def quantize(values: Tensor, bits: int, group: int, search: bool = False) -> Quantized:
    """Round `values` (rows, c) to the nearest level of their group.

    Args:
        search: whether to take the scale with the least squared error among `SCALE_FACTORS`, or the one that just covers the group.
    """
    rows, columns = values.shape
    groups = math.ceil(columns / group)
    padded = torch.nn.functional.pad(values, (0, groups * group - columns)).view(rows * groups, group)
    importance = torch.ones(1, dtype=values.dtype, device=values.device) if search else None
    scale = group_scales(padded, bits, importance).view(rows, groups)
    return Quantized(nearest_codes(values, spread_scale(scale, group, columns), bits), scale, bits, group)


def group_scales(values: Tensor, bits: int, importance: Tensor | None = None) -> Tensor:
    """The scale (...) of each group of g `values` (..., g); zero for a group of zeros. Zeros that pad a group have no say.

    A scale is rounded to the eight significant bits of bfloat16, so that a checkpoint of any dtype holds it exactly.

    Args:
        importance: weights of the squared errors whose sum is made least among `SCALE_FACTORS`, in a shape that broadcasts; without
            them, the scale is the one that just covers the group.
    """
    covering = values.abs().amax(dim=-1) / 2 ** (bits - 1)
    best = _rounded(covering)
    if importance is None:
        return best
    importance = torch.where(values == 0, 0.0, importance)
    least = torch.full_like(best, math.inf)
    for factor in SCALE_FACTORS:
        scale = _rounded(covering * factor)
        error = (nearest_levels(values, scale[..., None], bits).sub_(values).square_() * importance).sum(dim=-1)
        best = torch.where(error < least, scale, best)
        least = torch.minimum(error, least)
    return best


def nearest_codes(values: Tensor, scale: Tensor, bits: int) -> Tensor:
    """The codes, uint8, of the levels nearest to `values`; `scale` has a shape that broadcasts. Any code where the scale is zero."""
    return _cells(values, scale, bits).add_(2 ** (bits - 1)).to(torch.uint8)


def nearest_levels(values: Tensor, scale: Tensor, bits: int) -> Tensor:
    """What `nearest_codes` stand for at their scale, in a new tensor."""
    return _cells(values, scale, bits).add_(0.5).mul_(scale)


def _cells(values: Tensor, scale: Tensor, bits: int) -> Tensor:
    """⌊values / scale⌋ within the 2ᵇ cells, the lowest of which is −2ᵇ⁻¹, in a new tensor."""
    steps = values / torch.where(scale == 0, 1.0, scale)
    return steps.floor_().clamp_(-(2 ** (bits - 1)), 2 ** (bits - 1) - 1)


def levels(codes: Tensor, bits: int, dtype: torch.dtype) -> Tensor:
    """What codes stand for at a scale of one: q − (2ᵇ − 1)/2, exact in every floating point dtype."""
    return codes.to(dtype) - (2**bits - 1) / 2


def spread_scale(scale: Tensor, group: int, columns: int) -> Tensor:
    """The scale (rows, c) of every value, from those of the groups (rows, ⌈c/group⌉)."""
    if scale.shape[1] == 1:
        return scale.expand(-1, columns)
    return scale.repeat_interleave(group, dim=1, output_size=scale.shape[1] * group)[:, :columns]


def group_sums(values: Tensor, group: int) -> Tensor:
    """Sums (rows, ⌈c/group⌉) of `values` (rows, c) over their groups: the transpose of `spread_scale`."""
    columns = values.shape[1]
    if columns <= group:
        return values.sum(dim=1, keepdim=True) if columns else values
    padded = torch.nn.functional.pad(values, (0, -columns % group))
    return padded.unflatten(1, (-1, group)).sum(dim=2)


def packed_shape(rows: int, columns: int, bits: int) -> tuple[int, int, int]:
    """Shape of packed codes: rows, bytes per row, 1. The third side is there so that it is never the shape of the dense matrix."""
    return rows, math.ceil(columns * bits / 8), 1


def pack_codes(codes: Tensor, bits: int) -> Tensor:
    """Pack codes (rows, c) into uint8 (rows, ⌈c·bits/8⌉, 1); padding bits are zero."""
    rows, width, _ = packed_shape(codes.shape[0], codes.shape[1], bits)
    word_bytes, word_codes = _word(bits)
    words = math.ceil(codes.shape[1] / word_codes)
    padded = torch.nn.functional.pad(codes.to(torch.int64), (0, words * word_codes - codes.shape[1]))
    packed = (padded.view(rows, words, word_codes) << _positions(word_codes, bits, padded)).sum(dim=2, keepdim=True)
    stream = ((packed >> _positions(word_bytes, 8, packed)) & 255).to(torch.uint8).flatten(1)
    return stream[:, :width].unsqueeze(2).contiguous()


def unpack_codes(packed: Tensor, bits: int, columns: int) -> Tensor:
    """The codes, uint8 (rows, c), from uint8 (rows, ⌈c·bits/8⌉, 1)."""
    word_bytes, word_codes = _word(bits)
    words = packed
    if word_bytes > 1:
        stream = torch.nn.functional.pad(packed.squeeze(2), (0, -packed.shape[1] % word_bytes))
        parts = stream.unflatten(1, (stream.shape[1] // word_bytes, word_bytes)).to(
            torch.int32 if word_bytes <= 3 else torch.int64
        )
        words = (parts << _positions(word_bytes, 8, parts)).sum(dim=2, keepdim=True, dtype=parts.dtype)
    if word_codes == 1:
        return words.squeeze(2)
    codes = (words >> _positions(word_codes, bits, words)) & (2**bits - 1)
    return codes.flatten(1)[:, :columns].to(torch.uint8)


def _word(bits: int) -> tuple[int, int]:
    """Bytes of the smallest word that holds whole codes, and how many codes that is."""
    common = math.gcd(bits, 8)
    return bits // common, 8 // common


def _positions(count: int, step: int, like: Tensor) -> Tensor:
    return torch.arange(0, count * step, step, dtype=like.dtype, device=like.device)


def _rounded(scale: Tensor) -> Tensor:
    return scale.to(torch.bfloat16).to(scale.dtype)
