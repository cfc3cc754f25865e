"""Tables from results files: every kind from rows of its schema, mistakes as one line, parity from the runs it compares."""
import json
from pathlib import Path

import pytest

from hashfast.commands import bench
from hashfast.research.report import TABLES, claims, fill, shape, summary, tables_of

ABOUT = {"gpu": "A GPU", "torch": "2.0", "triton": "3.0", "commit": "abc", "command": "python bench.py x"}
SIZES = {"batch": 1, "context": 32768}
STEP = {"model": "m", **SIZES, "attention": "dense", "sparsity": 1, "ms_per_step": 8.0, "floor_ms": 4.0, "peak_gib": 9.0,
        "compile_s": 3.0}
CASE = {**SIZES, "sparsity": 32, "mode": "default", "encode_us": 5.0, "total_us": 20.0, "floor_us": 2.0}
PEERS = {"dense_best_us": 50.0, "dense_best": "cudnn", "dense_gb_s": 4000.0, "flash_us": 60.0, "flex_us": None}
JUDGED = {"model": "m", "context": 8192, "selector": "hash", "recipe": "listwise", "bits": 32, "share": "kv", "ratio": 16,
          "budget": 512, "exact": 3, "samples": 4, "bytes_per_token": 4.0, "nll_difference": 0.25}
ROWS = {  # table: its rows, and cells that must come of them
    "attention": ([CASE | PEERS, CASE | {"mode": "hashattention", "total_us": 33.0}],
                  ["1 x 32K, 1/32", "20.0", "50 (cudnn, 4000 GB/s)", "2.5x", "60", "-", "33.0"]),
    "decode": ([STEP | {"warm_start_s": 1.5}, STEP | {"attention": "hash", "sparsity": 32, "ms_per_step": 3.2}],
               ["8.00", "4.00", "3.20", "2.50x", "9.0"]),
    "latency": ([{**SIZES, "attention": mode, "sparsity": 32, "ttft_s": 0.5, "ms_per_token": ms, "floor_ms": 1.0}
                 for mode, ms in (("dense", 6.0), ("hash", 4.0))], ["32K", "0.50", "6.00", "4.00", "1.50x"]),
    "prefill": ([{**SIZES, "model": "m", "seconds": 2.5, "tflops": 400.4, "peak_gib": 20.0, "plan_gib": 21.0}],
                ["2.50", "400", "20.0", "21.0"]),
    "ragged": ([{"lengths": [1000, 2048], "attention": "hash", "together_tok_s": 300.0, "alone_tok_s": 100.0, "speedup": 3.0}],
               ["1000, 2K", "hash", "300", "100", "3.0x"]),
    "speculate": ([{**SIZES, "model": "m", "sparsity": 32, "k": 4, "draft_ms": 1.0, "verify_ms": 2.0, "round_ms": 6.0,
                    "dense_ms": 4.0}], ["4", "6.00", "1.50"]),
    "parity": ([{**SIZES, "feature": "int8", "model": "m", "attention": "hash", "ms_per_token": 3.0, "baseline_ms": 5.0,
                 "ratio": 0.6, "note": "random weights"}], ["int8", "3.00", "5.00", "0.60", "random weights"]),
    "ppl": ([JUDGED | {"ppl_ratio": 1.25, "per_text": {"a": 1.5, "b": 1.0}}],
            ["hash (listwise, 32 bit)", "512 of 8192", "1.250", "1.000 - 1.500"]),
    "needles": ([JUDGED | {"task": "uuids"}, JUDGED | {"task": "single", "exact": 4},
                 JUDGED | {"task": "uuids", "selector": "hash_turns", "share": "query"}],
                ["3/4 (+0.25)", "4/4 (+0.25)", "7/8", "4", "hash turns (listwise, 32 bit, one per query head)"]),
    "grid": ([JUDGED | {"depth": depth} for depth in (0, 50)], ["1/16", "6/8"]),
    "ablations": ([{"name": "64 bits", "bytes_per_token": 8.0, "ratio": ratio, "mass_books": 0.5 + ratio / 64,
                    "mass_needles": 0.25} for ratio in (16, 32)], ["64 bits", "8", "0.750", "1.000", "0.250"]),
    "quickstart": ([{"device": "cpu", "attention": "hash", "prompt_tokens": 6000, "budget": 384, "decode_tok_s": 20.0,
                     "agreement": 0.9, "perplexity_ratio": 1.01}], ["384", "20.0", "0.900", "1.010"]),
}


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
def command(in_process):
    """command(word, ...) runs bench.py in this process -> exit code, stdout, stderr."""
    return lambda *words: in_process(bench.main, "bench.py", *words)


