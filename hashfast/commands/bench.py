"""Latency, measured: attention of one layer, decode steps, prefill, ragged batches; beside their peers and byte floors.

    python -m hashfast bench attention --json results/attention_h200.json
    python -m hashfast bench decode --model llama-3.1-8b --shapes 1x32768 8x32768 --json results/decode_h200.json
    torchrun --nproc_per_node 2 -m hashfast bench decode ...      each rank's share of the model on a GPU of its own
    python -m hashfast bench speculate --model llama-3.1-8b --shapes 1x131072 --k 2 4 8 --json results/speculate_h200.json
    python -m hashfast bench prefill --context 32768 131072 --json results/prefill_h200.json
    python -m hashfast bench latency --json results/latency_h200.json
    python -m hashfast bench ragged --json results/ragged_h200.json
    python -m hashfast bench plot results/attention_h200.json results/decode_h200.json
    python -m hashfast bench report --results my-results      results/README.md's tables of your own numbers

Attention times are medians of CUDA-graph replays over as many copies of the cache as it takes to read past the L2 cache, as
the layers of a model do. A floor is the bytes that must be read over the copy bandwidth measured in the same run.
"""
import argparse
import math
import os
import re
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from hashfast.common import ROOT, Parser, UserError, check_writable, environment
from hashfast.hash_attention import HashConfig, dense_attention, rope_encode_append, select_tokens, sparse_attention
from hashfast.model import Fingerprint
from hashfast.research.latency import (
    RECENT,
    SINK,
    copy_bandwidth,
    decode_rows,
    latency_rows,
    prefill_rows,
    ragged_rows,
    skip_on_oom,
    speculate_rows,
    time_graph,
)
from hashfast.research.parity import compare
from hashfast.research.plots import plot
from hashfast.research.report import print_table, report, save_results
from hashfast.runtime import distributed
from hashfast.runtime.checkpoint import PRESETS
from hashfast.runtime.decode import PREFILL_CHUNK
from hashfast.runtime.signatures import random_encoders

MODES = {
    "default": HashConfig(),
    "hashattention": HashConfig(query_bits=1, depth=3, share="query"),  # HashAttention, arXiv 2412.14468
    "hata": HashConfig(bits=128, query_bits=1),  # HATA, arXiv 2506.02572
}
CASES = ["1x32768x16", "1x131072x32", "8x32768x32", "1x524288x32", "16x131072x32"]
DENSE = ("dense_best_us", "dense_best", "flash_us", "flex_us", "classic_us", "hashfast_dense_us", "dense_gb_s")
ROTATE_BYTES = 256 * 2 ** 20  # a few times the L2 cache


# ------------------------------------------------------------------------------------------------------------- attention

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


def bench_attention(case: str, mode: str, heads: tuple[int, int, int], bandwidth: float, with_dense: bool) -> dict:
    """One row: every stage of hash attention for one layer and, with_dense, the dense peers on the same caches."""
    from hashfast.kernels.score import Selection, blocks_per_row, launch_score
    from hashfast.kernels.select import launch_compact
    batch, context, sparsity = map(int, case.split("x"))
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
    half_scores = signatures[0][..., 0].to(torch.float16)  # for torch.topk alone, its scores given for nothing
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
        os.environ["HASHFAST_PORTABLE"] = "1"
        row |= stages("portable_", "portable_us")
        del os.environ["HASHFAST_PORTABLE"]
    if with_dense:
        dense = {}
        for name, step in dense_peers(q, caches, seq_lens).items():
            try:
                dense[name] = timed(step, copies)
            except (RuntimeError, torch.OutOfMemoryError) as error:
                print(f"{case}: {name} does not run here ({str(error).splitlines()[0]})", file=sys.stderr)
        best = min((us, name) for name, us in dense.items() if name != "hashfast_dense")
        row |= {"dense_best_us": best[0], "dense_best": best[1], "flash_us": dense.get("flash"), "flex_us": dense.get("flex"),
                "classic_us": dense.get("classic"), "hashfast_dense_us": dense["hashfast_dense"],
                "dense_gb_s": dense_bytes / best[0] / 1000}
    return row


def attention(options: argparse.Namespace) -> Iterator[dict]:
    bandwidth = copy_bandwidth()
    for case in options.cases:
        dense: dict = {}  # of the case's first mode, for the rows of all
        for mode in options.modes:
            with skip_on_oom(f"{case} {mode}"):
                row = bench_attention(case, mode, tuple(options.heads), bandwidth, not dense)
                dense = dense or {name: row[name] for name in DENSE if name in row}
                yield row | dense
            torch.cuda.empty_cache()


# --------------------------------------------------------------------------------------------------------------- command

def sizes(names: str) -> Callable[[str], str]:
    """An argparse type: integers from 1 on joined by x, one for each of `names`, which are joined by " x "."""
    pattern = "x".join(r"[1-9]\d*" for _ in names.split(" x "))

    def check(text: str) -> str:
        if re.fullmatch(pattern, text) is None:
            raise argparse.ArgumentTypeError(f"{text!r} is not {names}, integers joined by x")
        return text
    return check


def at_least_1(number: type) -> Callable[[str], float]:
    """An argparse type: an int or a float (`number`) from 1 on."""
    def check(text: str) -> float:
        value = number(text)
        if not 1 <= value < 1e9:
            raise argparse.ArgumentTypeError(f"{text} is out of range; it must be at least 1")
        return value
    check.__name__ = number.__name__  # argparse names it where `number` cannot read the text
    return check


