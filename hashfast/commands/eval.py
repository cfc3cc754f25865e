"""Quality, measured: what is lost when a decode step reads only a few tokens, chosen by signatures or by other methods.

    python -m hashfast eval ppl     --checkpoint_path MODEL --data books/*.txt --signatures weights/*.safetensors
    python -m hashfast eval needles --checkpoint_path MODEL --data books/*.txt --selector hash oracle_group quest --ratios 16 32
    python -m hashfast eval grid    --checkpoint_path MODEL --data books/*.txt --contexts 8192 32768 --depths 0 50 100
    python -m hashfast eval recall  --checkpoint_path MODEL --data books/*.txt --selector hash oracle --json recall.json
    python -m hashfast eval lm      --checkpoint_path MODEL --tasks NAME --include_path DIR --ratios 16

ppl      the first tokens of each text are read densely, its last ones are decoded one by one, each given the true token before
         it (teacher forcing): with everything in view, then with 1/ratio of the context. A ratio of 1 to dense loses nothing.
needles  retrieval documents (needles.py): the context is read densely, the question and the answer are decoded.
grid     the same with a single needle, at several contexts and depths; a PNG beside --json.
recall   the share of the dense model's attention, and of its top tokens, that a budget catches, by layer and KV head.
lm       tasks of lm-evaluation-harness (lm.py): the prompt is read densely but for its last tokens, which are decoded too.

Every selector (token_selectors.py) has the same budget, and one dense prefill of a text serves them all. --batch_size texts
are decoded together.
"""
import argparse
import contextlib
import functools
import itertools
import json
import math
import os
import sys
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor
from tqdm import tqdm

from hashfast.common import (
    Parser,
    UserError,
    atomic_path,
    can_compile,
    check_device,
    check_writable,
    command_line,
    default_device,
    environment,
)
from hashfast.model import Transformer
from hashfast.research.needles import TASKS, Needle, make_needle
from hashfast.research.selectors import SELECTORS, Method, Observers, Selector, dot_products, make_methods
from hashfast.runtime.checkpoint import load_model
from hashfast.runtime.decode import Decoder, prefill
from hashfast.runtime.prompts import read_text
from hashfast.runtime.sampling import Sampling
from hashfast.runtime.tokenizer import Tokenizer

SLACK = 32  # tokens of a context that a retrieval document leaves free: it is measured without the chat template's joints
EXTRA = 8  # tokens that a greedy answer may be longer than the true one


# ----------------------------------------------------------------------------------------------------------------- model

@dataclass
class Run:
    """One line of a table: a method at a budget. ratio 1 is the whole context."""
    method: Method
    ratio: int
    budget: int
    decoder: Decoder | None = None

    def __str__(self) -> str:
        return f"{self.method.label:28} 1/{self.ratio:<3}"


