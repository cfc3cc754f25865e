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
import contextlib
import json
import math
import os
import re
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from hashfast.common import ROOT, Parser, UserError, atomic_path, check_writable, command_line, environment
from hashfast.hash_attention import (
    HashConfig,
    HashEncoder,
    dense_attention,
    rope_encode_append,
    select_tokens,
    sparse_attention,
)
from hashfast.model import Fingerprint, SparseSettings, Transformer
from hashfast.ops.quant_linear import Quantization
from hashfast.research.report import compare, plot, print_table, report
from hashfast.runtime import distributed, tensor_parallel
from hashfast.runtime.checkpoint import PRESETS, load_model, load_quantization, random_model
from hashfast.runtime.decode import PREFILL_CHUNK, Decoder, prefill, prepare_prefill
from hashfast.runtime.memory import bytes_per_step, cache_bytes_per_token, prefill_bytes, weight_bytes
from hashfast.runtime.sampling import Sampling
from hashfast.runtime.signatures import random_encoders
from hashfast.runtime.speculate import Speculator

MODES = {
    "default": HashConfig(),
    "hashattention": HashConfig(query_bits=1, depth=3, share="query"),  # HashAttention, arXiv 2412.14468
    "hata": HashConfig(bits=128, query_bits=1),  # HATA, arXiv 2506.02572
}
CASES = ["1x32768x16", "1x131072x32", "8x32768x32", "1x524288x32", "16x131072x32"]
DENSE = ("dense_best_us", "dense_best", "flash_us", "flex_us", "classic_us", "hashfast_dense_us", "dense_gb_s")
SINK, RECENT = 64, 128
ROTATE_BYTES = 256 * 2 ** 20  # a few times the L2 cache


def time_graph(step: Callable[[int], object], count: int, replays: int = 20) -> float:
    """Microseconds of step(i): `count` of them in one CUDA graph, the median over replays."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        step(0)
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for i in range(count):
            step(i)
    return 1000 * median_ms(graph.replay, replays) / count


def median_ms(run: Callable[[], object], repeats: int) -> float:
    """Milliseconds of `run` on the GPU, the median after three warm-ups."""
    times = []
    for _ in range(repeats + 3):
        begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        begin.record()
        run()
        end.record()
        torch.cuda.synchronize()
        times.append(begin.elapsed_time(end))
    return statistics.median(times[3:])


def copy_bandwidth() -> float:
    """Bytes read and written per microsecond by a large device-to-device copy."""
    source = torch.randint(0, 255, (2 ** 31,), dtype=torch.uint8, device="cuda")
    target = torch.empty_like(source)
    return 2 * source.nbytes / median_ms(lambda: target.copy_(source), 20) / 1000


@contextlib.contextmanager
def skip_on_oom(what: str) -> Iterator[None]:
    """What does not fit into the memory of this GPU is left out with a line."""
    try:
        yield
    except torch.OutOfMemoryError:
        if distributed.world_size() > 1:
            raise  # another rank may have had enough, and be in the middle of a step
        print(f"{what}: does not fit", file=sys.stderr)


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


# ---------------------------------------------------------------------------------------------------------------- decode

def fill_caches(model: Transformer) -> None:
    """Random keys, values and signatures, as if a prompt had been read."""
    for layer in model.layers:
        for buffer in layer.attention.cache.rows():
            if buffer.dtype == torch.int32:
                buffer.random_(-2 ** 31, 2 ** 31)
            else:
                buffer.normal_()


def hashed(model: Transformer, context: int, sparsity: float) -> tuple[list[HashEncoder], SparseSettings]:
    """Random encoders, and a budget of 1 / sparsity of `context` tokens."""
    budget = max(64 * math.ceil(context / sparsity / 64), SINK + RECENT + 64)
    encoders = tensor_parallel.shard_encoders(random_encoders(HashConfig(), model.fingerprint()))
    return encoders, SparseSettings(budget, SINK, RECENT)


def release(model: Transformer) -> None:
    """Give the memory of the caches back, and of what was compiled for them."""
    model.setup_caches(1, 1)
    torch._dynamo.reset()
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()


@torch.inference_mode()
def bench_decode(model: Transformer, name: str, batch: int, context: int, mode: str, sparsity: float, bandwidth: float,
                 steps: int) -> dict:
    """One row: the median time of a captured decode step at `context` tokens."""
    encoders, settings = hashed(model, context, sparsity) if mode == "hash" else (None, None)
    release(model)
    model.setup_caches(batch, context + steps + 8, encoders, settings)
    decoder = Decoder(model, batch, Sampling(temperature=0), compiled=True)
    compile_s = decoder.prepare()
    fill_caches(model)
    decoder.start(torch.zeros_like(decoder.token[:, 0]), context)
    ms, read = median_ms(decoder.step, steps), bytes_per_step(model, settings, context, batch)
    return {"model": name, "ranks": model.args.ranks, "batch": batch, "context": context, "attention": mode,
            "sparsity": sparsity if mode == "hash" else 1, "ms_per_step": ms, "tok_s": 1000 * batch / ms,
            "floor_ms": read / bandwidth / 1000, "gb_s": read / ms / 1e6,
            "compile_s": compile_s, "peak_gib": torch.cuda.max_memory_allocated() / 2 ** 30, "copy_gb_s": bandwidth / 1000}


def decode(options: argparse.Namespace) -> Iterator[dict]:
    """Rows of bench_decode. compile_s of the first is a cold start where Inductor's cache is empty; the others find parts."""
    name, quantization = options.model, Quantization(options.quantize) if options.quantize else None
    if options.checkpoint_path is not None:
        if options.quantize:
            raise UserError("--quantize is of random weights; give --checkpoint_path a folder that quantize.py made")
        name, model = options.checkpoint_path.resolve().name, load_model(options.checkpoint_path, "cuda", torch.bfloat16)
        quantization = load_quantization(options.checkpoint_path)
    else:
        model = random_model(options.model, "cuda", torch.bfloat16, quantization=quantization)
    bandwidth = copy_bandwidth()
    if distributed.world_size() > 1 and not options.nccl:
        batch = max(int(shape.split("x")[0]) for shape in options.shapes)
        distributed.use_one_shot(batch * model.args.dim, torch.bfloat16)
    for shape in options.shapes:
        batch, context = map(int, shape.split("x"))
        for mode in options.attention:
            with skip_on_oom(f"{batch} x {context} {mode}"):
                row = bench_decode(model, name, batch, context, mode, options.sparsity, bandwidth, options.steps)
                row |= {"weights": quantization.mode if quantization is not None else "bfloat16", "warm_start_s": None}
                if options.warm_start and distributed.world_size() == 1 and shape == options.shapes[0]:
                    release(model)  # the second process needs room
                    row["warm_start_s"] = warm_start(options, shape, mode)
                yield row


