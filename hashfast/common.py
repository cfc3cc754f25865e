"""What every command shares: one-line errors, files that are never half-written, facts about the machine.

torch is imported where it is used, so that `--help` and `--version` do not wait for it.
"""
import argparse
import contextlib
import datetime
import errno
import fcntl
import glob
import os
import shlex
import shutil
import signal
import stat
import subprocess
import sys
import tempfile
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NoReturn

from safetensors import SafetensorError

import hashfast

ROOT = Path(__file__).resolve().parent.parent  # of a clone: what holds README.md, results/ and the folder hashfast
WEIGHTS = Path(__file__).resolve().parent / "weights"  # the signature files that ship, in a clone and installed


class UserError(Exception):
    """A mistake the user can mend. The message says what is wrong, where, and what to do, on one line."""


class HelpFormatter(argparse.RawDescriptionHelpFormatter):
    """Descriptions as they are written; every default shown, unless the help says it in words."""

    def _get_help_string(self, action: argparse.Action) -> str:
        text, default = action.help or "", action.default
        if any(default is no for no in (None, False, argparse.SUPPRESS)) or default == [] or "default" in text:
            return text
        shown = " ".join(map(str, default)) if isinstance(default, list | tuple) else str(default)
        return f"{text} (default: {shown})".replace("%", "%%").strip()


class Parser(argparse.ArgumentParser):
    """A command line whose mistakes are UserErrors too, with `--version` and every default in its help."""

    def __init__(self, *args: Any, add_help: bool = True, **more: Any) -> None:
        super().__init__(*args, add_help=add_help, **{"formatter_class": HelpFormatter} | more)
        if add_help:
            self.add_argument("--version", action="version", version=f"hashfast {hashfast.__version__}")

    def error(self, message: str) -> NoReturn:
        raise UserError(f"{message}; --help lists what there is")


def run_command(main: Callable[[], None]) -> None:
    """Run a command line's `main`; a UserError, exhausted memory or a stream that fails become one line and exit code 2."""
    # threads that wait for each other sleep: spinning, they take the cores of other programs, which they then wait for
    os.environ.setdefault("OMP_WAIT_POLICY", "passive")
    try:
        open_streams()
        try:
            main()
        finally:
            sys.stdout.flush()
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
    except BrokenPipeError:  # the reader of a pipe has left
        drop_output()
        sys.exit(141)
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO) or error.filename is not None:
            raise
        drop_output()
        sys.exit(fail(f"cannot write standard output: {error.strerror}; send it to a place with free space"))
    except KeyboardInterrupt:
        sys.exit(130)


def open_streams() -> None:
    """What a terminal cannot show becomes a question mark. UserError where stdout is closed; stderr and stdin may be."""
    if sys.stdin is None:
        sys.stdin = open(os.devnull)
    if sys.stderr is None:
        sys.stderr = open(os.devnull, "w")
    if sys.stdout is None:
        raise UserError("standard output is closed; send it somewhere, for instance to /dev/null")
    for stream in (sys.stdout, sys.stderr):
        stream.reconfigure(errors="replace")


def drop_output() -> None:
    """Nothing can be written to stdout: the interpreter must not complain again when it flushes."""
    with contextlib.suppress(OSError, ValueError):
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def fail(message: str) -> int:
    """Print one error line; returns the exit code for bad input."""
    print("error: " + " ".join(message.split()), file=sys.stderr)
    return 2


# ----------------------------------------------------------------------------------------------------------------- files

def read_file(path: str | Path, wanted: str, limit: int = 2 ** 30) -> bytes:
    """The content of a regular file of `limit` bytes at most; else UserError, which ends with what is `wanted`.

    Pipes and devices are refused: they may never end.
    """
    try:
        about = os.stat(path)
        if not stat.S_ISREG(about.st_mode):
            raise OSError(None, "Is a directory" if stat.S_ISDIR(about.st_mode) else "not a regular file")
        if about.st_size > limit:
            raise OSError(None, f"{about.st_size} bytes are more than {limit}")
        return Path(path).read_bytes()
    except (OSError, ValueError) as error:  # ValueError: a null byte in the path
        raise UserError(f"cannot read {path}: {getattr(error, 'strerror', None) or error}; {wanted}") from error


def text_of(content: bytes, name: str | Path, wanted: str) -> str:
    """UTF-8 text, with or without a byte order mark; lines end in \\n. UserError where it is none."""
    try:
        return content.decode("utf-8-sig").replace("\r\n", "\n").replace("\r", "\n")
    except UnicodeDecodeError as error:
        raise UserError(f"cannot read {name}: not UTF-8 at byte {error.start}; {wanted}") from error


