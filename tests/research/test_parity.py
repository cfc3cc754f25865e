"""Parity: rows from the runs it compares, refusals where there is no run to compare with."""
import json
from pathlib import Path

from results_inputs import ABOUT, CASE, STEP

from hashfast.research.report import tables_of


def answer(**fields: object) -> dict:
    return {"model": "q", "prompt_sha256": "p", "new_tokens": [[1, 2]], "prompt_tokens": 32000, "attention": "dense",
            "decode_tok_s": 100.0, "versions": ABOUT, **fields}


def test_parity(bench_command, tmp_path: Path) -> None:
    plain = ABOUT | {"rows": [STEP, STEP | {"attention": "hash", "sparsity": 32, "ms_per_step": 5.0}]}
    int8 = ABOUT | {"rows": [STEP | {"weights": "int8", "ms_per_step": 4.0}]}
    tp2 = ABOUT | {"rows": [STEP | {"attention": "hash", "sparsity": 32, "ranks": 2, "ms_per_step": 3.0}]}
    spoken = answer(speculate="self", speculate_k=4, accepted_per_verify=2.5, decode_tok_s=200.0)
    files = []
    for i, content in enumerate([plain, int8, tp2, answer(), spoken]):
        files.append(tmp_path / f"{i}.json")
        files[-1].write_text(json.dumps(content))
    out = tmp_path / "results" / "parity.json"
    assert bench_command("parity", *files, "--json", out)[0] == 0
    result = json.loads(out.read_text())
    assert {name: result[name] for name in ("gpu", "torch", "triton", "commit")}.items() <= ABOUT.items()
    fields = ("feature", "attention", "ms_per_token", "baseline_ms", "ratio")
    assert [tuple(row[name] for name in fields) for row in result["rows"]] == [
        ("int8", "dense", 4.0, 8.0, 0.5), ("tp2", "hash", 3.0, 5.0, 0.6), ("self_speculation", "dense", 5.0, 10.0, 0.5)]
    assert result["rows"][-1]["note"] == "real weights, 2.50 of 4 drafts accepted a round"
    assert "| self_speculation | q | 1 x 32000 |" in tables_of("parity", out.parent, tmp_path)

    assert bench_command("parity", files[1], "--json", out)[0] == 2  # nothing to hold it against
    assert bench_command("parity", files[0], "--json", out)[0] == 2  # nothing but that
    assert bench_command("parity", files[0], files[4], "--json", out)[0] == 2
    files[1].write_text(json.dumps(ABOUT | {"rows": [CASE]}))  # no decode steps
    assert bench_command("parity", files[0], files[1], "--json", out)[0] == 2
    files[1].write_text(json.dumps(int8 | {"gpu": "another"}))
    code, _, err = bench_command("parity", *files, "--json", out)
    assert code == 2 and "another GPU" in err and json.loads(out.read_text()) == result
