"""Selectors of the tokens that a decode step attends to: signatures, oracles as upper bounds, and other papers' methods.

Every selector keeps the first `sink` and the last `recent` tokens inside the same budget of tokens, in the same layers (a
paper's dense layers are not reproduced). `bytes_per_token` is what a selector reads to select: bytes per token of the cache,
layer and KV head, beside 4 D bytes of bfloat16 keys and values.

Plain PyTorch of static shape, without host syncs, so that a decode step with any of them is one CUDA graph. The sequences of a
batch are independent.

Symbols: B batch, S cache length, Hq query heads, Hkv key/value heads, G = Hq / Hkv, D head_dim, Hs heads that select (Hkv, or
Hq with share "query"), K tokens attended.
"""
import functools
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from hashfast.common import UserError
from hashfast.hash_attention import HashConfig, HashEncoder, select_tokens, sparse_attention
from hashfast.model import Transformer
from hashfast.research.budgets import budgets_for
from hashfast.runtime.signatures import load_signatures, random_encoders

PAGE = 16  # tokens per page of Quest, and per cluster of Multipole
CODE_BITS, TABLES = 8, 150  # of MagicPIG: K and L; its default of 10 bits draws too few tokens for 1/16
KMEANS_STEPS = 10  # of Multipole's clusters
ROWS_AT_ONCE = 128  # queries of a prompt whose attention H2O holds at a time


def top_tokens(scores: Tensor, seq_lens: Tensor, budget: int, sink: int, recent: int) -> Tensor:
    """The `budget` tokens of the highest scores, sink and recent before all others; -1 where a sequence has fewer.

    scores float32 [B, Hs, S], seq_lens int32 [B] -> indices int32 [B, Hs, min(budget, S)]
    """
    position = torch.arange(scores.shape[-1], device=scores.device)
    middle = (position >= sink) & (position < seq_lens[:, None, None] - recent)  # [B, 1, S]
    edge = torch.full(middle.shape, float("-inf"), device=scores.device)
    edge = edge.masked_fill(position < seq_lens[:, None, None], float("inf"))
    best = torch.where(middle, scores, edge).topk(min(budget, scores.shape[-1]), dim=-1, sorted=False)
    return best.indices.to(torch.int32).masked_fill(best.values.isneginf(), -1)


def dot_products(q: Tensor, k: Tensor) -> Tensor:
    """q [B, Hq, D], k [B, Hkv, S, D] -> float32 [B, Hkv, G, S], summed in float32."""
    q = q.unflatten(1, (k.shape[1], -1))  # [B, Hkv, G, D]
    if k.is_cuda and k.dtype != torch.float32:  # no float32 copy of all keys
        return torch.bmm(q.flatten(0, 1), k.flatten(0, 1).mT, out_dtype=torch.float32).unflatten(0, q.shape[:2])
    return q.float() @ k.float().mT


class Selector(nn.Module):
    """One layer's choice of tokens. `budget` may change between steps; the buffers are made for one cache."""
    share = "kv"
    bytes_per_token = 0.0

    def __init__(self, sink: int, recent: int) -> None:
        super().__init__()
        self.budget, self.sink, self.recent = 0, sink, recent

    def set_budget(self, budget: int, context: int) -> None:
        """Tokens that the layers attend to on average from now on, in texts of `context` tokens."""
        self.budget = budget

    def observe(self, q: Tensor, k: Tensor, row: int, start: int) -> None:
        """A part of sequence `row`'s prompt at position `start` is read. q [1, T, Hq, D], k [1, Hkv, T, D] after RoPE."""

    def build(self, k: Tensor, row: int, length: int) -> None:
        """Summarise the prompt of sequence `row`, the first `length` > 0 of its keys. k [B, Hkv, S, D].

        A prompt may be continued from again and again without another call: what a step adds, the next one overwrites.
        """

    def forward(self, q: Tensor, k: Tensor, seq_lens: Tensor) -> Tensor:
        """q [B, Hq, D] after RoPE, k [B, Hkv, S, D] with the newest key in, seq_lens int32 [B] -> int32 [B, Hs, K]."""
        return top_tokens(self.scores(q, k, seq_lens), seq_lens, self.budget, self.sink, self.recent)

    def scores(self, q: Tensor, k: Tensor, seq_lens: Tensor) -> Tensor:
        """Float32 [B, Hs, S]; what stands at and past seq_lens does not count."""
        raise NotImplementedError

    def attend(self, q: Tensor, k: Tensor, v: Tensor, seq_lens: Tensor) -> Tensor:
        """Attention of the step over what is selected, v like k -> [B, Hq, D]. For methods whose weights are not softmax's."""
        return sparse_attention(q, k, v, self(q, k, seq_lens))[0]


