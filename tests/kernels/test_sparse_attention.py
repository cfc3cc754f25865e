"""Attention over selected rows against the reference, beside rows of NaN.

The kernel always runs before the reference, so that memory the reference left behind cannot pass for its result.
"""
import itertools
from functools import partial

import pytest
import torch

pytest.importorskip("triton")

from conftest import DEVICE, GPU, gpu_only  # noqa: E402
from kernel_inputs import DTYPES, RUNS, assert_attention, normal, random_indices, strided_cache  # noqa: E402

from hashfast import hash_attention as reference  # noqa: E402
from hashfast.kernels import sparse_attention as kernels  # noqa: E402
from hashfast.kernels import sparse_attention_ptx  # noqa: E402

pytestmark = pytest.mark.usefixtures("seeded")


def poison_unselected(cache: torch.Tensor, indices: torch.Tensor) -> None:
    """NaN in every row of the cache [B, Hkv, S, D] that no signature head of its KV head selects."""
    B, Hkv, S, _ = cache.shape
    selected = torch.zeros(B, indices.shape[1], S + 1, dtype=torch.bool, device=DEVICE)
    selected.scatter_(2, torch.where(indices < 0, S, indices).long(), True)
    cache.masked_fill_(~selected[..., :S].unflatten(1, (Hkv, -1)).any(dim=2)[..., None], float("nan"))


def check_sparse(q, k_cache, v_cache, indices, scale=0.125, attend=kernels.sparse_attention):
    got = attend(q, k_cache, v_cache, indices, scale)
    expected = reference.sparse_attention_reference(q.float(), k_cache.float(), v_cache.float(), indices, scale)
    assert_attention(got, expected, q.dtype)
    return got


SHAPES = [(1, 64), (3, 96), (7, 128), (16, 64)]  # G, D
SPARSE = list(itertools.product(DTYPES, ["kv", "query"], [*SHAPES, (2, 256)])) if GPU else [
    *((torch.float32, "kv", shape) for shape in SHAPES), (torch.float32, "query", (3, 96)), (torch.float16, "kv", (7, 128)),
    (torch.float32, "kv", (2, 256))]


@pytest.mark.parametrize(("dtype", "share", "shape"), SPARSE)
def test_sparse(dtype, share, shape, path):
    (G, D), B, Hkv, S, K = shape, 3, 2, 211, 150
    Hs = Hkv if share == "kv" else Hkv * G
    indices = random_indices(B, Hs, K, S)
    indices[0, 0] = -1
    indices[1, -1, 1:] = -1
    indices[2, 0, 20:] = -1  # whole tiles
    k_cache, v_cache = strided_cache(B, Hkv, S, D, dtype), strided_cache(B, Hkv, S, D, dtype)
    for cache in (k_cache, v_cache):
        poison_unselected(cache, indices)
    check_sparse(normal(B, Hkv * G, 2, D, dtype=dtype)[:, :, 1], k_cache, v_cache, indices)


@pytest.mark.parametrize("n_splits", [1, 3, 40])
def test_splits_of_tiles(n_splits):
    """One split, several tiles a split, more splits than tiles; a second run gives the same."""
    q, k_cache, v_cache = normal(1, 3, 64), normal(1, 1, 400, 64), normal(1, 1, 400, 64)
    indices = random_indices(1, 1, 250, 400)
    attend = partial(kernels.launch_tiles, block_k=32, n_splits=n_splits, num_warps=4, num_stages=2)
    runs = [check_sparse(q, k_cache, v_cache, indices, 0.3, attend) for _ in range(RUNS)]
    assert all(map(torch.equal, runs[0], runs[-1]))


@gpu_only
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize(("G", "D"), [(1, 128), (3, 64), (8, 128)])
@pytest.mark.parametrize("n_splits", [1, 3, 40])
def test_in_registers(n_splits, G, D, dtype):
    """As above, of the kernel for 16-bit caches, with unused slots first, last and through whole splits; next to NaN."""
    q, k_cache, v_cache = (normal(3, heads, 400, D, dtype=dtype) for heads in (2 * G, 2, 2))
    indices = random_indices(3, 2, 250, 400)
    indices[0, 0] = -1
    indices[0, 1, :40] = -1
    indices[1, 0, 30:] = -1
    for cache in (k_cache, v_cache):
        poison_unselected(cache, indices)
    attend = partial(sparse_attention_ptx.launch_registers, n_splits=n_splits)
    first, second = (check_sparse(q[:, :, 7], k_cache, v_cache, indices, 0.3, attend) for _ in range(2))
    assert all(map(torch.equal, first, second))


def test_rows_at_odd_places(path):
    """Rows that do not begin at multiples of 16 bytes cannot be loaded in chunks of 16."""
    q, k_cache, v_cache = (normal(2, heads, 300, 65, dtype=torch.float16)[..., 1:] for heads in (6, 2, 2))
    check_sparse(q[:, :, 0], k_cache, v_cache, random_indices(2, 2, 90, 300))


def test_which_rows_are_aligned():
    even = normal(2, 3, 8, 72, dtype=torch.float16)
    assert sparse_attention_ptx.aligned(even, even[..., 8:], strided_cache(2, 3, 8, 64, torch.float16))
    assert not sparse_attention_ptx.aligned(even, even[..., 1:])
    assert not sparse_attention_ptx.aligned(normal(2, 3, 8, 65, dtype=torch.float16))


@pytest.mark.parametrize("dtype", DTYPES)
def test_large_scores(dtype, path):
    """Scores whose exponentials leave float32."""
    q, k_cache = (normal(1, heads, size, 64, dtype=dtype) * 30 for heads, size in ((4, 1), (2, 100)))
    q, v_cache = q[:, :, 0], normal(1, 2, 100, 64, dtype=dtype)
    check_sparse(q, k_cache, v_cache, random_indices(1, 2, 90, 100))
