"""Triton kernels of products with quantised weights. quant_linear.py holds the formats and the definitions (`*_reference`).

int8_linear, int4_linear   1 to 16 rows: read the weights once, dequantise in registers    one kernel, or two where K is split
int8_row, int4_row         one row, with the norm, gate and residual around it             one kernel
dequantize_int4            the weights in full, for prompts                                one kernel

One row is a GEMV in float32; more rows go through tensor cores. Integers become floats by bit operations, since conversion
instructions (16 a clock and SM) would be slower than the weights' loads; with PORTABLE by plain Triton, else by inline PTX. No
atomics: the same input gives the same bits. Weights are constant, so the first ones are loaded before the wait for the kernel
before this one.
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


def _int4_row_parameters(N: int) -> dict[str, int]:
    """block_u: blocks of 32 inputs at a time, one a thread."""
    num_warps = 4 if N <= 4096 else 2 if N <= 8192 else 1
    block_n = 2 if N <= 2048 else 8 if N <= 8192 else 16
    return {"block_n": block_n, "block_u": 32 * num_warps, "num_warps": num_warps}


def _int8_dot_parameters(N: int, K: int) -> dict[str, int]:
    """block_k: inputs at a time.  n_splits: programs that share an output block's inputs, for narrow and deep products."""
    if N <= 8192 < K:
        return {"block_n": 64, "block_k": 128, "n_splits": _splits(N, K, 128), "num_warps": 4, "num_stages": 4}
    return {"block_n": 32, "block_k": 256, "n_splits": 1, "num_warps": 4, "num_stages": 4}


def _int4_dot_parameters(N: int, K: int) -> dict[str, int]:
    return {"block_n": 64, "block_k": 256, "n_splits": _splits(N, K, 256), "num_warps": 4, "num_stages": 4}


