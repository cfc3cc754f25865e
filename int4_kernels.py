"""Triton kernel of a decode step's int4 layers, with what stands around them. quant_linear.py holds the format.

int4_row   residual + rstd * (x * norm) W^T + bias, or silu(gate) * up of two such products, for one or two rows: one kernel

The weights of 4 bits go from memory into the registers of mma.m16n8k16, as those of 16 do (linear_kernels.py). As integers:
128 + q is a bfloat16 whose lowest bits are q, so that two of them cost a shift and a logical instruction. Each group of inputs
has its own scale and zero, though, and the instruction sums over four lanes. But it has room for eight rows of x, of which one
or two are there: lane t has a block of 32 inputs of its own, and row n of x is given to lane n % 4 alone, as zeros to the
others. What comes out is the sum of each lane's block by itself, rows 0 .. 3 for the first row of x and 4 .. 7 for the second.
Another such product, with ones for weights, sums the inputs; then w = q s + z gives s * sums + (z - 128 s) * ones.
"""
import functools

import torch
import triton
import triton.language as tl
from torch import Tensor

from hash_kernels import DEPENDENT_LAUNCH, INTERPRETED, after_previous
from linear_kernels import _number, _outputs, _scaled, _squares, silu_gate

ROWS = 2


def _parameters(N: int, K: int, gated: bool) -> dict[str, int]:
    """As linear_kernels._parameters; a unit is four blocks of 32 inputs."""
    if gated:
        return {"parts": 4, "warps": 8, "units": 2}
    return {"parts": 2, "warps": 4 if K > 8192 else 8, "units": 4}


def _mma(sums: str, weights: str, inputs: str, before: str) -> str:
    return f"mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {{{sums}}}, {{{weights}}}, {{{inputs}}}, {{{before}}};"


def _integers_times_inputs() -> str:
    """$0-3 sums of two outputs for two groups; $4-5 and $6-7 a block of integers of each output; $8 .. $23 inputs."""
    lines = [".reg .b32 w<4>, al, ah, bl, bh, xl, xh, o;", ".reg .f32 z;", "mov.b32 o, 0x43004300; mov.f32 z, 0f00000000;"]
    before = "z, z, z, z"
    for half in range(2):  # words 0 and 1, words 2 and 3
        lines.append(f"mov.b64 {{w0, w1}}, ${4 + half}; mov.b64 {{w2, w3}}, ${6 + half};")
        for i in range(4):
            for word, name in enumerate(("al", "ah", "bl", "bh")):
                if i > 0:
                    lines.append(f"shr.u32 {name}, w{word}, {4 * i};")
                lines.append(f"lop3.b32 {name}, {name if i > 0 else f'w{word}'}, 0x000F000F, o, 0xEA;")
            lines.append(f"mov.b64 {{xl, xh}}, ${8 + 8 * (i // 2) + 4 * half + i % 2};")
            lines.append(_mma("$0, $1, $2, $3", "al, bl, ah, bh", "xl, xh", before))
            before = "$0, $1, $2, $3"
    return "{ " + " ".join(lines) + " }"


def _sum_of_inputs() -> str:
    """$0-1 sums of two groups of inputs, $2 .. $9."""
    lines = [".reg .b32 xl, xh, o;", ".reg .f32 z, c, d;", "mov.b32 o, 0x3F803F80; mov.f32 z, 0f00000000;"]
    before = "z, z, z, z"
    for i in range(8):
        lines += [f"mov.b64 {{xl, xh}}, ${2 + i};", _mma("$0, $1, c, d", "o, o, o, o", "xl, xh", before)]
        before = "$0, $1, c, d"
    return "{ " + " ".join(lines) + " }"


def _products_of_inputs() -> str:
    """$0-1 sums $2-3 plus the products of one group of inputs with two, $4 .. $11."""
    lines = [".reg .b32 xl, xh;", ".reg .f32 c, d;", "mov.f32 c, 0f00000000; mov.f32 d, 0f00000000;"]
    before = "$2, $3, c, d"
    for i in range(8):
        lines += [f"mov.b64 {{xl, xh}}, ${4 + i};", _mma("$0, $1, c, d", "xl, xl, xh, xh", "xl, xh", before)]
        before = "$0, $1, c, d"
    return "{ " + " ".join(lines) + " }"