class Observers(Selector):
    """Stands in for a layer's selector while a prompt is read, so that several selectors observe it."""

    def __init__(self, selectors: list[Selector]) -> None:
        super().__init__(0, 0)
        self.selectors = nn.ModuleList(selectors)

    def observe(self, q: Tensor, k: Tensor, row: int, start: int) -> None:
        for selector in self.selectors:
            selector.observe(q, k, row, start)


def signature_cache(encoder: HashEncoder, k: Tensor) -> Tensor:
    """Room for the signatures of the keys [B, Hkv, S, D] in a cache: int32 [B, Hs, S, W]."""
    shape = (k.shape[0], encoder.n_signature_head, k.shape[2], encoder.config.words)
    return torch.zeros(shape, dtype=torch.int32, device=k.device)


class Hash(Selector):
    """Signatures of hash_attention.py, with its own selection. Untrained encoders make it LSH."""

    def __init__(self, sink: int, recent: int, encoder: HashEncoder, k: Tensor, signatures: Tensor | None = None) -> None:
        """signatures: those of `signature_cache`, which selectors by the same encoder may share; None makes them."""
        super().__init__(sink, recent)
        self.encoder, self.share = encoder, encoder.config.share
        self.bytes_per_token = 4.0 * encoder.config.words * encoder.n_signature_head / k.shape[1]
        self.register_buffer("signatures", signature_cache(encoder, k) if signatures is None else signatures, persistent=False)

    def build(self, k: Tensor, row: int, length: int) -> None:
        self.signatures[row, :, :length] = self.encoder.encode_keys(k[row:row + 1, :, :length])[0]

    def forward(self, q: Tensor, k: Tensor, seq_lens: Tensor) -> Tensor:
        batch, newest = torch.arange(len(q), device=q.device), seq_lens.long() - 1
        self.signatures[batch, :, newest] = self.encoder.encode_keys(k[batch, :, newest][:, :, None])[:, :, 0]
        return self.select(self.encoder.encode_queries(q), seq_lens, min(self.budget, k.shape[2]))

    def select(self, planes: Tensor, seq_lens: Tensor, K: int) -> Tensor:
        """planes int32 [B, Hs, 1 + P, W], seq_lens int32 [B] -> int32 [B, Hs, K]."""
        return select_tokens(planes, self.signatures, seq_lens, K, self.sink, self.recent, shift=self.encoder.shift)


class CalibratedHash(Hash):
    """`Hash` with the budgets that its signatures were calibrated to give this layer's heads (budgets.py)."""

    def __init__(self, sink: int, recent: int, encoder: HashEncoder, k: Tensor, about: dict, layer: int,
                 dense_layers: int, signatures: Tensor | None = None) -> None:
        super().__init__(sink, recent, encoder, k, signatures)
        self.about, self.layer, self.dense_layers = about, layer, dense_layers
        # by budget, as a captured step goes on reading its own: the heads' budgets, and the most of any layer
        self.heads: dict[int, tuple[Tensor, int]] = {}

    def set_budget(self, budget: int, context: int) -> None:
        if budget not in self.heads:
            layers = ((context,) * self.encoder.n_signature_head,) * (self.layer + 1)
            if budget < context:
                layers = budgets_for(self.about, budget, context, self.sink + self.recent, self.dense_layers)
            heads = torch.tensor(layers[self.layer], dtype=torch.int32, device=self.signatures.device).clamp(max=context)
            # as many slots in every layer, so that one compilation serves them all
            self.heads[budget] = heads, max(map(max, layers[self.dense_layers:]))
        self.now, self.budget = self.heads[budget]

    def select(self, planes: Tensor, seq_lens: Tensor, K: int) -> Tensor:
        return select_tokens(planes, self.signatures, seq_lens, self.now, self.sink, self.recent, K, self.encoder.shift)


