"""Quality, measured: what is lost when a decode step reads only a few tokens, chosen by signatures or by other methods.

    python eval.py ppl     --checkpoint_path MODEL --data books/*.txt --signatures weights/*.safetensors --context 32768
    python eval.py needles --checkpoint_path MODEL --data books/*.txt --selector hash oracle_group quest --ratios 16 32
    python eval.py recall  --checkpoint_path MODEL --data books/*.txt --selector hash oracle quest --json results/recall.json

ppl      the first tokens of each text are read densely, its last ones are decoded one by one, each given the true token before
         it (teacher forcing): with everything in view, then with 1/ratio of the context. A ratio of 1 to dense loses nothing.
needles  retrieval documents (needles.py): the context is read densely, the question and the answer are decoded.
recall   the share of the dense model's attention, and of its top tokens, that a budget catches, by layer and KV head.

Every selector (token_selectors.py) has the same budget, and one dense prefill of a text serves them all.
"""
import argparse
import json
import math
import os
import shlex
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor
from tqdm import tqdm

from checkpoint import load_model
from common import (
    Parser,
    UserError,
    atomic_path,
    can_compile,
    check_device,
    default_device,
    environment,
    run_command,
)
from decode import Decoder, Sampling, prefill
from generate import read_text
from hash_attention import dense_attention, rope_encode_append, sparse_attention
from model import Attention, Transformer
from needles import TASKS, Needle, make_needle
from token_selectors import SELECTORS, Method, Selector, dot_products, make_methods
from tokenizer import Tokenizer

SLACK = 32  # tokens of a context that a retrieval document leaves free: it is measured without the chat template's joints
EXTRA = 8  # tokens that a greedy answer may be longer than the true one


# ----------------------------------------------------------------------------------------------------------------- model

class SelectingAttention(Attention):
    """Attention whose decode step asks `selector` for the tokens to attend to (None: all of them)."""
    selector: Selector | None
    query_size: Tensor  # [Hq, D], the summed |q| of the prompt

    def decode(self, x: Tensor, cos: Tensor, sin: Tensor, seq_lens: Tensor) -> Tensor:
        k, v = self.cache.k, self.cache.v
        q, _ = rope_encode_append(self.wqkv(x), cos, sin, None, k, v, None, seq_lens)
        if self.selector is None:
            return dense_attention(q, k, v, seq_lens)[0]
        return sparse_attention(q[:, 0], k, v, self.selector(q[:, 0], k, seq_lens))[0][:, None]

    def prefill(self, q: Tensor, k: Tensor, v: Tensor, row: int, start: int) -> Tensor:
        size = q[0].abs().sum(dim=0, dtype=torch.float32)
        self.query_size = size if start == 0 else self.query_size + size
        return super().prefill(q, k, v, row, start)


@dataclass
class Run:
    """One line of a table: a method at a budget. ratio 1 is the whole context."""
    method: Method
    ratio: int
    budget: int
    decoder: Decoder | None = None

    def __str__(self) -> str:
        return f"{self.method.label:28} 1/{self.ratio:<3}"


