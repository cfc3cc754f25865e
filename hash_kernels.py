"""Triton kernels of signatures. hash_attention.py holds the definitions (`*_reference`) and the symbols used here.

select_tokens   score and count all tokens, write the positions of the best   two kernels

encode_kernels.py holds what goes before and attention_kernels.py what follows. Each function of them is a torch.library custom
op: torch.compile(fullgraph=True) keeps it whole, and a CUDA graph can capture it, for nothing here waits for the device: shapes
are static and lengths are read on the device. With TRITON_INTERPRET=1 set before triton is imported, the same functions run on
CPU tensors.

The kernels of a step are short, so the time between them counts: on Hopper and later each is launched while the one before
still runs (programmatic dependent launch) and waits for its results with `after_previous`.
"""
import functools

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.language.extra import libdevice

from hash_attention import NUM_BINS

# ------------------------------------------------------------------------------------------------------ launch parameters

# Chosen by measurement on an H100 and an H200 (132 multiprocessors); a GPU with fewer fills up as well.

def splits_per_row(programs: int, rows: int, tiles: int) -> int:
    """Programs per row so that all rows have about `programs` together and each has a tile of work."""
    return max(1, min(tiles, programs // rows))


def _select_parameters(rows: int, S: int) -> dict[str, int]:
    """chunk: tokens scored at a time, 256 a warp or more; a block's range is a multiple of it.

    step: tokens compacted at a time; divides chunk.
    """
    if rows * S <= 2 ** 19:
        programs, chunk = 256, 1024
    elif rows * S <= 2 ** 21:
        programs, chunk = 512, 1024
    elif rows * S <= 2 ** 23:
        programs, chunk = 512, 2048
    else:
        programs, chunk = 2048, 2048
    n_blocks = splits_per_row(programs, rows, triton.cdiv(S, chunk))
    return {"chunk": chunk, "step": chunk, "n_blocks": n_blocks, "score_warps": 4, "compact_warps": 1}


INTERPRETED = tl.constexpr(triton.knobs.runtime.interpret)
DEPENDENT_LAUNCH = not triton.knobs.runtime.interpret and torch.cuda.get_device_capability() >= (9, 0)
_WAITS = tl.constexpr(DEPENDENT_LAUNCH)


@triton.jit
def after_previous():
    """Wait until the kernel before this one has finished, then let the next one be launched.

    Before any store, and before any load but of what that kernel leaves alone: weights, or what an earlier one has written.
    """
    if _WAITS:
        tl.extra.cuda.gdc_wait()
        tl.extra.cuda.gdc_launch_dependents()


def checked_rows(x: Tensor) -> Tensor:
    if x.stride(-1) != 1 and x.shape[-1] != 1:
        raise ValueError(f"the last dimension must be contiguous, but the strides are {x.stride()}")
    return x


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
_MASKS = tl.constexpr("{ .reg .b32 lane, word, owner; .reg .pred p; mov.u32 lane, %laneid; and.b32 word, lane, 4; "
                      "setp.ne.u32 p, word, 0; selp.b32 $0, $2, $1, p; and.b32 word, lane, 3; shr.u32 owner, lane, 3; "
                      "setp.eq.u32 p, word, owner; selp.b32 $0, $0, 0, p; }")
_COUNT = tl.constexpr("{ .reg .b32 x0, x1, c0, c1, c2, c3, zero; mov.b32 zero, 0; "
                      "lop3.b32 x0, $4, $6, 0, 0xC3; lop3.b32 x1, $5, $6, 0, 0xC3; "  # ~(a ^ b)
                      "mma.sync.aligned.m16n8k128.row.col.s32.b1.b1.s32.and.popc {c0, c1, c2, c3}, {x0, x1}, {$8}, "
                      "{$2, zero, $3, zero}; shl.b32 c1, c1, 1; shl.b32 c3, c3, 1; add.s32 $0, c0, c1; add.s32 $1, c2, c3; }")


@triton.jit
def _add_scores(score, words, signs, magnitudes, P: tl.constexpr):
    """score [N] plus the summed weights of the bits where words [N] and signs agree. magnitudes: P planes of the weights."""
    if INTERPRETED:
        for p in tl.static_range(P):
            score += _popcount(~(words ^ signs) & magnitudes[p]) << p
    else:
        for p in tl.static_range(0, P, 2):
            # differs by lane, though Triton takes it for one number
            masks = tl.inline_asm_elementwise(_MASKS, "=&r,r,r", [magnitudes[p], magnitudes[p + 1] if p + 1 < P else 0],
                                              dtype=tl.int32, is_pure=True, pack=1)
            before = score if p == 0 else tl.zeros_like(score)
            count = tl.inline_asm_elementwise(_COUNT, "=&r,=&r,r,r,r,r,r,r,r,r", [before, words, signs, masks], dtype=tl.int32,
                                              is_pure=True, pack=2)
            score = count if p == 0 else score + (count << p)
    return score


# A histogram of 64 bins is a product of two matrices, [8, tokens] and [tokens, 8]: has a token's bin these upper three bits,
# and these lower three? A lane of an mma holds the answers for one row, or one column, of four tokens, as bytes. It has them
# from one `prmt`, which looks four numbers below 8 up in a table of eight bytes: 1 at the lane's own row or column. The words
# looked up hold the lower bits of four tokens' bins in their lower half and the upper bits in their upper half.
_TABLE = tl.constexpr("{ .reg .b32 lane, one; .reg .pred low; mov.u32 lane, %laneid; and.b32 $2, lane, 3; "
                      "shr.u32 lane, lane, 2; setp.lt.u32 low, lane, 4; and.b32 lane, lane, 3; shl.b32 lane, lane, 3; "
                      "mov.b32 one, 1; shl.b32 one, one, lane; selp.b32 $0, one, 0, low; selp.b32 $1, 0, one, low; }")


@triton.constexpr_function
def _histogram_code():
    """$0-1 counts of a row and two columns, $2-3 before; $4-5 words; $6, $8 the table; $10 lane % 4."""
    lines = [".reg .b32 from, a0, a2, b0, b1, c2, c3, zero; mov.b32 zero, 0; mov.b32 $0, $2; mov.b32 $1, $3;"]
    for word in ("$4", "$5"):
        for first in range(0, 32, 8):  # the words of eight lanes: 32 tokens
            for a, b, lane in (("a0", "b0", first), ("a2", "b1", first + 4)):
                lines += [f"add.s32 from, $10, {lane}; shfl.sync.idx.b32 from, {word}, from, 31, 0xffffffff;",
                          f"prmt.b32 {b}, $6, $8, from; shr.u32 from, from, 16; prmt.b32 {a}, $6, $8, from;"]
            lines += ["mma.sync.aligned.m16n8k32.row.col.s32.u8.u8.s32 {$0, $1, c2, c3}, {a0, zero, a2, zero}, {b0, b1}, "
                      "{$0, $1, zero, zero};"]
    return "{ " + " ".join(lines) + " }"


@triton.jit
def _add_histogram(counts, bins, CHUNK: tl.constexpr):
    """Count bins [CHUNK], each below 64. counts [CHUNK / 4]: a lane has two of its warp's 64 sums in each pair of numbers."""
    if INTERPRETED:
        counts += tl.histogram(bins, CHUNK // 4)
    else:
        bits = bins + (bins & 0x38) * (2 ** 13 - 1)  # bins & 7, and bins >> 3 from bit 16 on
        words = tl.sum(tl.reshape(bits, [CHUNK // 4, 4]) << (4 * tl.arange(0, 4))[None, :], axis=1)
        table = tl.inline_asm_elementwise(_TABLE, "=&r,=&r,=&r,r", [0], dtype=(tl.int32, tl.int32, tl.int32), is_pure=True,
                                          pack=1)
        counts = tl.inline_asm_elementwise(_histogram_code(), "=&r,=&r,r,r,r,r,r,r,r,r,r,r",
                                           [counts, words, table[0], table[1], table[2]], dtype=tl.int32, is_pure=True, pack=2)
    return counts


@triton.jit
def _sum_histogram(counts, CHUNK: tl.constexpr, WARPS: tl.constexpr):
    """What `_add_histogram` counted -> [64]."""
    if INTERPRETED:
        total = tl.sum(tl.reshape(counts, [CHUNK // 256, 64]), axis=0)
    else:
        # of a warp, lane 4 g + t has columns 2 t and 2 t + 1 of row g
        pairs = tl.sum(tl.sum(tl.reshape(counts, [CHUNK // 256 // WARPS, 2, WARPS, 32]), axis=0), axis=1)
        total = tl.reshape(tl.permute(pairs, [1, 0]), [64])
    return total


@triton.jit
def _plan(row, block, n_blocks, seq_lens, budgets, budget, K, sink, recent,
          HEADS: tl.constexpr, PER_HEAD: tl.constexpr, CHUNK: tl.constexpr):
    """(length, low, high, filled, start, stop) of a row and block.

    [low, high): the tokens that compete, those before and after being always in; empty where all tokens fit.
    filled: slots used.  [start, stop): the block's tokens, split by the current length so that all blocks have work.
    """
    length = tl.load(seq_lens + row // HEADS)
    if PER_HEAD:
        budget = tl.load(budgets + row % HEADS)
    filled = tl.minimum(tl.minimum(budget, K), length)
    low = tl.where(filled == length, length, tl.minimum(sink, length))
    high = tl.maximum(length - recent, low)
    per_block = tl.cdiv(tl.cdiv(length, n_blocks), CHUNK) * CHUNK
    start = block * per_block
    return length, low, high, filled, start, tl.minimum(start + per_block, length)


_LEVELS = tl.constexpr(8)  # every eighth bin's counts are kept on their own as well


@triton.jit
def _score_kernel(planes, signatures, seq_lens, ranks, counts, budgets, budget, K, sink, recent, S, x_b, x_h, x_s, ranks_row,
                  HEADS: tl.constexpr, P: tl.constexpr, W: tl.constexpr, SHIFT: tl.constexpr, BINS: tl.constexpr,
                  PER_HEAD: tl.constexpr, CHUNK: tl.constexpr, WARPS: tl.constexpr, EARLY: tl.constexpr):
    """The rank of every token, a byte: 1 + bin where it competes, else 0. And how many of each block's tokens are at or above
    each eighth bin, and each bin: counts [8 + 64].

    EARLY: the first signatures are loaded while the kernel before still runs. What that one may write is the newest token's,
    which does not compete where `recent` is at least 1.
    """
    block, n_blocks = tl.program_id(0), tl.num_programs(0)
    row = tl.program_id(1).to(tl.int64)
    if not EARLY:
        after_previous()
    _, low, high, _, start, stop = _plan(row, block, n_blocks, seq_lens, budgets, budget, K, sink, recent,
                                         HEADS, PER_HEAD, CHUNK)
    signatures += (row // HEADS) * x_b + (row % HEADS) * x_h
    # masked by the cache's length alone, as loads and stores masked at odd places are not vectorised
    position = start + tl.arange(0, CHUNK)
    words = ()
    for w in tl.static_range(W):
        words += (tl.load(signatures + position.to(tl.int64) * x_s + w, mask=position < S, other=0),)
    if EARLY:
        after_previous()
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
    ranks = (ranks + row * ranks_row).to(tl.pointer_type(tl.int32))
    histogram = tl.zeros([CHUNK // 4], tl.int32)
    for first in range(start, stop, CHUNK):
        position = tl.multiple_of(first, CHUNK) + tl.arange(0, CHUNK)
        following = ()
        for w in tl.static_range(W):
            following += (tl.load(signatures + (position + CHUNK).to(tl.int64) * x_s + w,
                                  mask=(position + CHUNK < S) & (first + CHUNK < stop), other=0),)
        score = tl.zeros([CHUNK], tl.int32) - total // 2
        for w in tl.static_range(W):
            score = _add_scores(score, words[w], signs[w], magnitudes[w], P)
        bins = tl.minimum(tl.maximum(score >> SHIFT, 0), BINS - 1)
        rank = bins + 1
        if (first < low) | (first + CHUNK > high):
            competes = (position >= low) & (position < high)
            rank = tl.where(competes, rank, 0)
            bins = tl.where(competes, bins, 0)  # at or above that one are all that compete
        packed = tl.sum(tl.reshape(rank, [CHUNK // 4, 4]) << (8 * tl.arange(0, 4))[None, :], axis=1)
        tl.store(ranks + first // 4 + tl.arange(0, CHUNK // 4), packed)
        histogram = _add_histogram(histogram, bins, CHUNK)
        words = following
    bin = tl.arange(0, BINS)
    at_least = tl.cumsum(_sum_histogram(histogram, CHUNK, WARPS), axis=0, reverse=True)
    at_least = tl.where(bin == 0, tl.maximum(tl.minimum(stop, high) - tl.maximum(start, low), 0), at_least)
    counts += (row * n_blocks + block) * (_LEVELS + BINS)
    tl.store(counts + bin // (BINS // _LEVELS), at_least, mask=bin % (BINS // _LEVELS) == 0)
    tl.store(counts + _LEVELS + bin, at_least)


@triton.jit
def _level(counts, stride: tl.constexpr, n_blocks, wanted, BLOCKS: tl.constexpr):
    """The highest of 8 levels with `wanted` tokens at or above it in all blocks. counts [n_blocks, 8], rows `stride` apart."""
    block = tl.arange(0, BLOCKS)[:, None]
    table = tl.load(counts + block * stride + tl.arange(0, _LEVELS)[None, :], mask=block < n_blocks, other=0)
    return tl.maximum(tl.sum((tl.sum(table, axis=0) >= wanted).to(tl.int32), axis=0) - 1, 0)


@triton.jit
def _threshold(counts, n_blocks, wanted, BINS: tl.constexpr, BLOCKS: tl.constexpr):
    """The bin above which all tokens are selected, from the counts of a row as `_score_kernel` leaves them.

    -> it, tokens above it and at it in each block [BLOCKS], how many of the latter are selected.
    """
    stride: tl.constexpr = _LEVELS + BINS
    # in two steps, so that not all of the counts have to be read
    level = _level(counts, stride, n_blocks, wanted, BLOCKS) * (BINS // _LEVELS)
    counts += _LEVELS
    bin = level + _level(counts + level, stride, n_blocks, wanted, BLOCKS)
    block = tl.arange(0, BLOCKS)
    at_least = tl.load(counts + block * stride + bin, mask=block < n_blocks, other=0)
    above = tl.load(counts + block * stride + bin + 1, mask=(block < n_blocks) & (bin + 1 < BINS), other=0)
    return bin, above, at_least - above, tl.maximum(wanted - tl.sum(above, axis=0), 0)


@triton.jit
def _load_group(ranks, first, stop):
    """The ranks of 32 tokens as 8 words, from `first` [GROUPS] on; zeros from `stop` on.

    Word by word, so that each thread holds all of a group: a sum over a second dimension would leave the result in a layout
    that every store after it has to change.
    """
    words = ()
    for j in tl.static_range(8):
        words += (tl.load(ranks + first // 4 + j, mask=first < stop, other=0),)
    return words


@triton.jit
def _bits(words, rank):
    """words as `_load_group` gives them -> int32 [GROUPS], one bit per token: is its rank at least `rank` (0 .. 128)?

    Ranks are below 128, so four are compared at once: adding 128 - rank to each byte sets its top bit where the byte is at
    least `rank`, and never reaches the next byte.
    """
    bits = tl.zeros_like(words[0])
    for j in tl.static_range(8):
        at_least = ((words[j] + (128 - rank) * 0x01010101) >> 7) & 0x01010101
        bits |= (((at_least * 0x00204081) >> 21) & 0xF) << (4 * j)
    return bits


@triton.jit
def _write_selected(ranks, words, indices, start, stop, threshold, sure, ties, ties_wanted, filled, STEP: tl.constexpr):
    """Write the selected positions of [start, stop) in ascending order.

    words: the first STEP ranks.  sure, ties: slots before `start` that are filled by tokens above the threshold or by
    position, tokens at the threshold before `start`.
    Few tokens are selected, so a thread looks at 32 of them as the bits of a word and then writes bit after bit.
    """
    for first in range(start, stop, STEP):
        token = first + 32 * tl.arange(0, STEP // 32)  # the first one of each group
        following = _load_group(ranks, token + STEP, stop)
        is_sure = _bits(words, threshold + 1)
        left = _bits(words, threshold)
        # one scan for both counts: STEP fits into 16 bits
        both = _popcount(is_sure) + (_popcount(left ^ is_sure) << 16)
        earlier = tl.cumsum(both, axis=0) - both
        ties_here = ties + (earlier >> 16)
        slot = sure + (earlier & 0xFFFF) + tl.minimum(ties_here, ties_wanted)
        for _ in range(tl.max(_popcount(left), axis=0)):
            lowest = left & -left
            left ^= lowest
            tie = (is_sure & lowest) == 0
            taken = (lowest != 0) & ((ties_here < ties_wanted) | ~tie)
            tl.store(indices + slot, token + _popcount(lowest - 1), mask=taken & (slot < filled))
            slot += taken.to(tl.int32)
            ties_here += (tie & (lowest != 0)).to(tl.int32)
        both = tl.sum(both, axis=0)
        sure += both & 0xFFFF
        ties += both >> 16
        words = following


_FEW = tl.constexpr(256)


@triton.jit
def _compact_kernel(seq_lens, ranks, counts, indices, budgets, budget, K, sink, recent, ranks_row,
                    HEADS: tl.constexpr, BINS: tl.constexpr, PER_HEAD: tl.constexpr, CHUNK: tl.constexpr,
                    STEP: tl.constexpr, BLOCKS: tl.constexpr):
    """The selected positions in ascending order: every block knows from the counts where its own begin."""
    block, n_blocks = tl.program_id(0), tl.num_programs(0)
    row = tl.program_id(1).to(tl.int64)
    length, low, high, filled, start, stop = _plan(row, block, n_blocks, seq_lens, budgets, budget, K, sink, recent,
                                                   HEADS, PER_HEAD, CHUNK)
    after_previous()  # which has written ranks and counts alone
    start = tl.maximum(start, low // CHUNK * CHUNK)
    stop = tl.minimum(stop, high)
    ranks = (ranks + row * ranks_row).to(tl.pointer_type(tl.int32))
    indices += row * K
    words = _load_group(ranks, start + 32 * tl.arange(0, STEP // 32), stop)
    wanted = filled - (length - (high - low))
    bin, above, ties, ties_wanted = _threshold(counts + row * n_blocks * (_LEVELS + BINS), n_blocks, wanted, BINS, BLOCKS)
    before = tl.arange(0, BLOCKS) < block
    _write_selected(ranks, words, indices, start, stop, 1 + bin, low + tl.sum(tl.where(before, above, 0), axis=0),
                   tl.sum(tl.where(before, ties, 0), axis=0), ties_wanted, filled, STEP)

    # the tokens that are in by their position, and the slots that nothing fills
    for first in range(block * _FEW, low, n_blocks * _FEW):
        position = first + tl.arange(0, _FEW)
        tl.store(indices + position, position, mask=position < tl.minimum(low, filled))
    for first in range(high + block * _FEW, length, n_blocks * _FEW):
        position = first + tl.arange(0, _FEW)
        slot = filled - length + position
        tl.store(indices + slot, position, mask=(position < length) & (slot >= 0))
    for first in range(filled + block * _FEW, K, n_blocks * _FEW):
        slot = first + tl.arange(0, _FEW)
        tl.store(indices + slot, tl.full([_FEW], -1, tl.int32), mask=slot < K)


def select_tokens(planes: Tensor, signatures: Tensor, seq_lens: Tensor, budget: int | Tensor, sink: int, recent: int,
                  K: int, shift: int) -> Tensor:
    """`hash_attention.select_tokens_reference`; the selected positions ascend, and the unused slots (-1) come last.

    planes int32 [B, Hs, 1 + P, W], signatures int32 [B, Hs, S, W], seq_lens int32 [B], budget int or int32 [Hs]
    -> indices int32 [B, Hs, K].
    """
    if isinstance(budget, Tensor):  # its values are on the device: one under sink + recent gives a smaller set, not an error
        return _select_tokens(planes, signatures, seq_lens, K, budget, sink, recent, K, shift)
    if budget < min(sink + recent, signatures.shape[2]):
        raise ValueError(f"the budget of {budget} tokens is under sink {sink} plus recent {recent}")
    return _select_tokens(planes, signatures, seq_lens, budget, None, sink, recent, K, shift)


@functools.cache
def _check_lanes(device: torch.device) -> None:
    """Triton does not promise which lane holds which number, and another order would count other bins: RuntimeError if so."""
    planes = torch.tensor([-1, 0x00FF00FF, 0x0F0F0F0F], dtype=torch.int32, device=device).view(1, 1, 3, 1)
    signatures = (torch.arange(2048, dtype=torch.int32, device=device) * 1103515245).view(1, 1, 2048, 1)
    limits = (None, 256, 256, 0, 0)
    ranks, counts = _launch_score(planes, signatures, signatures.new_tensor([2000]), limits, 0, 1024, 1, 4)
    bins = torch.arange(NUM_BINS, device=device)
    if not torch.equal(counts[0, 0, _LEVELS.value:], (ranks[0, :, None] > bins).sum(dim=0, dtype=torch.int32)):
        raise RuntimeError(f"Triton {triton.__version__} lays tensors out in another way than hash_kernels.py needs; "
                           "use a version that requirements.txt allows")


@torch.library.custom_op("hashfast::select_tokens", mutates_args=())
def _select_tokens(planes: Tensor, signatures: Tensor, seq_lens: Tensor, budget: int, budgets: Tensor | None, sink: int,
                   recent: int, K: int, shift: int) -> Tensor:
    _check_lanes(planes.device)
    return _launch_select(planes, signatures, seq_lens, budget, budgets, sink, recent, K, shift,
                          **_select_parameters(signatures.shape[0] * signatures.shape[1], signatures.shape[2]))


@_select_tokens.register_fake
def _(planes, signatures, seq_lens, budget, budgets, sink, recent, K, shift):
    return planes.new_empty((*planes.shape[:2], K))


def _launch_select(planes: Tensor, signatures: Tensor, seq_lens: Tensor, budget: int, budgets: Tensor | None, sink: int,
                   recent: int, K: int, shift: int, *, chunk: int, step: int, n_blocks: int, score_warps: int,
                   compact_warps: int) -> Tensor:
    limits = (budgets, budget, K, sink, recent)
    scored = _launch_score(planes, signatures, seq_lens, limits, shift, chunk, n_blocks, score_warps)
    return _launch_compact(*scored, seq_lens, limits, signatures.shape[1], chunk, step, compact_warps)


def _readable(signatures: Tensor) -> int:
    """Tokens of a row that a load may touch: S rounded up where memory goes on, as masks at odd places keep loads narrow."""
    S = signatures.shape[2]
    rounded = S + -S % 16
    last = sum((size - 1) * stride for size, stride in zip(signatures.shape, signatures.stride(), strict=True))
    end = signatures.storage_offset() + last + (rounded - S) * signatures.stride(2)
    return rounded if end < signatures.untyped_storage().nbytes() // 4 else S


def _launch_score(planes: Tensor, signatures: Tensor, seq_lens: Tensor, limits: tuple, shift: int, chunk: int, n_blocks: int,
                  num_warps: int) -> tuple[Tensor, Tensor]:
    """-> ranks uint8 [B * Hs, S rounded up] and counts int32 [B * Hs, n_blocks, 8 + 64].

    limits: (budgets, budget, K, sink, recent). chunk: at least 256 tokens a warp.
    """
    B, HEADS, S, W = signatures.shape
    ranks_row = triton.cdiv(S, chunk) * chunk  # whole chunks, so that no access needs a mask
    ranks = torch.empty((B * HEADS, ranks_row), dtype=torch.uint8, device=planes.device)
    counts = torch.empty((B * HEADS, n_blocks, _LEVELS.value + NUM_BINS), dtype=torch.int32, device=planes.device)
    _score_kernel[(n_blocks, B * HEADS)](
        planes.contiguous(), checked_rows(signatures), seq_lens, ranks, counts, *limits, _readable(signatures),
        *signatures.stride()[:3], ranks_row, HEADS=HEADS, P=planes.shape[2] - 1, W=W, SHIFT=shift, BINS=NUM_BINS,
        PER_HEAD=limits[0] is not None, CHUNK=chunk, WARPS=num_warps, EARLY=limits[4] >= 1, num_warps=num_warps,
        launch_pdl=DEPENDENT_LAUNCH)
    return ranks, counts


def _launch_compact(ranks: Tensor, counts: Tensor, seq_lens: Tensor, limits: tuple, heads: int, chunk: int, step: int,
                    num_warps: int) -> Tensor:
    """What `_launch_score` gave, with the same limits and chunk -> indices int32 [B, Hs, K]."""
    rows, n_blocks, _ = counts.shape
    K = limits[2]
    indices = torch.empty((rows // heads, heads, K), dtype=torch.int32, device=ranks.device)
    _compact_kernel[(n_blocks, rows)](
        seq_lens, ranks, counts, indices, *limits, ranks.shape[1], HEADS=heads, BINS=NUM_BINS, PER_HEAD=limits[0] is not None,
        CHUNK=chunk, STEP=step, BLOCKS=triton.next_power_of_2(n_blocks), num_warps=num_warps, launch_pdl=DEPENDENT_LAUNCH)
    return indices
