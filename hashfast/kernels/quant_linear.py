"""Triton kernels of products with int8 weights. ops/quant_linear.py holds the format and the definitions.

int8_linear   1 to 16 rows: reads the weights once, dequantises in registers    one kernel, or two where K is split
int8_row      one row, with the norm, gate and residual around it               one kernel

One row is a GEMV in float32; more rows go through tensor cores. No atomics: the same input gives the same bits. Weights are
constant, so the first ones of a row are loaded before the wait for the kernel before this one.

Symbols: M rows, K inputs, N outputs.
"""
import torch
import triton
import triton.language as tl
from torch import Tensor

from hashfast.kernels.epilogue import silu_gate
from hashfast.kernels.launch import pdl_options, pdl_wait, portable
from hashfast.kernels.split_kv import dot_precision

# ------------------------------------------------------------------------------------------------------ launch parameters

# An SM of an H200 needs some 30 KB of loads in flight.

def _int8_row_parameters(N: int, K: int) -> dict[str, int]:
    """block_n: rows of the weight that a program takes.  block_w: words of 4 inputs at a time, two a thread."""
    num_warps = min(8 if N <= 4096 else 4 if N <= 8192 else 2, triton.next_power_of_2(triton.cdiv(K, 256)))
    return {"block_n": 8 if N > 2048 else 2, "block_w": 64 * num_warps, "num_warps": num_warps}


