"""lm-evaluation-harness over the decode step: scores are the model's own, answers end where they should, tasks run offline."""
import functools
import itertools
import json
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import tqdm

from hashfast.commands import eval
from hashfast.common import UserError
from hashfast.research.evaluator import DecodeEvaluator, EvalConfig
from hashfast.runtime.decode import prefill
from hashfast.runtime.tokenizer import Tokenizer

pytest.importorskip("lm_eval")
from lm_eval.api.instance import Instance  # noqa: E402
from lm_eval.tasks import TaskManager  # noqa: E402

from hashfast.research import harness  # noqa: E402
from hashfast.research.harness import DecodeLM, lm  # noqa: E402

CONTEXT = 128
LONG = "".join(chr(97 + i * i % 26) for i in range(300))  # one token a letter



def config(checkpoint: Path, *selectors: str) -> EvalConfig:
    return EvalConfig(checkpoint, CONTEXT, selectors, ratios=(8,), sink=2, recent=4, batch_size=3)


@pytest.fixture(scope="module")
def evaluator(tiny_checkpoint: Path) -> DecodeEvaluator:
    evaluator = DecodeEvaluator(config(tiny_checkpoint, "oracle"), 3)
    evaluator.prepare()
    return evaluator


@pytest.fixture
def own_tasks_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """The harness does not index the thousands of tasks that come with it."""
    monkeypatch.setattr(harness, "TaskManager", functools.partial(TaskManager, include_defaults=False))


def model(evaluator: DecodeEvaluator, run: int = 0, tail: int = 5) -> DecodeLM:
    return DecodeLM(evaluator, evaluator.runs[run], tail, chat=False)


def instances(kind: str, *arguments: tuple) -> list[Instance]:
    return [Instance(kind, {}, each, i) for i, each in enumerate(arguments)]


def read_log_likelihoods(evaluator: DecodeEvaluator, ids: list[int], first: int) -> list[torch.Tensor]:
    """The dense model's log-probabilities of what follows ids[:first], ids[:first + 1], ..., by prefill alone."""
    return [prefill(evaluator.model, torch.tensor(ids[:i]), 1).log_softmax(-1) for i in range(first, len(ids))]


def test_likelihoods_are_those_of_reading_the_text(evaluator: DecodeEvaluator) -> None:
    pairs = [("The sky is", " blue"), ("A", " very much longer continuation of it"), ("One and one and one make", " 3"),
             ("", "no context"), ("x" * 300, " too long")]
    found = model(evaluator).loglikelihood(instances("loglikelihood", *pairs), disable_tqdm=True)
    for (context, continuation), (score, greedy) in zip(pairs, found, strict=True):
        encode = evaluator.tokenizer.encode
        ids = encode(context + continuation) if context else [256 + 1, *encode(continuation)]
        ids = ids[-(CONTEXT + 1):]
        target = ids[-len(continuation):]
        logs = read_log_likelihoods(evaluator, ids, len(ids) - len(target))
        assert score == pytest.approx(sum(log[token].item() for log, token in zip(logs, target, strict=True)), abs=1e-3)
        assert greedy == all(log.argmax() == token for log, token in zip(logs, target, strict=True))


def test_the_greedy_continuation_is_known_as_such(evaluator: DecodeEvaluator) -> None:
    prompt, answer = evaluator.tokenizer.encode("Some words"), []
    for _ in range(4):
        answer.append(prefill(evaluator.model, torch.tensor(prompt + answer), 1).argmax().item())
    other = [*answer[:2], (answer[2] + 1) % 256, answer[3]]
    requests = [(("", ""), prompt, answer), (("", ""), prompt, other)]
    assert [greedy for _, greedy in model(evaluator)._loglikelihood_tokens(requests, disable_tqdm=True)] == [True, False]


def test_a_selector_matters(evaluator: DecodeEvaluator) -> None:
    pair = instances("loglikelihood", ("Many words stand here. " * 4, " So few remain"))
    assert evaluator.runs[1].budget == CONTEXT // 8
    dense, sparse = (model(evaluator, run).loglikelihood(pair, disable_tqdm=True)[0][0] for run in (0, 1))
    assert abs(dense - sparse) > 1e-3


