"""Broken and hostile input: a command ends soon, in little memory, with one line and exit code 2, and leaves nothing by halves.

Cases run in forked children of this process, which has all modules loaded, under limits of memory, CPU time and file size.
"""
import contextlib
import gc
import json
import os
import resource
import shutil
import signal
import struct
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from conftest import Ran
from safetensors.torch import load_file, save_file

from hashfast import common, generate, train_hash
from hashfast.commands import convert_gguf, quantize
from hashfast.common import UserError, atomic_folder, atomic_path, run_command
from hashfast.hash_attention import HashConfig
from hashfast.model import Fingerprint
from hashfast.runtime import quantize as quantizing
from hashfast.runtime import tokenizer as tokenizers
from hashfast.runtime.checkpoint import load_model
from hashfast.runtime.signatures import load_signatures, random_encoders, save_signatures
from hashfast.runtime.tokenizer import Tokenizer

MEMORY = 2 ** 30  # bytes that a case may take on top of this process's own
SECONDS = 20
MODEL = Fingerprint(2, 4, 2, 8, 1e4, 259)


def bounded(main: Callable[[], None], *argv: object, stdin: int | str | None = "", stdout: int | str | None = "out",
            file_size: int | None = None, user: int | None = None) -> Ran:
    """Run a command line's `main` in a forked child under limits -> what it said.

    stdin, stdout: a path, or None for closed; "out" is kept.  file_size: the most bytes of a file, as on a full disk.
    user: the id of another one.
    """
    with tempfile.TemporaryDirectory() as kept:
        gc.collect()
        child = os.fork()
        if child == 0:
            with contextlib.suppress(BaseException):
                os._exit(_in_child(main, [*map(str, argv)], Path(kept), stdin, stdout, file_size, user))
            os._exit(99)
        deadline = time.monotonic() + 3 * SECONDS
        while (ended := os.waitpid(child, os.WNOHANG))[0] == 0:
            if time.monotonic() > deadline:
                os.kill(child, signal.SIGKILL)
            time.sleep(0.005)
        files = [Path(kept) / name for name in ("out", "err")]
        texts = [file.read_text(errors="replace") if file.exists() else "" for file in files]
        return Ran(os.waitstatus_to_exitcode(ended[1]), *texts)


def _in_child(main: Callable[[], None], argv: list[str], kept: Path, stdin: str | None, stdout: str | None,
              file_size: int | None, user: int | None) -> int:
    for number, path, flags in ((0, stdin and os.open(stdin, os.O_RDONLY), "r"),
                                (1, stdout and os.open(kept / stdout, os.O_WRONLY | os.O_CREAT), "w"),
                                (2, os.open(kept / "err", os.O_WRONLY | os.O_CREAT), "w")):
        stream = None
        if path == "":
            path = os.open(os.devnull, os.O_RDONLY)
        if path is not None:
            os.dup2(path, number)
            stream = os.fdopen(number, flags, closefd=False)
        else:
            os.close(number)
        setattr(sys, ("stdin", "stdout", "stderr")[number], stream)
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    resource.setrlimit(resource.RLIMIT_AS, (pages * resource.getpagesize() + MEMORY,) * 2)
    used = sum(resource.getrusage(resource.RUSAGE_SELF)[:2])
    resource.setrlimit(resource.RLIMIT_CPU, (int(used) + SECONDS,) * 2)
    if file_size is not None:
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (file_size,) * 2)
    if user is not None:
        os.setuid(user)
    sys.argv = argv
    code = 0
    try:
        run_command(main)
    except SystemExit as stop:
        code = stop.code or 0
    with contextlib.suppress(OSError, AttributeError):
        sys.stdout.flush()
    with contextlib.suppress(OSError, AttributeError):
        sys.stderr.flush()
    return code


@pytest.fixture(scope="module")
def generated(tiny_checkpoint: Path) -> Callable[..., Ran]:
    """generated(flag, ..., **limits) runs generate.py on the tiny model, bounded."""
    def run(*flags: object, checkpoint: Path = tiny_checkpoint, **limits: object) -> Ran:
        return bounded(generate.main, "generate.py", "--device", "cpu", "--checkpoint_path", checkpoint, "--temperature", 0,
                       "--max_new_tokens", 4, *flags, **limits)
    warm = run("--prompt", "x", "--chat", "--attention", "hash", "--json")
    assert warm.code == 0, warm.err
    Tokenizer.load(tiny_checkpoint).encode_chat([{"role": "user", "content": "x"}])  # imports that children then share
    return run


