"""Latency of decode steps, speculation, prefill, whole answers and ragged batches, on random prompts, beside byte floors.

Every function yields rows of a results file as they are measured. A floor is the bytes that must be read over the copy
bandwidth of the same run.
"""
import contextlib
import json
import math
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from unittest import mock

import torch
from torch import Tensor

from hashfast import model as model_module
from hashfast.common import ROOT
from hashfast.hash_attention import HashConfig, HashEncoder
from hashfast.model import PrefillSettings, SparseSettings, Transformer
from hashfast.research.report import print_table
from hashfast.runtime import distributed, tensor_parallel
from hashfast.runtime.checkpoint import load_model, load_quantization, random_model
from hashfast.runtime.decode import Decoder, pairs_read, prefill, prepare_prefill
from hashfast.runtime.memory import bytes_per_step, cache_bytes_per_token, prefill_bytes, weight_bytes
from hashfast.runtime.sampling import Sampling
from hashfast.runtime.signatures import random_encoders
from hashfast.runtime.speculate import Speculator

SINK, RECENT = 64, 128


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
    """Skip what does not fit into the memory of this GPU, with a line."""
    try:
        yield
    except torch.OutOfMemoryError:
        if distributed.world_size() > 1:
            raise  # other ranks may be in the middle of a step
        print(f"{what}: does not fit", file=sys.stderr)


# ---------------------------------------------------------------------------------------------------------------- decode

def fill_caches(model: Transformer) -> None:
    """Random keys, values and signatures, as if a prompt had been read."""
    for layer in model.layers:
        for buffer in layer.attention.cache.rows():
            if buffer.dtype == torch.int32:
                buffer.random_(-2 ** 31, 2 ** 31)
            else:
                buffer.normal_()


def sparse_encoders(model: Transformer, context: int, sparsity: float) -> tuple[list[HashEncoder], SparseSettings]:
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
    encoders, settings = sparse_encoders(model, context, sparsity) if mode == "hash" else (None, None)
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


def decode_rows(preset: str, shapes: list[tuple[int, int]], modes: list[str], sparsity: float, steps: int,
                quantize: str | None = None, checkpoint: Path | None = None, warm: bool = False,
                nccl: bool = False) -> Iterator[dict]:
    """Rows of bench_decode for each (batch, context) and of `modes` "dense" and "hash".

    preset: random weights, of `quantize` "int8"; checkpoint: a folder instead. warm: start the first shape again in a
    second process. nccl: all-reduce by NCCL. compile_s of the first row is a cold start where Inductor's cache is empty.
    """
    if checkpoint is not None:
        name, model, quantization = (checkpoint.resolve().name, load_model(checkpoint, "cuda", torch.bfloat16),
                                     load_quantization(checkpoint))
    else:
        name, model, quantization = preset, random_model(preset, "cuda", torch.bfloat16, quantization=quantize), quantize
    bandwidth = copy_bandwidth()
    if distributed.world_size() > 1 and not nccl:
        distributed.use_one_shot(max(batch for batch, _ in shapes) * model.args.dim, torch.bfloat16)
    for batch, context in shapes:
        for mode in modes:
            with skip_on_oom(f"{batch} x {context} {mode}"):
                row = bench_decode(model, name, batch, context, mode, sparsity, bandwidth, steps)
                row |= {"weights": quantization or "bfloat16", "warm_start_s": None}
                if warm and distributed.world_size() == 1 and (batch, context) == shapes[0]:
                    release(model)  # the second process needs room
                    source = ["--checkpoint_path", str(checkpoint)] if checkpoint is not None else ["--model", preset]
                    row["warm_start_s"] = warm_start([
                        *source, *(["--quantize", quantize] if quantize else []), "--shapes", f"{batch}x{context}",
                        "--attention", mode, "--sparsity", str(sparsity)])
                yield row


