"""The ablations: every variant trains and is judged on the same captures."""
import json
import sys
from pathlib import Path

import pytest
import torch

from hashfast.commands import ablations
from hashfast.commands.ablations import RATIOS, VARIANTS, Layer
from hashfast.common import run_command
from hashfast.train_hash import attention_weights

WORDS = "river stone cloud lamp table window garden winter letter captain".split()


def test_value_norms_are_a_channel_that_attention_does_not_see() -> None:
    torch.manual_seed(0)
    q, k, v = torch.randn(4, 20, 16), torch.randn(2, 20, 16), torch.randn(2, 20, 16)
    wide = Layer([q], [k], [v]).with_value_norms()
    torch.testing.assert_close(wide.keys[0][..., 16], v.norm(dim=-1).log())
    positions = torch.tensor([5, 19])
    torch.testing.assert_close(attention_weights(wide.queries[0][:, positions], wide.keys[0], positions),
                               attention_weights(q[:, positions], k, positions))


def test_rows_that_cannot_be_written_are_no_surprise(tmp_path: Path, in_process) -> None:
    done = in_process(ablations.main, "ablations.py", "--checkpoint_path", "none", "--data", "none", "--json", tmp_path)
    assert done.code == 2 and done.err.startswith(f"error: --json {tmp_path} cannot be written")


def test_every_variant_has_its_rows(tiny_checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    text = " ".join(f"{WORDS[i % 10].capitalize()} {WORDS[i * i % 7]} {WORDS[i // 3 % 9]}." for i in range(600))
    (tmp_path / "book.txt").write_text(text)
    out = tmp_path / "rows.json"
    monkeypatch.setattr(sys, "argv", [
        "ablations.py", "--checkpoint_path", str(tiny_checkpoint), "--data", str(tmp_path / "book.txt"), "--json", str(out),
        "--device", "cpu", "--precision", "float32", "--context", "480", "--sequences", "3", "--needles", "0.3", "--steps", "2",
        "--sink", "2", "--recent", "4", "--layers", "0", "1",
        "--variants", *[name for name in VARIANTS if name != "1/4 of the context"]])
    run_command(ablations.main)
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
