"""Triton kernels for packed matrices: tiles expanded in registers from bitmaps, kept values or codes, and signs.

A program has `BLOCK_ROWS` rows. Of their columns it takes `SPANS` spans of 1024 at a time, which give each lane of a
warp a word of a bitmap, 32 columns. A span is multiplied by quarters: a tile is (BLOCK_ROWS, SPANS, 256), with eight
columns to a lane, so that nothing moves between lanes and the values that the lanes of a warp read lie together.

Every row of a bitmask keeps the same number of values, so that the values of row i begin at i · kept. Within a row a
value is found by counting the bits before it. Nothing is precomputed and nothing waits for the host: one launch is
right whatever the tensors hold, also in a CUDA graph.

Arguments that the kernels share:

- `values` (rows, kept) or, with `BITS`, packed codes of `stride` bytes per row, see `runtime.quantization`;
- `code_scale` (rows, ⌈kept/GROUP⌉), the scales of codes;
- `mask` (rows, ⌈columns/8⌉), the bitmap of the kept values; None where every column has a value;
- `signs` (rows, ⌈columns/8⌉), `scale_in` (BINARY_RANK, columns) and `scale_out` (rows, BINARY_RANK), the binary part;
- `COMPILED`, which is False in Triton's interpreter, as that takes no PTX.

Bitmaps, and codes without a bitmap, come as int32 where rows are made of whole words, otherwise as bytes.
"""

import triton
import triton.language as tl

from .bits import LANES, bytes_of, fetch_rows, kept_of_bytes, ones, side_by_side, sign_bits, words

SPAN: tl.constexpr = tl.constexpr(1024)
"""Columns of a span: 32 lanes times 32 bits."""
TILE: tl.constexpr = tl.constexpr(256)
"""Columns of a tile in each span: a quarter of it, eight columns to a lane."""


@triton.jit
def _level(code, BITS: tl.constexpr):
    """Return the number that a code stands for before it is scaled: the levels are centered on zero."""
    return code.to(tl.float32) - (2**BITS - 1) / 2


