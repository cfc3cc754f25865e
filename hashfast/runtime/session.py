"""A session: a model with its caches and compiled decode step, through which prompts run, one at a time or as a batch."""
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from hashfast.common import UserError
from hashfast.hash_attention import HashEncoder
from hashfast.model import PrefillSettings, SparseSettings, Transformer
from hashfast.progress import Progress
from hashfast.runtime import distributed
from hashfast.runtime.decode import PREFILL_CHUNK, Decoder, decode_all, prefill, prepare_prefill, synchronize
from hashfast.runtime.prompt_cache import PromptCache, common_beginning
from hashfast.runtime.prompts import NewText, encode
from hashfast.runtime.sampling import Sampling, sample
from hashfast.runtime.speculate import Speculator
from hashfast.runtime.tokenizer import Tokenizer


@dataclass(frozen=True)
class DecodeOptions:
    """How a session reads and decodes.

    batch: sequences decoded together.  temperature: 0 is greedy.  top_k: None keeps the whole vocabulary.
    top_p: draw from the fewest tokens of this probability together.  stop: texts that end an answer, and are cut off.
    compile_prefill: on a GPU `compile` does that too for caches longer than a chunk; elsewhere it takes longer than it saves.
    prefill_chunk: prompt tokens read at a time; None: 4096 on a GPU, 2048 on a CPU.
    sparse_tail: last prompt tokens that go through decode steps, so that they are read sparsely too.
    speculate_k: tokens drafted per round, 0 without speculation.
    prefill: how prompts are read; of mode "hash" with its own chunk, and a model that has encoders.
    prompt_cache: a file of a prompt that was read, whose beginning is not read again; written after an answer unless
        prompt_cache_ro (runtime/prompt_cache.py).
    """
    batch: int = 1
    temperature: float = 0.8
    top_k: int | None = 200
    ignore_eos: bool = False
    compile: bool = False
    compile_prefill: bool = False
    prefill_chunk: int | None = None
    sparse_tail: int = 0
    speculate_k: int = 0
    top_p: float = 1.0
    stop: tuple[str, ...] = ()
    prefill: PrefillSettings = PrefillSettings()
    prompt_cache: Path | None = None
    prompt_cache_ro: bool = False


@dataclass
class Sample:
    """One run over a batch: new tokens per sequence (end tokens included) and its times in seconds.

    reused: tokens of each prompt that came from a prompt file.
    """
    tokens: list[list[int]]
    prefill_s: float
    decode_s: float
    steps: int
    reused: int = 0


def check_finite(logits: Tensor) -> None:
    if not logits.isfinite().all():
        raise UserError("the model's logits are not finite (NaN or infinity); its weights are damaged, or too large for this "
                        "--precision: download them again, or try float32")


