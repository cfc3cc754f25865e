"""Speculative decoding: k tokens are drafted cheaply, one pass of the model over all of them keeps those it would have chosen.

    python generate.py --checkpoint_path ... --speculate self --speculate_k 4 --sparsity 32 --signatures FILE --compile
    python generate.py --checkpoint_path ... --draft_checkpoint_path SMALLER_MODEL --speculate_k 4 --compile

self    the model drafts for itself: same weights, same cache, but each draft step reads only what signatures select
draft   a smaller model of the same vocabulary, with a cache of its own, which may be dense or sparse

Verifying is dense, and rejection sampling (Leviathan et al., arXiv 2211.17192) keeps the dense model's distribution exactly,
whatever the drafts are; greedy tokens are its argmax at every position. The verify pass overwrites the
drafts' K, V and signatures in a shared cache by those of dense attention's hidden states.

A round (drafting, verifying, accepting) has static shapes and no host sync: one CUDA graph on a GPU. Every sequence accepts
as many tokens as it does, so lengths differ within a batch; they live on the device.

Symbols: B batch, k drafted tokens per round, N tokens in a cache.
"""
import time
from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from hashfast.common import UserError
from hashfast.model import SparseSettings, Transformer
from hashfast.runtime import distributed
from hashfast.runtime.decode import Decoder, capture, compile_parts, prefill
from hashfast.runtime.memory import context_limit
from hashfast.runtime.sampling import argmax, gumbel_sample, probabilities
from hashfast.runtime.tokenizer import Tokenizer

# ---------------------------------------------------------------------------------------------------------------- accept

def leading(kept: Tensor) -> Tensor:
    """How many come before the first False. bool [B, k] -> int64 [B], 0 .. k."""
    k = kept.shape[1]
    return torch.where(kept, k, torch.arange(k, device=kept.device)).amin(dim=1)


def accept_greedy(choice: Tensor, drafted: Tensor) -> tuple[Tensor, Tensor]:
    """The drafts that equal the model's own choice, and its choice after them.

    choice int64 [B, k + 1]: argmax after each of the k + 1 verified tokens; drafted int64 [B, k]
    -> accepted int64 [B], the token that follows them int64 [B].
    """
    accepted = leading(drafted == choice[:, :-1])
    return accepted, choice.gather(1, accepted[:, None])[:, 0]


def accept_sampled(p: Tensor, q: Tensor, drafted: Tensor) -> tuple[Tensor, Tensor]:
    """Rejection sampling: what it keeps and adds is distributed as p, if each draft was drawn from its q.

    p float32 [B, k + 1, vocab]: the model's probabilities after each verified token; q float32 [B, k, vocab]: those that the
    drafts int64 [B, k] were drawn from -> accepted int64 [B], the token that follows them int64 [B].
    A draft is kept with probability min(1, p / q). After the first that is not, the next token comes from max(p - q, 0),
    normalised; after k kept ones from the last p.
    """
    p_drafted = p[:, :-1].gather(2, drafted[..., None])[..., 0]  # [B, k]
    q_drafted = q.gather(2, drafted[..., None])[..., 0]
    accepted = distributed.from_first(leading(torch.rand_like(q_drafted) * q_drafted < p_drafted))
    at = accepted[:, None, None].expand(-1, 1, p.shape[2])
    p = p.gather(1, at)[:, 0]
    q = F.pad(q, (0, 0, 0, 1)).gather(1, at)[:, 0]  # nothing was drafted after k kept ones: q is 0 there
    rest = (p - q).clamp(min=0)
    # where p = q rounding may reject a draft all the same and leave nothing over
    return accepted, gumbel_sample(torch.where(rest.sum(dim=1, keepdim=True) > 0, rest, p))


# ----------------------------------------------------------------------------------------------------------------- rounds

