"""The kernels of a step one after the other: as operators, compiled, captured, and past 2^31 elements."""
import pytest
import torch

pytest.importorskip("triton")

from conftest import DEVICE, GPU, gpu_only  # noqa: E402
from kernel_inputs import (  # noqa: E402
    angles,
    append,
    assert_attention,
    encoder_for,
    lengths,
    normal,
    random_planes,
    random_signatures,
    shared_memory,
)

from hashfast import hash_attention as reference  # noqa: E402
from hashfast.hash_attention import HashConfig  # noqa: E402
from hashfast.kernels import dense_attention as dense  # noqa: E402
from hashfast.kernels import encode, select  # noqa: E402
from hashfast.kernels import sparse_attention as sparse  # noqa: E402

pytestmark = pytest.mark.usefixtures("seeded")


def decode_step(qkv, encoder, k_cache, v_cache, signatures, seq_lens):
    q, planes = append(qkv, *angles(seq_lens, 1, 64), encoder, k_cache, v_cache, signatures, seq_lens)
    indices = select.select_tokens(planes, signatures, seq_lens, 48, None, 48, 4, 8, 0, k_cache, v_cache)
    return (indices, *sparse.sparse_attention(q[:, 0], k_cache, v_cache, indices, 0.125),
            *dense.dense_attention(q, k_cache, v_cache, seq_lens, 0.125))


def decode_inputs(B: int = 2, Hkv: int = 2, G: int = 2, S: int = 150, D: int = 64, dtype: torch.dtype = torch.float32):
    qkv, k_cache, v_cache = (normal(*shape, dtype=dtype) for shape in ((B, 1, (G + 2) * Hkv * D), *[(B, Hkv, S, D)] * 2))
    return (qkv, encoder_for(HashConfig(), Hkv * G, Hkv, D), k_cache, v_cache, random_signatures(B, Hkv, S, 1),
            lengths(*range(S - 11, S - 11 + B)))


def test_operators_are_well_formed():
    qkv, encoder, k_cache, v_cache, signatures, seq_lens = decode_inputs(1, 1, 2, 70)
    checks = ("test_schema", "test_faketensor")
    cos, sin = angles(seq_lens, 1, 64)
    weights = encoder.key[0].weight, encoder.key[0].bias, encoder.query[0].weight, encoder.query[0].bias
    torch.library.opcheck(encode.rope_encode_append, (qkv, cos, sin, *weights, k_cache, v_cache, signatures, seq_lens, 4, 3),
                          test_utils=checks)
    torch.library.opcheck(encode.rope_encode_append, (qkv, cos, sin, None, None, None, None, k_cache, v_cache, None, seq_lens,
                                                        0, 0), test_utils=checks)
    planes = random_planes(HashConfig(), 1, 1, 2)
    for caches in ((k_cache, v_cache), (None, None)):
        torch.library.opcheck(select.select_tokens, (planes, signatures, seq_lens, 48, None, 60, 4, 8, 0, *caches),
                              test_utils=checks)
    indices = select.select_tokens(planes, signatures, seq_lens, 48, None, 60, 4, 8, 0, None, None)
    q = normal(1, 1, 2, 64)
    torch.library.opcheck(sparse.sparse_attention, (q[:, 0], k_cache, v_cache, indices, 0.125), test_utils=checks)
    torch.library.opcheck(dense.dense_attention, (q, k_cache, v_cache, seq_lens, 0.125), test_utils=checks)


def test_compiles_in_one_graph(path):
    inputs = decode_inputs(S=70)
    inputs_compiled = [x.clone() if isinstance(x, torch.Tensor) else x for x in inputs]
    compiled = torch.compile(decode_step, fullgraph=True, backend="inductor" if GPU else "aot_eager")(*inputs_compiled)
    plain = decode_step(*inputs)
    assert torch.equal(compiled[0], plain[0])
    for got, expected in zip(compiled[1:], plain[1:], strict=True):
        torch.testing.assert_close(got, expected)  # the angles may round otherwise
    torch.testing.assert_close(inputs_compiled[2:], list(inputs[2:]))


@gpu_only
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_graph_replays_at_other_lengths(dtype, path):
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
    assert torch.equal(sparse.sparse_attention(q[:, 0], k_cache, v_cache, newest, 0.125)[0], v[:, 0])

    k_cache[:, :, -tail:] = 8 * normal(2, 1, tail, D, dtype=dtype)  # large scores outweigh the many zeros before
    v_cache[:, :, -tail:] = normal(2, 1, tail, D, dtype=dtype)
    last = torch.arange(tail, dtype=torch.int32, device=DEVICE).expand(2, 1, tail)
    got = sparse.sparse_attention(q[:, 0], k_cache, v_cache, last + (S - tail), 0.125)
    out, lse = dense.dense_attention(q, k_cache, v_cache, seq_lens, 0.125)
    ends = (cache[:, :, -tail:].float() for cache in (k_cache, v_cache))
    tail_out, tail_lse = reference.sparse_attention_reference(q[:, 0].float(), *ends, last, 0.125)
    assert_attention(got, (tail_out, tail_lse), dtype)
    # a prefix of zeros weighs exp(0) a row and adds nothing to the output
    prefix = torch.tensor(float(S - tail), device=DEVICE).log()
    expected_lse = torch.logaddexp(tail_lse, prefix)
    torch.testing.assert_close(lse[:, 0], expected_lse, rtol=1e-5, atol=1e-5)
    assert_attention((out[:, 0], expected_lse), (tail_out * torch.exp(tail_lse - expected_lse)[..., None], expected_lse), dtype)


@gpu_only
def test_signature_offsets_over_32_bits(S: int = 2 ** 24):
    """The last of 33 heads of 128-bit signatures lies past 2^31 words."""
    signatures = torch.zeros(1, 33, S, 4, dtype=torch.int32, device=DEVICE)
    signatures[:, -1, -1000:] = random_signatures(1000, 4)
    planes = random_planes(HashConfig(bits=128), 1, 33, 2)
    got = select.select_tokens(planes, signatures, lengths(S), 500, None, 500, 1, 1, 1, None, None)
    expected = reference.select_tokens_reference(planes[:, -1:], signatures[:, -1:], lengths(S), 500, 1, 1, 500, 1)
    assert torch.equal(got[:, -1:], expected.sort(dim=-1).values)


@gpu_only
@pytest.mark.parametrize(("B", "budget"), [(1, 2048), (1, 4096), (8, 1024)])
def test_no_shared_memory(monkeypatch, B, budget):
    """From scores to the combined output no kernel takes any: one that does delays those around it by microseconds."""
    k_cache, v_cache = normal(B, 8, 8192, 128, dtype=torch.bfloat16), normal(B, 8, 8192, 128, dtype=torch.bfloat16)
    arguments = random_planes(HashConfig(), B, 8, 4), random_signatures(B, 8, 8192, 1), lengths(*[8000] * B)
    q = normal(B, 32, 128, dtype=torch.bfloat16)

    def attend():
        indices = select.select_tokens(*arguments, budget, None, budget, 64, 128, 0, k_cache, v_cache)
        sparse.sparse_attention(q, k_cache, v_cache, indices, 0.125)

    assert shared_memory(monkeypatch, attend) == [
        ("_score_kernel", 0), ("_compact_kernel", 0), ("_register_attention_kernel", 0), ("_combine_kernel", 0)]