@pytest.mark.parametrize("name", TABLES)
def test_every_table(name: str, results, tmp_path: Path) -> None:
    rows, expected = ROWS[name]
    made = tables_of(name, results(name, rows), tmp_path)
    cells = [cell.strip() for line in made.splitlines() if line.startswith("|") for cell in line.split("|")[1:-1]]
    assert set(expected) <= set(cells)
    lines = [line for line in made.splitlines() if line.startswith("|")]
    assert len({line.count("|") for line in lines}) == 1 and len(lines) > 2
    assert "A GPU, torch 2.0, Triton 3.0, commit abc" in made
    assert "`python bench.py x`" in made
    assert f"[rows](results/{TABLES[name].files.replace('*', '_here')})" in made
    assert tables_of(name, tmp_path, tmp_path) == ""  # no file, no table


def test_what_sets_runs_apart() -> None:
    assert shape(SIZES) == "1 x 32K" and shape({"batch": 4, "context": 1000}) == "4 x 1000"
    assert shape(SIZES | {"weights": "int8", "ranks": 2}) == "1 x 32K, int8, 2 GPUs"


def test_a_start_is_told_beside_the_steps(results, tmp_path: Path) -> None:
    made = tables_of("decode", results("decode", ROWS["decode"][0]), tmp_path)
    assert "dense 3.0 s, 1.5 s in another process later." in made


def test_markers(results, tmp_path: Path) -> None:
    folder = results("prefill", ROWS["prefill"][0], date="2026-01-02", note="slow disk")
    text = "a\n<!-- table:prefill -->\nold\n<!-- /table -->\nb\n<!-- table:grid -->\nold\n<!-- /table -->\nc\n"
    filled = fill(text, folder, tmp_path)
    assert "old" not in filled and "| 2.50 | 400 |" in filled and "2026-01-02" in filled and "Note: slow disk." in filled
    assert "<!-- no needle_grid*.json -->" in filled and [filled[0], filled[-2]] == ["a", "c"]
    assert fill(filled, folder, tmp_path) == filled


def test_summary(results, tmp_path: Path) -> None:
    """Dense beside hash, from every kind of file; of signatures the first file's, and a shape of two files once."""
    other = {"recipe": "hata", "bits": 128}
    for name, rows in {
        "attention": ROWS["attention"][0],
        "decode": [*ROWS["decode"][0], STEP | {"ranks": 2}, STEP | {"ranks": 2, "attention": "hash", "sparsity": 32}],
        "latency": [row | {"model": "m", "batch": 1, "context": context} for row in ROWS["latency"][0]
                    for context in (32768, 65536)],
        "ppl": [JUDGED | {"ppl_ratio": 1.25}, JUDGED | other | {"ppl_ratio": 2.0}],
        "needles": [JUDGED | {"task": task} | changed for task in ("single", "uuids")
                    for changed in ({"selector": "dense", "recipe": None, "ratio": 1, "exact": 4}, {}, other | {"exact": 0})],
    }.items():
        folder = results(name, rows)
    lines = [[cell.strip() for cell in line.split("|")[1:-2]] for line in summary(folder, tmp_path).splitlines()[2:-2]]
    assert lines == [
        ["attention of a layer, 1 x 32K, 1/32", "50 us (cudnn, 4000 GB/s)", "20.0 us", "2.0 us", "2.5x"],
        ["a token, m, 1 x 32K, 1/32", "8.00 ms", "3.20 ms", "4.00 ms", "2.50x"],
        ["a token, m, 1 x 64K, 1/32", "6.00 ms", "4.00 ms", "1.00 ms", "1.50x"],
        ["perplexity, m, 512 of 8K tokens", "1", "1.250", "-", "-"],
        ["right answers, m, 512 of 8K tokens: single, multi key, all tasks", "4/4, -, 8/8", "3/4, -, 6/8", "-", "-"]]
    assert "[decode_here.json](results/decode_here.json)" in summary(folder, tmp_path)
    assert summary(folder, tmp_path).endswith("\n\nA GPU, torch 2.0, Triton 3.0.")
    ranks = [STEP | {"ranks": 2}, STEP | {"ranks": 2, "attention": "hash", "sparsity": 32}]
    (folder / "decode_ranks.json").write_text(json.dumps(ABOUT | {"gpu": "Two GPUs", "rows": ranks}))
    assert "Two GPUs" not in summary(folder, tmp_path)  # no line is of theirs
    results("attention", ROWS["attention"][0], date="2026-01-02")
    assert summary(folder, tmp_path).endswith("\n\nA GPU, torch 2.0, Triton 3.0, 2026-01-02.")
    results("decode", ROWS["decode"][0], date="2026-01-01")
    assert summary(folder, tmp_path).endswith("\n\nA GPU, torch 2.0, Triton 3.0, 2026-01-01 to 2026-01-02.")
    assert "FlashDecode; A100, 1/32 | 3.0x to 3.0x, of FlashDecode |" in claims(folder)
    assert "| 2.5x to 2.5x, of our own dense steps |" in claims(folder)


