"""Hash attention: learned bit signatures of keys and queries choose the few tokens that a decode step attends to.

The steps of one decode step, in order:
    encode    k -> signature bits, q -> signed integer weights as bit planes          HashEncoder
    score     weighted agreement of the query's bits with every cached signature      score_reference
    select    exact integer top-k of static shape                                     select_tokens
    attend    softmax attention over the selected rows of the cache                   sparse_attention

Sources: HashAttention (arXiv 2412.14468): learned signatures, one MLP per query head, Hamming ranking. HATA (arXiv 2506.02572):
linear encoders and summed Hamming distance over a group. What goes past them: one signature per KV head for all queries of
its group, and a query of several bits, so that a bit counts as much as the query is sure of it.

Every public function has a plain-PyTorch twin `*_reference`, which is the definition. On a GPU the Triton kernels of
hashfast/kernels run instead; on a CPU the reference itself runs.

Symbols: B batch, S cache length, N current length (`seq_lens`, int32 [B], the newest token included), Hq query heads, Hkv
key/value heads, G = Hq / Hkv, D head_dim, b signature bits, W = b / 32 words, Hs signature heads, P magnitude planes,
K tokens attended per signature head.
"""
import itertools
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from hashfast.common import UserError
from hashfast.ops.linear import rms_norm

NUM_BINS = 64