def assert_refused(ran: Ran, message: str) -> None:
    lines = ran.err.strip().splitlines()
    assert ran.code == 2 and lines, ran
    assert lines[-1].startswith("error: ") and message in lines[-1], ran.err
    assert "Traceback" not in ran.err


# -------------------------------------------------------------------------------------------------------------- outputs

@pytest.mark.parametrize("flag", ["--save", "--profile"])
def test_devices_and_pipes_are_no_outputs(flag: str, generated: Callable[..., Ran], tmp_path: Path) -> None:
    pipe, link = tmp_path / "pipe", tmp_path / "link"
    os.mkfifo(pipe)
    link.symlink_to("/dev/full")
    before = os.stat("/dev/full").st_rdev
    for path in ("/dev/full", pipe, link):
        assert_refused(generated("--prompt", "x", flag, path), f"{flag} {path} cannot be written: it is no regular file")
    assert os.stat("/dev/full").st_rdev == before and link.is_symlink() and sorted(tmp_path.iterdir()) == [link, pipe]


def test_writing_through_links(tmp_path: Path) -> None:
    (tmp_path / "there").mkdir()
    real, link, dangling, loop = (tmp_path / name for name in ("there/real", "link", "dangling", "loop"))
    real.write_text("old")
    link.symlink_to(real)
    dangling.symlink_to("there/new")
    loop.symlink_to(loop)
    for path in (link, dangling):
        with atomic_path(path) as beside:
            beside.write_text("new")
        assert path.is_symlink() and path.read_text() == "new"
    assert real.read_text() == "new" and sorted(path.name for path in (tmp_path / "there").iterdir()) == ["new", "real"]
    with pytest.raises(UserError, match="loop: Too many levels of symbolic links"), atomic_path(loop):
        pass


def test_streams_that_are_closed_or_full(generated: Callable[..., Ran]) -> None:
    assert_refused(generated("--prompt", "x", stdout=None), "standard output is closed; send it somewhere")
    assert_refused(generated("--prompt", "x", stdout="/dev/full"), "cannot write standard output: No space left on device")
    assert_refused(generated("--help", stdout="/dev/full"), "cannot write standard output: No space left on device")
    assert_refused(generated("--prompt", "-", stdin=None), "standard input is empty")
    assert_refused(generated("--prompt_file", "-", stdin="/dev/zero"), "standard input is longer than")
    ended = generated("--interactive", stdin=None)
    assert ended.code == 0 and "Traceback" not in ended.err


def test_a_full_disk_during_training(tiny_checkpoint: Path, tmp_path: Path) -> None:
    (tmp_path / "text.txt").write_text("river stone cloud lamp. " * 400)
    out = tmp_path / "signatures.safetensors"
    flags = ("--checkpoint_path", tiny_checkpoint, "--data", tmp_path / "text.txt", "--out", out, "--device", "cpu",
             "--context", 480, "--sequences", 1, "--needles", 0, "--steps", 1, "--sink", 4, "--recent", 8)
    ran = bounded(train_hash.main, "train_hash.py", *flags, file_size=4096)
    assert_refused(ran, "cannot write")
    assert "choose a writable place with free space" in ran.err
    left = [path for path in tmp_path.rglob("*") if path.is_file()]
    assert left == [tmp_path / "text.txt"]


def test_a_full_disk_during_quantising(tiny_checkpoint: Path, tmp_path: Path) -> None:
    ran = bounded(quantize.main, "quantize", "--checkpoint_path", tiny_checkpoint, "--out", tmp_path / "q", "--device", "cpu",
                  file_size=4096)
    assert_refused(ran, f"cannot write {tmp_path / 'q'}")
    assert not list(tmp_path.iterdir())


