"""Mistakes on bench's command line. What it measures is tested in tests/research and needs a GPU."""
import sys

import pytest

from hashfast.commands import bench
from hashfast.common import UserError


@pytest.mark.parametrize(("words", "message"), [
    ("decode --shapes 1", "argument --shapes: '1' is not batch x context"),
    ("decode --shapes 1x2x3", "argument --shapes: '1x2x3' is not batch x context"),
    ("speculate --shapes 0x5", "argument --shapes: '0x5' is not batch x context"),
    ("speculate --k 0", "argument --k: 0 is out of range; it must be at least 1"),
    ("attention --cases 1x2", "argument --cases: '1x2' is not batch x context x sparsity"),
    ("prefill --context few", "argument --context: invalid int value: 'few'"),
    ("ragged --sparsity nan", "argument --sparsity: nan is out of range"),
    ("transformers --implementation eager", "argument --implementation: invalid choice: 'eager'"),
    ("decode --quantize int8 --checkpoint_path somewhere", "--quantize is of random weights"),
    ("decode --json pyproject.toml/rows.json", "--json pyproject.toml/rows.json cannot be written"),
    ("decode --json /proc/self/rows.json", "--json /proc/self/rows.json cannot be written"),
])
def test_mistakes(words: str, message: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", ["hashfast bench", *words.split()])
    with pytest.raises(UserError) as raised:
        bench.main()
    assert str(raised.value).startswith(message)