_INTEGERS, _SUM, _PRODUCTS = (tl.constexpr(asm()) for asm in (_integers_times_inputs, _sum_of_inputs, _products_of_inputs))
_INTEGERS_REGISTERS = tl.constexpr(",".join(["=&f"] * 4 + ["l"] * 20))
_SUM_REGISTERS = tl.constexpr(",".join(["=&f"] * 2 + ["l"] * 8))
_PRODUCTS_REGISTERS = tl.constexpr(",".join(["=&f"] * 2 + ["f"] * 2 + ["l"] * 8))
# four inputs $2 and the four 16 places on $3 -> the pairs 16 apart that a word's integers are, of two words and of two more
_PAIRS = tl.constexpr("{ .reg .b32 al, ah, bl, bh, p, q; mov.b64 {al, ah}, $2; mov.b64 {bl, bh}, $3; "
                      "prmt.b32 p, al, bl, 0x5410; prmt.b32 q, al, bl, 0x7632; mov.b64 $0, {p, q}; "
                      "prmt.b32 p, ah, bh, 0x5410; prmt.b32 q, ah, bh, 0x7632; mov.b64 $1, {p, q}; }")


@triton.jit
def _pairs(x, y):
    return tl.inline_asm_elementwise(_PAIRS, "=&l,=&l,l,l", [x, y], dtype=(tl.int64, tl.int64), is_pure=True, pack=1)


@triton.jit
def _to_parts(x, PARTS: tl.constexpr):
    """[n, 8] -> [PARTS * n, 8], the same for all parts."""
    return tl.reshape(tl.broadcast_to(x[None], [PARTS, x.shape[0], 8]), [PARTS * x.shape[0], 8])


@triton.jit
def _element(x, i: tl.constexpr):
    """x [.., 2] -> [..], the i-th of the last dimension."""
    return tl.sum(tl.where(tl.arange(0, 2) == i, x, 0), axis=len(x.shape) - 1)


