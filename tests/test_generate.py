"""The command line as users run it: what it prints, what it reports, and one line for every mistake."""
import functools
import io
import json
import re
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from conftest import COMPILED, Ran
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer as Backend
from tokenizers import decoders, models, pre_tokenizers

import hashfast
from hashfast import generate
from hashfast.common import UserError
from hashfast.generate import parse_options
from hashfast.hash_attention import HashConfig
from hashfast.model import Fingerprint, ModelArgs, SparseSettings, Transformer
from hashfast.runtime import memory, session, signatures
from hashfast.runtime.checkpoint import PRESETS, load_model
from hashfast.runtime.memory import sparse_settings
from hashfast.runtime.prompts import Display, NewText
from hashfast.runtime.sampling import Sampling, probabilities, sample
from hashfast.runtime.session import DecodeOptions, Session
from hashfast.runtime.signatures import load_signatures, random_encoders, save_signatures
from hashfast.runtime.tokenizer import Tokenizer

SCRIPT = Path(generate.__file__)
BYTES = 256  # token ids below stand for bytes, those above are special
TINY = ModelArgs(2, 32, 4, 2, 8, 64, 120, 1e-5, 10000.0, max_position=512)


@pytest.fixture
def run(command: Callable[..., Ran], tiny_checkpoint: Path) -> Callable[..., Ran]:
    """run(flag, ...) continues a short text greedily with the tiny model, and prints JSON."""
    def run(*flags: object, prompt: tuple = ("--prompt", "The quick brown fox jumps over the lazy dog.")) -> Ran:
        greedy = ("--temperature", 0, "--max_new_tokens", 24, "--json")
        return command("--checkpoint_path", tiny_checkpoint, *prompt, *greedy, *flags)
    return run


def process(*flags: object, **how: object) -> subprocess.Popen:
    heed = functools.partial(signal.signal, signal.SIGINT, signal.SIG_DFL)  # which a shell's background jobs do not
    return subprocess.Popen([sys.executable, str(SCRIPT), "--device", "cpu", *map(str, flags)], stdout=subprocess.PIPE,
                            stderr=subprocess.PIPE, preexec_fn=heed, **how)


# ----------------------------------------------------------------------------------------------------------- end to end

def test_as_a_user_runs_it(tiny_checkpoint: Path, tmp_path: Path) -> None:
    child = process("--checkpoint_path", tiny_checkpoint, "--prompt", "Hello", "--max_new_tokens", 20, "--ignore_eos", "--json",
                    cwd=tmp_path)
    out, err = (stream.decode() for stream in child.communicate())
    assert child.returncode == 0, err
    result = json.loads(out.splitlines()[-1])
    assert out == result["text"][0] + "\n" + out.splitlines()[-1] + "\n"
    assert len(result["new_tokens"][0]) == 20
    assert "tok/s" in err and "GiB" in err
    assert list(tmp_path.iterdir()) == []


def test_a_mistake_as_a_user_sees_it(tmp_path: Path) -> None:
    child = process("--checkpoint_path", tmp_path / "nowhere")
    out, err = child.communicate()
    assert (child.returncode, out) == (2, b"")
    *_, last = err.decode().splitlines()  # a slow machine says before that it is loading
    assert last == f"error: no folder {tmp_path / 'nowhere'}; give a folder in the Hugging Face layout"


def test_interrupted_while_it_streams(checkpoint_copy: Callable[..., Path]) -> None:
    folder = checkpoint_copy(max_position_embeddings=10 ** 5)
    child = process("--checkpoint_path", folder, "--prompt", "Hello", "--max_new_tokens", 50000, "--ignore_eos")
    assert child.stdout.read(20)
    child.send_signal(signal.SIGINT)
    _, err = child.communicate(timeout=60)
    assert child.returncode == 130
    assert b"Traceback" not in err


# -------------------------------------------------------------------------------------------------------------- reports

def test_json_fields(run: Callable[..., Ran]) -> None:
    result = run().json
    for field in ("prefill_s", "prefill_tok_s", "decode_tok_s", "ms_per_token", "bandwidth_gb_s", "compile_s",
                  "peak_memory_gib"):
        assert type(result[field]) is float and result[field] > 0, field
    assert len(result["new_tokens"]) == len(result["text"]) == 1
    assert result["prompt_tokens"] == 44
    assert result["kv_bytes"] == 2 * 2 * 2 * 8 * 4 * (44 + 24)  # K and V, layers, heads, D, float32
    assert (result["signature_bytes"], result["budget"], result["attention"]) == (0, None, "dense")
    assert (result["device"], result["dtype"], result["tokens_read"]) == ("cpu", "float32", 44 + 11)
    assert result["versions"]["torch"] == torch.__version__


def test_json_of_hash_attention(run: Callable[..., Ran]) -> None:
    ran = run("--attention", "hash", "--budget", 32, "--sink", 4, "--recent", 8, "--dense_layers", 1, "--precision", "bfloat16")
    assert "no signatures for this model, so random projections" in ran.err
    result = ran.json
    assert result["budget"] == 32
    assert result["signature_bytes"] == 2 * 4 * (44 + 24)  # the first layer keeps none
    assert result["tokens_read"] == (55 + 32) / 2
    assert result["dtype"] == "bfloat16"


def test_one_new_token_has_no_decode_rate(run: Callable[..., Ran]) -> None:
    result = run("--max_new_tokens", 1).json
    assert len(result["new_tokens"][0]) == 1
    assert result["decode_tok_s"] is None and result["ms_per_token"] is None


def test_profile(run: Callable[..., Ran], tmp_path: Path) -> None:
    assert run("--profile", tmp_path / "traces" / "trace.json", "--num_samples", 2).code == 0
    assert json.loads((tmp_path / "traces" / "trace.json").read_text())["traceEvents"]


# ----------------------------------------------------------------------------------------------------------------- text

