"""Sparse attention in registers, by inline PTX: the form that models decode with, of 16-bit caches, D 64 or 128, G up to 8.

A warp is a split of its own. It loads the rows of 16 tokens straight into the mma operands: no shared memory, no barrier, and a
kernel without shared memory starts beside one that is still running.
"""
import torch
import triton
import triton.language as tl
from torch import Tensor

from hashfast.kernels.launch import balanced_splits, pdl_wait
from hashfast.kernels.split_kv import LN_2, launch_splits


def register_splits(rows: int, K: int) -> int:
    """At least 32 tokens a warp, and hardly more warps than are resident at once."""
    return balanced_splits(triton.cdiv(K, 32), (1024 if rows * K < 0.75 * 2 ** 19 else 1408) // rows)


def aligned(*rows: Tensor) -> bool:
    """Whether all rows begin at multiples of 16 bytes, of tensors with 2-byte elements."""
    return all(x.data_ptr() % 16 == 0 and all(stride % 8 == 0 for stride in x.stride()[:-1]) for x in rows)


# Lane 4 g + t of a warp holds, of 16 tokens, keys g and g + 8 and values 2 t, 2 t + 1, 2 t + 8 and 2 t + 9, in chunks of 16
# bytes: t, t + 4, t + 8, .. of a key, g, g + 8, .. of a value. Those are its fragments of mma.m16n8k16 in
#     S^T [tokens, queries] = K Q^T      with channels permuted, the same way in K and Q
#     O^T [channels, queries] += V^T P^T
# except that a register of V has two channels of one token instead of one channel of two tokens: one `prmt` a register swaps
# them. P goes from the accumulators of the first product to the B operand of the second by `movmatrix`.
#
# To Triton all tensors are [32], one element a lane. What depends on the lane comes out of assembly, so no layout is assumed.

@triton.constexpr_function
def _constraints(results, kind, arguments):
    """Constraints of `results` registers of `kind`, updated in place, then of the arguments, a letter each."""
    return ",".join([f"=&{kind}"] * results + [str(i) for i in range(results)] + list(arguments))


@triton.constexpr_function
def _types(count, dtype):
    """Result types of an assembly."""
    return (dtype,) * count


@triton.constexpr_function
def _mma(TYPE):
    """[16, 8] += [16, 16] [16, 8]. TYPE: bf16 or f16."""
    return f"mma.sync.aligned.m16n8k16.row.col.f32.{TYPE}.{TYPE}.f32"


@triton.constexpr_function
def _load_code(rows, words, step):
    """$0..: `words` registers a row, chunks of four, `step` bytes apart; they stay as they are where the position is below 0.

    Then the positions, the address of the lane's first chunk in row 0, and the bytes from row to row.
    """
    position = 2 * rows * words
    address, stride = position + rows, position + rows + 1
    lines = [".reg .b64 at; .reg .pred ok;"]
    for row in range(rows):
        lines += [f"setp.ge.s32 ok, ${position + row}, 0; mad.wide.s32 at, ${position + row}, ${stride}, ${address};"]
        for chunk in range(words // 4):
            registers = ", ".join(f"${row * words + 4 * chunk + i}" for i in range(4))
            # no_allocate: each row is read once, so L1 is left to the GEMVs
            lines += [f"@ok ld.global.L1::no_allocate.v4.b32 {{{registers}}}, [at + {step * chunk}];"]
    return "{ " + " ".join(lines) + " }"


@triton.jit
def _load(registers, positions, address, stride, WORDS: tl.constexpr, STEP: tl.constexpr):
    """registers, len(positions) x WORDS, with the rows loaded into them. address [32], stride: bytes.

    An unused slot (-1) costs no memory traffic. It leaves zeros or a token that is attended anyway, which meet weights of 0.
    """
    rows: tl.constexpr = len(positions)
    return tl.inline_asm_elementwise(_load_code(rows, WORDS, STEP), _constraints(rows * WORDS, "r", "r" * rows + "lr"),
                                     registers + positions + (address, stride), dtype=_types(rows * WORDS, tl.int32),
                                     is_pure=False, pack=1)


@triton.constexpr_function
def _scores_code(words, TYPE):
    """$0-3: of token g with queries 2 t and 2 t + 1, of token g + 8 with them. Keys $4 [2, words], then queries [words]."""
    low, high, query = 4, 4 + words, 4 + 2 * words
    lines = [".reg .f32 s<4>; " + " ".join(f"mov.f32 s{i}, 0f00000000;" for i in range(4))]
    for i in range(0, words, 2):
        tokens = f"${low + i}, ${high + i}, ${low + i + 1}, ${high + i + 1}"
        lines += [f"{_mma(TYPE)} {{s0, s1, s2, s3}}, {{{tokens}}}, {{${query + i}, ${query + i + 1}}}, {{s0, s1, s2, s3}};"]
    lines += [f"mov.f32 ${i}, s{i};" for i in range(4)]
    return "{ " + " ".join(lines) + " }"


@triton.constexpr_function
def _values_code(words, TYPE):
    """acc $0 [words, 4]: of each pair of channels first one, then the other, with two queries. Kept at a factor for each query,
    and added to: weights [2 x 2 tokens and queries, as scores are], values [4, words]."""
    keep = 2 * 4 * words
    weight, value = keep + 2, keep + 6
    lines = [".reg .b32 a<4>, b<2>, pair;"]
    lines += [f"cvt.rn.{TYPE}x2.f32 pair, ${weight + 2 * i + 1}, ${weight + 2 * i}; "
              f"movmatrix.sync.aligned.m8n8.trans.b16 b{i}, pair;" for i in range(2)]
    lines += [f"mul.f32 ${i}, ${i}, ${keep + i % 2};" for i in range(4 * words)]
    for word in range(words):
        tokens = [f"${value + words * i + word}" for i in range(4)]
        lines += [f"prmt.b32 a{2 * i}, {tokens[2 * i]}, {tokens[2 * i + 1]}, 0x5410; "
                  f"prmt.b32 a{2 * i + 1}, {tokens[2 * i]}, {tokens[2 * i + 1]}, 0x7632;" for i in range(2)]
        sums = ", ".join(f"${4 * word + i}" for i in range(4))
        lines += [f"{_mma(TYPE)} {{{sums}}}, {{a0, a1, a2, a3}}, {{b0, b1}}, {{{sums}}};"]
    return "{ " + " ".join(lines) + " }"


@triton.constexpr_function
def _across_code(operation):
    """$0: of $1 of the lanes with the same t."""
    lines = [".reg .f32 other; mov.f32 $0, $1;"]
    lines += [f"shfl.sync.bfly.b32 other, $0, {lane}, 31, 0xffffffff; {operation}.f32 $0, $0, other;" for lane in (4, 8, 16)]
    return "{ " + " ".join(lines) + " }"


@triton.jit
def _across(x, OPERATION: tl.constexpr):
    """max or add of the 8 lanes that have the same queries, and other tokens."""
    return tl.inline_asm_elementwise(_across_code(OPERATION), "=&f,f", [x], dtype=tl.float32, is_pure=True, pack=1)


@triton.constexpr_function
def _store_code(words):
    """$1: where the lane's first chunk goes, $2: whether, $3..: its channels, float32, 8 a chunk. $0, of no use: 0."""
    lines = [".reg .pred ok; setp.ne.s32 ok, $2, 0; mov.b32 $0, 0;"]
    for i in range(0, 2 * words, 4):
        numbers = ", ".join(f"${3 + i + j}" for j in range(4))
        lines += [f"@ok st.global.v4.f32 [$1 + {256 * (i // 8) + 4 * (i % 8)}], {{{numbers}}};"]
    return "{ " + " ".join(lines) + " }"


@triton.jit
def _slots(indices, first, stop, g, t):
    """The positions of 16 slots whose keys, and those whose values, the lane has; -1 from `stop` on."""
    keys, values = (), ()
    for i in tl.static_range(2):
        slot = first + g + 8 * i
        keys += (tl.load(indices + slot, mask=slot < stop, other=-1),)
        for j in tl.static_range(2):
            slot = first + 2 * t + 8 * i + j
            values += (tl.load(indices + slot, mask=slot < stop, other=-1),)
    return keys, values


@triton.jit
def _softmax(scores, low, high, top, total):
    """Of one query: weights of two tokens, valid where low and high, the factor of what was summed before, new top and total.

    scores, of both tokens, and top are in base 2. total is of the lane's own tokens alone.
    """
    first = tl.where(low, scores[0], float("-inf"))
    second = tl.where(high, scores[1], float("-inf"))
    new_top = tl.maximum(top, _across(tl.maximum(first, second), "max"))
    # while a query has seen nothing its top is -inf, and -inf - -inf would be NaN
    pivot = tl.where(new_top == float("-inf"), 0.0, new_top)
    weights = (tl.exp2(first - pivot), tl.exp2(second - pivot))
    keep = tl.exp2(top - pivot)
    return weights, keep, new_top, total * keep + weights[0] + weights[1]


@triton.jit
def _register_attention_kernel(q, k_cache, v_cache, indices, partial, partial_lse, scale_log2, K, n_splits, per_split,
                               q_b, q_h, k_b, k_h, k_s, v_b, v_h, v_s, HEADS: tl.constexpr, HEADS_PER_KV: tl.constexpr,
                               G: tl.constexpr, D: tl.constexpr, TYPE: tl.constexpr, PDL: tl.constexpr):
    """One split, per_split tokens (whole 16s), of one row of indices, by one warp -> partial [*, n_splits, D], partial_lse."""
    split = tl.program_id(0)
    row = tl.program_id(1).to(tl.int64)
    batch, head = row // HEADS, row % HEADS
    lane = tl.inline_asm_elementwise("mov.u32 $0, %laneid; // $1", "=r,r", [tl.arange(0, 32)], dtype=tl.int32, is_pure=True,
                                     pack=1)
    g, t = lane // 4, lane % 4
    KEY_WORDS: tl.constexpr = D // 8  # 4 bytes each: a quarter of a row
    VALUE_WORDS: tl.constexpr = D // 16
    indices += row * K
    q_chunk = (q + batch * q_b + head * G * q_h).to(tl.int64) + 16 * t
    k_chunk = (k_cache + batch * k_b + (head // HEADS_PER_KV) * k_h).to(tl.int64) + 16 * t
    v_chunk = (v_cache + batch * v_b + (head // HEADS_PER_KV) * v_h).to(tl.int64) + 16 * g
    first = split * per_split
    stop = tl.minimum(first + per_split, K)
    zero = lane * 0
    acc = (zero.to(tl.float32),) * (4 * VALUE_WORDS)
    top = (zero + float("-inf"),) * 2
    total = (zero.to(tl.float32),) * 2
    pdl_wait(PDL)
    k_slots, v_slots = _slots(indices, first, stop, g, t)
    queries = _load((zero,) * KEY_WORDS, (tl.where(g < G, g, -1),), q_chunk, 2 * q_h, KEY_WORDS, 64)
    keys = _load((zero,) * (2 * KEY_WORDS), k_slots, k_chunk, 2 * k_s, KEY_WORDS, 64)
    values = _load((zero,) * (4 * VALUE_WORDS), v_slots, v_chunk, 2 * v_s, VALUE_WORDS, 128)
    next_k_slots, next_v_slots = _slots(indices, first + 16, stop, g, t)
    for start in range(first, stop, 16):
        # keys and values are loaded again as soon as they have been used, from positions that were loaded one turn before
        later_k_slots, later_v_slots = _slots(indices, start + 32, stop, g, t)
        scores = tl.inline_asm_elementwise(_scores_code(KEY_WORDS, TYPE), "=f,=f,=f,=f" + ",r" * (3 * KEY_WORDS),
                                           keys + queries, dtype=_types(4, tl.float32), is_pure=False, pack=1)
        keys = _load(keys, next_k_slots, k_chunk, 2 * k_s, KEY_WORDS, 64)
        low, high = k_slots[0] >= 0, k_slots[1] >= 0
        a, keep_a, top_a, total_a = _softmax((scores[0] * scale_log2, scores[2] * scale_log2), low, high, top[0], total[0])
        b, keep_b, top_b, total_b = _softmax((scores[1] * scale_log2, scores[3] * scale_log2), low, high, top[1], total[1])
        acc = tl.inline_asm_elementwise(_values_code(VALUE_WORDS, TYPE),
                                        _constraints(4 * VALUE_WORDS, "f", "f" * 6 + "r" * (4 * VALUE_WORDS)),
                                        acc + (keep_a, keep_b, a[0], b[0], a[1], b[1]) + values,
                                        dtype=_types(4 * VALUE_WORDS, tl.float32), is_pure=False, pack=1)
        values = _load(values, next_v_slots, v_chunk, 2 * v_s, VALUE_WORDS, 128)
        top, total = (top_a, top_b), (total_a, total_b)
        k_slots, next_k_slots, next_v_slots = next_k_slots, later_k_slots, later_v_slots
    for i in tl.static_range(2):
        member = 2 * t + i
        at = (row * G + member) * n_splits + split
        summed = _across(total[i], "add")
        safe = tl.where(summed > 0, summed, 1.0)
        inverse = 1.0 / safe
        channels = ()
        for word in tl.static_range(VALUE_WORDS):
            channels += (acc[4 * word + i] * inverse, acc[4 * word + 2 + i] * inverse)
        tl.inline_asm_elementwise(_store_code(VALUE_WORDS), "=r,l,r" + ",f" * (2 * VALUE_WORDS),
                                  ((partial + at * D).to(tl.int64) + 32 * g, (member < G).to(tl.int32)) + channels,
                                  dtype=tl.int32, is_pure=False, pack=1)
        tl.store(partial_lse + at, (top[i] + tl.log2(safe)) * LN_2, mask=(member < G) & (g == 0))


def can_launch_registers(q: Tensor, k_cache: Tensor, v_cache: Tensor, indices: Tensor) -> bool:
    return (q.element_size() == 2 and q.dtype == k_cache.dtype == v_cache.dtype and q.shape[2] in (64, 128)
            and q.shape[1] // indices.shape[1] <= 8 and aligned(q, k_cache, v_cache))


def launch_registers(q: Tensor, k_cache: Tensor, v_cache: Tensor, indices: Tensor, scale: float, *,
                     n_splits: int | None = None) -> tuple[Tensor, Tensor]:
    """Arguments and results of `sparse_attention.sparse_attention`, where `can_launch_registers`."""
    B, HEADS, K = indices.shape
    if n_splits is None:
        n_splits = register_splits(B * HEADS, K)
    n_splits = max(n_splits, 2)  # so that all that is written is float32, and a second kernel rounds it
    per_split = 16 * triton.cdiv(triton.cdiv(K, 16), n_splits)
    return launch_splits(_register_attention_kernel, q, k_cache, v_cache, indices, scale, n_splits, per_split,
                         TYPE="bf16" if q.dtype == torch.bfloat16 else "f16", num_warps=1)
