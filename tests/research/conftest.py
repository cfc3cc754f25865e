"""Results files, and the command bench that reads them."""
import json
from pathlib import Path

import pytest
from results_inputs import ABOUT

from hashfast.commands import bench
from hashfast.research.report import TABLES


@pytest.fixture
def results(tmp_path: Path):
    """results(table, rows, **about) writes a file that the table finds -> its folder."""
    def write(name: str, rows: list[dict], **about: str) -> Path:
        path = tmp_path / "results" / TABLES[name].files.replace("*", "_here")
        path.parent.mkdir(exist_ok=True)
        path.write_text(json.dumps(ABOUT | about | {"rows": rows}))
        return path.parent
    return write


@pytest.fixture
def bench_command(in_process):
    """bench_command(word, ...) runs the command bench in this process -> exit code, stdout, stderr."""
    return lambda *words: in_process(bench.main, "bench.py", *words)
