"""Kernels of int8 products against their definitions in ops/quant_linear.py."""
import pytest
import torch
from conftest import DEVICE, GPU

pytest.importorskip("triton")
from kernel_inputs import DTYPES, RUNS  # noqa: E402

from hashfast.kernels import quant_linear as kernels  # noqa: E402
from hashfast.ops.linear import linear_reference  # noqa: E402
from hashfast.ops.quant_linear import dequantize_int8, quantize_int8  # noqa: E402

ROUNDING = {torch.float32: 1e-5, torch.float16: 1e-3, torch.bfloat16: 8e-3}
ONE_ROW = 2 ** -14  # sums of one row carry 1152 times the inputs, which costs bits of float32

pytestmark = pytest.mark.usefixtures("seeded", "path")


def error(got: torch.Tensor, expected: torch.Tensor) -> float:
    return ((got.double() - expected).norm() / expected.norm()).item()


@pytest.mark.parametrize("N, K, M, dtype", [(*shape, M, dtype) for shape in [(5, 32), (70, 96), (33, 576), (40, 1536), (9, 50)]
                                            for M in (1, 2, 16) for dtype in DTYPES] if GPU else [
    (5, 32, 1, torch.float32), (5, 20, 16, torch.float16), (33, 288, 2, torch.float32), (9, 1536, 1, torch.float16),
    (9, 50, 1, torch.float32)])  # 50: no whole words
def test_products(N, K, M, dtype):
    weight, x = torch.randn(N, K, device=DEVICE) * 0.05, torch.randn(M, K, device=DEVICE).to(dtype)
    int8, scale = quantize_int8(weight)
    got = kernels.int8_linear(x, int8, scale.to(dtype))
    expected = x.double() @ dequantize_int8(int8, scale.to(dtype).double()).T
    assert got.dtype == dtype and error(got, expected) < max(ROUNDING[dtype], ONE_ROW if M == 1 else 0)


def test_a_row_that_begins_anywhere():
    """Four inputs are one load only where they begin at a multiple of 8 bytes."""
    x = torch.randn(1 + 64, device=DEVICE).bfloat16()
    int8, scale = quantize_int8(torch.randn(5, 64, device=DEVICE))
    assert torch.equal(kernels.int8_linear(x[1:][None], int8, scale), kernels.int8_linear(x[1:].clone()[None], int8, scale))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("M", [1, 3])
def test_every_integer_in_every_place(M, dtype):
    """An input of 1 among zeros picks a weight: all bytes, at each place of a word."""
    def int8_linear(x):
        if GPU or M > 1:
            return kernels.int8_linear(x, int8, one)
        return kernels.launch_int8_row(x, int8, one, block_n=256, num_warps=1, block_w=4)  # one program to interpret

    int8 = (torch.arange(-128, 128, device=DEVICE)[:, None] + torch.arange(16, device=DEVICE)).to(torch.int8)  # wraps
    one = torch.ones(256, device=DEVICE, dtype=dtype)
    for k in (0, 5, 10, 15):
        x = torch.zeros(M, 16, device=DEVICE, dtype=dtype)
        x[-1, k] = 1
        assert torch.equal(int8_linear(x)[-1], int8[:, k].to(dtype))


@pytest.mark.parametrize("M, n_splits", [(1, 1), (5, 1), (5, 3)])
def test_launch_parameters_change_nothing_but_rounding(M, n_splits):
    N, K = 19, 160
    weight, x = torch.randn(N, K, device=DEVICE), torch.randn(M, K, device=DEVICE)
    int8, scale = quantize_int8(weight)
    if M == 1:  # a loop of several blocks, with a rest
        got = kernels.launch_int8_row(x, int8, scale.float(), block_n=4, block_w=16, num_warps=1)
    else:
        got = kernels.launch_int8_dot(x, int8, scale.float(), block_n=16, block_k=32, n_splits=n_splits, num_warps=1,
                                      num_stages=1)
    expected = x.double() @ dequantize_int8(int8, scale.double()).T
    assert error(got, expected) < (ONE_ROW if M == 1 else ROUNDING[torch.float32])


KINDS = ("plain", "norm bias", "norm gated", "add", "norm gated add bias")


@pytest.mark.parametrize("kind, N, K, dtype", [(kind, *row, dtype) for kind in KINDS
                                               for row in [(6, 96), (13, 160), (9, 1088), (5, 2560)] for dtype in DTYPES]
                         if GPU else [
    ("plain", 6, 96, torch.float16), ("norm bias", 5, 160, torch.float32), ("norm gated", 6, 96, torch.float32),
    ("add", 5, 160, torch.float16), ("norm gated add bias", 3, 1088, torch.float16),
    ("norm gated add bias", 3, 1088, torch.float32)])
def test_rows_with_prologue_and_epilogue(kind, N, K, dtype):
    gated = "gated" in kind
    rows = 2 * N if gated else N
    x, weight = torch.randn(1, 1, K, device=DEVICE).to(dtype), torch.randn(rows, K, device=DEVICE) * K ** -0.5
    bias = torch.randn(rows, device=DEVICE).to(dtype) if "bias" in kind else None
    norm = torch.randn(K, device=DEVICE).to(dtype) if "norm" in kind else None
    residual = torch.randn(1, 1, N, device=DEVICE).to(dtype) if "add" in kind else None
    around = bias, norm, 1e-5, residual, gated
    int8, scale = quantize_int8(weight)
    dense = dequantize_int8(int8, scale.to(dtype).double())
    expected = linear_reference(x.double(), dense, *(t.double() if isinstance(t, torch.Tensor) else t for t in around))
    got = kernels.int8_row(x, int8, scale.to(dtype), *around)
    assert got.dtype == dtype and got.shape == (1, 1, N)
    assert error(got, expected) < max(ROUNDING[dtype], ONE_ROW)
    again = [kernels.launch_int8_row(x, int8, scale.to(dtype), *around, block_n=4, block_w=64, num_warps=1)
             for _ in range(RUNS)]
    assert error(again[0], expected) < max(ROUNDING[dtype], ONE_ROW)
    assert torch.equal(again[0], again[-1])


def test_ops_have_right_fakes():
    weight, x = torch.randn(6, 16, device=DEVICE), torch.randn(3, 16, device=DEVICE)
    int8, scale = quantize_int8(weight)
    for op, arguments in ((kernels.int8_linear, (x, int8, scale.float())),
                          (kernels.int8_row, (x[:1, None], int8, scale.float(), None, None, 0.0, None, True))):
        torch.library.opcheck(op, arguments, test_utils=("test_schema", "test_faketensor"))
