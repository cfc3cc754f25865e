"""Latency, measured: attention per layer, whole decode steps, prefill; every number beside its peers and its byte floor.

    python bench.py attention --json results/attention.json
    python bench.py decode --model llama-3.1-8b --batch 1 8 --context 32768 131072 --json results/decode.json
    python bench.py plot results/attention.json results/decode.json

Times are medians of CUDA-graph replays. Inputs rotate over as many copies as it takes to read past the L2 cache, as the
layers of a model do. The floor is the bytes that must be read over the copy bandwidth that the same run measures.
"""
import argparse
import json
import shlex
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from checkpoint import PRESETS, load_model, random_model
from common import UserError, atomic_path, environment, run_command
from generate import Decoder, Sampling, load_encoders, prefill, read_text, sparse_settings
from hash_attention import Fingerprint, HashConfig, append_to_cache, dense_attention, random_encoders
from model import SparseSettings

MODES = {
    "default": HashConfig(),
    "paper": HashConfig(query_bits=1, depth=3, share="query"),  # HashAttention
    "hata": HashConfig(bits=128, query_bits=1),  # HATA
}
# batch, context, sparsity
ATTENTION_CASES = [(1, 32768, 16), (1, 131072, 32), (8, 32768, 32), (1, 524288, 32), (16, 131072, 32)]
SINK, RECENT = 64, 128
ROTATE_BYTES = 256 * 2 ** 20  # a few times the L2 cache


def time_graph(step: Callable[[int], object], count: int, replays: int = 20) -> float:
    """Microseconds of step(i), i = 0 .. count - 1 in one CUDA graph: median over replays, divided by count."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for i in range(min(count, 2)):
            step(i)
    torch.cuda.current_stream().wait_stream(side)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for i in range(count):
            step(i)
    times = []
    for _ in range(replays + 3):
        begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        begin.record()
        graph.replay()
        end.record()
        torch.cuda.synchronize()
        times.append(1000 * begin.elapsed_time(end) / count)
    return statistics.median(times[3:])


def copy_bandwidth() -> float:
    """Bytes read and written per microsecond by a large device-to-device copy."""
    source = torch.empty(2 ** 31, dtype=torch.uint8, device="cuda").random_()
    target = torch.empty_like(source)
    return 2 * source.nbytes / time_graph(lambda i: target.copy_(source), 4)


# ------------------------------------------------------------------------------------------------------------- attention

def dense_peers(q: Tensor, caches: list[tuple[Tensor, Tensor]], seq_lens: Tensor) -> dict[str, Callable[[int], object]]:
    """Dense decode attention by every way that PyTorch and this project have. q [B, Hq, D]; what cannot run is left out."""
    B, Hq, D = q.shape
    Hkv = caches[0][0].shape[1]
    grouped = q.view(B, Hkv, Hq // Hkv, D)  # the query heads of a group as rows: the same sums without causality
    single = q[:, :, None]

    def sdpa(backend: SDPBackend, query: Tensor, gqa: bool) -> Callable[[int], object]:
        def step(i: int) -> Tensor:
            with sdpa_kernel(backend):
                return F.scaled_dot_product_attention(query, *caches[i], enable_gqa=gqa)
        return step

    def classic(i: int) -> Tensor:
        """The first gpt-fast: K and V repeated for every query head, a boolean mask over the whole cache."""
        k, v = (cache.repeat_interleave(Hq // Hkv, dim=1) for cache in caches[i])
        return F.scaled_dot_product_attention(single, k, v, attn_mask=mask)

    mask = (torch.arange(caches[0][0].shape[2], device=q.device) < seq_lens[:, None])[:, None, None]
    from torch.nn.attention.flex_attention import flex_attention
    flex = torch.compile(flex_attention, dynamic=False)
    return {
        "flash": sdpa(SDPBackend.FLASH_ATTENTION, single, True),
        "flash_grouped": sdpa(SDPBackend.FLASH_ATTENTION, grouped, False),
        "cudnn": sdpa(SDPBackend.CUDNN_ATTENTION, single, True),
        "cudnn_grouped": sdpa(SDPBackend.CUDNN_ATTENTION, grouped, False),
        "efficient_grouped": sdpa(SDPBackend.EFFICIENT_ATTENTION, grouped, False),
        "flex": lambda i: flex(single, *caches[i], enable_gqa=True),
        "classic": classic,
        "hashfast_dense": lambda i: dense_attention(q[:, None], *caches[i], seq_lens),
    }


def topk_selection(planes: Tensor, signatures: Tensor, budget: int) -> Tensor:
    """What selection costs with PyTorch's own topk, given scores for nothing: fp16 scores [B, Hs, S] -> indices."""
    scores = signatures[..., 0].to(torch.float16)
    return scores.topk(budget, dim=-1, sorted=False).indices


