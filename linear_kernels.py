"""Triton kernels of a decode step's linear layers, with what stands around them. linear.py holds the definition.

linear   residual + rstd * (x * norm) W^T + bias, or silu(gate) * up of two such products, for 1 to 16 rows: one kernel

A step of few sequences is bound by the bytes of its weights. What else there is, the norm before, the activation or the
residual after, is a few numbers that a program has at hand, so that a layer's linear part is four kernels, each launched while
the one before still runs. One row is a sum along each output's weights, the first of them on the way before the kernel waits;
more rows go through tensor cores.
"""
import functools

import torch
import triton
import triton.language as tl
from torch import Tensor

from hash_kernels import DEPENDENT_LAUNCH, after_previous

# By measurement on an H200, where programs that go on from block to block were slower than new ones.

def _row_parameters(N: int, K: int) -> dict[str, int]:
    """block_n: outputs of a program.  block_k: inputs at a time."""
    if N <= 4096:
        block_n, block_k = (2, 512) if K <= 4096 else (1, 2048)
    else:
        block_n, block_k = (8 if N <= 8192 or N >= 65536 else 4), 1024
    return {"block_n": block_n, "block_k": min(block_k, triton.next_power_of_2(K)), "num_warps": 2 if block_k == 512 else 4}


def _rows_parameters(N: int, K: int, gated: bool) -> dict[str, int]:
    """As `_row_parameters`; num_stages: tiles on the way, at most."""
    if N <= 2048:
        block_n, block_k, num_stages = 16, 256, 4
    elif gated:
        block_n, block_k, num_stages = 64, 128, 3
    elif N > 8192:
        block_n, block_k, num_stages = 128, 128, 3
    elif N > 4096:
        block_n, block_k, num_stages = 64, 256, 3
    elif K > 8192:
        block_n, block_k, num_stages = 32, 256, 5
    else:
        block_n, block_k, num_stages = 64, 128, 8
    return {"block_n": block_n, "block_k": block_k, "num_warps": 4, "num_stages": num_stages}


@functools.cache
def _shared_bytes(device: torch.device) -> int:
    """Shared memory that one program may have."""
    return torch.cuda.get_device_properties(device).shared_memory_per_block_optin if device.type == "cuda" else 2 ** 17


@triton.jit
def silu_gate(gate, up):
    return gate / (1 + tl.exp(-gate)) * up


