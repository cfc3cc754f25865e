"""The command train_hash: what it writes is what loads, an interrupted run goes on, mistakes in one line."""
import copy
import random
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from conftest import Ran

from hashfast import train_hash
from hashfast.hash_attention import HashConfig
from hashfast.research import recall, training
from hashfast.runtime.checkpoint import load_model
from hashfast.runtime.signatures import load_signatures, random_encoders, save_signatures

WORDS = "river stone cloud lamp table window garden winter letter captain silver morning forest answer bread".split()


@pytest.fixture
def train(in_process: Callable[..., Ran], tiny_checkpoint: Path, tmp_path: Path) -> Callable[..., Ran]:
    """train(out, flag, ...) trains for a few steps on two texts, on the CPU."""
    rng = random.Random(0)
    for name in ("one.txt", "two.txt"):
        (tmp_path / name).write_text(" ".join(" ".join(rng.choices(WORDS, k=8)).capitalize() + "." for _ in range(100)))
    return lambda out, *flags: in_process(
        train_hash.main, "train_hash.py", "--checkpoint_path", tiny_checkpoint, "--data", tmp_path / "*.txt", "--out", out,
        "--device", "cpu", "--precision", "float32", "--context", 480, "--sequences", 4, "--needles", 0.5, "--steps", 3,
        "--sink", 4, "--recent", 8, *flags)


def test_command_writes_what_loads(tiny_checkpoint: Path, tmp_path: Path, train) -> None:
    out = tmp_path / "new" / "signatures.safetensors"
    ran = train(out)
    assert ran.code == 0, ran.err
    encoders, about = load_signatures(out, load_model(tiny_checkpoint).fingerprint())
    assert len(encoders) == 2 and encoders[0].config == HashConfig()
    assert (about["recipe"], about["needles"], about["data"], about["seed"]) == ("listwise", 2, ["one.txt", "two.txt"], 0)
    for kind in ("books", "needles"):
        layers = about["held_out"]["mass"][kind]
        assert len(layers) == 2
        assert all(0 < share["window"] <= share["trained"] <= share["oracle"] + 1e-6 for share in layers)
    printed = [line.split() for line in ran.out.splitlines()]
    assert printed[1][:3] == ["layer", "books:", "window,"] and [line[0] for line in printed[2:5]] == ["0", "1", "mean"]


def test_recall_is_of_what_the_file_holds(tiny_checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
                                          train) -> None:
    measured = []
    layer_recall = recall.layer_recall
    monkeypatch.setattr(recall, "layer_recall", lambda encoders, *rest: measured.append(
        copy.deepcopy(encoders["trained"])) or layer_recall(encoders, *rest))
    out = tmp_path / "out.safetensors"
    train(out, "--depth", 2, "--hidden", 24, "--needles", 0)
    encoders, _ = load_signatures(out, load_model(tiny_checkpoint).fingerprint())
    assert encoders[0].config == HashConfig(depth=2, hidden=24) and encoders[0].key[0].weight.shape == (2, 8, 24)
    for ours, held in zip(measured, encoders, strict=True):
        assert all(torch.equal(ours.state_dict()[name], tensor) for name, tensor in held.state_dict().items())


def test_calibration_leaves_signatures_as_they_are(tiny_checkpoint: Path, tmp_path: Path, train) -> None:
    out, fingerprint = tmp_path / "out.safetensors", load_model(tiny_checkpoint).fingerprint()
    save_signatures(out, random_encoders(HashConfig(bits=64), fingerprint, 5), fingerprint, {"recipe": "mine"})
    train(out, "--calibrate", "--needles", 0)
    encoders, about = load_signatures(out, fingerprint)
    for ours, theirs in zip(encoders, random_encoders(HashConfig(bits=64), fingerprint, 5), strict=True):
        assert torch.equal(ours.key[0].weight, theirs.key[0].weight.half().float())
    # 480 / 8 leaves no second unit to choose
    assert about["recipe"] == "mine" and about["budgets"] == {} and len(about["held_out"]["mass"]["books"]) == 2


