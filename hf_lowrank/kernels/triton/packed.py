"""Triton kernels for packed matrices: tiles expanded in registers from bitmaps, kept values or codes, and signs.

A program has `BLOCK_ROWS` rows, and of their columns `SPANS` spans of 1024 at a time, a word of a bitmap for 32 columns and each lane.
A span is multiplied by quarters: a tile (BLOCK_ROWS, SPANS, 256), eight columns to a lane, so that nothing moves between lanes and the
values that the lanes of a warp read lie together. Every row of a bitmask keeps the same number of values, so the values of row i begin
at i · kept; within a row they are found by counting the bits that come before. Nothing is precomputed and nothing waits for the host: the
same launch is right whatever the tensors hold, in a CUDA graph too.

Arguments that the kernels share: `values` (rows, kept) or, with `BITS`, packed codes of `stride` bytes per row and their scales
`code_scale` (rows, ⌈kept/GROUP⌉), see `runtime.quantization`; `mask` (rows, ⌈columns/8⌉), None where every column has a value; `signs`
(rows, ⌈columns/8⌉), `scale_in` (BINARY_RANK, columns) and `scale_out` (rows, BINARY_RANK). Bitmaps, and codes without a bitmap, come as
int32 where rows are made of whole words, else as bytes. `COMPILED` is False in Triton's interpreter, which takes no PTX.
"""

import triton
import triton.language as tl

from .bits import LANES, bytes_of, fetch_rows, kept_of_bytes, ones, side_by_side, sign_bits, words

SPAN: tl.constexpr = tl.constexpr(1024)
TILE: tl.constexpr = tl.constexpr(256)


