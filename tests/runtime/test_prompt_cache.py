"""Prompt files: what is reused gives the tokens of a cold run, what does not fit is refused; interruptions leave no trace."""
import json
import os
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from conftest import Ran
from safetensors import safe_open

from hashfast.common import UserError
from hashfast.hash_attention import HashConfig
from hashfast.model import ModelArgs, PrefillSettings, SparseSettings, Transformer
from hashfast.runtime import prompt_cache
from hashfast.runtime.prompt_cache import PromptCache, common_beginning
from hashfast.runtime.session import DecodeOptions, Session
from hashfast.runtime.signatures import random_encoders

ARGS = ModelArgs(2, 48, 6, 2, 8, 64, 120, 1e-5, 10000.0, max_position=512)
DENSE = PrefillSettings()
HASHED = PrefillSettings("hash", sparsity=4, chunk=16, tail=5)
BOOK = torch.randint(0, 120, (90,), generator=torch.Generator().manual_seed(0)).tolist()
QUESTIONS = [[*BOOK, *range(i, i + 7)] for i in (0, 50)]


def session(path: Path | None = None, prefill: PrefillSettings = DENSE, read_only: bool = False, batch: int = 1,
            hashed: bool = True, args: ModelArgs = ARGS, share: str = "kv", dtype: torch.dtype = torch.float32,
            seed: int = 1, **options: int) -> Session:
    torch.manual_seed(seed)
    model = Transformer(args).eval().to(dtype)
    encoders = random_encoders(HashConfig(share=share), model.fingerprint()) if hashed else None
    return Session(model, None, 128, encoders, SparseSettings(32, 4, 8) if hashed else None, DecodeOptions(
        batch, temperature=0, prefill=prefill, prompt_cache=path, prompt_cache_ro=read_only, prefill_chunk=16, **options))


def answer(here: Session, *prompts: list[int]) -> list[list[int]]:
    here.cached = []
    return here.run([*prompts], 12).tokens


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "made" / "book.safetensors"


def test_common_beginning() -> None:
    assert [common_beginning([1, 2, 3], other) for other in ([1, 2, 4], [1, 2], [], [1, 2, 3, 4], [2])] == [2, 2, 0, 3, 0]


@pytest.mark.parametrize(("prefill", "how", "reused"), [
    (DENSE, {}, 90), (DENSE, {"hashed": False}, 90), (HASHED, {}, 80),
    (replace(HASHED, tail=0), {"share": "query"}, 80), (DENSE, {"sparse_tail": 3}, 90),
    (HASHED, {"speculate_k": 2}, 80), (HASHED, {"batch": 2}, 80)], ids=str)
def test_a_second_question_gets_the_tokens_of_a_cold_run(prefill: PrefillSettings, how: dict, reused: int, path: Path) -> None:
    cold = [answer(session(None, prefill, **how), prompt) for prompt in QUESTIONS]
    assert answer(session(path, prefill, **how), QUESTIONS[0]) == cold[0]
    written = path.read_bytes()
    warm = session(path, prefill, **how)
    assert answer(warm, QUESTIONS[1]) == cold[1] != cold[0] and warm.reused == reused
    assert answer(warm, QUESTIONS[0]) == cold[0] and warm.reused >= reused
    assert path.read_bytes() == written  # most of it was there
    assert [each.name for each in path.parent.iterdir()] == [path.name]


@pytest.mark.parametrize("prefill", [DENSE, HASHED], ids=lambda settings: settings.mode)
def test_batches_share_a_beginning(prefill: PrefillSettings, path: Path) -> None:
    prompts = [QUESTIONS[0], QUESTIONS[1][:93], [*BOOK[:70], 1]]
    cold = [answer(session(None, prefill), prompt)[0] for prompt in prompts]
    for reused in (0, 70 if prefill.mode == "dense" else 64):
        batch = session(path, prefill, batch=3)
        assert answer(batch, *prompts) == cold and batch.reused == reused
    single = session(path, prefill)
    assert answer(single, QUESTIONS[0])[0] == cold[0] and single.reused == reused
    assert len(PromptCache(path, single.model, prefill).ids) == (97 if prefill.mode == "dense" else 64)


def test_another_book_replaces_the_file_and_turns_of_a_chat_do_not(path: Path) -> None:
    here = session(path)
    here.run([QUESTIONS[0]], 5)
    here.run([[*here.cached, *range(20)]], 5)  # a turn that goes on from the answer
    assert here.prompt_cache.ids == QUESTIONS[0]
    other = [5] * 40
    assert answer(session(path, read_only=True), other) == answer(session(), other)
    assert session(path).prompt_cache.ids == QUESTIONS[0]
    answer(session(path), other)
    assert session(path).prompt_cache.ids == other


def test_a_prompt_shorter_than_a_chunk_makes_no_sparse_file(path: Path) -> None:
    answer(session(path, HASHED), BOOK[:20])
    assert not path.exists()


@pytest.mark.parametrize(("name", "how"), [
    ("norms", {"seed": 2}), ("rope_theta", {"args": replace(ARGS, rope_theta=5e5)}), ("precision", {"dtype": torch.bfloat16}),
    ("signatures", {"hashed": False, "prefill": DENSE}), ("signatures", {"share": "query"}),
    ("n_layer", {"args": replace(ARGS, n_layer=1)}), ("prefill", {"prefill": DENSE}),
    ("prefill_sparsity", {"prefill": replace(HASHED, sparsity=8)}), ("prefill_chunk", {"prefill": replace(HASHED, chunk=32)})],
    ids=str)
