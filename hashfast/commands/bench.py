"""Latency, measured: attention of one layer, decode steps, prefill, ragged batches; beside their peers and byte floors.

    python -m hashfast bench attention --json results/attention_h200.json
    python -m hashfast bench decode --model llama-3.1-8b --shapes 1x32768 8x32768 --json results/decode_h200.json
    torchrun --nproc_per_node 2 -m hashfast bench decode ...      each rank's share of the model on a GPU of its own
    python -m hashfast bench speculate --model llama-3.1-8b --shapes 1x131072 --k 2 4 8 --json results/speculate_h200.json
    python -m hashfast bench prefill --context 32768 131072 --json results/prefill_h200.json
    python -m hashfast bench latency --json results/latency_h200.json
    python -m hashfast bench ragged --json results/ragged_h200.json
    python -m hashfast bench transformers --json results/transformers_h200.json      model.generate, by attention implementation
    python -m hashfast bench plot results/attention_h200.json results/decode_h200.json
    python -m hashfast bench report --results my-results      results/README.md's tables of your own numbers

Attention times are medians of CUDA-graph replays over as many copies of the cache as it takes to read past the L2 cache, as
the layers of a model do. A floor is the bytes that must be read over the copy bandwidth measured in the same run.
"""
import argparse
import re
from collections.abc import Callable, Iterator
from pathlib import Path

from hashfast.common import ROOT, Parser, UserError, check_writable, environment
from hashfast.names import IMPLEMENTATIONS, MODES

CASES = ["1x32768x16", "1x131072x32", "8x32768x32", "1x524288x32", "16x131072x32"]


# --------------------------------------------------------------------------------------------------------------- command

def sizes(names: str) -> Callable[[str], str]:
    """An argparse type: integers from 1 on joined by x, one for each of `names`, which are joined by " x "."""
    pattern = "x".join(r"[1-9]\d*" for _ in names.split(" x "))

    def check(text: str) -> str:
        if re.fullmatch(pattern, text) is None:
            raise argparse.ArgumentTypeError(f"{text!r} is not {names}, integers joined by x")
        return text
    return check


def integers(text: str) -> tuple[int, ...]:
    """What `sizes` let pass."""
    return tuple(map(int, text.split("x")))


def at_least_1(number: type) -> Callable[[str], float]:
    """An argparse type: an int or a float (`number`) from 1 on."""
    def check(text: str) -> float:
        value = number(text)
        if not 1 <= value < 1e9:
            raise argparse.ArgumentTypeError(f"{text} is out of range; it must be at least 1")
        return value
    check.__name__ = number.__name__  # argparse names it where `number` cannot read the text
    return check


