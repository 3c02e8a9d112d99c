"""Computes every operation of a compressed layer in plain torch, which defines its meaning.

A kernel only ever claims to be faster: tests compare it with the functions of this file. A packed matrix is never
unpacked as a whole, but one tile of rows at a time, and the tiles are not saved for the backward pass.
"""

import math
from collections.abc import Iterator
from typing import Protocol

import torch
from torch import Tensor
from torch.nn import functional as F

from .packing import signs_to_values, unpack_bits, unpack_values
from .pivoting import row_sources

TILE_ELEMENTS = 1 << 24
"""Maximum number of matrix entries that are unpacked at once (64 MiB in float32)."""


class UnpackRows(Protocol):
    """Returns some rows of a packed matrix as a dense one, in the given dtype."""

    def __call__(self, rows: slice, dtype: torch.dtype, /) -> Tensor: ...


# --- products -----------------------------------------------------------------------------------------------------


def plain_bitmask_linear(x: Tensor, weight: Tensor, weight_mask: Tensor) -> Tensor:
    """Return S x for a sparse S (m, n) and x (..., n).

    Args:
        weight: the kept values, (m, k).
        weight_mask: bitmap of their places, uint8 (m, ⌈n/8⌉).
    """
    compute = compute_dtype(x)
    y = []
    for rows in row_tiles(weight_mask, x):
        y.append(F.linear(x.to(compute), _sparse_rows(weight, weight_mask, rows, x.shape[-1], compute)))
    return torch.cat(y, dim=-1).to(x.dtype)


def plain_binary_linear(x: Tensor, sign_bits: Tensor, scale_in: Tensor, scale_out: Tensor) -> Tensor:
    """Return Σ_b scale_out_b ⊙ (±1 · (scale_in_b ⊙ x)) for x (..., n).

    Args:
        sign_bits: bitmap of the signs, uint8 (m, ⌈n/8⌉).
        scale_in: (b, n).
        scale_out: (m, b).
    """
    compute = compute_dtype(x)
    y = []
    for rows in row_tiles(sign_bits, x):
        y.append(F.linear(x.to(compute), _binary_rows(sign_bits, scale_in, scale_out, rows, compute)))
    return torch.cat(y, dim=-1).to(x.dtype)


def plain_bitmask_binary_linear(
    x: Tensor, weight: Tensor, weight_mask: Tensor, sign_bits: Tensor, scale_in: Tensor, scale_out: Tensor
) -> Tensor:
    """Return the sum of `bitmask_linear` and `binary_linear`, rounded once: the product of a SLaB layer."""
    compute = compute_dtype(x)
    y = []
    for rows in row_tiles(sign_bits, x):
        tile = _sparse_rows(weight, weight_mask, rows, x.shape[-1], compute)
        y.append(F.linear(x.to(compute), tile + _binary_rows(sign_bits, scale_in, scale_out, rows, compute)))
    return torch.cat(y, dim=-1).to(x.dtype)


def plain_lowrank_linear(x: Tensor, lowrank_a: Tensor, lowrank_b: Tensor) -> Tensor:
    """Return B (A x) for A (r, n), B (m, r) and x (..., n)."""
    return F.linear(F.linear(x, lowrank_a.to(x.dtype)), lowrank_b.to(x.dtype))


def plain_pivoted_linear(x: Tensor, lowrank_a: Tensor, lowrank_b: Tensor, lowrank_pivots: Tensor, rows: int) -> Tensor:
    """Return the product of pivoted factors with x (..., n): P times I above B', times A' x (see `pivoting`).

    Args:
        lowrank_a: A', (r, n).
        lowrank_b: B', (m − r, r).
        lowrank_pivots: bitmap of the pivots, uint8 (⌈m/8⌉,).
        rows: m.
    """
    z = F.linear(x, lowrank_a.to(x.dtype))
    y = torch.cat([z, F.linear(z, lowrank_b.to(x.dtype))], dim=-1)
    return y.index_select(-1, row_sources(lowrank_pivots, rows, lowrank_a.shape[0]))


# --- gradients: the matrix is unpacked again, tile by tile --------------------------------------------------------


def plain_bitmask_input_grad(grad: Tensor, weight: Tensor, weight_mask: Tensor, columns: int) -> Tensor:
    """Return Sᵀ g for g (..., m): the gradient of `bitmask_linear` in x."""

    def unpack_rows(rows: slice, dtype: torch.dtype) -> Tensor:
        return _sparse_rows(weight, weight_mask, rows, columns, dtype)

    return sum_over_tiles(grad, weight_mask, columns, unpack_rows=unpack_rows)


def plain_bitmask_weight_grad(grad: Tensor, x: Tensor, weight_mask: Tensor, kept: int) -> Tensor:
    """Return the gradient of `bitmask_linear` in its kept values: the entries (m, k) of g xᵀ where the mask is set."""
    compute = torch.promote_types(x.dtype, torch.float32)
    g, inputs = as_matrix(grad).to(compute), as_matrix(x).to(compute)
    kept_grad = []
    for rows in row_tiles(weight_mask, x):
        kept_entries = (g[:, rows].T @ inputs)[unpack_bits(weight_mask[rows], x.shape[-1])]
        kept_grad.append(kept_entries.view(-1, kept))
    return torch.cat(kept_grad)