def test_files_of_another_kind_are_refused(name: str, how: dict, path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Transformer, "hash_norms", lambda model: str(model.tok_embeddings.weight[0, 0].item())[:5])
    answer(session(path, HASHED), QUESTIONS[0])
    with pytest.raises(UserError, match=rf"{name} is .* there and .* here"):
        session(path, **{"prefill": HASHED, **how})


def test_damaged_files_are_refused(path: Path) -> None:
    with pytest.raises(UserError, match="no prompt file"):
        session(path, read_only=True)
    here = session(path)
    answer(here, QUESTIONS[0])
    whole = path.read_bytes()
    for damaged in (b"", whole[:4], whole[:300], whole[:-1], b"x" * 500, whole.replace(b"hashfast_prompt", b"hashfast_prompx"),
                    whole.replace(b"layers.1.v", b"layers.1.w")):
        path.write_bytes(damaged)
        with pytest.raises(UserError, match="not a whole prompt file"):
            session(path)


def test_a_save_that_is_killed_leaves_the_old_file(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    answer(session(path), BOOK)
    written = path.read_bytes()
    here = session(path)
    header = prompt_cache.header
    child = os.fork()
    if child == 0:  # dies with the header and no tensor written
        monkeypatch.setattr(prompt_cache, "pieces", lambda tensor: os._exit(9))
        answer(here, [7] * 50)
        os._exit(0)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 9
    assert path.read_bytes() == written and session(path).prompt_cache.ids == BOOK

    def full(*args: object) -> bytes:
        raise OSError(28, "No space left on device")

    for beside in path.parent.glob(".*.tmp"):
        beside.unlink()
    monkeypatch.setattr(prompt_cache, "header", full)
    with pytest.raises(UserError, match="No space left"):
        answer(here, [7] * 50)
    assert path.read_bytes() == written and [each.name for each in path.parent.iterdir()] == [path.name]
    monkeypatch.setattr(prompt_cache, "header", header)
    monkeypatch.setattr(shutil, "disk_usage", lambda folder: shutil._ntuple_diskusage(2, 1, 1))
    with pytest.raises(UserError, match="GiB are free"):  # before the prompt is read
        answer(session(path), [7] * 50)


def test_the_file_is_safetensors(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Copied in pieces of a few rows, both ways."""
    monkeypatch.setattr(prompt_cache, "_PIECE", 300)
    here = session(path, HASHED)
    answer(here, QUESTIONS[0])
    with safe_open(path, framework="pt") as file:
        assert json.loads(file.metadata()["hashfast_prompt"])["prefill_sparsity"] == 4
        assert file.get_tensor("ids").tolist() == BOOK[:80]
        cache = here.model.layers[1].attention.cache
        assert torch.equal(file.get_tensor("layers.1.k"), cache.k[0, :, :80])
        assert torch.equal(file.get_tensor("layers.1.signatures"), cache.signatures[0, :, :80])
    warm = session(path, HASHED)
    assert answer(warm, QUESTIONS[0]) == answer(session(None, HASHED), QUESTIONS[0]) and warm.reused == 80


# ------------------------------------------------------------------------------------------------------------------ flags

def test_flags(command: Callable[..., Ran], tiny_checkpoint: Path, tmp_path: Path) -> None:
    ids, file = ",".join(map(str, range(1, 101))), tmp_path / "book"
    flags = ("--checkpoint_path", tiny_checkpoint, "--prompt_ids", ids, "--temperature", 0, "--max_new_tokens", 8, "--json")
    sparse = (*flags, "--prefill", "hash", "--prefill_sparsity", 4, "--prefill_chunk", 16, "--prefill_tail", 4)
    cold = command(*sparse)
    assert cold.json["prefill"] == "hash" and 0.3 < cold.json["pairs_read"] < 0.7 and cold.json["tokens_reused"] == 0
    assert "of all pairs read" in cold.err
    assert command(*flags).json["pairs_read"] == 1
    made, warm = (command(*sparse, "--prompt_cache", file) for _ in range(2))
    assert made.tokens == warm.tokens == cold.tokens
    assert (made.json["tokens_reused"], warm.json["tokens_reused"]) == (0, 96) and "96 tokens from --prompt_cache" in warm.err
    assert command(*sparse, "--prompt_cache", file, "--prompt_cache_ro", "--attention", "hash").json["tokens_reused"] == 96


@pytest.mark.parametrize(("flags", "error"), [
    (("--prefill_sparsity", 8), "--prefill is dense; leave --prefill_sparsity out"),
    (("--prefill_tail", 8), "--prefill is dense; leave --prefill_tail out"),
    (("--prompt_cache_ro",), "there is no --prompt_cache; leave --prompt_cache_ro out"),
    (("--prefill", "hash", "--draft_checkpoint_path", "x"), "--prefill hash needs the verifying model's signatures"),
])
def test_flags_at_odds(flags: tuple, error: str, command: Callable[..., Ran], tiny_checkpoint: Path) -> None:
    ran = command("--checkpoint_path", tiny_checkpoint, *flags)
    assert ran.code == 2 and error in ran.err
