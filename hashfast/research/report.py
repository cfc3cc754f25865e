"""Tables in Markdown from results files, for README.md and results/README.md (which explains each table above its markers).

A results file is JSON: {"gpu", "torch", "triton", "commit", "command", "rows"}. Below each table stands where and how it was
measured; every figure comes from a row.
"""
import json
import os
import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path

from hashfast.common import UserError, atomic_path, command_line, read_file


def save_results(path: Path, about: dict[str, object], rows: list[dict], *launch: str) -> None:
    """Write a results file. about: `environment()`, taken before a tracked file changed. launch: as for `command_line`."""
    with atomic_path(path) as beside:
        beside.write_text(json.dumps({**about, "command": command_line(*launch), "rows": rows}, indent=1) + "\n")


def print_table(rows: list[dict], header: bool) -> None:
    """Rows of a results file on the terminal, with their names above the first."""
    def cell(value: object) -> str:
        return f"{value:.4g}" if isinstance(value, float) else str(value)

    widths = [max(len(name), 9) for name in rows[0]]
    if header:
        print(" ".join(name.rjust(width) for name, width in zip(rows[0], widths, strict=True)))
    for row in rows:
        print(" ".join(cell(value).rjust(width) for value, width in zip(row.values(), widths, strict=True)), flush=True)


# ---------------------------------------------------------------------------------------------------------------- tables

def fixed(value: float | None, digits: int, suffix: str = "") -> str:
    return "-" if value is None else f"{value:.{digits}f}{suffix}"


def tokens(count: int) -> str:
    return f"{count // 1024}K" if count % 1024 == 0 else str(count)


def shape(row: dict) -> str:
    """batch x context, and what else sets a run apart: bits of the weights, GPUs that share the model."""
    parts = [f"{row['batch']} x {tokens(row['context'])}"]
    if row.get("weights", "bfloat16") != "bfloat16":
        parts.append(row["weights"])
    if row.get("ranks", 1) > 1:
        parts.append(f"{row['ranks']} GPUs")
    return ", ".join(parts)


def pick(rows: list[dict], **fields: object) -> dict:
    """The first row with these fields; {} where there is none."""
    return next((row for row in rows if all(row.get(name) == value for name, value in fields.items())), {})


def grouped(rows: list[dict], key: Callable[[dict], object]) -> list[list[dict]]:
    """Rows of the same key together, in the order of their first."""
    groups: dict[object, list[dict]] = {}
    for row in rows:
        groups.setdefault(key(row), []).append(row)
    return list(groups.values())


def markdown(header: list[str], lines: Iterable[list[str]]) -> str:
    return "\n".join("| " + " | ".join(line) + " |" for line in [header, ["---"] * len(header), *lines])


def attention_table(rows: list[dict]) -> str:
    """Lines of one batch, context and sparsity: all modes of signatures, and the dense peers measured on the same caches."""
    lines = []
    for case in grouped(rows, lambda row: (row["batch"], row["context"], row["sparsity"])):
        hash, hashattention, hata = (pick(case, mode=mode) for mode in ("default", "hashattention", "hata"))
        dense = next(row for row in case if "dense_best_us" in row)
        lines.append([
            f"{shape(dense)}, 1/{dense['sparsity']}", fixed(hash.get("total_us"), 1), fixed(hash.get("portable_us"), 1),
            fixed(hash.get("floor_us"), 1),
            f"{dense['dense_best_us']:.0f} ({dense['dense_best']}, {dense['dense_gb_s']:.0f} GB/s)",
            fixed(dense["dense_best_us"] / hash["total_us"] if hash else None, 1, "x"), fixed(dense["flash_us"], 0),
            fixed(dense["flex_us"], 0), fixed(dense.get("classic_us"), 0), fixed(dense.get("topk_us"), 0),
            fixed(hash.get("encode_us"), 1), fixed(hashattention.get("total_us"), 1), fixed(hata.get("total_us"), 1)])
    return markdown(["batch x context, read", "hash", "portable", "floor", "fastest dense", "hash is", "FlashDecode",
                     "FlexAttention", "first gpt-fast", "torch.topk alone", "encoding, on top", "HashAttention's signatures",
                     "HATA's"], lines)


