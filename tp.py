"""Tensor parallelism: each of N processes holds 1/N of every layer, its heads' caches, and its share of the vocabulary.

    torchrun --nproc_per_node 2 generate.py --checkpoint_path ... --prompt "Once upon a time" --compile

As in Megatron-LM (arXiv 1909.08053), wqkv and w13 are divided by rows of their weights: a rank has n_head / N query heads, the
n_kv_head / N key/value heads that these read, and intermediate_size / N channels. wo and w2 are divided by columns, with an
all-reduce after each. Signatures, selection and attention never leave the rank. model.py is built at a rank's size
(`shard_args`), each rank reads its own part of the checkpoint (`read_part`), and `parallelize` adds the collectives, which
torch.compile traces and the CUDA graph captures. Hidden state and logits are the same in every rank to the last bit.

NCCL between GPUs, gloo between CPUs. Without torchrun nothing here does anything. Symbols as in model.py; N ranks.
"""
import contextlib
import datetime
import io
import os
import sys
import traceback
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from safetensors import safe_open
from torch import Tensor, nn

from common import UserError, run_command
from hash_attention import HashEncoder
from linear import linear
from model import ModelArgs, SparseSettings, Transformer

_group: str | None = None  # name of the process group; None in a process of its own
_one_shot_buffer: Tensor | None = None


# ----------------------------------------------------------------------------------------------------------------- ranks

def rank() -> int:
    return dist.get_rank() if _group is not None else 0


def size() -> int:
    """N, the number of ranks."""
    return dist.get_world_size() if _group is not None else 1


def run_ranks(main: Callable[[], None]) -> None:
    """`run_command(main)`, in one process or in each of those that torchrun started.

    Only rank 0 is heard. A rank that fails leaves at once, since shutting the group down would wait for the others, and
    torchrun then ends those; where rank 0 fails as well, as with a mistake in the command, its message is the only one.
    """
    if not dist.is_torchelastic_launched() or os.environ["WORLD_SIZE"] == "1":
        run_command(main)
        return
    store = join()
    stderr = sys.stderr
    if rank() > 0:
        sys.stdout, sys.stderr = open(os.devnull, "w"), io.TextIOWrapper(io.BytesIO())
    code = 0
    try:
        run_command(main)
    except SystemExit as stop:
        code = stop.code or 0
    except BaseException:
        traceback.print_exc()
        code = 1
    with contextlib.suppress(OSError):  # nobody reads any more
        sys.stdout.flush()
        sys.stderr.flush()
    if code == 0:
        if torch.cuda.is_initialized():
            torch.cuda.synchronize()
        least(0)  # no rank leaves while another may still read from its GPU
    elif rank() == 0:
        store.set("failed", "")
    else:
        try:
            store.wait(["failed"], datetime.timedelta(seconds=3))
        except RuntimeError:  # rank 0 is well, or waits for this rank
            stderr.write(f"rank {rank()} failed\n{sys.stderr.buffer.getvalue().decode()}")
            stderr.flush()
    os._exit(code)  # NCCL's own shutdown would wait for the CUDA graphs that hold its kernels


def join() -> dist.Store:
    """Meet the other processes that torchrun started; this process's GPU becomes the current one -> what they can share."""
    global _group
    local = int(os.environ["LOCAL_RANK"])
    backend = "gloo"
    if torch.cuda.is_available():
        backend = "cpu:gloo,cuda:nccl"
        if local < torch.cuda.device_count():  # otherwise `check_device` says so, if a GPU is wanted at all
            torch.cuda.set_device(local)
    store, this, count = next(dist.rendezvous("env://"))
    # torchrun ends what waits for a rank that has failed; rank 0 may wait for a person's next question
    dist.init_process_group(backend, store=store, rank=this, world_size=count, timeout=datetime.timedelta(days=1))
    _group = dist.group.WORLD.group_name
    return store


def check_device(device: str) -> None:
    """UserError where `device` cannot be given to every rank of this machine."""
    if size() == 1 or device == "cpu":
        return
    here = int(os.environ["LOCAL_WORLD_SIZE"])
    if device != "cuda":
        raise UserError(f"--device {device} is one GPU and there are {size()} ranks; give cuda, and each takes its own")
    if here > torch.cuda.device_count():
        raise UserError(f"{here} ranks want a GPU each and {torch.cuda.device_count()} are visible; "
                        "start fewer (torchrun --nproc_per_node)")


def least(value: int) -> int:
    """The smallest of the ranks' values."""
    if _group is None:
        return value
    values = torch.tensor(value)
    dist.all_reduce(values, dist.ReduceOp.MIN)
    return int(values)