def warm_start(options: argparse.Namespace, shape: str, mode: str) -> float | None:
    """Compile and capture seconds of a second process, which finds the first one's caches on disk; None where it fails."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "rows.json"
        subprocess.run([sys.executable, "-m", "hashfast", "bench", "decode", "--model", options.model, "--shapes", shape,
                        "--attention", mode, "--sparsity", str(options.sparsity), "--steps", "8", "--no_warm_start",
                        "--json", str(path),
                        *(["--quantize", options.quantize] if options.quantize else []),
                        *(["--checkpoint_path", str(options.checkpoint_path)] if options.checkpoint_path else [])],
                       capture_output=True, check=False, env=os.environ | {"PYTHONPATH": str(ROOT)})
        return json.loads(path.read_text())["rows"][0]["compile_s"] if path.is_file() else None


# ------------------------------------------------------------------------------------------------------------- speculate

@torch.inference_mode()
def bench_round(model: Transformer, name: str, batch: int, context: int, k: int, sparsity: float, steps: int) -> dict:
    """One row: the times of a self-speculative round's parts at `context` tokens, and of the dense step it stands in for.

    draft_ms: of one hash step; verify_ms: of the dense pass over k + 1 tokens, logits not included; round_ms: of it all.
    """
    encoders, settings = hashed(model, context, sparsity)
    release(model)
    # random drafts are seldom accepted; there is room for all of them
    model.setup_caches(batch, context + (steps + 8) * (k + 1), encoders, settings)
    decoder = Decoder(model, batch, Sampling(temperature=0), compiled=True)
    speculator = Speculator(decoder, model, k, settings, compiled=True)
    speculator.prepare()
    decoder.prepare()
    fill_caches(model)
    first = torch.zeros_like(decoder.token[:, 0])
    prompts = [[0] * context]
    speculator.start(prompts, first, first + 2 ** 20)
    drafted, _ = speculator.draft_tokens()
    row = {"model": name, "batch": batch, "context": context, "sparsity": sparsity, "k": k,
           "draft_ms": time_graph(lambda i: speculator.draft_tokens(), 1) / k / 1000,
           "verify_ms": time_graph(lambda i: speculator.verify(drafted), 1) / 1000,
           "round_ms": median_ms(speculator.round, steps)}
    decoder.start(first, context)
    row["dense_ms"] = median_ms(decoder.step, steps)
    return row


def bench_speculate(options: argparse.Namespace) -> Iterator[dict]:
    """Rows of bench_round, and the ms per token that follow where each draft is accepted with a given probability."""
    model = random_model(options.model, "cuda", torch.bfloat16)
    rows = []
    for shape in options.shapes:
        batch, context = map(int, shape.split("x"))
        for k in options.k:
            with skip_on_oom(f"{batch} x {context}, {k} drafts"):
                rows.append(bench_round(model, options.model, batch, context, k, options.sparsity, options.steps))
                yield rows[-1]
            torch.cuda.empty_cache()
    print("\nms per token if each draft is accepted with probability")
    for number, row in enumerate(rows):
        tokens = {p: sum(p ** i for i in range(row["k"] + 1)) for p in (0.6, 0.7, 0.8, 0.9, 0.95, 0.99)}
        implied = {f"{p:.2f}": row["round_ms"] / n for p, n in tokens.items()}
        print_table([{name: row[name] for name in ("batch", "context", "k")} | implied | {"dense": row["dense_ms"]}],
                    header=number == 0)


# ---------------------------------------------------------------------------------------------- prefill, whole answers

def random_prompt(model: Transformer, length: int) -> Tensor:
    return torch.randint(model.args.vocab_size, (length,), device="cuda")


def timed_prefill(model: Transformer, ids: Tensor, chunk: int) -> tuple[int, float]:
    """Read a prompt -> its greedy next token, seconds."""
    torch.cuda.synchronize()
    started = time.perf_counter()
    token = prefill(model, ids, 1, chunk=chunk).argmax().item()
    return token, time.perf_counter() - started


def bench_prefill(options: argparse.Namespace) -> Iterator[dict]:
    """Seconds and TFLOP/s of reading a random prompt: 2 FLOPs per weight and token, 4 per query, head, channel and visible key.

    Signatures are written too. plan_gib: weights, caches and an upper estimate of what a chunk takes.
    """
    model = random_model(options.model, "cuda", torch.bfloat16)
    args = model.args
    weights = sum(p.numel() for name, p in model.named_parameters() if name.startswith("layers"))
    for context in options.context:
        with skip_on_oom(f"{context} tokens"):
            encoders, settings = hashed(model, context, options.sparsity)
            release(model)
            model.setup_caches(1, context, encoders, settings)
            compile_s = prepare_prefill(model, options.chunk)
            _, seconds = timed_prefill(model, random_prompt(model, context), options.chunk)
            flops = context * 2 * weights + 4 * args.n_layer * args.n_head * args.head_dim * context * (context + 1) / 2
            plan = weight_bytes(model) + context * sum(cache_bytes_per_token(model, encoders, 1))
            yield {"model": options.model, "batch": 1, "context": context, "chunk": options.chunk, "seconds": seconds,
                   "tflops": flops / seconds / 1e12, "peak_gib": torch.cuda.max_memory_allocated() / 2 ** 30,
                   "plan_gib": (plan + prefill_bytes(model, options.chunk)) / 2 ** 30, "compile_s": compile_s}


@torch.inference_mode()
def bench_latency(model: Transformer, context: int, bandwidth: float, options: argparse.Namespace) -> list[dict]:
    """Time to the first token of a random prompt, then per token, dense and hash on the cache of that one prefill."""
    encoders, settings = hashed(model, context, options.sparsity)
    release(model)
    model.setup_caches(1, context + options.steps + 8, encoders, settings)
    decoders = {}
    for mode in ("dense", "hash"):
        for layer, encoder in zip(model.layers, encoders, strict=True):
            layer.attention.encoder = encoder if mode == "hash" else None  # a dense step writes no signatures
        model.set_sparse(settings if mode == "hash" else None)  # of layers that have an encoder
        decoders[mode] = Decoder(model, 1, Sampling(temperature=0), compiled=True)
        decoders[mode].prepare()
    prepare_prefill(model, options.chunk)
    token, seconds = timed_prefill(model, random_prompt(model, context), options.chunk)
    rows = []
    for mode, decoder in decoders.items():
        decoder.start(torch.full_like(decoder.token[:, 0], token), context)
        ms = median_ms(decoder.step, options.steps)
        model.set_sparse(settings if mode == "hash" else None)  # the captured steps stay as they are
        floor = bytes_per_step(model, settings if mode == "hash" else None, context, 1)
        rows.append({"model": options.model, "batch": 1, "context": context, "attention": mode,
                     "sparsity": options.sparsity if mode == "hash" else 1, "ttft_s": seconds, "ms_per_token": ms,
                     "floor_ms": floor / bandwidth / 1000})
    return rows


def latency(options: argparse.Namespace) -> Iterator[dict]:
    model = random_model(options.model, "cuda", torch.bfloat16)
    bandwidth = copy_bandwidth()
    for context in options.context:
        with skip_on_oom(f"{context} tokens"):
            yield from bench_latency(model, context, bandwidth, options)


@torch.inference_mode()
def bench_ragged(options: argparse.Namespace) -> Iterator[dict]:
    """Tokens per second of decoding prompts of different lengths in one batch, and one after the other."""
    model = random_model(options.model, "cuda", torch.bfloat16)
    longest = max(options.lengths)

    def seconds(lengths: list[list[int]], mode: str) -> float:
        """Seconds of options.steps tokens for each batch of `lengths`; all batches are of one size."""
        encoders, settings = hashed(model, longest, options.sparsity) if mode == "hash" else (None, None)
        release(model)
        model.setup_caches(len(lengths[0]), longest + options.steps + 8, encoders, settings)
        decoder = Decoder(model, len(lengths[0]), Sampling(temperature=0), compiled=True)
        decoder.prepare()
        fill_caches(model)
        total = 0.0
        for batch in lengths:
            decoder.start(torch.zeros_like(decoder.token[:, 0]), torch.tensor(batch, device="cuda"))
            total += median_ms(decoder.step, options.steps) * options.steps / 1000
        return total

    for mode in ("dense", "hash"):
        tokens = len(options.lengths) * options.steps
        together, alone = seconds([options.lengths], mode), seconds([[length] for length in options.lengths], mode)
        yield {"model": options.model, "batch": len(options.lengths), "lengths": options.lengths, "attention": mode,
               "sparsity": options.sparsity if mode == "hash" else 1, "together_tok_s": tokens / together,
               "alone_tok_s": tokens / alone, "speedup": alone / together}


# --------------------------------------------------------------------------------------------------------------- command

def save(path: Path, about: dict[str, str], rows: list[dict]) -> None:
    ranks = distributed.world_size()
    launch = ["torchrun", "--nproc_per_node", str(ranks)] if ranks > 1 else ["python"]
    result = {**about, "command": command_line(*launch), "rows": rows}
    with atomic_path(path) as beside:
        beside.write_text(json.dumps(result, indent=1) + "\n")


def sizes(names: str) -> Callable[[str], str]:
    """An argparse type: whole numbers from 1 on with an x between them, one for each of `names`, which are written so too."""
    pattern = "x".join(r"[1-9]\d*" for _ in names.split(" x "))

    def check(text: str) -> str:
        if re.fullmatch(pattern, text) is None:
            raise argparse.ArgumentTypeError(f"{text!r} is not {names}, whole numbers with an x between them")
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
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    part = commands.add_parser("attention", help="one layer's attention, by stage")
    part.add_argument("--cases", nargs="+", type=sizes("batch x context x sparsity"), default=CASES,
                      help="batch x context x sparsity")
    part.add_argument("--modes", nargs="+", choices=MODES, default=list(MODES))
    part.add_argument("--heads", nargs=3, type=at_least_1(int), default=(32, 8, 128), metavar=("HQ", "HKV", "D"))
    part.add_argument("--json", type=Path, help="write the rows here")
    part.set_defaults(run=attention)
    part = commands.add_parser("decode", help="whole decode steps")
    part.add_argument("--model", default="llama-3.1-8b", choices=PRESETS, help="preset, random weights")
    part.add_argument("--checkpoint_path", type=Path, help="a model of real weights instead")
    part.add_argument("--shapes", nargs="+", type=sizes("batch x context"), help="batch x context",
                      default=["1x32768", "1x131072", "8x32768", "4x131072", "16x32768"])
    part.add_argument("--attention", nargs="+", choices=("dense", "hash"), default=["dense", "hash"])
    part.add_argument("--sparsity", type=at_least_1(float), default=32)
    part.add_argument("--quantize", choices=("int8", "int4"), help="weights of this many bits (int4: groups of 32)")
    part.add_argument("--steps", type=at_least_1(int), default=50)
    part.add_argument("--no_warm_start", dest="warm_start", action="store_false",
                      help="do not start the first shape again in a second process")
    part.add_argument("--nccl", action="store_true", help="between ranks: all-reduces by NCCL, to compare with")
    part.add_argument("--json", type=Path)
    part.set_defaults(run=decode)
    part = commands.add_parser("speculate", help="rounds of self-speculative decoding")
    part.add_argument("--model", default="llama-3.1-8b", choices=PRESETS)
    part.add_argument("--shapes", nargs="+", type=sizes("batch x context"), default=["1x131072", "4x131072"],
                      help="batch x context")
    part.add_argument("--k", nargs="+", type=at_least_1(int), default=[2, 4, 6, 8], help="drafted tokens per round")
    part.add_argument("--sparsity", type=at_least_1(float), default=32)
    part.add_argument("--steps", type=at_least_1(int), default=20)
    part.add_argument("--json", type=Path)
    part.set_defaults(run=bench_speculate)
    for name, run, about in (("prefill", bench_prefill, "reading a prompt"),
                             ("latency", latency, "time to the first token and per token")):
        part = commands.add_parser(name, help=about)
        part.add_argument("--model", default="llama-3.1-8b", choices=PRESETS)
        part.add_argument("--context", nargs="+", type=at_least_1(int), default=[8192, 32768, 131072, 524288])
        part.add_argument("--chunk", type=at_least_1(int), default=PREFILL_CHUNK["cuda"], help="prompt tokens read at a time")
        part.add_argument("--sparsity", type=at_least_1(float), default=32)
        part.add_argument("--steps", type=at_least_1(int), default=50, help="tokens decoded")
        part.add_argument("--json", type=Path)
        part.set_defaults(run=run)
    part = commands.add_parser("ragged", help="prompts of different lengths decoded together, and one by one")
    part.add_argument("--model", default="llama-3.1-8b", choices=PRESETS)
    part.add_argument("--lengths", nargs="+", type=at_least_1(int),
                      default=[1024, 2048, 4096, 8192, 12288, 16384, 24576, 32768])
    part.add_argument("--sparsity", type=at_least_1(float), default=32)
    part.add_argument("--steps", type=at_least_1(int), default=50)
    part.add_argument("--json", type=Path)
    part.set_defaults(run=bench_ragged)
    part = commands.add_parser("plot", help="PNGs from results files")
    part.add_argument("files", nargs="+", type=Path)
    part.set_defaults(run=plot)
    part = commands.add_parser("parity", help="one results file of what each feature takes, from others")
    part.add_argument("files", nargs="+", type=Path, help="of bench.py decode --json and generate.py --save")
    part.add_argument("--json", type=Path, required=True)
    part.set_defaults(run=compare)
    part = commands.add_parser("report", help="tables in Markdown from results files")
    part.add_argument("--results", type=Path, default=ROOT / "results", help="the folder (default: results)")
    part.add_argument("--write", type=Path, nargs="+", metavar="FILE",
                      help="put them between the markers of these files; default: print")
    part.set_defaults(run=report)
    return parser.parse_args()


def main() -> None:
    options = parse_options()
    check_writable("--json", getattr(options, "json", None))
    if options.command in ("plot", "parity", "report"):  # these only read files
        options.run(options)
        return
    if not torch.cuda.is_available():
        raise UserError("bench measures a GPU and this machine has none; run it where torch.cuda.is_available()")
    if distributed.world_size() > 1 and options.command != "decode":
        raise UserError(f"bench {options.command} measures one GPU; start it without torchrun")
    distributed.check_device("cuda")
    rows, about = [], environment()  # before a results file that git knows is written over
    for row in options.run(options):
        rows.append(row)
        print_table([row], header=len(rows) == 1)
        if options.json is not None and distributed.rank() == 0:  # as they come, for a run that ends early
            save(options.json, about, rows)
    if not rows:
        raise UserError(f"nothing that bench {options.command} was asked for fits into this GPU's memory; ask for less")