class Judge:
    """A model whose one dense prefill of a text is decoded from by every method at every budget."""

    def __init__(self, options: argparse.Namespace) -> None:
        self.options = options
        self.model: Transformer = load_model(options.checkpoint_path, options.device, getattr(torch, options.precision))
        self.tokenizer = Tokenizer.load(options.checkpoint_path)
        limit = min(self.model.args.max_position, self.model.args.sliding_window or options.context)
        if options.context > limit:
            raise UserError(f"--context {options.context} is more than the model's {limit}; give less")
        self.model.setup_caches(1, options.context)
        self.attentions: list[SelectingAttention] = [layer.attention for layer in self.model.layers]
        for attention in self.attentions:
            attention.__class__ = SelectingAttention
            attention.selector = None
        self.methods = make_methods(["dense", *options.selector], self.model, options.sink, options.recent, options.signatures,
                                    options.lsh_bits, options.dense_layers, options.seed)
        least = options.sink + options.recent
        self.runs = [Run(self.methods[0], 1, options.context)]
        self.runs += [Run(method, ratio, min(options.context, max(math.ceil(options.context / ratio), least)))
                      for method in self.methods[1:] for ratio in options.ratios]

    def prepare(self) -> None:
        """Make the decode step of every run: on a GPU a CUDA graph of its own."""
        if self.options.compile:  # one compiled block serves all layers of a run, and all runs share its cache
            torch._dynamo.config.recompile_limit = 8 * len(self.runs)
        for run in tqdm(self.runs, desc="prepare", unit="run", delay=2, leave=False):
            run.decoder = Decoder(self.model, 1, Sampling(temperature=0), self.options.compile)
            self.use(run)
            run.decoder.prepare()

    def use(self, run: Run) -> Decoder:
        """Let decode steps select as `run` does. -> its decoder."""
        for attention, selector in zip(self.attentions, run.method.layers, strict=True):
            attention.selector = selector
            if selector is not None:
                selector.budget = run.budget
        return run.decoder

    @torch.inference_mode()
    def read(self, ids: Tensor) -> Tensor:
        """Prefill ids int64 [T] and let every selector summarise them. -> logits of the last position [vocab]."""
        logits = prefill(self.model, ids, 1)
        for method in self.methods:
            for attention, selector in zip(self.attentions, method.layers, strict=True):
                if selector is not None:
                    selector.build(attention.cache.k, len(ids), attention.query_size / len(ids))
        return logits

    @torch.inference_mode()
    def decode(self, run: Run, ids: Tensor, start: int) -> Tensor:
        """Decode ids int64 [T] from position `start` on, each step given the true token. -> logits [T - start, vocab]."""
        decoder = self.use(run)
        logits = []
        for i in range(start, len(ids)):
            decoder.start(ids[i:i + 1], i)
            decoder.step()
            logits.append(decoder.logits[0].clone())
        return torch.stack(logits)

    @torch.inference_mode()
    def continue_greedily(self, run: Run, last: Tensor, length: int, count: int) -> list[int]:
        """`count` tokens after `last` (int64 [1]), which stands at `length` in a cache that `decode` has filled up to it."""
        decoder = self.use(run)
        decoder.start(last, length)
        tokens = []
        for _ in range(count):
            decoder.step()
            tokens.append(decoder.token[0].clone())
        return torch.cat(tokens).tolist()

    def row(self, run: Run) -> dict:
        options = self.options
        return {"model": options.checkpoint_path.resolve().name, "context": options.context, **run.method.about(),
                "ratio": run.ratio, "budget": run.budget, "sink": options.sink, "recent": options.recent,
                "dense_layers": options.dense_layers, "precision": options.precision, "seed": options.seed}

    def texts(self) -> dict[str, Tensor]:
        """The first `context` tokens of every text, int64 [context]."""
        texts = {}
        for path in self.options.data:
            ids = self.tokenizer.encode(read_text(path))[:self.options.context]
            if len(ids) < self.options.context:
                raise UserError(f"{path} has {len(ids)} tokens, fewer than --context {self.options.context}; give longer texts")
            texts[path.stem] = torch.tensor(ids, device=self.options.device)
        return texts


# ------------------------------------------------------------------------------------------------------------ perplexity

def likelihood(logits: Tensor, ids: Tensor) -> Tensor:
    """Log-likelihood of each token. logits [T, vocab] of the positions before ids int64 [T] -> float32 [T]."""
    return logits.float().log_softmax(dim=-1).gather(-1, ids[:, None])[:, 0]


def ppl(options: argparse.Namespace) -> Iterator[dict]:
    """Rows of results/quality_ppl.json: the perplexity ratio to dense of each run over all texts, and text by text."""
    judge = Judge(options)
    texts = judge.texts()
    judge.prepare()
    start = options.context - options.last
    found: list[dict[str, float]] = [{} for _ in judge.runs]  # mean log-likelihoods
    for name, ids in tqdm(texts.items(), desc="texts", unit="text", leave=False):
        first = judge.read(ids[:start])[None]
        for run, means in zip(judge.runs, found, strict=True):
            total = likelihood(first, ids[start:start + 1]).sum()
            for i in range(start, len(ids) - 1, 256):  # logits of a whole text would fill memory
                end = min(i + 256, len(ids) - 1)
                total += likelihood(judge.decode(run, ids[:end], i), ids[i + 1:end + 1]).sum()
            means[name] = total.item() / options.last
    dense = found[0]
    for run, means in zip(judge.runs, found, strict=True):
        lost = {name: dense[name] - means[name] for name in texts}
        row = {**judge.row(run), "last": options.last, "ppl": math.exp(-sum(means.values()) / len(texts)),
               "ppl_ratio": math.exp(sum(lost.values()) / len(texts)),
               "per_text": {name: math.exp(loss) for name, loss in lost.items()}}
        spread = " ".join(f"{value:.4f}" for value in row["per_text"].values())
        print(f"{run} budget {run.budget:5}  perplexity {row['ppl']:8.3f}  ratio {row['ppl_ratio']:.4f}  ({spread})",
              flush=True)
        yield row


# --------------------------------------------------------------------------------------------------------------- needles

