"""The evaluator: one dense prefill of a batch of texts, from which every selector decodes at every budget."""
import contextlib
import functools
import io
import math
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn
from tqdm import tqdm

from hashfast.common import UserError
from hashfast.model import PrefillSettings, Transformer
from hashfast.research.data import named_texts
from hashfast.research.selectors import Method, Observers, make_methods
from hashfast.runtime.checkpoint import load_model
from hashfast.runtime.decode import Decoder, pairs_read, prefill
from hashfast.runtime.prompts import read_text
from hashfast.runtime.sampling import Sampling
from hashfast.runtime.signatures import load_signatures, model_outline
from hashfast.runtime.tokenizer import Tokenizer

COMPARED_AT_ONCE = 64  # tokens whose logits `compare` holds at a time


@dataclass(frozen=True)
class EvalConfig:
    """What all tasks share.

    context: tokens of each text or document, the decoded ones included. A budget is context / ratio tokens, at least sink +
    recent. selectors: names in SELECTORS, beside dense. signatures: files, each a hash selector of its own. dense_layers: first
    layers that attend to everything. lsh_bits: of the lsh selector. batch_size: texts decoded together. compile: the blocks of
    every decode step, which pays off for few selectors. prefill: ways to read the texts, dense first; others by the first
    signatures.
    """
    checkpoint_path: Path
    context: int = 8192
    selectors: tuple[str, ...] = ("hash",)
    signatures: tuple[Path, ...] = ()
    ratios: tuple[int, ...] = (16, 32)
    sink: int = 64
    recent: int = 128
    dense_layers: int = 0
    lsh_bits: int = 128
    batch_size: int = 8
    seed: int = 0
    device: str = "cpu"
    precision: str = "float32"
    compile: bool = False
    prefill: tuple[PrefillSettings, ...] = (PrefillSettings(),)


@dataclass
class Run:
    """One line of a table: a method at a budget, after texts read as `prefill` says. ratio 1 is the whole context."""
    method: Method
    ratio: int
    budget: int
    decoder: Decoder | None = None
    prefill: PrefillSettings = PrefillSettings()

    def __str__(self) -> str:
        read = f" read 1/{self.prefill.sparsity:<3g}" if self.prefill.mode == "hash" else ""
        return f"{self.method.label:28} 1/{self.ratio:<3}{read}"


