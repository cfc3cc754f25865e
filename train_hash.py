"""Train signatures for a frozen model: capture its queries and keys layer by layer, fit each layer's encoders to its attention.

    python train_hash.py --checkpoint_path checkpoints/model --data books/*.txt --out weights/model.safetensors

The model runs one layer at a time over all sequences, so that memory holds their hidden states and one layer's queries, keys
and values. The signatures file also holds the recall on held-out sequences, and budgets per layer and head made from it. In
hashfast/research: data.py makes sequences, training.py trains a layer, recipes.py has the losses, recall.py measures.
"""
# Modules that need torch are imported where they are used: `--help` and most mistakes do not wait for it.
import argparse
import functools
import hashlib
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING

from hashfast.common import Parser, UserError, check_writable, environment, find_device, run_command
from hashfast.names import RECIPES
from hashfast.progress import Progress

if TYPE_CHECKING:
    from torch import Tensor

    from hashfast.hash_attention import HashEncoder
    from hashfast.model import Fingerprint
    from hashfast.research.data import Sequence
    from hashfast.research.resume import Partial
    from hashfast.research.training import TrainConfig


def train(capture: "Callable[[list[Sequence]], Iterator[tuple[list[Tensor], ...]]]", model: "Fingerprint", device: str,
          encoders: "list[HashEncoder]", training: "list[Sequence]", held_out: "dict[str, list[Sequence]]", budget: int,
          config: "TrainConfig", layers: list[int], partial: "Partial") -> "tuple[dict[str, list[dict]], Tensor]":
    """Train the encoders of `layers` in place and measure those of all layers; what `partial` holds is taken from there.

    capture: `research.training.capture` of the model.  budget: tokens at which recall is measured.
    -> by kind of held-out text, each layer's recall of the trained encoder and its bounds; recall by units of budget,
    float32 [n_layer, Hs, J].
    """
    import torch
    from tqdm import tqdm

    from hashfast.research.recall import layer_recall
    from hashfast.research.training import train_layer
    from hashfast.runtime.signatures import random_encoders, round_weights

    untrained = random_encoders(encoders[0].config, model, config.seed + 1)
    recalls, curves = [], []
    sequences = training + [sequence for kept in held_out.values() for sequence in kept]
    progress = tqdm(capture(sequences), total=len(encoders), desc="layers", unit="layer")
    for i, (queries, keys, values) in enumerate(progress):
        if not all(part.isfinite().all() for kind in (queries, keys, values) for part in kind):
            raise UserError(f"layer {i} computes values that are not finite; the checkpoint is damaged, or too large for this "
                            "--precision: download it again, or try float32")
        done = partial.load(i)
        if done is not None:
            state, recall = done
            curve = state.pop("curve")
            encoders[i].load_state_dict(state)
        else:
            encoders[i].to(device)
            if i in layers:
                encoders[i], losses = train_layer(encoders[i], queries[:len(training)], keys[:len(training)],
                                                  [sequence.question for sequence in training],
                                                  replace(config, seed=config.seed * 100_003 + i))
                progress.set_postfix(loss=f"{sum(losses[-20:]) / len(losses[-20:]):.3f}")
            round_weights(encoders[i])  # recall is of what the file will hold
            recall, curve = layer_recall({"random": untrained[i].to(device), "trained": encoders[i]}, held_out,
                                         queries[len(training):], keys[len(training):], budget, config)
            partial.save(i, encoders[i].state_dict() | {"curve": curve}, recall)
        recalls.append(recall)
        curves.append(curve.cpu())
        del queries, keys, values  # before the next layer's are captured
    return {kind: [recall[kind] for recall in recalls] for kind in held_out}, torch.stack(curves)


# --------------------------------------------------------------------------------------------------------------- command

def parse_arguments() -> argparse.Namespace:
    parser = Parser(description=__doc__.splitlines()[0])
    add = parser.add_argument_group("model").add_argument
    add("--checkpoint_path", type=Path, required=True, metavar="FOLDER", help="folder with config.json, safetensors, tokenizer")
    add("--precision", choices=("bfloat16", "float16", "float32"), default="bfloat16", help="of the model")
    add("--device", help="cpu, cuda or cuda:N; default: a GPU where there is one")
    add("--backend", choices=("hashfast", "transformers"), default="hashfast",
        help="what runs the model; transformers: any decoder with rotary, full, grouped-query attention")
    add = parser.add_argument_group("data").add_argument
    add("--data", nargs="+", required=True, metavar="FILE", help="text files or globs to train on")
    add("--context", type=int, default=8192, metavar="N", help="tokens per training sequence")
    add("--sequences", type=int, default=16, metavar="N", help="training sequences")
    add("--needles", type=float, default=0.3, metavar="SHARE", help="of them that are retrieval documents")
    add = parser.add_argument_group("signatures").add_argument
    add("--recipe", choices=RECIPES, default="listwise", help="sets the defaults of the next five")
    add("--bits", type=int, metavar="N", help="signature bits per token and signature head")
    add("--query_bits", type=int, metavar="N", help="bits per query weight; 1 = signs alone")
    add("--depth", type=int, metavar="N", help="layers of the encoders")
    add("--hidden", type=int, metavar="N", help="width of their inner layers, where --depth is more than 1")
    add("--share", choices=("kv", "query"), help="one signature per KV head or per query head")
    add = parser.add_argument_group("training").add_argument
    add("--steps", type=int, default=300, metavar="N", help="training steps per layer")
    add("--layers", type=int, nargs="+", metavar="I", help="train these alone; the others stay random projections")
    add("--sink", type=int, default=64, metavar="N", help="first tokens that are always attended to")
    add("--recent", type=int, default=128, metavar="N", help="last tokens that are always attended to")
    add("--seed", type=int, default=0, metavar="N", help="of sequences and training")
    add = parser.add_argument_group("output").add_argument
    add("--out", type=Path, required=True, metavar="FILE", help="the signatures file to write")
    add("--resume", action="store_true", help="go on from the layers that OUT.partial holds")
    add("--calibrate", action="store_true", help="measure --out as it is: held-out figures and budgets anew")
    return parser.parse_args()


