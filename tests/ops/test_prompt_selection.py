"""Prompts read sparsely: how much a chunk reads, attention over the chosen rows, and whole prompts through a model."""
import math

import pytest
import torch
import torch.nn.functional as F
from conftest import DEVICE, gpu_only

from hashfast.common import UserError
from hashfast.hash_attention import HashConfig
from hashfast.model import ModelArgs, PrefillSettings, SparseSettings, Transformer
from hashfast.ops.prompt_selection import PrefixRows, prefix_rows, sampled_positions, select_rows_reference
from hashfast.runtime.decode import pairs_read, prefill, prepare_prefill, prompt_chunks
from hashfast.runtime.memory import prefill_bytes
from hashfast.runtime.signatures import random_encoders

ARGS = ModelArgs(2, 48, 6, 2, 8, 64, 120, 1e-5, 10000.0, max_position=512)
HASHED = PrefillSettings("hash", sparsity=4, chunk=16, tail=5)

pytestmark = pytest.mark.usefixtures("seeded")


def test_rows_of_a_chunk() -> None:
    """Whole chunks, 1/R rounded up to them, never all but a few; sink and recent leave half of the rows to signatures."""
    assert prefix_rows(0, 4096, 16, 131072) is None and prefix_rows(4096, 4096, 16, 131072) is None
    assert prefix_rows(8192, 4096, 16, 131072) == PrefixRows(4096, 64, 1024, 8192)
    assert prefix_rows(65536, 4096, 16, 131072).count == 4096 and prefix_rows(65537, 4096, 16, 131072).count == 8192
    assert prefix_rows(126976, 4096, 16, 131072 + 300) == PrefixRows(8192, 64, 1024, 12288)
    assert prefix_rows(15360, 1024, 16, 16384) == PrefixRows(1024, 64, 256, 1024)
    assert all(prefix_rows(start, 64, 1, 640) is None for start in range(0, 640, 64))


def test_gathered_rows_are_planned() -> None:
    assert PrefillSettings().gathered(2 ** 17) == 0 and PrefillSettings("hash").gathered(2 ** 17) == 8192
    with torch.device("meta"):
        model = Transformer(ARGS)
    assert prefill_bytes(model, 16, 64) - prefill_bytes(model, 16) == 64 * 2 * 2 * 8 * 4


def test_sampled_positions() -> None:
    def sample(count: int) -> list[int]:
        return sampled_positions(count, torch.device("cpu")).tolist()

    assert sample(4096) == list(range(63, 4096, 64))
    assert sample(100)[-1] == 99 and len(set(sample(100))) == 64
    assert set(sample(3)) == {0, 1, 2} and sample(1) == [0] * 64


def test_chunks_end_at_multiples_and_the_tail_is_dense() -> None:
    assert list(prompt_chunks(0, 45, 9, HASHED)) == [(0, 16, True), (16, 32, True), (32, 40, True), (40, 45, False)]
    assert list(prompt_chunks(20, 40, 9, HASHED)) == [(20, 32, True), (32, 35, True), (35, 40, False)]
    assert list(prompt_chunks(38, 40, 9, HASHED)) == [(38, 40, False)]
    assert list(prompt_chunks(3, 25, 9, None)) == [(3, 12, False), (12, 21, False), (21, 25, False)]
    assert list(prompt_chunks(0, 20, 9, PrefillSettings())) == [(0, 9, False), (9, 18, False), (18, 20, False)]


def test_pairs_read_is_what_the_chunks_read() -> None:
    pairs = 16 * 17 / 2 + 16 * 16 + 16 * 17 / 2 + 8 * 16 + 8 * 9 / 2 + 5 * 40 + 5 * 6 / 2  # 0, 16, 32 and the tail from 40
    assert pairs_read(45, HASHED) == pytest.approx(pairs / (45 * 46 / 2))
    assert pairs_read(45, HASHED, 0.5) == pytest.approx((1 + pairs / (45 * 46 / 2)) / 2)
    assert pairs_read(45, PrefillSettings()) == 1 == pairs_read(45, PrefillSettings("hash", sparsity=1, chunk=16, tail=0))
    long = PrefillSettings("hash")
    assert 1 / 16 < pairs_read(2 ** 19, long) < 0.08 < pairs_read(2 ** 17, long) < 0.13


def test_settings_that_cannot_be() -> None:
    for wrong in ({"mode": "sparse"}, {"sparsity": 0.5}, {"chunk": 0}, {"tail": -1}):
        with pytest.raises(UserError, match="dense|sparsity"):
            PrefillSettings(**wrong)


# ----------------------------------------------------------------------------------------------------------------- model

def tiny(length: int, rows: int = 1, share: str = "kv", dense_layers: int = 0) -> Transformer:
    torch.manual_seed(1)
    with torch.device(DEVICE):
        model = Transformer(ARGS).eval()
    settings = SparseSettings(length, 4, 8, dense_layers)
    model.setup_caches(rows, length, random_encoders(HashConfig(share=share), model.fingerprint()), settings)
    return model


def tokens(count: int) -> torch.Tensor:
    return torch.randint(0, ARGS.vocab_size, (count,), device=DEVICE)


def caches(model: Transformer, row: int, length: int) -> list[torch.Tensor]:
    return [buffer[row, :, :length].clone() for layer in model.layers for buffer in layer.attention.cache.rows()]


