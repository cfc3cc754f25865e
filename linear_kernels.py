"""Triton kernels of a decode step's linear layers, with what stands around them. linear.py holds the definitions.

linear   out = residual + rstd * (x * norm) W^T + bias, or silu(gate) * up of two such products: one kernel for 1 to 16 rows

A step's products are bound by the bytes of their weights. What else there is, the norm before, the activation or the residual
after, is a few numbers a program has at hand, so that a layer's linear part is four kernels. Weights are constant: each
kernel is launched while the one before still runs, and has its first weights on the way before it waits for its inputs.
"""
import torch
import triton
import triton.language as tl
from torch import Tensor

from hash_kernels import DEPENDENT_LAUNCH, INTERPRETED, after_previous

MOST_ROWS = 16


def _row_parameters(N: int, K: int) -> dict[str, int]:
    """One row. block_n: outputs of a program.  block_k: inputs at a time."""
    return {"block_n": 4 if N >= 8192 else 2, "block_k": min(1024, triton.next_power_of_2(K)), "num_warps": 4}


def _rows_parameters(N: int, K: int) -> dict[str, int]:
    """2 to 16 rows. n_splits: programs that share an output's inputs."""
    block_n = 64 if N >= 16384 else 32
    return {"block_n": block_n, "block_k": 128, "num_warps": 4, "num_stages": 4}


@triton.jit
def _gate(gate, up):
    return gate / (1 + tl.exp(-gate)) * up


@triton.jit
def _row_kernel(x, norm, weight, bias, residual, out, N, K, eps, NORM: tl.constexpr, GATED: tl.constexpr, BIAS: tl.constexpr,
                ADD: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr):
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
        value = _gate(value, tl.sum(total_up, axis=1) * scale)
    if BIAS:
        value += tl.load(bias + n, mask=n < N, other=0.0).to(tl.float32)
    if ADD:
        value += tl.load(residual + n, mask=n < N, other=0.0).to(tl.float32)
    tl.store(out + n, value.to(out.dtype.element_ty), mask=n < N)


@triton.jit
def _prefetch(at):
    """Ask for the cache lines at these addresses."""
    if not INTERPRETED:
        tl.inline_asm_elementwise("prefetch.global.L2 [$1]; mov.u32 $0, 0;", "=r,l", [at], dtype=tl.int32, is_pure=False,
                                  pack=1)


@triton.jit
def _rows_kernel(x, norm, weight, bias, residual, out, M, N, K, eps, NORM: tl.constexpr, GATED: tl.constexpr,
                 BIAS: tl.constexpr, ADD: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
                 AHEAD: tl.constexpr, PRECISION: tl.constexpr):
    """As `_row_kernel` for M rows: x [M, K], residual [M, N] -> out [M, N]. AHEAD: inputs whose weights are asked for early."""
    n = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    m = tl.arange(0, BLOCK_M)
    k = tl.arange(0, BLOCK_K)
    rows = tl.minimum(n, N - 1)[:, None].to(tl.int64) * K  # programs past the end compute what nobody stores
    weight_rows = weight + rows
    line: tl.constexpr = 128 // (weight.dtype.element_ty.primitive_bitwidth // 8)
    ahead = line * tl.arange(0, AHEAD // line)[None, :]
    _prefetch((weight_rows + tl.minimum(ahead, K - 1)).to(tl.int64))
    if GATED:
        _prefetch((weight_rows + N.to(tl.int64) * K + tl.minimum(ahead, K - 1)).to(tl.int64))
    after_previous()
    total = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    total_up = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    squares = tl.zeros([BLOCK_M], tl.float32)
    for first in range(0, K, BLOCK_K):
        at = (first + k)[None, :]
        w = tl.load(weight_rows + at, mask=at < K, other=0.0)
        inputs = tl.load(x + m[:, None] * K + at, mask=(m[:, None] < M) & (at < K), other=0.0)
        if NORM:
            wide = inputs.to(tl.float32)
            squares += tl.sum(wide * wide, axis=1)
            inputs = (wide * tl.load(norm + at, mask=at < K, other=0.0).to(tl.float32)).to(inputs.dtype)
        total = tl.dot(inputs, tl.trans(w), total, input_precision=PRECISION)
        if GATED:
            w_up = tl.load(weight_rows + N.to(tl.int64) * K + at, mask=at < K, other=0.0)
            total_up = tl.dot(inputs, tl.trans(w_up), total_up, input_precision=PRECISION)
    if NORM:
        scale = tl.rsqrt(squares / K + eps)[:, None]
        total *= scale
        total_up *= scale
    if GATED:
        total = _gate(total, total_up)
    inside = (m[:, None] < M) & (n[None, :] < N)
    if BIAS:
        total += tl.load(bias + n, mask=n < N, other=0.0).to(tl.float32)[None, :]
    at = m[:, None] * N + n[None, :]
    if ADD:
        total += tl.load(residual + at, mask=inside, other=0.0).to(tl.float32)
    tl.store(out + at, total.to(out.dtype.element_ty), mask=inside)


@torch.library.custom_op("hashfast::linear", mutates_args=())
def linear(x: Tensor, weight: Tensor, bias: Tensor | None, norm: Tensor | None, eps: float, residual: Tensor | None,
           gated: bool) -> Tensor:
    """`linear.linear_reference` for at most MOST_ROWS rows: x [..., K], weight [N, K] ([2 N, K] where gated) -> [..., N]."""
    rows, K, N = x.numel() // x.shape[-1], x.shape[-1], weight.shape[0] // (2 if gated else 1)
    parameters = _row_parameters(N, K) if rows == 1 else _rows_parameters(N, K)
    return _launch_linear(x, weight, bias, norm, eps, residual, gated, **parameters)


@linear.register_fake
def _(x, weight, bias, norm, eps, residual, gated):
    return x.new_empty((*x.shape[:-1], weight.shape[0] // (2 if gated else 1)))


def _launch_linear(x: Tensor, weight: Tensor, bias: Tensor | None, norm: Tensor | None, eps: float, residual: Tensor | None,
                   gated: bool, *, block_n: int, block_k: int, num_warps: int, num_stages: int = 1, ahead: int = 512) -> Tensor:
    x = x.contiguous()
    rows, K, N = x.numel() // x.shape[-1], x.shape[-1], weight.shape[0] // (2 if gated else 1)
    out = x.new_empty((*x.shape[:-1], N))
    what = {"NORM": norm is not None, "GATED": gated, "BIAS": bias is not None, "ADD": residual is not None,
            "BLOCK_N": block_n, "BLOCK_K": block_k, "num_warps": num_warps, "launch_pdl": DEPENDENT_LAUNCH}
    residual = residual.contiguous() if residual is not None else None
    grid = (triton.cdiv(N, block_n),)
    if rows == 1:
        _row_kernel[grid](x, norm, weight, bias, residual, out, N, K, eps, **what)
    else:
        _rows_kernel[grid](x, norm, weight, bias, residual, out, rows, N, K, eps, BLOCK_M=MOST_ROWS, AHEAD=ahead,
                           PRECISION="ieee" if x.dtype == torch.float32 else "tf32", num_stages=num_stages, **what)
    return out
