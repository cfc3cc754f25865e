"""Kernels of quantised products against their definitions in ops/quant_linear.py."""
import pytest
import torch
from conftest import DEVICE, GPU

pytest.importorskip("triton")
from hashfast.kernels import quant_linear as kernels  # noqa: E402
from hashfast.ops import quant_linear as reference  # noqa: E402
from hashfast.ops.linear import linear_reference  # noqa: E402

# the interpreter multiplies bfloat16 wrongly
DTYPES = [torch.float32, torch.float16, torch.bfloat16] if GPU else [torch.float32, torch.float16]
ROUNDING = {torch.float32: 1e-5, torch.float16: 1e-3, torch.bfloat16: 8e-3}
ONE_ROW = 2 ** -14  # the kernels of one row lose bits of float32's sums, as they say
SHAPES = [(5, 32, 32), (70, 96, 32), (33, 576, 64), (40, 1536, 256)]  # out, in, groupsize

pytestmark = pytest.mark.usefixtures("one_thread", "seeded", "path")


def error(got: torch.Tensor, expected: torch.Tensor) -> float:
    return ((got.double() - expected).norm() / expected.norm()).item()


@pytest.mark.parametrize("N, K, groupsize, M, dtype", [(*shape, M, dtype) for shape in SHAPES for M in (1, 2, 16)
                                                        for dtype in DTYPES] if GPU else [
    (5, 32, 32, 1, torch.float32), (5, 32, 32, 16, torch.float16), (33, 576, 64, 2, torch.float32),
    (70, 96, 32, 2, torch.float16), (17, 1536, 256, 1, torch.float16), (40, 1536, 256, 16, torch.float32)])
def test_kernels(N, K, groupsize, M, dtype):
    weight, x = torch.randn(N, K, device=DEVICE) * 0.05, torch.randn(M, K, device=DEVICE).to(dtype)
    int8, scale = reference.quantize_int8(weight)
    got = kernels.int8_linear(x, int8, scale.to(dtype))
    expected = x.double() @ reference.dequantize_int8(int8, scale.to(dtype).double()).T
    bound = max(ROUNDING[dtype], ONE_ROW if M == 1 else 0)
    assert got.dtype == dtype and error(got, expected) < bound
    words, *pair = reference.quantize_int4(weight, groupsize)
    pair = [part.to(dtype) for part in pair]
    got = kernels.int4_linear(x, words, *pair)
    dense = reference.dequantize_int4(words, *(part.double() for part in pair))
    assert got.dtype == dtype and error(got, x.double() @ dense.T) < bound
    assert error(kernels.dequantize_int4(words, *pair), dense) < ROUNDING[dtype]


@pytest.mark.parametrize("M, K", [(1, 20), (1, 50), (2, 20), (2, 50)])
def test_int8_of_any_width(M, K):
    weight, x = torch.randn(9, K, device=DEVICE), torch.randn(M, K, device=DEVICE)
    int8, scale = reference.quantize_int8(weight)
    got = kernels.int8_linear(x, int8, scale.float())
    expected = x.double() @ reference.dequantize_int8(int8, scale.double()).T
    assert error(got, expected) < (ONE_ROW if M == 1 else ROUNDING[torch.float32])


def test_int8_row_that_begins_anywhere():
    """Four inputs are one load only where they begin at a multiple of 8 bytes."""
    x = torch.randn(1 + 64, device=DEVICE).bfloat16()
    int8, scale = reference.quantize_int8(torch.randn(5, 64, device=DEVICE))
    assert torch.equal(kernels.int8_linear(x[1:][None], int8, scale), kernels.int8_linear(x[1:].clone()[None], int8, scale))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("M", [1, 3])
def test_every_integer_in_every_place(M, dtype):
    """An input of 1 among zeros picks a weight: all bytes, and all 4-bit integers, at each place of a word."""
    def int8_linear(x):
        if GPU or M > 1:
            return kernels.int8_linear(x, int8, one)
        return kernels.launch_int8_row(x, int8, one, block_n=64, num_warps=1, block_w=8)  # few programs to interpret

    int8 = (torch.arange(-128, 128, device=DEVICE)[:, None] + torch.arange(32, device=DEVICE)).to(torch.int8)  # wraps
    int4 = (torch.arange(16, device=DEVICE, dtype=torch.int32)[:, None] + torch.arange(32, device=DEVICE)).int() % 16
    words, one = reference.pack_int4(int4), torch.ones(256, device=DEVICE, dtype=dtype)
    for k in (0, 5, 10, 15, 16, 21, 26, 31):  # each byte of a word twice, each of its eight 4-bit integers
        x = torch.zeros(M, 32, device=DEVICE, dtype=dtype)
        x[-1, k] = 1
        assert torch.equal(int8_linear(x)[-1], int8[:, k].to(dtype))
        got = kernels.int4_linear(x, words, one[:16, None], -3 * one[:16, None])[-1]
        assert torch.equal(got, (int4[:, k] - 3).to(dtype))