def test_report(command, results, tmp_path: Path) -> None:
    folder = results("prefill", ROWS["prefill"][0])
    code, out, _ = command("report", "--results", folder)
    assert code == 0 and "| 2.50 | 400 |" in out
    page = tmp_path / "page.md"
    page.write_text("<!-- table:prefill -->\n<!-- /table -->\n")
    code, out, _ = command("report", "--results", folder, "--write", page)
    assert (code, out) == (0, "") and "| 2.50 | 400 |" in page.read_text()


def write(folder: Path, text: str) -> None:
    (folder / "prefill_here.json").write_text(text)


@pytest.mark.parametrize("change, words", [
    (lambda folder, page: page.write_text("no markers"), "has no line <!-- table:NAME -->"),
    (lambda folder, page: page.write_text("<!-- table:tea -->\n<!-- /table -->"), "no table 'tea'"),
    (lambda folder, page: page.unlink(), "cannot read"),
    (lambda folder, page: write(folder, "{"), "cannot read"),
    (lambda folder, page: write(folder, json.dumps(ABOUT | {"rows": []})), "cannot read"),
    (lambda folder, page: write(folder, json.dumps(ABOUT | {"rows": [{"batch": 1}]})), "no rows for"),
])
def test_mistakes(change, words: str, command, results, tmp_path: Path) -> None:
    folder, page = results("prefill", ROWS["prefill"][0]), tmp_path / "page.md"
    page.write_text("<!-- table:prefill -->\n<!-- /table -->\n")
    change(folder, page)
    before = page.read_text() if page.exists() else None
    code, out, err = command("report", "--results", folder, "--write", page)
    assert code == 2 and out == "" and words in err and err.count("\n") == 1
    assert before is None or page.read_text() == before


def test_nothing_to_report(command, tmp_path: Path) -> None:
    assert command("report", "--results", tmp_path)[0] == 2
    assert command("report", "--results", tmp_path / "none")[0] == 2


def answer(**fields: object) -> dict:
    return {"model": "q", "prompt_sha256": "p", "new_tokens": [[1, 2]], "prompt_tokens": 32000, "attention": "dense",
            "decode_tok_s": 100.0, "versions": ABOUT, **fields}


def test_parity(command, tmp_path: Path) -> None:
    plain = ABOUT | {"rows": [STEP, STEP | {"attention": "hash", "sparsity": 32, "ms_per_step": 5.0}]}
    int8 = ABOUT | {"rows": [STEP | {"weights": "int8", "ms_per_step": 4.0}]}
    tp2 = ABOUT | {"rows": [STEP | {"attention": "hash", "sparsity": 32, "ranks": 2, "ms_per_step": 3.0}]}
    spoken = answer(speculate="self", speculate_k=4, accepted_per_verify=2.5, decode_tok_s=200.0)
    files = []
    for i, content in enumerate([plain, int8, tp2, answer(), spoken]):
        files.append(tmp_path / f"{i}.json")
        files[-1].write_text(json.dumps(content))
    out = tmp_path / "results" / "parity.json"
    assert command("parity", *files, "--json", out)[0] == 0
    result = json.loads(out.read_text())
    assert {name: result[name] for name in ("gpu", "torch", "triton", "commit")}.items() <= ABOUT.items()
    fields = ("feature", "attention", "ms_per_token", "baseline_ms", "ratio")
    assert [tuple(row[name] for name in fields) for row in result["rows"]] == [
        ("int8", "dense", 4.0, 8.0, 0.5), ("tp2", "hash", 3.0, 5.0, 0.6), ("self_speculation", "dense", 5.0, 10.0, 0.5)]
    assert result["rows"][-1]["note"] == "real weights, 2.50 of 4 drafts accepted a round"
    assert "| self_speculation | q | 1 x 32000 |" in tables_of("parity", out.parent, tmp_path)

    assert command("parity", files[1], "--json", out)[0] == 2  # nothing to hold it against
    assert command("parity", files[0], "--json", out)[0] == 2  # nothing but that
    assert command("parity", files[0], files[4], "--json", out)[0] == 2
    files[1].write_text(json.dumps(ABOUT | {"rows": [CASE]}))  # no decode steps
    assert command("parity", files[0], files[1], "--json", out)[0] == 2
    files[1].write_text(json.dumps(int8 | {"gpu": "another"}))
    code, _, err = command("parity", *files, "--json", out)
    assert code == 2 and "another GPU" in err and json.loads(out.read_text()) == result


def test_plots(command, results) -> None:
    for name in ("attention", "decode", "latency"):
        rows = ROWS[name][0]
        if name == "attention":
            rows = [row | {"score_us": 3.0, "select_us": 4.0, "attend_us": 9.0} for row in rows]
        if name == "latency":
            rows = [row | {"model": "m"} for row in rows]
        path = results(name, rows) / f"{name}_here.json"
        assert command("plot", path)[0] == 0
        assert path.with_suffix(".png").read_bytes().startswith(b"\x89PNG")
        assert f"](results/{name}_here.png)" in tables_of(name, path.parent, path.parent.parent)
    path.write_text("{}")
    assert command("plot", path)[0] == 2
