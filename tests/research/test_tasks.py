"""Tasks: every row has its fields, full budgets lose nothing, answers are scored as they should be."""
import json
import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from eval_inputs import CONTEXT, PROSE, config, make_files

from hashfast.common import UserError
from hashfast.names import SELECTORS
from hashfast.research import evaluator as evaluator_module
from hashfast.research.evaluator import DecodeEvaluator
from hashfast.research.needles import TASKS, Needle
from hashfast.research.tasks import (
    grid,
    make_question,
    needles,
    paired_interval,
    ppl,
    score_answers,
    tokenize_needle,
)
from hashfast.runtime.tokenizer import Tokenizer


@pytest.fixture(scope="module")
def files(tiny_checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    return make_files(tiny_checkpoint, tmp_path_factory.mktemp("tasks"))


def test_ppl_rows_and_a_whole_budget_loses_nothing(files: dict[str, Path]) -> None:
    rows = list(ppl(config(files, selectors=SELECTORS, ratios=(1, 4)), {"all": {"prose": PROSE}}, last=12))
    assert len(rows) == 1 + 2 * (len(SELECTORS) + 1)  # dense once; hash and hash_calibrated from two files
    fields = {"model", "context", "selector", "recipe", "bits", "query_bits", "share", "ratio", "budget", "bytes_per_token",
              "ppl_ratio", "per_text"}
    for row in rows:
        assert fields <= row.keys() and json.dumps(row)
        if row["ratio"] == 1:
            assert row["ppl_ratio"] == pytest.approx(1, abs=1e-5), row["selector"]
            assert row["kl"] < 1e-6 and row["agreement"] == 1
        else:
            assert row["budget"] == CONTEXT // 4 and abs(row["ppl_ratio"] - 1) > 1e-6 and row["kl"] > 1e-4
    hashes = [(row["recipe"], row["bits"], row["query_bits"], row["share"]) for row in rows if row["selector"] == "hash"]
    assert hashes[::2] == [("kv", 32, 4, "kv"), ("query", 32, 1, "query")]


def test_ppl_is_that_of_each_text_alone(files: dict[str, Path]) -> None:
    """Three texts two at a time: what each loses is what it loses alone."""
    given = config(files, selectors=("hash", "quest"), ratios=(4,), batch_size=2)
    texts = {f"part{i}": PROSE[30 * i:] for i in range(3)}
    together = list(ppl(given, {"all": texts}, last=12))
    for name, text in texts.items():
        for row, whole in zip(ppl(replace(given, batch_size=1), {"all": {name: text}}, last=12), together, strict=True):
            assert row["per_text"][name] == pytest.approx(whole["per_text"][name], abs=1e-4)
            for key, values in row["per_window"][name].items():
                assert values == pytest.approx(whole["per_window"][name][key], abs=1e-4)
    assert together[0]["per_text"].keys() == texts.keys() and len({*together[1]["per_text"].values()}) == 3


def test_windows_of_kinds(files: dict[str, Path]) -> None:
    """"all" comes first; a kind's figures are the means of its windows; a text that is short gives fewer of them."""
    given = config(files, selectors=("oracle",), ratios=(8,), batch_size=2)
    kinds = {"novels": {"a": PROSE[:2 * CONTEXT], "b": PROSE[900:900 + CONTEXT]}, "code": {"c": PROSE[::-1]}}
    rows = list(ppl(given, kinds, last=6, most=2))
    assert [(row["kind"], row["selector"], row["windows"]) for row in rows] == [
        (kind, name, count) for kind, count in (("all", 5), ("novels", 3), ("code", 2)) for name in ("dense", "oracle")]
    whole, novels, code = rows[1::2]
    assert [*whole["per_window"]] == ["a", "b", "c"] and [*novels["per_text"]] == ["a", "b"]
    for row in (whole, novels, code):
        values = {key: [x for figures in row["per_window"].values() for x in figures[key]]
                  for key in ("ppl_ratio", "kl", "agreement")}
        for key in ("kl", "agreement"):
            assert row[key] == pytest.approx(sum(values[key]) / row["windows"], abs=1e-5)
        assert math.log(row["ppl_ratio"]) == pytest.approx(sum(map(math.log, values["ppl_ratio"])) / row["windows"], abs=1e-5)
        for key in ("ratio", "kl", "agreement"):
            low, high = row[f"{key}_interval"]
            assert low - 1e-9 <= row["ppl_ratio" if key == "ratio" else key] <= high + 1e-9
    assert whole["kl"] == pytest.approx((3 * novels["kl"] + 2 * code["kl"]) / 5)


def test_needle_rows(files: dict[str, Path]) -> None:
    given = config(files, selectors=("oracle",), ratios=(1, 8), context=480, batch_size=2)
    rows = list(needles(given, [files["text"]], ["single", "multi_value"], samples=3))
    assert [(row["task"], row["selector"], row["ratio"]) for row in rows] == [
        (task, selector, ratio) for task in ("single", "multi_value")
        for selector, ratio in (("dense", 1), ("oracle", 1), ("oracle", 8))]
    for row in rows:
        assert row.keys() >= {"model", "context", "task", "selector", "recipe", "bits", "ratio", "exact", "samples", "nll",
                              "bytes_per_token", "nll_interval"}
        low, high = row["nll_interval"]
        assert low - 1e-6 <= row["nll_difference"] <= high + 1e-6 and row["samples"] == len(row["per_sample"]) == 3
        if row["ratio"] == 1:
            assert row["nll_difference"] == pytest.approx(0, abs=1e-4)


@pytest.mark.parametrize("task", TASKS)
def test_questions_are_split_where_their_parts_begin(files: dict[str, Path], task: str) -> None:
    evaluator = DecodeEvaluator(config(files), 1)
    question = make_question(evaluator, [files["text"]], task, 500, 0)
    decode = evaluator.tokenizer.decode
    end = len(question.ids) - question.answer
    assert 350 < len(question.ids) <= 500 - 8  # a line of uuids has 85
    assert decode(question.ids[end:].tolist()) == question.needle.answer
    assert decode(question.ids[:question.context].tolist()).strip().endswith(question.needle.context[-30:])
    asked = decode(question.ids[question.context:end].tolist())
    assert asked.startswith("\n\nQuestion: ") and asked.endswith(question.needle.question.split("\nAnswer: ")[1])


def test_without_a_chat_template_the_text_is_read_as_it_is(checkpoint_copy: Callable[..., Path]) -> None:
    folder = checkpoint_copy()
    (folder / "tokenizer_config.json").write_text("{}")
    tokenizer = Tokenizer.load(folder)
    needle = Needle("single", "The sky is blue.", "\n\nQuestion: Which colour?\nAnswer: It is", ("blue",))
    question = tokenize_needle(tokenizer, needle)
    assert tokenizer.decode(question.ids.tolist()) == needle.text
    assert (question.context, question.answer) == (len(needle.context), len(needle.answer))


class Stub:
    """An evaluator whose model finds `says` likeliest at each place of the answer, and then `goes_on`."""

    def __init__(self, tokenizer: Tokenizer, says: list[str], goes_on: str) -> None:
        self.tokenizer = tokenizer
        self.says, self.goes_on = [tokenizer.encode(text) for text in says], tokenizer.encode(goes_on)

    def score(self, run: None, texts: list[torch.Tensor], starts: list[int], last: int) -> tuple[torch.Tensor, torch.Tensor]:
        likeliest = torch.full((len(texts), last), -1)
        scores = torch.full((len(texts), last), -1000.0)  # of what is no answer
        for row, (text, says) in enumerate(zip(texts, self.says, strict=True)):
            likeliest[row, -len(says):] = torch.tensor(says)
            scores[row, -len(says):] = torch.where(likeliest[row, -len(says):] == text[-len(says):], -0.5, -2.0)
        return scores, likeliest

    def continue_greedily(self, run: None, tokens: list[int], lengths: list[int], count: int) -> list[list[int]]:
        self.asked = tokens, lengths
        return [self.goes_on[:count]] * len(tokens)


@pytest.mark.parametrize("says, goes_on, exact", [
    (" 12, 34", "never asked", True), (" 12, 35", " 34 and 12", True), (" 12, 35", " 12, 35", False),
    (" 12, 35", " 12<|im_end|>34", False), (" 12, 35", " 12" + "." * 20 + "34", False)])
def test_scores_of_answers(tiny_checkpoint: Path, says: str, goes_on: str, exact: bool) -> None:
    """Beside a question with a longer answer, which never comes out right."""
    tokenizer = Tokenizer.load(tiny_checkpoint)
    asked = [Needle("multi_value", "12 34", "\n\nQuestion: Which?\nAnswer: It is", answers)
             for answers in (("12", "34"), ("56", "7" * 40))]
    questions = [tokenize_needle(tokenizer, needle) for needle in asked]
    stub = Stub(tokenizer, [says, " " * questions[1].answer], goes_on)
    (found, nll), (other, other_nll) = score_answers(stub, None, questions)
    wrong = sum(a != b for a, b in zip(says, " 12, 34", strict=True))
    assert found is exact and nll == pytest.approx((0.5 * (7 - wrong) + 2 * wrong) / 7)
    assert other is False and other_nll == pytest.approx((0.5 * 2 + 2 * 43) / 45)  # its two spaces are right
    ends = [len(question.ids) - question.answer - 1 for question in questions]
    assert stub.asked == (tokenizer.encode("s") * 2, ends)


def test_a_text_is_read_once_for_all_documents(files: dict[str, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    read = []
    monkeypatch.setattr(evaluator_module, "read_text", lambda path: read.append(path) or PROSE)
    evaluator = DecodeEvaluator(config(files, selectors=("dense",)), 2)
    for i in range(3):
        make_question(evaluator, [files["text"]], "single", 480, i)
    assert read == [files["text"]]


def test_paired_interval() -> None:
    assert paired_interval(torch.full((8,), 0.25), 0) == [0.25, 0.25]
    values = torch.randn(400, generator=torch.Generator().manual_seed(0))
    wanted = values.mean() + values.std() / 20 * torch.tensor([-1.96, 1.96])
    torch.testing.assert_close(torch.tensor(paired_interval(values, 0)), wanted, rtol=0, atol=0.01)


def test_grid(files: dict[str, Path], tmp_path: Path) -> None:
    given = config(files, selectors=("hash",), signatures=(files["kv"],), ratios=(8,), batch_size=4)
    rows = list(grid(given, [files["text"]], [480, 420], [0, 60, 100], samples=1, plot=tmp_path / "grid.png"))
    assert (tmp_path / "grid.png").read_bytes().startswith(b"\x89PNG")
    places = [(context, depth, name) for context in (420, 480) for depth in (0, 60, 100) for name in ("dense", "hash")]
    assert [(row["context"], row["depth"], row["selector"]) for row in rows] == places
    assert {row["budget"] for row in rows if row["selector"] == "hash"} == {math.ceil(420 / 8), 480 // 8}
    for row in rows:
        assert row.keys() >= {"model", "ratio", "exact", "samples", "nll"} and row["samples"] == 1
    assert len({row["nll"] for row in rows if row["selector"] == "dense"}) == 6


def test_a_context_that_is_too_long_is_refused_before_the_shorter_ones(files: dict[str, Path]) -> None:
    rows = grid(config(files, selectors=("dense",)), [files["text"]], [480, 8192], [0], samples=1)
    with pytest.raises(UserError, match="--context 8192 is more than the model's 512"):
        next(rows)