def plain_binary_input_grad(grad: Tensor, sign_bits: Tensor, scale_in: Tensor, scale_out: Tensor) -> Tensor:
    """Return the gradient of `binary_linear` in x, (..., n), for g (..., m)."""

    def unpack_rows(rows: slice, dtype: torch.dtype) -> Tensor:
        return _binary_rows(sign_bits, scale_in, scale_out, rows, dtype)

    return sum_over_tiles(grad, sign_bits, scale_in.shape[1], unpack_rows=unpack_rows)


def plain_bitmask_binary_input_grad(
    grad: Tensor, weight: Tensor, weight_mask: Tensor, sign_bits: Tensor, scale_in: Tensor, scale_out: Tensor
) -> Tensor:
    """Return the gradient of `bitmask_binary_linear` in x, (..., n), for g (..., m)."""
    columns = scale_in.shape[1]

    def unpack_rows(rows: slice, dtype: torch.dtype) -> Tensor:
        sparse = _sparse_rows(weight, weight_mask, rows, columns, dtype)
        return sparse + _binary_rows(sign_bits, scale_in, scale_out, rows, dtype)

    return sum_over_tiles(grad, sign_bits, columns, unpack_rows=unpack_rows)


def plain_binary_scale_grads(
    grad: Tensor, x: Tensor, sign_bits: Tensor, scale_in: Tensor, scale_out: Tensor
) -> tuple[Tensor, Tensor]:
    """Return the gradients of `binary_linear` in `scale_in` (b, n) and in `scale_out` (m, b)."""
    compute = torch.promote_types(x.dtype, torch.float32)
    g, inputs = as_matrix(grad).to(compute), as_matrix(x).to(compute)
    in_grad = torch.zeros(scale_in.shape, dtype=compute, device=x.device)
    out_grad = []
    for rows in row_tiles(sign_bits, x):
        signed = (g[:, rows].T @ inputs) * signs_to_values(sign_bits[rows], x.shape[-1], compute)
        in_grad += scale_out[rows].to(compute).T @ signed
        out_grad.append(signed @ scale_in.to(compute).T)
    return in_grad, torch.cat(out_grad)


# --- tiles --------------------------------------------------------------------------------------------------------


def compute_dtype(x: Tensor) -> torch.dtype:
    """Return the dtype to multiply in: that of x, but float32 for half precision on a CPU.

    On a CPU the product in float32 is the exact one and usually the faster one.
    """
    # Not by `torch.promote_types`, which torch 2.6 writes into an exported program and cannot read back.
    is_half = x.dtype.itemsize < torch.float32.itemsize
    return torch.float32 if is_half and x.device.type == "cpu" else x.dtype


def row_tiles(packed: Tensor, x: Tensor) -> Iterator[slice]:
    """Yield the rows of a packed matrix in tiles of at most `TILE_ELEMENTS` entries.

    Args:
        packed: bitmap or codes of the matrix, one row for each of its rows.
        x: a tensor (..., n), n being the number of columns of the matrix.
    """
    rows, columns = packed.shape[0], max(x.shape[-1], 1)
    step = max(TILE_ELEMENTS // columns, 1)
    # A matrix without rows gives one empty tile, so that there is something to concatenate.
    for start in range(0, max(rows, 1), step):
        yield slice(start, min(start + step, rows))


def as_matrix(x: Tensor) -> Tensor:
    """Return x (..., n) as (tokens, n). A single vector is one token."""
    return x.reshape(math.prod(x.shape[:-1]), x.shape[-1])


def sum_over_tiles(grad: Tensor, packed: Tensor, columns: int, *, unpack_rows: UnpackRows) -> Tensor:
    """Return Mᵀ g, (..., n), for g (..., m) and a packed matrix M (m, n), unpacking one tile at a time.

    Args:
        packed: bitmap or codes of M, one row for each of its rows.
        columns: n.
        unpack_rows: unpacks some rows of M.
    """
    compute = compute_dtype(grad)
    total = torch.zeros(*grad.shape[:-1], columns, dtype=compute, device=grad.device)
    for rows in row_tiles(packed, total):
        total += grad[..., rows].to(compute) @ unpack_rows(rows, compute)
    return total.to(grad.dtype)


def _sparse_rows(weight: Tensor, weight_mask: Tensor, rows: slice, columns: int, dtype: torch.dtype) -> Tensor:
    """Return some rows of a sparse part as a dense matrix (rows, n), n = `columns`."""
    return unpack_values(weight[rows], unpack_bits(weight_mask[rows], columns)).to(dtype)


def _binary_rows(sign_bits: Tensor, scale_in: Tensor, scale_out: Tensor, rows: slice, dtype: torch.dtype) -> Tensor:
    """Return some rows of a binary part as a dense matrix (rows, n): signs times magnitudes of rank b."""
    magnitudes = scale_out[rows].to(dtype) @ scale_in.to(dtype)
    return magnitudes * signs_to_values(sign_bits[rows], scale_in.shape[1], dtype)
