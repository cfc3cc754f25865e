"""What bench.py and eval.py measured, for people: lines on the terminal, tables for README.md and results/README.md, PNGs.

A results file is JSON: {"gpu", "torch", "triton", "commit", "command", "rows"}. `python bench.py report` turns the files of a
folder into tables, each with where and how it was measured below it; every figure in them comes from a row.
"""
import argparse
import json
import os
import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path

from hashfast.common import UserError, atomic_path


def print_table(rows: list[dict], header: bool) -> None:
    """Rows as bench.py measures them, with their names above the first."""
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


def by(rows: list[dict], key: Callable[[dict], object]) -> list[list[dict]]:
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
    for case in by(rows, lambda row: (row["batch"], row["context"], row["sparsity"])):
        hash, paper, hata = (pick(case, mode=mode) for mode in ("default", "hashattention", "hata"))
        dense = next(row for row in case if "dense_best_us" in row)
        lines.append([
            f"{shape(dense)}, 1/{dense['sparsity']}", fixed(hash.get("total_us"), 1), fixed(hash.get("floor_us"), 1),
            f"{dense['dense_best_us']:.0f} ({dense['dense_best']}, {dense['dense_gb_s']:.0f} GB/s)",
            fixed(dense["dense_best_us"] / hash["total_us"] if hash else None, 1, "x"), fixed(dense["flash_us"], 0),
            fixed(dense["flex_us"], 0), fixed(dense.get("classic_us"), 0), fixed(dense.get("topk_us"), 0),
            fixed(hash.get("encode_us"), 1), fixed(paper.get("total_us"), 1), fixed(hata.get("total_us"), 1)])
    return markdown(["batch x context, read", "hash", "floor", "fastest dense", "hash is", "FlashDecode", "FlexAttention",
                     "first gpt-fast", "torch.topk alone", "encoding, on top", "HashAttention's signatures", "HATA's"], lines)


def decode_table(rows: list[dict]) -> str:
    lines = []
    for runs in by(rows, shape):
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
    for runs in by(rows, lambda row: row["context"]):
        dense, hash = (pick(runs, attention=mode) for mode in ("dense", "hash"))
        gain = dense["ms_per_token"] / hash["ms_per_token"] if dense and hash else None
        lines.append([tokens(runs[0]["context"]), fixed(runs[0]["ttft_s"], 2), fixed(dense.get("ms_per_token"), 2),
                      fixed(dense.get("floor_ms"), 2), fixed(hash.get("ms_per_token"), 2), fixed(hash.get("floor_ms"), 2),
                      fixed(gain, 2, "x")])
    return markdown(["prompt", "first token s", "then dense ms", "floor", "hash ms", "floor", "hash is"], lines)


