"""Parts of split-KV flash attention that the dense and the sparse kernels share: a tile, the end of a split, combining."""
import torch
import triton
import triton.language as tl
from torch import Tensor

from hashfast.kernels.launch import checked_rows, pdl_options, pdl_wait

# Softmax is computed in base 2, whose powers and logarithms are instructions.
LOG2_E = tl.constexpr(1.4426950408889634)
LN_2 = tl.constexpr(0.6931471805599453)


@triton.jit
def attend_tile(q, k, v, visible, top, total, acc, scale_log2, MASKED: tl.constexpr, PRECISION: tl.constexpr):
    """One tile of flash attention in base 2. q [M, D], k and v [N, D]; top, total [M] and acc [M, D] are the running state.

    `visible` [M or 1, N] counts where MASKED. scale_log2 is positive: it then commutes with the maximum, and scaling a score
    and subtracting the maximum is one instruction.
    """
    scores = tl.dot(q, tl.trans(k), input_precision=PRECISION)
    if MASKED:
        scores = tl.where(visible, scores, float("-inf"))
    new_top = tl.maximum(top, tl.max(scores, axis=1) * scale_log2)
    # while a query has seen nothing its top is -inf, and -inf - -inf would be NaN
    pivot = tl.where(new_top == float("-inf"), 0.0, new_top)
    weights = tl.exp2(scores * scale_log2 - pivot[:, None])
    keep = tl.exp2(top - pivot)
    total = total * keep + tl.sum(weights, axis=1)
    acc = tl.dot(weights.to(v.dtype), v, acc * keep[:, None], input_precision=PRECISION)
    return new_top, total, acc


@triton.jit
def finish(top, total, acc):
    """Normalised output and log-sum-exp; a query that saw nothing gets 0 and -inf."""
    safe = tl.where(total > 0, total, 1.0)
    return acc / safe[:, None], (top + tl.log2(safe)) * LN_2


@triton.jit
def store_rows(out, lse, row, valid, value, value_lse, D: tl.constexpr, BLOCK_D: tl.constexpr):
    """Write value [M, BLOCK_D] and value_lse [M] to rows `row` of out [*, D] and lse [*] where valid."""
    column = tl.arange(0, BLOCK_D)[None, :]
    tl.store(out + row[:, None] * D + column, value.to(out.dtype.element_ty), mask=valid[:, None] & (column < D))
    tl.store(lse + row, value_lse, mask=valid)


