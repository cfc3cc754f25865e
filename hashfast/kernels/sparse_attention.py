"""Triton kernels of sparse attention. hash_attention.py holds the definition (`*_reference`) and the symbols used here.

sparse_attention   split-KV flash decoding over gathered cache rows, combine   one or two kernels

Here the portable kernel, in tiles; sparse_attention_ptx.py has a faster one for the caches that models decode with.
"""
import torch
import triton
import triton.language as tl
from torch import Tensor

from hashfast.kernels.launch import pdl_wait, portable, splits_per_row
from hashfast.kernels.sparse_attention_ptx import can_launch_registers, launch_registers
from hashfast.kernels.split_kv import attend_tile, block_d, dot_precision, finish, launch_splits, store_rows


@torch.library.custom_op("hashfast::sparse_attention", mutates_args=())
def sparse_attention(q: Tensor, k_cache: Tensor, v_cache: Tensor, indices: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    """`hash_attention.sparse_attention_reference`.

    q [B, Hq, D], k_cache and v_cache [B, Hkv, S, D], indices int32 [B, Hs, K] -> out [B, Hq, D], lse float32 [B, Hq].
    """
    if not portable(q.device) and can_launch_registers(q, k_cache, v_cache, indices):
        return launch_registers(q, k_cache, v_cache, indices, scale)
    B, HEADS, K = indices.shape
    return launch_tiles(q, k_cache, v_cache, indices, scale, **tile_parameters(B * HEADS, K, q.shape[2], q.element_size()))


@sparse_attention.register_fake
def _(q, k_cache, v_cache, indices, scale):
    return q.new_empty(q.shape), q.new_empty(q.shape[:2], dtype=torch.float32)


def tile_parameters(rows: int, K: int, D: int, element_size: int) -> dict[str, int]:
    block_k, num_warps = (64, 2 if D <= 128 else 4) if element_size <= 2 else (32, 8)  # fewer warps would spill registers
    return {"block_k": block_k, "n_splits": splits_per_row(512, rows, triton.cdiv(K, block_k)), "num_warps": num_warps,
            "num_stages": 2}


@triton.jit
def _tile_attention_kernel(q, k_cache, v_cache, indices, partial, partial_lse, scale_log2, K, n_splits,
                           tiles_per_split, q_b, q_h, k_b, k_h, k_s, v_b, v_h, v_s,
                           HEADS: tl.constexpr, HEADS_PER_KV: tl.constexpr, G: tl.constexpr, D: tl.constexpr,
                           BLOCK_G: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_D: tl.constexpr, PRECISION: tl.constexpr,
                           PDL: tl.constexpr):
    """One split, tiles_per_split x BLOCK_K tokens, of one row of indices -> partial [*, n_splits, D], partial_lse."""
    split = tl.program_id(0)
    row = tl.program_id(1).to(tl.int64)
    batch, head = row // HEADS, row % HEADS
    member = tl.arange(0, BLOCK_G)
    column = tl.arange(0, BLOCK_D)[None, :]
    indices += row * K
    k_cache += batch * k_b + (head // HEADS_PER_KV) * k_h
    v_cache += batch * v_b + (head // HEADS_PER_KV) * v_h
    top = tl.full([BLOCK_G], float("-inf"), tl.float32)
    total = tl.zeros([BLOCK_G], tl.float32)
    acc = tl.zeros([BLOCK_G, BLOCK_D], tl.float32)
    first_tile = split * tiles_per_split
    pdl_wait(PDL)
    queries = tl.load(q + batch * q_b + (head * G + member)[:, None] * q_h + column,
                      mask=(member < G)[:, None] & (column < D), other=0.0)
    for tile in range(first_tile, tl.minimum(first_tile + tiles_per_split, tl.cdiv(K, BLOCK_K))):
        slot = tile * BLOCK_K + tl.arange(0, BLOCK_K)
        position = tl.load(indices + slot, mask=slot < K, other=-1).to(tl.int64)
        valid = position >= 0
        # an unused slot loads nothing, so a tile of -1 costs no memory traffic, and its zeros meet weights of 0
        mask = valid[:, None] & (column < D)
        k = tl.load(k_cache + position[:, None] * k_s + column, mask=mask, other=0.0)
        v = tl.load(v_cache + position[:, None] * v_s + column, mask=mask, other=0.0)
        top, total, acc = attend_tile(queries, k, v, valid[None, :], top, total, acc, scale_log2, True, PRECISION)
    value, value_lse = finish(top, total, acc)
    store_rows(partial, partial_lse, (row * G + member) * n_splits + split, member < G, value, value_lse, D, BLOCK_D)


def launch_tiles(q: Tensor, k_cache: Tensor, v_cache: Tensor, indices: Tensor, scale: float, *, block_k: int,
                 n_splits: int, num_warps: int, num_stages: int) -> tuple[Tensor, Tensor]:
    per_split = triton.cdiv(triton.cdiv(indices.shape[2], block_k), n_splits)
    block_g = max(16, triton.next_power_of_2(q.shape[1] // indices.shape[1]))
    return launch_splits(_tile_attention_kernel, q, k_cache, v_cache, indices, scale, n_splits, per_split, BLOCK_G=block_g,
                         BLOCK_K=block_k, BLOCK_D=block_d(q.shape[2]), PRECISION=dot_precision(q), num_warps=num_warps,
                         num_stages=num_stages)