def test_streamed_text_is_the_whole_text(run: Callable[..., Ran]) -> None:
    """Sampled bytes are full of broken characters; those of the tiny model's first sequence must come out alike both ways."""
    for flags in (("--chat",), ("--batch_size", 2), ("--prompt_ids", "7,8,9")):
        ran = run("--temperature", 1.5, "--max_new_tokens", 200, *flags, prompt=())
        assert "\ufffd" in ran.json["text"][0]
        assert ran.out == ran.json["text"][0] + "\n" + ran.out.splitlines()[-1] + "\n"
    assert run("--no_stream").out.count("\n") == 1


def test_whole_characters_are_streamed(tiny_checkpoint: Path) -> None:
    tokenizer = Tokenizer.load(tiny_checkpoint)
    text = "é漢🙂 a"
    stream = NewText(tokenizer, tokenizer.encode("x"))
    parts = [stream.put(id) for id in tokenizer.encode(text) + [*tokenizer.stop_ids]]
    assert [part for part in parts if part] == list(text)
    assert stream.end() == ""


def test_a_text_goes_on_after_its_prompt_with_sentencepiece(tmp_path: Path) -> None:
    backend = Backend(models.WordLevel({"<unk>": 0, "▁Once": 1, "▁upon": 2, "▁a": 3}, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="always")
    backend.decoder = decoders.Metaspace(prepend_scheme="always")
    backend.save(str(tmp_path / "tokenizer.json"))
    tokenizer = Tokenizer.load(tmp_path)
    assert tokenizer.encode("Once upon a") == [1, 2, 3]
    assert NewText(tokenizer, [1]).whole([2, 3]) == " upon a"
    assert NewText(tokenizer, []).whole([2, 3]) == "upon a"  # the answer in a chat


def test_an_end_token_ends_a_sequence(run: Callable[..., Ran], checkpoint_copy: Callable[..., Path]) -> None:
    """A token that the first sequence alone soon comes to is declared an end token. It is reported, but not printed."""
    flags = ("--temperature", 1.5, "--batch_size", 2, "--prompt", "Hello")
    first, second = run(*flags, "--ignore_eos", prompt=()).tokens
    at, end = next((i, token) for i, token in enumerate(first) if i > 2 and token not in second and token < BYTES)
    folder = checkpoint_copy(eos_token_id=end)
    (folder / "generation_config.json").unlink()
    tokenizer = Tokenizer.load(folder)
    ran = run("--checkpoint_path", folder, *flags, prompt=())
    assert ran.tokens[0] == first[:at + 1] and len(ran.tokens[1]) > at + 1
    assert ran.json["text"][0] == tokenizer.decode(first[:at])
    assert ran.out.startswith(ran.json["text"][0] + "\n{")  # the stream stops where its sequence does
    assert run("--checkpoint_path", folder, "--ignore_eos", *flags, prompt=()).tokens == [first, second]


# --------------------------------------------------------------------------------------------------------------- tokens

def test_greedy_batches_and_samples_repeat(run: Callable[..., Ran]) -> None:
    (alone,) = run().tokens
    assert len(set(alone)) > 5
    assert run("--batch_size", 2).tokens == [alone, alone]
    assert run("--num_samples", 2).tokens == [alone, alone]
    assert run("--max_seq_length", 300, "--no_stream").tokens == [alone]
    assert run("--top_k", 1, "--temperature", 0.7).tokens == [alone]


def test_a_seed_repeats_samples(run: Callable[..., Ran]) -> None:
    flags = ("--num_samples", 3, "--temperature", 1.0)
    ran = run(*flags)
    assert len(ran.tokens) == len(ran.json["text"]) == 3
    assert len(set(map(tuple, ran.tokens))) == 3
    assert run(*flags).tokens == ran.tokens
    assert run(*flags, "--seed", 7).tokens != ran.tokens


@pytest.mark.parametrize("temperature", [1e-300, 1e-5, 1000.0])
def test_extreme_temperatures(temperature: float) -> None:
    logits = torch.tensor([[1.0, 3.0, 2.0, -float("inf")]]).expand(100, -1)
    chosen = sample(logits, Sampling(temperature, top_k=3))
    assert set(chosen.tolist()) == ({1} if temperature < 1 else {0, 1, 2})


def test_top_p_keeps_the_fewest_tokens_of_that_probability() -> None:
    """As the definition over all subsets says; after temperature and top-k; no probability is lost."""
    logits = torch.tensor([[0.4, 0.3, 0.2, 0.1], [0.1, 0.6, 0.1, 0.2]]).log()
    for p, kept in ((1e-6, [[0], [1]]), (0.4, [[0], [1]]), (0.41, [[0, 1], [1]]), (0.7001, [[0, 1, 2], [1, 3]]),
                    (1.0, [[0, 1, 2, 3]] * 2)):
        found = probabilities(logits, Sampling(1.0, None, p))
        assert [row.nonzero().flatten().tolist() for row in found] == kept
        torch.testing.assert_close(found.sum(-1), torch.ones(2))
    narrow = probabilities(logits, Sampling(1.0, 2, 0.58))  # of the two likeliest the first has 4/7 and 3/4
    assert [row.nonzero().flatten().tolist() for row in narrow] == [[0, 1], [1]]
    many = torch.randn(3, 1000, generator=torch.Generator().manual_seed(0))
    ranked, order = many.softmax(-1).sort(descending=True)
    for row, p in zip(probabilities(many, Sampling(1.0, None, 0.5)), ranked, strict=True):
        assert (row > 0).sum() == int((p.cumsum(0) < 0.5).sum()) + 1


def test_stop_texts(run: Callable[..., Ran], tiny_checkpoint: Path) -> None:
    """An answer ends before the first of them, shown or in JSON, alone, in a batch and speculating; nothing of one is shown."""
    flags = ("--temperature", 1.5, "--prompt", "Hello", "--batch_size", 2, "--max_new_tokens", 60)
    free = run(*flags, prompt=())
    whole, other = free.json["text"]
    at = next(i for i in range(5, len(whole) - 3) if "\ufffd" not in whole[i:i + 3] and whole.index(whole[i:i + 3]) == i
              and whole[i:i + 3] not in other and whole[i:i + 3].isprintable())
    stop = whole[at:at + 3]
    ran = run(*flags, "--stop", "not there", "--stop", stop, prompt=())
    assert ran.json["text"] == [whole[:at], other]
    assert ran.out.startswith(whole[:at] + "\n{")
    assert len(ran.tokens[0]) < len(free.tokens[0]) and ran.tokens[0] == free.tokens[0][:len(ran.tokens[0])]
    assert ran.tokens[1] == free.tokens[1]
    greedy = run().json["text"][0]
    stop = next(greedy[i:i + 2] for i in range(4, 20) if "\ufffd" not in greedy[i:i + 2])
    for flags in ((), ("--speculate", "self", "--sparsity", 2)):
        assert run("--stop", stop, *flags).json["text"] == [greedy[:greedy.index(stop)]]


def test_what_may_begin_a_stop_text_is_held_back(tiny_checkpoint: Path) -> None:
    tokenizer = Tokenizer.load(tiny_checkpoint)

    def parts(text: str, *stop: str) -> list[str]:
        stream = NewText(tokenizer, [], stop)
        return [*map(stream.put, tokenizer.encode(text)), stream.end()]

    assert parts("ab--c", "---") == ["a", "b", "", "", "--c", ""]
    assert parts("ab---c", "---") == ["a", "b", "", "", "", "", ""]
    assert parts("ab--", "---") == ["a", "b", "", "", "--"]
    assert "".join(parts("aab", "aab", "ab")) == "" and "".join(parts("xabab", "bc")) == "xabab"


def test_prompts_from_standard_input(run: Callable[..., Ran], monkeypatch: pytest.MonkeyPatch) -> None:
    wanted = run().tokens
    text = "The quick brown fox jumps over the lazy dog."
    for flags, content in ((("--prompt", "-"), text), (("--prompt_file", "-"), text),
                           (("--prompts", "-"), json.dumps({"prompt": text}))):
        monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(b"\xef\xbb\xbf" + content.encode())))
        assert run(*flags, prompt=()).tokens == wanted


