"""Quantised weights: packing bit by bit, rounding errors, layers that stand in for nn.Linear."""
import pytest
import torch
import torch.nn.functional as F
from conftest import DEVICE

from hashfast.ops import quant_linear as reference
from hashfast.ops.quant_linear import Int4Linear, Int8Linear, Quantization

pytestmark = pytest.mark.usefixtures("one_thread", "seeded")


def test_packing_bit_by_bit():
    q = torch.randint(16, (3, 64), dtype=torch.int32)
    words = reference.pack_int4(q)
    assert words.shape == (3, 8) and words.dtype == torch.int32
    for row in range(3):
        for k in range(64):
            block, within = divmod(k, 32)
            word = int(words[row, 4 * block + within % 4]) & 0xFFFFFFFF
            assert (word >> 4 * (within // 4)) & 15 == q[row, k]
    assert torch.equal(reference.unpack_int4(words), q)


def test_int8_integers_survive():
    weight = torch.randint(-127, 128, (6, 50)).float()
    weight[:, 7] = 127
    scale = torch.tensor([1.0, 0.5, 2.0, 2 ** -9, 3.0, 1.5])
    weight[5] = 0
    got, found = reference.quantize_int8(weight * scale[:, None])
    assert torch.equal(got.float(), weight)
    assert torch.equal(found[:5].float(), scale[:5]) and found[5] == 0
    assert torch.equal(reference.dequantize_int8(got, found.float()), weight * scale[:, None])


@pytest.mark.parametrize("groupsize", [32, 64, 128])
def test_int4_integers_survive(groupsize):
    q = torch.randint(16, (5, 256), dtype=torch.int32).unflatten(1, (-1, groupsize))
    q[..., 0], q[..., 1] = 0, 15
    scale = torch.rand(q.shape[:2]).add(0.1).bfloat16().float()
    zero = torch.randint(-20, 5, q.shape[:2]) * scale  # may need more bits than bfloat16 has
    zero = zero.bfloat16().float()
    weight = (q * scale[..., None] + zero[..., None]).flatten(1)
    words, found, offset = reference.quantize_int4(weight, groupsize)
    assert torch.equal(reference.unpack_int4(words), q.flatten(1))
    torch.testing.assert_close(reference.dequantize_int4(words, found.float(), offset.float()), weight, rtol=0, atol=0.06)


def test_errors_are_half_a_step_and_equal_groups_are_kept():
    weight = torch.randn(9, 128)
    weight[3, 32:64] = 0.25
    weight[4] = 0
    got = reference.dequantize_int4(*(part.float() if part.is_floating_point() else part
                                      for part in reference.quantize_int4(weight, 32)))
    step = (weight.unflatten(1, (-1, 32)).amax(-1) - weight.unflatten(1, (-1, 32)).amin(-1)) / 15
    error = (got - weight).unflatten(1, (-1, 32)).abs().amax(-1)
    assert (error <= 0.6 * step + 1e-6).all()  # half a step, and bfloat16's rounding of scale and zero
    assert torch.equal(got[3, 32:64], weight[3, 32:64]) and torch.equal(got[4], weight[4])
    int8, scale = reference.quantize_int8(weight)
    error = (reference.dequantize_int8(int8, scale.float()) - weight).abs()
    assert (error <= 0.51 * scale.float()[:, None] + 0.004 * weight.abs()).all()


def test_rows_are_quantised_alone(monkeypatch):
    weight = torch.randn(10, 64)
    whole = reference.quantize_int4(weight, 32)
    monkeypatch.setattr(reference, "ROWS_AT_ONCE", 3)
    assert all(torch.equal(a, b) for a, b in zip(whole, reference.quantize_int4(weight, 32), strict=True))


@pytest.mark.parametrize("rows, bias", [(1, True), (3, False), (40, True)])
@pytest.mark.parametrize("mode", ["int8", "int4"])
def test_layers_are_drop_in(mode, rows, bias):
    linear = torch.nn.Linear(96, 50, bias=bias).requires_grad_(False)
    model = torch.nn.Sequential(linear).to(DEVICE)
    reference.swap_linears(model, Quantization(mode, 32))
    layer, weight = model[0], linear.weight.to(DEVICE)
    assert isinstance(layer, Int8Linear if mode == "int8" else Int4Linear)
    parts = reference.quantize_int8(weight) if mode == "int8" else reference.quantize_int4(weight, 32)
    for name, part in zip(("weight", "scale", "zero"), parts, strict=False):
        getattr(layer, name).data = part.float() if part.is_floating_point() else part
    dequantize = reference.dequantize_int8 if mode == "int8" else reference.dequantize_int4
    if bias:
        layer.bias.data = linear.bias.data.to(DEVICE)
    x = torch.randn(1, rows, 96, device=DEVICE)
    expected = F.linear(x, dequantize(*(p.float() if p.is_floating_point() else p for p in parts)), layer.bias)
    torch.testing.assert_close(layer(x), expected, rtol=1e-4, atol=1e-4)
    assert not any(parameter.requires_grad for parameter in layer.parameters())