@triton.jit
def _kept_values(values, code_scale, place, wanted, row, stride, groups, BITS: tl.constexpr, GROUP: tl.constexpr):
    """The stored values, float32, at a `place` in their rows; zeros where none is wanted."""
    if BITS == 0:
        kept = tl.load(values + row * stride + place, mask=wanted, other=0.0).to(tl.float32)
    else:
        byte = (place * BITS) >> 3
        code = tl.load(values + row * stride + byte, mask=wanted, other=0).to(tl.int32)
        if 8 % BITS != 0:  # a code may begin in one byte and end in the next
            code |= (
                tl.load(values + row * stride + byte + 1, mask=wanted & (byte + 1 < stride), other=0).to(tl.int32) << 8
            )
        code = (code >> ((place * BITS) & 7)) & (2**BITS - 1)
        scale = tl.load(code_scale + row * groups + place // GROUP, mask=wanted, other=0.0).to(tl.float32)
        kept = (code.to(tl.float32) - (2**BITS - 1) / 2) * scale
    return kept


@triton.jit
def _kept_tile(
    values,
    code_scale,
    place,
    byte,
    row,
    stride,
    groups,
    COMPILED: tl.constexpr,
    BITS: tl.constexpr,
    GROUP: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    SPANS: tl.constexpr,
):
    """A tile of the values kept where a bit of the bytes is set, the first of each byte at its `place`; zeros elsewhere."""
    if COMPILED and BITS == 0 and values.dtype.element_ty.primitive_bitwidth == 16:
        tile = kept_of_bytes(values, row * stride + place, byte, values.dtype.element_ty, BLOCK_ROWS, SPANS)
    else:
        columns = ()
        for bit in tl.static_range(8):
            wanted = (byte & (1 << bit)) != 0
            columns += (_kept_values(values, code_scale, place, wanted, row, stride, groups, BITS, GROUP),)
            place += (byte >> bit) & 1
        tile = side_by_side(columns, BLOCK_ROWS, SPANS)
    return tile


@triton.jit
def _coded_tile(
    values,
    code_scale,
    eighth,
    row,
    rows,
    columns,
    stride,
    groups,
    BITS: tl.constexpr,
    GROUP: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    SPANS: tl.constexpr,
):
    """A tile of codes that every column has one of; those of eight columns, the `eighth` ones, take `BITS` bytes."""
    inside = (row < rows) & (eighth * 8 < columns)
    codes = tl.zeros((BLOCK_ROWS, SPANS, LANES), tl.int64)
    if values.dtype.element_ty == tl.int32:
        for part in tl.static_range(BITS // 4):
            word = eighth * (BITS // 4) + part
            four = tl.load(values + row * (stride // 4) + word, mask=inside & (word * 4 < stride), other=0)
            codes |= (four.to(tl.int64) & 0xFFFFFFFF) << (32 * part)
    else:
        for part in tl.static_range(BITS):
            byte = eighth * BITS + part
            codes |= tl.load(values + row * stride + byte, mask=inside & (byte < stride), other=0).to(tl.int64) << (
                8 * part
            )
    if GROUP % 8 == 0:
        scale = tl.load(code_scale + row * groups + eighth * 8 // GROUP, mask=inside, other=0.0).to(tl.float32)
    entries = ()
    for column in tl.static_range(8):
        if GROUP % 8 != 0:
            group = (eighth * 8 + column) // GROUP
            scale = tl.load(code_scale + row * groups + group, mask=inside & (group < groups), other=0.0).to(
                tl.float32
            )
        code = ((codes >> (column * BITS)) & (2**BITS - 1)).to(tl.int32)
        entries += ((code.to(tl.float32) - (2**BITS - 1) / 2) * scale,)
    return side_by_side(entries, BLOCK_ROWS, SPANS)


@triton.jit
def _add_binary_tile(tile, positive, scale_in, scale_out, row, column, rows, columns, BINARY_RANK: tl.constexpr):
    """`tile` plus the entries of the binary part; the sign bits of `positive` are set where an entry is positive."""
    for b in tl.static_range(BINARY_RANK):
        of_columns = tl.load(scale_in + b * columns + column, mask=column < columns, other=0.0).to(tl.float32)
        of_rows = tl.load(scale_out + row * BINARY_RANK + b, mask=row < rows, other=0.0).to(tl.float32)
        signed = (positive ^ (-of_rows).to(tl.int32, bitcast=True)).to(tl.float32, bitcast=True)
        tile = tl.fma(signed, tl.broadcast_to(of_columns[None, :, :], tile.shape), tile)
    return tile


@triton.jit
def _sum(
    x,
    dense,
    layer,
    row,
    first_row,
    tokens,
    HAS_VALUES: tl.constexpr,
    HAS_MASK: tl.constexpr,
    BITS: tl.constexpr,
    GROUP: tl.constexpr,
    BINARY_RANK: tl.constexpr,
    COMPILED: tl.constexpr,
    TOKENS: tl.constexpr,
    TENSOR_CORES: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    SPANS: tl.constexpr,
):
    """Products (TOKENS, BLOCK_ROWS) with x, float32; with no x, the entries go to `dense` (…, columns), whose first row is `first_row`."""
    values, code_scale, mask, signs, scale_in, scale_out, rows, columns, stride, groups = layer
    row = row.to(tl.int64)[:, None, None]
    token = tl.arange(0, TOKENS)
    kept_before = tl.zeros((BLOCK_ROWS,), tl.int32)
    if TENSOR_CORES:
        total = tl.zeros((BLOCK_ROWS, TOKENS), tl.float32)
    elif TOKENS == 1:  # a sum of the tile's shape is laid out as the tile, one of more dimensions is not
        total = tl.zeros((BLOCK_ROWS, SPANS, TILE), tl.float32)
    else:
        total = tl.zeros((TOKENS, BLOCK_ROWS, SPANS, TILE), tl.float32)
    span = tl.arange(0, SPANS)
    for first_word in range(0, (columns + 31) // 32, SPANS * LANES):
        word = (first_word + span * LANES)[None, :, None] + tl.arange(0, LANES)[None, None, :]
        if HAS_MASK:
            kept = words(mask, row, word, rows, columns)
            count = ones(kept, COMPILED)
            up_to = tl.cumsum(tl.reshape(count, (BLOCK_ROWS, SPANS * LANES)), axis=1)
            before = kept_before[:, None, None] + tl.reshape(up_to, (BLOCK_ROWS, SPANS, LANES)) - count
            kept_before += tl.sum(tl.sum(count, axis=2), axis=1)
        if BINARY_RANK > 0:
            signs_of_words = words(signs, row, word, rows, columns)
        for quarter in range(4):
            column = (first_word * 32 + span * SPAN + quarter * TILE)[:, None] + tl.arange(0, TILE)[None, :]
            tile = tl.zeros((BLOCK_ROWS, SPANS, TILE), tl.float32)
            if HAS_MASK:
                bits, shift = bytes_of(kept, quarter, BLOCK_ROWS, SPANS)
                earlier, shift = bytes_of(before, quarter, BLOCK_ROWS, SPANS)
                place = earlier + ones(bits & ((1 << shift) - 1), COMPILED)
                tile = _kept_tile(
                    values,
                    code_scale,
                    place,
                    bits >> shift,
                    row,
                    stride,
                    groups,
                    COMPILED,
                    BITS,
                    GROUP,
                    BLOCK_ROWS,
                    SPANS,
                )
            elif HAS_VALUES:
                eighth = (first_word * 4 + span * (SPAN // 8) + quarter * LANES)[None, :, None] + tl.arange(0, LANES)[
                    None, None, :
                ]
                tile = _coded_tile(
                    values, code_scale, eighth, row, rows, columns, stride, groups, BITS, GROUP, BLOCK_ROWS, SPANS
                )
            if BINARY_RANK > 0:
                bits, shift = bytes_of(signs_of_words, quarter, BLOCK_ROWS, SPANS)
                positive = sign_bits(bits >> shift, BLOCK_ROWS, SPANS)
                tile = _add_binary_tile(tile, positive, scale_in, scale_out, row, column, rows, columns, BINARY_RANK)
            if x is None:
                inside = (row < rows) & (column < columns)[None, :, :]
                tl.store(
                    dense + (row - first_row) * columns + column[None, :, :],
                    tile.to(dense.dtype.element_ty),
                    mask=inside,
                )
            elif TENSOR_CORES:
                column = tl.reshape(column, (TILE,))
                wanted = (token < tokens)[:, None] & (column < columns)[None, :]
                inputs = tl.load(x + token[:, None] * columns + column[None, :], mask=wanted, other=0.0)
                entries = tl.reshape(tile, (BLOCK_ROWS, TILE)).to(inputs.dtype)
                total = tl.dot(entries, tl.trans(inputs), total, input_precision="ieee")
            elif TOKENS == 1:
                inputs = tl.load(x + column, mask=column < columns, other=0.0).to(tl.float32)
                total = tl.fma(tile, tl.broadcast_to(inputs[None, :, :], tile.shape), total)
            else:
                wanted = (token < tokens)[:, None, None] & (column < columns)[None, :, :]
                inputs = tl.load(x + token[:, None, None] * columns + column[None, :, :], mask=wanted, other=0.0).to(
                    tl.float32
                )
                entries = tl.broadcast_to(tile[None, :, :, :], total.shape)
                total = tl.fma(entries, tl.broadcast_to(inputs[:, None, :, :], total.shape), total)
    if TENSOR_CORES:
        products = tl.trans(total)
    elif TOKENS == 1:
        products = tl.sum(tl.sum(total, axis=2), axis=1)[None, :]
    else:
        products = tl.sum(tl.sum(total, axis=3), axis=2)
    return products


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
    COMPILED: tl.constexpr,
    TOKENS: tl.constexpr,
    TENSOR_CORES: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    SPANS: tl.constexpr,
    FETCHED: tl.constexpr,
):
    """y (tokens, rows) of x (tokens, columns), summed in float32; a program has `BLOCK_ROWS` rows and `TOKENS` ≥ tokens.

    With `TENSOR_CORES` the entries are rounded to the dtype of x, otherwise they stay in float32. With `FETCHED`, all that the program
    reads is asked for at once, before bits say where the values of a lane begin.
    """
    first_row = tl.program_id(0) * BLOCK_ROWS
    row = first_row + tl.arange(0, BLOCK_ROWS)
    if FETCHED and COMPILED:
        count = tl.minimum(rows - first_row, BLOCK_ROWS)
        if HAS_MASK:
            fetch_rows(mask, (columns + 7) // 8, first_row, count, SPANS * LANES)
        if HAS_VALUES:
            row_bytes = stride if BITS > 0 else stride * (values.dtype.element_ty.primitive_bitwidth // 8)
            fetch_rows(values, row_bytes, first_row, count, SPANS * LANES)
        if BINARY_RANK > 0:
            fetch_rows(signs, (columns + 7) // 8, first_row, count, SPANS * LANES)
    token = tl.arange(0, TOKENS)
    layer = (values, code_scale, mask, signs, scale_in, scale_out, rows, columns, stride, groups)
    products = _sum(
        x,
        None,
        layer,
        row,
        0,
        tokens,
        HAS_VALUES,
        HAS_MASK,
        BITS,
        GROUP,
        BINARY_RANK,
        COMPILED,
        TOKENS,
        TENSOR_CORES,
        BLOCK_ROWS,
        SPANS,
    )
    inside = (token < tokens)[:, None] & (row < rows)[None, :]
    tl.store(y + token[:, None] * rows + row[None, :], products.to(y.dtype.element_ty), mask=inside)


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
    COMPILED: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    SPANS: tl.constexpr,
):
    """The rows from `first_row` to `rows` in full, rounded to the dtype of `dense` (rows − first_row, columns)."""
    row = first_row + tl.program_id(0) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    layer = (values, code_scale, mask, signs, scale_in, scale_out, rows, columns, stride, groups)
    _sum(
        None,
        dense,
        layer,
        row,
        first_row,
        0,
        HAS_VALUES,
        HAS_MASK,
        BITS,
        GROUP,
        BINARY_RANK,
        COMPILED,
        1,
        False,
        BLOCK_ROWS,
        SPANS,
    )
