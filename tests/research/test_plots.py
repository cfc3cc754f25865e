"""A PNG beside every results file that has a plot."""
from results_inputs import ROWS

from hashfast.research.report import tables_of


def test_plots(bench_command, results) -> None:
    for name in ("attention", "decode", "latency"):
        rows = ROWS[name][0]
        if name == "attention":
            rows = [row | {"score_us": 3.0, "select_us": 4.0, "attend_us": 9.0} for row in rows]
        if name == "latency":
            rows = [row | {"model": "m"} for row in rows]
        path = results(name, rows) / f"{name}_here.json"
        assert bench_command("plot", path)[0] == 0
        assert path.with_suffix(".png").read_bytes().startswith(b"\x89PNG")
        assert f"](results/{name}_here.png)" in tables_of(name, path.parent, path.parent.parent)
    path.write_text("{}")
    assert bench_command("plot", path)[0] == 2