def _int8_dot_parameters(N: int, K: int) -> dict[str, int]:
    """block_k: inputs at a time.  n_splits: programs that share an output block's inputs, for narrow and deep products, so that
    there are three an SM."""
    if N <= 8192 < K:
        n_splits = max(1, min(triton.cdiv(K, 128), 400 // triton.cdiv(N, 64)))
        return {"block_n": 64, "block_k": 128, "n_splits": n_splits, "num_warps": 4, "num_stages": 4}
    return {"block_n": 32, "block_k": 256, "n_splits": 1, "num_warps": 4, "num_stages": 4}


# --------------------------------------------------------------------------------------------------------------- one row

# Tiles have two dimensions, the second that of a row's words, and N and K are constants: a thread then has its weights, inputs
# and scales by itself, nothing goes through shared memory in the loop, and rows are at constant distances from one address.

@triton.jit
def _int8_mantissas(w, PORTABLE: tl.constexpr):
    """int32 w -> its four signed bytes as float32 1152 + byte, the byte in the mantissa of 1024.

    Conversion instructions (16 a clock and SM) would be slower than the weights' loads. In PTX a byte permutation puts two into
    float16, which widen at the rate of additions.
    """
    w ^= -0x7F7F7F80  # 0x80808080
    if PORTABLE:
        moved = w << 13, w << 5, w >> 3, w >> 11
        values = ()
        for i in tl.static_range(4):
            values += (((moved[i] & (255 << 13)) | 0x44800000).to(tl.float32, bitcast=True),)
        return values
    else:
        return tl.inline_asm_elementwise("""{
            .reg .b32 a;
            .reg .f16 x, y;
            prmt.b32 a, $4, 0x64646464, 0x4140;
            mov.b32 {x, y}, a;
            cvt.f32.f16 $0, x;
            cvt.f32.f16 $1, y;
            prmt.b32 a, $4, 0x64646464, 0x4342;
            mov.b32 {x, y}, a;
            cvt.f32.f16 $2, x;
            cvt.f32.f16 $3, y;
            }""", "=&f,=&f,=&f,=&f,r", [w], dtype=(tl.float32,) * 4, is_pure=True, pack=1)


@triton.jit
def _four_inputs(x, word, inside, PACKED: tl.constexpr):
    """x [K] -> x[4 word + i] for i = 0 .. 3, float32 and zero where not `inside`.

    PACKED: four of 16 bits as one int64, which keeps every number with the thread that has its weight.
    """
    values = ()
    if PACKED:
        four = tl.load(x.to(tl.pointer_type(tl.int64), bitcast=True) + word, mask=inside, other=0)
        for i in tl.static_range(4):
            values += ((four >> 16 * i).to(tl.int16).to(x.dtype.element_ty, bitcast=True).to(tl.float32),)
    else:
        for i in tl.static_range(4):
            values += (tl.load(x + 4 * word + i, mask=inside, other=0.0).to(tl.float32),)
    return values


@triton.jit
def _int8_row_kernel(x, norm, weight, scale, bias, residual, out, eps, N: tl.constexpr, K: tl.constexpr, GATED: tl.constexpr,
                     PACKED: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_W: tl.constexpr, PORTABLE: tl.constexpr,
                     PDL: tl.constexpr):
    """x [K], norm [K], weight [N, K] or, GATED, [2 N, K] as int32 [.., K / 4], scale and bias [N or 2 N], residual [N]
    -> out [N].

    Inputs times `_int8_mantissas` sum to x q plus 1152 x, which every output shares. Weights beyond the last are any number,
    and meet an input of 0.
    """
    # Two words a thread, where weights alone would have four: as many as one load has of `_four_inputs`.
    word = tl.max_contiguous(tl.arange(0, BLOCK_W), 2)[None, :]
    words: tl.constexpr = K // 4
    outputs: tl.constexpr = BLOCK_N // (2 if GATED else 1)
    first_row = (tl.program_id(0) * outputs).to(tl.int64)
    row = tl.arange(0, BLOCK_N) // (BLOCK_N // outputs)  # gate and up in turn
    if N % outputs != 0:
        row = tl.minimum(row, N - 1 - tl.program_id(0) * outputs)
    if GATED:
        row += N * (tl.arange(0, BLOCK_N) % 2)
    weight += first_row * words
    at = row[:, None] * words + word
    w = tl.load(weight + at, mask=word < words)
    s = tl.load(scale + first_row + row).to(tl.float32)
    shift = 0.0
    if bias is not None:
        shift = tl.load(bias + first_row + row).to(tl.float32)
    pdl_wait(PDL)
    n = tl.program_id(0) * outputs + tl.arange(0, outputs)
    added = 0.0
    if residual is not None:
        added = tl.load(residual + n, mask=n < N, other=0.0).to(tl.float32)
    total = tl.zeros([BLOCK_N, BLOCK_W], tl.float32)
    ones = tl.zeros([1, BLOCK_W], tl.float32)
    squares = tl.zeros([1, BLOCK_W], tl.float32)
    for first in range(0, words, BLOCK_W):
        beyond = first + BLOCK_W
        following = tl.load(weight + beyond + at, mask=beyond + word < words)
        x0, x1, x2, x3 = _four_inputs(x, first + word, first + word < words, PACKED)
        if norm is not None:
            squares += (x0 * x0 + x1 * x1) + (x2 * x2 + x3 * x3)
            g0, g1, g2, g3 = _four_inputs(norm, first + word, first + word < words, PACKED)
            x0, x1, x2, x3 = x0 * g0, x1 * g1, x2 * g2, x3 * g3
        ones += (x0 + x1) + (x2 + x3)
        w0, w1, w2, w3 = _int8_mantissas(w, PORTABLE)
        total += w0 * x0
        total += w1 * x1
        total += w2 * x2
        total += w3 * x3
        w = following
    value = s * tl.sum(total - 1152 * ones, axis=1)
    if norm is not None:
        value *= tl.rsqrt(tl.sum(squares) / K + eps)
    value += shift
    if GATED:
        gate, up = tl.split(tl.reshape(value, [outputs, 2]))
        value = silu_gate(gate, up)
    tl.store(out + n, (value + added).to(out.dtype.element_ty), mask=n < N)


# ---------------------------------------------------------------------------------------------------------- several rows

@triton.jit
def _int8_dot_kernel(x, weight, scale, partial, M, N, K, k_per_split, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
                     PRECISION: tl.constexpr, PDL: tl.constexpr):
    """x [M, K], weight [N, K] -> partial [splits, M, N]."""
    n = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    split = tl.program_id(1)
    m = tl.arange(0, 16)[:, None]
    column = tl.arange(0, BLOCK_K)
    start = split * k_per_split
    stop = tl.minimum(start + k_per_split, K)
    weight += tl.minimum(n, N - 1).to(tl.int64)[None, :] * K + column[:, None]
    x += m * K + column[None, :]
    factor = tl.load(scale + n, mask=n < N, other=0.0).to(tl.float32)
    acc = tl.zeros([16, BLOCK_N], tl.float32)
    pdl_wait(PDL)
    for first in range(start, stop, BLOCK_K):
        w = tl.load(weight + first, mask=(first + column < stop)[:, None], other=0)
        inputs = tl.load(x + first, mask=(m < M) & (first + column < stop)[None, :], other=0.0)
        acc = tl.dot(inputs, w.to(inputs.dtype), acc, input_precision=PRECISION)
    acc *= factor[None, :]
    at = (split * M + m).to(tl.int64) * N + n[None, :]
    tl.store(partial + at, acc.to(partial.dtype.element_ty), mask=(m < M) & (n[None, :] < N))


# ---------------------------------------------------------------------------------------------------------------- launch

def launch_int8_row(x: Tensor, weight: Tensor, scale: Tensor, bias: Tensor | None = None, norm: Tensor | None = None,
                    eps: float = 0.0, residual: Tensor | None = None, gated: bool = False, *, block_n: int, block_w: int,
                    num_warps: int) -> Tensor:
    """Arguments and result of `int8_row`."""
    out = _outputs(x, weight, gated)
    x = x.contiguous()
    packed = all(t.element_size() == 2 and t.data_ptr() % 8 == 0 for t in (x, norm) if t is not None)
    _int8_row_kernel[(triton.cdiv(len(weight), block_n),)](
        x, norm, weight.view(torch.int32), scale, bias, residual.contiguous() if residual is not None else None, out, eps,
        out.shape[-1], x.shape[-1], GATED=gated, PACKED=packed, BLOCK_N=block_n, BLOCK_W=block_w,
        PORTABLE=portable(x.device), num_warps=num_warps,
        maxnreg=64 if num_warps == block_n == 8 and norm is None else None,  # with 65 three run at once, not four
        **pdl_options(x.device))
    return out


def launch_int8_dot(x: Tensor, weight: Tensor, scale: Tensor, *, block_n: int, block_k: int, n_splits: int, num_warps: int,
                    num_stages: int) -> Tensor:
    """Arguments and result of `int8_linear`. What several splits find is summed in float32, by PyTorch."""
    N, K = weight.shape
    partial = torch.empty((n_splits, len(x), N), dtype=x.dtype if n_splits == 1 else torch.float32, device=x.device)
    per_split = triton.cdiv(triton.cdiv(K, block_k), n_splits) * block_k
    _int8_dot_kernel[(triton.cdiv(N, block_n), n_splits)](
        x.contiguous(), weight, scale, partial, len(x), N, K, per_split, BLOCK_N=block_n, BLOCK_K=block_k,
        PRECISION=dot_precision(x), num_warps=num_warps, num_stages=num_stages, **pdl_options(x.device))
    return partial[0] if n_splits == 1 else partial.sum(dim=0).to(x.dtype)


@torch.library.custom_op("hashfast::int8_linear", mutates_args=())
def int8_linear(x: Tensor, weight: Tensor, scale: Tensor) -> Tensor:
    """`int8_linear_reference` of M <= 16 rows: x [M, K], int8 [N, K], scale [N] -> [M, N]."""
    N, K = weight.shape
    if len(x) == 1 and K % 4 == 0:
        return launch_int8_row(x, weight, scale, **_int8_row_parameters(N, K))
    return launch_int8_dot(x, weight, scale, **_int8_dot_parameters(N, K))


@int8_linear.register_fake
def _(x, weight, scale):
    return x.new_empty(len(x), len(weight))


@torch.library.custom_op("hashfast::int8_row", mutates_args=())
def int8_row(x: Tensor, weight: Tensor, scale: Tensor, bias: Tensor | None, norm: Tensor | None, eps: float,
             residual: Tensor | None, gated: bool) -> Tensor:
    """`ops.linear.linear_reference` of one row: x [1, .., K], int8 [N, K] ([2 N, K] where gated), K % 4 == 0 -> [1, .., N]."""
    return launch_int8_row(x, weight, scale, bias, norm, eps, residual, gated, **_int8_row_parameters(*weight.shape))


@int8_row.register_fake
def _(x, weight, scale, bias, norm, eps, residual, gated):
    return _outputs(x, weight, gated)


def _outputs(x: Tensor, weight: Tensor, gated: bool) -> Tensor:
    return x.new_empty((*x.shape[:-1], len(weight) // (2 if gated else 1)))
