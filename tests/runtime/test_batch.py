"""Batches of different prompts: every sequence gets the tokens that it gets alone."""
import json
import re
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from conftest import COMPILED, GPU, Ran

from hashfast.hash_attention import HashConfig
from hashfast.model import ModelArgs, SparseSettings
from hashfast.runtime import memory
from hashfast.runtime.checkpoint import PRESETS, load_model
from hashfast.runtime.decode import Decoder, decode, prefill
from hashfast.runtime.sampling import Sampling
from hashfast.runtime.signatures import random_encoders
from hashfast.runtime.tokenizer import Tokenizer

IDS = [[7], [72, 101, 108, 108, 111, 32, 119], list(range(40, 80))]
HASH = ("--attention", "hash", "--budget", 16, "--sink", 4, "--recent", 4)


@pytest.fixture
def run(command: Callable[..., Ran], tiny_checkpoint: Path) -> Callable[..., Ran]:
    """run(flag, ...) decodes 24 tokens greedily with the tiny model on the CPU, and prints JSON."""
    def run(*flags: object, model: tuple = ("--checkpoint_path", tiny_checkpoint)) -> Ran:
        return command(*model, "--temperature", 0, "--max_new_tokens", 24, "--json", *flags)
    return run


@pytest.fixture
def write(tmp_path: Path) -> Callable[..., Path]:
    """write(line, ...) -> a file of these lines; what is no text becomes JSON."""
    def write(*rows: object) -> Path:
        file = tmp_path / "prompts.jsonl"
        file.write_text("".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows))
        return file
    return write


def alone(run: Callable[..., Ran], ids: list[int], *flags: object, **how: tuple) -> list[int]:
    return run("--prompt_ids", ",".join(map(str, ids)), *flags, **how).tokens[0]


# --------------------------------------------------------------------------------------------------------------- tokens

@pytest.mark.parametrize("flags", [
    (), HASH, ("--compile", "--max_seq_length", COMPILED["length"]), (*HASH, "--sparse_tail", 5), ("--prefill_chunk", 9),
])
def test_tokens_equal_those_of_each_prompt_alone(flags: tuple, run: Callable[..., Ran], write: Callable[..., Path]) -> None:
    flags = (*flags, "--ignore_eos")
    batch = run("--prompts", write(*({"ids": ids} for ids in IDS)), *flags).tokens
    eager = tuple(flag for flag in flags if flag != "--compile")
    assert batch == [alone(run, ids, *eager) for ids in IDS]
    assert [len(tokens) for tokens in batch] == [24, 24, 24] and len(set(map(tuple, batch))) == 3


def test_eight_prompts_of_very_different_lengths(run: Callable[..., Ran], write: Callable[..., Path],
                                                 checkpoint_copy: Callable[..., Path]) -> None:
    """32 to 1, at one budget, in float32; the shortest is shorter than the budget, the longest is read in several chunks."""
    model = ("--checkpoint_path", checkpoint_copy(max_position_embeddings=2 ** 16))
    random = torch.Generator().manual_seed(0)
    unit = 1024 if GPU else 160
    prompts = [torch.randint(256, (unit * length,), generator=random).tolist() for length in (32, 1, 24, 2, 16, 4, 12, 8)]
    flags = ("--attention", "hash", "--budget", 1024 if GPU else 224, "--ignore_eos")
    batch = run("--prompts", write(*({"ids": ids} for ids in prompts)), *flags, model=model).tokens
    assert batch == [run("--prompts", write({"ids": ids}), *flags, model=model).tokens[0] for ids in prompts]
    assert len(set(map(tuple, batch))) > 1


