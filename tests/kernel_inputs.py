"""What the tests of kernels share: random inputs on a GPU where there is one, else for Triton's interpreter on the CPU."""
from collections.abc import Callable

import torch
import triton
from conftest import DEVICE, GPU

from hashfast import hash_attention as reference
from hashfast import model
from hashfast.hash_attention import HashConfig, HashEncoder
from hashfast.kernels import encode
from hashfast.runtime import signatures

# the interpreter multiplies bfloat16 wrongly
DTYPES = [torch.float32, torch.float16, torch.bfloat16] if GPU else [torch.float32, torch.float16]
ROUNDING = {torch.float32: 2e-6, torch.float16: 1e-3, torch.bfloat16: 8e-3}
RUNS = 2 if GPU else 1  # of what must give the same bits again: the interpreter has no races


def assert_attention(got: tuple, expected: tuple, dtype: torch.dtype) -> None:
    """out and lse against those of float32; rows that see nothing give 0 and -inf."""
    out, lse = (x.float() for x in got)
    expected_out, expected_lse = expected
    assert got[0].dtype == dtype and got[1].dtype == torch.float32
    assert out.isfinite().all()
    error = (out - expected_out).norm() / expected_out.norm()
    assert error < ROUNDING[dtype], f"out: relative error {error:.2e}"
    seen = expected_lse.isfinite()
    assert torch.equal(lse.isneginf(), ~seen)
    assert (out[~seen] == 0).all()
    # sums are float32 whatever the dtype: only exact products of rounded inputs enter
    torch.testing.assert_close(lse[seen], expected_lse[seen], rtol=2e-6, atol=4e-6)


def lengths(*values: int) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.int32, device=DEVICE)


def ascending(indices: torch.Tensor) -> torch.Tensor:
    """Each row sorted, unused slots (-1) last."""
    past = torch.iinfo(torch.int32).max
    ordered = torch.where(indices < 0, past, indices).sort(dim=-1).values
    return torch.where(ordered == past, -1, ordered)


def random_planes(config: HashConfig, B: int, Hs: int, group: int) -> torch.Tensor:
    codes = torch.randn(B, Hs, group, config.bits, device=DEVICE)
    return reference.weight_planes(reference.query_weights(codes, config), config.planes(group))


def random_signatures(*shape: int) -> torch.Tensor:
    return torch.randint(-2 ** 31, 2 ** 31, shape, device=DEVICE).int()


def random_indices(B: int, Hs: int, K: int, S: int, unused: float = 0.2) -> torch.Tensor:
    """Distinct positions in any order, some slots unused."""
    order = torch.rand(B, Hs, S, device=DEVICE).argsort(dim=-1)[..., :K].int()
    return torch.where(torch.rand(B, Hs, K, device=DEVICE) < unused, -1, order)


def normal(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.randn(shape, device=DEVICE).to(dtype)


def strided_cache(B: int, H: int, S: int, D: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """[B, H, S, D] inside a wider tensor whose sequence comes before its heads."""
    return normal(B, S, H + 1, D + 8, dtype=dtype)[:, :, 1:, :D].transpose(1, 2)


def angles(seq_lens: torch.Tensor, T: int, D: int) -> tuple[torch.Tensor, torch.Tensor]:
    """cos and sin [B, T, D / 2] of the last T positions."""
    position = seq_lens[:, None] - T + torch.arange(T, device=DEVICE)
    angle = position[..., None] * torch.logspace(0, -3, D // 2, device=DEVICE)
    return angle.cos(), angle.sin()


def encoder_for(config: HashConfig, Hq: int, Hkv: int, D: int) -> HashEncoder:
    """Random weights; biases keep every code away from 0, where rounding decides the sign."""
    (encoder,) = signatures.random_encoders(config, model.Fingerprint(1, Hq, Hkv, D, 1e4, 1))
    for (layer,) in (encoder.key, encoder.query):
        layer.weight.mul_(0.05)
        layer.bias.copy_(torch.where(torch.rand_like(layer.bias) > 0.5, 1.0, -1.0) * (0.5 + torch.rand_like(layer.bias)))
    return encoder.to(DEVICE)


def append(qkv: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, encoder: HashEncoder | None, *rest: torch.Tensor,
           norms: tuple[torch.Tensor, torch.Tensor, float] | None = None) -> tuple[torch.Tensor, torch.Tensor | None]:
    """`hash_attention.rope_encode_append` by the kernel, on any device."""
    norms = norms or ()
    if encoder is None:
        return encode.rope_encode_append(qkv, cos, sin, None, None, None, None, *rest, 0, 0, *norms)[0], None
    (key,), (query,) = encoder.key, encoder.query
    q, planes = encode.rope_encode_append(qkv, cos, sin, key.weight, key.bias, query.weight, query.bias, *rest,
                                          encoder.config.query_bits, encoder.config.planes(encoder.group), *norms)
    return q, planes if qkv.shape[1] == 1 else None


def shared_memory(monkeypatch, run: Callable[[], object]) -> list[tuple[str, int]]:
    """The kernels that run() launches, with the shared memory each takes."""
    launched, launch = [], triton.JITFunction.run
    monkeypatch.setattr(triton.JITFunction, "run", lambda *args, **kwargs: launched.append(launch(*args, **kwargs)))
    run()
    return [(kernel.metadata.name, kernel.metadata.shared) for kernel in launched]
