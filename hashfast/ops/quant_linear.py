"""Linear layers whose weights are 8 bits, in plain PyTorch; kernels/quant_linear.py multiplies a few rows by them on a GPU.

weight int8 [out, in], scale [out]: w = weight * scale, symmetric, one scale per output. Scales are bfloat16 values in the
model's dtype. Activations are never quantised.

The kernels are the project's own: in a captured step no operator of PyTorch or torchao comes near (results/NOTES.md).
"""
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from hashfast.ops.linear import KERNEL_ROWS

ROWS_AT_ONCE = 4096  # outputs quantised together, which bounds the float32 copies


def quantize_int8(weight: Tensor) -> tuple[Tensor, Tensor]:
    """weight [out, in] -> int8 [out, in], scale bfloat16 [out]: each weight rounded to the nearest."""
    parts = [_quantize_rows(rows) for rows in weight.split(ROWS_AT_ONCE)]
    return torch.cat([q for q, _ in parts]), torch.cat([scale for _, scale in parts])


def _quantize_rows(weight: Tensor) -> tuple[Tensor, Tensor]:
    weight = weight.float()
    scale = (weight.abs().amax(dim=1) / 127).bfloat16()
    divisor = torch.where(scale == 0, 1.0, scale.float())
    return (weight / divisor[:, None]).round().clamp(-127, 127).to(torch.int8), scale


def dequantize_int8(weight: Tensor, scale: Tensor) -> Tensor:
    """int8 [out, in], scale [out] -> [out, in] of scale's dtype."""
    return weight.to(scale.dtype) * scale[:, None]


def int8_linear_reference(x: Tensor, weight: Tensor, scale: Tensor) -> Tensor:
    """x [rows, in], int8 [out, in], scale [out] -> [rows, out]: integers are exact in any float, so the scale can wait."""
    return F.linear(x, weight.to(x.dtype)) * scale


class Int8Linear(nn.Module):
    """nn.Linear with int8 weights, without values yet."""

    def __init__(self, in_features: int, out_features: int, bias: bool) -> None:
        super().__init__()
        self.has_row_kernel = in_features % 4 == 0  # which reads four weights as one word
        self.weight = nn.Parameter(torch.empty(out_features, in_features, dtype=torch.int8), requires_grad=False)
        self.scale = nn.Parameter(torch.empty(out_features), requires_grad=False)
        self.bias = nn.Parameter(torch.empty(out_features), requires_grad=False) if bias else None

    def forward(self, x: Tensor) -> Tensor:
        rows = x.reshape(-1, x.shape[-1])
        if x.is_cuda and len(rows) <= KERNEL_ROWS:
            from hashfast.kernels import quant_linear as quant_kernels
            out = quant_kernels.int8_linear(rows, self.weight, self.scale)
        else:
            out = int8_linear_reference(rows, self.weight, self.scale)
        return (out if self.bias is None else out + self.bias).view(*x.shape[:-1], -1)

    def row(self, x: Tensor, norm: Tensor | None, eps: float, residual: Tensor | None, gated: bool) -> Tensor:
        """`linear_reference` of one row on a GPU."""
        from hashfast.kernels import quant_linear as quant_kernels
        return quant_kernels.int8_row(x, self.weight, self.scale, self.bias, norm, eps, residual, gated)


def swap_linears(model: nn.Module) -> None:
    """Put an Int8Linear without values in the place of every nn.Linear. An embedding tied to one stays as it is."""
    for name, linear in list(model.named_modules()):
        if isinstance(linear, nn.Linear):
            with linear.weight.device:
                model.set_submodule(name, Int8Linear(linear.in_features, linear.out_features, linear.bias is not None))
