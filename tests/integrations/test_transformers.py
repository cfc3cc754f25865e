"""enable(model): the model's answers where the budget covers the text, our decoder's where it does not, refusals by name."""
import functools
import json
import random
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from conftest import Ran
from eval_inputs import PROSE
from torch import Tensor

import hashfast
from hashfast import train_hash
from hashfast.commands import eval
from hashfast.common import UserError
from hashfast.hash_attention import HashConfig
from hashfast.integrations.transformers_latency import random_transformers, time_generate
from hashfast.model import ModelArgs, RopeScaling, SparseSettings
from hashfast.research.data import Sequence
from hashfast.research.evaluator import DecodeEvaluator, EvalConfig
from hashfast.research.tasks import EXTRA, make_question
from hashfast.research.training import capture as capture_ours
from hashfast.runtime.checkpoint import load_model
from hashfast.runtime.decode import prefill
from hashfast.runtime.signatures import load_signatures, random_encoders, save_signatures

transformers = pytest.importorskip("transformers")
from transformers.cache_utils import Cache  # noqa: E402

from hashfast.integrations import transformers as hf  # noqa: E402
from hashfast.integrations import transformers_capture, transformers_needles  # noqa: E402

FAMILIES = ("Llama", "Mistral", "Qwen2", "Qwen3", "Phi3", "Olmo2", "Granite", "SmolLM3")
SHAPE = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2,
         "vocab_size": 96, "max_position_embeddings": 512, "initializer_range": 0.3, "bos_token_id": None, "eos_token_id": None,
         "pad_token_id": 0}
OWN = {"Granite": {"attention_multiplier": 0.125, "embedding_multiplier": 2.0}, "SmolLM3": {"no_rope_layers": [1, 0]}}
SPARSE = {"budget": 12, "sink": 2, "recent": 4}


@functools.cache
def model(family: str):
    torch.manual_seed(0)
    config = getattr(transformers, f"{family}Config")(**SHAPE, **OWN.get(family, {}))
    made = getattr(transformers, f"{family}ForCausalLM")(config).eval()
    made.set_attn_implementation("eager")
    return made


@pytest.fixture
def llama():
    yield model("Llama")
    hf.disable(model("Llama"))


def batch(seed: int = 1) -> tuple[Tensor, Tensor]:
    """Two prompts, the second with seven tokens of padding: ids and attention mask [2, 24]."""
    ids = torch.randint(1, SHAPE["vocab_size"], (2, 24), generator=torch.Generator().manual_seed(seed))
    mask = torch.ones_like(ids)
    ids[1, :7] = mask[1, :7] = 0
    return ids, mask


def answer(made, mask: Tensor | None = None, ids: Tensor | None = None, **options: object) -> Tensor:
    ids = batch()[0] if ids is None else ids
    mask = torch.ones_like(ids) if mask is None else mask
    options = {"max_new_tokens": 8, "do_sample": False} | options
    return made.generate(ids, attention_mask=mask, **options)[:, ids.shape[1]:]


def encoders(made, seed: int = 3) -> list:
    return random_encoders(HashConfig(), hf.fingerprint(made), seed)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_budget_over_the_length_gives_the_models_answer(family: str) -> None:
    made, mask = model(family), batch()[1]
    wanted = [answer(made), answer(made, mask)]
    ids = batch()[0]
    logits = made(ids).logits
    hf.enable(made, encoders(made), budget=64, sink=2, recent=4)
    assert made.config._attn_implementation == "hashfast"
    found = [answer(made), answer(made, mask), answer(made, mask, prefill_chunk_size=5)]
    assert torch.allclose(made(ids).logits, logits, atol=1e-4)  # without a cache: attention as ever
    hf.enable(made, encoders(made), **SPARSE)
    sparse = answer(made, mask)
    hf.disable(made)
    assert torch.equal(found[0], wanted[0]) and torch.equal(found[1], wanted[1]) and torch.equal(found[2], wanted[1])
    assert not torch.equal(sparse, wanted[1]), "12 tokens of 24 have been all that counts"
    assert made.config._attn_implementation == "eager" and "_prepare_cache_for_generation" not in vars(made)
    assert torch.equal(answer(made, mask), wanted[1])


