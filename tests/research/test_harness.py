"""lm-evaluation-harness over the decode step: scores are the model's own, answers end where they should, tasks run offline."""
import json
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from hashfast.commands import eval

pytest.importorskip("lm_eval")
from lm_eval.api.instance import Instance  # noqa: E402

from hashfast.common import UserError  # noqa: E402
from hashfast.research.harness import DecodeLM  # noqa: E402
from hashfast.runtime.decode import prefill  # noqa: E402

CONTEXT = 128


def options(checkpoint: Path, *more: str):
    return eval.parse_options(["lm", "--checkpoint_path", str(checkpoint), "--device", "cpu", "--tasks", "local", "--context",
                               str(CONTEXT), "--sink", "2", "--recent", "4", "--ratios", "8", "--batch_size", "3", *more])


@pytest.fixture(scope="module")
def judge(tiny_checkpoint: Path) -> Iterator[eval.DecodeEvaluator]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # the model is tiny
    judge = eval.DecodeEvaluator(options(tiny_checkpoint, "--selector", "oracle"), 3)
    judge.prepare()
    yield judge
    torch.set_num_threads(threads)


def model(judge: eval.DecodeEvaluator, run: int = 0, tail: int = 5) -> DecodeLM:
    return DecodeLM(judge, judge.runs[run], tail, chat=False)


def instances(kind: str, *arguments: tuple) -> list[Instance]:
    return [Instance(kind, {}, each, i) for i, each in enumerate(arguments)]


def read_log_likelihoods(judge: eval.DecodeEvaluator, ids: list[int], first: int) -> list[torch.Tensor]:
    """The dense model's log-probabilities of what follows ids[:first], ids[:first + 1], ..., by prefill alone."""
    return [prefill(judge.model, torch.tensor(ids[:i]), 1).log_softmax(-1) for i in range(first, len(ids))]


def test_likelihoods_are_those_of_reading_the_text(judge: eval.DecodeEvaluator) -> None:
    pairs = [("The sky is", " blue"), ("A", " very much longer continuation of it"), ("One and one and one make", " 3"),
             ("", "no context"), ("x" * 300, " too long")]
    found = model(judge).loglikelihood(instances("loglikelihood", *pairs), disable_tqdm=True)
    for (context, continuation), (score, greedy) in zip(pairs, found, strict=True):
        ids = judge.tokenizer.encode(context + continuation) if context else [256 + 1, *judge.tokenizer.encode(continuation)]
        ids = ids[-CONTEXT:]
        target = ids[-len(continuation):]
        logs = read_log_likelihoods(judge, ids, len(ids) - len(target))
        assert score == pytest.approx(sum(log[token].item() for log, token in zip(logs, target, strict=True)), abs=1e-3)
        assert greedy == all(log.argmax() == token for log, token in zip(logs, target, strict=True))


def test_the_greedy_continuation_is_known_as_such(judge: eval.DecodeEvaluator) -> None:
    prompt, answer = judge.tokenizer.encode("Some words"), []
    for _ in range(4):
        answer.append(prefill(judge.model, torch.tensor(prompt + answer), 1).argmax().item())
    other = [*answer[:2], (answer[2] + 1) % 256, answer[3]]
    requests = [(("", ""), prompt, answer), (("", ""), prompt, other)]
    assert [greedy for _, greedy in model(judge)._loglikelihood_tokens(requests, disable_tqdm=True)] == [True, False]


def test_a_selector_matters(judge: eval.DecodeEvaluator) -> None:
    pair = instances("loglikelihood", ("Many words stand here. " * 4, " So few remain"))
    assert judge.runs[1].budget == CONTEXT // 8
    dense, sparse = (model(judge, run).loglikelihood(pair, disable_tqdm=True)[0][0] for run in (0, 1))
    assert abs(dense - sparse) > 1e-3


def test_rolling_windows_cover_the_text_once(judge: eval.DecodeEvaluator) -> None:
    text = "".join(chr(97 + i * i % 26) for i in range(2 * CONTEXT))
    found = model(judge).loglikelihood_rolling(instances("loglikelihood_rolling", (text,), ("short",)), disable_tqdm=True)
    ids = judge.tokenizer.encode(text)
    total, window = 0.0, CONTEXT - 1
    for start in range(0, len(ids), window):
        before = ids[:start][-1:] or [256 + 1]
        if start + window > len(ids):  # the last window is filled up on the left with what was scored before
            before = ids[len(ids) - window - 1:start]
        part = before + ids[start:start + window]
        logs = read_log_likelihoods(judge, part, len(before))
        total += sum(log[token].item() for log, token in zip(logs, part[len(before):], strict=True))
    assert found[0] == pytest.approx(total, rel=1e-4)
    (alone, _), = model(judge).loglikelihood(instances("loglikelihood", ("", "short")), disable_tqdm=True)
    assert found[1] == pytest.approx(alone, rel=1e-4)


