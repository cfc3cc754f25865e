"""Tensor parallelism: each of N processes holds 1/N of every layer, its heads' caches, and its share of the vocabulary.

    torchrun --nproc_per_node 2 generate.py --checkpoint_path ... --prompt "Once upon a time" --compile

As in Megatron-LM (arXiv 1909.08053), wqkv and w13 are divided by rows of their weights: a rank has n_head / N query heads, the
n_kv_head / N key/value heads that these read, and intermediate_size / N channels. wo and w2 are divided by columns, with an
all-reduce after each. Signatures, selection and attention never leave the rank. model.py is built at a rank's size
(`shard_args`), each rank reads its own part of the checkpoint (`read_part`), and `parallelize` adds the collectives, which
torch.compile traces and the CUDA graph captures. Hidden state and logits are the same in every rank to the last bit.

NCCL between GPUs, gloo between CPUs. Without torchrun nothing here does anything. Symbols as in model.py; N ranks.
"""
from dataclasses import replace

import torch.nn.functional as F
from safetensors import safe_open
from torch import Tensor, nn

from hashfast.common import UserError
from hashfast.hash_attention import HashEncoder
from hashfast.model import ModelArgs, SparseSettings, Transformer
from hashfast.ops.linear import linear
from hashfast.runtime.distributed import all_gather, all_reduce, rank, world_size

# ----------------------------------------------------------------------------------------------------------------- model

class RowParallel(nn.Module):
    """A linear layer whose inputs are divided among the ranks: x [..., in / N] -> [..., out], the sum over the ranks."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, x: Tensor) -> Tensor:
        return all_reduce(linear(x, self.layer))


class ShardedEmbedding(nn.Module):
    """Rows first .. first + R of the embedding table: weight [R, d]; a token outside them adds nothing to the sum."""

    def __init__(self, weight: nn.Parameter, first: int) -> None:
        super().__init__()
        self.weight, self.first = weight, first

    def forward(self, tokens: Tensor) -> Tensor:
        rows = self.weight.shape[0]
        here = tokens - self.first
        outside = (here < 0) | (here >= rows)
        return all_reduce(F.embedding(here.clamp(0, rows - 1), self.weight).masked_fill(outside[..., None], 0))


class ShardedOutput(nn.Module):
    """Logits of a rank's R tokens, gathered: x [B, T, d] -> [B, T, vocab]. The last rank's rows may go past the vocabulary."""

    def __init__(self, layer: nn.Module, vocab_size: int) -> None:
        super().__init__()
        self.layer, self.vocab_size = layer, vocab_size

    def forward(self, x: Tensor) -> Tensor:
        logits = all_gather(linear(x, self.layer))  # [N, B, T, R]
        return logits.movedim(0, -2).flatten(-2)[..., :self.vocab_size]


def shard_args(args: ModelArgs, ranks: int) -> ModelArgs:
    """The shape of one rank's part of a model. UserError where heads or channels cannot be shared out evenly."""
    counts = [n for n in range(1, args.n_kv_head + 1) if args.n_kv_head % n == 0 and args.intermediate_size % n == 0]
    if ranks not in counts:
        raise UserError(f"{ranks} ranks cannot share {args.n_kv_head} KV heads and an intermediate size of "
                        f"{args.intermediate_size} evenly; start {' or '.join(map(str, counts))} (torchrun --nproc_per_node)")
    return replace(args, n_head=args.n_head // ranks, n_kv_head=args.n_kv_head // ranks,
                   intermediate_size=args.intermediate_size // ranks, ranks=ranks)


def read_part(tensors: safe_open, name: str, target: Tensor, rank: int) -> None:
    """Copy a rank's part of the checkpoint's tensor `name`, and no more of the file, into `target`.

    The part is along the dimension where `target` is smaller; where the last ranks' parts go past the end, zeros follow.
    """
    source = tensors.get_slice(name)
    shape = source.get_shape()
    dim = next((d for d in range(len(shape)) if target.shape[d] < shape[d]), None)
    if dim is None:
        target.copy_(tensors.get_tensor(name))
        return
    start = min(rank * target.shape[dim], shape[dim])
    stop = min(start + target.shape[dim], shape[dim])
    target.narrow(dim, stop - start, target.shape[dim] - (stop - start)).zero_()
    if stop > start:
        part = source[start:stop] if dim == 0 else source[:, start:stop]
        target.narrow(dim, 0, stop - start).copy_(part)


def parallelize(model: Transformer) -> Transformer:
    """Add the collectives to a model of `shard_args`, in place; one of a single rank stays as it is."""
    args = model.args
    if args.ranks == 1:
        return model
    all_reduce(model.norm.weight)  # NCCL connects and takes its memory now, before the caches are planned and graphs captured
    for layer in model.layers:
        if args.out_bias and rank() > 0:  # the sum over the ranks holds the bias of rank 0
            layer.attention.wo.bias.zero_()
        layer.attention.wo = RowParallel(layer.attention.wo)
        layer.feed_forward.w2 = RowParallel(layer.feed_forward.w2)
    model.tok_embeddings = ShardedEmbedding(model.tok_embeddings.weight, rank() * args.vocab_rows)
    model.output = ShardedOutput(model.output, args.vocab_size)
    return model


def shard_encoders(encoders: list[HashEncoder]) -> list[HashEncoder]:
    """The encoders of this rank's heads, of one per layer for the whole model."""
    return [shard_encoder(encoder, rank(), world_size()) for encoder in encoders] if world_size() > 1 else encoders


def shard_settings(settings: SparseSettings) -> SparseSettings:
    """Settings with the budgets of this rank's heads, of those of the whole model."""
    heads = len(settings.budgets[0]) // world_size()
    return replace(settings, budgets=tuple(row[rank() * heads:(rank() + 1) * heads] for row in settings.budgets))


def shard_encoder(encoder: HashEncoder, rank: int, ranks: int) -> HashEncoder:
    """The encoder of one rank's heads: a contiguous part of all its tensors, whose first dimension is heads."""
    query = encoder.query[0].weight  # [Hq, D, b]
    part = HashEncoder(encoder.config, query.shape[0] // ranks, encoder.n_signature_head // ranks, query.shape[1])
    part.load_state_dict({name: tensor.chunk(ranks)[rank] for name, tensor in encoder.state_dict().items()})
    return part