def parse_options() -> argparse.Namespace:
    rows, model, steps = (Parser(add_help=False) for _ in range(3))
    rows.add_argument("--json", type=Path, help="write the rows here, as they come")
    model.add_argument("--model", default="llama-3.1-8b", metavar="PRESET",
                       help="random weights; `hashfast list` names presets")
    model.add_argument("--sparsity", type=at_least_1(float), default=32, metavar="R", help="hash steps read 1/R of the tokens")
    steps.add_argument("--steps", type=at_least_1(int), default=50, help="tokens decoded")
    shapes = {"nargs": "+", "type": sizes("batch x context"), "help": "batch x context"}
    parser = Parser(description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    part = commands.add_parser("attention", parents=[rows], help="one layer's attention, by stage")
    part.add_argument("--cases", nargs="+", type=sizes("batch x context x sparsity"), default=CASES,
                      help="batch x context x sparsity")
    part.add_argument("--modes", nargs="+", choices=MODES, default=list(MODES), help="shapes of signatures: ours, the papers'")
    part.add_argument("--heads", nargs=3, type=at_least_1(int), default=(32, 8, 128), metavar=("HQ", "HKV", "D"),
                      help="query heads, KV heads, their width")
    part = commands.add_parser("decode", parents=[model, steps, rows], help="whole decode steps")
    part.add_argument("--checkpoint_path", type=Path, help="a model of real weights instead")
    part.add_argument("--shapes", default=["1x32768", "1x131072", "8x32768", "4x131072", "16x32768"], **shapes)
    part.add_argument("--attention", nargs="+", choices=("dense", "hash"), default=["dense", "hash"], help="what to time")
    part.add_argument("--quantize", choices=("int8",), help="weights of 8 bits")
    part.add_argument("--no_warm_start", dest="warm_start", action="store_false",
                      help="do not start the first shape again in a second process")
    part.add_argument("--nccl", action="store_true", help="between ranks: all-reduces by NCCL, to compare with")
    part = commands.add_parser("speculate", parents=[model, rows], help="rounds of self-speculative decoding")
    part.add_argument("--shapes", default=["1x131072", "4x131072"], **shapes)
    part.add_argument("--k", nargs="+", type=at_least_1(int), default=[2, 4, 6, 8], help="drafted tokens per round")
    part.add_argument("--steps", type=at_least_1(int), default=20, help="rounds")
    for name, about in (("prefill", "reading a prompt"), ("latency", "time to the first token and per token")):
        part = commands.add_parser(name, parents=[model, steps, rows], help=about)
        part.add_argument("--context", nargs="+", type=at_least_1(int), default=[8192, 32768, 131072, 524288], metavar="N",
                          help="prompt tokens")
        part.add_argument("--prefill", nargs="+", choices=("dense", "hash"), default=["dense", "hash"],
                          help="how the prompt is read; latency: and how steps attend")
        part.add_argument("--prefill_sparsity", type=at_least_1(float), default=16, metavar="R",
                          help="by hash a chunk reads 1/R of what is before it")
        part.add_argument("--chunk", type=at_least_1(int), metavar="N",
                          help="prompt tokens read at a time (default: as generate.py does)")
    part = commands.add_parser("ragged", parents=[model, steps, rows],
                               help="prompts of different lengths decoded together, and one by one")
    part.add_argument("--lengths", nargs="+", type=at_least_1(int),
                      default=[1024, 2048, 4096, 8192, 12288, 16384, 24576, 32768], metavar="N", help="of the prompts")
    part = commands.add_parser("transformers", parents=[model, steps, rows], help="transformers' generate, enabled and not")
    part.add_argument("--shapes", default=["1x32768", "8x32768", "1x131072"], **shapes)
    part.add_argument("--implementation", nargs="+", choices=IMPLEMENTATIONS, default=list(IMPLEMENTATIONS))
    part = commands.add_parser("plot", help="PNGs from results files")
    part.add_argument("files", nargs="+", type=Path)
    part = commands.add_parser("parity", help="one results file of what each feature takes, from others")
    part.add_argument("files", nargs="+", type=Path, help="of bench decode --json and generate --save")
    part.add_argument("--json", type=Path, required=True)
    part = commands.add_parser("report", help="tables in Markdown from results files")
    part.add_argument("--results", type=Path, default=ROOT / "results", metavar="FOLDER", help="(default: results)")
    part.add_argument("--write", type=Path, nargs="+", metavar="FILE",
                      help="put them between the markers of these files; default: print")
    options = parser.parse_args()
    check_writable("--json", getattr(options, "json", None))
    if options.command == "decode" and options.quantize and options.checkpoint_path:
        raise UserError("--quantize is of random weights; give --checkpoint_path a folder that `hashfast quantize` made")
    return options


def measure(options: argparse.Namespace) -> Iterator[dict]:
    """The rows of the subcommand."""
    from hashfast.model import PrefillSettings
    from hashfast.research.attention_latency import attention_rows
    from hashfast.research.latency import decode_rows, latency_rows, prefill_rows, ragged_rows, speculate_rows
    from hashfast.runtime.decode import PREFILL_CHUNK

    ways = [PrefillSettings(mode, options.prefill_sparsity, options.chunk or PREFILL_CHUNK["cuda"])
            for mode in getattr(options, "prefill", [])]
    if options.command == "attention":
        return attention_rows([integers(case) for case in options.cases], options.modes, tuple(options.heads))
    if options.command == "prefill":
        return prefill_rows(options.model, options.context, options.sparsity, ways)
    if options.command == "latency":
        return latency_rows(options.model, options.context, options.sparsity, options.steps, ways)
    if options.command == "ragged":
        return ragged_rows(options.model, options.lengths, options.sparsity, options.steps)
    shapes = [integers(shape) for shape in options.shapes]
    if options.command == "speculate":
        return speculate_rows(options.model, shapes, options.k, options.sparsity, options.steps)
    if options.command == "transformers":
        from hashfast.integrations.transformers_latency import transformers_rows
        return transformers_rows(options.model, shapes, options.implementation, options.sparsity, options.steps)
    from hashfast.runtime.hub import checkpoint_folder
    checkpoint = checkpoint_folder(options.checkpoint_path) if options.checkpoint_path is not None else None
    return decode_rows(options.model, shapes, options.attention, options.sparsity, options.steps, options.quantize, checkpoint,
                       options.warm_start, options.nccl)


def main() -> None:
    options = parse_options()
    if options.command == "plot":
        from hashfast.research.plots import plot
        plot(options.files)
        return
    if options.command == "parity":
        from hashfast.research.parity import compare
        compare(options.files, options.json)
        return
    from hashfast.research.report import print_table, report, save_results
    if options.command == "report":
        report(options.results, options.write)
        return
    import torch

    from hashfast.runtime import distributed
    from hashfast.runtime.checkpoint import PRESETS

    if getattr(options, "model", None) not in (None, *PRESETS):
        raise UserError(f"--model {options.model} is no preset; choose from {', '.join(PRESETS)}")
    if not torch.cuda.is_available():
        raise UserError("bench measures a GPU and this machine has none; run it where torch.cuda.is_available()")
    if distributed.world_size() > 1 and options.command != "decode":
        raise UserError(f"bench {options.command} measures one GPU; start it without torchrun")
    distributed.check_device("cuda")
    rows, about = [], environment()  # before a results file that git knows is written over
    for row in measure(options):
        rows.append(row)
        print_table([row], header=len(rows) == 1)
        if options.json is not None and distributed.rank() == 0:  # as they come, for a run that ends early
            ranks = distributed.world_size()
            save_results(options.json, about, rows, *(["torchrun", "--nproc_per_node", str(ranks)] if ranks > 1 else []))
    if not rows:
        raise UserError(f"nothing of bench {options.command} fits into this GPU's memory; give smaller shapes")

