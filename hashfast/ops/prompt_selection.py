"""Which cached tokens a prompt chunk reads: as few as a decode step in proportion, chosen by the same signatures.

A chunk of T tokens reads K rows of its prefix for each KV head: the first, the last, and those whose signatures score best
against 64 of its queries. The rows are gathered, so that the fastest dense kernel reads them (ops/prompt_attention.py).
No paper of hash attention reads prompts so; what it loses stands in results/NOTES.md.

Symbols: T tokens of a chunk, `start` tokens before it, Q sampled queries, Hs signature heads, Hkv KV heads, W signature words,
b = 32 W, K rows read per KV head, S cache length, D head_dim.
"""
import math
from typing import NamedTuple

import torch
from torch import Tensor

from hashfast.hash_attention import NUM_BINS, top_tokens

SAMPLED = 64  # queries that choose for a chunk, evenly spaced
SINK, RECENT = 64, 1024  # rows of the prefix that are always read; less where they would take over a quarter of K


class PrefixRows(NamedTuple):
    """Rows of its prefix that a chunk reads: `count`, with the first `sink` and the last `recent` of them.

    most: what any chunk of the cache reads, so that gathered rows have the same strides at every position.
    """
    count: int
    sink: int
    recent: int
    most: int


def rows_read(start: int, chunk: int, sparsity: float) -> int:
    """K of a chunk at `start`: whole chunks, so that attention sees few shapes."""
    return chunk * max(1, math.ceil(start / sparsity / chunk))


def prefix_rows(start: int, chunk: int, sparsity: float, length: int) -> PrefixRows | None:
    """What a chunk at `start` reads in a cache of `length` tokens; None: all of its prefix, which has no more than K."""
    K = rows_read(start, chunk, sparsity)
    if start <= K:
        return None
    return PrefixRows(K, min(SINK, K // 4), min(RECENT, K // 4), rows_read(length, chunk, sparsity))


def sampled_positions(count: int, device: torch.device) -> Tensor:
    """SAMPLED of `count` positions, evenly spaced, the last among them; each several times where they are fewer. int64 [Q]."""
    return ((torch.arange(1, SAMPLED + 1, device=device) * count).div(SAMPLED, rounding_mode="floor") - 1).clamp(min=0)


# ---------------------------------------------------------------------------------------------------------------- select

def prompt_bins_reference(weights: Tensor, signatures: Tensor, n_kv_head: int, shift: int) -> Tensor:
    """A token's bin is the largest of its bins over the sampled queries and over the signature heads of a KV head.

    weights int8 [Hs, Q, b], signatures int32 [Hs, N, W] -> int32 [Hkv, N]. With a query's integer weights w and a key's bits
    s = +-1, score - T // 2 of `hash_attention.score_bins` is (w . s + 1) >> 1.
    """
    Hs, _, bits = weights.shape
    group = Hs // n_kv_head
    bit = torch.arange(32, dtype=torch.int32, device=signatures.device)
    best = torch.empty(n_kv_head, signatures.shape[1], dtype=torch.int32, device=signatures.device)
    for head in range(n_kv_head):  # one at a time: products with all queries are Q numbers per token
        words = signatures[head * group:(head + 1) * group]  # [G, N, W]
        signs = (((words[..., None] >> bit) & 1) * 2 - 1).flatten(2).float()  # [G, N, b]
        products = signs @ weights[head * group:(head + 1) * group].float().transpose(1, 2)  # [G, N, Q], integers
        best[head] = products.amax(dim=(0, 2)).int()
    return ((best + 1) >> (1 + shift)).clamp(0, NUM_BINS - 1)


def select_rows_reference(weights: Tensor, signatures: Tensor, n_kv_head: int, start: int, rows: PrefixRows,
                          shift: int) -> Tensor:
    """The cached tokens that a chunk at `start` reads, by the rule of `hash_attention.select_tokens_reference`.

    weights int8 [Hs, Q, b] of its queries, signatures int32 [Hs, S, W], start > rows.count -> int32 [Hkv, rows.count].
    """
    bins = prompt_bins_reference(weights, signatures[:, :start], n_kv_head, shift)
    length = torch.tensor([start], dtype=torch.int32, device=bins.device)
    return top_tokens(bins[None], length, rows.count, rows.sink, rows.recent, rows.count)[0]


def select_rows(weights: Tensor, signatures: Tensor, n_kv_head: int, start: int, rows: PrefixRows, shift: int) -> Tensor:
    """`select_rows_reference`, by two Triton kernels where the tensors are on a GPU; the order of the rows is free."""
    if not signatures.is_cuda:
        return select_rows_reference(weights, signatures, n_kv_head, start, rows, shift)
    from hashfast.kernels import prompt_selection as kernels
    return kernels.select_rows(weights, signatures, n_kv_head, start, rows.count, rows.sink, rows.recent, shift)


# ---------------------------------------------------------------------------------------------------------------- gather

def gather_rows_reference(k: Tensor, v: Tensor, indices: Tensor, most: int) -> tuple[Tensor, Tensor]:
    """Rows of k and v [Hkv, S, D] at indices int32 [Hkv, K] -> both [1, Hkv, K, D], with room for `most` rows a head."""
    gathered = []
    for x in (k, v):
        rows = x.new_empty(1, x.shape[0], most, x.shape[2])[:, :, :indices.shape[1]]
        gathered.append(rows.copy_(x.gather(1, indices.long()[..., None].expand(-1, -1, x.shape[2]))[None]))
    return gathered[0], gathered[1]


def gather_rows(k: Tensor, v: Tensor, indices: Tensor, most: int) -> tuple[Tensor, Tensor]:
    """`gather_rows_reference`, by a Triton kernel where the tensors are on a GPU."""
    if not k.is_cuda:
        return gather_rows_reference(k, v, indices, most)
    from hashfast.kernels import prompt_selection as kernels
    return kernels.gather_rows(k, v, indices, most)
