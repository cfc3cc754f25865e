"""Llama, Mistral, Qwen2 and Qwen3 in one file: a decoder whose decode step may attend to the tokens that signatures choose.

Two ways through the model:
    prefill   one sequence's prompt, in chunks of host-known position, which see all that is cached or what signatures choose;
              fills K, V and signatures
    forward   one decode step for the whole batch; lengths live on the device, every shape is static (one CUDA graph)

Symbols: B batch, T tokens per sequence in this call, S cache length, d model width, Hq query heads, Hkv key/value heads,
D head_dim, Hs signature heads, W signature words.
"""
import functools
import hashlib
import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from hashfast.common import UserError
from hashfast.hash_attention import (
    HashEncoder,
    apply_rope,
    dense_attention,
    rope_encode_append,
    select_tokens,
    sparse_attention,
)
from hashfast.ops.linear import linear, rms_norm
from hashfast.ops.prompt_attention import causal_attention
from hashfast.ops.prompt_selection import PrefixRows, gather_rows, prefix_rows, rows_read, sampled_positions, select_rows


@dataclass(frozen=True)
class RopeScaling:
    """How positions beyond the first training length are squeezed: `linear`, `llama3` or `yarn` (arXiv 2309.00071)."""
    kind: str
    factor: float
    original_max_position: int = 0
    low_freq_factor: float = 1.0  # llama3
    high_freq_factor: float = 4.0
    beta_fast: float = 32.0  # yarn
    beta_slow: float = 1.0
    attention_factor: float | None = None
    truncate: bool = True


