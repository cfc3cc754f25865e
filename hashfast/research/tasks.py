"""Tasks of this project's own: perplexity of long texts, retrieval (needles.py), a grid of needles by context and depth."""
import contextlib
import functools
import itertools
import math
import os
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor
from tqdm import tqdm

from hashfast.common import UserError
from hashfast.research.evaluator import DecodeEvaluator, EvalConfig, Run
from hashfast.research.needles import Needle, make_needle
from hashfast.research.plots import heat_maps
from hashfast.research.report import ranged
from hashfast.runtime.prompt_cache import common_beginning
from hashfast.runtime.tokenizer import Tokenizer

SLACK = 32  # tokens of a context left free: documents are measured without what the chat template adds between their parts
EXTRA = 8  # tokens that a greedy answer may be longer than the true one


# ------------------------------------------------------------------------------------------------------------ perplexity

def ppl(config: EvalConfig, kinds: dict[str, dict[str, str]], last: int, most: int = 1) -> Iterator[dict]:
    """Rows of results/quality_ppl*.json: how far each run is from dense, by kind of text; of several kinds "all" of them first.

    kinds: texts by kind and name. Of at most `most` windows of config.context tokens of each, the last `last` are scored.
    Beside the perplexity and its ratio to dense: `kl`, KL(dense || run) over the whole vocabulary, mean per token in nats, and
    `agreement`, the share of tokens whose likeliest token is dense's. `*_interval`: 95 % bootstrap over the windows that dense
    and the run share. A ratio below 1 is no gain: attending to fewer tokens sharpens attention.
    """
    evaluator = DecodeEvaluator(config, most * sum(map(len, kinds.values())), kinds, most)
    windows = evaluator.given
    evaluator.prepare()
    start = config.context - last - 1
    parts: list[list[Tensor]] = [[] for _ in evaluator.runs]
    for batch in tqdm(list(evaluator.batches([ids for *_, ids in windows])), desc="texts", unit="batch", leave=False):
        starts, following = [start] * len(batch), torch.stack([ids[-last:] for ids in batch])
        evaluator.read([ids[:start] for ids in batch])
        dense = None
        for run, part in zip(evaluator.runs, parts, strict=True):
            hidden = evaluator.hidden(run, batch, starts, last)
            dense = hidden if dense is None else dense  # the first run
            part.append(evaluator.compare(dense, hidden, following))
    figures = [torch.cat(part, dim=1) for part in parts]  # [3, windows] of each run
    for kind in ["all", *kinds] if len(kinds) > 1 else kinds:
        own = torch.tensor([kind in (of, "all") for of, *_ in windows])
        names = [name for of, name, _ in windows if kind in (of, "all")]
        for run, figure in zip(evaluator.runs, figures, strict=True):
            row = {**evaluator.row(run), "kind": kind, "last": last, "windows": len(names),
                   **distance(figure[:, own], figures[0][0, own], names, config.seed)}
            print(f"{kind:9} {run} budget {run.budget:5}  KL {ranged(row, 'kl', 4)}  agreement {ranged(row, 'agreement', 3)}  "
                  f"perplexity {row['ppl']:8.3f}  ratio {ranged(row, 'ppl_ratio', 4)}", flush=True)
            yield row


def distance(figure: Tensor, dense: Tensor, names: list[str], seed: int) -> dict:
    """The figures of a row, over n windows of the texts `names`. figure float64 [3, n] as `DecodeEvaluator.compare` gives it,
    dense [n]: its negative log-likelihoods."""
    nll, kl, agreement = figure
    lost = nll - dense
    values = {"ppl_ratio": lost.exp(), "kl": kl, "agreement": agreement}
    places = {name: torch.tensor([name == other for other in names]) for name in dict.fromkeys(names)}
    return {
        "ppl": nll.mean().exp().item(),
        "ppl_ratio": lost.mean().exp().item(), "ratio_interval": [math.exp(end) for end in paired_interval(lost, seed)],
        "kl": kl.mean().item(), "kl_interval": paired_interval(kl, seed),
        "agreement": agreement.mean().item(), "agreement_interval": paired_interval(agreement, seed),
        "per_text": {name: lost[own].mean().exp().item() for name, own in places.items()},
        "per_window": {name: {key: [round(x, 7) for x in value[own].tolist()] for key, value in values.items()}
                       for name, own in places.items()}}


