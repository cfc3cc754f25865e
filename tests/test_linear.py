"""A step's linear layers: kernels against the reference."""
import pytest
import torch

pytest.importorskip("triton")

import linear_kernels  # noqa: E402
from linear import linear_reference  # noqa: E402

GPU = torch.cuda.is_available()
DEVICE = "cuda" if GPU else "cpu"
DTYPES = [torch.float32, torch.bfloat16] if GPU else [torch.float32, torch.float16]
TOLERANCE = {torch.float32: 1e-5, torch.float16: 4e-3, torch.bfloat16: 3e-2}


def random(*shape: int, dtype: torch.dtype) -> torch.Tensor:
    return torch.randn(*shape, device=DEVICE).to(dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("N", "K"), [(96, 64), (37, 200), (9, 2080), (70, 1312)])
@pytest.mark.parametrize("kind", ["plain", "norm bias", "norm gated", "add", "norm gated add bias"])
def test_linear(kind: str, N: int, K: int, dtype: torch.dtype) -> None:
    gated = "gated" in kind
    x = random(1, 1, K, dtype=dtype)
    weight = random((2 if gated else 1) * N, K, dtype=dtype) * K ** -0.5
    norm = random(K, dtype=dtype) if "norm" in kind else None
    bias = random(N, dtype=dtype) if "bias" in kind else None
    residual = random(1, 1, N, dtype=dtype) if "add" in kind else None
    got = linear_kernels.linear(x, weight, bias if not gated else None, norm, 1e-5, residual, gated)
    wide = [None if t is None else t.double() for t in (x, weight, bias if not gated else None, norm)]
    expected = linear_reference(*wide, 1e-5, None if residual is None else residual.double(), gated)
    assert got.dtype == dtype and got.shape == (1, 1, N)
    torch.testing.assert_close(got.double(), expected, rtol=TOLERANCE[dtype], atol=TOLERANCE[dtype])
    launch = {"block_n": 4, "block_k": 128, "num_warps": 4}
    again = [linear_kernels._launch_linear(x, weight, bias if not gated else None, norm, 1e-5, residual, gated, **launch)
             for _ in range(2)]
    torch.testing.assert_close(again[0].double(), expected, rtol=TOLERANCE[dtype], atol=TOLERANCE[dtype])
    assert torch.equal(*again)
