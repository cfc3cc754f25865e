"""Tasks of lm-evaluation-harness, answered by decode steps. Needs the package lm_eval.

A prompt is read densely but for its last `tail` tokens (the question, as a rule); these, what is generated and every
continuation that is scored go through decode steps, so that the run's selector matters wherever a token is predicted. The
budget is that of the evaluator's context, whatever a prompt's length: one no longer than the budget is attended to in full.

Texts are encoded and cut to the context, which is HFLM's max_length, as the harness's own HFLM does it (lm_eval 0.4.13).
"""
import random
from collections.abc import Iterator
from pathlib import Path

import lm_eval
import numpy
import torch
from lm_eval.api.instance import Instance
from lm_eval.api.model import TemplateLM
from lm_eval.tasks import TaskManager
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window
from tqdm import tqdm

from hashfast.common import UserError
from hashfast.research.evaluator import DecodeEvaluator, EvalConfig, Run

STRIDE = 16  # tokens generated between looks at whether all answers have ended
LIMITS = ("max_gen_toks", "max_new_tokens", "max_tokens", "max_completion_tokens")  # a task's names for the most new tokens


class DecodeLM(TemplateLM):
    """The harness's interface to one run. Greedy only."""

    def __init__(self, evaluator: DecodeEvaluator, run: Run, tail: int, chat: bool) -> None:
        super().__init__()
        self.evaluator, self.run, self.tail, self.chat = evaluator, run, tail, chat

    @property
    def eot_token_id(self) -> int:
        """The tokenizer's eos; where it names none, a token that ends a text."""
        eos = self.evaluator.tokenizer.eos_id
        return min(self.evaluator.tokenizer.stop_ids, default=0) if eos is None else eos

    @property
    def prefix_token_id(self) -> int:
        bos = self.evaluator.tokenizer.bos_id
        return self.eot_token_id if bos is None else bos

    @property
    def tokenizer_name(self) -> str:
        return self.evaluator.config.checkpoint_path.resolve().name

    def apply_chat_template(self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True) -> str:
        chat_text = self.evaluator.tokenizer.chat_text
        if add_generation_prompt:
            return chat_text(chat_history)
        return chat_text(chat_history[:-1]) + chat_history[-1]["content"]  # the task begins the model's answer itself

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **kwargs: object) -> list[int]:
        # a chat template writes bos and the other special tokens out
        return self.evaluator.tokenizer.encode(string, bos=not self.chat and add_special_tokens is not False, special=self.chat)

    def batches(self, requests: list, lengths: list[int], name: str, quiet: bool) -> Iterator[list[int]]:
        """Indices of requests to answer together: those of similar `lengths`, the most tokens to decode first."""
        order = sorted(range(len(requests)), key=lambda i: -lengths[i])
        with tqdm(desc=name, total=len(order), unit="request", leave=False, disable=quiet) as progress:
            for batch in self.evaluator.batches(order):
                yield batch
                progress.update(len(batch))

    def _loglikelihood_tokens(self, requests: list[tuple[tuple[str, str], list[int], list[int]]],
                              disable_tqdm: bool = False, **kwargs: object) -> list[tuple[float, bool]]:
        """Of each (texts, context ids, continuation ids): the continuation's log-likelihood, and whether it is the greedy one.

        Too long a text is cut off on the left: the cache holds all but its last token, which is only predicted.
        """
        evaluator = self.evaluator
        for request in requests:
            if not 1 <= len(request[2]) <= evaluator.context:
                raise UserError(f"a continuation of this task has {len(request[2])} tokens, but 1 to {evaluator.context} fit; "
                                "give more --context")
        answers: list[tuple[float, bool]] = [(0.0, True)] * len(requests)
        for batch in self.batches(requests, [len(request[2]) for request in requests], "score", disable_tqdm):
            contexts = [requests[i][1] or [self.prefix_token_id] for i in batch]
            texts = [torch.tensor((before + requests[i][2])[-(evaluator.context + 1):])
                     for i, before in zip(batch, contexts, strict=True)]
            counts = [len(requests[i][2]) for i in batch]
            starts = [max(0, len(ids) - count - self.tail) for ids, count in zip(texts, counts, strict=True)]
            evaluator.read([ids[:start] for ids, start in zip(texts, starts, strict=True)])
            scores, likeliest = evaluator.score(self.run, texts, starts, max(counts))
            for i, ids, count, score, tokens in zip(batch, texts, counts, scores, likeliest, strict=True):
                answers[i] = (score[-count:].sum().item(), torch.equal(tokens[-count:], ids[-count:]))
        return answers

    def loglikelihood_rolling(self, requests: list[Instance], disable_tqdm: bool = False) -> list[float]:
        """The log-likelihood of each whole text, in windows of the cache's length, every token by a decode step."""
        windows, owners = [], []
        for owner, request in enumerate(requests):
            ids = self.tok_encode(request.args[0])
            for window in get_rolling_token_windows(ids, self.prefix_token_id, self.evaluator.context, 1):
                windows.append((("", ""), *make_disjoint_window(window)))
                owners.append(owner)
        totals = [0.0] * len(requests)
        for owner, (score, _) in zip(owners, self._loglikelihood_tokens(windows, disable_tqdm), strict=True):
            totals[owner] += score
        return totals

    def generate_until(self, requests: list[Instance], disable_tqdm: bool = False) -> list[str]:
        """The greedy answer to each prompt, up to an end token, one of its `until` strings or `max_gen_toks` tokens.

        A prompt keeps the last tokens that leave room for as many new ones as it may get, whatever it is answered with.
        """
        prompts = [self.tok_encode(request.args[0]) or [self.prefix_token_id] for request in requests]
        settings = [request.args[1] for request in requests]
        for wanted in settings:
            if wanted.get("do_sample") or wanted.get("temperature"):
                raise UserError("this task samples its answers; only greedy ones (do_sample: false) are supported")
        limits = [next((wanted[name] for name in LIMITS if wanted.get(name) is not None), 256) for wanted in settings]
        if max(limits, default=0) >= self.evaluator.context:
            raise UserError(f"this task generates up to {max(limits)} tokens, which leaves no room for a prompt in --context "
                            f"{self.evaluator.context}; give more")
        answers = [""] * len(requests)
        for limit in sorted(set(limits), reverse=True):  # all prompts of a batch leave the same room
            chosen = [i for i in range(len(requests)) if limits[i] == limit]
            for batch in self.batches(chosen, [len(prompts[i]) for i in chosen], "generate", disable_tqdm):
                batch = [chosen[i] for i in batch]
                texts = self.generate([torch.tensor(prompts[i][limit - self.evaluator.context:]) for i in batch], limit,
                                      [settings[i].get("until") or [] for i in batch])
                for i, text in zip(batch, texts, strict=True):
                    answers[i] = text
        return answers

    def generate(self, prompts: list[torch.Tensor], limit: int, until: list[str | list[str]]) -> list[str]:
        """One batch of `generate_until`. prompts: int64 [T] each, which fit the cache together with `limit` new tokens."""
        evaluator = self.evaluator
        starts = [max(0, len(ids) - 1 - self.tail) for ids in prompts]
        evaluator.read([ids[:start] for ids, start in zip(prompts, starts, strict=True)])
        if max(map(len, prompts)) > 1:
            evaluator.score(self.run, prompts, starts, 1)  # the tails, but for the last token of each
        tokens: list[list[int]] = [[] for _ in prompts]
        for done in range(0, limit, STRIDE):
            last = [new[-1] if new else int(ids[-1]) for new, ids in zip(tokens, prompts, strict=True)]
            lengths = [len(ids) - 1 + done for ids in prompts]
            more = evaluator.continue_greedily(self.run, last, lengths, min(STRIDE, limit - done))
            tokens = [old + new for old, new in zip(tokens, more, strict=True)]
            answers = [self.cut(new, limit, stops) for new, stops in zip(tokens, until, strict=True)]
            if all(ended for _, ended in answers):
                break
        return [text for text, _ in answers]

    def cut(self, tokens: list[int], limit: int, until: str | list[str]) -> tuple[str, bool]:
        """The answer's text, up to its end, and whether that was reached."""
        stop_ids = self.evaluator.tokenizer.stop_ids
        end = next((i for i, token in enumerate(tokens[:limit]) if token in stop_ids), min(limit, len(tokens)))
        text = self.evaluator.tokenizer.decode(tokens[:end])
        ends = [text.index(stop) for stop in ([until] if isinstance(until, str) else until) if stop and stop in text]
        return text[:min(ends, default=None)], bool(ends) or end < len(tokens) or end == limit