def test_layers_left_out_stay_random(tiny_checkpoint: Path, tmp_path: Path, train) -> None:
    out = tmp_path / "signatures.safetensors"
    train(out, "--layers", 1, "--needles", 0, "--bits", 64)
    model = load_model(tiny_checkpoint).fingerprint()
    encoders, about = load_signatures(out, model)
    untrained = random_encoders(HashConfig(bits=64), model, 0)
    assert torch.equal(encoders[0].key[0].weight, untrained[0].key[0].weight.half().float())
    assert not torch.equal(encoders[1].key[0].weight, untrained[1].key[0].weight.half().float())
    assert list(about["held_out"]["mass"]) == ["books"] and about["layers"] == [1]


def test_an_interrupted_run_goes_on_and_ends_the_same(tiny_checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
                                                      train) -> None:
    whole, out = tmp_path / "whole.safetensors", tmp_path / "out.safetensors"
    finished = tmp_path / "out.safetensors.partial" / "0.safetensors"
    train(whole)

    seeds = []
    train_layer = training.train_layer

    def interrupted(*args: object) -> tuple:
        seeds.append(args[-1].seed)
        if len(seeds) == 2:
            raise KeyboardInterrupt
        return train_layer(*args)

    monkeypatch.setattr(training, "train_layer", interrupted)
    assert train(out).code == 130 and list(finished.parent.iterdir()) == [finished] and not out.exists()

    ran = train(out)
    assert ran.code == 2 and f"{finished.parent} holds the finished layers of an interrupted run; give --resume" in ran.err
    ran = train(out, "--steps", 4, "--resume")
    assert ran.code == 2 and "is of a run with steps 3, not 4; give the same arguments" in ran.err
    assert finished.exists() and seeds == [0, 1]

    assert train(out, "--resume").code == 0
    assert seeds == [0, 1, 1] and not finished.parent.exists()
    fingerprint = load_model(tiny_checkpoint).fingerprint()
    (ours, about), (theirs, expected) = load_signatures(out, fingerprint), load_signatures(whole, fingerprint)
    for a, b in zip(ours, theirs, strict=True):
        assert all(torch.equal(a.state_dict()[name], tensor) for name, tensor in b.state_dict().items())
    assert [about[key] for key in ("held_out", "budgets")] == [expected[key] for key in ("held_out", "budgets")]


@pytest.mark.parametrize("flags, words", [
    (("--sequences", "0"), "--sequences must be at least 1"),
    (("--steps", "0"), "--steps must be at least 1"),
    (("--needles", "1.5"), "--needles must be 0 to 1"),
    (("--recent", "0"), "--recent at least 1"),
    (("--context", "100"), "too few tokens to choose among"),
    (("--context", "1024"), "over the model's 512"),
    (("--layers", "2"), "--layers 2 is not a layer"),
    (("--bits", "48"), "signature bits must be"),
    (("--query_bits", "9"), "query_bits must be"),
    (("--depth", "4"), "encoder depth must be"),
    (("--hidden", "64"), "--hidden is the width of inner layers"),
    (("--depth", "2", "--hidden", "0"), "width of inner layers must be at least 1"),
    (("--data", "nowhere/*.txt"), "names no file"),
    (("--data", "."), "cannot read"),
    (("--seed", "-1"), "--seed must be 0 to"),
    (("--out", "."), "--out . cannot be written"),
    (("--out", "train_hash.py/x"), "--out train_hash.py/x cannot be written"),
    (("--sequences", "50", "--needles", "0"), "is too short"),
    (("--checkpoint_path", "nowhere"), "nowhere"),
    (("--device", "abacus"), "abacus"),
])
def test_mistakes_are_one_line(tmp_path: Path, train, flags: tuple[str, ...], words: str) -> None:
    ran = train(tmp_path / "out", *flags)
    assert ran.code == 2 and not (tmp_path / "out").exists()
    printed = ran.err.strip().splitlines()[-1]
    assert printed.startswith("error: ") and words in printed
