"""Train signatures for a frozen model: capture its queries and keys layer by layer, fit each layer's encoders to its attention.

    python train_hash.py --checkpoint_path checkpoints/model --data books/*.txt --out weights/model.safetensors

The model is run one layer at a time over all training sequences, so that memory holds their hidden states and one layer's
queries and keys. Three recipes: `Listwise` (ours), `HashAttention` and `Hata` (the two papers', to compare with).

Symbols: T sequence length, n query positions of one step, Hq query heads, Hkv key/value heads, Hs signature heads, D head_dim,
b signature bits, d model width.
"""
import argparse
import glob
import os
import random
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from tqdm import tqdm

from checkpoint import load_model
from common import Parser, UserError, check_device, default_device, environment, run_command
from hash_attention import Fingerprint, HashConfig, HashEncoder, random_encoders, save_signatures, select_tokens_reference
from model import Transformer, causal_attention
from needles import make_needle
from tokenizer import Tokenizer

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


def book_sequences(texts: dict[str, str], encode: Callable[[str], list[int]], count: int, context: int,
                   seed: int) -> list[Sequence]:
    """`count` stretches of `context` tokens that do not overlap, from one text after the other."""
    parts = -(-count // len(texts))
    sequences = []
    for i in range(count):
        path, text = list(texts.items())[i % len(texts)]
        size = len(text) // parts
        part = text[i // len(texts) * size:][:size]
        start = random.Random(f"book {seed} {i}").randrange(max(1, size - 8 * context))  # a token is seldom over 8 characters
        ids = encode(part[start:start + 16 * context])[:context]
        if len(ids) < context:
            raise UserError(f"{path} is too short: {parts} stretches of {context} tokens are needed of each text; "
                            "give more text to --data, fewer --sequences or a smaller --context")
        sequences.append(Sequence(torch.tensor([ids])))
    return sequences


def needle_sequences(texts: dict[str, str], encode: Callable[[str], list[int]], count: int, context: int,
                     seed: int) -> list[Sequence]:
    """`count` synthetic retrieval documents of at most `context` tokens, from the train split of needles.py."""
    sequences = []
    for i in range(count):
        filler = list(texts.values())[-1 - i % len(texts)]
        needle = make_needle(NEEDLE_TASKS[i % len(NEEDLE_TASKS)], context, filler, seed * 100_003 + i, "train",
                             lambda text: len(encode(text)))
        ids = encode(needle.text)
        sequences.append(Sequence(torch.tensor([ids]), asked=len(ids) - len(encode(needle.context))))
    return sequences


# --------------------------------------------------------------------------------------------------------------- capture

@torch.no_grad()
def capture(model: Transformer, sequences: list[Sequence]) -> Iterator[tuple[list[Tensor], list[Tensor]]]:
    """Queries [Hq, T, D] and keys [Hkv, T, D] after RoPE of every sequence, one layer after the other."""
    device = model.output.weight.device
    hidden = [model.tok_embeddings(sequence.ids.to(device)) for sequence in sequences]
    for block in model.layers:
        queries, keys = [], []
        for i, x in enumerate(hidden):
            cos, sin = model.rope(torch.arange(x.shape[1], device=device)[None])
            q, k, v = block.attention.project(block.attention_norm(x), cos, sin)
            hidden[i] = block.finish(x, causal_attention(q, k, v))
            queries.append(q[0].transpose(0, 1).contiguous())
            keys.append(k[0].contiguous())
        yield queries, keys


def attention_weights(q: Tensor, k: Tensor, positions: Tensor) -> Tensor:
    """Causal attention weights. q [Hq, n, D], k [Hkv, T, D], positions int64 [n] of the queries -> float32 [Hq, n, T]."""
    grouped = (q.float() * q.shape[-1] ** -0.5).unflatten(0, (len(k), -1)).flatten(1, 2)  # [Hkv, G * n, D]
    logits = (grouped @ k.float().transpose(1, 2)).unflatten(1, (-1, len(positions)))
    hidden = torch.arange(k.shape[1], device=k.device) > positions[:, None]
    return logits.masked_fill_(hidden, float("-inf")).softmax(dim=-1).flatten(0, 1)


def selectable_region(positions: Tensor, length: int, sink: int, recent: int) -> Tensor:
    """The tokens that a query chooses among: neither sink nor recent. positions int64 [n] -> bool [n, length]."""
    token = torch.arange(length, device=positions.device)
    return (token >= sink) & (token <= positions[:, None] - recent)


# --------------------------------------------------------------------------------------------------------------- recipes

class Recipe(nn.Module):
    """How one layer's encoder is trained: a loss over some query positions of one sequence, and an optimiser.

    Inputs are standardised per channel where `standardise` says so, from statistics of the layer's training sequences.
    """
    config = HashConfig()
    standardise = True

    def __init__(self, encoder: HashEncoder) -> None:
        super().__init__()
        self.encoder = encoder.requires_grad_(True)

    def forward(self, q: Tensor, k: Tensor, weights: Tensor, selectable: Tensor, progress: float) -> Tensor:
        """The loss. q [Hq, n, D], k [Hkv, T, D], weights [Hq, n, T], selectable bool [n, T], progress 0 to 1 -> scalar."""
        raise NotImplementedError

    def optimizer(self) -> torch.optim.Optimizer:
        raise NotImplementedError

    def schedule(self, optimizer: torch.optim.Optimizer, steps: int) -> torch.optim.lr_scheduler.LRScheduler:
        return torch.optim.lr_scheduler.ConstantLR(optimizer, factor=1.0)

    def finish(self) -> HashEncoder:
        return self.encoder.requires_grad_(False)

    def codes(self, q: Tensor, k: Tensor) -> tuple[Tensor, Tensor]:
        """Real-valued codes of queries [Hs, G, n, b] and keys [Hs, T, b]."""
        encoder = self.encoder
        return encoder.query_codes(q[None])[0].unflatten(0, (-1, encoder.group)), encoder.key_codes(k[None])[0]


class Listwise(Recipe):
    """Ours: the scores of the selectable tokens, as a distribution, shall be the group's attention over them.

    Cross-entropy between the attention mass of a signature head's query heads (outside sink and recent, normalised) and
    softmax(scale * score), scale learned per head, score = sum_i c_i tanh(slope * phi_k(k)_i) with c the summed query codes.
    The slope grows from 1 to 3, so that the codes learn while they are soft and end close to the bits they become.
    """

    def __init__(self, encoder: HashEncoder) -> None:
        super().__init__(encoder)
        # The first distribution is nearly uniform: one that is sharp and wrong costs most of the steps to undo.
        self.log_scale = nn.Parameter(torch.full((encoder.n_signature_head, 1, 1), -3.0, device=encoder.key[0].weight.device))

    def forward(self, q: Tensor, k: Tensor, weights: Tensor, selectable: Tensor, progress: float) -> Tensor:
        slope = 1 + 2 * progress
        query, key = self.codes(q, k)
        if self.encoder.config.query_bits == 1:  # a query code then counts by its sign alone
            query = torch.tanh(slope * query)
        score = (self.log_scale.exp() * query.sum(dim=1)) @ torch.tanh(slope * key).transpose(1, 2)  # [Hs, n, T]
        mass = weights.unflatten(0, (-1, self.encoder.group)).sum(dim=1) * selectable
        mass = mass / mass.sum(dim=-1, keepdim=True).clamp(min=1e-9)
        return (score.masked_fill(~selectable, float("-inf")).logsumexp(dim=-1) - (mass * score).sum(dim=-1)).mean()

    def optimizer(self) -> torch.optim.Optimizer:
        return torch.optim.Adam(self.parameters(), lr=3e-2)

    def schedule(self, optimizer: torch.optim.Optimizer, steps: int) -> torch.optim.lr_scheduler.LRScheduler:
        return torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=3e-2, total_steps=steps)


class HashAttention(Recipe):
    """HashAttention (arXiv 2412.14468, section 4): for each query head alone, is this key among the query's top tokens?

    Binary cross-entropy of <tanh phi_q(q), tanh phi_k(k)> on the exact top 64 outside sink and recent, positives weighted by
    20. Adam at 1e-3. The paper trains on far more text.
    """
    config = HashConfig(query_bits=1, depth=3, share="query")
    standardise = False
    top = 64

    def forward(self, q: Tensor, k: Tensor, weights: Tensor, selectable: Tensor, progress: float) -> Tensor:
        query, key = self.codes(q, k)
        logit = torch.tanh(query).sum(dim=1) @ torch.tanh(key).transpose(1, 2)  # [Hs, n, T]
        mass = weights.unflatten(0, (-1, self.encoder.group)).sum(dim=1) * selectable
        label = torch.zeros_like(mass).scatter_(-1, mass.topk(min(self.top, mass.shape[-1]), dim=-1).indices, 1.0)
        loss = F.binary_cross_entropy_with_logits(logit, label, weight=1 + 19 * label, reduction="none")
        return (loss * selectable).sum() / (selectable.sum() * len(logit))

    def optimizer(self) -> torch.optim.Optimizer:
        return torch.optim.Adam(self.encoder.parameters(), lr=1e-3)


class Hata(Recipe):
    """HATA (arXiv 2506.02572, section 3.1): one linear map per KV head, shared by queries and keys.

    h = 2 sigmoid(0.1 x W) - 1; the top tenth of the keys are labelled s = 20 down to 1, the others -1; loss
    0.01 mean(s ||h_q - h_k||^2) + bit balance + ||W'W - I||. SGD at 0.1 with momentum 0.9. The last term has the last word:
    training moves W little, and weights that move it more help some layers and harm others.
    """
    config = HashConfig(bits=128, query_bits=1)
    standardise = False  # the map is shared, so that queries and keys must be in one space

    def forward(self, q: Tensor, k: Tensor, weights: Tensor, selectable: Tensor, progress: float) -> Tensor:
        grouped = q.unflatten(0, (-1, self.encoder.group)).flatten(1, 2)  # [Hs, G * n, D]
        query = torch.tanh(0.05 * self.encoder.key_codes(grouped[None])[0])  # tanh(x / 2) = 2 sigmoid(x) - 1
        key = torch.tanh(0.05 * self.encoder.key_codes(k[None])[0])  # [Hs, T, b]
        distance = query.square().sum(-1)[..., None] + key.square().sum(-1)[:, None] - 2 * query @ key.transpose(1, 2)
        mass = (weights * selectable).unflatten(0, (-1, self.encoder.group)).flatten(1, 2)  # [Hs, G * n, T]
        top = max(1, mass.shape[-1] // 10)
        rank = torch.arange(top, device=q.device).expand(*mass.shape[:-1], -1)
        label = torch.full_like(mass, -1.0).scatter_(-1, mass.topk(top, dim=-1).indices, 20.0 - 20 * rank // top)
        selectable = selectable.repeat(self.encoder.group, 1)
        similarity = 0.01 * (label * distance * selectable).sum() / (selectable.sum() * len(mass))
        balance = key.mean(dim=1).square().sum(dim=-1).mean()
        weight = self.encoder.key[0].weight
        decorrelation = (weight.transpose(1, 2) @ weight - torch.eye(weight.shape[-1], device=q.device)).norm(dim=(1, 2)).mean()
        return similarity + balance + decorrelation

    def optimizer(self) -> torch.optim.Optimizer:
        return torch.optim.SGD([layer.weight for layer in self.encoder.key], lr=0.1, momentum=0.9)

    def finish(self) -> HashEncoder:
        encoder = super().finish()
        for key, query in zip(encoder.key, encoder.query, strict=True):
            query.weight.copy_(key.weight.repeat_interleave(encoder.group, dim=0))
        return encoder


RECIPES: dict[str, type[Recipe]] = {"listwise": Listwise, "hashattention": HashAttention, "hata": Hata}


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
        """Make a first layer that was trained on standardised inputs take them as they are."""
        repeat = len(layer.weight) // len(self.mean)
        mean, std = self.mean.repeat_interleave(repeat, dim=0), self.std.repeat_interleave(repeat, dim=0)
        layer.weight.div_(std.transpose(1, 2))
        layer.bias.sub_((mean @ layer.weight).squeeze(1))


def train_layer(recipe: type[Recipe], encoder: HashEncoder, queries: list[Tensor], keys: list[Tensor], asked: list[int],
                steps: int, sink: int, recent: int, seed: int) -> tuple[HashEncoder, list[float]]:
    """Train one layer's encoder in place. queries [Hq, T, D] and keys [Hkv, T, D] per sequence -> encoder, loss of each step.

    Each step takes one sequence and `POSITIONS` random query positions; where a question was asked, half of them in it.
    """
    training = recipe(encoder)
    optimizer = training.optimizer()
    schedule = training.schedule(optimizer, steps)
    of_query, of_key = Standard.of(queries), Standard.of(keys)
    inputs = [of_key(k) for k in keys] if recipe.standardise else keys
    choose = torch.Generator().manual_seed(seed)
    first = sink + recent + 64  # a query before has too few tokens to choose among
    losses = []
    for step in range(steps):
        s = int(torch.randint(len(queries), (), generator=choose))
        length = keys[s].shape[1]
        positions = torch.randint(first, length, (POSITIONS,), generator=choose)
        if asked[s]:
            positions[::2] = torch.randint(max(first, length - asked[s]), length, (POSITIONS // 2,), generator=choose)
        positions = positions.to(keys[s].device)
        q = queries[s][:, positions]
        weights = attention_weights(q, keys[s], positions)
        selectable = selectable_region(positions, length, sink, recent)
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
def caught_mass(encoders: dict[str, HashEncoder], q: Tensor, k: Tensor, positions: Tensor, budget: int, sink: int,
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
        planes = encoder.encode_queries(q.transpose(0, 1))  # the positions are the batch: [n, Hs, 1 + P, W]
        signatures = encoder.encode_keys(k[None]).expand(len(positions), -1, -1, -1)
        indices = select_tokens_reference(planes, signatures, (positions + 1).int(), budget, sink, recent, shift=encoder.shift)
        mass = weights.unflatten(0, (encoder.n_signature_head, -1)).mean(dim=1).transpose(0, 1)  # [n, Hs, T]
        shares[name] = float(mass.gather(-1, indices.clamp(min=0).long()).mul(indices >= 0).sum(dim=-1).mean())
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


# --------------------------------------------------------------------------------------------------------------- command

def parse_arguments() -> argparse.Namespace:
    parser = Parser(description=__doc__.splitlines()[0])
    parser.add_argument("--checkpoint_path", type=Path, required=True, help="folder of the model in Hugging Face's format")
    parser.add_argument("--data", nargs="+", required=True, metavar="FILE", help="text files or globs to train on")
    parser.add_argument("--out", type=Path, required=True, help="the signatures file to write")
    parser.add_argument("--context", type=int, default=8192, help="tokens per training sequence (default: 8192)")
    parser.add_argument("--sequences", type=int, default=16, help="training sequences (default: 16)")
    parser.add_argument("--needles", type=float, default=0.3, help="share of them that are retrieval documents (default: 0.3)")
    parser.add_argument("--recipe", choices=RECIPES, default="listwise", help="sets the defaults of the next four")
    parser.add_argument("--bits", type=int, help="signature bits per token and signature head")
    parser.add_argument("--query_bits", type=int, help="bits per query weight; 1 = signs alone")
    parser.add_argument("--depth", type=int, help="layers of the encoders")
    parser.add_argument("--share", choices=("kv", "query"), help="one signature per KV head or per query head")
    parser.add_argument("--steps", type=int, default=300, help="training steps per layer (default: 300)")
    parser.add_argument("--layers", type=int, nargs="+", help="train these alone; the others stay random projections")
    parser.add_argument("--sink", type=int, default=64, help="first tokens that are always attended to (default: 64)")
    parser.add_argument("--recent", type=int, default=128, help="last tokens that are always attended to (default: 128)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--device", default=default_device())
    parser.add_argument("--precision", choices=("bfloat16", "float16", "float32"), default="bfloat16", help="of the model")
    return parser.parse_args()


def check_arguments(args: argparse.Namespace) -> None:
    check_device(args.device)
    try:
        args.out.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"--out {args.out} cannot be written: {error.strerror}; choose another place") from error
    if args.out.is_dir() or not os.access(args.out.parent, os.W_OK):  # better now than after the training
        raise UserError(f"--out {args.out} cannot be written; give a file in a writable folder")
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


def main() -> None:
    args = parse_arguments()
    check_arguments(args)
    recipe = RECIPES[args.recipe]
    given = {field: getattr(args, field) for field in ("bits", "query_bits", "depth", "share")}
    config = replace(recipe.config, **{field: value for field, value in given.items() if value is not None})
    texts = read_texts(args.data)
    begin = time.perf_counter()
    model = load_model(args.checkpoint_path, args.device, getattr(torch, args.precision))
    check_model(args, model)
    encode = Tokenizer.load(args.checkpoint_path).encode

    n_needle = round(args.needles * args.sequences)
    kept_needles = HELD_OUT if n_needle else 0
    books = book_sequences(texts, encode, args.sequences - n_needle + HELD_OUT, args.context, args.seed)
    needles = needle_sequences(texts, encode, n_needle + kept_needles, args.context, args.seed)
    training = books[HELD_OUT:] + needles[kept_needles:]
    kept = {"books": books[:HELD_OUT], "needles": needles[:kept_needles]}
    kept = {kind: sequences for kind, sequences in kept.items() if sequences}

    budget = max(args.context // 16, args.sink + args.recent + 64)
    fingerprint: Fingerprint = model.fingerprint()
    encoders = random_encoders(config, fingerprint, args.seed)
    untrained = random_encoders(config, fingerprint, args.seed + 1)
    held_out: dict[str, list[dict[str, float]]] = {kind: [] for kind in kept}
    every = training + [sequence for sequences in kept.values() for sequence in sequences]
    layers = tqdm(capture(model, every), total=fingerprint.n_layer, desc="layers", unit="layer")
    for i, (queries, keys) in enumerate(layers):
        encoders[i].to(args.device)
        if args.layers is None or i in args.layers:
            encoders[i], losses = train_layer(
                recipe, encoders[i], queries[:len(training)], keys[:len(training)], [s.asked for s in training], args.steps,
                args.sink, args.recent, args.seed * 100_003 + i)
            layers.set_postfix(loss=f"{sum(losses[-20:]) / len(losses[-20:]):.3f}")
        judged = {"random": untrained[i].to(args.device), "trained": encoders[i]}
        s = len(training)
        for kind, sequences in kept.items():
            shares = []
            for sequence in sequences:
                positions = held_out_positions(sequence).to(args.device)
                shares.append(caught_mass(judged, queries[s][:, positions], keys[s], positions, budget, args.sink, args.recent))
                s += 1
            held_out[kind].append(mean_shares(shares))

    print(f"attention mass caught by {budget} of {args.context} tokens, on sequences kept out of training")
    print(table(held_out))
    provenance = {
        "recipe": args.recipe, "steps": args.steps, "context": args.context, "sequences": args.sequences, "needles": n_needle,
        "data": [Path(path).name for path in texts], "layers": args.layers, "seed": args.seed, "precision": args.precision,
        "seconds": round(time.perf_counter() - begin), "environment": environment(),
        "held_out": {"budget": budget, "sink": args.sink, "recent": args.recent, "mass": held_out},
    }
    save_signatures(args.out, encoders, fingerprint, provenance)
    print(f"{args.out}: {fingerprint.n_layer} layers in {provenance['seconds']} s")


if __name__ == "__main__":
    run_command(main)