@dataclass(frozen=True)
class Question:
    """A retrieval document as tokens. ids int64 [T]: `context` of them are read densely, the last `answer` are the answer."""
    needle: Needle
    ids: Tensor
    context: int
    answer: int


def common_prefix(a: list[int], b: list[int]) -> int:
    return next((i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))


def chat_frame(tokenizer: Tokenizer) -> int | None:
    """Tokens that the chat template puts around a message; None without a template."""
    try:
        return len(tokenizer.encode_chat([{"role": "user", "content": ""}]))
    except UserError:
        return None


def tokenize_needle(tokenizer: Tokenizer, needle: Needle) -> Question:
    """Through the chat template where the model has one: the user asks, and the answer's opening words are put into the
    model's mouth (RULER, arXiv 2404.06654, appendix)."""
    question, opening = needle.question.split("\nAnswer: ")
    if chat_frame(tokenizer) is not None:
        context = tokenizer.encode_chat([{"role": "user", "content": needle.context}])
        prompt = tokenizer.encode_chat([{"role": "user", "content": needle.context + question}])
        asked, whole = (prompt + tokenizer.encode(opening + text, bos=False) for text in ("", needle.answer))
    else:
        context, asked, whole = (tokenizer.encode(text) for text in (
            needle.context, needle.context + needle.question, needle.text))
    return Question(needle, torch.tensor(whole), common_prefix(context, asked), len(whole) - common_prefix(asked, whole))


def make_questions(judge: Judge, task: str) -> Iterator[Question]:
    """The documents of one task, each of nearly --context tokens; made by threads, ahead of their use."""
    options, tokenizer = judge.options, judge.tokenizer
    texts = [read_text(path) for path in options.data]
    frame = chat_frame(tokenizer) or 0

    def make(i: int) -> Question:
        needle = make_needle(task, options.context - frame - SLACK, texts[i % len(texts)], options.seed * 100_003 + i,
                             length=lambda text: len(tokenizer.encode(text)))
        return tokenize_needle(tokenizer, needle)

    with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:
        yield from pool.map(make, range(options.samples))


def judge_answer(judge: Judge, run: Run, question: Question) -> tuple[bool, float]:
    """Whether the greedy answer names all that was asked for, and the true answer's negative log-likelihood per token.

    The context is in the cache; the question is decoded, then the true answer. Where the likeliest tokens are those of the
    true answer, it is the greedy answer; elsewhere that is decoded too, and holds the answers or not (RULER's rule).
    """
    ids = question.ids.to(judge.options.device)
    start = len(ids) - question.answer
    logits = judge.decode(run, ids[:-1], question.context)[-question.answer:]
    nll = -likelihood(logits, ids[start:]).mean().item()
    if torch.equal(logits.argmax(dim=-1), ids[start:]):
        return True, nll
    tokens = judge.continue_greedily(run, ids[start - 1:start], start - 1, question.answer + EXTRA)
    stop = next((i for i, token in enumerate(tokens) if token in judge.tokenizer.stop_ids), len(tokens))
    text = judge.tokenizer.decode(tokens[:stop])
    return all(answer in text for answer in question.needle.answers), nll


def paired_interval(differences: Tensor, seed: int) -> list[float]:
    """A 95 % bootstrap interval of the mean of paired differences [n]."""
    generator = torch.Generator().manual_seed(seed)
    drawn = torch.randint(len(differences), (10_000, len(differences)), generator=generator)
    return differences[drawn].mean(dim=1).quantile(torch.tensor([0.025, 0.975])).tolist()


def needles(options: argparse.Namespace) -> Iterator[dict]:
    """Rows of results/quality_needles.json: one per task, method and budget."""
    judge = Judge(options)
    judge.prepare()
    for task in options.tasks:
        results: list[list[tuple[bool, float]]] = [[] for _ in judge.runs]
        for question in tqdm(make_questions(judge, task), desc=task, total=options.samples, unit="document", leave=False):
            judge.read(question.ids[:question.context].to(options.device))
            for run, result in zip(judge.runs, results, strict=True):
                result.append(judge_answer(judge, run, question))
        likelihoods = [torch.tensor([nll for _, nll in result]) for result in results]
        for run, result, nll in zip(judge.runs, results, likelihoods, strict=True):
            difference = nll - likelihoods[0]
            row = {**judge.row(run), "task": task, "exact": sum(exact for exact, _ in result), "samples": len(result),
                   "nll": nll.mean().item(), "nll_difference": difference.mean().item(),
                   "nll_interval": paired_interval(difference, options.seed),
                   "per_sample": [{"exact": exact, "nll": round(nll, 5)} for exact, nll in result]}
            low, high = row["nll_interval"]
            print(f"{task:18} {run} exact {row['exact']:3} of {row['samples']}  nll {row['nll']:.4f}  to dense "
                  f"{row['nll_difference']:+.4f} [{low:+.4f}, {high:+.4f}]  {row['bytes_per_token']:g} bytes", flush=True)
            yield row