@pytest.mark.parametrize("family", ["Llama", "Qwen2", "Qwen3"])
def test_sparse_answers_are_our_decoders(family: str, tmp_path: Path) -> None:
    made = model(family)
    made.save_pretrained(tmp_path)
    ours = load_model(tmp_path, "cpu", torch.float32)
    assert hf.fingerprint(made) == ours.fingerprint()
    chosen = encoders(made)
    ids, mask = batch()
    hf.enable(made, chosen, **SPARSE)
    found = answer(made, mask)
    hf.disable(made)
    ours.setup_caches(1, 40, chosen, SparseSettings(**SPARSE))
    for row, skip in enumerate((0, 7)):
        prompt = ids[row, skip:]
        tokens = [prefill(ours, prompt, 64).argmax().item()]
        for n in range(1, 8):
            logits = ours(torch.tensor([[tokens[-1]]]), torch.tensor([len(prompt) + n], dtype=torch.int32))
            tokens.append(logits[0, -1].argmax().item())
        assert found[row].tolist() == tokens


def test_sampled_and_repeated(llama) -> None:
    options = {"do_sample": True, "num_return_sequences": 3, "top_k": 20}

    def sampled() -> Tensor:
        torch.manual_seed(5)
        return answer(llama, batch()[1], **options)

    wanted = sampled()
    hf.enable(llama, encoders(llama), budget=64, sink=2, recent=4)
    assert torch.equal(sampled(), wanted)


def test_a_cache_serves_calls_that_fit(llama) -> None:
    hf.enable(llama, encoders(llama), **SPARSE)
    first = answer(llama)
    cache = llama._hashfast.cache
    answer(llama, ids=batch(2)[0][:, :9])
    with torch.inference_mode():
        assert torch.equal(answer(llama), first)
    assert llama._hashfast.cache is cache and cache.layers[0].state.signatures.is_contiguous()
    answer(llama, max_new_tokens=12)
    assert llama._hashfast.cache is not cache and llama._hashfast.cache.get_max_length() == 48
    answer(llama, ids=batch()[0][:1])
    assert llama._hashfast.cache.batch_size == 1


def test_sparsity_is_of_prompt_and_answer(llama) -> None:
    hf.enable(llama, encoders(llama), sparsity=2, sink=2, recent=4)
    answer(llama, ids=torch.randint(1, 90, (1, 150)), max_new_tokens=2)
    assert llama._hashfast.cache.layers[0].state.budget == 128


def test_the_step_is_compiled_once(llama) -> None:
    """By generate itself, as on a GPU, where it does so unasked. The graph is run eagerly: Inductor is no part of this."""
    hf.enable(llama, encoders(llama), **SPARSE)
    mask = batch()[1]
    wanted = [answer(llama, mask), answer(llama), answer(llama, ids=batch(2)[0][:, 3:])]
    compiled = transformers.CompileConfig(fullgraph=True, backend="eager", mode=None)
    compiled._compile_all_devices = True
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    found = [answer(llama, mask, compile_config=compiled), answer(llama, compile_config=compiled),
             answer(llama, ids=batch(2)[0][:, 3:], compile_config=compiled)]
    assert all(map(torch.equal, found, wanted))
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 1
    del llama._compiled_call


# --------------------------------------------------------------------------------------------------------------- refusals

@pytest.mark.parametrize(("kind", "fields", "message"), [
    ("Gemma2", {"head_dim": 8}, "Gemma2ForCausalLM caps attention logits"),
    ("DeepseekV3", {}, "DeepseekV3ForCausalLM has multi-head latent attention"),
    ("Qwen3Next", {}, "has layers of linear_attention"),
    ("GPT2", {}, "GPT2LMHeadModel has no rotary embeddings"),
])
def test_models_that_are_refused(kind: str, fields: dict, message: str) -> None:
    made = transformers.AutoModelForCausalLM
    with torch.device("meta"):
        made = made.from_config(getattr(transformers, f"{kind}Config")(**{"num_hidden_layers": 4, "vocab_size": 64} | fields))
    with pytest.raises(UserError, match=message):
        hf.enable(made)


def test_an_encoder_decoder_is_refused() -> None:
    with torch.device("meta"):
        made = transformers.T5ForConditionalGeneration(transformers.T5Config(num_layers=1, d_model=8, d_ff=8, vocab_size=64))
    with pytest.raises(UserError, match="is an encoder-decoder"):
        hf.enable(made)