def decode_table(rows: list[dict]) -> str:
    lines = []
    for runs in grouped(rows, shape):
        dense, hash = (pick(runs, attention=mode) for mode in ("dense", "hash"))
        gain = dense["ms_per_step"] / hash["ms_per_step"] if dense and hash else None
        lines.append([shape(runs[0]), fixed(dense.get("ms_per_step"), 2), fixed(dense.get("floor_ms"), 2),
                      fixed(hash.get("ms_per_step"), 2), fixed(hash.get("floor_ms"), 2), fixed(gain, 2, "x"),
                      fixed(hash.get("peak_gib"), 1)])
    table = markdown(["batch x context", "dense ms", "floor", "hash ms", "floor", "hash is", "GiB at most"], lines)
    starts = [f"{row['attention']} {row['compile_s']:.1f} s{', with what it shares made already' if i else ''}, "
              f"{row['warm_start_s']:.1f} s in another process later"
              for i, row in enumerate(row for row in rows if row.get("warm_start_s") is not None)]
    return table + (f"\n\nCompiling and capturing the first shape, one after the other: {'; '.join(starts)}." if starts else "")


def latency_table(rows: list[dict]) -> str:
    lines = []
    for runs in grouped(rows, lambda row: row["context"]):
        dense, hash = (pick(runs, attention=mode) for mode in ("dense", "hash"))
        gain = dense["ms_per_token"] / hash["ms_per_token"] if dense and hash else None
        sparse = pick(runs, prefill="hash")  # of older files all prompts were read densely
        lines.append([tokens(runs[0]["context"]), fixed(runs[0]["ttft_s"] if runs[0] is not sparse else None, 2),
                      fixed(sparse.get("ttft_s"), 2), fixed(dense.get("ms_per_token"), 2),
                      fixed(dense.get("floor_ms"), 2), fixed(hash.get("ms_per_token"), 2), fixed(hash.get("floor_ms"), 2),
                      fixed(gain, 2, "x")])
    return markdown(["prompt", "first token s", "by hash s", "then dense ms", "floor", "hash ms", "floor", "hash is"], lines)


def prefill_table(rows: list[dict]) -> str:
    """Older files have neither stages nor sparse prompts; theirs are `seconds`."""
    def way(row: dict) -> str:
        return f"hash, 1/{row['prefill_sparsity']:g}" if row.get("prefill") == "hash" else "dense"

    names = ("floor_s", "linear_s", "select_s", "attention_s")
    return markdown(["batch x context", "read", "of all pairs", "seconds", "TFLOP/s", "floor", "linear", "select",
                     "attention", "GiB at most", "GiB planned"],
                    ([shape(row), way(row), f"{row.get('pairs_read', 1):.1%}", fixed(row.get("ttft_s", row.get("seconds")), 2),
                      fixed(row["tflops"], 0), *(fixed(row.get(name), 2) for name in names), fixed(row["peak_gib"], 1),
                      fixed(row["plan_gib"], 1)] for row in rows))


def ragged_table(rows: list[dict]) -> str:
    return markdown(["prompt lengths", "attention", "together tok/s", "one by one tok/s", "together is"],
                    ([", ".join(map(tokens, row["lengths"])), row["attention"], fixed(row["together_tok_s"], 0),
                      fixed(row["alone_tok_s"], 0), fixed(row["speedup"], 1, "x")] for row in rows))


def speculate_table(rows: list[dict]) -> str:
    times = ("draft_ms", "verify_ms", "round_ms", "dense_ms")
    return markdown(["batch x context", "k", "draft ms", "verify ms", "round ms", "dense ms", "pays above, tokens a round"],
                    ([shape(row), str(row["k"]), *(fixed(row[name], 2) for name in times),
                      fixed(row["round_ms"] / row["dense_ms"], 2)] for row in rows))


def parity_table(rows: list[dict]) -> str:
    return markdown(["feature", "model", "batch x context", "attention", "ms per token", "without", "ratio", "note"],
                    ([row["feature"], row["model"], shape(row), row["attention"], fixed(row["ms_per_token"], 2),
                      fixed(row["baseline_ms"], 2), fixed(row["ratio"], 2), row.get("note", "")] for row in rows))


