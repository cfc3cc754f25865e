"""Attention recall: the share of the dense attention mass that lies on the selected tokens.

Of encoders on captured queries and keys (training and ablations), and of any selector while a model decodes (`recall`).
"""
from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor
from tqdm import tqdm

from hashfast.common import UserError
from hashfast.hash_attention import HashEncoder, select_tokens_reference
from hashfast.research.budgets import UNIT, curve_units
from hashfast.research.data import Sequence, named_texts
from hashfast.research.evaluator import DecodeEvaluator, EvalConfig, Run
from hashfast.research.plots import heat_maps
from hashfast.research.selectors import Method, Selector, dot_products
from hashfast.research.training import TrainConfig, attention_weights, selectable_region
from hashfast.runtime.decode import Decoder
from hashfast.runtime.sampling import Sampling

HELD_OUT_POSITIONS = 32


# -------------------------------------------------------------------------------------------------------------- encoders

@torch.inference_mode()
def recall_curve(encoder: HashEncoder, weights: Tensor, q: Tensor, k: Tensor, positions: Tensor, budgets: list[int], sink: int,
                 recent: int) -> Tensor:
    """Recall at each of these budgets, mean over positions and the heads of a group.

    weights [Hq, n, T] of the queries q [Hq, n, D] at positions int64 [n], k [Hkv, T, D] -> float32 [Hs, budgets].
    """
    planes = encoder.encode_queries(q.transpose(0, 1))  # the positions are the batch: [n, Hs, 1 + P, W]
    signatures = encoder.encode_keys(k[None]).expand(len(positions), -1, -1, -1)
    indices = select_tokens_reference(planes, signatures, (positions + 1).int(), max(budgets), sink, recent,
                                      shift=encoder.shift)
    mass = weights.unflatten(0, (encoder.n_signature_head, -1)).mean(dim=1).transpose(0, 1)  # [n, Hs, T]
    mass = mass.gather(-1, indices.clamp(min=0).long()).mul(indices >= 0)
    # by rank, as the reference gives them, so that a smaller budget's tokens come first
    return mass.cumsum(dim=-1).mean(dim=0)[:, torch.tensor(budgets, device=q.device) - 1]


@torch.inference_mode()
def attention_recall(encoders: dict[str, HashEncoder], q: Tensor, k: Tensor, positions: Tensor, budget: int, sink: int,
                     recent: int) -> dict[str, float]:
    """Recall of each encoder at a budget, mean over query heads and positions.

    q [Hq, n, D] of the queries at positions int64 [n], k [Hkv, T, D]. Besides the encoders: "window" (sink and recent alone)
    and "oracle" (the best tokens for the summed mass of each KV head's group).
    """
    weights = attention_weights(q, k, positions)  # [Hq, n, T]
    selectable = selectable_region(positions, k.shape[1], sink, recent)
    group_mass = (weights * selectable).unflatten(0, (len(k), -1)).mean(dim=1)  # [Hkv, n, T]
    window = (weights * ~selectable).sum(dim=-1).mean()
    shares = {"window": float(window),
              "oracle": float(window + group_mass.topk(budget - sink - recent, dim=-1).values.sum(dim=-1).mean())}
    for name, encoder in encoders.items():
        shares[name] = float(recall_curve(encoder, weights, q, k, positions, [budget], sink, recent).mean())
    return shares


def held_out_positions(sequence: Sequence) -> Tensor:
    """Where recall is measured: int64 [n], the end of a question and its answer, or the last quarter of a book."""
    length = sequence.ids.shape[1]
    if sequence.question:
        return torch.arange(length - min(sequence.question, HELD_OUT_POSITIONS), length)
    return torch.linspace(0.75 * length, length - 1, HELD_OUT_POSITIONS).long()


def layer_recall(encoders: dict[str, HashEncoder], held_out: dict[str, list[Sequence]], queries: list[Tensor],
                 keys: list[Tensor], budget: int, config: TrainConfig) -> tuple[dict[str, dict[str, float]], Tensor]:
    """One layer's recall by kind of text, and the curve of the encoder "trained" by units of budget, float32 [Hs, J].

    queries [Hq, T, D] and keys [Hkv, T, D] are of the held-out sequences, in their order.
    """
    captured = zip(queries, keys, strict=True)
    window = config.sink + config.recent
    recalls, curves = {}, []
    for kind, sequences in held_out.items():
        shares = []
        for sequence, (q, k) in zip(sequences, captured, strict=False):
            positions = held_out_positions(sequence).to(k.device)
            q = q[:, positions]
            shares.append(attention_recall(encoders, q, k, positions, budget, config.sink, config.recent))
            budgets = [window + UNIT * (1 + j) for j in range(curve_units(k.shape[1], window))]
            curves.append(recall_curve(encoders["trained"], attention_weights(q, k, positions), q, k, positions, budgets,
                                       config.sink, config.recent))
        recalls[kind] = mean_shares(shares)
    shortest = min(curve.shape[1] for curve in curves)
    return recalls, torch.stack([curve[:, :shortest] for curve in curves]).mean(dim=0)


def mean_shares(shares: list[dict[str, float]]) -> dict[str, float]:
    return {name: sum(share[name] for share in shares) / len(shares) for name in shares[0]}


