"""Scores, bins and their histogram by inline PTX, for score.py: binary mma where plain Triton has popcounts and ballots.

A chunk is 1024 tokens of two warps: 16 tokens a lane.
"""
import triton
import triton.language as tl

# One binary mma (m16n8k128) takes the signatures of 64 tokens as A: 16 rows of four words, of which each lane holds its own
# two. B has eight columns: two planes of weights for each of the four words, zero in the other three. So a lane's accumulators
# are the counts of its own two tokens.
#
# $0: the lane's part of B, from planes $1 and $2.
_MASKS = tl.constexpr("{ .reg .b32 lane, word, owner; .reg .pred p; mov.u32 lane, %laneid; and.b32 word, lane, 4; "
                      "setp.ne.u32 p, word, 0; selp.b32 $0, $2, $1, p; and.b32 word, lane, 3; shr.u32 owner, lane, 3; "
                      "setp.eq.u32 p, word, owner; selp.b32 $0, $0, 0, p; }")


# $0-1, $2-3: counts of the first and of the second plane in two tokens' words $8-9, where these agree with the signs $10
# (= $11), added to $4-5, $6-7.  $12 (= $13): the planes, as _MASKS gives them.
_COUNT = tl.constexpr("{ .reg .b32 x0, x1; lop3.b32 x0, $8, $10, 0, 0xC3; lop3.b32 x1, $9, $10, 0, 0xC3; "  # ~(a ^ b)
                      "mma.sync.aligned.m16n8k128.row.col.s32.b1.b1.s32.and.popc {$0, $2, $1, $3}, {x0, x1}, {$12}, "
                      "{$4, $6, $5, $7}; }")


@triton.jit
def _two_planes(words, signs, magnitudes, FIRST: tl.constexpr, P: tl.constexpr, W: tl.constexpr):
    """What planes FIRST and FIRST + 1, if there is one, add to the scores, in units of 1 << FIRST."""
    low = tl.zeros_like(words[0])
    high = low
    for w in tl.static_range(W):
        second = magnitudes[w][FIRST + 1] if FIRST + 1 < P else 0
        # differs by lane, though Triton takes it for a scalar
        masks = tl.inline_asm_elementwise(_MASKS, "=&r,r,r", [magnitudes[w][FIRST], second], dtype=tl.int32, is_pure=True,
                                          pack=1)
        low, high = tl.inline_asm_elementwise(_COUNT, "=&r,=&r,=&r,=&r" + ",r" * 10, [low, high, words[w], signs[w], masks],
                                              dtype=(tl.int32, tl.int32), is_pure=True, pack=2)
    return low + (high << 1) if FIRST + 1 < P else low


@triton.jit
def mma_scores(words, signs, magnitudes, P: tl.constexpr, W: tl.constexpr):
    """`score.portable_scores`."""
    score = _two_planes(words, signs, magnitudes, 0, P, W)
    for first in tl.static_range(2, P, 2):
        score += _two_planes(words, signs, magnitudes, first, P, W) << first
    return score


# $0: the bins of four tokens, as bytes.  $1-4: their scores in quarters of a bin; saturated to bytes, whose upper six bits are
# the bin.
_PACK = tl.constexpr("{ .reg .b32 x; cvt.pack.sat.u8.s32.b32 x, $4, $3, 0; cvt.pack.sat.u8.s32.b32 x, $2, $1, x; "
                     "shr.u32 x, x, 2; and.b32 $0, x, 0x3F3F3F3F; }")


