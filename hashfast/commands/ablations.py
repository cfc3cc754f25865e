"""What each choice of the method is worth: attention mass that signatures catch on held-out text, one choice changed at a time.

usage: python -m hashfast ablations --checkpoint_path checkpoints/model --data books/*.txt --json results/ablations.json

The model runs once; every variant is trained on the same captured queries and keys, of a few layers, and judged on the same
sequences kept out of training. The rows are means over the layers done so far, written after each layer.
"""
import argparse
import json
import sys
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import torch
from torch import Tensor
from tqdm import tqdm

from hashfast.common import (
    Parser,
    UserError,
    atomic_path,
    check_device,
    check_writable,
    command_line,
    default_device,
    environment,
)
from hashfast.hash_attention import HashConfig, HashEncoder
from hashfast.model import Fingerprint
from hashfast.research.recipes import RECIPES
from hashfast.runtime.checkpoint import load_model
from hashfast.runtime.signatures import random_encoders
from hashfast.train_hash import (
    Sequence,
    attention_recall,
    attention_weights,
    capture,
    check_model,
    held_out_positions,
    make_sequences,
    read_texts,
    recall_curve,
    train_layer,
)

RATIOS = (16, 32, 64)


@dataclass(frozen=True)
class Variant:
    """recipe: one of recipes.py, or "random" (projections as they are).  bits, query_bits, depth, share: None is the recipe's.
    needles: retrieval documents among the training sequences.  value_norm: log |v| beside the key's channels.
    context_share: of each training sequence, the first part that is used; the judging is at full length.
    """
    name: str
    recipe: str = "listwise"
    bits: int | None = None
    query_bits: int | None = None
    depth: int | None = None
    share: str | None = None
    needles: bool = True
    value_norm: bool = False
    context_share: float = 1.0

    @property
    def config(self) -> HashConfig:
        given = {field: getattr(self, field) for field in ("bits", "query_bits", "depth", "share")}
        base = RECIPES[self.recipe].config if self.recipe != "random" else HashConfig()
        return replace(base, **{field: value for field, value in given.items() if value is not None})


VARIANTS = {variant.name: variant for variant in (
    Variant("ours"),
    Variant("random", "random"),
    Variant("hashattention", "hashattention"),
    Variant("hata", "hata"),
    *(Variant(f"{bits} bits", bits=bits) for bits in (16, 64, 128)),
    *(Variant(f"{bits}-bit query", query_bits=bits) for bits in (1, 2, 8)),
    *(Variant(f"depth {depth}", depth=depth) for depth in (2, 3)),
    Variant("per query head", share="query"),
    Variant("no needles", needles=False),
    Variant("log |v|", value_norm=True),
    Variant("1/4 of the context", context_share=0.25),
)}


@dataclass(frozen=True)
class Layer:
    """One layer's capture: what trains and what judges. Queries [Hq, T, D], keys and values [Hkv, T, D] per sequence."""
    queries: list[Tensor]
    keys: list[Tensor]
    values: list[Tensor]

    def part(self, sequences: slice) -> "Layer":
        return Layer(self.queries[sequences], self.keys[sequences], self.values[sequences])

    def with_value_norms(self) -> "Layer":
        """log |v| as one more channel of the keys, and 0 of the queries; attention stays what it was."""
        gain = ((self.keys[0].shape[-1] + 1) / self.keys[0].shape[-1]) ** 0.5  # undone by the scale of D + 1 channels
        keys = [torch.cat((k.float(), v.float().norm(dim=-1, keepdim=True).clamp(min=1e-6).log()), dim=-1)
                for k, v in zip(self.keys, self.values, strict=True)]
        return replace(self, keys=keys, queries=[torch.nn.functional.pad(q.float() * gain, (0, 1)) for q in self.queries])

    def cut(self, share: float) -> "Layer":
        return Layer(*([x[:, :int(share * x.shape[1])] for x in xs] for xs in (self.queries, self.keys, self.values)))


def train(variant: Variant, layer: Layer, asked: list[int], model: Fingerprint, args: argparse.Namespace) -> HashEncoder:
    """One variant's encoder of a captured layer, trained on its training sequences."""
    encoder = random_encoders(variant.config, replace(model, n_layer=1, head_dim=layer.keys[0].shape[-1]), args.seed)[0]
    encoder = encoder.to(layer.keys[0].device)
    if variant.recipe == "random":
        return encoder
    if not variant.needles:
        kept = [i for i, count in enumerate(asked) if count == 0]
        layer = Layer(*([xs[i] for i in kept] for xs in (layer.queries, layer.keys, layer.values)))
        asked = [0] * len(kept)
    if variant.context_share < 1:  # the questions are at the end, which is cut off
        layer, asked = layer.cut(variant.context_share), [0] * len(asked)
    return train_layer(RECIPES[variant.recipe], encoder, layer.queries, layer.keys, asked, args.steps, args.sink, args.recent,
                       args.seed)[0]


def judge(encoders: dict[str, HashEncoder], layer: Layer, sequences: list[Sequence], budgets: list[int],
          args: argparse.Namespace) -> dict[str, Tensor]:
    """Caught mass [budgets] of every variant, and of "window" and "oracle", mean over these sequences."""
    caught: dict[str, list[Tensor]] = {}
    norms = layer.with_value_norms()
    for i, sequence in enumerate(sequences):
        positions = held_out_positions(sequence).to(layer.keys[i].device)
        q, k = layer.queries[i][:, positions], layer.keys[i]
        weights = attention_weights(q, k, positions)
        for name, encoder in encoders.items():
            inputs = (norms.queries[i][:, positions], norms.keys[i]) if VARIANTS[name].value_norm else (q, k)
            curve = recall_curve(encoder, weights, *inputs, positions, budgets, args.sink, args.recent)
            caught.setdefault(name, []).append(curve.mean(dim=0).cpu())
        bounds = [attention_recall({}, q, k, positions, budget, args.sink, args.recent) for budget in budgets]
        for name in ("window", "oracle"):
            caught.setdefault(name, []).append(torch.tensor([bound[name] for bound in bounds]))
    return {name: torch.stack(curves).mean(dim=0) for name, curves in caught.items()}


