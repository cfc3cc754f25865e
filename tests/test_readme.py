"""README and CONTRIBUTING: tables are the results', commands parse, files are there, the tree is whole, the example runs."""
import importlib
import json
import os
import re
import shlex
import stat
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from hashfast.__main__ import COMMANDS
from hashfast.common import Parser
from hashfast.research.report import MARKED, TABLES, fill

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")
PAGES = {name: (ROOT / name).read_text(encoding="utf-8") for name in ("README.md", "CONTRIBUTING.md")}
TABLES_PAGE = (ROOT / "results" / "README.md").read_text(encoding="utf-8")
RESULTS = sorted((ROOT / "results").glob("*.json"))
BY_HAND = {"quickstart_cpu.json", "quickstart_h200.json"}  # from the quickstart's lines on the terminal
OF_OLD_COMMITS = {"ideas_16k.json"}  # whose code is gone; NOTES.md names the commit

# Figures in README's own words: versions. Every other figure stands in a table between markers.
VERSIONS = {"3.10", "2.11", "3.6", "2.13", "5.17", "Llama-3.1-8B", "Apache-2.0"}
EXPLAINED = {"2x"}  # an example of how to read "hash is"


def blocks(text: str, language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", text, re.DOTALL | re.MULTILINE)


def commands(text: str) -> list[list[str]]:
    """The commands of shell code, as words; comments left out, continued lines joined."""
    lines = (shlex.split(line, comments=True) for line in text.replace("\\\n", " ").splitlines())
    return [words for words in lines if words]


SHELL = [words for page in PAGES.values() for block in blocks(page, "bash") for words in commands(block)]


class Parsed(Exception):
    """A command line was understood; what it would do is not done."""


def parse(monkeypatch: pytest.MonkeyPatch, words: list[str]) -> None:
    """Let the script in `words` parse the flags behind it, as it would when started."""
    if "hashfast" in words:
        command, *flags = words[words.index("hashfast") + 1:]
        name, prog = COMMANDS[command][0], f"hashfast {command}"
    else:
        prog = next(word for word in words if word.endswith(".py") or word.startswith("hashfast."))
        flags = words[words.index(prog) + 1:]
        name = prog if prog.startswith("hashfast.") else f"hashfast.{prog.removesuffix('.py')}"
    module = importlib.import_module(name)
    if "Parser(" not in Path(module.__file__).read_text():
        assert not flags, f"{prog} takes no flags"
        return
    original = Parser.parse_args

    def parse_args(self: Parser, *args: object) -> None:
        original(self, *args)
        raise Parsed

    with monkeypatch.context() as patched:
        patched.setattr(sys, "argv", [prog, *flags])
        patched.setattr(Parser, "parse_args", parse_args)
        with pytest.raises(Parsed):
            module.main()


def test_tables_are_those_of_the_results() -> None:
    again = "run: python -m hashfast bench report --write README.md results/README.md"
    assert fill(README, ROOT / "results", ROOT) == README, again
    assert fill(TABLES_PAGE, ROOT / "results", ROOT / "results") == TABLES_PAGE, again
    assert [match[2] for match in MARKED.finditer(README)] == ["summary", "claims"]
    assert sorted(match[2] for match in MARKED.finditer(TABLES_PAGE)) == sorted(TABLES)


def test_results_are_cited() -> None:
    notes = (ROOT / "results" / "NOTES.md").read_text(encoding="utf-8")
    assert RESULTS
    for path in RESULTS:
        assert f"]({path.name})" in TABLES_PAGE or path.name in notes, f"results/README and NOTES leave out {path.name}"
        about = json.loads(path.read_text())
        assert {"gpu", "torch", "triton", "commit", "command", "rows"} <= about.keys()


def test_the_tree() -> None:
    """What README's tree names is there, and all files at the top and of kernels, and all folders of the package, are named."""
    tree = README.split("## The tree")[1].split("```")[1].strip("\n")
    named, path = set(), []
    for line in tree.splitlines():
        path = [*path[:(len(line) - len(line.lstrip())) // 2], line.split()[0]]
        named.add("".join(path))
        assert (ROOT / "".join(path)).exists(), f"README's tree names {''.join(path)}"
    package = ROOT / "hashfast"
    there = {f"{file.name}" for file in ROOT.glob("*.py")} | {f"hashfast/kernels/{file.name}"
                                                             for file in (package / "kernels").glob("[a-z]*.py")}
    there |= {f"hashfast/{file.parent.name}/" for file in package.glob("*/__init__.py")}
    assert there <= named, f"README's tree leaves out {there - named}"


def test_figures_have_a_source() -> None:
    """Outside of generated tables and code only versions are figures."""
    text = re.sub(r"```.*?```|`[^`]*`|\]\([^)]*\)", " ", MARKED.sub("", README), flags=re.DOTALL)
    text = re.sub(r"arXiv \[[\d.]+", " ", text)
    found = set(re.findall(r"[\w.-]*\d+\.\d+[\w-]*|\b\d+x\b|\d+ ?%|\d+ (?:ms|us|GiB|tok/s|GB/s|TFLOP/s)\b", text))
    assert found == VERSIONS | EXPLAINED


@pytest.mark.parametrize("page", PAGES)
def test_files_are_there(page: str) -> None:
    text = re.sub(r"```.*?```", "", PAGES[page], flags=re.DOTALL)
    linked = {link for link in re.findall(r"\]\(([^)#]+)\)", text) if not link.startswith("http")}
    named = set(re.findall(r"(?<!-)\b((?:\w+/)*\w+\.(?:py|sh|md|cff))\b", text))
    assert named
    for name in linked | named:
        assert (ROOT / name).exists(), f"{page} names {name}"


@pytest.mark.parametrize("words", SHELL, ids=" ".join)
def test_commands(words: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    if words[0] in ("python", "torchrun"):
        parse(monkeypatch, words)
    elif words[0] == "bash":
        script = ROOT / words[1]
        assert script.is_file()
        if script.name == "reproduce.sh":
            (usage,) = re.findall(r"^# usage: .*\{(.*)\}", script.read_text(), re.MULTILINE)
            assert words[2:] and set(words[2:]) <= set(usage.split(","))
    else:
        assert words == ["source", ".venv/bin/activate"]
    made = {after for other in SHELL for flag, after in zip(other, other[1:], strict=False) if flag in ("--out", "--json")}
    for word in words:
        if word.startswith(("weights/", "results/", "scripts/")):
            assert word in made or (ROOT / word).exists(), f"{word} is not there and nothing makes it"


@pytest.mark.skipif(not (ROOT / "checkpoints" / "smollm2-135m-instruct").exists(), reason="needs scripts/quickstart.sh's model")
def test_the_notebook_example_runs(tmp_path: Path) -> None:
    """As it stands in README, on the real model and a short text, from a folder of its own."""
    code, _ = blocks(README, "python")
    (tmp_path / "checkpoints").symlink_to(ROOT / "checkpoints")
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "alice29.txt").write_text("Alice was beginning to get very tired of sitting by her sister on the")
    ran = subprocess.run([sys.executable, "-c", code.replace("max_new_tokens=64", "max_new_tokens=4")], cwd=tmp_path,
                         capture_output=True, text=True, check=False, env=os.environ | {"PYTHONPATH": str(ROOT)})
    assert ran.returncode == 0 and ran.stdout.startswith(" couch. She was"), ran


@pytest.mark.skipif(not (ROOT / "checkpoints" / "smollm2-135m-instruct").exists(), reason="needs scripts/quickstart.sh's model")
def test_the_transformers_example_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture) -> None:
    _, code = blocks(README, "python")
    (tmp_path / "checkpoints").symlink_to(ROOT / "checkpoints")
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "alice29.txt").write_text("Alice was beginning to get very tired of sitting by her sister on the")
    monkeypatch.chdir(tmp_path)
    exec(compile(code.replace("=64", "=4").replace("-64", "-4"), "README.md", "exec"), {})
    assert capsys.readouterr().out == " couch. She was\n"


def test_the_example_runs(tiny_checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
                          capsys: pytest.CaptureFixture) -> None:
    """The selector of CONTRIBUTING, as it stands there, on a tiny model: it is what decodes, and it chooses what it says."""
    (code,) = blocks(PAGES["CONTRIBUTING.md"], "python")
    (tmp_path / "checkpoints").mkdir()
    (tmp_path / "checkpoints" / "smollm2-135m-instruct").symlink_to(tiny_checkpoint)
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "alice29.txt").write_text("Alice was beginning to get very tired. " * 40)
    monkeypatch.chdir(tmp_path)
    names: dict = {}
    exec(compile(code, "CONTRIBUTING.md", "exec"), names)
    assert capsys.readouterr().out.strip()

    attention, length = names["model"].layers[0].attention, len(names["ids"]) + 23
    q = torch.randn(1, attention.n_head, attention.head_dim, generator=torch.Generator().manual_seed(0))
    indices = attention.selector(q, attention.cache.k, torch.tensor([length], dtype=torch.int32))
    assert indices.shape == (1, attention.n_kv_head, 128)
    products = (q.view(1, attention.n_kv_head, -1, attention.head_dim) @ attention.cache.k.mT).amax(dim=2)[0]  # [Hkv, S]
    for head, chosen in zip(products, indices[0].long(), strict=True):
        middle = head[16:length - 32].topk(128 - 16 - 32).indices + 16
        assert set(chosen.tolist()) == {*range(16), *range(length - 32, length), *middle.tolist()}