# --------------------------------------------------------------------------------------------------------------- needles

@dataclass(frozen=True)
class Question:
    """A retrieval document as tokens. ids int64 [T]: `context` of them are read densely, the last `answer` are the answer."""
    needle: Needle
    ids: Tensor
    context: int
    answer: int


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
    return Question(needle, torch.tensor(whole), common_beginning(context, asked), len(whole) - common_beginning(asked, whole))


class Source(Protocol):
    """What makes questions: `DecodeEvaluator`, and what else has its tokenizer, texts and seed."""
    tokenizer: Tokenizer
    read_text: Callable[[Path], str]
    config: EvalConfig


def make_question(evaluator: Source, data: list[Path], task: str, context: int, i: int,
                  depth: int | None = None) -> Question:
    """The i-th document of a task, of nearly `context` tokens. depth: where its fact lies, in percent (task "single")."""
    tokenizer = evaluator.tokenizer
    needle = make_needle(task, context - (chat_frame(tokenizer) or 0) - SLACK, evaluator.read_text(data[i % len(data)]),
                         evaluator.config.seed * 100_003 + i, length=lambda text: len(tokenizer.encode(text)),
                         depth=None if depth is None else depth / 100)
    return tokenize_needle(tokenizer, needle)


def score_answers(evaluator: DecodeEvaluator, run: Run, questions: list[Question]) -> list[tuple[bool, float]]:
    """Of each question: is the greedy answer right, and the true answer's negative log-likelihood per token.

    The contexts are in the caches; the questions are decoded, then the true answers. Where every likeliest token is the true
    answer's, that is the greedy answer; elsewhere the greedy one is decoded too, and must contain the answers (RULER's rule).
    """
    last = max(question.answer for question in questions)
    scores, likeliest = evaluator.score(run, [question.ids for question in questions],
                                        [question.context for question in questions], last)
    nll = [-score[-question.answer:].mean().item() for score, question in zip(scores, questions, strict=True)]
    exact = [torch.equal(tokens[-question.answer:], question.ids[-question.answer:])
             for tokens, question in zip(likeliest, questions, strict=True)]
    if not all(exact):
        lengths = [len(question.ids) - question.answer - 1 for question in questions]
        openings = [int(question.ids[length]) for question, length in zip(questions, lengths, strict=True)]
        answers = evaluator.continue_greedily(run, openings, lengths, last + EXTRA)
        exact = [good or is_right(evaluator.tokenizer, answer[:question.answer + EXTRA], question.needle)
                 for good, answer, question in zip(exact, answers, questions, strict=True)]
    return list(zip(exact, nll, strict=True))


def is_right(tokenizer: Tokenizer, answer: list[int], needle: Needle) -> bool:
    """Whether an answer, up to its end token, contains every true one."""
    stop = next((i for i, token in enumerate(answer) if token in tokenizer.stop_ids), len(answer))
    text = tokenizer.decode(answer[:stop])
    return all(wanted in text for wanted in needle.answers)


def score_all(evaluator: DecodeEvaluator, questions: Iterator[Question], count: int,
              name: str) -> list[list[tuple[bool, float]]]:
    """What `score_answers` gives for `count` questions, a list for each run."""
    results: list[list[tuple[bool, float]]] = [[] for _ in evaluator.runs]
    with tqdm(desc=name, total=count, unit="document", leave=False) as progress:
        while batch := list(itertools.islice(questions, evaluator.batch)):
            evaluator.read([question.ids[:question.context] for question in batch])
            for run, result in zip(evaluator.runs, results, strict=True):
                result += score_answers(evaluator, run, batch)
            progress.update(len(batch))
    return results


def paired_interval(differences: Tensor, seed: int) -> list[float]:
    """A 95 % bootstrap interval of the mean of paired differences [n]."""
    generator = torch.Generator().manual_seed(seed)
    drawn = torch.randint(len(differences), (10_000, len(differences)), generator=generator)
    return differences[drawn].mean(dim=1).quantile(torch.tensor([0.025, 0.975], dtype=differences.dtype)).tolist()


