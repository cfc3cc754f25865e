"""What each choice of the method is worth: attention recall of signatures on held-out text, one choice changed at a time.

    python -m hashfast ablations --checkpoint_path checkpoints/model --data books/*.txt --json results/ablations.json

The rows are means over the layers done so far, written after each layer.
"""
import argparse
from pathlib import Path

import torch

from hashfast.common import Parser, UserError, check_device, check_writable, default_device, environment
from hashfast.research.ablations import VARIANTS, ablate
from hashfast.research.data import DataConfig, read_texts
from hashfast.research.report import ablations_table, save_results
from hashfast.research.training import TrainConfig, check_model, longest_context
from hashfast.runtime.checkpoint import load_model
from hashfast.runtime.tokenizer import Tokenizer


def parse_arguments() -> argparse.Namespace:
    parser = Parser(description=__doc__.splitlines()[0])
    add = parser.add_argument
    add("--checkpoint_path", type=Path, required=True)
    add("--data", nargs="+", required=True, metavar="FILE", help="text files or globs")
    add("--layers", type=int, nargs="+", help="default: six, evenly spaced")
    add("--variants", nargs="+", choices=VARIANTS, default=list(VARIANTS), help="default: all")
    add("--context", type=int, default=8192)
    add("--sequences", type=int, default=16)
    add("--needles", type=float, default=0.3, help="share of the sequences that are retrieval documents")
    add("--steps", type=int, default=300)
    add("--sink", type=int, default=64)
    add("--recent", type=int, default=128)
    add("--seed", type=int, default=0)
    add("--device", default=default_device())
    add("--precision", choices=("bfloat16", "float16", "float32"), default="bfloat16", help="of the model")
    add("--json", type=Path, help="write the rows here")
    args = parser.parse_args()
    check_device(args.device)
    check_writable("--json", args.json)
    if args.context * min(VARIANTS[name].context_share for name in args.variants) < 2 * (args.sink + args.recent + 64):
        raise UserError(f"--context {args.context} leaves too few tokens to choose among; give a longer one")
    if not 1 <= args.sequences or not 0 <= args.needles < 1 or args.steps < 1:
        raise UserError("--sequences and --steps must be at least 1, and --needles from 0 to below 1")
    return args


def main() -> None:
    args = parse_arguments()
    texts, measured = read_texts(args.data), environment()
    if args.device.startswith("cuda"):
        torch.set_float32_matmul_precision("high")
    model = load_model(args.checkpoint_path, args.device, getattr(torch, args.precision))
    check_model(longest_context(model), model.args.n_layer, args.context, args.layers)
    layers = args.layers or sorted({round(i * (model.args.n_layer - 1) / 6) for i in range(1, 7)})
    data = DataConfig(args.context, args.sequences, args.needles, args.seed)
    config = TrainConfig(steps=args.steps, sink=args.sink, recent=args.recent, seed=args.seed)
    done = 0
    for rows in ablate(model, Tokenizer.load(args.checkpoint_path).encode, texts, data, config, layers, args.variants):
        done += 1
        if args.json is not None:
            about = {"model": args.checkpoint_path.resolve().name, "context": args.context, "layers": layers[:done],
                     "steps": args.steps, "sequences": args.sequences, "seed": args.seed}
            save_results(args.json, measured | about, rows)
    print(ablations_table(rows))
