"""Bits of packed matrices, by the lane: words of 32 columns, bytes of eight, and the kept values of a byte.

A lane of a warp holds one word of a bitmap, or one byte of a word that it shares with three others. Where Triton's language has no
instruction for it, or its compiler needs a third more, this is PTX; the interpreter, which cannot run that, takes the plain form.
"""

import triton
import triton.language as tl

LANES: tl.constexpr = tl.constexpr(32)
SIGN: tl.constexpr = tl.constexpr(-(2**31))


def _ptx_of_kept_values() -> str:
    """The values (16 bits each, in the upper half of a register) of the set bits among eight, which lie one after the other; else zeros.

    Operands: eight results, the bits, the address of the first value.
    """
    lines = ["{ .reg .pred kept; .reg .b64 address, step; .reg .b32 bit; mov.b64 address, $9;"]
    for column in range(8):
        result = f"${column}"
        lines.append(f"and.b32 bit, $8, {1 << column}; setp.ne.u32 kept, bit, 0;")
        lines.append(f"mov.b32 {result}, 0; @kept ld.global.u16 {result}, [address]; shl.b32 {result}, {result}, 16;")
        twice = (
            "shl.b32 bit, bit, 1;" if column == 0 else f"shr.u32 bit, bit, {column - 1};"
        )  # two bytes if the bit is set
        lines.append(f"{twice} cvt.u64.u32 step, bit; add.u64 address, address, step;")
    return "\n".join([*lines, "}"])


PTX_OF_KEPT_VALUES: tl.constexpr = tl.constexpr(_ptx_of_kept_values())
EIGHT_RESULTS: tl.constexpr = tl.constexpr("=&r,=&r,=&r,=&r,=&r,=&r,=&r,=&r,r,l")


@triton.jit
def words(bitmap, row, word, rows, columns):
    """32 bits each of a `bitmap` (rows, ⌈columns/8⌉), given as whole words or as bytes; zeros beyond the matrix."""
    width = (columns + 7) // 8
    if bitmap.dtype.element_ty == tl.int32:
        bits = tl.load(bitmap + row * (width // 4) + word, mask=(row < rows) & (word * 4 < width), other=0)
    else:
        inside = (row < rows) & (word * 4 < width)
        bits = tl.load(bitmap + row * width + word * 4, mask=inside, other=0).to(tl.int32)
        for byte in tl.static_range(1, 4):
            inside = (row < rows) & (word * 4 + byte < width)
            bits |= tl.load(bitmap + row * width + word * 4 + byte, mask=inside, other=0).to(tl.int32) << (8 * byte)
    return bits


@triton.jit
def ones(word, COMPILED: tl.constexpr):
    """Number of set bits of 32."""
    if COMPILED:
        count = tl.inline_asm_elementwise("popc.b32 $0, $1;", "=r,r", [word], dtype=tl.int32, is_pure=True, pack=1)
    else:
        pairs = word - ((word >> 1) & 0x55555555)
        nibbles = (pairs & 0x33333333) + ((pairs >> 2) & 0x33333333)
        of_bytes = (nibbles + (nibbles >> 4)) & 0x0F0F0F0F
        count = (of_bytes + (of_bytes >> 8) + (of_bytes >> 16) + (of_bytes >> 24)) & 0x3F
    return count


@triton.jit
def bytes_of(word, quarter, BLOCK_ROWS: tl.constexpr, SPANS: tl.constexpr):
    """Of each span of 32 words, the eight in one `quarter`, four lanes to a word: the word, and which bit of it the lane begins at."""
    lane = tl.arange(0, LANES)
    holder = tl.broadcast_to((quarter * 8 + lane // 4)[None, None, :], (BLOCK_ROWS, SPANS, LANES))
    return tl.gather(word, holder, 2), ((lane % 4) * 8)[None, None, :]


@triton.jit
def side_by_side(columns, BLOCK_ROWS: tl.constexpr, SPANS: tl.constexpr):
    """The eight columns of each lane as a tile (BLOCK_ROWS, SPANS, 256); nothing moves between lanes."""
    c0, c1, c2, c3, c4, c5, c6, c7 = columns
    even = tl.join(tl.join(c0, c4), tl.join(c2, c6))
    odd = tl.join(tl.join(c1, c5), tl.join(c3, c7))
    return tl.reshape(tl.join(even, odd), (BLOCK_ROWS, SPANS, LANES * 8))


@triton.jit
def sign_bits(byte, BLOCK_ROWS: tl.constexpr, SPANS: tl.constexpr):
    """Each of the eight lowest bits in the place of a float32's sign, a tile of int32."""
    bits = ()
    for bit in tl.static_range(8):
        bits += ((byte << (31 - bit)) & SIGN,)
    return side_by_side(bits, BLOCK_ROWS, SPANS)


@triton.jit
def kept_of_bytes(values, place, byte, dtype: tl.constexpr, BLOCK_ROWS: tl.constexpr, SPANS: tl.constexpr):
    """The values of 16 bits of the set bits of each byte, the first of which is at `place`, and zeros; a tile of float32."""
    columns = tl.inline_asm_elementwise(
        PTX_OF_KEPT_VALUES,
        EIGHT_RESULTS,
        [byte, values + place],
        dtype=(tl.int32, tl.int32, tl.int32, tl.int32, tl.int32, tl.int32, tl.int32, tl.int32),
        is_pure=True,
        pack=1,
    )
    upper = side_by_side(columns, BLOCK_ROWS, SPANS)
    if dtype == tl.bfloat16:
        tile = upper.to(tl.float32, bitcast=True)
    else:
        tile = (upper >> 16).to(tl.int16).to(dtype, bitcast=True).to(tl.float32)
    return tile


@triton.jit
def fetch_rows(packed, row_bytes, first_row, count, LINES: tl.constexpr):
    """Have `count` rows of a packed matrix brought into the second cache, 128 bytes at a time; not for the interpreter."""
    start = packed.to(tl.pointer_type(tl.uint8), bitcast=True) + first_row.to(tl.int64) * row_bytes
    size = count * row_bytes
    for first in range(0, size, LINES * 128):
        line = start + tl.minimum(first + tl.arange(0, LINES) * 128, size - 1)
        tl.inline_asm_elementwise(
            "prefetch.global.L2 [$1]; mov.b32 $0, 0;", "=r,l", [line], dtype=tl.int32, is_pure=False, pack=1
        )