@pytest.mark.parametrize(("options", "message"), [
    ({"num_beams": 2}, "generate by beam search is not supported"),
    ({"prompt_lookup_num_tokens": 2}, "generate by assisted generation is not supported"),
    ({"use_cache": False}, "use_cache=False"),
    ({"cache_implementation": "quantized"}, "cache_implementation='quantized'"),
    ({"past_key_values": "theirs"}, "a cache of your own"),
    ({"mask": "right"}, "pad prompts on the left"),
])
def test_calls_that_are_refused(llama, options: dict, message: str) -> None:
    hf.enable(llama, encoders(llama), **SPARSE)
    if "past_key_values" in options:
        options = {hf.CACHE: transformers.DynamicCache(config=llama.config)}
    mask = batch()[1].flip(1) if options.pop("mask", None) else None
    with pytest.raises(UserError, match=message):
        answer(llama, mask, ids=batch()[0][:1] if mask is None else None, **options)


def test_a_cache_that_is_not_ours_is_refused(llama) -> None:
    cache = transformers.DynamicCache(config=llama.config)
    ids = batch()[0]
    llama(ids, use_cache=True, **{hf.CACHE: cache})
    hf.enable(llama, encoders(llama), **SPARSE)
    with pytest.raises(UserError, match="the cache is not hashfast's"):
        llama(ids[:, :1], use_cache=True, **{hf.CACHE: cache})


def test_a_window_that_the_text_outgrows_is_refused() -> None:
    made = model("Mistral")
    made.config.sliding_window = 32
    try:
        hf.enable(made, encoders(made), **SPARSE)
        answer(made)
        with pytest.raises(UserError, match="33 tokens outgrow this model's sliding window of 32|34 tokens outgrow"):
            answer(made, max_new_tokens=10)
    finally:
        hf.disable(made)
        made.config.sliding_window = 4096


@pytest.mark.parametrize(("options", "message"), [
    ({"budget": 64, "sparsity": 8}, "give one"),
    ({"budget": 64}, "the budget of 64 tokens is under sink 64 plus recent 128"),
    ({"sparsity": 0.5}, "sparsity must be at least 1"),
    ({"recent": 0}, "recent at least 1"),
    ({"signatures": "nowhere.safetensors"}, "no signatures file at nowhere.safetensors"),
])
def test_settings_that_are_refused(llama, options: dict, message: str) -> None:
    with pytest.raises(UserError, match=message):
        hf.enable(llama, **options)
    assert llama.config._attn_implementation == "eager"


# --------------------------------------------------------------------------------------------------------------- training

@pytest.mark.parametrize("family", ["Llama", "Granite", "SmolLM3"])
def test_capture_is_what_a_pass_attends_with(family: str, tmp_path: Path) -> None:
    made = model(family)
    sequences = [Sequence(torch.randint(0, 96, (1, length))) for length in (20, 17)]
    found = [[*queries, *keys, *values] for queries, keys, values in transformers_capture.capture(made, sequences)]
    assert made.config._attn_implementation == "eager"
    made.set_attn_implementation("hashfast")
    try:
        for i, sequence in enumerate(sequences):
            recorders = [transformers_capture.RecordingLayer() for _ in range(2)]
            made(sequence.ids, use_cache=True, **{hf.CACHE: Cache(layers=recorders)})
            for layer, recorder in zip(found, recorders, strict=True):
                assert all(torch.allclose(layer[2 * part + i], recorder.recorded[part], atol=1e-5) for part in range(3))
    finally:
        made.set_attn_implementation("eager")
    if family == "Llama":
        made.save_pretrained(tmp_path)
        ours = capture_ours(load_model(tmp_path, "cpu", torch.float32), sequences)
        for layer, parts in zip(found, ours, strict=True):
            assert all(torch.allclose(a, b, atol=1e-4) for a, b in zip(layer, sum(parts, []), strict=True))


