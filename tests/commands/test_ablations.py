"""The command ablations: every variant trains and is measured on the same captures."""
import json
from pathlib import Path

from hashfast.commands import ablations
from hashfast.research.ablations import RATIOS, VARIANTS

WORDS = "river stone cloud lamp table window garden winter letter captain".split()


def test_rows_that_cannot_be_written_are_no_surprise(tmp_path: Path, in_process) -> None:
    done = in_process(ablations.main, "ablations.py", "--checkpoint_path", "none", "--data", "none", "--json", tmp_path)
    assert done.code == 2 and done.err.startswith(f"error: --json {tmp_path} cannot be written")


def test_every_variant_has_its_rows(tiny_checkpoint: Path, tmp_path: Path, in_process) -> None:
    text = " ".join(f"{WORDS[i % 10].capitalize()} {WORDS[i * i % 7]} {WORDS[i // 3 % 9]}." for i in range(600))
    (tmp_path / "book.txt").write_text(text)
    out = tmp_path / "rows.json"
    done = in_process(
        ablations.main, "ablations.py", "--checkpoint_path", tiny_checkpoint, "--data", tmp_path / "book.txt", "--json", out,
        "--device", "cpu", "--precision", "float32", "--context", 480, "--sequences", 3, "--needles", 0.3, "--steps", 2,
        "--sink", 2, "--recent", 4, "--layers", 0, 1, "--variants", *(name for name in VARIANTS if name[:3] != "1/4"))
    assert done.code == 0, done.err
    assert done.out.startswith("| choice | bytes | books 1/16 |") and "\n| ours | 4 | 0." in done.out
    result = json.loads(out.read_text())
    rows = {(row["name"], row["ratio"]): row for row in result["rows"]}
    assert len(rows) == (len(VARIANTS) - 1 + 2) * len(RATIOS) and result["layers"] == [0, 1]
    for name in {name for name, _ in rows}:
        for kind in ("mass_books", "mass_needles"):
            masses = [rows[name, ratio][kind] for ratio in RATIOS]
            assert 0 < masses[2] <= masses[1] <= masses[0] <= 1
            for ratio in RATIOS:
                assert rows["window", ratio][kind] <= rows[name, ratio][kind] + 1e-6
    assert rows["16 bits", 16]["bytes_per_token"] == rows["ours", 16]["bytes_per_token"] == 4
    assert rows["hata", 16]["bytes_per_token"] == 16 and rows["hashattention", 16]["bytes_per_token"] == 8
    assert rows["per query head", 16]["share"] == "query" and rows["log |v|", 16]["value_norm"]
    assert rows["ours", 16]["mass_books"] != rows["no needles", 16]["mass_books"]