def table(held_out: dict[str, list[dict[str, float]]]) -> str:
    """Recall by layer: one line a layer and one of means, the columns of each kind of text side by side."""
    columns = ("window", "random", "trained", "oracle")
    lines = ["layer  " + "   ".join(f"{kind + ': ' + ', '.join(columns):36}" for kind in held_out)]
    rows = list(zip(*held_out.values(), strict=True)) + [[mean_shares(layers) for layers in held_out.values()]]
    for i, row in enumerate(rows):
        name = "mean" if i == len(rows) - 1 else str(i)
        lines.append(f"{name:5}  " + "   ".join(f"{'  '.join(f'{share[c]:.3f}' for c in columns):36}" for share in row))
    return "\n".join(lines)


# --------------------------------------------------------------------------------------------------------------- decoding

class Probe(Selector):
    """Attends to everything, and measures what each run would have selected for the same queries."""

    def __init__(self, runs: list[Run], layer: int, top: int) -> None:
        super().__init__(0, 0)
        self.rows = 0  # sequences that count, the first of the batch
        self.selectors = [(run.method.layers[layer], run.budget) for run in runs]
        self.top, self.steps = top, 0  # steps: of all sequences
        self.mass: Tensor | float = 0.0  # [runs, Hkv], summed over steps and sequences; as `recall`
        self.recall: Tensor | float = 0.0

    def forward(self, q: Tensor, k: Tensor, seq_lens: Tensor) -> Tensor:
        position = torch.arange(k.shape[2], device=k.device, dtype=torch.int32)
        length = seq_lens[:, None, None, None]
        logits = (dot_products(q, k) * q.shape[-1] ** -0.5).masked_fill(position >= length, float("-inf"))
        weights = logits.softmax(dim=-1)  # [B, Hkv, G, S]
        first = self.selectors[0][0]
        outside = (position < first.sink) | (position >= length - first.recent)
        best = logits.masked_fill(outside, float("-inf")).topk(min(self.top, k.shape[2]), dim=-1)
        counted = ~best.values.isneginf()
        mass, recall = [], []
        for selector, budget in self.selectors:
            selector.set_budget(budget, k.shape[2])
            indices = selector(q, k, seq_lens).long()
            chosen = torch.zeros(*indices.shape[:2], k.shape[2] + 1, dtype=torch.bool, device=k.device)
            chosen = chosen.scatter(-1, indices.masked_fill(indices < 0, k.shape[2]), True)[..., :-1]
            chosen = chosen.unflatten(1, (k.shape[1], -1)).expand_as(weights)
            mass.append((weights * chosen).sum(dim=-1)[:self.rows].mean(dim=2).sum(dim=0))
            hits = (chosen.gather(-1, best.indices) & counted).sum(dim=-1) / counted.sum(dim=-1).clamp(min=1)
            recall.append(hits[:self.rows].mean(dim=2).sum(dim=0))
        self.mass, self.recall = self.mass + torch.stack(mass), self.recall + torch.stack(recall)
        self.steps += self.rows
        return position.expand(*k.shape[:2], -1).masked_fill(position >= seq_lens[:, None, None], -1)


def recall(config: EvalConfig, data: list[Path], last: int, top: int, plot: Path | None = None) -> Iterator[dict]:
    """One row per method and budget: attention recall and recall of the `top` tokens, by layer and KV head.

    data: text files, of each of which the last `last` of config.context tokens are decoded. plot: a PNG to write.
    """
    evaluator = DecodeEvaluator(config, len(data), {"all": named_texts(data)})
    runs = evaluator.runs[1:]
    if not runs:
        raise UserError("recall needs a --selector besides dense")
    probes = [Probe(runs, layer, top) for layer in range(len(evaluator.attentions))]
    probing = Run(Method("probe", probes), 1, config.context,  # not captured: the sums grow step by step
                  Decoder(evaluator.model, evaluator.batch, Sampling(temperature=0), compiled=False))
    start = config.context - last - 1
    for texts in tqdm(list(evaluator.batches([ids for *_, ids in evaluator.given])), desc="texts", unit="batch", leave=False):
        for probe in probes:
            probe.rows = len(texts)
        evaluator.read([ids[:start] for ids in texts])
        evaluator.score(probing, texts, [start] * len(texts), 1)
    mass, of_top = (torch.stack([getattr(probe, name) / probe.steps for probe in probes], dim=1).cpu()
                    for name in ("mass", "recall"))  # [runs, layers, Hkv]
    for run, share, recalled in zip(runs, mass, of_top, strict=True):
        print(f"{run} budget {run.budget:5}  mass {share.mean():.4f} (least {share.min():.4f})  recall of the top "
              f"{top}: {recalled.mean():.4f} (least {recalled.min():.4f})", flush=True)
        yield {**evaluator.row(run), "last": last, "top": top, "mass": share.mean().item(),
               "recall": recalled.mean().item(), "mass_by_head": share.tolist(), "recall_by_head": recalled.tolist()}
    if plot is not None:
        maps = [(f"{run.method.label}\n1/{run.ratio}: {share.mean():.3f}", share)
                for run, share in zip(runs, mass, strict=True)]
        heat_maps(plot, maps, ("KV head", range(mass.shape[2])), ("layer", range(mass.shape[1])), "attention recall", 0.5)
