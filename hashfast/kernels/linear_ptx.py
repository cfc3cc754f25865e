"""Linear layers of a decode step by inline PTX, in bfloat16: linear.py on NVIDIA GPUs.

Weights go from memory straight into the operands of mma.m16n8k16, without shared memory, a layout conversion or a barrier in
the loop. Of a tile of eight outputs by 32 inputs, a warp's lane 4 g + t loads the 16 bytes of output g that hold inputs
8 t .. 8 t + 7, and of a tile of eight rows of x likewise. That permutes K against the fragment layout, the same way for
weights and x, so the product is the same.
"""
import functools

import torch
import triton
import triton.language as tl
from torch import Tensor

from hashfast.kernels.epilogue import silu_gate
from hashfast.kernels.launch import pdl_options, pdl_wait


def mma_parameters(M: int, N: int, K: int, gated: bool) -> dict[str, int]:
    """parts: tiles of eight outputs that a warp works on, an even number; the gate's and those of `up` count apart.
    warps: of a program; they share the inputs.  units: tiles of inputs in flight at a time, per warp.
    """
    if N >= 2 ** 16:
        parts, warps, units = (2, 2, 8) if M <= 8 else (8, 2, 4)
    elif K > 8192:
        parts, warps, units = 2, 8, 8 if M <= 8 else 4
    elif gated:
        parts, warps, units = (2, 4, 4) if M <= 8 else (4, 2, 2)
    else:
        parts, warps, units = 2, 4, 8 if M <= 8 else 4
    per_warp = triton.cdiv(triton.cdiv(K, 32), warps)
    return {"parts": parts, "warps": warps, "units": triton.cdiv(per_warp, triton.cdiv(per_warp, units))}  # as even as can be


def _mma() -> str:
    """$0-3 sums of two outputs for two rows of x, $4-7 before; $8-9 and $10-11 weights of the two outputs, $12-13 inputs."""
    lines = [".reg .b32 al, ah, bl, bh, xl, xh;"]
    before = "$4, $5, $6, $7"
    for i in range(2):
        lines += [f"mov.b64 {{al, ah}}, ${8 + i}; mov.b64 {{bl, bh}}, ${10 + i}; mov.b64 {{xl, xh}}, ${12 + i};",
                  "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {$0, $1, $2, $3}, {al, bl, ah, bh}, {xl, xh}, "
                  f"{{{before}}};"]
        before = "$0, $1, $2, $3"
    return "{ " + " ".join(lines) + " }"


_MMA = tl.constexpr(_mma())
_MMA_REGISTERS = tl.constexpr(",".join(["=&f"] * 4 + ["f"] * 4 + ["l"] * 8))
_SCALE = tl.constexpr("{ .reg .b32 xl, xh, fl, fh; mov.b64 {xl, xh}, $1; mov.b64 {fl, fh}, $2; mul.rn.bf16x2 xl, xl, fl; "
                      "mul.rn.bf16x2 xh, xh, fh; mov.b64 $0, {xl, xh}; }")


@triton.jit
def _element(x, i: tl.constexpr):
    """The i-th of the four bfloat16 elements of each int64, as float32."""
    return (((x >> (16 * i)) & 0xFFFF) << 16).to(tl.int32).to(tl.float32, bitcast=True)


@triton.jit
def _squares(x):
    """Sum of the squares of the four elements of each int64."""
    total = tl.zeros(x.shape, tl.float32)
    for i in tl.static_range(4):
        total += _element(x, i) * _element(x, i)
    return total


@triton.jit
def _scaled(x, factor):
    """Products of the four bfloat16 elements of each int64, rounded to bfloat16."""
    return tl.inline_asm_elementwise(_SCALE, "=l,l,l", [x, factor], dtype=tl.int64, is_pure=True, pack=1)


