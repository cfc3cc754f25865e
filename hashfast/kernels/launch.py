"""What every kernel launch shares: which path it takes, programmatic dependent launch, how rows are split, checks of strides.

Each kernel of a decode step exists in plain Triton: the portable path. On NVIDIA GPUs from Ampere on some have a faster form
with inline PTX: files *_ptx.py, the bit operations of quant_linear.py, the prefetch of select.py. HASHFAST_PORTABLE=1 turns
these off, for whoever edits a kernel or compares.
Triton's interpreter (TRITON_INTERPRET=1, set before triton is imported) runs the portable path on CPU tensors.

The functions that launch kernels are torch.library custom ops: torch.compile(fullgraph=True) keeps each whole, and a CUDA graph
can capture it, for nothing waits for the device: shapes are static, and lengths are read on the device.
"""
import functools
import os

import torch
import triton
import triton.language as tl
from torch import Tensor

INTERPRETED = tl.constexpr(triton.knobs.runtime.interpret)


@functools.cache
def supports_ptx(device: torch.device) -> bool:
    """Whether the inline PTX of *_ptx.py runs there: sm_80 has its mma of bits and of bfloat16."""
    return device.type == "cuda" and torch.version.hip is None and torch.cuda.get_device_capability(device) >= (8, 0)


@functools.cache
def shared_memory(device: torch.device) -> int:
    """Bytes that a block may have."""
    return torch.cuda.get_device_properties(device).shared_memory_per_block_optin if device.type == "cuda" else 0


def portable(device: torch.device) -> bool:
    """Whether a kernel launched now is the plain Triton one. Read at each launch: one process can run both."""
    return bool(INTERPRETED) or os.environ.get("HASHFAST_PORTABLE", "0") not in ("", "0") or not supports_ptx(device)


# ------------------------------------------------------------------------------------------- programmatic dependent launch

# The kernels of a step are short, so the gaps between them count: on Hopper and later each is launched while the one before
# still runs, loads what does not depend on it, and waits for its results with `pdl_wait`.

@functools.cache
def supports_pdl(device: torch.device) -> bool:
    return not INTERPRETED and supports_ptx(device) and torch.cuda.get_device_capability(device) >= (9, 0)


def pdl_options(device: torch.device) -> dict[str, bool]:
    """Launch arguments of a kernel that calls `pdl_wait(PDL)`."""
    return {"PDL": True, "launch_pdl": True} if supports_pdl(device) else {"PDL": False}


@triton.jit
def pdl_wait(PDL: tl.constexpr):
    """Wait until the kernel before this one has finished, then let the next one be launched.

    Before any store, and before any load but of what that kernel leaves alone: weights, or what an earlier one has written.
    """
    if PDL:
        tl.extra.cuda.gdc_wait()
        tl.extra.cuda.gdc_launch_dependents()


# ------------------------------------------------------------------------------------------------------ launch parameters

# Those of all kernels are tuned on an H100 and an H200 (132 SMs), amid the other kernels of a step.

def splits_per_row(programs: int, rows: int, tiles: int) -> int:
    """Programs per row: as many as keep all rows together within `programs`, but one at least and no more than tiles."""
    return max(1, min(tiles, programs // rows))


def balanced_splits(pieces: int, target: int) -> int:
    """Programs, about `target` of them, that get equally many of the pieces, but for the last one.

    That can be half as many again as `target`, which does not suit programs of which few fit a GPU: dense attention took 1.4
    times as long with nine splits a row, the last of them nearly empty, as with eight.
    """
    return triton.cdiv(pieces, max(1, round(pieces / max(target, 1))))


def checked_rows(x: Tensor) -> Tensor:
    """x, whose last dimension must be contiguous."""
    if x.stride(-1) != 1 and x.shape[-1] != 1:
        raise ValueError(f"the last dimension must be contiguous, but the strides are {x.stride()}")
    return x
