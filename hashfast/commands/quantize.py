"""Make a checkpoint smaller: its linear layers in 8 bits, in a folder that every command here loads like any other.

    python -m hashfast quantize --checkpoint_path checkpoints/llama --out checkpoints/llama-int8 --data books/*.txt

Every linear layer has one scale per output (ops/quant_linear.py). Embedding, norms and biases stay as they are; where the
embedding is also the output layer, the folder holds an int8 copy for the output. Weights are rounded to the nearest value,
without calibration; --data measures what that does to the perplexity of texts.
"""
import argparse
from pathlib import Path

from hashfast.common import Parser, UserError, find_device
from hashfast.progress import Progress


def parse_options() -> argparse.Namespace:
    parser = Parser(description=__doc__)
    add = parser.add_argument
    add("--checkpoint_path", type=Path, required=True, help="folder with config.json and safetensors")
    add("--out", type=Path, required=True, help="the folder to make")
    add("--mode", choices=("int8",), default="int8", help="bits of a weight")
    add("--data", type=Path, nargs="+", default=[], help="text files: print their perplexity before and after")
    add("--windows", type=int, default=2, help="windows of 2048 tokens that are read of each text")
    add("--device", help="cpu, cuda or cuda:N; default: a GPU where there is one")
    add("--precision", choices=("float32", "bfloat16"),
        help="of the perplexity; default: bfloat16 on a GPU, float32 on a CPU")
    options = parser.parse_args()
    if options.windows < 1:
        raise UserError(f"--windows {options.windows} is out of range; it must be at least 1")
    return options


def main() -> None:
    options = parse_options()
    with Progress("starting"):
        import torch

        from hashfast.research.perplexity import measure, read_windows
        from hashfast.runtime.checkpoint import plan_loading
        from hashfast.runtime.hub import checkpoint_folder
        from hashfast.runtime.quantize import check_folders, quantize_folder

    options.device = find_device(options.device)
    if options.precision is None:
        options.precision = "bfloat16" if options.device.startswith("cuda") else "float32"
    source, out = checkpoint_folder(options.checkpoint_path), options.out
    check_folders(source, out)
    _, _, files = plan_loading(source)
    dtype = getattr(torch, options.precision)
    windows = read_windows(source, options.data, options.windows) if options.data else []
    before = measure(source, windows, options.device, dtype, "before") if windows else None
    size = quantize_folder(source, out, options.device)
    was = sum(path.stat().st_size for path in files)
    print(f"{out} is ready: {was / 1e9:.2f} GB before, {size / 1e9:.2f} GB now")
    if before is not None:
        after = measure(out, windows, options.device, dtype, "after")
        print(f"perplexity {before:.4f} before, {after:.4f} now, ratio {after / before:.4f} "
              f"({sum(map(len, windows)) - len(windows)} tokens, {options.precision})")