@dataclass(frozen=True)
class ModelArgs:
    """The shape of a model; runtime/checkpoint.py reads it from config.json.

    max_position: the context length that the model was made for.  sliding_window: None where attention is full.
    qkv_bias, out_bias: of the projections into and out of attention.  qk_norm: RMSNorm of each head's q and k before RoPE.
    ranks: processes that share the model (runtime/tensor_parallel.py); n_head, n_kv_head and intermediate_size are then of
    one of them.
    """
    n_layer: int
    dim: int
    n_head: int
    n_kv_head: int
    head_dim: int
    intermediate_size: int
    vocab_size: int
    norm_eps: float
    rope_theta: float
    rope_scaling: RopeScaling | None = None
    max_position: int = 0
    sliding_window: int | None = None
    qkv_bias: bool = False
    out_bias: bool = False
    qk_norm: bool = False
    tie_embeddings: bool = False
    ranks: int = 1

    @property
    def vocab_rows(self) -> int:
        """Rows of the embedding and output tables that a rank holds, those past the vocabulary's end included."""
        return -(-self.vocab_size // self.ranks)


@dataclass(frozen=True)
class Fingerprint:
    """What of a model its signatures depend on: another shape refuses them, another hash or RoPE scaling warns.

    norms: SHA-256 of all RMSNorm weights, which quantising, GGUF conversion and tensor parallelism leave as they are; None
    where the model has no weights (on the meta device). rope_scaling: None is none.
    """
    n_layer: int
    n_head: int
    n_kv_head: int
    head_dim: int
    rope_theta: float
    vocab_size: int
    rope_scaling: RopeScaling | None = None
    norms: str | None = None


@dataclass(frozen=True)
class SparseSettings:
    """What a hash decode step reads.

    budget: tokens per signature head, `sink` first and `recent` last ones included; with `budgets`, the most of any head.
    dense_layers: the first layers that attend to everything.
    budgets: tokens of each layer and signature head, where they differ (research/budgets.py).
    """
    budget: int
    sink: int = 64
    recent: int = 128
    dense_layers: int = 0
    budgets: tuple[tuple[int, ...], ...] | None = None

    def __post_init__(self) -> None:
        if self.budget < 1:
            raise UserError(f"a budget of {self.budget} tokens reads nothing; give at least 1")
        least = min(self.sink + self.recent, self.budget)  # a budget was cut to the cache's length, which may be under them
        for i, heads in enumerate(self.budgets or ()):
            if i >= self.dense_layers and not all(least <= budget <= self.budget for budget in heads):
                raise UserError(f"the budgets {heads} of layer {i} must be from {least} (sink and recent) to {self.budget}")


@dataclass(frozen=True)
class PrefillSettings:
    """How prompts are read. By default each token sees all before it.

    mode: "dense", or "hash": a chunk attends to itself and to about 1 / `sparsity` of what is cached, chosen by signatures
        (ops/prompt_selection.py); layers without an encoder stay dense.
    chunk: tokens that choose together, part of the method; chunks begin at its multiples.
    tail: the last tokens of a prompt, which read everything, so that a question is never sampled away.
    """
    mode: str = "dense"
    sparsity: float = 16
    chunk: int = 4096
    tail: int = 256

    def __post_init__(self) -> None:
        if self.mode not in ("dense", "hash"):
            raise UserError(f"prompts are read 'dense' or 'hash', not {self.mode!r}")
        if self.sparsity < 1 or self.chunk < 1 or self.tail < 0:
            raise UserError(f"a prompt read 1/{self.sparsity} at a time of {self.chunk} tokens with a tail of {self.tail}: "
                            "give a sparsity and a chunk of at least 1, and a tail of at least 0")

    def gathered(self, length: int) -> int:
        """Cached tokens that a chunk of a prompt of `length` reads at most where it chooses."""
        return rows_read(length, self.chunk, self.sparsity) if self.mode == "hash" else 0


class KVCache(nn.Module):
    """Static buffers of one layer: k, v [B, Hkv, S, D] and, with an encoder, signatures int32 [B, Hs, S, W]."""

    def __init__(self, batch: int, length: int, args: ModelArgs | Fingerprint, encoder: HashEncoder | None,
                 device: torch.device, dtype: torch.dtype) -> None:
        super().__init__()
        shape = (batch, args.n_kv_head, length, args.head_dim)
        self.register_buffer("k", torch.zeros(shape, device=device, dtype=dtype), persistent=False)
        self.register_buffer("v", torch.zeros(shape, device=device, dtype=dtype), persistent=False)
        signatures = None
        if encoder is not None:
            # rows padded to 64 bytes, or loads of four signatures at a time are not vectorised
            shape = (batch, encoder.n_signature_head, length + -length % 16, encoder.config.words)
            signatures = torch.zeros(shape, device=device, dtype=torch.int32)[:, :, :length]
        self.register_buffer("signatures", signatures, persistent=False)

    def rows(self) -> list[Tensor]:
        """The buffers that have a row per token: [B, heads, S, ...]."""
        return [buffer for buffer in (self.k, self.v, self.signatures) if buffer is not None]

    def write(self, row: int, start: int, k: Tensor, v: Tensor, signatures: Tensor | None) -> None:
        """Put one sequence's tokens from `start` on into it. k, v [1, Hkv, T, D], signatures int32 [1, Hs, T, W]."""
        end = start + k.shape[2]
        self.k[row, :, start:end] = k[0]
        self.v[row, :, start:end] = v[0]
        if signatures is not None:
            self.signatures[row, :, start:end] = signatures[0]

    def read(self, row: int, first: int, last: int) -> tuple[Tensor, Tensor]:
        """K and V [1, Hkv, last - first, D] of one sequence's tokens first .. last."""
        return self.k[row:row + 1, :, first:last], self.v[row:row + 1, :, first:last]


class RMSNorm(nn.Module):
    def __init__(self, dim: int, eps: float) -> None:
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(dim))

    def forward(self, x: Tensor) -> Tensor:
        return rms_norm(x, self.weight, self.eps)


class FeedForward(nn.Module):
    def __init__(self, args: ModelArgs) -> None:
        super().__init__()
        self.w13 = nn.Linear(args.dim, 2 * args.intermediate_size, bias=False)
        self.w2 = nn.Linear(args.intermediate_size, args.dim, bias=False)

    def forward(self, x: Tensor, norm: RMSNorm) -> Tensor:
        """x plus what the layer makes of it, normalised. [B, T, d] -> [B, T, d]."""
        return linear(linear(x, self.w13, norm, gated=True), self.w2, residual=x)


