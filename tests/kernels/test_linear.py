"""A step's linear layers: kernels against the reference."""
import itertools
from functools import partial

import pytest
import torch
from conftest import DEVICE, GPU, gpu_only

pytest.importorskip("triton")

from hashfast.kernels import linear as kernels  # noqa: E402
from hashfast.kernels import linear_ptx  # noqa: E402
from hashfast.ops.linear import KERNEL_ROWS, linear_reference  # noqa: E402

TOLERANCE = 5e-3 if GPU else 2e-2  # of one product; Triton's interpreter rounds to bfloat16 towards zero
pytestmark = pytest.mark.usefixtures("seeded")
KINDS = ("norm bias", "norm gated", "add", "norm gated add")
CASES = list(itertools.product(KINDS, [(96, 64), (37, 200), (9, 1312)], [1, 3, 16])) if GPU else [
    ("norm bias", (37, 64), 1), ("norm gated", (37, 200), 3), ("add", (9, 1312), 16), ("norm gated add", (37, 200), 1),
    ("norm bias", (9, 1312), 3), ("add", (37, 200), 1), ("norm gated add", (9, 1312), 16), ("norm gated", (9, 1312), 1)]


def random(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, device=DEVICE).bfloat16()


def check(run: partial, M: int, N: int, K: int, kind: str) -> None:
    gated = "gated" in kind
    x = random(M, 1, K)
    weight = random((2 if gated else 1) * N, K) * K ** -0.5
    norm = random(K) if "norm" in kind else None
    bias = random(N) if "bias" in kind else None
    residual = random(M, 1, N) if "add" in kind else None
    got = run(x, weight, bias, norm, 1e-5, residual, gated)
    wide = [None if t is None else t.double() for t in (x, weight, bias, norm)]
    expected = linear_reference(*wide, 1e-5, None if residual is None else residual.double(), gated)
    assert got.dtype == torch.bfloat16 and got.shape == (M, 1, N)
    torch.testing.assert_close(got.double(), expected, rtol=2e-2, atol=6e-2)
    assert (got.double() - expected).norm() < TOLERANCE * (2 if gated else 1) * expected.norm()
    if GPU:
        assert torch.equal(got, run(x, weight, bias, norm, 1e-5, residual, gated))


@pytest.mark.parametrize(("kind", "shape", "M"), CASES)
def test_linear(kind: str, shape: tuple[int, int], M: int, path: str) -> None:
    check(kernels.linear, M, *shape, kind)


@pytest.mark.parametrize(("kind", "M"), [("norm bias", 1), ("norm gated add", 5)])
def test_other_blocks(kind: str, M: int) -> None:
    """A loop of several turns with a rest, and outputs past the last."""
    check(partial(kernels.launch_portable, block_n=16, block_k=64, num_warps=4), M, 19, 200, kind)


@gpu_only
@pytest.mark.parametrize(("kind", "shape", "M"), CASES)
def test_other_parts(kind: str, shape: tuple[int, int], M: int) -> None:
    check(partial(linear_ptx.launch_mma, parts=4, warps=2, units=3), M, *shape, kind)


@pytest.mark.parametrize("M", [1, 3])
def test_rows_past_the_last_are_not_read(M: int, path: str) -> None:
    """Of a tensor whose next rows are poison."""
    x, weight = torch.full((8, 64), torch.nan, device=DEVICE).bfloat16(), random(24, 64)
    x[:M] = random(M, 64)
    got = kernels.linear(x[:M], weight, None, None, 0.0, None, False)
    torch.testing.assert_close(got.double(), x[:M].double() @ weight.double().T, rtol=2e-2, atol=6e-2)


@pytest.mark.parametrize(("M", "K", "gated_bias"), [(17, 64, False), (1, 68, False), (1, 64, True)])
def test_refuses_what_it_cannot_do(M: int, K: int, gated_bias: bool) -> None:
    bias = random(8) if gated_bias else None
    with pytest.raises(ValueError, match="no kernel"):
        kernels.linear(random(M, K), random(16, K), bias, None, 0.0, None, gated_bias)


def test_rows_that_the_kernels_take() -> None:
    assert kernels.MAX_ROWS == KERNEL_ROWS
