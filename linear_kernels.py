"""Triton kernel of a decode step's linear layers, with what stands around them. linear.py holds the definition.

linear   residual + rstd * (x * norm) W^T + bias, or silu(gate) * up of two such products, for one row: one kernel

A step of one sequence is bound by the bytes of its weights. What else there is, the norm before, the activation or the
residual after, is a few numbers that a program has at hand, so that a layer's linear part is four kernels. Weights are
constant: each kernel is launched while the one before still runs, and its first weights are on the way before it waits.
"""
import torch
import triton
import triton.language as tl
from torch import Tensor

from hash_kernels import DEPENDENT_LAUNCH, after_previous


def _parameters(N: int, K: int, gated: bool) -> dict[str, int]:
    """block_n: outputs at a time.  block_k: inputs at a time.  programs: as many as are resident together on an H200."""
    return {"block_n": 2 if gated else 4, "block_k": min(1024, triton.next_power_of_2(K)), "programs": 528, "num_warps": 4}


@triton.jit
def _gate(gate, up):
    return gate / (1 + tl.exp(-gate)) * up


@triton.jit
def _linear_kernel(x, norm, weight, bias, residual, out, N, K, eps, NORM: tl.constexpr, GATED: tl.constexpr,
                   BIAS: tl.constexpr, ADD: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr):
    """x [K], norm [K], weight [N, K] or, GATED, [2 N, K], bias [N], residual [N] -> out [N].

    A program takes every so many blocks of outputs. Always the next weights are on the way, over the end of a block as well.
    """
    programs = tl.num_programs(0)
    member = tl.arange(0, BLOCK_N)
    k = tl.arange(0, BLOCK_K)[None, :]
    within = member[:, None] * K + k
    upper = weight + N.to(tl.int64) * K
    start = tl.program_id(0)
    inside = (start * BLOCK_N + member < N)[:, None] & (k < K)
    w = tl.load(weight + start.to(tl.int64) * BLOCK_N * K + within, mask=inside, other=0.0)
    w_up = w
    if GATED:
        w_up = tl.load(upper + start.to(tl.int64) * BLOCK_N * K + within, mask=inside, other=0.0)
    after_previous()
    for block in range(start, tl.cdiv(N, BLOCK_N), programs):
        total = tl.zeros([BLOCK_N, BLOCK_K], tl.float32)
        total_up = tl.zeros([BLOCK_N, BLOCK_K], tl.float32)
        squares = tl.zeros([1, BLOCK_K], tl.float32)
        for first in range(0, K, BLOCK_K):
            ends = first + BLOCK_K >= K
            next_block = tl.where(ends, block + programs, block)
            next_first = tl.where(ends, 0, first + BLOCK_K)
            at = next_block.to(tl.int64) * BLOCK_N * K + next_first
            inside = (next_block * BLOCK_N + member < N)[:, None] & (next_first + k < K)
            following = tl.load(weight + at + within, mask=inside, other=0.0)
            following_up = following
            if GATED:
                following_up = tl.load(upper + at + within, mask=inside, other=0.0)
            inputs = tl.load(x + first + k, mask=first + k < K, other=0.0).to(tl.float32)
            if NORM:
                squares += inputs * inputs
                inputs *= tl.load(norm + first + k, mask=first + k < K, other=0.0).to(tl.float32)
            total += w.to(tl.float32) * inputs
            if GATED:
                total_up += w_up.to(tl.float32) * inputs
            w, w_up = following, following_up
        value = tl.sum(total, axis=1)
        scale = 1.0
        if NORM:
            scale = tl.rsqrt(tl.sum(squares) / K + eps)
            value *= scale
        if GATED:
            value = _gate(value, tl.sum(total_up, axis=1) * scale)
        n = block * BLOCK_N + member
        if BIAS:
            value += tl.load(bias + n, mask=n < N, other=0.0).to(tl.float32)
        if ADD:
            value += tl.load(residual + n, mask=n < N, other=0.0).to(tl.float32)
        tl.store(out + n, value.to(out.dtype.element_ty), mask=n < N)


@torch.library.custom_op("hashfast::linear", mutates_args=())
def linear(x: Tensor, weight: Tensor, bias: Tensor | None, norm: Tensor | None, eps: float, residual: Tensor | None,
           gated: bool) -> Tensor:
    """`linear.linear_reference` of one row: x [1, .., K], weight [N, K] ([2 N, K] where gated) -> [1, .., N]."""
    return _launch_linear(x, weight, bias, norm, eps, residual, gated,
                          **_parameters(weight.shape[0] // (2 if gated else 1), x.shape[-1], gated))


@linear.register_fake
def _(x, weight, bias, norm, eps, residual, gated):
    return x.new_empty((*x.shape[:-1], weight.shape[0] // (2 if gated else 1)))


def _launch_linear(x: Tensor, weight: Tensor, bias: Tensor | None, norm: Tensor | None, eps: float, residual: Tensor | None,
                   gated: bool, *, block_n: int, block_k: int, programs: int, num_warps: int) -> Tensor:
    K, N = x.shape[-1], weight.shape[0] // (2 if gated else 1)
    out = x.new_empty((*x.shape[:-1], N))
    _linear_kernel[(min(programs, triton.cdiv(N, block_n)),)](
        x.contiguous(), norm, weight, bias, residual.contiguous() if residual is not None else None, out, N, K, eps,
        NORM=norm is not None, GATED=gated, BIAS=bias is not None, ADD=residual is not None, BLOCK_N=block_n, BLOCK_K=block_k,
        num_warps=num_warps, launch_pdl=DEPENDENT_LAUNCH)
    return out
