"""Triton kernels of hash attention. hash_attention.py holds the definitions (`*_reference`) and the symbols used here.

append_to_cache      the newest rows of K, V and signatures                                 one kernel
select_tokens        score -> bins and histograms per block -> threshold -> compaction      two kernels
sparse_attention     split-K flash decoding over gathered cache rows                        one kernel
dense_attention      split-K flash attention over the whole prefix                          one kernel

Each is a torch.library custom op: torch.compile(fullgraph=True) keeps it whole, and a CUDA graph can capture it, for nothing
here waits for the device: shapes are static and lengths are read on the device. With TRITON_INTERPRET=1 set before
triton is imported, the same functions run on CPU tensors.
"""
import functools

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.language.extra import libdevice

from hash_attention import NUM_BINS

# ------------------------------------------------------------------------------------------------------ launch parameters

PROGRAMS = 512  # programs that a launch aims for: about four per multiprocessor of the largest GPUs


def _split(rows: int, tiles: int) -> int:
    """Programs per row: enough for `rows` rows to fill the GPU, each with a tile of work where all tiles are used."""
    return max(1, min(tiles, triton.cdiv(PROGRAMS, rows)))


def _select_parameters(rows: int, S: int) -> dict[str, int]:
    """chunk: tokens scored at a time; a block's range is a multiple of it.  step: tokens compacted at a time; divides chunk."""
    chunk = 1024
    return {"chunk": chunk, "step": chunk, "n_blocks": _split(rows, triton.cdiv(S, chunk)),
            "score_warps": 4, "compact_warps": 4}


def _sparse_parameters(rows: int, K: int, element_size: int) -> dict[str, int]:
    block_k = 64 if element_size <= 2 else 32
    return {"block_k": block_k, "n_splits": _split(rows, triton.cdiv(K, block_k)), "num_warps": 4, "num_stages": 2}


def _dense_parameters(rows: int, M: int, S: int, element_size: int) -> dict[str, int]:
    """M = G * T queries per KV head."""
    wide = element_size <= 2
    block_m = min(max(16, triton.next_power_of_2(M)), 128 if wide else 32)
    block_n = 64 if wide else 32
    n_splits = _split(rows * triton.cdiv(M, block_m), triton.cdiv(S, block_n))
    return {"block_m": block_m, "block_n": block_n, "n_splits": n_splits,
            "num_warps": 8 if block_m == 128 else 4, "num_stages": 3 if wide else 2}


# ----------------------------------------------------------------------------------------------------------------- append

@triton.jit
def _append_kernel(k, v, new_signatures, k_cache, v_cache, signatures, seq_lens,
                   k_b, k_h, k_t, v_b, v_h, v_t, x_b, x_h, x_t, kc_b, kc_h, kc_s, vc_b, vc_h, vc_s, xc_b, xc_h, xc_s,
                   HKV: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr, W: tl.constexpr, SIGNED: tl.constexpr):
    t = tl.program_id(0).to(tl.int64)
    head = tl.program_id(1).to(tl.int64)
    batch = tl.program_id(2).to(tl.int64)
    position = tl.load(seq_lens + batch) - tl.num_programs(0) + t
    column = tl.arange(0, BLOCK_D)
    mask = (column < D) & (head < HKV) & (position >= 0)
    new_k = tl.load(k + batch * k_b + head * k_h + t * k_t + column, mask=mask)
    new_v = tl.load(v + batch * v_b + head * v_h + t * v_t + column, mask=mask)
    tl.store(k_cache + batch * kc_b + head * kc_h + position * kc_s + column, new_k, mask=mask)
    tl.store(v_cache + batch * vc_b + head * vc_h + position * vc_s + column, new_v, mask=mask)
    if SIGNED:
        word = tl.arange(0, W)
        bits = tl.load(new_signatures + batch * x_b + head * x_h + t * x_t + word)
        tl.store(signatures + batch * xc_b + head * xc_h + position * xc_s + word, bits, mask=(word < W) & (position >= 0))


