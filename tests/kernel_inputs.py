"""What the tests of kernels share: random inputs on a GPU where there is one, else for Triton's interpreter on the CPU."""
import torch
import triton
from conftest import DEVICE

from hashfast import hash_attention as reference
from hashfast.hash_attention import HashConfig


def lengths(*values: int) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.int32, device=DEVICE)


def random_planes(config: HashConfig, B: int, Hs: int, group: int) -> torch.Tensor:
    codes = torch.randn(B, Hs, group, config.bits, device=DEVICE)
    return reference.weight_planes(reference.query_weights(codes, config), config.planes(group))


def random_signatures(*shape: int) -> torch.Tensor:
    return torch.randint(-2 ** 31, 2 ** 31, shape, device=DEVICE).int()


def normal(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.randn(shape, device=DEVICE).to(dtype)


def strided_cache(B: int, H: int, S: int, D: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """[B, H, S, D] inside a wider tensor whose sequence comes before its heads."""
    return normal(B, S, H + 1, D + 8, dtype=dtype)[:, :, 1:, :D].transpose(1, 2)


def shared_memory(monkeypatch, run) -> list[tuple[str, int]]:
    """The kernels that run() launches, with the shared memory each takes."""
    launched, launch = [], triton.JITFunction.run
    monkeypatch.setattr(triton.JITFunction, "run", lambda *args, **kwargs: launched.append(launch(*args, **kwargs)))
    run()
    return [(kernel.metadata.name, kernel.metadata.shared) for kernel in launched]
