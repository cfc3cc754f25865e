"""Finished layers on disk: what was saved is loaded by --resume alone, damage and another run's layers are refused."""
from pathlib import Path

import pytest
import torch

from hashfast.common import UserError
from hashfast.research.resume import Partial


def test_layers_are_kept_for_resume_alone(tmp_path: Path) -> None:
    out = tmp_path / "out.safetensors"
    partial = Partial(out, {"steps": 3}, resume=False)
    partial.save(0, {"a": torch.ones(2)}, {"found": 1})
    tensors, found = Partial(out, {"steps": 3}, resume=True).load(0)
    assert tensors["a"].tolist() == [1, 1] and found == {"found": 1}
    assert Partial(out, {"steps": 3}, resume=True).load(1) is None
    with pytest.raises(UserError, match="out.safetensors.partial holds the finished layers"):
        Partial(out, {"steps": 3}, resume=False)
    with pytest.raises(UserError, match="is of a run with steps 3, not 4"):
        Partial(out, {"steps": 4}, resume=True).load(0)
    (tmp_path / "out.safetensors.partial" / "1.safetensors").write_bytes(b"cut")
    with pytest.raises(UserError, match="is damaged"):
        Partial(out, {"steps": 3}, resume=True).load(1)
    partial.remove()
    assert Partial(out, {"steps": 3}, resume=False).load(0) is None
