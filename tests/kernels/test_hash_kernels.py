"""Every kernel against its reference: on a GPU where there is one, else in Triton's interpreter on the CPU.

The kernel always runs before the reference, so that memory the reference left behind cannot pass for its result.
"""
import itertools
from functools import partial

import pytest
import torch

pytest.importorskip("triton")

from conftest import DEVICE, GPU, gpu_only  # noqa: E402
from kernel_inputs import lengths, normal, random_planes, random_signatures, shared_memory, strided_cache  # noqa: E402

from hashfast import hash_attention as reference  # noqa: E402
from hashfast import model  # noqa: E402
from hashfast.hash_attention import HashConfig  # noqa: E402
from hashfast.kernels import dense_attention as attention_kernels  # noqa: E402
from hashfast.kernels import encode, select, sparse_attention_ptx, split_kv  # noqa: E402
from hashfast.kernels import sparse_attention as sparse_kernels  # noqa: E402
from hashfast.runtime import signatures  # noqa: E402

pytestmark = pytest.mark.usefixtures("seeded")
# the interpreter multiplies bfloat16 wrongly
DTYPES = [torch.float32, torch.float16, torch.bfloat16] if GPU else [torch.float32, torch.float16]
ROUNDING = {torch.float32: 2e-6, torch.float16: 1e-3, torch.bfloat16: 8e-3}


def assert_close(got: tuple, expected: tuple, dtype: torch.dtype) -> None:
    out, lse = (x.float() for x in got)
    expected_out, expected_lse = expected
    assert got[0].dtype == dtype and got[1].dtype == torch.float32
    assert out.isfinite().all()
    error = (out - expected_out).norm() / expected_out.norm()
    assert error < ROUNDING[dtype], f"out: relative error {error:.2e}"
    seen = expected_lse.isfinite()
    assert torch.equal(lse.isneginf(), ~seen)
    assert (out[~seen] == 0).all()
    # sums are float32 whatever the dtype: only exact products of rounded inputs enter
    torch.testing.assert_close(lse[seen], expected_lse[seen], rtol=2e-6, atol=4e-6)


# ----------------------------------------------------------------------------------------------------------------- encode

def append(qkv, cos, sin, encoder, *rest):
    """`encode.rope_encode_append` with an encoder's tensors."""
    if encoder is None:
        return encode.rope_encode_append(qkv, cos, sin, None, None, None, None, *rest, 0, 0)[0], None
    (key,), (query,) = encoder.key, encoder.query
    q, planes = encode.rope_encode_append(qkv, cos, sin, key.weight, key.bias, query.weight, query.bias, *rest,
                                          encoder.config.query_bits, encoder.config.planes(encoder.group))
    return q, planes if qkv.shape[1] == 1 else None


