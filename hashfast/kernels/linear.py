"""Triton kernel of a decode step's linear layers with their prologue and epilogue. ops/linear.py holds the definition.

linear   residual + rstd * (x * norm) W^T + bias, or silu(gate) * up of two such products, for 1 to 16 rows: one kernel

A step of few sequences is bandwidth bound: it reads every weight once. Norm, gate and residual are fused into the GEMV, so that
a layer's linear part is four kernels. Weights are constant: each kernel is launched while the one before still runs, and loads
its first weights before it waits. Here in plain Triton; linear_ptx.py has a faster form.
"""
import torch
import triton
import triton.language as tl
from torch import Tensor

from hashfast.kernels.epilogue import silu_gate
from hashfast.kernels.launch import INTERPRETED, pdl_options, pdl_wait, portable
from hashfast.kernels.linear_ptx import check_lanes, launch_mma, mma_parameters

MAX_ROWS = 16


@triton.jit
def _multiply(acc, weights, x):
    """weights [N, K] times x [1, K] are summed over K at the end: acc [N, K]. x [16, K]: acc [N, 16] on tensor cores."""
    if x.shape[0] == 1:
        acc += weights.to(tl.float32) * x.to(tl.float32)
    elif INTERPRETED:  # multiplies bfloat16 wrongly
        acc = tl.dot(weights.to(tl.float32), tl.trans(x).to(tl.float32), acc, input_precision="ieee")
    else:
        acc = tl.dot(weights, tl.trans(x), acc)
    return acc


@triton.jit
def _linear_kernel(x, norm, weight, bias, residual, out, M, N, eps, K: tl.constexpr, GATED: tl.constexpr, BLOCK_M: tl.constexpr,
                   BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, PDL: tl.constexpr):
    """x [M, K], norm [K], weight [N, K] or, GATED, [2 N, K], bias [N], residual [M, N] -> out [M, N]."""
    n = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    m = tl.arange(0, BLOCK_M)
    k = tl.arange(0, BLOCK_K)
    weight += tl.minimum(n, N - 1).to(tl.int64)[:, None] * K + k[None, :]
    up_weight = weight + N.to(tl.int64) * K
    x += m[:, None] * K + k[None, :]
    w = tl.load(weight, mask=k[None, :] < K, other=0.0)
    if GATED:
        up_w = tl.load(up_weight, mask=k[None, :] < K, other=0.0)
    pdl_wait(PDL)
    at = m[None, :] * N + n[:, None]
    mask = (m < M)[None, :] & (n < N)[:, None]
    added = 0.0
    if residual is not None:
        added = tl.load(residual + at, mask=mask, other=0.0).to(tl.float32)
    acc = tl.zeros([BLOCK_N, BLOCK_K if BLOCK_M == 1 else BLOCK_M], tl.float32)
    up_acc = acc
    squares = tl.zeros([BLOCK_M, BLOCK_K], tl.float32)
    for first in range(0, K, BLOCK_K):
        beyond = first + BLOCK_K
        next_w = tl.load(weight + beyond, mask=beyond + k[None, :] < K, other=0.0)
        inputs = tl.load(x + first, mask=(m < M)[:, None] & (first + k < K)[None, :], other=0.0)
        if norm is not None:
            wide = inputs.to(tl.float32)
            squares += wide * wide
            factor = tl.load(norm + first + k[None, :], mask=first + k[None, :] < K, other=0.0).to(tl.float32)
            inputs = (wide * factor).to(inputs.dtype)
        acc = _multiply(acc, w, inputs)
        w = next_w
        if GATED:
            next_w = tl.load(up_weight + beyond, mask=beyond + k[None, :] < K, other=0.0)
            up_acc = _multiply(up_acc, up_w, inputs)
            up_w = next_w
    if BLOCK_M == 1:
        acc = tl.sum(acc, axis=1)[:, None]
        up_acc = tl.sum(up_acc, axis=1)[:, None]
    if norm is not None:
        rstd = tl.rsqrt(tl.sum(squares, axis=1) / K + eps)[None, :]
        acc *= rstd
        up_acc *= rstd
    if GATED:
        acc = silu_gate(acc, up_acc)
    if bias is not None:
        acc += tl.load(bias + n, mask=n < N, other=0.0).to(tl.float32)[:, None]
    tl.store(out + at, (acc + added).to(out.dtype.element_ty), mask=mask)


def portable_parameters(M: int, N: int, K: int) -> dict[str, int]:
    """M 1: a thread has 16 bytes of every row, of weights as of x, so that no layout is converted in the loop."""
    warps = min(4, triton.next_power_of_2(triton.cdiv(K, 256)))
    if M == 1:
        return {"block_n": 8 if N > 2048 else 2, "block_k": 256 * warps, "num_warps": warps}
    return {"block_n": 32, "block_k": min(128, max(16, triton.next_power_of_2(K))), "num_warps": 4}


def launch_portable(x: Tensor, weight: Tensor, bias: Tensor | None, norm: Tensor | None, eps: float, residual: Tensor | None,
                    gated: bool, *, block_n: int, block_k: int, num_warps: int) -> Tensor:
    """Arguments and result of `linear`. num_warps * 256 = block_k where x has one row."""
    N, K = weight.shape[0] // (2 if gated else 1), x.shape[-1]
    M = x.numel() // K
    out = x.new_empty((*x.shape[:-1], N))
    _linear_kernel[(triton.cdiv(N, block_n),)](
        x.contiguous(), norm, weight.contiguous(), bias, residual.contiguous() if residual is not None else None, out, M, N,
        eps, K=K, GATED=gated, BLOCK_M=1 if M == 1 else MAX_ROWS, BLOCK_N=block_n, BLOCK_K=block_k, num_warps=num_warps,
        **pdl_options(x.device))
    return out


@torch.library.custom_op("hashfast::linear", mutates_args=())
def linear(x: Tensor, weight: Tensor, bias: Tensor | None, norm: Tensor | None, eps: float, residual: Tensor | None,
           gated: bool) -> Tensor:
    """`ops.linear.linear_reference` of M rows in bfloat16, M <= 16: x [.., K], weight [N, K] ([2 N, K] where gated) -> [.., N].

    K is a multiple of 8. A gated product has no bias.
    """
    N, K = weight.shape[0] // (2 if gated else 1), x.shape[-1]
    M = x.numel() // K
    if M > MAX_ROWS or K % 8 or weight.dtype != torch.bfloat16 or gated and bias is not None:
        raise ValueError(f"no kernel for {M} rows of {K} {weight.dtype} numbers{' and a gated bias' if gated else ''}")
    if portable(x.device):
        return launch_portable(x, weight, bias, norm, eps, residual, gated, **portable_parameters(M, N, K))
    check_lanes(x.device)
    return launch_mma(x, weight, bias, norm, eps, residual, gated, **mma_parameters(M, N, K, gated))


@linear.register_fake
def _(x, weight, bias, norm, eps, residual, gated):
    return x.new_empty((*x.shape[:-1], weight.shape[0] // (2 if gated else 1)))