class Oracle(Selector):
    """The tokens of the largest q.k, for each query head alone: no selection of that size has a higher recall."""
    share = "query"

    def __init__(self, sink: int, recent: int, k: Tensor) -> None:
        super().__init__(sink, recent)
        self.bytes_per_token = 2.0 * k.shape[-1]

    def scores(self, q: Tensor, k: Tensor, seq_lens: Tensor) -> Tensor:
        return dot_products(q, k).flatten(1, 2)


class OracleGroup(Oracle):
    """The tokens of the largest attention mass summed over a KV head's query heads: the best that one shared set can do."""
    share = "kv"

    def weights(self, q: Tensor, k: Tensor, seq_lens: Tensor) -> Tensor:
        """Each head's attention over all tokens, float32 [B, Hkv, G, S]."""
        hidden = torch.arange(k.shape[2], device=k.device) >= seq_lens[:, None, None, None]
        logits = dot_products(q, k) * q.shape[-1] ** -0.5
        return logits.masked_fill(hidden, float("-inf")).softmax(dim=-1)

    def scores(self, q: Tensor, k: Tensor, seq_lens: Tensor) -> Tensor:
        return self.weights(q, k, seq_lens).sum(dim=2)


class OracleMax(OracleGroup):
    """The tokens of the largest attention weight in any of a KV head's query heads: many heads of diffuse attention do not
    outvote a sharp one."""

    def scores(self, q: Tensor, k: Tensor, seq_lens: Tensor) -> Tensor:
        return self.weights(q, k, seq_lens).amax(dim=2)


class Streaming(Selector):
    """Sink and the most recent tokens fill the budget (StreamingLLM, arXiv 2309.17453, section 3.2)."""

    def scores(self, q: Tensor, k: Tensor, seq_lens: Tensor) -> Tensor:
        return torch.arange(k.shape[2], device=k.device, dtype=torch.float32).expand(k.shape[0], k.shape[1], -1)


