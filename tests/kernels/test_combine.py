"""Splits of attention combined."""
from functools import partial

import pytest
import torch

pytest.importorskip("triton")

from conftest import DEVICE, gpu_only  # noqa: E402
from kernel_inputs import DTYPES, assert_attention, normal, shared_memory  # noqa: E402

from hashfast.kernels import split_kv  # noqa: E402

pytestmark = pytest.mark.usefixtures("seeded")


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("rows", "n_splits", "D"),
                         [(3, 2, 64), (5, 20, 80), (2, 200, 128), (3, 150, 96), (5, 7, 256), (4, 3, 12)])
def test_combine(rows, n_splits, D, dtype):
    """Splits of one turn and of several, columns that no chunk divides; splits, turns and a whole row that saw nothing."""
    lse = 5 * normal(rows, n_splits)
    lse[0] = lse[1, :-1] = -torch.inf
    parts = normal(rows, n_splits, D).masked_fill((lse == -torch.inf)[..., None], 0.0)
    guarded = torch.full((rows + 1, D), 7.0, dtype=dtype, device=DEVICE)
    out, out_lse = guarded[:rows], torch.empty_like(lse[:, 0])
    split_kv.combine(parts, lse, out, out_lse, n_splits)
    total = lse.logsumexp(1)
    weights = (lse - total[:, None]).exp().nan_to_num(0.0)
    assert_attention((out, out_lse), ((weights[..., None] * parts).sum(1), total), dtype)
    assert (guarded[rows] == 7).all()


@gpu_only
@pytest.mark.parametrize("D", [64, 80, 128])
@pytest.mark.parametrize("n_splits", [2, 5, 8, 11, 33, 64, 128])
def test_combine_without_shared_memory(monkeypatch, n_splits, D):
    parts, lse = normal(3, n_splits, D), normal(3, n_splits)
    out = normal(3, D, dtype=torch.bfloat16)
    combine = partial(split_kv.combine, parts, lse, out, lse[:, 0].clone(), n_splits)
    assert shared_memory(monkeypatch, combine) == [("_combine_kernel", 0)]
