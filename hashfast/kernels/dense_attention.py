"""Triton kernels of dense attention. hash_attention.py holds the definitions (`*_reference`) and the symbols used here.

dense_attention    split-KV flash attention over the whole prefix, combine     one or two kernels
chunk_attention    flash attention of a prompt chunk                          one kernel
merge              attention over two sets of tokens into one                 one kernel

Plain Triton on every path.
"""
import torch
import triton
import triton.language as tl
from torch import Tensor

from hashfast.kernels.launch import checked_rows, pdl_options, pdl_wait, shared_memory, splits_per_row
from hashfast.kernels.split_kv import LOG2_E, attend_tile, block_d, combine, dot_precision, finish, partials, store_rows

# ------------------------------------------------------------------------------------------------------ launch parameters

def block_parameters(M: int, D: int, element_size: int, device: torch.device) -> dict[str, int]:
    """Tiles of block_m of M queries by block_n tokens that fit into shared memory and, unspilled, into registers.

    Up to 96 KB of shared memory suit every GPU from Ampere on; 128 KB are faster where there are as many. A few queries take at
    most 48 KB (D 128): more would leave the linear layers of the step with less L1 cache than they need.
    """
    block_m = max(16, triton.next_power_of_2(M))
    if element_size > 2:  # products without tensor cores, whose operands are all in registers
        return {"block_m": min(block_m, 32), "block_n": 16, "num_warps": 8, "num_stages": 2}
    if D > 128:
        return {"block_m": min(block_m, 64), "block_n": 32, "num_warps": 8 if block_m >= 64 else 4, "num_stages": 2}
    if block_m >= 128:
        return {"block_m": 128, "block_n": 64, "num_warps": 8, "num_stages": 3 if shared_memory(device) >= 2 ** 17 else 2}
    return {"block_m": block_m, "block_n": 32, "num_warps": 4 if block_m == 64 else 2, "num_stages": 2}


def dense_parameters(rows: int, M: int, S: int, D: int, element_size: int, device: torch.device) -> dict[str, int]:
    """M = G * T queries per KV head, `rows` KV heads of all sequences."""
    blocks = block_parameters(M, D, element_size, device)
    block_m = blocks["block_m"]
    programs = 256 if block_m >= 64 else 512
    return {**blocks, "n_splits": splits_per_row(programs, rows * triton.cdiv(M, block_m), triton.cdiv(S, blocks["block_n"]))}


# ------------------------------------------------------------------------------------------------------------ attend: dense

@triton.jit
def _load_tile(rows, inside, MASKED: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr):
    """A tile at `rows` [N, BLOCK_D] of a cache whose rows have D channels; where MASKED, only rows `inside` [N], else zeros."""
    column = tl.arange(0, BLOCK_D)[None, :]
    if MASKED:
        tile = tl.load(rows, mask=inside[:, None] & (column < D), other=0.0)
    elif D < BLOCK_D:
        tile = tl.load(rows, mask=column < D, other=0.0)
    else:
        tile = tl.load(rows)
    return tile


