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

# By measurement on an H200, where programs that go on from block to block were slower than new ones.

def _parameters(N: int, K: int) -> dict[str, int]:
    """block_n: outputs of a program.  block_k: inputs at a time."""
    if N <= 4096:
        block_n, block_k = (2, 512) if K <= 4096 else (1, 2048)
    else:
        block_n, block_k = (8 if N <= 8192 or N >= 65536 else 4), 1024
    return {"block_n": block_n, "block_k": min(block_k, triton.next_power_of_2(K)), "num_warps": 2 if block_k == 512 else 4}


@triton.jit
def silu_gate(gate, up):
    return gate / (1 + tl.exp(-gate)) * up


@triton.jit
def _linear_kernel(x, norm, weight, bias, residual, out, N, K, eps, NORM: tl.constexpr, GATED: tl.constexpr,
                   BIAS: tl.constexpr, ADD: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr):
    """x [K], norm [K], weight [N, K] or, GATED, [2 N, K], bias [N], residual [N] -> out [N]."""
    n = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    k = tl.arange(0, BLOCK_K)[None, :]
    row = n[:, None]
    weight += row.to(tl.int64) * K + k
    upper = weight + N.to(tl.int64) * K
    w = tl.load(weight, mask=(row < N) & (k < K), other=0.0)
    if GATED:
        w_up = tl.load(upper, mask=(row < N) & (k < K), other=0.0)
    after_previous()
    total = tl.zeros([BLOCK_N, BLOCK_K], tl.float32)
    total_up = tl.zeros([BLOCK_N, BLOCK_K], tl.float32)
    squares = tl.zeros([1, BLOCK_K], tl.float32)
    for first in range(0, K, BLOCK_K):
        beyond = first + BLOCK_K
        inside = (row < N) & (beyond + k < K)
        following = tl.load(weight + beyond, mask=inside, other=0.0)
        if GATED:
            following_up = tl.load(upper + beyond, mask=inside, other=0.0)
        inputs = tl.load(x + first + k, mask=first + k < K, other=0.0).to(tl.float32)
        if NORM:
            squares += inputs * inputs
            inputs *= tl.load(norm + first + k, mask=first + k < K, other=0.0).to(tl.float32)
        total += w.to(tl.float32) * inputs
        w = following
        if GATED:
            total_up += w_up.to(tl.float32) * inputs
            w_up = following_up
    value = tl.sum(total, axis=1)
    scale = 1.0
    if NORM:
        scale = tl.rsqrt(tl.sum(squares) / K + eps)
        value *= scale
    if GATED:
        value = silu_gate(value, tl.sum(total_up, axis=1) * scale)
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
                          **_parameters(weight.shape[0] // (2 if gated else 1), x.shape[-1]))


@linear.register_fake
def _(x, weight, bias, norm, eps, residual, gated):
    return x.new_empty((*x.shape[:-1], weight.shape[0] // (2 if gated else 1)))


def _launch_linear(x: Tensor, weight: Tensor, bias: Tensor | None, norm: Tensor | None, eps: float, residual: Tensor | None,
                   gated: bool, *, block_n: int, block_k: int, num_warps: int) -> Tensor:
    if gated and bias is not None:
        raise ValueError("a gated product has no bias here")
    K, N = x.shape[-1], weight.shape[0] // (2 if gated else 1)
    out = x.new_empty((*x.shape[:-1], N))
    _linear_kernel[(triton.cdiv(N, block_n),)](
        x.contiguous(), norm, weight, bias, residual.contiguous() if residual is not None else None, out, N, K, eps,
        NORM=norm is not None, GATED=gated, BIAS=bias is not None, ADD=residual is not None, BLOCK_N=block_n, BLOCK_K=block_k,
        num_warps=num_warps, launch_pdl=DEPENDENT_LAUNCH)
    return out