def test_a_number_is_text_where_there_is_a_tokenizer(run: Callable[..., Ran]) -> None:
    assert run("--prompt", "1984", prompt=()).json["prompt_tokens"] == 4


def test_system_prompts(run: Callable[..., Ran], tiny_checkpoint: Path) -> None:
    messages = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hi"}]
    ids = Tokenizer.load(tiny_checkpoint).encode_chat(messages)
    ran = run("--prompt", "Hi", "--chat", "--system", "Be brief.", prompt=())
    assert ran.json["prompt_sha256"] == run("--prompt_ids", ",".join(map(str, ids)), prompt=()).json["prompt_sha256"]


def test_signatures_that_ship_are_found(run: Callable[..., Ran], tiny_checkpoint: Path, tmp_path: Path,
                                        monkeypatch: pytest.MonkeyPatch) -> None:
    """By the whole fingerprint, norms included; the listwise recipe's, one signature per KV head; named in one line."""
    monkeypatch.setattr(signatures, "signature_files", functools.partial(signatures.signature_files, tmp_path))
    model = load_model(tiny_checkpoint, "cpu", torch.float32).fingerprint()
    flags = ("--attention", "hash", "--budget", 16, "--sink", 4, "--recent", 8)
    other, shared = replace(model, norms="0" * 16), HashConfig(share="query")
    for name, of, config, recipe in (("a", other, HashConfig(), "listwise"), ("b", model, HashConfig(), "hata"),
                                     ("c", model, shared, "listwise")):
        save_signatures(tmp_path / f"{name}.safetensors", random_encoders(config, of, 7), of, {"recipe": recipe})
    (tmp_path / "junk.safetensors").write_bytes(b"junk")
    assert run(*flags).err.startswith("warning: no signatures for this model, so random projections choose the tokens")
    save_signatures(tmp_path / "d.safetensors", random_encoders(HashConfig(), model, 7), model, {"recipe": "listwise"})
    ran = run(*flags)
    assert ran.err.startswith(f"signatures: {tmp_path / 'd.safetensors'}\nmemory plan: ")
    assert ran.tokens == run(*flags, "--signatures", tmp_path / "d.safetensors").tokens != run().tokens


def test_models_and_signatures_that_fit(in_process: Callable[..., Ran], tiny_checkpoint: Path, tmp_path: Path,
                                        monkeypatch: pytest.MonkeyPatch) -> None:
    from hashfast.commands import list as command

    model = load_model(tiny_checkpoint, "cpu", torch.float32).fingerprint()
    other = replace(model, norms="0" * 16)
    for name, of in (("ours", model), ("theirs", other)):
        save_signatures(tmp_path / f"{name}.safetensors", random_encoders(HashConfig(), of), of, {"recipe": "listwise"})
    monkeypatch.chdir(tmp_path)
    assert "no models in checkpoints/; `hashfast download` fetches one" in in_process(command.main, "list").out
    (tmp_path / "checkpoints" / "owner").mkdir(parents=True)
    (tmp_path / "checkpoints" / "owner" / "tiny").symlink_to(tiny_checkpoint)
    (tmp_path / "checkpoints" / "broken").mkdir()
    (tmp_path / "checkpoints" / "broken" / "config.json").write_text("{}")
    out = in_process(command.main, "list", "--signatures", tmp_path).out
    assert "\ncheckpoints/owner/tiny: ours.safetensors\n" in out and "\ncheckpoints/broken: model_type is missing" in out


def test_token_ids_need_no_tokenizer(run: Callable[..., Ran], checkpoint_copy: Callable[..., Path]) -> None:
    flags = ("--prompt_ids", "5,6,7", "--ignore_eos")
    with_tokenizer = run(*flags, prompt=())
    assert with_tokenizer.json["prompt_tokens"] == 3 and len(with_tokenizer.json["text"]) == 1
    folder = checkpoint_copy()
    (folder / "tokenizer.json").unlink()
    without = run("--checkpoint_path", folder, *flags, prompt=())
    assert without.tokens == with_tokenizer.tokens and without.json["text"] == []
    assert "no tokenizer in" in run("--checkpoint_path", folder).err


