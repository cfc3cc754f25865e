"""Hash attention in transformers (>= 5.17): `enable(model)`, then `model.generate` and what is built on it read by signatures.

Three parts of transformers' own interface are implemented here. Of a call of `generate`:
    mask       `count_pads`: not a mask [B, 1, T, S] but each row's padding tokens, int32 [B, 1, 1, 1]
    cache      `HashCacheLayer.update`: returns (k, the layer) as the keys, so that the attention function reaches the buffers
    attention  `hash_attention`: writes K, V and signatures, then attends: densely for a prompt, sparsely for one token
A forward pass without a cache is scaled-dot-product attention as transformers does it.

Prompts are padded on the left. A row's tokens are stored from 0 on, without its padding: sinks are tokens, not padding.

Symbols: B batch, T tokens per sequence in this call, S cache length, Hq query heads, Hkv key/value heads, D head_dim.
"""
import hashlib
import inspect
import re
import sys
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import AttentionInterface, PreTrainedModel
from transformers.cache_utils import Cache, CacheLayerMixin
from transformers.generation import GenerationConfig, GenerationMixin, GenerationMode
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import AttentionMaskInterface, sdpa_mask

from hashfast.common import UserError
from hashfast.hash_attention import HashConfig, HashEncoder, dense_attention, select_tokens, sparse_attention
from hashfast.model import Fingerprint, KVCache, RopeScaling, SparseSettings
from hashfast.runtime.checkpoint import Fields, read_rope
from hashfast.runtime.memory import sparse_settings
from hashfast.runtime.signatures import load_signatures, random_encoders

NAME = "hashfast"  # of the attention implementation
# a model's argument for its cache: cache from transformers 5.24 on
CACHE = next(name for name in ("cache", "past_key_values")
             if name in inspect.signature(GenerationMixin.prepare_inputs_for_generation).parameters)
LAYER_TYPES = {"full_attention", "sliding_attention"}
NORM_ORDER = ("input_layernorm", "q_norm", "k_norm", "post_attention_layernorm")  # as model.py's layers hold theirs


# ----------------------------------------------------------------------------------------------------------------- cache

class LayerState(KVCache):
    """Buffers and settings of one layer. A module, so that torch.compile takes the integers for constants.

    seen: int32, tokens written so far, padding included; the layers of a cache share it.
    """

    def __init__(self, batch: int, length: int, model: Fingerprint, encoder: HashEncoder, sparse: SparseSettings,
                 seen: Tensor, dtype: torch.dtype) -> None:
        super().__init__(batch, length, model, encoder, seen.device, dtype)
        self.encoder = encoder
        self.length = length
        self.budget, self.sink, self.recent = sparse.budget, sparse.sink, sparse.recent
        self.register_buffer("seen", seen, persistent=False)
        for buffer in (*self.rows(), seen):
            torch._dynamo.mark_static_address(buffer)  # without it the compiled step is not captured as a CUDA graph


class CacheLayer(CacheLayerMixin):
    """What an attention function is given as keys beside k: `attend` of the layer's own kind."""
    is_compileable = True
    is_sliding = False

    def attend(self, q: Tensor, k: Tensor, v: Tensor, pads: Tensor, scale: float) -> Tensor:
        """q [B, Hq, T, D], k and v [B, Hkv, T, D] after RoPE, pads int32 [B, 1, 1, 1] -> [B, T, Hq, D]."""
        raise NotImplementedError

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Any, Tensor]:
        return (key_states, self), value_states

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """The buffers are there from the start."""

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return 0, 0  # tells `count_pads` that this cache is ours: others have keys

    def get_seq_length(self) -> int | Tensor:
        return 0

    def get_max_length(self) -> int:
        return -1


