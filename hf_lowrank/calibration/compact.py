"""Statistics in a compact form, in which those of all blocks wait until the blocks are built.

A Gram matrix C of inputs is kept as the float32 values of its lower triangle, 2 n² bytes in place of 8 n². Losses are
measured in directions in which C is small, so that fewer digits would show. A Gram matrix G of output gradients is
damped by a tenth of its mean wherever it is used. Its correlations are kept as 16-bit integers, m² bytes in place of
8 m²: an error of 1.5e-5 of the diagonal in each. Bfloat16 takes as much, and errs by 4e-3.
"""

from typing import Any

import torch
from torch import Tensor

from ..methods import Statistics
from .grams import fill_upper_triangle, row_blocks

LARGEST_CODE = 2**15 - 1
"""The code of a correlation of 1."""


def pack_symmetric(matrix: Tensor) -> Tensor:
    """Return the blocks of rows of a symmetric matrix (n, n), as far as the diagonal, one after the other, float32."""
    return torch.cat([matrix[rows, : rows.stop].float().flatten() for rows in row_blocks(matrix)])


def unpack_symmetric(values: Tensor, side: int, dtype: torch.dtype = torch.float64) -> Tensor:
    """Return the symmetric matrix (n, n) with the values that `pack_symmetric` returned, or others so arranged."""
    matrix = torch.empty(side, side, dtype=dtype, device=values.device)
    start = 0
    for rows in row_blocks(matrix):
        part = matrix[rows, : rows.stop]
        part.copy_(values[start : start + part.numel()].view_as(part))
        start += part.numel()
    fill_upper_triangle(matrix)
    return matrix


def pack_correlations(gram: Tensor) -> tuple[Tensor, Tensor]:
    """Return the roots of the diagonal of a Gram matrix (m, m), (m,) float32, and its correlations as int16 codes.

    The codes are arranged as by `pack_symmetric`.
    """
    scale = gram.diagonal().float().clamp(min=0).sqrt()
    divisor = torch.where(scale > 0, scale, 1.0)
    codes = []
    for rows in row_blocks(gram):
        correlations = gram[rows, : rows.stop].float() / divisor[rows, None] / divisor[: rows.stop]
        codes.append((LARGEST_CODE * correlations).round_().clamp_(-LARGEST_CODE, LARGEST_CODE).short().flatten())
    return scale, torch.cat(codes)


def unpack_correlations(scale: Tensor, codes: Tensor) -> Tensor:
    """Return the Gram matrix (m, m), float64, that `pack_correlations` was given, up to rounding."""
    gram = unpack_symmetric(codes, len(scale))
    exact_scale = scale.double()
    gram *= exact_scale[:, None] / LARGEST_CODE
    gram *= exact_scale
    return gram


def pack_statistics(statistics: dict[str, Statistics]) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Return the statistics of the layers of a block, without those of one layer alone, as tensors and facts.

    Layers that share an input share its tensors.
    """
    tensors: dict[str, Tensor] = {}
    inputs: dict[str, int] = {}
    tokens: list[int] = []
    known: dict[int, int] = {}
    for name, values in statistics.items():
        gram = values.require("gram", "the survey")
        number = known.setdefault(id(gram), len(tokens))
        inputs[name] = number
        if number < len(tokens):
            continue
        tokens.append(values.tokens)
        tensors[f"{number}.gram"] = pack_symmetric(gram).cpu()
        tensors[f"{number}.channels"] = torch.stack([values.column_norms, values.mean, values.mean_abs]).cpu()
    return tensors, {"inputs": inputs, "tokens": tokens}


def unpack_statistics(
    name: str, tensors: dict[str, Tensor], facts: dict[str, Any], device: torch.device
) -> Statistics:
    """Return the statistics of the layer `name` from what `pack_statistics` returned."""
    number = facts["inputs"][name]
    column_norms, mean, mean_abs = tensors[f"{number}.channels"].to(device)
    gram = unpack_symmetric(tensors[f"{number}.gram"].to(device), len(mean))
    return Statistics(facts["tokens"][number], column_norms, mean, mean_abs, gram)
