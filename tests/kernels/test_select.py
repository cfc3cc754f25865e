"""The kernels of selection against their reference: on a GPU where there is one, else in Triton's interpreter on the CPU.

The kernels always run before the reference, so that memory the reference left behind cannot pass for their result.
"""
from functools import partial

import pytest
import torch

triton = pytest.importorskip("triton")

from conftest import DEVICE, gpu_only  # noqa: E402
from kernel_inputs import lengths, normal, random_planes, random_signatures, shared_memory, strided_cache  # noqa: E402

from hashfast import hash_attention as reference  # noqa: E402
from hashfast.hash_attention import HashConfig  # noqa: E402
from hashfast.kernels import score  # noqa: E402
from hashfast.kernels.score import CHUNK, Selection, blocks_per_row, launch_score  # noqa: E402
from hashfast.kernels.select import launch_compact, select_tokens  # noqa: E402

pytestmark = pytest.mark.usefixtures("seeded")


def launch_select(planes, signatures, seq_lens, selection, n_blocks=None, caches=None):
    if n_blocks is None:
        return select_tokens(planes, signatures, seq_lens, *selection, *(caches or (None, None)))
    scored = launch_score(planes, signatures, seq_lens, selection, n_blocks)
    return launch_compact(*scored, seq_lens, selection, n_blocks, caches)


def check_select(planes, signatures, seq_lens, budget, sink, recent, K, shift, n_blocks=None):
    """Two runs, bit-equal, and the reference's set in ascending order."""
    selection = Selection(K, budget, K, sink, recent, shift) if isinstance(budget, torch.Tensor) else Selection(
        budget, None, K, sink, recent, shift)
    run = partial(launch_select, planes, signatures, seq_lens, selection, n_blocks)
    first, second = run(), run()
    expected = reference.select_tokens_reference(planes, signatures, seq_lens, budget, sink, recent, K, shift)
    assert torch.equal(first, second)
    assert torch.equal(first, ascending(expected))


def ascending(indices: torch.Tensor) -> torch.Tensor:
    past = torch.iinfo(torch.int32).max
    ordered = torch.where(indices < 0, past, indices).sort(dim=-1).values
    return torch.where(ordered == past, -1, ordered)


@pytest.mark.parametrize(("bits", "query_bits", "share", "group"), [
    (32, 4, "kv", 3), (32, 1, "kv", 7), (32, 1, "query", 1), (64, 8, "kv", 16), (64, 4, "query", 2), (128, 1, "kv", 1),
])
def test_select(bits, query_bits, share, group):
    config = HashConfig(bits=bits, query_bits=query_bits, share=share)
    Hs = config.signature_heads(2 * group, 2)
    group = 2 * group // Hs
    planes, signatures = random_planes(config, 3, Hs, group), random_signatures(3, Hs, 2500, config.words)
    check_select(planes, signatures, lengths(1, 700, 2437), 300, 16, 33, 300, config.shift(group))


@pytest.mark.parametrize("n_blocks", [1, 2, 3, 9])
def test_select_across_blocks(n_blocks):
    """Several chunks a block and blocks a row, more blocks than tokens, and a strided view of the cache."""
    config = HashConfig()
    planes = random_planes(config, 3, 2, 3)
    signatures = random_signatures(3, 2601, 3, 2)[:, :, 1:, 1:].transpose(1, 2)  # [3, 2, 2601, 1]
    check_select(planes, signatures, lengths(5, 1777, 2601), 200, 7, 20, 200, 0, n_blocks)


@pytest.mark.parametrize(("rows", "S"), [(8, 2 ** 15), (8, 2 ** 17), (64, 2 ** 15), (8, 2 ** 19), (32, 2 ** 17),
                                         (128, 2 ** 15), (128, 2 ** 17), (1024, 2 ** 17), (8, 2 ** 23)])
def test_a_cache_slightly_longer_is_launched_alike(rows, S):
    """What is measured at a round context is what a step uses, whose cache has room for what it generates."""
    assert blocks_per_row(rows, S, 128) == blocks_per_row(rows, S + 72, 128)


@pytest.mark.parametrize("rows", [1, 8, 128, 1024])
@pytest.mark.parametrize("S", [100, 5000, 2 ** 17 + 72, 2 ** 20, 2 ** 23 + 72, 2 ** 24])
def test_counts_of_a_block_fit_16_bits(rows, S):
    assert triton.cdiv(triton.cdiv(S, CHUNK), blocks_per_row(rows, S, 128)) * CHUNK < 2 ** 16