@triton.jit
def _kept_values(values, code_scale, place, is_kept, row, stride, groups, BITS: tl.constexpr, GROUP: tl.constexpr):
    """Return the stored values, float32, at a `place` in their rows, and zeros where no value is kept."""
    if BITS == 0:
        kept = tl.load(values + row * stride + place, mask=is_kept, other=0.0).to(tl.float32)
    else:
        byte = (place * BITS) >> 3
        code = tl.load(values + row * stride + byte, mask=is_kept, other=0).to(tl.int32)
        if 8 % BITS != 0:  # a code may begin in one byte and end in the next
            has_next = is_kept & (byte + 1 < stride)
            code |= tl.load(values + row * stride + byte + 1, mask=has_next, other=0).to(tl.int32) << 8
        code = (code >> ((place * BITS) & 7)) & (2**BITS - 1)
        scale = tl.load(code_scale + row * groups + place // GROUP, mask=is_kept, other=0.0).to(tl.float32)
        kept = _level(code, BITS) * scale
    return kept


@triton.jit
def _kept_tile(
    values,
    code_scale,
    kept_bits,
    values_before,
    quarter,
    row,
    stride,
    groups,
    COMPILED: tl.constexpr,
    BITS: tl.constexpr,
    GROUP: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    SPANS: tl.constexpr,
):
    """Return the tile of one quarter of a matrix with a bitmap: its kept values, and zeros elsewhere.

    `kept_bits` are the words of the bitmap, `values_before` the number of values that lie before each word in its row.
    """
    bits, shift = bytes_of(kept_bits, quarter, BLOCK_ROWS, SPANS)
    # A byte's first value comes after those of the words before its word, and of the bits before it in the word.
    before_word, shift = bytes_of(values_before, quarter, BLOCK_ROWS, SPANS)
    place = before_word + ones(bits & ((1 << shift) - 1), COMPILED)
    byte = bits >> shift
    if COMPILED and BITS == 0 and values.dtype.element_ty.primitive_bitwidth == 16:
        tile = kept_of_bytes(values, row * stride + place, byte, values.dtype.element_ty, BLOCK_ROWS, SPANS)
    else:
        columns = ()
        for bit in tl.static_range(8):
            is_kept = (byte & (1 << bit)) != 0
            columns += (_kept_values(values, code_scale, place, is_kept, row, stride, groups, BITS, GROUP),)
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
    """Return a tile of a matrix that has a code in every column.

    A lane has eight columns, those from 8 · `eighth` on, whose codes are `BITS` bytes.
    """
    inside = (row < rows) & (eighth * 8 < columns)
    codes = tl.zeros((BLOCK_ROWS, SPANS, LANES), tl.int64)
    if values.dtype.element_ty == tl.int32:
        for part in tl.static_range(BITS // 4):
            word = eighth * (BITS // 4) + part
            four_bytes = tl.load(values + row * (stride // 4) + word, mask=inside & (word * 4 < stride), other=0)
            codes |= (four_bytes.to(tl.int64) & 0xFFFFFFFF) << (32 * part)
    else:
        for part in tl.static_range(BITS):
            byte = eighth * BITS + part
            one_byte = tl.load(values + row * stride + byte, mask=inside & (byte < stride), other=0)
            codes |= one_byte.to(tl.int64) << (8 * part)
    if GROUP % 8 == 0:  # the eight columns share a scale
        scale = tl.load(code_scale + row * groups + eighth * 8 // GROUP, mask=inside, other=0.0).to(tl.float32)
    entries = ()
    for column in tl.static_range(8):
        if GROUP % 8 != 0:
            group = (eighth * 8 + column) // GROUP
            in_row = inside & (group < groups)
            scale = tl.load(code_scale + row * groups + group, mask=in_row, other=0.0).to(tl.float32)
        code = ((codes >> (column * BITS)) & (2**BITS - 1)).to(tl.int32)
        entries += (_level(code, BITS) * scale,)
    return side_by_side(entries, BLOCK_ROWS, SPANS)


@triton.jit
def _add_binary_tile(tile, positive, scale_in, scale_out, row, column, rows, columns, BINARY_RANK: tl.constexpr):
    """Return `tile` plus the entries of the binary part.

    `positive` is an int32 for each entry that has only its sign bit, set where the entry is positive.
    """
    for b in tl.static_range(BINARY_RANK):
        column_scale = tl.load(scale_in + b * columns + column, mask=column < columns, other=0.0).to(tl.float32)
        row_scale = tl.load(scale_out + row * BINARY_RANK + b, mask=row < rows, other=0.0).to(tl.float32)
        # The exclusive or changes the sign of the scale where the bit is set. That must give +, so it is negated
        # first.
        signed = (positive ^ (-row_scale).to(tl.int32, bitcast=True)).to(tl.float32, bitcast=True)
        tile = tl.fma(signed, tl.broadcast_to(column_scale[None, :, :], tile.shape), tile)
    return tile


@triton.jit
def _store_tile(dense, tile, row, first_row, rows, column, columns):
    """Store the entries of a tile in `dense` (…, columns), whose first row is `first_row`."""
    inside = (row < rows) & (column < columns)[None, :, :]
    place = (row - first_row) * columns + column[None, :, :]
    tl.store(dense + place, tile.to(dense.dtype.element_ty), mask=inside)


@triton.jit
def _no_sum(TOKENS: tl.constexpr, TENSOR_CORES: tl.constexpr, BLOCK_ROWS: tl.constexpr, SPANS: tl.constexpr):
    """Return zeros in the shape in which `_add_product` sums."""
    if TENSOR_CORES:
        total = tl.zeros((BLOCK_ROWS, TOKENS), tl.float32)
    elif TOKENS == 1:  # a sum of the tile's shape is laid out as the tile, one of more dimensions is not
        total = tl.zeros((BLOCK_ROWS, SPANS, TILE), tl.float32)
    else:
        total = tl.zeros((TOKENS, BLOCK_ROWS, SPANS, TILE), tl.float32)
    return total


@triton.jit
def _add_product(
    total,
    tile,
    x,
    column,
    tokens,
    columns,
    TOKENS: tl.constexpr,
    TENSOR_CORES: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
):
    """Return `total` plus the products of a tile with its columns of x (tokens, columns)."""
    token = tl.arange(0, TOKENS)
    if TENSOR_CORES:  # a single span, so that a tile is a matrix
        tile_column = tl.reshape(column, (TILE,))
        inside = (token < tokens)[:, None] & (tile_column < columns)[None, :]
        inputs = tl.load(x + token[:, None] * columns + tile_column[None, :], mask=inside, other=0.0)
        entries = tl.reshape(tile, (BLOCK_ROWS, TILE)).to(inputs.dtype)
        total = tl.dot(entries, tl.trans(inputs), total, input_precision="ieee")
    elif TOKENS == 1:
        inputs = tl.load(x + column, mask=column < columns, other=0.0).to(tl.float32)
        total = tl.fma(tile, tl.broadcast_to(inputs[None, :, :], tile.shape), total)
    else:
        inside = (token < tokens)[:, None, None] & (column < columns)[None, :, :]
        place = token[:, None, None] * columns + column[None, :, :]
        inputs = tl.load(x + place, mask=inside, other=0.0).to(tl.float32)
        entries = tl.broadcast_to(tile[None, :, :, :], total.shape)
        total = tl.fma(entries, tl.broadcast_to(inputs[:, None, :, :], total.shape), total)
    return total


@triton.jit
def _products_of_sum(total, TOKENS: tl.constexpr, TENSOR_CORES: tl.constexpr):
    """Return products (TOKENS, BLOCK_ROWS) of what `_add_product` has summed."""
    if TENSOR_CORES:
        products = tl.trans(total)
    elif TOKENS == 1:
        products = tl.sum(tl.sum(total, axis=2), axis=1)[None, :]
    else:
        products = tl.sum(tl.sum(total, axis=3), axis=2)
    return products


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
    """Return products (TOKENS, BLOCK_ROWS) with x, float32.

    Without x, the entries of the matrix go to `dense` (…, columns) instead, whose first row is `first_row`.
    """
    values, code_scale, mask, signs, scale_in, scale_out, rows, columns, stride, groups = layer
    row = row.to(tl.int64)[:, None, None]  # positions in a matrix of values may need more than 32 bits
    kept_before = tl.zeros((BLOCK_ROWS,), tl.int32)  # values of each row in the words that were passed
    total = _no_sum(TOKENS, TENSOR_CORES, BLOCK_ROWS, SPANS)
    span = tl.arange(0, SPANS)
    lane = tl.arange(0, LANES)[None, None, :]
    for first_word in range(0, (columns + 31) // 32, SPANS * LANES):
        word = (first_word + span * LANES)[None, :, None] + lane
        if HAS_MASK:  # a word's values begin after those of the passes before, and of the words before it in this one
            kept_bits = words(mask, row, word, rows, columns)
            count = ones(kept_bits, COMPILED)
            up_to = tl.cumsum(tl.reshape(count, (BLOCK_ROWS, SPANS * LANES)), axis=1)
            values_before = kept_before[:, None, None] + tl.reshape(up_to, (BLOCK_ROWS, SPANS, LANES)) - count
            kept_before += tl.sum(tl.sum(count, axis=2), axis=1)
        if BINARY_RANK > 0:
            sign_words = words(signs, row, word, rows, columns)
        for quarter in range(4):
            column = (first_word * 32 + span * SPAN + quarter * TILE)[:, None] + tl.arange(0, TILE)[None, :]
            tile = tl.zeros((BLOCK_ROWS, SPANS, TILE), tl.float32)
            if HAS_MASK:
                tile = _kept_tile(
                    values, code_scale, kept_bits, values_before, quarter, row, stride, groups,
                    COMPILED, BITS, GROUP, BLOCK_ROWS, SPANS,
                )  # fmt: skip
            elif HAS_VALUES:
                eighth = (first_word * 4 + span * (SPAN // 8) + quarter * LANES)[None, :, None] + lane
                tile = _coded_tile(
                    values, code_scale, eighth, row, rows, columns, stride, groups, BITS, GROUP, BLOCK_ROWS, SPANS
                )
            if BINARY_RANK > 0:
                bits, shift = bytes_of(sign_words, quarter, BLOCK_ROWS, SPANS)
                positive = sign_bits(bits >> shift, BLOCK_ROWS, SPANS)
                tile = _add_binary_tile(tile, positive, scale_in, scale_out, row, column, rows, columns, BINARY_RANK)
            if x is None:
                _store_tile(dense, tile, row, first_row, rows, column, columns)
            else:
                total = _add_product(total, tile, x, column, tokens, columns, TOKENS, TENSOR_CORES, BLOCK_ROWS)
    return _products_of_sum(total, TOKENS, TENSOR_CORES)


# Not specialized: one program serves every number of tokens, so that a captured graph meets no new one.
@triton.jit(do_not_specialize=["tokens"])
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
    """Compute y (tokens, rows) of x (tokens, columns), summed in float32.

    A program has `BLOCK_ROWS` rows and `TOKENS` ≥ tokens. With `TENSOR_CORES` the entries are rounded to the dtype of
    x, otherwise they stay in float32. With `FETCHED`, everything that the program reads is prefetched at once, before
    bits say where the values of a lane begin.
    """
    first_row = tl.program_id(0) * BLOCK_ROWS
    row = first_row + tl.arange(0, BLOCK_ROWS)
    if FETCHED and COMPILED:
        # The last program may have fewer rows.
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
        x, None, layer, row, 0, tokens, HAS_VALUES, HAS_MASK, BITS, GROUP, BINARY_RANK,
        COMPILED, TOKENS, TENSOR_CORES, BLOCK_ROWS, SPANS,
    )  # fmt: skip
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
    """Unpack the rows from `first_row` to `rows` into `dense` (rows − first_row, columns), rounded to its dtype."""
    row = first_row + tl.program_id(0) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    layer = (values, code_scale, mask, signs, scale_in, scale_out, rows, columns, stride, groups)
    # One token and no tensor cores: without x, neither matters.
    _sum(
        None, dense, layer, row, first_row, 0, HAS_VALUES, HAS_MASK, BITS, GROUP, BINARY_RANK,
        COMPILED, 1, False, BLOCK_ROWS, SPANS,
    )  # fmt: skip
