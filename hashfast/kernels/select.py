"""Triton kernels of selection. hash_attention.py holds the definition (`select_tokens_reference`) and the symbols used here.

select_tokens   score and count all tokens (score.py), write the positions of the best (here)   two kernels
"""
import torch
import triton
import triton.language as tl
from torch import Tensor

from hashfast.kernels.launch import pdl_options, pdl_wait, portable
from hashfast.kernels.score import CHUNK, Selection, block_range, blocks_per_row, launch_score, popcount

# Above this, prefetching the selected keys into L2 slows selection by at least what attention gains (on an H200).
_PREFETCH_BYTES = 12 * 2 ** 20


@triton.jit
def _column(counts, n_blocks, level, BLOCKS: tl.constexpr):
    """Each block's count at one of 8 levels, [BLOCKS], zeros past the last block and level. counts: uint16 [BLOCKS, 8].

    A load that hits L1, as all levels were read before: to pick it from registers would take a sum over levels.
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
    """The bins of 32 tokens as 8 words, from `first` [CHUNK / 32] on; zeros where the first of them is at `stop` or beyond.

    Word by word, so that each thread holds all of a group: a sum over a second dimension would leave the result in a slice
    layout, which every store after it has to convert.
    """
    words = ()
    for j in tl.static_range(8):
        words += (tl.load(bins + first // 4 + j, mask=first < stop, other=0),)
    return words


@triton.jit
def _bits(words, bin):
    """words as `_load_group` gives them -> int32 [CHUNK / 32], one bit per token: is it in `bin` (0 .. 64) or beyond?

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
    """Prefetch rows of LINES x 128 bytes into L2, at positions where wanted."""
    if LINES > 0:
        at = (rows + position.to(tl.int64) * stride).to(tl.int64)
        for line in tl.static_range(LINES):
            tl.inline_asm_elementwise("{ .reg .pred p; setp.ne.s32 p, $2, 0; @p prefetch.global.L2 [$1]; mov.b32 $0, 0; }",
                                      "=r,l,r", [at + 128 * line, wanted.to(tl.int32)], dtype=tl.int32, is_pure=False, pack=1)


