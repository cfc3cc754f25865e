"""A step's linear layers: kernels against the reference."""
import pytest
import torch
from conftest import DEVICE, GPU

pytest.importorskip("triton")

from hashfast.kernels import linear as linear_kernels  # noqa: E402
from hashfast.ops.linear import linear_reference  # noqa: E402

TOLERANCE = 5e-3 if GPU else 2e-2  # Triton's interpreter rounds to bfloat16 towards zero


def random(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, device=DEVICE).bfloat16()


@pytest.mark.parametrize("M", [1, 3, 16])
@pytest.mark.parametrize(("N", "K"), [(96, 64), (37, 200), (9, 1312)])
@pytest.mark.parametrize("kind", ["norm bias", "norm gated", "add", "norm gated add"])
def test_linear(kind: str, N: int, K: int, M: int) -> None:
    gated = "gated" in kind
    x = random(M, 1, K)
    weight = random((2 if gated else 1) * N, K) * K ** -0.5
    norm = random(K) if "norm" in kind else None
    bias = random(N) if "bias" in kind else None
    residual = random(M, 1, N) if "add" in kind else None
    got = linear_kernels.linear(x, weight, bias, norm, 1e-5, residual, gated)
    wide = [None if t is None else t.double() for t in (x, weight, bias, norm)]
    expected = linear_reference(*wide, 1e-5, None if residual is None else residual.double(), gated)
    assert got.dtype == torch.bfloat16 and got.shape == (M, 1, N)
    torch.testing.assert_close(got.double(), expected, rtol=2e-2, atol=6e-2)
    assert (got.double() - expected).norm() < TOLERANCE * expected.norm()
    again = [linear_kernels.launch_portable(x, weight, bias, norm, 1e-5, residual, gated, block_n=16, block_k=64, num_warps=4)
             for _ in range(2)]
    assert (again[0].double() - expected).norm() < TOLERANCE * expected.norm()
    assert torch.equal(*again)


def test_rows_past_the_last_are_not_read() -> None:
    """Three rows in a tile of eight, of a tensor whose next rows are poison; nothing but three rows is written."""
    x, weight = torch.full((8, 64), torch.nan, device=DEVICE).bfloat16(), random(24, 64)
    x[:3] = random(3, 64)
    got = linear_kernels.linear(x[:3], weight, None, None, 0.0, None, False)
    torch.testing.assert_close(got.double(), x[:3].double() @ weight.double().T, rtol=2e-2, atol=6e-2)


@pytest.mark.parametrize(("M", "K", "gated_bias"), [(17, 64, False), (1, 68, False), (1, 64, True)])
def test_refuses_what_it_cannot_do(M: int, K: int, gated_bias: bool) -> None:
    bias = random(8) if gated_bias else None
    with pytest.raises(ValueError, match="no kernel"):
        linear_kernels.linear(random(M, K), random(16, K), bias, None, 0.0, None, gated_bias)