class Attention(nn.Module):
    """Projections, cache and attention of one layer. `sparse` and `encoder` are None where the layer is dense.

    selector: what chooses a decode step's tokens instead of signatures (research/selectors.py); None outside of measurements.
    """

    def __init__(self, args: ModelArgs) -> None:
        super().__init__()
        self.n_head, self.n_kv_head, self.head_dim = args.n_head, args.n_kv_head, args.head_dim
        self.wqkv = nn.Linear(args.dim, (args.n_head + 2 * args.n_kv_head) * args.head_dim, bias=args.qkv_bias)
        self.wo = nn.Linear(args.n_head * args.head_dim, args.dim, bias=args.out_bias)
        self.q_norm = RMSNorm(args.head_dim, args.norm_eps) if args.qk_norm else None
        self.k_norm = RMSNorm(args.head_dim, args.norm_eps) if args.qk_norm else None
        self.encoder: HashEncoder | None = None
        self.cache: KVCache | None = None
        self.sparse: SparseSettings | None = None
        self.register_buffer("budgets", None, persistent=False)  # int32 [Hs], where the heads' budgets differ
        self.selector: nn.Module | None = None

    def project(self, x: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """x [B, T, d] -> q [B, T, Hq, D], k and v [B, Hkv, T, D]; q and k after RoPE."""
        heads = self.wqkv(x).unflatten(-1, (-1, self.head_dim))  # [B, T, Hq + 2 Hkv, D]
        q, k, v = heads.split((self.n_head, self.n_kv_head, self.n_kv_head), dim=2)
        if self.q_norm is not None:
            q, k = self.q_norm(q), self.k_norm(k)
        return apply_rope(q, cos, sin), apply_rope(k, cos, sin).transpose(1, 2), v.transpose(1, 2)

    def decode(self, qkv: Tensor, cos: Tensor, sin: Tensor, seq_lens: Tensor) -> Tensor:
        """Append and attend at device-known lengths. qkv as wqkv gives it [B, T, (Hq + 2 Hkv) D], cos and sin [B, T, D / 2]
        -> [B, T, Hq, D]."""
        cache = self.cache
        norms = None if self.q_norm is None else (self.q_norm.weight, self.k_norm.weight, self.q_norm.eps)
        q, planes = rope_encode_append(qkv, cos, sin, self.encoder, cache.k, cache.v, cache.signatures, seq_lens, norms)
        if qkv.shape[1] > 1 or self.sparse is None and self.selector is None:  # drafted tokens to verify attend to everything
            return dense_attention(q, cache.k, cache.v, seq_lens)[0]
        if self.selector is not None:
            return self.selector.attend(q[:, 0], cache.k, cache.v, seq_lens)[:, None]
        budget = self.sparse.budget if self.budgets is None else self.budgets
        indices = select_tokens(planes, cache.signatures, seq_lens, budget, self.sparse.sink, self.sparse.recent,
                                K=self.sparse.budget, shift=self.encoder.shift, caches=(cache.k, cache.v))
        return sparse_attention(q[:, 0], cache.k, cache.v, indices)[0][:, None]

    def prefill(self, q: Tensor, k: Tensor, v: Tensor, signatures: Tensor | None, weights: Tensor | None, row: int, start: int,
                count: int, rows: PrefixRows | None = None) -> Tensor:
        """Attend to one sequence's `start` cached tokens and, causally, to these, the first `count` of which are cached.

        Shapes as `TransformerBlock.project` gives them; what comes after `count` is padding. rows: how many cached tokens are
        read, chosen by `weights`; None, or without weights: all. -> [1, T, Hq, D]
        """
        cache, length = self.cache, start
        read = functools.partial(cache.read, row)
        if rows is not None and weights is not None:
            chosen = select_rows(weights[0], cache.signatures[row], self.n_kv_head, start, rows, self.encoder.shift)
            gathered = gather_rows(cache.k[row], cache.v[row], chosen, rows.most)
            length = rows.count

            def read(first: int, last: int) -> tuple[Tensor, ...]:
                return tuple(x[:, :, first:last] for x in gathered)
        attended = causal_attention(q, k, v, read, length)
        k, v = k[:, :, :count], v[:, :, :count]
        if self.selector is not None:
            self.selector.observe(q[:, :count], k, row, start)
        cache.write(row, start, k, v, signatures[:, :, :count] if signatures is not None else None)
        return attended


class TransformerBlock(nn.Module):
    def __init__(self, args: ModelArgs) -> None:
        super().__init__()
        self.attention_norm = RMSNorm(args.dim, args.norm_eps)
        self.attention = Attention(args)
        self.ffn_norm = RMSNorm(args.dim, args.norm_eps)
        self.feed_forward = FeedForward(args)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor, seq_lens: Tensor) -> Tensor:
        """One decode step of this layer. x [B, T, d], cos and sin [B, T, D / 2], seq_lens int32 [B] -> [B, T, d]."""
        qkv = linear(x, self.attention.wqkv, self.attention_norm)
        return self.finish(x, self.attention.decode(qkv, cos, sin, seq_lens))

    def project(self, x: Tensor, cos: Tensor, sin: Tensor,
                sample: Tensor | None = None) -> tuple[Tensor, Tensor, Tensor, Tensor | None, Tensor | None]:
        """What a prompt chunk needs of this layer before attention: q, k, v as `Attention.project` gives them, signatures, and
        the weights int8 [1, Hs, Q, b] of the queries at `sample` (int64 [Q]); the latter two None without encoder or sample."""
        q, k, v = self.attention.project(self.attention_norm(x), cos, sin)
        encoder = self.attention.encoder
        signatures = encoder.encode_keys(k) if encoder is not None else None
        if encoder is None or sample is None:
            return q, k, v, signatures, None
        return q, k, v, signatures, encoder.weigh_queries(q[:, sample].transpose(1, 2))

    def prompt(self, x: Tensor, cos: Tensor, sin: Tensor, attend: Callable[..., Tensor] | None = None,
               parts: tuple[Callable, ...] = (), sample: Tensor | None = None) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """The layer's pass over prompt tokens: x [B, T, d], cos and sin [B, T, D / 2] -> the next x, and q, k and v.

        attend(what `project` gives) -> [B, T, Hq, D]; by default causal attention among these tokens alone, without a cache.
        parts: `project` and `finish` compiled.
        """
        project, finish = parts or (TransformerBlock.project, TransformerBlock.finish)
        q, k, v, *chosen_by = project(self, x, cos, sin, sample)
        attended = causal_attention(q, k, v) if attend is None else attend(q, k, v, *chosen_by)
        return finish(self, x, attended), q, k, v

    def finish(self, x: Tensor, attended: Tensor) -> Tensor:
        """Output projection and feed-forward with their residuals. x [B, T, d], attended [B, T, Hq, D] -> [B, T, d]."""
        x = linear(attended.flatten(2), self.attention.wo, residual=x)
        return self.feed_forward(x, self.ffn_norm)


