"""The import rule: who may import whom, by which name, and what must not be needed to import anything."""
import ast
import importlib.util
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
FOUR = ("model", "hash_attention", "generate", "train_hash")  # at the top, with links in the package

# A module imports those of lower layers, and others of its own layer as long as that makes no circle.
LAYERS = ({"hashfast", "hashfast.common", "hashfast.names", "hashfast.progress", "hashfast.kernels"},
          {"hashfast.ops", "hashfast.hash_attention"}, {"hashfast.model"},
          {"hashfast.runtime"}, {"hashfast.research"}, {"hashfast.integrations"},
          {"hashfast.commands", "hashfast.generate", "hashfast.train_hash"}, {"hashfast.__main__"})


def module_name(path: Path) -> str:
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(("hashfast", *parts) if parts[0] != "hashfast" else parts).removesuffix(".__init__")


FILES = {module_name(path): path
         for path in [*(ROOT / f"{name}.py" for name in FOUR), *(ROOT / "hashfast").rglob("*.py")] if not path.is_symlink()}
TREES = {name: ast.parse(path.read_text(encoding="utf-8")) for name, path in FILES.items()}
TESTS = {path: ast.parse(path.read_text(encoding="utf-8")) for path in (ROOT / "tests").rglob("*.py")}


def imported(tree: ast.Module) -> Iterator[str]:
    """Every module that is imported, at the top or inside a function."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "relative import"
            for alias in node.names:
                whole = f"{node.module}.{alias.name}"
                yield whole if whole in FILES else node.module


def layer(name: str) -> int:
    """Commands are loaded by name, by __main__ alone."""
    return next(i for i, names in enumerate(LAYERS) for each in names if name == each or name.startswith(f"{each}.")
                and each != "hashfast")


OURS = {name: {other for other in imported(tree) if other.split(".")[0] == "hashfast"} for name, tree in TREES.items()}


@pytest.mark.parametrize("name", FILES)
def test_layers(name: str) -> None:
    for other in OURS[name]:
        assert other in FILES, f"{name} imports {other}, which is not there"
        assert layer(other) <= layer(name), f"{name} imports {other}, of a higher layer"
        if name.startswith("hashfast.kernels"):
            assert other.startswith("hashfast.kernels"), f"{name}, a kernel, imports {other}"
        if layer(name) == 6:
            assert layer(other) < 6, f"the command {name} imports the command {other}"


def test_no_circles() -> None:
    done: set[str] = set()

    def visit(name: str, path: tuple[str, ...]) -> None:
        assert name not in path, " -> ".join((*path, name))
        if name not in done:
            for other in OURS[name]:
                visit(other, (*path, name))
            done.add(name)

    for name in FILES:
        visit(name, ())


@pytest.mark.parametrize("path", [*FILES.values(), *TESTS], ids=lambda path: str(path.relative_to(ROOT)))
def test_one_module_one_name(path: Path) -> None:
    """A bare `import model` would be a second module of the same file."""
    tree = TESTS.get(path) or ast.parse(path.read_text(encoding="utf-8"))
    assert not {name.split(".")[0] for name in imported(tree)} & {*FOUR}


@pytest.mark.parametrize("name", FILES)
def test_private_names_stay_in_their_file(name: str) -> None:
    bound = {}  # names of this file that are modules of ours
    for node in ast.walk(TREES[name]):
        if isinstance(node, ast.Import):
            bound |= {alias.asname or alias.name: alias.name for alias in node.names if alias.name in FILES}
        elif isinstance(node, ast.ImportFrom) and node.module.split(".")[0] == "hashfast":
            private = [alias.name for alias in node.names if alias.name.startswith("_") and not alias.name.endswith("__")]
            assert not private, f"{name} takes {', '.join(private)} from {node.module}"
            bound |= {alias.asname or alias.name: f"{node.module}.{alias.name}" for alias in node.names
                      if f"{node.module}.{alias.name}" in FILES}
    for node in ast.walk(TREES[name]):
        if isinstance(node, ast.Attribute) and node.attr.startswith("_") and not node.attr.endswith("__"):
            assert ast.unparse(node.value) not in bound, f"{name} uses {ast.unparse(node)}"


@pytest.mark.parametrize("name", FILES)
def test_command_lines_are_read_by_commands(name: str) -> None:
    """Below them functions take dataclasses and plain arguments, which a notebook can give."""
    if not name.startswith(("hashfast.commands.", "hashfast.common", "hashfast.generate", "hashfast.train_hash")):
        assert "argparse" not in [*imported(TREES[name])]


def test_everything_imports_without_triton_and_gpu() -> None:
    missing = importlib.util.find_spec("accelerate") is None  # the harness's models import it
    names = [name for name in FILES if not name.startswith("hashfast.kernels.")
             and not (missing and name == "hashfast.integrations.lm_eval")]
    code = f"""import importlib, sys
sys.modules["triton"] = None
for name in {names}:
    importlib.import_module(name)
import torch
assert not torch.cuda.is_initialized()"""
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, env=os.environ | {"CUDA_VISIBLE_DEVICES": ""},
                          capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_commands_import_no_torch() -> None:
    code = """import importlib, sys, hashfast.__main__
for name, _ in hashfast.__main__.COMMANDS.values():
    importlib.import_module(name)
print({"torch", "transformers", "numpy", "huggingface_hub"} & {*sys.modules})"""
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.stdout == "set()\n", done.stderr


def test_names_of_flags_are_those_that_there_are() -> None:
    from hashfast import names
    from hashfast.research import ablations, attention_latency, recipes

    assert names.RECIPES == (*recipes.RECIPES,)
    assert names.VARIANTS == (*ablations.VARIANTS,)
    assert names.MODES == (*attention_latency.MODES,)


def test_links() -> None:
    for name in FOUR:
        link = ROOT / "hashfast" / f"{name}.py"
        assert link.is_symlink() and link.resolve() == ROOT / f"{name}.py"
    assert (ROOT / "hashfast" / "weights").resolve() == ROOT / "weights"