@triton.jit
def _sums(w, x, PARTS: tl.constexpr, WARPS: tl.constexpr):
    """-> sums of 128 + q times inputs [PARTS * WARPS * 8 outputs, 8 groups], of inputs alone [WARPS * 8, 8 groups].

    w [PARTS * WARPS * 8, 4 blocks * 2], 16 integers as int64.
    x: four tiles [WARPS * 8 groups, 4 blocks * 2] of four numbers as int64, inputs 0 .. 7, .. , 24 .. 31 of a block.
    """
    if INTERPRETED:
        sums = tl.zeros([PARTS, WARPS, 8, 8], tl.float32)
        ones = tl.zeros([WARPS, 8], tl.float32)
        words = tl.reshape(w, [PARTS, WARPS, 8, 1, 4, 2])
        for place in tl.static_range(32):
            value = _number(_element(tl.reshape(x[place // 8], [WARPS, 8, 4, 2]), place // 4 % 2), place % 4)
            q = (_element(words, place % 4 // 2) >> (32 * (place % 2) + 4 * (place // 4))) & 15
            sums += tl.sum((128 + q.to(tl.float32)) * value[None, :, None], axis=4)
            ones += tl.sum(value, axis=2)
        sums = tl.reshape(sums, [PARTS * WARPS * 8, 8])
        ones = tl.reshape(tl.broadcast_to(ones[:, None], [WARPS, 8, 8]), [WARPS * 8, 8])
    else:
        p0, q0 = _pairs(x[0], x[2])
        p1, q1 = _pairs(x[1], x[3])
        ones = tl.inline_asm_elementwise(_SUM, _SUM_REGISTERS, [p0, q0, p1, q1], dtype=tl.float32, is_pure=True, pack=2)
        sums = tl.inline_asm_elementwise(_INTEGERS, _INTEGERS_REGISTERS, [w, _to_parts(p0, PARTS), _to_parts(q0, PARTS),
                                                                          _to_parts(p1, PARTS), _to_parts(q1, PARTS)],
                                         dtype=tl.float32, is_pure=True, pack=4)
    return sums, ones


@triton.jit
def _add_products(squares, x):
    """squares [WARPS * 8, 8] plus products of groups of inputs, tiles as in `_sums`: their sum where both are of one row of x
    is that of its squares, as inputs of different groups meet zeros."""
    if INTERPRETED:
        for i in tl.static_range(4):
            squares += _squares(x[i])
    else:
        squares = tl.inline_asm_elementwise(_PRODUCTS, _PRODUCTS_REGISTERS, [squares, x[0], x[1], x[2], x[3]],
                                            dtype=tl.float32, is_pure=True, pack=2)
    return squares


@triton.jit
def _load_factors(factor, output, block, BLOCKS: tl.constexpr, GROUP: tl.constexpr):
    """Scales or zeros [N, BLOCKS / GROUP] of outputs [n, 1] and the blocks [n, 1] and the three after it -> [n, 8], twice."""
    if GROUP == 1:
        column = tl.arange(0, 8)[None, :] % 4
        at = tl.max_contiguous(output * BLOCKS + block + column, [1, 2])
        if BLOCKS % 2 == 0:
            at = tl.multiple_of(at, [1, 2])
        return tl.load(factor + at, mask=block + column < BLOCKS, other=0.0)
    else:  # two neighbours are of one group; in one dimension and one by one, each number comes to the lanes that need it
        n: tl.constexpr = output.shape[0]
        at = tl.max_contiguous(tl.arange(0, n * 4), 1)
        block = tl.reshape(tl.broadcast_to(block, [n, 4]), [n * 4]) + at % 2 * 2
        output = tl.reshape(tl.broadcast_to(output, [n, 4]), [n * 4])
        value = tl.load(factor + output * (BLOCKS // GROUP) + block // GROUP, mask=block < BLOCKS, other=0.0)
        return tl.reshape(tl.broadcast_to(value[:, None], [n * 4, 2]), [n, 8])


@triton.jit
def _load_units(weight, scale, zero, output, block, BLOCKS: tl.constexpr, GROUP: tl.constexpr, UNITS: tl.constexpr):
    """UNITS times four blocks from `block` [n, 1] on -> tuples of weights, scales and zeros; zeros past the last block."""
    w, s, z = (), (), ()
    column = tl.arange(0, 8)[None, :]
    for u in tl.static_range(UNITS):
        here = block + 4 * u
        w += (tl.load(weight + output * (2 * BLOCKS) + 2 * here + column, mask=here + column // 2 < BLOCKS, other=0),)
        s += (_load_factors(scale, output, here, BLOCKS, GROUP),)
        z += (_load_factors(zero, output, here, BLOCKS, GROUP),)
    return w, s, z


@triton.jit
def _load_block(x, visible):
    """A lane's place in each fourth of its block, two int64 there: four tiles of `_sums`."""
    tiles = ()
    for i in tl.static_range(4):
        tiles += (tl.load(x + 2 * i, mask=visible, other=0),)
    return tiles


@triton.jit
def _int4_row_kernel(x, norm, weight, scale, zero, bias, residual, out, M, N, eps, K: tl.constexpr, GROUPSIZE: tl.constexpr,
                     GATED: tl.constexpr, PARTS: tl.constexpr, WARPS: tl.constexpr, UNITS: tl.constexpr):
    """x [M, K / 4] and norm [K / 4] as int64 of four numbers, weight [N, K / 16] or, GATED, [2 N, K / 16] as int64 of sixteen,
    scale and zero [N or 2 N, K / GROUPSIZE], bias [N], residual [M, N] -> out [M, N]. GATED: every other part is of the gate.

    Warps take turns of UNITS times four blocks of 32 inputs.
    """
    BLOCKS: tl.constexpr = K // 32
    STEP: tl.constexpr = WARPS * UNITS * 4
    GROUP: tl.constexpr = GROUPSIZE // 32
    lane = tl.arange(0, PARTS * WARPS * 8)[:, None]  # of a part, a warp and an output
    part = lane // (WARPS * 8)
    if GATED:
        output = tl.minimum((tl.program_id(0) * (PARTS // 2) + part // 2) * 8 + lane % 8, N - 1) + part % 2 * N
    else:
        output = tl.minimum((tl.program_id(0) * PARTS + part) * 8 + lane % 8, N - 1)
    output = output.to(tl.int64)
    block = lane // 8 % WARPS * (UNITS * 4)
    w, s, z = _load_units(weight, scale, zero, output, block, BLOCKS, GROUP, UNITS)

    x_lane = tl.arange(0, WARPS * 8)[:, None]  # of a warp and a group
    column = tl.arange(0, 8)[None, :]
    m = x_lane % 8 // 4
    x_block = x_lane // 8 * (UNITS * 4) + column // 2
    own = (x_lane % 4 == column // 2) & (m < M)
    place = tl.multiple_of(tl.max_contiguous(x_block * 8 + column % 2, [1, 2]), [1, 2])
    after_previous()
    n = _outputs(N, GATED, PARTS)
    row = tl.arange(0, 2)[None, None, :]
    added = 0.0
    if residual is not None:
        added = tl.load(residual + row * N + n, mask=(row < M) & (n < N), other=0.0).to(tl.float32)
    total = tl.zeros([PARTS * WARPS * 8, 8], tl.float32)
    squares = tl.zeros([WARPS * 8, 8], tl.float32)
    for first in range(0, BLOCKS, STEP):
        next_w, next_s, next_z = _load_units(weight, scale, zero, output, first + STEP + block, BLOCKS, GROUP, UNITS)
        for u in tl.static_range(UNITS):
            here = first + 4 * u
            visible = own & (here + x_block < BLOCKS)
            inputs = _load_block(x + m * (K // 4) + here * 8 + place, visible)
            if norm is not None:
                squares = _add_products(squares, inputs)
                factors = _load_block(norm + here * 8 + place, visible)
                inputs = (_scaled(inputs[0], factors[0]), _scaled(inputs[1], factors[1]), _scaled(inputs[2], factors[2]),
                          _scaled(inputs[3], factors[3]))
            sums, ones = _sums(w[u], inputs, PARTS, WARPS)
            wide = s[u].to(tl.float32)
            total += wide * sums + (z[u].to(tl.float32) - 128 * wide) * _to_parts(ones, PARTS)
        w, s, z = next_w, next_s, next_z
    value = tl.sum(tl.sum(tl.reshape(total, [PARTS, WARPS, 8, 2, 4]), axis=4), axis=1)  # [PARTS, 8 outputs, 2 rows]
    if norm is not None:
        if not INTERPRETED:
            squares = tl.where(m == column // 4, squares, 0.0)
        mean = tl.sum(tl.sum(tl.reshape(tl.sum(squares, axis=1), [WARPS, 2, 4]), axis=2), axis=0) / K
        value *= tl.rsqrt(mean + eps)[None, None, :]
    if GATED:
        gate, up = tl.split(tl.permute(tl.reshape(value, [PARTS // 2, 2, 8, 2]), [0, 2, 3, 1]))
        value = silu_gate(gate, up)
    if bias is not None:
        value += tl.load(bias + n, mask=n < N, other=0.0).to(tl.float32)
    tl.store(out + row * N + n, (value + added).to(out.dtype.element_ty), mask=(row < M) & (n < N))


@functools.cache
def _check_lanes(device: torch.device) -> None:
    """As linear_kernels._check_lanes: RuntimeError where Triton's lanes hold other numbers than the kernel needs."""
    words = (torch.arange(16 * 64, device=device, dtype=torch.int32).view(16, 64) * 40503 * 65521) & 0x11111111
    q = (words.unflatten(1, (-1, 1, 4)) >> 4 * torch.arange(8, device=device, dtype=torch.int32)[:, None] & 15).flatten(1)
    x = (torch.arange(ROWS * 512, device=device) * 27449 % 65519 % 3 - 1).view(ROWS, 512).bfloat16()
    scale = torch.ones(16, 16, device=device, dtype=torch.bfloat16)
    got = _launch_int4_row(x, words, scale, torch.zeros_like(scale), None, None, 0.0, None, False, parts=2, warps=2, units=1)
    if not torch.equal(got, (x.float() @ q.float().T).to(got.dtype)):
        raise RuntimeError(f"Triton {triton.__version__} lays tensors out in another way than int4_kernels.py needs; "
                           "use a version that requirements.txt allows")


@torch.library.custom_op("hashfast::int4_row", mutates_args=())
def int4_row(x: Tensor, weight: Tensor, scale: Tensor, zero: Tensor, bias: Tensor | None, norm: Tensor | None, eps: float,
             residual: Tensor | None, gated: bool) -> Tensor:
    """`linear.linear_reference` of one or two rows in bfloat16: x [.., K], int32 [N, K / 8] ([2 N, K / 8] where gated),
    scale and zero [N or 2 N, K / groupsize] -> [.., N]. A gated product has no bias."""
    _check_lanes(x.device)
    N, K = len(weight) // (2 if gated else 1), x.shape[-1]
    return _launch_int4_row(x, weight, scale, zero, bias, norm, eps, residual, gated, **_parameters(N, K, gated))


@int4_row.register_fake
def _(x, weight, scale, zero, bias, norm, eps, residual, gated):
    return x.new_empty((*x.shape[:-1], len(weight) // (2 if gated else 1)))


def _launch_int4_row(x: Tensor, weight: Tensor, scale: Tensor, zero: Tensor, bias: Tensor | None, norm: Tensor | None,
                     eps: float, residual: Tensor | None, gated: bool, *, parts: int, warps: int, units: int) -> Tensor:
    K = x.shape[-1]
    M, N = x.numel() // K, len(weight) // (2 if gated else 1)
    if M > ROWS or scale.dtype != torch.bfloat16 or gated and bias is not None:
        raise ValueError(f"no kernel for {M} rows of {K} {scale.dtype} numbers{' and a gated bias' if gated else ''}")
    out = x.new_empty((*x.shape[:-1], N))
    x, norm, weight = (None if t is None else t.contiguous().view(torch.int64) for t in (x, norm, weight))
    _int4_row_kernel[(triton.cdiv(N, 8 * parts // (2 if gated else 1)),)](
        x, norm, weight, scale, zero, bias, residual.contiguous() if residual is not None else None, out, M, N, eps, K=K,
        GROUPSIZE=K // scale.shape[1], GATED=gated, PARTS=parts, WARPS=warps, UNITS=units, num_warps=warps,
        launch_pdl=DEPENDENT_LAUNCH)
    return out