# ---------------------------------------------------------------------------------------------------------------- recall

class Probe(Selector):
    """Attends to everything, and notes what each run would have caught of it: every run is asked for the same queries."""

    def __init__(self, runs: list[Run], layer: int, top: int) -> None:
        super().__init__(0, 0)
        self.chosen_by = [(run.method.layers[layer], run.budget) for run in runs]
        self.top, self.steps = top, 0
        self.mass: Tensor | float = 0.0  # [runs, Hkv], summed over steps; as `recall`
        self.recall: Tensor | float = 0.0

    def forward(self, q: Tensor, k: Tensor, seq_lens: Tensor) -> Tensor:
        position = torch.arange(k.shape[2], device=k.device, dtype=torch.int32)
        length = seq_lens[:, None, None, None]
        logits = (dot_products(q, k) * q.shape[-1] ** -0.5).masked_fill(position >= length, float("-inf"))
        weights = logits.softmax(dim=-1)  # [B, Hkv, G, S]
        first = self.chosen_by[0][0]
        outside = (position < first.sink) | (position >= length - first.recent)
        best = logits.masked_fill(outside, float("-inf")).topk(min(self.top, k.shape[2]), dim=-1)
        counted = ~best.values.isneginf()
        mass, recall = [], []
        for selector, budget in self.chosen_by:
            selector.budget = budget
            indices = selector(q, k, seq_lens).long()
            chosen = torch.zeros(*indices.shape[:2], k.shape[2] + 1, dtype=torch.bool, device=k.device)
            chosen = chosen.scatter(-1, indices.masked_fill(indices < 0, k.shape[2]), True)[..., :-1]
            chosen = chosen.unflatten(1, (k.shape[1], -1)).expand_as(weights)
            mass.append((weights * chosen).sum(dim=-1).mean(dim=(0, 2)))
            hits = (chosen.gather(-1, best.indices) & counted).sum(dim=-1) / counted.sum(dim=-1).clamp(min=1)
            recall.append(hits.mean(dim=(0, 2)))
        self.mass, self.recall = self.mass + torch.stack(mass), self.recall + torch.stack(recall)
        self.steps += 1
        return position.expand(*k.shape[:2], -1).masked_fill(position >= seq_lens[:, None, None], -1)


def recall(options: argparse.Namespace) -> Iterator[dict]:
    """One row per method and budget: attention mass caught and recall of the top tokens, by layer and KV head."""
    judge = Judge(options)
    runs = judge.runs[1:]
    if not runs:
        raise UserError("recall needs a --selector besides dense")
    probes = [Probe(runs, layer, options.top) for layer in range(len(judge.attentions))]
    probing = Run(Method("probe", probes), 1, options.context,
                  Decoder(judge.model, 1, Sampling(temperature=0), compiled=False))  # its sums are no part of a CUDA graph
    start = options.context - options.last
    for ids in tqdm(judge.texts().values(), desc="texts", unit="text", leave=False):
        judge.read(ids[:start])
        judge.decode(probing, ids, start)
    mass, caught = (torch.stack([getattr(probe, name) / probe.steps for probe in probes], dim=1).cpu()
                    for name in ("mass", "recall"))  # [runs, layers, Hkv]
    for run, share, recalled in zip(runs, mass, caught, strict=True):
        print(f"{run} budget {run.budget:5}  mass {share.mean():.4f} (least {share.min():.4f})  recall of the top "
              f"{options.top}: {recalled.mean():.4f} (least {recalled.min():.4f})", flush=True)
        yield {**judge.row(run), "last": options.last, "top": options.top, "mass": share.mean().item(),
               "recall": recalled.mean().item(), "mass_by_head": share.tolist(), "recall_by_head": recalled.tolist()}
    if options.json is not None:
        plot_mass(options.json.with_suffix(".png"), runs, mass)