@triton.jit
def _write_selected(bins, words, indices, start, stop, low, bin, sure, ties, ties_wanted, filled, keys, k_s,
                    LINES: tl.constexpr):
    """Write the selected positions of [start, stop), from `low` on, in ascending order, and prefetch their keys.

    words: the first CHUNK bins.  bin: the threshold.  sure: slots filled before `start`, by position or by tokens beyond it.
    ties: tokens in it before `start`.
    Few tokens are selected, so a thread looks at 32 of them as the bits of a word and then writes bit after bit.
    """
    for first in range(start, stop, CHUNK):
        token = first + 32 * tl.arange(0, CHUNK // 32)  # the first one of each group
        following = _load_group(bins, token + CHUNK, stop)
        competing = _below(stop - token) & ~_below(low - token)
        is_sure = _bits(words, bin + 1) & competing
        left = _bits(words, bin) & competing
        # one scan for both counts: CHUNK fits into 16 bits
        both = popcount(is_sure) + (popcount(left ^ is_sure) << 16)
        earlier = tl.cumsum(both, axis=0) - both
        ties_here = ties + (earlier >> 16)
        slot = sure + (earlier & 0xFFFF) + tl.minimum(ties_here, ties_wanted)
        for _ in range(tl.max(popcount(left), axis=0)):
            lowest = left & -left
            left ^= lowest
            tie = (is_sure & lowest) == 0
            taken = (lowest != 0) & ((ties_here < ties_wanted) | ~tie)
            position = token + popcount(lowest - 1)
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
                    BLOCKS: tl.constexpr, LINES: tl.constexpr, SELECTED_LINES: tl.constexpr,
                    PDL: tl.constexpr):
    """The selected positions in ascending order: every block knows from the counts where its own begin.

    This kernel is latency bound. So it prefetches into L2 what attention reads next: keys and values of the tokens that are in
    by their position, rows of LINES x 128 bytes, and the keys of the selected ones, SELECTED_LINES. 0: none.
    """
    block, n_blocks = tl.program_id(0), tl.num_programs(0)
    row = tl.program_id(1).to(tl.int64)
    length, low, high, filled, start, stop = block_range(row, block, n_blocks, seq_lens, budgets, budget, K, sink, recent,
                                                         HEADS, PER_HEAD)
    if LINES > 0:
        keys += (row // HEADS) * k_b + (row % HEADS) // HEADS_PER_KV * k_h
        values += (row // HEADS) * v_b + (row % HEADS) // HEADS_PER_KV * v_h
    pdl_wait(PDL)  # the kernel before writes bins and counts alone
    start = tl.maximum(start, low // CHUNK * CHUNK)
    bins = (bins + row * bins_row).to(tl.pointer_type(tl.int32))
    counts += row * 9 * BLOCKS * 8
    indices += row * K
    words = _load_group(bins, start + 32 * tl.arange(0, CHUNK // 32), stop)
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


def launch_compact(bins: Tensor, counts: Tensor, seq_lens: Tensor, selection: Selection, n_blocks: int,
                   caches: tuple[Tensor, Tensor] | None = None) -> Tensor:
    """The results of `launch_score` with the same arguments, counts [B * Hs, ...] -> indices int32 [B, Hs, K].

    caches: keys and values [B, Hkv, S, D], of which rows are prefetched into L2.
    """
    B, rows, K = len(seq_lens), len(counts), selection.K
    HEADS = rows // B
    indices = torch.empty((B, HEADS, K), dtype=torch.int32, device=bins.device)
    if caches is None or portable(bins.device):
        keys, values, strides, heads_per_kv, lines, selected_lines = None, None, (0,) * 6, 1, 0, 0
    else:
        keys, values = caches
        strides = (*keys.stride()[:3], *values.stride()[:3])
        heads_per_kv = HEADS // keys.shape[1]
        row_bytes = keys.shape[3] * keys.element_size()
        lines = triton.cdiv(row_bytes, 128)
        selected_lines = lines if rows * K * row_bytes <= _PREFETCH_BYTES else 0
    # one warp: more would take shared memory, and with as little as 32 bytes of it the chain of kernels took 1 to 4 us more, 12
    # at 1 x 512K
    _compact_kernel[(n_blocks, rows)](
        seq_lens, bins, counts, indices, selection.budgets, selection.budget, K, selection.sink, selection.recent,
        bins.shape[1], keys, values, *strides, HEADS=HEADS, HEADS_PER_KV=heads_per_kv, PER_HEAD=selection.budgets is not None,
        BLOCKS=counts.shape[2], LINES=lines, SELECTED_LINES=selected_lines, num_warps=1,
        **pdl_options(bins.device))
    return indices


@torch.library.custom_op("hashfast::select_tokens", mutates_args=())
def select_tokens(planes: Tensor, signatures: Tensor, seq_lens: Tensor, budget: int, budgets: Tensor | None, K: int, sink: int,
                  recent: int, shift: int, keys: Tensor | None, values: Tensor | None) -> Tensor:
    """`hash_attention.select_tokens_reference`; the selected positions ascend, and the unused slots (-1) come last.

    planes int32 [B, Hs, 1 + P, W], signatures int32 [B, Hs, S, W], seq_lens int32 [B], budgets int32 [Hs], None to use budget
    -> indices int32 [B, Hs, K].
    keys, values [B, Hkv, S, D] or None: what attention will read at these positions, prefetched into L2 meanwhile.
    """
    B, HEADS, S, _ = signatures.shape
    selection = Selection(budget, budgets, K, sink, recent, shift)
    n_blocks = blocks_per_row(B * HEADS, S, recent)
    scored = launch_score(planes, signatures, seq_lens, selection, n_blocks)
    return launch_compact(*scored, seq_lens, selection, n_blocks, None if keys is None else (keys, values))


@select_tokens.register_fake
def _(planes, signatures, seq_lens, budget, budgets, K, sink, recent, shift, keys, values):
    return planes.new_empty((*planes.shape[:2], K))
