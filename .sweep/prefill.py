"""GPU sweep of prompts read sparsely: kernels against their twins at odd shapes, then times at the 8B geometry. < 120 s.

    python .sweep/prefill.py [check] [score] [stages] [model]      all of them by default; SWEEP_SECONDS bounds it
"""
import itertools
import os
import statistics
import sys
import time
import traceback
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import torch
import triton

from hashfast import hash_attention as reference
from hashfast.hash_attention import HashConfig
from hashfast.kernels import prompt_selection as kernels
from hashfast.kernels.score import Selection, blocks_per_row
from hashfast.kernels.select import launch_compact
from hashfast.model import Fingerprint, ModelArgs, PrefillSettings, SparseSettings, Transformer
from hashfast.ops import prompt_attention
from hashfast.ops import prompt_selection as ops
from hashfast.runtime.decode import pairs_read, prefill
from hashfast.runtime.signatures import random_encoders

BEGIN = time.time()
LIMIT = float(os.environ.get("SWEEP_SECONDS", 115))
HQ, HKV, D, T, R, LAYERS = 32, 8, 128, 4096, 16, 32
STARTS = (28672, 126976, 520192)
wanted = sys.argv[1:] or ["check", "stages", "model", "score"]


def say(*words):
    print(f"[{time.time() - BEGIN:5.1f}]", *words, flush=True)


def guarded(label, run):
    if time.time() - BEGIN > LIMIT:
        say(label, "skipped: out of time")
        return None
    try:
        got = run()
        say(label, f"{got:.4f} ms" if isinstance(got, float) else got)
        return got
    except Exception as error:  # noqa: BLE001
        say(label, "FAILED", type(error).__name__, str(error).splitlines()[0][:200] if str(error) else "")
        if os.environ.get("TRACE"):
            traceback.print_exc()
        return None


def ms(run, repeats=7):
    times = []
    for _ in range(repeats + 2):
        begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        begin.record()
        run()
        end.record()
        torch.cuda.synchronize()
        times.append(begin.elapsed_time(end))
    return float(statistics.median(times[2:]))


def words(*shape):
    return torch.randint(-2 ** 31, 2 ** 31, shape, device="cuda", dtype=torch.int32)


def weights_of(config, hq, hkv, d=64):
    (encoder,) = random_encoders(config, Fingerprint(1, hq, hkv, d, 1e4, 1))
    encoder = encoder.cuda()
    return encoder, encoder.weigh_queries(torch.randn(1, hq, ops.SAMPLED, d, device="cuda"))[0]


# ----------------------------------------------------------------------------------------------------------------- check