class Speculator:
    """Rounds of drafting and verifying for the model of a Decoder, whose compiled block, sampling and end tokens they share.

    Before the model's caches, and a draft model's, N tokens long each, k more rows are needed: a round may write that many
    past the last token that a sequence gets.

    recent int64 [B, 2]: the last two tokens of every sequence; the newer has no K and V yet.
    seq_lens int32 [B]: tokens in the cache.
    left int64 [B]: tokens that a sequence may still get; 0 when it has ended. A round then writes rows past its end, no more.
    outcome int64 [B, 3 + k + 1]: of the last round, for the host: drafts accepted, new tokens, `left`, and the new tokens
        (what comes after them is no token of the sequence).
    """

    def __init__(self, target: Decoder, draft: Transformer, k: int, settings: SparseSettings | None, compiled: bool) -> None:
        """draft: the model itself (then `settings` say what it reads as it drafts) or another (None: everything)."""
        batch, device = target.token.shape[0], target.token.device
        self.target, self.draft, self.k, self.settings = target, draft, k, settings
        self.is_self = draft is target.model
        self.recent = torch.zeros(batch, 2, dtype=torch.int64, device=device)
        self.seq_lens = torch.zeros(batch, dtype=torch.int32, device=device)
        self.left = torch.zeros(batch, dtype=torch.int64, device=device)
        self.outcome = torch.zeros(batch, 3 + k + 1, dtype=torch.int64, device=device)
        self.stem, self.draft_stem, self.propose, self.judge = target.model.stem, draft.stem, self._propose, self._judge
        if compiled:
            self.stem, self.draft_stem, self.propose, self.judge = compile_parts(
                device, self.stem, self.draft_stem, self.propose, self.judge)
        self.graph: torch.cuda.CUDAGraph | None = None
        self.rounds = 0
        self.histogram = [0] * (k + 1)  # how often 0 .. k drafts of a sequence were accepted
        draft.set_sparse(None)  # but for drafting, a step of a shared model is dense

    def _forward(self, model: Transformer, stem: Callable, tokens: Tensor, ahead: int) -> Tensor:
        """tokens int64 [B, T], the last of them `ahead` of the cached ones -> hidden states [B, T, d]."""
        seq_lens = self.seq_lens + ahead
        x, cos, sin = stem(tokens, seq_lens)
        for layer in model.layers:
            x = self.target.block(layer, x, cos, sin, seq_lens)
        return x

    def _propose(self, x: Tensor) -> tuple[Tensor, Tensor | None]:
        """Hidden states [B, T, d] -> the next token int64 [B, 1] and what it was drawn from [B, vocab] (greedy: None)."""
        logits = self.draft.logits(x[:, -1])
        if self.target.sampling.greedy:
            return argmax(logits)[:, None], None
        q = probabilities(logits, self.target.sampling)
        return gumbel_sample(q)[:, None], q

    def draft_tokens(self) -> tuple[list[Tensor], list[Tensor | None]]:
        """k drafts, int64 [B, 1] each, and what they were drawn from.

        A draft model reads two tokens first: where all drafts of the last round were accepted, the last of them, now the
        older of `recent`, has not been in it yet.
        """
        self.draft.set_sparse(self.settings)
        tokens = self.recent[:, 1:].contiguous() if self.is_self else self.recent  # strides as of the drafts: one compilation
        drafted, drawn_from = [], []
        for i in range(self.k):
            tokens, q = self.propose(self._forward(self.draft, self.draft_stem, tokens, 1 + i))
            drafted.append(tokens)
            drawn_from.append(q)
        self.draft.set_sparse(None)
        return drafted, drawn_from

    def verify(self, drafted: list[Tensor]) -> Tensor:
        """Hidden states [B, k + 1, d] of the newest token and the drafts; their K, V and signatures go to the cache."""
        return self._forward(self.target.model, self.stem, torch.cat((self.recent[:, 1:], *drafted), dim=1), self.k + 1)

    def _judge(self, x: Tensor, drafted: list[Tensor], drawn_from: list[Tensor | None], recent: Tensor, seq_lens: Tensor,
               left: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """-> the next recent, seq_lens and left, and the outcome. A sequence ends with an end token or with none left."""
        logits, drafts = self.target.model.logits(x), torch.cat(drafted, dim=1)  # [B, k + 1, vocab], [B, k]
        if self.target.sampling.greedy:
            accepted, following = accept_greedy(argmax(logits), drafts)
        else:
            accepted, following = accept_sampled(probabilities(logits, self.target.sampling), torch.stack(drawn_from, dim=1),
                                                 drafts)
        slot = torch.arange(self.k + 1, device=x.device)
        tokens = torch.where(slot < accepted[:, None], F.pad(drafts, (0, 1)), following[:, None])  # [B, k + 1]
        is_end = (tokens[..., None] == self.target.stop_ids).any(dim=-1) & (slot <= accepted[:, None])
        end = torch.where(is_end, slot, self.k + 1).amin(dim=1)  # the slot of the first end token
        count = torch.minimum(torch.minimum(accepted, end) + 1, left)
        left = torch.where(end < count, 0, left - count)
        recent = torch.cat((recent, tokens), dim=1).gather(1, count[:, None] + slot[:2])
        return recent, seq_lens + count.int(), left, torch.cat((torch.stack((accepted, count, left), dim=1), tokens), dim=1)

    def _round(self) -> None:
        drafted, drawn_from = self.draft_tokens()
        state = self.recent, self.seq_lens, self.left
        changed = self.judge(self.verify(drafted), drafted, drawn_from, *state)
        for old, new in zip((*state, self.outcome), changed, strict=True):
            old.copy_(new)

    @torch.inference_mode()
    def prepare(self) -> float:
        """Compile, and capture the graph on a GPU. Writes the first cache rows, so call it before the prefill. -> seconds."""
        started = time.perf_counter()
        self.seq_lens.fill_(1)  # a draft model begins one token back
        self.left.zero_()
        if self.recent.is_cuda:
            self.graph = capture(self._round, lambda: None)  # with no tokens left a round changes nothing here
        else:
            self._round()
        return time.perf_counter() - started

    @torch.inference_mode()
    def round(self) -> None:
        if self.graph is None:
            self._round()
        else:
            self.graph.replay()

    def read_prompts(self, prompts: list[list[int]], kept: int, chunk: int) -> None:
        """Prefill a draft model with prompts, one for all sequences or one for each, of which `kept` tokens are cached."""
        if self.is_self:
            return
        device = self.recent.device
        kept = max(kept - 1, 0)  # the last cached token may be a draft that it has not read
        for row, ids in enumerate(prompts):
            prefill(self.draft, torch.tensor(ids[kept:], device=device), len(self.recent) // len(prompts), kept, chunk, row)

    def start(self, prompts: list[list[int]], first: Tensor, left: Tensor) -> None:
        """The next round goes on from prompts that are cached, one for all sequences or one for each.

        first int64 [B]: the token after each prompt; left int64 [B]: how many more each may get.
        """
        last = torch.tensor([ids[-1] for ids in prompts], device=first.device).expand(len(first))
        self.recent.copy_(torch.stack((last, first), dim=1))
        self.seq_lens[:] = torch.tensor([len(ids) for ids in prompts], device=first.device)
        self.left.copy_(left)

    def decode_all(self, prompts: list[list[int]], first: Tensor, count: int,
                   emit: Callable[[int, int, bool], bool | None]) -> tuple[list[list[int]], int]:
        """As decode.decode_all after cached `prompts` -> new tokens of each sequence, and the steps without speculation.

        Those are one less than the longest answer has tokens. The host waits once a round.
        """
        tokens: list[list[int]] = [[token] for token in first.tolist()]
        ended = (first[:, None] == self.target.stop_ids).any(dim=1)
        self.start(prompts, first, torch.where(ended, 0, count - 1))
        left = self.left.tolist()
        for i, new in enumerate(tokens):
            if emit(i, new[0], left[i] == 0):
                left[i] = self.left[i] = 0
        while any(left):
            self.round()
            self.rounds += 1
            for i, (accepted, n, still, *new) in enumerate(self.outcome.tolist()):
                if left[i] > 0:
                    self.histogram[accepted] += 1
                    left[i] = still
                    for j, token in enumerate(new[:n], 1):
                        tokens[i].append(token)
                        if emit(i, token, still == 0 and j == n):
                            left[i] = self.left[i] = 0
                            break
        return tokens, max(map(len, tokens)) - 1

    def report(self) -> dict:
        """What --json adds: rounds, and the drafts accepted of each sequence in each, as a mean and counted from 0 to k."""
        verified = sum(self.histogram)
        accepted = sum(n * times for n, times in enumerate(self.histogram))
        return {"speculate": "self" if self.is_self else "draft", "speculate_k": self.k, "rounds": self.rounds,
                "accepted_per_verify": accepted / verified if verified else None, "accepted_histogram": self.histogram}


# ----------------------------------------------------------------------------------------------------------- draft model

def texts(tokenizer: Tokenizer) -> str:
    """What all its tokens stand for, one after the other."""
    return tokenizer.decode(range(tokenizer.vocab_size))


def check_draft(path: Path, draft: Transformer, model: Transformer, tokenizer: Tokenizer | None, length: int) -> None:
    """UserError where `draft`, of `path`, has another vocabulary than `model` or is not made for `length` tokens.

    Of both the shapes count alone: they may be on the meta device.
    """
    ours, its = model.args.vocab_size, draft.args.vocab_size
    if ours != its:
        raise UserError(f"{path} cannot draft for this model: its vocabulary has {its} tokens, the model's {ours}; "
                        "give a model of the same family")
    if tokenizer is not None and texts(Tokenizer.load(path)) != texts(tokenizer):
        raise UserError(f"{path} cannot draft for this model: its tokens stand for other text; give a model of the same family")
    limit = context_limit(draft)
    if length > limit:
        raise UserError(f"{path} cannot draft in {length} tokens: it is made for {limit} (max_position_embeddings or "
                        "sliding_window in its config.json); shorten the prompt, --max_new_tokens or --max_seq_length")
