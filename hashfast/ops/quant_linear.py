"""Linear layers whose weights are 8 or 4 bits, in plain PyTorch; kernels/quant_linear.py runs a few rows on a GPU.

int8   weight int8 [out, in], scale [out]: w = weight * scale, symmetric, one scale per output
int4   weight int32 [out, in / 8], scale and zero [out, in / groupsize]: w = q * scale + zero, q in 0 .. 15, one pair per
       `groupsize` inputs of an output. A block of 32 inputs is four words; word j holds inputs j, j + 4, ..., j + 28, the
       first in its lowest bits, so that a thread that loads a block needs its inputs four contiguous ones at a time.

Scales and zeros are bfloat16 values in the model's dtype. Activations are never quantised.

These are the project's own because a layer must run one to 16 rows at the memory's bandwidth inside a compiled block, and the
same folder must load on a CPU; torchao's 4-bit layouts are packed for one device and bfloat16.
"""
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from hashfast.ops.linear import KERNEL_ROWS

GROUPSIZES = (32, 64, 128, 256)
ROWS_AT_ONCE = 4096  # outputs quantised together, which bounds the float32 copies


@dataclass(frozen=True)
class Quantization:
    """mode: int8 or int4. groupsize: inputs that share a scale and a zero, of int4 alone; `output` is int8 in both modes."""
    mode: str
    groupsize: int = 32


# -------------------------------------------------------------------------------------------------------------- numbers

def quantize_int8(weight: Tensor) -> tuple[Tensor, Tensor]:
    """weight [out, in] -> int8 [out, in], scale bfloat16 [out]."""
    return _by_rows(_int8_rows, weight)


def _int8_rows(weight: Tensor) -> tuple[Tensor, Tensor]:
    weight = weight.float()
    scale = (weight.abs().amax(dim=1) / 127).bfloat16()
    q = (weight / _divisor(scale)[:, None]).round().clamp(-127, 127)
    return q.to(torch.int8), scale


def dequantize_int8(weight: Tensor, scale: Tensor) -> Tensor:
    """int8 [out, in], scale [out] -> [out, in] of scale's dtype."""
    return weight.to(scale.dtype) * scale[:, None]


def quantize_int4(weight: Tensor, groupsize: int) -> tuple[Tensor, Tensor, Tensor]:
    """weight [out, in] -> int32 [out, in / 8], scale and zero bfloat16 [out, in / groupsize]. in is a multiple of groupsize."""
    return _by_rows(lambda rows: _int4_rows(rows, groupsize), weight)


def _int4_rows(weight: Tensor, groupsize: int) -> tuple[Tensor, Tensor, Tensor]:
    groups = weight.float().unflatten(1, (-1, groupsize))
    low, high = groups.amin(dim=-1), groups.amax(dim=-1)
    scale = ((high - low) / 15).bfloat16()
    zero = low.bfloat16()
    q = ((groups - zero.float()[..., None]) / _divisor(scale)[..., None]).round().clamp(0, 15)
    return pack_int4(q.flatten(1).int()), scale, zero


def dequantize_int4(weight: Tensor, scale: Tensor, zero: Tensor) -> Tensor:
    """int32 [out, in / 8], scale and zero [out, in / groupsize] -> [out, in] of scale's dtype."""
    q = unpack_int4(weight).to(scale.dtype).unflatten(1, (scale.shape[1], -1))
    return torch.addcmul(zero[..., None], q, scale[..., None]).flatten(1)


def pack_int4(q: Tensor) -> Tensor:
    """int32 [out, in] of 0 .. 15 -> int32 [out, in / 8], in the order above. in is a multiple of 32."""
    blocks = q.unflatten(1, (-1, 8, 4))  # input 4 i + j of a block is [i, j]
    words = blocks[:, :, 0].clone()
    for i in range(1, 8):
        words |= blocks[:, :, i] << 4 * i
    return words.flatten(1)


def unpack_int4(words: Tensor) -> Tensor:
    """int32 [out, in / 8] -> int32 [out, in] of 0 .. 15."""
    shift = 4 * torch.arange(8, device=words.device, dtype=torch.int32)
    return ((words.unflatten(1, (-1, 1, 4)) >> shift[:, None]) & 15).flatten(1)


def _divisor(scale: Tensor) -> Tensor:
    """`scale` as float32; 1 where it is 0, for a group of one value."""
    return torch.where(scale == 0, 1.0, scale.float())


def _by_rows(quantize: Callable[[Tensor], tuple[Tensor, ...]], weight: Tensor) -> tuple[Tensor, ...]:
    parts = [quantize(rows) for rows in weight.split(ROWS_AT_ONCE)]
    return tuple(torch.cat(part) for part in zip(*parts, strict=True))


