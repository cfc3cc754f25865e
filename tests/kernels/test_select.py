"""Selection against the reference: on a GPU where there is one, else in Triton's interpreter on the CPU.

The kernels always run before the reference, so that memory the reference left behind cannot pass for their result.
"""
from functools import partial

import pytest
import torch

pytest.importorskip("triton")

from conftest import DEVICE, GPU, gpu_only  # noqa: E402
from kernel_inputs import (  # noqa: E402
    RUNS,
    ascending,
    lengths,
    normal,
    random_planes,
    random_signatures,
    shared_memory,
    strided_cache,
)

from hashfast import hash_attention as reference  # noqa: E402
from hashfast.hash_attention import HashConfig  # noqa: E402
from hashfast.kernels.score import Selection, launch_score  # noqa: E402
from hashfast.kernels.select import launch_compact, select_tokens  # noqa: E402

pytestmark = pytest.mark.usefixtures("seeded")
HEADS = 2 if GPU else 1


def select(planes, signatures, seq_lens, selection, n_blocks=None, caches=None):
    if n_blocks is None:
        return select_tokens(planes, signatures, seq_lens, *selection, *(caches or (None, None)))
    scored = launch_score(planes, signatures, seq_lens, selection, n_blocks)
    return launch_compact(*scored, seq_lens, selection, n_blocks, caches)


def check_select(planes, signatures, seq_lens, budget, sink, recent, K, shift, n_blocks=None):
    """The reference's set in ascending order, run after run."""
    fixed = (K, budget) if isinstance(budget, torch.Tensor) else (budget, None)
    runs = [select(planes, signatures, seq_lens, Selection(*fixed, K, sink, recent, shift), n_blocks) for _ in range(RUNS)]
    expected = reference.select_tokens_reference(planes, signatures, seq_lens, budget, sink, recent, K, shift)
    assert torch.equal(runs[0], ascending(expected))
    assert torch.equal(runs[0], runs[-1])


@pytest.mark.parametrize(("bits", "query_bits", "share", "group"), [
    (32, 4, "kv", 3), (32, 1, "kv", 7), (32, 1, "query", 1), (64, 8, "kv", 16), (64, 4, "query", 2), (128, 1, "kv", 1),
])
def test_select(bits, query_bits, share, group, path):
    config = HashConfig(bits=bits, query_bits=query_bits, share=share)
    Hs = config.signature_heads(HEADS * group, HEADS)
    group = HEADS * group // Hs
    planes, signatures = random_planes(config, 2, Hs, group), random_signatures(2, Hs, 1300, config.words)
    check_select(planes, signatures, lengths(700, 1237), 230, 16, 33, 230, config.shift(group))


@pytest.mark.parametrize("n_blocks", [1, 2, 3, 9] if GPU else [1, 2, 9])
def test_across_blocks(n_blocks, path):
    """Several chunks a block and blocks a row, more blocks than tokens, and a strided view of the cache."""
    planes = random_planes(HashConfig(), 2, HEADS, 3)
    signatures = random_signatures(2, 2601, HEADS + 1, 2)[:, :, 1:, 1:].transpose(1, 2)  # [2, HEADS, 2601, 1]
    check_select(planes, signatures, lengths(5, 2601), 200, 7, 20, 200, 0, n_blocks)


@pytest.mark.parametrize(("sink", "n_blocks"), [(sink, n_blocks) for sink in (1024, 1500, 2100) for n_blocks in (1, 3)] if GPU
                         else [(1024, 1), (1024, 3), (1500, 1), (2100, 3)])
def test_first_tokens_take_whole_chunks(sink, n_blocks, path):
    planes, signatures = random_planes(HashConfig(), 2, 1, 2), random_signatures(2, 1, 3100, 1)
    check_select(planes, signatures, lengths(3100, 2260), 2150, sink, 33, 2150, 0, n_blocks)


@pytest.mark.parametrize(("budget", "sink", "recent"), [(300, 0, 0), (300, 100, 200), (130, 0, 129), (400, 64, 128)])
def test_edges(budget, sink, recent, path):
    """Budgets taken up by what is always in, no such tokens, lengths of at most the budget, slots to spare."""
    seq_lens = lengths(0, sink + 1, 130, 300, 400, 401, 600)
    planes, signatures = random_planes(HashConfig(), len(seq_lens), 1, 2), random_signatures(len(seq_lens), 1, 600, 1)
    check_select(planes, signatures, seq_lens, budget, sink, recent, budget + 37, 0)