class DecodeEvaluator:
    """A model whose one dense prefill of some texts is decoded from by every method at every budget."""

    def __init__(self, options: argparse.Namespace, texts: int) -> None:
        """texts: how many there will be; at most --batch_size of them are in the caches at a time."""
        self.options = options
        self.batch = min(options.batch_size, texts)
        self.model: Transformer = load_model(options.checkpoint_path, options.device, getattr(torch, options.precision))
        self.tokenizer = Tokenizer.load(options.checkpoint_path)
        self.read_text = functools.cache(read_text)  # one file serves many documents
        self.attentions = [layer.attention for layer in self.model.layers]
        self.resize(options.context)

    def resize(self, context: int) -> None:
        """Make the caches, the methods and the runs for texts of `context` tokens."""
        options = self.options
        limit = min(self.model.args.max_position, self.model.args.sliding_window or context)
        if context > limit:
            raise UserError(f"--context {context} is more than the model's {limit}; give less")
        self.context, self.methods, self.runs = context, [], []
        for attention in self.attentions:
            attention.cache = attention.selector = None  # what was there goes before the new is made
        self.model.setup_caches(self.batch, context)
        self.methods = make_methods(["dense", *options.selector], self.model, options.sink, options.recent, options.signatures,
                                    options.lsh_bits, options.dense_layers, options.seed)
        least = options.sink + options.recent
        self.runs = [Run(self.methods[0], 1, context)]
        self.runs += [Run(method, ratio, min(context, max(math.ceil(context / ratio), least)))
                      for method in self.methods[1:] for ratio in options.ratios]
        for ratio in options.ratios:
            if context / ratio <= least:
                print(f"warning: 1/{ratio} of {context} tokens is no more than --sink and --recent, so that nothing is chosen; "
                      "give smaller --ratios", file=sys.stderr)

    def prepare(self) -> None:
        """Make the decode step of every run: on a GPU a CUDA graph of its own. Before the first text is read."""
        if self.options.compile:  # one compiled block serves all layers of a run, and all runs share its cache
            torch._dynamo.reset()  # of the runs before `resize`
            torch._dynamo.config.recompile_limit = 8 * len(self.runs)
        for run in tqdm(self.runs, desc="prepare", unit="run", delay=2, leave=False):
            run.decoder = Decoder(self.model, self.batch, Sampling(temperature=0), self.options.compile)
            self.use(run)
            run.decoder.prepare()

    def use(self, run: Run) -> Decoder:
        """Let decode steps select as `run` does. -> its decoder."""
        for attention, selector in zip(self.attentions, run.method.layers, strict=True):
            attention.selector = selector
            if selector is not None:
                selector.set_budget(run.budget, self.context)
        return run.decoder

    @torch.inference_mode()
    def read(self, prompts: list[Tensor]) -> None:
        """Prefill one cache row with each of up to `batch` prompts, int64 [T] each, and let every selector summarise them."""
        for attention, *selectors in zip(self.attentions, *(method.layers for method in self.methods), strict=True):
            attention.selector = Observers([selector for selector in selectors if selector is not None])
        for row, ids in enumerate(prompts):
            if len(ids) == 0:
                continue
            prefill(self.model, ids.to(self.options.device), 1, row=row)
            for method in self.methods:
                for attention, selector in zip(self.attentions, method.layers, strict=True):
                    if selector is not None:
                        selector.build(attention.cache.k, row, len(ids))

    @torch.inference_mode()
    def score(self, run: Run, texts: list[Tensor], starts: list[int], last: int) -> tuple[Tensor, Tensor]:
        """Decode the texts whose first `starts` tokens `read` has put into the cache, each step given the true token.

        texts: int64 [T] each, on the CPU. They are decoded side by side and end together: one with fewer tokens to go waits at
        its first, which is written again to the same place.
        -> of the last `last` tokens of each text: log-likelihoods float32 [texts, last], and the likeliest tokens in their
        places int64 [texts, last], on the CPU. What belongs to a text's tokens up to its start means nothing.
        """
        decoder, device = self.use(run), self.options.device
        rows = [*range(len(texts)), *[0] * (self.batch - len(texts))]  # a batch that is not full repeats its first text
        steps = max(len(texts[row]) - 1 - starts[row] for row in rows)
        at = torch.stack([torch.arange(len(texts[row]) - 1 - steps, len(texts[row]) - 1).clamp(min=starts[row])
                          for row in rows], dim=1)  # [steps, B]
        tokens, following = (torch.stack([texts[row][(at[:, i] + ahead).clamp(max=len(texts[row]) - 1)]
                                          for i, row in enumerate(rows)], dim=1).to(device) for ahead in (0, 1))
        at = at.to(device)
        found, likeliest = [], []
        for i in range(steps):
            decoder.start(tokens[i], at[i])
            decoder.step()
            if i >= steps - last:
                found.append(likelihood(decoder.logits, following[i]))
                likeliest.append(decoder.token[:, 0].clone())
        return torch.stack(found, dim=1)[:len(texts)].cpu(), torch.stack(likeliest, dim=1)[:len(texts)].cpu()

    @torch.inference_mode()
    def continue_greedily(self, run: Run, tokens: list[int], lengths: list[int], count: int) -> list[list[int]]:
        """At most `count` tokens after each of `tokens`, which stand at `lengths` in caches that are filled up to there."""
        decoder = self.use(run)
        rows = [*range(len(tokens)), *[0] * (self.batch - len(tokens))]
        decoder.start(torch.tensor([tokens[row] for row in rows], device=self.options.device),
                      torch.tensor([lengths[row] for row in rows], device=self.options.device))
        chosen = []
        for _ in range(min(count, self.context - max(lengths))):
            decoder.step()
            chosen.append(decoder.token[:, 0].clone())
        return torch.stack(chosen, dim=1)[:len(tokens)].tolist()

    def batches(self, items: list) -> Iterator[list]:
        return (items[i:i + self.batch] for i in range(0, len(items), self.batch))

    def row(self, run: Run) -> dict:
        options = self.options
        return {"model": options.checkpoint_path.resolve().name, "context": self.context, **run.method.about(),
                "ratio": run.ratio, "budget": run.budget, "sink": options.sink, "recent": options.recent,
                "dense_layers": options.dense_layers, "precision": options.precision, "seed": options.seed}

    def texts(self) -> dict[str, Tensor]:
        """The first `context` tokens of every text, int64 [context]."""
        texts: dict[str, Tensor] = {}
        for path in self.options.data:
            if path.stem in texts:
                raise UserError(f"--data has two texts of the name {path.stem}, by which they are told apart; rename one")
            ids = self.tokenizer.encode(self.read_text(path))[:self.context]
            if len(ids) < self.context:
                raise UserError(f"{path} has {len(ids)} tokens, fewer than --context {self.context}; give longer texts")
            texts[path.stem] = torch.tensor(ids)
        return texts