@pytest.mark.parametrize("flags", [(), HASH])
def test_sequences_end_at_different_steps(flags: tuple, run: Callable[..., Ran], write: Callable[..., Path],
                                          checkpoint_copy: Callable[..., Path]) -> None:
    """Two tokens of the longest prompt's and the shortest prompt's answers are declared end tokens."""
    file = write(*({"ids": ids} for ids in IDS))
    free = run("--prompts", file, *flags, "--ignore_eos").tokens
    ends = [free[0][3], free[2][9]]
    folder = checkpoint_copy(eos_token_id=ends)
    (folder / "generation_config.json").unlink()
    model = ("--checkpoint_path", folder)
    stop_ids = Tokenizer.load(folder).stop_ids
    expected = []
    for tokens in free:
        at = next((i for i, token in enumerate(tokens) if token in stop_ids), len(tokens))
        expected.append(tokens[:at + 1])
    ran = run("--prompts", file, *flags, model=model)
    assert ran.tokens == expected == [alone(run, ids, *flags, model=model) for ids in IDS]
    assert len(set(map(len, expected))) > 1 and min(map(len, expected)) < 24
    shown = [line for line in ran.out.splitlines()[:-1] if line.startswith("[")]
    assert {line[:4] for line in shown} >= {"[0] ", "[2] "}
    assert ran.out.index("[0] ") < ran.out.index("[2] ")  # the first to end is the first shown
    assert run("--prompts", file, *flags, "--num_samples", 2, model=model).tokens == 2 * expected


@pytest.mark.parametrize("hashed", [False, True])
def test_a_finished_sequence_stays_as_it_is(hashed: bool, tiny_checkpoint: Path) -> None:
    """After its end token a sequence keeps length and token and writes no further rows; the other goes on as if alone."""
    model = load_model(tiny_checkpoint, "cpu", torch.float32)
    encoders = random_encoders(HashConfig(), model.fingerprint()) if hashed else None
    settings = SparseSettings(16, sink=4, recent=4) if hashed else None
    tokens = {}
    for stop_ids in ((), None):
        model.setup_caches(2, 64, encoders, settings)
        with torch.inference_mode():
            first = torch.stack([prefill(model, torch.tensor(ids), 1, row=row) for row, ids in enumerate(IDS[1:])]).argmax(-1)
        if stop_ids is None:
            end = next(i for i, token in enumerate(tokens[()][0]) if i > 2 and token not in tokens[()][1])
            stop_ids = (tokens[()][0][end],)
        decoder = Decoder(model, 2, Sampling(temperature=0), False, stop_ids)
        lengths = torch.tensor([7, 40])
        rows = decode(decoder, first, lengths, 20)
        tokens[stop_ids] = [list(column) for column in zip(*rows, strict=True)]
    before, after = tokens.values()
    end = before[0].index(stop_ids[0])
    assert after[0] == before[0][:end] + [stop_ids[0]] * (20 - end)
    assert after[1] == before[1]
    assert decoder.seq_lens.tolist() == [7 + end + 1, 40 + 19] and decoder.active.tolist() == [0, 1]
    for layer in model.layers:
        for buffer in layer.attention.cache.buffers():
            assert not buffer[0, :, 7 + end + 1:].any()