def test_answers_are_those_of_each_prompt_alone(judge: eval.DecodeEvaluator) -> None:
    prompts = [("Once", {"max_gen_toks": 20}), ("A longer prompt than the others", {"max_gen_toks": 3}), ("x", {"until": "q"}),
               ("Another batch", {"max_gen_toks": 18, "until": []})]
    together = model(judge).generate_until(instances("generate_until", *prompts), disable_tqdm=True)
    for prompt, text in zip(prompts, together, strict=True):
        assert model(judge).generate_until(instances("generate_until", prompt), disable_tqdm=True) == [text]
        assert len(judge.tokenizer.encode(text)) <= 3 * prompt[1].get("max_gen_toks", 256)  # 3 bytes of U+FFFD each


@pytest.mark.parametrize("text, limit, until, wanted", [
    ("one two", 20, [], ("one two", False)), ("one two", 7, [], ("one two", True)), ("one two", 3, [], ("one", True)),
    ("one two", 20, ["two", "e t"], ("on", True)), ("one two", 20, " ", ("one", True)), ("one", 20, ["", "x"], ("one", False)),
    ("one<|im_end|>two", 20, ["two"], ("one", True))])
def test_where_an_answer_ends(judge: eval.DecodeEvaluator, text: str, limit: int, until: list[str] | str,
                              wanted: tuple) -> None:
    assert model(judge).cut(judge.tokenizer.encode(text), limit, until) == wanted


def test_sampling_is_refused(judge: eval.DecodeEvaluator) -> None:
    with pytest.raises(UserError, match="sampled"):
        model(judge).generate_until(instances("generate_until", ("x", {"do_sample": True, "temperature": 0.7})))


def test_chat_text_is_encoded_as_the_chat(judge: eval.DecodeEvaluator) -> None:
    chat = DecodeLM(judge, judge.runs[0], 5, chat=True)
    messages = [{"role": "user", "content": "Hello"}]
    assert chat.tok_encode(chat.apply_chat_template(messages)) == judge.tokenizer.encode_chat(messages)
    with pytest.raises(UserError, match="--chat"):
        chat.apply_chat_template(messages, add_generation_prompt=False)


def write_task(folder: Path, name: str, rows: list[dict], **fields: object) -> None:
    data = folder / f"{name}.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder / f"{name}.yaml").write_text(json.dumps({  # JSON is YAML
        "task": name, "dataset_path": "json", "dataset_kwargs": {"data_files": {"test": str(data)}}, "test_split": "test",
        **fields}))


@pytest.mark.slow
def test_a_local_task(tiny_checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import datasets
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path / "cache"))
    write_task(tmp_path, "local", [{"q": f"{i} and", "choices": ["one", "two"], "a": i % 2} for i in range(5)],
               output_type="multiple_choice", doc_to_text="{{q}}", doc_to_choice="choices", doc_to_target="a",
               metric_list=[{"metric": "acc"}])
    given = options(tiny_checkpoint, "--selector", "oracle", "--include_path", str(tmp_path), "--limit", "4", "--json",
                    str(tmp_path / "rows.json"))
    monkeypatch.setattr(eval, "parse_options", lambda: given)
    eval.main()
    rows = json.loads((tmp_path / "rows.json").read_text())["rows"]
    assert [(row["selector"], row["task"], row["metric"], row["samples"]) for row in rows] == [
        (name, "local", "acc,none", 4) for name in ("dense", "oracle")]
    assert all(0 <= row["value"] <= 1 for row in rows)


@pytest.mark.slow
def test_mistakes(tiny_checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(UserError, match="no task 'local'; give --include_path"):
        list(eval.lm(options(tiny_checkpoint, "--selector", "dense", "--include_path", str(tmp_path))))
    monkeypatch.delitem(sys.modules, "lm")
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    with pytest.raises(UserError, match="pip install lm-eval"):
        list(eval.lm(options(tiny_checkpoint)))