def append_to_cache(k: Tensor, v: Tensor, new_signatures: Tensor | None, k_cache: Tensor, v_cache: Tensor,
                    signatures: Tensor | None, seq_lens: Tensor) -> None:
    """`hash_attention.append_to_cache_reference`: write the newest T rows of each sequence in place.

    k, v [B, Hkv, T, D] into k_cache, v_cache [B, Hkv, S, D]; new_signatures int32 [B, Hs, T, W] into signatures
    [B, Hs, S, W] (or both None); seq_lens int32 [B], the T tokens included. Rows before a sequence's start are left out.
    """
    _append(k, v, new_signatures, k_cache, v_cache, signatures, seq_lens)


@torch.library.custom_op("hashfast::append_to_cache", mutates_args=("k_cache", "v_cache", "signatures"))
def _append(k: Tensor, v: Tensor, new_signatures: Tensor | None, k_cache: Tensor, v_cache: Tensor,
            signatures: Tensor | None, seq_lens: Tensor) -> None:
    B, HKV, T, D = k.shape
    signed = signatures is not None
    if not signed:  # a kernel needs pointers even for what it never touches
        new_signatures, signatures = k, k_cache
    _append_kernel[(T, max(HKV, signatures.shape[1]), B)](
        *map(_rows, (k, v, new_signatures, k_cache, v_cache, signatures)), seq_lens,
        *(stride for x in (k, v, new_signatures, k_cache, v_cache, signatures) for stride in x.stride()[:3]),
        HKV=HKV, D=D, BLOCK_D=triton.next_power_of_2(D), W=signatures.shape[3] if signed else 1, SIGNED=signed, num_warps=1)


@_append.register_fake
def _(k, v, new_signatures, k_cache, v_cache, signatures, seq_lens):
    return None


# ----------------------------------------------------------------------------------------------------------------- select

_INTERPRETED = tl.constexpr(triton.knobs.runtime.interpret)


@triton.jit
def _popcount(x):
    if _INTERPRETED:  # has no libdevice
        x = x.to(tl.uint32, bitcast=True)
        x = x - ((x >> 1) & 0x55555555)
        x = (x & 0x33333333) + ((x >> 2) & 0x33333333)
        x = (x + (x >> 4)) & 0x0F0F0F0F
        x = x + (x >> 8)
        return ((x + (x >> 16)) & 0x3F).to(tl.int32)
    else:
        return libdevice.popc(x)


