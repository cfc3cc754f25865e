"""Ablations: attention recall on held-out text, one choice of the method changed at a time.

The model runs once; every variant is trained on the same captured queries and keys and measured on the same sequences.
"""
import sys
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, replace

import torch
from torch import Tensor
from tqdm import tqdm

from hashfast.hash_attention import HashConfig, HashEncoder
from hashfast.model import Fingerprint, Transformer
from hashfast.research.data import DataConfig, Sequence, make_sequences
from hashfast.research.recall import attention_recall, held_out_positions, recall_curve
from hashfast.research.recipes import RECIPES
from hashfast.research.training import TrainConfig, attention_weights, capture, train_layer
from hashfast.runtime.signatures import random_encoders

RATIOS = (16, 32, 64)


@dataclass(frozen=True)
class Variant:
    """recipe: one of recipes.py, or "random" (projections as they are).  bits, query_bits, depth, share: None is the recipe's.
    needles: retrieval documents among the training sequences.  value_norm: log |v| beside the key's channels.
    context_share: of each training sequence, the first part that is used; recall is measured at full length.
    """
    name: str
    recipe: str = "listwise"
    bits: int | None = None
    query_bits: int | None = None
    depth: int | None = None
    share: str | None = None
    needles: bool = True
    value_norm: bool = False
    context_share: float = 1.0

    @property
    def config(self) -> HashConfig:
        given = {field: getattr(self, field) for field in ("bits", "query_bits", "depth", "share")}
        base = RECIPES[self.recipe].config if self.recipe != "random" else HashConfig()
        return replace(base, **{field: value for field, value in given.items() if value is not None})


VARIANTS = {variant.name: variant for variant in (
    Variant("ours"),
    Variant("random", "random"),
    Variant("hashattention", "hashattention"),
    Variant("hata", "hata"),
    *(Variant(f"{bits} bits", bits=bits) for bits in (16, 64, 128)),
    *(Variant(f"{bits}-bit query", query_bits=bits) for bits in (1, 2, 8)),
    *(Variant(f"depth {depth}", depth=depth) for depth in (2, 3)),
    Variant("per query head", share="query"),
    Variant("no needles", needles=False),
    Variant("log |v|", value_norm=True),
    Variant("1/4 of the context", context_share=0.25),
)}


@dataclass(frozen=True)
class Layer:
    """One layer's capture. Queries [Hq, T, D], keys and values [Hkv, T, D] per sequence."""
    queries: list[Tensor]
    keys: list[Tensor]
    values: list[Tensor]

    def part(self, sequences: slice) -> "Layer":
        return Layer(self.queries[sequences], self.keys[sequences], self.values[sequences])

    def with_value_norms(self) -> "Layer":
        """log |v| as one more channel of the keys, and 0 of the queries; attention stays what it was."""
        gain = ((self.keys[0].shape[-1] + 1) / self.keys[0].shape[-1]) ** 0.5  # undone by the scale of D + 1 channels
        keys = [torch.cat((k.float(), v.float().norm(dim=-1, keepdim=True).clamp(min=1e-6).log()), dim=-1)
                for k, v in zip(self.keys, self.values, strict=True)]
        return replace(self, keys=keys, queries=[torch.nn.functional.pad(q.float() * gain, (0, 1)) for q in self.queries])

    def cut(self, share: float) -> "Layer":
        return Layer(*([x[:, :int(share * x.shape[1])] for x in xs] for xs in (self.queries, self.keys, self.values)))


def train_variant(variant: Variant, layer: Layer, questions: list[int], model: Fingerprint, config: TrainConfig) -> HashEncoder:
    """One variant's encoder of a captured layer, trained on its training sequences."""
    encoder = random_encoders(variant.config, replace(model, n_layer=1, head_dim=layer.keys[0].shape[-1]), config.seed)[0]
    encoder = encoder.to(layer.keys[0].device)
    if variant.recipe == "random":
        return encoder
    if not variant.needles:
        kept = [i for i, count in enumerate(questions) if count == 0]
        layer = Layer(*([xs[i] for i in kept] for xs in (layer.queries, layer.keys, layer.values)))
        questions = [0] * len(kept)
    if variant.context_share < 1:  # the questions are at the end, which is cut off
        layer, questions = layer.cut(variant.context_share), [0] * len(questions)
    return train_layer(encoder, layer.queries, layer.keys, questions, replace(config, recipe=variant.recipe))[0]