@pytest.mark.parametrize("attention", ["dense", "hash"])
def test_no_recompilation_between_ragged_starts(attention: str, tiny_checkpoint: Path) -> None:
    """Of a compiled step; it gives the tokens of each prompt alone, not compiled."""
    model = load_model(tiny_checkpoint, "cpu", torch.float32)
    hashed = ()
    if attention == "hash":
        settings = SparseSettings(COMPILED["budget"], COMPILED["sink"], COMPILED["recent"])
        hashed = random_encoders(HashConfig(), model.fingerprint()), settings

    def greedy(decoder: Decoder, prompts: list[list[int]]) -> list[list[int]]:
        with torch.inference_mode():
            first = torch.stack([prefill(model, torch.tensor(ids), 1, row=row) for row, ids in enumerate(prompts)]).argmax(-1)
        rows = decode(decoder, first, torch.tensor([len(ids) for ids in prompts]), 24)
        return [list(column) for column in zip(*rows, strict=True)]

    torch._dynamo.reset()
    counters = torch._dynamo.utils.counters
    counters.clear()
    model.setup_caches(COMPILED["batch"], COMPILED["length"], *hashed)
    decoder = Decoder(model, COMPILED["batch"], Sampling(temperature=0), compiled=True)
    decoder.prepare()
    assert counters["stats"]["unique_graphs"] == 3
    batches = [IDS, [IDS[2], IDS[0], IDS[1]], [IDS[2] + IDS[1], IDS[1] * 3, [5]]]
    tokens = [greedy(decoder, prompts) for prompts in batches]
    assert counters["stats"]["unique_graphs"] == 3 and not counters["graph_break"]
    model.setup_caches(1, 96, *hashed)
    decoder = Decoder(model, 1, Sampling(temperature=0), compiled=False)
    assert tokens == [[greedy(decoder, [ids])[0] for ids in prompts] for prompts in batches]


# --------------------------------------------------------------------------------------------------------------- report

def test_texts_chats_and_ids(run: Callable[..., Ran], write: Callable[..., Path], tiny_checkpoint: Path) -> None:
    tokenizer = Tokenizer.load(tiny_checkpoint)
    messages = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hello?"}]
    file = write({"prompt": "Once upon a time", "source": "a tale"}, {"messages": messages}, {"ids": IDS[1]})
    prompts = [tokenizer.encode("Once upon a time"), tokenizer.encode_chat(messages), IDS[1]]
    ran = run("--prompts", file, "--batch_size", 3)
    result = ran.json
    assert result["prompt_tokens"] == [len(ids) for ids in prompts] and len(set(result["prompt_sha256"])) == 3
    assert result["new_tokens"] == [alone(run, ids) for ids in prompts]
    assert result["kv_bytes"] == 3 * 256 * (max(map(len, prompts)) + 24)
    assert len(result["text"]) == 3 and all(f"[{i}] {text}\n" in ran.out for i, text in enumerate(result["text"]))
    assert run("--prompts", file, "--no_stream").out.count("\n") == 1
    chat = run("--prompts", write({"prompt": "Hello?"}), "--chat")
    assert chat.json["prompt_tokens"] == len(tokenizer.encode_chat([{"role": "user", "content": "Hello?"}]))
    assert chat.out == chat.json["text"][0] + "\n" + chat.out.splitlines()[-1] + "\n"  # one prompt streams as always


@pytest.mark.parametrize("flags", [("--batch_size", 2), ("--speculate", "self", *HASH[2:]), HASH])
def test_more_prompts_than_fit(flags: tuple, run: Callable[..., Ran], write: Callable[..., Path],
                               monkeypatch: pytest.MonkeyPatch) -> None:
    """Two at a time, by --batch_size or by memory; the last batch is filled up, which nobody sees."""
    file = write(*({"ids": ids} for ids in (*IDS, *IDS[:2])))
    whole = run("--prompts", file, *(flags if "--batch_size" not in flags else ()), "--ignore_eos")
    with monkeypatch.context() as patched:
        patched.setattr(memory, "MOST_SEQUENCES", 2)
        ran = run("--prompts", file, *flags, "--ignore_eos", "--num_samples", 2)
    assert "\n5 prompts, 2 at a time\n" in ran.err and "at a time" not in whole.err
    assert ran.tokens == 2 * whole.tokens and ran.json["text"] == 2 * whole.json["text"]
    assert ran.json["kv_bytes"] < whole.json["kv_bytes"] and ran.json["prompt_tokens"] == whole.json["prompt_tokens"]
    shown = [line[:4] for line in ran.out.splitlines() if re.match(r"\[\d\] ", line)]  # of a batch in the order of their ends
    assert sorted(shown) == sorted(2 * [f"[{i}] " for i in range(5)])


