"""Quality, measured: what is lost when a decode step reads only a few tokens, selected by signatures or by other methods.

    python -m hashfast eval ppl     --checkpoint_path MODEL --data books/*.txt --signatures weights/*.safetensors
    python -m hashfast eval ppl     --checkpoint_path MODEL --kinds novels='books/*.txt' code=package:asyncio --windows 4 ...
    python -m hashfast eval needles --checkpoint_path MODEL --data books/*.txt --selector hash oracle_group quest --ratios 16 32
    python -m hashfast eval grid    --checkpoint_path MODEL --data books/*.txt --contexts 8192 32768 --depths 0 50 100
    python -m hashfast eval recall  --checkpoint_path MODEL --data books/*.txt --selector hash oracle --json recall.json
    python -m hashfast eval lm      --checkpoint_path MODEL --tasks NAME --include_path DIR --ratios 16

ppl      the first tokens of each text are read densely, its last ones are decoded one by one, each given the true token before
         it (teacher forcing): with everything in view, then with 1/ratio of the context. KL 0 to dense and agreement 1 lose
         nothing; a perplexity ratio below 1 is no gain, as attending to fewer tokens sharpens attention.
needles  retrieval documents: the context is read densely, the question and the answer are decoded.
grid     the same with a single needle, at several contexts and depths; a PNG beside --json.
recall   the share of the dense model's attention, and of its top tokens, that a budget selects, by layer and KV head.
lm       tasks of lm-evaluation-harness: the prompt is read densely but for its last tokens, which are decoded too. RULER's
         ruler_vt, ruler_fwe, niah_single_1, niah_multikey_2 and _3, ruler_cwe make their data (pip install wonderwords nltk).

Every selector has the same budget, and one dense prefill of a text serves them all. --batch_size texts are decoded together.
"""
import argparse
import importlib.util
import json
import sys
from collections.abc import Iterator
from dataclasses import fields
from pathlib import Path

from hashfast.common import Parser, UserError, can_compile, check_writable, environment, find_device
from hashfast.names import SELECTORS
from hashfast.progress import Progress
from hashfast.research.needles import TASKS
from hashfast.runtime.prompts import read_text


def json_object(text: str) -> dict:
    value = json.loads(text)
    if not isinstance(value, dict):
        raise ValueError
    return value


