"""Integers as the blocks of 32 values in which GGUF stores quantized matrices.

A block has a scale in float16, for some types an offset in float16, and 32 codes. The odd integers of a layer
(`integers`) are codes of a type of one bit more without an offset, or of their own bits with one:

| bits | type | code | rounded |
|---|---|---|---|
| 2, 3 | Q4_0 | v + 8 | no |
| 4 | Q4_1, Q5_0 if exact | (v + 15)/2, v + 16 | the offset, −15 steps, to 11 bits |
| 5 | Q5_1, Q8_0 if exact | (v + 31)/2, v | the offset, −31 steps, to 11 bits |
| 6, 7 | Q8_0 | v | no |
| 8 | Q8_0 | nearest | all values |

Steps are bfloat16 as a rule, and float16 holds them unless they are below 2⁻¹⁷.
"""

from dataclasses import dataclass
from typing import Any

import numpy as np
from gguf import GGMLQuantizationType

from .integers import Integers

BLOCK = 32
Array = np.ndarray[Any, Any]


@dataclass(frozen=True)
class Blocks:
    """A matrix in blocks.

    Attributes:
        type: GGUF's type.
        data: uint8 (m, bytes of a row).
        error: the largest change of a value, in distances between two levels of the layer. 0: no value is changed.
    """

    type: GGMLQuantizationType
    data: Array
    error: float


def blocks_of(integers: Integers, exact: bool = False) -> Blocks | None:
    """Return a matrix in the smallest blocks that hold its bits. None if there are none.

    Args:
        exact: prefer larger blocks that change no value to smaller ones that round offsets.
    """
    m, n = integers.values.shape
    if n % BLOCK or integers.group % BLOCK:
        return None
    values = integers.values.numpy().reshape(m, n // BLOCK, BLOCK)
    steps = integers.steps.double().numpy().repeat(integers.group // BLOCK, axis=1)
    bits = integers.bits
    if bits <= 3:
        return _blocks(values, steps, GGMLQuantizationType.Q4_0, 4, offset=None)
    if bits == 4:
        kind = GGMLQuantizationType.Q5_0 if exact else GGMLQuantizationType.Q4_1
        return _blocks(values, steps, kind, 5 if exact else 4, offset=None if exact else 15)
    if bits == 5 and not exact:
        return _blocks(values, steps, GGMLQuantizationType.Q5_1, 5, offset=31)
    if bits < 8:
        return _blocks(values, steps, GGMLQuantizationType.Q8_0, 8, offset=None)
    return _rounded_to_bytes(values, steps)


def _blocks(values: Array, steps: Array, kind: GGMLQuantizationType, bits: int, offset: int | None) -> Blocks | None:
    """Return blocks of codes of so many bits, with an offset of −`offset` steps or without any."""
    with np.errstate(over="ignore"):
        scales = (steps if offset is None else 2 * steps).astype(np.float16)
        offsets = None if offset is None else (-offset * steps).astype(np.float16)
    if not np.isfinite(scales).all():
        return None
    codes = values + 2 ** (bits - 1) if offset is None else (values + offset) // 2
    stored = _values(codes, bits, scales, offsets)
    error = _largest_error(stored, values * steps[..., None], steps)
    return Blocks(kind, _packed(codes, bits, scales, offsets), error)


def _rounded_to_bytes(values: Array, steps: Array) -> Blocks | None:
    """Return blocks of Q8_0 whose values are the nearest ones: integers of 9 bits do not fit its codes."""
    wanted = values * steps[..., None]
    with np.errstate(over="ignore"):
        scales = (np.abs(wanted).max(axis=2) / 127).astype(np.float16)
    if not np.isfinite(scales).all():
        return None
    divisor = np.where(scales == 0, 1, scales.astype(np.float64))
    codes = np.clip(np.rint(wanted / divisor[..., None]), -127, 127).astype(np.int16) + 128
    stored = _values(codes, 8, scales, None)
    error = _largest_error(stored, wanted, steps)
    return Blocks(GGMLQuantizationType.Q8_0, _packed(codes, 8, scales, None), error)


def _values(codes: Array, bits: int, scales: Array, offsets: Array | None) -> Array:
    """Return what blocks stand for, in float64."""
    wide = scales.astype(np.float64)[..., None]
    if offsets is None:
        return (codes - 2 ** (bits - 1)) * wide
    return codes * wide + offsets.astype(np.float64)[..., None]


def _largest_error(stored: Array, wanted: Array, steps: Array) -> float:
    distance = np.where(steps == 0, 1, 2 * np.abs(steps))[..., None]
    return float((np.abs(stored - wanted) / distance).max(initial=0))


def _packed(codes: Array, bits: int, scales: Array, offsets: Array | None) -> Array:
    """Return blocks as bytes (m, ·): scale, offset, fifth bits, and then nibbles or whole bytes."""
    rows = len(codes)
    parts: list[Array] = [scales[..., None].view(np.uint8)]
    if offsets is not None:
        parts.append(offsets[..., None].view(np.uint8))
    if bits == 8:
        parts.append((codes - 128).astype(np.int8).view(np.uint8))
    else:
        if bits == 5:
            parts.append(np.packbits((codes >> 4).astype(np.uint8), axis=2, bitorder="little"))
        nibbles = (codes & 15).astype(np.uint8)
        # The second half of a block lies in the upper halves of the bytes.
        parts.append(nibbles[..., :16] | nibbles[..., 16:] << 4)
    return np.ascontiguousarray(np.concatenate(parts, axis=2)).reshape(rows, -1)
