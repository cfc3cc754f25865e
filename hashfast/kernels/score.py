"""Triton kernel of scores: the bin of every token, and how many tokens of each block of a row are in each bin.

hash_attention.py holds the definition (`score_reference`, `score_bins`) and the symbols used here. To change a score, change it
there and in `portable_scores` or `portable_bins`, and run with HASHFAST_PORTABLE=1: score_ptx.py has a faster form of both and
of the histogram, which computes the rule as published.
"""
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.language.extra import libdevice

from hashfast.kernels.launch import INTERPRETED, balanced_splits, checked_rows, pdl_options, pdl_wait, portable
from hashfast.kernels.score_ptx import mma_histogram, mma_scores, packed_bins, store_mma_histogram

CHUNK = tl.constexpr(1024)  # tokens scored, then compacted, at a time: by two warps, 16 a lane, then by one, 32 a lane
BINS = tl.constexpr(64)  # hash_attention.NUM_BINS; counted as a table of 8 x 8


class Selection(NamedTuple):
    """What selection needs to know beside its tensors, as `hash_attention.select_tokens_reference` defines it."""
    budget: int  # tokens per signature head
    budgets: Tensor | None  # int32 [Hs] on the device, instead
    K: int  # slots per signature head
    sink: int
    recent: int
    shift: int


