"""Quality measurements: every row has its fields, full budgets lose nothing, needles are scored as they should be."""
import json
import math
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from hashfast.commands import eval
from hashfast.commands.eval import (
    DecodeEvaluator,
    Question,
    judge_answers,
    make_question,
    paired_interval,
    parse_options,
    tokenize_needle,
)
from hashfast.hash_attention import HashConfig
from hashfast.model import SparseSettings
from hashfast.research.needles import TASKS, Needle
from hashfast.research.selectors import SELECTORS
from hashfast.runtime.signatures import random_encoders, save_signatures

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
    from hashfast.runtime.checkpoint import load_model
    fingerprint = load_model(tiny_checkpoint, "cpu", torch.float32).fingerprint()
    for name, config in {"kv": HashConfig(), "query": HashConfig(query_bits=1, depth=2, share="query")}.items():
        heads = config.signature_heads(fingerprint.n_head, fingerprint.n_kv_head)
        about = {"recipe": name, "budgets": {"8": [[1.5] * heads, [0.5] * heads]}}
        save_signatures(folder / f"{name}.safetensors", random_encoders(config, fingerprint, 1), fingerprint, about)
    return {"model": tiny_checkpoint, "text": folder / "prose.txt", "kv": folder / "kv.safetensors",
            "query": folder / "query.safetensors"}


def options(files: dict[str, Path], command: str, *more: str):
    own = {"ppl": ["--last", "12"], "recall": ["--last", "12"], "needles": [], "grid": [], "lm": []}[command]
    own += [] if command == "lm" else ["--data", str(files["text"])]
    own += [] if command == "grid" else ["--context", str(CONTEXT)]
    return parse_options([command, "--checkpoint_path", str(files["model"]), "--device", "cpu", "--signatures",
                          str(files["kv"]), str(files["query"]), "--sink", str(SINK), "--recent", str(RECENT), *own, *more])


def ragged(judge: DecodeEvaluator) -> tuple[list[torch.Tensor], list[int]]:
    """Three texts of different lengths, and where their decoding starts: 19, 3 and 40 tokens before their last."""
    generator = torch.Generator().manual_seed(5)
    texts = [torch.randint(256, (length,), generator=generator) for length in (300, 171, 224)]
    return texts, [len(ids) - 1 - back for ids, back in zip(texts, (19, 3, 40), strict=True)]


def test_ppl_rows_and_a_whole_budget_loses_nothing(files: dict[str, Path]) -> None:
    rows = list(eval.ppl(options(files, "ppl", "--selector", *SELECTORS, "--ratios", "1", "8")))
    assert len(rows) == 1 + 2 * (len(SELECTORS) + 3)  # dense once; hash and three of its kind from two files
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


def test_ppl_is_that_of_each_text_alone(files: dict[str, Path]) -> None:
    """Three texts two at a time: what each loses is what it loses alone."""
    given = options(files, "ppl", "--selector", "hash", "quest", "--ratios", "8", "--batch_size", "2")
    given.data = [files["text"].with_name(f"part{i}.txt") for i in range(3)]
    for i, path in enumerate(given.data):
        path.write_text(PROSE[30 * i:])
    together = [row["per_text"] for row in eval.ppl(given)]
    paths, given.batch_size = given.data, 1
    for path in paths:
        given.data = [path]
        for row, whole in zip(eval.ppl(given), together, strict=True):
            assert row["per_text"][path.stem] == pytest.approx(whole[path.stem], abs=1e-4)
    assert together[0].keys() == {"part0", "part1", "part2"} and len(set(together[1].values())) == 3