def plot_mass(path: Path, runs: list[Run], mass: Tensor) -> None:
    """A heat map per run: layers down, KV heads across. mass [runs, layers, Hkv]."""
    try:
        import matplotlib
    except ImportError as error:
        raise UserError("plots need matplotlib; pip install matplotlib") from error
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    columns = min(6, len(runs))
    lines = -(-len(runs) // columns)
    height = 1 + 0.12 * mass.shape[1]
    figure, axes = plt.subplots(lines, columns, figsize=(2.2 * columns + 1, height * lines + 1), squeeze=False,
                                layout="constrained")
    for axis in axes.flat[len(runs):]:
        axis.axis("off")
    for axis, run, share in zip(axes.flat, runs, mass, strict=False):
        image = axis.imshow(share.numpy(), vmin=0.5, vmax=1, aspect="auto", cmap="viridis", interpolation="nearest")
        axis.set_title(f"{run.method.label}\n1/{run.ratio}: {share.mean():.3f}", fontsize=8)
        axis.set_xticks(range(share.shape[1]))
        axis.tick_params(labelsize=6)
    figure.supxlabel("KV head")
    figure.supylabel("layer")
    figure.colorbar(image, ax=axes, label="attention mass caught", shrink=0.6)
    with atomic_path(path) as beside:
        figure.savefig(beside, format="png", dpi=120)
    plt.close(figure)


# --------------------------------------------------------------------------------------------------------------- command

def parse_options(argv: list[str] | None = None) -> argparse.Namespace:
    shared = Parser(add_help=False)
    add = shared.add_argument
    add("--checkpoint_path", type=Path, required=True)
    add("--data", type=Path, nargs="+", required=True, help="text files that no signature was trained on")
    add("--selector", nargs="+", choices=SELECTORS, default=["hash"], help="dense is always measured (default: hash)")
    add("--signatures", type=Path, nargs="+", default=[], help="files of train_hash.py; each is a hash selector of its own")
    add("--context", type=int, default=8192, help="tokens of each text or document, the decoded ones included")
    add("--ratios", type=int, nargs="+", default=[16, 32, 64], help="budget = context / ratio")
    add("--sink", type=int, default=64)
    add("--recent", type=int, default=128)
    add("--lsh_bits", type=int, default=128, choices=(32, 64, 128), help="bits of the lsh selector's random projections")
    add("--seed", type=int, default=0)
    add("--device", default=default_device())
    add("--precision", choices=("float32", "bfloat16"), help="default: bfloat16 on a GPU, float32 on a CPU")
    add("--compile", action="store_true", help="compile the blocks of every decode step; pays off for few selectors")
    add("--json", type=Path, help="write the rows here, as they come")
    dense_layers = {"type": int, "default": 0, "help": "first layers that attend to everything, whatever the selector"}
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    part = commands.add_parser("ppl", parents=[shared], help="teacher-forced perplexity of long texts")
    part.add_argument("--last", type=int, default=512, help="tokens decoded one by one")
    part.add_argument("--dense_layers", **dense_layers)
    part.set_defaults(run=ppl)
    part = commands.add_parser("needles", parents=[shared], help="synthetic retrieval")
    part.add_argument("--tasks", nargs="+", choices=TASKS, default=list(TASKS))
    part.add_argument("--samples", type=int, default=32, help="documents per task")
    part.add_argument("--dense_layers", **dense_layers)
    part.set_defaults(run=needles)
    part = commands.add_parser("recall", parents=[shared], help="attention caught, by layer and head; a PNG beside --json")
    part.add_argument("--last", type=int, default=64, help="tokens whose attention is looked at")
    part.add_argument("--top", type=int, default=64, help="recall of this many tokens, outside sink and recent")
    part.set_defaults(run=recall, dense_layers=0)
    return check_options(parser.parse_args(argv))


def check_options(options: argparse.Namespace) -> argparse.Namespace:
    check_device(options.device)
    options.compile = options.compile and can_compile(options.device)
    if options.precision is None:
        options.precision = "bfloat16" if options.device.startswith("cuda") else "float32"
    for flag, least in {"sink": 0, "recent": 1, "dense_layers": 0, "seed": 0, "samples": 1, "top": 1, "last": 1}.items():
        if getattr(options, flag, least) < least:
            raise UserError(f"--{flag} {getattr(options, flag)} is out of range; it must be at least {least}")
    if min(options.ratios) < 1:
        raise UserError(f"--ratios {min(options.ratios)} is out of range; they must be at least 1")
    if "last" in options and options.last >= options.context:
        raise UserError(f"--last {options.last} is out of range; it must be below --context {options.context}")
    if options.sink + options.recent > options.context:
        raise UserError(f"--sink {options.sink} and --recent {options.recent} are more than --context {options.context}")
    return options


def main() -> None:
    options = parse_options()
    rows = []
    for row in options.run(options):
        rows.append(row)
        if options.json is not None:
            result = {**environment(), "command": shlex.join(["python", *sys.argv]), "rows": rows}
            with atomic_path(options.json) as beside:
                beside.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    run_command(main)