def angles(seq_lens: torch.Tensor, T: int, D: int) -> tuple[torch.Tensor, torch.Tensor]:
    position = seq_lens[:, None] - T + torch.arange(T, device=DEVICE)
    angle = position[..., None] * torch.logspace(0, -3, D // 2, device=DEVICE)
    return angle.cos(), angle.sin()


def encoder_for(config: HashConfig, Hq: int, Hkv: int, D: int) -> reference.HashEncoder:
    """Random weights; biases keep every code away from 0, where rounding decides the sign."""
    (encoder,) = signatures.random_encoders(config, model.Fingerprint(1, Hq, Hkv, D, 1e4, 1))
    for (layer,) in (encoder.key, encoder.query):
        layer.weight.mul_(0.05)
        layer.bias.copy_(torch.where(torch.rand_like(layer.bias) > 0.5, 1.0, -1.0) * (0.5 + torch.rand_like(layer.bias)))
    return encoder.to(DEVICE)


ENCODERS = [None, HashConfig(), HashConfig(bits=128, query_bits=1), HashConfig(bits=64, query_bits=8), HashConfig(query_bits=2),
            HashConfig(bits=128), HashConfig(share="query"), HashConfig(query_bits=1, share="query")]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("D", [64, 96, 128])
@pytest.mark.parametrize("T", [1, 3])
@pytest.mark.parametrize("config", ENCODERS, ids=str)
def test_rope_encode_append(config, T, D, dtype):
    B, Hq, Hkv, S = 3, 6, 2, 40
    encoder = encoder_for(config, Hq, Hkv, D) if config else None
    caches = [strided_cache(B, Hkv, S, D, dtype), strided_cache(B, Hkv, S, D, dtype),
              random_signatures(B, encoder.n_signature_head, S, config.words) if config else None]
    expected_caches = [None if cache is None else cache.clone() for cache in caches]
    qkv = normal(B, T, (Hq + 2 * Hkv) * D, dtype=dtype)
    seq_lens = lengths(T, 17, S)
    q, planes = append(qkv, *angles(seq_lens, T, D), encoder, *caches, seq_lens)
    expected_q, expected_planes = reference.rope_encode_append_reference(
        qkv, *angles(seq_lens, T, D), encoder, *expected_caches, seq_lens)
    rounding = {"rtol": ROUNDING[dtype], "atol": ROUNDING[dtype]}
    torch.testing.assert_close(q, expected_q, **rounding)
    torch.testing.assert_close(caches[0], expected_caches[0], **rounding)
    assert torch.equal(caches[1], expected_caches[1])
    if config:
        assert torch.equal(caches[2], expected_caches[2])
    assert (planes is None) == (expected_planes is None) == (config is None or T > 1)
    if planes is not None:
        assert torch.equal(planes[:, :, 0], expected_planes[:, :, 0]) or config.share == "kv"
        # a weight next to a half may round either way
        changed = weights_of(planes) - weights_of(expected_planes)
        assert changed.abs().max() <= 1 and (changed != 0).float().mean() < 0.01


def weights_of(planes: torch.Tensor) -> torch.Tensor:
    """int32 [B, Hs, 1 + P, W] -> the signed weights [B, Hs, b] behind them."""
    bits = (planes[..., None] >> torch.arange(32, device=DEVICE)) & 1
    sign, *magnitude = bits.flatten(3).unbind(dim=2)
    return sum(plane << p for p, plane in enumerate(magnitude)) * (2 * sign - 1)


def test_encoding_zero_queries():
    encoder = encoder_for(HashConfig(), 4, 2, 64)
    encoder.query[0].bias.zero_()
    caches = normal(1, 2, 8, 64), normal(1, 2, 8, 64), random_signatures(1, 2, 8, 1)
    _, planes = append(torch.zeros(1, 1, 512, device=DEVICE), *angles(lengths(5), 1, 64), encoder, *caches,
                                   lengths(5))
    assert (planes == 0).all()


# ---------------------------------------------------------------------------------------------------------- attend: sparse

def random_indices(B: int, Hs: int, K: int, S: int, unused: float = 0.2) -> torch.Tensor:
    """Distinct positions in any order, some slots unused."""
    order = torch.rand(B, Hs, S, device=DEVICE).argsort(dim=-1)[..., :K].int()
    return torch.where(torch.rand(B, Hs, K, device=DEVICE) < unused, -1, order)


def poison_unselected(cache: torch.Tensor, indices: torch.Tensor) -> None:
    """NaN in every row of the cache [B, Hkv, S, D] that no signature head of its KV head selects."""
    B, Hkv, S, _ = cache.shape
    selected = torch.zeros(B, indices.shape[1], S + 1, dtype=torch.bool, device=DEVICE)
    selected.scatter_(2, torch.where(indices < 0, S, indices).long(), True)
    cache.masked_fill_(~selected[..., :S].unflatten(1, (Hkv, -1)).any(dim=2)[..., None], float("nan"))


def check_sparse(q, k_cache, v_cache, indices, scale=0.125, attend=sparse_kernels.sparse_attention):
    got = attend(q, k_cache, v_cache, indices, scale)
    expected = reference.sparse_attention_reference(q.float(), k_cache.float(), v_cache.float(), indices, scale)
    assert_close(got, expected, q.dtype)
    return got


SHAPES = [(1, 64), (3, 96), (7, 128), (16, 64)]  # G, D
SPARSE = list(itertools.product(DTYPES, ["kv", "query"], SHAPES)) if GPU else [
    *((torch.float32, "kv", shape) for shape in SHAPES), (torch.float32, "query", (3, 96)), (torch.float16, "kv", (7, 128))]


@pytest.mark.parametrize(("dtype", "share", "shape"), SPARSE)
def test_sparse(dtype, share, shape):
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
def test_sparse_splits(n_splits):
    """One split, several tiles a split, more splits than tiles; a second run gives the same."""
    q, k_cache, v_cache = normal(2, 6, 64), normal(2, 2, 400, 64), normal(2, 2, 400, 64)
    indices = random_indices(2, 2, 250, 400)
    attend = partial(sparse_kernels.launch_tiles, block_k=32, n_splits=n_splits, num_warps=4, num_stages=2)
    first, second = (check_sparse(q, k_cache, v_cache, indices, 0.3, attend) for _ in range(2))
    assert all(map(torch.equal, first, second))


@gpu_only
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize(("G", "D"), [(1, 128), (3, 64), (8, 128)])
@pytest.mark.parametrize("n_splits", [1, 3, 40])
def test_sparse_in_registers(n_splits, G, D, dtype):
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


def test_sparse_rows_at_odd_places():
    """Rows that do not begin at multiples of 16 bytes cannot be loaded in chunks of 16."""
    q, k_cache, v_cache = (normal(2, heads, 300, 65, dtype=torch.float16)[..., 1:] for heads in (6, 2, 2))
    check_sparse(q[:, :, 0], k_cache, v_cache, random_indices(2, 2, 90, 300))


def test_which_rows_are_aligned():
    even = normal(2, 3, 8, 72, dtype=torch.float16)
    assert sparse_attention_ptx.aligned(even, even[..., 8:], strided_cache(2, 3, 8, 64, torch.float16))
    assert not sparse_attention_ptx.aligned(even, even[..., 1:])
    assert not sparse_attention_ptx.aligned(normal(2, 3, 8, 65, dtype=torch.float16))


@pytest.mark.parametrize("dtype", DTYPES)
def test_sparse_large_scores(dtype):
    """Scores whose exponentials leave float32."""
    q, k_cache = (normal(1, heads, size, 64, dtype=dtype) * 30 for heads, size in ((4, 1), (2, 100)))
    q, v_cache = q[:, :, 0], normal(1, 2, 100, 64, dtype=dtype)
    check_sparse(q, k_cache, v_cache, random_indices(1, 2, 90, 100))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("rows", "n_splits", "D"),
                         [(3, 2, 64), (5, 20, 80), (2, 200, 128), (3, 150, 96), (5, 7, 256), (4, 3, 12)])