@dataclass(frozen=True)
class HashConfig:
    """The shape of signatures.

    bits: signature bits per token and signature head: 32, 64 or 128; or 16, stored as 32 whose upper half never counts.
    query_bits: 1 = signs alone (both papers); 2-8 = each query bit carries a signed integer weight of that many bits.
    depth: layers of the encoder, 1 (linear) to 3 (HashAttention's D -> hidden -> hidden -> bits with SiLU).
    hidden: width of the inner layers where depth > 1.
    share: "kv" = one signature per KV head, its G query heads select together; "query" = each query head alone (HashAttention).
    """
    bits: int = 32
    query_bits: int = 4
    depth: int = 1
    hidden: int = 128
    share: str = "kv"

    def __post_init__(self) -> None:
        if self.bits not in (16, 32, 64, 128):
            raise UserError(f"signature bits must be 16, 32, 64 or 128, not {self.bits}")
        if not 1 <= self.query_bits <= 8:
            raise UserError(f"query_bits must be 1 to 8, not {self.query_bits}")
        if self.bits == 16 and self.query_bits == 1:  # a sign is never 0, so that the upper half would count
            raise UserError("16 signature bits need query_bits of at least 2")
        if not 1 <= self.depth <= 3:
            raise UserError(f"encoder depth must be 1 to 3, not {self.depth}")
        if self.hidden < 1:
            raise UserError(f"the width of inner layers must be at least 1, not {self.hidden}")
        if self.share not in ("kv", "query"):
            raise UserError(f"share must be 'kv' or 'query', not {self.share!r}")

    @property
    def words(self) -> int:
        return -(-self.bits // 32)

    def signature_heads(self, n_head: int, n_kv_head: int) -> int:
        return n_kv_head if self.share == "kv" else n_head

    def planes(self, group: int) -> int:
        """Magnitude planes P for `group` query heads per signature head."""
        return self.query_bits - 1 if self.query_bits > 1 else group.bit_length()

    def shift(self, group: int) -> int:
        """Score resolution given up so that the scores that matter fit the bins (see `score_bins`).

        Chance agreement is T/2 and the best scores are near T = sum |w|. T is about 0.4 b (2^(query_bits-1) - 1) for
        Gaussian codes and b sqrt(2 group / pi) for sums of signs; its upper half must fit into the bins.
        """
        if self.query_bits > 1:
            total = 0.4 * self.bits * (2 ** (self.query_bits - 1) - 1)
        else:
            total = self.bits * max(1.0, (2 * group / torch.pi) ** 0.5)
        shift = 0
        while total / 2 / 2 ** shift > NUM_BINS:
            shift += 1
        return shift


# ---------------------------------------------------------------------------------------------------------------- encode

class HashEncoder(nn.Module):
    """Encoders of one layer: phi_k for keys and phi_q for queries, all heads batched.

    Key weights are [Hs, in, out], query weights [Hq, in, out]; biases [Hs or Hq, out]. They are float32 here (float16 in
    files): they are small, and bits next to zero then agree between devices. The last layer is 32 W wide: where bits are 16,
    the outputs past them have weights of zero, so that codes and query weights are 0 (training keeps them there: the gradient
    of one is the other).
    """

    def __init__(self, config: HashConfig, n_head: int, n_kv_head: int, head_dim: int) -> None:
        super().__init__()
        self.config = config
        self.n_signature_head = config.signature_heads(n_head, n_kv_head)
        self.group = n_head // self.n_signature_head
        widths = [head_dim] + [config.hidden] * (config.depth - 1) + [32 * config.words]
        self.key = _perceptron(self.n_signature_head, widths)
        self.query = _perceptron(n_head, widths)

    @property
    def shift(self) -> int:
        return self.config.shift(self.group)

    def key_codes(self, k: Tensor) -> Tensor:
        """Real-valued codes phi_k(k) of keys after RoPE. k [B, Hkv, T, D] -> float32 [B, Hs, T, b]."""
        return _apply_perceptron(self.key, k.repeat_interleave(self.n_signature_head // k.shape[1], dim=1))

    def query_codes(self, q: Tensor) -> Tensor:
        """Real-valued codes phi_q(q) of queries after RoPE. q [B, Hq, T, D] -> float32 [B, Hq, T, b]."""
        return _apply_perceptron(self.query, q)

    def encode_keys(self, k: Tensor) -> Tensor:
        """Signatures of keys after RoPE. k [B, Hkv, T, D] -> int32 [B, Hs, T, W], bit i = [phi_k(k)_i > 0]."""
        return pack_bits(self.key_codes(k) > 0)

    def encode_queries(self, q: Tensor) -> Tensor:
        """Bit planes of queries after RoPE. q [B, Hq, D] -> int32 [B, Hs, 1 + P, W], the sign plane first."""
        return weight_planes(self.weigh_queries(q.unsqueeze(2))[:, :, 0].int(), self.config.planes(self.group))

    def weigh_queries(self, q: Tensor) -> Tensor:
        """The integer weights that planes hold, of several queries after RoPE. q [B, Hq, T, D] -> int8 [B, Hs, T, b]."""
        codes = self.query_codes(q).unflatten(1, (self.n_signature_head, self.group))  # [B, Hs, G, T, b]
        return query_weights(codes, self.config).to(torch.int8)


def _perceptron(heads: int, widths: list[int]) -> nn.ModuleList:
    layers = nn.ModuleList()
    for n_in, n_out in itertools.pairwise(widths):
        layer = nn.Module()
        layer.weight = nn.Parameter(torch.empty(heads, n_in, n_out, dtype=torch.float32), requires_grad=False)
        layer.bias = nn.Parameter(torch.zeros(heads, n_out, dtype=torch.float32), requires_grad=False)
        layers.append(layer)
    return layers


def _apply_perceptron(layers: nn.ModuleList, x: Tensor) -> Tensor:
    """x [B, H, T, in] -> float32 [B, H, T, out]: one small network per head."""
    x = x.float()
    for j, layer in enumerate(layers):
        x = x @ layer.weight + layer.bias[:, None]
        if j < len(layers) - 1:
            x = F.silu(x)
    return x


def query_weights(codes: Tensor, config: HashConfig) -> Tensor:
    """Integer weight of every signature bit. codes [B, Hs, G, .., b] real -> int32 [B, Hs, .., b].

    query_bits >= 2: the group's codes are summed and scaled so that the largest becomes the largest integer.
    query_bits = 1: the sum of the heads' signs, so that ranking by score is ranking by summed Hamming similarity.
    """
    if config.query_bits == 1:
        return torch.where(codes > 0, 1, -1).sum(dim=2, dtype=torch.int32)
    code = codes.sum(dim=2)
    top = 2 ** (config.query_bits - 1) - 1
    largest = code.abs().amax(dim=-1, keepdim=True)
    scaled = torch.where(largest > 0, code / largest, 0.0) * (top + 0.5)
    return scaled.round().clamp(-top, top).to(torch.int32)


def pack_bits(bits: Tensor) -> Tensor:
    """bool [..., b] -> int32 [..., b / 32], little-endian: bit i of word j is bits[..., 32 j + i]."""
    words = bits.unflatten(-1, (-1, 32)).to(torch.int32)
    return (words << torch.arange(32, dtype=torch.int32, device=bits.device)).sum(dim=-1, dtype=torch.int32)


def weight_planes(weights: Tensor, n_planes: int) -> Tensor:
    """Sign-magnitude bit planes. weights int32 [B, Hs, b] -> int32 [B, Hs, 1 + P, W]."""
    magnitude = weights.abs()
    planes = [weights > 0] + [(magnitude >> p) & 1 > 0 for p in range(n_planes)]
    return pack_bits(torch.stack(planes, dim=2))


# ----------------------------------------------------------------------------------------------------------------- score

def popcount(x: Tensor) -> Tensor:
    """Set bits of each int32. The sign bit is counted apart so that no step overflows."""
    negative = (x < 0).to(torch.int32)
    x = x & 0x7FFFFFFF
    x = x - ((x >> 1) & 0x55555555)
    x = (x & 0x33333333) + ((x >> 2) & 0x33333333)
    x = (x + (x >> 4)) & 0x0F0F0F0F
    x = x + (x >> 8)
    return ((x + (x >> 16)) & 0x3F) + negative


def score_reference(planes: Tensor, signatures: Tensor) -> Tensor:
    """Summed |w| over the bits where key and query agree.

    planes int32 [B, Hs, 1 + P, W], signatures int32 [B, Hs, S, W] -> int32 [B, Hs, S].
    """
    disagree = signatures ^ planes[:, :, :1]  # [B, Hs, S, W]
    score = torch.zeros(signatures.shape[:3], dtype=torch.int32, device=signatures.device)
    for p in range(planes.shape[2] - 1):
        agree = ~disagree & planes[:, :, 1 + p, None]
        score = score + (popcount(agree).sum(dim=-1, dtype=torch.int32) << p)
    return score


def score_bins(score: Tensor, planes: Tensor, shift: int) -> Tensor:
    """The bin of each score: clamp((score - T // 2) >> shift, 0, 63), T = sum |w|. int32 [B, Hs, S] in and out."""
    place = 2 ** torch.arange(planes.shape[2] - 1, dtype=torch.int32, device=planes.device)
    total = (popcount(planes[:, :, 1:]).sum(dim=-1, dtype=torch.int32) * place).sum(dim=-1, dtype=torch.int32)  # [B, Hs]
    return ((score - (total // 2)[..., None]) >> shift).clamp(0, NUM_BINS - 1)


# ---------------------------------------------------------------------------------------------------------------- select

def select_tokens_reference(planes: Tensor, signatures: Tensor, seq_lens: Tensor, budget: int | Tensor, sink: int,
                            recent: int, K: int | None = None, shift: int = 0) -> Tensor:
    """The tokens that each signature head attends to: an exact integer top-k of static shape.

    planes int32 [B, Hs, 1 + P, W], signatures int32 [B, Hs, S, W], seq_lens int32 [B] -> indices int32 [B, Hs, K].
    Always in, inside the budget: the first `sink` and the last `recent` tokens. The rest come from between them by bin
    descending, then position ascending. A sequence no longer than the budget keeps all its tokens. Unused slots are -1.
    The order within a row is free; the set is not. Here it is by rank: a smaller budget's tokens come first.
    budget: tokens per signature head, an int or int32 [Hs] on the device, each at least sink + recent and at most K.
    K: slots in the result; the int budget where not given.  shift: `HashEncoder.shift`.
    """
    bins = score_bins(score_reference(planes, signatures), planes, shift)
    return top_tokens(bins, seq_lens, budget, sink, recent, _slots(budget, K, signatures.shape[2], sink, recent))


def top_tokens(bins: Tensor, seq_lens: Tensor, budget: int | Tensor, sink: int, recent: int, K: int) -> Tensor:
    """`select_tokens_reference` from the bins of all tokens on: int32 [B, Hs, S] -> indices int32 [B, Hs, K]."""
    S = bins.shape[2]
    position = torch.arange(S, dtype=torch.int32, device=bins.device)
    length = seq_lens[:, None, None]  # [B, 1, 1]
    always = (position < sink) | (position >= length - recent)  # [B, 1, S]
    rank = torch.where(position < length, torch.where(always, NUM_BINS, bins), -1)
    # one integer per token orders by (rank descending, position ascending)
    order = rank.to(torch.int64) * S + (S - 1 - position)
    best = order.topk(min(K, S), dim=-1).values  # [B, Hs, min(K, S)]
    indices = (S - 1 - best % S).to(torch.int32)
    slot = torch.arange(min(K, S), device=bins.device)
    limit = budget[:, None] if isinstance(budget, Tensor) else budget
    indices = torch.where((best >= 0) & (slot < limit), indices, -1)
    return F.pad(indices, (0, K - min(K, S)), value=-1)


def _slots(budget: int | Tensor, K: int | None, S: int, sink: int, recent: int) -> int:
    """K, by default the int budget, which is checked; the values of a tensor are on the device, where nothing checks them."""
    if isinstance(budget, Tensor):
        if K is None:
            raise ValueError("K is required where budget is a tensor")
        return K
    if budget < min(sink + recent, S):
        raise ValueError(f"the budget of {budget} tokens is under sink {sink} plus recent {recent}")
    return budget if K is None else K


# ---------------------------------------------------------------------------------------------------------------- attend

def sparse_attention_reference(q: Tensor, k_cache: Tensor, v_cache: Tensor, indices: Tensor,
                               scale: float | None = None) -> tuple[Tensor, Tensor]:
    """Attention of one query per head over selected cache rows.

    q [B, Hq, D], k_cache and v_cache [B, Hkv, S, D], indices int32 [B, Hs, K] (-1 = unused), scale 1/sqrt(D) by default
    -> out [B, Hq, D] in q's dtype, lse float32 [B, Hq]. A row of only -1 gives out 0 and lse -inf.
    Rows that are not selected are never used: they may hold NaN.
    """
    B, Hq, D = q.shape
    Hkv, Hs = k_cache.shape[1], indices.shape[1]
    scale = D ** -0.5 if scale is None else scale
    valid = indices >= 0
    batch = torch.arange(B, device=q.device)[:, None, None]
    kv_head = (torch.arange(Hs, device=q.device) // (Hs // Hkv))[None, :, None]
    row = indices.clamp(min=0)
    k = k_cache[batch, kv_head, row].float()  # [B, Hs, K, D]
    # an unused slot reads row 0, whose value must not reach the output even as 0 * NaN
    v = v_cache[batch, kv_head, row].masked_fill(~valid[..., None], 0).float()
    queries = q.float().unflatten(1, (Hs, Hq // Hs))  # [B, Hs, G, D]
    scores = (queries @ k.transpose(-1, -2) * scale).masked_fill(~valid[:, :, None], float("-inf"))  # [B, Hs, G, K]
    out, lse = _softmax_attend(scores, v)
    return out.flatten(1, 2).to(q.dtype), lse.flatten(1, 2)


def dense_attention_reference(q: Tensor, k_cache: Tensor, v_cache: Tensor, seq_lens: Tensor,
                              scale: float | None = None) -> tuple[Tensor, Tensor]:
    """Attention of the last T positions of each sequence over its whole prefix, causal among them.

    q [B, T, Hq, D], k_cache and v_cache [B, Hkv, S, D], seq_lens int32 [B] (the T tokens included)
    -> out [B, T, Hq, D] in q's dtype, lse float32 [B, T, Hq]. Cache rows at and past seq_lens are never used.
    """
    _, T, Hq, D = q.shape
    Hkv, S = k_cache.shape[1:3]
    scale = D ** -0.5 if scale is None else scale
    position = torch.arange(S, device=q.device)
    last = seq_lens[:, None] - T + torch.arange(T, device=q.device)  # [B, T]: the newest token each query may see
    hidden = position > last[..., None]  # [B, T, S]
    v = v_cache.masked_fill((position >= seq_lens[:, None])[:, None, :, None], 0).float()
    queries = q.float().unflatten(2, (Hkv, Hq // Hkv)).permute(0, 2, 3, 1, 4).flatten(2, 3)  # [B, Hkv, G * T, D]
    hidden = hidden.repeat(1, Hq // Hkv, 1)[:, None]  # [B, 1, G * T, S]
    scores = (queries @ k_cache.float().transpose(-1, -2) * scale).masked_fill(hidden, float("-inf"))
    out, lse = _softmax_attend(scores, v)
    out = out.unflatten(2, (-1, T)).permute(0, 3, 1, 2, 4).flatten(2, 3)  # [B, T, Hq, D]
    lse = lse.unflatten(2, (-1, T)).permute(0, 3, 1, 2).flatten(2, 3)
    return out.to(q.dtype), lse


def _softmax_attend(scores: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    """scores float32 [..., M, K], v float32 [..., K, D] -> out [..., M, D] and lse [..., M]; all -inf gives 0 and -inf."""
    largest = scores.amax(dim=-1, keepdim=True)
    weights = torch.exp(scores - largest.masked_fill(largest.isneginf(), 0.0))
    total = weights.sum(dim=-1, keepdim=True)
    return weights @ v / total.clamp(min=1e-30), (largest + total.log()).squeeze(-1)


# ------------------------------------------------------------------------------------------------- before attention

def apply_rope(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate the halves of each head (Hugging Face's layout). x [B, T, H, D], cos and sin float32 [B, T, D / 2]."""
    first, second = x.float().chunk(2, dim=-1)
    cos, sin = cos[:, :, None], sin[:, :, None]
    return torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1).to(x.dtype)


def rope_encode_append_reference(qkv: Tensor, cos: Tensor, sin: Tensor, encoder: HashEncoder | None, k_cache: Tensor,
                                 v_cache: Tensor, signatures: Tensor | None, seq_lens: Tensor,
                                 norms: tuple[Tensor, Tensor, float] | None = None) -> tuple[Tensor, Tensor | None]:
    """What a decode step does before it attends: RoPE, signatures, and the newest T rows of each sequence into the cache.

    qkv [B, T, (Hq + 2 Hkv) D] (all query heads, then keys, then values), cos and sin float32 [B, T, D / 2], k_cache and
    v_cache [B, Hkv, S, D], signatures int32 [B, Hs, S, W] (None without an encoder), seq_lens int32 [B], the T tokens
    included. Rows seq_lens - T .. seq_lens are written in place. norms: RMSNorm of every head's q and k before RoPE (Qwen3),
    as the weights [D] of both and eps.
    -> q after RoPE [B, T, Hq, D], planes int32 [B, Hs, 1 + P, W] of the query; None without an encoder or where T > 1, as
    only a single query selects.
    """
    B, T, _ = qkv.shape
    Hkv, D = k_cache.shape[1], k_cache.shape[3]
    heads = qkv.unflatten(-1, (-1, D))  # [B, T, Hq + 2 Hkv, D]
    q, k, v = heads.split((heads.shape[2] - 2 * Hkv, Hkv, Hkv), dim=2)
    if norms is not None:
        q_norm, k_norm, eps = norms
        q, k = rms_norm(q, q_norm, eps), rms_norm(k, k_norm, eps)
    q, k = apply_rope(q, cos, sin), apply_rope(k, cos, sin)
    batch = torch.arange(B, device=qkv.device)[:, None]
    row = seq_lens[:, None] - T + torch.arange(T, device=qkv.device)  # [B, T]
    k_cache[batch, :, row] = k
    v_cache[batch, :, row] = v
    if encoder is None:
        return q, None
    signatures[batch, :, row] = encoder.encode_keys(k.transpose(1, 2)).transpose(1, 2)
    return q, encoder.encode_queries(q[:, 0]) if T == 1 else None


# -------------------------------------------------------------------------------------------------------------- dispatch

def rope_encode_append(qkv: Tensor, cos: Tensor, sin: Tensor, encoder: HashEncoder | None, k_cache: Tensor, v_cache: Tensor,
                       signatures: Tensor | None, seq_lens: Tensor,
                       norms: tuple[Tensor, Tensor, float] | None = None) -> tuple[Tensor, Tensor | None]:
    """`rope_encode_append_reference`, by one Triton kernel where the tensors are on a GPU and the encoder is linear."""
    if not qkv.is_cuda or encoder is not None and encoder.config.depth > 1:
        return rope_encode_append_reference(qkv, cos, sin, encoder, k_cache, v_cache, signatures, seq_lens, norms)
    from hashfast.kernels import encode
    norms = norms or (None, None, 0.0)
    if encoder is None:
        return encode.rope_encode_append(qkv, cos, sin, None, None, None, None, k_cache, v_cache, None, seq_lens, 0, 0,
                                         *norms)[0], None
    (key,), (query,) = encoder.key, encoder.query
    q, planes = encode.rope_encode_append(
        qkv, cos, sin, key.weight, key.bias, query.weight, query.bias, k_cache, v_cache, signatures, seq_lens,
        encoder.config.query_bits, encoder.config.planes(encoder.group), *norms)
    return q, planes if qkv.shape[1] == 1 else None


def select_tokens(planes: Tensor, signatures: Tensor, seq_lens: Tensor, budget: int | Tensor, sink: int, recent: int,
                  K: int | None = None, shift: int = 0, caches: tuple[Tensor, Tensor] | None = None) -> Tensor:
    """`select_tokens_reference`, by two Triton kernels where the tensors are on a GPU.

    caches: keys and values [B, Hkv, S, D] that attention reads next. The second kernel prefetches into L2 the rows of the first
    and last tokens and, where they are few, the keys of the selected ones; the result does not depend on it.
    """
    if not signatures.is_cuda:
        return select_tokens_reference(planes, signatures, seq_lens, budget, sink, recent, K, shift)
    from hashfast.kernels import select
    K = _slots(budget, K, signatures.shape[2], sink, recent)
    budget, budgets = (K, budget) if isinstance(budget, Tensor) else (budget, None)
    keys, values = caches or (None, None)
    return select.select_tokens(planes, signatures, seq_lens, budget, budgets, K, sink, recent, shift, keys, values)


def sparse_attention(q: Tensor, k_cache: Tensor, v_cache: Tensor, indices: Tensor,
                     scale: float | None = None) -> tuple[Tensor, Tensor]:
    """`sparse_attention_reference`, by Triton kernels where the tensors are on a GPU."""
    if not q.is_cuda:
        return sparse_attention_reference(q, k_cache, v_cache, indices, scale)
    from hashfast.kernels import sparse_attention as kernels
    return kernels.sparse_attention(q, k_cache, v_cache, indices, q.shape[-1] ** -0.5 if scale is None else scale)


def dense_attention(q: Tensor, k_cache: Tensor, v_cache: Tensor, seq_lens: Tensor,
                    scale: float | None = None) -> tuple[Tensor, Tensor]:
    """`dense_attention_reference`, by Triton kernels where the tensors are on a GPU."""
    if not q.is_cuda:
        return dense_attention_reference(q, k_cache, v_cache, seq_lens, scale)
    from hashfast.kernels import dense_attention as kernels
    return kernels.dense_attention(q, k_cache, v_cache, seq_lens, q.shape[-1] ** -0.5 if scale is None else scale)