@triton.jit
def _multiply(acc, weights, x, PARTS: tl.constexpr, WARPS: tl.constexpr):
    """acc [PARTS * WARPS * 8 outputs, 8 rows of x] plus the products of one unit of inputs per warp.

    weights [PARTS * WARPS * 8, 8] and x [WARPS * 8, 8], int64 of four elements each.
    """
    x = tl.reshape(tl.broadcast_to(x[None], [PARTS, WARPS * 8, 8]), [PARTS * WARPS * 8, 8])
    return tl.inline_asm_elementwise(_MMA, _MMA_REGISTERS, [acc, weights, x], dtype=tl.float32, is_pure=True, pack=4)


@triton.jit
def _outputs(N, GATED: tl.constexpr, PARTS: tl.constexpr):
    """The outputs of this program, [PARTS, 8, 1]; GATED, half as many."""
    parts: tl.constexpr = PARTS // 2 if GATED else PARTS
    return (tl.program_id(0) * parts + tl.arange(0, parts)[:, None, None]) * 8 + tl.arange(0, 8)[None, :, None]


@triton.jit
def _load_units(row, q, first, visible, Q: tl.constexpr, UNITS: tl.constexpr, STEP: tl.constexpr):
    """A tuple of UNITS tiles of rows of Q int64, from place `first` + q on; zeros past their end and where not `visible`."""
    units = ()
    for u in tl.static_range(UNITS):
        inside = first < Q if Q % STEP == 0 else first + u * 8 + q < Q
        if visible is not None:
            inside = visible & inside
        units += (tl.load(row + first + u * 8, mask=inside, other=0),)
    return units


