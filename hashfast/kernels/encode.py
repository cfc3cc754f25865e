"""Triton kernel of a step's queries, keys and values. hash_attention.py holds the definition and the symbols used here.

rope_encode_append   RoPE, signatures and bit planes, the new rows of the cache   one kernel

Plain Triton on every path.
"""
import torch
import triton
import triton.language as tl
from torch import Tensor

from hashfast.kernels.launch import checked_rows, pdl_options, pdl_wait


@triton.jit
def _load_halves(x, HALF: tl.constexpr, BLOCK: tl.constexpr):
    """The halves of x [D] in float32."""
    column = tl.arange(0, BLOCK)
    first = tl.load(x + column, mask=column < HALF, other=0.0)
    second = tl.load(x + HALF + column, mask=column < HALF, other=0.0)
    return first.to(tl.float32), second.to(tl.float32)


@triton.jit
def _rotated(x, norm, cos, sin, EPS: tl.constexpr, HALF: tl.constexpr, BLOCK: tl.constexpr):
    """The rotated halves of one head at x [D], after RMSNorm by the weights at norm [D] or None, rounded to its dtype."""
    dtype = x.dtype.element_ty
    first, second = _load_halves(x, HALF, BLOCK)
    if norm is not None:
        norm_first, norm_second = _load_halves(norm, HALF, BLOCK)
        rstd = tl.rsqrt(tl.sum(first * first + second * second, axis=0) / (2 * HALF) + EPS)
        # rounded where PyTorch rounds: after the division and after the weight
        first = ((first * rstd).to(dtype).to(tl.float32) * norm_first).to(dtype).to(tl.float32)
        second = ((second * rstd).to(dtype).to(tl.float32) * norm_second).to(dtype).to(tl.float32)
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
def _products(first, second, weights):
    """x @ weight before the sum over axis 0, float32 [BLOCK, BITS]: the products of both halves of a head, added."""
    return first.to(tl.float32)[:, None] * weights[0] + second.to(tl.float32)[:, None] * weights[1]


@triton.jit
def _pack(bits, WORDS: tl.constexpr):
    """Booleans [32 * WORDS] -> int32 [WORDS], little-endian."""
    words = tl.reshape(bits.to(tl.int32), [WORDS, 32])
    return tl.sum(words << tl.arange(0, 32)[None, :], axis=1)


