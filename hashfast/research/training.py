"""Training one layer's signatures: capture its queries and keys, fit its encoder to its attention. recipes.py has the losses.

Symbols: T sequence length, n query positions of one step, Hq query heads, Hkv key/value heads, D head_dim, d model width.
"""
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from hashfast.common import UserError
from hashfast.hash_attention import HashEncoder
from hashfast.model import Transformer
from hashfast.research.data import Sequence
from hashfast.research.recipes import RECIPES
from hashfast.runtime.signatures import round_weights

POSITIONS = 48  # query positions of one training step


@dataclass(frozen=True)
class TrainConfig:
    """recipe: a name in RECIPES. steps: of each layer. sink, recent: first and last tokens that are always attended to."""
    recipe: str = "listwise"
    steps: int = 300
    sink: int = 64
    recent: int = 128
    seed: int = 0


def check_model(model: Transformer, context: int, layers: list[int] | None) -> None:
    """A UserError where the model cannot read `context` tokens or has not these layers."""
    longest = min(model.args.max_position or context, model.args.sliding_window or context)
    if context > longest:
        raise UserError(f"--context {context} is over the model's {longest}; give at most that")
    for layer in layers or []:
        if not 0 <= layer < model.args.n_layer:
            raise UserError(f"--layers {layer} is not a layer of this model; give 0 to {model.args.n_layer - 1}")


# --------------------------------------------------------------------------------------------------------------- capture

@torch.no_grad()
def capture(model: Transformer, sequences: list[Sequence]) -> Iterator[tuple[list[Tensor], list[Tensor], list[Tensor]]]:
    """Queries [Hq, T, D], keys and values [Hkv, T, D] of every sequence, after RoPE, one layer after the other.

    On the device at a time: 2 T (d + (Hq + 2 Hkv) D) bytes of bfloat16 per sequence (20 of 32K: 4.7 GB where d = Hq D = 1536
    and Hkv = 2, 13.4 GB where it is 4096 and Hkv = 8), beside the weights and what one layer's pass over one sequence needs.
    """
    device = model.output.weight.device
    hidden = [model.tok_embeddings(sequence.ids.to(device)) for sequence in sequences]
    for block in model.layers:
        queries, keys, values = [], [], []
        for i, x in enumerate(hidden):
            cos, sin = model.rope(torch.arange(x.shape[1], device=device)[None])
            hidden[i], q, k, v = block.prompt(x, cos, sin)
            queries.append(q[0].transpose(0, 1).contiguous())
            keys.append(k[0].contiguous())
            values.append(v[0].contiguous())
        yield queries, keys, values


def attention_weights(q: Tensor, k: Tensor, positions: Tensor) -> Tensor:
    """Causal attention weights. q [Hq, n, D], k [Hkv, T, D], positions int64 [n] of the queries -> float32 [Hq, n, T]."""
    grouped = q.float().unflatten(0, (len(k), -1)).flatten(1, 2)  # [Hkv, G * n, D]
    # scaled afterwards: products of bfloat16 are exact in TF32, scaled queries would not be
    logits = (grouped @ k.float().transpose(1, 2)).mul_(q.shape[-1] ** -0.5).unflatten(1, (-1, len(positions)))
    hidden = torch.arange(k.shape[1], device=k.device) > positions[:, None]
    return logits.masked_fill_(hidden, float("-inf")).softmax(dim=-1).flatten(0, 1)


def selectable_region(positions: Tensor, length: int, sink: int, recent: int) -> Tensor:
    """The tokens that a query chooses among: neither sink nor recent. positions int64 [n] -> bool [n, length]."""
    token = torch.arange(length, device=positions.device)
    return (token >= sink) & (token <= positions[:, None] - recent)


# ----------------------------------------------------------------------------------------------------------------- train

@dataclass(frozen=True)
class Standard:
    """Mean and standard deviation per head and channel, [H, 1, D] each."""
    mean: Tensor
    std: Tensor

    @staticmethod
    def of(heads: list[Tensor]) -> "Standard":
        """Over all positions of all sequences [H, T, D], one sequence in float32 at a time."""
        count = sum(x.shape[1] for x in heads)
        mean = sum(x.float().sum(dim=1, keepdim=True) for x in heads) / count
        variance = sum((x.float() - mean).square().sum(dim=1, keepdim=True) for x in heads) / count
        return Standard(mean, variance.sqrt().clamp(min=1e-6))

    def __call__(self, x: Tensor) -> Tensor:
        return (x.float() - self.mean) / self.std

    def fold(self, layer: nn.Module) -> None:
        """Fold the standardisation into a first layer trained on standardised inputs, so that it takes raw ones.

        The weights are rounded to float16, as stored, before the bias is computed from them: where a channel's mean is many
        standard deviations, the bias would otherwise carry the rounding error times the mean.
        """
        repeat = len(layer.weight) // len(self.mean)
        mean, std = self.mean.repeat_interleave(repeat, dim=0), self.std.repeat_interleave(repeat, dim=0)
        layer.weight.div_(std.transpose(1, 2))
        round_weights(layer)
        layer.bias.sub_((mean @ layer.weight).squeeze(1))


def draw_positions(lengths: list[int], questions: list[int], steps: int, first: int, seed: int) -> tuple[list[int], Tensor]:
    """The sequence of each step and its query positions, int64 [steps, POSITIONS], from `first` on.

    Where a sequence ends with a question, half of the positions are in it. Drawn all at once: no step syncs with the device.
    """
    choose = torch.Generator().manual_seed(seed)
    sequences, positions = [], torch.empty(steps, POSITIONS, dtype=torch.int64)
    for row in positions:
        s = int(torch.randint(len(lengths), (), generator=choose))
        row[:] = torch.randint(first, lengths[s], (POSITIONS,), generator=choose)
        if questions[s]:
            row[::2] = torch.randint(max(first, lengths[s] - questions[s]), lengths[s], (POSITIONS // 2,), generator=choose)
        sequences.append(s)
    return sequences, positions


def train_layer(encoder: HashEncoder, queries: list[Tensor], keys: list[Tensor], questions: list[int],
                config: TrainConfig) -> tuple[HashEncoder, list[float]]:
    """Train one layer's encoder in place. Per sequence: queries [Hq, T, D], keys [Hkv, T, D], `Sequence.question`.

    -> the encoder, and the loss of each step.
    """
    recipe = RECIPES[config.recipe]
    training = recipe(encoder)
    optimizer = training.optimizer()
    schedule = training.schedule(optimizer, config.steps)
    of_query, of_key = Standard.of(queries), Standard.of(keys)
    inputs = [of_key(k) for k in keys] if recipe.standardise else keys
    # a query before sink + recent + 64 has too few tokens to choose among
    first = config.sink + config.recent + 64
    chosen, drawn = draw_positions([k.shape[1] for k in keys], questions, config.steps, first, config.seed)
    losses = []
    for step, (s, positions) in enumerate(zip(chosen, drawn.to(keys[0].device), strict=True)):
        q = queries[s][:, positions]
        weights = attention_weights(q, keys[s], positions)
        selectable = selectable_region(positions, keys[s].shape[1], config.sink, config.recent)
        q = of_query(q) if recipe.standardise else q.float()
        loss = training(q, inputs[s].float(), weights, selectable, step / config.steps)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
        losses.append(loss.detach())
    encoder = training.finish()
    if recipe.standardise:
        of_query.fold(encoder.query[0])
        of_key.fold(encoder.key[0])
    return encoder, torch.stack(losses).tolist()