def variant_recalls(encoders: dict[str, HashEncoder], layer: Layer, sequences: list[Sequence], budgets: list[int],
                    config: TrainConfig) -> dict[str, Tensor]:
    """Recall [budgets] of every variant, and of "window" and "oracle", mean over these sequences."""
    recalls: dict[str, list[Tensor]] = {}
    norms = layer.with_value_norms()
    for i, sequence in enumerate(sequences):
        positions = held_out_positions(sequence).to(layer.keys[i].device)
        q, k = layer.queries[i][:, positions], layer.keys[i]
        weights = attention_weights(q, k, positions)
        for name, encoder in encoders.items():
            inputs = (norms.queries[i][:, positions], norms.keys[i]) if VARIANTS[name].value_norm else (q, k)
            curve = recall_curve(encoder, weights, *inputs, positions, budgets, config.sink, config.recent)
            recalls.setdefault(name, []).append(curve.mean(dim=0).cpu())
        bounds = [attention_recall({}, q, k, positions, budget, config.sink, config.recent) for budget in budgets]
        for name in ("window", "oracle"):
            recalls.setdefault(name, []).append(torch.tensor([bound[name] for bound in bounds]))
    return {name: torch.stack(curves).mean(dim=0) for name, curves in recalls.items()}


def make_rows(found: list[dict[str, dict[str, Tensor]]], budgets: list[int], model: Fingerprint) -> list[dict]:
    """One row per variant and ratio from found[layer][kind of text][variant]."""
    rows = []
    for name in found[0]["books"]:
        about: dict = {"name": name}
        if name in VARIANTS:
            config = VARIANTS[name].config
            heads = config.signature_heads(model.n_head, model.n_kv_head)
            about = asdict(VARIANTS[name]) | {"bits": config.bits, "query_bits": config.query_bits, "depth": config.depth,
                                              "share": config.share,
                                              "bytes_per_token": 4 * config.words * heads / model.n_kv_head}
        for i, ratio in enumerate(RATIOS):
            masses = {f"mass_{kind}": float(sum(layer[kind][name][i] for layer in found) / len(found)) for kind in found[0]}
            rows.append({**about, "ratio": ratio, "budget": budgets[i], **masses})
    return rows


def ablate(model: Transformer, encode: Callable[[str], list[int]], texts: dict[str, str], data: DataConfig, config: TrainConfig,
           layers: list[int], variants: list[str]) -> Iterator[list[dict]]:
    """After each of `layers`: one row per variant and ratio, mean over the layers so far. Drops the model's later layers.

    encode: of the model's tokenizer. texts: by path. variants: names in VARIANTS.
    """
    training, held_out = make_sequences(texts, encode, data)
    fingerprint = model.fingerprint()
    del model.layers[max(layers) + 1:]
    budgets = [max(data.context // ratio, config.sink + config.recent) for ratio in RATIOS]
    if budgets[-1] <= config.sink + config.recent:
        print(f"warning: 1/{RATIOS[-1]} of {data.context} tokens is no more than --sink and --recent, so nothing is selected; "
              "give a longer --context", file=sys.stderr)
    found = []
    sequences = training + [sequence for kept in held_out.values() for sequence in kept]
    with tqdm(total=len(layers) * len(variants), desc="variants") as progress:
        for i, captured in enumerate(capture(model, sequences)):
            if i not in layers:
                continue
            layer = Layer(*captured)
            train_part = layer.part(slice(len(training)))
            encoders = {}
            for name in variants:
                variant = VARIANTS[name]
                encoders[name] = train_variant(variant, train_part.with_value_norms() if variant.value_norm else train_part,
                                               [sequence.question for sequence in training], fingerprint, config)
                progress.update()
            first = len(training)
            found.append({})
            for kind, kept in held_out.items():
                part = layer.part(slice(first, first + len(kept)))
                found[-1][kind] = variant_recalls(encoders, part, kept, budgets, config)
                first += len(kept)
            yield make_rows(found, budgets, fingerprint)