def parse_options(argv: list[str] | None = None) -> argparse.Namespace:
    shared = Parser(add_help=False)
    add = shared.add_argument_group("model").add_argument
    add("--checkpoint_path", type=Path, required=True, metavar="FOLDER", help="folder with config.json, safetensors, tokenizer")
    add("--precision", choices=("float32", "bfloat16"), help="default: bfloat16 on a GPU, float32 on a CPU")
    add("--device", help="cpu, cuda or cuda:N; default: a GPU where there is one")
    add = shared.add_argument_group("selectors").add_argument
    add("--selector", dest="selectors", nargs="+", choices=SELECTORS, default=["hash"], metavar="NAME",
        help=f"{', '.join(SELECTORS)}; dense is always measured (default: hash)")
    add("--signatures", type=Path, nargs="+", default=[], metavar="FILE",
        help="of train_hash.py; each is a hash selector of its own")
    add("--ratios", type=int, nargs="+", default=[16, 32], metavar="R", help="budget = context / ratio")
    add("--sink", type=int, default=64, metavar="N", help="first tokens, always attended")
    add("--recent", type=int, default=128, metavar="N", help="last tokens, always attended")
    add("--lsh_bits", type=int, default=128, choices=(32, 64, 128), help="bits of the lsh selector's random projections")
    add = shared.add_argument_group("run").add_argument
    add("--batch_size", type=int, default=8, metavar="N", help="texts decoded together")
    add("--seed", type=int, default=0, metavar="N", help="of documents and random projections")
    add("--compile", action="store_true", help="compile the blocks of every decode step; pays off for few selectors")
    add("--json", type=Path, metavar="FILE", help="write the rows here, as they come")
    data, context, dense = (Parser(add_help=False) for _ in range(3))
    data.add_argument("--data", type=Path, nargs="+", required=True, help="text files that no signature was trained on")
    context.add_argument("--context", type=int, default=8192, help="tokens of each text or document, the decoded ones included")
    dense.add_argument("--dense_layers", type=int, default=0,
                       help="first layers that attend to everything, whatever the selector")
    dense.add_argument("--prefill_sparsity", type=float, nargs="+", default=[], metavar="R",
                       help="beside dense, read texts by the first signatures too: a chunk 1/R of what is before it")
    dense.add_argument("--prefill_chunk", type=int, default=4096, metavar="N", help="tokens that choose together")
    dense.add_argument("--prefill_tail", type=int, default=256, metavar="N", help="last tokens read that read everything")
    parser = Parser(description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    part = commands.add_parser("ppl", parents=[shared, context, dense], help="perplexity, and KL to dense, of long texts")
    texts = part.add_mutually_exclusive_group(required=True)
    texts.add_argument("--data", type=Path, nargs="+", help="text files that no signature was trained on")
    texts.add_argument("--kinds", nargs="+", metavar="KIND=GLOB",
                       help="text files by kind; KIND=package:NAME is the source of an installed Python package")
    part.add_argument("--windows", type=int, default=1, help="disjoint windows of --context tokens of each text, at most")
    part.add_argument("--last", type=int, default=512, help="tokens that are scored, each after one decode step")
    part = commands.add_parser("needles", parents=[shared, data, context, dense], help="synthetic retrieval")
    part.add_argument("--tasks", nargs="+", choices=TASKS, default=list(TASKS))
    part.add_argument("--samples", type=int, default=32, help="documents per task")
    part.add_argument("--backend", choices=("hashfast", "transformers"), default="hashfast",
                      help="what runs the model; transformers: --signatures alone, without dense attention beside them")
    part = commands.add_parser("grid", parents=[shared, data, dense],
                               help="a single needle by context and depth; a PNG beside --json")
    part.add_argument("--contexts", type=int, nargs="+", default=[8192, 16384, 32768], help="tokens of a document")
    part.add_argument("--depths", type=int, nargs="+", default=[0, 25, 50, 75, 100], help="percent of the document before it")
    part.add_argument("--samples", type=int, default=4, help="documents per context and depth")
    part = commands.add_parser("recall", parents=[shared, data, context],
                               help="attention recall, by layer and head; a PNG beside --json")
    part.add_argument("--last", type=int, default=64, help="tokens whose attention is looked at")
    part.add_argument("--top", type=int, default=64, help="recall of this many tokens, outside sink and recent")
    part.set_defaults(dense_layers=0, prefill_sparsity=[])
    part = commands.add_parser("lm", parents=[shared, context, dense],
                               help="tasks of lm-evaluation-harness (pip install lm-eval)")
    part.add_argument("--tasks", nargs="+", required=True, help="names that the harness knows")
    part.add_argument("--include_path", type=Path, help="a folder with more tasks (YAML)")
    part.add_argument("--limit", type=int, help="documents per task; default: all")
    part.add_argument("--chat", action="store_true", help="wrap prompts in the model's chat template")
    part.add_argument("--metadata", type=json_object, default={}, metavar="JSON",
                      help='what tasks that make their data are told; RULER: \'{"max_seq_lengths": [16384]}\'')
    part.add_argument("--tail", type=int, default=64, help="last tokens of a prompt that are decoded, not prefilled")
    return check_options(parser.parse_args(argv))


def check_options(options: argparse.Namespace) -> argparse.Namespace:
    check_writable("--json", options.json)
    least = {"sink": 0, "recent": 1, "dense_layers": 0, "seed": 0, "batch_size": 1, "samples": 1, "top": 1, "last": 1,
             "windows": 1, "tail": 1, "limit": 1, "prefill_chunk": 1, "prefill_tail": 0}
    for flag, low in least.items():
        value = getattr(options, flag, None)
        if value is not None and value < low:
            raise UserError(f"--{flag} {value} is out of range; it must be at least {low}")
    if min(options.ratios) < 1:
        raise UserError(f"--ratios {min(options.ratios)} is out of range; they must be at least 1")
    if min(options.prefill_sparsity, default=1) < 1:
        raise UserError(f"--prefill_sparsity {min(options.prefill_sparsity):g} is out of range; it must be at least 1")
    if options.prefill_sparsity and not options.signatures:
        raise UserError("--prefill_sparsity needs --signatures FILE; train_hash.py writes one")
    if getattr(options, "backend", "") == "transformers" and (options.selectors != ["hash"] or not options.signatures):
        raise UserError("--backend transformers measures --signatures FILE alone; give one, and no --selector")
    if options.command == "grid":
        options.context = min(options.contexts)
        if not 0 <= min(options.depths) <= max(options.depths) <= 100:
            raise UserError(f"--depths {' '.join(map(str, options.depths))} is out of range; they are percent, 0 to 100")
    if "last" in options and options.last >= options.context:
        raise UserError(f"--last {options.last} is out of range; it must be below --context {options.context}")
    if options.sink + options.recent > options.context:
        raise UserError(f"--sink {options.sink} and --recent {options.recent} are more than --context {options.context}")
    for path in getattr(options, "data", None) or []:
        most = len(read_text(path).encode()) + 1  # a token is a byte at least
        if "last" in options and most < options.context:
            raise UserError(f"{path} has {most} tokens at most, fewer than --context {options.context}; give longer texts")
    if options.command == "lm" and importlib.util.find_spec("lm_eval") is None:
        raise UserError("the lm command needs lm-evaluation-harness; pip install lm-eval")
    for path in options.signatures:
        if not path.is_file():
            raise UserError(f"no signatures file at {path}; train one with train_hash.py")
    with Progress("starting"):
        from hashfast.runtime.hub import checkpoint_folder
        options.device = find_device(options.device)
    options.checkpoint_path = checkpoint_folder(options.checkpoint_path)
    if not options.signatures and {"hash", "hash_calibrated"} & {*options.selectors}:
        from hashfast.runtime.signatures import model_outline, shipped_signatures
        shipped = shipped_signatures(model_outline(options.checkpoint_path).fingerprint())
        if shipped is None:
            raise UserError("--selector hash and hash_calibrated need --signatures FILE, as none ships for this model; train "
                            "one with train_hash.py, or use lsh")
        print(f"signatures: {shipped}", file=sys.stderr)
        options.signatures = [shipped]
    options.compile = options.compile and can_compile(options.device)
    if options.precision is None:
        options.precision = "bfloat16" if options.device.startswith("cuda") else "float32"
    return options


def measure(options: argparse.Namespace) -> Iterator[dict]:
    """The rows of the subcommand."""
    from hashfast.model import PrefillSettings
    from hashfast.research.evaluator import EvalConfig
    from hashfast.research.recall import recall
    from hashfast.research.tasks import grid, needles, ppl

    options.prefill = (PrefillSettings(), *(PrefillSettings("hash", sparsity, options.prefill_chunk, options.prefill_tail)
                                            for sparsity in options.prefill_sparsity))
    config = EvalConfig(**{field.name: getattr(options, field.name) for field in fields(EvalConfig)})
    plot = options.json and options.json.with_suffix(".png")
    if options.command == "ppl":
        from hashfast.research.data import named_texts, read_kinds
        kinds = read_kinds(options.kinds, 8 * options.windows * options.context) if options.kinds else {  # 3 to 5 make a token
            "all": named_texts(options.data)}
        return ppl(config, kinds, options.last, options.windows)
    if options.command == "needles" and options.backend == "transformers":
        from hashfast.integrations.transformers_needles import needles as transformers_needles
        return transformers_needles(config, options.data, options.tasks, options.samples)
    if options.command == "needles":
        return needles(config, options.data, options.tasks, options.samples)
    if options.command == "grid":
        return grid(config, options.data, options.contexts, options.depths, options.samples, plot)
    if options.command == "recall":
        return recall(config, options.data, options.last, options.top, plot)
    from hashfast.research.harness import lm

    return lm(config, options.tasks, options.include_path, options.limit, options.tail, options.chat, options.metadata)


def main() -> None:
    options = parse_options()
    from hashfast.research.report import save_results

    rows, about = [], environment()  # before a results file that git knows is written over
    for row in measure(options):
        rows.append(row)
        if options.json is not None:
            save_results(options.json, about, rows)
