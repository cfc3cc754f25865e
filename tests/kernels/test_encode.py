"""RoPE, signatures and bit planes of a step's tokens, and their rows in the cache, against the reference."""
import itertools

import pytest
import torch

pytest.importorskip("triton")

from conftest import DEVICE, GPU  # noqa: E402
from kernel_inputs import (  # noqa: E402
    DTYPES,
    ROUNDING,
    angles,
    append,
    encoder_for,
    lengths,
    normal,
    random_signatures,
    strided_cache,
)

from hashfast import hash_attention as reference  # noqa: E402
from hashfast.hash_attention import HashConfig  # noqa: E402
from hashfast.kernels import encode  # noqa: E402

pytestmark = pytest.mark.usefixtures("seeded")

ENCODERS = [None, HashConfig(), HashConfig(bits=128, query_bits=1), HashConfig(bits=64, query_bits=8), HashConfig(query_bits=2),
            HashConfig(bits=128), HashConfig(share="query"), HashConfig(query_bits=1, share="query")]


CASES = list(itertools.product(ENCODERS, [1, 3], [64, 96, 128], DTYPES)) if GPU else [
    *((config, 1, 64, torch.float32) for config in ENCODERS), *((config, 3, 64, torch.float16) for config in ENCODERS[:2]),
    (HashConfig(), 1, 96, torch.float16), (HashConfig(share="query"), 1, 128, torch.float16), (None, 1, 96, torch.float32),
    (HashConfig(bits=128), 3, 96, torch.float32)]


@pytest.mark.parametrize(("config", "T", "D", "dtype"), CASES, ids=str)
def test_rope_encode_append(config, T, D, dtype):
    check(config, T, D, dtype)


NORMED = CASES if GPU else [(HashConfig(), 1, 96, torch.float16), (HashConfig(share="query"), 1, 64, torch.float32),
                            (None, 3, 64, torch.float32)]


@pytest.mark.parametrize(("config", "T", "D", "dtype"), NORMED, ids=str)
def test_norms_of_queries_and_keys(config, T, D, dtype):
    """Of heads whose size differs by orders of magnitude, one of them 0."""
    check(config, T, D, dtype, (normal(D, dtype=dtype), 1 + normal(D, dtype=dtype), 1e-5),
          torch.tensor([1.0, 30.0, 0.01, 1.0, 0.0, 1.0, 5.0, 0.1, 1.0, 1.0], dtype=dtype, device=DEVICE))


def test_the_operator_with_norms_is_well_formed():
    caches, seq_lens = (normal(1, 1, 8, 16), normal(1, 1, 8, 16)), lengths(5)
    torch.library.opcheck(encode.rope_encode_append, (
        normal(1, 1, 3 * 16), *angles(seq_lens, 1, 16), None, None, None, None, *caches, None, seq_lens, 0, 0, normal(16),
        normal(16), 1e-6), test_utils=("test_schema", "test_faketensor"))


def check(config, T, D, dtype, norms=None, sizes=None):
    """The kernel against the reference. sizes [Hq + 2 Hkv] scale the heads of q, k and v."""
    B, Hq, Hkv, S = 3, 6, 2, 40
    encoder = encoder_for(config, Hq, Hkv, D) if config else None
    caches = [strided_cache(B, Hkv, S, D, dtype), strided_cache(B, Hkv, S, D, dtype),
              random_signatures(B, encoder.n_signature_head, S, config.words) if config else None]
    expected_caches = [None if cache is None else cache.clone() for cache in caches]
    qkv = normal(B, T, Hq + 2 * Hkv, D, dtype=dtype)
    qkv = (qkv if sizes is None else qkv * sizes[:, None]).flatten(2)
    seq_lens = lengths(T, 17, S)
    q, planes = append(qkv, *angles(seq_lens, T, D), encoder, *caches, seq_lens, norms=norms)
    expected_q, expected_planes = reference.rope_encode_append_reference(
        qkv, *angles(seq_lens, T, D), encoder, *expected_caches, seq_lens, norms)
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