def _splits(N: int, K: int, block_k: int) -> int:
    """So that blocks of 64 outputs have three programs an SM."""
    return max(1, min(triton.cdiv(K, block_k), 400 // triton.cdiv(N, 64)))


# --------------------------------------------------------------------------------------------------------------- one row

# Tiles have two dimensions, the second that of a row's words, and N and K are constants: a thread then has its weights, inputs
# and scales by itself, nothing goes through shared memory in the loop, and rows are at constant distances from one address.

@triton.jit
def _int8_mantissas(w, PORTABLE: tl.constexpr):
    """int32 w -> its four signed bytes as float32 1152 + byte, the byte in the mantissa of 1024.

    In PTX a byte permutation puts two into float16, which widen at the rate of additions.
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
def _int4_mantissas(w, PORTABLE: tl.constexpr):
    """int32 w -> its 4-bit integers q as eight float32, 1 + q / 256 and 1 + q / 16 in turn: in the mantissa of 1.0 at bit 15
    or 19, so that one shift serves two."""
    if PORTABLE:
        moved = w << 15, w << 7, w >> 1, w >> 9
        values = ()
        for i in tl.static_range(4):
            values += (((moved[i] & (15 << 15)) | 0x3F800000).to(tl.float32, bitcast=True),)
            values += (((moved[i] & (15 << 19)) | 0x3F800000).to(tl.float32, bitcast=True),)
        return values
    else:
        return tl.inline_asm_elementwise("""{
            .reg .b32 a;
            shl.b32 a, $8, 15;
            lop3.b32 $0, a, 0x078000, 0x3F800000, 0xEA;
            lop3.b32 $1, a, 0x780000, 0x3F800000, 0xEA;
            shl.b32 a, $8, 7;
            lop3.b32 $2, a, 0x078000, 0x3F800000, 0xEA;
            lop3.b32 $3, a, 0x780000, 0x3F800000, 0xEA;
            shr.u32 a, $8, 1;
            lop3.b32 $4, a, 0x078000, 0x3F800000, 0xEA;
            lop3.b32 $5, a, 0x780000, 0x3F800000, 0xEA;
            shr.u32 a, $8, 9;
            lop3.b32 $6, a, 0x078000, 0x3F800000, 0xEA;
            lop3.b32 $7, a, 0x780000, 0x3F800000, 0xEA;
            }""", "=&r,=&r,=&r,=&r,=&r,=&r,=&r,=&r,r", [w], dtype=(tl.float32,) * 8, is_pure=True, pack=1)


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
def _rows(N: tl.constexpr, GATED: tl.constexpr, BLOCK_N: tl.constexpr):
    """A program's first output, and how far from there its BLOCK_N rows of the weight are, gate and up in turn where GATED.
    Beyond the last output it is the last again. Where none is, they are constants, which addresses take at no cost."""
    per_output: tl.constexpr = 2 if GATED else 1
    first = tl.program_id(0) * (BLOCK_N // per_output)
    row = tl.arange(0, BLOCK_N) // per_output
    if N % (BLOCK_N // per_output) != 0:
        row = tl.minimum(row, N - 1 - first)
    if GATED:
        row += N * (tl.arange(0, BLOCK_N) % 2)
    return first.to(tl.int64), row


@triton.jit
def _outputs_here(N: tl.constexpr, GATED: tl.constexpr, BLOCK_N: tl.constexpr):
    """The outputs of a program."""
    outputs: tl.constexpr = BLOCK_N // 2 if GATED else BLOCK_N
    return tl.program_id(0) * outputs + tl.arange(0, outputs)


@triton.jit
def _store_row(out, value, added, N: tl.constexpr, GATED: tl.constexpr):
    """value [BLOCK_N] in the order of `_rows` and what is added to each output -> out [N]."""
    n = _outputs_here(N, GATED, value.shape[0])
    if GATED:
        gate, up = tl.split(tl.reshape(value, [value.shape[0] // 2, 2]))
        value = silu_gate(gate, up)
    tl.store(out + n, (value + added).to(out.dtype.element_ty), mask=n < N)


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
    first_row, row = _rows(N, GATED, BLOCK_N)
    weight += first_row * words
    at = row[:, None] * words + word
    w = tl.load(weight + at, mask=word < words)
    s = tl.load(scale + first_row + row).to(tl.float32)
    shift = 0.0
    if bias is not None:
        shift = tl.load(bias + first_row + row).to(tl.float32)
    pdl_wait(PDL)
    added = 0.0
    if residual is not None:
        n = _outputs_here(N, GATED, BLOCK_N)
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
    _store_row(out, value + shift, added, N, GATED)


@triton.jit
def _sum_of_four(t):
    """[rows, 4 blocks] -> [rows, blocks]: a block's four words, which one thread has."""
    return tl.sum(tl.reshape(t, [t.shape[0], t.shape[1] // 4, 4]), axis=2)


@triton.jit
def _int4_row_kernel(x, norm, weight, scale, zero, bias, residual, out, eps, N: tl.constexpr, K: tl.constexpr,
                     GROUPSIZE: tl.constexpr, GATED: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_U: tl.constexpr,
                     PORTABLE: tl.constexpr, PDL: tl.constexpr):
    """x [K], norm [K], weight [N, K / 8] or, GATED, [2 N, K / 8], bias [N or 2 N], residual [N] -> out [N]. A thread takes a
    block of 32 inputs of BLOCK_N rows of the weight: four words, one group each.

    Inputs times `_int4_mantissas` sum to x q plus what the ones add, which every output shares and sums begin without.
    That costs 8 of float32's 24 bits: a relative error of a few 2^-16, below the rounding of the result in any narrower type.
    Weights beyond the last are any number, and meet an input of 0.
    """
    words: tl.constexpr = K // 8
    groups: tl.constexpr = K // GROUPSIZE
    first_row, row = _rows(N, GATED, BLOCK_N)
    word = tl.arange(0, 4 * BLOCK_U)[None, :]
    weight += first_row * words
    at = row[:, None] * words + word
    x_at = word // 4 * 32 + word % 4
    # [BLOCK_N, BLOCK_U] scales in one dimension, loaded one at a time: so each comes to the thread that has its block.
    unit = tl.max_contiguous(tl.arange(0, BLOCK_N * BLOCK_U), 1)
    scale_at = tl.reshape(tl.broadcast_to(row[:, None], [BLOCK_N, BLOCK_U]), [BLOCK_N * BLOCK_U]) * groups
    unit = unit % BLOCK_U
    scale += first_row * groups
    zero += first_row * groups
    w = tl.load(weight + at, mask=word < words)
    group = scale_at + tl.minimum(unit // (GROUPSIZE // 32), groups - 1)
    s = tl.load(scale + group)
    z = tl.load(zero + group)
    shift = 0.0
    if bias is not None:
        shift = tl.load(bias + first_row + row).to(tl.float32)
    pdl_wait(PDL)
    added = 0.0
    if residual is not None:
        n = _outputs_here(N, GATED, BLOCK_N)
        added = tl.load(residual + n, mask=n < N, other=0.0).to(tl.float32)
    scaled = tl.zeros([BLOCK_N, BLOCK_U], tl.float32)
    offset = tl.zeros([BLOCK_N, BLOCK_U], tl.float32)
    squares = tl.zeros([1, 4 * BLOCK_U], tl.float32)
    for first in range(0, words, 4 * BLOCK_U):
        beyond = first + 4 * BLOCK_U
        next_w = tl.load(weight + beyond + at, mask=beyond + word < words)
        group = scale_at + tl.minimum((beyond // 4 + unit) // (GROUPSIZE // 32), groups - 1)
        next_s = tl.load(scale + group)
        next_z = tl.load(zero + group)
        even = tl.zeros([1, 4 * BLOCK_U], tl.float32)
        odd = tl.zeros([1, 4 * BLOCK_U], tl.float32)
        inputs = ()
        for i in tl.static_range(8):
            place = 8 * first + 4 * i + x_at
            value = tl.load(x + place, mask=first + word < words, other=0.0).to(tl.float32)
            if norm is not None:
                squares += value * value
                value *= tl.load(norm + place, mask=first + word < words, other=0.0).to(tl.float32)
            if i % 2 == 0:
                value *= 16
                even += value
            else:
                odd += value
            inputs += (value,)
        products = tl.broadcast_to(-even - odd, [BLOCK_N, 4 * BLOCK_U])
        integers = _int4_mantissas(w, PORTABLE)
        for i in tl.static_range(8):
            products += integers[i] * inputs[i]
        scaled += tl.reshape(s, [BLOCK_N, BLOCK_U]).to(tl.float32) * _sum_of_four(products)
        offset += tl.reshape(z, [BLOCK_N, BLOCK_U]).to(tl.float32) * _sum_of_four(even / 16 + odd)
        w, s, z = next_w, next_s, next_z
    value = tl.sum(16 * scaled + offset, axis=1)
    if norm is not None:
        value *= tl.rsqrt(tl.sum(squares) / K + eps)
    _store_row(out, value + shift, added, N, GATED)


# ---------------------------------------------------------------------------------------------------------- several rows

@triton.jit
def _store_tile(partial, acc, split, n, M, N):
    """acc [16, BLOCK_N] to partial [splits, M, N]."""
    m = tl.arange(0, 16)[:, None]
    at = (split * M + m).to(tl.int64) * N + n[None, :]
    tl.store(partial + at, acc.to(partial.dtype.element_ty), mask=(m < M) & (n[None, :] < N))


def _int4_values_asm() -> str:
    """PTX of `_int4_values`: $8 and $9 are two words, $10 and $11 the scales and zeros of both, $0 .. $7 pairs of weights."""
    lines = [".reg .b32 low, high, q, o;", "mov.b32 o, 0x43004300;",
             "prmt.b32 low, $8, $9, 0x5410;", "prmt.b32 high, $8, $9, 0x7632;"]
    for i in range(8):
        half, shift = "low" if i < 4 else "high", 4 * (i % 4)
        if shift:
            lines.append(f"shr.u32 q, {half}, {shift};")
        lines += [f"lop3.b32 q, {'q' if shift else half}, 0x000F000F, o, 0xEA;", "sub.rn.bf16x2 q, q, o;",
                  f"fma.rn.bf16x2 ${i}, q, $10, $11;"]
    return "{ " + " ".join(lines) + " }"


_INT4_VALUES = tl.constexpr(_int4_values_asm())


@triton.jit
def _int4_values(w, s, z, PORTABLE: tl.constexpr):
    """int32 w -> its eight weights q s + z in s's dtype, rounded once.

    bfloat16 128 + q has q in its lowest bits. Two words go together, so that a register holds two adjacent elements of an
    operand.
    """
    if PORTABLE or s.dtype != tl.bfloat16:
        wide_s, wide_z = s.to(tl.float32), z.to(tl.float32)
        values = ()
        for i in tl.static_range(8):
            values += ((((w >> 4 * i) & 15).to(tl.float32) * wide_s + wide_z).to(s.dtype),)
        return values
    else:
        return tl.inline_asm_elementwise(_INT4_VALUES, "=&r,=&r,=&r,=&r,=&r,=&r,=&r,=&r,r,r,r,r", [w, s, z],
                                         dtype=(tl.bfloat16,) * 8, is_pure=True, pack=2)


@triton.jit
def _by_words(pair, BLOCK_W: tl.constexpr, BLOCK_N: tl.constexpr):
    """[BLOCK_W / 4, BLOCK_N] -> [BLOCK_W, BLOCK_N]: a block's value for each of its four words."""
    return tl.reshape(tl.broadcast_to(pair[:, None, :], [BLOCK_W // 4, 4, BLOCK_N]), [BLOCK_W, BLOCK_N])


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
    _store_tile(partial, acc * factor[None, :], split, n, M, N)


@triton.jit
def _int4_dot_kernel(x, weight, scale, zero, partial, M, N, K, units_per_split, GROUPSIZE: tl.constexpr, BLOCK_N: tl.constexpr,
                     BLOCK_W: tl.constexpr, PRECISION: tl.constexpr, PORTABLE: tl.constexpr, PDL: tl.constexpr):
    """x [M, K], weight [N, K / 8] -> partial [splits, M, N]. A word's eight weights go into eight products."""
    n = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    split = tl.program_id(1)
    m = tl.arange(0, 16)[:, None]
    word = tl.arange(0, BLOCK_W)
    unit = tl.arange(0, BLOCK_W // 4)
    start = split * units_per_split
    stop = tl.minimum(start + units_per_split, K // 32)
    row = tl.minimum(n, N - 1).to(tl.int64)[None, :]
    weight += row * (K // 32 * 4) + word[:, None]
    scale += row * (K // GROUPSIZE)
    zero += row * (K // GROUPSIZE)
    x += m * K + (word // 4 * 32 + word % 4)[None, :]
    acc = tl.zeros([16, BLOCK_N], tl.float32)
    group = ((start + unit) // (GROUPSIZE // 32))[:, None]
    s = tl.load(scale + group, mask=(start + unit < stop)[:, None], other=0.0)
    z = tl.load(zero + group, mask=(start + unit < stop)[:, None], other=0.0)
    pdl_wait(PDL)
    for first in range(start, stop, BLOCK_W // 4):
        valid = first + word // 4 < stop
        w = tl.load(weight + 4 * first, mask=valid[:, None], other=0)
        beyond = first + BLOCK_W // 4 + unit
        group = (beyond // (GROUPSIZE // 32))[:, None]
        next_s = tl.load(scale + group, mask=(beyond < stop)[:, None], other=0.0)
        next_z = tl.load(zero + group, mask=(beyond < stop)[:, None], other=0.0)
        values = _int4_values(w, _by_words(s, BLOCK_W, BLOCK_N), _by_words(z, BLOCK_W, BLOCK_N),
                              PORTABLE)
        for i in tl.static_range(8):
            inputs = tl.load(x + 32 * first + 4 * i, mask=(m < M) & valid[None, :], other=0.0)
            acc = tl.dot(inputs, values[i], acc, input_precision=PRECISION)
        s, z = next_s, next_z
    _store_tile(partial, acc, split, n, M, N)


def _partial(x: Tensor, N: int, n_splits: int) -> Tensor:
    """[splits, M, N] for what the splits of a product find: float32, unless there is one and it is the result."""
    return torch.empty((n_splits, len(x), N), dtype=x.dtype if n_splits == 1 else torch.float32, device=x.device)


def _summed(partial: Tensor, dtype: torch.dtype) -> Tensor:
    return partial[0] if len(partial) == 1 else partial.sum(dim=0).to(dtype)


# ------------------------------------------------------------------------------------------------------------- functions

@torch.library.custom_op("hashfast::int8_linear", mutates_args=())
def int8_linear(x: Tensor, weight: Tensor, scale: Tensor) -> Tensor:
    """`quant_linear.int8_linear_reference`: x [M, K], M <= 16, int8 [N, K], scale [N] -> [M, N]."""
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
    """`linear.linear_reference` of one row: x [1, .., K], int8 [N, K] ([2 N, K] where gated), K % 4 == 0 -> [1, .., N]."""
    return launch_int8_row(x, weight, scale, bias, norm, eps, residual, gated, **_int8_row_parameters(*weight.shape))


@int8_row.register_fake
def _(x, weight, scale, bias, norm, eps, residual, gated):
    return _outputs(x, weight, gated)


def _outputs(x: Tensor, weight: Tensor, gated: bool) -> Tensor:
    return x.new_empty((*x.shape[:-1], len(weight) // (2 if gated else 1)))


def launch_int8_row(x: Tensor, weight: Tensor, scale: Tensor, bias: Tensor | None = None, norm: Tensor | None = None,
                    eps: float = 0.0, residual: Tensor | None = None, gated: bool = False, *, block_n: int, block_w: int,
                    num_warps: int) -> Tensor:
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
    N, K = weight.shape
    partial = _partial(x, N, n_splits)
    per_split = triton.cdiv(triton.cdiv(K, block_k), n_splits) * block_k
    _int8_dot_kernel[(triton.cdiv(N, block_n), n_splits)](
        x.contiguous(), weight, scale, partial, len(x), N, K, per_split, BLOCK_N=block_n, BLOCK_K=block_k,
        PRECISION=dot_precision(x), num_warps=num_warps, num_stages=num_stages, **pdl_options(x.device))
    return _summed(partial, x.dtype)


@torch.library.custom_op("hashfast::int4_linear", mutates_args=())
def int4_linear(x: Tensor, weight: Tensor, scale: Tensor, zero: Tensor) -> Tensor:
    """`quant_linear.int4_linear_reference`.

    x [M, K], M <= 16, int32 [N, K / 8], scale and zero [N, K / groupsize] -> [M, N].
    """
    M, K = x.shape
    if M == 1:
        return launch_int4_row(x, weight, scale, zero, **_int4_row_parameters(len(weight)))
    return launch_int4_dot(x, weight, scale, zero, **_int4_dot_parameters(len(weight), K))


@int4_linear.register_fake
def _(x, weight, scale, zero):
    return x.new_empty(len(x), len(weight))


@torch.library.custom_op("hashfast::int4_row", mutates_args=())
def int4_row(x: Tensor, weight: Tensor, scale: Tensor, zero: Tensor, bias: Tensor | None, norm: Tensor | None, eps: float,
             residual: Tensor | None, gated: bool) -> Tensor:
    """`linear.linear_reference` of one row: x [1, .., K], int32 [N, K / 8] ([2 N, K / 8] where gated) -> [1, .., N]."""
    return launch_int4_row(x, weight, scale, zero, bias, norm, eps, residual, gated, **_int4_row_parameters(len(weight)))


@int4_row.register_fake
def _(x, weight, scale, zero, bias, norm, eps, residual, gated):
    return _outputs(x, weight, gated)


def launch_int4_row(x: Tensor, weight: Tensor, scale: Tensor, zero: Tensor, bias: Tensor | None = None,
                    norm: Tensor | None = None, eps: float = 0.0, residual: Tensor | None = None, gated: bool = False, *,
                    block_n: int, block_u: int, num_warps: int) -> Tensor:
    out, K = _outputs(x, weight, gated), x.shape[-1]
    _int4_row_kernel[(triton.cdiv(len(weight), block_n),)](
        x.contiguous(), norm, weight, scale, zero, bias, residual.contiguous() if residual is not None else None, out, eps,
        out.shape[-1], K, GROUPSIZE=K // scale.shape[1], GATED=gated, BLOCK_N=block_n, BLOCK_U=block_u,
        PORTABLE=portable(x.device), num_warps=num_warps,
        **pdl_options(x.device))
    return out


def launch_int4_dot(x: Tensor, weight: Tensor, scale: Tensor, zero: Tensor, *, block_n: int, block_k: int, n_splits: int,
                    num_warps: int, num_stages: int) -> Tensor:
    N, K = len(weight), x.shape[1]
    partial = _partial(x, N, n_splits)
    per_split = triton.cdiv(triton.cdiv(K, block_k), n_splits) * (block_k // 32)
    _int4_dot_kernel[(triton.cdiv(N, block_n), n_splits)](
        x.contiguous(), weight, scale, zero, partial, len(x), N, K, per_split, GROUPSIZE=K // scale.shape[1], BLOCK_N=block_n,
        BLOCK_W=block_k // 8, PRECISION=dot_precision(x), PORTABLE=portable(x.device), num_warps=num_warps,
        num_stages=num_stages, **pdl_options(x.device))
    return _summed(partial, x.dtype)


# ------------------------------------------------------------------------------------------------------------ dequantise

@triton.jit
def _dequantize_kernel(weight, scale, zero, out, words, GROUPSIZE: tl.constexpr, BLOCK_W: tl.constexpr,
                       PDL: tl.constexpr):
    """weight [N, words] -> out [N, 8 words]."""
    n = tl.program_id(0).to(tl.int64)
    word = tl.program_id(1) * BLOCK_W + tl.arange(0, BLOCK_W)
    pdl_wait(PDL)
    w = tl.load(weight + n * words + word, mask=word < words, other=0)
    group = n * (8 * words // GROUPSIZE) + word // (GROUPSIZE // 8)
    s = tl.load(scale + group, mask=word < words, other=0.0).to(tl.float32)
    z = tl.load(zero + group, mask=word < words, other=0.0).to(tl.float32)
    out += n * (8 * words) + word // 4 * 32 + word % 4
    for i in tl.static_range(8):
        value = ((w >> 4 * i) & 15).to(tl.float32) * s + z
        tl.store(out + 4 * i, value.to(out.dtype.element_ty), mask=word < words)


@torch.library.custom_op("hashfast::dequantize_int4", mutates_args=())
def dequantize_int4(weight: Tensor, scale: Tensor, zero: Tensor) -> Tensor:
    """`quant_linear.dequantize_int4`: int32 [N, K / 8], scale and zero [N, K / groupsize] -> [N, K] of scale's dtype."""
    N, words = weight.shape
    out = torch.empty((N, 8 * words), dtype=scale.dtype, device=weight.device)
    block_w = min(512, triton.next_power_of_2(words))
    _dequantize_kernel[(N, triton.cdiv(words, block_w))](
        weight, scale, zero, out, words, GROUPSIZE=8 * words // scale.shape[1], BLOCK_W=block_w, num_warps=4,
        **pdl_options(weight.device))
    return out


@dequantize_int4.register_fake
def _(weight, scale, zero):
    return scale.new_empty(len(weight), 8 * weight.shape[1])