class HashCacheLayer(CacheLayer):
    """A layer's K, V and signatures.

    fresh: nothing was written yet.  padded: some row of the batch begins with padding.
    """

    def __init__(self, state: LayerState, is_first: bool) -> None:
        super().__init__()
        self.state, self.is_first = state, is_first
        self.batch_size = state.k.shape[0]
        self.is_initialized = True
        self.fresh, self.padded = True, False

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Any, Tensor]:
        if self.is_first:
            self.state.seen.add_(key_states.shape[2])
        return super().update(key_states, value_states)

    def attend(self, q: Tensor, k: Tensor, v: Tensor, pads: Tensor, scale: float) -> Tensor:
        state, T = self.state, q.shape[2]
        seq_lens = state.seen - pads.flatten()  # [B]
        self.append(k, v, seq_lens)
        if T == 1:
            self.fresh = False
            planes = state.encoder.encode_queries(query_for_hash(q, scale)[:, :, 0])
            indices = select_tokens(planes, state.signatures, seq_lens, state.budget, state.sink, state.recent,
                                    shift=state.encoder.shift, caches=(state.k, state.v))
            return sparse_attention(q[:, :, 0].contiguous(), state.k, state.v, indices, scale)[0][:, None]
        fresh, self.fresh = self.fresh, False
        if fresh and not self.padded:
            return causal_attention(q, k, v, scale)
        return dense_attention(q.transpose(1, 2).contiguous(), state.k, state.v, seq_lens, scale)[0]

    def append(self, k: Tensor, v: Tensor, seq_lens: Tensor) -> None:
        """Write T rows of each sequence, which end at seq_lens int32 [B]. k and v [B, Hkv, T, D]."""
        state, (B, _, T, _) = self.state, k.shape
        position = seq_lens[:, None] - T + torch.arange(T, device=k.device)  # [B, T]; of padding: below 0
        # a padded row ends before the last row of the buffer, which then takes the padding until a token overwrites it
        row = torch.where(position < 0, state.length - 1, position)
        batch = torch.arange(B, device=k.device)[:, None]
        state.k[batch, :, row] = k.transpose(1, 2)
        state.v[batch, :, row] = v.transpose(1, 2)
        state.signatures[batch, :, row] = state.encoder.encode_keys(k).transpose(1, 2)

    def reset(self) -> None:
        self.state.seen.zero_()
        self.fresh = True

    def get_seq_length(self) -> int | Tensor:
        return 0 if self.fresh else self.state.seen

    def get_max_length(self) -> int:
        return self.state.length


def causal_attention(q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
    """Of tokens among themselves. q [B, Hq, T, D], k and v [B, Hkv, T, D] -> [B, T, Hq, D]."""
    return F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=scale, enable_gqa=True).transpose(1, 2)


def query_for_hash(q: Tensor, scale: float) -> Tensor:
    """The query whose logits are divided by sqrt(D): encoders are trained on it, whatever a model's scale is (Granite's)."""
    ratio = scale * q.shape[-1] ** 0.5
    return q if abs(ratio - 1) < 1e-6 else q * ratio


# ------------------------------------------------------------------------------------------------------ mask, attention

def count_pads(batch_size: int, q_length: int, kv_length: int, *args: Any, attention_mask: Tensor | None = None,
               device: torch.device | str = "cpu", **kwargs: Any) -> Tensor | None:
    """transformers' mask function: with our cache the padding tokens of each row, int32 [B, 1, 1, 1]; else a mask as SDPA's."""
    if kv_length > 0:
        return sdpa_mask(batch_size, q_length, kv_length, *args, attention_mask=attention_mask, device=device, **kwargs)
    if kwargs.get("use_vmap"):
        raise UserError("this model adds a mask of its own to the causal one, which hash attention does not read")
    if attention_mask is None:
        return torch.zeros(batch_size, 1, 1, 1, dtype=torch.int32, device=device)
    return (attention_mask == 0).sum(dim=-1, dtype=torch.int32)[:, None, None, None]


def hash_attention(module: nn.Module, query: Tensor, key: Any, value: Tensor, attention_mask: Tensor | None,
                   scaling: float | None = None, **kwargs: Any) -> tuple[Tensor, None]:
    """transformers' attention function. query [B, Hq, T, D], value [B, Hkv, T, D] -> [B, T, Hq, D], None."""
    for name in ("softcap", "s_aux", "position_bias"):
        if kwargs.get(name) is not None:
            raise UserError(f"{type(module).__name__} has {name}, which hash attention does not compute; disable(model)")
    if not isinstance(key, tuple):
        if key.shape[2] != query.shape[2]:
            raise UserError("the cache is not hashfast's; leave past_key_values to model.generate, or disable(model)")
        return sdpa_attention_forward(module, query, key, value, attention_mask, scaling=scaling, **kwargs)
    k, layer = key
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    return layer.attend(query, k, value, attention_mask, scale), None


AttentionInterface.register(NAME, hash_attention)
AttentionMaskInterface.register(NAME, count_pads)


# ---------------------------------------------------------------------------------------------------------------- enable

