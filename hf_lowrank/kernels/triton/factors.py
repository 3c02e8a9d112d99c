"""Triton kernel for low-rank factors and one to four tokens: each factor is read once, and A x is kept in float32."""

import triton
import triton.language as tl

from .bits import ones


# Not specialized: one program serves every number of tokens, so that a captured graph meets no new one.
@triton.jit(do_not_specialize=["tokens"])
def multiply(
    x,
    y,
    weight,
    pivots,
    tokens,
    rows,
    columns,
    PIVOTED: tl.constexpr,
    BITMAP_BYTES: tl.constexpr,
    TOKENS: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_COLUMNS: tl.constexpr,
):
    """Compute y (tokens, rows) = x weightᵀ for x (tokens, columns) and `weight` (rows, columns), summed in float32.

    A program has `BLOCK_ROWS` rows. With `PIVOTED`, `weight` stores only the rows whose bits are clear in the bitmap
    `pivots` (⌈rows/8⌉ ≤ BITMAP_BYTES); the rows whose bits are set are the entries of x itself, in their order.
    """
    first_row = tl.program_id(0) * BLOCK_ROWS
    row = first_row + tl.arange(0, BLOCK_ROWS)
    token = tl.arange(0, TOKENS)
    inside = row < rows
    source, is_stored = row, inside  # the row of `weight`, and whether there is one
    if PIVOTED:
        # A row that is stored lies behind its index by the number of pivots before it: those before the block, counted
        # here from the whole bitmap, and those within.
        byte = tl.arange(0, BITMAP_BYTES)
        earlier = tl.load(pivots + byte, mask=byte <= first_row // 8, other=0).to(tl.int32)
        earlier = tl.where(byte < first_row // 8, earlier, earlier & ((1 << (first_row % 8)) - 1))
        is_pivot = (tl.load(pivots + row // 8, mask=inside, other=0).to(tl.int32) >> (row % 8)) & 1
        pivots_before = tl.sum(ones(earlier, COMPILED=False), axis=0) + tl.cumsum(is_pivot, axis=0) - is_pivot
        source, is_stored = row - pivots_before, inside & (is_pivot == 0)
    total = tl.zeros((TOKENS, BLOCK_ROWS, BLOCK_COLUMNS), tl.float32)
    row_start = weight + source.to(tl.int64)[None, :, None] * columns
    token_start = x + token[:, None, None] * columns
    for first in range(0, columns, BLOCK_COLUMNS):
        column = (first + tl.arange(0, BLOCK_COLUMNS))[None, None, :]
        entries = tl.load(row_start + column, mask=is_stored[None, :, None] & (column < columns), other=0.0)
        inputs = tl.load(token_start + column, mask=(token < tokens)[:, None, None] & (column < columns), other=0.0)
        total += entries.to(tl.float32) * inputs.to(tl.float32)
    result = tl.sum(total, axis=2)
    stored = (token < tokens)[:, None] & inside[None, :]
    if PIVOTED:
        copied = stored & (is_pivot != 0)[None, :]
        pivot_value = tl.load(x + token[:, None] * columns + pivots_before[None, :], mask=copied, other=0.0)
        result = tl.where(copied, pivot_value.to(tl.float32), result)
    tl.store(y + token[:, None] * rows + row[None, :], result.to(y.dtype.element_ty), mask=stored)
