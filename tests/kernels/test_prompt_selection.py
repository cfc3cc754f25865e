"""What prompt chunks read: kernels against their references, and the references against those of decoding."""
import pytest
import torch

pytest.importorskip("triton")

from conftest import DEVICE, GPU  # noqa: E402
from kernel_inputs import DTYPES, encoder_for, lengths, normal, random_signatures, strided_cache  # noqa: E402

from hashfast import hash_attention as reference  # noqa: E402
from hashfast.hash_attention import HashConfig  # noqa: E402
from hashfast.kernels import prompt_selection as kernels  # noqa: E402
from hashfast.kernels.score import Selection  # noqa: E402
from hashfast.ops.prompt_selection import (  # noqa: E402
    SAMPLED,
    PrefixRows,
    gather_rows_reference,
    prompt_bins_reference,
    select_rows_reference,
)

pytestmark = pytest.mark.usefixtures("seeded")
HKV = 2
CONFIGS = [(HashConfig(), 3), (HashConfig(share="query"), 3), (HashConfig(bits=128, query_bits=1), 2),
           (HashConfig(bits=64, query_bits=8), 1), (HashConfig(bits=16, query_bits=2), 2)]


def inputs(config: HashConfig, group: int, S: int) -> tuple[torch.Tensor, torch.Tensor, int]:
    """Weights of random queries, signatures with room past a row's end, and the shift."""
    encoder = encoder_for(config, HKV * group, HKV, 8)
    weights = encoder.weigh_queries(normal(1, HKV * group, SAMPLED, 8))[0]
    assert weights.dtype == torch.int8 and weights.shape == (encoder.n_signature_head, SAMPLED, 32 * config.words)
    return weights, random_signatures(encoder.n_signature_head, S + 5, config.words)[:, :S], encoder.shift


@pytest.mark.parametrize(("config", "group"), CONFIGS, ids=str)
def test_bins_are_the_largest_of_those_of_decoding(config: HashConfig, group: int) -> None:
    encoder = encoder_for(config, HKV * group, HKV, 8)
    q, signatures = normal(1, HKV * group, SAMPLED, 8), random_signatures(1, encoder.n_signature_head, 50, config.words)
    expected = torch.zeros(HKV, 50, dtype=torch.int32, device=DEVICE)
    for i in range(SAMPLED):
        planes = encoder.encode_queries(q[:, :, i])
        bins = reference.score_bins(reference.score_reference(planes, signatures), planes, encoder.shift)
        expected = torch.maximum(expected, bins[0].unflatten(0, (HKV, -1)).amax(dim=1))
    got = prompt_bins_reference(encoder.weigh_queries(q)[0], signatures[0], HKV, encoder.shift)
    assert torch.equal(got, expected) and got.unique().numel() > 3


def check_selection(config: HashConfig, group: int, start: int, rows: PrefixRows, S: int) -> None:
    weights, signatures, shift = inputs(config, group, S)
    got = kernels.select_rows(weights, signatures, HKV, start, *rows[:3], shift)
    expected = select_rows_reference(weights, signatures, HKV, start, rows, shift).sort(dim=-1).values
    assert torch.equal(got, expected)
    assert torch.equal(got[:, :rows.sink], torch.arange(rows.sink, device=DEVICE).expand(HKV, -1).int())
    assert (got[:, -rows.recent:] >= start - rows.recent).all() and got.unique(dim=-1).shape[-1] <= rows.count


@pytest.mark.parametrize(("config", "group"), CONFIGS, ids=str)
def test_selection(config: HashConfig, group: int) -> None:
    check_selection(config, group, 131, PrefixRows(40, 5, 7, 64), 140)


@pytest.mark.parametrize(("start", "rows"), [(1100, PrefixRows(64, 16, 16, 64)), (65, PrefixRows(64, 16, 16, 64)),
                                             *([(70_000, PrefixRows(4096, 64, 1024, 8192))] if GPU else [])])
def test_selection_over_chunks_and_nearly_all(start: int, rows: PrefixRows) -> None:
    check_selection(HashConfig(), 2, start, rows, start)


def test_counts_of_several_blocks() -> None:
    """Tokens are counted where they lie, and compaction does not depend on how a row was divided."""
    weights, signatures, shift = inputs(HashConfig(), 1, 2100)
    selection = Selection(64, None, 64, 16, 16, shift)
    bins, counts = kernels.launch_prompt_score(weights, signatures, HKV, lengths(2050), 2050, selection, 2)
    expected = prompt_bins_reference(weights, signatures[:, :2050], HKV, shift)
    assert torch.equal(bins[:, 16:2034].int(), expected[:, 16:2034])
    assert not bins[:, :16].any() and not bins[:, 2034:2048].any()
    assert counts[:, 0, :, 0].tolist() == [[1024 - 16, 2034 - 1024]] * HKV
    (indices,) = kernels.launch_compact(bins, counts, lengths(2050), selection, 2)
    rows = PrefixRows(64, 16, 16, 64)
    assert torch.equal(indices, select_rows_reference(weights, signatures, HKV, 2050, rows, shift).sort(dim=-1).values)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("D", [8, 96])
def test_gather(dtype: torch.dtype, D: int) -> None:
    k, v = (strided_cache(1, HKV, 70, D, dtype)[0] for _ in "kv")
    indices = torch.rand(HKV, 70, device=DEVICE).argsort(dim=-1)[:, :37].int()
    for got, same, x in zip(kernels.gather_rows(k, v, indices, 64), gather_rows_reference(k, v, indices, 64), (k, v),
                            strict=True):
        assert got.shape == same.shape == (1, HKV, 37, D) and got.stride() == same.stride()
        assert torch.equal(got, same) and torch.equal(same[0, 1, 5], x[1, indices[1, 5]])