def test_a_family_beyond_ours_is_trained_and_used(tiny_checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture,
                                                  in_process: Callable[..., Ran]) -> None:
    folder, out = tmp_path / "olmo", tmp_path / "olmo.safetensors"
    torch.manual_seed(0)
    made = transformers.Olmo2ForCausalLM(transformers.Olmo2Config(**SHAPE | {"vocab_size": 300})).eval()
    made.save_pretrained(folder)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (folder / name).write_bytes((tiny_checkpoint / name).read_bytes())
    rng = random.Random(0)
    for name in ("one.txt", "two.txt"):
        (tmp_path / name).write_text(" ".join(rng.choices("river stone cloud lamp table window".split(), k=400)))
    ran = in_process(train_hash.main, "train_hash.py", "--backend", "transformers", "--checkpoint_path", folder, "--data",
                     tmp_path / "*.txt", "--out", out, "--device", "cpu", "--precision", "float32", "--context", 300,
                     "--sequences", 3, "--needles", 0, "--steps", 20, "--sink", 4, "--recent", 8)
    assert ran.code == 0, ran.err
    trained, about = load_signatures(out, hf.fingerprint(made))
    for layer in about["held_out"]["mass"]["books"]:
        assert layer["window"] < layer["trained"] <= layer["oracle"] + 1e-6
    assert capsys.readouterr().err == ""
    hf.enable(made, out, budget=32, sink=4, recent=8)
    assert torch.equal(made._hashfast.encoders[1].key[0].weight, trained[1].key[0].weight)
    assert answer(made, ids=torch.randint(1, 90, (1, 60))).shape == (1, 8)
    missing = in_process(train_hash.main, "train_hash.py", "--backend", "transformers", "--checkpoint_path", tmp_path / "none",
                         "--data", tmp_path / "*.txt", "--out", out, "--device", "cpu")
    assert missing.code == 2 and "transformers finds no model in" in missing.err


# ---------------------------------------------------------------------------------------------------------------- latency

@pytest.mark.parametrize("implementation", ["hashfast", "sdpa"])
def test_a_row_of_the_bench(implementation: str) -> None:
    rope = RopeScaling("llama3", factor=8.0, original_max_position=64)
    made = random_transformers(ModelArgs(2, 32, 4, 2, 8, 32, 64, 1e-5, 1e4, rope, max_position=512), "cpu", torch.float32)
    row = time_generate(made, "tiny", 2, 24, implementation, 4, 4)
    assert (row["model"], row["context"], row["batch"], row["implementation"]) == ("tiny", 24, 2, implementation)
    assert row["ms_per_token"] > 0 and row["first_token_s"] > 0 and row["recompilations"] == 0


def test_hashfast_has_both() -> None:
    assert hashfast.enable is hf.enable and hashfast.disable is hf.disable


def test_needles_are_answered_as_our_decoder_does(tiny_checkpoint: Path, tmp_path: Path,
                                                  in_process: Callable[..., Ran]) -> None:
    made = transformers_capture.load(tiny_checkpoint, "cpu", torch.float32)
    signatures, prose = tmp_path / "tiny.safetensors", tmp_path / "prose.txt"
    save_signatures(signatures, encoders(made), hf.fingerprint(made), {})
    prose.write_text(PROSE)
    evaluator = DecodeEvaluator(EvalConfig(tiny_checkpoint, 480, ("hash",), (signatures,), (16,), sink=4, recent=8), 1)
    evaluator.prepare()
    question = make_question(evaluator, [prose], "single", 480, 0)
    asked, count = len(question.ids) - question.answer, question.answer + EXTRA
    evaluator.read([question.ids[:question.context]])
    evaluator.score(evaluator.runs[1], [question.ids], [question.context], 1)
    wanted = evaluator.continue_greedily(evaluator.runs[1], [int(question.ids[asked - 1])], [asked - 1], count)
    hf.enable(made, signatures, budget=30, sink=4, recent=8)
    assert transformers_needles.greedy_answer(made, question) == wanted[0]

    flags = ("--checkpoint_path", tiny_checkpoint, "--device", "cpu", "--data", prose, "--context", 480, "--sink", 4,
             "--recent", 8, "--backend", "transformers", "--tasks", "single", "--samples", 1)
    rows = tmp_path / "rows.json"
    ran = in_process(eval.main, "hashfast eval", "needles", *flags, "--signatures", signatures, "--json", rows)
    assert ran.code == 0, ran.err
    assert [(row["ratio"], row["budget"], row["samples"]) for row in json.loads(rows.read_text())["rows"]] == [
        (16, 30, 1), (32, 15, 1)]
    ran = in_process(eval.main, "hashfast eval", "needles", *flags)
    assert ran.code == 2 and "--backend transformers measures --signatures FILE alone" in ran.err