def load_tasks(names: list[str], include_path: Path | None, metadata: dict) -> list:
    """The harness's tasks and groups of these names, loaded once for all runs.

    metadata: what tasks that make their own data are told (RULER: "tokenizer", "max_seq_lengths"). They draw from the global
    generators, seeded as the harness seeds them.
    """
    manager = TaskManager(include_path=None if include_path is None else str(include_path), metadata=metadata)
    unknown = [name for name in names if name not in manager.all_tasks]
    if unknown:
        raise UserError(f"the harness knows no task {unknown[0]!r}; give --include_path with its YAML file, or another name")
    random.seed(0)
    numpy.random.seed(1234)
    try:
        loaded = manager.load(list(names))
    except ImportError as error:
        raise UserError(f"the data of {' '.join(names)} need a package that is not installed ({error}); RULER's: pip install "
                        "wonderwords nltk") from error
    except OSError as error:  # the harness reads its data from files or from the network
        raise UserError(f"cannot read the data of {' '.join(names)}: {error}; check the task's files") from error
    groups = {name: group for name, group in loaded["groups"].items() if name in names}
    grouped = {child for children in loaded["group_map"].values() for child in children}
    return [*groups.values(), *(task for name, task in loaded["tasks"].items() if name in names or name not in grouped)]


