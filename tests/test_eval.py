"""Quality measurements: every row has its fields, full budgets lose nothing, needles are scored as they should be."""
import json
import math
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

import eval
from eval import Judge, Question, judge_answer, make_questions, paired_interval, parse_options, tokenize_needle
from hash_attention import HashConfig, random_encoders, save_signatures
from model import Attention, SparseSettings
from needles import TASKS, Needle
from token_selectors import SELECTORS

CONTEXT, SINK, RECENT = 320, 4, 8
PROSE = " ".join(f"Line {i} tells of {i * 7919 % 97} boats." for i in range(60))


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> Iterator[None]:
    """The model is so small that on a busy machine threads wait for each other most of the time."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def files(tiny_checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("eval")
    (folder / "prose.txt").write_text(PROSE)
    from checkpoint import load_model
    fingerprint = load_model(tiny_checkpoint, "cpu", torch.float32).fingerprint()
    for name, config in {"kv": HashConfig(), "query": HashConfig(query_bits=1, depth=2, share="query")}.items():
        save_signatures(folder / f"{name}.safetensors", random_encoders(config, fingerprint, 1), fingerprint, {"recipe": name})
    return {"model": tiny_checkpoint, "text": folder / "prose.txt", "kv": folder / "kv.safetensors",
            "query": folder / "query.safetensors"}


def options(files: dict[str, Path], command: str, *more: str):
    last = [] if command == "needles" else ["--last", "12"]
    return parse_options([command, "--checkpoint_path", str(files["model"]), "--data", str(files["text"]), "--device", "cpu",
                          "--signatures", str(files["kv"]), str(files["query"]), "--context", str(CONTEXT),
                          "--sink", str(SINK), "--recent", str(RECENT), *last, *more])


def test_ppl_rows_and_a_whole_budget_loses_nothing(files: dict[str, Path]) -> None:
    rows = list(eval.ppl(options(files, "ppl", "--selector", *SELECTORS, "--ratios", "1", "8")))
    assert len(rows) == 1 + 2 * len(SELECTORS)  # dense once, hash from two files
    fields = {"model", "context", "selector", "recipe", "bits", "query_bits", "share", "ratio", "budget", "bytes_per_token",
              "ppl_ratio", "per_text"}
    for row in rows:
        assert fields <= row.keys() and json.dumps(row)
        if row["ratio"] == 1:
            assert row["ppl_ratio"] == pytest.approx(1, abs=1e-5), row["selector"]
        else:
            assert row["budget"] == CONTEXT // 8 and abs(row["ppl_ratio"] - 1) > 1e-6
    hashes = [(row["recipe"], row["bits"], row["query_bits"], row["share"]) for row in rows if row["selector"] == "hash"]
    assert hashes[::2] == [("kv", 32, 4, "kv"), ("query", 32, 1, "query")]


def test_hash_is_what_the_model_itself_decodes(files: dict[str, Path]) -> None:
    judge = Judge(options(files, "ppl", "--selector", "hash", "--ratios", "8"))
    judge.prepare()
    ids = next(iter(judge.texts().values()))
    judge.read(ids[:-10])
    found = judge.decode(judge.runs[1], ids, len(ids) - 10)
    encoders = [layer.encoder for layer in judge.methods[1].layers]
    for attention in judge.attentions:
        attention.__class__ = Attention
    judge.model.setup_caches(1, CONTEXT, encoders, SparseSettings(CONTEXT // 8, SINK, RECENT))
    for part, wanted in zip(range(len(ids) - 10, len(ids)), found, strict=True):
        if part == len(ids) - 10:
            eval.prefill(judge.model, ids[:part], 1)
        with torch.inference_mode():
            logits = judge.model(ids[None, part:part + 1], torch.tensor([part + 1], dtype=torch.int32))[0, 0]
        torch.testing.assert_close(logits, wanted, rtol=1e-4, atol=1e-4)


def test_one_prefill_serves_all_runs_in_any_order(files: dict[str, Path]) -> None:
    judge = Judge(options(files, "ppl", "--selector", *SELECTORS, "--ratios", "8"))
    judge.prepare()
    ids = next(iter(judge.texts().values()))
    judge.read(ids[:-20])
    first = [judge.decode(run, ids, len(ids) - 20) for run in judge.runs]
    for run, logits in reversed(list(zip(judge.runs, first, strict=True))):
        assert torch.equal(judge.decode(run, ids, len(ids) - 20), logits), run


def test_needle_rows(files: dict[str, Path]) -> None:
    given = options(files, "needles", "--selector", "oracle", "streaming", "--ratios", "1", "8", "--context", "480",
                    "--samples", "2", "--tasks", "single", "multi_value")
    rows = list(eval.needles(given))
    assert [(row["task"], row["selector"], row["ratio"]) for row in rows[:5]] == [
        ("single", "dense", 1), ("single", "oracle", 1), ("single", "oracle", 8), ("single", "streaming", 1),
        ("single", "streaming", 8)]
    for row in rows:
        assert row.keys() >= {"model", "context", "task", "selector", "recipe", "bits", "ratio", "exact", "samples", "nll",
                              "bytes_per_token", "nll_interval"}
        low, high = row["nll_interval"]
        assert low - 1e-6 <= row["nll_difference"] <= high + 1e-6 and row["samples"] == 2
        if row["ratio"] == 1:
            assert row["nll_difference"] == pytest.approx(0, abs=1e-4)


@pytest.mark.parametrize("task", TASKS)
def test_questions_are_split_where_their_parts_begin(files: dict[str, Path], task: str) -> None:
    judge = Judge(options(files, "needles", "--samples", "1", "--context", "500"))
    question = next(make_questions(judge, task))
    decode = judge.tokenizer.decode
    end = len(question.ids) - question.answer
    assert 350 < len(question.ids) <= 500 - 8  # a line of uuids has 85
    assert decode(question.ids[end:].tolist()) == question.needle.answer
    assert decode(question.ids[:question.context].tolist()).strip().endswith(question.needle.context[-30:])
    asked = decode(question.ids[question.context:end].tolist())
    assert asked.startswith("\n\nQuestion: ") and asked.endswith(question.needle.question.split("\nAnswer: ")[1])


def test_without_a_chat_template_the_text_is_read_as_it_is(files: dict[str, Path]) -> None:
    judge = Judge(options(files, "needles"))
    judge.tokenizer._chat_template = None
    needle = Needle("single", "The sky is blue.", "\n\nQuestion: Which colour?\nAnswer: It is", ("blue",))
    question = tokenize_needle(judge.tokenizer, needle)
    assert judge.tokenizer.decode(question.ids.tolist()) == needle.text
    assert (question.context, question.answer) == (len(needle.context), len(needle.answer))


class Stub:
    """A judge whose model says `says` with logit 5 at each place of the answer, and then `goes_on`."""

    def __init__(self, judge: Judge, says: str, goes_on: str) -> None:
        self.options, self.tokenizer = judge.options, judge.tokenizer
        self.says, self.goes_on = judge.tokenizer.encode(says), judge.tokenizer.encode(goes_on)

    def decode(self, run: None, ids: torch.Tensor, start: int) -> torch.Tensor:
        logits = torch.zeros(len(ids) - start, 259)
        for row, token in zip(logits[-len(self.says):], self.says, strict=True):
            row[token] = 5
        return logits

    def continue_greedily(self, run: None, last: torch.Tensor, length: int, count: int) -> list[int]:
        return self.goes_on[:count]


@pytest.mark.parametrize("says, goes_on, exact", [
    (" 12, 34", "never asked", True), (" 12, 35", " 34 and 12", True), (" 12, 35", " 12, 35", False),
    (" 12, 35", " 12<|im_end|>34", False), (" 12, 35", " 12" + "." * 20 + "34", False)])
def test_scores_of_an_answer(files: dict[str, Path], says: str, goes_on: str, exact: bool) -> None:
    judge = Judge(options(files, "needles"))
    needle = Needle("multi_value", "12 34", "\n\nQuestion: Which?\nAnswer: It is", ("12", "34"))
    question = tokenize_needle(judge.tokenizer, needle)
    found, nll = judge_answer(Stub(judge, says, goes_on), None, question)
    right = sum(a == b for a, b in zip(says, " 12, 34", strict=True))
    norm = math.log(math.exp(5) + 258)
    assert found is exact and nll == pytest.approx(norm - 5 * right / 7, rel=1e-5)


def test_paired_interval() -> None:
    assert paired_interval(torch.full((8,), 0.25), 0) == [0.25, 0.25]
    values = torch.randn(400, generator=torch.Generator().manual_seed(0))
    wanted = values.mean() + values.std() / 20 * torch.tensor([-1.96, 1.96])
    torch.testing.assert_close(torch.tensor(paired_interval(values, 0)), wanted, rtol=0, atol=0.01)


def test_recall(files: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("matplotlib")
    given = options(files, "recall", "--selector", *SELECTORS, "--ratios", "1", "8", "--last", "6", "--top", "10",
                    "--json", str(tmp_path / "recall.json"))
    monkeypatch.setattr(eval, "parse_options", lambda: given)
    eval.main()
    rows = json.loads((tmp_path / "recall.json").read_text())["rows"]
    assert (tmp_path / "recall.png").read_bytes().startswith(b"\x89PNG")
    assert len(rows) == 2 * len(SELECTORS)
    mass = {(row["selector"], row["recipe"]): torch.tensor(row["mass_by_head"]) for row in rows if row["ratio"] == 8}
    oracle = mass.pop(("oracle", None))
    assert oracle.shape == (2, 2)
    for name, share in mass.items():
        assert (share <= oracle + 1e-6).all(), name
        if name[0] not in ("oracle_group",) and name[1] != "query" and name[0] not in ("quest", "double_sparsity"):
            assert (share <= mass["oracle_group", None] + 1e-6).all(), name
    for row in rows:
        if row["ratio"] == 1:
            assert row["mass"] == pytest.approx(1, abs=1e-5) and row["recall"] == pytest.approx(1)
        if row["selector"] == "oracle":
            assert row["recall"] == pytest.approx(1)


@pytest.mark.parametrize("arguments, message", [
    (["ppl", "--context", "100000"], "--context 100000"), (["ppl", "--ratios", "0"], "--ratios 0"),
    (["ppl", "--last", "320"], "--last 320"), (["recall", "--selector", "dense"], "besides dense"),
    (["needles", "--samples", "0"], "--samples 0"), (["ppl", "--selector", "magic"], "magic"),
    (["ppl", "--last", "2", "--context", "8"], "are more than --context 8")])
def test_mistakes(files: dict[str, Path], arguments: list[str], message: str) -> None:
    with pytest.raises(eval.UserError, match=message):
        given = options(files, *arguments)
        list(given.run(given))


def test_mistakes_are_one_line_and_exit_2(files: dict[str, Path]) -> None:
    command = [sys.executable, eval.__file__, "ppl", "--checkpoint_path", files["model"], "--data", files["text"], "--context",
               str(CONTEXT), "--last", "8", "--device", "cpu"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 2 and done.stdout == ""
    assert done.stderr.startswith("error: --selector hash needs --signatures") and done.stderr.count("\n") == 1


def test_short_text(files: dict[str, Path]) -> None:
    given = options(files, "ppl", "--context", "500", "--ratios", "8")
    files["text"].with_name("short.txt").write_text("Too short.")
    given.data = [files["text"].with_name("short.txt")]
    with pytest.raises(eval.UserError, match="fewer than --context 500"):
        list(eval.ppl(given))


def test_the_files_row_order_is_the_tables(files: dict[str, Path]) -> None:
    runs = Judge(options(files, "ppl", "--selector", "quest", "dense", "quest", "--ratios", "16", "32")).runs
    assert [(run.method.selector, run.ratio, run.budget) for run in runs] == [
        ("dense", 1, CONTEXT), ("quest", 16, 20), ("quest", 32, SINK + RECENT)]


def test_question_is_immutable() -> None:
    with pytest.raises(AttributeError):
        Question(Needle("single", "", "", ()), torch.zeros(1), 0, 1).answer = 2