@pytest.fixture
def reproduce(tmp_path: Path) -> Callable[..., subprocess.CompletedProcess]:
    """reproduce(part, NAME=value) runs the script with an `echo` in Python's place, on a machine of four GPUs."""
    smi = tmp_path / "bin" / "nvidia-smi"
    smi.parent.mkdir()
    plain = {name: value for name, value in os.environ.items() if name not in ("BOOKS", "TRAIN", "MODEL", "PROMPT", "DRAFT",
                                                                                "RESULTS", "SIGNATURES")}

    def run(*parts: str, gpu: str = "NVIDIA H200", **variables: object) -> subprocess.CompletedProcess:
        smi.write_text("#!/bin/sh\n" + 4 * f"echo {gpu}\n")
        smi.chmod(smi.stat().st_mode | stat.S_IXUSR)
        path = f"{smi.parent}{os.pathsep}{os.environ['PATH']}"
        changed = {name: str(value) for name, value in variables.items()}
        return subprocess.run(["bash", ROOT / "scripts" / "reproduce.sh", *parts], capture_output=True, text=True, check=False,
                              env={**plain, "PATH": path, "PYTHON": "echo", **changed})
    return run


def test_reproduce(reproduce, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every command of every part parses, and together they write every results file that this code can write."""
    text = tmp_path / "books" / "long.txt"
    text.parent.mkdir()
    text.write_text("Long.")
    ran = reproduce("all", BOOKS=text.parent, TRAIN=text.parent, MODEL="checkpoints/large", DRAFT="checkpoints/small",
                    PROMPT=text)
    assert ran.returncode == 0, ran.stderr
    lines = [line.split() for line in ran.stdout.splitlines()]
    other = reproduce("all", gpu="NVIDIA H100 80GB HBM3", BOOKS=text.parent, TRAIN=text.parent)
    both = [*lines, *(line.split() for line in other.stdout.splitlines())]
    for words in both:
        parse(monkeypatch, words)
    written = {words[words.index("--json") + 1] for words in both if "--json" in words}
    assert {"results/raw/tp4_h200.json", "results/raw/tp4_h100.json"} <= written
    assert {path.name for path in RESULTS} - {Path(name).name for name in written} == BY_HAND | OF_OLD_COMMITS
    assert lines[-1] == ["-m", "hashfast", "bench", "report", "--write", "README.md", "results/README.md"]

    elsewhere = reproduce("attention", RESULTS=tmp_path / "mine")
    assert elsewhere.stdout.splitlines()[-1] == f"-m hashfast bench report --results {tmp_path / 'mine'}"
    for part, model in (("tea", ""), ("", ""), ("quality", ""), ("all", ""), ("parity", "checkpoints/large")):
        ran = reproduce(*part.split(), MODEL=model)
        assert ran.returncode == 2 and ran.stdout == "" and ran.stderr.startswith("error: ") and ran.stderr.count("\n") == 1
