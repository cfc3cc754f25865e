"""Train signatures for a frozen model: capture its queries and keys layer by layer, fit each layer's encoders to its attention.

    python train_hash.py --checkpoint_path checkpoints/model --data books/*.txt --out weights/model.safetensors

The model is run one layer at a time over all training sequences, so that memory holds their hidden states and one layer's
queries, keys and values. recipes.py holds the losses and their optimisers. The file also says how to spread a budget over
layers and heads (budgets.py), as measured on sequences kept out of training.

Symbols: T sequence length, n query positions of one step, Hq query heads, Hkv key/value heads, Hs signature heads, D head_dim,
b signature bits, d model width.
"""
import argparse
import glob
import hashlib
import json
import os
import random
import shutil
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from tqdm import tqdm

from hashfast.common import (
    Parser,
    UserError,
    atomic_path,
    check_device,
    check_writable,
    default_device,
    environment,
    run_command,
)
from hashfast.hash_attention import HashConfig, HashEncoder, select_tokens_reference
from hashfast.model import Fingerprint, Transformer
from hashfast.research.budgets import UNIT, calibrate, curve_units
from hashfast.research.needles import make_needle
from hashfast.research.recipes import RECIPES, Recipe
from hashfast.runtime.checkpoint import load_model
from hashfast.runtime.signatures import load_signatures, random_encoders, round_weights, save_signatures
from hashfast.runtime.tokenizer import Tokenizer

POSITIONS = 48  # query positions of one training step
HELD_OUT = 2  # sequences kept out of training, of books and of retrieval documents each
HELD_OUT_POSITIONS = 32
# common_words is left out: its answer is a count over the whole list, which no selection of tokens finds
NEEDLE_TASKS = ("multi_key", "every_line_key", "uuids", "variable_tracking", "multi_value", "single")


# ------------------------------------------------------------------------------------------------------------------ data

@dataclass(frozen=True)
class Sequence:
    """Token ids [1, T]; the last `asked` of them ask for and give what was hidden in the text (0: a book)."""
    ids: Tensor
    asked: int = 0


def read_texts(patterns: list[str]) -> dict[str, str]:
    """The texts of all files that the names or globs give, by path, in sorted order."""
    paths: set[str] = set()
    for pattern in patterns:
        found = [pattern] if Path(pattern).exists() else glob.glob(pattern, recursive=True)
        if not found:
            raise UserError(f"--data {pattern} names no file; give text files or quoted globs")
        paths.update(found)
    texts = {}
    for path in sorted(paths):
        try:
            texts[path] = Path(path).read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise UserError(f"cannot read {path} as UTF-8 text ({error}); give text files to --data") from error
    return texts


def in_threads(make: Callable[[int], Sequence], count: int) -> list[Sequence]:
    """make(0) .. make(count - 1); a tokenizer leaves the interpreter to other threads while it works."""
    with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:
        return list(pool.map(make, range(count)))