def test_rolling_windows_cover_the_text_once(evaluator: DecodeEvaluator) -> None:
    text = "".join(chr(97 + i * i % 26) for i in range(2 * CONTEXT + 9))
    found = model(evaluator).loglikelihood_rolling(instances("loglikelihood_rolling", (text,), ("short",)), disable_tqdm=True)
    ids = evaluator.tokenizer.encode(text)
    total = 0.0
    for start, end in ((0, CONTEXT), (CONTEXT, 2 * CONTEXT), (2 * CONTEXT, len(ids))):
        before = ids[:start][-1:] or [256 + 1]
        if end - start < CONTEXT:  # the last window is filled up on the left with what was scored before
            before = ids[end - CONTEXT - 1:start]
        part = before + ids[start:end]
        logs = read_log_likelihoods(evaluator, part, len(before))
        total += sum(log[token].item() for log, token in zip(logs, part[len(before):], strict=True))
    assert found[0] == pytest.approx(total, rel=1e-4)
    (alone, _), = model(evaluator).loglikelihood(instances("loglikelihood", ("", "short")), disable_tqdm=True)
    assert found[1] == pytest.approx(alone, rel=1e-4)


def test_answers_are_those_of_each_prompt_alone(evaluator: DecodeEvaluator) -> None:
    """Too long a prompt keeps what its own answer leaves of the context, though the others may be answered at more length."""
    alike = {"max_gen_toks": 20}
    prompts = [("Once", alike), ("A longer prompt than the others", {"max_gen_toks": 3}), ("x", alike | {"until": "q"}),
               ("Another batch", {"max_new_tokens": 18, "until": []}), (LONG, {"max_gen_toks": 3}), (LONG, alike)]
    together = model(evaluator).generate_until(instances("generate_until", *prompts), disable_tqdm=True)
    for prompt, text in zip(prompts, together, strict=True):
        assert model(evaluator).generate_until(instances("generate_until", prompt), disable_tqdm=True) == [text]
        limit = prompt[1].get("max_gen_toks", 18)
        assert len(evaluator.tokenizer.encode(text)) <= 3 * limit  # 3 bytes of U+FFFD each
    for prompt, kept in ((prompts[4], LONG[-125:]), (prompts[5], LONG[-108:])):
        assert model(evaluator).generate_until(instances("generate_until", (kept, prompt[1])), disable_tqdm=True) == [
            together[prompts.index(prompt)]]


def test_lengths_that_leave_no_room(evaluator: DecodeEvaluator) -> None:
    with pytest.raises(UserError, match="generates up to 256 tokens, which leaves no room for a prompt in --context 128;"):
        model(evaluator).generate_until(instances("generate_until", ("x", {"until": ["q"]})))
    for continuation, count in ((LONG, 300), ("", 0)):
        with pytest.raises(UserError, match=f"of this task has {count} tokens, but 1 to 128 fit; give more --context"):
            model(evaluator).loglikelihood(instances("loglikelihood", ("x", continuation)), disable_tqdm=True)


@pytest.mark.parametrize("config, eos, prefix", [
    ({"eos_token": "<|im_end|>"}, 257, 257), ({"eos_token": "<|endoftext|>"}, 258, 258), ({}, 257, 257),
    ({"eos_token": "<|endoftext|>", "bos_token": "<|im_start|>"}, 258, 256)])
def test_eos_and_prefix_are_those_of_the_tokenizer(checkpoint_copy, config: dict, eos: int, prefix: int) -> None:
    """Not the first of all tokens that end a text: here 257 and 258 do."""
    folder = checkpoint_copy()
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    lm = DecodeLM(SimpleNamespace(tokenizer=Tokenizer.load(folder)), None, 5, chat=False)
    assert (lm.eot_token_id, lm.prefix_token_id) == (eos, prefix)


