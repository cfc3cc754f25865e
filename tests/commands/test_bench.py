"""Of bench.py what can be checked without a GPU: what its decode steps are made to read, and mistakes on the command line."""
import argparse
import sys

import pytest
import torch

from hashfast.commands import bench
from hashfast.common import UserError
from hashfast.model import ModelArgs
from hashfast.runtime.checkpoint import random_model


def test_latency_measures_a_dense_and_a_sparse_step(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(bench.PRESETS, "tiny", ModelArgs(2, 32, 4, 2, 8, 64, 50, 1e-5, 1e4, max_position=512))
    captured = []

    def prepare(decoder: bench.Decoder) -> None:
        captured.append([(a.sparse is not None, a.encoder is not None) for a in (x.attention for x in decoder.model.layers)])

    monkeypatch.setattr(bench.Decoder, "prepare", prepare)
    for name, result in {"release": None, "prepare_prefill": 0.0, "timed_prefill": (1, 2.0), "median_ms": 3.0,
                         "random_prompt": None}.items():
        monkeypatch.setattr(bench, name, lambda *args, result=result: result)
    options = argparse.Namespace(model="tiny", sparsity=2.0, steps=4, chunk=16)
    rows = bench.bench_latency(random_model("tiny"), 300, 1.0, options)
    assert captured == [[(False, False)] * 2, [(True, True)] * 2]
    assert [row["attention"] for row in rows] == ["dense", "hash"] and rows[0]["floor_ms"] > rows[1]["floor_ms"]


def test_what_does_not_fit_is_left_out(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture) -> None:
    def measure(model: object, context: int, *rest: object) -> list[dict]:
        if context > 2:
            raise torch.OutOfMemoryError("too much")
        return [{"context": context}]

    for name, result in {"random_model": lambda *args: None, "copy_bandwidth": lambda: 1.0, "bench_latency": measure}.items():
        monkeypatch.setattr(bench, name, result)
    assert list(bench.latency(argparse.Namespace(model="m", context=[1, 3, 2]))) == [{"context": 1}, {"context": 2}]
    assert capsys.readouterr().err == "3 tokens: does not fit\n"


@pytest.mark.parametrize(("words", "message"), [
    ("decode --shapes 1", "argument --shapes: '1' is not batch x context"),
    ("decode --shapes 1x2x3", "argument --shapes: '1x2x3' is not batch x context"),
    ("speculate --shapes 0x5", "argument --shapes: '0x5' is not batch x context"),
    ("speculate --k 0", "argument --k: 0 is out of range; it must be at least 1"),
    ("attention --cases 1x2", "argument --cases: '1x2' is not batch x context x sparsity"),
    ("prefill --context few", "argument --context: invalid int value: 'few'"),
    ("ragged --sparsity nan", "argument --sparsity: nan is out of range"),
    ("decode --json pyproject.toml/rows.json", "--json pyproject.toml/rows.json cannot be written"),
    ("decode --json /proc/self/rows.json", "--json /proc/self/rows.json cannot be written"),
])
def test_mistakes(words: str, message: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", ["bench.py", *words.split()])
    with pytest.raises(UserError) as raised:
        bench.main()
    assert str(raised.value).startswith(message)