def method(row: dict) -> str:
    """What chose the tokens: a selector and its signatures."""
    name = row["selector"].replace("_", " ")
    if row["selector"].startswith("hash") and row.get("recipe"):
        each = ", one per query head" if row["share"] == "query" else ""
        return f"{name} ({row['recipe']}, {row['bits']} bit{each})"
    return name


def ppl_table(rows: list[dict]) -> str:
    """A line per run: its figures over all texts, and KL by kind of text. Older files have the perplexity ratio alone."""
    rows = [row for row in rows if row["selector"] != "dense"]
    kinds = list(dict.fromkeys(row["kind"] for row in rows if row.get("kind", "all") != "all"))
    lines = []
    for runs in grouped(rows, lambda row: (row["model"], method(row), row["ratio"])):
        row = runs[0]
        line = [row["model"], method(row), f"{row['budget']} of {row['context']}"]
        if "kl" in row:
            by_kind = [pick(runs, kind=kind).get("kl") for kind in kinds] if len(kinds) > 1 else []
            line += [f"{row['bytes_per_token']:g}", *(ranged(row, *figure) for figure in DISTANCES),
                     *(fixed(kl, 4) for kl in by_kind)]
        else:
            line += [fixed(row["ppl_ratio"], 3), f"{min(row['per_text'].values()):.3f} - {max(row['per_text'].values()):.3f}"]
        lines.append(line)
    figures = ["perplexity ratio", "lowest and highest text"]
    if "kl" in rows[0]:
        figures = ["bytes", "KL to dense, nats", "same argmax", "perplexity ratio",
                   *(f"KL, {kind}" for kind in kinds if len(kinds) > 1)]
    return markdown(["model", "chosen by", "tokens read", *figures], lines)


DISTANCES = (("kl", 4), ("agreement", 3), ("ppl_ratio", 3))  # what tells a run from dense, with digits


def ranged(row: dict, name: str, digits: int) -> str:
    """A figure of a row with its interval."""
    low, high = row[f"{name.removeprefix('ppl_')}_interval"]
    return f"{row[name]:.{digits}f} [{low:.{digits}f}, {high:.{digits}f}]"


def answers(rows: list[dict]) -> str:
    return f"{sum(row['exact'] for row in rows)}/{sum(row['samples'] for row in rows)}" if rows else "-"


def by_run(rows: list[dict]) -> list[list[dict]]:
    return grouped(rows, lambda row: (method(row), row["ratio"]))


def needles_table(rows: list[dict]) -> str:
    tasks = list(dict.fromkeys(row["task"] for row in rows))
    lines = [[method(runs[0]), f"{runs[0]['budget']} of {runs[0]['context']}", f"{runs[0]['bytes_per_token']:g}",
              *(f"{answers(own)} ({own[0]['nll_difference']:+.2f})" if own else "-"
                for own in ([row for row in runs if row["task"] == task] for task in tasks)), answers(runs)]
             for runs in by_run(rows)]
    return markdown(["chosen by", "tokens read", "bytes", *(task.replace("_", " ") for task in tasks), "all"], lines)


def ruler_table(rows: list[dict]) -> str:
    tasks = list(dict.fromkeys(row["task"] for row in rows))
    lines = [[method(runs[0]), f"{runs[0]['budget']} of {runs[0]['context']}",
              *(fixed(pick(runs, task=task).get("value"), 3) for task in tasks),
              fixed(sum(row["value"] for row in runs) / len(runs), 3)] for runs in by_run(rows)]
    return markdown(["chosen by", "tokens read", *(task.removeprefix("ruler_") for task in tasks), "mean"], lines)


def grid_table(rows: list[dict]) -> str:
    contexts = list(dict.fromkeys(row["context"] for row in rows))
    lines = [[method(runs[0]), f"1/{runs[0]['ratio']}" if runs[0]["ratio"] > 1 else "all",
              *(answers([row for row in runs if row["context"] == context]) for context in contexts)] for runs in by_run(rows)]
    return markdown(["chosen by", "tokens read", *(f"{tokens(context)} context" for context in contexts)], lines)