def test_dense_figures_are_those_of_the_harness_own_model(evaluator: DecodeEvaluator, tiny_checkpoint: Path) -> None:
    pytest.importorskip("accelerate")  # HFLM imports it; nothing else here does
    from lm_eval.models.huggingface import HFLM
    from transformers import AutoModelForCausalLM, AutoTokenizer

    theirs = HFLM(pretrained=AutoModelForCausalLM.from_pretrained(tiny_checkpoint, dtype=torch.float32), device="cpu",
                  tokenizer=AutoTokenizer.from_pretrained(tiny_checkpoint), max_length=CONTEXT, batch_size=3)
    pairs = [("The sky is", " blue"), ("", "no context"), (LONG[:120], " too long"), (LONG[:121], " too long"),
             (LONG, " too long"), ("x", LONG[:128]), ("trailing ", "space")]
    texts = [(LONG[:length],) for length in (1, 127, 128, 129, 300)]
    prompts = [(text, {"max_gen_toks": 20, "until": ["q"]}) for text in ("Once", LONG[:107], LONG[:108], LONG[:109], LONG)]
    for kind, arguments in (("loglikelihood", pairs), ("loglikelihood_rolling", texts), ("generate_until", prompts)):
        expected = getattr(theirs, kind)(instances(kind, *arguments), disable_tqdm=True)
        for got, wanted in zip(getattr(model(evaluator), kind)(instances(kind, *arguments)), expected, strict=True):
            assert got == wanted if kind == "generate_until" else got == pytest.approx(wanted, rel=1e-4)


@pytest.mark.parametrize("text, limit, until, wanted", [
    ("one two", 20, [], ("one two", False)), ("one two", 7, [], ("one two", True)), ("one two", 3, [], ("one", True)),
    ("one two", 20, ["two", "e t"], ("on", True)), ("one two", 20, " ", ("one", True)), ("one", 20, ["", "x"], ("one", False)),
    ("one<|im_end|>two", 20, ["two"], ("one", True))])
def test_where_an_answer_ends(evaluator: DecodeEvaluator, text: str, limit: int, until: list[str] | str,
                              wanted: tuple) -> None:
    assert model(evaluator).cut(evaluator.tokenizer.encode(text), limit, until) == wanted


def test_sampling_is_refused(evaluator: DecodeEvaluator) -> None:
    with pytest.raises(UserError, match="samples its answers"):
        model(evaluator).generate_until(instances("generate_until", ("x", {"do_sample": True, "temperature": 0.7})))


def test_chat_text_is_encoded_as_the_chat(evaluator: DecodeEvaluator) -> None:
    chat = DecodeLM(evaluator, evaluator.runs[0], 5, chat=True)
    messages = [{"role": "user", "content": "Hello"}]
    assert chat.tok_encode(chat.apply_chat_template(messages)) == evaluator.tokenizer.encode_chat(messages)
    begun = [*messages, {"role": "assistant", "content": "The answer is"}]  # by the task
    assert chat.apply_chat_template(begun, add_generation_prompt=False) == chat.apply_chat_template(messages) + "The answer is"


def write_task(folder: Path, name: str, rows: list[dict], **fields: object) -> None:
    data = folder / f"{name}.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder / f"{name}.yaml").write_text(json.dumps({  # JSON is YAML
        "task": name, "dataset_path": "json", "dataset_kwargs": {"data_files": {"test": str(data)}}, "test_split": "test",
        **fields}))


def test_a_local_task(tiny_checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, own_tasks_alone: None) -> None:
    import datasets
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path / "cache"))
    write_task(tmp_path, "local", [{"q": f"{i} and", "choices": ["one", "two"], "a": i % 2} for i in range(5)],
               output_type="multiple_choice", doc_to_text="{{q}}", doc_to_choice="choices", doc_to_target="a",
               metric_list=[{"metric": "acc"}])
    monkeypatch.setattr(sys, "argv", [
        "hashfast eval", "lm", "--checkpoint_path", str(tiny_checkpoint), "--device", "cpu", "--tasks", "local", "--context",
        str(CONTEXT), "--sink", "2", "--recent", "4", "--ratios", "8", "--batch_size", "3", "--selector", "oracle",
        "--include_path", str(tmp_path), "--limit", "4", "--json", str(tmp_path / "rows.json")])
    eval.main()
    rows = json.loads((tmp_path / "rows.json").read_text())["rows"]
    assert [(row["selector"], row["task"], row["metric"], row["samples"]) for row in rows] == [
        (name, "local", "acc,none", 4) for name in ("dense", "oracle")]
    assert all(0 <= row["value"] <= 1 for row in rows)


