"""Progress: nothing of what is quick; on a terminal a line that counts and goes, in a log one line."""
import io
import re
import sys
import time

import pytest

from hashfast import progress


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


@pytest.mark.parametrize("stream, shown", [
    (io.StringIO(), r"prefill: 2048 of 6000 tok \(\d+ tok/s\), 0 s \.\.\n"),
    (Terminal(), r"(\rprefill: 2048 of 6000 tok \(\d+ tok/s\), 0 s\x1b\[K){2,}\r\x1b\[K"),
])
def test_what_is_shown(stream: io.StringIO, shown: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "stderr", stream)
    with progress.Progress("prefill", 6000, "tok") as counted:
        counted.done += 2048
    assert stream.getvalue() == ""
    monkeypatch.setattr(progress, "DELAY", 0.01)
    monkeypatch.setattr(progress, "EVERY", 0.01)
    counted.done = 2048
    with counted:
        time.sleep(0.3)
    assert re.fullmatch(shown, stream.getvalue())


def test_it_ends_with_its_block(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "stderr", stream := Terminal())
    monkeypatch.setattr(progress, "DELAY", 0)
    with pytest.raises(KeyboardInterrupt), progress.Progress("compiling") as shown:
        time.sleep(0.05)
        raise KeyboardInterrupt
    assert not shown.thread.is_alive()
    assert stream.getvalue().startswith("\rcompiling: 0 s") and stream.getvalue().endswith("\x1b[K")