def bench_attention(batch: int, context: int, sparsity: int, mode: str, heads: tuple[int, int, int], bandwidth: float,
                    dense: dict[str, float] | None) -> dict:
    """One row: every stage of hash attention for one layer, and the dense peers unless they are given."""
    import hash_kernels
    Hq, Hkv, D = heads
    config = MODES[mode]
    budget = max(64 * -(-context // sparsity // 64), SINK + RECENT + 64)
    encoder = random_encoders(config, Fingerprint(1, Hq, Hkv, D, 1e4, 1))[0].cuda()
    Hs = encoder.n_signature_head
    sparse_bytes = batch * Hs * (2 * D * 2 * budget + 4 * config.words * context)
    dense_bytes = batch * Hkv * 2 * D * 2 * context
    copies = max(1, min(16, -(-ROTATE_BYTES // sparse_bytes)))
    shape = (batch, Hkv, context, D)
    caches = [(torch.randn(shape, device="cuda", dtype=torch.bfloat16), torch.randn(shape, device="cuda", dtype=torch.bfloat16))
              for _ in range(copies)]
    signatures = [torch.randint(-2 ** 31, 2 ** 31, (batch, Hs, context, config.words), device="cuda").int() for _ in range(copies)]
    q = torch.randn(batch, Hq, D, device="cuda", dtype=torch.bfloat16)
    k = torch.randn(batch, Hkv, 1, D, device="cuda", dtype=torch.bfloat16)
    seq_lens = torch.full((batch,), context, dtype=torch.int32, device="cuda")
    planes = encoder.encode_queries(q)
    encode = torch.compile(lambda q, k: (encoder.encode_queries(q), encoder.encode_keys(k)), dynamic=False)
    select = hash_kernels.select_stages(planes, signatures[0], seq_lens, budget, SINK, RECENT, budget, encoder.shift)
    indices = [hash_kernels.select_tokens(planes, s, seq_lens, budget, SINK, RECENT, budget, encoder.shift) for s in signatures]

    def whole(i: int) -> object:
        chosen = hash_kernels.select_tokens(planes, signatures[i], seq_lens, budget, SINK, RECENT, budget, encoder.shift)
        return hash_kernels.sparse_attention(q, *caches[i], chosen, None)

    repeat = max(1, 16 // copies)  # short steps need many in one graph

    def timed(step: Callable[[int], object]) -> float:
        return time_graph(lambda i: step(i % copies), copies * repeat)

    row = {
        "batch": batch, "context": context, "sparsity": sparsity, "n_head": Hq, "n_kv_head": Hkv, "head_dim": D, "mode": mode,
        "encode_us": timed(lambda i: encode(q, k)),
        "append_us": timed(lambda i: append_to_cache(k, k, encoder_signature, *caches[i], signatures[i], seq_lens)),
        "score_us": timed(lambda i: select.score(signatures[i])),
        "select_us": timed(lambda i: select.compact()),
        "attend_us": timed(lambda i: hash_kernels.sparse_attention(q, *caches[i], indices[i], None)),
        "total_us": timed(whole),
        "topk_us": timed(lambda i: topk_selection(planes, signatures[i], budget)),
        "floor_us": sparse_bytes / bandwidth, "floor_dense_us": dense_bytes / bandwidth, "copy_gb_s": bandwidth / 1000,
    }
    return row | (dense or time_dense(q, caches, seq_lens))
