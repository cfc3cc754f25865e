"""What a sparse prompt loses, by rule of selection, on real weights: ratio, KL and agreement of the last tokens after a dense prompt.

    python .sweep/prefill_quality.py --checkpoint_path MODEL --signatures FILE --data books/*.txt --context 131072 --sparsity 16 32

For each text and R: the prompt (all but the last tokens) is read by each rule, then the last tokens are teacher-forced densely, 64 at a
time. bins is what the package does. Also printed: the share of the selected rows that the tie bin gave. One line per rule and R as
texts come, so that an early end leaves a mean over fewer texts.
"""
import argparse
import os
import sys
import time
import traceback
from collections import defaultdict
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import torch

import hashfast.model as M
from hashfast.hash_attention import NUM_BINS, HashEncoder
from hashfast.model import PrefillSettings, SparseSettings
from hashfast.ops import prompt_selection as ops
from hashfast.runtime.checkpoint import load_model
from hashfast.runtime.decode import pairs_read, prefill
from hashfast.runtime.signatures import load_signatures
from hashfast.runtime.tokenizer import Tokenizer

BEGIN = time.time()
LIMIT = float(os.environ.get("SWEEP_SECONDS", 500))
parser = argparse.ArgumentParser()
parser.add_argument("--checkpoint_path", type=Path, required=True)
parser.add_argument("--signatures", type=Path, required=True)
parser.add_argument("--data", type=Path, nargs="+", required=True)
parser.add_argument("--context", type=int, default=32768)
parser.add_argument("--sparsity", type=float, nargs="+", default=[16])
parser.add_argument("--chunk", type=int, nargs="+", default=[4096])
parser.add_argument("--tail", type=int, default=256)
parser.add_argument("--last", type=int, default=512)
parser.add_argument("--dense_layers", type=int, default=0)
parser.add_argument("--rules", nargs="+", default=["bins", "spread", "latest", "integers", "real", "sum1", "sum2", "sum4", "exact"])
parser.add_argument("--device", default="cuda")
options = parser.parse_args()

WEIGH, SELECT, GATHER = HashEncoder.weigh_queries, M.select_rows, M.gather_rows
held: dict[str, torch.Tensor] = {}  # the sampled queries of the layer at work
ties: list[float] = []


def say(*words):
    print(f"[{time.time() - BEGIN:6.1f}]", *words, flush=True)


def top(scores, start, rows):
    """scores [Hkv, start], the higher the better -> the best rows, with sink and recent."""
    scores = scores.clone() if scores.is_floating_point() else scores.double()  # doubles keep apart the ranks within a bin
    scores[:, :rows.sink] = scores[:, start - rows.recent:] = float("inf")
    return scores.topk(rows.count, dim=-1).indices.int()


def signs(signatures, start):
    bit = torch.arange(32, dtype=torch.int32, device=signatures.device)
    return (((signatures[:, :start, :, None] >> bit) & 1) * 2 - 1).flatten(2)  # [Hs, start, b]


def products(codes, signatures, n_kv_head, start):
    """[Hkv, G * Q, start], a signature head's queries as rows."""
    out = codes.float() @ signs(signatures, start).float().transpose(1, 2)
    return out.unflatten(0, (n_kv_head, -1)).flatten(1, 2)


def rule_bins(order):
    def select(weights, signatures, n_kv_head, start, rows, shift):
        bins = ops.prompt_bins_reference(weights, signatures[:, :start], n_kv_head, shift)
        position = torch.arange(start, device=bins.device)
        rank = {"position": start - 1 - position, "latest": position,
                "spread": (position * 2654435761) % (2 ** 32)}[order].double() / 2 ** 33
        chosen = top(bins.double() + rank, start, rows)
        inside = bins[:, rows.sink:start - rows.recent]
        wanted = rows.count - rows.sink - rows.recent
        counts = torch.stack([torch.bincount(head, minlength=NUM_BINS) for head in inside]).flip(-1).cumsum(-1)  # at or above
        above = torch.where(counts < wanted, counts, 0).amax(dim=-1)
        ties.append(((wanted - above) / rows.count).mean().item())
        return chosen
    return select


def rule_integers(weights, signatures, n_kv_head, start, rows, shift):
    return top(products(weights, signatures, n_kv_head, start).amax(dim=1), start, rows)


def rule_sum(scale):
    def select(weights, signatures, n_kv_head, start, rows, shift):
        scores = products(weights, signatures, n_kv_head, start)
        return top((scale * (scores - scores.mean(-1, keepdim=True)) / scores.std(-1, keepdim=True)).softmax(-1).sum(dim=1), start, rows)
    return select