def parse_options() -> argparse.Namespace:
    rows, model, steps = (Parser(add_help=False) for _ in range(3))
    rows.add_argument("--json", type=Path, help="write the rows here, as they come")
    model.add_argument("--model", default="llama-3.1-8b", choices=PRESETS, help="preset, random weights")
    model.add_argument("--sparsity", type=at_least_1(float), default=32)
    steps.add_argument("--steps", type=at_least_1(int), default=50, help="tokens decoded")
    shapes = {"nargs": "+", "type": sizes("batch x context"), "help": "batch x context"}
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    part = commands.add_parser("attention", parents=[rows], help="one layer's attention, by stage")
    part.add_argument("--cases", nargs="+", type=sizes("batch x context x sparsity"), default=CASES,
                      help="batch x context x sparsity")
    part.add_argument("--modes", nargs="+", choices=MODES, default=list(MODES))
    part.add_argument("--heads", nargs=3, type=at_least_1(int), default=(32, 8, 128), metavar=("HQ", "HKV", "D"))
    part = commands.add_parser("decode", parents=[model, steps, rows], help="whole decode steps")
    part.add_argument("--checkpoint_path", type=Path, help="a model of real weights instead")
    part.add_argument("--shapes", default=["1x32768", "1x131072", "8x32768", "4x131072", "16x32768"], **shapes)
    part.add_argument("--attention", nargs="+", choices=("dense", "hash"), default=["dense", "hash"])
    part.add_argument("--quantize", choices=("int8", "int4"), help="weights of this many bits (int4: groups of 32)")
    part.add_argument("--no_warm_start", dest="warm_start", action="store_false",
                      help="do not start the first shape again in a second process")
    part.add_argument("--nccl", action="store_true", help="between ranks: all-reduces by NCCL, to compare with")
    part = commands.add_parser("speculate", parents=[model, rows], help="rounds of self-speculative decoding")
    part.add_argument("--shapes", default=["1x131072", "4x131072"], **shapes)
    part.add_argument("--k", nargs="+", type=at_least_1(int), default=[2, 4, 6, 8], help="drafted tokens per round")
    part.add_argument("--steps", type=at_least_1(int), default=20, help="rounds")
    for name, about in (("prefill", "reading a prompt"), ("latency", "time to the first token and per token")):
        part = commands.add_parser(name, parents=[model, steps, rows], help=about)
        part.add_argument("--context", nargs="+", type=at_least_1(int), default=[8192, 32768, 131072, 524288])
        part.add_argument("--chunk", type=at_least_1(int), default=PREFILL_CHUNK["cuda"], help="prompt tokens read at a time")
    part = commands.add_parser("ragged", parents=[model, steps, rows],
                               help="prompts of different lengths decoded together, and one by one")
    part.add_argument("--lengths", nargs="+", type=at_least_1(int),
                      default=[1024, 2048, 4096, 8192, 12288, 16384, 24576, 32768])
    part = commands.add_parser("plot", help="PNGs from results files")
    part.add_argument("files", nargs="+", type=Path)
    part = commands.add_parser("parity", help="one results file of what each feature takes, from others")
    part.add_argument("files", nargs="+", type=Path, help="of bench decode --json and generate --save")
    part.add_argument("--json", type=Path, required=True)
    part = commands.add_parser("report", help="tables in Markdown from results files")
    part.add_argument("--results", type=Path, default=ROOT / "results", help="the folder (default: results)")
    part.add_argument("--write", type=Path, nargs="+", metavar="FILE",
                      help="put them between the markers of these files; default: print")
    options = parser.parse_args()
    check_writable("--json", getattr(options, "json", None))
    if options.command == "decode" and options.quantize and options.checkpoint_path:
        raise UserError("--quantize is of random weights; give --checkpoint_path a folder that `hashfast quantize` made")
    return options


def measure(options: argparse.Namespace) -> Iterator[dict]:
    """The rows of the subcommand."""
    if options.command == "attention":
        return attention(options)
    if options.command == "prefill":
        return prefill_rows(options.model, options.context, options.sparsity, options.chunk)
    if options.command == "latency":
        return latency_rows(options.model, options.context, options.sparsity, options.steps, options.chunk)
    if options.command == "ragged":
        return ragged_rows(options.model, options.lengths, options.sparsity, options.steps)
    shapes = [tuple(map(int, shape.split("x"))) for shape in options.shapes]
    if options.command == "speculate":
        return speculate_rows(options.model, shapes, options.k, options.sparsity, options.steps)
    return decode_rows(options.model, shapes, options.attention, options.sparsity, options.steps, options.quantize,
                       options.checkpoint_path, options.warm_start, options.nccl)


def main() -> None:
    options = parse_options()
    if options.command == "plot":
        plot(options.files)
        return
    if options.command == "parity":
        compare(options.files, options.json)
        return
    if options.command == "report":
        report(options.results, options.write)
        return
    if not torch.cuda.is_available():
        raise UserError("bench measures a GPU and this machine has none; run it where torch.cuda.is_available()")
    if distributed.world_size() > 1 and options.command != "decode":
        raise UserError(f"bench {options.command} measures one GPU; start it without torchrun")
    distributed.check_device("cuda")
    rows, about = [], environment()  # before a results file that git knows is written over
    for row in measure(options):
        rows.append(row)
        print_table([row], header=len(rows) == 1)
        if options.json is not None and distributed.rank() == 0:  # as they come, for a run that ends early
            ranks = distributed.world_size()
            save_results(options.json, about, rows, *(["torchrun", "--nproc_per_node", str(ranks)] if ranks > 1 else []))
    if not rows:
        raise UserError(f"nothing of bench {options.command} fits into this GPU's memory; give smaller shapes")