def likelihood(logits: Tensor, ids: Tensor) -> Tensor:
    """Log-likelihood of each token. logits [T, vocab] of the positions before ids int64 [T] -> float32 [T]."""
    return logits.float().log_softmax(dim=-1).gather(-1, ids[:, None])[:, 0]


# ------------------------------------------------------------------------------------------------------------ perplexity

def ppl(options: argparse.Namespace) -> Iterator[dict]:
    """Rows of results/quality_ppl*.json: the perplexity ratio to dense of each run over all texts, and text by text."""
    judge = DecodeEvaluator(options, len(options.data))
    texts = judge.texts()
    judge.prepare()
    start = options.context - options.last - 1
    found: list[dict[str, float]] = [{} for _ in judge.runs]  # mean log-likelihoods
    for names in tqdm(list(judge.batches(list(texts))), desc="texts", unit="batch", leave=False):
        ids = [texts[name] for name in names]
        judge.read([text[:start] for text in ids])
        for run, means in zip(judge.runs, found, strict=True):
            scores, _ = judge.score(run, ids, [start] * len(ids), options.last)
            means |= zip(names, scores.mean(dim=1).tolist(), strict=True)
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


def make_question(judge: DecodeEvaluator, task: str, context: int, i: int, depth: int | None = None) -> Question:
    """The i-th document of a task, of nearly `context` tokens. depth: where its fact lies, in percent (task "single")."""
    options, tokenizer = judge.options, judge.tokenizer
    filler = judge.read_text(options.data[i % len(options.data)])
    needle = make_needle(task, context - (chat_frame(tokenizer) or 0) - SLACK, filler, options.seed * 100_003 + i,
                         length=lambda text: len(tokenizer.encode(text)), depth=None if depth is None else depth / 100)
    return tokenize_needle(tokenizer, needle)


def judge_answers(judge: DecodeEvaluator, run: Run, questions: list[Question]) -> list[tuple[bool, float]]:
    """Of each question: does the greedy answer name all that was asked for, and the true answer's negative log-likelihood
    per token.

    The contexts are in the caches; the questions are decoded, then the true answers. Where the likeliest tokens are those of
    the true answer, it is the greedy answer; elsewhere that is decoded too, and holds the answers or not (RULER's rule).
    """
    last = max(question.answer for question in questions)
    scores, likeliest = judge.score(run, [question.ids for question in questions],
                                    [question.context for question in questions], last)
    nll = [-score[-question.answer:].mean().item() for score, question in zip(scores, questions, strict=True)]
    exact = [torch.equal(tokens[-question.answer:], question.ids[-question.answer:])
             for tokens, question in zip(likeliest, questions, strict=True)]
    if not all(exact):
        lengths = [len(question.ids) - question.answer - 1 for question in questions]
        openings = [int(question.ids[length]) for question, length in zip(questions, lengths, strict=True)]
        answers = judge.continue_greedily(run, openings, lengths, last + EXTRA)
        exact = [good or is_right(judge.tokenizer, answer[:question.answer + EXTRA], question.needle)
                 for good, answer, question in zip(exact, answers, questions, strict=True)]
    return list(zip(exact, nll, strict=True))


