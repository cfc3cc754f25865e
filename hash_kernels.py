"""Triton kernels of signatures. hash_attention.py holds the definitions (`*_reference`) and the symbols used here.

rope_encode_append   a step's queries, keys and values: rotate, encode, write to the cache   one kernel
select_tokens        score and count, where there are many tokens count once more, write         two or three kernels

attention_kernels.py holds the attention that follows. Each is a torch.library custom op: torch.compile(fullgraph=True) keeps
it whole, and a CUDA graph can capture it, for nothing here waits for the device: shapes are static and lengths are read on the
device. With TRITON_INTERPRET=1 set before triton is imported, the same functions run on CPU tensors.

The kernels of a step are short, so the time between them counts: on Hopper and later each is launched while the one before
still runs (programmatic dependent launch) and waits for its results with `after_previous`.
"""
import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.language.extra import libdevice

from hash_attention import NUM_BINS, HashEncoder

# ------------------------------------------------------------------------------------------------------ launch parameters

# Chosen by measurement on an H100 and an H200 (132 multiprocessors); a GPU with fewer fills up as well.

def splits_per_row(programs: int, rows: int, tiles: int) -> int:
    """Programs per row so that all rows have about `programs` together and each has a tile of work."""
    return max(1, min(tiles, programs // rows))


# The threshold among the 64 bins is found at once from a histogram where there are few tokens (64 levels); where there are
# many, in two rounds of 8, each counting the tokens at or above 7 of them, which costs less per token and one kernel more.
_COARSE = tl.constexpr(8)


def _select_parameters(rows: int, S: int) -> dict[str, int]:
    """chunk: tokens scored at a time; a block's range is a multiple of it.  step: tokens compacted at a time; divides chunk.

    levels: of the first count, see `_COARSE`.
    """
    if rows * S <= 2 ** 19:
        programs, chunk, levels = 264, 1024, NUM_BINS
    elif rows * S <= 2 ** 21:
        programs, chunk, levels = 528, 1024, _COARSE.value
    elif rows * S <= 2 ** 23:
        programs, chunk, levels = 1056, 2048, _COARSE.value
    else:
        programs, chunk, levels = 2112, 2048, _COARSE.value
    n_blocks = splits_per_row(programs, rows, triton.cdiv(S, chunk))
    if levels == NUM_BINS:
        n_blocks = min(n_blocks, 64)  # every program of the last kernel reads the counts of all blocks
    n_blocks = max(n_blocks, triton.cdiv(S, 255 * chunk))  # counters of one byte
    return {"chunk": chunk, "step": chunk, "n_blocks": n_blocks, "levels": levels, "score_warps": 4, "compact_warps": 1}


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


# ----------------------------------------------------------------------------------------------------------------- encode

@triton.jit
def _rotated(x, cos, sin, HALF: tl.constexpr, BLOCK: tl.constexpr):
    """The rotated halves of one head at x [D], rounded to its dtype."""
    column = tl.arange(0, BLOCK)
    first = tl.load(x + column, mask=column < HALF, other=0.0)
    second = tl.load(x + HALF + column, mask=column < HALF, other=0.0)
    dtype = first.dtype
    first, second = first.to(tl.float32), second.to(tl.float32)
    return (first * cos - second * sin).to(dtype), (second * cos + first * sin).to(dtype)


@triton.jit
def _store_halves(x, first, second, HALF: tl.constexpr, BLOCK: tl.constexpr):
    column = tl.arange(0, BLOCK)
    tl.store(x + column, first, mask=column < HALF)
    tl.store(x + HALF + column, second, mask=column < HALF)


@triton.jit
def _weights(weight, HALF: tl.constexpr, BLOCK: tl.constexpr, BITS: tl.constexpr):
    """The rows of weight [D, BITS] for each half of a head."""
    at = tl.arange(0, BLOCK)[:, None] * BITS + tl.arange(0, BITS)[None, :]
    mask = tl.arange(0, BLOCK)[:, None] < HALF
    return tl.load(weight + at, mask=mask, other=0.0), tl.load(weight + HALF * BITS + at, mask=mask, other=0.0)


@triton.jit
def _code(first, second, weights, bias, BITS: tl.constexpr):
    """x @ weight + bias for the halves of x and of weight, bias [BITS] -> float32 [BITS]."""
    products = first.to(tl.float32)[:, None] * weights[0] + second.to(tl.float32)[:, None] * weights[1]
    return tl.sum(products, axis=0) + tl.load(bias + tl.arange(0, BITS))


@triton.jit
def _pack(bits, WORDS: tl.constexpr):
    """Booleans [32 * WORDS] -> int32 [WORDS], little-endian."""
    words = tl.reshape(bits.to(tl.int32), [WORDS, 32])
    return tl.sum(words << tl.arange(0, 32)[None, :], axis=1)


@triton.jit
def _rope_encode_append_kernel(qkv, cos, sin, key_weight, key_bias, query_weight, query_bias, seq_lens, q_out, planes,
                               k_cache, v_cache, signatures, T, k_b, k_h, k_s, v_b, v_h, v_s, x_b, x_h, x_s,
                               HQ: tl.constexpr, HKV: tl.constexpr, HEADS: tl.constexpr, D: tl.constexpr, BLOCK: tl.constexpr,
                               WORDS: tl.constexpr, P: tl.constexpr, SIGNS: tl.constexpr, KEYS: tl.constexpr,
                               QUERIES: tl.constexpr, EARLY: tl.constexpr):
    """One signature head (or KV head without signatures) of one new token: its G queries, and its key and value.

    qkv [B, T, Hq + 2 Hkv, D], cos and sin [B, T, D / 2]. SIGNS: query_bits is 1. KEYS, QUERIES: which of them to encode.
    EARLY: load all weights while the kernel before still runs.
    """
    head = tl.program_id(0).to(tl.int64)
    batch = tl.program_id(1).to(tl.int64)
    t = tl.program_id(2)
    G: tl.constexpr = HQ // HEADS
    HALF: tl.constexpr = D // 2
    BITS: tl.constexpr = 32 * WORDS
    kv_head = head // (HEADS // HKV)
    column = tl.arange(0, BLOCK)
    word = tl.arange(0, WORDS)
    token = batch * T + t
    if EARLY:
        key_weights = _weights(key_weight + head * (D * BITS), HALF, BLOCK, BITS)
        query_weights = ()
        for g in tl.static_range(G):
            query_weights += (_weights(query_weight + (head * G + g) * (D * BITS), HALF, BLOCK, BITS),)
    after_previous()
    # all loads come before the first store, which they would otherwise have to wait for
    position = tl.load(seq_lens + batch).to(tl.int64) - T + t
    qkv += token * ((HQ + 2 * HKV) * D)
    angle_cos = tl.load(cos + token * HALF + column, mask=column < HALF, other=0.0)
    angle_sin = tl.load(sin + token * HALF + column, mask=column < HALF, other=0.0)
    key_first, key_second = _rotated(qkv + (HQ + kv_head) * D, angle_cos, angle_sin, HALF, BLOCK)
    value = tl.arange(0, 2 * BLOCK)
    v = tl.load(qkv + (HQ + HKV + kv_head) * D + value, mask=value < D)
    queries = ()
    for g in tl.static_range(G):
        queries += (_rotated(qkv + (head * G + g) * D, angle_cos, angle_sin, HALF, BLOCK),)

    if head % (HEADS // HKV) == 0:
        _store_halves(k_cache + batch * k_b + kv_head * k_h + position * k_s, key_first, key_second, HALF, BLOCK)
        tl.store(v_cache + batch * v_b + kv_head * v_h + position * v_s + value, v, mask=value < D)
    for g in tl.static_range(G):
        _store_halves(q_out + (token * HQ + head * G + g) * D, queries[g][0], queries[g][1], HALF, BLOCK)
    if KEYS:
        if not EARLY:
            key_weights = _weights(key_weight + head * (D * BITS), HALF, BLOCK, BITS)
        code = _code(key_first, key_second, key_weights, key_bias + head * BITS, BITS)
        tl.store(signatures + batch * x_b + head * x_h + position * x_s + word, _pack(code > 0, WORDS))
    codes = tl.zeros([BITS], tl.float32)
    if QUERIES:
        for g in tl.static_range(G):
            if EARLY:
                weights = query_weights[g]
            else:
                weights = _weights(query_weight + (head * G + g) * (D * BITS), HALF, BLOCK, BITS)
            code = _code(queries[g][0], queries[g][1], weights, query_bias + (head * G + g) * BITS, BITS)
            codes += tl.where(code > 0, 1.0, -1.0) if SIGNS else code
    if QUERIES:
        if not SIGNS:
            largest = tl.max(tl.abs(codes), axis=0)
            limit = (1 << P) - 1
            codes = tl.where(largest > 0, codes / largest, 0.0) * (limit + 0.5)
            # adding 1.5 * 2^23 rounds to the nearest integer, halves to even, as torch.round does
            codes = tl.minimum(tl.maximum((codes + 12582912.0) - 12582912.0, -limit), limit)
        magnitude = tl.abs(codes).to(tl.int32)
        planes += (batch * HEADS + head) * ((1 + P) * WORDS)
        tl.store(planes + word, _pack(codes > 0, WORDS))
        for p in tl.static_range(P):
            tl.store(planes + (1 + p) * WORDS + word, _pack(((magnitude >> p) & 1) > 0, WORDS))


def rope_encode_append(qkv: Tensor, cos: Tensor, sin: Tensor, encoder: HashEncoder | None, k_cache: Tensor, v_cache: Tensor,
                       signatures: Tensor | None, seq_lens: Tensor) -> tuple[Tensor, Tensor | None]:
    """`hash_attention.rope_encode_append_reference`, for linear encoders.

    qkv [B, T, (Hq + 2 Hkv) D] -> q [B, T, Hq, D] and, with an encoder and T = 1, planes int32 [B, Hs, 1 + P, W].
    """
    if encoder is None:
        return _rope_encode_append(qkv, cos, sin, None, None, None, None, k_cache, v_cache, None, seq_lens, 0, 0)[0], None
    (key,), (query,) = encoder.key, encoder.query
    q, planes = _rope_encode_append(qkv, cos, sin, key.weight, key.bias, query.weight, query.bias, k_cache, v_cache, signatures,
                                    seq_lens, encoder.config.query_bits, encoder.config.planes(encoder.group))
    return q, planes if qkv.shape[1] == 1 else None


@torch.library.custom_op("hashfast::rope_encode_append", mutates_args=("k_cache", "v_cache", "signatures"))
def _rope_encode_append(qkv: Tensor, cos: Tensor, sin: Tensor, key_weight: Tensor | None, key_bias: Tensor | None,
                        query_weight: Tensor | None, query_bias: Tensor | None, k_cache: Tensor, v_cache: Tensor,
                        signatures: Tensor | None, seq_lens: Tensor, query_bits: int, P: int) -> tuple[Tensor, Tensor]:
    B, T, width = qkv.shape
    HKV, D = k_cache.shape[1], k_cache.shape[3]
    HQ = width // D - 2 * HKV
    encode = signatures is not None
    HEADS, WORDS = (signatures.shape[1], signatures.shape[3]) if encode else (HKV, 1)
    q = torch.empty((B, T, HQ, D), dtype=qkv.dtype, device=qkv.device)
    planes = torch.empty((B, HEADS, 1 + P, WORDS), dtype=torch.int32, device=qkv.device)
    # with 8 warps that many weights take half of the registers
    early = encode and T == 1 and (1 + HQ // HEADS) * D * 32 * WORDS <= 2 ** 15
    _rope_encode_append_kernel[(HEADS, B, T)](
        qkv.contiguous(), cos.contiguous(), sin.contiguous(), key_weight, key_bias, query_weight, query_bias, seq_lens,
        q, planes,
        checked_rows(k_cache), checked_rows(v_cache), signatures, T, *k_cache.stride()[:3], *v_cache.stride()[:3],
        *(signatures.stride()[:3] if encode else (0, 0, 0)),
        HQ=HQ, HKV=HKV, HEADS=HEADS, D=D, BLOCK=triton.next_power_of_2(D // 2), WORDS=WORDS, P=P, SIGNS=query_bits == 1,
        KEYS=encode, QUERIES=encode and T == 1, EARLY=early, num_warps=8 if encode else 4, launch_pdl=DEPENDENT_LAUNCH)
    return q, planes


@_rope_encode_append.register_fake
def _(qkv, cos, sin, key_weight, key_bias, query_weight, query_bias, k_cache, v_cache, signatures, seq_lens, query_bits, P):
    B, T, width = qkv.shape
    heads, words = (signatures.shape[1], signatures.shape[3]) if signatures is not None else (k_cache.shape[1], 1)
    D = k_cache.shape[3]
    return (qkv.new_empty((B, T, width // D - 2 * k_cache.shape[1], D)),
            seq_lens.new_empty((B, heads, 1 + P, words)))


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


# A token's rank is one byte: 1 + bin where it competes, 0 where it does not. Ranks stay below 128, so four of them in an
# int32 are compared at once: adding 128 - r to each byte sets the top bit of those >= r and never reaches the next byte.


@triton.jit
def _at_least(words, rank):
    """0 or 1 in each byte: is it at least `rank` (0 .. 128)? words: int32, 4 ranks each."""
    return ((words + (128 - rank) * 0x01010101) >> 7) & 0x01010101


@triton.jit
def _count(counters, words, first, step: tl.constexpr):
    """Add to the byte counters of 7 levels: ranks at least first + step, first + 2 step, .. first + 7 step."""
    counted = ()
    for level in tl.static_range(7):
        counted += (counters[level] + _at_least(words, first + (1 + level) * step),)
    return counted


@triton.jit
def _add7(a0, a1, a2, a3, a4, a5, a6, b0, b1, b2, b3, b4, b5, b6):
    return a0 + b0, a1 + b1, a2 + b2, a3 + b3, a4 + b4, a5 + b5, a6 + b6


@triton.jit
def _store_counts(counts, counters, lowest):
    """Write lowest and the 7 sums of all bytes of the counters to counts [8]."""
    wide = ()
    for level in tl.static_range(7):
        pairs = (counters[level] & 0x00FF00FF) + ((counters[level] >> 8) & 0x00FF00FF)
        wide += ((pairs & 0xFFFF) + (pairs >> 16),)
    tl.store(counts, lowest)
    if INTERPRETED:  # reduces several tensors together one element at a time
        for level in tl.static_range(7):
            tl.store(counts + 1 + level, tl.sum(wide[level], axis=0))
    else:
        sums = tl.reduce(wide, 0, _add7)
        for level in tl.static_range(7):
            tl.store(counts + 1 + level, sums[level])


@triton.jit
def _load_counts(counts, n_blocks, BLOCKS: tl.constexpr, LEVELS: tl.constexpr):
    """counts [n_blocks, LEVELS] of a row -> [BLOCKS, LEVELS], zeros past n_blocks."""
    other = tl.arange(0, BLOCKS)[:, None]
    return tl.load(counts + other * LEVELS + tl.arange(0, LEVELS)[None, :], mask=other < n_blocks, other=0)


@triton.jit
def _level(counts, wanted, LEVELS: tl.constexpr):
    """The highest level with `wanted` tokens at or above it, from counts [BLOCKS, LEVELS].

    -> level, tokens at or above it and above it in each block [BLOCKS]; none are above the last.
    """
    level = tl.arange(0, LEVELS)
    chosen = tl.maximum(tl.sum((tl.sum(counts, axis=0) >= wanted).to(tl.int32), axis=0) - 1, 0)
    return (chosen, tl.sum(tl.where((level == chosen)[None, :], counts, 0), axis=1),
            tl.sum(tl.where((level == chosen + 1)[None, :], counts, 0), axis=1))


@triton.jit
def _threshold(counts, fine_counts, row, n_blocks, wanted, BINS: tl.constexpr, BLOCKS: tl.constexpr, LEVELS: tl.constexpr):
    """The rank above which all tokens are selected. -> it, tokens above it and at it in each block [BLOCKS], how many of the
    latter are selected."""
    table = _load_counts(counts + row * n_blocks * LEVELS, n_blocks, BLOCKS, LEVELS)
    if LEVELS < BINS:
        fine_table = _load_counts(fine_counts + row * n_blocks * LEVELS, n_blocks, BLOCKS, LEVELS)
    threshold, at_least, above = _level(table, wanted, LEVELS)
    threshold += 1
    if LEVELS < BINS:
        fine, at_least, higher = _level(fine_table, wanted, LEVELS)
        threshold = (threshold - 1) * (BINS // LEVELS) + 1 + fine
        above = tl.where(fine == LEVELS - 1, above, higher)  # the next bin up may belong to the level above
    return threshold, above, at_least - above, tl.maximum(wanted - tl.sum(above, axis=0), 0)


@triton.jit
def _score_kernel(planes, signatures, seq_lens, ranks, counts, budgets, budget, K, sink, recent, S, x_b, x_h, x_s, ranks_row,
                  HEADS: tl.constexpr, P: tl.constexpr, W: tl.constexpr, SHIFT: tl.constexpr, BINS: tl.constexpr,
                  PER_HEAD: tl.constexpr, CHUNK: tl.constexpr, LEVELS: tl.constexpr, EARLY: tl.constexpr):
    """The rank of every token, and how many of each block's are at or above each level of bins.

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
    for w in tl.static_range(W):
        signs += (tl.load(planes + w),)
        for p in tl.static_range(P):
            magnitudes += (tl.load(planes + (1 + p) * W + w),)
    ranks = (ranks + row * ranks_row).to(tl.pointer_type(tl.int32))
    total = 0
    for w in tl.static_range(W):
        for p in tl.static_range(P):
            total += _popcount(magnitudes[w * P + p]) << p
    histogram = tl.zeros([BINS], tl.int32)
    zero = tl.zeros([CHUNK // 4], tl.int32)
    counters = (zero, zero, zero, zero, zero, zero, zero)
    for first in range(start, stop, CHUNK):
        position = tl.multiple_of(first, CHUNK) + tl.arange(0, CHUNK)
        following = ()
        for w in tl.static_range(W):
            following += (tl.load(signatures + (position + CHUNK).to(tl.int64) * x_s + w,
                                  mask=(position + CHUNK < S) & (first + CHUNK < stop), other=0),)
        score = tl.zeros([CHUNK], tl.int32)
        for w in tl.static_range(W):
            for p in tl.static_range(P):
                score += _popcount(~(words[w] ^ signs[w]) & magnitudes[w * P + p]) << p
        rank = tl.minimum(tl.maximum((score - total // 2) >> SHIFT, 0), BINS - 1) + 1
        if (first < low) | (first + CHUNK > high):
            rank = tl.where((position >= low) & (position < high), rank, 0)
        packed = tl.sum(tl.reshape(rank, [CHUNK // 4, 4]) << (8 * tl.arange(0, 4))[None, :], axis=1)
        tl.store(ranks + first // 4 + tl.arange(0, CHUNK // 4), packed)
        if LEVELS == BINS:
            histogram += tl.histogram(rank - 1, BINS, mask=rank > 0)
        else:
            counters = _count(counters, packed, 1, BINS // LEVELS)
        words = following
    counts += (row * n_blocks + block) * LEVELS
    if LEVELS == BINS:
        tl.store(counts + tl.arange(0, BINS), tl.cumsum(histogram, axis=0, reverse=True))
    else:
        _store_counts(counts, counters, tl.maximum(tl.minimum(stop, high) - tl.maximum(start, low), 0))


@triton.jit
def _count_kernel(seq_lens, ranks, counts, fine_counts, budgets, budget, K, sink, recent, ranks_row,
                  HEADS: tl.constexpr, BINS: tl.constexpr, PER_HEAD: tl.constexpr, CHUNK: tl.constexpr, BLOCKS: tl.constexpr):
    """How many of each block's tokens are at or above each of the bins from the level that the threshold lies in."""
    block, n_blocks = tl.program_id(0), tl.num_programs(0)
    row = tl.program_id(1).to(tl.int64)
    after_previous()
    counts += row * n_blocks * _COARSE
    table = _load_counts(counts, n_blocks, BLOCKS, _COARSE)
    length, low, high, filled, start, stop = _plan(row, block, n_blocks, seq_lens, budgets, budget, K, sink, recent,
                                                   HEADS, PER_HEAD, CHUNK)
    ranks = (ranks + row * ranks_row).to(tl.pointer_type(tl.int32)) + tl.arange(0, CHUNK // 4)
    words = tl.load(ranks + start // 4, mask=start < stop, other=0)
    level, _, _ = _level(table, filled - (length - (high - low)), _COARSE)
    zero = tl.zeros([CHUNK // 4], tl.int32)
    counters = (zero, zero, zero, zero, zero, zero, zero)
    for first in range(start, stop, CHUNK):
        following = tl.load(ranks + (first + CHUNK) // 4, mask=first + CHUNK < stop, other=0)
        counters = _count(counters, words, 1 + level * (BINS // _COARSE), 1)
        words = following
    _store_counts(fine_counts + (row * n_blocks + block) * _COARSE, counters, tl.load(counts + block * _COARSE + level))


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
    """words as `_load_group` gives them -> int32 [GROUPS], one bit per token: is its rank at least `rank`?"""
    bits = tl.zeros_like(words[0])
    for j in tl.static_range(8):
        bits |= (((_at_least(words[j], rank) * 0x00204081) >> 21) & 0xF) << (4 * j)
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


@triton.jit
def _compact_kernel(seq_lens, ranks, counts, fine_counts, indices, budgets, budget, K, sink, recent, ranks_row,
                    HEADS: tl.constexpr, BINS: tl.constexpr, PER_HEAD: tl.constexpr, CHUNK: tl.constexpr,
                    STEP: tl.constexpr, BLOCKS: tl.constexpr, LEVELS: tl.constexpr):
    """The selected positions in ascending order: every block knows from the counts where its own begin."""
    block, n_blocks = tl.program_id(0), tl.num_programs(0)
    row = tl.program_id(1).to(tl.int64)
    after_previous()
    length, low, high, filled, start, stop = _plan(row, block, n_blocks, seq_lens, budgets, budget, K, sink, recent,
                                                  HEADS, PER_HEAD, CHUNK)
    start = tl.maximum(start, low // CHUNK * CHUNK)
    stop = tl.minimum(stop, high)
    ranks = (ranks + row * ranks_row).to(tl.pointer_type(tl.int32))
    indices += row * K
    words = _load_group(ranks, start + 32 * tl.arange(0, STEP // 32), stop)
    wanted = filled - (length - (high - low))
    threshold, above, ties, ties_wanted = _threshold(counts, fine_counts, row, n_blocks, wanted, BINS, BLOCKS, LEVELS)
    before = tl.arange(0, BLOCKS) < block
    _write_selected(ranks, words, indices, start, stop, threshold, low + tl.sum(tl.where(before, above, 0), axis=0),
                   tl.sum(tl.where(before, ties, 0), axis=0), ties_wanted, filled, STEP)

    # the tokens that are in by their position, and the slots that nothing fills
    for first in range(block * STEP, low, n_blocks * STEP):
        position = first + tl.arange(0, STEP)
        tl.store(indices + position, position, mask=position < tl.minimum(low, filled))
    for first in range(high + block * STEP, length, n_blocks * STEP):
        position = first + tl.arange(0, STEP)
        slot = filled - length + position
        tl.store(indices + slot, position, mask=(position < length) & (slot >= 0))
    for first in range(filled + block * STEP, K, n_blocks * STEP):
        slot = first + tl.arange(0, STEP)
        tl.store(indices + slot, tl.full([STEP], -1, tl.int32), mask=slot < K)


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


@torch.library.custom_op("hashfast::select_tokens", mutates_args=())
def _select_tokens(planes: Tensor, signatures: Tensor, seq_lens: Tensor, budget: int, budgets: Tensor | None, sink: int,
                   recent: int, K: int, shift: int) -> Tensor:
    return _launch_select(planes, signatures, seq_lens, budget, budgets, sink, recent, K, shift,
                          **_select_parameters(signatures.shape[0] * signatures.shape[1], signatures.shape[2]))


@_select_tokens.register_fake
def _(planes, signatures, seq_lens, budget, budgets, sink, recent, K, shift):
    return planes.new_empty((*planes.shape[:2], K))


def _launch_select(planes: Tensor, signatures: Tensor, seq_lens: Tensor, budget: int, budgets: Tensor | None, sink: int,
                   recent: int, K: int, shift: int, *, chunk: int, step: int, n_blocks: int, levels: int, score_warps: int,
                   compact_warps: int) -> Tensor:
    limits = (budgets, budget, K, sink, recent)
    scored = _launch_score(planes, signatures, seq_lens, limits, shift, chunk, n_blocks, levels, score_warps)
    return _launch_compact(*scored, seq_lens, limits, signatures.shape[1], chunk, step, compact_warps)


def _readable(signatures: Tensor) -> int:
    """Tokens of a row that a load may touch: S rounded up where memory goes on, as masks at odd places keep loads narrow."""
    S = signatures.shape[2]
    rounded = S + -S % 16
    last = sum((size - 1) * stride for size, stride in zip(signatures.shape, signatures.stride(), strict=True))
    end = signatures.storage_offset() + last + (rounded - S) * signatures.stride(2)
    return rounded if end < signatures.untyped_storage().nbytes() // 4 else S


def _launch_score(planes: Tensor, signatures: Tensor, seq_lens: Tensor, limits: tuple, shift: int, chunk: int, n_blocks: int,
                  levels: int, num_warps: int) -> tuple[Tensor, Tensor]:
    """-> ranks uint8 [B * Hs, S rounded up] and counts int32 [B * Hs, n_blocks, levels].

    limits: (budgets, budget, K, sink, recent).
    """
    B, HEADS, S, W = signatures.shape
    ranks_row = triton.cdiv(S, chunk) * chunk  # whole chunks, so that no access needs a mask
    ranks = torch.empty((B * HEADS, ranks_row), dtype=torch.uint8, device=planes.device)
    counts = torch.empty((B * HEADS, n_blocks, levels), dtype=torch.int32, device=planes.device)
    _score_kernel[(n_blocks, B * HEADS)](
        planes.contiguous(), checked_rows(signatures), seq_lens, ranks, counts, *limits, _readable(signatures),
        *signatures.stride()[:3], ranks_row, HEADS=HEADS, P=planes.shape[2] - 1, W=W, SHIFT=shift, BINS=NUM_BINS,
        PER_HEAD=limits[0] is not None, CHUNK=chunk, LEVELS=levels, EARLY=limits[4] >= 1, num_warps=num_warps,
        launch_pdl=DEPENDENT_LAUNCH)
    return ranks, counts


def _launch_compact(ranks: Tensor, counts: Tensor, seq_lens: Tensor, limits: tuple, heads: int, chunk: int, step: int,
                    num_warps: int) -> Tensor:
    """What `_launch_score` gave, with the same limits and chunk -> indices int32 [B, Hs, K]."""
    rows, n_blocks, levels = counts.shape
    K = limits[2]
    indices = torch.empty((rows // heads, heads, K), dtype=torch.int32, device=ranks.device)
    shared = {"HEADS": heads, "BINS": NUM_BINS, "PER_HEAD": limits[0] is not None, "CHUNK": chunk,
              "BLOCKS": triton.next_power_of_2(n_blocks), "launch_pdl": DEPENDENT_LAUNCH}
    fine_counts = None
    if levels < NUM_BINS:
        fine_counts = torch.empty_like(counts)
        _count_kernel[(n_blocks, rows)](seq_lens, ranks, counts, fine_counts, *limits, ranks.shape[1], num_warps=4, **shared)
    _compact_kernel[(n_blocks, rows)](seq_lens, ranks, counts, fine_counts, indices, *limits, ranks.shape[1], STEP=step,
                                      LEVELS=levels, num_warps=num_warps, **shared)
    return indices
