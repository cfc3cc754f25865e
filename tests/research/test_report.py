"""Tables from results files: every kind from rows of its schema, mistakes as one line."""
import json
from pathlib import Path

import pytest
from results_inputs import ABOUT, DISTANCE, MEASURED, ROWS, SIZES, STEP

from hashfast.research.report import TABLES, claims, fill, shape, summary, tables_of


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


def test_distances_from_dense(results, tmp_path: Path) -> None:
    """A line per run over all texts, with KL by kind; the summary names all three figures."""
    rows = [DISTANCE | {"selector": "dense"}, DISTANCE, DISTANCE | {"kind": "novels", "kl": 0.01},
            DISTANCE | {"kind": "code", "kl": 0.02}]
    folder = results("ppl", rows)
    lines = tables_of("ppl", folder, tmp_path).splitlines()
    assert [line for line in lines if "hash" in line and line.startswith("|")] == [
        "| m | hash (listwise, 32 bit) | 512 of 8192 | 4 | 0.0138 [0.0121, 0.0155] | 0.941 [0.930, 0.950] "
        "| 0.990 [0.980, 1.010] | 0.0100 | 0.0200 |"]
    assert lines[0].endswith("| KL to dense, nats | same argmax | perplexity ratio | KL, novels | KL, code |")
    assert ("| KL to dense, same argmax, perplexity ratio, m, 512 of 8K tokens | 0, 1, 1 | 0.0138, 0.941, 0.990 | - | - |"
            in summary(folder, tmp_path))
    lines = tables_of("ppl", results("ppl", [DISTANCE | {"kind": "novels"}]), tmp_path).splitlines()
    assert lines[0].endswith("| perplexity ratio |") and len(lines) == 5


def test_summary(results, tmp_path: Path) -> None:
    """Dense beside hash, from every kind of file; of signatures the first file's, and a shape of two files once."""
    other = {"recipe": "hata", "bits": 128}
    for name, rows in {
        "attention": ROWS["attention"][0],
        "decode": [*ROWS["decode"][0], STEP | {"ranks": 2}, STEP | {"ranks": 2, "attention": "hash", "sparsity": 32}],
        "latency": [row | {"model": "m", "batch": 1, "context": context} for row in ROWS["latency"][0]
                    for context in (32768, 65536)],
        "ppl": [MEASURED | {"ppl_ratio": 1.25}, MEASURED | other | {"ppl_ratio": 2.0}],
        "needles": [MEASURED | {"task": task} | changed for task in ("single", "uuids")
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


def test_report(bench_command, results, tmp_path: Path) -> None:
    folder = results("prefill", ROWS["prefill"][0])
    code, out, _ = bench_command("report", "--results", folder)
    assert code == 0 and "| 2.50 | 400 |" in out
    page = tmp_path / "page.md"
    page.write_text("<!-- table:prefill -->\n<!-- /table -->\n")
    code, out, _ = bench_command("report", "--results", folder, "--write", page)
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
def test_mistakes(change, words: str, bench_command, results, tmp_path: Path) -> None:
    folder, page = results("prefill", ROWS["prefill"][0]), tmp_path / "page.md"
    page.write_text("<!-- table:prefill -->\n<!-- /table -->\n")
    change(folder, page)
    before = page.read_text() if page.exists() else None
    code, out, err = bench_command("report", "--results", folder, "--write", page)
    assert code == 2 and out == "" and words in err and err.count("\n") == 1
    assert before is None or page.read_text() == before


def test_nothing_to_report(bench_command, tmp_path: Path) -> None:
    assert bench_command("report", "--results", tmp_path)[0] == 2
    assert bench_command("report", "--results", tmp_path / "none")[0] == 2