def warm_start(flags: list[str]) -> float | None:
    """Compile and capture seconds of `bench decode` in a second process, which finds the first one's caches on disk; None where
    it fails."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "rows.json"
        subprocess.run([sys.executable, "-m", "hashfast", "bench", "decode", *flags, "--steps", "8", "--no_warm_start",
                        "--json", str(path)],
                       capture_output=True, check=False, env=os.environ | {"PYTHONPATH": str(ROOT)})
        return json.loads(path.read_text())["rows"][0]["compile_s"] if path.is_file() else None


# ------------------------------------------------------------------------------------------------------------- speculate

@torch.inference_mode()
def bench_round(model: Transformer, name: str, batch: int, context: int, k: int, sparsity: float, steps: int) -> dict:
    """One row: the times of a self-speculative round's parts at `context` tokens, and of the dense step it stands in for.

    draft_ms: of one hash step; verify_ms: of the dense pass over k + 1 tokens, logits not included; round_ms: of it all.
    """
    encoders, settings = sparse_encoders(model, context, sparsity)
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


def speculate_rows(preset: str, shapes: list[tuple[int, int]], drafts: list[int], sparsity: float,
                   steps: int) -> Iterator[dict]:
    """Rows of bench_round for each (batch, context) and number of drafts; then prints the ms per token that follow where each
    draft is accepted with a given probability."""
    model = random_model(preset, "cuda", torch.bfloat16)
    rows = []
    for batch, context in shapes:
        for k in drafts:
            with skip_on_oom(f"{batch} x {context}, {k} drafts"):
                rows.append(bench_round(model, preset, batch, context, k, sparsity, steps))
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


def matrix_rate() -> float:
    """FLOP/s of a large product of bfloat16 matrices."""
    a, b = torch.randn(2, 8192, 8192, device="cuda", dtype=torch.bfloat16)
    return 2 * 8192 ** 3 / median_ms(lambda: a @ b, 20) * 1000


@contextlib.contextmanager
def timed_stages() -> Iterator[dict[str, list[tuple[torch.cuda.Event, torch.cuda.Event]]]]:
    """Events around what prompt chunks do in the model's stages: "select" (and gather) and "attention"."""
    stages = {"select_rows": "select", "gather_rows": "select", "causal_attention": "attention"}
    times: dict[str, list] = {stage: [] for stage in stages.values()}

    def timed(run: Callable, stage: str) -> Callable:
        def call(*args: object, **more: object) -> object:
            begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            begin.record()
            result = run(*args, **more)
            end.record()
            times[stage].append((begin, end))
            return result
        return call

    with contextlib.ExitStack() as stack:
        for name, stage in stages.items():
            stack.enter_context(mock.patch.object(model_module, name, timed(getattr(model_module, name), stage)))
        yield times


def timed_prefill(model: Transformer, ids: Tensor, settings: PrefillSettings) -> tuple[int, dict[str, float]]:
    """Read a prompt -> its greedy next token, seconds to it and of its stages. linear_s: all but selection and attention."""
    torch.cuda.synchronize()
    with timed_stages() as times:
        started = time.perf_counter()
        token = prefill(model, ids, 1, chunk=settings.chunk, settings=settings).argmax().item()
        seconds = time.perf_counter() - started
    select, attention = (sum(begin.elapsed_time(end) for begin, end in times[stage]) / 1000
                         for stage in ("select", "attention"))
    return token, {"ttft_s": seconds, "linear_s": seconds - select - attention, "select_s": select, "attention_s": attention}


def prefill_flops(model: Transformer, context: int, settings: PrefillSettings) -> float:
    """2 per weight of a layer and token, 4 per query, head, channel and key read."""
    args = model.args
    weights = sum(p.numel() for name, p in model.named_parameters() if name.startswith("layers"))
    pairs = pairs_read(context, settings) * context * (context + 1) / 2
    return context * 2 * weights + 4 * args.n_layer * args.n_head * args.head_dim * pairs


def prefill_columns(model: Transformer, context: int, settings: PrefillSettings, rate: float) -> dict[str, object]:
    """How a prompt was read, and the seconds that its products take at `rate` FLOP/s."""
    return {"chunk": settings.chunk, "prefill": settings.mode,
            "prefill_sparsity": settings.sparsity if settings.mode == "hash" else 1,
            "pairs_read": pairs_read(context, settings), "floor_s": prefill_flops(model, context, settings) / rate}


