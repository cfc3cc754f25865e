"""Queries, keys and values of any model that integrations/transformers.py takes, for train_hash.py --backend transformers."""
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, PreTrainedModel
from transformers.cache_utils import Cache

from hashfast.common import UserError
from hashfast.integrations.transformers import (
    CACHE,
    NAME,
    CacheLayer,
    binding_window,
    causal_attention,
    fingerprint,
    query_for_hash,
    refuse_model,
)
from hashfast.model import Fingerprint
from hashfast.research.data import Sequence


def load(folder: str | Path, device: str, dtype: torch.dtype) -> PreTrainedModel:
    """A transformers model for `capture`. UserError where there is none, or hash attention would compute something else."""
    try:
        model = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype)
    except (OSError, ValueError) as error:
        raise UserError(f"transformers finds no model in {folder} ({error}); give a folder in Hugging Face's format") from error
    refuse_model(model)
    return model.to(device).eval()


class Limits(NamedTuple):
    """What of ModelArgs `check_model` reads."""
    n_layer: int
    max_position: int
    sliding_window: int | None


class CaptureModel:
    """A transformers model as train_hash.py takes it."""

    def __init__(self, folder: str | Path, device: str, dtype: torch.dtype) -> None:
        self.model = load(folder, device, dtype)
        self.args = Limits(self.model.config.num_hidden_layers, self.model.config.max_position_embeddings,
                           binding_window(self.model))

    def fingerprint(self) -> Fingerprint:
        return fingerprint(self.model)

    def capture(self, sequences: list[Sequence]) -> Iterator[tuple[list[Tensor], list[Tensor], list[Tensor]]]:
        return capture(self.model, sequences)


class RecordingLayer(CacheLayer):
    """Keeps what one layer attends with: q [Hq, T, D], k and v [Hkv, T, D]. Batch 1, no padding."""

    def __init__(self) -> None:
        super().__init__()
        self.recorded: tuple[Tensor, Tensor, Tensor] | None = None

    def attend(self, q: Tensor, k: Tensor, v: Tensor, pads: Tensor, scale: float) -> Tensor:
        self.recorded = tuple(x[0].contiguous() for x in (query_for_hash(q, scale), k, v))
        return causal_attention(q, k, v, scale)


class _Stop(Exception):
    """The first layer's inputs are known; the rest of the pass is not run."""


def _layer_inputs(model: PreTrainedModel, layer: nn.Module, ids: Tensor, cache: Cache) -> tuple[Tensor, dict[str, Any]]:
    """The hidden states [1, T, d] and the other arguments that the model calls its first layer with."""
    found: list = []

    def keep(module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
        found.extend((args[0] if args else kwargs["hidden_states"], kwargs))
        raise _Stop

    hook = layer.register_forward_pre_hook(keep, with_kwargs=True)
    try:
        model(ids, use_cache=True, **{CACHE: cache})
    except _Stop:
        pass
    finally:
        hook.remove()
    hidden, arguments = found
    arguments.pop("hidden_states", None)
    return hidden, arguments


@torch.no_grad()
def capture(model: PreTrainedModel, sequences: list[Sequence]) -> Iterator[tuple[list[Tensor], list[Tensor], list[Tensor]]]:
    """`research.training.capture` of a transformers model: one layer at a time over all sequences.

    Every layer is called with the first one's arguments but for the hidden states.
    """
    layers = model.get_decoder().layers
    recorder = RecordingLayer()
    cache = Cache(layers=[recorder] * len(layers))
    before = model.config._attn_implementation
    model.set_attn_implementation(NAME)
    try:
        hidden, arguments = [], {}
        for sequence in sequences:
            x, others = _layer_inputs(model, layers[0], sequence.ids.to(model.device), cache)
            hidden.append(x)
            arguments[x.shape[1]] = others  # of one length they are the same
        for layer in layers:
            recorded = []
            for i, x in enumerate(hidden):
                out = layer(x, **arguments[x.shape[1]])
                hidden[i] = out[0] if isinstance(out, tuple) else out
                recorded.append(recorder.recorded)
            queries, keys, values = map(list, zip(*recorded, strict=True))
            del recorded
            recorder.recorded = None
            yield queries, keys, values
            del queries, keys, values
    finally:
        model.set_attn_implementation(before)