def test_combine(rows, n_splits, D, dtype):
    """Splits of one turn and of several, columns that no chunk divides; splits, turns and a whole row that saw nothing."""
    lse = 5 * normal(rows, n_splits)
    lse[0] = lse[1, :-1] = -torch.inf
    parts = normal(rows, n_splits, D).masked_fill((lse == -torch.inf)[..., None], 0.0)
    guarded = torch.full((rows + 1, D), 7.0, dtype=dtype, device=DEVICE)
    out, out_lse = guarded[:rows], torch.empty_like(lse[:, 0])
    split_kv.combine(parts, lse, out, out_lse, n_splits)
    total = lse.logsumexp(1)
    weights = (lse - total[:, None]).exp().nan_to_num(0.0)
    assert_close((out, out_lse), ((weights[..., None] * parts).sum(1), total), dtype)
    assert (guarded[rows] == 7).all()


@gpu_only
@pytest.mark.parametrize(("B", "budget"), [(1, 2048), (1, 4096), (8, 1024)])
def test_no_shared_memory(monkeypatch, B, budget):
    """From scores to the combined output no kernel takes any: one that does delays those around it by microseconds."""
    k_cache, v_cache = normal(B, 8, 8192, 128, dtype=torch.bfloat16), normal(B, 8, 8192, 128, dtype=torch.bfloat16)
    arguments = random_planes(HashConfig(), B, 8, 4), random_signatures(B, 8, 8192, 1), lengths(*[8000] * B)
    q = normal(B, 32, 128, dtype=torch.bfloat16)

    def attend():
        indices = select.select_tokens(*arguments, budget, None, budget, 64, 128, 0, k_cache, v_cache)
        sparse_kernels.sparse_attention(q, k_cache, v_cache, indices, 0.125)

    assert shared_memory(monkeypatch, attend) == [
        ("_score_kernel", 0), ("_compact_kernel", 0), ("_register_attention_kernel", 0), ("_combine_kernel", 0)]


@gpu_only
@pytest.mark.parametrize("D", [64, 80, 128])
@pytest.mark.parametrize("n_splits", [2, 5, 8, 11, 33, 64, 128])
def test_combine_without_shared_memory(monkeypatch, n_splits, D):
    parts, lse = normal(3, n_splits, D), normal(3, n_splits)
    out = normal(3, D, dtype=torch.bfloat16)
    combine = partial(split_kv.combine, parts, lse, out, lse[:, 0].clone(), n_splits)
    assert shared_memory(monkeypatch, combine) == [("_combine_kernel", 0)]


# ----------------------------------------------------------------------------------------------------------- attend: dense

def check_dense(q, k_cache, v_cache, seq_lens, scale=0.125, **launch):
    for b, length in enumerate(seq_lens.tolist()):
        k_cache[b, :, length:] = float("nan")
        v_cache[b, :, length:] = float("nan")
    if launch:
        got = attention_kernels.launch_dense(q, k_cache, v_cache, seq_lens, scale, num_warps=4, num_stages=2, **launch)
    else:
        got = attention_kernels.dense_attention(q, k_cache, v_cache, seq_lens, scale)
    expected = reference.dense_attention_reference(q.float(), k_cache.float(), v_cache.float(), seq_lens, scale)
    assert_close(got, expected, q.dtype)
    return got