def target_file(path: str | Path) -> Path:
    """The file that writing to `path` replaces: what a link points to. UserError where it is a device, a pipe or a folder."""
    path = Path(path)
    if not path.name:
        raise UserError(f"cannot write to {str(path)!r}: it names no file")
    try:
        mode = path.stat().st_mode
    except FileNotFoundError:
        pass
    except (OSError, ValueError) as error:
        raise UserError(f"cannot write {path}: {getattr(error, 'strerror', None) or error}; choose another place") from error
    else:
        if not stat.S_ISREG(mode):
            kind = "a folder; give a file in it" if stat.S_ISDIR(mode) else "no regular file; give one"
            raise UserError(f"cannot write {path}: it is {kind}")
    return Path(os.path.realpath(path)) if path.is_symlink() else path


@contextlib.contextmanager
def atomic_path(path: str | Path) -> Iterator[Path]:
    """A temporary path beside `path` that replaces it when the block ends well and vanishes when it does not.

    Through a link what it points to is replaced; devices and pipes are refused.
    """
    target = target_file(path)
    beside = target.with_name(f".{target.name}.{os.getpid()}.tmp")
    try:
        with _writing(path):
            target.parent.mkdir(parents=True, exist_ok=True)
            yield beside
            umask = os.umask(0)
            os.umask(umask)
            beside.chmod(0o666 & ~umask)  # some writers leave files that only their owner may read
            os.replace(beside, target)
    finally:
        with contextlib.suppress(OSError):
            beside.unlink(missing_ok=True)


@contextlib.contextmanager
def atomic_folder(out: Path) -> Iterator[Path]:
    """A temporary folder beside `out` that takes its place when the block ends well and vanishes when it does not.

    It is locked while it is written; those that nobody locks any more, of processes that were killed, go first.
    """
    for left in out.parent.glob(f".{glob.escape(out.name)}.*.tmp"):
        with contextlib.suppress(OSError), _locked(left):
            shutil.rmtree(left, ignore_errors=True)
    beside = out.with_name(f".{out.name}.{os.getpid()}.tmp")
    try:
        with _writing(out):
            beside.mkdir(parents=True)
            with _locked(beside):
                yield beside
            os.replace(beside, out)
    finally:
        shutil.rmtree(beside, ignore_errors=True)


@contextlib.contextmanager
def _locked(folder: Path) -> Iterator[None]:
    """Hold a folder's lock; BlockingIOError where another process does."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        yield
    finally:
        os.close(handle)


@contextlib.contextmanager
def _writing(path: str | Path) -> Iterator[None]:
    """What fails as a file is written is a UserError."""
    try:
        yield
    except (OSError, SafetensorError) as error:  # safetensors' own for a full disk
        reason = getattr(error, "strerror", None) or error
        raise UserError(f"cannot write {path}: {reason}; choose a writable place with free space") from error


def check_writable(flag: str, path: Path | None) -> None:
    """A UserError now, not after the work, where the file that `flag` names cannot be written. Makes its folder."""
    if path is None:
        return
    try:
        target = target_file(path)
        target.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=target.parent):  # os.access would tell root that everything is writable
            pass
    except UserError as error:
        raise UserError(f"{flag} {path} cannot be written: {str(error).removeprefix(f'cannot write {path}: ')}") from error
    except OSError as error:
        raise UserError(f"{flag} {path} cannot be written: {error.strerror}; choose another place") from error


# ------------------------------------------------------------------------------------------------------------------ time

@contextlib.contextmanager
def time_limit(seconds: float) -> Iterator[None]:
    """TimeoutError in a block of Python code that runs longer. Only the main thread can be interrupted; others run on."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def stop(*_: object) -> NoReturn:
        raise TimeoutError(f"no end after {seconds:g} s")

    before = signal.signal(signal.SIGALRM, stop)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


# --------------------------------------------------------------------------------------------------------------- machine

def default_device() -> str:
    import torch
    return "cuda" if torch.cuda.is_available() else "cpu"


def find_device(device: str | None) -> str:
    """`device`, or where that is None the default. UserError where this machine has no such device: cpu, cuda, cuda:N."""
    import torch
    if device is None:
        return default_device()
    there = ["cpu", *(["cuda"] if torch.cuda.is_available() else []), *(f"cuda:{i}" for i in range(torch.cuda.device_count()))]
    if device not in there:
        raise UserError(f"--device {device} is not there; this machine has: {', '.join(there)}")
    return device


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
