"""Linear layers of a decode step with prologue (RMSNorm) and epilogue (gate, residual).

Plain PyTorch on a CPU, for prompts, and for other dtypes; one fused Triton kernel each for up to 16 rows in bfloat16 on a GPU
(kernels/linear.py). int8 layers have their own (kernels/quant_linear.py), fused for one row alone.

Symbols: K inputs, N outputs.
"""
import torch
import torch.nn.functional as F
from torch import Tensor, nn

KERNEL_ROWS = 16  # the most rows that the kernels take


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    wide = x.float()
    wide = wide * torch.rsqrt(wide.square().mean(dim=-1, keepdim=True) + eps)
    return wide.to(x.dtype) * weight


def linear_reference(x: Tensor, weight: Tensor, bias: Tensor | None, norm: Tensor | None, eps: float, residual: Tensor | None,
                     gated: bool) -> Tensor:
    """residual + norm(x) W^T + bias; where gated, silu of the first half of the outputs times the second half instead.

    x [..., K], weight [N, K] and bias [N] (2 N where gated), norm [K] (RMSNorm's weight), residual [..., N] -> [..., N].
    bias, norm and residual may be None.
    """
    return _after(F.linear(x if norm is None else rms_norm(x, norm, eps), weight, bias), residual, gated)


def _after(out: Tensor, residual: Tensor | None, gated: bool) -> Tensor:
    """The epilogue of a product: [..., N or 2 N] -> [..., N]."""
    if gated:
        gate, up = out.chunk(2, dim=-1)
        hidden = F.silu(gate) * up
        # as_strided makes Inductor store `hidden`: inlined into the next product, it would be computed again for every output
        out = hidden.as_strided(hidden.shape, hidden.stride())
    return out if residual is None else residual + out


def linear(x: Tensor, layer: nn.Module, norm: nn.Module | None = None, residual: Tensor | None = None,
           gated: bool = False) -> Tensor:
    """`linear_reference` of a layer and the RMSNorm before it, by one fused kernel where there is one."""
    K = x.shape[-1]
    if x.is_cuda and x.numel() <= KERNEL_ROWS * K:
        fused = (*((norm.weight, norm.eps) if norm is not None else (None, 0.0)), residual, gated)
        if type(layer) is nn.Linear and x.dtype == torch.bfloat16 and K % 8 == 0:
            from hashfast.kernels import linear as linear_kernels
            return linear_kernels.linear(x, layer.weight, layer.bias, *fused)
        if x.numel() == K and getattr(layer, "has_row_kernel", False):  # quant_linear.py
            return layer.row(x, *fused)
    return _after(layer(x if norm is None else norm(x)), residual, gated)
