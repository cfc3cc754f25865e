"""Latency of one layer's attention, by stage, beside its dense peers and byte floors, on random caches."""
import contextlib
import math
import os
import sys
from collections.abc import Callable, Iterator

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from hashfast.hash_attention import HashConfig, dense_attention, rope_encode_append, select_tokens, sparse_attention
from hashfast.model import Fingerprint
from hashfast.research.latency import RECENT, SINK, copy_bandwidth, skip_on_oom, time_graph
from hashfast.runtime.signatures import random_encoders

MODES = {
    "default": HashConfig(),
    "hashattention": HashConfig(query_bits=1, depth=3, share="query"),  # HashAttention, arXiv 2412.14468
    "hata": HashConfig(bits=128, query_bits=1),  # HATA, arXiv 2506.02572
}
DENSE = ("dense_best_us", "dense_best", "flash_us", "flex_us", "classic_us", "hashfast_dense_us", "dense_gb_s")
ROTATE_BYTES = 256 * 2 ** 20  # read by the copies of a cache in turn: a few times the L2 cache


@contextlib.contextmanager
def portable_kernels() -> Iterator[None]:
    """HASHFAST_PORTABLE=1 inside the block."""
    before = os.environ.get("HASHFAST_PORTABLE")
    os.environ["HASHFAST_PORTABLE"] = "1"
    try:
        yield
    finally:
        if before is None:
            del os.environ["HASHFAST_PORTABLE"]
        else:
            os.environ["HASHFAST_PORTABLE"] = before


