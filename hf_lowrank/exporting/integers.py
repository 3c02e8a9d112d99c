"""Quantized layers as integers and steps: the form in which other formats can hold them.

A code q of b bits stands for (q − (2ᵇ − 1)/2) · s. None of these levels is zero, while the integers of other formats
have a zero. But (2q − (2ᵇ − 1)) · s/2 is the same value: an odd integer of b + 1 bits with its sign, times half of the
scale. So formats of signed integers hold every value, with at least one bit more.
"""

import math
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from ..runtime.layer_spec import LayerSpec
from ..runtime.layers import CompressedLinear
from ..runtime.quantization import unpack_codes

QUANTIZED = LayerSpec(sparse="full")
"""What a layer stores, its bits and its bias aside, that is quantized integers and nothing else."""


@dataclass(frozen=True)
class Integers:
    """A matrix (m, n) as odd integers times steps.

    Attributes:
        values: int16 (m, n), from 1 − 2ᵇ to 2ᵇ − 1.
        steps: float (m, n / group).
        bits: bits b of a code; the integers take one more.
        group: values of a row that share a step. It divides n.
    """

    values: Tensor
    steps: Tensor
    bits: int
    group: int


def integers_of(layer: CompressedLinear) -> Integers | None:
    """Return the integers of a quantized layer. None for a layer of other parts, or of scales too small to halve."""
    spec = layer.spec
    if replace(spec, bias=False, weight_bits=0, weight_group=0) != QUANTIZED:
        return None
    columns = layer.in_features
    codes = unpack_codes(layer.weight, spec.weight_bits, columns).short()
    scale = layer.get_parameter("weight_scale").detach()
    steps = scale / 2
    if not torch.equal(steps * 2, scale):
        return None
    group = columns
    if spec.weight_group < columns:
        # The last group of a row may be a shorter one. Groups of another size that divides both have no such rest.
        group = math.gcd(spec.weight_group, columns)
        steps = steps.repeat_interleave(spec.weight_group // group, dim=1)[:, : columns // group]
    return Integers(2 * codes - (2**spec.weight_bits - 1), steps.contiguous(), spec.weight_bits, group)


def reason_against(spec: LayerSpec) -> str:
    """Return which parts of a layer no format of integers holds, for people."""
    parts = []
    if spec.sparse not in ("none", "full"):
        parts.append({"rows": "kept rows", "columns": "kept columns", "bitmask": "kept values"}[spec.sparse])
    if spec.rank:
        parts.append("a low-rank part")
    if spec.binary_rank:
        parts.append("signs")
    return " and ".join(parts) or f"{spec.weight_bits} bits in groups of {spec.weight_group}"