DENSE = list(itertools.product(DTYPES, [1, 5, 40], SHAPES)) if GPU else [
    *((torch.float32, 1, shape) for shape in SHAPES), (torch.float32, 5, (7, 128)), (torch.float32, 40, (3, 96)),
    (torch.float32, 40, (1, 64)), (torch.float16, 1, (7, 128)), (torch.float16, 5, (3, 96))]


@pytest.mark.parametrize(("dtype", "T", "shape"), DENSE)
def test_dense(dtype, T, shape):
    (G, D), B, Hkv, S = shape, 3, 2, 211
    k_cache, v_cache = strided_cache(B, Hkv, S, D, dtype), strided_cache(B, Hkv, S, D, dtype)
    check_dense(normal(B, T, Hkv * G, D, dtype=dtype), k_cache, v_cache, lengths(T, 130, S))


@pytest.mark.parametrize(("T", "n_splits"), [(1, 1), (1, 4), (1, 30), (11, 1), (11, 3)])
def test_dense_splits(T, n_splits):
    q, k_cache, v_cache = normal(2, T, 8, 2, 64)[..., 0, :], normal(2, 2, 300, 64), normal(2, 2, 300, 64)
    seq_lens = lengths(300, 37)
    first = check_dense(q, k_cache, v_cache, seq_lens, 0.3, block_m=16, block_n=32, n_splits=n_splits)
    second = check_dense(q, k_cache, v_cache, seq_lens, 0.3, block_m=16, block_n=32, n_splits=n_splits)
    assert all(map(torch.equal, first, second))


def test_dense_queries_before_the_sequence():
    """Fewer tokens than queries: the first queries see nothing."""
    check_dense(normal(2, 5, 4, 64), normal(2, 2, 50, 64), normal(2, 2, 50, 64), lengths(2, 30))


# --------------------------------------------------------------------------------------------------- operators and graphs

def decode_step(qkv, encoder, k_cache, v_cache, signatures, seq_lens):
    q, planes = append(qkv, *angles(seq_lens, 1, 64), encoder, k_cache, v_cache, signatures, seq_lens)
    indices = select.select_tokens(planes, signatures, seq_lens, 48, None, 48, 4, 8, 0, k_cache, v_cache)
    sparse = sparse_kernels.sparse_attention(q[:, 0], k_cache, v_cache, indices, 0.125)
    dense = attention_kernels.dense_attention(q, k_cache, v_cache, seq_lens, 0.125)
    return indices, *sparse, *dense


def decode_inputs(B: int = 2, Hkv: int = 2, G: int = 2, S: int = 150, D: int = 64, dtype: torch.dtype = torch.float32):
    qkv, k_cache, v_cache = (normal(*shape, dtype=dtype) for shape in ((B, 1, (G + 2) * Hkv * D), *[(B, Hkv, S, D)] * 2))
    return (qkv, encoder_for(HashConfig(), Hkv * G, Hkv, D), k_cache, v_cache, random_signatures(B, Hkv, S, 1),
            lengths(*range(S - 11, S - 11 + B)))


def test_operators_are_well_formed():
    qkv, encoder, k_cache, v_cache, signatures, seq_lens = decode_inputs()
    checks = ("test_schema", "test_faketensor")
    cos, sin = angles(seq_lens, 1, 64)
    weights = encoder.key[0].weight, encoder.key[0].bias, encoder.query[0].weight, encoder.query[0].bias
    torch.library.opcheck(encode.rope_encode_append, (qkv, cos, sin, *weights, k_cache, v_cache, signatures, seq_lens, 4, 3),
                          test_utils=checks)
    torch.library.opcheck(encode.rope_encode_append, (qkv, cos, sin, None, None, None, None, k_cache, v_cache, None, seq_lens,
                                                        0, 0), test_utils=checks)
    planes = random_planes(HashConfig(), 2, 2, 2)
    for caches in ((k_cache, v_cache), (None, None)):
        torch.library.opcheck(select.select_tokens, (planes, signatures, seq_lens, 48, None, 60, 4, 8, 0, *caches),
                              test_utils=checks)
    indices = select.select_tokens(planes, signatures, seq_lens, 48, None, 60, 4, 8, 0, None, None)
    q = normal(2, 1, 4, 64)
    torch.library.opcheck(sparse_kernels.sparse_attention, (q[:, 0], k_cache, v_cache, indices, 0.125), test_utils=checks)
    torch.library.opcheck(attention_kernels.dense_attention, (q, k_cache, v_cache, seq_lens, 0.125), test_utils=checks)