def is_right(tokenizer: Tokenizer, answer: list[int], needle: Needle) -> bool:
    """Whether an answer, up to its end token, names all that was asked for."""
    stop = next((i for i, token in enumerate(answer) if token in tokenizer.stop_ids), len(answer))
    text = tokenizer.decode(answer[:stop])
    return all(wanted in text for wanted in needle.answers)


def judge_all(judge: DecodeEvaluator, questions: Iterator[Question], count: int, name: str) -> list[list[tuple[bool, float]]]:
    """What `judge_answers` gives for `count` questions, a list for each run."""
    results: list[list[tuple[bool, float]]] = [[] for _ in judge.runs]
    with tqdm(desc=name, total=count, unit="document", leave=False) as progress:
        while batch := list(itertools.islice(questions, judge.batch)):
            judge.read([question.ids[:question.context] for question in batch])
            for run, result in zip(judge.runs, results, strict=True):
                result += judge_answers(judge, run, batch)
            progress.update(len(batch))
    return results


def paired_interval(differences: Tensor, seed: int) -> list[float]:
    """A 95 % bootstrap interval of the mean of paired differences [n]."""
    generator = torch.Generator().manual_seed(seed)
    drawn = torch.randint(len(differences), (10_000, len(differences)), generator=generator)
    return differences[drawn].mean(dim=1).quantile(torch.tensor([0.025, 0.975])).tolist()


def score_rows(judge: DecodeEvaluator, results: list[list[tuple[bool, float]]], **about: object) -> Iterator[dict]:
    """One row per run over the same documents: `about`, right answers, likelihoods and their differences to dense."""
    likelihoods = [torch.tensor([nll for _, nll in result]) for result in results]
    for run, result, nll in zip(judge.runs, results, likelihoods, strict=True):
        difference = nll - likelihoods[0]
        row = {**judge.row(run), **about, "exact": sum(exact for exact, _ in result), "samples": len(result),
               "nll": nll.mean().item(), "nll_difference": difference.mean().item(),
               "nll_interval": paired_interval(difference, judge.options.seed),
               "per_sample": [{"exact": exact, "nll": round(nll, 5)} for exact, nll in result]}
        low, high = row["nll_interval"]
        title = " ".join(f"{value}" for value in about.values())
        print(f"{judge.context:6} {title:18} {run} exact {row['exact']:3} of {row['samples']}  nll {row['nll']:.4f}  to dense "
              f"{row['nll_difference']:+.4f} [{low:+.4f}, {high:+.4f}]  {row['bytes_per_token']:g} bytes", flush=True)
        yield row


@contextlib.contextmanager
def workers() -> Iterator[ThreadPoolExecutor]:
    """Threads that make documents ahead of their use; what is not begun when the block ends is dropped."""
    pool = ThreadPoolExecutor(min(16, os.cpu_count() or 1))
    try:
        yield pool
    finally:
        pool.shutdown(cancel_futures=True)


def needles(options: argparse.Namespace) -> Iterator[dict]:
    """Rows of results/quality_needles*.json: one per task, method and budget."""
    judge = DecodeEvaluator(options, options.samples)
    with workers() as pool:
        made = {task: pool.map(functools.partial(make_question, judge, task, judge.context), range(options.samples))
                for task in options.tasks}
        judge.prepare()
        for task, questions in made.items():
            yield from score_rows(judge, judge_all(judge, questions, options.samples, task), task=task)


