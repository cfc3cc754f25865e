"""Queries and keys of one layer, as training captures them, whose attention is easy to learn."""
import torch

from hashfast.model import Fingerprint

SHAPE = Fingerprint(n_layer=1, n_head=4, n_kv_head=2, head_dim=16, rope_theta=1e4, vocab_size=256)
SINK, RECENT = 4, 8


def structured(seed: int, length: int = 400) -> tuple[torch.Tensor, torch.Tensor]:
    """Queries [4, T, 16] and keys [2, T, 16] whose match lies in 4 of 16 channels; the keys are loud in all the others."""
    generator = torch.Generator().manual_seed(seed)
    q = torch.zeros(4, length, 16)
    wanted = torch.randn(2, length, 4, generator=generator).sign() * 3  # the two heads of a group want about the same
    q[..., :4] = wanted.repeat_interleave(2, dim=0) + 0.5 * torch.randn(4, length, 4, generator=generator)
    k = torch.randn(2, length, 16, generator=generator) * 4 + 1
    k[..., :4] = torch.randn(2, length, 4, generator=generator) * 2
    return q, k