def check_scores(planes, signatures, seq_lens, sink, recent, n_blocks, shift):
    """The bins of the tokens that compete, and how many there are in each block, [8 x 8] or beyond."""
    B, Hs, _, _ = signatures.shape
    selection = Selection(sink + recent + 1, None, sink + recent + 1, sink, recent, shift)
    bins, counts = (x.cpu() for x in launch_score(planes, signatures, seq_lens, selection, n_blocks))
    expected = reference.score_bins(reference.score_reference(planes, signatures), planes, shift).cpu()
    for row in range(B * Hs):
        low, high = sink, int(seq_lens[row // Hs]) - recent
        here = expected[row // Hs, row % Hs]
        assert torch.equal(bins[row, low:high].int(), here[low:high])
        per_block = triton.cdiv(triton.cdiv(high, n_blocks), CHUNK) * CHUNK
        for block in range(n_blocks):
            competing = here[max(low, block * per_block):min(high, (block + 1) * per_block)]
            table = torch.bincount(competing, minlength=64).view(8, 8)
            levels, columns = (x.flip(-1).cumsum(-1).flip(-1) for x in (table.sum(dim=1), table))
            got = counts[row, :, block].int()
            assert torch.equal(got[0], levels.int()) and torch.equal(got[1:], columns.int())


@pytest.mark.parametrize(("P", "W", "shift"), [(1, 1, 0), (2, 1, 1), (3, 1, 0), (4, 1, 2), (6, 2, 3), (7, 4, 4), (3, 2, 0)])
def test_bins_and_counts(P, W, shift):
    planes, signatures = random_signatures(2, 2, 1 + P, W), random_signatures(2, 2, 2600, W)
    check_scores(planes, signatures, lengths(2600, 1500), 5, 20, 2, shift)


@pytest.mark.parametrize("bits", [4, 6])  # an even bin, an odd one
def test_a_block_counts_to_64512(bits):
    """All of 63 chunks alike, so that a count uses all of its 16 bits."""
    planes = torch.tensor([0, 2 ** bits - 1], dtype=torch.int32, device=DEVICE).view(1, 1, 2, 1)
    check_scores(planes, torch.zeros(1, 1, 63 * 1024, 1, dtype=torch.int32, device=DEVICE), lengths(63 * 1024), 3, 0, 1, 0)


@pytest.mark.parametrize("sink", [1024, 1500, 2100])
@pytest.mark.parametrize("n_blocks", [1, 3])
def test_first_tokens_take_whole_chunks(sink, n_blocks):
    planes, signatures = random_planes(HashConfig(), 3, 1, 2), random_signatures(3, 1, 3600, 1)
    check_select(planes, signatures, lengths(3600, 2500, 2260), 2250, sink, 33, 2250, 0, n_blocks)


def test_all_blocks_have_work():
    """At a round context and slightly beyond: the last tokens, which do not compete, take no chunk of their own."""
    planes, signatures = random_planes(HashConfig(), 3, 1, 2), random_signatures(3, 1, 4168, 1)
    selection = Selection(500, None, 500, 4, 128, 0)
    _, counts = launch_score(planes, signatures, lengths(4096, 4097, 4168), selection, 2)
    competing = counts[:, 0, :, 0]  # in the first eight bins or beyond
    assert competing.tolist() == [[2044, 1920], [2044, 1921], [2044, 1992]]


@pytest.mark.parametrize(("budget", "sink", "recent"), [(300, 0, 0), (300, 100, 200), (130, 0, 129), (700, 64, 128)])
def test_select_edges(budget, sink, recent):
    """Budgets taken up by what is always in, no such tokens, lengths of at most the budget, slots to spare."""
    planes, signatures = random_planes(HashConfig(), 7, 1, 2), random_signatures(7, 1, 900, 1)
    check_select(planes, signatures, lengths(0, sink + 1, 130, 300, 700, 701, 900), budget, sink, recent, budget + 37, 0)


@pytest.mark.parametrize("alike", ["all", "halves"])
def test_select_ties(alike):
    """Equal scores go by position, across chunks and blocks."""
    config = HashConfig()
    signatures = random_signatures(2, 2, 1, 1).repeat(1, 1, 3100, 1)
    if alike == "halves":
        signatures[:, :, ::2] = ~signatures[:, :, ::2]
    planes = random_planes(config, 2, 2, 3)
    check_select(planes, signatures, lengths(3100, 2901), 400, 3, 5, 400, 0, 2)


def test_select_weightless_query():
    """A query of zeros agrees with nothing: all scores and T are 0."""
    check_select(torch.zeros(2, 1, 4, 1, dtype=torch.int32, device=DEVICE), random_signatures(2, 1, 600, 1), lengths(600, 401),
                 100, 3, 5, 100, 0)


def test_select_budget_per_head():
    config = HashConfig(bits=64)
    budget = torch.tensor([40, 128, 300, 64], dtype=torch.int32, device=DEVICE)
    check_select(random_planes(config, 2, 4, 2), random_signatures(2, 4, 1100, 2), lengths(90, 1093), budget, 10, 20, 300, 1)


def test_select_beyond_the_cache():
    """More slots and budget than the cache has rows."""
    check_select(random_planes(HashConfig(), 2, 2, 2), random_signatures(2, 2, 50, 1), lengths(50, 9), 80, 4, 4, 90, 0)


def test_select_ignores_what_lies_past_the_length():
    config = HashConfig()
    planes, signatures, seq_lens = random_planes(config, 2, 2, 2), random_signatures(2, 2, 600, 1), lengths(333, 418)
    select = partial(launch_select, planes, signatures, seq_lens, Selection(64, None, 64, 4, 4, 0))
    before = select()
    for b, length in enumerate(seq_lens.tolist()):
        signatures[b, :, length:] = random_signatures(2, 600 - length, 1)
    assert torch.equal(before, select())


def test_select_in_rows_that_memory_goes_past():
    """As a cache's rows are, whole 64 bytes whatever its length; what follows there is read and never chosen."""
    planes = random_planes(HashConfig(), 2, 2, 2)
    rows = random_signatures(2, 2, 704, 1)
    for S, readable in ((700, 704), (689, 704), (688, 688), (704, 704)):
        signatures = rows[:, :, :S]
        assert score.readable_tokens(signatures) == readable
        check_select(planes, signatures, lengths(S, 300), 150, 5, 20, 150, 0)
    assert score.readable_tokens(rows[:, :, 4:701]) == 697  # rounded up, it would end after the last row
    check_select(planes, rows[:, :, 4:701], lengths(697, 300), 150, 5, 20, 150, 0)


@gpu_only
@pytest.mark.parametrize(("D", "dtype"), [(64, torch.bfloat16), (96, torch.float16), (128, torch.float32)])
@pytest.mark.parametrize("group", [1, 2])
def test_select_asks_for_rows(group, D, dtype):
    """Asking the L2 cache for rows changes no position."""
    caches = normal(3, 2, 900, D, dtype=dtype), strided_cache(3, 2, 900, D, dtype)
    planes, signatures = random_planes(HashConfig(), 3, 2 * group, 1), random_signatures(3, 2 * group, 900, 1)
    for budget in (128, 640):
        select = partial(launch_select, planes, signatures, lengths(1, 300, 900), Selection(budget, None, budget, 16, 33, 0))
        assert torch.equal(select(caches=caches), select())


@gpu_only
@pytest.mark.parametrize("words", [1, 2, 4])
@pytest.mark.parametrize("n_blocks", [3, 64, 128, 256])
def test_selecting_without_shared_memory(monkeypatch, n_blocks, words):
    config = HashConfig(bits=32 * words)
    planes, signatures = random_planes(config, 1, 2, 4), random_signatures(1, 2, 8192, words)
    select = partial(launch_select, planes, signatures, lengths(8000), Selection(500, None, 500, 64, 128, 0))
    assert shared_memory(monkeypatch, partial(select, n_blocks)) == [("_score_kernel", 0), ("_compact_kernel", 0)]


@gpu_only
def test_selection_replayed_at_other_lengths():
    """Over several blocks; what longer sequences left in memory does not count."""
    planes, signatures, seq_lens = random_planes(HashConfig(), 2, 2, 4), random_signatures(2, 2, 5000, 1), lengths(4900, 4900)
    select = partial(launch_select, planes, signatures, seq_lens, Selection(200, None, 200, 4, 8, 0), 3)
    select()  # compiles
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = select()
    for pair in ((4900, 1100), (49, 3000), (1, 200), (5000, 201)):
        seq_lens.copy_(lengths(*pair))
        graph.replay()
        expected = reference.select_tokens_reference(planes, signatures, seq_lens, 200, 4, 8, 200, 0)
        assert torch.equal(captured, ascending(expected))