def grid(options: argparse.Namespace) -> Iterator[dict]:
    """Rows of results/needle_grid.json: one per context, depth, method and budget. The documents of the depths differ in
    nothing else."""
    judge = DecodeEvaluator(options, len(options.depths) * options.samples)
    wanted = [(depth, i) for depth in options.depths for i in range(options.samples)]
    exact = torch.zeros(len(judge.runs), len(options.depths), len(options.contexts))
    with workers() as pool:
        made = {context: pool.map(lambda place, context=context: make_question(judge, "single", context, place[1], place[0]),
                                  wanted) for context in options.contexts}
        for column, (context, questions) in enumerate(made.items()):
            judge.resize(context)
            judge.prepare()
            results = judge_all(judge, questions, len(wanted), f"context {context}")
            for line, depth in enumerate(options.depths):
                part = slice(line * options.samples, (line + 1) * options.samples)
                for i, row in enumerate(score_rows(judge, [result[part] for result in results], depth=depth)):
                    exact[i, line, column] = row["exact"] / row["samples"]
                    yield row
    if options.json is not None:
        maps = [(f"{run.method.label}\n1/{run.ratio}: {share.mean():.2f}", share)
                for run, share in zip(judge.runs, exact, strict=True)]
        plot_maps(options.json.with_suffix(".png"), maps, ("context", options.contexts), ("depth, %", options.depths),
                  "needles found", 0.0)


# ---------------------------------------------------------------------------------------------------------------- recall

class Probe(Selector):
    """Attends to everything, and notes what each run would have caught of it: every run is asked for the same queries."""

    def __init__(self, runs: list[Run], layer: int, top: int) -> None:
        super().__init__(0, 0)
        self.rows = 0  # sequences that count, the first of the batch
        self.chosen_by = [(run.method.layers[layer], run.budget) for run in runs]
        self.top, self.steps = top, 0  # steps: of all sequences
        self.mass: Tensor | float = 0.0  # [runs, Hkv], summed over steps and sequences; as `recall`
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
            selector.set_budget(budget, k.shape[2])
            indices = selector(q, k, seq_lens).long()
            chosen = torch.zeros(*indices.shape[:2], k.shape[2] + 1, dtype=torch.bool, device=k.device)
            chosen = chosen.scatter(-1, indices.masked_fill(indices < 0, k.shape[2]), True)[..., :-1]
            chosen = chosen.unflatten(1, (k.shape[1], -1)).expand_as(weights)
            mass.append((weights * chosen).sum(dim=-1)[:self.rows].mean(dim=2).sum(dim=0))
            hits = (chosen.gather(-1, best.indices) & counted).sum(dim=-1) / counted.sum(dim=-1).clamp(min=1)
            recall.append(hits[:self.rows].mean(dim=2).sum(dim=0))
        self.mass, self.recall = self.mass + torch.stack(mass), self.recall + torch.stack(recall)
        self.steps += self.rows
        return position.expand(*k.shape[:2], -1).masked_fill(position >= seq_lens[:, None, None], -1)


def recall(options: argparse.Namespace) -> Iterator[dict]:
    """One row per method and budget: attention mass caught and recall of the top tokens, by layer and KV head."""
    judge = DecodeEvaluator(options, len(options.data))
    runs = judge.runs[1:]
    if not runs:
        raise UserError("recall needs a --selector besides dense")
    probes = [Probe(runs, layer, options.top) for layer in range(len(judge.attentions))]
    probing = Run(Method("probe", probes), 1, options.context,
                  Decoder(judge.model, judge.batch, Sampling(temperature=0), compiled=False))  # its sums are in no CUDA graph
    start = options.context - options.last - 1
    for texts in tqdm(list(judge.batches(list(judge.texts().values()))), desc="texts", unit="batch", leave=False):
        for probe in probes:
            probe.rows = len(texts)
        judge.read([ids[:start] for ids in texts])
        judge.score(probing, texts, [start] * len(texts), 1)
    mass, caught = (torch.stack([getattr(probe, name) / probe.steps for probe in probes], dim=1).cpu()
                    for name in ("mass", "recall"))  # [runs, layers, Hkv]
    for run, share, recalled in zip(runs, mass, caught, strict=True):
        print(f"{run} budget {run.budget:5}  mass {share.mean():.4f} (least {share.min():.4f})  recall of the top "
              f"{options.top}: {recalled.mean():.4f} (least {recalled.min():.4f})", flush=True)
        yield {**judge.row(run), "last": options.last, "top": options.top, "mass": share.mean().item(),
               "recall": recalled.mean().item(), "mass_by_head": share.tolist(), "recall_by_head": recalled.tolist()}
    if options.json is not None:
        maps = [(f"{run.method.label}\n1/{run.ratio}: {share.mean():.3f}", share)
                for run, share in zip(runs, mass, strict=True)]
        plot_maps(options.json.with_suffix(".png"), maps, ("KV head", range(mass.shape[2])), ("layer", range(mass.shape[1])),
                  "attention mass caught", 0.5)


