"""Triton kernels of prompts that are read sparsely. ops/prompt_selection.py holds the definitions (`*_reference`) and symbols.

select_rows   score and count all cached tokens (here), write the positions of the best (select.py)   two kernels
gather_rows   K and V of the chosen tokens into rows that lie side by side                            one kernel

Plain Triton on every path. A decode step has one query per head, and popcounts score it; here 64 queries share each signature,
so a product of int8 matrices on tensor cores does, of which the largest of a row is kept: [tokens, 64] is never in memory.
"""
import torch
import triton
import triton.language as tl
from torch import Tensor

from hashfast.kernels.launch import checked_rows
from hashfast.kernels.score import BINS, CHUNK, Selection, block_range, blocks_per_row, store_counts
from hashfast.kernels.select import launch_compact


@triton.jit
def _prompt_score_kernel(weights, signatures, seq_lens, bins, counts, budget, sink, recent, start_at, x_h, x_s, bins_row,
                         GROUP: tl.constexpr, QUERIES: tl.constexpr, W: tl.constexpr, SHIFT: tl.constexpr,
                         BLOCKS: tl.constexpr, TOKENS: tl.constexpr):
    """Bins and counts as `score._score_kernel` leaves them, of the largest score over all queries of a KV head's GROUP; TOKENS
    at a time are multiplied."""
    block, n_blocks = tl.program_id(0), tl.num_programs(0)
    row = tl.program_id(1).to(tl.int64)  # KV head
    _, low, high, _, start, stop = block_range(0, block, n_blocks, seq_lens, None, budget, budget, sink, recent, 1, False)
    signatures += row * GROUP * x_h
    bins += row * bins_row
    bit = tl.arange(0, 32)
    tables = ()  # GROUP x W of the queries' weights, transposed: [32, QUERIES]
    for i in tl.static_range(GROUP * W):
        query = (row * GROUP + i // W) * QUERIES + tl.arange(0, QUERIES)
        tables += (tl.load(weights + query[None, :] * (32 * W) + (i % W) * 32 + bit[:, None]),)
    others = tl.maximum(tl.cdiv(stop - start, CHUNK) * CHUNK, 0) - tl.maximum(stop - tl.maximum(start, low), 0)
    sums = tl.where(tl.arange(0, BINS) == 0, -others, 0)
    for first in range(start, stop, CHUNK):
        for part in range(first, first + CHUNK, TOKENS):
            position = part + tl.arange(0, TOKENS)
            best = tl.full([TOKENS], -(2 ** 30), tl.int32)
            for g in tl.static_range(GROUP):
                product = tl.zeros([TOKENS, QUERIES], tl.int32)
                for w in tl.static_range(W):
                    word = tl.load(signatures + g * x_h + position.to(tl.int64) * x_s + w, mask=position < start_at, other=0)
                    sign = (((word[:, None] >> bit[None, :]) & 1) * 2 - 1).to(tl.int8)
                    product = tl.dot(sign, tables[g * W + w], product, out_dtype=tl.int32)
                best = tl.maximum(best, tl.max(product, axis=1))
            bin = tl.minimum(tl.maximum((best + 1) >> (1 + SHIFT), 0), BINS - 1)
            bin = tl.where((position >= low) & (position < high), bin, 0)
            tl.store(bins + position, bin.to(tl.uint8))
        tl.debug_barrier()  # other threads have stored the bins that are counted
        sums += tl.histogram(tl.load(bins + first + tl.arange(0, CHUNK)).to(tl.int32), BINS)
    store_counts(counts + (row * 9 * BLOCKS + block) * 8, sums, BLOCKS)


def launch_prompt_score(weights: Tensor, signatures: Tensor, n_kv_head: int, seq_lens: Tensor, start: int, selection: Selection,
                        n_blocks: int, tokens: int = 128, num_warps: int = 4) -> tuple[Tensor, Tensor]:
    """weights int8 [Hs, Q, 32 W], signatures int32 [Hs, S, W], seq_lens int32 [1], which holds `start` <= S
    -> bins uint8 [Hkv, start rounded up] and counts uint16 [Hkv, 1 + 8, n_blocks rounded up, 8].
    """
    Hs, queries, _ = weights.shape
    chunks = triton.cdiv(start, CHUNK.value)
    assert triton.cdiv(chunks, n_blocks) * CHUNK.value < 2 ** 16  # counts
    bins = torch.empty((n_kv_head, chunks * CHUNK.value), dtype=torch.uint8, device=weights.device)
    blocks = triton.next_power_of_2(n_blocks)
    counts = torch.empty((n_kv_head, 1 + 8, blocks, 8), dtype=torch.uint16, device=weights.device)
    _prompt_score_kernel[(n_blocks, n_kv_head)](
        weights.contiguous(), checked_rows(signatures), seq_lens, bins, counts, selection.budget, selection.sink,
        selection.recent, start, *signatures.stride()[:2], bins.shape[1], GROUP=Hs // n_kv_head, QUERIES=queries,
        W=signatures.shape[2], SHIFT=selection.shift, BLOCKS=blocks, TOKENS=tokens, num_warps=num_warps)
    return bins, counts


def select_rows(weights: Tensor, signatures: Tensor, n_kv_head: int, start: int, K: int, sink: int, recent: int,
                shift: int) -> Tensor:
    """`prompt_selection.select_rows_reference`; the positions ascend. weights int8 [Hs, Q, 32 W], Q a power of two from 16 on,
    signatures int32 [Hs, S, W], start > K -> int32 [Hkv, K]."""
    seq_lens = torch.full((1,), start, dtype=torch.int32, device=weights.device)
    selection = Selection(K, None, K, sink, recent, shift)
    n_blocks = blocks_per_row(n_kv_head, start, recent)
    scored = launch_prompt_score(weights, signatures, n_kv_head, seq_lens, start, selection, n_blocks)
    return launch_compact(*scored, seq_lens, selection, n_blocks)[0]


# ---------------------------------------------------------------------------------------------------------------- gather

@triton.jit
def _gather_kernel(k, v, indices, k_out, v_out, K, k_h, k_s, v_h, v_s, out_h, D: tl.constexpr, BLOCK: tl.constexpr,
                   BLOCK_D: tl.constexpr):
    slot = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    head = tl.program_id(1).to(tl.int64)
    column = tl.arange(0, BLOCK_D)[None, :]
    position = tl.load(indices + head * K + slot, mask=slot < K, other=0).to(tl.int64)[:, None]
    mask = (slot < K)[:, None] & (column < D)
    out = head * out_h + slot.to(tl.int64)[:, None] * D + column
    tl.store(k_out + out, tl.load(k + head * k_h + position * k_s + column, mask=mask), mask=mask)
    tl.store(v_out + out, tl.load(v + head * v_h + position * v_s + column, mask=mask), mask=mask)


def gather_rows(k: Tensor, v: Tensor, indices: Tensor, most: int) -> tuple[Tensor, Tensor]:
    """`gather_rows_reference`. k, v [Hkv, S, D], indices int32 [Hkv, K], none unused -> both [1, Hkv, K, D]."""
    Hkv, _, D = k.shape
    K = indices.shape[1]
    k_out, v_out = (x.new_empty(1, Hkv, most, D)[:, :, :K] for x in (k, v))
    columns = triton.next_power_of_2(D)
    block = max(1, 4096 // columns)
    _gather_kernel[(triton.cdiv(K, block), Hkv)](
        checked_rows(k), checked_rows(v), indices, k_out, v_out, K, *k.stride()[:2], *v.stride()[:2], k_out.stride(1), D=D,
        BLOCK=block, BLOCK_D=columns, num_warps=4)
    return k_out, v_out