class Enabled:
    """What `enable` keeps beside a model: its encoders, settings, and the cache of the last call of generate."""

    def __init__(self, model: PreTrainedModel, encoders: list[HashEncoder], budget: int, sparsity: float | None, sink: int,
                 recent: int) -> None:
        self.model, self.encoders, self.shape = model, encoders, fingerprint(model)
        self.budget, self.sparsity, self.sink, self.recent = budget, sparsity, sink, recent
        self.before = model.config._attn_implementation
        self.cache: Cache | None = None

    def prepare(self, *args: Any, **kwargs: Any) -> None:
        """In the place of the model's _prepare_cache_for_generation: refuse what is not supported, and give our cache."""
        call = inspect.signature(type(self.model)._prepare_cache_for_generation).bind(self.model, *args, **kwargs).arguments
        settings, inputs = call["generation_config"], call["model_kwargs"]
        refuse_generation(settings, call["generation_mode"], inputs)
        length = max(call["max_cache_length"], getattr(settings, "max_cache_len", None) or 0)
        window = binding_window(self.model)
        if window is not None and call["max_cache_length"] > window:
            raise UserError(f"prompt and answer of {call['max_cache_length'] + 1} tokens outgrow this model's sliding window "
                            f"of {window}, which hash attention does not know; shorten them, or disable(model)")
        mask = inputs.get("attention_mask")
        padded = mask is not None and bool((mask == 0).any())
        if padded and bool((mask[:, 1:] < mask[:, :-1]).any()):
            raise UserError("the attention mask hides tokens behind others; pad prompts on the left (tokenizer.padding_side)")
        inputs[CACHE] = self.make_cache(call["batch_size"] * settings.num_return_sequences, length,
                                        call["max_cache_length"] + 1, padded)

    def make_cache(self, batch: int, length: int, tokens: int, padded: bool) -> Cache:
        """An empty cache of at least `length` tokens: the one of the call before, where it fits, so that nothing is compiled
        again. tokens: of prompt and answer, which `sparsity` is a share of."""
        length += -length % 16  # so that KVCache's signatures are no view: of one, a compiled step would read a copy
        last = self.cache.layers[0].state if self.cache is not None else None
        if last is not None and last.k.shape[0] == batch:
            length = max(length, last.length)
        sparse = sparse_settings(length, tokens, self.budget, self.sparsity, self.sink, self.recent)
        if last is None or (last.k.shape[0], last.length, last.budget) != (batch, length, sparse.budget):
            self.cache = last = None  # before the next one is allocated
            with torch.inference_mode(False):  # buffers made in that mode could not be written outside of it
                seen = torch.zeros((), dtype=torch.int32, device=self.model.device)
                self.cache = Cache(layers=[
                    HashCacheLayer(LayerState(batch, length, self.shape, encoder, sparse, seen, self.model.dtype), i == 0)
                    for i, encoder in enumerate(self.encoders)])
        self.cache.reset()
        for layer in self.cache.layers:
            layer.padded = padded
        return self.cache


def enable(model: PreTrainedModel, signatures: str | Path | list[HashEncoder] | None = None, budget: int | None = None,
           sparsity: float | None = None, sink: int = 64, recent: int = 128) -> PreTrainedModel:
    """From now on `model.generate` reads the prompt densely, and for each new token the cached tokens that signatures select.

    signatures: a file of train_hash.py, or one encoder per layer; None: random projections, with a warning.
    budget: tokens read per KV head, `sink` first and `recent` last ones included (default: 2048).
    sparsity: a budget of 1 / sparsity of prompt and answer instead; another length may then compile the step again.
    UserError where hash attention would compute something else than the model. -> the model itself.
    """
    refuse_model(model)
    if budget is not None and sparsity is not None:
        raise UserError("budget and sparsity both say how many tokens to read; give one")
    if sink < 0 or recent < 1:
        raise UserError(f"sink must be at least 0 and recent at least 1, not {sink} and {recent}")
    if budget is not None and budget < sink + recent:
        raise UserError(f"the budget of {budget} tokens is under sink {sink} plus recent {recent}")
    if sparsity is not None and not 1 <= sparsity < 1e9:
        raise UserError(f"sparsity must be at least 1, not {sparsity}")
    shape = fingerprint(model)
    if signatures is None:
        print("warning: no signatures, so random projections choose the tokens; train some with "
              "`hashfast train --backend transformers`", file=sys.stderr)
        signatures = random_encoders(HashConfig(), shape)
    encoders = signatures if isinstance(signatures, list) else load_signatures(signatures, shape)[0]
    disable(model)
    state = Enabled(model, [encoder.to(model.device) for encoder in encoders], budget or 2048, sparsity, sink, recent)
    model.set_attn_implementation(NAME)
    model._hashfast = state
    model._prepare_cache_for_generation = state.prepare
    return model


def disable(model: PreTrainedModel) -> PreTrainedModel:
    """Give the model back as it was before `enable`; nothing happens where it was not enabled."""
    state = model.__dict__.pop("_hashfast", None)
    if state is not None:
        del model._prepare_cache_for_generation
        model.set_attn_implementation(state.before)
    return model