def real_codes(self, q):
    codes = self.query_codes(q).unflatten(1, (self.n_signature_head, self.group)).sum(dim=2)
    return codes / codes.abs().amax(dim=-1, keepdim=True)


def keep_queries(self, q):
    held["q"] = q
    return WEIGH(self, q)


def gather_exact(k, v, chosen, most):
    """The largest logit of the sampled queries, over the group; `chosen` only says how many."""
    q = held["q"][0].unflatten(0, (k.shape[0], -1)).flatten(1, 2)  # [Hkv, G * Q, D]
    start, rows = held["start"], held["rows"]
    scores = torch.cat([(q @ part.transpose(1, 2)).float().amax(dim=1) for part in k[:, :start].split(16384, dim=1)], dim=1)
    return GATHER(k, v, top(scores, start, rows).contiguous(), most)


def remember(weights, signatures, n_kv_head, start, rows, shift):
    held["start"], held["rows"] = start, rows
    return SELECT(weights, signatures, n_kv_head, start, rows, shift)


RULES = {  # how queries are weighed, rows selected, and gathered
    "bins": (WEIGH, SELECT, GATHER), "ties": (WEIGH, rule_bins("position"), GATHER), "spread": (WEIGH, rule_bins("spread"), GATHER),
    "latest": (WEIGH, rule_bins("latest"), GATHER), "integers": (WEIGH, rule_integers, GATHER), "real": (real_codes, rule_integers, GATHER),
    **{f"sum{scale}": (real_codes, rule_sum(scale), GATHER) for scale in (1, 2, 4)}, "exact": (keep_queries, remember, gather_exact)}


@torch.inference_mode()
def last_logits(model, ids, settings, rule):
    HashEncoder.weigh_queries, M.select_rows, M.gather_rows = RULES[rule] if rule else (WEIGH, SELECT, GATHER)
    try:
        prefill(model, ids[:-options.last], 1, settings=settings)
    finally:
        HashEncoder.weigh_queries, M.select_rows, M.gather_rows = WEIGH, SELECT, GATHER
    model.set_sparse(None)
    parts, at = [], len(ids) - options.last
    while at < len(ids):
        step = min(64, len(ids) - at)
        lengths = torch.tensor([at + step], dtype=torch.int32, device=ids.device)
        parts.append(model(ids[None, at:at + step], lengths)[0].float().log_softmax(-1).cpu())
        at += step
    return torch.cat(parts)[:-1]  # of the tokens after the first of them


model = load_model(options.checkpoint_path, options.device, torch.bfloat16 if options.device == "cuda" else torch.float32)
tokenizer = Tokenizer.load(options.checkpoint_path)
encoders, _ = load_signatures(options.signatures, model.fingerprint())
model.setup_caches(1, options.context, encoders, SparseSettings(2048, dense_layers=options.dense_layers))
dense_share = options.dense_layers / len(model.layers)
found = defaultdict(list)
for path in options.data:
    ids = torch.tensor(tokenizer.encode(path.read_text())[:options.context], device=options.device)
    if len(ids) < options.context:
        say(path.name, "is too short")
        continue
    dense = last_logits(model, ids, None, None)
    true = ids[-options.last + 1:].cpu()[:, None]
    nll = -dense.gather(-1, true).mean().item()
    for sparsity in options.sparsity:
        for chunk in options.chunk:
            for rule in options.rules:
                if time.time() - BEGIN > LIMIT:
                    say("out of time")
                    sys.exit()
                settings = PrefillSettings("hash", sparsity, chunk, options.tail)
                ties.clear()
                try:
                    got = last_logits(model, ids, settings, rule)
                except Exception:  # noqa: BLE001
                    say(rule, "FAILED")
                    traceback.print_exc()
                    continue
                loss = -got.gather(-1, true).mean().item() - nll
                kl = (dense.exp() * (dense - got)).sum(-1).mean().item()
                agree = (dense.argmax(-1) == got.argmax(-1)).float().mean().item()
                found[sparsity, chunk, rule].append((loss, kl, agree))
                mean = torch.tensor(found[sparsity, chunk, rule]).mean(dim=0)
                tied = f" tie bin {sum(ties) / len(ties):.1%}" if ties else ""
                say(f"{path.stem[:20]:20} R {sparsity:g} T {chunk} {rule:9} ratio {2.718281828 ** loss:.4f} KL {kl:.4f} agree {agree:.4f} | mean of "
                    f"{len(found[sparsity, chunk, rule])}: ratio {2.718281828 ** mean[0]:.4f} KL {mean[1]:.4f} agree {mean[2]:.4f}{tied} "
                    f"({pairs_read(len(ids) - options.last, settings, dense_share):.1%} of pairs)")
