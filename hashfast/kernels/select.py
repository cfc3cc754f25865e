"""Triton kernels of selection. hash_attention.py holds the definition (`*_reference`) and the symbols used here.

select_tokens   score and count all tokens, write the positions of the best   two kernels

encode_kernels.py holds what goes before and sparse_kernels.py what follows. The functions of these files are torch.library
custom ops: torch.compile(fullgraph=True) keeps each whole, and a CUDA graph can capture it, for nothing here waits for the
device: shapes are static and lengths are read on the device. With TRITON_INTERPRET=1 set before triton is imported, the same
functions run on CPU tensors.

The kernels of a step are short, so the time between them counts: on Hopper and later each is launched while the one before
still runs (programmatic dependent launch) and waits for its results with `pdl_wait`.
"""
import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.language.extra import libdevice

from hashfast.kernels.launch import DEPENDENT_LAUNCH, INTERPRETED, balanced_splits, checked_rows, pdl_wait

_CHUNK = tl.constexpr(1024)  # tokens scored, then compacted, at a time: by two warps, 16 a lane, then by one, 32 a lane


def _blocks_per_row(rows: int, S: int, recent: int) -> int:
    """Blocks of whole chunks that both kernels of selection divide a row into."""
    # the limits lie between powers of two: a cache has some tokens more than the context it is made for
    millions = rows * S / 2 ** 20
    programs = 256 if millions < 0.75 else 512 if millions < 1.5 else 1024 if millions < 12 else 4096
    chunks = max(1, triton.cdiv(S - recent, _CHUNK.value))  # the last tokens do not compete
    n_blocks = min(balanced_splits(chunks, programs // rows), 256)  # the second kernel reads the counts of all
    return max(n_blocks, triton.cdiv(S, 63 * _CHUNK.value))  # a count has 16 bits


# Where selection has to ask for more keys, it takes longer by what attention gains, or more (on an H200).
_PREFETCH_BYTES = 12 * 2 ** 20
_BINS = tl.constexpr(64)  # the histogram's 8 x 8


# ----------------------------------------------------------------------------------------------------------------- select

@triton.jit
def _popcount(x):
    if INTERPRETED:  # has no libdevice
        x = x.to(tl.uint32, bitcast=True)
        x = x - ((x >> 1) & 0x55555555)
        x = (x & 0x33333333) + ((x >> 2) & 0x33333333)
        x = (x + (x >> 4)) & 0x0F0F0F0F
        x = x + (x >> 8)
        return ((x + (x >> 16)) & 0x3F).to(tl.int32)
    else:
        return libdevice.popc(x)


# The tensor cores count bits too. One mma takes the signatures of 64 tokens as 16 rows of four words, of which each lane has
# its own two, and multiplies them by eight columns: two planes of weights for each of the four words, zero where the other
# three are. So a lane gets back the counts of its own two tokens.
#
# $0: what the lane has of the columns, from planes $1 and $2.
_MASKS = tl.constexpr("{ .reg .b32 lane, word, owner; .reg .pred p; mov.u32 lane, %laneid; and.b32 word, lane, 4; "
                      "setp.ne.u32 p, word, 0; selp.b32 $0, $2, $1, p; and.b32 word, lane, 3; shr.u32 owner, lane, 3; "
                      "setp.eq.u32 p, word, owner; selp.b32 $0, $0, 0, p; }")


# Planes of the weights, two by two: $0-1 and $2-3 are what each counts in two tokens' words, $8-9, where they agree with $10,
# which $11 repeats. Before: $4-5, $6-7.  $12, which $13 repeats: the planes, as _MASKS gives them.
_COUNT = tl.constexpr("{ .reg .b32 x0, x1; lop3.b32 x0, $8, $10, 0, 0xC3; lop3.b32 x1, $9, $10, 0, 0xC3; "  # ~(a ^ b)
                      "mma.sync.aligned.m16n8k128.row.col.s32.b1.b1.s32.and.popc {$0, $2, $1, $3}, {x0, x1}, {$12}, "
                      "{$4, $6, $5, $7}; }")


@triton.jit
def _weigh(words, signs, magnitudes, FIRST: tl.constexpr, P: tl.constexpr, W: tl.constexpr):
    """What planes FIRST and FIRST + 1, if there is one, add to the scores, in units of 1 << FIRST."""
    low = tl.zeros_like(words[0])
    high = low
    for w in tl.static_range(W):
        second = magnitudes[w][FIRST + 1] if FIRST + 1 < P else 0
        # differs by lane, though Triton takes it for one number
        masks = tl.inline_asm_elementwise(_MASKS, "=&r,r,r", [magnitudes[w][FIRST], second], dtype=tl.int32, is_pure=True,
                                          pack=1)
        low, high = tl.inline_asm_elementwise(_COUNT, "=&r,=&r,=&r,=&r" + ",r" * 10, [low, high, words[w], signs[w], masks],
                                              dtype=(tl.int32, tl.int32), is_pure=True, pack=2)
    return low + (high << 1) if FIRST + 1 < P else low


@triton.jit
def _scores(words, signs, magnitudes, P: tl.constexpr, W: tl.constexpr):
    """[N]: the summed weights of the bits where words W x [N] and signs agree. magnitudes: W x P planes of them."""
    if INTERPRETED:
        score = tl.zeros_like(words[0])
        for w in tl.static_range(W):
            for p in tl.static_range(P):
                score += _popcount(~(words[w] ^ signs[w]) & magnitudes[w][p]) << p
    else:
        score = _weigh(words, signs, magnitudes, 0, P, W)
        for first in tl.static_range(2, P, 2):
            score += _weigh(words, signs, magnitudes, first, P, W) << first
    return score


# $0: the bins of four tokens, as bytes.  $1-4: their scores, shifted so that 4 make a bin; saturated to bytes, whose upper six
# bits are the bin.
_PACK = tl.constexpr("{ .reg .b32 x; cvt.pack.sat.u8.s32.b32 x, $4, $3, 0; cvt.pack.sat.u8.s32.b32 x, $2, $1, x; "
                     "shr.u32 x, x, 2; and.b32 $0, x, 0x3F3F3F3F; }")


@triton.jit
def _bins(score, total, SHIFT: tl.constexpr):
    """uint8: the bin of each score, clamp((score - total // 2) >> SHIFT, 0, 63)."""
    if INTERPRETED:
        bins = tl.minimum(tl.maximum((score - total // 2) >> SHIFT, 0), _BINS - 1).to(tl.uint8)
    else:
        if SHIFT < 2:  # a multiplication and the addition in one instruction
            byte = (score << (2 - SHIFT)) - ((total << (1 - SHIFT)) & (-1 << (2 - SHIFT)))
        else:
            byte = (score - total // 2) >> (SHIFT - 2)
        bins = tl.inline_asm_elementwise(_PACK, "=r,r,r,r,r", [byte], dtype=tl.uint8, is_pure=True, pack=4)
    return bins


# A histogram of 64 bins is a product of two matrices of bits, [8, tokens] and [tokens, 8]: has a token's bin these upper three
# bits, and these lower three? An mma multiplies them for 64 tokens; each of its lanes gives, for one row and the same column,
# the answers for 16. Every lane first turns the bins of its own 16 tokens into three words, with one of the upper bits in the
# upper half of each byte and one of the lower bits in the lower half. An mma's lanes get the words of four lanes and compare
# them with the number of their row. Which lane has which tokens does not matter; the sums stay in the lane that has them.

@triton.constexpr_function
def _histogram_code():
    """Of sixteen tokens a lane, whose bins are $32-35. $0-15: a row's counts in two columns, eight times, of an eighth of the
    tokens each; before: $16-31.
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
    """Add what _histogram_code counted, $16-31, to the counts at $32, as _score_kernel describes them. $0-15, which Triton asks
    for, are of no use."""
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
def _add_histogram(sums, bins):
    """sums with bins [_CHUNK], as `_bins` gives them, counted as well.

    sums [_CHUNK], sixteen a lane: for `_store_histogram`. Their layout must not change on the way there.
    """
    if INTERPRETED:
        sums += tl.histogram(bins.to(tl.int32), _CHUNK)
    else:
        registers: tl.constexpr = "=&r" + ",=&r" * 15 + ",0,1,2,3,4,5,6,7,8,9,10,11,12,13,14,15" + ",r" * 4
        sums = tl.inline_asm_elementwise(_histogram_code(), registers, [sums, bins], dtype=tl.int32, is_pure=True, pack=16)
    return sums


@triton.jit
def _store_histogram(counts, sums, BLOCKS: tl.constexpr):
    """Add what `_add_histogram` counted to a block's counts, as `_score_kernel` describes them."""
    if INTERPRETED:
        table = tl.reshape(tl.sum(tl.reshape(sums, [_CHUNK // 64, 64]), axis=0), [8, 8])
        columns = tl.reshape(tl.cumsum(table, axis=1, reverse=True), [8, 4, 2])
        rows = tl.reshape(tl.cumsum(tl.sum(table, axis=1), axis=0, reverse=True), [4, 2])
        high = 16 * tl.arange(0, 2)
        i = tl.arange(0, 4)
        tl.atomic_add(counts + i, tl.sum(rows << high[None, :], axis=1))
        tl.atomic_add(counts + 4 * BLOCKS * (1 + tl.arange(0, 8)[:, None]) + i[None, :],
                      tl.sum(columns << high[None, None, :], axis=2))
    else:
        tl.inline_asm_elementwise(_store_code(BLOCKS), "=r" + ",=r" * 15 + ",r" * 16 + ",l" * 16, [sums, counts.to(tl.int64)],
                                  dtype=tl.int32, is_pure=False, pack=16)


@triton.jit
def _plan(row, block, n_blocks, seq_lens, budgets, budget, K, sink, recent,
          HEADS: tl.constexpr, PER_HEAD: tl.constexpr):
    """(length, low, high, filled, start, stop) of a row and block.

    [low, high): the tokens that compete, those before and after being always in; empty where all tokens fit.
    filled: slots used.  [start, stop): the block's part of [0, high), split by the current length so that all have work.
    """
    length = tl.load(seq_lens + row // HEADS)
    if PER_HEAD:
        budget = tl.load(budgets + row % HEADS)
    filled = tl.minimum(tl.minimum(budget, K), length)
    low = tl.where(filled == length, length, tl.minimum(sink, length))
    high = tl.maximum(length - recent, low)
    per_block = tl.cdiv(tl.cdiv(high, n_blocks), _CHUNK) * _CHUNK
    start = block * per_block
    return length, low, high, filled, start, tl.minimum(start + per_block, high)


@triton.jit
def _load_words(signatures, position, x_s, limit, W: tl.constexpr):
    """W x the words [..] of the tokens at `position`; undefined from `limit` on."""
    words = ()
    for w in tl.static_range(W):
        words += (tl.load(signatures + position.to(tl.int64) * x_s + w, mask=position < limit),)
    return words


@triton.jit
def _masked(words, signs, mask, W: tl.constexpr):
    """words where `mask`, elsewhere words of which no bit agrees with signs, so that the score is 0."""
    masked = ()
    for w in tl.static_range(W):
        masked += (tl.where(mask, words[w], ~signs[w]),)
    return masked


@triton.jit
def _score_kernel(planes, signatures, seq_lens, bins, counts, budgets, budget, K, sink, recent, S, x_b, x_h, x_s, bins_row,
                  HEADS: tl.constexpr, P: tl.constexpr, W: tl.constexpr, SHIFT: tl.constexpr, PER_HEAD: tl.constexpr,
                  BLOCKS: tl.constexpr, EARLY: tl.constexpr):
    """The bins of tokens, bytes, in whole chunks; 0 for those that do not compete. And uint16 counts [1 + 8, BLOCKS, 8] of the
    competing tokens of each block: first those in each eight bins or beyond, then, for each eight, those in each bin or beyond
    in the same eight. They are written two at a time, as halves of a word.

    EARLY: the first signatures are loaded while the kernel before still runs. What that one may write is the newest token's,
    which does not compete where `recent` is at least 1.
    """
    block, n_blocks = tl.program_id(0), tl.num_programs(0)
    row = tl.program_id(1).to(tl.int64)
    if not EARLY:
        pdl_wait()
    _, low, high, _, start, stop = _plan(row, block, n_blocks, seq_lens, budgets, budget, K, sink, recent,
                                         HEADS, PER_HEAD)
    signatures += (row // HEADS) * x_b + (row % HEADS) * x_h
    # as far as memory can be read, not up to `stop`: loads masked at odd places are not vectorised
    words = _load_words(signatures, start + tl.arange(0, _CHUNK), x_s, S, W)
    if EARLY:
        pdl_wait()
    planes += row * ((1 + P) * W)
    signs, magnitudes = (), ()
    total = 0
    for w in tl.static_range(W):
        signs += (tl.load(planes + w),)
        magnitude = ()
        for p in tl.static_range(P):
            magnitude += (tl.load(planes + (1 + p) * W + w),)
            total += _popcount(magnitude[p]) << p
        magnitudes += (magnitude,)
    bins += row * bins_row
    counts = counts.to(tl.pointer_type(tl.int32)) + (row * 9 * BLOCKS + block) * 4
    # Tokens that are scored but do not compete are counted in bin 0, so their number is taken away there, in both tables. Until
    # all is added the lower half of these words may borrow from the upper.
    others = tl.maximum(tl.cdiv(stop - start, _CHUNK) * _CHUNK, 0) - tl.maximum(stop - tl.maximum(start, low), 0)
    i = tl.arange(0, 64)
    tl.store(counts + (i // 4) * (4 * BLOCKS) + i % 4, tl.where((i == 0) | (i == 4), -others, 0), mask=i < 9 * 4)
    sums = tl.zeros([_CHUNK], tl.int32)
    for first in range(start, stop, _CHUNK):
        position = tl.multiple_of(first, _CHUNK) + tl.arange(0, _CHUNK)
        if (first < low) | (first + _CHUNK > high):
            words = _masked(words, signs, (position >= low) & (position < high), W)
        score = _scores(words, signs, magnitudes, P, W)
        bin = _bins(score, total, SHIFT)
        # This store decides the layout of all: four neighbours a lane are one load and one store; where a token has several
        # words, one token a lane is better.
        tl.store(bins + tl.max_contiguous(position, 4 if W == 1 else 1), bin)
        if first + _CHUNK < stop:
            words = _load_words(signatures, position + _CHUNK, x_s, S, W)
        sums = _add_histogram(sums, bin)
    tl.debug_barrier()  # other threads have written the zeros
    _store_histogram(counts, sums, BLOCKS)


@triton.jit
def _column(counts, n_blocks, level, BLOCKS: tl.constexpr):
    """Each block's count at one of 8 levels, [BLOCKS], zeros past the last block and level. counts: uint16 [BLOCKS, 8].

    Where all levels have been read before, it comes from the L1 cache; to pick it from them would take a sum over levels.
    """
    block = tl.arange(0, BLOCKS)
    return tl.load(counts + block * 8 + level, mask=(block < n_blocks) & (level < 8), other=0).to(tl.int32)


@triton.jit
def _level(counts, n_blocks, wanted, BLOCKS: tl.constexpr):
    """The highest of 8 levels with `wanted` tokens at or beyond it in all blocks together. counts: uint16 [BLOCKS, 8]."""
    block = tl.arange(0, BLOCKS)[:, None]
    table = tl.load(counts + block * 8 + tl.arange(0, 8)[None, :], mask=block < n_blocks, other=0)
    return tl.maximum(tl.sum((tl.sum(table.to(tl.int32), axis=0) >= wanted).to(tl.int32), axis=0) - 1, 0)


@triton.jit
def _threshold(counts, n_blocks, wanted, BLOCKS: tl.constexpr):
    """The bin above which all tokens are selected, from the counts of a row as `_score_kernel` leaves them.

    -> it, tokens above it and at it in each block [BLOCKS], how many of the latter are selected.
    """
    level = _level(counts, n_blocks, wanted, BLOCKS)
    beyond = _column(counts, n_blocks, level + 1, BLOCKS)
    wanted -= tl.sum(beyond, axis=0)
    counts += (1 + level) * BLOCKS * 8
    bin = _level(counts, n_blocks, wanted, BLOCKS)
    above = _column(counts, n_blocks, bin + 1, BLOCKS)
    ties = _column(counts, n_blocks, bin, BLOCKS) - above
    return 8 * level + bin, beyond + above, ties, tl.maximum(wanted - tl.sum(above, axis=0), 0)


@triton.jit
def _load_group(bins, first, stop):
    """The bins of 32 tokens as 8 words, from `first` [_CHUNK / 32] on; zeros where the first of them is at `stop` or beyond.

    Word by word, so that each thread holds all of a group: a sum over a second dimension would leave the result in a layout
    that every store after it has to change.
    """
    words = ()
    for j in tl.static_range(8):
        words += (tl.load(bins + first // 4 + j, mask=first < stop, other=0),)
    return words


@triton.jit
def _bits(words, bin):
    """words as `_load_group` gives them -> int32 [_CHUNK / 32], one bit per token: is it in `bin` (0 .. 64) or beyond?

    Four are compared at once: adding 128 - bin to each byte sets its top bit where the byte is at least `bin`, and never
    reaches the next byte.
    """
    bits = tl.zeros_like(words[0])
    for j in tl.static_range(8):
        at_least = ((words[j] + (128 - bin) * 0x01010101) >> 7) & 0x01010101
        bits |= (((at_least * 0x00204081) >> 21) & 0xF) << (4 * j)
    return bits


@triton.jit
def _below(count):
    """The lowest `count` bits of a word, of 32 at most."""
    return tl.where(count >= 32, -1, (1 << tl.minimum(tl.maximum(count, 0), 31)) - 1)


@triton.jit
def prefetch_l2(rows, stride, position, wanted, LINES: tl.constexpr):
    """Ask the L2 cache for rows of LINES x 128 bytes, at positions where wanted."""
    if LINES > 0:
        at = (rows + position.to(tl.int64) * stride).to(tl.int64)
        for line in tl.static_range(LINES):
            tl.inline_asm_elementwise("{ .reg .pred p; setp.ne.s32 p, $2, 0; @p prefetch.global.L2 [$1]; mov.b32 $0, 0; }",
                                      "=r,l,r", [at + 128 * line, wanted.to(tl.int32)], dtype=tl.int32, is_pure=False, pack=1)


@triton.jit
def _write_selected(bins, words, indices, start, stop, low, bin, sure, ties, ties_wanted, filled, keys, k_s,
                    LINES: tl.constexpr):
    """Write the selected positions of [start, stop), from `low` on, in ascending order, and ask for their keys.

    words: the first _CHUNK bins.  bin: the threshold.  sure: slots filled before `start`, by position or by tokens beyond it.
    ties: tokens in it before `start`.
    Few tokens are selected, so a thread looks at 32 of them as the bits of a word and then writes bit after bit.
    """
    for first in range(start, stop, _CHUNK):
        token = first + 32 * tl.arange(0, _CHUNK // 32)  # the first one of each group
        following = _load_group(bins, token + _CHUNK, stop)
        competing = _below(stop - token) & ~_below(low - token)
        is_sure = _bits(words, bin + 1) & competing
        left = _bits(words, bin) & competing
        # one scan for both counts: _CHUNK fits into 16 bits
        both = _popcount(is_sure) + (_popcount(left ^ is_sure) << 16)
        earlier = tl.cumsum(both, axis=0) - both
        ties_here = ties + (earlier >> 16)
        slot = sure + (earlier & 0xFFFF) + tl.minimum(ties_here, ties_wanted)
        for _ in range(tl.max(_popcount(left), axis=0)):
            lowest = left & -left
            left ^= lowest
            tie = (is_sure & lowest) == 0
            taken = (lowest != 0) & ((ties_here < ties_wanted) | ~tie)
            position = token + _popcount(lowest - 1)
            tl.store(indices + slot, position, mask=taken & (slot < filled))
            prefetch_l2(keys, k_s, position, taken, LINES)
            slot += taken.to(tl.int32)
            ties_here += (tie & (lowest != 0)).to(tl.int32)
        both = tl.sum(both, axis=0)
        sure += both & 0xFFFF
        ties += both >> 16
        words = following


_FEW = tl.constexpr(32)  # tokens or slots that a block fills in at a time, where no scores are needed


@triton.jit
def _compact_kernel(seq_lens, bins, counts, indices, budgets, budget, K, sink, recent, bins_row, keys, values,
                    k_b, k_h, k_s, v_b, v_h, v_s, HEADS: tl.constexpr, HEADS_PER_KV: tl.constexpr, PER_HEAD: tl.constexpr,
                    BLOCKS: tl.constexpr, LINES: tl.constexpr, SELECTED_LINES: tl.constexpr):
    """The selected positions in ascending order: every block knows from the counts where its own begin.

    Memory has little to do meanwhile. So keys and values of the tokens that are in by their position, rows of LINES x 128
    bytes, and the keys of the selected ones, SELECTED_LINES, are asked for: attention finds them in the L2 cache. 0: not asked.
    """
    block, n_blocks = tl.program_id(0), tl.num_programs(0)
    row = tl.program_id(1).to(tl.int64)
    length, low, high, filled, start, stop = _plan(row, block, n_blocks, seq_lens, budgets, budget, K, sink, recent,
                                                   HEADS, PER_HEAD)
    if LINES > 0:
        keys += (row // HEADS) * k_b + (row % HEADS) // HEADS_PER_KV * k_h
        values += (row // HEADS) * v_b + (row % HEADS) // HEADS_PER_KV * v_h
    pdl_wait()  # the kernel before writes bins and counts alone
    start = tl.maximum(start, low // _CHUNK * _CHUNK)
    bins = (bins + row * bins_row).to(tl.pointer_type(tl.int32))
    counts += row * 9 * BLOCKS * 8
    indices += row * K
    words = _load_group(bins, start + 32 * tl.arange(0, _CHUNK // 32), stop)
    wanted = filled - (length - (high - low))
    bin, above, ties, ties_wanted = _threshold(counts, n_blocks, wanted, BLOCKS)
    before = tl.arange(0, BLOCKS) < block
    _write_selected(bins, words, indices, start, stop, low, bin, low + tl.sum(tl.where(before, above, 0), axis=0),
                   tl.sum(tl.where(before, ties, 0), axis=0), ties_wanted, filled, keys, k_s, SELECTED_LINES)

    # the tokens that are in by their position, and the slots that nothing fills
    for first in range(block * _FEW, low, n_blocks * _FEW):
        position = first + tl.arange(0, _FEW)
        taken = position < tl.minimum(low, filled)
        tl.store(indices + position, position, mask=taken)
        first_ones = taken & (position < sink)  # where all tokens fit, that is not all of them
        prefetch_l2(keys, k_s, position, first_ones, LINES)
        prefetch_l2(values, v_s, position, first_ones, LINES)
    for first in range(high + block * _FEW, length, n_blocks * _FEW):
        position = first + tl.arange(0, _FEW)
        slot = filled - length + position
        taken = (position < length) & (slot >= 0)
        tl.store(indices + slot, position, mask=taken)
        prefetch_l2(keys, k_s, position, taken, LINES)
        prefetch_l2(values, v_s, position, taken, LINES)
    for first in range(filled + block * _FEW, K, n_blocks * _FEW):
        slot = first + tl.arange(0, _FEW)
        tl.store(indices + slot, tl.full([_FEW], -1, tl.int32), mask=slot < K)


def select_tokens(planes: Tensor, signatures: Tensor, seq_lens: Tensor, budget: int | Tensor, sink: int, recent: int,
                  K: int, shift: int, caches: tuple[Tensor, Tensor] | None = None) -> Tensor:
    """`hash_attention.select_tokens_reference`; the selected positions ascend, and the unused slots (-1) come last.

    planes int32 [B, Hs, 1 + P, W], signatures int32 [B, Hs, S, W], seq_lens int32 [B], budget int or int32 [Hs]
    -> indices int32 [B, Hs, K].
    caches: keys and values, [B, Hkv, S, D] each, that attention will read at these positions: nothing but time depends on them.
    """
    caches = (None, None) if caches is None else caches
    if isinstance(budget, Tensor):  # its values are on the device, where nothing checks them
        return _select_tokens(planes, signatures, seq_lens, K, budget, sink, recent, K, shift, *caches)
    if budget < min(sink + recent, signatures.shape[2]):
        raise ValueError(f"the budget of {budget} tokens is under sink {sink} plus recent {recent}")
    return _select_tokens(planes, signatures, seq_lens, budget, None, sink, recent, K, shift, *caches)


@torch.library.custom_op("hashfast::select_tokens", mutates_args=())
def _select_tokens(planes: Tensor, signatures: Tensor, seq_lens: Tensor, budget: int, budgets: Tensor | None, sink: int,
                   recent: int, K: int, shift: int, keys: Tensor | None, values: Tensor | None) -> Tensor:
    return _launch_select(planes, signatures, seq_lens, budget, budgets, sink, recent, K, shift, keys, values,
                          _blocks_per_row(signatures.shape[0] * signatures.shape[1], signatures.shape[2], recent))


@_select_tokens.register_fake
def _(planes, signatures, seq_lens, budget, budgets, sink, recent, K, shift, keys, values):
    return planes.new_empty((*planes.shape[:2], K))


def _launch_select(planes: Tensor, signatures: Tensor, seq_lens: Tensor, budget: int, budgets: Tensor | None, sink: int,
                   recent: int, K: int, shift: int, keys: Tensor | None, values: Tensor | None, n_blocks: int) -> Tensor:
    limits = (budgets, budget, K, sink, recent)
    scored = _launch_score(planes, signatures, seq_lens, limits, shift, n_blocks)
    return _launch_compact(*scored, seq_lens, limits, signatures.shape[1], keys, values, n_blocks)


def _readable(signatures: Tensor) -> int:
    """Tokens of a row that a load may touch: S rounded up where memory goes on, as masks at odd places keep loads narrow."""
    S = signatures.shape[2]
    rounded = S + -S % 16
    last = sum((size - 1) * stride for size, stride in zip(signatures.shape, signatures.stride(), strict=True))
    end = signatures.storage_offset() + last + (rounded - S) * signatures.stride(2)
    return rounded if end < signatures.untyped_storage().nbytes() // 4 else S


def _launch_score(planes: Tensor, signatures: Tensor, seq_lens: Tensor, limits: tuple, shift: int,
                  n_blocks: int) -> tuple[Tensor, Tensor]:
    """-> bins uint8 [B * Hs, S rounded up] and counts uint16 [B * Hs, 1 + 8, n_blocks rounded up, 8].

    limits: (budgets, budget, K, sink, recent).
    """
    B, HEADS, S, W = signatures.shape
    chunks = triton.cdiv(S, _CHUNK.value)
    assert triton.cdiv(chunks, n_blocks) * _CHUNK.value < 2 ** 16  # counts
    bins_row = chunks * _CHUNK.value  # whole chunks, so that no access needs a mask
    bins = torch.empty((B * HEADS, bins_row), dtype=torch.uint8, device=planes.device)
    blocks = triton.next_power_of_2(n_blocks)
    counts = torch.empty((B * HEADS, 1 + 8, blocks, 8), dtype=torch.uint16, device=planes.device)
    _score_kernel[(n_blocks, B * HEADS)](
        planes.contiguous(), checked_rows(signatures), seq_lens, bins, counts, *limits, _readable(signatures),
        *signatures.stride()[:3], bins_row, HEADS=HEADS, P=planes.shape[2] - 1, W=W, SHIFT=shift,
        PER_HEAD=limits[0] is not None, BLOCKS=blocks, EARLY=limits[4] >= 1, num_warps=2, launch_pdl=DEPENDENT_LAUNCH)
    return bins, counts


def _launch_compact(bins: Tensor, counts: Tensor, seq_lens: Tensor, limits: tuple, heads: int, keys: Tensor | None,
                    values: Tensor | None, n_blocks: int) -> Tensor:
    """What `_launch_score` gave, with the same limits and n_blocks -> indices int32 [B, Hs, K].

    keys, values: the caches to ask for rows of, [B, Hkv, S, D], or None.
    """
    rows = counts.shape[0]
    K = limits[2]
    indices = torch.empty((rows // heads, heads, K), dtype=torch.int32, device=bins.device)
    if keys is None or INTERPRETED:
        strides, heads_per_kv, lines, selected_lines = (0,) * 6, 1, 0, 0
    else:
        strides = (*keys.stride()[:3], *values.stride()[:3])
        heads_per_kv = heads // keys.shape[1]
        row_bytes = keys.shape[3] * keys.element_size()
        lines = triton.cdiv(row_bytes, 128)
        selected_lines = lines if rows * K * row_bytes <= _PREFETCH_BYTES else 0
    # one warp: more would take shared memory, and with as little as 32 bytes of it the chain of kernels took 1 to 4 us more, 12
    # at 1 x 512K
    _compact_kernel[(n_blocks, rows)](
        seq_lens, bins, counts, indices, *limits, bins.shape[1], keys, values, *strides, HEADS=heads,
        HEADS_PER_KV=heads_per_kv, PER_HEAD=limits[0] is not None, BLOCKS=counts.shape[2], LINES=lines,
        SELECTED_LINES=selected_lines, num_warps=1, launch_pdl=DEPENDENT_LAUNCH)
    return indices