class DecodeEvaluator:
    """A model, its caches, and the runs that decode from them: dense, and every method at every ratio."""

    def __init__(self, config: EvalConfig, texts: int, kinds: dict[str, dict[str, str]] | None = None, most: int = 1) -> None:
        """texts: how many there will be; at most config.batch_size of them are in the caches at a time.

        kinds: texts by kind and name; `given` then holds their windows, `most` at most of each, with kind and name. What can be
        wrong is found before weights are read.
        """
        self.config, self.context = config, config.context
        self.batch = min(config.batch_size, texts)
        self.read_text = functools.cache(read_text)  # one file serves many documents
        self.model: Transformer = model_outline(config.checkpoint_path)
        self.check_context(config.context)
        self.check_signatures()
        self.tokenizer = Tokenizer.load(config.checkpoint_path)
        self.given = [(kind, name, ids) for kind, named in (kinds or {}).items()
                      for name, windows in self.windows(named, most).items() for ids in windows]
        self.model = load_model(config.checkpoint_path, config.device, getattr(torch, config.precision))
        self.attentions = [layer.attention for layer in self.model.layers]
        self.resize(config.context)

    def check_context(self, context: int) -> None:
        limit = min(self.model.args.max_position, self.model.args.sliding_window or context)
        if context > limit:
            raise UserError(f"--context {context} is more than the model's {limit}; give less")

    def check_signatures(self) -> None:
        for path in self.config.signatures:
            with contextlib.redirect_stderr(io.StringIO()):  # make_methods reads them again, and warns
                _, about = load_signatures(path, self.model.fingerprint())
            if "hash_calibrated" in self.config.selectors and not about.get("budgets"):
                raise UserError(f"{path} holds no calibrated budgets; measure them (train_hash.py --calibrate --out FILE), or "
                                "leave hash_calibrated out")

    def resize(self, context: int) -> None:
        """Make the caches, the methods and the runs for texts of `context` tokens."""
        config = self.config
        self.check_context(context)
        self.context, self.methods, self.runs = context, [], []
        for attention in self.attentions:
            attention.cache = attention.selector = None  # what was there goes before the new is made
        self.prompts: list[Tensor] = []
        self.read_as = config.prefill[0]
        encoders = None
        if any(way.mode == "hash" for way in config.prefill):
            encoders, _ = load_signatures(config.signatures[0], self.model.fingerprint())
        self.model.setup_caches(self.batch, context, encoders)
        for attention in self.attentions[:config.dense_layers]:
            attention.encoder = None
        self.methods = make_methods(["dense", *config.selectors], self.model, config.sink, config.recent, config.signatures,
                                    config.lsh_bits, config.dense_layers, config.seed)
        least = config.sink + config.recent
        for way in config.prefill:
            self.runs.append(Run(self.methods[0], 1, context, prefill=way))
            self.runs += [Run(method, ratio, min(context, max(math.ceil(context / ratio), least)), prefill=way)
                          for method in self.methods[1:] for ratio in config.ratios]
        for ratio in config.ratios:
            if context / ratio <= least:
                print(f"warning: 1/{ratio} of {context} tokens is no more than --sink and --recent, so nothing is selected; "
                      "give smaller --ratios", file=sys.stderr)

    def prepare(self) -> None:
        """Make the decode step of every run: on a GPU a CUDA graph of its own. Before the first text is read."""
        if self.config.compile:  # one compiled block serves all layers of a run, and all runs share its cache
            torch._dynamo.reset()  # of the runs before `resize`
            torch._dynamo.config.recompile_limit = 8 * len(self.runs)
        for run in tqdm(self.runs, desc="prepare", unit="run", delay=2, leave=False):
            run.decoder = Decoder(self.model, self.batch, Sampling(temperature=0), self.config.compile)
            self.use(run)
            run.decoder.prepare()

    def use(self, run: Run) -> Decoder:
        """Let decode steps select as `run` does, after texts read as it wants them. -> its decoder."""
        if self.prompts and run.prefill != self.read_as:
            self.read(self.prompts, run.prefill)
        for attention, selector in zip(self.attentions, run.method.layers, strict=True):
            attention.selector = selector
            if selector is not None:
                selector.set_budget(run.budget, self.context)
        return run.decoder

    @torch.inference_mode()
    def read(self, prompts: list[Tensor], way: PrefillSettings | None = None) -> None:
        """Prefill one cache row with each of up to `batch` prompts, int64 [T] each; every selector summarises them.

        way: how they are read, by default as the first run wants them; `use` reads them again for a run that differs.
        """
        self.prompts, self.read_as = prompts, way or self.config.prefill[0]
        for attention, *selectors in zip(self.attentions, *(method.layers for method in self.methods), strict=True):
            attention.selector = Observers([selector for selector in selectors if selector is not None])
        for row, ids in enumerate(prompts):
            if len(ids) == 0:
                continue
            prefill(self.model, ids.to(self.config.device), 1, row=row, settings=self.read_as)
            for method in self.methods:
                for attention, selector in zip(self.attentions, method.layers, strict=True):
                    if selector is not None:
                        selector.build(attention.cache.k, row, len(ids))

    def force(self, run: Run, texts: list[Tensor], starts: list[int], last: int) -> Iterator[tuple[Decoder, Tensor]]:
        """Decode the texts whose first `starts` tokens `read` has put into the cache, each step given the true token.

        texts: int64 [T] each, on the CPU. They are decoded as one batch and end together: a text with fewer tokens left
        repeats its first step until the others have caught up, writing the same cache row.
        -> after each of the last `last` steps the run's decoder and the tokens that follow, int64 [B]. Rows from len(texts) on
        repeat the first text; steps before a text's start are undefined.
        """
        decoder, device = self.use(run), self.config.device
        rows = [*range(len(texts)), *[0] * (self.batch - len(texts))]  # a batch that is not full repeats its first text
        steps = max(len(texts[row]) - 1 - starts[row] for row in rows)
        at = torch.stack([torch.arange(len(texts[row]) - 1 - steps, len(texts[row]) - 1).clamp(min=starts[row])
                          for row in rows], dim=1)  # [steps, B]
        tokens, following = (torch.stack([texts[row][(at[:, i] + ahead).clamp(max=len(texts[row]) - 1)]
                                          for i, row in enumerate(rows)], dim=1).to(device) for ahead in (0, 1))
        at = at.to(device)
        for i in range(steps):
            decoder.start(tokens[i], at[i])
            decoder.step()
            if i >= steps - last:
                yield decoder, following[i]

    @torch.inference_mode()
    def score(self, run: Run, texts: list[Tensor], starts: list[int], last: int) -> tuple[Tensor, Tensor]:
        """Teacher-forced decoding by `force` -> of the last `last` tokens of each text: log-likelihoods float32
        [texts, last], and the likeliest tokens in their places int64 [texts, last], on the CPU."""
        found, likeliest = [], []
        for decoder, following in self.force(run, texts, starts, last):
            found.append(likelihood(decoder.logits, following))
            likeliest.append(decoder.token[:, 0].clone())
        return torch.stack(found, dim=1)[:len(texts)].cpu(), torch.stack(likeliest, dim=1)[:len(texts)].cpu()

    @torch.inference_mode()
    def hidden(self, run: Run, texts: list[Tensor], starts: list[int], last: int) -> Tensor:
        """Teacher-forced decoding by `force` -> what the last `last` tokens are predicted from [texts, last, d]: 1/100 of the
        logits' memory, so that dense's can wait for every other run's."""
        steps = self.force(run, texts, starts, last)
        return torch.stack([decoder.hidden[:len(texts), 0].clone() for decoder, _ in steps], dim=1)

    def logits(self, hidden: Tensor) -> Tensor:
        """hidden [n, d] -> float32 [n, vocab], never rounded to the model's dtype: of logits near 20 bfloat16's rounding alone
        is a KL of about 0.001."""
        output, hidden = self.model.output, self.model.norm(hidden)
        if type(output) is not nn.Linear:  # quantised
            return output(hidden).float()
        if hidden.is_cuda and hidden.dtype != torch.float32:
            return torch.mm(hidden, output.weight.mT, out_dtype=torch.float32)
        return hidden.float() @ output.weight.float().mT

    @torch.inference_mode()
    def compare(self, dense: Tensor, hidden: Tensor, following: Tensor) -> Tensor:
        """A run beside dense: what `hidden` gave for both, [texts, last, d], and the true tokens int64 [texts, last]
        -> float64 [3, texts], means over a text's tokens: the negative log-likelihood and KL(dense || run) over the whole
        vocabulary, in nats, and the share of tokens whose likeliest token is dense's."""
        parts = []
        for rows in zip(*(x.flatten(0, 1).split(COMPARED_AT_ONCE) for x in (dense, hidden, following)), strict=True):
            full, sparse = (self.logits(x).log_softmax(dim=-1) for x in rows[:2])
            parts.append(torch.stack([
                -sparse.gather(-1, rows[2][:, None].to(sparse.device))[:, 0].double(),
                (full.exp() * (full - sparse)).sum(dim=-1, dtype=torch.float64),
                (full.argmax(dim=-1) == sparse.argmax(dim=-1)).double()]))
        return torch.cat(parts, dim=1).unflatten(1, following.shape).mean(dim=2).cpu()

    @torch.inference_mode()
    def continue_greedily(self, run: Run, tokens: list[int], lengths: list[int], count: int) -> list[list[int]]:
        """At most `count` tokens after each of `tokens`, which stand at `lengths` in caches that are filled up to there."""
        decoder = self.use(run)
        rows = [*range(len(tokens)), *[0] * (self.batch - len(tokens))]
        decoder.start(torch.tensor([tokens[row] for row in rows], device=self.config.device),
                      torch.tensor([lengths[row] for row in rows], device=self.config.device))
        chosen = []
        for _ in range(min(count, self.context - max(lengths))):
            decoder.step()
            chosen.append(decoder.token[:, 0].clone())
        return torch.stack(chosen, dim=1)[:len(tokens)].tolist()

    def batches(self, items: list) -> Iterator[list]:
        return (items[i:i + self.batch] for i in range(0, len(items), self.batch))

    def row(self, run: Run) -> dict:
        config, way = self.config, {}
        if len(config.prefill) > 1:
            way = {"prefill": run.prefill.mode, "prefill_sparsity": run.prefill.sparsity if run.prefill.mode == "hash" else 1,
                   "chunk": run.prefill.chunk, "pairs_read": pairs_read(self.context, run.prefill,
                                                                        config.dense_layers / len(self.attentions))}
        return {"model": config.checkpoint_path.resolve().name, "context": self.context, **run.method.about(),
                "ratio": run.ratio, "budget": run.budget, "sink": config.sink, "recent": config.recent,
                "dense_layers": config.dense_layers, "precision": config.precision, "seed": config.seed, **way}

    def windows(self, texts: dict[str, str], most: int) -> dict[str, list[Tensor]]:
        """Of every text, by name, its first windows of `context` tokens, int64 each: disjoint, as many as there are and at most
        `most`. Where the model has a bos token, each begins with it."""
        begin = self.tokenizer.encode("")
        size = self.context - len(begin)
        windows = {}
        for name, text in texts.items():
            ids = self.tokenizer.encode(text, bos=False)
            if len(ids) < size:
                raise UserError(f"the text {name} has {len(begin) + len(ids)} tokens, fewer than --context {self.context}; "
                                "give longer texts")
            windows[name] = [torch.tensor(begin + ids[i * size:(i + 1) * size]) for i in range(min(most, len(ids) // size))]
        return windows

    def texts(self, paths: list[Path]) -> dict[str, Tensor]:
        """The first `context` tokens of every text, int64 [context]."""
        return {name: windows[0] for name, windows in self.windows(named_texts(paths), 1).items()}


def likelihood(logits: Tensor, ids: Tensor) -> Tensor:
    """Log-likelihood of each token. logits [T, vocab] of the positions before ids int64 [T] -> float32 [T]."""
    return logits.float().log_softmax(dim=-1).gather(-1, ids[:, None])[:, 0]