def test_what_a_killed_quantize_leaves_the_next_one_cleans(tiny_checkpoint: Path, tmp_path: Path,
                                                           monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(quantizing, "copy_small_files", lambda *folders: os.kill(os.getpid(), signal.SIGKILL))
    flags = ("quantize", "--checkpoint_path", tiny_checkpoint, "--out", tmp_path / "q", "--device", "cpu")
    assert bounded(quantize.main, *flags).code == -signal.SIGKILL
    (left,) = tmp_path.iterdir()
    monkeypatch.undo()
    with atomic_folder(tmp_path / "q") as at_work:  # of a process that lives
        assert bounded(quantize.main, *flags).code == 0
        assert not left.exists() and at_work.exists()
        shutil.rmtree(tmp_path / "q")
    assert list(tmp_path.iterdir()) == [tmp_path / "q"]


# --------------------------------------------------------------------------------------------------------------- inputs

@pytest.mark.parametrize("flag", ["--prompt_file", "--prompts", "--compare"])
def test_pipes_and_devices_are_no_inputs(flag: str, generated: Callable[..., Ran], tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    for path in (tmp_path / "pipe", "/dev/zero"):
        assert_refused(generated(flag, path), f"cannot read {path}: not a regular file; give a")


@pytest.mark.parametrize("name", ["config.json", "tokenizer.json", "tokenizer_config.json", "model.safetensors"])
def test_pipes_and_devices_in_a_checkpoint(name: str, generated: Callable[..., Ran],
                                           checkpoint_copy: Callable[..., Path]) -> None:
    folder = checkpoint_copy()
    (folder / name).unlink()
    if name.startswith("t"):
        os.mkfifo(folder / name)
    else:
        (folder / name).symlink_to("/dev/zero")
    ran = generated("--prompt", "x", "--chat", checkpoint=folder)
    assert_refused(ran, "no chat template" if name == "tokenizer_config.json" else str(folder))


def test_byte_order_marks_and_blank_lines(generated: Callable[..., Ran], tmp_path: Path) -> None:
    file = tmp_path / "prompt"
    file.write_bytes(b"\xef\xbb\xbfHello\r\nyou")
    assert generated("--prompt_file", file, "--json").json["prompt_tokens"] == len("Hello\nyou")
    file.write_bytes(b'\xef\xbb\xbf\n{"prompt": "one"}\r\n\n   \n{"prompt": "three"}\n\n')
    assert generated("--prompts", file, "--json").json["prompt_tokens"] == [3, 5]
    file.write_bytes(b'\n{"prompt": "one"}\n\n{"ids": [1, 300]}\n')
    assert_refused(generated("--prompts", file), f"{file} line 4: token id 300 is outside")
    file.write_bytes("Hello".encode("utf-16"))
    assert_refused(generated("--prompt_file", file), "not UTF-8 at byte 0; give a UTF-8 text file")


def test_contents_in_parts(generated: Callable[..., Ran], tmp_path: Path) -> None:
    file = tmp_path / "chats.jsonl"
    parts = [{"type": "text", "text": "Hel"}, {"type": "text", "text": "lo"}]
    chats = [[{"role": "user", "content": "Hello"}], [{"role": "user", "content": parts}], [{"role": "user", "content": None}]]
    file.write_text("\n".join(json.dumps({"messages": chat}) for chat in chats))
    plain, joined, empty = generated("--prompts", file, "--json").json["prompt_tokens"]
    assert plain == joined == empty + 5
    for content in ([{"type": "image", "image": "x"}], 3, [3], {"text": "x"}):
        file.write_text(json.dumps({"messages": [{"role": "user", "content": content}]}))
        assert_refused(generated("--prompts", file), f"{file} line 1 is no prompt")


def test_deep_json(generated: Callable[..., Ran], checkpoint_copy: Callable[..., Path], tmp_path: Path) -> None:
    deep = tmp_path / "deep.json"
    deep.write_text("[" * 10 ** 5)
    assert_refused(generated("--prompts", deep), "line 1 is no prompt")
    assert_refused(generated("--prompt", "x", "--compare", deep), f"cannot use --compare {deep}")
    folder = checkpoint_copy()
    for name in ("tokenizer.json", "tokenizer_config.json", "config.json"):  # each is read before the one above
        shutil.copy(deep, folder / name)
        assert_refused(generated("--prompt", "x", checkpoint=folder), str(folder / name))


def test_token_ids_of_600_million(generated: Callable[..., Ran], checkpoint_copy: Callable[..., Path]) -> None:
    folder = checkpoint_copy()
    content = json.loads((folder / "tokenizer.json").read_text())
    content["model"]["vocab"]["zz"] = 600_000_000
    (folder / "tokenizer.json").write_text(json.dumps(content))
    assert_refused(generated("--prompt", "x", checkpoint=folder), "token id 600000000 is beyond any vocabulary")


def test_templates_that_never_end(generated: Callable[..., Ran], checkpoint_copy: Callable[..., Path],
                                  monkeypatch: pytest.MonkeyPatch) -> None:
    assert tokenizers.TEMPLATE_SECONDS == 10
    monkeypatch.setattr(tokenizers, "TEMPLATE_SECONDS", 0.2)
    folder = checkpoint_copy()
    loop = "{% for i in range(99999) %}" * 3 + "{% endfor %}" * 3
    (folder / "tokenizer_config.json").write_text(json.dumps({"chat_template": loop, "eos_token": "<|im_end|>"}))
    assert_refused(generated("--prompt", "x", "--chat", checkpoint=folder),
                   "the chat template refuses these messages: no end after 0.2 s")


def test_weights_that_may_not_be_read(generated: Callable[..., Ran], tiny_checkpoint: Path) -> None:
    """By another user, from a folder that all may enter."""
    with tempfile.TemporaryDirectory() as parent:
        os.chmod(parent, 0o755)
        folder = shutil.copytree(tiny_checkpoint, Path(parent, "model"))
        folder.chmod(0o755)
        for path in folder.iterdir():
            path.chmod(0 if path.suffix == ".safetensors" else 0o644)
        other = 65534 if os.getuid() == 0 else None  # root may read everything
        assert_refused(generated("--prompt", "x", checkpoint=folder, user=other),
                       f"cannot read {folder / 'model.safetensors'}: permission denied; let this user read it")


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_weights_that_are_not_finite(value: float, generated: Callable[..., Ran], checkpoint_copy: Callable[..., Path],
                                     tmp_path: Path) -> None:
    folder = checkpoint_copy()
    weights = load_file(folder / "model.safetensors")
    weights["model.layers.1.mlp.down_proj.weight"][3, 4] = value
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    for flags in ((), ("--speculate", "self", "--sparsity", 2)):
        assert_refused(generated("--prompt", "x", *flags, checkpoint=folder), "the model's logits are not finite")


# ----------------------------------------------------------------------------------------------------------- signatures

@pytest.fixture
def signatures(tmp_path: Path) -> Callable[..., Path]:
    """signatures(change, **about) -> a file whose tensors `change` has changed, with other metadata."""
    def write(change: Callable[[dict], object] = lambda tensors: None, **about: object) -> Path:
        path = tmp_path / "signatures.safetensors"
        save_signatures(path, random_encoders(HashConfig(), MODEL), MODEL, {})
        tensors = load_file(path)
        change(tensors)
        told = {"config": vars(HashConfig()), "model": vars(MODEL)} | about
        save_file(tensors, path, metadata={"hashfast": json.dumps(told)})
        return path
    return write


NAME = "layers.1.key.0.weight"


@pytest.mark.parametrize("change, message", [
    (lambda t: t[NAME].fill_(float("nan")), f"{NAME} holds NaN or infinity"),
    (lambda t: t["layers.0.query.0.bias"].fill_(float("-inf")), "layers.0.query.0.bias holds NaN or infinity"),
    (lambda t: t.update({NAME: t[NAME].int()}), f"{NAME} holds integers"),
    (lambda t: t.update({NAME: t[NAME][:, :, :16].contiguous()}), f"{NAME} is [2, 8, 16], not [2, 8, 32]"),
    (lambda t: t.pop(NAME), f"{NAME} is missing"),
    (lambda t: t.update({"layers.2.key.0.weight": t[NAME].clone()}), "layers.2.key.0.weight is unknown"),
])
def test_damaged_signatures(change: Callable[[dict], object], message: str, signatures: Callable[..., Path]) -> None:
    with pytest.raises(UserError) as refused:
        load_signatures(signatures(change), MODEL)
    assert message in str(refused.value)


@pytest.mark.parametrize("budgets", [
    3, [1], "16", {"16": 3}, {"16": [[1, 1]]}, {"16": [[1, 1], [1]]}, {"16": [[1, 1], [1, None]]}, {"16": [[1, 1], [1, -1]]},
    {"16": [[1, 1], [1, float("nan")]]}, {"0": [[1, 1], [1, 1]]}, {"x": [[1, 1], [1, 1]]}, {"16": [["1", "1"], ["1", "1"]]},
])
def test_malformed_budgets(budgets: object, signatures: Callable[..., Path]) -> None:
    with pytest.raises(UserError, match="is damaged: "):
        load_signatures(signatures(budgets=budgets), MODEL)


@pytest.mark.parametrize("config", [
    {"depth": 3, "hidden": 10 ** 9}, {"depth": 2, "hidden": 10 ** 18}, {"bits": 10 ** 9}, {"hidden": "wide", "depth": 2},
    {"depth": 1.5}, [], {"query_bits": None}, {"share": ["kv"]},
])
def test_absurd_configs_of_signatures(config: object, signatures: Callable[..., Path], generated: Callable[..., Ran]) -> None:
    path = signatures(config=vars(HashConfig()) | config if isinstance(config, dict) else config)
    assert_refused(generated("--prompt", "x", "--attention", "hash", "--signatures", path), "")


def test_budgets_that_are_not_there_are_found_before_weights_load(generated: Callable[..., Ran], tiny_checkpoint: Path,
                                                                  signatures: Callable[..., Path],
                                                                  monkeypatch: pytest.MonkeyPatch) -> None:
    about = load_model(tiny_checkpoint).fingerprint()
    path = signatures(model=vars(about))
    monkeypatch.setattr("hashfast.runtime.checkpoint.load_model", lambda *args: os._exit(3))
    assert_refused(generated("--prompt", "x", "--attention", "hash", "--signatures", path, "--budgets", "calibrated"),
                   "these signatures hold no calibrated budgets")


# ----------------------------------------------------------------------------------------------------------------- GGUF

def test_gguf_counts_that_lie(tmp_path: Path) -> None:
    def string(text: str) -> bytes:
        return struct.pack("<Q", len(text)) + text.encode()

    def head(tensors: int, fields: int) -> bytes:
        return struct.pack("<4sIQQ", b"GGUF", 3, tensors, fields)

    arch = string("general.architecture") + struct.pack("<I", 8) + string("llama")
    tokens = string("tokenizer.ggml.tokens") + struct.pack("<IIQ", 9, 8, 2 ** 27)
    layers = string("llama.block_count") + struct.pack("<II", 4, 2 ** 32 - 1)
    sizes = b"".join(string(f"llama.{name}") + struct.pack("<II", 4, 64) for name in (
        "embedding_length", "context_length", "attention.head_count"))
    tensor = string("token_embd.weight") + struct.pack("<IQQIQ", 2, 32, 4, 0, 0)
    cases = {
        "strings": (head(0, 2) + arch + tokens, 2 ** 29, "is not a whole GGUF file (a count of 134217728 where"),
        "fields": (head(0, 2 ** 62), 2 ** 29, "is not a whole GGUF file (a count of"),
        "tensors": (head(2 ** 62, 1) + arch, 2 ** 29, "is not a whole GGUF file (a count of"),
        "layers": (head(1, 5) + arch + layers + sizes + tensor, 4096, "4294967295 layers and 1 tensors"),
    }
    for name, (content, size, message) in cases.items():
        path = tmp_path / f"{name}.gguf"
        path.write_bytes(content)
        os.truncate(path, size)  # sparse: zeros that take no space
        assert_refused(bounded(convert_gguf.main, "convert-gguf", path, tmp_path / "out"), message)
    assert not (tmp_path / "out").exists()


# ---------------------------------------------------------------------------------------------------------------- common

def test_control_characters_are_escaped_on_a_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    from hashfast.runtime.prompts import visible

    text = "a\x1b[31mb\tc\nd\r\x00\x7f\x9bé"
    assert visible(text) == text
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True, raising=False)
    assert visible(text) == "a\\x1b[31mb\tc\nd\\r\\x00\\x7f\\x9bé"


def test_limits_of_time_are_of_the_block_alone() -> None:
    before = signal.getsignal(signal.SIGALRM)
    with pytest.raises(TimeoutError, match="no end after 0.05 s"), common.time_limit(0.05):
        while True:
            pass
    with common.time_limit(0.05):
        pass
    assert signal.getsignal(signal.SIGALRM) == before and signal.getitimer(signal.ITIMER_REAL)[0] == 0
    assert torch.ones(1).item() == 1