def check():
    torch.manual_seed(0)
    configs = [(HashConfig(), 4), (HashConfig(share="query"), 4), (HashConfig(share="query"), 6), (HashConfig(bits=128, query_bits=1), 4),
               (HashConfig(bits=64, query_bits=8), 1), (HashConfig(bits=16, query_bits=2), 2)]
    shapes = [(131, ops.PrefixRows(40, 5, 7, 64)), (65, ops.PrefixRows(64, 16, 16, 64)), (2050, ops.PrefixRows(64, 16, 16, 64)),
              (70_001, ops.PrefixRows(4096, 64, 1024, 8192)), (126_976, ops.PrefixRows(8192, 64, 1024, 8192))]
    for (config, group), (start, rows) in itertools.product(configs, shapes):
        if config != HashConfig() and start in (65, 2050, 126_976) or time.time() - BEGIN > LIMIT / 2:
            continue

        def run(config=config, group=group, start=start, rows=rows):
            encoder, weights = weights_of(config, 2 * group, 2)
            signatures = words(encoder.n_signature_head, start + 9, config.words)[:, :start]
            for tokens, warps in ((128, 4), (64, 4), (256, 8)) if config == HashConfig() and start in (131, 70_001) else ((128, 4),):
                seq_lens = torch.full((1,), start, dtype=torch.int32, device="cuda")
                n_blocks = blocks_per_row(2, start, rows.recent)
                selection = Selection(rows.count, None, rows.count, rows.sink, rows.recent, encoder.shift)
                scored = kernels.launch_prompt_score(weights, signatures, 2, seq_lens, start, selection, n_blocks, tokens, warps)
                got = launch_compact(*scored, seq_lens, selection, n_blocks)[0]
                expected = ops.select_rows_reference(weights, signatures, 2, start, rows, encoder.shift).sort(dim=-1).values
                assert torch.equal(got, expected), f"tokens {tokens}: {(got != expected).sum().item()} of {got.numel()} differ"
            again = kernels.select_rows(weights, signatures, 2, start, *rows[:3], encoder.shift)
            assert torch.equal(again, expected), "not the same twice"
            return "equal"
        guarded(f"check {config} group {group} start {start} K {rows.count}", run)
    for d, dtype in itertools.product((64, 80, 96, 128, 256), (torch.bfloat16, torch.float32)):
        def run(d=d, dtype=dtype):
            k, v = torch.randn(2, 3, 5000, d + 8, device="cuda").to(dtype)[..., :d]
            indices = torch.rand(3, 5000, device="cuda").argsort(dim=-1)[:, :1111].int().contiguous()
            for got, want in zip(kernels.gather_rows(k, v, indices, 2048), ops.gather_rows_reference(k, v, indices, 2048), strict=True):
                assert torch.equal(got, want) and got.stride() == want.stride()
            return "equal"
        guarded(f"gather D {d} {dtype}", run)
    for length, chunk, share in ((9000, 1024, "kv"), (5003, 1024, "query")):
        def run(length=length, chunk=chunk, share=share):
            args, logits = ModelArgs(2, 256, 8, 2, 64, 256, 120, 1e-5, 10000.0, max_position=2 ** 14), []
            ids = torch.randint(0, 120, (length,), device="cuda")
            import hashfast.model as M
            kept = M.select_rows, M.gather_rows
            for plain in (False, True):
                M.select_rows, M.gather_rows = (ops.select_rows_reference, ops.gather_rows_reference) if plain else kept
                torch.manual_seed(1)
                with torch.device("cuda"):
                    model = Transformer(args).eval().bfloat16()
                model.setup_caches(1, length, random_encoders(HashConfig(share=share), model.fingerprint()), SparseSettings(length))
                logits.append(prefill(model, ids, 1, settings=PrefillSettings("hash", 4, chunk)).float())
            M.select_rows, M.gather_rows = kept
            error = ((logits[0] - logits[1]).norm() / logits[1].norm()).item()
            assert error < 2e-2, error
            return f"relative error {error:.1e}"
        guarded(f"model {length} chunk {chunk} {share}", run)


# ----------------------------------------------------------------------------------------------------------------- times

def inputs(start, config=None):
    config = config or HashConfig()
    encoder, weights = weights_of(config, HQ, HKV, D)
    rows = ops.prefix_rows(start, T, R, start + T)
    signatures = words(encoder.n_signature_head, start + T, config.words)
    seq_lens = torch.full((1,), start, dtype=torch.int32, device="cuda")
    selection = Selection(rows.count, None, rows.count, rows.sink, rows.recent, encoder.shift)
    return encoder, weights, rows, signatures, seq_lens, selection


