"""What a command is doing while a person waits."""
import contextlib
import sys
import threading
import time

DELAY = 2.0  # seconds before it is said
EVERY = 0.5


class Progress:
    """Says on stderr what a block is doing, once that has taken 2 s: on a terminal one line that counts, wiped at the end.

        with Progress("prefill", 6000, "tok") as progress:
            progress.done += 2048

    Elsewhere, as in a log, it is said once.
    """

    def __init__(self, task: str, total: int = 0, unit: str = "") -> None:
        self.task, self.total, self.unit, self.done = task, total, unit, 0

    def __enter__(self) -> "Progress":
        self.started, self.ended = time.perf_counter(), threading.Event()
        self.thread = threading.Thread(target=self._show, daemon=True)
        self.thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.ended.set()
        self.thread.join()

    def _line(self) -> str:
        seconds = time.perf_counter() - self.started
        rate = f" ({self.done / seconds:.0f} {self.unit}/s)" if self.done else ""
        counted = f" {self.done} of {self.total} {self.unit}{rate}," if self.total else ""
        return f"{self.task}:{counted} {seconds:.0f} s"

    def _show(self) -> None:
        stream = sys.stderr
        if self.ended.wait(DELAY):
            return
        with contextlib.suppress(OSError, ValueError):  # nobody reads it
            if not stream.isatty():
                print(f"{self._line()} ..", file=stream, flush=True)
                return
            while True:
                print(f"\r{self._line()}\x1b[K", end="", file=stream, flush=True)
                if self.ended.wait(EVERY):
                    break
            print("\r\x1b[K", end="", file=stream, flush=True)