@triton.jit
def _row_kernel(x, norm, weight, bias, residual, out, N, K, eps, NORM: tl.constexpr, GATED: tl.constexpr,
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


@triton.jit
def _rows_kernel(x, norm, weight, bias, residual, out, M, N, K, eps, NORM: tl.constexpr, GATED: tl.constexpr,
                 BIAS: tl.constexpr, ADD: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, WHOLE: tl.constexpr,
                 PRECISION: tl.constexpr):
    """x [M, K], M <= 16, residual [M, N] -> out [M, N], the rest as in `_row_kernel`. WHOLE: K is a multiple of BLOCK_K.

    The weights are the tall operand, which fits a tensor core's shape: a tile is [BLOCK_N, BLOCK_K] of them, GATED twice as
    many rows, first the gate's, then those of `up`.
    """
    TILE: tl.constexpr = 2 * BLOCK_N if GATED else BLOCK_N
    first_n = tl.program_id(0) * BLOCK_N
    r = tl.arange(0, TILE)
    k = tl.arange(0, BLOCK_K)
    m = tl.arange(0, 16)[None, :]
    row = tl.minimum(first_n + r % BLOCK_N, N - 1).to(tl.int64)
    if GATED:
        row += (r // BLOCK_N).to(tl.int64) * N
    weight += row[:, None] * K + k[None, :]
    x += m * K + k[:, None]
    acc = tl.zeros([TILE, 16], tl.float32)
    squares = tl.zeros([BLOCK_K, 16], tl.float32)
    after_previous()
    for first in range(0, K, BLOCK_K):
        inside = first + k < K
        if WHOLE:  # the compiler does not see it in a mask
            w = tl.load(weight + first)
        else:
            w = tl.load(weight + first, mask=inside[None, :], other=0.0)
        inputs = tl.load(x + first, mask=(m < M) & inside[:, None], other=0.0)
        if NORM:
            wide = inputs.to(tl.float32)
            squares += wide * wide
            factor = tl.load(norm + first + k, mask=inside, other=0.0).to(tl.float32)
            inputs = (wide * factor[:, None]).to(inputs.dtype)
        acc = tl.dot(w, inputs, acc, input_precision=PRECISION)
    if NORM:
        acc *= tl.rsqrt(tl.sum(squares, axis=0) / K + eps)[None, :]
    value = acc
    if GATED:
        gate, up = tl.split(tl.permute(tl.reshape(acc, [2, BLOCK_N, 16]), [1, 2, 0]))
        value = silu_gate(gate, up)
    n = (first_n + tl.arange(0, BLOCK_N))[:, None]
    at = m * N + n
    mask = (m < M) & (n < N)
    if BIAS:
        value += tl.load(bias + n, mask=n < N, other=0.0).to(tl.float32)
    if ADD:
        value += tl.load(residual + at, mask=mask, other=0.0).to(tl.float32)
    tl.store(out + at, value.to(out.dtype.element_ty), mask=mask)


@torch.library.custom_op("hashfast::linear", mutates_args=())
def linear(x: Tensor, weight: Tensor, bias: Tensor | None, norm: Tensor | None, eps: float, residual: Tensor | None,
           gated: bool) -> Tensor:
    """`linear.linear_reference` of 1 to 16 rows: x [.., K], weight [N, K] ([2 N, K] where gated) -> [.., N]."""
    N, K = weight.shape[0] // (2 if gated else 1), x.shape[-1]
    if x.numel() == K:
        return _launch_row(x, weight, bias, norm, eps, residual, gated, **_row_parameters(N, K))
    return _launch_rows(x, weight, bias, norm, eps, residual, gated, **_rows_parameters(N, K, gated))


@linear.register_fake
def _(x, weight, bias, norm, eps, residual, gated):
    return x.new_empty((*x.shape[:-1], weight.shape[0] // (2 if gated else 1)))


def _launch_row(x: Tensor, weight: Tensor, bias: Tensor | None, norm: Tensor | None, eps: float, residual: Tensor | None,
                gated: bool, *, block_n: int, block_k: int, num_warps: int) -> Tensor:
    K, N = x.shape[-1], weight.shape[0] // (2 if gated else 1)
    out = x.new_empty((*x.shape[:-1], N))
    _row_kernel[(triton.cdiv(N, block_n),)](
        x.contiguous(), norm, weight, bias, residual.contiguous() if residual is not None else None, out, N, K, eps,
        NORM=norm is not None, GATED=gated, BIAS=bias is not None, ADD=residual is not None, BLOCK_N=block_n, BLOCK_K=block_k,
        num_warps=num_warps, launch_pdl=DEPENDENT_LAUNCH)
    return out


def _launch_rows(x: Tensor, weight: Tensor, bias: Tensor | None, norm: Tensor | None, eps: float, residual: Tensor | None,
                 gated: bool, *, block_n: int, block_k: int, num_warps: int, num_stages: int) -> Tensor:
    K, N = x.shape[-1], weight.shape[0] // (2 if gated else 1)
    out = x.new_empty((*x.shape[:-1], N))
    tile_bytes = ((2 if gated else 1) * block_n + 16) * block_k * x.element_size()
    _rows_kernel[(triton.cdiv(N, block_n),)](
        x.contiguous(), norm, weight, bias, residual.contiguous() if residual is not None else None, out, x.numel() // K, N, K,
        eps, NORM=norm is not None, GATED=gated, BIAS=bias is not None, ADD=residual is not None, BLOCK_N=block_n,
        BLOCK_K=block_k, WHOLE=K % block_k == 0, PRECISION="ieee" if x.dtype == torch.float32 else "tf32", num_warps=num_warps,
        num_stages=max(1, min(num_stages, _shared_bytes(x.device) // tile_bytes)), launch_pdl=DEPENDENT_LAUNCH)
    return out
