"""What every kernel launch shares: how rows are split, programmatic dependent launch, checks of strides."""
import torch
import triton
import triton.language as tl
from torch import Tensor

# ------------------------------------------------------------------------------------------------------ launch parameters

# Chosen by measurement on an H100 and an H200 (132 multiprocessors); a GPU with fewer fills up as well.

def splits_per_row(programs: int, rows: int, tiles: int) -> int:
    """Programs per row: as many as keep all rows together within `programs`, but one at least and no more than tiles."""
    return max(1, min(tiles, programs // rows))


def balanced_splits(pieces: int, target: int) -> int:
    """Programs, about `target` of them, that get equally many of the pieces, but for the last one.

    That can be half as many again as `target`, which does not suit programs of which few fit a GPU: dense attention took 1.4
    times as long with nine splits a row, the last of them nearly empty, as with eight.
    """
    return triton.cdiv(pieces, max(1, round(pieces / max(target, 1))))


INTERPRETED = tl.constexpr(triton.knobs.runtime.interpret)
DEPENDENT_LAUNCH = not triton.knobs.runtime.interpret and torch.cuda.get_device_capability() >= (9, 0)
_WAITS = tl.constexpr(DEPENDENT_LAUNCH)


@triton.jit
def pdl_wait():
    """Wait until the kernel before this one has finished, then let the next one be launched.

    Before any store, and before any load but of what that kernel leaves alone: weights, or what an earlier one has written.
    """
    if _WAITS:
        tl.extra.cuda.gdc_wait()
        tl.extra.cuda.gdc_launch_dependents()


def checked_rows(x: Tensor) -> Tensor:
    if x.stride(-1) != 1 and x.shape[-1] != 1:
        raise ValueError(f"the last dimension must be contiguous, but the strides are {x.stride()}")
    return x