class Transformer(nn.Module):
    def __init__(self, args: ModelArgs) -> None:
        super().__init__()
        self.args = args
        self.tok_embeddings = nn.Embedding(args.vocab_rows, args.dim)
        self.layers = nn.ModuleList(TransformerBlock(args) for _ in range(args.n_layer))
        self.static_chunk = 0  # compile_prefill sets them
        self.compiled_parts: tuple[Callable, ...] = ()
        self.norm = RMSNorm(args.dim, args.norm_eps)
        self.output = nn.Linear(args.dim, args.vocab_rows, bias=False)
        if args.tie_embeddings:
            self.output.weight = self.tok_embeddings.weight
        self.sparse: SparseSettings | None = None  # the last that were set
        with torch.device("cpu"):  # also where the parameters are made on the meta device
            self.inv_freq, self.rope_gain = rope_frequencies(args)

    def fingerprint(self) -> Fingerprint:
        args = self.args
        return Fingerprint(args.n_layer, args.n_head * args.ranks, args.n_kv_head * args.ranks, args.head_dim, args.rope_theta,
                           args.vocab_size, args.rope_scaling, self.hash_norms())

    def hash_norms(self) -> str | None:
        """SHA-256 of all RMSNorm weights as float32, rounded to bfloat16 so that the precision at load does not matter."""
        weights = [module.weight for module in self.modules() if isinstance(module, RMSNorm)]
        if weights[0].is_meta:
            return None
        weights = torch.cat(weights).detach().bfloat16().float().cpu().numpy()
        return hashlib.sha256(weights.tobytes()).hexdigest()[:16]

    def setup_caches(self, batch: int, length: int, encoders: list[HashEncoder] | None = None,
                     sparse: SparseSettings | None = None) -> None:
        """Allocate static caches of `length` tokens for `batch` sequences, beside the weights; selectors are gone then.

        With `encoders` (one per layer) signatures are kept as well; `sparse` says what a decode step then reads.
        """
        weight = self.tok_embeddings.weight
        self.inv_freq = self.inv_freq.to(weight.device)
        for i, layer in enumerate(self.layers):
            is_sparse = encoders is not None and (sparse is None or i >= sparse.dense_layers)
            layer.attention.encoder = encoders[i].to(weight.device) if is_sparse else None
            layer.attention.selector = None  # it belonged to the caches before
            layer.attention.cache = KVCache(batch, length, self.args, layer.attention.encoder, weight.device, weight.dtype)
        self.set_sparse(sparse)

    def set_sparse(self, sparse: SparseSettings | None) -> None:
        """Choose what decode steps read from now on: `sparse`, or everything (None). The caches stay as they are."""
        for i, layer in enumerate(self.layers):
            is_sparse = sparse is not None and layer.attention.encoder is not None and i >= sparse.dense_layers
            layer.attention.sparse = sparse if is_sparse else None
        # a captured step may switch between a setting and None: it cannot copy from the host, and reads the same budgets again
        if sparse is None or sparse == self.sparse:
            return
        self.sparse = sparse
        device = self.tok_embeddings.weight.device
        for i, layer in enumerate(self.layers):
            budgets = None if sparse.budgets is None else torch.tensor(sparse.budgets[i], dtype=torch.int32, device=device)
            layer.attention.budgets = budgets

    def forward(self, tokens: Tensor, seq_lens: Tensor) -> Tensor:
        """One decode step. tokens int64 [B, T], seq_lens int32 [B] with these tokens counted -> logits [B, T, vocab].

        Several tokens (T > 1) attend to everything, whatever `set_sparse` chose.
        """
        x, cos, sin = self.stem(tokens, seq_lens)
        for layer in self.layers:
            x = layer(x, cos, sin, seq_lens)
        return self.logits(x)

    def compile_prefill(self, chunk: int) -> None:
        """From now on prompt chunks of more than half of `chunk` tokens are padded to it, and all but attention is compiled.

        One compilation serves all layers, rows and positions. Shorter chunks are read as they are: padding would cost more.
        """
        self.static_chunk = chunk
        self.compiled_parts = tuple(torch.compile(part, fullgraph=True, dynamic=False)
                                    for part in (TransformerBlock.project, TransformerBlock.finish))

    def prefill(self, tokens: Tensor, row: int = 0, start: int = 0, settings: PrefillSettings | None = None) -> Tensor:
        """One prompt chunk of sequence `row` at position `start`. tokens int64 [T] -> logits of the last position [vocab].

        settings: of mode "hash": layers with an encoder read only part of what is cached. Its tail is the caller's.
        """
        count, sample, rows = len(tokens), None, None
        if settings is not None and settings.mode == "hash":
            rows = prefix_rows(start, settings.chunk, settings.sparsity, self.layers[0].attention.cache.k.shape[2])
            sample = sampled_positions(count, tokens.device)
        parts: tuple[Callable, ...] = ()
        if self.static_chunk // 2 < count <= self.static_chunk:
            parts = self.compiled_parts
            tokens = F.pad(tokens, (0, self.static_chunk - count))  # no token before it sees the padding
        x, cos, sin = self.embed(tokens[None], torch.arange(start, start + len(tokens), device=tokens.device)[None])
        for layer in self.layers:
            attend = functools.partial(layer.attention.prefill, row=row, start=start, count=count, rows=rows)
            x = layer.prompt(x, cos, sin, attend, parts, sample)[0]
        return self.logits(x[:, count - 1:count])[0, 0]

    def stem(self, tokens: Tensor, seq_lens: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """What `embed` gives for the newest tokens. tokens [B, T], seq_lens int32 [B] with these tokens counted."""
        return self.embed(tokens, seq_lens[:, None] - tokens.shape[1] + torch.arange(tokens.shape[1], device=tokens.device))

    def embed(self, tokens: Tensor, positions: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """tokens, positions [B, T] -> x [B, T, d], cos and sin [B, T, D / 2]."""
        return self.tok_embeddings(tokens), *self.rope(positions)

    def logits(self, x: Tensor) -> Tensor:
        return linear(x, self.output, self.norm)

    def rope(self, positions: Tensor) -> tuple[Tensor, Tensor]:
        """positions [B, T] -> cos and sin float32 [B, T, D / 2]."""
        angle = positions[..., None].float() * self.inv_freq.to(positions.device)
        return angle.cos() * self.rope_gain, angle.sin() * self.rope_gain


# ------------------------------------------------------------------------------------------------------------------ RoPE

def rope_frequencies(args: ModelArgs) -> tuple[Tensor, float]:
    """Radians per position of each pair of channels, float32 [D / 2], and the factor on cos and sin (yarn's; else 1)."""
    inv_freq = 1.0 / args.rope_theta ** (torch.arange(0, args.head_dim, 2, dtype=torch.float32) / args.head_dim)
    scaling = args.rope_scaling
    if scaling is None:
        return inv_freq, 1.0
    if scaling.kind == "linear":
        return inv_freq / scaling.factor, 1.0
    if scaling.kind == "llama3":
        return _llama3_frequencies(inv_freq, scaling), 1.0
    if scaling.kind == "yarn":
        gain = scaling.attention_factor
        return _yarn_frequencies(inv_freq, args.rope_theta, scaling), gain or 0.1 * math.log(max(scaling.factor, 1.0)) + 1.0
    raise ValueError(f"unknown RoPE scaling {scaling.kind!r}")


def _llama3_frequencies(inv_freq: Tensor, scaling: RopeScaling) -> Tensor:
    """Llama 3.1: long wavelengths divided by the factor, short ones kept, a linear blend between."""
    turns = scaling.original_max_position * inv_freq / (2 * math.pi)  # rotations over the original length
    keep = (turns - scaling.low_freq_factor) / (scaling.high_freq_factor - scaling.low_freq_factor)
    keep = keep.clamp(0, 1)
    return inv_freq * keep + inv_freq / scaling.factor * (1 - keep)


def _yarn_frequencies(inv_freq: Tensor, theta: float, scaling: RopeScaling) -> Tensor:
    """YaRN, section 3.2: channels that turn often are kept, slow ones are divided by the factor, a ramp between."""
    dim = 2 * len(inv_freq)

    def channel(turns: float) -> float:
        return dim * math.log(scaling.original_max_position / (turns * 2 * math.pi)) / (2 * math.log(theta))

    low, high = channel(scaling.beta_fast), channel(scaling.beta_slow)
    if scaling.truncate:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, dim - 1)
    ramp = (torch.arange(dim // 2, dtype=torch.float32) - low) / (high - low if high > low else 0.001)
    keep = 1 - ramp.clamp(0, 1)
    return inv_freq * keep + inv_freq / scaling.factor * (1 - keep)
