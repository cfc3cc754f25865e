"""Quality, measured: what is lost when a decode step reads only the tokens that signatures choose.

    python eval.py ppl --checkpoint_path checkpoints/smollm2-135m-instruct \\
        --signatures weights/smollm2-135m-instruct.safetensors --data books/*.txt --context 8192 --last 512 --ratios 16 32

ppl: the first tokens of each text are read densely, its last ones are decoded one by one, each given the true token before
it (teacher forcing): with everything in view, then with 1/ratio of the context. A ratio of perplexities of 1 loses nothing.
"""
import argparse
import json
import math
import shlex
import sys
from pathlib import Path

import torch
from torch import Tensor
from tqdm import tqdm

from checkpoint import load_model
from common import UserError, atomic_path, default_device, environment, run_command
from decode import Decoder, Sampling, prefill
from generate import read_text
from hash_attention import HashConfig, load_signatures, random_encoders
from model import SparseSettings, Transformer
from tokenizer import Tokenizer


@torch.inference_mode()
def likelihood(model: Transformer, decoder: Decoder, ids: Tensor, last: int) -> float:
    """Mean log-likelihood of the last `last` tokens of ids int64 [T], decoded after a dense prefill of the others."""
    start = len(ids) - last
    logits = prefill(model, ids[:start], 1)
    total = logits.float().log_softmax(-1)[ids[start]]
    for i in tqdm(range(start, len(ids) - 1), desc="decode", unit="tok", delay=2, leave=False):
        decoder.start(ids[i:i + 1], i)
        decoder.step()
        total = total + decoder.logits[0].float().log_softmax(-1)[ids[i + 1]]
    return total.item() / last


def ppl(options: argparse.Namespace) -> list[dict]:
    """Rows of results/quality_ppl.json: the perplexity ratio to dense of each budget over all texts, and text by text."""
    model = load_model(options.checkpoint_path, options.device, getattr(torch, options.precision))
    tokenizer = Tokenizer.load(options.checkpoint_path)
    if options.context > model.args.max_position:
        raise UserError(f"--context {options.context} is more than the model's {model.args.max_position}; give less")
    texts = {}
    for path in options.data:
        ids = tokenizer.encode(read_text(path))[:options.context]
        if len(ids) < options.context:
            raise UserError(f"{path} has {len(ids)} tokens, fewer than --context {options.context}; give longer texts")
        texts[path.stem] = torch.tensor(ids, device=options.device)
    if options.signatures is None:
        encoders, recipe = random_encoders(HashConfig(), model.fingerprint()), "random"
    else:
        encoders, about = load_signatures(options.signatures, model.fingerprint())
        recipe = about.get("recipe", "unknown")
    config = encoders[0].config
    dense: dict[str, float] = {}
    rows = []
    for ratio in [1, *options.ratios]:
        settings = None
        if ratio > 1:
            settings = SparseSettings(max(math.ceil(options.context / ratio), options.sink + options.recent), options.sink,
                                      options.recent)
        model.setup_caches(1, options.context, encoders, settings)
        decoder = Decoder(model, 1, Sampling(temperature=0), options.compile)
        decoder.prepare()
        found = {name: likelihood(model, decoder, ids, options.last) for name, ids in texts.items()}
        dense = dense or found
        mean = sum(dense[name] - found[name] for name in texts) / len(texts)
        rows.append({
            "model": options.checkpoint_path.name, "context": options.context, "last": options.last,
            "selector": "hash" if ratio > 1 else "dense", "recipe": recipe if ratio > 1 else None, "bits": config.bits,
            "query_bits": config.query_bits, "share": config.share, "ratio": ratio,
            "budget": settings.budget if settings else options.context, "precision": options.precision,
            "ppl": math.exp(-sum(found.values()) / len(texts)), "ppl_ratio": math.exp(mean),
            "per_text": {name: math.exp(dense[name] - found[name]) for name in texts},
        })
        row = rows[-1]
        spread = " ".join(f"{value:.4f}" for value in row["per_text"].values())
        print(f"{row['selector']:6} 1/{ratio:<3} budget {row['budget']:5}  perplexity {row['ppl']:7.3f}  "
              f"ratio {row['ppl_ratio']:.4f}  ({spread})", flush=True)
    return rows


def parse_options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    part = commands.add_parser("ppl", help="teacher-forced perplexity of long texts")
    part.add_argument("--checkpoint_path", type=Path, required=True)
    part.add_argument("--signatures", type=Path, help="file that train_hash.py wrote; without it random projections choose")
    part.add_argument("--data", type=Path, nargs="+", required=True, help="text files that no signature was trained on")
    part.add_argument("--context", type=int, default=8192, help="tokens of each text, the decoded ones included")
    part.add_argument("--last", type=int, default=512, help="tokens decoded one by one")
    part.add_argument("--ratios", type=int, nargs="+", default=[16, 32, 64], help="budget = context / ratio")
    part.add_argument("--sink", type=int, default=64)
    part.add_argument("--recent", type=int, default=128)
    part.add_argument("--device", default=default_device())
    part.add_argument("--precision", choices=("float32", "bfloat16"))
    part.add_argument("--compile", action="store_true")
    part.add_argument("--json", type=Path, help="write the rows here")
    part.set_defaults(run=ppl)
    options = parser.parse_args()
    if options.precision is None:
        options.precision = "bfloat16" if options.device.startswith("cuda") else "float32"
    if not 1 <= options.last < options.context:
        raise UserError(f"--last {options.last} is out of range; it must be at least 1 and below --context {options.context}")
    if min(options.ratios) < 2:
        raise UserError(f"--ratios {min(options.ratios)} is out of range; they must be at least 2")
    return options


def main() -> None:
    options = parse_options()
    rows = options.run(options)
    if options.json is not None:
        result = {**environment(), "command": shlex.join(["python", *sys.argv]), "rows": rows}
        with atomic_path(options.json) as beside:
            beside.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    run_command(main)