def plot_maps(path: Path, maps: list[tuple[str, Tensor]], across: tuple[str, Sequence[int]], down: tuple[str, Sequence[int]],
              label: str, least: float) -> None:
    """Heat maps side by side, from `least` to 1. maps: titles and values [down, across]; across, down: names and ticks."""
    import matplotlib
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    columns = min(6, len(maps))
    lines = -(-len(maps) // columns)
    height = max(2.0, 1 + 0.12 * len(down[1]))
    figure, axes = plt.subplots(lines, columns, figsize=(2.2 * columns + 1, height * lines + 1), squeeze=False,
                                layout="constrained")
    for axis in axes.flat[len(maps):]:
        axis.axis("off")
    for axis, (title, values) in zip(axes.flat, maps, strict=False):
        image = axis.imshow(values.numpy(), vmin=least, vmax=1, aspect="auto", cmap="viridis", interpolation="nearest")
        axis.set_title(title, fontsize=8)
        axis.set_xticks(range(len(across[1])), labels=map(str, across[1]))
        step = -(-len(down[1]) // 16)
        axis.set_yticks(range(0, len(down[1]), step), labels=map(str, down[1][::step]))
        axis.tick_params(labelsize=6)
    figure.supxlabel(across[0])
    figure.supylabel(down[0])
    figure.colorbar(image, ax=axes, label=label, shrink=0.6)
    with atomic_path(path) as beside:
        figure.savefig(beside, format="png", dpi=120)
    plt.close(figure)


# -------------------------------------------------------------------------------------------------------- other people's tasks

def lm(options: argparse.Namespace) -> Iterator[dict]:
    """One row per run, task and metric of lm-evaluation-harness."""
    try:
        from hashfast.research.harness import evaluate
    except ModuleNotFoundError as error:
        if error.name != "lm_eval":
            raise
        raise UserError("the lm command needs lm-evaluation-harness; pip install lm-eval") from error
    judge = DecodeEvaluator(options, options.batch_size)
    judge.prepare()
    for run, found in evaluate(judge, options):
        row = {**judge.row(run), **found, "tail": options.tail, "limit": options.limit, "chat": options.chat}
        print(f"{row['task']:24} {run} {row['metric']:24} {row['value']:.4f} of {row['samples']}", flush=True)
        yield row


# --------------------------------------------------------------------------------------------------------------- command

def parse_options(argv: list[str] | None = None) -> argparse.Namespace:
    shared = Parser(add_help=False)
    add = shared.add_argument
    add("--checkpoint_path", type=Path, required=True)
    add("--selector", nargs="+", choices=SELECTORS, default=["hash"], help="dense is always measured (default: hash)")
    add("--signatures", type=Path, nargs="+", default=[], help="files of train_hash.py; each is a hash selector of its own")
    add("--ratios", type=int, nargs="+", default=[16, 32], help="budget = context / ratio (default: 16 32)")
    add("--sink", type=int, default=64)
    add("--recent", type=int, default=128)
    add("--lsh_bits", type=int, default=128, choices=(32, 64, 128), help="bits of the lsh selector's random projections")
    add("--batch_size", type=int, default=8, help="texts decoded together")
    add("--seed", type=int, default=0)
    add("--device", default=default_device())
    add("--precision", choices=("float32", "bfloat16"), help="default: bfloat16 on a GPU, float32 on a CPU")
    add("--compile", action="store_true", help="compile the blocks of every decode step; pays off for few selectors")
    add("--json", type=Path, help="write the rows here, as they come")
    data = {"type": Path, "nargs": "+", "required": True, "help": "text files that no signature was trained on"}
    context = {"type": int, "default": 8192, "help": "tokens of each text or document, the decoded ones included"}
    dense_layers = {"type": int, "default": 0, "help": "first layers that attend to everything, whatever the selector"}
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    part = commands.add_parser("ppl", parents=[shared], help="teacher-forced perplexity of long texts")
    part.add_argument("--data", **data)
    part.add_argument("--context", **context)
    part.add_argument("--last", type=int, default=512, help="tokens that are scored, each after one decode step")
    part.add_argument("--dense_layers", **dense_layers)
    part.set_defaults(run=ppl)
    part = commands.add_parser("needles", parents=[shared], help="synthetic retrieval")
    part.add_argument("--data", **data)
    part.add_argument("--context", **context)
    part.add_argument("--tasks", nargs="+", choices=TASKS, default=list(TASKS))
    part.add_argument("--samples", type=int, default=32, help="documents per task")
    part.add_argument("--dense_layers", **dense_layers)
    part.set_defaults(run=needles)
    part = commands.add_parser("grid", parents=[shared], help="a single needle by context and depth; a PNG beside --json")
    part.add_argument("--data", **data)
    part.add_argument("--contexts", type=int, nargs="+", default=[8192, 16384, 32768], help="tokens of a document")
    part.add_argument("--depths", type=int, nargs="+", default=[0, 25, 50, 75, 100], help="percent of the document before it")
    part.add_argument("--samples", type=int, default=4, help="documents per context and depth")
    part.add_argument("--dense_layers", **dense_layers)
    part.set_defaults(run=grid)
    part = commands.add_parser("recall", parents=[shared], help="attention caught, by layer and head; a PNG beside --json")
    part.add_argument("--data", **data)
    part.add_argument("--context", **context)
    part.add_argument("--last", type=int, default=64, help="tokens whose attention is looked at")
    part.add_argument("--top", type=int, default=64, help="recall of this many tokens, outside sink and recent")
    part.set_defaults(run=recall, dense_layers=0)
    part = commands.add_parser("lm", parents=[shared], help="tasks of lm-evaluation-harness (pip install lm-eval)")
    part.add_argument("--tasks", nargs="+", required=True, help="names that the harness knows")
    part.add_argument("--include_path", type=Path, help="a folder with more tasks (YAML)")
    part.add_argument("--limit", type=int, help="documents per task; default: all")
    part.add_argument("--chat", action="store_true", help="wrap prompts in the model's chat template")
    part.add_argument("--context", **context)
    part.add_argument("--tail", type=int, default=64, help="last tokens of a prompt that are decoded, not prefilled")
    part.add_argument("--dense_layers", **dense_layers)
    part.set_defaults(run=lm)
    return check_options(parser.parse_args(argv))


def check_options(options: argparse.Namespace) -> argparse.Namespace:
    check_device(options.device)
    check_writable("--json", options.json)
    options.compile = options.compile and can_compile(options.device)
    if options.precision is None:
        options.precision = "bfloat16" if options.device.startswith("cuda") else "float32"
    least = {"sink": 0, "recent": 1, "dense_layers": 0, "seed": 0, "batch_size": 1, "samples": 1, "top": 1, "last": 1,
             "tail": 1, "limit": 1}
    for flag, low in least.items():
        value = getattr(options, flag, None)
        if value is not None and value < low:
            raise UserError(f"--{flag} {value} is out of range; it must be at least {low}")
    if min(options.ratios) < 1:
        raise UserError(f"--ratios {min(options.ratios)} is out of range; they must be at least 1")
    if options.command == "grid":
        options.contexts = sorted(set(options.contexts))
        options.context = options.contexts[0]
        if not 0 <= min(options.depths) <= max(options.depths) <= 100:
            raise UserError(f"--depths {' '.join(map(str, options.depths))} is out of range; they are percent, 0 to 100")
    if "last" in options and options.last >= options.context:
        raise UserError(f"--last {options.last} is out of range; it must be below --context {options.context}")
    if options.sink + options.recent > options.context:
        raise UserError(f"--sink {options.sink} and --recent {options.recent} are more than --context {options.context}")
    return options


def main() -> None:
    options = parse_options()
    rows, about = [], environment()  # before a results file that git knows is written over
    for row in options.run(options):
        rows.append(row)
        if options.json is not None:
            result = {**about, "command": command_line(), "rows": rows}
            with atomic_path(options.json) as beside:
                beside.write_text(json.dumps(result, indent=1) + "\n")
