"""From logits to token ids: greedy, or by temperature, top-k and top-p, without host synchronisation."""
from dataclasses import dataclass

import torch
from torch import Tensor

from hashfast.runtime import distributed


@dataclass(frozen=True)
class Sampling:
    """temperature 0 is greedy; top_k None keeps the whole vocabulary; top_p the fewest tokens of that probability together."""
    temperature: float = 0.8
    top_k: int | None = 200
    top_p: float = 1.0

    @property
    def greedy(self) -> bool:
        return self.temperature < 1e-6  # the logits would overflow


def sample(logits: Tensor, sampling: Sampling) -> Tensor:
    """logits [B, vocab] -> token ids int64 [B]."""
    return argmax(logits) if sampling.greedy else gumbel_sample(probabilities(logits, sampling))


def argmax(x: Tensor) -> Tensor:
    """argmax of x [..., n] -> int64 [...], in 128 parts where n allows: a row at once would run on one SM alone."""
    if x.shape[-1] % 128:
        return x.argmax(dim=-1)
    best, at = x.unflatten(-1, (128, -1)).max(dim=-1)  # [..., 128]
    part = best.argmax(dim=-1, keepdim=True)
    return (part * (x.shape[-1] // 128) + at.gather(-1, part))[..., 0]


def probabilities(logits: Tensor, sampling: Sampling) -> Tensor:
    """What `sample` draws from where it is not greedy. logits [..., vocab] -> float32 [..., vocab]."""
    logits = logits.float() / sampling.temperature
    count = min(sampling.top_k or logits.shape[-1], logits.shape[-1])
    if sampling.top_k is not None:
        kept = logits.topk(count, dim=-1).values[..., -1:]
        logits = logits.masked_fill(logits < kept, float("-inf"))
    p = logits.softmax(dim=-1)
    if sampling.top_p < 1:
        ranked = p.topk(count, dim=-1).values
        before = ranked.cumsum(dim=-1) - ranked  # what more probable tokens have together
        least = ranked.masked_fill(before >= sampling.top_p, 1).amin(dim=-1, keepdim=True)
        p = p.masked_fill(p < least, 0)
        p = p / p.sum(dim=-1, keepdim=True)
    return p


def gumbel_sample(weights: Tensor) -> Tensor:
    """Token ids int64 [...] with the probabilities weights / weights.sum(), float32 [..., vocab]."""
    # the Gumbel trick needs no host sync, as torch.multinomial does
    return distributed.from_first(argmax(weights / torch.empty_like(weights).exponential_(1)))