def new_cache(model: PreTrainedModel, batch: int, length: int, padded: bool) -> Cache:
    """An empty cache for forward passes of an enabled model without `generate`; the next one overwrites it.

    padded: some row begins with padding, which the attention mask of every pass says.
    """
    return model._hashfast.make_cache(batch, length, length + 1, padded)


# --------------------------------------------------------------------------------------------------------------- refusals

def refuse_model(model: PreTrainedModel) -> None:
    """UserError, by name, for what hash attention would compute otherwise."""
    config = model.config

    def refuse(what: str) -> None:
        raise UserError(f"{type(model).__name__} {what}; hash attention is for decoders with rotary embeddings and full, "
                        "grouped-query attention")

    if config.is_encoder_decoder:
        refuse("is an encoder-decoder")
    if config.get_text_config(decoder=True) is not config:
        refuse("has other parts than a text decoder")
    if getattr(config, "kv_lora_rank", None):
        refuse("has multi-head latent attention")
    if getattr(config, "attn_logit_softcapping", None):
        refuse("caps attention logits")
    others = set(getattr(config, "layer_types", None) or ()) - LAYER_TYPES
    if others:
        refuse(f"has layers of {', '.join(sorted(others))}")
    if not getattr(config, "rope_parameters", None):
        refuse("has no rotary embeddings")
    if not model._supports_attention_backend:
        refuse("does not go through transformers' attention interface")
    if len(set(getattr(model, "hf_device_map", {}).values())) > 1:
        refuse("is spread over several devices")


def refuse_generation(settings: GenerationConfig, mode: GenerationMode, inputs: dict[str, Any]) -> None:
    """UserError for calls of generate that one static cache cannot serve."""
    if mode not in (GenerationMode.GREEDY_SEARCH, GenerationMode.SAMPLE) or getattr(settings, "is_assistant", False):
        raise UserError(f"generate by {mode.value.replace('_', ' ')} is not supported with hash attention, only greedy search "
                        "and sampling; disable(model) before")
    if any(inputs.get(name) is not None for name in ("cache", "past_key_values")):
        raise UserError("past_key_values is a cache of your own, and hash attention keeps signatures in its; leave it out")
    if not settings.use_cache:
        raise UserError("use_cache=False leaves nothing to select from; leave it out, or disable(model)")
    if settings.cache_implementation not in (None, "dynamic", "static"):
        raise UserError(f"cache_implementation={settings.cache_implementation!r} is another cache than hash attention's; "
                        "leave it out")


def binding_window(model: PreTrainedModel) -> int | None:
    """The sliding window of the model's layers; None where attention is full."""
    types = getattr(model.config, "layer_types", None)
    if types is not None and "sliding_attention" not in types:
        return None
    return getattr(model.config, "sliding_window", None)


# ------------------------------------------------------------------------------------------------------------ fingerprint

def fingerprint(model: PreTrainedModel) -> Fingerprint:
    """What of a model its signatures depend on: for the models of model.py the same as there."""
    config = model.config
    values = config.to_dict()
    rope = values["rope_parameters"]
    if "rope_theta" not in rope:  # one for each type of layers
        rope = rope["full_attention"]
        values["rope_parameters"] = rope
    try:
        theta, scaling = read_rope(Fields(values, "the model's config"), config.max_position_embeddings)
    except UserError:  # a kind that model.py does not know
        theta = float(rope["rope_theta"])
        scaling = RopeScaling(rope.get("rope_type", "default"), float(rope.get("factor") or 1))
    n_head = config.num_attention_heads
    return Fingerprint(config.num_hidden_layers, n_head, getattr(config, "num_key_value_heads", None) or n_head,
                       getattr(config, "head_dim", None) or config.hidden_size // n_head, theta, config.vocab_size, scaling,
                       hash_norms(model))


def hash_norms(model: PreTrainedModel) -> str | None:
    """`Transformer.hash_norms` over weights in the same order."""
    weights = {}
    for name, weight in model.named_parameters():
        match = re.search(r"(?:\.layers\.(\d+)\.(?:.*\.)?)?(\w*norm)\.weight$", name)
        if match is not None:
            layer = model.config.num_hidden_layers if match[1] is None else int(match[1])
            place = NORM_ORDER.index(match[2]) if match[2] in NORM_ORDER else len(NORM_ORDER)
            weights[layer, place, name] = weight
    if not weights or any(weight.is_meta for weight in weights.values()):
        return None
    flat = torch.cat([weights[key].detach().flatten().cpu() for key in sorted(weights)]).bfloat16().float().numpy()
    return hashlib.sha256(flat.tobytes()).hexdigest()[:16]