def test_a_task_that_is_not_there(tiny_checkpoint: Path, tmp_path: Path, own_tasks_alone: None) -> None:
    with pytest.raises(UserError, match="no task 'local'; give --include_path"):
        list(lm(config(tiny_checkpoint, "dense"), ["local"], tmp_path))


def test_without_the_harness(tiny_checkpoint: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delitem(sys.modules, "hashfast.research.harness")
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    monkeypatch.setattr(sys, "argv", ["hashfast eval", "lm", "--checkpoint_path", str(tiny_checkpoint), "--tasks", "local"])
    with pytest.raises(UserError, match="pip install lm-eval"):
        eval.main()


RULER = ("niah_single_1", "niah_multikey_2", "niah_multikey_3", "ruler_vt", "ruler_cwe", "ruler_fwe")


def ruler(checkpoint: Path, folder: Path, *tasks: str) -> list[dict]:
    """Rows of a dense run and a sparse one over two documents of each task. Its tokens are words, of which it makes 4,096."""
    transformers = pytest.importorskip("transformers")
    from tokenizers import Tokenizer, models, pre_tokenizers

    words = Tokenizer(models.WordLevel({"x": 0}, unk_token="x"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    transformers.PreTrainedTokenizerFast(tokenizer_object=words, unk_token="x").save_pretrained(folder)
    given = EvalConfig(checkpoint, 256, ("oracle",), ratios=(16,), sink=2, recent=4, batch_size=2)
    return list(lm(given, [*tasks], Path(harness.lm_eval.__file__).parent / "tasks" / "ruler", limit=2,
                   metadata={"max_seq_lengths": [4096], "tokenizer": str(folder)}))


def test_ruler_makes_its_documents_offline(tiny_checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
                                           own_tasks_alone: None) -> None:
    """With a list of words in place of wonderwords', and 2 documents of 500."""
    nltk = pytest.importorskip("nltk")
    kinds = {kind: [f"{kind}{i}" for i in range(count)] for kind, count in (("noun", 900), ("verb", 9), ("adjective", 9))}
    kinds |= {f"{kind}s": words for kind, words in kinds.items()}
    words = SimpleNamespace(_categories=kinds)
    monkeypatch.setitem(sys.modules, "wonderwords", SimpleNamespace(RandomWord=lambda: words))
    monkeypatch.setattr(nltk, "download", lambda *_: False)  # for tasks that read essays
    monkeypatch.setattr(tqdm, "tqdm", lambda things, **_: itertools.islice(things, 2))
    rows = ruler(tiny_checkpoint, tmp_path, *RULER)
    for name in ("lm_eval.tasks.ruler.prepare_niah", "lm_eval.tasks.ruler.niah_utils"):
        sys.modules.pop(name, None)  # they hold these words
    assert {(row["selector"], row["ratio"], row["task"], row["metric"], row["samples"]) for row in rows} == {
        (*run, task, "4096,none", 2) for run in (("dense", 1), ("oracle", 16)) for task in RULER}
    assert len(rows) == 12 and all(0 <= row["value"] <= 1 for row in rows)


def test_ruler_without_words(tiny_checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
                             own_tasks_alone: None) -> None:
    monkeypatch.setitem(sys.modules, "wonderwords", None)
    with pytest.raises(UserError, match="the data of ruler_cwe need .*wonderwords.*pip install wonderwords nltk"):
        ruler(tiny_checkpoint, tmp_path, "ruler_cwe")
