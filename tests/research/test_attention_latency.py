"""Of attention's measurements what needs no GPU: when dense peers run, what does not fit, the switch to portable kernels."""
import os

import pytest
import torch

from hashfast.research import attention_latency
from hashfast.research.attention_latency import attention_rows, portable_kernels


def test_dense_peers_are_measured_once_a_case(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture) -> None:
    def measure(batch: int, context: int, sparsity: int, mode: str, heads: tuple, bandwidth: float, with_dense: bool) -> dict:
        if (context, mode) == (3, "default"):
            raise torch.OutOfMemoryError("too much")
        return {"context": context, "mode": mode} | ({"dense_best_us": float(context)} if with_dense else {})

    monkeypatch.setattr(attention_latency, "copy_bandwidth", lambda: 1.0)
    monkeypatch.setattr(attention_latency, "bench_attention", measure)
    rows = list(attention_rows([(1, 2, 8), (1, 3, 8)], ["default", "hata"], (4, 2, 16)))
    assert [(row["context"], row["mode"], row["dense_best_us"]) for row in rows] == [
        (2, "default", 2.0), (2, "hata", 2.0), (3, "hata", 3.0)]
    assert capsys.readouterr().err == "1x3x8 default: does not fit\n"


@pytest.mark.parametrize("before", [None, "0"])
def test_portable_kernels(before: str | None, monkeypatch: pytest.MonkeyPatch) -> None:
    if before is None:
        monkeypatch.delenv("HASHFAST_PORTABLE", raising=False)
    else:
        monkeypatch.setenv("HASHFAST_PORTABLE", before)
    with pytest.raises(ValueError, match="within"), portable_kernels():
        assert os.environ["HASHFAST_PORTABLE"] == "1"
        raise ValueError("within")
    assert os.environ.get("HASHFAST_PORTABLE") == before