class Session:
    """A loaded model with caches of `length` tokens and a decode step; runs prompts through it.

    tokenizer: its end tokens end a sequence; None: none does, and prompts are token ids.
    encoders, settings: one HashEncoder per layer and what a step reads by them; None is dense attention.
    draft: a smaller model that speculates; encoders and settings are its own then. None: with `speculate_k` the model drafts by
        its hash attention.
    """

    def __init__(self, model: Transformer, tokenizer: Tokenizer | None, length: int, encoders: list[HashEncoder] | None = None,
                 settings: SparseSettings | None = None, options: DecodeOptions | None = None,
                 draft: Transformer | None = None) -> None:
        self.options = options = options or DecodeOptions()
        self.model, self.tokenizer, self.length, self.settings = model, tokenizer, length, settings
        weight = model.tok_embeddings.weight
        self.device = weight.device
        self.chunk = options.prefill_chunk or PREFILL_CHUNK[self.device.type]
        if options.prefill.mode == "hash":
            self.chunk = options.prefill.chunk
        if distributed.world_size() > 1 and weight.is_cuda:
            distributed.use_one_shot(options.batch * (1 + options.speculate_k) * model.args.dim, weight.dtype)
        if draft is not None:
            model.setup_caches(options.batch, length + options.speculate_k)
        drafter = draft or model
        drafter.setup_caches(options.batch, length + options.speculate_k, encoders, settings)
        self.prompt_cache: PromptCache | None = None
        if options.prompt_cache is not None:
            self.prompt_cache = PromptCache(options.prompt_cache, model, options.prefill, options.prompt_cache_ro)
        self.reused = 0  # tokens of each of the last prompts that came from it
        self.unsaved: list[list[int]] = []  # what of them was prefilled, which it may hold
        self.sampling = Sampling(options.temperature, options.top_k, options.top_p)
        self.stop_ids = frozenset() if options.ignore_eos or tokenizer is None else tokenizer.stop_ids
        self.decoder = Decoder(model, options.batch, self.sampling, options.compile, self.stop_ids)
        self.speculator: Speculator | None = None
        if options.speculate_k:
            self.speculator = Speculator(self.decoder, drafter, options.speculate_k, settings, options.compile)
        with Progress("compiling" if options.compile or options.compile_prefill else "the first step"):
            self.compile_s = (self.speculator or self.decoder).prepare()
            if options.compile_prefill or options.compile and weight.is_cuda and length > self.chunk:
                self.compile_s += prepare_prefill(model, self.chunk, options.prefill)
        self.cached: list[int] = []  # tokens in the cache, for prompts that go on from it

    def generate(self, prompt: str | list[dict], max_new_tokens: int = 200, chat: bool = False) -> str:
        """The text that follows `prompt`; with `chat`, or for a list of messages (role and content), the model's answer."""
        ids, is_chat = encode(prompt, self.tokenizer, self.model.args.vocab_size, chat)
        (tokens, *_) = self.run([ids], max_new_tokens).tokens
        return NewText(self.tokenizer, [] if is_chat else ids, self.options.stop).whole(tokens)

    def run(self, prompts: list[list[int]], max_new_tokens: int,
            emit: Callable[[int, int, bool], None] = lambda *new: None) -> Sample:
        """Prefill and decode one prompt for all sequences or one for each, up to the caches' end.

        emit(sequence, token, whether it is that sequence's last) is called for each token. What the caches already hold of a
        single prompt is not read again. UserError where logits are not finite.
        """
        count = min(max_new_tokens, self.length - max(map(len, prompts)))
        if count < 1:
            raise UserError(f"a prompt of {max(map(len, prompts))} tokens leaves no room in caches of {self.length}; "
                            "make them longer or the prompt shorter")
        synchronize(self.device.type)
        started = time.perf_counter()
        first = self.first_token(prompts)
        synchronize(self.device.type)
        prefilled = time.perf_counter()
        lengths = torch.tensor([len(ids) for ids in prompts], device=self.device)
        if self.options.stop:
            emit = self._until_stop(prompts, emit)
        if self.speculator is not None:
            tokens, steps = self.speculator.decode_all(prompts, first, count, emit)
        else:
            tokens, steps = decode_all(self.decoder, first, lengths, count, self.stop_ids, emit)
            if steps:
                check_finite(self.decoder.logits)
        if len(prompts) == 1:
            self.cached = prompts[0] + tokens[0][:-1]  # the newest token has no K and V yet
        sample = Sample(tokens, prefilled - started, time.perf_counter() - prefilled, steps, self.reused)
        if self.unsaved:
            self.prompt_cache.save(self.unsaved)
        return sample

    def _until_stop(self, prompts: list[list[int]], emit: Callable[[int, int, bool], None]) -> Callable[[int, int, bool], bool]:
        """`emit` for decode_all: sequences whose text has come to one of `options.stop` end."""
        streams = [NewText(self.tokenizer, prompts[i % len(prompts)], self.options.stop) for i in range(self.options.batch)]

        def put(i: int, token: int, last: bool) -> bool:
            streams[i].put(token)
            emit(i, token, last or streams[i].stopped)
            return streams[i].stopped
        return put

    def first_token(self, prompts: list[list[int]]) -> Tensor:
        """Put prompts into the caches -> the first new token of each sequence, int64 [B]."""
        batch, tail_tokens = self.options.batch, self.options.sparse_tail
        cached = self.cached if len(prompts) == 1 else []
        kept = in_memory = common_beginning(cached, prompts[0][:-1])
        self.reused, self.unsaved = 0, []
        if self.prompt_cache is not None and kept == 0:  # later turns of a chat are in part what decode steps wrote
            self.unsaved = [ids[:max(len(ids) - tail_tokens, 1)] for ids in prompts]
            self.prompt_cache.check_room(self.unsaved)
            kept = self.reused = self.prompt_cache.load(self.unsaved)
        self.cached = prompts[0][:kept] if len(prompts) == 1 else []  # what holds if this is interrupted
        tails = [min(tail_tokens, len(ids) - kept - 1) for ids in prompts]
        logits = torch.stack([
            prefill(self.model, torch.tensor(ids[kept:len(ids) - tail], device=self.device), batch // len(prompts), kept,
                    chunk=self.chunk, row=row, settings=self.options.prefill)
            for row, (ids, tail) in enumerate(zip(prompts, tails, strict=True))])
        if self.speculator is not None:
            self.speculator.read_prompts(prompts, in_memory, self.chunk)
        self.cached = list(prompts[0]) if len(prompts) == 1 else []
        for back in range(max(tails), 0, -1):
            # a shorter tail waits at its first token, which is written again to the same place
            at = [len(ids) - min(back, max(tail, 1)) for ids, tail in zip(prompts, tails, strict=True)]
            tokens = torch.tensor([ids[i] for ids, i in zip(prompts, at, strict=True)], device=self.device)
            self.decoder.start(tokens.expand(batch), torch.tensor(at, device=self.device))
            self.decoder.step()
            logits = self.decoder.logits
        check_finite(logits)
        return sample(logits.expand(batch, -1), self.sampling)

    @torch.inference_mode()
    def teacher_force(self, ids: list[int], tokens: list[int]) -> tuple[float, float]:
        """Decode given tokens after the prompt in the cache -> (share that is this run's argmax, mean log-likelihood).

        The first token comes from the prompt's last logits, not from a decode step, and is not counted.
        """
        agree, total = 0, 0.0
        for i, (token, following) in enumerate(zip(tokens, tokens[1:], strict=False)):
            self.decoder.start(torch.full_like(self.decoder.token[:, 0], token), len(ids) + i)
            self.decoder.step()
            logprobs = self.decoder.logits[0].float().log_softmax(-1)
            agree += int(logprobs.argmax().item() == following)
            total += logprobs[following].item()
        self.cached = list(ids)
        return agree / (len(tokens) - 1), total / (len(tokens) - 1)
