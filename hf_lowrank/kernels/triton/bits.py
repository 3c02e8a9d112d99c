"""Bits of packed matrices, by the lane: words of 32 columns, bytes of eight, and the kept values of a byte.

A lane of a warp holds one word of a bitmap, or one byte of a word that it shares with three others. A step is written
in PTX where Triton's language has no instruction for it, or where its compiler makes a third more instructions of it.
Triton's interpreter cannot run PTX and takes the plain form.
"""

import triton
import triton.language as tl

LANES: tl.constexpr = tl.constexpr(32)
"""Threads of a warp."""
SIGN: tl.constexpr = tl.constexpr(-(2**31))
"""The sign bit of a float32, as an int32."""


def _ptx_of_kept_values() -> str:
    """Return PTX that loads a 16-bit value for each set bit of a byte, and zeros for its clear bits.

    The values lie next to each other in memory. Each is left in the upper half of its register. The operands are eight
    results ($0 to $7), the bits ($8) and the address of the first value ($9).
    """
    lines = ["{ .reg .pred kept; .reg .b64 address, step; .reg .b32 bit; mov.b64 address, $9;"]
    for column in range(8):
        result = f"${column}"
        lines.append(f"and.b32 bit, $8, {1 << column}; setp.ne.u32 kept, bit, 0;")
        lines.append(f"mov.b32 {result}, 0; @kept ld.global.u16 {result}, [address]; shl.b32 {result}, {result}, 16;")
        # `bit` is 2 ** column or zero. Shifted to 2 or zero, it is the number of bytes to the next value.
        if column == 0:
            shift = "shl.b32 bit, bit, 1;"
        else:
            shift = f"shr.u32 bit, bit, {column - 1};"
        lines.append(f"{shift} cvt.u64.u32 step, bit; add.u64 address, address, step;")
    return "\n".join([*lines, "}"])


PTX_OF_KEPT_VALUES: tl.constexpr = tl.constexpr(_ptx_of_kept_values())
EIGHT_RESULTS: tl.constexpr = tl.constexpr("=&r,=&r,=&r,=&r,=&r,=&r,=&r,=&r,r,l")
"""Constraints of its operands. `&`: results are written before all inputs are read, and share no register with one."""


@triton.jit
def words(bitmap, row, word, rows, columns):
    """Return words of a `bitmap` (rows, ⌈columns/8⌉) of int32 or bytes. Beyond the matrix they are zero."""
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
    """Return the number of set bits of each word."""
    if COMPILED:
        count = tl.inline_asm_elementwise("popc.b32 $0, $1;", "=r,r", [word], dtype=tl.int32, is_pure=True, pack=1)
    else:  # counts in pairs of bits, added to counts in nibbles, then in bytes, then in the word
        pairs = word - ((word >> 1) & 0x55555555)
        nibbles = (pairs & 0x33333333) + ((pairs >> 2) & 0x33333333)
        octets = (nibbles + (nibbles >> 4)) & 0x0F0F0F0F
        count = (octets + (octets >> 8) + (octets >> 16) + (octets >> 24)) & 0x3F
    return count


@triton.jit
def bytes_of(word, quarter, BLOCK_ROWS: tl.constexpr, SPANS: tl.constexpr):
    """Give four lanes to each of the eight words of one `quarter` of every span of 32 words.

    Returns the word of each lane, and the bit of it that the lane's eight columns begin at.
    """
    lane = tl.arange(0, LANES)
    holder = tl.broadcast_to((quarter * 8 + lane // 4)[None, None, :], (BLOCK_ROWS, SPANS, LANES))
    return tl.gather(word, holder, 2), ((lane % 4) * 8)[None, None, :]


@triton.jit
def side_by_side(columns, BLOCK_ROWS: tl.constexpr, SPANS: tl.constexpr):
    """Return the eight columns of each lane as a tile (BLOCK_ROWS, SPANS, 256). Nothing moves between lanes."""
    # The last `join` is the fastest dimension: this order of joins puts columns 0 to 7 next to each other.
    c0, c1, c2, c3, c4, c5, c6, c7 = columns
    even = tl.join(tl.join(c0, c4), tl.join(c2, c6))
    odd = tl.join(tl.join(c1, c5), tl.join(c3, c7))
    return tl.reshape(tl.join(even, odd), (BLOCK_ROWS, SPANS, LANES * 8))


@triton.jit
def sign_bits(byte, BLOCK_ROWS: tl.constexpr, SPANS: tl.constexpr):
    """Return a tile of int32 that has each of the eight lowest bits in the place of a float32's sign."""
    bits = ()
    for bit in tl.static_range(8):
        bits += ((byte << (31 - bit)) & SIGN,)
    return side_by_side(bits, BLOCK_ROWS, SPANS)


@triton.jit
def kept_of_bytes(values, place, byte, dtype: tl.constexpr, BLOCK_ROWS: tl.constexpr, SPANS: tl.constexpr):
    """Return a tile of float32: 16-bit values for the set bits of bytes, from each byte's `place` on, and zeros."""
    columns = tl.inline_asm_elementwise(
        PTX_OF_KEPT_VALUES,
        EIGHT_RESULTS,
        [byte, values + place],
        dtype=(tl.int32, tl.int32, tl.int32, tl.int32, tl.int32, tl.int32, tl.int32, tl.int32),
        is_pure=True,
        pack=1,
    )
    upper = side_by_side(columns, BLOCK_ROWS, SPANS)
    if dtype == tl.bfloat16:  # a bfloat16 is the upper half of a float32
        tile = upper.to(tl.float32, bitcast=True)
    else:
        tile = (upper >> 16).to(tl.int16).to(dtype, bitcast=True).to(tl.float32)
    return tile


@triton.jit
def fetch_rows(packed, row_bytes, first_row, count, LINES: tl.constexpr):
    """Prefetch `count` rows of a packed matrix into the second-level cache, 128 bytes at a time. This is PTX only."""
    start = packed.to(tl.pointer_type(tl.uint8), bitcast=True) + first_row.to(tl.int64) * row_bytes
    size = count * row_bytes
    for first in range(0, size, LINES * 128):
        line = start + tl.minimum(first + tl.arange(0, LINES) * 128, size - 1)
        tl.inline_asm_elementwise(
            "prefetch.global.L2 [$1]; mov.b32 $0, 0;", "=r,l", [line], dtype=tl.int32, is_pure=False, pack=1
        )