def test_random_weights(command: Callable[..., Ran], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(PRESETS, "tiny", TINY)
    ran = command("--random_weights", "tiny", "--prompt", 700, "--max_new_tokens", 5, "--batch_size", 3, "--json",
                  "--attention", "hash", "--sparsity", 4)
    assert ran.json["prompt_tokens"] == 700  # beyond the preset's context: latency knows no bounds
    assert [len(tokens) for tokens in ran.tokens] == [5, 5, 5]
    assert ran.json["budget"] == 256 and ran.json["text"] == []


@pytest.mark.parametrize("flags, length, tokens, budget", [
    ((), 8192, 8192, 2048),
    (("--budget", "192"), 8192, 8192, 192),
    (("--budget", "1000"), 8192, 8192, 1000),
    ((), 300, 300, 300),
    (("--budget", "200"), 100, 100, 100),
    (("--sparsity", "16"), 8192, 6128, 384),
    (("--sparsity", "16"), 8192, 6144, 384),
    (("--sparsity", "16"), 8192, 6145, 448),
    (("--sparsity", "1"), 8192, 6145, 6208),
    (("--sparsity", "1000"), 8192, 6145, 256),
    (("--sparsity", "1000", "--sink", "4", "--recent", "8"), 8192, 6145, 76),
    (("--sparsity", "2.5"), 8192, 4000, 1600),
    (("--sparsity", "16"), 200, 200, 200),
])
def test_budget(flags: tuple[str, ...], length: int, tokens: int, budget: int) -> None:
    """`tokens` is prompt and new tokens, `length` that of the cache."""
    options = parse_options(["--checkpoint_path", "x", "--attention", "hash", *flags])
    settings = sparse_settings(length, tokens, options.budget, options.sparsity, options.sink, options.recent)
    assert settings == SparseSettings(budget, options.sink, options.recent)


def test_a_budget_of_the_whole_cache_gives_dense_tokens(run: Callable[..., Ran]) -> None:
    dense = run().tokens
    assert run("--sparse_tail", 10).tokens == dense
    for flags in ((), ("--sparse_tail", 10), ("--sparse_tail", 1000, "--batch_size", 2)):
        assert run("--attention", "hash", "--budget", 2048, *flags).tokens[0] == dense[0]


def test_a_sparse_tail_is_read_sparsely(run: Callable[..., Ran]) -> None:
    flags = ("--attention", "hash", "--budget", 13, "--sink", 4, "--recent", 8)
    assert run(*flags).tokens != run(*flags, "--sparse_tail", 30).tokens


def test_signatures_from_a_file(run: Callable[..., Ran], tiny_checkpoint: Path, tmp_path: Path) -> None:
    model = load_model(tiny_checkpoint, "cpu", torch.float32).fingerprint()
    save_signatures(tmp_path / "tiny.safetensors", random_encoders(HashConfig(), model, seed=1234), model, {})
    flags = ("--attention", "hash", "--budget", 16, "--sink", 4, "--recent", 8)
    ran = run(*flags, "--signatures", tmp_path / "tiny.safetensors")
    assert "warning" not in ran.err
    assert ran.tokens == run(*flags).tokens  # random ones of the same seed


@pytest.mark.slow
def test_compiled_prefill_and_steps_give_the_same_tokens(run: Callable[..., Ran]) -> None:
    prompt = ("--prompt", "The quick brown fox jumps over the lazy dog." * 2)  # more than half of a chunk: it is padded
    flags = ("--batch_size", COMPILED["batch"], "--max_seq_length", COMPILED["length"])
    eager = run(*flags, prompt=prompt)
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    compiled = run("--compile", "--compile_prefill", "--num_samples", 2, *flags, prompt=prompt)
    assert compiled.tokens == eager.tokens * 2
    # the step's stem, block and head; prefill before and after attention
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 5
    assert compiled.json["compile_s"] > eager.json["compile_s"]
    assert "warning" not in compiled.err


def test_without_a_compiler(run: Callable[..., Ran], monkeypatch: pytest.MonkeyPatch) -> None:
    eager = run()
    monkeypatch.setattr(shutil, "which", lambda name: None)
    ran = run("--compile", "--compile_prefill")
    assert ran.err.startswith("warning: no C++ compiler")
    assert ran.tokens == eager.tokens


def test_a_session_as_a_notebook_uses_it(run: Callable[..., Ran], tiny_checkpoint: Path, tmp_path: Path) -> None:
    """The same texts as the command's; a prompt that goes on from another, a chat, and one that does not fit."""
    model, tokenizer = load_model(tiny_checkpoint, "cpu", torch.float32), Tokenizer.load(tiny_checkpoint)
    save_signatures(tmp_path / "tiny.safetensors", random_encoders(HashConfig(), model.fingerprint()), model.fingerprint(), {})
    encoders, _ = load_signatures(tmp_path / "tiny.safetensors", model.fingerprint())
    hashed = ("--attention", "hash", "--signatures", tmp_path / "tiny.safetensors", "--budget", 32, "--sink", 4, "--recent", 8)
    settings = SparseSettings(32, sink=4, recent=8)
    cases = [((), (), 0), (("--speculate", "self", *hashed[2:]), (encoders, settings), 3), (hashed, (encoders, settings), 0)]
    for flags, how, k in cases:
        notebook = hashfast.Session(model, tokenizer, 128, *how, options=DecodeOptions(temperature=0, speculate_k=k))
        for text in ("The quick brown fox", "The quick brown fox jumps"):
            (wanted,) = run("--prompt", text, *flags, prompt=()).json["text"]
            assert notebook.generate(text, max_new_tokens=24) == wanted
    (wanted,) = run("--prompt", "Hi", "--chat", *hashed, prompt=()).json["text"]
    assert notebook.generate("Hi", 24, chat=True) == notebook.generate([{"role": "user", "content": "Hi"}], 24) == wanted
    with pytest.raises(UserError, match="a prompt of 128 tokens leaves no room in caches of 128"):
        notebook.generate("x" * 128)


# ---------------------------------------------------------------------------------------------------------- comparisons

def test_a_run_agrees_with_itself(run: Callable[..., Ran], tmp_path: Path) -> None:
    saved = run("--save", tmp_path / "runs" / "dense.json")
    assert list((tmp_path / "runs").iterdir()) == [tmp_path / "runs" / "dense.json"]
    file = json.loads((tmp_path / "runs" / "dense.json").read_text())
    assert file.pop("log_likelihood") < 0
    assert file == saved.json
    ran = run("--compare", tmp_path / "runs" / "dense.json")
    assert ran.json["agreement"] == 1.0
    assert ran.json["perplexity_ratio"] == pytest.approx(1.0, abs=1e-5)
    rows = [line.split() for line in ran.out.splitlines()]
    assert rows[3] == ["dense", "dense"]
    assert [row[:4] for row in rows[8:10]] == [["same", "argmax", "1.000", "1.000"], ["perplexity", "ratio", "1.000", "1.000"]]
    assert re.search(r"^verdict: dense reads 100% of the tokens that dense reads, decoding at \d+\.\d\d times its speed, and "
                     r"would have chosen 100% of its tokens; nothing to speak of is lost \(perplexity x 1.000\)\.$", ran.out,
                     re.MULTILINE)


def test_a_poor_selection_agrees_less(run: Callable[..., Ran], tmp_path: Path) -> None:
    file = tmp_path / "dense.json"
    run("--save", file)
    result = run("--compare", file, "--attention", "hash", "--budget", 12, "--sink", 4, "--recent", 8, "--batch_size", 2).json
    assert 0 <= result["agreement"] < 1 and result["perplexity_ratio"] > 1


def test_bad_comparisons(run: Callable[..., Ran], tmp_path: Path) -> None:
    file = tmp_path / "run.json"
    assert_refused(run("--compare", file), f"cannot read {file}: No such file or directory; give a file that --save wrote")
    for junk in ("", "{}", "[]", "null", '{"new_tokens": 3}', "\x00\xff"):
        file.write_text(junk, encoding="latin-1")
        assert_refused(run("--compare", file), "give a file that --save wrote")
    run("--save", file)
    assert_refused(run("--compare", file, "--prompt", "Another", prompt=()), "is of another prompt or model")
    assert_refused(run("--compare", file, "--max_new_tokens", 5), "has 24 new tokens")
    good = json.loads(file.read_text())
    for broken in ({"new_tokens": [["a", "b"]]}, {"log_likelihood": None}, {"decode_tok_s": "fast"}, {"attention": None}):
        file.write_text(json.dumps(good | broken))
        assert_refused(run("--compare", file), "give a file that --save wrote")
    file.write_text(json.dumps(good | {"new_tokens": [[1, 4000]]}))
    assert_refused(run("--compare", file), "is of another prompt or model")
    run("--max_new_tokens", 1, "--save", file)
    assert_refused(run("--compare", file), "has 1 new tokens; save 2 or more")


# ---------------------------------------------------------------------------------------------------------- interactive

def lines(monkeypatch: pytest.MonkeyPatch, *turns: str) -> None:
    """What a person types; then the terminal is closed."""
    waiting = iter(turns)

    def read(prompt: str) -> str:
        try:
            return next(waiting)
        except StopIteration:
            raise EOFError from None
    monkeypatch.setattr("builtins.input", read)


def test_a_conversation_keeps_the_cache(command: Callable[..., Ran], tiny_checkpoint: Path,
                                        monkeypatch: pytest.MonkeyPatch) -> None:
    prefilled, prompts, replies = [], [], []
    original, run = session.prefill, Session.run

    def counted(model, ids, batch, start=0, **more):
        prefilled.append((start, len(ids)))
        return original(model, ids, batch, start, **more)

    def recorded(self, ids, count, emit):
        prompts.extend(ids)
        answer = run(self, ids, count, emit)
        replies.extend(answer.tokens)
        return answer

    monkeypatch.setattr(session, "prefill", counted)
    monkeypatch.setattr(Session, "run", recorded)
    lines(monkeypatch, "Hello there.", "And now?")
    flags = ("--checkpoint_path", tiny_checkpoint, "--temperature", 0, "--max_new_tokens", 30)
    ran = command(*flags, "--interactive")
    assert ran.code == 0 and ran.err.startswith("memory plan: ") and ran.err.count("\n") == 1
    assert prefilled[0] == (0, len(prompts[0]))
    start, count = prefilled[1]
    assert start >= len(prompts[0]) and start + count == len(prompts[1])
    tokenizer = Tokenizer.load(tiny_checkpoint)
    turns = [("user", "Hello there."), ("assistant", NewText(tokenizer, []).whole(replies[0])), ("user", "And now?")]
    messages = [{"role": role, "content": content} for role, content in turns]
    assert prompts[1] == tokenizer.encode_chat(messages)
    fresh = command(*flags, "--prompt_ids", ",".join(map(str, prompts[1])), "--json")
    assert fresh.tokens == [replies[1]]


def test_commands_of_a_conversation(command: Callable[..., Ran], tiny_checkpoint: Path,
                                    monkeypatch: pytest.MonkeyPatch) -> None:
    seen = []
    monkeypatch.setattr(generate, "answer", lambda session, messages, count: seen.append(list(messages)) or "yes")
    lines(monkeypatch, "/help", "one", "/etc/hosts?", "/what", "/reset", "two", "/quit", "three")
    ran = command("--checkpoint_path", tiny_checkpoint, "--interactive", "--system", "Be brief.")
    turns = [[message["content"] for message in messages] for messages in seen]
    assert turns == [["Be brief.", "one"], ["Be brief.", "one", "yes", "/etc/hosts?"], ["Be brief.", "two"]]
    assert ran.code == 0 and ran.err.count("/reset  start the conversation again") == 2
    assert "no command /what; there are\n" in ran.err


def test_an_interrupted_answer_leaves_the_conversation(command: Callable[..., Ran], tiny_checkpoint: Path,
                                                       monkeypatch: pytest.MonkeyPatch) -> None:
    """What was shown of it counts; a turn whose answer had not begun does not. The next answer is that of a fresh run."""
    seen, put, prefill = [], Display.put, session.prefill
    encode_chat = Tokenizer.encode_chat

    def cut(self: Display, i: int, token: int, last: bool) -> None:
        put(self, i, token, last)
        if len(seen) == 1:
            self.count = getattr(self, "count", 0) + 1
            if self.count == 3:
                raise KeyboardInterrupt

    def cut_prefill(*args: object, **how: object) -> torch.Tensor:
        logits = prefill(*args, **how)
        if len(seen) == 2:
            raise KeyboardInterrupt
        return logits

    def recorded(self: Tokenizer, messages: list[dict]) -> list[int]:
        seen.append([dict(message) for message in messages])
        return encode_chat(self, messages)

    monkeypatch.setattr(Display, "put", cut)
    monkeypatch.setattr(session, "prefill", cut_prefill)
    monkeypatch.setattr(Tokenizer, "encode_chat", recorded)
    lines(monkeypatch, "one", "two", "three")
    flags = ("--checkpoint_path", tiny_checkpoint, "--temperature", 0, "--max_new_tokens", 12)
    ran = command(*flags, "--interactive")
    assert ran.code == 0, ran.err
    roles = [[message["role"] for message in messages] for messages in seen]
    assert roles == [["user"], ["user", "assistant", "user"], ["user", "assistant", "user"]]
    assert seen[2][2]["content"] == "three"
    ids = encode_chat(Tokenizer.load(tiny_checkpoint), seen[2])
    fresh = command(*flags, "--prompt_ids", ",".join(map(str, ids)), "--json")
    last = NewText(Tokenizer.load(tiny_checkpoint), []).whole(fresh.tokens[0])
    assert ran.out.endswith(last + "\n")


def test_a_conversation_ends(command: Callable[..., Ran], tiny_checkpoint: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    flags = ("--checkpoint_path", tiny_checkpoint, "--interactive", "--max_new_tokens", 5)
    lines(monkeypatch, "", "Never asked")
    ran = command(*flags)
    assert ran[:2] == (0, "") and ran.err.startswith("memory plan: ") and ran.err.count("\n") == 1
    lines(monkeypatch, *["On and on."] * 9)
    ran = command(*flags, "--max_seq_length", 150)
    assert ran.code == 2 and "has filled the cache of 150; start again with a larger --max_seq_length" in ran.err
    lines(monkeypatch, *["On and on."] * 9)
    ran = command(*flags, "--max_seq_length", 150, "--max_new_tokens", 120)
    assert re.search(r"\nnote: \d+ of 150 tokens are left; the conversation ends with them\n", ran.err)
    assert ran.code == 2 and "has filled the cache of 150" in ran.err.splitlines()[-1]


# ------------------------------------------------------------------------------------------------------------- mistakes

def assert_refused(ran: Ran, message: str) -> None:
    """Exit code 2 and one line."""
    assert ran.code == 2 and ran.out == ""
    assert ran.err.startswith("error: ") and ran.err.count("\n") == 1, ran.err
    assert message in ran.err


@pytest.mark.parametrize("flags, message", [
    (["--max_new_tokens", 0], "--max_new_tokens 0 is out of range; it must be from 1 to"),
    (["--max_new_tokens", -5], "--max_new_tokens -5"),
    (["--max_new_tokens", 10 ** 12], "--max_new_tokens 1000000000000"),
    (["--max_new_tokens", "many"], "--max_new_tokens: invalid int value: 'many'"),
    (["--num_samples", 0], "--num_samples 0"),
    (["--batch_size", 0], "--batch_size 0"),
    (["--top_k", 0], "--top_k 0"),
    (["--temperature", -1], "--temperature -1.0"),
    (["--temperature", "nan"], "--temperature nan is out of range; it must be from 0 to 1000.0"),
    (["--temperature", "inf"], "--temperature inf"),
    (["--seed", -1], "--seed -1"),
    (["--seed", 2 ** 63], "--seed 9223372036854775808"),
    (["--max_seq_length", 0], "--max_seq_length 0"),
    (["--max_seq_length", "long"], "--max_seq_length long is neither a number nor auto"),
    (["--prefill_chunk", 0], "--prefill_chunk 0"),
    (["--prompt", ""], "the prompt is empty"),
    (["--prompt_ids", "64", "--chat"], "a prompt of token ids is no chat; leave --chat out"),
    (["--top_p", 0], "--top_p 0.0 is out of range; it must be from 1e-06 to 1"),
    (["--top_p", 1.5], "--top_p 1.5 is out of range"),
    (["--stop", ""], "--stop is empty; give a text"),
    (["--system", "Be brief."], "a system prompt is part of a chat: give --chat or --interactive; leave --system out"),
    (["--sink", -1], "--sink -1"),
    (["--recent", 10 ** 20], "--recent 100000000000000000000"),
    (["--dense_layers", -1], "--dense_layers -1"),
    (["--sparse_tail", -1], "--sparse_tail -1"),
    (["--attention", "hash", "--sparsity", 0.5], "--sparsity 0.5 is out of range; it must be from 1"),
    (["--attention", "hash", "--sparsity", "nan"], "--sparsity nan"),
    (["--attention", "hash", "--sparsity", "inf"], "--sparsity inf"),
    (["--attention", "hash", "--budget", 0], "--budget 0"),
    (["--attention", "hash", "--budget", 191], "--budget 191 is less than --sink 64 plus --recent 128; give at least 192"),
    (["--attention", "hash", "--sink", 3000], "--budget 2048 is less than --sink 3000 plus --recent 128; give at least 3128"),
    (["--attention", "hash", "--budget", 512, "--sparsity", 4], "--sparsity: not allowed with argument --budget"),
    (["--budget", 512], "--attention is dense, which reads all tokens; leave --budget out"),
    (["--attention", "sliding"], "--attention: invalid choice: 'sliding'"),
    (["--precision", "int4"], "--precision: invalid choice: 'int4'"),
    (["--device", "abacus"], "--device abacus is not there; this machine has: cpu"),
    (["--device", "cudax"], "--device cudax is not there; this machine has: cpu"),
    (["--device", "cuda:99"], "--device cuda:99 is not there; this machine has: cpu"),
    (["--interactive", "--json"], "leave --json out"),
    (["--interactive", "--compare", "run.json"], "--compare repeats a single prompt; leave --compare out"),
    (["--interactive", "--batch_size", 2], "leave --batch_size and --num_samples out"),
    (["--random_weights", "llama-3.1-8b"], "give either --checkpoint_path FOLDER or --random_weights PRESET"),
    (["--tempature", 1], "unrecognized arguments: --tempature 1"),
])
def test_flags_out_of_range(flags: list, message: str, command: Callable[..., Ran], tiny_checkpoint: Path) -> None:
    assert_refused(command("--checkpoint_path", tiny_checkpoint, *flags), message)


def test_flags_without_a_checkpoint(command: Callable[..., Ran]) -> None:
    assert_refused(command(), "give either --checkpoint_path FOLDER or --random_weights PRESET")
    assert_refused(command("--random_weights", "gpt-5", "--prompt", 8), "unknown preset 'gpt-5'; use one of llama-3.1-8b, ")
    assert_refused(command("--random_weights", "mistral-7b"), "random weights have no tokenizer; give --prompt NUMBER")
    for count in (0, -3, 10 ** 15):
        assert_refused(command("--random_weights", "mistral-7b", "--prompt", count), f"--prompt {count} is out of range")
    assert_refused(command("--random_weights", "mistral-7b", "--prompt", 8, "--stop", "x"), "random weights have no text")


@pytest.mark.parametrize("ids, message", [
    ("1,2,259", "token id 259 is outside the model's vocabulary; give ids from 0 to 258"),
    ("-1", "token id -1 is outside"),
    ("1,,2", "--prompt_ids '1,,2' is not a list of numbers such as 1,2,3"),
    ("one", "'one' is not a list of numbers"),
    ("", "'' is not a list of numbers"),
])
def test_bad_token_ids(ids: str, message: str, command: Callable[..., Ran], tiny_checkpoint: Path) -> None:
    assert_refused(command("--checkpoint_path", tiny_checkpoint, f"--prompt_ids={ids}"), message)


@pytest.mark.parametrize("content, message", [
    (None, "No such file or directory; give a UTF-8 text file"),
    (b"", "is empty; give a file with text"),
    (b" \n\n", "is empty; give a file with text"),
    (b"\xff\xfe\x00", "give a UTF-8 text file"),
])
def test_bad_prompt_files(content: bytes | None, message: str, command: Callable[..., Ran], tiny_checkpoint: Path,
                          tmp_path: Path) -> None:
    file = tmp_path / "prompt.txt"
    if content is not None:
        file.write_bytes(content)
    ran = command("--checkpoint_path", tiny_checkpoint, "--prompt_file", file)
    assert_refused(ran, message)
    assert str(file) in ran.err
    assert_refused(command("--checkpoint_path", tiny_checkpoint, "--prompt_file", tmp_path), "Is a directory")


@pytest.mark.parametrize("flags, message", [
    (["--prompt", "x" * 100, "--max_seq_length", 90], "give --max_seq_length 110, a shorter prompt or fewer --max_new_tokens"),
    (["--prompt", "x" * 85, "--max_seq_length", 90], "85 prompt and 10 new tokens do not fit --max_seq_length 90"),
    (["--prompt", "x" * 510], "520 tokens are more than the model's 512 (max_position_embeddings or sliding_window in"),
    (["--prompt", "x" * 9, "--max_seq_length", 4096], "4096 tokens are more than the model's 512"),
])
def test_prompts_longer_than_the_cache(flags: list, message: str, command: Callable[..., Ran], tiny_checkpoint: Path) -> None:
    assert_refused(command("--checkpoint_path", tiny_checkpoint, "--max_new_tokens", 10, *flags), message)


def test_sliding_window_shorter_than_the_cache(command: Callable[..., Ran], checkpoint_copy: Callable[..., Path]) -> None:
    folder = checkpoint_copy(model_type="mistral", architectures=["MistralForCausalLM"], sliding_window=64)
    ran = command("--checkpoint_path", folder, "--prompt", "x" * 60, "--max_new_tokens", 10)
    assert_refused(ran, "70 tokens are more than the model's 64")


def test_too_little_memory(command: Callable[..., Ran], tiny_checkpoint: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(memory, "free_memory", lambda device: 2 ** 16)
    monkeypatch.setattr(Transformer, "setup_caches", lambda *args: pytest.fail("memory was taken"))
    flags = ("--checkpoint_path", tiny_checkpoint, "--prompt", "x" * 200, "--max_new_tokens", 100)
    assert_refused(command(*flags), "at most 256 tokens fit")  # 256 bytes of K and V a token
    ran = command(*flags, "--attention", "hash", "--batch_size", 2)
    assert ran.code == 2 and "at most 120 tokens fit" in ran.err  # and 16 of signatures, twice
    assert_refused(command(*flags, "--max_seq_length", "auto"), "at most 256 tokens fit")
    ran = command(*flags, "--speculate", "self", "--speculate_k", 10)
    assert ran.code == 2 and "at most 230 tokens fit" in ran.err  # and 10 rows beyond the text


def test_memory_plan(run: Callable[..., Ran], monkeypatch: pytest.MonkeyPatch) -> None:
    weights = 4 * (2 * 259 * 32 + 2 * (32 * 64 + 32 * 32 + 3 * 32 * 64 + 2 * 32) + 32)
    for free, length, fits in ((2 ** 40, 512, 2 ** 32), (2 ** 16, 256, 256)):
        monkeypatch.setattr(memory, "free_memory", lambda device, free=free: free)
        ran = run("--max_seq_length", "auto")
        assert ran.json["kv_bytes"] == 256 * length
        assert ran.err.splitlines()[0] == (
            f"memory plan: weights {weights / 2 ** 30:.2f} GiB, K and V 0.00 GiB, signatures 0.0 MiB for {length} tokens, "
            f"work 0.00 GiB at most; up to {fits} tokens fit")
    monkeypatch.setattr(memory, "free_memory", lambda device: 2 ** 34)
    ran = run("--attention", "hash", "--budget", 500, "--max_seq_length", "auto", "--batch_size", 2)
    assert f"signatures {2 * 16 * 512 / 2 ** 20:.1f} MiB for 2 x 512 tokens, " in ran.err
    assert f"up to {2 ** 34 // 544} tokens fit" in ran.err


def test_prefill_chunks(run: Callable[..., Ran], monkeypatch: pytest.MonkeyPatch) -> None:
    (whole,), read, original = run().tokens, [], Transformer.prefill

    def counted(self, tokens, *more):
        read.append(len(tokens))
        return original(self, tokens, *more)

    monkeypatch.setattr(Transformer, "prefill", counted)
    assert run("--prefill_chunk", 10).tokens == [whole]
    assert read == [10, 10, 10, 10, 4]


@pytest.mark.parametrize("damage, message", [
    ("missing", "no folder"),
    ("empty", "no config.json in"),
    ("a file", "config.json"),
    ("no weights", "no weights in"),
    ("cut weights", "damaged or incomplete, download it again"),
    ("cut config", "config.json is not valid JSON"),
    ("junk tokenizer", "cannot read tokenizer"),
    ("no tokenizer", "no tokenizer in"),
])
def test_damaged_checkpoints(damage: str, message: str, command: Callable[..., Ran],
                             checkpoint_copy: Callable[..., Path]) -> None:
    folder = checkpoint_copy()
    config, weights, tokenizer = (folder / name for name in ("config.json", "model.safetensors", "tokenizer.json"))
    if damage == "cut weights":
        weights.write_bytes(weights.read_bytes()[:-100])
    elif damage == "cut config":
        config.write_text(config.read_text()[:40])
    elif damage == "junk tokenizer":
        tokenizer.write_text("junk")
    elif damage in ("no weights", "no tokenizer"):
        (weights if damage == "no weights" else tokenizer).unlink()
    else:
        shutil.rmtree(folder)
        if damage == "empty":
            folder.mkdir()
        elif damage == "a file":
            folder.touch()
    ran = command("--checkpoint_path", folder)
    assert_refused(ran, message)
    assert str(folder) in ran.err


@pytest.mark.parametrize("fields, message", [
    ({"model_type": "gpt2"}, "model_type 'gpt2' is not supported"),
    ({"model_type": None}, "model_type is missing"),
    ({"num_attention_heads": "four"}, "num_attention_heads must be a whole number"),
    ({"qk_norm": True}, "qk_norm is not supported"),
    ({"rope_parameters": {"rope_type": "longrope", "rope_theta": 1e4}}, "RoPE type 'longrope'"),
    ({"clip_qkv": 8.0}, "clip_qkv is not supported"),
    ({"intermediate_size": 65}, "take both from the same model"),
])
def test_unsupported_configs(fields: dict, message: str, command: Callable[..., Ran],
                             checkpoint_copy: Callable[..., Path]) -> None:
    assert_refused(command("--checkpoint_path", checkpoint_copy(**fields)), message)


@pytest.mark.parametrize("change, message", [
    ({"model.norm.weight": None}, "lacks tensor model.norm.weight; download all files of the model"),
    ({"model.layers.0.self_attn.q_norm.weight": torch.ones(8)}, "tensor model.layers.0.self_attn.q_norm.weight, unknown"),
    ({"model.norm.weight": torch.ones(31)}, "is [31], but config.json makes it [32]"),
])
def test_bad_tensors(change: dict, message: str, command: Callable[..., Ran], checkpoint_copy: Callable[..., Path]) -> None:
    folder = checkpoint_copy()
    tensors = load_file(folder / "model.safetensors") | change
    save_file({name: tensor for name, tensor in tensors.items() if tensor is not None}, folder / "model.safetensors")
    assert_refused(command("--checkpoint_path", folder), message)


def test_bad_signatures(command: Callable[..., Ran], tiny_checkpoint: Path, tmp_path: Path) -> None:
    file = tmp_path / "signatures.safetensors"
    flags = ("--checkpoint_path", tiny_checkpoint, "--attention", "hash", "--signatures", file)
    assert_refused(command(*flags), f"no signatures file at {file}; train one with train_hash.py")
    file.write_bytes(b"junk" * 100)
    assert_refused(command(*flags), f"{file} is not a hashfast signatures file")
    shutil.copy(tiny_checkpoint / "model.safetensors", file)
    assert_refused(command(*flags), f"{file} is not a hashfast signatures file")
    other = Fingerprint(n_layer=3, n_head=4, n_kv_head=2, head_dim=8, rope_theta=1e4, vocab_size=259)
    save_signatures(file, random_encoders(HashConfig(), other), other, {})
    assert_refused(command(*flags), f"{file} holds signatures of another model: n_layer is 3 there and 2 here")


@pytest.mark.parametrize("flag", ["--save", "--profile"])
def test_nothing_half_written(flag: str, run: Callable[..., Ran], tmp_path: Path) -> None:
    target = tmp_path / "taken"
    target.mkdir()  # a folder stands where the file should go
    ran = run(flag, target)
    assert ran.code == 2 and ran.err.startswith(f"error: {flag} {target} cannot be written") and ran.err.count("\n") == 1
    assert list(tmp_path.iterdir()) == [target] and not list(target.iterdir())