def score_rows(evaluator: DecodeEvaluator, results: list[list[tuple[bool, float]]], **about: object) -> Iterator[dict]:
    """One row per run over the same documents: `about`, right answers, likelihoods and their differences to dense."""
    likelihoods = [torch.tensor([nll for _, nll in result]) for result in results]
    for run, result, nll in zip(evaluator.runs, results, likelihoods, strict=True):
        difference = nll - likelihoods[0]
        row = {**evaluator.row(run), **about, "exact": sum(exact for exact, _ in result), "samples": len(result),
               "nll": nll.mean().item(), "nll_difference": difference.mean().item(),
               "nll_interval": paired_interval(difference, evaluator.config.seed),
               "per_sample": [{"exact": exact, "nll": round(nll, 5)} for exact, nll in result]}
        low, high = row["nll_interval"]
        title = " ".join(f"{value}" for value in about.values())
        print(f"{evaluator.context:6} {title:18} {run} exact {row['exact']:3} of {row['samples']}  nll {row['nll']:.4f}  "
              f"to dense {row['nll_difference']:+.4f} [{low:+.4f}, {high:+.4f}]  {row['bytes_per_token']:g} bytes", flush=True)
        yield row


@contextlib.contextmanager
def workers() -> Iterator[ThreadPoolExecutor]:
    """Threads that make documents ahead of their use; what is not begun when the block ends is dropped."""
    pool = ThreadPoolExecutor(min(16, os.cpu_count() or 1))
    try:
        yield pool
    finally:
        pool.shutdown(cancel_futures=True)


def needles(config: EvalConfig, data: list[Path], tasks: list[str], samples: int) -> Iterator[dict]:
    """Rows of results/quality_needles*.json: one per task, method and budget, over `samples` documents.

    data: text files that hide the facts. tasks: of needles.TASKS.
    """
    evaluator = DecodeEvaluator(config, samples)
    with workers() as pool:
        made = {task: pool.map(functools.partial(make_question, evaluator, data, task, config.context), range(samples))
                for task in tasks}
        evaluator.prepare()
        for task, questions in made.items():
            yield from score_rows(evaluator, score_all(evaluator, questions, samples, task), task=task)


def grid(config: EvalConfig, data: list[Path], contexts: list[int], depths: list[int], samples: int,
         plot: Path | None = None) -> Iterator[dict]:
    """Rows of results/needle_grid.json: one per context, depth, method and budget, over `samples` documents.

    contexts: in tokens, instead of config.context. depths: percent of the document before the needle; the documents of the
    depths differ in nothing else. plot: a PNG to write.
    """
    contexts = sorted(set(contexts))
    evaluator = DecodeEvaluator(replace(config, context=contexts[0]), len(depths) * samples)
    evaluator.check_context(contexts[-1])  # now, not after the shorter ones
    wanted = [(depth, i) for depth in depths for i in range(samples)]
    exact = torch.zeros(len(evaluator.runs), len(depths), len(contexts))
    with workers() as pool:
        made = {context: pool.map(lambda place, context=context: make_question(evaluator, data, "single", context, place[1],
                                                                               place[0]), wanted) for context in contexts}
        for column, (context, questions) in enumerate(made.items()):
            evaluator.resize(context)
            evaluator.prepare()
            results = score_all(evaluator, questions, len(wanted), f"context {context}")
            for line, depth in enumerate(depths):
                part = slice(line * samples, (line + 1) * samples)
                for i, row in enumerate(score_rows(evaluator, [result[part] for result in results], depth=depth)):
                    exact[i, line, column] = row["exact"] / row["samples"]
                    yield row
    if plot is not None:
        maps = [(f"{run.method.label}\n1/{run.ratio}: {share.mean():.2f}", share)
                for run, share in zip(evaluator.runs, exact, strict=True)]
        heat_maps(plot, maps, ("context", contexts), ("depth, %", depths), "needles found", 0.0)