def test_the_batch_that_fits(tiny_checkpoint: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = load_model(tiny_checkpoint, "cpu", torch.float32)
    encoders = random_encoders(HashConfig(), model.fingerprint())
    monkeypatch.setattr(memory, "free_memory", lambda device: 10 * 100 * (256 + 16))
    for signatures, length, count, expected in (
            (encoders, 100, 99, 10), (encoders, 101, 99, 9), (None, 100, 99, 10), (None, 100, 3, 3), (None, 10 ** 6, 99, 1),
            (None, 1, 99, memory.MOST_SEQUENCES)):
        assert memory.largest_batch([model], signatures, length, count, 2048) == expected


def test_the_budget_is_of_the_longest_prompt(run: Callable[..., Ran], write: Callable[..., Path]) -> None:
    file = write({"ids": [1]}, {"ids": [2] * 400})
    flags = ("--attention", "hash", "--sink", 4, "--recent", 8, "--sparsity", 4)
    assert run("--prompts", file, *flags).json["budget"] == 128  # of 424 tokens


def test_ids_need_no_tokenizer(run: Callable[..., Ran], write: Callable[..., Path], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(PRESETS, "tiny", ModelArgs(2, 32, 4, 2, 8, 64, 120, 1e-5, 10000.0, max_position=512))
    model = ("--random_weights", "tiny")
    result = run("--prompts", write({"ids": [1, 2]}, {"ids": [3]}), model=model).json
    assert [len(tokens) for tokens in result["new_tokens"]] == [24, 24] and result["text"] == []
    ran = run("--prompts", write({"ids": [1]}, {"prompt": "x"}), model=model)
    assert ran.code == 2 and "random weights have no tokenizer" in ran.err


# ------------------------------------------------------------------------------------------------------------- mistakes

@pytest.mark.parametrize("line", [
    "Hello", "[1, 2]", "{}", '"prompt"', "null", '{"prompt": 3}', '{"prompt": ""}', '{"ids": []}', '{"ids": "12"}',
    '{"ids": [1, true]}', '{"ids": 3}', '{"ids": [1.5]}', '{"messages": []}', '{"messages": ["x"]}', '{"messages": {"a": 1}}',
    '{"messages": [{"role": "user"}]}', '{"prompt": "a", "ids": [1]}', "[" * 10 ** 5, '{"prompt": "a"',
])
def test_bad_lines(line: str, run: Callable[..., Ran], write: Callable[..., Path]) -> None:
    file = write({"prompt": "good"}, line, {"prompt": "good"})
    ran = run("--prompts", file)
    assert ran.code == 2 and ran.out == "" and ran.err.count("\n") == 1, ran.err
    assert ran.err.startswith(f"error: {file} line 2 is no prompt; give a JSON object with one of prompt")


def test_other_mistakes(run: Callable[..., Ran], write: Callable[..., Path], tmp_path: Path) -> None:
    for flags, message in [
        (("--prompts", write({"ids": [1]}, {"ids": [2, 259]})), "prompts.jsonl line 2: token id 259 is outside"),
        (("--prompts", tmp_path / "none.jsonl"), "none.jsonl: No such file"),
        (("--prompts", tmp_path / "prompts.jsonl", "--compare", "x"), "leave --compare out"),
        (("--prompts", tmp_path / "prompts.jsonl", "--prompt", "x"), "--prompt: not allowed with argument --prompts"),
        (("--prompts", tmp_path / "prompts.jsonl", "--chat"), "a prompt of token ids is no chat; leave --chat out"),
    ]:
        ran = run(*flags)
        assert ran.code == 2 and ran.out == "" and ran.err.count("\n") == 1 and message in ran.err, ran.err
    ran = run("--prompts", write("", ""))
    assert ran.code == 2 and "is empty; give a file with text" in ran.err
    ran = run("--prompts", write({"ids": [1]}, {"ids": [2] * 500}))
    assert ran.code == 2 and "524 tokens are more than the model's 512" in ran.err
