"""Models on Hugging Face: downloaded into a folder, complete or not at all; safetensors weights, configuration, tokenizer."""
import errno
import os
import re
import shutil
import sys
from fnmatch import fnmatch
from pathlib import Path

import huggingface_hub
from huggingface_hub import errors

from hashfast.common import UserError

CHECKPOINTS = Path("checkpoints")
HUB_ID = re.compile(r"[\w-][\w.-]*/[\w-][\w.-]*", re.ASCII)  # owner/name
# Only at the top of the repository: subfolders, like consolidated*.safetensors, hold the same weights in another layout.
WANTED = (
    "config.json",
    "generation_config.json",
    "model*.safetensors",
    "model.safetensors.index.json",
    "tokenizer*",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "chat_template*",
)
NEEDED = (("config.json",), ("model*.safetensors",), ("tokenizer.json", "tokenizer.model*"))


def explain(error: Exception, repo: str, revision: str | None, out: Path) -> UserError:
    """One line for whatever the hub's client raised."""
    if isinstance(error, errors.GatedRepoError):
        what = f"{repo} is gated; accept its licence on https://huggingface.co/{repo}, then pass --token or set HF_TOKEN"
    elif isinstance(error, errors.RepositoryNotFoundError):
        what = f"no repository {repo} on Hugging Face; check its name, and pass --token or set HF_TOKEN if it is private"
    elif isinstance(error, errors.RevisionNotFoundError):
        what = f"{repo} has no revision {revision}; check the branch, tag or commit"
    elif isinstance(error, errors.HFValidationError):
        what = f"{repo!r} is not a repository's name; write it as owner/name"
    elif isinstance(error, errors.HfHubHTTPError) and error.response.status_code in (401, 403):
        what = f"Hugging Face refused the token for {repo}; check --token or HF_TOKEN"
    elif getattr(error, "errno", None) == errno.ENOSPC or "No space left" in str(error):
        what = f"the disk of {out} is full; free some space and run this again, it continues where it stopped"
    elif isinstance(error, OSError) and error.errno in (errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOTDIR):
        what = f"cannot write {out}: {error.strerror}; choose a writable place with --out"
    else:  # every client library in between has its own names for a broken connection
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        what = f"download of {repo} failed ({reason}); check the network and run this again, it continues where it stopped"
    return UserError(what)


def download(repo: str, out: Path, token: str | None = None, revision: str | None = None) -> None:
    """Fill the folder `out`: complete, or not at all. A stopped download waits beside it and is continued by the next call."""
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise UserError(f"{out} already exists; remove it or choose another folder with --out")
    beside = out.with_name(f".{out.name}.partial")
    try:
        info = huggingface_hub.HfApi(token=token).model_info(repo, revision=revision, files_metadata=True)
        sizes = {
            file.rfilename: file.size or 0
            for file in info.siblings or []
            if "/" not in file.rfilename and any(fnmatch(file.rfilename, pattern) for pattern in WANTED)
        }
        for patterns in NEEDED:
            if not any(fnmatch(name, pattern) for name in sizes for pattern in patterns):
                raise UserError(f"{repo} has no {' or '.join(patterns)}; choose a repository in the layout of transformers")
        beside.mkdir(parents=True, exist_ok=True)
        # what a stopped download left counts, wherever in the folder the client keeps it
        there = sum(path.stat().st_size for path in beside.rglob("*") if path.is_file())
        lacking = sum(sizes.values()) - there - shutil.disk_usage(beside).free
        if lacking > 0:
            raise UserError(f"the disk of {out} lacks {lacking / 1e9:.1f} GB for {repo}; free some or choose another --out")
        huggingface_hub.snapshot_download(repo, revision=info.sha, token=token, local_dir=beside, allow_patterns=list(sizes))
        # without a connection the client may return a folder that an earlier call left incomplete
        for name, size in sizes.items():
            if not (beside / name).is_file() or (beside / name).stat().st_size != size:
                raise UserError(f"download of {repo} is incomplete ({name}); run this again, it continues where it stopped")
        shutil.rmtree(beside / ".cache", ignore_errors=True)  # the client's notes on the download
        os.replace(beside, out)
    except UserError:
        raise
    except Exception as error:
        raise explain(error, repo, revision, out) from error


def checkpoint_folder(name: str | Path) -> Path:
    """The folder of a model: `name` itself, or the Hub's owner/name, downloaded once into checkpoints/owner/name.

    A name whose first part is a folder here is a path, there or not. Of several ranks the first downloads. Raises UserError.
    """
    from hashfast.runtime.distributed import on_first  # imports torch, for which `hashfast download` does not wait

    folder = Path(name)
    if folder.exists() or not HUB_ID.fullmatch(str(name)) or Path(folder.parts[0]).exists():
        return folder
    out = CHECKPOINTS / folder

    def fetch() -> str:
        """What went wrong, for all ranks to know."""
        if out.is_dir():
            return ""
        print(f"no folder {name} here: downloading it from Hugging Face to {out}", file=sys.stderr)
        try:
            download(str(name), out)
        except UserError as error:
            return str(error)
        return ""

    if problem := on_first(fetch):
        raise UserError(f"no folder {name} here, and {problem}")
    return out
