"""The evaluator: decoding after one dense prefill scores what the model itself would, in batches, with every selector."""
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from eval_inputs import CONTEXT, RECENT, SINK, config, make_files

from hashfast.common import UserError
from hashfast.model import PrefillSettings, SparseSettings
from hashfast.names import SELECTORS
from hashfast.research import evaluator as evaluator_module
from hashfast.research.evaluator import DecodeEvaluator
from hashfast.runtime.decode import prefill


@pytest.fixture(scope="module")
def files(tiny_checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    return make_files(tiny_checkpoint, tmp_path_factory.mktemp("evaluator"))


def ragged(evaluator: DecodeEvaluator) -> tuple[list[torch.Tensor], list[int]]:
    """Three texts of different lengths, and where their decoding starts: 9, 3 and 20 tokens before their last."""
    generator = torch.Generator().manual_seed(5)
    texts = [torch.randint(256, (length,), generator=generator) for length in (150, 85, 112)]
    return texts, [len(ids) - 1 - back for ids, back in zip(texts, (9, 3, 20), strict=True)]


def test_hash_is_what_the_model_itself_decodes(files: dict[str, Path]) -> None:
    evaluator = DecodeEvaluator(config(files, selectors=("hash",), ratios=(4,)), 1)
    evaluator.prepare()
    ids = next(iter(evaluator.texts([files["text"]]).values()))
    start = len(ids) - 11
    evaluator.read([ids[:start]])
    found, likeliest = evaluator.score(evaluator.runs[1], [ids], [start], 10)
    encoders = [layer.encoder for layer in evaluator.methods[1].layers]
    for attention in evaluator.attentions:
        attention.selector = None
    evaluator.model.setup_caches(1, CONTEXT, encoders, SparseSettings(CONTEXT // 4, SINK, RECENT))
    prefill(evaluator.model, ids[:start], 1)
    for i in range(10):
        at = start + i
        with torch.inference_mode():
            logits = evaluator.model(ids[None, at:at + 1], torch.tensor([at + 1], dtype=torch.int32))[0, 0]
        assert logits.log_softmax(-1)[ids[at + 1]].item() == pytest.approx(found[0, i].item(), abs=1e-4)
        assert logits.argmax() == likeliest[0, i]


def test_texts_are_read_in_several_ways(files: dict[str, Path]) -> None:
    """Dense first; a run that wants another way gets what a model alone decodes after a prompt read so."""
    ways = (PrefillSettings(), PrefillSettings("hash", 4, 16, 4), PrefillSettings("hash", 1, 16, 4))
    evaluator = DecodeEvaluator(config(files, selectors=("hash",), ratios=(4,), prefill=ways), 2)
    evaluator.prepare()
    assert [(run.method.selector, run.prefill) for run in evaluator.runs] == [
        (name, way) for way in ways for name in ("dense", "hash", "hash")]
    texts, starts = (each[:2] for each in ragged(evaluator))
    evaluator.read([ids[:start] for ids, start in zip(texts, starts, strict=True)])
    scores = [evaluator.score(run, texts, starts, 3)[0] for run in evaluator.runs]
    for full, sparse, whole in zip(scores[:3], scores[3:6], scores[6:], strict=True):
        torch.testing.assert_close(full, whole, rtol=1e-4, atol=1e-4)
        assert (full - sparse).abs().max() > 1e-3
    rows = [evaluator.row(run) for run in evaluator.runs]
    assert [row["prefill_sparsity"] for row in rows[::3]] == [1, 4, 1] and rows[0]["pairs_read"] == 1 > rows[3]["pairs_read"]
    encoders = [layer.encoder for layer in evaluator.methods[1].layers]
    for attention in evaluator.attentions:
        attention.selector = None
    evaluator.model.setup_caches(1, CONTEXT, encoders)
    prefill(evaluator.model, texts[1][:starts[1]], 1, settings=ways[1])
    for back in (3, 2, 1):
        ids = texts[1][starts[1]:-back]
        logits = prefill(evaluator.model, ids, 1, starts[1]).log_softmax(-1)
        assert scores[3][1, -back].item() == pytest.approx(logits[texts[1][-back]].item(), abs=1e-4)


def test_dense_scores_are_those_of_reading_the_text(files: dict[str, Path]) -> None:
    """Each likelihood against a prefill of all that comes before its token, for texts of different lengths."""
    evaluator = DecodeEvaluator(config(files, selectors=("dense",)), 3)
    evaluator.prepare()
    texts, starts = ragged(evaluator)
    evaluator.read([ids[:start] for ids, start in zip(texts, starts, strict=True)])
    scores, likeliest = evaluator.score(evaluator.runs[0], texts, starts, 3)
    evaluator.model.setup_caches(1, CONTEXT)
    for ids, score, tokens in zip(texts, scores, likeliest, strict=True):
        for back in (3, 2, 1):
            logits = prefill(evaluator.model, ids[:-back], 1).log_softmax(-1)
            assert score[-back].item() == pytest.approx(logits[ids[-back]].item(), abs=1e-4)
            assert tokens[-back] == logits.argmax()


def test_a_ragged_batch_is_what_each_text_is_alone(files: dict[str, Path]) -> None:
    """Every selector; the batch has a row to spare, and rows that longer texts have used before."""
    together, alone = (DecodeEvaluator(config(files, selectors=SELECTORS, ratios=(4,), batch_size=size), 9) for size in (4, 1))
    assert (together.batch, alone.batch) == (4, 1)
    texts, starts = ragged(together)
    for evaluator in (together, alone):
        evaluator.prepare()
    together.read([torch.arange(CONTEXT) % 250] * 4)
    together.read([ids[:start] for ids, start in zip(texts, starts, strict=True)])
    lengths, openings = [len(ids) - 1 for ids in texts], [int(ids[-1]) for ids in texts]
    found = [(together.score(run, texts, starts, 20), together.continue_greedily(run, openings, lengths, 4))
             for run in together.runs]
    for row, (ids, start, length, opening) in enumerate(zip(texts, starts, lengths, openings, strict=True)):
        alone.read([ids[:start]])
        for run, ((scores, likeliest), answers) in zip(alone.runs, found, strict=True):
            count = length - start
            wanted, tokens = alone.score(run, [ids], [start], count)
            torch.testing.assert_close(scores[row, -count:], wanted[0], rtol=1e-4, atol=1e-4, msg=str(run))
            assert torch.equal(likeliest[row, -count:], tokens[0]), run
            assert alone.continue_greedily(run, [opening], [length], 4) == [answers[row]], run
    for run, ((scores, _), _) in list(zip(together.runs, found, strict=True))[1:]:
        assert not torch.allclose(scores[0], found[0][0][0][0], atol=1e-4), f"{run} is dense"


def test_one_prefill_serves_all_runs_in_any_order(files: dict[str, Path]) -> None:
    evaluator = DecodeEvaluator(config(files, selectors=SELECTORS, ratios=(4,)), 3)
    evaluator.prepare()
    texts, starts = ragged(evaluator)
    evaluator.read([ids[:start] for ids, start in zip(texts, starts, strict=True)])
    first = [evaluator.score(run, texts, starts, 3)[0] for run in evaluator.runs]
    for run, scores in reversed(list(zip(evaluator.runs, first, strict=True))):
        assert torch.equal(evaluator.score(run, texts, starts, 3)[0], scores), run


def test_kl_and_agreement_are_those_of_the_steps_logits(files: dict[str, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(evaluator_module, "COMPARED_AT_ONCE", 4)  # chunks that end within a text
    evaluator = DecodeEvaluator(config(files, selectors=("streaming",), ratios=(8,)), 3)
    evaluator.prepare()
    texts = [torch.arange(i, i + 60) * (i + 3) % 250 for i in range(2)]
    evaluator.read([ids[:52] for ids in texts])
    logs = [torch.stack([decoder.logits[:2].double().log_softmax(-1) for decoder, _ in
                         evaluator.force(run, texts, [52, 52], 6)], dim=1) for run in evaluator.runs]  # [2, 6, vocab]
    hidden = [evaluator.hidden(run, texts, [52, 52], 6) for run in evaluator.runs]
    following = torch.stack([ids[-6:] for ids in texts])
    nll, kl, agreement = evaluator.compare(*hidden, following)
    wanted = [evaluator.score(run, texts, [52, 52], 6)[0].double() for run in evaluator.runs]
    torch.testing.assert_close(nll, -wanted[1].mean(dim=1), rtol=0, atol=1e-5)
    torch.testing.assert_close(kl, (logs[0].exp() * (logs[0] - logs[1])).sum(-1).mean(-1), rtol=1e-4, atol=1e-6)
    assert torch.equal(agreement, (logs[0].argmax(-1) == logs[1].argmax(-1)).double().mean(-1)) and kl.min() > 1e-3
    nll, kl, agreement = evaluator.compare(hidden[0], hidden[0], following)
    torch.testing.assert_close(nll, -wanted[0].mean(dim=1), rtol=0, atol=1e-5)
    assert not kl.any() and (agreement == 1).all()


def test_windows_are_disjoint_and_begin_with_bos(files: dict[str, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    evaluator = DecodeEvaluator(config(files, selectors=("dense",)), 1)
    text = "".join(chr(33 + i % 90) for i in range(3 * CONTEXT - 1))
    windows = evaluator.windows({"a": text}, 4)["a"]
    assert len(windows) == 2 and torch.cat(windows).tolist() == evaluator.tokenizer.encode(text)[:2 * CONTEXT]
    assert len(evaluator.windows({"a": text}, 1)["a"]) == 1
    monkeypatch.setattr(evaluator.tokenizer, "_backend", replace(evaluator.tokenizer._backend, start=[256]))
    windows = evaluator.windows({"a": text}, 4)["a"]
    assert [(len(ids), int(ids[0])) for ids in windows] == [(CONTEXT, 256)] * 3
    assert torch.cat([ids[1:] for ids in windows]).tolist() == evaluator.tokenizer.encode(text, bos=False)[:3 * CONTEXT - 3]


def test_greedy_answers_stop_at_the_caches_end(files: dict[str, Path]) -> None:
    evaluator = DecodeEvaluator(config(files, selectors=("dense",)), 2)
    evaluator.prepare()
    evaluator.read([torch.arange(100), torch.arange(CONTEXT - 4) % 250])
    answers = evaluator.continue_greedily(evaluator.runs[0], [1, 2], [100, CONTEXT - 4], 9)
    assert [len(answer) for answer in answers] == [4, 4]


def test_the_files_row_order_is_the_tables(files: dict[str, Path]) -> None:
    runs = DecodeEvaluator(config(files, selectors=("quest", "dense", "quest"), ratios=(8, 16)), 1).runs
    assert [(run.method.selector, run.ratio, run.budget) for run in runs] == [
        ("dense", 1, CONTEXT), ("quest", 8, 20), ("quest", 16, SINK + RECENT)]


def test_texts_of_one_name(files: dict[str, Path]) -> None:
    evaluator = DecodeEvaluator(config(files, selectors=("dense",)), 2)
    with pytest.raises(UserError, match="two texts of the name"):
        evaluator.texts([files["text"]] * 2)


def test_short_text(files: dict[str, Path]) -> None:
    short = files["text"].with_name("short.txt")
    short.write_text("Too short.")
    with pytest.raises(UserError, match=f"text short has 10 tokens, fewer than --context {CONTEXT}"):
        DecodeEvaluator(config(files, selectors=("dense",)), 1).texts([short])
