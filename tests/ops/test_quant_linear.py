"""int8 weights: rounding errors, layers that stand in for nn.Linear."""
import pytest
import torch
import torch.nn.functional as F
from conftest import DEVICE

from hashfast.ops import quant_linear
from hashfast.ops.quant_linear import Int8Linear, dequantize_int8, quantize_int8

pytestmark = pytest.mark.usefixtures("seeded")


def test_integers_survive():
    weight = torch.randint(-127, 128, (6, 50)).float()
    weight[:, 7] = 127
    scale = torch.tensor([1.0, 0.5, 2.0, 2 ** -9, 3.0, 1.5])
    weight[5] = 0
    got, found = quantize_int8(weight * scale[:, None])
    assert torch.equal(got.float(), weight)
    assert torch.equal(found[:5].float(), scale[:5]) and found[5] == 0
    assert torch.equal(dequantize_int8(got, found.float()), weight * scale[:, None])


def test_errors_are_half_a_step():
    weight = torch.randn(9, 128)
    int8, scale = quantize_int8(weight)
    error = (dequantize_int8(int8, scale.float()) - weight).abs()
    assert (error <= 0.51 * scale.float()[:, None] + 0.004 * weight.abs()).all()  # and bfloat16's rounding of the scale


def test_rows_are_quantised_alone(monkeypatch):
    weight = torch.randn(10, 64)
    whole = quantize_int8(weight)
    monkeypatch.setattr(quant_linear, "ROWS_AT_ONCE", 3)
    assert all(torch.equal(a, b) for a, b in zip(whole, quantize_int8(weight), strict=True))


@pytest.mark.parametrize("rows, bias", [(1, True), (3, False), (40, True)])
def test_layers_are_drop_in(rows, bias):
    linear = torch.nn.Linear(96, 50, bias=bias).requires_grad_(False)
    model = torch.nn.Sequential(linear).to(DEVICE)
    quant_linear.swap_linears(model)
    layer = model[0]
    assert isinstance(layer, Int8Linear)
    int8, scale = quantize_int8(linear.weight.to(DEVICE))
    layer.weight.data, layer.scale.data = int8, scale.float()
    if bias:
        layer.bias.data = linear.bias.data.to(DEVICE)
    x = torch.randn(1, rows, 96, device=DEVICE)
    expected = F.linear(x, dequantize_int8(int8, scale.float()), layer.bias)
    torch.testing.assert_close(layer(x), expected, rtol=1e-4, atol=1e-4)
    assert not any(parameter.requires_grad for parameter in layer.parameters())