@triton.jit
def _rope_encode_append_kernel(qkv, cos, sin, key_weight, key_bias, query_weight, query_bias, q_norm, k_norm, seq_lens, q_out,
                               planes, k_cache, v_cache, signatures, T, k_b, k_h, k_s, v_b, v_h, v_s, x_b, x_h, x_s,
                               HQ: tl.constexpr, HKV: tl.constexpr, HEADS: tl.constexpr, D: tl.constexpr, BLOCK: tl.constexpr,
                               WORDS: tl.constexpr, P: tl.constexpr, SIGNS: tl.constexpr, KEYS: tl.constexpr,
                               QUERIES: tl.constexpr, EARLY: tl.constexpr, EPS: tl.constexpr, PDL: tl.constexpr):
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
    bit, word = tl.arange(0, BITS), tl.arange(0, WORDS)
    token = batch * T + t
    if EARLY:
        key_weights = _weights(key_weight + head * (D * BITS), HALF, BLOCK, BITS)
        query_weights = ()
        for g in tl.static_range(G):
            query_weights += (_weights(query_weight + (head * G + g) * (D * BITS), HALF, BLOCK, BITS),)
    if KEYS:
        key_biases = tl.load(key_bias + head * BITS + bit)
    codes = tl.zeros([BITS], tl.float32)
    query_biases = ()
    if QUERIES:
        for g in tl.static_range(G):
            biases = tl.load(query_bias + (head * G + g) * BITS + bit)
            if SIGNS:
                query_biases += (biases,)
            else:
                codes += biases
    pdl_wait(PDL)
    # all loads before the first store: they may alias it, so the compiler would keep later ones behind it
    position = tl.load(seq_lens + batch).to(tl.int64) - T + t
    qkv += token * ((HQ + 2 * HKV) * D)
    angle_cos = tl.load(cos + token * HALF + column, mask=column < HALF, other=0.0)
    angle_sin = tl.load(sin + token * HALF + column, mask=column < HALF, other=0.0)
    key_first, key_second = _rotated(qkv + (HQ + kv_head) * D, k_norm, angle_cos, angle_sin, EPS, HALF, BLOCK)
    value = tl.arange(0, 2 * BLOCK)
    v = tl.load(qkv + (HQ + HKV + kv_head) * D + value, mask=value < D)
    queries = ()
    for g in tl.static_range(G):
        queries += (_rotated(qkv + (head * G + g) * D, q_norm, angle_cos, angle_sin, EPS, HALF, BLOCK),)

    if head % (HEADS // HKV) == 0:
        _store_halves(k_cache + batch * k_b + kv_head * k_h + position * k_s, key_first, key_second, HALF, BLOCK)
        tl.store(v_cache + batch * v_b + kv_head * v_h + position * v_s + value, v, mask=value < D)
    for g in tl.static_range(G):
        _store_halves(q_out + (token * HQ + head * G + g) * D, queries[g][0], queries[g][1], HALF, BLOCK)
    if KEYS:
        if not EARLY:
            key_weights = _weights(key_weight + head * (D * BITS), HALF, BLOCK, BITS)
        code = tl.sum(_products(key_first, key_second, key_weights), axis=0) + key_biases
        tl.store(signatures + batch * x_b + head * x_h + position * x_s + word, _pack(code > 0, WORDS))
    if QUERIES:
        products = tl.zeros([BLOCK, BITS], tl.float32)  # of all queries, so that there is one reduction over channels
        for g in tl.static_range(G):
            if EARLY:
                weights = query_weights[g]
            else:
                weights = _weights(query_weight + (head * G + g) * (D * BITS), HALF, BLOCK, BITS)
            if SIGNS:
                code = tl.sum(_products(queries[g][0], queries[g][1], weights), axis=0) + query_biases[g]
                codes += tl.where(code > 0, 1.0, -1.0)
            else:
                products += _products(queries[g][0], queries[g][1], weights)
        if not SIGNS:
            codes += tl.sum(products, axis=0)
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


def _parameters(weights: int) -> tuple[bool, int]:
    """(EARLY, num_warps) of a program with so many weights.

    Fewer warps reduce less through shared memory, but their registers must hold the weights: up to 160 of a lane's 255.
    """
    return weights <= 2 ** 15, 4 if weights <= 5 * 2 ** 12 else 8


@torch.library.custom_op("hashfast::rope_encode_append", mutates_args=("k_cache", "v_cache", "signatures"))
def rope_encode_append(qkv: Tensor, cos: Tensor, sin: Tensor, key_weight: Tensor | None, key_bias: Tensor | None,
                       query_weight: Tensor | None, query_bias: Tensor | None, k_cache: Tensor, v_cache: Tensor,
                       signatures: Tensor | None, seq_lens: Tensor, query_bits: int, P: int, q_norm: Tensor | None = None,
                       k_norm: Tensor | None = None, eps: float = 0.0) -> tuple[Tensor, Tensor]:
    """`hash_attention.rope_encode_append_reference` for a linear encoder; without one weights, biases and signatures are None.

    qkv [B, T, (Hq + 2 Hkv) D], key_weight float32 [Hs, D, b], query_weight [Hq, D, b], biases [Hs or Hq, b], q_norm and k_norm
    [D] and eps of RMSNorm before RoPE, or None
    -> q [B, T, Hq, D] and planes int32 [B, Hs, 1 + P, W], which are written where T = 1 alone.
    """
    B, T, width = qkv.shape
    HKV, D = k_cache.shape[1], k_cache.shape[3]
    HQ = width // D - 2 * HKV
    encode = signatures is not None
    HEADS, WORDS = (signatures.shape[1], signatures.shape[3]) if encode else (HKV, 1)
    q = torch.empty((B, T, HQ, D), dtype=qkv.dtype, device=qkv.device)
    planes = torch.empty((B, HEADS, 1 + P, WORDS), dtype=torch.int32, device=qkv.device)
    block = triton.next_power_of_2(D // 2)
    early, num_warps = False, 8 if encode else 4
    if encode and T == 1:
        early, num_warps = _parameters((1 + HQ // HEADS) * 2 * block * 32 * WORDS)
    _rope_encode_append_kernel[(HEADS, B, T)](
        qkv.contiguous(), cos.contiguous(), sin.contiguous(), key_weight, key_bias, query_weight, query_bias, q_norm, k_norm,
        seq_lens, q, planes,
        checked_rows(k_cache), checked_rows(v_cache), signatures, T, *k_cache.stride()[:3], *v_cache.stride()[:3],
        *(signatures.stride()[:3] if encode else (0, 0, 0)),
        HQ=HQ, HKV=HKV, HEADS=HEADS, D=D, BLOCK=block, WORDS=WORDS, P=P, SIGNS=query_bits == 1,
        KEYS=encode, QUERIES=encode and T == 1, EARLY=early, EPS=eps, num_warps=num_warps, **pdl_options(qkv.device))
    return q, planes


@rope_encode_append.register_fake
def _(qkv, cos, sin, key_weight, key_bias, query_weight, query_bias, k_cache, v_cache, signatures, seq_lens, query_bits, P,
      q_norm=None, k_norm=None, eps=0.0):
    B, T, width = qkv.shape
    heads, words = (signatures.shape[1], signatures.shape[3]) if signatures is not None else (k_cache.shape[1], 1)
    D = k_cache.shape[3]
    return (qkv.new_empty((B, T, width // D - 2 * k_cache.shape[1], D)),
            seq_lens.new_empty((B, heads, 1 + P, words)))
