"""lm-evaluation-harness on transformers: its hf model enabled, and the model hashfast, which scores by decode steps."""
import json
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from hashfast.common import UserError
from hashfast.hash_attention import HashConfig
from hashfast.integrations.transformers import disable, enable, fingerprint
from hashfast.runtime.signatures import random_encoders, save_signatures

pytest.importorskip("accelerate")  # the harness's hf model imports it
import lm_eval  # noqa: E402
from lm_eval.api.instance import Instance  # noqa: E402
from lm_eval.tasks import TaskManager  # noqa: E402

from hashfast.integrations.lm_eval import HFLM, HashfastLM  # noqa: E402

LONG = "".join(chr(97 + i * i % 26) for i in range(300))  # one token a letter
LIKELIHOODS = [("The sky is", " blue"), ("", "no context"), (LONG[:100], " too long"), (LONG, " too long"), ("x", LONG[:60])]
COVERED = {"budget": 128, "sink": 2, "recent": 4}
SPARSE = {"budget": 16, "sink": 2, "recent": 4}


def instances(kind: str, *arguments: tuple) -> list[Instance]:
    return [Instance(kind, {}, each, i) for i, each in enumerate(arguments)]


@pytest.fixture(scope="module")
def load(tiny_checkpoint: Path):
    """load(class, ...) -> the harness's model of the tiny checkpoint."""
    return lambda kind, **more: kind(
        pretrained=AutoModelForCausalLM.from_pretrained(tiny_checkpoint, dtype=torch.float32), device="cpu",
        tokenizer=AutoTokenizer.from_pretrained(tiny_checkpoint), max_length=96, batch_size=2, **more)


@pytest.fixture(scope="module")
def signatures(load, tmp_path_factory: pytest.TempPathFactory) -> Path:
    shape, path = fingerprint(load(HFLM).model), tmp_path_factory.mktemp("signatures") / "tiny.safetensors"
    save_signatures(path, random_encoders(HashConfig(), shape), shape, {})
    return path


def ask(model: HFLM) -> list:
    return [model.loglikelihood(instances("loglikelihood", *LIKELIHOODS), disable_tqdm=True),
            model.loglikelihood_rolling(instances("loglikelihood_rolling", ("short",), (LONG[:150],)), disable_tqdm=True),
            model.generate_until(instances("generate_until", *((text, {"max_gen_toks": 6, "until": ["q"]})
                                                               for text in ("Once", LONG[:40], LONG))), disable_tqdm=True)]


def test_scores_and_answers_are_the_dense_models_where_the_budget_covers_the_text(load, signatures: Path) -> None:
    theirs = load(HFLM)
    wanted = ask(theirs)
    enable(theirs.model, signatures, **COVERED)
    for found in (ask(theirs), ask(load(HashfastLM, signatures=str(signatures), tail=5, **COVERED))):
        for (score, greedy), (expected, its_greedy) in zip(found[0], wanted[0], strict=True):
            assert score == pytest.approx(expected, rel=1e-4) and greedy == its_greedy
        assert found[1] == pytest.approx(wanted[1], rel=1e-4) and found[2] == wanted[2]
    enable(theirs.model, signatures, **SPARSE)
    assert ask(theirs)[2] != wanted[2]
    disable(theirs.model)


def test_scores_are_sparse_and_do_not_depend_on_the_batch(load, signatures: Path) -> None:
    sparse = load(HashfastLM, signatures=str(signatures), tail=5, **SPARSE)
    together = sparse.loglikelihood(instances("loglikelihood", *LIKELIHOODS), disable_tqdm=True)
    dense = load(HFLM).loglikelihood(instances("loglikelihood", *LIKELIHOODS), disable_tqdm=True)
    assert abs(together[3][0] - dense[3][0]) > 1e-3
    for pair, (score, _) in zip(LIKELIHOODS, together, strict=True):
        alone = sparse.loglikelihood(instances("loglikelihood", pair), disable_tqdm=True)
        assert alone[0][0] == pytest.approx(score, rel=1e-4)


def test_what_is_refused(load, signatures: Path) -> None:
    with pytest.raises(UserError, match="has 300 tokens, but at most max_length=96 fit"):
        load(HashfastLM, signatures=str(signatures), **SPARSE).loglikelihood(instances("loglikelihood", ("x", LONG)))
    with pytest.raises(UserError, match="--batch_size auto is not supported"):
        HashfastLM("nowhere", batch_size="auto:4")


def test_the_harness_knows_the_model_by_name(tiny_checkpoint: Path, signatures: Path, tmp_path: Path,
                                             monkeypatch: pytest.MonkeyPatch) -> None:
    import datasets
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path / "cache"))
    data = tmp_path / "local.jsonl"
    data.write_text("".join(json.dumps({"q": f"{i} and", "choices": ["one", "two"], "a": i % 2}) + "\n" for i in range(4)))
    (tmp_path / "local.yaml").write_text(json.dumps({  # JSON is YAML
        "task": "local", "dataset_path": "json", "dataset_kwargs": {"data_files": {"test": str(data)}}, "test_split": "test",
        "output_type": "multiple_choice", "doc_to_text": "{{q}}", "doc_to_choice": "choices", "doc_to_target": "a",
        "metric_list": [{"metric": "acc"}]}))
    found = lm_eval.simple_evaluate(
        "hashfast", f"pretrained={tiny_checkpoint},signatures={signatures},budget=16,sink=2,recent=4,dtype=float32",
        tasks=["local"], batch_size=2, device="cpu", bootstrap_iters=0,
        task_manager=TaskManager(include_path=str(tmp_path), include_defaults=False))
    assert 0 <= found["results"]["local"]["acc,none"] <= 1
