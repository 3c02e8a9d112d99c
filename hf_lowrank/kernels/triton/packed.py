"""Triton kernels for packed matrices: tiles expanded in registers from bitmaps, kept values or codes, and signs.

A tile has `BLOCK_ROWS` rows and 8 · `BLOCK_BYTES` columns, one byte of a bitmap for eight columns. Every row of a bitmask keeps the same
number of values, so the values of row i begin at i · kept; within a row they are found by counting the bits that come before. Nothing is
precomputed and nothing waits for the host: the same launch is right whatever the tensors hold, in a CUDA graph too.

Arguments that the kernels share: `values` (rows, kept) or, with `BITS`, packed codes of `stride` bytes per row and their scales
`code_scale` (rows, ⌈kept/GROUP⌉), see `runtime.quantization`; `mask` (rows, ⌈columns/8⌉), None where every column has a value; `signs`
(rows, ⌈columns/8⌉), `scale_in` (BINARY_RANK, columns) and `scale_out` (rows, BINARY_RANK).
"""

import triton
import triton.language as tl


@triton.jit
def ones_of_byte(byte):
    """Number of ones of integers from 0 to 255."""
    pairs = byte - ((byte >> 1) & 0x55)
    nibbles = (pairs & 0x33) + ((pairs >> 2) & 0x33)
    return (nibbles + (nibbles >> 4)) & 0x0F


