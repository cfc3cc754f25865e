"""GPU sweep of the portable path: correctness at odd shapes, then times of each stage in both forms, one line each. < 150 s.

    python .sweep/portable.py [check] [score] [compact] [attend] [total] [linear] [quant]      all of them by default
"""
import contextlib
import itertools
import os
import sys
import time
import traceback
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import torch
import triton

from hashfast import hash_attention as reference
from hashfast.commands.bench import time_graph
from hashfast.hash_attention import HashConfig
from hashfast.kernels import linear as L
from hashfast.kernels import linear_ptx as LP
from hashfast.kernels import quant_linear as Q
from hashfast.kernels import score as SC
from hashfast.kernels import select as SE
from hashfast.kernels import sparse_attention as SA
from hashfast.kernels import sparse_attention_ptx as SP
from hashfast.ops import quant_linear as QR
from hashfast.ops.linear import linear_reference

BEGIN = time.time()
LIMIT = float(os.environ.get("SWEEP_SECONDS", 150))
CASES = [(1, 32768, 16), (1, 131072, 32), (8, 32768, 32), (1, 524288, 32), (16, 131072, 32)]
SINK, RECENT, HQ, HKV, D = 64, 128, 32, 8, 128
wanted = sys.argv[1:] or ["check", "score", "compact", "attend", "total", "linear", "quant"]


@contextlib.contextmanager
def path(portable: bool):
    os.environ["HASHFAST_PORTABLE"] = "1" if portable else "0"
    yield
    os.environ["HASHFAST_PORTABLE"] = "0"


def say(*words):
    print(f"[{time.time() - BEGIN:5.1f}]", *words, flush=True)


def guarded(label, run):
    if time.time() - BEGIN > LIMIT:
        say(label, "skipped: out of time")
        return None
    try:
        us = run()
        say(label, f"{us:.2f}" if isinstance(us, float) else us)
        return us
    except Exception as error:  # noqa: BLE001
        say(label, "FAILED", type(error).__name__, str(error).splitlines()[0][:150] if str(error) else "")
        if os.environ.get("TRACE"):
            traceback.print_exc()
        return None


def ascending(indices):
    past = torch.iinfo(torch.int32).max
    ordered = torch.where(indices < 0, past, indices).sort(dim=-1).values
    return torch.where(ordered == past, -1, ordered)


def planes_of(config, B, Hs, group):
    codes = torch.randn(B, Hs, group, config.bits, device="cuda")
    return reference.weight_planes(reference.query_weights(codes, config), config.planes(group))


def words(*shape):
    return torch.randint(-2 ** 31, 2 ** 31, shape, device="cuda", dtype=torch.int32)


