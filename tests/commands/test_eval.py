"""The command eval: its flags, the rows it writes, mistakes in one line. What it measures is tested in tests/research."""
import json
from collections.abc import Callable
from pathlib import Path

import pytest
from conftest import Ran
from eval_inputs import PROSE

from hashfast.commands import eval


@pytest.fixture
def run(in_process: Callable[..., Ran], tiny_checkpoint: Path, tmp_path: Path) -> Callable[..., Ran]:
    """run(subcommand, flag, ...) with a text and a context of 160 tokens, on the CPU."""
    def start(subcommand: str, *flags: object) -> Ran:
        (tmp_path / "prose.txt").write_text(PROSE)
        own = {"ppl": ["--last", 12], "recall": ["--last", 12]}.get(subcommand, [])
        own += [] if subcommand == "grid" else ["--context", 160]
        return in_process(eval.main, "hashfast eval", subcommand, "--checkpoint_path", tiny_checkpoint, "--device", "cpu",
                          "--data", tmp_path / "prose.txt", "--sink", 4, "--recent", 8, *own, *flags)
    return start


@pytest.mark.parametrize("subcommand, flags, rows", [
    ("ppl", ("--dense_layers", 1), [("dense", 1), ("oracle", 4), ("oracle", 8)]),
    ("needles", ("--context", 480, "--tasks", "single", "--samples", 1), [("dense", 1), ("oracle", 4), ("oracle", 8)]),
    ("grid", ("--contexts", 480, "--depths", 50, "--samples", 1), [("dense", 1), ("oracle", 4), ("oracle", 8)]),
    ("recall", ("--top", 10), [("oracle", 4), ("oracle", 8)])])
def test_rows_are_written(subcommand: str, flags: tuple, rows: list[tuple], run, tmp_path: Path) -> None:
    path = tmp_path / "rows.json"
    ran = run(subcommand, "--selector", "oracle", "--ratios", 4, 8, *flags, "--json", path)
    assert ran.code == 0, ran.err
    result = json.loads(path.read_text())
    assert [(row["selector"], row["ratio"]) for row in result["rows"]] == rows
    assert result["command"].startswith(f"python -m hashfast eval {subcommand} --checkpoint_path")
    assert {row["dense_layers"] for row in result["rows"]} == {1 if subcommand == "ppl" else 0}
    assert len(ran.out.splitlines()) == len(rows)
    assert path.with_suffix(".png").exists() == (subcommand in ("grid", "recall"))


@pytest.mark.parametrize("arguments, message", [
    (["ppl", "--context", "100000"], "--context 100000"), (["ppl", "--ratios", "0"], "--ratios 0"),
    (["ppl", "--last", "160"], "--last 160"), (["ppl", "--windows", "0"], "--windows 0"),
    (["ppl", "--kinds", "code=package:json"], "not allowed with argument --data"),
    (["recall", "--selector", "dense", "--ratios", "8"], "besides dense"), (["needles", "--samples", "0"], "--samples 0"),
    (["ppl", "--selector", "magic"], "magic"),
    (["ppl", "--last", "2", "--context", "8"], "are more than --context 8"), (["ppl", "--batch_size", "0"], "--batch_size 0"),
    (["ppl", "--json", "pyproject.toml/rows.json"], "--json pyproject.toml/rows.json cannot be written"),
    (["grid", "--depths", "0", "101"], "--depths 0 101"),
    (["grid", "--contexts", "480", "8192", "--selector", "dense"], "--context 8192"),
    (["ppl"], "--selector hash and hash_calibrated need --signatures")])
def test_mistakes_are_one_line_and_exit_2(arguments: list[str], message: str, run) -> None:
    ran = run(*arguments)
    assert ran.code == 2 and ran.out == ""
    assert ran.err.startswith("error: ") and message in ran.err and ran.err.count("\n") == 1