def prefill_table(rows: list[dict]) -> str:
    return markdown(["batch x context", "seconds", "TFLOP/s", "GiB at most", "GiB planned"],
                    ([shape(row), fixed(row["seconds"], 2), fixed(row["tflops"], 0), fixed(row["peak_gib"], 1),
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
    lines = [[row["model"], method(row), f"{row['budget']} of {row['context']}", fixed(row["ppl_ratio"], 3),
              f"{min(row['per_text'].values()):.3f} - {max(row['per_text'].values()):.3f}"]
             for row in rows if row["selector"] != "dense"]
    return markdown(["model", "chosen by", "tokens read", "perplexity ratio", "lowest and highest text"], lines)


def answers(rows: list[dict]) -> str:
    return f"{sum(row['exact'] for row in rows)}/{sum(row['samples'] for row in rows)}" if rows else "-"


def by_run(rows: list[dict]) -> list[list[dict]]:
    return by(rows, lambda row: (method(row), row["ratio"]))


def needles_table(rows: list[dict]) -> str:
    tasks = list(dict.fromkeys(row["task"] for row in rows))
    lines = [[method(runs[0]), f"{runs[0]['budget']} of {runs[0]['context']}", f"{runs[0]['bytes_per_token']:g}",
              *(f"{answers(own)} ({own[0]['nll_difference']:+.2f})" if own else "-"
                for own in ([row for row in runs if row["task"] == task] for task in tasks)), answers(runs)]
             for runs in by_run(rows)]
    return markdown(["chosen by", "tokens read", "bytes", *(task.replace("_", " ") for task in tasks), "all"], lines)


def grid_table(rows: list[dict]) -> str:
    contexts = list(dict.fromkeys(row["context"] for row in rows))
    lines = [[method(runs[0]), f"1/{runs[0]['ratio']}" if runs[0]["ratio"] > 1 else "all",
              *(answers([row for row in runs if row["context"] == context]) for context in contexts)] for runs in by_run(rows)]
    return markdown(["chosen by", "tokens read", *(f"{tokens(context)} context" for context in contexts)], lines)


def ablations_table(rows: list[dict]) -> str:
    kinds = [name for name in rows[0] if name.startswith("mass_")]
    ratios = list(dict.fromkeys(row["ratio"] for row in rows))
    lines = [[runs[0]["name"], fixed(runs[0].get("bytes_per_token"), 0),
              *(fixed(row[kind], 3) for kind in kinds for row in runs)] for runs in by(rows, lambda row: row["name"])]
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
        for case in by(rows, lambda row: (row["batch"], row["context"], row["sparsity"])):
            hash, dense = pick(case, mode="default"), next((row for row in case if "dense_best_us" in row), None)
            if hash and dense:
                yield [f"attention of a layer, {shape(hash)}, 1/{hash['sparsity']}",
                       f"{dense['dense_best_us']:.0f} us ({dense['dense_best']}, {dense['dense_gb_s']:.0f} GB/s)",
                       f"{hash['total_us']:.1f} us", f"{hash['floor_us']:.1f} us",
                       f"{dense['dense_best_us'] / hash['total_us']:.1f}x"]
    elif name in ("decode", "latency"):
        ms = "ms_per_step" if name == "decode" else "ms_per_token"
        for runs in by(rows, lambda row: (row["model"], shape(row))):
            dense, hash = (pick(runs, attention=mode) for mode in ("dense", "hash"))
            if hash and dense:
                yield [f"a token, {hash['model']}, {shape(hash)}, 1/{hash['sparsity']:g}", f"{dense[ms]:.2f} ms",
                       f"{hash[ms]:.2f} ms", f"{hash['floor_ms']:.2f} ms", f"{dense[ms] / hash[ms]:.2f}x"]
    else:
        for runs in by([row for row in rows if row["selector"] == "hash"], lambda row: row["ratio"]):
            own = [row for row in runs if method(row) == method(runs[0])]  # the first of several signatures files
            what = f"{runs[0]['model']}, {tokens(runs[0]['budget'])} of {tokens(runs[0]['context'])} tokens"
            if name == "needles":
                yield [f"right answers, {what}: single, multi key, all tasks",
                       *(", ".join(answers([row for row in found if task in (row["task"], "all")])
                                   for task in ("single", "multi_key", "all"))
                         for found in ([row for row in rows if row["selector"] == "dense"], own)), "-", "-"]
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
             for runs in by(rows_of("decode"), lambda row: (row["model"], shape(row))) if runs[0].get("ranks", 1) == 1]
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
            own = told(path, name, summary_lines, name, rows)
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
    """A table of every file that `files` matches in a results folder, with what a reader must know above it."""
    files: str
    about: str
    make: Callable[[list[dict]], str]
    image: bool = False  # whether the plot beside the file is shown


TABLES = {
    "attention": Table("attention*.json", "**One layer's attention**, microseconds: score, select, attend in one CUDA graph; "
                       "random data. *Floor*: the bytes that must be read over the copy bandwidth of the same run. Encoding "
                       "includes RoPE and the append of K and V, which a dense step needs too. *First gpt-fast*: SDPA with a "
                       "mask on K and V repeated for every query head. The last two columns are the papers' shapes of "
                       "signature in these kernels, not the papers' own code. FlashInfer is not compared; FlexAttention does "
                       "not run where there is a dash.", attention_table),
    "decode": Table("decode*.json", "**Whole decode steps**, random weights: the latency is what is measured. *Floor*: "
                    "weights, K, V and signatures that a step must read over the copy bandwidth; reading alone can be a little "
                    "faster than copying.", decode_table, image=True),
    "latency": Table("latency*.json", "**From the prompt on**, batch 1, random weights: time to the first token (dense in both "
                     "cases), then per token.", latency_table, image=True),
    "prefill": Table("prefill*.json", "**Reading the prompt**, random weights.", prefill_table),
    "ragged": Table("ragged*.json", "**Prompts of different lengths in one batch**, random weights.", ragged_table),
    "speculate": Table("speculate*.json", "**Self-speculation**: k hash steps draft, one dense pass verifies. A round gives "
                       "between 1 and k + 1 tokens, by acceptance, and pays where it gives more than the last column.",
                       speculate_table),
    "parity": Table("parity*.json", "**Features against the same run without them** (ratio below 1: faster).", parity_table),
    "ppl": Table("quality_ppl*.json", "**Perplexity** of a text's last tokens, each decoded given the true ones before it, as "
                 "a ratio to dense; real weights, texts that no signature was trained on.", ppl_table),
    "needles": Table("quality_needles*.json", "**Retrieval**, right answers of documents, real weights; the question and the "
                     "answer are decoded sparsely. In brackets: how much less likely the true answer's tokens are than with "
                     "dense attention, negative log-likelihood per token (paired 95 % intervals are in the rows). *Bytes*: "
                     "what is read to choose, per token of the cache, layer and KV head.", needles_table),
    "grid": Table("needle_grid*.json", "**One needle at every depth**, right answers of documents, real weights.", grid_table),
    "ablations": Table("ablations*.json", "**What each choice of the method is worth**: attention mass caught on sequences "
                       "kept out of training, one choice changed at a time. *Bytes*: of signatures, per token and KV head.",
                       ablations_table),
    "quickstart": Table("quickstart*.json", "**The quickstart's prompt**, real weights.", quickstart_table),
}


def read_results(path: Path) -> dict:
    try:
        result = json.loads(path.read_text(encoding="utf-8"))
        for name in ("gpu", "torch", "triton", "commit", "command"):
            result[name].split()
        result["rows"][0].keys()
    except (OSError, ValueError, LookupError, TypeError, AttributeError) as error:
        raise UserError(f"cannot read {path} ({type(error).__name__}: {error}); give files that bench.py or eval.py --json "
                        "wrote") from error
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


def told(path: Path, name: str, make: Callable, *arguments: object) -> str | list:
    """make(*arguments), a string or all that it yields; a UserError where the rows of `path` are not those of table NAME."""
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
        made = told(path, name, table.make, result["rows"])
        link = Path(os.path.relpath(path, base))
        if table.image and path.with_suffix(".png").exists():
            parts.append(f"![{name}]({link.with_suffix('.png').as_posix()})")
        parts.append(f"{made}\n\n{provenance(result, path, link, table.image)}")
    return "\n\n".join([table.about, *parts]) if parts else ""


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


def report(options: argparse.Namespace) -> None:
    """Print the tables of a results folder, or put them between the markers of Markdown files."""
    if not options.results.is_dir():
        raise UserError(f"no such folder: {options.results}; give the one that --json wrote to")
    if options.write is None:
        found = [table for name in TABLES if (table := tables_of(name, options.results, Path()))]
        if not found:
            raise UserError(f"{options.results} holds none of {', '.join(table.files for table in TABLES.values())}")
        print("\n\n".join(filter(None, [summary(options.results, Path()), *found])))
        return
    for page in options.write:
        try:
            text = page.read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise UserError(f"cannot read {page}: {error}; give a Markdown file") from error
        if not MARKED.search(text):
            raise UserError(f"{page} has no line <!-- table:NAME --> with <!-- /table --> after it; write them where "
                            f"tables shall be (summary, claims, {', '.join(TABLES)})")
        with atomic_path(page) as beside:
            beside.write_text(fill(text, options.results, page.parent), encoding="utf-8")


# ---------------------------------------------------------------------------------------------------------------- parity

def compare(options: argparse.Namespace) -> None:
    """Write the rows of parity: what each feature takes, beside the same run without it.

    options.files: of `bench.py decode --json`, whose rows in bfloat16 on one GPU are what the others are held against; and of
    `generate.py --save`, where runs that speculate are held against the one of the same prompt that does not.
    """
    decoded, generated, machine = [], [], {}
    commits, dates = {}, {}  # in the order of the files
    for path in options.files:
        try:
            result = json.loads(path.read_text(encoding="utf-8"))
            about = result.get("versions") or result
            if machine and about["gpu"] != machine["gpu"]:
                raise UserError(f"{path} is of another GPU than {options.files[0]}; compare runs of one kind")
            machine = machine or {name: about[name] for name in ("gpu", "torch", "triton")}
            commits |= {about["commit"]: None}
            dates |= {about.get("date", ""): None}
            if "rows" in result:
                decoded += result["rows"]
            else:
                generated.append(result)
        except (OSError, ValueError, LookupError, TypeError, AttributeError) as error:
            raise UserError(f"cannot read {path} ({type(error).__name__}: {error}); give files of bench.py decode --json and "
                            "generate.py --save") from error
    try:
        rows = decode_parity(decoded) + speculation_parity(generated)
    except (LookupError, TypeError) as error:
        raise UserError(f"the files hold other rows than those of bench.py decode --json and generate.py --save of one prompt "
                        f"({type(error).__name__}: {error}); give such files") from error
    if not rows:
        raise UserError("nothing to compare; give runs with a feature (int8, several GPUs, speculation) and without")
    command = " ".join(["python bench.py parity", *map(str, options.files), "--json", str(options.json)])
    with atomic_path(options.json) as beside:
        about = {**machine, "commit": ", ".join(commits), "date": ", ".join(filter(None, dates)), "command": command}
        beside.write_text(json.dumps({**about, "rows": rows}, indent=1) + "\n")
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


# ----------------------------------------------------------------------------------------------------------------- plots

def plot(options: argparse.Namespace) -> None:
    """A PNG beside every results file: stages of attention, steps by shape, or latency against context."""
    import matplotlib
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    for path in options.files:
        try:
            result = json.loads(path.read_text())
            rows = result["rows"]
            figure, axes = plt.subplots(figsize=(8, 4.5))
            if "attend_us" in rows[0]:
                plot_stages(axes, [row for row in rows if row["mode"] == "default"])
            elif "ttft_s" in rows[0]:
                plot_per_token(axes, rows)
            else:
                plot_latency(axes, rows)
            axes.set_title(f"{result['gpu']}, torch {result['torch']}", fontsize=9)
        except (OSError, ValueError, LookupError, TypeError) as error:
            reason = f"{type(error).__name__}: {error}"
            raise UserError(f"cannot plot {path} ({reason}); give a file that bench.py --json wrote") from error
        figure.tight_layout()
        with atomic_path(path.with_suffix(".png")) as beside:
            figure.savefig(beside, dpi=120, format="png")
        print(path.with_suffix(".png"))


def plot_stages(axes, rows: list[dict]) -> None:
    names = [f"{row['batch']} x {row['context'] // 1024}K, 1/{row['sparsity']}" for row in rows]
    left = [0.0] * len(rows)
    for stage in ("score_us", "select_us", "attend_us"):
        values = [row[stage] / row["dense_best_us"] for row in rows]
        axes.barh(names, values, left=left, label=stage.removesuffix("_us"))
        left = [a + b for a, b in zip(left, values, strict=True)]
    axes.plot([row["floor_us"] / row["dense_best_us"] for row in rows], names, "k|", markersize=18, label="bytes / bandwidth")
    for i, row in enumerate(rows):
        axes.text(left[i] + 0.005, i, f"{row['total_us']:.1f} us; dense {row['dense_best_us']:.0f}", va="center", fontsize=8)
    axes.set_xlim(0, 1.25 * max(left))
    axes.set_xlabel("time of one layer's attention, as a share of the fastest dense kernel's")
    axes.legend(fontsize=8)


def plot_latency(axes, rows: list[dict]) -> None:
    shapes = sorted({(row["batch"], row["context"]) for row in rows})
    names = [f"{batch} x {context // 1024}K" for batch, context in shapes]
    for mode, offset in (("dense", -0.2), ("hash", 0.2)):
        found = {(row["batch"], row["context"]): row for row in rows if row["attention"] == mode}
        places = [i + offset for i, shape in enumerate(shapes) if shape in found]
        chosen = [found[shape] for shape in shapes if shape in found]
        axes.bar(places, [row["ms_per_step"] for row in chosen], width=0.38, label=mode)
        axes.hlines([row["floor_ms"] for row in chosen], [x - 0.19 for x in places], [x + 0.19 for x in places], "k",
                    label="bytes / bandwidth" if mode == "hash" else None)
        for x, row in zip(places, chosen, strict=True):
            axes.text(x, row["ms_per_step"], f"{row['ms_per_step']:.1f}", ha="center", va="bottom", fontsize=8)
    axes.set_xticks(range(len(names)), names)
    axes.set_xlabel(f"batch x context, {rows[0]['model']}, hash at 1/{max(row['sparsity'] for row in rows):g}")
    axes.set_ylabel("ms per decode step")
    axes.legend(fontsize=8)


def plot_per_token(axes, rows: list[dict]) -> None:
    for mode in ("dense", "hash"):
        chosen = [row for row in rows if row["attention"] == mode]
        contexts = [row["context"] for row in chosen]
        (line,) = axes.plot(contexts, [row["ms_per_token"] for row in chosen], "o-",
                            label=mode if mode == "dense" else f"hash, 1/{chosen[0]['sparsity']:g}")
        axes.plot(contexts, [row["floor_ms"] for row in chosen], "--", color=line.get_color(),
                  label=f"{mode}: bytes / bandwidth")
        for row in chosen:
            axes.annotate(f"{row['ms_per_token']:.1f}", (row["context"], row["ms_per_token"]),
                          (0, 5 if mode == "dense" else -13), textcoords="offset points", ha="center", fontsize=8)
    first = {row["context"]: row["ttft_s"] for row in rows}
    axes.set_xscale("log", base=2)
    axes.set_yscale("log")
    for ticks in (axes.yaxis.set_major_formatter, axes.yaxis.set_minor_formatter):
        ticks("{x:g}")
    axes.set_xticks(list(first), [f"{context // 1024}K\nfirst token {float(f'{seconds:.2g}'):g} s"
                                  for context, seconds in first.items()])
    axes.set_xlabel(f"prompt tokens, {rows[0]['model']}, batch 1")
    axes.set_ylabel("ms per token")
    axes.legend(fontsize=8)