@triton.jit
def _dense_attention_kernel(q, k_cache, v_cache, seq_lens, partial, partial_lse, scale_log2, T, n_splits,
                            q_b, q_t, q_h, k_b, k_h, k_s, v_b, v_h, v_s,
                            HKV: tl.constexpr, G: tl.constexpr, D: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
                            BLOCK_D: tl.constexpr, CAUSAL: tl.constexpr, PRECISION: tl.constexpr, PDL: tl.constexpr):
    # later queries see more: they start first, so that no long block is left for the end
    block = tl.num_programs(0) - 1 - tl.program_id(0)
    row = tl.program_id(1).to(tl.int64)
    split = tl.program_id(2)
    batch, kv_head = row // HKV, row % HKV
    m = block * BLOCK_M + tl.arange(0, BLOCK_M)  # all heads of a group side by side
    t, head, valid = m // G, kv_head * G + m % G, m < T * G
    column = tl.arange(0, BLOCK_D)[None, :]
    k_cache += batch * k_b + kv_head * k_h
    v_cache += batch * v_b + kv_head * v_h
    pdl_wait(PDL)
    length = tl.load(seq_lens + batch)
    queries = tl.load(q + batch * q_b + (t.to(tl.int64) * q_t + head * q_h)[:, None] + column,
                      mask=valid[:, None] & (column < D), other=0.0)
    # last: the newest token each query sees; all queries of the block see [0, common), some see [0, seen)
    if CAUSAL:
        last = length - T + t
        common = tl.maximum(length - T + (block * BLOCK_M) // G + 1, 0)
        seen = tl.maximum(length - T + tl.minimum((block * BLOCK_M + BLOCK_M - 1) // G, T - 1) + 1, 0)
    else:
        last = length - 1 + tl.zeros_like(t)
        common = length
        seen = length
    # the split takes [start, stop) of it
    per_split = tl.cdiv(tl.cdiv(seen, BLOCK_N), n_splits) * BLOCK_N
    start = split * per_split
    stop = tl.minimum(start + per_split, seen)
    unmasked = tl.maximum(tl.minimum(common // BLOCK_N * BLOCK_N, stop), start)
    top = tl.full([BLOCK_M], float("-inf"), tl.float32)
    total = tl.zeros([BLOCK_M], tl.float32)
    acc = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    # 32-bit offsets within a tile, from a base that moves: 64-bit ones for every element would cost as much as the softmax
    k_offset = (tl.arange(0, BLOCK_N) * k_s)[:, None] + column
    v_offset = (tl.arange(0, BLOCK_N) * v_s)[:, None] + column
    k_s, v_s = tl.cast(k_s, tl.int64), tl.cast(v_s, tl.int64)
    for masked in tl.static_range(2):
        for first in range(unmasked if masked else start, stop if masked else unmasked, BLOCK_N):
            position = first + tl.arange(0, BLOCK_N)
            k = _load_tile(k_cache + first * k_s + k_offset, position < stop, masked, D, BLOCK_D)
            v = _load_tile(v_cache + first * v_s + v_offset, position < stop, masked, D, BLOCK_D)
            visible = position[None, :] <= last[:, None]
            top, total, acc = attend_tile(queries, k, v, visible, top, total, acc, scale_log2, masked, PRECISION)
    value, value_lse = finish(top, total, acc)
    out_row = (batch * T + t) * (HKV * G) + head
    store_rows(partial, partial_lse, out_row * n_splits + split, valid, value, value_lse, D, BLOCK_D)


@torch.library.custom_op("hashfast::dense_attention", mutates_args=())
def dense_attention(q: Tensor, k_cache: Tensor, v_cache: Tensor, seq_lens: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    """`hash_attention.dense_attention_reference`.

    q [B, T, Hq, D], k_cache and v_cache [B, Hkv, S, D], seq_lens int32 [B] -> out [B, T, Hq, D], lse float32 [B, T, Hq].
    """
    B, T, Hq, D = q.shape
    HKV, S = k_cache.shape[1:3]
    return launch_dense(q, k_cache, v_cache, seq_lens, scale,
                        **dense_parameters(B * HKV, Hq // HKV * T, S, D, k_cache.element_size(), q.device))


@dense_attention.register_fake
def _(q, k_cache, v_cache, seq_lens, scale):
    return q.new_empty(q.shape), q.new_empty(q.shape[:3], dtype=torch.float32)


def launch_dense(q: Tensor, k_cache: Tensor, v_cache: Tensor, seq_lens: Tensor, scale: float, *, block_m: int, block_n: int,
                 n_splits: int, num_warps: int, num_stages: int, causal: bool = True) -> tuple[Tensor, Tensor]:
    B, T, Hq, D = q.shape
    HKV = k_cache.shape[1]
    G = Hq // HKV
    out = torch.empty((B, T, Hq, D), dtype=q.dtype, device=q.device)
    lse = torch.empty((B, T, Hq), dtype=torch.float32, device=q.device)
    partial, partial_lse = partials(out, lse, n_splits)
    _dense_attention_kernel[(triton.cdiv(G * T, block_m), B * HKV, n_splits)](
        checked_rows(q), checked_rows(k_cache), checked_rows(v_cache), seq_lens, partial, partial_lse,
        scale * LOG2_E.value, T, n_splits, *q.stride()[:3], *k_cache.stride()[:3], *v_cache.stride()[:3],
        HKV=HKV, G=G, D=D, BLOCK_M=block_m, BLOCK_N=block_n, BLOCK_D=block_d(D), CAUSAL=causal,
        PRECISION=dot_precision(q), num_warps=num_warps, num_stages=num_stages, **pdl_options(q.device))
    combine(partial, partial_lse, out, lse, n_splits)
    return out, lse


# ---------------------------------------------------------------------------------------------------------- prompt chunks

def chunk_attention(q: Tensor, k: Tensor, v: Tensor, causal: bool) -> tuple[Tensor, Tensor]:
    """Attention of many queries: of query i to all N keys or, causal, to those up to N - T + i.

    q [B, T, Hq, D], k and v [B, Hkv, N, D] -> out [B, T, Hq, D], lse float32 [B, T, Hq]. No token of k and v is left out.
    """
    B, T, Hq, D = q.shape
    lengths = torch.full((B,), k.shape[2], dtype=torch.int32, device=q.device)
    blocks = block_parameters(Hq // k.shape[1] * T, D, k.element_size(), q.device)
    return launch_dense(q, k, v, lengths, D ** -0.5, causal=causal, n_splits=1, **blocks)


@triton.jit
def _merge_kernel(out, lse, part, part_lse, T, out_h, out_t, lse_h, part_h, part_t, part_lse_h, D: tl.constexpr,
                  BLOCK_T: tl.constexpr, BLOCK_D: tl.constexpr):
    t = tl.program_id(0) * BLOCK_T + tl.arange(0, BLOCK_T)
    head = tl.program_id(1).to(tl.int64)
    column = tl.arange(0, BLOCK_D)[None, :]
    mask = (t < T)[:, None] & (column < D)
    lse += head * lse_h + t
    a = tl.load(lse, mask=t < T, other=0.0)
    b = tl.load(part_lse + head * part_lse_h + t, mask=t < T, other=0.0)
    top = tl.maximum(a, b)
    total = tl.exp(a - top) + tl.exp(b - top)
    weight = tl.exp(b - top) / total
    rows = t.to(tl.int64)[:, None]
    out += head * out_h + rows * out_t + column
    mine = tl.load(out, mask=mask, other=0.0).to(tl.float32)
    theirs = tl.load(part + head * part_h + rows * part_t + column, mask=mask, other=0.0).to(tl.float32)
    tl.store(out, (mine + (theirs - mine) * weight[:, None]).to(out.dtype.element_ty), mask=mask)
    tl.store(lse, top + tl.log(total), mask=t < T)


def merge(out: Tensor, lse: Tensor, part: Tensor, part_lse: Tensor) -> None:
    """`prompt_attention.merge_reference`, of one sequence. out, part [1, Hq, T, D], lse, part_lse float32 [1, Hq, T]."""
    _, Hq, T, D = out.shape
    columns = triton.next_power_of_2(D)
    block_t = 4096 // columns
    _merge_kernel[(triton.cdiv(T, block_t), Hq)](
        checked_rows(out), checked_rows(lse), checked_rows(part), checked_rows(part_lse), T, *out.stride()[1:3], lse.stride(1),
        *part.stride()[1:3], part_lse.stride(1), D=D, BLOCK_T=block_t, BLOCK_D=columns, num_warps=4)
