"""Training sequences: stretches that do not overlap, files that cannot be read."""
import json
from pathlib import Path

import pytest
import torch

from hashfast.common import UserError
from hashfast.research.data import DataConfig, book_sequences, make_sequences, read_kinds, read_texts


def test_some_of_each_kind_are_held_out() -> None:
    texts = {"a": " ".join(f"Sentence {i} is about nothing." for i in range(300))}
    training, held_out = make_sequences(texts, lambda text: [*text.encode()], DataConfig(480, 3, 0.34))
    assert [sequence.question > 0 for sequence in training] == [False, False, True]
    assert {kind: len(sequences) for kind, sequences in held_out.items()} == {"books": 2, "needles": 2}
    assert all(sequence.question for sequence in held_out["needles"])
    asked = bytes(training[2].ids[0, -training[2].question:].tolist()).decode()
    assert asked.startswith("\n\nQuestion: ") and "Answer: " in asked
    assert list(make_sequences(texts, lambda text: [*text.encode()], DataConfig(480, 3, 0))[1]) == ["books"]


def test_stretches_of_one_text_do_not_overlap() -> None:
    text = "".join(chr(0x4E00 + i) for i in range(4000))  # every character once
    sequences = book_sequences({"a": text, "b": text[::-1]}, lambda s: [ord(c) for c in s], 6, 100, seed=0)
    starts = [int(sequence.ids[0, 0]) for sequence in sequences]
    assert len(set(starts)) == 6
    seen = torch.cat([sequence.ids[0] for sequence in sequences[::2]])
    assert len(seen.unique()) == len(seen) == 300


def test_every_pattern_must_name_a_file(tmp_path: Path) -> None:
    (tmp_path / "a[1].txt").write_text("one")  # a name that is no glob of itself
    (tmp_path / "b.txt").write_text("two")
    assert list(read_texts([str(tmp_path / "a[1].txt"), str(tmp_path / "b*")]).values()) == ["one", "two"]
    with pytest.raises(UserError, match="c.txt names no file"):
        read_texts([str(tmp_path / "b.txt"), str(tmp_path / "c.txt")])


def test_text_that_is_not_utf8(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(UserError, match="a.txt: not UTF-8 at byte 0"):
        read_texts([str(tmp_path / "a.txt")])


def test_texts_of_kinds(tmp_path: Path) -> None:
    for name in ("b.txt", "a.txt", "p.txt"):
        (tmp_path / name).write_text(name)
    code = ["code=package:json", "code=package:email"]
    kinds = read_kinds([f"novels={tmp_path}/[ab].txt", f"plays={tmp_path}/p.txt", *code], 9000)
    assert kinds["novels"] == {"a": "a.txt", "b": "b.txt"} and kinds["plays"] == {"p": "p.txt"}
    assert [*kinds] == ["novels", "plays", "code"] and [*kinds["code"]] == ["json", "email"]
    files = sorted(Path(json.__path__[0]).rglob("*.py"))
    assert kinds["code"]["json"] == "".join(path.read_text() for path in files)[:9000] and len(files) > 2


@pytest.mark.parametrize("source, words", [
    ("novels", "is no KIND=GLOB"), ("all=a.txt", "is no KIND=GLOB"), ("x=no such*", "names no file"),
    ("x=package:no_such", "package:no_such is no package"), ("x=package:glob", "package:glob is no package")])
def test_kinds_that_give_nothing(source: str, words: str) -> None:
    with pytest.raises(UserError, match=words):
        read_kinds([source], 100)


def test_a_text_of_two_kinds() -> None:
    with pytest.raises(UserError, match="the text json twice"):
        read_kinds(["code=package:json", "other=package:json"], 100)