def book_sequences(texts: dict[str, str], encode: Callable[[str], list[int]], count: int, context: int,
                   seed: int) -> list[Sequence]:
    """`count` stretches of `context` tokens that do not overlap, from one text after the other."""
    parts = -(-count // len(texts))

    def make(i: int) -> Sequence:
        path, text = list(texts.items())[i % len(texts)]
        size = len(text) // parts
        part = text[i // len(texts) * size:][:size]
        start = random.Random(f"book {seed} {i}").randrange(max(1, size - 8 * context))  # a token is seldom over 8 characters
        ids = encode(part[start:start + 6 * context])  # enough for most prose, and a third of the time
        if len(ids) < context + 8:  # the cut may have changed the last tokens
            ids = encode(part[start:start + 16 * context])
        if len(ids) < context:
            raise UserError(f"{path} is too short: {parts} stretches of {context} tokens are needed of each text; "
                            "give more text to --data, fewer --sequences or a smaller --context")
        return Sequence(torch.tensor([ids[:context]]))

    return in_threads(make, count)


def needle_sequences(texts: dict[str, str], encode: Callable[[str], list[int]], count: int, context: int,
                     seed: int) -> list[Sequence]:
    """`count` synthetic retrieval documents of at most `context` tokens, from the train split of needles.py."""
    def make(i: int) -> Sequence:
        filler = list(texts.values())[-1 - i % len(texts)]
        needle = make_needle(NEEDLE_TASKS[i % len(NEEDLE_TASKS)], context, filler, seed * 100_003 + i, "train",
                             lambda text: len(encode(text)))
        ids = encode(needle.text)
        return Sequence(torch.tensor([ids]), asked=len(ids) - len(encode(needle.context)))

    return in_threads(make, count)


# --------------------------------------------------------------------------------------------------------------- capture

@torch.no_grad()
def capture(model: Transformer, sequences: list[Sequence]) -> Iterator[tuple[list[Tensor], list[Tensor], list[Tensor]]]:
    """Queries [Hq, T, D], keys and values [Hkv, T, D] of every sequence, after RoPE, one layer after the other.

    On the device at a time: 2 T (d + (Hq + 2 Hkv) D) bytes of bfloat16 per sequence (20 of 32K: 4.7 GB where d = Hq D = 1536
    and Hkv = 2, 13.4 GB where it is 4096 and Hkv = 8), beside the weights and what one layer's pass over one sequence needs.
    """
    device = model.output.weight.device
    hidden = [model.tok_embeddings(sequence.ids.to(device)) for sequence in sequences]
    for block in model.layers:
        queries, keys, values = [], [], []
        for i, x in enumerate(hidden):
            cos, sin = model.rope(torch.arange(x.shape[1], device=device)[None])
            hidden[i], q, k, v = block.prompt(x, cos, sin)
            queries.append(q[0].transpose(0, 1).contiguous())
            keys.append(k[0].contiguous())
            values.append(v[0].contiguous())
        yield queries, keys, values


def attention_weights(q: Tensor, k: Tensor, positions: Tensor) -> Tensor:
    """Causal attention weights. q [Hq, n, D], k [Hkv, T, D], positions int64 [n] of the queries -> float32 [Hq, n, T]."""
    grouped = q.float().unflatten(0, (len(k), -1)).flatten(1, 2)  # [Hkv, G * n, D]
    # scaled afterwards: products of bfloat16 are exact in TF32, scaled queries would not be
    logits = (grouped @ k.float().transpose(1, 2)).mul_(q.shape[-1] ** -0.5).unflatten(1, (-1, len(positions)))
    hidden = torch.arange(k.shape[1], device=k.device) > positions[:, None]
    return logits.masked_fill_(hidden, float("-inf")).softmax(dim=-1).flatten(0, 1)


def selectable_region(positions: Tensor, length: int, sink: int, recent: int) -> Tensor:
    """The tokens that a query chooses among: neither sink nor recent. positions int64 [n] -> bool [n, length]."""
    token = torch.arange(length, device=positions.device)
    return (token >= sink) & (token <= positions[:, None] - recent)


# ----------------------------------------------------------------------------------------------------------------- train

@dataclass(frozen=True)
class Standard:
    """Mean and standard deviation per head and channel, [H, 1, D] each."""
    mean: Tensor
    std: Tensor

    @staticmethod
    def of(heads: list[Tensor]) -> "Standard":
        """Over all positions of all sequences [H, T, D], one sequence in float32 at a time."""
        count = sum(x.shape[1] for x in heads)
        mean = sum(x.float().sum(dim=1, keepdim=True) for x in heads) / count
        variance = sum((x.float() - mean).square().sum(dim=1, keepdim=True) for x in heads) / count
        return Standard(mean, variance.sqrt().clamp(min=1e-6))

    def __call__(self, x: Tensor) -> Tensor:
        return (x.float() - self.mean) / self.std

    def fold(self, layer: nn.Module) -> None:
        """Make a first layer that was trained on standardised inputs take them as they are.

        Its weights are rounded as in the file before its bias is taken from them: where a mean is many deviations, so is what
        rounding does to it.
        """
        repeat = len(layer.weight) // len(self.mean)
        mean, std = self.mean.repeat_interleave(repeat, dim=0), self.std.repeat_interleave(repeat, dim=0)
        layer.weight.div_(std.transpose(1, 2))
        round_weights(layer)
        layer.bias.sub_((mean @ layer.weight).squeeze(1))


def draw_positions(lengths: list[int], asked: list[int], steps: int, first: int, seed: int) -> tuple[list[int], Tensor]:
    """The sequence of each step and its query positions, int64 [steps, POSITIONS], from `first` on.

    Where a question was asked, half of the positions are in it. Drawn all at once, so that no step waits for the device.
    """
    choose = torch.Generator().manual_seed(seed)
    sequences, positions = [], torch.empty(steps, POSITIONS, dtype=torch.int64)
    for row in positions:
        s = int(torch.randint(len(lengths), (), generator=choose))
        row[:] = torch.randint(first, lengths[s], (POSITIONS,), generator=choose)
        if asked[s]:
            row[::2] = torch.randint(max(first, lengths[s] - asked[s]), lengths[s], (POSITIONS // 2,), generator=choose)
        sequences.append(s)
    return sequences, positions


def train_layer(recipe: type[Recipe], encoder: HashEncoder, queries: list[Tensor], keys: list[Tensor], asked: list[int],
                steps: int, sink: int, recent: int, seed: int) -> tuple[HashEncoder, list[float]]:
    """Train one layer's encoder in place. queries [Hq, T, D], keys [Hkv, T, D] per sequence -> encoder, loss of each step."""
    training = recipe(encoder)
    optimizer = training.optimizer()
    schedule = training.schedule(optimizer, steps)
    of_query, of_key = Standard.of(queries), Standard.of(keys)
    inputs = [of_key(k) for k in keys] if recipe.standardise else keys
    # a query before sink + recent + 64 has too few tokens to choose among
    chosen, drawn = draw_positions([k.shape[1] for k in keys], asked, steps, sink + recent + 64, seed)
    losses = []
    for step, (s, positions) in enumerate(zip(chosen, drawn.to(keys[0].device), strict=True)):
        q = queries[s][:, positions]
        weights = attention_weights(q, keys[s], positions)
        selectable = selectable_region(positions, keys[s].shape[1], sink, recent)
        q = of_query(q) if recipe.standardise else q.float()
        loss = training(q, inputs[s].float(), weights, selectable, step / steps)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
        losses.append(loss.detach())
    encoder = training.finish()
    if recipe.standardise:
        of_query.fold(encoder.query[0])
        of_key.fold(encoder.key[0])
    return encoder, torch.stack(losses).tolist()


# -------------------------------------------------------------------------------------------------------------- held out

@torch.inference_mode()
def recall_curve(encoder: HashEncoder, weights: Tensor, q: Tensor, k: Tensor, positions: Tensor, budgets: list[int], sink: int,
                 recent: int) -> Tensor:
    """Share of the attention mass that each of these budgets catches, mean over positions and the heads of a group.

    weights [Hq, n, T] of the queries q [Hq, n, D] at positions int64 [n], k [Hkv, T, D] -> float32 [Hs, budgets].
    """
    planes = encoder.encode_queries(q.transpose(0, 1))  # the positions are the batch: [n, Hs, 1 + P, W]
    signatures = encoder.encode_keys(k[None]).expand(len(positions), -1, -1, -1)
    indices = select_tokens_reference(planes, signatures, (positions + 1).int(), max(budgets), sink, recent,
                                      shift=encoder.shift)
    mass = weights.unflatten(0, (encoder.n_signature_head, -1)).mean(dim=1).transpose(0, 1)  # [n, Hs, T]
    mass = mass.gather(-1, indices.clamp(min=0).long()).mul(indices >= 0)
    # by rank, as the reference gives them, so that a smaller budget's tokens come first
    return mass.cumsum(dim=-1).mean(dim=0)[:, torch.tensor(budgets, device=q.device) - 1]


@torch.inference_mode()
def attention_recall(encoders: dict[str, HashEncoder], q: Tensor, k: Tensor, positions: Tensor, budget: int, sink: int,
                recent: int) -> dict[str, float]:
    """Share of the attention mass that `budget` tokens catch, mean over query heads and positions.

    q [Hq, n, D] of the queries at positions int64 [n], k [Hkv, T, D]. Besides each encoder: "window" (sink and recent alone)
    and "oracle" (the best tokens for the summed mass of each KV head's group).
    """
    weights = attention_weights(q, k, positions)  # [Hq, n, T]
    selectable = selectable_region(positions, k.shape[1], sink, recent)
    group_mass = (weights * selectable).unflatten(0, (len(k), -1)).mean(dim=1)  # [Hkv, n, T]
    window = (weights * ~selectable).sum(dim=-1).mean()
    shares = {"window": float(window),
              "oracle": float(window + group_mass.topk(budget - sink - recent, dim=-1).values.sum(dim=-1).mean())}
    for name, encoder in encoders.items():
        shares[name] = float(recall_curve(encoder, weights, q, k, positions, [budget], sink, recent).mean())
    return shares


def held_out_positions(sequence: Sequence) -> Tensor:
    """Where a held-out sequence is judged: int64 [n], the end of a question and its answer, or the last quarter of a book."""
    length = sequence.ids.shape[1]
    if sequence.asked:
        return torch.arange(length - min(sequence.asked, HELD_OUT_POSITIONS), length)
    return torch.linspace(0.75 * length, length - 1, HELD_OUT_POSITIONS).long()


def mean_shares(shares: list[dict[str, float]]) -> dict[str, float]:
    return {name: sum(share[name] for share in shares) / len(shares) for name in shares[0]}


def table(held_out: dict[str, list[dict[str, float]]]) -> str:
    """Caught mass by layer: one line a layer and one of means, the columns of each kind of text side by side."""
    columns = ("window", "random", "trained", "oracle")
    lines = ["layer  " + "   ".join(f"{kind + ': ' + ', '.join(columns):36}" for kind in held_out)]
    rows = list(zip(*held_out.values(), strict=True)) + [[mean_shares(layers) for layers in held_out.values()]]
    for i, row in enumerate(rows):
        name = "mean" if i == len(rows) - 1 else str(i)
        lines.append(f"{name:5}  " + "   ".join(f"{'  '.join(f'{share[c]:.3f}' for c in columns):36}" for share in row))
    return "\n".join(lines)


# ---------------------------------------------------------------------------------------------------------------- resume

class Partial:
    """The layers that a run has finished, one file each in OUT.partial, for a run with --resume to go on from."""

    def __init__(self, out: Path, settings: dict, resume: bool) -> None:
        self.folder = out.with_name(out.name + ".partial")
        self.settings = json.loads(json.dumps(settings))  # as a file gives them back
        if not resume:
            self.remove()

    def load(self, layer: int) -> tuple[dict[str, Tensor], dict] | None:
        """What `save` was given for this layer; None where the run had not come so far."""
        path = self.folder / f"{layer}.safetensors"
        if not path.exists():
            return None
        try:
            with safe_open(path, framework="pt") as file:
                about = json.loads(file.metadata()["hashfast"])
                tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (not a dict)
            before = about["settings"]
        except (SafetensorError, KeyError, TypeError, ValueError) as error:
            raise UserError(f"{path} is damaged ({error}); delete {self.folder} or leave --resume out") from error
        for name, here in self.settings.items():
            if before.get(name) != here:
                raise UserError(f"--resume: {self.folder} is of a run with {name} {before.get(name)}, not {here}; "
                                "give the same arguments, or leave --resume out to start again")
        return tensors, about["found"]

    def save(self, layer: int, tensors: dict[str, Tensor], found: dict) -> None:
        tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
        with atomic_path(self.folder / f"{layer}.safetensors") as beside:
            save_file(tensors, beside, metadata={"hashfast": json.dumps({"settings": self.settings, "found": found})})

    def remove(self) -> None:
        shutil.rmtree(self.folder, ignore_errors=True)


# --------------------------------------------------------------------------------------------------------------- command

def parse_arguments() -> argparse.Namespace:
    parser = Parser(description=__doc__.splitlines()[0])
    parser.add_argument("--checkpoint_path", type=Path, required=True, help="folder of the model in Hugging Face's format")
    parser.add_argument("--data", nargs="+", required=True, metavar="FILE", help="text files or globs to train on")
    parser.add_argument("--out", type=Path, required=True, help="the signatures file to write")
    parser.add_argument("--context", type=int, default=8192, help="tokens per training sequence (default: 8192)")
    parser.add_argument("--sequences", type=int, default=16, help="training sequences (default: 16)")
    parser.add_argument("--needles", type=float, default=0.3, help="share of them that are retrieval documents (default: 0.3)")
    parser.add_argument("--recipe", choices=RECIPES, default="listwise", help="sets the defaults of the next five")
    parser.add_argument("--bits", type=int, help="signature bits per token and signature head")
    parser.add_argument("--query_bits", type=int, help="bits per query weight; 1 = signs alone")
    parser.add_argument("--depth", type=int, help="layers of the encoders")
    parser.add_argument("--hidden", type=int, help="width of their inner layers, where --depth is more than 1")
    parser.add_argument("--share", choices=("kv", "query"), help="one signature per KV head or per query head")
    parser.add_argument("--steps", type=int, default=300, help="training steps per layer (default: 300)")
    parser.add_argument("--layers", type=int, nargs="+", help="train these alone; the others stay random projections")
    parser.add_argument("--sink", type=int, default=64, help="first tokens that are always attended to (default: 64)")
    parser.add_argument("--recent", type=int, default=128, help="last tokens that are always attended to (default: 128)")
    parser.add_argument("--resume", action="store_true", help="go on from the layers that OUT.partial holds")
    parser.add_argument("--calibrate", action="store_true", help="measure --out as it is: held-out figures and budgets anew")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--device", default=default_device())
    parser.add_argument("--precision", choices=("bfloat16", "float16", "float32"), default="bfloat16", help="of the model")
    return parser.parse_args()


def check_arguments(args: argparse.Namespace) -> None:
    check_device(args.device)
    check_writable("--out", args.out)
    if not 0 <= args.seed < 2 ** 31:
        raise UserError(f"--seed must be 0 to {2 ** 31 - 1}, not {args.seed}")
    if args.sequences < 1:
        raise UserError(f"--sequences must be at least 1, not {args.sequences}")
    if args.steps < 1:
        raise UserError(f"--steps must be at least 1, not {args.steps}")
    if not 0 <= args.needles <= 1:
        raise UserError(f"--needles must be 0 to 1, not {args.needles}")
    if args.sink < 0 or args.recent < 1:
        raise UserError(f"--sink must be at least 0 and --recent at least 1, not {args.sink} and {args.recent}")
    if args.context < 2 * (args.sink + args.recent + 64):
        raise UserError(f"--context {args.context} leaves too few tokens to choose among; give at least "
                        f"{2 * (args.sink + args.recent + 64)} or a smaller --sink and --recent")


def check_model(args: argparse.Namespace, model: Transformer) -> None:
    longest = min(model.args.max_position or args.context, model.args.sliding_window or args.context)
    if args.context > longest:
        raise UserError(f"--context {args.context} is over the model's {longest}; give at most that")
    for layer in args.layers or []:
        if not 0 <= layer < model.args.n_layer:
            raise UserError(f"--layers {layer} is not a layer of this model; give 0 to {model.args.n_layer - 1}")


def make_sequences(args: argparse.Namespace, texts: dict[str, str]) -> tuple[list[Sequence], dict[str, list[Sequence]]]:
    """The sequences to train on, and those kept out of training by kind ("books", "needles")."""
    encode = Tokenizer.load(args.checkpoint_path).encode
    n_needle = round(args.needles * args.sequences)
    kept_needles = HELD_OUT if n_needle else 0
    books = book_sequences(texts, encode, args.sequences - n_needle + HELD_OUT, args.context, args.seed)
    needles = needle_sequences(texts, encode, n_needle + kept_needles, args.context, args.seed)
    kept = {"books": books[:HELD_OUT], "needles": needles[:kept_needles]}
    return books[HELD_OUT:] + needles[kept_needles:], {kind: sequences for kind, sequences in kept.items() if sequences}


def judge_layer(judged: dict[str, HashEncoder], kept: dict[str, list[Sequence]], queries: list[Tensor], keys: list[Tensor],
                budget: int, sink: int, recent: int) -> tuple[dict[str, dict[str, float]], Tensor]:
    """Caught mass of one layer by kind of text, and the curve of "trained" by units, float32 [Hs, J].

    queries and keys: of the sequences of `kept`, in their order.
    """
    captured = zip(queries, keys, strict=True)
    masses, curves = {}, []
    for kind, sequences in kept.items():
        shares = []
        for sequence, (q, k) in zip(sequences, captured, strict=False):
            positions = held_out_positions(sequence).to(k.device)
            q = q[:, positions]
            shares.append(attention_recall(judged, q, k, positions, budget, sink, recent))
            units = curve_units(k.shape[1], sink + recent)
            curves.append(recall_curve(judged["trained"], attention_weights(q, k, positions), q, k, positions,
                                       [sink + recent + UNIT * (1 + j) for j in range(units)], sink, recent))
        masses[kind] = mean_shares(shares)
    shortest = min(curve.shape[1] for curve in curves)
    return masses, torch.stack([curve[:, :shortest] for curve in curves]).mean(dim=0)


def run_settings(args: argparse.Namespace, config: HashConfig, model: Transformer, texts: dict[str, str]) -> dict:
    """All that a layer's result depends on, for Partial."""
    names = ("recipe", "context", "sequences", "needles", "steps", "layers", "sink", "recent", "seed", "device", "precision",
             "calibrate")
    digest = hashlib.sha256("\0".join(texts.values()).encode()).hexdigest()[:16]
    return {**asdict(config), **{name: getattr(args, name) for name in names}, "data": digest, **asdict(model.fingerprint()),
            "checkpoint_path": str(args.checkpoint_path.resolve()), "torch": torch.__version__}


def main() -> None:
    args = parse_arguments()
    check_arguments(args)
    recipe = RECIPES[args.recipe]
    given = {field: getattr(args, field) for field in ("bits", "query_bits", "depth", "hidden", "share")}
    config = replace(recipe.config, **{field: value for field, value in given.items() if value is not None})
    if args.hidden is not None and config.depth == 1:
        raise UserError("--hidden is the width of inner layers and --depth 1 has none; give --depth 2 or 3, or leave it out")
    texts = read_texts(args.data)
    begin = time.perf_counter()
    if args.device.startswith("cuda"):
        torch.set_float32_matmul_precision("high")  # TF32: codes are learned as well, several times as fast
    model = load_model(args.checkpoint_path, args.device, getattr(torch, args.precision))
    check_model(args, model)
    training, kept = make_sequences(args, texts)

    window = args.sink + args.recent
    budget = max(args.context // 16, window + UNIT)
    fingerprint: Fingerprint = model.fingerprint()
    encoders, before = load_signatures(args.out, fingerprint) if args.calibrate else (
        random_encoders(config, fingerprint, args.seed), {})
    config = encoders[0].config
    untrained = random_encoders(config, fingerprint, args.seed + 1)
    partial = Partial(args.out, run_settings(args, config, model, texts), args.resume)
    masses, curves = [], []
    every = training + [sequence for sequences in kept.values() for sequence in sequences]
    layers = tqdm(capture(model, every), total=fingerprint.n_layer, desc="layers", unit="layer")
    for i, (queries, keys, values) in enumerate(layers):
        done = partial.load(i)
        if done is not None:
            curve = done[0].pop("curve")
            encoders[i].load_state_dict(done[0])
            mass = done[1]
        else:
            encoders[i].to(args.device)
            if not args.calibrate and (args.layers is None or i in args.layers):
                encoders[i], losses = train_layer(
                    recipe, encoders[i], queries[:len(training)], keys[:len(training)], [s.asked for s in training], args.steps,
                    args.sink, args.recent, args.seed * 100_003 + i)
                layers.set_postfix(loss=f"{sum(losses[-20:]) / len(losses[-20:]):.3f}")
            round_weights(encoders[i])  # what is judged is what the file will hold
            mass, curve = judge_layer({"random": untrained[i].to(args.device), "trained": encoders[i]}, kept,
                                      queries[len(training):], keys[len(training):], budget, args.sink, args.recent)
            partial.save(i, encoders[i].state_dict() | {"curve": curve}, mass)
        masses.append(mass)
        curves.append(curve.cpu())
        del queries, keys, values  # the next layer's need the room

    held_out = {kind: [mass[kind] for mass in masses] for kind in kept}
    print(f"attention mass caught by {budget} of {args.context} tokens, on sequences kept out of training")
    print(table(held_out))
    provenance = before if args.calibrate else {
        "recipe": args.recipe, "steps": args.steps, "context": args.context, "sequences": args.sequences,
        "needles": sum(sequence.asked > 0 for sequence in training), "data": [Path(path).name for path in texts],
        "layers": args.layers, "seed": args.seed, "precision": args.precision,
        "seconds": round(time.perf_counter() - begin), "environment": environment(),
    }
    provenance |= {"budgets": calibrate(torch.stack(curves), args.context, window),
                   "held_out": {"budget": budget, "sink": args.sink, "recent": args.recent, "mass": held_out}}
    save_signatures(args.out, encoders, fingerprint, provenance)
    partial.remove()
    print(f"{args.out}: {fingerprint.n_layer} layers in {time.perf_counter() - begin:.0f} s")


if __name__ == "__main__":
    run_command(main)