@triton.jit
def _kept_values(values, code_scale, place, wanted, row, stride, groups, BITS: tl.constexpr, GROUP: tl.constexpr):
    """The stored values, float32, at a `place` in their rows; zeros where none is wanted."""
    if BITS == 0:
        kept = tl.load(values + row * stride + place, mask=wanted, other=0.0).to(tl.float32)
    else:
        byte = (place * BITS) >> 3
        code = tl.load(values + row * stride + byte, mask=wanted, other=0).to(tl.int32)
        if 8 % BITS != 0:  # a code may begin in one byte and end in the next
            code |= tl.load(values + row * stride + byte + 1, mask=wanted & (byte + 1 < stride), other=0).to(tl.int32) << 8
        code = (code >> ((place * BITS) & 7)) & (2**BITS - 1)
        scale = tl.load(code_scale + row * groups + place // GROUP, mask=wanted, other=0.0).to(tl.float32)
        kept = (code.to(tl.float32) - (2**BITS - 1) / 2) * scale
    return kept


@triton.jit
def _every_eighth(
    values,
    code_scale,
    place,
    bits,
    row,
    stride,
    groups,
    column,
    columns,
    HAS_MASK: tl.constexpr,
    BITS: tl.constexpr,
    GROUP: tl.constexpr,
    BIT: tl.constexpr,
):
    """Values of the columns of one bit of every byte, and the place of the next column's."""
    if HAS_MASK:
        kept = _kept_values(values, code_scale, place, (bits & (1 << BIT)) != 0, row, stride, groups, BITS, GROUP)
        place += (bits >> BIT) & 1
    else:
        wanted = (bits != 0) & (column + BIT < columns)
        kept = _kept_values(values, code_scale, column + BIT, wanted, row, stride, groups, BITS, GROUP)
    return kept, place


@triton.jit
def _sparse_tile(
    values,
    code_scale,
    mask,
    kept_before,
    row,
    first_byte,
    rows,
    columns,
    stride,
    groups,
    HAS_MASK: tl.constexpr,
    BITS: tl.constexpr,
    GROUP: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_BYTES: tl.constexpr,
):
    """Entries (BLOCK_ROWS, 8 · BLOCK_BYTES) of the sparse or quantised part, float32, and the values kept up to the end of the tile."""
    byte = first_byte + tl.arange(0, BLOCK_BYTES)[None, :]
    inside = (row < rows) & (byte * 8 < columns)
    if HAS_MASK:
        bits = tl.load(mask + row * ((columns + 7) // 8) + byte, mask=inside, other=0).to(tl.int32)
        ones = ones_of_byte(bits)
        p = kept_before[:, None] + tl.cumsum(ones, axis=1) - ones
        kept_before += tl.sum(ones, axis=1)
    else:
        bits = inside.to(tl.int32)
        p = bits
    c = byte * 8
    v0, p = _every_eighth(values, code_scale, p, bits, row, stride, groups, c, columns, HAS_MASK, BITS, GROUP, 0)
    v1, p = _every_eighth(values, code_scale, p, bits, row, stride, groups, c, columns, HAS_MASK, BITS, GROUP, 1)
    v2, p = _every_eighth(values, code_scale, p, bits, row, stride, groups, c, columns, HAS_MASK, BITS, GROUP, 2)
    v3, p = _every_eighth(values, code_scale, p, bits, row, stride, groups, c, columns, HAS_MASK, BITS, GROUP, 3)
    v4, p = _every_eighth(values, code_scale, p, bits, row, stride, groups, c, columns, HAS_MASK, BITS, GROUP, 4)
    v5, p = _every_eighth(values, code_scale, p, bits, row, stride, groups, c, columns, HAS_MASK, BITS, GROUP, 5)
    v6, p = _every_eighth(values, code_scale, p, bits, row, stride, groups, c, columns, HAS_MASK, BITS, GROUP, 6)
    v7, p = _every_eighth(values, code_scale, p, bits, row, stride, groups, c, columns, HAS_MASK, BITS, GROUP, 7)
    even = tl.join(tl.join(v0, v4), tl.join(v2, v6))
    odd = tl.join(tl.join(v1, v5), tl.join(v3, v7))
    return tl.reshape(tl.join(even, odd), (BLOCK_ROWS, BLOCK_BYTES * 8)), kept_before


@triton.jit
def _add_binary_tile(
    tile,
    signs,
    scale_in,
    scale_out,
    row,
    first_byte,
    rows,
    columns,
    BINARY_RANK: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_BYTES: tl.constexpr,
):
    """`tile` (BLOCK_ROWS, 8 · BLOCK_BYTES), float32, plus the entries of the binary part."""
    byte = first_byte + tl.arange(0, BLOCK_BYTES)[None, :]
    column = first_byte * 8 + tl.arange(0, BLOCK_BYTES * 8)[None, :]
    packed = tl.load(signs + row * ((columns + 7) // 8) + byte, mask=(row < rows) & (byte * 8 < columns), other=0).to(tl.int32)
    ones = (packed[:, :, None] & (1 << tl.arange(0, 8))[None, None, :]) != 0
    positive = tl.reshape(ones, (BLOCK_ROWS, BLOCK_BYTES * 8))
    for b in tl.static_range(BINARY_RANK):
        of_columns = tl.load(scale_in + b * columns + column, mask=column < columns, other=0.0).to(tl.float32)
        of_rows = tl.load(scale_out + row * BINARY_RANK + b, mask=row < rows, other=0.0).to(tl.float32)
        tile += tl.where(positive, of_rows, -of_rows) * of_columns
    return tile


@triton.jit
def _tile(
    values,
    code_scale,
    mask,
    signs,
    scale_in,
    scale_out,
    kept_before,
    row,
    first_byte,
    rows,
    columns,
    stride,
    groups,
    HAS_VALUES: tl.constexpr,
    HAS_MASK: tl.constexpr,
    BITS: tl.constexpr,
    GROUP: tl.constexpr,
    BINARY_RANK: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_BYTES: tl.constexpr,
):
    """Entries (BLOCK_ROWS, 8 · BLOCK_BYTES) of the sum of the parts, float32, and the values kept up to the end of the tile."""
    row = row.to(tl.int64)[:, None]
    tile = tl.zeros((BLOCK_ROWS, BLOCK_BYTES * 8), tl.float32)
    if HAS_VALUES:
        tile, kept_before = _sparse_tile(
            values,
            code_scale,
            mask,
            kept_before,
            row,
            first_byte,
            rows,
            columns,
            stride,
            groups,
            HAS_MASK,
            BITS,
            GROUP,
            BLOCK_ROWS,
            BLOCK_BYTES,
        )
    if BINARY_RANK > 0:
        tile = _add_binary_tile(tile, signs, scale_in, scale_out, row, first_byte, rows, columns, BINARY_RANK, BLOCK_ROWS, BLOCK_BYTES)
    return tile, kept_before


@triton.jit(do_not_specialize=["tokens"])  # one program for every number, so that a captured graph meets no new one
def multiply(
    x,
    y,
    values,
    code_scale,
    mask,
    signs,
    scale_in,
    scale_out,
    tokens,
    rows,
    columns,
    stride,
    groups,
    HAS_VALUES: tl.constexpr,
    HAS_MASK: tl.constexpr,
    BITS: tl.constexpr,
    GROUP: tl.constexpr,
    BINARY_RANK: tl.constexpr,
    TOKENS: tl.constexpr,
    TENSOR_CORES: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_BYTES: tl.constexpr,
):
    """y (tokens, rows) of x (tokens, columns), summed in float32; a program has `BLOCK_ROWS` rows and `TOKENS` ≥ tokens.

    With `TENSOR_CORES` the entries are rounded to the dtype of x, otherwise they stay in float32.
    """
    row = tl.program_id(0) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    token = tl.arange(0, TOKENS)
    kept_before = tl.zeros((BLOCK_ROWS,), tl.int32)
    if TENSOR_CORES:
        total = tl.zeros((BLOCK_ROWS, TOKENS), tl.float32)
    else:
        total = tl.zeros((TOKENS, BLOCK_ROWS, BLOCK_BYTES * 8), tl.float32)
    for first_byte in range(0, (columns + 7) // 8, BLOCK_BYTES):
        tile, kept_before = _tile(
            values,
            code_scale,
            mask,
            signs,
            scale_in,
            scale_out,
            kept_before,
            row,
            first_byte,
            rows,
            columns,
            stride,
            groups,
            HAS_VALUES,
            HAS_MASK,
            BITS,
            GROUP,
            BINARY_RANK,
            BLOCK_ROWS,
            BLOCK_BYTES,
        )
        column = first_byte * 8 + tl.arange(0, BLOCK_BYTES * 8)
        if TENSOR_CORES:
            wanted = (token < tokens)[:, None] & (column < columns)[None, :]
            inputs = tl.load(x + token[:, None] * columns + column[None, :], mask=wanted, other=0.0)
            total = tl.dot(tile.to(inputs.dtype), tl.trans(inputs), total, input_precision="ieee")
        else:
            wanted = (token < tokens)[:, None, None] & (column < columns)[None, None, :]
            inputs = tl.load(x + token[:, None, None] * columns + column[None, None, :], mask=wanted, other=0.0)
            total += tile[None, :, :] * inputs.to(tl.float32)
    if TENSOR_CORES:
        result = tl.trans(total)
    else:
        result = tl.sum(total, axis=2)
    inside = (token < tokens)[:, None] & (row < rows)[None, :]
    tl.store(y + token[:, None] * rows + row[None, :], result.to(y.dtype.element_ty), mask=inside)


@triton.jit
def unpack(
    dense,
    values,
    code_scale,
    mask,
    signs,
    scale_in,
    scale_out,
    first_row,
    rows,
    columns,
    stride,
    groups,
    HAS_VALUES: tl.constexpr,
    HAS_MASK: tl.constexpr,
    BITS: tl.constexpr,
    GROUP: tl.constexpr,
    BINARY_RANK: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_BYTES: tl.constexpr,
):
    """The rows from `first_row` to `rows` in full, rounded to the dtype of `dense` (rows − first_row, columns)."""
    within = tl.program_id(0) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    row = first_row + within
    kept_before = tl.zeros((BLOCK_ROWS,), tl.int32)
    for first_byte in range(0, (columns + 7) // 8, BLOCK_BYTES):
        tile, kept_before = _tile(
            values,
            code_scale,
            mask,
            signs,
            scale_in,
            scale_out,
            kept_before,
            row,
            first_byte,
            rows,
            columns,
            stride,
            groups,
            HAS_VALUES,
            HAS_MASK,
            BITS,
            GROUP,
            BINARY_RANK,
            BLOCK_ROWS,
            BLOCK_BYTES,
        )
        column = first_byte * 8 + tl.arange(0, BLOCK_BYTES * 8)
        inside = (row < rows)[:, None] & (column < columns)[None, :]
        tl.store(dense + within.to(tl.int64)[:, None] * columns + column[None, :], tile.to(dense.dtype.element_ty), mask=inside)