def lm(config: EvalConfig, tasks: list[str], include_path: Path | None = None, limit: int | None = None, tail: int = 64,
       chat: bool = False, metadata: dict | None = None) -> Iterator[dict]:
    """One row per run, task and metric (the harness's name, its filter behind a comma).

    include_path: a folder with more tasks (YAML). limit: documents per task. tail: last tokens of a prompt that are decoded,
    not prefilled. chat: wrap prompts in the model's chat template. metadata: as for `load_tasks`, beside the tokenizer.
    """
    wanted = load_tasks(tasks, include_path, {"tokenizer": str(config.checkpoint_path)} | (metadata or {}))
    evaluator = DecodeEvaluator(config, config.batch_size)
    evaluator.prepare()
    manager = TaskManager(include_defaults=False)  # it has nothing to load
    for run in evaluator.runs:
        results = lm_eval.simple_evaluate(
            DecodeLM(evaluator, run, tail, chat), tasks=wanted, limit=limit, task_manager=manager,
            apply_chat_template=chat, log_samples=False, bootstrap_iters=0, fewshot_random_seed=config.seed)
        for task, figures in results["results"].items():
            samples = results["n-samples"].get(task, {}).get("effective")
            for metric, value in figures.items():
                if not isinstance(value, float | int) or "," not in metric or "_stderr" in metric:
                    continue
                if metric.split(",")[0].isdigit() and value == -1:
                    continue  # RULER's, of a length that has no documents
                print(f"{task:24} {run} {metric:24} {value:.4f} of {samples}", flush=True)
                yield {**evaluator.row(run), "task": task, "metric": metric, "value": float(value), "samples": samples,
                       "tail": tail, "limit": limit, "chat": chat}