def ablations_table(rows: list[dict]) -> str:
    kinds = [name for name in rows[0] if name.startswith("mass_")]
    ratios = list(dict.fromkeys(row["ratio"] for row in rows))
    lines = [[runs[0]["name"], fixed(runs[0].get("bytes_per_token"), 0),
              *(fixed(row[kind], 3) for kind in kinds for row in runs)] for runs in grouped(rows, lambda row: row["name"])]
    names = [f"{kind.removeprefix('mass_')} 1/{ratio}" for kind in kinds for ratio in ratios]
    return markdown(["choice", "bytes", *names], lines)


def quickstart_table(rows: list[dict]) -> str:
    return markdown(["device", "attention", "prompt tokens", "tokens read", "tok/s", "dense's choice", "perplexity ratio"],
                    ([row["device"], row["attention"], str(row["prompt_tokens"]),
                      fixed(row.get("tokens_read") or row["budget"] or row["prompt_tokens"], 0), fixed(row["decode_tok_s"], 1),
                      fixed(row.get("agreement"), 3), fixed(row.get("perplexity_ratio"), 3)] for row in rows))


def summary_lines(name: str, rows: list[dict]) -> Iterable[list[str]]:
    """Lines of `summary` from the rows of a file of table NAME: what, dense, hash, hash's floor, how many times as fast."""
    if name == "attention":
        for case in grouped(rows, lambda row: (row["batch"], row["context"], row["sparsity"])):
            hash, dense = pick(case, mode="default"), next((row for row in case if "dense_best_us" in row), None)
            if hash and dense:
                yield [f"attention of a layer, {shape(hash)}, 1/{hash['sparsity']}",
                       f"{dense['dense_best_us']:.0f} us ({dense['dense_best']}, {dense['dense_gb_s']:.0f} GB/s)",
                       f"{hash['total_us']:.1f} us", f"{hash['floor_us']:.1f} us",
                       f"{dense['dense_best_us'] / hash['total_us']:.1f}x"]
    elif name in ("decode", "latency"):
        ms = "ms_per_step" if name == "decode" else "ms_per_token"
        for runs in grouped(rows, lambda row: (row["model"], shape(row))):
            dense, hash = (pick(runs, attention=mode) for mode in ("dense", "hash"))
            if hash and dense:
                yield [f"a token, {hash['model']}, {shape(hash)}, 1/{hash['sparsity']:g}", f"{dense[ms]:.2f} ms",
                       f"{hash[ms]:.2f} ms", f"{hash['floor_ms']:.2f} ms", f"{dense[ms] / hash[ms]:.2f}x"]
    else:
        for runs in grouped([row for row in rows if row["selector"] == "hash"], lambda row: row["ratio"]):
            own = [row for row in runs if method(row) == method(runs[0])]  # the first of several signatures files
            what = f"{runs[0]['model']}, {tokens(runs[0]['budget'])} of {tokens(runs[0]['context'])} tokens"
            if name == "needles":
                yield [f"right answers, {what}: single, multi key, all tasks",
                       *(", ".join(answers([row for row in found if task in (row["task"], "all")])
                                   for task in ("single", "multi_key", "all"))
                         for found in ([row for row in rows if row["selector"] == "dense"], own)), "-", "-"]
            elif "kl" in own[0]:
                yield [f"KL to dense, same argmax, perplexity ratio, {what}", "0, 1, 1",
                       ", ".join(fixed(own[0][figure], digits) for figure, digits in DISTANCES), "-", "-"]
            else:
                yield [f"perplexity, {what}", "1", f"{own[0]['ppl_ratio']:.3f}", "-", "-"]


def span(ratios: Iterable[float]) -> str:
    """The least and the largest, as "2.8x to 15.0x"."""
    found = sorted(ratios)
    return f"{found[0]:.1f}x to {found[-1]:.1f}x" if found else "-"


