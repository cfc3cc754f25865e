"""Of the latency measurements what needs no GPU: what the decode steps read, and what does not fit."""
import pytest
import torch

from hashfast import model as model_module
from hashfast.hash_attention import HashConfig
from hashfast.model import ModelArgs, PrefillSettings, SparseSettings, Transformer
from hashfast.research import latency
from hashfast.runtime.checkpoint import PRESETS, random_model
from hashfast.runtime.decode import Decoder, prefill
from hashfast.runtime.signatures import random_encoders

TINY = ModelArgs(2, 32, 4, 2, 8, 64, 50, 1e-5, 1e4, max_position=512)


def test_latency_measures_a_dense_and_a_sparse_step(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(PRESETS, "tiny", TINY)
    captured = []

    def prepare(decoder: Decoder) -> None:
        captured.append([(a.sparse is not None, a.encoder is not None) for a in (x.attention for x in decoder.model.layers)])

    monkeypatch.setattr(Decoder, "prepare", prepare)
    for name, result in {"release": None, "prepare_prefill": 0.0, "timed_prefill": (1, {"ttft_s": 2.0}), "median_ms": 3.0,
                         "random_prompt": None}.items():
        monkeypatch.setattr(latency, name, lambda *args, result=result: result)
    ways = [PrefillSettings(mode, 4, 16) for mode in ("dense", "hash")]
    rows = latency.bench_latency(random_model("tiny"), "tiny", 3000, 2.0, 4, ways, bandwidth=1.0, rate=1e9)
    assert captured == [[(False, False)] * 2, [(True, True)] * 2]
    assert [(row["attention"], row["prefill"], row["prefill_sparsity"], row["ttft_s"]) for row in rows] == [
        ("dense", "dense", 1, 2.0), ("hash", "hash", 4, 2.0)]
    for smaller in ("floor_ms", "floor_s", "pairs_read"):
        assert rows[0][smaller] > rows[1][smaller]
    assert rows[0]["pairs_read"] == 1


class Event:
    """In place of torch.cuda.Event: each takes a second."""
    now = 0

    def __init__(self, enable_timing: bool) -> None:
        pass

    def record(self) -> None:
        Event.now += 1
        self.at = Event.now

    def elapsed_time(self, end: "Event") -> float:
        return 1000.0 * (end.at - self.at)


def test_stages_of_a_prompt(monkeypatch: pytest.MonkeyPatch) -> None:
    """Attention in each layer and chunk, selection and gathering in those that read part of what is before them."""
    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    model = Transformer(TINY)
    attend = model_module.causal_attention
    model.setup_caches(1, 100, random_encoders(HashConfig(), model.fingerprint()), SparseSettings(32, 4, 8))
    ids = torch.randint(50, (100,))
    token, times = latency.timed_prefill(model, ids, PrefillSettings("hash", 8, 16, 4))
    assert times["attention_s"] == 2 * 7 and times["select_s"] == 2 * 2 * 4  # chunks at 32, 48, 64 and 80; two kernels
    assert token == prefill(model, ids, 1, settings=PrefillSettings("hash", 8, 16, 4)).argmax()
    _, times = latency.timed_prefill(model, ids, PrefillSettings(chunk=16))
    assert times["select_s"] == 0 and times["attention_s"] == 2 * 7
    assert model_module.causal_attention is attend


def test_flops_of_a_prompt() -> None:
    """As the table of dense prompts counted them."""
    with torch.device("meta"):
        model = Transformer(PRESETS["llama-3.1-8b"])
    flops = latency.prefill_flops(model, 32768, PrefillSettings())
    assert flops == pytest.approx(595.06e12 * 1.24173, rel=1e-4)
    dense, sparse = (latency.prefill_flops(model, 131072, PrefillSettings(mode)) for mode in ("dense", "hash"))
    assert 0.3 < sparse / dense < 0.45


def test_what_does_not_fit_is_left_out(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture) -> None:
    def measure(model: object, name: str, context: int, *rest: object) -> list[dict]:
        if context > 2:
            raise torch.OutOfMemoryError("too much")
        return [{"context": context}]

    for name, result in {"random_model": lambda *args: None, "copy_bandwidth": lambda: 1.0,
                         "matrix_rate": lambda: 1.0, "bench_latency": measure}.items():
        monkeypatch.setattr(latency, name, result)
    assert list(latency.latency_rows("m", [1, 3, 2], 32, 4, [])) == [{"context": 1}, {"context": 2}]
    assert capsys.readouterr().err == "3 tokens: does not fit\n"