class Quest(Selector):
    """Pages of 16 tokens, ranked by an upper bound of q.k from each channel's least and largest key (arXiv 2406.10774,
    section 3.3). Each query head selects alone, as in the paper. The last page is cut where the budget ends."""
    share = "query"

    def __init__(self, sink: int, recent: int, k: Tensor) -> None:
        super().__init__(sink, recent)
        self.bytes_per_token = 2 * 2 * k.shape[-1] / PAGE
        shape = (*k.shape[:2], -(-k.shape[2] // PAGE), k.shape[3])
        self.register_buffer("low", torch.zeros(shape, dtype=k.dtype, device=k.device), persistent=False)
        self.register_buffer("high", torch.zeros(shape, dtype=k.dtype, device=k.device), persistent=False)

    def build(self, k: Tensor, row: int, length: int) -> None:
        pages = -(-length // PAGE)
        # the last page is filled up with the newest key, which moves no bound
        at = torch.arange(pages * PAGE, device=k.device).clamp(max=length - 1)
        keys = k[row][:, at].unflatten(1, (pages, PAGE))  # [Hkv, pages, PAGE, D]
        self.low[row, :, :pages], self.high[row, :, :pages] = keys.amin(dim=2), keys.amax(dim=2)

    def scores(self, q: Tensor, k: Tensor, seq_lens: Tensor) -> Tensor:
        batch, newest = torch.arange(len(q), device=q.device), seq_lens.long() - 1
        page = newest // PAGE
        at = torch.minimum(page[:, None] * PAGE + torch.arange(PAGE, device=q.device), newest[:, None])
        keys = k[batch[:, None], :, at]  # [B, PAGE, Hkv, D]
        self.low[batch, :, page], self.high[batch, :, page] = keys.amin(dim=1), keys.amax(dim=1)
        # a channel's bound is q * high where q > 0 and q * low elsewhere
        bound = dot_products(q.clamp(min=0), self.high) + dot_products(q.clamp(max=0), self.low)
        return bound.flatten(1, 2).repeat_interleave(PAGE, dim=-1)[..., :k.shape[2]]


class DoubleSparsity(Selector):
    """q.k over a few label channels (arXiv 2408.07092, section 3): the D / 8 of the largest mean |q| |k|.

    Each query head selects alone; the channels belong to the KV head, so that there is one label cache. The paper calibrates
    them offline; here the prompt itself does it, which is kinder to the method. Labels are not quantised.
    """
    share = "query"

    def __init__(self, sink: int, recent: int, k: Tensor) -> None:
        super().__init__(sink, recent)
        B, Hkv, S, D = k.shape
        count = max(1, D // 8)
        self.bytes_per_token = 2.0 * count
        self.register_buffer("query_size", torch.zeros(B, Hkv, D, device=k.device), persistent=False)  # sum of |q|
        self.register_buffer("channels", torch.zeros(B, Hkv, count, dtype=torch.int64, device=k.device), persistent=False)
        self.register_buffer("labels", torch.zeros(B, Hkv, S, count, dtype=k.dtype, device=k.device), persistent=False)

    def observe(self, q: Tensor, k: Tensor, row: int, start: int) -> None:
        size = q[0].abs().sum(dim=0, dtype=torch.float32).unflatten(0, (k.shape[1], -1)).sum(dim=1)
        self.query_size[row] = size if start == 0 else self.query_size[row] + size

    def build(self, k: Tensor, row: int, length: int) -> None:
        size = k[row, :, :length].abs().sum(dim=1, dtype=torch.float32) * self.query_size[row]  # sums rank as means do
        self.channels[row] = size.topk(self.channels.shape[-1], dim=-1).indices
        channels = self.channels[row, :, None].expand(-1, length, -1)
        self.labels[row, :, :length] = k[row, :, :length].gather(-1, channels)

    def scores(self, q: Tensor, k: Tensor, seq_lens: Tensor) -> Tensor:
        batch, newest = torch.arange(len(q), device=q.device), seq_lens.long() - 1
        self.labels[batch, :, newest] = k[batch, :, newest].gather(-1, self.channels)
        channels = self.channels.repeat_interleave(q.shape[1] // k.shape[1], dim=1)
        return dot_products(q.gather(-1, channels), self.labels).flatten(1, 2)


class H2O(Selector):
    """Eviction: of the tokens that are not recent, those of the most attention so far stay; what is evicted never comes back
    (H2O, arXiv 2306.14048, algorithm 1).

    Each KV head evicts by the sum over its query heads. The whole prompt is read densely and evicted from at its end, where
    the paper evicts as it reads; budget and recent are those of all selectors, where the paper halves its budget between the
    two. A sequence that goes back to a position it has passed starts again from the prompt.
    """

    def __init__(self, sink: int, recent: int, k: Tensor) -> None:
        super().__init__(sink, recent)
        self.keys = k  # the cache, which prompts observed in parts attend to
        self.bytes_per_token = 4.0  # the accumulated weight, of the tokens that are left alone
        for name, fill in (("prompt", 0.0), ("total", 0.0), ("kept", True)):
            self.register_buffer(name, torch.full(k.shape[:3], fill, device=k.device), persistent=False)
        self.register_buffer("newest", torch.full(k.shape[:1], -1, device=k.device), persistent=False)
        self.states: dict[int, tuple[Tensor, Tensor, Tensor]] = {}  # by budget, each with evictions of its own

    def set_budget(self, budget: int, context: int) -> None:
        self.budget = budget
        if budget not in self.states:
            self.states[budget] = self.total.clone(), self.kept.clone(), torch.full_like(self.newest, self.total.shape[2])
        self.total, self.kept, self.newest = self.states[budget]

    def observe(self, q: Tensor, k: Tensor, row: int, start: int) -> None:
        if start == 0:
            self.prompt[row] = 0
        end = start + k.shape[2]
        keys = torch.cat((self.keys[row:row + 1, :, :start], k), dim=2)
        position = torch.arange(end, device=k.device)
        for at, part in zip(position[start:].split(ROWS_AT_ONCE), q[0].split(ROWS_AT_ONCE), strict=True):
            queries = part.unflatten(1, (k.shape[1], -1)).permute(1, 2, 0, 3)  # [Hkv, G, n, D]
            logits = dot_products(queries.flatten(0, 2)[None], keys).unflatten(2, queries.shape[1:3]) * q.shape[-1] ** -0.5
            weights = logits.masked_fill_(position > at[:, None], float("-inf")).softmax(dim=-1)  # [1, Hkv, G, n, end]
            self.prompt[row, :, :end] += weights[0].sum(dim=(1, 2))

    def build(self, k: Tensor, row: int, length: int) -> None:
        for newest in (self.newest, *(newest for *_, newest in self.states.values())):
            newest[row] = k.shape[2]  # the first step starts from the prompt

    def forward(self, q: Tensor, k: Tensor, seq_lens: Tensor) -> Tensor:
        newest, position = seq_lens.long() - 1, torch.arange(k.shape[2], device=k.device)
        again = (newest <= self.newest)[:, None, None]
        total = torch.where(again, self.prompt, self.total)
        kept = again | self.kept | (position >= newest[:, None, None])
        indices = top_tokens(total.masked_fill(~kept, float("-inf")), seq_lens, self.budget, self.sink, self.recent)
        kept = chosen_mask(indices, k.shape[2])
        logits = dot_products(q, k) * q.shape[-1] ** -0.5
        weights = logits.masked_fill(~kept[:, :, None], float("-inf")).softmax(dim=-1)
        self.total.copy_(total + weights.sum(dim=2))
        self.kept.copy_(kept)
        self.newest.copy_(newest)
        return indices


class MagicPIG(Selector):
    """A sample of the tokens instead of the best: LSH tables draw each with a known probability, by which its weight is divided
    (MagicPIG, arXiv 2410.16179, section 4).

    A token is drawn that shares its code of `CODE_BITS` sign bits with the query in at least two tables; keys are centred by
    the prompt's mean. Each query head draws alone. The paper fixes the number of tables, and the budget follows; here the
    budget is fixed, and as many of the `TABLES` tables are used as fill it. What the tables leave of it is not attended to.
    All codes are compared, not looked up in hash tables on the CPU.
    """
    share = "query"

    def __init__(self, sink: int, recent: int, k: Tensor, seed: int = 0) -> None:
        super().__init__(sink, recent)
        self.bytes_per_token = TABLES * CODE_BITS / 8
        generator = torch.Generator().manual_seed(seed)
        planes = torch.randn(k.shape[-1], TABLES * CODE_BITS, generator=generator)
        self.register_buffer("planes", planes.to(k.device), persistent=False)
        self.register_buffer("mean", torch.zeros(k.shape[0], k.shape[1], 1, k.shape[3], device=k.device), persistent=False)
        self.register_buffer("codes", torch.zeros(*k.shape[:3], TABLES, dtype=torch.uint8, device=k.device), persistent=False)

    def encode(self, x: Tensor) -> Tensor:
        """[..., D] -> uint8 [..., TABLES]"""
        bits = (x.float() @ self.planes > 0).to(torch.uint8).unflatten(-1, (TABLES, CODE_BITS))
        return (bits << torch.arange(CODE_BITS, dtype=torch.uint8, device=x.device)).sum(dim=-1, dtype=torch.uint8)

    def build(self, k: Tensor, row: int, length: int) -> None:
        keys = k[row, :, :length].float()
        self.mean[row] = keys.mean(dim=1, keepdim=True)
        self.codes[row, :, :length] = self.encode(keys - self.mean[row])

    def scores(self, q: Tensor, k: Tensor, seq_lens: Tensor) -> Tensor:
        """Tables left once a token has been met in two, times S, less its position: no two are equal. Under 1: in fewer."""
        batch, newest = torch.arange(len(q), device=q.device), seq_lens.long() - 1
        self.codes[batch, :, newest] = self.encode(k[batch, :, newest].float() - self.mean[:, :, 0])
        query = self.encode(q).unflatten(1, (k.shape[1], -1))  # [B, Hkv, G, TABLES]
        left = TABLES - torch.arange(TABLES, dtype=torch.int16, device=q.device)  # Inductor counts down wrongly in uint8
        left = (self.codes[:, :, None] == query[:, :, :, None]) * left  # [B, Hkv, G, S, TABLES]
        left = left.masked_fill(left == left.amax(dim=-1, keepdim=True), 0).amax(dim=-1)  # of the second table
        return left.flatten(1, 2).float() * k.shape[2] - torch.arange(k.shape[2], device=k.device)

    def attend(self, q: Tensor, k: Tensor, v: Tensor, seq_lens: Tensor) -> Tensor:
        scores, length = self.scores(q, k, seq_lens), seq_lens[:, None, None]
        indices = top_tokens(scores, seq_lens, self.budget, self.sink, self.recent)
        group = q.shape[1] // k.shape[1]
        row = indices.clamp(min=0).long()
        keys, values = (x.repeat_interleave(group, dim=1).gather(2, row[..., None].expand(-1, -1, -1, x.shape[3])).float()
                        for x in (k, v))  # [B, Hq, K, D]
        left = (scores.gather(-1, row) / k.shape[2]).ceil()  # of TABLES, after a token's second
        drawn = (indices >= self.sink) & (indices < length - self.recent)
        used = TABLES + 1 - left.masked_fill(~drawn, TABLES).amin(dim=-1, keepdim=True).clamp(min=1)
        q = q[:, :, None].float()
        centred = keys - self.mean.repeat_interleave(group, dim=1)
        cosine = (q * centred).sum(dim=-1) / (q.norm(dim=-1) * centred.norm(dim=-1)).clamp(min=1e-20)
        meet = (1 - cosine.clamp(-1, 1).acos() / torch.pi) ** CODE_BITS  # the probability of one table
        twice = 1 - (1 - meet) ** used - used * meet * (1 - meet) ** (used - 1)
        logits = (q * keys).sum(dim=-1) * q.shape[-1] ** -0.5
        exact = ~drawn | (length <= self.budget)
        logits = torch.where(exact, logits, logits - twice.clamp(min=1e-9).log())
        logits = logits.masked_fill((indices < 0) | ~exact & (left < 1), float("-inf"))
        return (logits.softmax(dim=-1)[:, :, None] @ values)[:, :, 0].to(v.dtype)


class Multipole(Selector):
    """Clusters of keys, ranked by q.centroid: the tokens of the best are attended to, all others as their cluster's centroid
    and mean value, which count as often as they stand for a token (Multipole Attention, arXiv 2506.13059).

    One k-means of the prompt by Euclidean distance, 16 tokens a cluster, from evenly spaced keys; a KV head ranks by the sum of
    its query heads' weights. Left out: the hierarchy of centroids, and new centroids in generation (a token joins the nearest).
    The last cluster is cut where the budget ends.
    """

    def __init__(self, sink: int, recent: int, k: Tensor, v: Tensor) -> None:
        super().__init__(sink, recent)
        self.values = v  # the cache
        self.bytes_per_token = 2 * 2 * k.shape[-1] / PAGE
        shape = (*k.shape[:2], -(-k.shape[2] // PAGE), k.shape[3])
        self.register_buffer("centroids", torch.zeros(shape, device=k.device), persistent=False)
        self.register_buffer("means", torch.zeros(shape, device=k.device), persistent=False)  # of values
        self.register_buffer("cluster", torch.zeros(k.shape[:3], dtype=torch.int64, device=k.device), persistent=False)

    def build(self, k: Tensor, row: int, length: int) -> None:
        count = -(-length // PAGE)
        keys, values = k[row, :, :length].float(), self.values[row, :, :length].float()  # [Hkv, length, D]
        centroids = keys[:, (torch.arange(count, device=k.device) + 0.5).mul(length / count).long()]
        for _ in range(KMEANS_STEPS):
            cluster = nearest(keys, centroids)
            centroids = cluster_means(keys, cluster, centroids)
        cluster = nearest(keys, centroids)
        self.cluster[row, :, :length] = cluster
        self.centroids[row] = float("inf")  # where a cluster is empty, nearest to nothing
        self.centroids[row, :, :count] = cluster_means(keys, cluster, torch.full_like(centroids, float("inf")))
        self.means[row, :, :count] = cluster_means(values, cluster, torch.zeros_like(centroids))

    def logits(self, q: Tensor, k: Tensor) -> Tensor:
        """Of a token of each cluster, by its centroid: float32 [B, Hkv, G, C]."""
        return dot_products(q.float(), self.centroids.masked_fill(self.centroids.isinf(), 0)) * q.shape[-1] ** -0.5

    def sizes(self, counted: Tensor) -> Tensor:
        """How many tokens of each cluster are `counted` bool [B, Hkv, S] -> float32 [B, Hkv, C]."""
        sizes = torch.zeros(self.centroids.shape[:3], device=counted.device)
        return sizes.scatter_add(2, self.cluster, counted.float())

    def scores(self, q: Tensor, k: Tensor, seq_lens: Tensor) -> Tensor:
        batch, newest = torch.arange(len(q), device=q.device), seq_lens.long() - 1
        key = k[batch, :, newest].float()[:, :, None]
        self.cluster[batch, :, newest] = nearest(key.flatten(0, 1), self.centroids.flatten(0, 1)).view(key.shape[:2])
        logits, sizes = self.logits(q, k), self.sizes(within(seq_lens, k).expand_as(self.cluster))
        weights = (logits - (logits + sizes.log()[:, :, None]).logsumexp(dim=-1, keepdim=True)).exp()
        return weights.sum(dim=2).gather(-1, self.cluster)

    def attend(self, q: Tensor, k: Tensor, v: Tensor, seq_lens: Tensor) -> Tensor:
        indices = self(q, k, seq_lens)
        near, lse = (x.float().unflatten(1, (k.shape[1], -1)) for x in sparse_attention(q, k, v, indices))
        sizes = self.sizes(within(seq_lens, k) & ~chosen_mask(indices, k.shape[2]))
        far = self.logits(q, k) + sizes.log()[:, :, None]
        total = torch.logaddexp(lse, far.logsumexp(dim=-1))[..., None]
        out = near * (lse[..., None] - total).exp() + (far - total).exp() @ self.means
        return out.flatten(1, 2).to(v.dtype)


def within(seq_lens: Tensor, k: Tensor) -> Tensor:
    """Whether a row of the cache is filled: bool [B, 1, S]."""
    return torch.arange(k.shape[2], device=k.device) < seq_lens[:, None, None]


def nearest(x: Tensor, centroids: Tensor) -> Tensor:
    """The centroid of the least distance. x [N, T, D], centroids [N, C, D] -> int64 [N, T]."""
    size = centroids.square().sum(dim=-1)[:, None]
    products = x @ centroids.masked_fill(centroids.isinf(), 0).mT
    return (size - 2 * products).argmin(dim=-1)


def cluster_means(x: Tensor, cluster: Tensor, otherwise: Tensor) -> Tensor:
    """The mean of each cluster's x [N, T, D], cluster int64 [N, T]; of an empty one `otherwise` [N, C, D]."""
    totals = torch.zeros_like(otherwise).scatter_add_(1, cluster[..., None].expand_as(x), x)
    sizes = torch.zeros_like(otherwise[..., 0]).scatter_add_(1, cluster, torch.ones_like(x[..., 0]))[..., None]
    return torch.where(sizes > 0, totals / sizes.clamp(min=1), otherwise)


def chosen_mask(indices: Tensor, length: int) -> Tensor:
    """int32 [B, Hs, K], -1 for none -> bool [B, Hs, length]."""
    mask = torch.zeros(*indices.shape[:2], length + 1, dtype=torch.bool, device=indices.device)
    indices = indices.long()
    return mask.scatter(-1, indices.masked_fill(indices < 0, length), True)[..., :-1]


class Random(Selector):
    """Tokens drawn by seed, anew at every step: what a budget is worth without a choice."""

    def __init__(self, sink: int, recent: int, seed: int) -> None:
        super().__init__(sink, recent)
        self.seed = seed

    def scores(self, q: Tensor, k: Tensor, seq_lens: Tensor) -> Tensor:
        # an integer hash of (seed, length, head, position): a generator's state would not survive a CUDA graph's replay
        head = torch.arange(k.shape[1], device=k.device)[:, None]
        x = torch.arange(k.shape[2], device=k.device) * 0x9E3779B1 + head * 0x85EBCA77
        x = x + seq_lens.long()[:, None, None] * 0xC2B2AE3D + self.seed * 0x27D4EB2F
        for _ in range(3):
            x = ((x >> 16 ^ x) * 0x45D9F3B) & 0x7FFFFFFF
        return (x >> 7).float()


# --------------------------------------------------------------------------------------------------------------- methods

@dataclass(frozen=True)
class Method:
    """One selector with what it was made of, as a line of a table: one Selector per layer, None where a layer is dense."""
    selector: str
    layers: list[Selector | None]
    recipe: str | None = None
    config: HashConfig | None = None

    def about(self) -> dict:
        """The fields of a results row that say which method it is."""
        first = next((layer for layer in self.layers if layer is not None), None)
        return {
            "selector": self.selector, "recipe": self.recipe, "bits": self.config and self.config.bits,
            "query_bits": self.config and self.config.query_bits,
            "share": self.config.share if self.config else first and first.share,  # of signatures, where there are any
            "bytes_per_token": first.bytes_per_token if first is not None else 0.0,
        }

    @property
    def label(self) -> str:
        return " ".join([self.selector, *([f"{self.recipe} {self.config.bits} bit"] if self.config else [])])


def make_methods(names: list[str], model: Transformer, sink: int, recent: int, signatures: Sequence[Path], lsh_bits: int,
                 dense_layers: int, seed: int) -> list[Method]:
    """The methods of these names over the model's present caches; those by hash once for each signatures file."""
    if {"hash", "hash_calibrated"} & set(names) and not signatures:
        raise UserError("--selector hash and hash_calibrated need --signatures FILE; train one with train_hash.py, or use lsh")
    caches = [layer.attention.cache.k for layer in model.layers]
    dense = [None] * min(dense_layers, len(caches))
    fingerprint = model.fingerprint()
    plain = {"oracle": Oracle, "oracle_group": OracleGroup, "oracle_max": OracleMax, "quest": Quest,
             "double_sparsity": DoubleSparsity, "h2o": H2O}
    methods = []

    @functools.cache
    def read(path: Path) -> tuple[list[HashEncoder], list[Tensor], dict]:
        """A file's encoders, their signature caches and its metadata, the same for all that select by it."""
        encoders, about = load_signatures(path, fingerprint)
        encoders = [encoder.to(k.device) for encoder, k in zip(encoders, caches, strict=True)]
        return encoders, [signature_cache(encoder, k) for encoder, k in zip(encoders, caches, strict=True)], about

    def add(name: str, layers: list[Selector], recipe: str | None = None, config: HashConfig | None = None) -> None:
        methods.append(Method(name, dense + layers[len(dense):], recipe, config))

    def add_hash(path: Path, calibrated: bool) -> None:
        encoders, signature_caches, about = read(path)
        layers = []
        for i, (encoder, k, shared) in enumerate(zip(encoders, caches, signature_caches, strict=True)):
            layers.append(CalibratedHash(sink, recent, encoder, k, about, i, len(dense), shared) if calibrated
                          else Hash(sink, recent, encoder, k, shared))
        add("hash_calibrated" if calibrated else "hash", layers, about.get("recipe", "unknown"), encoders[0].config)

    for name in dict.fromkeys(names):
        if name == "dense":
            methods.append(Method(name, [None] * len(caches)))
        elif name in ("hash", "hash_calibrated"):
            for path in signatures:
                add_hash(path, name == "hash_calibrated")
        elif name == "lsh":
            encoders = random_encoders(HashConfig(bits=lsh_bits), fingerprint, seed)
            layers = [Hash(sink, recent, encoder.to(k.device), k) for encoder, k in zip(encoders, caches, strict=True)]
            add(name, layers, "random", encoders[0].config)
        elif name == "streaming":
            add(name, [Streaming(sink, recent) for _ in caches])
        elif name == "multipole":
            add(name, [Multipole(sink, recent, layer.attention.cache.k, layer.attention.cache.v) for layer in model.layers])
        elif name == "magicpig":
            add(name, [MagicPIG(sink, recent, k, seed * len(caches) + i) for i, k in enumerate(caches)])
        elif name == "random":
            add(name, [Random(sink, recent, seed * len(caches) + i) for i in range(len(caches))])
        else:
            add(name, [plain[name](sink, recent, k) for k in caches])
    return methods