def check_arguments(args: argparse.Namespace) -> None:
    check_writable("--out", args.out)
    if not 0 <= args.seed < 2 ** 31:
        raise UserError(f"--seed must be 0 to {2 ** 31 - 1}, not {args.seed}")
    if args.sequences < 1:
        raise UserError(f"--sequences must be at least 1, not {args.sequences}")
    if args.steps < 1:
        raise UserError(f"--steps must be at least 1, not {args.steps}")
    if not 0 <= args.needles <= 1:
        raise UserError(f"--needles must be 0 to 1, not {args.needles}")
    if args.sink < 0 or args.recent < 1:
        raise UserError(f"--sink must be at least 0 and --recent at least 1, not {args.sink} and {args.recent}")
    if args.context < 2 * (args.sink + args.recent + 64):
        raise UserError(f"--context {args.context} leaves too few tokens to choose among; give at least "
                        f"{2 * (args.sink + args.recent + 64)} or a smaller --sink and --recent")


def run_settings(args: argparse.Namespace, encoder: "HashEncoder", model: "Fingerprint", texts: dict[str, str]) -> dict:
    """All that a layer's result depends on, for Partial."""
    import torch
    names = ("recipe", "context", "sequences", "needles", "steps", "layers", "sink", "recent", "seed", "device", "precision",
             "calibrate", "backend")
    digest = hashlib.sha256("\0".join(texts.values()).encode()).hexdigest()[:16]
    return {**asdict(encoder.config), **{name: getattr(args, name) for name in names}, "data": digest,
            **asdict(model), "checkpoint_path": str(args.checkpoint_path.resolve()), "torch": torch.__version__}


def main() -> None:
    args = parse_arguments()
    check_arguments(args)
    with Progress("starting"):
        import torch

        from hashfast.research import recipes
        from hashfast.research.budgets import UNIT, calibrate
        from hashfast.research.data import DataConfig, make_sequences, read_texts
        from hashfast.research.recall import table
        from hashfast.research.resume import Partial
        from hashfast.research.training import TrainConfig, capture, check_model
        from hashfast.runtime.checkpoint import load_model
        from hashfast.runtime.hub import checkpoint_folder
        from hashfast.runtime.signatures import load_signatures, model_outline, random_encoders, save_signatures
        from hashfast.runtime.tokenizer import Tokenizer

    args.device = find_device(args.device)
    args.checkpoint_path = checkpoint_folder(args.checkpoint_path)
    given = {field: getattr(args, field) for field in ("bits", "query_bits", "depth", "hidden", "share")}
    given = {field: value for field, value in given.items() if value is not None}
    shape = replace(recipes.RECIPES[args.recipe].config, **given)
    if args.hidden is not None and shape.depth == 1:
        raise UserError("--hidden is the width of inner layers and --depth 1 has none; give --depth 2 or 3, or leave it out")
    texts = read_texts(args.data)
    begin = time.perf_counter()
    if args.device.startswith("cuda"):
        torch.set_float32_matmul_precision("high")  # TF32: codes are learned as well, several times as fast
    precision = getattr(torch, args.precision)
    if args.backend == "transformers":
        from hashfast.integrations.transformers_capture import CaptureModel
        outline = CaptureModel(args.checkpoint_path, args.device, precision)
    else:
        outline = model_outline(args.checkpoint_path)  # what can be wrong, before weights are read
    check_model(outline, args.context, args.layers)
    fingerprint = outline.fingerprint()
    layers = list(range(fingerprint.n_layer)) if args.layers is None else args.layers
    encoders, about = random_encoders(shape, fingerprint, args.seed), {}
    if args.calibrate:
        layers, (encoders, about) = [], load_signatures(args.out, fingerprint)
    partial = Partial(args.out, run_settings(args, encoders[0], fingerprint, texts), args.resume)
    training, held_out = make_sequences(texts, Tokenizer.load(args.checkpoint_path).encode,
                                        DataConfig(args.context, args.sequences, args.needles, args.seed))
    if args.backend == "transformers":
        capture = outline.capture
    else:
        capture = functools.partial(capture, load_model(args.checkpoint_path, args.device, precision))

    window = args.sink + args.recent
    budget = max(args.context // 16, window + UNIT)
    config = TrainConfig(args.recipe, args.steps, args.sink, args.recent, args.seed)
    recalls, curves = train(capture, fingerprint, args.device, encoders, training, held_out, budget, config, layers, partial)

    print(f"attention recall of {budget} of {args.context} tokens, on held-out sequences")
    print(table(recalls))
    if not args.calibrate:
        about = {"recipe": args.recipe, "steps": args.steps, "context": args.context, "sequences": args.sequences,
                 "needles": sum(sequence.question > 0 for sequence in training), "data": [Path(path).name for path in texts],
                 "layers": args.layers, "seed": args.seed, "precision": args.precision,
                 "seconds": round(time.perf_counter() - begin), "environment": environment()}
    about |= {"budgets": calibrate(curves, args.context, window),
              "held_out": {"budget": budget, "sink": args.sink, "recent": args.recent, "mass": recalls}}
    save_signatures(args.out, encoders, fingerprint, about)
    partial.remove()
    print(f"{args.out}: {fingerprint.n_layer} layers in {time.perf_counter() - begin:.0f} s")


if __name__ == "__main__":
    run_command(main)