def stages():
    total = {}
    for start in STARTS:
        def run(start=start):
            encoder, weights, rows, signatures, seq_lens, selection = inputs(start)
            n_blocks = blocks_per_row(HKV, start, rows.recent)
            k, v = (torch.randn(1, HKV, start + T, D, device="cuda", dtype=torch.bfloat16) for _ in "kv")
            q = torch.randn(1, T, HQ, D, device="cuda", dtype=torch.bfloat16)
            own = [torch.randn(1, HKV, T, D, device="cuda", dtype=torch.bfloat16) for _ in "kv"]
            scored = kernels.launch_prompt_score(weights, signatures, HKV, seq_lens, start, selection, n_blocks)
            chosen = launch_compact(*scored, seq_lens, selection, n_blocks)[0]
            gathered = kernels.gather_rows(k[0], v[0], chosen, rows.most)
            at = torch.arange(ops.SAMPLED, device="cuda")
            got = {
                "encode": ms(lambda: encoder.weigh_queries(q[:, at].transpose(1, 2))),  # eager; compiled in the model
                "score": ms(lambda: kernels.launch_prompt_score(weights, signatures, HKV, seq_lens, start, selection, n_blocks)),
                "compact": ms(lambda: launch_compact(*scored, seq_lens, selection, n_blocks)),
                "gather": ms(lambda: kernels.gather_rows(k[0], v[0], chosen, rows.most)),
                "own": ms(lambda: prompt_attention.causal_attention(q, *own)),
                "sparse": ms(lambda: prompt_attention.causal_attention(
                    q, *own, lambda a, b: tuple(x[:, :, a:b] for x in gathered), rows.count)),
            }
            if start < 200_000:
                got["dense"] = ms(lambda: prompt_attention.causal_attention(
                    q, *own, lambda a, b: (k[:, :, a:b], v[:, :, a:b]), start), 3)
            total[start] = got
            floor = (2 * rows.count * HKV * D * 2 * 2) / 4.3e9
            return f"K {rows.count} " + " ".join(f"{name} {value:.3f}" for name, value in got.items()) + f" ms (gather floor {floor:.3f})"
        guarded(f"stages start {start}", run)
        torch.cuda.empty_cache()
    for start, got in total.items():  # selection of the last chunk in all layers, and of a prompt: half of it per chunk
        select = got["score"] + got["compact"] + got["gather"]
        say(f"start {start}: selection {select:.3f} ms of a chunk's {got['sparse']:.3f} attention; "
            f"a prompt of {start + T}: about {select / 2 * LAYERS * (start + T) / T / 1000:.2f} s")


def score():
    for start, (config, name) in itertools.product(STARTS, ((HashConfig(), "kv"), (HashConfig(share="query"), "query"),
                                                            (HashConfig(bits=128, query_bits=1), "hata"))):
        def prepare(start=start, config=config):
            return inputs(start, config)
        try:
            encoder, weights, rows, signatures, seq_lens, selection = prepare()
        except Exception as error:  # noqa: BLE001
            say("score", name, start, "FAILED", error)
            continue
        least = blocks_per_row(HKV, start, rows.recent)
        for (tokens, warps), factor in itertools.product(((128, 4), (64, 4), (64, 2), (128, 8), (256, 8)), (1, 2)):
            n_blocks = min(least * factor, 256)
            if name != "kv" and (tokens, factor) != (128, 1):
                continue
            guarded(f"score {name} start {start} tokens {tokens} warps {warps} blocks {n_blocks}",
                    lambda tokens=tokens, warps=warps, n_blocks=n_blocks: ms(lambda: kernels.launch_prompt_score(
                        weights, signatures, HKV, seq_lens, start, selection, n_blocks, tokens, warps)))


def model():
    """Two layers of the 8B geometry, dense and by hash, without compilation: what a layer takes; the linear part by difference."""
    args = ModelArgs(2, 4096, HQ, HKV, D, 14336, 128256, 1e-5, 5e5, max_position=2 ** 21)
    with torch.device("cuda"):
        torch.set_default_dtype(torch.bfloat16)
        layers = Transformer(args).eval().requires_grad_(False)
        torch.set_default_dtype(torch.float32)
    for length, mode in itertools.product((32768, 131072, 524288), ("hash", "dense")):
        if (length, mode) == (524288, "dense"):
            continue

        def run(length=length, mode=mode):
            layers.setup_caches(1, length, random_encoders(HashConfig(), layers.fingerprint()), SparseSettings(2048))
            ids = torch.randint(0, 128256, (length,), device="cuda")
            settings = PrefillSettings(mode, R, T)
            prefill(layers, ids[:2 * T], 1, chunk=T, settings=settings)
            torch.cuda.synchronize()
            begin = time.perf_counter()
            prefill(layers, ids, 1, chunk=T, settings=settings)
            torch.cuda.synchronize()
            took = time.perf_counter() - begin
            return (f"{took:.3f} s for 2 layers, cold plans included; 32 layers about {16 * took:.2f} s; "
                    f"{pairs_read(length, settings):.1%} of pairs")
        guarded(f"prefill {length} {mode}", run)
        torch.cuda.empty_cache()


print(torch.cuda.get_device_name(), torch.__version__, triton.__version__, reference.NUM_BINS)
with torch.inference_mode():
    for name in wanted:
        guarded(name, lambda name=name: {"check": check, "stages": stages, "score": score, "model": model}[name]())
