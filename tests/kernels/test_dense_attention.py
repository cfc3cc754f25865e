"""Dense attention, that of prompt chunks, and merging, against their references; beside rows of NaN.

The kernel always runs before the reference, so that memory the reference left behind cannot pass for its result.
"""
import itertools

import pytest
import torch

pytest.importorskip("triton")

from conftest import DEVICE, GPU, gpu_only  # noqa: E402
from kernel_inputs import DTYPES, RUNS, assert_attention, lengths, normal, shared_memory, strided_cache  # noqa: E402

from hashfast import hash_attention as reference  # noqa: E402
from hashfast.kernels import dense_attention as kernels  # noqa: E402
from hashfast.ops.prompt_attention import merge_reference  # noqa: E402

pytestmark = pytest.mark.usefixtures("seeded")


def check_dense(q, k_cache, v_cache, seq_lens, scale=0.125, **launch):
    for b, length in enumerate(seq_lens.tolist()):
        k_cache[b, :, length:] = float("nan")
        v_cache[b, :, length:] = float("nan")
    if launch:
        got = kernels.launch_dense(q, k_cache, v_cache, seq_lens, scale, num_warps=4, num_stages=2, **launch)
    else:
        got = kernels.dense_attention(q, k_cache, v_cache, seq_lens, scale)
    expected = reference.dense_attention_reference(q.float(), k_cache.float(), v_cache.float(), seq_lens, scale)
    assert_attention(got, expected, q.dtype)
    return got


SHAPES = [(1, 64), (3, 96), (7, 128), (16, 64)]  # G, D
DENSE = [*itertools.product(DTYPES, [1, 5, 40], SHAPES), *itertools.product(DTYPES, [1, 40], [(4, 256)])] if GPU else [
    *((torch.float32, 1, shape) for shape in SHAPES), (torch.float32, 11, (7, 64)), (torch.float16, 1, (7, 128)),
    (torch.float16, 5, (3, 96)), (torch.float16, 5, (1, 256))]


@pytest.mark.parametrize(("dtype", "T", "shape"), DENSE)
def test_dense(dtype, T, shape):
    (G, D), B, Hkv, S = shape, 3, 2 if GPU else 1, 211 if GPU else 107
    k_cache, v_cache = strided_cache(B, Hkv, S, D, dtype), strided_cache(B, Hkv, S, D, dtype)
    check_dense(normal(B, T, Hkv * G, D, dtype=dtype), k_cache, v_cache, lengths(T, 70, S))


@pytest.mark.parametrize(("T", "n_splits"), [(1, 1), (1, 4), (1, 12), (11, 1), (11, 3)])
def test_splits(T, n_splits):
    """One split, several tiles a split, more splits than tiles; a second run gives the same."""
    q, k_cache, v_cache = normal(2, T, 3, 2, 64)[..., 0, :], normal(2, 1, 300, 64), normal(2, 1, 300, 64)
    launch = {"block_m": 16, "block_n": 32, "n_splits": n_splits}
    runs = [check_dense(q, k_cache, v_cache, lengths(300, 37), 0.3, **launch) for _ in range(RUNS)]
    assert all(map(torch.equal, runs[0], runs[-1]))


def test_queries_before_the_sequence():
    """Fewer tokens than queries: the first queries see nothing."""
    check_dense(normal(2, 5, 4, 64), normal(2, 2, 50, 64), normal(2, 2, 50, 64), lengths(2, 30))


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize(("T", "N", "D"), [(40, 40, 64), (9, 130, 96), (64, 64, 128), (20, 33, 256)])
def test_chunk_attention(T: int, N: int, D: int, causal: bool) -> None:
    q, (k, v) = normal(1, T, 6, D), (normal(2, 2, N + 9, D)[1:, :, :N] for _ in "kv")
    out, lse = kernels.chunk_attention(q, k, v, causal)
    scores = (q.transpose(1, 2) @ k.repeat_interleave(3, dim=1).transpose(-1, -2)) * D ** -0.5  # [1, Hq, T, N]
    if causal:
        scores = scores.masked_fill(torch.ones(T, N, dtype=torch.bool, device=DEVICE).triu(N - T + 1), float("-inf"))
    expected = (scores.softmax(-1) @ v.repeat_interleave(3, dim=1)).transpose(1, 2)
    torch.testing.assert_close(out, expected, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(lse, scores.logsumexp(-1).transpose(1, 2), rtol=1e-5, atol=1e-5)


@gpu_only
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("D", [128, 256])
def test_shared_memory_of_chunks(monkeypatch, D, dtype):
    """Within the 99 KB that every GPU from Ampere on has, where wider tiles gain nothing."""
    q, k, v = normal(1, 512, 8, D, dtype=dtype), normal(1, 2, 512, D, dtype=dtype), normal(1, 2, 512, D, dtype=dtype)
    ((_, shared),) = shared_memory(monkeypatch, lambda: kernels.chunk_attention(q, k, v, True))
    assert shared <= (2 ** 17 if D == 128 and dtype != torch.float32 else 99 * 1024)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize(("T", "D"), [(1, 64), (45, 96), (33, 8)])
def test_merge(T: int, D: int, dtype: torch.dtype) -> None:
    """The kernel against the reference, on strided inputs and weights next to 0 and 1."""
    tensors = [torch.randn(1, T, 3, D, device=DEVICE).to(dtype).transpose(1, 2), 9 * torch.randn(1, 3, T, device=DEVICE),
               torch.randn(1, 3, T, D, device=DEVICE).to(dtype), 9 * torch.randn(1, 3, T + 2, device=DEVICE)[..., :T]]
    expected = [x.clone() for x in tensors]
    kernels.merge(*tensors)
    merge_reference(*expected)
    tolerance = 1e-6 if dtype == torch.float32 else 1e-3
    torch.testing.assert_close(tensors[0], expected[0], rtol=tolerance, atol=tolerance)
    torch.testing.assert_close(tensors[1], expected[1])
    assert all(map(torch.equal, tensors[2:], expected[2:]))
