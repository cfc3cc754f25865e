"""Attention of a prompt chunk over itself and over what is cached before it, in pieces merged by their log-sum-exps.

The chunk's own part is causal; every cached token is seen by all of the chunk. So each piece is a plain case that the fastest
kernels take, and the pieces have few shapes: a chunk of T tokens sees the prefix in pieces of T * 2^i tokens, so that one
set of kernels serves prompts of every length.

Symbols: T tokens of the chunk, N tokens of a piece, Hq query heads, Hkv key/value heads, D head_dim.
"""
import functools
from collections.abc import Callable, Iterator

import torch
from torch import Tensor

LARGEST_PIECE = 2 ** 16
UNIT = 1024  # chunks of a multiple of this are taken for a shape that comes back
FASTEST = "cudnn"  # of KERNELS, for shapes that come back, by measurement on an H200

Rows = Callable[[int, int], tuple[Tensor, Tensor]]  # (first, last) -> K and V [1, Hkv, last - first, D] of cached tokens


def causal_attention(q: Tensor, k: Tensor, v: Tensor, prefix: Rows | None = None, start: int = 0) -> Tensor:
    """Attention of T tokens over `start` tokens before them and over themselves, causal among them.

    q [1, T, Hq, D], k and v [1, Hkv, T, D] of the T tokens; prefix(first, last) gives K and V of tokens first .. last < start.
    -> [1, T, Hq, D] in q's dtype.
    """
    q = q.transpose(1, 2)
    out, lse = attend(q, k, v, causal=True)
    for first, last in pieces(start, q.shape[2]):
        merge(out, lse, *attend(q, *prefix(first, last), causal=False))
    return out.transpose(1, 2)


def piece_sizes(T: int) -> list[int]:
    """The lengths, ascending, of whole pieces that chunks of T tokens see; none where T is no length that comes back."""
    return [T << i for i in range(LARGEST_PIECE.bit_length()) if T << i <= LARGEST_PIECE] if T % UNIT == 0 else []


def pieces(start: int, T: int) -> Iterator[tuple[int, int]]:
    """Split 0 .. start into ranges of T * 2^i tokens, long ones first, and a rest shorter than T; where no length comes back,
    into ranges of LARGEST_PIECE, which bound what a piece takes."""
    first = 0
    while first < start:
        left = min(start - first, LARGEST_PIECE)
        size = max((size for size in piece_sizes(T) if size <= left), default=left)
        yield first, first + size
        first += size


def merge_reference(out: Tensor, lse: Tensor, part: Tensor, part_lse: Tensor) -> None:
    """Take attention over other tokens into `out` and `lse`, in place. out, part [1, Hq, T, D], lse, part_lse [1, Hq, T]."""
    weight = torch.sigmoid(part_lse - lse)[..., None]
    out.copy_(torch.lerp(out.float(), part.float(), weight))
    lse.copy_(torch.logaddexp(lse, part_lse))


def merge(out: Tensor, lse: Tensor, part: Tensor, part_lse: Tensor) -> None:
    """`merge_reference`, by a Triton kernel where the tensors are on a GPU."""
    if out.is_cuda:
        from hashfast.kernels import dense_attention as attention_kernels
        attention_kernels.merge(out, lse, part, part_lse)
    else:
        merge_reference(out, lse, part, part_lse)


# --------------------------------------------------------------------------------------------------------------- kernels

def attend(q: Tensor, k: Tensor, v: Tensor, causal: bool) -> tuple[Tensor, Tensor]:
    """Attention by the kernel that measured fastest for the shapes. causal: N = T, and query i sees keys 0 .. i.

    q [1, Hq, T, D], k and v [1, Hkv, N, D] -> out [1, Hq, T, D] and lse float32 [1, Hq, T].
    """
    return KERNELS[kernel_for(q, k.shape[2])](q, k, v, causal)


def kernel_for(q: Tensor, N: int) -> str:
    T, D = q.shape[2:]
    if not q.is_cuda:
        return "cpu"
    if q.dtype == torch.float32 or D % 8 > 0 or D > 256:
        return "triton"
    # cuDNN plans every new shape anew (a good part of a second), so it gets those that come back
    returns = T % UNIT == 0 and N % T == 0
    return FASTEST if returns and _is_hopper(q.device) and D <= 128 else "flash"


@functools.cache
def _is_hopper(device: torch.device) -> bool:
    return torch.cuda.get_device_capability(device) >= (9, 0) and torch.backends.cudnn.is_available()


def _cpu(q: Tensor, k: Tensor, v: Tensor, causal: bool) -> tuple[Tensor, Tensor]:
    return torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(q, k, v, 0.0, causal)


def _cudnn(q: Tensor, k: Tensor, v: Tensor, causal: bool) -> tuple[Tensor, Tensor]:
    out, lse = torch.ops.aten._scaled_dot_product_cudnn_attention(q, k, v, None, True, 0.0, causal)[:2]
    return out, lse.reshape(q.shape[:3]).contiguous()  # one number per head lies next to another


def _flash(q: Tensor, k: Tensor, v: Tensor, causal: bool) -> tuple[Tensor, Tensor]:
    return torch.ops.aten._scaled_dot_product_flash_attention(q, k, v, 0.0, causal)[:2]


def _triton(q: Tensor, k: Tensor, v: Tensor, causal: bool) -> tuple[Tensor, Tensor]:
    from hashfast.kernels import dense_attention as attention_kernels
    out, lse = attention_kernels.chunk_attention(q.transpose(1, 2), k, v, causal)
    return out.transpose(1, 2), lse.transpose(1, 2).contiguous()


KERNELS = {"cpu": _cpu, "cudnn": _cudnn, "flash": _flash, "triton": _triton}
