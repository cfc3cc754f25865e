"""Downloads: what they ask the Hub for, one line for everything that can go wrong; the Hub's names as checkpoint folders."""
import errno
from pathlib import Path
from types import SimpleNamespace

import huggingface_hub
import pytest
from huggingface_hub import errors

from hashfast import common
from hashfast.commands import download as command
from hashfast.runtime.hub import checkpoint_folder, download

FILES = {"config.json": 2, "model-00001-of-00001.safetensors": 7, "tokenizer.json": 3, "README.md": 5}
EXTRA = {"consolidated.safetensors": 9, "original/tokenizer.model": 4, "onnx/model.safetensors": 8, "pytorch_model.bin": 6}


def failure(kind: type[Exception], status: int) -> Exception:
    """An error of the hub's client that carries a response with this status."""
    error = kind.__new__(kind)
    error.args = (f"{status} Client Error.\n\nRequest ID: 1",)
    error.response = SimpleNamespace(status_code=status)
    return error


class Hub:
    """Stands in for the hub: lists `files`, then writes them, or raises `listing` and `transfer`."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.files = FILES | EXTRA
        self.listing: Exception | None = None
        self.transfer: Exception | None = None
        self.fetched: dict = {}
        monkeypatch.setattr(huggingface_hub, "HfApi", lambda token: SimpleNamespace(model_info=self.model_info))
        monkeypatch.setattr(huggingface_hub, "snapshot_download", self.snapshot_download)

    def model_info(self, repo: str, revision: str | None, files_metadata: bool) -> SimpleNamespace:
        if self.listing:
            raise self.listing
        return SimpleNamespace(sha="c0ffee", siblings=[SimpleNamespace(rfilename=n, size=s) for n, s in self.files.items()])

    def snapshot_download(self, repo: str, **options) -> None:
        self.fetched = {"repo": repo, **options}
        folder = Path(options["local_dir"])
        for name in options["allow_patterns"]:
            if self.transfer and name == "tokenizer.json":
                raise self.transfer
            (folder / name).write_bytes(bytes(self.files[name]))
        (folder / ".cache" / "huggingface").mkdir(parents=True)


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> Hub:
    return Hub(monkeypatch)


def test_only_weights_configuration_and_tokenizer(hub: Hub, tmp_path: Path) -> None:
    out = tmp_path / "deep" / "model"
    download("owner/name", out, token="hf_x")
    assert {path.name for path in out.iterdir()} == {"config.json", "model-00001-of-00001.safetensors", "tokenizer.json"}
    assert [path.name for path in out.parent.iterdir()] == ["model"]
    assert hub.fetched["repo"] == "owner/name" and hub.fetched["revision"] == "c0ffee" and hub.fetched["token"] == "hf_x"


@pytest.mark.parametrize(
    ("error", "words"),
    [
        (failure(errors.GatedRepoError, 403), "gated; accept its licence on https://huggingface.co/owner/name"),
        (failure(errors.RepositoryNotFoundError, 404), "no repository owner/name"),
        (failure(errors.RevisionNotFoundError, 404), "no revision v9"),
        (failure(errors.HfHubHTTPError, 401), "refused the token"),
        (failure(errors.HfHubHTTPError, 503), "check the network"),
        (errors.HFValidationError("Repo id must be"), "write it as owner/name"),
        (errors.LocalEntryNotFoundError("Got: ConnectError\nand more"), "(Got: ConnectError); check the network"),
        (ConnectionError("Name or service not known"), "check the network"),
        (OSError(errno.ENOSPC, "No space left on device"), "is full; free some space"),
        (RuntimeError("Data processing error: No space left on device (os error 28)"), "is full; free some space"),
        (PermissionError(errno.EACCES, "Permission denied"), "choose a writable place"),
    ],
)
@pytest.mark.parametrize("when", ["listing", "transfer"])
def test_one_line_for_each_failure(hub: Hub, tmp_path: Path, capsys, monkeypatch, error: Exception, words: str, when: str):
    setattr(hub, when, error)
    out = tmp_path / "model"
    monkeypatch.setattr("sys.argv", ["download.py", "owner/name", "--out", str(out), "--revision", "v9"])
    with pytest.raises(SystemExit) as stop:
        common.run_command(command.main)
    lines = capsys.readouterr().err.splitlines()
    assert stop.value.code == 2 and len(lines) == 1 and lines[0].startswith("error: ") and words in lines[0]
    assert not out.exists()


def test_a_stopped_download_is_continued(hub: Hub, tmp_path: Path) -> None:
    hub.transfer = ConnectionError("reset by peer")
    with pytest.raises(common.UserError, match="continues where it stopped"):
        download("owner/name", tmp_path / "model")
    assert (tmp_path / ".model.partial" / "config.json").exists()
    hub.transfer = None
    download("owner/name", tmp_path / "model")
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


def test_incomplete_folder_is_not_taken_for_the_model(hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # as the client does without a connection
    monkeypatch.setattr(huggingface_hub, "snapshot_download", lambda repo, **options: None)
    with pytest.raises(common.UserError, match="incomplete"):
        download("owner/name", tmp_path / "model")
    assert not (tmp_path / "model").exists()


@pytest.mark.parametrize("missing", ["config.json", "model-00001-of-00001.safetensors", "tokenizer.json"])
def test_repository_in_another_layout(hub: Hub, tmp_path: Path, missing: str) -> None:
    del hub.files[missing]
    with pytest.raises(common.UserError, match="choose a repository in the layout of transformers"):
        download("owner/name", tmp_path / "model")
    assert not list(tmp_path.iterdir())


def test_too_little_space_is_noticed_before_the_download(hub: Hub, tmp_path: Path) -> None:
    hub.files["model-00001-of-00001.safetensors"] = 10**18
    with pytest.raises(common.UserError, match="lacks .* GB"):
        download("owner/name", tmp_path / "model")
    assert not hub.fetched


def test_existing_folder_is_left_alone(hub: Hub, tmp_path: Path) -> None:
    (tmp_path / "mine.txt").write_text("x")
    with pytest.raises(common.UserError, match="already exists"):
        download("owner/name", tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["mine.txt"]


# --------------------------------------------------------------------------------------------- names of the Hub as folders

def test_a_name_of_the_hub_is_downloaded_once(hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys) -> None:
    monkeypatch.chdir(tmp_path)
    folder = Path("checkpoints/owner/name")
    assert checkpoint_folder("owner/name") == checkpoint_folder(Path("owner/name")) == folder
    assert {path.name for path in folder.iterdir()} == {"config.json", "model-00001-of-00001.safetensors", "tokenizer.json"}
    assert capsys.readouterr().err == "no folder owner/name here: downloading it from Hugging Face to checkpoints/owner/name\n"
    hub.listing = ConnectionError("Name or service not known")
    assert checkpoint_folder("owner/name") == folder  # without a network
    with pytest.raises(common.UserError) as error:
        checkpoint_folder("owner/other")
    assert str(error.value) == ("no folder owner/other here, and download of owner/other failed (Name or service not known); "
                                "check the network and run this again, it continues where it stopped")


@pytest.mark.parametrize("name", ["here/model", "here/missing", "model", "./owner/name", "/owner/name", "a/b/c", "../name", ""])
def test_paths_stay_paths(hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    """A missing folder in one that is here is a path too: loading says what is wrong."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "here" / "model").mkdir(parents=True)
    assert checkpoint_folder(name) == Path(name) and not hub.fetched