@pytest.mark.parametrize("M, n_splits", [(1, 1), (5, 1), (5, 3)])
def test_launch_parameters_change_nothing_but_rounding(M, n_splits):
    N, K = 19, 320
    weight, x = torch.randn(N, K, device=DEVICE), torch.randn(M, K, device=DEVICE)
    int8, scale = reference.quantize_int8(weight)
    words, *pair = reference.quantize_int4(weight, 64)
    pair = [part.float() for part in pair]
    if M == 1:
        row = {"block_n": 2, "num_warps": 1}  # a loop of several blocks, with a rest
        got = (kernels.launch_int8_row(x, int8, scale.float(), block_w=8, **row),
               kernels.launch_int4_row(x, words, *pair, block_u=4, **row))
    else:
        dot = {"block_n": 16, "n_splits": n_splits, "num_warps": 1, "num_stages": 1}
        got = (kernels.launch_int8_dot(x, int8, scale.float(), block_k=32, **dot),
               kernels.launch_int4_dot(x, words, *pair, block_k=128, **dot))
    dense = reference.dequantize_int8(int8, scale.double()), reference.dequantize_int4(words, *(part.double() for part in pair))
    for found, expected in zip(got, dense, strict=True):
        assert error(found, x.double() @ expected.T) < (ONE_ROW if M == 1 else ROUNDING[torch.float32])


KINDS = ("plain", "norm bias", "norm gated", "add", "norm gated add bias")
ROWS = [(6, 96, 32), (13, 160, 32), (9, 1088, 64), (5, 2560, 128)]


@pytest.mark.parametrize("kind, N, K, groupsize, dtype", [(kind, *row, dtype) for kind in KINDS for row in ROWS
                                                          for dtype in DTYPES] if GPU else [
    ("plain", 6, 96, 32, torch.float16), ("norm bias", 13, 160, 32, torch.float32), ("norm gated", 6, 96, 32, torch.float32),
    ("add", 13, 160, 32, torch.float16), ("norm gated add bias", 3, 1088, 64, torch.float16),
    ("norm gated add bias", 3, 2560, 128, torch.float32)])
def test_rows_with_prologue_and_epilogue(kind, N, K, groupsize, dtype):
    gated = "gated" in kind
    rows = 2 * N if gated else N
    x, weight = torch.randn(1, 1, K, device=DEVICE).to(dtype), torch.randn(rows, K, device=DEVICE) * K ** -0.5
    bias = torch.randn(rows, device=DEVICE).to(dtype) if "bias" in kind else None
    norm = torch.randn(K, device=DEVICE).to(dtype) if "norm" in kind else None
    residual = torch.randn(1, 1, N, device=DEVICE).to(dtype) if "add" in kind else None
    around = bias, norm, 1e-5, residual, gated
    wide = [t.double() if isinstance(t, torch.Tensor) else t for t in around]
    for mode in ("int8", "int4"):
        if mode == "int8":
            q, scale = reference.quantize_int8(weight)
            parts, dense = (q, scale.to(dtype)), reference.dequantize_int8(q, scale.to(dtype).double())
            fused, launch, blocks = kernels.int8_row, kernels.launch_int8_row, {"block_w": 64}
        else:
            q, *pair = reference.quantize_int4(weight, groupsize)
            parts = q, *(part.to(dtype) for part in pair)
            dense = reference.dequantize_int4(q, *(part.to(dtype).double() for part in pair))
            fused, launch, blocks = kernels.int4_row, kernels.launch_int4_row, {"block_u": 8}
        expected = linear_reference(x.double(), dense, *wide)
        got = fused(x, *parts, *around)
        assert got.dtype == dtype and got.shape == (1, 1, N)
        assert error(got, expected) < max(ROUNDING[dtype], ONE_ROW)
        again = [launch(x, *parts, *around, block_n=4, num_warps=1, **blocks) for _ in range(1 + GPU)]
        assert error(again[0], expected) < max(ROUNDING[dtype], ONE_ROW)
        assert torch.equal(again[0], again[-1])


def test_ops_have_right_fakes():
    weight, x = torch.randn(40, 64, device=DEVICE), torch.randn(3, 64, device=DEVICE)
    int8, scale = reference.quantize_int8(weight)
    words, *pair = reference.quantize_int4(weight, 32)
    pair = [part.float() for part in pair]
    for op, arguments in ((kernels.int8_linear, (x, int8, scale.float())), (kernels.int4_linear, (x, words, *pair)),
                          (kernels.dequantize_int4, (words, *pair)),
                          (kernels.int8_row, (x[:1, None], int8, scale.float(), None, None, 0.0, None, True)),
                          (kernels.int4_row, (x[:1, None], words, *pair, None, None, 0.0, None, True))):
        torch.library.opcheck(op, arguments, test_utils=("test_schema", "test_faketensor"))
