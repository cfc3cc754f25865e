"""Bins and counts of the kernel of scores against the reference, and how rows are divided into blocks."""
import pytest
import torch

triton = pytest.importorskip("triton")

from conftest import DEVICE  # noqa: E402
from kernel_inputs import lengths, random_planes, random_signatures  # noqa: E402

from hashfast import hash_attention as reference  # noqa: E402
from hashfast.hash_attention import NUM_BINS, HashConfig  # noqa: E402
from hashfast.kernels.score import BINS, CHUNK, Selection, blocks_per_row, launch_score, readable_tokens  # noqa: E402

pytestmark = pytest.mark.usefixtures("seeded", "path")


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


def test_all_blocks_have_work():
    """At a round context and slightly beyond: the last tokens, which do not compete, take no chunk of their own."""
    planes, signatures = random_planes(HashConfig(), 3, 1, 2), random_signatures(3, 1, 4168, 1)
    selection = Selection(500, None, 500, 4, 128, 0)
    _, counts = launch_score(planes, signatures, lengths(4096, 4097, 4168), selection, 2)
    competing = counts[:, 0, :, 0]  # in the first eight bins or beyond
    assert competing.tolist() == [[2044, 1920], [2044, 1921], [2044, 1992]]


def test_bins_are_those_of_the_definition():
    assert BINS == NUM_BINS


def test_tokens_that_may_be_read():
    """A cache's rows are whole 64 bytes, whatever its length."""
    rows = random_signatures(1, 2, 704, 1)
    for S, readable in ((700, 704), (689, 704), (688, 688), (704, 704)):
        assert readable_tokens(rows[:, :, :S]) == readable
    assert readable_tokens(rows[:, :, 4:701]) == 697  # rounded up, it would end after the last row


@pytest.mark.parametrize(("rows", "S"), [(8, 2 ** 15), (8, 2 ** 17), (64, 2 ** 15), (8, 2 ** 19), (32, 2 ** 17),
                                         (128, 2 ** 15), (128, 2 ** 17), (1024, 2 ** 17), (8, 2 ** 23)])
def test_a_cache_slightly_longer_is_launched_alike(rows, S):
    """What is measured at a round context is what a step uses, whose cache has room for what it generates."""
    assert blocks_per_row(rows, S, 128) == blocks_per_row(rows, S + 72, 128)


@pytest.mark.parametrize("rows", [1, 8, 128, 1024])
def test_counts_of_a_block_fit_16_bits(rows):
    for S in (100, 5000, 2 ** 17 + 72, 2 ** 20, 2 ** 23 + 72, 2 ** 24):
        assert triton.cdiv(triton.cdiv(S, CHUNK), blocks_per_row(rows, S, 128)) * CHUNK < 2 ** 16