@pytest.mark.parametrize("share", ["kv", "query"])
@torch.inference_mode()
def test_a_chunk_attends_to_the_chosen_rows_and_to_itself(share: str) -> None:
    model, start, T = tiny(100, 2, share), 70, 12
    attention = model.layers[1].attention
    for buffer in attention.cache.rows():
        buffer.copy_(torch.randint_like(buffer, -2 ** 31, 2 ** 31) if buffer.dtype == torch.int32 else torch.randn_like(buffer))
    q, k, v = torch.randn(1, T, 6, 8, device=DEVICE), *torch.randn(2, 1, 2, T, 8, device=DEVICE)
    weights = attention.encoder.weigh_queries(q[:, sampled_positions(T, q.device)].transpose(1, 2))
    rows = prefix_rows(start, 16, 4, 100)
    assert rows == PrefixRows(32, 8, 8, 32)
    chosen = select_rows_reference(weights[0], attention.cache.signatures[1], 2, start, rows, attention.encoder.shift)
    seen = torch.zeros(2, start, dtype=torch.bool, device=DEVICE).scatter(1, chosen.long(), True)  # [Hkv, start]
    causal = torch.ones(T, T, dtype=torch.bool, device=DEVICE).tril().expand(2, -1, -1)
    mask = torch.cat((seen[:, None].expand(-1, T, -1), causal), dim=2).repeat_interleave(3, dim=0)
    keys, values = (torch.cat((cached[1:2, :, :start], new), dim=2).repeat_interleave(3, dim=1)
                    for cached, new in ((attention.cache.k, k), (attention.cache.v, v)))
    expected = F.scaled_dot_product_attention(q.transpose(1, 2), keys, values, mask[None]).transpose(1, 2)
    signatures = attention.encoder.encode_keys(k)
    got = attention.prefill(q, k, v, signatures, weights, 1, start, T, rows)
    torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-5)
    assert torch.equal(attention.cache.k[1, :, start:start + T], k[0])
    assert seen.sum(dim=1).tolist() == [32, 32] and not torch.equal(seen[0], seen[1])


@pytest.mark.parametrize("settings", [PrefillSettings("hash", 1, 16, 0), PrefillSettings("hash", 8, 16, 90),
                                      PrefillSettings("hash", 8, 96, 0), PrefillSettings()], ids=str)
def test_what_reads_everything_is_dense(settings: PrefillSettings) -> None:
    ids = tokens(90)
    dense, got = (prefill(tiny(96), ids, 1, chunk=16, settings=how) for how in (None, settings))
    torch.testing.assert_close(got, dense, rtol=1e-4, atol=1e-4)


def test_signatures_choose_and_dense_layers_do_not() -> None:
    ids = tokens(90)
    dense, sparse, alike = (prefill(tiny(96, dense_layers=layers), ids, 1, settings=settings)
                            for layers, settings in ((0, None), (0, HASHED), (2, HASHED)))
    torch.testing.assert_close(alike, dense, rtol=1e-4, atol=1e-4)
    assert not torch.allclose(sparse, dense, atol=1e-3)


def test_rows_turns_and_copies() -> None:
    """A row gets what it gets alone, and a turn that goes on where a chunk ended changes nothing."""
    first, second = tokens(90), tokens(61)
    model, alone = tiny(96, 3), tiny(96)
    prefill(model, first, 2, settings=HASHED)
    prefill(model, second[:32], 1, row=2, settings=PrefillSettings("hash", 4, 16, 0))
    logits = prefill(model, second[32:], 1, 32, row=2, settings=HASHED)
    torch.testing.assert_close(logits, prefill(alone, second, 1, settings=HASHED), rtol=1e-4, atol=1e-4)
    for got, expected in zip(caches(model, 2, 61), caches(alone, 0, 61), strict=True):
        torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-4)
    for got, expected in zip(caches(model, 1, 90), caches(model, 0, 90), strict=True):
        assert torch.equal(got, expected)


def test_one_compilation_serves_sparse_chunks_too() -> None:
    model, plain, ids = tiny(100), tiny(100), tokens(95)
    torch._dynamo.reset()
    counters = torch._dynamo.utils.counters
    counters.clear()
    assert prepare_prefill(model, settings=HASHED) > 0 and model.static_chunk == HASHED.chunk
    for count in (95, 61, 40):
        got, expected = (prefill(each, ids[:count], 1, settings=HASHED) for each in (model, plain))
        torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-4)
    assert counters["stats"]["unique_graphs"] == 2 and not counters["graph_break"]


@gpu_only
def test_kernels_read_what_the_references_read(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whole prompts at a real head size, in the kernels' and in the references' selection."""
    from hashfast.ops import prompt_selection as ops
    args = ModelArgs(2, 256, 8, 2, 64, 256, 120, 1e-5, 10000.0, max_position=2 ** 14)
    ids, logits = tokens(9000), []
    for plain in (False, True):
        if plain:
            monkeypatch.setattr("hashfast.model.select_rows", ops.select_rows_reference)
            monkeypatch.setattr("hashfast.model.gather_rows", ops.gather_rows_reference)
        torch.manual_seed(1)
        with torch.device(DEVICE):
            model = Transformer(args).eval().bfloat16()
        model.setup_caches(1, 9000, random_encoders(HashConfig(), model.fingerprint()), SparseSettings(9000))
        logits.append(prefill(model, ids, 1, settings=PrefillSettings("hash", 4, 1024)).float())
    assert (logits[0] - logits[1]).norm() < 2e-2 * logits[1].norm() and math.isfinite(logits[0].norm())
