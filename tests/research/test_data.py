"""Training sequences: stretches that do not overlap, files that cannot be read."""
from pathlib import Path

import pytest
import torch

from hashfast.common import UserError
from hashfast.research.data import DataConfig, book_sequences, make_sequences, read_texts


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