def check():
    torch.manual_seed(0)
    for (bits, qb, share, group), (S, lens), portable in itertools.product(
            [(32, 4, "kv", 4), (32, 1, "query", 1), (64, 8, "kv", 3), (128, 1, "kv", 7)],
            [(2501, (1, 700, 2437)), (5000, (5000, 4999, 333)), (777, (777, 300, 301))], [True, False]):
        config = HashConfig(bits=bits, query_bits=qb, share=share)
        planes, sig = planes_of(config, 3, 2, group), words(3, 2, S + 3, config.words)[:, :, :S]
        seq_lens, shift = torch.tensor(lens, dtype=torch.int32, device="cuda"), config.shift(group)
        expected = ascending(reference.select_tokens_reference(planes, sig, seq_lens, 300, 16, 33, 333, shift))
        variants = [(1024, None, 3)]
        if portable and bits == 32 and share == "kv":
            variants += [(512, 2, 3), (2048, 8, 1), (1024, 4, 7)]
        for chunk, warps, blocks in variants:
            def run():
                with path(portable):
                    sel = SC.Selection(300, None, 333, 16, 33, shift)
                    scored = SC.launch_score(planes, sig, seq_lens, sel, blocks, chunk=chunk, num_warps=warps)
                    got = SE.launch_compact(*scored, seq_lens, sel, blocks, chunk=chunk)
                return "equal" if torch.equal(got, expected) else "DIFFERENT"
            label = f"check select {bits}b q{qb} G{group} S{S} {'portable' if portable else 'ptx'} chunk {chunk} x{warps} b{blocks}"
            try:
                result = run()
            except Exception as error:  # noqa: BLE001
                result = f"FAILED {type(error).__name__} {str(error).splitlines()[0][:120] if str(error) else ''}"
            if result != "equal":
                say(label, result)
    say("check select done")
    for dtype, D_, G in ((torch.bfloat16, 64, 1), (torch.bfloat16, 128, 4), (torch.bfloat16, 256, 4), (torch.float16, 96, 3),
                         (torch.float32, 128, 4), (torch.float32, 256, 1)):
        def run():
            q, k, v = (torch.randn(2, h, *s, D_, device="cuda").to(dtype) for h, s in ((2 * G, ()), (2, (300,)), (2, (300,))))
            idx = torch.rand(2, 2, 300, device="cuda").argsort(-1)[..., :150].int()
            idx[0, 0, 100:] = -1
            with path(True):
                out, lse = SA.sparse_attention(q, k, v, idx, D_ ** -0.5)
            eo, el = reference.sparse_attention_reference(q.float(), k.float(), v.float(), idx)
            error = ((out.float() - eo).norm() / eo.norm()).item()
            return "ok" if error < 1e-2 and (lse - el).abs().max() < 1e-4 else f"DIFFERENT {error}"
        guarded(f"check attend portable {dtype} D{D_} G{G}", run)
    for M, (N, K, kind) in itertools.product([1, 3, 16], [(96, 64, "norm bias"), (37, 200, "norm gated"), (9, 1312, "add")]):
        def run():
            gated = "gated" in kind
            r = lambda *s: torch.randn(*s, device="cuda").bfloat16()  # noqa: E731
            x, w = r(M, 1, K), r((2 if gated else 1) * N, K) * K ** -0.5
            norm, bias, add = (r(n) if f in kind else None for n, f in ((K, "norm"), (N, "bias"), (1, "none")))
            add = r(M, 1, N) if "add" in kind else None
            with path(True):
                got = L.linear(x, w, bias, norm, 1e-5, add, gated)
            wide = [None if t is None else t.double() for t in (x, w, bias, norm)]
            expected = linear_reference(*wide, 1e-5, None if add is None else add.double(), gated)
            error = ((got.double() - expected).norm() / expected.norm()).item()
            return "ok" if error < 5e-3 else f"DIFFERENT {error}"
        guarded(f"check linear M{M} N{N} K{K} {kind}", run)
    say("check done")


