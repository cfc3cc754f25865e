"""What every command shares: one-line errors, files that are never half-written, facts about the machine.

torch is imported where it is used, so that `--help` and `--version` do not wait for it.
"""
import argparse
import contextlib
import datetime
import os
import shlex
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NoReturn

ROOT = Path(__file__).resolve().parent.parent  # of a clone: what holds README.md, results/ and the folder hashfast
WEIGHTS = Path(__file__).resolve().parent / "weights"  # the signature files that ship, in a clone and installed


class UserError(Exception):
    """A mistake the user can mend. The message says what is wrong, where, and what to do, on one line."""


class Parser(argparse.ArgumentParser):
    """A command line whose mistakes are UserErrors too."""

    def error(self, message: str) -> NoReturn:
        raise UserError(f"{message}; --help lists what there is")


def run_command(main: Callable[[], None]) -> None:
    """Run a command line's `main`; a UserError or an exhausted memory becomes one line on stderr and exit code 2."""
    for stream in (sys.stdout, sys.stderr):
        stream.reconfigure(errors="replace")  # a terminal that cannot show a character shows a question mark
    try:
        main()
    except UserError as error:
        sys.exit(fail(str(error)))
    except MemoryError:
        sys.exit(fail("out of memory. Use a smaller model, --max_seq_length or --batch_size."))
    except RuntimeError as error:
        import torch
        if isinstance(error, torch.OutOfMemoryError):
            sys.exit(fail(f"out of GPU memory: {str(error).splitlines()[0]} Use a smaller --max_seq_length or --batch_size."))
        if "DefaultCPUAllocator" not in str(error):
            raise
        sys.exit(fail(f"out of memory ({error}). Use a smaller model, --max_seq_length or --batch_size."))
    except BrokenPipeError:  # the reader of a pipe has left; the interpreter must not complain again when it flushes
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(141)
    except KeyboardInterrupt:
        sys.exit(130)


def fail(message: str) -> int:
    """Print one error line; returns the exit code for bad input."""
    print("error: " + " ".join(message.split()), file=sys.stderr)
    return 2


@contextlib.contextmanager
def atomic_path(path: str | Path) -> Iterator[Path]:
    """A temporary path beside `path` that replaces it when the block ends well and vanishes when it does not."""
    path = Path(path)
    if not path.name:
        raise UserError(f"cannot write to {str(path)!r}: it names no file")
    beside = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        yield beside
        umask = os.umask(0)
        os.umask(umask)
        beside.chmod(0o666 & ~umask)  # some writers leave files that only their owner may read
        os.replace(beside, path)
    except OSError as error:
        raise UserError(f"cannot write {path}: {error.strerror or error}; choose a writable place with free space") from error
    finally:
        with contextlib.suppress(OSError):
            beside.unlink(missing_ok=True)


def check_writable(flag: str, path: Path | None) -> None:
    """A UserError now, not after the work, where the file that `flag` names cannot be written. Makes its folder."""
    if path is None:
        return
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=path.parent):  # os.access would tell root that everything is writable
            pass
    except OSError as error:
        raise UserError(f"{flag} {path} cannot be written: {error.strerror}; choose another place") from error
    if path.is_dir():
        raise UserError(f"{flag} {path} cannot be written: it is a folder; give a file in it")


def default_device() -> str:
    import torch
    return "cuda" if torch.cuda.is_available() else "cpu"


def check_device(device: str) -> None:
    """UserError where this machine has no such device: cpu, cuda or cuda:N."""
    import torch
    there = ["cpu", *(["cuda"] if torch.cuda.is_available() else []), *(f"cuda:{i}" for i in range(torch.cuda.device_count()))]
    if device not in there:
        raise UserError(f"--device {device} is not there; this machine has: {', '.join(there)}")


def can_compile(device: str) -> bool:
    """Whether Inductor has what it needs; where it has not, a line of warning."""
    compiler = os.environ.get("CXX", "g++")  # as Inductor chooses it
    if device != "cpu" or shutil.which(compiler) is not None:
        return True
    print(f"warning: no C++ compiler ({compiler}) found, so nothing is compiled", file=sys.stderr)
    return False


def _commit() -> str:
    """The commit of this clone; "unknown" where the package is installed, for a repository around it is another project's."""
    if (ROOT / ".git").exists():
        with contextlib.suppress(OSError):  # git is not installed
            git = subprocess.run(["git", "-C", str(ROOT), "describe", "--always", "--dirty", "--abbrev=12"],
                                 check=False, capture_output=True, text=True)
            return git.stdout.strip() or "unknown"
    return "unknown"


def command_line(*launch: str) -> str:
    """The command that this process runs, as a person types it, for results files. launch: what starts it, if not python."""
    first, *flags = sys.argv
    words = ["-m", *first.split()] if first.startswith("hashfast ") else [first]
    return shlex.join([*(launch or ["python"]), *words, *flags])


def environment() -> dict[str, str]:
    """Where and when a result was measured: GPU (or CPU), torch, triton, commit and day (UTC), for every results file."""
    import torch
    try:
        import triton
        triton_version = triton.__version__
    except ImportError:
        triton_version = "none"
    commit = os.environ.get("HASHFAST_COMMIT") or _commit()  # the variable: of a copy without its history
    return {
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else "none (CPU)",
        "torch": torch.__version__,
        "triton": triton_version,
        "commit": commit,
        "date": datetime.datetime.now(datetime.timezone.utc).date().isoformat(),
    }
