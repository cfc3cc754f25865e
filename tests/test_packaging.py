"""What pip installs, built as an installation does: source archive, then wheel."""
import os
import shutil
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest

pytest.importorskip("setuptools", "77")

ROOT = Path(__file__).parent.parent


def build(kind: str, source: Path, out: Path) -> Path:
    """The archive that the build backend makes of the folder `source`, without the network."""
    code = f"import setuptools.build_meta as backend; backend.build_{kind}({str(out)!r})"
    done = subprocess.run([sys.executable, "-c", code], cwd=source, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    (archive,) = out.iterdir()
    return archive


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What the wheel puts into site-packages."""
    folder = tmp_path_factory.mktemp("packaging")
    unwanted = shutil.ignore_patterns(".*", "checkpoints", "data", "results", "tests", "build", "*.egg-info", "__pycache__")
    shutil.copytree(ROOT, folder / "clone", ignore=unwanted, symlinks=True)
    for name in ("sdist", "wheel"):
        (folder / name).mkdir()
    with tarfile.open(build("sdist", folder / "clone", folder / "sdist")) as archive:
        archive.extractall(folder / "source", filter="data")
    with zipfile.ZipFile(build("wheel", next((folder / "source").iterdir()), folder / "wheel")) as archive:
        archive.extractall(folder / "site")
    return folder / "site"


def test_one_package_with_all_files(site: Path) -> None:
    assert sorted(path.name for path in site.iterdir()) == ["hashfast", "hashfast-0.1.0.dist-info"]
    wanted = {path.relative_to(ROOT) for path in (ROOT / "hashfast").rglob("*.py")}
    wanted |= {Path("hashfast", "weights", path.name) for path in (ROOT / "weights").iterdir()}
    files = [path for path in site.rglob("*") if path.is_file() and path.is_relative_to(site / "hashfast")]
    assert {path.relative_to(site) for path in files} == wanted and not any(path.is_symlink() for path in files)
    for name in ("model", "hash_attention", "generate", "train_hash"):
        assert (site / "hashfast" / f"{name}.py").read_text() == (ROOT / f"{name}.py").read_text()


def test_the_harness_finds_the_model(site: Path) -> None:
    (text,) = (path.read_text() for path in site.glob("*.dist-info/entry_points.txt"))
    assert "[lm_eval.models]\nhashfast = hashfast.integrations.lm_eval:HashfastLM" in text


def test_it_runs_from_another_folder(site: Path, tmp_path: Path) -> None:
    """As one set of modules, and with the signatures that ship."""
    code = """import sys
sys.argv = ["hashfast", "list"]
from hashfast.__main__ import main
main()
import hashfast
print(hashfast.__file__, hashfast.Session.__module__, {"model", "generate"} & {*sys.modules})"""
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, env=os.environ | {"PYTHONPATH": str(site)},
                          capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert f"signature files in {site / 'hashfast' / 'weights'}:" in done.stdout and "smollm2-135m-instruct" in done.stdout
    assert done.stdout.endswith(f"{site / 'hashfast' / '__init__.py'} hashfast.runtime.session set()\n")