def claims(folder: Path) -> str:
    """What the papers claim beside what the attention and decode files of `folder` say.

    The claims are those of the abstracts of arXiv 2412.14468 and 2506.02572, and of the first one's section on LongBench.
    """
    def rows_of(name: str) -> list[dict]:
        return [row for path in sorted(folder.glob(TABLES[name].files)) for row in read_results(path)["rows"]]

    def faster(peer: str) -> str:
        return span(row[peer] / row["total_us"] for row in rows_of("attention") if row["mode"] == "default" and row.get(peer))

    steps = [[pick(runs, attention=mode) for mode in ("dense", "hash")]
             for runs in grouped(rows_of("decode"), lambda row: (row["model"], shape(row))) if runs[0].get("ranks", 1) == 1]
    throughput = span(dense["ms_per_step"] / hash["ms_per_step"] for dense, hash in steps if dense and hash)
    return markdown(["paper", "claim", "here"], [
        ["HashAttention", "attention up to 4.3x faster in GPT-FAST; A100, 1/32", f"{faster('flex_us')}, of FlexAttention"],
        ["HashAttention", "attention up to 2.54x faster in FlashDecode; A100, 1/32", f"{faster('flash_us')}, of FlashDecode"],
        ["HashAttention", "throughput of GPT-FAST up to 3.12x; A100, 1/32", f"{throughput}, of our own dense steps"],
        ["HashAttention", "LongBench, Llama-3.1-8B: 48.78 dense, 48.00 at 1/16", "not measured"],
        ["HATA", "up to 7.2x faster than full attention; batch 8, 32K, one KV head per query head",
         f"{faster('dense_best_us')}, of the fastest dense kernel"]])


def period(days: set[str]) -> str:
    """From the first to the last of them, as ", 2026-01-01 to 2026-01-02"; empty where there is none."""
    return ", " + " to ".join(sorted({min(days), max(days)})) if days else ""


def summary(folder: Path, base: Path) -> str:
    """README's table: dense beside hash, from all files of `folder` that hold both."""
    lines: dict[tuple[str, str], list[str]] = {}
    machines: dict[str, set[str]] = {}  # and the days
    for name in ("attention", "decode", "latency", "ppl", "needles"):
        for path in sorted(folder.glob(TABLES[name].files)):
            link = Path(os.path.relpath(path, base)).as_posix()
            result = read_results(path)
            rows = [row for row in result["rows"] if row.get("ranks", 1) == 1]
            own = checked(path, name, summary_lines, name, rows)
            for line in own:  # a shape of both decode and latency stands there once
                lines.setdefault((line[0], result["gpu"]), [*line, f"[{path.name}]({link})"])
            if own:
                machine = f"{result['gpu']}, torch {result['torch']}, Triton {result['triton']}"
                machines.setdefault(machine, set()).update({result["date"]} if "date" in result else ())
    table = markdown(["measured", "dense", "hash", "floor of hash", "hash is", "rows and command"], lines.values())
    where = "; ".join(machine + period(days) for machine, days in machines.items())
    return f"{table}\n\n{where}." if lines else ""


@dataclass(frozen=True)
class Table:
    """A table of every file that `files` matches in a results folder. image: whether the plot beside the file is shown."""
    files: str
    make: Callable[[list[dict]], str]
    image: bool = False


TABLES = {
    "attention": Table("attention*.json", attention_table),
    "decode": Table("decode*.json", decode_table, image=True),
    "latency": Table("latency*.json", latency_table, image=True),
    "prefill": Table("prefill_[!q]*.json", prefill_table),
    "ragged": Table("ragged*.json", ragged_table),
    "speculate": Table("speculate*.json", speculate_table),
    "parity": Table("parity*.json", parity_table),
    "ppl": Table("quality_ppl*.json", ppl_table),
    "needles": Table("quality_needles*.json", needles_table),
    "ruler": Table("quality_ruler*.json", ruler_table),
    "grid": Table("needle_grid*.json", grid_table),
    "ablations": Table("ablations*.json", ablations_table),
    "quickstart": Table("quickstart*.json", quickstart_table),
}


def read_results(path: Path) -> dict:
    wanted = "give files that --json wrote"
    try:
        result = json.loads(read_file(path, wanted))
        for name in ("gpu", "torch", "triton", "commit", "command"):
            result[name].split()
        result["rows"][0].keys()
    except (ValueError, LookupError, TypeError, AttributeError, RecursionError) as error:
        raise UserError(f"cannot read {path} ({type(error).__name__}: {error}); {wanted}") from error
    return result