def attention():
    for B, S, sparsity in CASES:
        if time.time() - BEGIN > LIMIT:
            return
        name = f"{B}x{S}"
        K = max(64 * -(-S // sparsity // 64), SINK + RECENT + 64)
        sparse_bytes = B * HKV * (4 * D * K + 4 * S)
        copies = max(2, min(8, -(-256 * 2 ** 20 // sparse_bytes)))
        config = HashConfig()
        planes, rows = planes_of(config, B, HKV, 4), B * HKV
        sigs = [words(B, HKV, S, 1) for _ in range(copies)]
        caches = [tuple(torch.randn(B, HKV, S, D, device="cuda", dtype=torch.bfloat16) for _ in "kv") for _ in range(copies)]
        q = torch.randn(B, HQ, D, device="cuda", dtype=torch.bfloat16)
        seq_lens = torch.full((B,), S, dtype=torch.int32, device="cuda")
        sel = SC.Selection(K, None, K, SINK, RECENT, config.shift(4))
        n = SC.blocks_per_row(rows, S, RECENT)
        count = copies * max(1, 16 // copies)
        timed = lambda step: time_graph(lambda i: step(i % copies), count)  # noqa: E731
        select = lambda i, c=True: SE.select_tokens(planes, sigs[i], seq_lens, K, None, K, SINK, RECENT,  # noqa: E731
                                                    sel.shift, *(caches[i] if c else (None, None)))
        indices = [select(i) for i in range(copies)]

        def blocks(chunk, factor=1.0):
            chunks = max(1, triton.cdiv(S - RECENT, chunk))
            return max(min(triton.cdiv(chunks, max(1, round(chunks / max(n * factor, 1)))), 256),
                       triton.cdiv(S, (2 ** 16 - 1) // chunk * chunk))

        if "score" in wanted:
            with path(False):
                ptx = guarded(f"score {name} ptx blocks {n}", lambda: timed(
                    lambda i: SC.launch_score(planes, sigs[i], seq_lens, sel, n)))
            best = None
            with path(True):
                for chunk, warps in ((512, 2), (512, 4), (1024, 2), (1024, 4), (1024, 8), (2048, 4), (2048, 8)):
                    for factor in ((1, 2) if warps == 4 else (1,)):
                        b = blocks(chunk, factor)
                        us = guarded(f"score {name} portable chunk {chunk} warps {warps} blocks {b}", lambda: timed(
                            lambda i: SC.launch_score(planes, sigs[i], seq_lens, sel, b, chunk=chunk, num_warps=warps)))
                        if us is not None:
                            best = min(best or (us,), (us, chunk, warps, b))
            say(f"BEST score {name} ptx {ptx} portable {best}")
        if "compact" in wanted:
            scored = SC.launch_score(planes, sigs[0], seq_lens, sel, n)
            for label, given in (("prefetch", True), ("plain", False)):
                guarded(f"compact {name} {label}", lambda: timed(
                    lambda i: SE.launch_compact(*scored, seq_lens, sel, n, caches[i] if given else None)))
            for chunk in (512, 2048):
                b = blocks(chunk)
                with path(True):
                    other = SC.launch_score(planes, sigs[0], seq_lens, sel, b, chunk=chunk)
                    guarded(f"compact {name} plain chunk {chunk} blocks {b}", lambda: timed(
                        lambda i: SE.launch_compact(*other, seq_lens, sel, b, chunk=chunk)))
        if "attend" in wanted:
            guarded(f"attend {name} registers", lambda: timed(lambda i: SA.sparse_attention(q, *caches[i], indices[i], 0.09)))
            default = SA.tile_parameters(rows, K, 2)
            variants = {"default": default}
            for block_k, programs, warps, stages in ((64, 1024, 2, 2), (32, 512, 2, 2), (32, 1024, 2, 2), (32, 1024, 1, 3),
                                                     (64, 512, 4, 2), (64, 512, 2, 3), (32, 1024, 2, 3)):
                splits = max(1, min(triton.cdiv(K, block_k), programs // rows))
                variants[f"k{block_k} p{programs} w{warps} s{stages}"] = {
                    "block_k": block_k, "n_splits": splits, "num_warps": warps, "num_stages": stages}
            for label, parameters in variants.items():
                guarded(f"attend {name} tiles {label} splits {parameters['n_splits']}", lambda: timed(
                    lambda i: SA.launch_tiles(q, *caches[i], indices[i], 0.09, **parameters)))
        if "total" in wanted:
            totals = []
            for portable, prefetch in ((False, True), (False, False), (True, True)):
                with path(portable):
                    totals.append(guarded(f"total {name} {'portable' if portable else 'ptx'} prefetch {prefetch and not portable}",
                                          lambda: timed(lambda i: SA.sparse_attention(q, *caches[i], select(i, prefetch), 0.09))))
            for label, score_portable, attend_portable in (("portable score", True, False), ("portable attend", False, True)):
                def step(i):
                    with path(score_portable):
                        scored = SC.launch_score(planes, sigs[i], seq_lens, sel, n)
                    chosen = SE.launch_compact(*scored, seq_lens, sel, n, caches[i])
                    with path(attend_portable):
                        return SA.sparse_attention(q, *caches[i], chosen, 0.09)
                guarded(f"total {name} ptx but {label}", lambda: timed(step))
            say(f"TOTAL {name} ptx {totals[0]} portable {totals[2]}")
        del sigs, caches
        torch.cuda.empty_cache()


SHAPES = {"wqkv": (6144, 4096, "norm"), "wo": (4096, 4096, "add"), "w13": (14336, 4096, "norm gated"),
          "w2": (4096, 14336, "add"), "output": (128256, 4096, "norm")}


def linear():
    for name, (N, K, kind) in SHAPES.items():
        gated = "gated" in kind
        size = (2 if gated else 1) * N * K * 2
        copies = max(2, min(8, -(-256 * 2 ** 20 // size)))
        weights = [(torch.randn((2 if gated else 1) * N, K, device="cuda") * K ** -0.5).bfloat16() for _ in range(copies)]
        norm = torch.ones(K, device="cuda").bfloat16() if "norm" in kind else None
        for M in (1, 8):
            x = torch.randn(M, 1, K, device="cuda").bfloat16()
            add = torch.randn(M, 1, N, device="cuda").bfloat16() if "add" in kind else None
            timed = lambda step: time_graph(lambda i: step(weights[i % copies]), copies * max(1, 16 // copies))  # noqa: E731
            with path(False):
                ptx = guarded(f"linear {name} M{M} ptx", lambda: timed(lambda w: L.linear(x, w, None, norm, 1e-5, add, gated)))
            best = None
            grid = itertools.product((2, 4, 8, 16), (2, 4, 8)) if M == 1 else ((n, (k, w)) for n, k, w in (
                (32, 128, 4), (16, 256, 4), (64, 64, 4), (64, 128, 4), (32, 256, 8), (64, 128, 8)))
            for block_n, other in grid:
                block_k, warps = (256 * other, other) if M == 1 else other
                us = guarded(f"linear {name} M{M} portable n{block_n} k{block_k} w{warps}", lambda: timed(
                    lambda w: L.launch_portable(x, w, None, norm, 1e-5, add, gated, block_n=block_n, block_k=block_k,
                                                num_warps=warps)))
                if us is not None:
                    best = min(best or (us,), (us, block_n, block_k, warps))
            say(f"BEST linear {name} M{M} ptx {ptx} portable {best} ({size / 4.3e6:.1f} us at 4.3 TB/s)")
        del weights
        torch.cuda.empty_cache()


def quant():
    for name, (N, K, kind) in SHAPES.items():
        gated = "gated" in kind
        rows = (2 if gated else 1) * N
        copies = max(2, min(8, -(-256 * 2 ** 20 // (rows * K))))
        norm = torch.ones(K, device="cuda").bfloat16() if "norm" in kind else None
        add = torch.randn(1, 1, N, device="cuda").bfloat16() if "add" in kind else None
        x, eight = torch.randn(1, 1, K, device="cuda").bfloat16(), torch.randn(8, K, device="cuda").bfloat16()
        int8 = [torch.randint(-128, 128, (rows, K), device="cuda", dtype=torch.int8) for _ in range(copies)]
        scale = torch.ones(rows, device="cuda").bfloat16()
        int4 = [words(rows, K // 8) for _ in range(copies)]
        group = torch.ones(rows, K // 32, device="cuda").bfloat16()
        for label, step in (("int8 M1", lambda i: Q.int8_row(x, int8[i], scale, None, norm, 1e-5, add, gated)),
                            ("int4 M1", lambda i: Q.int4_row(x, int4[i], group, group, None, norm, 1e-5, add, gated)),
                            ("int4 M8", lambda i: Q.int4_linear(eight, int4[i], group, group))):
            got = []
            for portable in (False, True):
                with path(portable):
                    got.append(guarded(f"quant {name} {label} {'portable' if portable else 'ptx'}", lambda: time_graph(
                        lambda i: step(i % copies), copies * max(1, 16 // copies))))
        del int8, int4
        torch.cuda.empty_cache()


say(torch.cuda.get_device_name(), "torch", torch.__version__, "triton", triton.__version__)
with torch.inference_mode():
    if "check" in wanted:
        check()
    if {"score", "compact", "attend", "total"} & {*wanted}:
        attention()
    if "linear" in wanted:
        linear()
    if "quant" in wanted:
        quant()
say("done")