def make_rows(found: list[dict[str, dict[str, Tensor]]], budgets: list[int], model: Fingerprint) -> list[dict]:
    """One row per variant and ratio from found[layer][kind of text][variant]."""
    rows = []
    for name in found[0]["books"]:
        about: dict = {"name": name}
        if name in VARIANTS:
            config = VARIANTS[name].config
            heads = config.signature_heads(model.n_head, model.n_kv_head)
            about = asdict(VARIANTS[name]) | {"bits": config.bits, "query_bits": config.query_bits, "depth": config.depth,
                                              "share": config.share,
                                              "bytes_per_token": 4 * config.words * heads / model.n_kv_head}
        for i, ratio in enumerate(RATIOS):
            masses = {f"mass_{kind}": float(sum(layer[kind][name][i] for layer in found) / len(found)) for kind in found[0]}
            rows.append({**about, "ratio": ratio, "budget": budgets[i], **masses})
    return rows


def table(rows: list[dict]) -> str:
    kinds = [key for key in rows[0] if key.startswith("mass_")]
    lines = [f"{'variant':20} " + "  ".join(f"{kind.removeprefix('mass_')}: " + ", ".join(f"1/{r}" for r in RATIOS)
                                            for kind in kinds) + "   bytes per token and KV head"]
    for i in range(0, len(rows), len(RATIOS)):
        group = rows[i:i + len(RATIOS)]
        masses = "    ".join("  ".join(f"{row[kind]:.3f}" for row in group) for kind in kinds)
        lines.append(f"{group[0]['name']:20} {masses}   {group[0].get('bytes_per_token', 0):g}")
    return "\n".join(lines)


def parse_arguments() -> argparse.Namespace:
    parser = Parser(description=__doc__.splitlines()[0])
    add = parser.add_argument
    add("--checkpoint_path", type=Path, required=True)
    add("--data", nargs="+", required=True, metavar="FILE", help="text files or globs")
    add("--layers", type=int, nargs="+", help="default: six, evenly spaced")
    add("--variants", nargs="+", choices=VARIANTS, default=list(VARIANTS), help="default: all")
    add("--context", type=int, default=8192)
    add("--sequences", type=int, default=16)
    add("--needles", type=float, default=0.3, help="share of the sequences that are retrieval documents")
    add("--steps", type=int, default=300)
    add("--sink", type=int, default=64)
    add("--recent", type=int, default=128)
    add("--seed", type=int, default=0)
    add("--device", default=default_device())
    add("--precision", choices=("bfloat16", "float16", "float32"), default="bfloat16", help="of the model")
    add("--json", type=Path, help="write the rows here")
    args = parser.parse_args()
    check_device(args.device)
    check_writable("--json", args.json)
    if args.context * min(VARIANTS[name].context_share for name in args.variants) < 2 * (args.sink + args.recent + 64):
        raise UserError(f"--context {args.context} leaves too few tokens to choose among; give a longer one")
    if not 1 <= args.sequences or not 0 <= args.needles < 1 or args.steps < 1:
        raise UserError("--sequences and --steps must be at least 1, and --needles from 0 to below 1")
    return args


def main() -> None:
    args = parse_arguments()
    texts = read_texts(args.data)
    if args.device.startswith("cuda"):
        torch.set_float32_matmul_precision("high")
    model = load_model(args.checkpoint_path, args.device, getattr(torch, args.precision))
    check_model(args, model)
    training, kept = make_sequences(args, texts)
    fingerprint = model.fingerprint()
    layers = args.layers or sorted({round(i * (model.args.n_layer - 1) / 6) for i in range(1, 7)})
    del model.layers[max(layers) + 1:]
    budgets = [max(args.context // ratio, args.sink + args.recent) for ratio in RATIOS]
    if budgets[-1] <= args.sink + args.recent:
        print(f"warning: 1/{RATIOS[-1]} of {args.context} tokens is no more than --sink and --recent: nothing is chosen; "
              "give a longer --context", file=sys.stderr)
    found = []
    every = training + [sequence for sequences in kept.values() for sequence in sequences]
    progress = tqdm(total=len(layers) * len(args.variants), desc="variants")
    for i, captured in enumerate(capture(model, every)):
        if i not in layers:
            continue
        layer = Layer(*captured)
        trained = layer.part(slice(len(training)))
        encoders = {}
        for name in args.variants:
            variant = VARIANTS[name]
            encoders[name] = train(variant, trained.with_value_norms() if variant.value_norm else trained,
                                   [sequence.asked for sequence in training], fingerprint, args)
            progress.update()
        first = len(training)
        found.append({})
        for kind, sequences in kept.items():
            part = layer.part(slice(first, first + len(sequences)))
            found[-1][kind] = judge(encoders, part, sequences, budgets, args)
            first += len(sequences)
        rows = make_rows(found, budgets, fingerprint)
        if args.json is not None:
            about = {"model": args.checkpoint_path.resolve().name, "context": args.context, "layers": layers[:len(found)],
                     "steps": args.steps, "sequences": args.sequences, "seed": args.seed}
            with atomic_path(args.json) as beside:
                result = {**environment(), "command": command_line(), **about, "rows": rows}
                beside.write_text(json.dumps(result, indent=1) + "\n")
    progress.close()
    print(table(rows))