def provenance(result: dict, path: Path, link: Path, image: bool) -> str:
    """The line below a table: where, with what, by which command, the rows, and the plot unless it is shown as an `image`."""
    model = {row["model"] for row in result["rows"] if "model" in row}
    sparsity = {row["sparsity"] for row in result["rows"] if row.get("attention") == "hash" and "sparsity" in row}
    parts = [*(model if len(model) == 1 else []), *(f"hash reads 1/{x:g}" for x in sparsity if len(sparsity) == 1),
             result.get("cpu", result["gpu"]), f"torch {result['torch']}", f"Triton {result['triton']}",
             f"commit {result['commit']}", result.get("date", "")]
    links = [f"[rows]({link.as_posix()})"]
    if path.with_suffix(".png").exists() and not image:
        links.append(f"[plot]({link.with_suffix('.png').as_posix()})")
    note = f" Note: {result['note']}." if "note" in result else ""
    return f"{', '.join(filter(None, parts))}; {', '.join(links)}: `{result['command']}`.{note}"


def checked(path: Path, name: str, make: Callable, *arguments: object) -> str | list:
    """make(*arguments), a string or a list of what it yields; a UserError where `path` has not the rows of table NAME."""
    try:
        made = make(*arguments)
        return made if isinstance(made, str) else list(made)
    except (LookupError, TypeError, AttributeError, StopIteration, ValueError, ZeroDivisionError) as error:
        raise UserError(f"{path} has no rows for the table {name} ({type(error).__name__}: {error}); measure it again, or "
                        "move it elsewhere") from error


def tables_of(name: str, folder: Path, base: Path) -> str:
    """Table NAME from the files of `folder`, as Markdown whose links start at `base`; empty where there are no files."""
    table, parts = TABLES[name], []
    for path in sorted(folder.glob(table.files)):
        result = read_results(path)
        made = checked(path, name, table.make, result["rows"])
        link = Path(os.path.relpath(path, base))
        if table.image and path.with_suffix(".png").exists():
            parts.append(f"![{name}]({link.with_suffix('.png').as_posix()})")
        parts.append(f"{made}\n\n{provenance(result, path, link, table.image)}")
    return "\n\n".join(parts)


MARKED = re.compile(r"(<!-- table:(\w*) -->\n)(.*?)(<!-- /table -->)", re.DOTALL)


def fill(text: str, folder: Path, base: Path) -> str:
    """`text` with what stands between its markers made anew from the results in `folder`."""
    def made(match: re.Match) -> str:
        name = match[2]
        if name in ("summary", "claims"):
            return f"{match[1]}\n{summary(folder, base) if name == 'summary' else claims(folder)}\n\n{match[4]}"
        if name not in TABLES:
            raise UserError(f"there is no table {name!r}; the markers may name summary, claims, {', '.join(TABLES)}")
        table = tables_of(name, folder, base)
        return match[1] + (f"\n{table}\n\n" if table else f"<!-- no {TABLES[name].files} -->\n") + match[4]

    return MARKED.sub(made, text)


def report(results: Path, pages: list[Path] | None = None) -> None:
    """Print the tables of a results folder, or put them between the markers of Markdown `pages`."""
    if not results.is_dir():
        raise UserError(f"no such folder: {results}; give the one that --json wrote to")
    if pages is None:
        found = [f"## {name}\n\n{table}" for name in TABLES if (table := tables_of(name, results, Path()))]
        if not found:
            raise UserError(f"{results} holds none of {', '.join(table.files for table in TABLES.values())}")
        print("\n\n".join(filter(None, [summary(results, Path()), *found])))
        return
    for page in pages:
        try:
            text = page.read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise UserError(f"cannot read {page}: {error}; give a Markdown file") from error
        if not MARKED.search(text):
            raise UserError(f"{page} has no line <!-- table:NAME --> with <!-- /table --> after it; write them where "
                            f"tables shall be (summary, claims, {', '.join(TABLES)})")
        with atomic_path(page) as beside:
            beside.write_text(fill(text, results, page.parent), encoding="utf-8")
