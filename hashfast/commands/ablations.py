"""What each choice of the method is worth: attention recall of signatures on held-out text, one choice changed at a time.

    python -m hashfast ablations --checkpoint_path checkpoints/model --data books/*.txt --json results/ablations.json

The rows are means over the layers done so far, written after each layer.
"""
import argparse
from pathlib import Path

from hashfast.common import Parser, UserError, check_writable, environment, find_device
from hashfast.names import VARIANTS
from hashfast.progress import Progress


def parse_arguments() -> argparse.Namespace:
    parser = Parser(description=__doc__.splitlines()[0])
    add = parser.add_argument_group("model").add_argument
    add("--checkpoint_path", type=Path, required=True, metavar="FOLDER", help="folder with config.json, safetensors, tokenizer")
    add("--precision", choices=("bfloat16", "float16", "float32"), default="bfloat16", help="of the model")
    add("--device", help="cpu, cuda or cuda:N; default: a GPU where there is one")
    add = parser.add_argument_group("data").add_argument
    add("--data", nargs="+", required=True, metavar="FILE", help="text files or globs")
    add("--context", type=int, default=8192, metavar="N", help="tokens per sequence")
    add("--sequences", type=int, default=16, metavar="N", help="to train on")
    add("--needles", type=float, default=0.3, metavar="SHARE", help="of the sequences that are retrieval documents")
    add = parser.add_argument_group("what is trained").add_argument
    add("--layers", type=int, nargs="+", metavar="I", help="default: six, evenly spaced")
    add("--variants", nargs="+", choices=VARIANTS, default=list(VARIANTS), metavar="NAME",
        help=f"{', '.join(VARIANTS)}; default: all")
    add("--steps", type=int, default=300, metavar="N", help="training steps per layer")
    add("--sink", type=int, default=64, metavar="N", help="first tokens, always attended")
    add("--recent", type=int, default=128, metavar="N", help="last tokens, always attended")
    add("--seed", type=int, default=0, metavar="N", help="of sequences and training")
    add("--json", type=Path, metavar="FILE", help="write the rows here")
    args = parser.parse_args()
    check_writable("--json", args.json)
    if not 1 <= args.sequences or not 0 <= args.needles < 1 or args.steps < 1:
        raise UserError("--sequences and --steps must be at least 1, and --needles from 0 to below 1")
    return args


def main() -> None:
    args = parse_arguments()
    with Progress("starting"):
        import torch

        from hashfast.research import ablations
        from hashfast.research.data import DataConfig, read_texts
        from hashfast.research.report import ablations_table, save_results
        from hashfast.research.training import TrainConfig, check_model
        from hashfast.runtime.checkpoint import load_model
        from hashfast.runtime.hub import checkpoint_folder
        from hashfast.runtime.signatures import model_outline
        from hashfast.runtime.tokenizer import Tokenizer

    args.device = find_device(args.device)
    args.checkpoint_path = checkpoint_folder(args.checkpoint_path)
    shortest = args.context * min(ablations.VARIANTS[name].context_share for name in args.variants)
    if shortest < 2 * (args.sink + args.recent + 64):
        raise UserError(f"--context {args.context} leaves too few tokens to choose among; give a longer one")
    texts, measured = read_texts(args.data), environment()
    check_model(model_outline(args.checkpoint_path), args.context, args.layers)
    tokenizer = Tokenizer.load(args.checkpoint_path)
    if args.device.startswith("cuda"):
        torch.set_float32_matmul_precision("high")
    model = load_model(args.checkpoint_path, args.device, getattr(torch, args.precision))
    layers = args.layers or sorted({round(i * (model.args.n_layer - 1) / 6) for i in range(1, 7)})
    data = DataConfig(args.context, args.sequences, args.needles, args.seed)
    config = TrainConfig(steps=args.steps, sink=args.sink, recent=args.recent, seed=args.seed)
    done = 0
    for rows in ablations.ablate(model, tokenizer.encode, texts, data, config, layers, args.variants):
        done += 1
        if args.json is not None:
            about = {"model": args.checkpoint_path.resolve().name, "context": args.context, "layers": layers[:done],
                     "steps": args.steps, "sequences": args.sequences, "seed": args.seed}
            save_results(args.json, measured | about, rows)
    print(ablations_table(rows))
