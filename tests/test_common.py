"""Facts about the machine that results files hold."""
import shutil
import subprocess
from pathlib import Path

import pytest

from hashfast import common


@pytest.fixture
def repository(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A repository of one commit."""
    if shutil.which("git") is None:
        pytest.skip("git is not installed")
    monkeypatch.delenv("HASHFAST_COMMIT", raising=False)
    identity = ("-c", "user.name=a", "-c", "user.email=a@b.c")
    for words in (["init", "--quiet"], [*identity, "commit", "--quiet", "--allow-empty", "--message", "first"]):
        subprocess.run(["git", "-C", str(tmp_path), *words], check=True)
    return tmp_path


def test_the_commit_is_that_of_this_clone_alone(repository: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(common, "ROOT", repository)
    assert len(common.environment()["commit"]) == 12
    installed = repository / "venv" / "site-packages"  # inside of another project
    installed.mkdir(parents=True)
    monkeypatch.setattr(common, "ROOT", installed)
    assert common.environment()["commit"] == "unknown"
    monkeypatch.setenv("HASHFAST_COMMIT", "0123abc")
    assert common.environment()["commit"] == "0123abc"


def test_the_commit_without_git(repository: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(common, "ROOT", repository)
    monkeypatch.setenv("PATH", "")
    assert common.environment()["commit"] == "unknown"