# -------------------------------------------------------------------------------------------------------------- products

def int8_linear_reference(x: Tensor, weight: Tensor, scale: Tensor) -> Tensor:
    """x [rows, in], int8 [out, in], scale [out] -> [rows, out]: integers are exact in any float, so the scale can wait."""
    return F.linear(x, weight.to(x.dtype)) * scale


def int4_linear_reference(x: Tensor, weight: Tensor, scale: Tensor, zero: Tensor) -> Tensor:
    """x [rows, in], int32 [out, in / 8], scale and zero [out, in / groupsize] -> [rows, out]."""
    return F.linear(x, dequantize_int4(weight, scale, zero))


def _parameter(*shape: int, dtype: torch.dtype | None = None) -> nn.Parameter:
    return nn.Parameter(torch.empty(shape, dtype=dtype), requires_grad=False)


class Int8Linear(nn.Module):
    """nn.Linear with int8 weights."""

    def __init__(self, in_features: int, out_features: int, bias: bool) -> None:
        super().__init__()
        self.has_row_kernel = in_features % 4 == 0  # which reads four weights as one word
        self.weight = _parameter(out_features, in_features, dtype=torch.int8)
        self.scale = _parameter(out_features)
        self.bias = _parameter(out_features) if bias else None

    def forward(self, x: Tensor) -> Tensor:
        rows = x.reshape(-1, x.shape[-1])
        if x.is_cuda and len(rows) <= KERNEL_ROWS:
            from hashfast.kernels import quant_linear as quant_kernels
            out = quant_kernels.int8_linear(rows, self.weight, self.scale)
        else:
            out = int8_linear_reference(rows, self.weight, self.scale)
        return _shaped(out, self.bias, x)

    def row(self, x: Tensor, norm: Tensor | None, eps: float, residual: Tensor | None, gated: bool) -> Tensor:
        """`linear.linear_reference` of one row on a GPU."""
        from hashfast.kernels import quant_linear as quant_kernels
        return quant_kernels.int8_row(x, self.weight, self.scale, self.bias, norm, eps, residual, gated)


class Int4Linear(nn.Module):
    """nn.Linear with int4 weights. in_features is a multiple of groupsize."""

    has_row_kernel = True

    def __init__(self, in_features: int, out_features: int, bias: bool, groupsize: int) -> None:
        super().__init__()
        self.weight = _parameter(out_features, in_features // 8, dtype=torch.int32)
        self.scale = _parameter(out_features, in_features // groupsize)
        self.zero = _parameter(out_features, in_features // groupsize)
        self.bias = _parameter(out_features) if bias else None

    def forward(self, x: Tensor) -> Tensor:
        rows = x.reshape(-1, x.shape[-1])
        if x.is_cuda:
            from hashfast.kernels import quant_linear as quant_kernels
            if len(rows) <= KERNEL_ROWS:
                out = quant_kernels.int4_linear(rows, self.weight, self.scale, self.zero)
            else:
                out = F.linear(rows, quant_kernels.dequantize_int4(self.weight, self.scale, self.zero))
        else:
            out = int4_linear_reference(rows, self.weight, self.scale, self.zero)
        return _shaped(out, self.bias, x)

    def row(self, x: Tensor, norm: Tensor | None, eps: float, residual: Tensor | None, gated: bool) -> Tensor:
        """`linear.linear_reference` of one row on a GPU."""
        from hashfast.kernels import quant_linear as quant_kernels
        return quant_kernels.int4_row(x, self.weight, self.scale, self.zero, self.bias, norm, eps, residual, gated)


def _shaped(out: Tensor, bias: Tensor | None, x: Tensor) -> Tensor:
    """out [rows, out] with its bias and the leading dimensions of x."""
    return (out if bias is None else out + bias).view(*x.shape[:-1], -1)


def is_int8(name: str, quantization: Quantization) -> bool:
    """Whether the linear layer called `name` is int8: the logits are worth more bits than they take."""
    return quantization.mode == "int8" or name == "output"


def swap_linears(model: nn.Module, quantization: Quantization) -> None:
    """Put a quantised layer without values in the place of every nn.Linear. An embedding tied to one stays as it is."""
    for name, linear in list(model.named_modules()):
        if isinstance(linear, nn.Linear):
            shape = (linear.in_features, linear.out_features, linear.bias is not None)
            device = linear.weight.device
            with device:
                layer = Int8Linear(*shape) if is_int8(name, quantization) else Int4Linear(*shape, quantization.groupsize)
            model.set_submodule(name, layer)