def on_first(function: Callable[[], Any]) -> Any:
    """What `function` returns in rank 0, where alone it runs."""
    result = [function() if rank() == 0 else None]
    if _group is not None:
        dist.broadcast_object_list(result, device=torch.device("cpu"))
    return result[0]


# ----------------------------------------------------------------------------------------------------------- collectives

def all_reduce(x: Tensor) -> Tensor:
    """The sum of the ranks' x, in each of them the same to the last bit."""
    if _one_shot_buffer is not None and x.numel() <= _one_shot_buffer.numel() and x.dtype == _one_shot_buffer.dtype:
        return one_shot_all_reduce(x)
    ops = torch.ops._c10d_functional  # Dynamo and Inductor know these
    return ops.wait_tensor(ops.all_reduce(x, "sum", _group))


def all_gather(x: Tensor) -> Tensor:
    """x [B, ...] of every rank -> [N, B, ...]."""
    ops = torch.ops._c10d_functional
    return ops.wait_tensor(ops.all_gather_into_tensor(x, size(), _group)).unflatten(0, (size(), -1))


def from_first(x: Tensor) -> Tensor:
    """Rank 0's x. Drawn tokens need it: kernels that were tuned rank by rank may round a probability differently."""
    if _group is None:
        return x
    ops = torch.ops._c10d_functional
    return ops.wait_tensor(ops.broadcast(x, 0, _group))


def use_one_shot(elements: int, dtype: torch.dtype) -> None:
    """Let all-reduces of up to `elements` of `dtype` be one kernel that reads the other GPUs' memory, instead of NCCL's.

    Only where all ranks are on GPUs of this machine that reach each other's memory. Multicast is not used. Call it before
    capturing. The small sums of a decode step gain by it: a step on two GPUs took 0.3 to 0.6 ms less.
    """
    global _one_shot_buffer
    here, this = int(os.environ["LOCAL_WORLD_SIZE"]), torch.cuda.current_device()
    peers = all(torch.cuda.can_device_access_peer(this, other) for other in range(here) if other != this)
    if not least(peers and here == size()):
        return
    import torch.distributed._symmetric_memory as symmetric_memory
    _one_shot_buffer = symmetric_memory.empty(elements, dtype=dtype, device=torch.device("cuda", this))
    symmetric_memory.rendezvous(_one_shot_buffer, _group)


# An operator of our own, because Inductor would move the buffer of torch's into memory that it allocates itself.
@torch.library.custom_op("hashfast::one_shot_all_reduce", mutates_args=())
def one_shot_all_reduce(x: Tensor) -> Tensor:
    """Copy x to where the others see it, wait for them, add up rank by rank, wait until all have read: one kernel."""
    buffer = _one_shot_buffer[:x.numel()].view(x.shape)
    return torch.ops.symm_mem.one_shot_all_reduce_copy(buffer, x.contiguous(), "sum", _group)


@one_shot_all_reduce.register_fake
def _(x: Tensor) -> Tensor:
    return x.new_empty(x.shape)


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
        layer.attention.wo = RowParallel(layer.attention.wo)
        layer.feed_forward.w2 = RowParallel(layer.feed_forward.w2)
    model.tok_embeddings = ShardedEmbedding(model.tok_embeddings.weight, rank() * args.vocab_rows)
    model.output = ShardedOutput(model.output, args.vocab_size)
    return model


def shard_encoders(encoders: list[HashEncoder]) -> list[HashEncoder]:
    """The encoders of this rank's heads, of one per layer for the whole model."""
    return [shard_encoder(encoder, rank(), size()) for encoder in encoders] if size() > 1 else encoders


def shard_settings(settings: SparseSettings) -> SparseSettings:
    """Settings with the budgets of this rank's heads, of those of the whole model."""
    heads = len(settings.budgets[0]) // size()
    return replace(settings, budgets=tuple(row[rank() * heads:(rank() + 1) * heads] for row in settings.budgets))


def shard_encoder(encoder: HashEncoder, rank: int, ranks: int) -> HashEncoder:
    """The encoder of one rank's heads: a contiguous part of all its tensors, whose first dimension is heads."""
    query = encoder.query[0].weight  # [Hq, D, b]
    part = HashEncoder(encoder.config, query.shape[0] // ranks, encoder.n_signature_head // ranks, query.shape[1])
    part.load_state_dict({name: tensor.chunk(ranks)[rank] for name, tensor in encoder.state_dict().items()})
    return part