@triton.jit
def packed_bins(score, total, SHIFT: tl.constexpr):
    """`score.portable_bins`, as uint8."""
    if SHIFT < 2:  # one IMAD: the shift as a product, and the sum
        byte = (score << (2 - SHIFT)) - ((total << (1 - SHIFT)) & (-1 << (2 - SHIFT)))
    else:
        byte = (score - total // 2) >> (SHIFT - 2)
    return tl.inline_asm_elementwise(_PACK, "=r,r,r,r,r", [byte], dtype=tl.uint8, is_pure=True, pack=4)


# A histogram of 64 bins is a product of two binary matrices, [8, tokens] and [tokens, 8]: one-hot upper three bits of each
# token's bin, and one-hot lower three. An m8n8k128 multiplies them for 64 tokens; each of its lanes supplies 16 tokens of a
# row of A and of a column of B. Every lane first transposes the bins of its own 16 tokens into three words, with an upper bit
# in the upper half of each byte and a lower bit in the lower half. By shuffles the lanes of an mma get the words of four lanes
# and compare them with their row's index. Which lane holds which tokens does not matter; accumulators stay put.

@triton.constexpr_function
def _histogram_code():
    """Bins $32-35 of sixteen tokens a lane. $0-15: a row's counts in two columns, eight times, of an eighth of the tokens each,
    added to $16-31.
    """
    lines = [".reg .b32 lane, x, y, u0, u1, v0, v1, w0, w1, w2, m0, m1, m2, r0, r1, r2, r3, a, b; mov.u32 lane, %laneid;"]
    # all ones where the bit of the lane's row is 0
    lines += [f"bfe.u32 m{bit}, lane, {2 + bit}, 1; sub.s32 m{bit}, m{bit}, 1;" for bit in range(3)]
    # the bin's upper bits go to the byte's upper half, the lower ones to the lower
    lines += [f"and.b32 x, ${32 + j}, 0x38383838; add.s32 r{j}, x, ${32 + j};" for j in range(4)]
    for even, odd, pair in (("u0", "u1", (0, 1)), ("v0", "v1", (2, 3))):  # a four by four transposition in every half byte
        lines += [f"shl.b32 y, r{pair[1]}, 1; lop3.b32 {even}, r{pair[0]}, y, 0x55555555, 0xE4; "
                  f"shr.u32 x, r{pair[0]}, 1; lop3.b32 {odd}, x, r{pair[1]}, 0x55555555, 0xE4;"]  # c ? a : b
    lines += ["shl.b32 y, v0, 2; lop3.b32 w0, u0, y, 0x33333333, 0xE4; shl.b32 y, v1, 2; lop3.b32 w1, u1, y, 0x33333333, 0xE4; "
              "shr.u32 x, u0, 2; lop3.b32 w2, x, v0, 0x33333333, 0xE4;"]
    for group in range(8):  # the words of four lanes: 64 tokens
        lines += [f"shfl.sync.idx.b32 r{bit}, w{bit}, {4 * group}, 0x31f, 0xffffffff;" for bit in range(3)]
        lines += ["xor.b32 a, r0, m0; lop3.b32 a, a, r1, m1, 0x60; lop3.b32 a, a, r2, m2, 0x60; "  # a & (b ^ c)
                  "and.b32 b, a, 0x0F0F0F0F; shr.u32 a, a, 4; "
                  f"mma.sync.aligned.m8n8k128.row.col.s32.b1.b1.s32.and.popc {{${2 * group}, ${2 * group + 1}}}, {{a}}, {{b}}, "
                  f"{{${16 + 2 * group}, ${17 + 2 * group}}};"]
    return "{ " + " ".join(lines) + " }"


@triton.constexpr_function
def _store_code(blocks):
    """Add the sums $16-31 of _histogram_code to the counts at $32, as _score_kernel describes them. $0-15, results that Triton
    demands, are unused."""
    lines = [".reg .b32 lane, row, column, even, odd, sum, other, shift; .reg .b64 at; .reg .pred p; mov.u32 lane, %laneid; "
             "shr.u32 row, lane, 2; and.b32 column, lane, 3; mov.b32 even, $16; mov.b32 odd, $17;"]
    lines += [f"add.s32 even, even, ${i}; add.s32 odd, odd, ${i + 1};" for i in range(18, 32, 2)]
    lines += ["add.s32 sum, even, odd;"]
    lines += [f"shfl.sync.down.b32 other|p, sum, {t}, 0x1c1f, 0xffffffff; @p add.s32 sum, sum, other;" for t in (1, 2)]
    lines += [f"mad.wide.u32 at, row, {16 * blocks}, $32; mad.wide.u32 at, column, 4, at; sub.s32 odd, sum, even; "
              f"mad.lo.s32 odd, odd, 65536, sum; red.relaxed.gpu.global.add.s32 [at + {16 * blocks}], odd;"]
    lines += [f"shfl.sync.down.b32 other|p, sum, {lane}, 0x1f, 0xffffffff; @p add.s32 sum, sum, other;" for lane in (4, 8, 16)]
    lines += ["setp.eq.u32 p, column, 0; and.b32 shift, lane, 4; shl.b32 shift, shift, 2; shl.b32 sum, sum, shift; "
              "shr.u32 row, lane, 3; mad.wide.u32 at, row, 4, $32; @p red.relaxed.gpu.global.add.s32 [at], sum; // $0\n"]
    return "{ " + " ".join(lines) + "}"


@triton.jit
def mma_histogram(sums, bins):
    """sums plus the histogram of bins [1024], from `packed_bins`.

    sums [1024], sixteen a lane: for `store_mma_histogram`. Their layout must not change on the way there.
    """
    registers: tl.constexpr = "=&r" + ",=&r" * 15 + ",0,1,2,3,4,5,6,7,8,9,10,11,12,13,14,15" + ",r" * 4
    return tl.inline_asm_elementwise(_histogram_code(), registers, [sums, bins], dtype=tl.int32, is_pure=True, pack=16)


@triton.jit
def store_mma_histogram(counts, sums, BLOCKS: tl.constexpr):
    """Add the sums of `mma_histogram` to a block's counts, as `_score_kernel` describes them."""
    tl.inline_asm_elementwise(_store_code(BLOCKS), "=r" + ",=r" * 15 + ",r" * 16 + ",l" * 16, [sums, counts.to(tl.int64)],
                              dtype=tl.int32, is_pure=False, pack=16)
