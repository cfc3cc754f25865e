"""The processes that torchrun starts, and their collectives: NCCL between GPUs, gloo between CPUs; one process does without."""
import contextlib
import datetime
import io
import os
import sys
import traceback
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from hashfast.common import UserError, run_command

_group: str | None = None  # name of the process group; None in a process of its own
_one_shot_buffer: Tensor | None = None


def rank() -> int:
    return dist.get_rank() if _group is not None else 0


def world_size() -> int:
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
        all_min(0)  # no rank leaves while another may still read from its GPU
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
    if world_size() == 1 or device == "cpu":
        return
    here = int(os.environ["LOCAL_WORLD_SIZE"])
    if device != "cuda":
        raise UserError(f"--device {device} is one GPU and there are {world_size()} ranks; give cuda, and each takes its own")
    if here > torch.cuda.device_count():
        raise UserError(f"{here} ranks want a GPU each and {torch.cuda.device_count()} are visible; "
                        "start fewer (torchrun --nproc_per_node)")


def all_min(value: int) -> int:
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
    return ops.wait_tensor(ops.all_gather_into_tensor(x, world_size(), _group)).unflatten(0, (world_size(), -1))


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
    if not all_min(peers and here == world_size()):
        return
    import torch.distributed._symmetric_memory as symmetric_memory
    _one_shot_buffer = symmetric_memory.empty(elements, dtype=dtype, device=torch.device("cuda", this))
    symmetric_memory.rendezvous(_one_shot_buffer, _group)


# An operator of our own, because Inductor would move the buffer of torch's into memory that it allocates itself.
@torch.library.custom_op("hashfast::one_shot_all_reduce", mutates_args=())
def one_shot_all_reduce(x: Tensor) -> Tensor:
    """One-shot all-reduce in one kernel: copy x to the symmetric buffer, barrier, sum in rank order, barrier."""
    buffer = _one_shot_buffer[:x.numel()].view(x.shape)
    return torch.ops.symm_mem.one_shot_all_reduce_copy(buffer, x.contiguous(), "sum", _group)


@one_shot_all_reduce.register_fake
def _(x: Tensor) -> Tensor:
    return x.new_empty(x.shape)
