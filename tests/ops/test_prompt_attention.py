"""Prompt chunks: attention in pieces, padding, and one compilation for every prompt, row and position."""
import pytest
import torch
from conftest import DEVICE, GPU, gpu_only

pytest.importorskip("triton")

from hashfast.hash_attention import HashConfig, dense_attention_reference  # noqa: E402
from hashfast.model import ModelArgs, SparseSettings, Transformer  # noqa: E402
from hashfast.ops import prompt_attention  # noqa: E402
from hashfast.ops.prompt_attention import causal_attention, pieces  # noqa: E402
from hashfast.runtime.decode import prefill, prepare_prefill  # noqa: E402
from hashfast.runtime.signatures import random_encoders  # noqa: E402

ARGS = ModelArgs(2, 48, 6, 2, 8, 64, 120, 1e-5, 10000.0, max_position=512)

pytestmark = pytest.mark.usefixtures("seeded")


def random_qkv(T: int, N: int, Hq: int, Hkv: int, D: int, dtype: torch.dtype = torch.float32) -> tuple[torch.Tensor, ...]:
    """q [1, T, Hq, D] and K, V [1, Hkv, N, D] as slices of a longer cache, of which the last T tokens are the chunk's."""
    q = torch.randn(1, T, Hq, D, device=DEVICE).to(dtype)
    return q, *(torch.randn(2, Hkv, N + 9, D, device=DEVICE).to(dtype)[1:, :, :N] for _ in "kv")


def check(T: int, start: int, dtype: torch.dtype = torch.float32, D: int = 64, tolerance: float = 2e-6) -> None:
    q, k, v = random_qkv(T, start + T, 6, 2, D, dtype)
    got = causal_attention(q, k[:, :, start:], v[:, :, start:], lambda first, last: (k[:, :, first:last], v[:, :, first:last]),
                           start)
    lengths = torch.tensor([start + T], dtype=torch.int32, device=DEVICE)
    expected, _ = dense_attention_reference(q.float(), k.float(), v.float(), lengths)
    assert got.shape == q.shape and got.dtype == dtype
    error = (got.float() - expected).norm() / expected.norm()
    assert error < tolerance, f"relative error {error:.2e}"


def test_pieces() -> None:
    for T, start in [(1024, 0), (1024, 1), (1024, 1023), (1024, 13 * 1024), (4096, 131072 + 77), (2048, 600_000), (5, 99),
                     (777, 200_001)]:
        ranges = list(pieces(start, T))
        assert [0, *(last for _, last in ranges)] == [*(first for first, _ in ranges), start]  # one after the other, to the end
        sizes = [last - first for first, last in ranges]
        assert all(0 < size <= prompt_attention.LARGEST_PIECE for size in sizes)
        if T % 1024 == 0:
            rest = start % T
            assert [size for size in sizes if size not in prompt_attention.piece_sizes(T)] == ([rest] if rest else [])
    # a prompt of any length is seen through few shapes
    shapes = {last - first for start in range(0, 2 ** 20, 4096) for first, last in pieces(start, 4096)}
    assert shapes == {4096, 8192, 16384, 32768, 65536}


@pytest.mark.parametrize(("T", "start"), [(1, 0), (40, 0), (1, 30), (17, 200), (64, 3)])
def test_causal_attention(T: int, start: int) -> None:
    check(T, start)


def test_causal_attention_in_many_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(prompt_attention, "UNIT", 8)
    monkeypatch.setattr(prompt_attention, "LARGEST_PIECE", 32)
    for start in (8, 24, 63, 101):
        check(8, start)
        check(7, start)


@gpu_only
@pytest.mark.parametrize("kernel", ["cudnn", "flash", "triton"])
@pytest.mark.parametrize("D", [64, 128])
def test_kernels_of_long_chunks(kernel: str, D: int, monkeypatch: pytest.MonkeyPatch) -> None:
    if kernel == "cudnn" and torch.cuda.get_device_capability() < (9, 0):
        pytest.skip("needs Hopper")
    monkeypatch.setattr(prompt_attention, "kernel_for", lambda q, N: kernel)
    for start in (0, 1024, 7 * 1024 + 300):
        check(1024, start, torch.bfloat16, D, tolerance=8e-3)


# ----------------------------------------------------------------------------------------------------------------- model

def tiny(length: int, rows: int = 1, hashed: bool = True) -> Transformer:
    torch.manual_seed(1)
    with torch.device(DEVICE):
        model = Transformer(ARGS).eval()
    encoders = random_encoders(HashConfig(), model.fingerprint()) if hashed else None
    model.setup_caches(rows, length, encoders, SparseSettings(length, 4, 8) if hashed else None)
    return model


def caches(model: Transformer, row: int, length: int) -> list[torch.Tensor]:
    return [buffer[row, :, :length].clone() for layer in model.layers for buffer in layer.attention.cache.rows()]


@pytest.mark.parametrize("hashed", [False, True] if GPU else [True])
def test_one_compilation_serves_every_prompt(hashed: bool) -> None:
    """Lengths around the chunk's, rows and starts; padding writes nothing, not even at the end of the cache."""
    model, plain = tiny(100, 3, hashed), tiny(100, 3, hashed)
    torch._dynamo.reset()
    counters = torch._dynamo.utils.counters
    counters.clear()
    assert prepare_prefill(model, 16) > 0
    assert counters["stats"]["unique_graphs"] == 2  # before and after attention
    for buffer in (buffer for layer in model.layers for buffer in layer.attention.cache.rows()):
        buffer.zero_()
    starts = [0] * 3
    # (row, tokens): padded, short and whole chunks; the second row is filled to its last place by a padded chunk
    for row, count in [(0, 16), (1, 9), (0, 8), (2, 1), (1, 33), (2, 47), (1, 48), (1, 10), (0, 76)]:
        ids = torch.randint(0, ARGS.vocab_size, (count,), device=DEVICE)
        got = prefill(model, ids, 1, starts[row], row=row)
        with torch.inference_mode():
            expected = plain.prefill(ids, row, starts[row])
        torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-4)
        starts[row] += count
    assert starts == [100, 100, 48]
    assert counters["stats"]["unique_graphs"] == 2 and not counters["graph_break"]
    for row, length in enumerate(starts):
        for i, (got, expected) in enumerate(zip(caches(model, row, 100), caches(plain, row, 100), strict=True)):
            assert not got[:, length:].any()
            if hashed and i % 3 == 2:
                assert torch.equal(got, expected)  # signatures
            else:
                torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-4)


def test_which_chunks_are_padded(monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny(64)
    model.static_chunk, seen = 16, []
    project, finish = type(model.layers[0]).project, type(model.layers[0]).finish
    model.compiled_parts = (lambda layer, x, *angles: seen.append(x.shape[1]) or project(layer, x, *angles), finish)
    for count in (8, 9, 15, 16, 17):
        with torch.inference_mode():
            model.prefill(torch.zeros(count, dtype=torch.int64, device=DEVICE))
        assert seen == ([16] * ARGS.n_layer if 8 < count < 17 else [])
        seen.clear()