def test_hash_is_what_the_model_itself_decodes(files: dict[str, Path]) -> None:
    judge = DecodeEvaluator(options(files, "ppl", "--selector", "hash", "--ratios", "8"), 1)
    judge.prepare()
    ids = next(iter(judge.texts().values()))
    start = len(ids) - 11
    judge.read([ids[:start]])
    found, likeliest = judge.score(judge.runs[1], [ids], [start], 10)
    encoders = [layer.encoder for layer in judge.methods[1].layers]
    for attention in judge.attentions:
        attention.selector = None
    judge.model.setup_caches(1, CONTEXT, encoders, SparseSettings(CONTEXT // 8, SINK, RECENT))
    eval.prefill(judge.model, ids[:start], 1)
    for i in range(10):
        at = start + i
        with torch.inference_mode():
            logits = judge.model(ids[None, at:at + 1], torch.tensor([at + 1], dtype=torch.int32))[0, 0]
        assert logits.log_softmax(-1)[ids[at + 1]].item() == pytest.approx(found[0, i].item(), abs=1e-4)
        assert logits.argmax() == likeliest[0, i]


def test_dense_scores_are_those_of_reading_the_text(files: dict[str, Path]) -> None:
    """Each likelihood against a prefill of all that comes before its token, for texts of different lengths."""
    judge = DecodeEvaluator(options(files, "ppl", "--selector", "dense"), 3)
    judge.prepare()
    texts, starts = ragged(judge)
    judge.read([ids[:start] for ids, start in zip(texts, starts, strict=True)])
    scores, likeliest = judge.score(judge.runs[0], texts, starts, 3)
    judge.model.setup_caches(1, CONTEXT)
    for ids, score, tokens in zip(texts, scores, likeliest, strict=True):
        for back in (3, 2, 1):
            logits = eval.prefill(judge.model, ids[:-back], 1).log_softmax(-1)
            assert score[-back].item() == pytest.approx(logits[ids[-back]].item(), abs=1e-4)
            assert tokens[-back] == logits.argmax()


def test_a_ragged_batch_is_what_each_text_is_alone(files: dict[str, Path]) -> None:
    """Every selector; the batch has a row to spare, and rows that longer texts have used before."""
    more = ("--selector", *SELECTORS, "--ratios", "8", "--batch_size")
    together, alone = (DecodeEvaluator(options(files, "ppl", *more, size), 9) for size in ("4", "1"))
    assert (together.batch, alone.batch) == (4, 1)
    texts, starts = ragged(together)
    for judge in (together, alone):
        judge.prepare()
    together.read([torch.arange(CONTEXT) % 250] * 4)
    together.read([ids[:start] for ids, start in zip(texts, starts, strict=True)])
    lengths, openings = [len(ids) - 1 for ids in texts], [int(ids[-1]) for ids in texts]
    found = [(together.score(run, texts, starts, 40), together.continue_greedily(run, openings, lengths, 6))
             for run in together.runs]
    for row, (ids, start, length, opening) in enumerate(zip(texts, starts, lengths, openings, strict=True)):
        alone.read([ids[:start]])
        for run, ((scores, likeliest), answers) in zip(alone.runs, found, strict=True):
            count = length - start
            wanted, tokens = alone.score(run, [ids], [start], count)
            torch.testing.assert_close(scores[row, -count:], wanted[0], rtol=1e-4, atol=1e-4, msg=str(run))
            assert torch.equal(likeliest[row, -count:], tokens[0]), run
            assert alone.continue_greedily(run, [opening], [length], 6) == [answers[row]], run
    for run, ((scores, _), _) in list(zip(together.runs, found, strict=True))[1:]:
        assert not torch.allclose(scores[0], found[0][0][0][0], atol=1e-4), f"{run} is dense"


def test_one_prefill_serves_all_runs_in_any_order(files: dict[str, Path]) -> None:
    judge = DecodeEvaluator(options(files, "ppl", "--selector", *SELECTORS, "--ratios", "8"), 3)
    judge.prepare()
    texts, starts = ragged(judge)
    judge.read([ids[:start] for ids, start in zip(texts, starts, strict=True)])
    first = [judge.score(run, texts, starts, 3)[0] for run in judge.runs]
    for run, scores in reversed(list(zip(judge.runs, first, strict=True))):
        assert torch.equal(judge.score(run, texts, starts, 3)[0], scores), run


def test_greedy_answers_stop_at_the_caches_end(files: dict[str, Path]) -> None:
    judge = DecodeEvaluator(options(files, "needles", "--selector", "dense"), 2)
    judge.prepare()
    judge.read([torch.arange(200), torch.arange(CONTEXT - 4) % 250])
    answers = judge.continue_greedily(judge.runs[0], [1, 2], [200, CONTEXT - 4], 9)
    assert [len(answer) for answer in answers] == [4, 4]


def test_needle_rows(files: dict[str, Path]) -> None:
    given = options(files, "needles", "--selector", "oracle", "streaming", "--ratios", "1", "8", "--context", "480",
                    "--samples", "3", "--batch_size", "2", "--tasks", "single", "multi_value")
    rows = list(eval.needles(given))
    assert [(row["task"], row["selector"], row["ratio"]) for row in rows[:5]] == [
        ("single", "dense", 1), ("single", "oracle", 1), ("single", "oracle", 8), ("single", "streaming", 1),
        ("single", "streaming", 8)]
    for row in rows:
        assert row.keys() >= {"model", "context", "task", "selector", "recipe", "bits", "ratio", "exact", "samples", "nll",
                              "bytes_per_token", "nll_interval"}
        low, high = row["nll_interval"]
        assert low - 1e-6 <= row["nll_difference"] <= high + 1e-6 and row["samples"] == len(row["per_sample"]) == 3
        if row["ratio"] == 1:
            assert row["nll_difference"] == pytest.approx(0, abs=1e-4)


@pytest.mark.parametrize("task", TASKS)
def test_questions_are_split_where_their_parts_begin(files: dict[str, Path], task: str) -> None:
    judge = DecodeEvaluator(options(files, "needles"), 1)
    question = make_question(judge, task, 500, 0)
    decode = judge.tokenizer.decode
    end = len(question.ids) - question.answer
    assert 350 < len(question.ids) <= 500 - 8  # a line of uuids has 85
    assert decode(question.ids[end:].tolist()) == question.needle.answer
    assert decode(question.ids[:question.context].tolist()).strip().endswith(question.needle.context[-30:])
    asked = decode(question.ids[question.context:end].tolist())
    assert asked.startswith("\n\nQuestion: ") and asked.endswith(question.needle.question.split("\nAnswer: ")[1])


def test_without_a_chat_template_the_text_is_read_as_it_is(files: dict[str, Path]) -> None:
    judge = DecodeEvaluator(options(files, "needles"), 1)
    judge.tokenizer._chat_template = None
    needle = Needle("single", "The sky is blue.", "\n\nQuestion: Which colour?\nAnswer: It is", ("blue",))
    question = tokenize_needle(judge.tokenizer, needle)
    assert judge.tokenizer.decode(question.ids.tolist()) == needle.text
    assert (question.context, question.answer) == (len(needle.context), len(needle.answer))


class Stub:
    """A judge whose model finds `says` likeliest at each place of the answer, and then `goes_on`."""

    def __init__(self, judge: DecodeEvaluator, says: list[str], goes_on: str) -> None:
        self.tokenizer = judge.tokenizer
        self.says, self.goes_on = [judge.tokenizer.encode(text) for text in says], judge.tokenizer.encode(goes_on)

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
def test_scores_of_answers(files: dict[str, Path], says: str, goes_on: str, exact: bool) -> None:
    """Beside a question with a longer answer, which never comes out right."""
    judge = DecodeEvaluator(options(files, "needles"), 1)
    needles = [Needle("multi_value", "12 34", "\n\nQuestion: Which?\nAnswer: It is", answers)
               for answers in (("12", "34"), ("56", "7" * 40))]
    questions = [tokenize_needle(judge.tokenizer, needle) for needle in needles]
    stub = Stub(judge, [says, " " * questions[1].answer], goes_on)
    (found, nll), (other, other_nll) = judge_answers(stub, None, questions)
    wrong = sum(a != b for a, b in zip(says, " 12, 34", strict=True))
    assert found is exact and nll == pytest.approx((0.5 * (7 - wrong) + 2 * wrong) / 7)
    assert other is False and other_nll == pytest.approx((0.5 * 2 + 2 * 43) / 45)  # its two spaces are right
    ends = [len(question.ids) - question.answer - 1 for question in questions]
    assert stub.asked == (judge.tokenizer.encode("s") * 2, ends)


def test_a_text_is_read_once_for_all_documents(files: dict[str, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    read = []
    monkeypatch.setattr(eval, "read_text", lambda path: read.append(path) or PROSE)
    judge = DecodeEvaluator(options(files, "needles", "--selector", "dense"), 2)
    for i in range(3):
        make_question(judge, "single", 480, i)
    assert read == [files["text"]]


def test_paired_interval() -> None:
    assert paired_interval(torch.full((8,), 0.25), 0) == [0.25, 0.25]
    values = torch.randn(400, generator=torch.Generator().manual_seed(0))
    wanted = values.mean() + values.std() / 20 * torch.tensor([-1.96, 1.96])
    torch.testing.assert_close(torch.tensor(paired_interval(values, 0)), wanted, rtol=0, atol=0.01)


def run_main(given, monkeypatch: pytest.MonkeyPatch) -> list[dict]:
    monkeypatch.setattr(eval, "parse_options", lambda: given)
    eval.main()
    return json.loads(given.json.read_text())["rows"]


def test_grid(files: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    given = options(files, "grid", "--selector", "hash", "--ratios", "8", "--contexts", "480", "420", "--depths", "0", "60",
                    "100", "--samples", "2", "--batch_size", "4", "--json", str(tmp_path / "grid.json"))
    rows = run_main(given, monkeypatch)
    assert (tmp_path / "grid.png").read_bytes().startswith(b"\x89PNG")
    places = [(context, depth, name) for context in (420, 480) for depth in (0, 60, 100) for name in ("dense", "hash", "hash")]
    assert [(row["context"], row["depth"], row["selector"]) for row in rows] == places
    assert {row["budget"] for row in rows if row["selector"] == "hash"} == {math.ceil(420 / 8), 480 // 8}
    for row in rows:
        assert row.keys() >= {"model", "ratio", "exact", "samples", "nll"} and row["samples"] == 2
    assert len({row["nll"] for row in rows if row["selector"] == "dense"}) == 6


def test_recall_of_a_batch_is_the_mean_of_its_texts(files: dict[str, Path], tmp_path: Path,
                                                    monkeypatch: pytest.MonkeyPatch) -> None:
    given = options(files, "recall", "--selector", "hash", "quest", "--ratios", "8", "--last", "6", "--top", "10",
                    "--batch_size", "2")
    paths = [tmp_path / f"part{i}.txt" for i in range(3)]
    for i, path in enumerate(paths):
        path.write_text(PROSE[30 * i:])
    means = []
    for given.data in (paths, *([path] for path in paths)):
        means.append(torch.tensor([row["mass_by_head"] for row in eval.recall(given)]))
    torch.testing.assert_close(means[0], torch.stack(means[1:]).mean(dim=0), rtol=1e-4, atol=1e-5)


def test_recall(files: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    given = options(files, "recall", "--selector", *SELECTORS, "--ratios", "1", "8", "--last", "6", "--top", "10",
                    "--json", str(tmp_path / "recall.json"))
    rows = run_main(given, monkeypatch)
    assert (tmp_path / "recall.png").read_bytes().startswith(b"\x89PNG")
    assert len(rows) == 2 * (len(SELECTORS) + 3)
    mass = {(row["selector"], row["recipe"]): torch.tensor(row["mass_by_head"]) for row in rows if row["ratio"] == 8}
    oracle = mass.pop(("oracle", None))
    assert oracle.shape == (2, 2)
    # its heads have budgets of their own
    mass = {name: share for name, share in mass.items() if name[0] != "hash_calibrated"}
    for name, share in mass.items():
        assert (share <= oracle + 1e-6).all(), name
        if name[0] not in ("oracle_group", "oracle_split", "quest", "double_sparsity") and name[1] != "query":
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
    (["ppl", "--last", "2", "--context", "8"], "are more than --context 8"), (["ppl", "--batch_size", "0"], "--batch_size 0"),
    (["ppl", "--json", "pyproject.toml/rows.json"], "--json pyproject.toml/rows.json cannot be written"),
    (["grid", "--depths", "0", "101"], "--depths 0 101"), (["grid", "--contexts", "480", "8192"], "--context 8192")])
def test_mistakes(files: dict[str, Path], arguments: list[str], message: str) -> None:
    with pytest.raises(eval.UserError, match=message):
        given = options(files, *arguments)
        list(given.run(given))


def test_mistakes_are_one_line_and_exit_2(files: dict[str, Path]) -> None:
    command = [sys.executable, eval.__file__, "ppl", "--checkpoint_path", files["model"], "--data", files["text"], "--context",
               str(CONTEXT), "--last", "8", "--device", "cpu"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 2 and done.stdout == ""
    assert done.stderr.startswith("error: --selector hash and those like it need --signatures") and done.stderr.count("\n") == 1


def test_texts_of_one_name(files: dict[str, Path]) -> None:
    given = options(files, "ppl", "--context", "320")
    given.data = [files["text"]] * 2
    with pytest.raises(eval.UserError, match="two texts of the name"):
        list(eval.ppl(given))


def test_short_text(files: dict[str, Path]) -> None:
    given = options(files, "ppl", "--context", "500", "--ratios", "8")
    files["text"].with_name("short.txt").write_text("Too short.")
    given.data = [files["text"].with_name("short.txt")]
    with pytest.raises(eval.UserError, match="fewer than --context 500"):
        list(eval.ppl(given))


def test_the_files_row_order_is_the_tables(files: dict[str, Path]) -> None:
    runs = DecodeEvaluator(options(files, "ppl", "--selector", "quest", "dense", "quest", "--ratios", "16", "32"), 1).runs
    assert [(run.method.selector, run.ratio, run.budget) for run in runs] == [
        ("dense", 1, CONTEXT), ("quest", 16, 20), ("quest", 32, SINK + RECENT)]


def test_question_is_immutable() -> None:
    with pytest.raises(AttributeError):
        Question(Needle("single", "", "", ()), torch.zeros(1), 0, 1).answer = 2