@triton.jit
def _mma_linear_kernel(x, norm, weight, bias, residual, out, M, N, eps, K: tl.constexpr, GATED: tl.constexpr,
                       PARTS: tl.constexpr, WARPS: tl.constexpr, UNITS: tl.constexpr, TILES: tl.constexpr, PDL: tl.constexpr):
    """x [M, K / 4], norm [K / 4], weight [N, K / 4] or, GATED, [2 N, K / 4] as int64 of four elements each, bias [N],
    residual [M, N] -> out [M, N]. GATED: every other part is of the gate. TILES: of eight rows of x.

    q: place in a row of such int64. Warps take turns of UNITS * 8 of them.
    """
    Q: tl.constexpr = K // 4
    STEP: tl.constexpr = WARPS * UNITS * 8
    NORM: tl.constexpr = norm is not None
    lane = tl.arange(0, PARTS * WARPS * 8)[:, None]  # of a part, a warp and an output
    part = lane // (WARPS * 8)
    q = lane // 8 % WARPS * (UNITS * 8) + tl.arange(0, 8)[None, :]
    if GATED:
        output = tl.minimum((tl.program_id(0) * (PARTS // 2) + part // 2) * 8 + lane % 8, N - 1) + part % 2 * N
    else:
        output = tl.minimum((tl.program_id(0) * PARTS + part) * 8 + lane % 8, N - 1)
    weight += output.to(tl.int64) * Q + q
    x_lane = tl.arange(0, WARPS * 8)[:, None]
    x_q = x_lane // 8 * (UNITS * 8) + tl.arange(0, 8)[None, :]
    m = x_lane % 8
    x += m * Q + x_q
    weights, factors, inputs = _load_units(weight, q, 0, None, Q, UNITS, STEP), (), ()
    if NORM:
        norm += x_q
        factors = _load_units(norm, x_q, 0, None, Q, UNITS, STEP)
    pdl_wait(PDL)
    for tile in tl.static_range(TILES):
        inputs += _load_units(x + tile * 8 * Q, x_q, 0, tile * 8 + m < M, Q, UNITS, STEP)
    added, accs, squares = (), (), ()
    n = _outputs(N, GATED, PARTS)
    for tile in tl.static_range(TILES):
        accs += (tl.zeros([PARTS * WARPS * 8, 8], tl.float32),)
        squares += (tl.zeros([WARPS * 8, 8], tl.float32),)
        if residual is not None:
            row = tile * 8 + tl.arange(0, 8)[None, None, :]
            added += (tl.load(residual + row * N + n, mask=(row < M) & (n < N), other=0.0).to(tl.float32),)
        else:
            added += (0.0,)
    for first in range(0, Q, STEP):
        beyond = first + STEP
        next_weights, next_factors, next_inputs = _load_units(weight, q, beyond, None, Q, UNITS, STEP), (), ()
        if NORM:
            next_factors = _load_units(norm, x_q, beyond, None, Q, UNITS, STEP)
        for tile in tl.static_range(TILES):
            next_inputs += _load_units(x + tile * 8 * Q, x_q, beyond, tile * 8 + m < M, Q, UNITS, STEP)
        for u in tl.static_range(UNITS):
            next_accs, next_squares = (), ()
            for tile in tl.static_range(TILES):
                value = inputs[UNITS * tile + u]
                if NORM:
                    next_squares += (squares[tile] + _squares(value),)
                    value = _scaled(value, factors[u])
                next_accs += (_multiply(accs[tile], weights[u], value, PARTS, WARPS),)
            accs = next_accs
            if NORM:
                squares = next_squares
        weights, factors, inputs = next_weights, next_factors, next_inputs
    for tile in tl.static_range(TILES):
        value = tl.sum(tl.reshape(accs[tile], [PARTS, WARPS, 8, 8]), axis=1)  # [PARTS, 8 outputs, 8 rows]
        if NORM:
            total = tl.sum(tl.reshape(tl.sum(squares[tile], axis=1), [WARPS, 8]), axis=0)
            value *= tl.rsqrt(total / K + eps)[None, None, :]
        if GATED:
            gate, up = tl.split(tl.permute(tl.reshape(value, [PARTS // 2, 2, 8, 8]), [0, 2, 3, 1]))
            value = silu_gate(gate, up)
        if bias is not None:
            value += tl.load(bias + n, mask=n < N, other=0.0).to(tl.float32)
        value += added[tile]
        row = tile * 8 + tl.arange(0, 8)[None, None, :]
        tl.store(out + row * N + n, value.to(out.dtype.element_ty), mask=(row < M) & (n < N))


@functools.cache
def check_lanes(device: torch.device) -> None:
    """Check that lanes hold the elements that the PTX assumes, which Triton does not promise: RuntimeError if not.

    Small integers, whose sums are exact.
    """
    weight = (torch.arange(16 * 256, device=device) * 40503 % 65521 % 3 - 1).view(16, 256).bfloat16()
    x = (torch.arange(8 * 256, device=device) * 27449 % 65519 % 3 - 1).view(8, 256).bfloat16()
    got = launch_mma(x, weight, None, None, 0.0, None, False, parts=2, warps=4, units=2)
    if not torch.equal(got, (x.float() @ weight.float().T).to(got.dtype)):
        raise RuntimeError(f"Triton {triton.__version__} lays tensors out in another way than linear_ptx.py needs; "
                           "use a version that requirements.txt allows, or HASHFAST_PORTABLE=1")


def launch_mma(x: Tensor, weight: Tensor, bias: Tensor | None, norm: Tensor | None, eps: float, residual: Tensor | None,
               gated: bool, *, parts: int, warps: int, units: int) -> Tensor:
    """Arguments and result of `linear.linear`."""
    N, K = weight.shape[0] // (2 if gated else 1), x.shape[-1]
    M = x.numel() // K
    out = x.new_empty((*x.shape[:-1], N))
    fours = [None if t is None else t.contiguous().view(torch.int64) for t in (x, norm, weight)]
    _mma_linear_kernel[(triton.cdiv(N, 8 * parts // (2 if gated else 1)),)](
        *fours, bias, residual.contiguous() if residual is not None else None, out, M, N, eps, K=K, GATED=gated, PARTS=parts,
        WARPS=warps, UNITS=units, TILES=triton.cdiv(M, 8), num_warps=warps, **pdl_options(x.device))
    return out
