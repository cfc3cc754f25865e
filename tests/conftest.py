"""What test files share: a tiny checkpoint, and the GPU or, where there is none, Triton's interpreter."""
import json
import os
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import pytest
import torch

from hashfast.common import run_command

GPU = torch.cuda.is_available()
DEVICE = "cuda" if GPU else "cpu"
if not GPU:
    os.environ["TRITON_INTERPRET"] = "1"  # must be set before anything imports triton
os.environ["OMP_NUM_THREADS"] = "1"  # of child processes; two would wait for each other longer than tiny products take
torch.set_num_threads(1)

CHATML = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{{ message['content'] }}<|im_end|>\n{% endfor %}"
    "<|im_start|>assistant\n"
)
# One geometry for all compiled tests of the tiny checkpoint, so that Inductor compiles a part once for all of them: three
# sequences, caches of 130 rows, and what hash steps read.
COMPILED = {"batch": 3, "length": 130, "budget": 16, "sink": 4, "recent": 4}
BYTES = 256  # the tokenizer's first ids, one per byte; the special tokens follow


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("markers", "slow: takes more than ten seconds")


def gpu_only(test: Callable[..., None]) -> Callable[..., None]:
    return pytest.mark.gpu(pytest.mark.skipif(not GPU, reason="needs a GPU")(test))


@pytest.fixture
def seeded() -> None:
    torch.manual_seed(0)


@pytest.fixture(scope="session")
def tiny_checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random Llama of two layers with a byte-level tokenizer and a ChatML template. Read only; `checkpoint_copy` is not."""
    transformers = pytest.importorskip("transformers")
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

    folder = tmp_path_factory.mktemp("tiny")
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
        vocab_size=BYTES + 3, max_position_embeddings=512, initializer_range=0.3, bos_token_id=None, eos_token_id=BYTES + 1)
    transformers.LlamaForCausalLM(config).save_pretrained(folder)
    vocabulary = {char: id for id, char in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    specials = ["<|im_start|>", "<|im_end|>", "<|endoftext|>"]
    tokenizer.add_special_tokens([AddedToken(token, special=True) for token in specials])
    tokenizer.save(str(folder / "tokenizer.json"))
    about = {"eos_token": "<|im_end|>", "chat_template": CHATML}
    (folder / "tokenizer_config.json").write_text(json.dumps(about))
    return folder


@pytest.fixture
def checkpoint_copy(tiny_checkpoint: Path, tmp_path: Path) -> Callable[..., Path]:
    """checkpoint_copy(field=value, ...) -> a folder to change or damage, with these fields in config.json."""
    def copy(**fields: object) -> Path:
        folder = shutil.copytree(tiny_checkpoint, tmp_path / "checkpoint")
        config = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps(config | fields))
        return folder
    return copy


class Ran(NamedTuple):
    code: int
    out: str
    err: str

    @property
    def json(self) -> dict:
        assert self.code == 0, self.err
        return json.loads(self.out.splitlines()[-1])

    @property
    def tokens(self) -> list[list[int]]:
        return self.json["new_tokens"]


@pytest.fixture
def in_process(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture) -> Callable[..., Ran]:
    """in_process(main, program, flag, ...) runs a command line's `main` in this process."""
    def run(main: Callable[[], None], *argv: object) -> Ran:
        monkeypatch.setattr(sys, "argv", [*map(str, argv)])
        code = 0
        try:
            run_command(main)
        except SystemExit as stop:
            code = stop.code
        return Ran(code, *capsys.readouterr())
    return run


@pytest.fixture
def command(in_process: Callable[..., Ran]) -> Callable[..., Ran]:
    """command(flag, ...) runs generate.py in this process, on the CPU."""
    from hashfast import generate

    return lambda *flags: in_process(generate.main, "generate.py", "--device", "cpu", *flags)