@triton.jit
def _plan(row, block, n_blocks, seq_lens, budget, budgets, K, sink, recent,
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


@triton.jit
def _score_kernel(planes, signatures, seq_lens, budgets, bins, histograms, budget, K, sink, recent, S, x_b, x_h, x_s, bins_row,
                  HEADS: tl.constexpr, P: tl.constexpr, W: tl.constexpr, SHIFT: tl.constexpr, BINS: tl.constexpr,
                  PER_HEAD: tl.constexpr, CHUNK: tl.constexpr):
    """The bin of every competing token, and each block's histogram of them."""
    block, n_blocks = tl.program_id(0), tl.num_programs(0)
    row = tl.program_id(1).to(tl.int64)
    _, low, high, _, start, stop = _plan(row, block, n_blocks, seq_lens, budget, budgets, K, sink, recent,
                                         HEADS, PER_HEAD, CHUNK)
    signatures += (row // HEADS) * x_b + (row % HEADS) * x_h
    bins += row * bins_row
    planes += row * ((1 + P) * W)
    signs, magnitudes, total = (), (), 0
    for w in tl.static_range(W):
        signs += (tl.load(planes + w),)
        for p in tl.static_range(P):
            magnitudes += (tl.load(planes + (1 + p) * W + w),)
            total += _popcount(magnitudes[w * P + p]) << p
    histogram = tl.zeros([BINS], tl.int32)
    stop = tl.minimum(stop, high)
    # whole chunks of always-selected tokens are left out
    for first in range(tl.maximum(start, low // CHUNK * CHUNK), stop, CHUNK):
        position = tl.multiple_of(first, CHUNK) + tl.arange(0, CHUNK)
        score = tl.zeros([CHUNK], tl.int32)
        for w in tl.static_range(W):
            # masked by the cache's length alone, as loads and stores masked at odd places are not vectorised
            word = tl.load(signatures + position.to(tl.int64) * x_s + w, mask=position < S, other=0)
            for p in tl.static_range(P):
                score += _popcount(~(word ^ signs[w]) & magnitudes[w * P + p]) << p
        bin = tl.minimum(tl.maximum((score - total // 2) >> SHIFT, 0), BINS - 1)
        tl.store(bins + position, bin.to(tl.uint8))
        histogram += tl.histogram(bin, BINS, mask=(position >= low) & (position < stop))
    tl.store(histograms + (row * n_blocks + block) * BINS + tl.arange(0, BINS), histogram)


@triton.jit
def _compact_kernel(seq_lens, budgets, bins, histograms, indices, budget, K, sink, recent, bins_row,
                    HEADS: tl.constexpr, BINS: tl.constexpr, PER_HEAD: tl.constexpr, CHUNK: tl.constexpr,
                    STEP: tl.constexpr, HISTOGRAMS: tl.constexpr):
    """The selected positions in ascending order: every block knows from the histograms where its own begin."""
    block, n_blocks = tl.program_id(0), tl.num_programs(0)
    row = tl.program_id(1).to(tl.int64)
    length, low, high, filled, start, stop = _plan(row, block, n_blocks, seq_lens, budget, budgets, K, sink, recent,
                                                   HEADS, PER_HEAD, CHUNK)
    bins += row * bins_row
    histograms += row * n_blocks * BINS
    indices += row * K
    index = tl.arange(0, BINS)
    before = tl.zeros([BINS], tl.int32)
    total = tl.zeros([BINS], tl.int32)
    for first in range(0, n_blocks, HISTOGRAMS):
        other = (first + tl.arange(0, HISTOGRAMS))[:, None]
        counts = tl.load(histograms + other * BINS + index[None, :], mask=other < n_blocks, other=0)
        total += tl.sum(counts, axis=0)
        before += tl.sum(tl.where(other < block, counts, 0), axis=0)

    # the threshold is the highest bin at and above which there are enough tokens; its own are taken until the budget is met
    wanted = filled - (length - (high - low))
    at_least = tl.cumsum(total, axis=0, reverse=True)
    threshold = tl.maximum(tl.sum((at_least >= wanted).to(tl.int32), axis=0) - 1, 0)
    ties_wanted = tl.maximum(wanted - tl.sum(tl.where(index > threshold, total, 0), axis=0), 0)
    ties = tl.sum(tl.where(index == threshold, before, 0), axis=0)
    sure = tl.sum(tl.where(index > threshold, before, 0), axis=0) + tl.minimum(start, low) + tl.maximum(start - high, 0)

    for first in range(start, stop, STEP):
        position = tl.multiple_of(first, STEP) + tl.arange(0, STEP)
        inside = position < stop
        competes = (position >= low) & (position < high) & inside
        bin = tl.load(bins + position).to(tl.int32)  # means nothing where the token does not compete
        is_sure = inside & ((competes & (bin > threshold)) | (position < low) | (position >= high))
        is_tie = competes & (bin == threshold)
        # one scan for both counts: STEP fits into 16 bits
        both = is_sure.to(tl.int32) + (is_tie.to(tl.int32) << 16)
        earlier = tl.cumsum(both, axis=0) - both
        ties_here = ties + (earlier >> 16)
        slot = sure + (earlier & 0xFFFF) + tl.minimum(ties_here, ties_wanted)
        taken = is_sure | (is_tie & (ties_here < ties_wanted))
        tl.store(indices + slot, position, mask=taken & (slot < filled))
        both = tl.sum(both, axis=0)
        sure += both & 0xFFFF
        ties += both >> 16

    for first in range(filled + block * STEP, K, n_blocks * STEP):
        slot = first + tl.arange(0, STEP)
        tl.store(indices + slot, tl.full([STEP], -1, tl.int32), mask=slot < K)


def select_tokens(planes: Tensor, signatures: Tensor, seq_lens: Tensor, budget: int | Tensor, sink: int, recent: int,
                  K: int, shift: int) -> Tensor:
    """`hash_attention.select_tokens_reference`; the selected positions ascend, and the unused slots (-1) come last.

    planes int32 [B, Hs, 1 + P, W], signatures int32 [B, Hs, S, W], seq_lens int32 [B], budget int or int32 [Hs]
    -> indices int32 [B, Hs, K].
    """
    if isinstance(budget, Tensor):
        return _select_tokens(planes, signatures, seq_lens, K, budget, sink, recent, K, shift)
    return _select_tokens(planes, signatures, seq_lens, budget, None, sink, recent, K, shift)


@torch.library.custom_op("hashfast::select_tokens", mutates_args=())
def _select_tokens(planes: Tensor, signatures: Tensor, seq_lens: Tensor, budget: int, budgets: Tensor | None, sink: int,
                   recent: int, K: int, shift: int) -> Tensor:
    rows = signatures.shape[0] * signatures.shape[1]
    return _launch_select(planes, signatures, seq_lens, budget, budgets, sink, recent, K, shift,
                          **_select_parameters(rows, signatures.shape[2]))


@_select_tokens.register_fake
def _(planes, signatures, seq_lens, budget, budgets, sink, recent, K, shift):
    return planes.new_empty((*planes.shape[:2], K))


def _launch_select(planes: Tensor, signatures: Tensor, seq_lens: Tensor, budget: int, budgets: Tensor | None, sink: int,
                   recent: int, K: int, shift: int, *, chunk: int, step: int, n_blocks: int, score_warps: int,
                   compact_warps: int) -> Tensor:
    B, HEADS, S, W = signatures.shape
    rows = B * HEADS
    planes = planes.contiguous()
    bins_row = triton.cdiv(S, chunk) * chunk  # whole chunks, so that no access to the bins needs a mask
    bins = torch.empty((rows, bins_row), dtype=torch.uint8, device=planes.device)
    histograms = torch.empty((rows, n_blocks, NUM_BINS), dtype=torch.int32, device=planes.device)
    indices = torch.empty((B, HEADS, K), dtype=torch.int32, device=planes.device)
    per_head = budgets is not None
    budgets = budgets if per_head else seq_lens
    _score_kernel[(n_blocks, rows)](
        planes, _rows(signatures), seq_lens, budgets, bins, histograms, budget, K, sink, recent,
        S, *signatures.stride()[:3], bins_row, HEADS=HEADS, P=planes.shape[2] - 1, W=W, SHIFT=shift, BINS=NUM_BINS,
        PER_HEAD=per_head, CHUNK=chunk, num_warps=score_warps)
    _compact_kernel[(n_blocks, rows)](
        seq_lens, budgets, bins, histograms, indices, budget, K, sink, recent, bins_row, HEADS=HEADS, BINS=NUM_BINS,
        PER_HEAD=per_head, CHUNK=chunk, STEP=step, HISTOGRAMS=min(64, triton.next_power_of_2(n_blocks)),
        num_warps=compact_warps)
    return indices


# ----------------------------------------------------------------------------------------------------- attend: shared parts

@triton.jit
def _attend(q, k, v, visible, top, total, acc, scale_log2, PRECISION: tl.constexpr):
    """One tile of flash attention in base 2. q [M, D], k and v [N, D]; top, total [M] and acc [M, D] are the running state."""
    scores = tl.dot(q, tl.trans(k), input_precision=PRECISION) * scale_log2
    scores = tl.where(visible, scores, float("-inf"))
    new_top = tl.maximum(top, tl.max(scores, axis=1))
    # while a query has seen nothing its top is -inf, and -inf - -inf would be NaN
    pivot = tl.where(new_top == float("-inf"), 0.0, new_top)
    weights = tl.exp2(scores - pivot[:, None])
    keep = tl.exp2(top - pivot)
    total = total * keep + tl.sum(weights, axis=1)
    acc = tl.dot(weights.to(v.dtype), v, acc * keep[:, None], input_precision=PRECISION)
    return new_top, total, acc


@triton.jit
def _finish(top, total, acc):
    """Normalised output and base-2 log-sum-exp; a query that saw nothing gets 0 and -inf."""
    safe = tl.where(total > 0, total, 1.0)
    return acc / safe[:, None], top + tl.log2(safe)


@triton.jit
def _is_last(counter, n_splits):
    """Whether this split is the last of its row to arrive. The counter is left at 0 for the next launch."""
    tl.debug_barrier()  # all threads have stored their share before one of them counts this split in
    last = tl.atomic_add(counter, 1, sem="acq_rel") == n_splits - 1
    if last:
        tl.store(counter, 0)
    return last


@triton.jit
def _combine(partial, partial_lse, n_splits, used, ROWS: tl.constexpr, BLOCK_D: tl.constexpr, SPLITS: tl.constexpr):
    """Merge the `used` first rows of partial [n_splits, ROWS, BLOCK_D] and partial_lse [n_splits, ROWS], SPLITS at a time."""
    row = tl.arange(0, ROWS)[None, :]
    top = tl.full([ROWS], float("-inf"), tl.float32)
    total = tl.zeros([ROWS], tl.float32)
    acc = tl.zeros([ROWS, BLOCK_D], tl.float32)
    for first in range(0, n_splits, SPLITS):
        split = (first + tl.arange(0, SPLITS))[:, None]
        at = split * ROWS + row  # [SPLITS, ROWS]
        mask = (split < n_splits) & (row < used)
        # .cg: these were written by other multiprocessors, so the first-level cache is passed by
        lse = tl.load(partial_lse + at, mask=mask, other=float("-inf"), cache_modifier=".cg")
        out = tl.load(partial + at[:, :, None] * BLOCK_D + tl.arange(0, BLOCK_D)[None, None, :],
                      mask=mask[:, :, None], other=0.0, cache_modifier=".cg")
        new_top = tl.maximum(top, tl.max(lse, axis=0))
        pivot = tl.where(new_top == float("-inf"), 0.0, new_top)
        keep = tl.exp2(top - pivot)
        weights = tl.exp2(lse - pivot[None, :])
        total = total * keep + tl.sum(weights, axis=0)
        acc = acc * keep[:, None] + tl.sum(weights[:, :, None] * out, axis=0)
        top = new_top
    return _finish(top, total, acc)


@triton.jit
def _store_rows(out, lse, row, valid, value, value_lse, D: tl.constexpr, BLOCK_D: tl.constexpr):
    """Write value [R, BLOCK_D] and value_lse [R] (base 2) to rows `row` of out [*, D] and lse [*] where valid."""
    column = tl.arange(0, BLOCK_D)[None, :]
    tl.store(out + row[:, None] * D + column, value.to(out.dtype.element_ty), mask=valid[:, None] & (column < D))
    tl.store(lse + row, value_lse * 0.6931471805599453, mask=valid)  # ln 2


@triton.jit
def _store_partial(partial, partial_lse, valid, value, value_lse, M: tl.constexpr, ROWS: tl.constexpr, BLOCK_D: tl.constexpr):
    """Write value [M, BLOCK_D] and value_lse [M] to a split's scratch [ROWS, BLOCK_D] and [ROWS] where valid."""
    row = tl.arange(0, M)
    valid &= row < ROWS
    tl.store(partial + row[:, None] * BLOCK_D + tl.arange(0, BLOCK_D)[None, :], value, mask=valid[:, None])
    tl.store(partial_lse + row, value_lse, mask=valid)


@functools.cache
def _counters(device: torch.device, size: int) -> Tensor:
    """Arrival counters of the splits, int32 zeros [size]. Kept for good: CUDA graphs hold their address.

    Kernels of one device share them, so two streams must not run split attention at the same time.
    """
    if device.type == "cuda" and torch.cuda.is_current_stream_capturing():
        raise RuntimeError("run attention once at this batch size before capturing it in a CUDA graph")
    return torch.zeros(size, dtype=torch.int32, device=device)


def _scratch(rows: int, n_splits: int, tile: int, D: int, device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
    """partial float32 [rows, n_splits, tile, D], partial_lse float32 [rows, n_splits, tile], counters int32 [>= rows]."""
    if n_splits == 1:
        rows = 0
    partial = torch.empty((rows, n_splits, tile, D), dtype=torch.float32, device=device)
    partial_lse = torch.empty((rows, n_splits, tile), dtype=torch.float32, device=device)
    return partial, partial_lse, _counters(device, max(1 << 16, triton.next_power_of_2(rows)))


def _rows(x: Tensor) -> Tensor:
    if x.stride(-1) != 1 and x.shape[-1] != 1:
        raise ValueError(f"the last dimension must be contiguous, but the strides are {x.stride()}")
    return x


# ----------------------------------------------------------------------------------------------------------- attend: sparse

@triton.jit
def _sparse_attention_kernel(q, k_cache, v_cache, indices, out, lse, partial, partial_lse, counters, scale_log2, K, n_splits,
                             tiles_per_split, q_b, q_h, k_b, k_h, k_s, v_b, v_h, v_s,
                             HEADS: tl.constexpr, HEADS_PER_KV: tl.constexpr, G: tl.constexpr, D: tl.constexpr,
                             BLOCK_G: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_D: tl.constexpr, ROWS: tl.constexpr,
                             SPLITS: tl.constexpr, DIRECT: tl.constexpr, PRECISION: tl.constexpr):
    split = tl.program_id(0)
    row = tl.program_id(1).to(tl.int64)
    batch, head = row // HEADS, row % HEADS
    member = tl.arange(0, BLOCK_G)
    column = tl.arange(0, BLOCK_D)[None, :]
    indices += row * K
    k_cache += batch * k_b + (head // HEADS_PER_KV) * k_h
    v_cache += batch * v_b + (head // HEADS_PER_KV) * v_h
    queries = tl.load(q + batch * q_b + (head * G + member)[:, None] * q_h + column,
                      mask=(member < G)[:, None] & (column < D), other=0.0)
    top = tl.full([BLOCK_G], float("-inf"), tl.float32)
    total = tl.zeros([BLOCK_G], tl.float32)
    acc = tl.zeros([BLOCK_G, BLOCK_D], tl.float32)
    first_tile = split * tiles_per_split
    for tile in range(first_tile, tl.minimum(first_tile + tiles_per_split, tl.cdiv(K, BLOCK_K))):
        slot = tile * BLOCK_K + tl.arange(0, BLOCK_K)
        position = tl.load(indices + slot, mask=slot < K, other=-1).to(tl.int64)
        valid = position >= 0
        # an unused slot loads nothing, so a tile of -1 costs no memory traffic, and its zeros meet weights of 0
        mask = valid[:, None] & (column < D)
        k = tl.load(k_cache + position[:, None] * k_s + column, mask=mask, other=0.0)
        v = tl.load(v_cache + position[:, None] * v_s + column, mask=mask, other=0.0)
        top, total, acc = _attend(queries, k, v, valid[None, :], top, total, acc, scale_log2, PRECISION)
    value, value_lse = _finish(top, total, acc)
    if DIRECT:
        _store_rows(out, lse, row * G + member, member < G, value, value_lse, D, BLOCK_D)
    else:
        partial += row * n_splits * (ROWS * BLOCK_D)
        partial_lse += row * n_splits * ROWS
        _store_partial(partial + split * (ROWS * BLOCK_D), partial_lse + split * ROWS, member < G, value, value_lse,
                       BLOCK_G, ROWS, BLOCK_D)
        if _is_last(counters + row, n_splits):
            combined, combined_lse = _combine(partial, partial_lse, n_splits, G, ROWS, BLOCK_D, SPLITS)
            query = tl.arange(0, ROWS)
            _store_rows(out, lse, row * G + query, query < G, combined, combined_lse, D, BLOCK_D)


def sparse_attention(q: Tensor, k_cache: Tensor, v_cache: Tensor, indices: Tensor,
                     scale: float | None = None) -> tuple[Tensor, Tensor]:
    """`hash_attention.sparse_attention_reference`.

    q [B, Hq, D], k_cache and v_cache [B, Hkv, S, D], indices int32 [B, Hs, K] -> out [B, Hq, D], lse float32 [B, Hq].
    """
    return _sparse_attention(q, k_cache, v_cache, indices, q.shape[-1] ** -0.5 if scale is None else scale)


@torch.library.custom_op("hashfast::sparse_attention", mutates_args=())
def _sparse_attention(q: Tensor, k_cache: Tensor, v_cache: Tensor, indices: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    B, HEADS, K = indices.shape
    return _launch_sparse(q, k_cache, v_cache, indices, scale, **_sparse_parameters(B * HEADS, K, k_cache.element_size()))


@_sparse_attention.register_fake
def _(q, k_cache, v_cache, indices, scale):
    return q.new_empty(q.shape), q.new_empty(q.shape[:2], dtype=torch.float32)


def _launch_sparse(q: Tensor, k_cache: Tensor, v_cache: Tensor, indices: Tensor, scale: float, *, block_k: int, n_splits: int,
                   num_warps: int, num_stages: int) -> tuple[Tensor, Tensor]:
    B, Hq, D = q.shape
    HEADS, K = indices.shape[1:]
    G, BLOCK_D = Hq // HEADS, triton.next_power_of_2(D)
    tile = triton.next_power_of_2(G)
    out = torch.empty((B, Hq, D), dtype=q.dtype, device=q.device)
    lse = torch.empty((B, Hq), dtype=torch.float32, device=q.device)
    partial, partial_lse, counters = _scratch(B * HEADS, n_splits, tile, BLOCK_D, q.device)
    tiles_per_split = triton.cdiv(triton.cdiv(K, block_k), n_splits)
    _sparse_attention_kernel[(n_splits, B * HEADS)](
        _rows(q), _rows(k_cache), _rows(v_cache), indices.contiguous(), out, lse, partial, partial_lse, counters,
        scale * 1.4426950408889634, K, n_splits, tiles_per_split,  # scores in base 2: log2 e
        *q.stride()[:2], *k_cache.stride()[:3], *v_cache.stride()[:3],
        HEADS=HEADS, HEADS_PER_KV=HEADS // k_cache.shape[1], G=G, D=D, BLOCK_G=max(16, tile), BLOCK_K=block_k, BLOCK_D=BLOCK_D,
        ROWS=tile, SPLITS=_combined(tile, BLOCK_D), DIRECT=n_splits == 1, PRECISION=_precision(q),
        num_warps=num_warps, num_stages=num_stages)
    return out, lse


def _combined(rows: int, D: int) -> int:
    """Splits that `_combine` merges at a time: 4096 values are 32 registers in each of 128 threads."""
    return max(1, 4096 // (rows * D))


def _precision(q: Tensor) -> str:
    """float32 is multiplied as float32; TF32 would lose what a float32 caller asks for."""
    return "ieee" if q.dtype == torch.float32 else "tf32"


# ------------------------------------------------------------------------------------------------------------ attend: dense

@triton.jit
def _query_rows(block, batch, kv_head, T, G: tl.constexpr, Hq: tl.constexpr, BLOCK_M: tl.constexpr, SIZE: tl.constexpr):
    """The first SIZE queries of a block, all heads of a group side by side: their t, head, row of the output and validity."""
    m = block * BLOCK_M + tl.arange(0, SIZE)
    t, head = m // G, kv_head * G + m % G
    return t, head, (batch * T + t) * Hq + head, m < T * G


@triton.jit
def _dense_attention_kernel(q, k_cache, v_cache, seq_lens, out, lse, partial, partial_lse, counters, scale_log2, T, n_splits,
                            q_b, q_t, q_h, k_b, k_h, k_s, v_b, v_h, v_s,
                            HKV: tl.constexpr, G: tl.constexpr, D: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
                            BLOCK_D: tl.constexpr, ROWS: tl.constexpr, SPLITS: tl.constexpr, DIRECT: tl.constexpr,
                            PRECISION: tl.constexpr):
    # later queries see more: they start first, so that no long block is left for the end
    block = tl.num_programs(0) - 1 - tl.program_id(0)
    row = tl.program_id(1).to(tl.int64)
    split = tl.program_id(2)
    batch, kv_head = row // HKV, row % HKV
    length = tl.load(seq_lens + batch)
    t, head, out_row, valid = _query_rows(block, batch, kv_head, T, G, HKV * G, BLOCK_M, BLOCK_M)
    column = tl.arange(0, BLOCK_D)[None, :]
    queries = tl.load(q + batch * q_b + (t.to(tl.int64) * q_t + head * q_h)[:, None] + column,
                      mask=valid[:, None] & (column < D), other=0.0)
    k_cache += batch * k_b + kv_head * k_h
    v_cache += batch * v_b + kv_head * v_h
    last = length - T + t  # the newest token each query sees

    # all queries of the block see [0, common), some see [0, seen); the split takes [start, stop) of it
    common = tl.maximum(length - T + (block * BLOCK_M) // G + 1, 0)
    seen = tl.maximum(length - T + tl.minimum((block * BLOCK_M + BLOCK_M - 1) // G, T - 1) + 1, 0)
    per_split = tl.cdiv(tl.cdiv(seen, BLOCK_N), n_splits) * BLOCK_N
    start = split * per_split
    stop = tl.minimum(start + per_split, seen)
    unmasked = tl.maximum(tl.minimum(common // BLOCK_N * BLOCK_N, stop), start)
    top = tl.full([BLOCK_M], float("-inf"), tl.float32)
    total = tl.zeros([BLOCK_M], tl.float32)
    acc = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    for masked in tl.static_range(2):
        for first in range(unmasked if masked else start, stop if masked else unmasked, BLOCK_N):
            position = first + tl.arange(0, BLOCK_N)
            mask = ((position < stop)[:, None] | (masked == 0)) & (column < D)
            visible = (position[None, :] <= last[:, None]) | (masked == 0)
            at = position.to(tl.int64)[:, None]
            k = tl.load(k_cache + at * k_s + column, mask=mask, other=0.0)
            v = tl.load(v_cache + at * v_s + column, mask=mask, other=0.0)
            top, total, acc = _attend(queries, k, v, visible, top, total, acc, scale_log2, PRECISION)
    value, value_lse = _finish(top, total, acc)
    if DIRECT:
        _store_rows(out, lse, out_row, valid, value, value_lse, D, BLOCK_D)
    else:
        tile = row * tl.num_programs(0) + block
        partial += tile * n_splits * (ROWS * BLOCK_D)
        partial_lse += tile * n_splits * ROWS
        _store_partial(partial + split * (ROWS * BLOCK_D), partial_lse + split * ROWS, valid, value, value_lse,
                       BLOCK_M, ROWS, BLOCK_D)
        if _is_last(counters + tile, n_splits):
            combined, combined_lse = _combine(partial, partial_lse, n_splits, T * G - block * BLOCK_M, ROWS, BLOCK_D, SPLITS)
            _, _, to_row, is_query = _query_rows(block, batch, kv_head, T, G, HKV * G, BLOCK_M, ROWS)
            _store_rows(out, lse, to_row, is_query, combined, combined_lse, D, BLOCK_D)


def dense_attention(q: Tensor, k_cache: Tensor, v_cache: Tensor, seq_lens: Tensor,
                    scale: float | None = None) -> tuple[Tensor, Tensor]:
    """`hash_attention.dense_attention_reference`.

    q [B, T, Hq, D], k_cache and v_cache [B, Hkv, S, D], seq_lens int32 [B] -> out [B, T, Hq, D], lse float32 [B, T, Hq].
    """
    return _dense_attention(q, k_cache, v_cache, seq_lens, q.shape[-1] ** -0.5 if scale is None else scale)


@torch.library.custom_op("hashfast::dense_attention", mutates_args=())
def _dense_attention(q: Tensor, k_cache: Tensor, v_cache: Tensor, seq_lens: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    B, T, Hq, _ = q.shape
    HKV, S = k_cache.shape[1:3]
    return _launch_dense(q, k_cache, v_cache, seq_lens, scale,
                         **_dense_parameters(B * HKV, Hq // HKV * T, S, k_cache.element_size()))


@_dense_attention.register_fake
def _(q, k_cache, v_cache, seq_lens, scale):
    return q.new_empty(q.shape), q.new_empty(q.shape[:3], dtype=torch.float32)


def _launch_dense(q: Tensor, k_cache: Tensor, v_cache: Tensor, seq_lens: Tensor, scale: float, *, block_m: int, block_n: int,
                  n_splits: int, num_warps: int, num_stages: int) -> tuple[Tensor, Tensor]:
    B, T, Hq, D = q.shape
    HKV = k_cache.shape[1]
    G, BLOCK_D = Hq // HKV, triton.next_power_of_2(D)
    n_blocks = triton.cdiv(G * T, block_m)
    tile = min(block_m, triton.next_power_of_2(G * T))
    out = torch.empty((B, T, Hq, D), dtype=q.dtype, device=q.device)
    lse = torch.empty((B, T, Hq), dtype=torch.float32, device=q.device)
    partial, partial_lse, counters = _scratch(B * HKV * n_blocks, n_splits, tile, BLOCK_D, q.device)
    _dense_attention_kernel[(n_blocks, B * HKV, n_splits)](
        _rows(q), _rows(k_cache), _rows(v_cache), seq_lens, out, lse, partial, partial_lse, counters,
        scale * 1.4426950408889634, T, n_splits,  # scores in base 2: log2 e
        *q.stride()[:3], *k_cache.stride()[:3], *v_cache.stride()[:3],
        HKV=HKV, G=G, D=D, BLOCK_M=block_m, BLOCK_N=block_n, BLOCK_D=BLOCK_D, ROWS=tile, SPLITS=_combined(tile, BLOCK_D),
        DIRECT=n_splits == 1, PRECISION=_precision(q), num_warps=num_warps, num_stages=num_stages)
    return out, lse
