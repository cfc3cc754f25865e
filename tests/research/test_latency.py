"""Of the latency measurements what needs no GPU: what the decode steps read, and what does not fit."""
import pytest
import torch

from hashfast.model import ModelArgs
from hashfast.research import latency
from hashfast.runtime.checkpoint import PRESETS, random_model
from hashfast.runtime.decode import Decoder


def test_latency_measures_a_dense_and_a_sparse_step(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(PRESETS, "tiny", ModelArgs(2, 32, 4, 2, 8, 64, 50, 1e-5, 1e4, max_position=512))
    captured = []

    def prepare(decoder: Decoder) -> None:
        captured.append([(a.sparse is not None, a.encoder is not None) for a in (x.attention for x in decoder.model.layers)])

    monkeypatch.setattr(Decoder, "prepare", prepare)
    for name, result in {"release": None, "prepare_prefill": 0.0, "timed_prefill": (1, 2.0), "median_ms": 3.0,
                         "random_prompt": None}.items():
        monkeypatch.setattr(latency, name, lambda *args, result=result: result)
    rows = latency.bench_latency(random_model("tiny"), "tiny", 300, sparsity=2.0, steps=4, chunk=16, bandwidth=1.0)
    assert captured == [[(False, False)] * 2, [(True, True)] * 2]
    assert [row["attention"] for row in rows] == ["dense", "hash"] and rows[0]["floor_ms"] > rows[1]["floor_ms"]


def test_what_does_not_fit_is_left_out(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture) -> None:
    def measure(model: object, name: str, context: int, *rest: object) -> list[dict]:
        if context > 2:
            raise torch.OutOfMemoryError("too much")
        return [{"context": context}]

    for name, result in {"random_model": lambda *args: None, "copy_bandwidth": lambda: 1.0, "bench_latency": measure}.items():
        monkeypatch.setattr(latency, name, result)
    assert list(latency.latency_rows("m", [1, 3, 2], 32, 4, 16)) == [{"context": 1}, {"context": 2}]
    assert capsys.readouterr().err == "3 tokens: does not fit\n"