@pytest.mark.parametrize("alike", ["all", "halves"])
def test_ties(alike, path):
    """Equal scores go by position, across chunks and blocks."""
    signatures = random_signatures(1, HEADS, 1, 1).repeat(1, 1, 2100, 1)
    if alike == "halves":
        signatures[:, :, ::2] = ~signatures[:, :, ::2]
    check_select(random_planes(HashConfig(), 1, HEADS, 3), signatures, lengths(2100), 1100, 3, 5, 1100, 0, 2)


def test_weightless_query(path):
    """A query of zeros agrees with nothing: all scores and T are 0."""
    check_select(torch.zeros(2, 1, 4, 1, dtype=torch.int32, device=DEVICE), random_signatures(2, 1, 300, 1), lengths(300, 201),
                 100, 3, 5, 100, 0)


def test_budget_per_head(path):
    budget = torch.tensor([40, 128, 300], dtype=torch.int32, device=DEVICE)
    check_select(random_planes(HashConfig(bits=64), 2, 3, 2), random_signatures(2, 3, 700, 2), lengths(90, 693), budget, 10, 20,
                 300, 1)


def test_beyond_the_cache(path):
    """More slots and budget than the cache has rows."""
    check_select(random_planes(HashConfig(), 2, 2, 2), random_signatures(2, 2, 50, 1), lengths(50, 9), 80, 4, 4, 90, 0)


def test_what_lies_past_the_length_is_ignored(path):
    planes, signatures, seq_lens = random_planes(HashConfig(), 2, 1, 2), random_signatures(2, 1, 300, 1), lengths(133, 218)
    run = partial(select, planes, signatures, seq_lens, Selection(64, None, 64, 4, 4, 0))
    before = run()
    for b, length in enumerate(seq_lens.tolist()):
        signatures[b, :, length:] = random_signatures(1, 300 - length, 1)
    assert torch.equal(before, run())


@pytest.mark.parametrize("part", [slice(0, 233), slice(0, 240), slice(4, 237)])
def test_rows_that_memory_goes_past(part, path):
    """As a cache's rows are, whole 64 bytes whatever its length; what follows there is read and never chosen."""
    signatures = random_signatures(1, 2, 240, 1)[:, :, part]
    check_select(random_planes(HashConfig(), 1, 2, 2), signatures, lengths(signatures.shape[2]), 100, 5, 20, 100, 0)


@gpu_only
@pytest.mark.parametrize(("D", "dtype"), [(64, torch.bfloat16), (96, torch.float16), (128, torch.float32)])
@pytest.mark.parametrize("group", [1, 2])
def test_prefetching_changes_nothing(group, D, dtype, path):
    caches = normal(3, 2, 900, D, dtype=dtype), strided_cache(3, 2, 900, D, dtype)
    planes, signatures = random_planes(HashConfig(), 3, 2 * group, 1), random_signatures(3, 2 * group, 900, 1)
    for budget in (128, 640):
        run = partial(select, planes, signatures, lengths(1, 300, 900), Selection(budget, None, budget, 16, 33, 0))
        assert torch.equal(run(caches=caches), run())


@gpu_only
@pytest.mark.parametrize("words", [1, 2, 4])
@pytest.mark.parametrize("n_blocks", [3, 64, 128, 256])
def test_no_shared_memory(monkeypatch, n_blocks, words):
    planes, signatures = random_planes(HashConfig(bits=32 * words), 1, 2, 4), random_signatures(1, 2, 8192, words)
    run = partial(select, planes, signatures, lengths(8000), Selection(500, None, 500, 64, 128, 0), n_blocks)
    assert shared_memory(monkeypatch, run) == [("_score_kernel", 0), ("_compact_kernel", 0)]


@gpu_only
def test_replayed_at_other_lengths(path):
    """Over several blocks; what longer sequences left in memory does not count."""
    planes, signatures, seq_lens = random_planes(HashConfig(), 2, 2, 4), random_signatures(2, 2, 5000, 1), lengths(4900, 4900)
    run = partial(select, planes, signatures, seq_lens, Selection(200, None, 200, 4, 8, 0), 3)
    run()  # compiles
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = run()
    for pair in ((4900, 1100), (49, 3000), (1, 200), (5000, 201)):
        seq_lens.copy_(lengths(*pair))
        graph.replay()
        expected = reference.select_tokens_reference(planes, signatures, seq_lens, 200, 4, 8, 200, 0)
        assert torch.equal(captured, ascending(expected))
