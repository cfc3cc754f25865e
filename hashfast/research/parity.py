"""What a feature costs beside the same run without it: rows of results/parity*.json from other results files."""
import json
from pathlib import Path

from hashfast.common import UserError, read_file
from hashfast.research.report import parity_table, save_results, shape


def compare(files: list[Path], out: Path) -> None:
    """Write the rows to `out` and print their table.

    files: of `bench decode --json`, whose rows in bfloat16 on one GPU are the baseline of the others; and of `generate --save`,
    where the baseline of runs that speculate is the dense one of the same prompt.
    """
    decoded, generated, machine = [], [], {}
    wanted = "give files of bench decode --json and generate --save"
    commits, dates = {}, {}  # in the order of the files
    for path in files:
        try:
            result = json.loads(read_file(path, wanted))
            about = result.get("versions") or result
            if machine and about["gpu"] != machine["gpu"]:
                raise UserError(f"{path} is of another GPU than {files[0]}; compare runs of one kind")
            machine = machine or {name: about[name] for name in ("gpu", "torch", "triton")}
            commits |= {about["commit"]: None}
            dates |= {about.get("date", ""): None}
            if "rows" in result:
                decoded += result["rows"]
            else:
                generated.append(result)
        except (ValueError, LookupError, TypeError, AttributeError, RecursionError) as error:
            raise UserError(f"cannot read {path} ({type(error).__name__}: {error}); {wanted}") from error
    try:
        rows = decode_parity(decoded) + speculation_parity(generated)
    except (LookupError, TypeError) as error:
        raise UserError(f"the files hold other rows than those of bench decode --json and generate --save of one prompt "
                        f"({type(error).__name__}: {error}); give such files") from error
    if not rows:
        raise UserError("nothing to compare; give runs with a feature (int8, several GPUs, speculation) and without")
    about = {**machine, "commit": ", ".join(commits), "date": ", ".join(filter(None, dates))}
    save_results(out, about, rows)
    print(parity_table(rows))


def compared(feature: str, row: dict, ms: float, baseline_ms: float, note: str) -> dict:
    same = {name: row[name] for name in ("model", "batch", "context", "attention")}
    return {"feature": feature, **same, "ms_per_token": ms, "baseline_ms": baseline_ms, "ratio": ms / baseline_ms, "note": note}


def decode_parity(rows: list[dict]) -> list[dict]:
    """Steps with weights of fewer bits or on several GPUs, against those in bfloat16 on one."""
    def key(row: dict) -> tuple:
        return row["model"], row["batch"], row["context"], row["attention"], row["sparsity"]

    def features(row: dict) -> list[str]:
        bits, ranks = row.get("weights", "bfloat16"), row.get("ranks", 1)
        return [*([bits] if bits != "bfloat16" else []), *([f"tp{ranks}"] if ranks > 1 else [])]

    plain = {key(row): row["ms_per_step"] for row in rows if not features(row)}
    for row in rows:
        if key(row) not in plain:
            raise UserError(f"no run of {row['model']} {shape(row)} {row['attention']} in bfloat16 on one GPU to compare with; "
                            "add the file of one")
    return [compared(" ".join(features(row)), row, row["ms_per_step"], plain[key(row)], "random weights")
            for row in rows if features(row)]


def speculation_parity(runs: list[dict]) -> list[dict]:
    """Answers drafted and verified, against those decoded densely one by one. One prompt each; ms per token of the answer."""
    speculated = [run for run in runs if "speculate" in run]
    plain = {(run["model"], run["prompt_sha256"]): run for run in runs if run not in speculated and run["attention"] == "dense"}
    rows = []
    for run in speculated:
        before = plain.get((run["model"], run["prompt_sha256"]))
        if before is None:
            raise UserError(f"no dense run of {run['model']} with the prompt of the one that speculates; add the file of one")
        feature = "self_speculation" if run["speculate"] == "self" else "draft"
        row = run | {"batch": len(run["new_tokens"]), "context": run["prompt_tokens"]}
        note = f"real weights, {run['accepted_per_verify']:.2f} of {run['speculate_k']} drafts accepted a round"
        rows.append(compared(feature, row, 1000 / run["decode_tok_s"], 1000 / before["decode_tok_s"], note))
    return rows