def test_compiles_in_one_graph():
    inputs = decode_inputs()
    inputs_compiled = [x.clone() if isinstance(x, torch.Tensor) else x for x in inputs]
    compiled = torch.compile(decode_step, fullgraph=True, backend="inductor" if GPU else "aot_eager")(*inputs_compiled)
    plain = decode_step(*inputs)
    assert torch.equal(compiled[0], plain[0])
    for got, expected in zip(compiled[1:], plain[1:], strict=True):
        torch.testing.assert_close(got, expected)  # the angles may round otherwise
    torch.testing.assert_close(inputs_compiled[2:], list(inputs[2:]))


@gpu_only
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_graph_replays_at_other_lengths(dtype):
    inputs = decode_inputs(S=700, dtype=dtype)
    seq_lens = inputs[-1]
    decode_step(*inputs)  # compiles
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = decode_step(*inputs)
    for length in (1, 30, 48, 49, 650):
        seq_lens.fill_(length)
        graph.replay()
        replayed = [x.clone() for x in captured]
        assert all(map(torch.equal, replayed, decode_step(*inputs)))


@gpu_only
def test_offsets_over_32_bits(S: int = 2 ** 24, dtype: torch.dtype = torch.bfloat16):
    """Rows of the second sequence lie past 2^31 elements of K and V."""
    D, tail = 128, 200
    k_cache, v_cache = (torch.zeros(2, 1, S, D, dtype=dtype, device=DEVICE) for _ in range(2))
    qkv, seq_lens = normal(2, 1, 3 * D, dtype=dtype), lengths(S, S)
    q, k, v = (x[:, None] for x in qkv.split(D, dim=-1))
    unrotated = torch.ones(2, 1, D // 2, device=DEVICE), torch.zeros(2, 1, D // 2, device=DEVICE)
    append(qkv, *unrotated, None, k_cache, v_cache, None, seq_lens)
    assert torch.equal(k_cache[:, :, -1:], k) and torch.equal(v_cache[:, :, -1:], v)
    newest = torch.full((2, 1, 1), S - 1, dtype=torch.int32, device=DEVICE)
    assert torch.equal(sparse_kernels.sparse_attention(q[:, 0], k_cache, v_cache, newest, 0.125)[0], v[:, 0])

    k_cache[:, :, -tail:] = 8 * normal(2, 1, tail, D, dtype=dtype)  # large scores outweigh the many zeros before
    v_cache[:, :, -tail:] = normal(2, 1, tail, D, dtype=dtype)
    last = torch.arange(tail, dtype=torch.int32, device=DEVICE).expand(2, 1, tail)
    got = sparse_kernels.sparse_attention(q[:, 0], k_cache, v_cache, last + (S - tail), 0.125)
    out, lse = attention_kernels.dense_attention(q, k_cache, v_cache, seq_lens, 0.125)
    ends = (cache[:, :, -tail:].float() for cache in (k_cache, v_cache))
    tail_out, tail_lse = reference.sparse_attention_reference(q[:, 0].float(), *ends, last, 0.125)
    assert_close(got, (tail_out, tail_lse), dtype)
    # a prefix of zeros weighs exp(0) a row and adds nothing to the output
    prefix = torch.tensor(float(S - tail), device=DEVICE).log()
    expected_lse = torch.logaddexp(tail_lse, prefix)
    torch.testing.assert_close(lse[:, 0], expected_lse, rtol=1e-5, atol=1e-5)
    assert_close((out[:, 0], expected_lse), (tail_out * torch.exp(tail_lse - expected_lse)[..., None], expected_lse), dtype)


@gpu_only
def test_signature_offsets_over_32_bits(S: int = 2 ** 24):
    """The last of 33 heads of 128-bit signatures lies past 2^31 words."""
    signatures = torch.zeros(1, 33, S, 4, dtype=torch.int32, device=DEVICE)
    signatures[:, -1, -1000:] = random_signatures(1000, 4)
    planes = random_planes(HashConfig(bits=128), 1, 33, 2)
    got = select.select_tokens(planes, signatures, lengths(S), 500, None, 500, 1, 1, 1, None, None)
    expected = reference.select_tokens_reference(planes[:, -1:], signatures[:, -1:], lengths(S), 500, 1, 1, 500, 1)
    assert torch.equal(got[:, -1:], expected.sort(dim=-1).values)