@triton.jit
def _combine_kernel(partial, partial_lse, out, lse, n_splits, D: tl.constexpr, COLUMNS: tl.constexpr, SPLITS: tl.constexpr,
                    PDL: tl.constexpr):
    """COLUMNS of a row of out [*, D] and lse [*] from its splits: partial [*, n_splits, D] and partial_lse [*, n_splits].

    One warp. A lane takes chunks of four columns, of every so many splits, and needs their weights alone: so there is no layout
    conversion, which would take shared memory, and 32 bytes of it delay the kernels around this one by up to 5 us. Triton's
    coalescing pass orders a layout by contiguity, and breaks ties differently in every version. So the hints below claim a
    contiguity of two in chunks and one in splits, true or not. Alignment to 1 keeps it from vectorising two.
    """
    row = tl.program_id(0).to(tl.int64)
    chunk = tl.program_id(1) * (COLUMNS // 4) + tl.arange(0, COLUMNS // 4)
    column = 4 * chunk[:, None] + tl.arange(0, 4)[None, :]
    pdl_wait(PDL)
    top = tl.full([COLUMNS // 4], float("-inf"), tl.float32)  # the same in every chunk, as is total
    total = tl.zeros([COLUMNS // 4], tl.float32)
    acc = tl.zeros([COLUMNS // 4, 4], tl.float32)
    for first in range(0, n_splits, SPLITS):
        split = first + tl.arange(0, SPLITS)[None, :] + (chunk[:, None] >> 31)  # [COLUMNS / 4, SPLITS]; the shift gives 0
        at = tl.multiple_of(tl.max_contiguous(row * n_splits + split, [2, 1]), [1, 1])
        part_lse = tl.load(partial_lse + at, mask=split < n_splits, other=float("-inf")) * LOG2_E
        part = tl.load(partial + tl.max_contiguous(at[:, :, None] * D + column[:, None, :], [2, 1, 4]),
                       mask=(split < n_splits)[:, :, None] & (column < D)[:, None, :], other=0.0)
        new_top = tl.maximum(top, tl.max(part_lse, axis=1))
        pivot = tl.where(new_top == float("-inf"), 0.0, new_top)
        keep = tl.exp2(top - pivot)
        weights = tl.exp2(part_lse - pivot[:, None])
        total = total * keep + tl.sum(weights, axis=1)
        acc = acc * keep[:, None] + tl.sum(weights[:, :, None] * part, axis=1)
        top = new_top
    safe = tl.where(total > 0, total, 1.0)
    lane = tl.arange(0, 128 // COLUMNS)[None, :, None]  # the lanes that hold the same sums; the first stores them
    value = (acc / safe[:, None])[:, None, :] + tl.zeros_like(lane)
    column = column[:, None, :] + 0 * lane
    out += tl.max_contiguous(row * D + column, [2, 1, 4])
    tl.store(out, value.to(out.dtype.element_ty), mask=(column < D) & (lane == 0))
    tl.store(lse + row + 0 * chunk, (top + tl.log2(safe)) * LN_2, mask=chunk == 0)


def partials(out: Tensor, lse: Tensor, n_splits: int) -> tuple[Tensor, Tensor]:
    """Where the splits of out [..., D] and lse [...] go: float32 [..., n_splits, D] and [..., n_splits]; one split: there."""
    if n_splits == 1:
        return out, lse
    return (torch.empty((*lse.shape, n_splits, out.shape[-1]), dtype=torch.float32, device=out.device),
            torch.empty((*lse.shape, n_splits), dtype=torch.float32, device=out.device))


def combine(partial: Tensor, partial_lse: Tensor, out: Tensor, lse: Tensor, n_splits: int) -> None:
    """Merge what `partials` gave, once filled, into out [..., D] and lse [...]."""
    if n_splits == 1:
        return
    rows, D = lse.numel(), out.shape[-1]
    # at most 32 values a lane, but no fewer than 16 columns (64 bytes), which with 128 splits makes 64
    splits = min(triton.next_power_of_2(n_splits), 128)
    columns = min(max(1024 // splits, 16), triton.next_power_of_2(D), 128)
    _combine_kernel[(rows, triton.cdiv(D, columns))](partial, partial_lse, out, lse, n_splits, D=D, COLUMNS=columns,
                                                     SPLITS=splits, num_warps=1, **pdl_options(out.device))


def launch_splits(kernel: triton.JITFunction, q: Tensor, k_cache: Tensor, v_cache: Tensor, indices: Tensor, scale: float,
                  n_splits: int, per_split: int, **options: object) -> tuple[Tensor, Tensor]:
    """A kernel of sparse attention over n_splits splits of per_split tokens or tiles, and their results combined."""
    B, Hq, D = q.shape
    HEADS, K = indices.shape[1:]
    out = torch.empty((B, Hq, D), dtype=q.dtype, device=q.device)
    lse = torch.empty((B, Hq), dtype=torch.float32, device=q.device)
    partial, partial_lse = partials(out, lse, n_splits)
    kernel[(n_splits, B * HEADS)](
        checked_rows(q), checked_rows(k_cache), checked_rows(v_cache), indices.contiguous(), partial, partial_lse,
        scale * LOG2_E.value, K, n_splits, per_split, *q.stride()[:2], *k_cache.stride()[:3], *v_cache.stride()[:3],
        HEADS=HEADS, HEADS_PER_KV=HEADS // k_cache.shape[1], G=Hq // HEADS, D=D, **pdl_options(q.device), **options)
    combine(partial, partial_lse, out, lse, n_splits)
    return out, lse


def block_d(D: int) -> int:
    """Channels of a tile: tensor cores take no fewer than 16."""
    return max(16, triton.next_power_of_2(D))


def dot_precision(q: Tensor) -> str:
    """float32 is multiplied as float32; TF32 would lose 13 bits of the mantissa."""
    return "ieee" if q.dtype == torch.float32 else "tf32"