def dense_peers(q: Tensor, caches: list[tuple[Tensor, Tensor]], seq_lens: Tensor) -> dict[str, Callable[[int], object]]:
    """Dense decode attention by every way at hand, for a query [B, Hq, D] on the i-th cache."""
    B, Hq, D = q.shape
    Hkv, S = caches[0][0].shape[1:3]
    single = q[:, :, None]
    grouped = q.view(B, Hkv, Hq // Hkv, D)  # the query heads of a group as rows: the same sums without any mask
    mask = (torch.arange(S, device=q.device) < seq_lens[:, None])[:, None, None]

    def sdpa(backend: SDPBackend, query: Tensor, gqa: bool) -> Callable[[int], Tensor]:
        def step(i: int) -> Tensor:
            with sdpa_kernel(backend):
                return F.scaled_dot_product_attention(query, *caches[i], enable_gqa=gqa)
        return step

    def classic(i: int) -> Tensor:
        """The first gpt-fast: K and V repeated for every query head, a boolean mask over the whole cache."""
        k, v = (cache.repeat_interleave(Hq // Hkv, dim=1) for cache in caches[i])
        return F.scaled_dot_product_attention(single, k, v, attn_mask=mask)

    from torch.nn.attention.flex_attention import create_block_mask, flex_attention
    flex = torch.compile(flex_attention, dynamic=False)
    # as gpt-fast calls it; without a mask of blocks it would not split a long context
    blocks = create_block_mask(lambda b, h, query, key: key < seq_lens[b], B, None, 1, S, device=q.device.type)
    return {
        "flash": sdpa(SDPBackend.FLASH_ATTENTION, single, True),
        "flash_grouped": sdpa(SDPBackend.FLASH_ATTENTION, grouped, False),
        "cudnn": sdpa(SDPBackend.CUDNN_ATTENTION, single, True),
        "flex": lambda i: flex(single, *caches[i], block_mask=blocks, enable_gqa=True),
        "classic": classic,
        "hashfast_dense": lambda i: dense_attention(q[:, None], *caches[i], seq_lens),
    }


def bench_attention(batch: int, context: int, sparsity: int, mode: str, heads: tuple[int, int, int], bandwidth: float,
                    with_dense: bool) -> dict:
    """One row: every stage of hash attention for one layer and, with_dense, the dense peers on the same caches.

    mode: of MODES.  heads: Hq, Hkv, D.  bandwidth: bytes per microsecond, of which the floors are made.
    """
    from hashfast.kernels.score import Selection, blocks_per_row, launch_score
    from hashfast.kernels.select import launch_compact
    Hq, Hkv, D = heads
    config = MODES[mode]
    budget = max(64 * math.ceil(context / sparsity / 64), SINK + RECENT + 64)
    sparse_bytes = batch * config.signature_heads(Hq, Hkv) * (4 * D * budget + 4 * config.words * context)
    dense_bytes = batch * Hkv * 4 * D * context
    copies = max(2, min(16, math.ceil(ROTATE_BYTES / sparse_bytes)))
    encoders = [encoder.cuda() for encoder in random_encoders(config, Fingerprint(copies, Hq, Hkv, D, 1e4, 1))]
    encoder = encoders[0]
    caches = [tuple(torch.randn(batch, Hkv, context, D, device="cuda", dtype=torch.bfloat16) for _ in "kv")
              for _ in range(copies)]
    signatures = [torch.randint(-2 ** 31, 2 ** 31, (batch, encoder.n_signature_head, context, config.words), device="cuda",
                                dtype=torch.int32) for _ in range(copies)]
    qkv = torch.randn(batch, 1, (Hq + 2 * Hkv) * D, device="cuda", dtype=torch.bfloat16)
    q = qkv[:, 0, :Hq * D].reshape(batch, Hq, D)
    cos = sin = torch.full((batch, 1, D // 2), 0.5 ** 0.5, device="cuda")
    seq_lens = torch.full((batch,), context, dtype=torch.int32, device="cuda")
    planes = encoder.encode_queries(q)
    # linear encoders have a kernel of their own; deeper ones are what Inductor makes of the reference
    encode = rope_encode_append if config.depth == 1 else torch.compile(rope_encode_append, dynamic=False)
    selection = Selection(budget, None, budget, SINK, RECENT, encoder.shift)
    n_blocks = blocks_per_row(batch * encoder.n_signature_head, context, RECENT)

    def score(i: int) -> tuple[Tensor, Tensor]:
        return launch_score(planes, signatures[i], seq_lens, selection, n_blocks)

    def select(i: int) -> Tensor:
        return select_tokens(planes, signatures[i], seq_lens, budget, SINK, RECENT, budget, encoder.shift, caches[i])

    scored = score(0)
    indices = [select(i) for i in range(copies)]
    half_scores = signatures[0][..., 0].to(torch.float16)  # for torch.topk alone: its time without scoring
    count = copies * max(1, 16 // copies)

    def timed(step: Callable[[int], object], count: int = count) -> float:
        return time_graph(lambda i: step(i % copies), count)

    def stages(prefix: str, total: str) -> dict[str, float]:
        return {f"{prefix}score_us": timed(score),
                f"{prefix}select_us": timed(lambda i: launch_compact(*scored, seq_lens, selection, n_blocks, caches[i])),
                f"{prefix}attend_us": timed(lambda i: sparse_attention(q, *caches[i], indices[i])),
                total: timed(lambda i: sparse_attention(q, *caches[i], select(i)))}

    row = {
        "batch": batch, "context": context, "sparsity": sparsity, "n_head": Hq, "n_kv_head": Hkv, "head_dim": D, "mode": mode,
        "encode_us": timed(lambda i: encode(qkv, cos, sin, encoders[i], *caches[i], signatures[i], seq_lens)),
        **stages("", "total_us"),
        "topk_us": timed(lambda i: half_scores.topk(budget, dim=-1, sorted=False)),
        "floor_us": sparse_bytes / bandwidth, "floor_dense_us": dense_bytes / bandwidth, "copy_gb_s": bandwidth / 1000,
    }
    if mode == "default":
        with portable_kernels():
            row |= stages("portable_", "portable_us")
    if with_dense:
        dense = {}
        for name, step in dense_peers(q, caches, seq_lens).items():
            try:
                dense[name] = timed(step, copies)
            except (RuntimeError, torch.OutOfMemoryError) as error:
                print(f"{batch}x{context}x{sparsity}: {name} does not run here ({str(error).splitlines()[0]})", file=sys.stderr)
        best = min((us, name) for name, us in dense.items() if name != "hashfast_dense")
        row |= {"dense_best_us": best[0], "dense_best": best[1], "flash_us": dense.get("flash"), "flex_us": dense.get("flex"),
                "classic_us": dense.get("classic"), "hashfast_dense_us": dense["hashfast_dense"],
                "dense_gb_s": dense_bytes / best[0] / 1000}
    return row


def attention_rows(cases: list[tuple[int, int, int]], modes: list[str], heads: tuple[int, int, int]) -> Iterator[dict]:
    """Rows of bench_attention for each (batch, context, sparsity) and mode. The dense peers are measured once per case, in its
    first row that fits."""
    bandwidth = copy_bandwidth()
    for case in cases:
        dense: dict = {}
        for mode in modes:
            with skip_on_oom(f"{'x'.join(map(str, case))} {mode}"):
                row = bench_attention(*case, mode, heads, bandwidth, not dense)
                dense = dense or {name: row[name] for name in DENSE if name in row}
                yield row | dense
            torch.cuda.empty_cache()