def prefill_rows(preset: str, contexts: list[int], sparsity: float, ways: list[PrefillSettings]) -> Iterator[dict]:
    """Seconds, by stage, and TFLOP/s of reading a random prompt in each of `ways`; signatures are written too.

    floor_s: its products at the rate of a large one.  plan_gib: weights, caches and an upper estimate of what a chunk takes.
    """
    model = random_model(preset, "cuda", torch.bfloat16)
    rate = matrix_rate()
    for context in contexts:
        for way in ways:
            with skip_on_oom(f"{context} tokens, {way.mode}"):
                encoders, settings = sparse_encoders(model, context, sparsity)
                release(model)
                model.setup_caches(1, context, encoders, settings)
                compile_s = prepare_prefill(model, way.chunk, way)
                _, times = timed_prefill(model, random_prompt(model, context), way)
                work = prefill_bytes(model, way.chunk, way.gathered(context))
                plan = weight_bytes(model) + context * sum(cache_bytes_per_token(model, encoders, 1))
                floor = prefill_columns(model, context, way, rate)
                yield {"model": preset, "batch": 1, "context": context, **floor, **times,
                       "tflops": prefill_flops(model, context, way) / times["ttft_s"] / 1e12,
                       "peak_gib": torch.cuda.max_memory_allocated() / 2 ** 30,
                       "plan_gib": (plan + work) / 2 ** 30, "compile_s": compile_s}


@torch.inference_mode()
def bench_latency(model: Transformer, name: str, context: int, sparsity: float, steps: int, ways: list[PrefillSettings],
                  bandwidth: float, rate: float) -> list[dict]:
    """Time to the first token of a random prompt, then per token, for each of `ways` to read the prompt; dense steps follow a
    dense prompt, hash steps one read by hash."""
    encoders, settings = sparse_encoders(model, context, sparsity)
    release(model)
    model.setup_caches(1, context + steps + 8, encoders, settings)
    rows = []
    for way in ways:
        is_hash = way.mode == "hash"
        for layer, encoder in zip(model.layers, encoders, strict=True):
            layer.attention.encoder = encoder if is_hash else None  # a dense step writes no signatures
        model.set_sparse(settings if is_hash else None)  # of layers that have an encoder
        decoder = Decoder(model, 1, Sampling(temperature=0), compiled=True)
        decoder.prepare()
        prepare_prefill(model, way.chunk, way)
        token, times = timed_prefill(model, random_prompt(model, context), way)
        decoder.start(torch.full_like(decoder.token[:, 0], token), context)
        ms = median_ms(decoder.step, steps)
        floor = bytes_per_step(model, settings if is_hash else None, context, 1)
        rows.append({"model": name, "batch": 1, "context": context, "attention": way.mode,
                     "sparsity": sparsity if is_hash else 1, **prefill_columns(model, context, way, rate), **times,
                     "ms_per_token": ms, "floor_ms": floor / bandwidth / 1000})
    return rows


def latency_rows(preset: str, contexts: list[int], sparsity: float, steps: int, ways: list[PrefillSettings]) -> Iterator[dict]:
    """Rows of bench_latency for each context."""
    model = random_model(preset, "cuda", torch.bfloat16)
    bandwidth, rate = copy_bandwidth(), matrix_rate()
    for context in contexts:
        with skip_on_oom(f"{context} tokens"):
            yield from bench_latency(model, preset, context, sparsity, steps, ways, bandwidth, rate)


@torch.inference_mode()
def ragged_rows(preset: str, prompts: list[int], sparsity: float, steps: int) -> Iterator[dict]:
    """Tokens per second of decoding prompts of these lengths in one batch, and one after the other."""
    model = random_model(preset, "cuda", torch.bfloat16)
    longest = max(prompts)

    def seconds(lengths: list[list[int]], mode: str) -> float:
        """Seconds of `steps` tokens for each batch of `lengths`; all batches are of one size."""
        encoders, settings = sparse_encoders(model, longest, sparsity) if mode == "hash" else (None, None)
        release(model)
        model.setup_caches(len(lengths[0]), longest + steps + 8, encoders, settings)
        decoder = Decoder(model, len(lengths[0]), Sampling(temperature=0), compiled=True)
        decoder.prepare()
        fill_caches(model)
        total = 0.0
        for batch in lengths:
            decoder.start(torch.zeros_like(decoder.token[:, 0]), torch.tensor(batch, device="cuda"))
            total += median_ms(decoder.step, steps) * steps / 1000
        return total

    for mode in ("dense", "hash"):
        tokens = len(prompts) * steps
        together, alone = seconds([prompts], mode), seconds([[length] for length in prompts], mode)
        yield {"model": preset, "batch": len(prompts), "lengths": prompts, "attention": mode,
               "sparsity": sparsity if mode == "hash" else 1, "together_tok_s": tokens / together,
               "alone_tok_s": tokens / alone, "speedup": alone / together}