def blocks_per_row(rows: int, S: int, recent: int) -> int:
    """Blocks of whole chunks that both kernels of selection divide a row into."""
    # the limits lie between powers of two: a cache has some tokens more than the context it is made for
    millions = rows * S / 2 ** 20
    programs = 256 if millions < 0.75 else 512 if millions < 1.5 else 1024 if millions < 12 else 4096
    chunks = max(1, triton.cdiv(S - recent, CHUNK.value))  # the last tokens do not compete
    n_blocks = min(balanced_splits(chunks, programs // rows), 256)  # the second kernel reads the counts of all
    return max(n_blocks, triton.cdiv(S, (2 ** 16 - 1) // CHUNK.value * CHUNK.value))  # a count has 16 bits


# ----------------------------------------------------------------------------------------------------- both kernels' parts

@triton.jit
def popcount(x):
    if INTERPRETED:  # has no libdevice
        x = x.to(tl.uint32, bitcast=True)
        x = x - ((x >> 1) & 0x55555555)
        x = (x & 0x33333333) + ((x >> 2) & 0x33333333)
        x = (x + (x >> 4)) & 0x0F0F0F0F
        x = x + (x >> 8)
        return ((x + (x >> 16)) & 0x3F).to(tl.int32)
    else:
        return libdevice.popc(x)


@triton.jit
def block_range(row, block, n_blocks, seq_lens, budgets, budget, K, sink, recent, HEADS: tl.constexpr, PER_HEAD: tl.constexpr):
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
    per_block = tl.cdiv(tl.cdiv(high, n_blocks), CHUNK) * CHUNK
    start = block * per_block
    return length, low, high, filled, start, tl.minimum(start + per_block, high)


# ------------------------------------------------------------------------------------------------------------------- score

@triton.jit
def portable_scores(words, signs, magnitudes, P: tl.constexpr, W: tl.constexpr):
    """`score_reference`: the summed weights of the bits where words W x [N] and signs W agree, [N]. magnitudes: W x P."""
    score = tl.zeros_like(words[0])
    for w in tl.static_range(W):
        agree = ~(words[w] ^ signs[w])
        for p in tl.static_range(P):
            score += popcount(agree & magnitudes[w][p]) << p
    return score


@triton.jit
def portable_bins(score, total, SHIFT: tl.constexpr):
    """`score_bins`: clamp((score - total // 2) >> SHIFT, 0, 63)."""
    return tl.minimum(tl.maximum((score - total // 2) >> SHIFT, 0), BINS - 1)


@triton.jit
def store_counts(counts, histogram, BLOCKS: tl.constexpr):
    """histogram [64] of a block's competing tokens -> its counts, as `_score_kernel` describes them."""
    table = tl.reshape(histogram, [8, 8])
    i = tl.arange(0, 8)
    tl.store(counts + i, tl.cumsum(tl.sum(table, axis=1), axis=0, reverse=True).to(tl.uint16))
    tl.store(counts + 8 * BLOCKS * (1 + i[:, None]) + i[None, :], tl.cumsum(table, axis=1, reverse=True).to(tl.uint16))


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
                  BLOCKS: tl.constexpr, EARLY: tl.constexpr, PORTABLE: tl.constexpr, PDL: tl.constexpr):
    """The bins of tokens, bytes, in whole chunks; 0 for those that do not compete. And uint16 counts [1 + 8, BLOCKS, 8] of the
    competing tokens of each block: first those in each eight bins or beyond, then, for each eight, those in each bin or beyond
    in the same eight.

    EARLY: the first signatures are loaded while the kernel before still runs. What that one may write is the newest token's,
    which does not compete where `recent` is at least 1.
    """
    block, n_blocks = tl.program_id(0), tl.num_programs(0)
    row = tl.program_id(1).to(tl.int64)
    if not EARLY:
        pdl_wait(PDL)
    _, low, high, _, start, stop = block_range(row, block, n_blocks, seq_lens, budgets, budget, K, sink, recent,
                                               HEADS, PER_HEAD)
    signatures += (row // HEADS) * x_b + (row % HEADS) * x_h
    # as far as memory can be read, not up to `stop`: a mask with an unaligned bound keeps loads from being vectorised
    words = _load_words(signatures, start + tl.arange(0, CHUNK), x_s, S, W)
    if EARLY:
        pdl_wait(PDL)
    planes += row * ((1 + P) * W)
    signs, magnitudes = (), ()
    total = 0
    for w in tl.static_range(W):
        signs += (tl.load(planes + w),)
        magnitude = ()
        for p in tl.static_range(P):
            magnitude += (tl.load(planes + (1 + p) * W + w),)
            total += popcount(magnitude[p]) << p
        magnitudes += (magnitude,)
    bins += row * bins_row
    counts += (row * 9 * BLOCKS + block) * 8
    # Tokens that are scored but do not compete are counted in bin 0, so their number is taken away there.
    others = tl.maximum(tl.cdiv(stop - start, CHUNK) * CHUNK, 0) - tl.maximum(stop - tl.maximum(start, low), 0)
    if PORTABLE:
        sums = tl.where(tl.arange(0, BINS) == 0, -others, 0)
    else:
        # Counts are added two at a time, as halves of a word, to the initial values stored here. Until all are added the lower
        # half may borrow from the upper.
        counts = counts.to(tl.pointer_type(tl.int32))
        i = tl.arange(0, 64)
        tl.store(counts + (i // 4) * (4 * BLOCKS) + i % 4, tl.where((i == 0) | (i == 4), -others, 0), mask=i < 9 * 4)
        sums = tl.zeros([CHUNK], tl.int32)
    for first in range(start, stop, CHUNK):
        position = tl.multiple_of(first, CHUNK) + tl.arange(0, CHUNK)
        if PORTABLE:
            bin = portable_bins(portable_scores(words, signs, magnitudes, P, W), total, SHIFT)
            if (first < low) | (first + CHUNK > high):
                bin = tl.where((position >= low) & (position < high), bin, 0)
        else:
            if (first < low) | (first + CHUNK > high):
                words = _masked(words, signs, (position >= low) & (position < high), W)
            bin = packed_bins(mma_scores(words, signs, magnitudes, P, W), total, SHIFT)
        # This store decides the layout of all: four consecutive tokens a lane are a load of 16 bytes and a store of 4; where a
        # token has several words, one token a lane is better.
        tl.store(bins + tl.max_contiguous(position, 4 if W == 1 else 1), bin.to(tl.uint8))
        if first + CHUNK < stop:
            words = _load_words(signatures, position + CHUNK, x_s, S, W)
        if PORTABLE:
            sums += tl.histogram(bin, BINS)
        else:
            sums = mma_histogram(sums, bin)
    if PORTABLE:
        store_counts(counts, sums, BLOCKS)
    else:
        tl.debug_barrier()  # other threads have written the initial values
        store_mma_histogram(counts, sums, BLOCKS)


def readable_tokens(signatures: Tensor) -> int:
    """Tokens of a row that a load may touch: S rounded up where memory goes on, as unaligned masks keep loads narrow."""
    S = signatures.shape[2]
    rounded = S + -S % 16
    last = sum((size - 1) * stride for size, stride in zip(signatures.shape, signatures.stride(), strict=True))
    end = signatures.storage_offset() + last + (rounded - S) * signatures.stride(2)
    return rounded if end < signatures.untyped_storage().nbytes() // 4 else S


def launch_score(planes: Tensor, signatures: Tensor, seq_lens: Tensor, selection: Selection,
                 n_blocks: int) -> tuple[Tensor, Tensor]:
    """planes int32 [B, Hs, 1 + P, W], signatures int32 [B, Hs, S, W], seq_lens int32 [B]
    -> bins uint8 [B * Hs, S rounded up] and counts uint16 [B * Hs, 1 + 8, n_blocks rounded up, 8].
    """
    B, HEADS, S, W = signatures.shape
    chunks = triton.cdiv(S, CHUNK.value)
    assert triton.cdiv(chunks, n_blocks) * CHUNK.value < 2 ** 16  # counts
    bins_row = chunks * CHUNK.value  # whole chunks, so that no access needs a mask
    plain = portable(planes.device)
    bins = torch.empty((B * HEADS, bins_row), dtype=torch.uint8, device=planes.device)
    blocks = triton.next_power_of_2(n_blocks)
    counts = torch.empty((B * HEADS, 1 + 8, blocks, 8), dtype=torch.uint16, device=planes.device)
    _score_kernel[(n_blocks, B * HEADS)](
        planes.contiguous(), checked_rows(signatures), seq_lens, bins, counts, selection.budgets, selection.budget, selection.K,
        selection.sink, selection.recent, readable_tokens(signatures), *signatures.stride()[:3], bins_row,
        HEADS=HEADS, P=planes.shape[2] - 1, W=W, SHIFT=selection.shift, PER_HEAD=selection.budgets is not None, BLOCKS=blocks,
        EARLY=selection.recent >= 1, PORTABLE=plain, num_warps=4 if plain else 2, **pdl_options(planes.device))
    return bins, counts
