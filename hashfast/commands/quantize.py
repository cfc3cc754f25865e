"""Make a checkpoint smaller: its linear layers in 8 bits, in a folder that every command here loads like any other.

    python -m hashfast quantize --checkpoint_path checkpoints/llama --out checkpoints/llama-int8 --data books/*.txt

Every linear layer has one scale per output (ops/quant_linear.py). Embedding, norms and biases stay as they are; where the
embedding is also the output layer, the folder holds an int8 copy for the output. Weights are rounded to the nearest value,
without calibration; --data measures what that does to the perplexity of texts.
"""
import argparse
import contextlib
import json
import math
import os
import shutil
from collections.abc import Iterator
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor, nn
from tqdm import tqdm

from hashfast.common import Parser, UserError, check_device, default_device
from hashfast.model import Transformer
from hashfast.ops.quant_linear import quantize_int8
from hashfast.runtime.checkpoint import QUANT_METHOD, load_model, load_quantization, plan_loading, read_tensors
from hashfast.runtime.prompts import read_text
from hashfast.runtime.tokenizer import Tokenizer

SHARD_BYTES = 2 ** 30  # of quantised tensors that wait in memory for their file
WINDOW = 2048  # tokens of a text that perplexity reads together
WEIGHT_FILES = (".safetensors", ".safetensors.index.json", ".bin", ".bin.index.json", ".pth", ".pt", ".gguf", ".h5", ".msgpack")


# --------------------------------------------------------------------------------------------------------------- folder

class ShardWriter:
    """Writes tensors to model-00001.safetensors, ... of a folder, as soon as SHARD_BYTES of them have come together."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.tensors, self.waiting = folder, {}, 0
        self.files = self.bytes = 0

    def add(self, name: str, tensor: Tensor) -> None:
        self.tensors[name] = tensor.cpu().contiguous()
        self.waiting += tensor.nbytes
        if self.waiting >= SHARD_BYTES:
            self.flush()

    def add_all(self, tensors: dict[str, Tensor]) -> None:
        for name, tensor in tensors.items():
            self.add(name, tensor)

    def flush(self) -> None:
        if not self.tensors:
            return
        self.files += 1
        path = self.folder / f"model-{self.files:05}.safetensors"
        save_file(self.tensors, path, metadata={"format": "pt"})
        shutil.copymode(self.folder / "config.json", path)  # safetensors lets its owner alone read it
        self.bytes += path.stat().st_size
        self.tensors, self.waiting = {}, 0


@contextlib.contextmanager
def atomic_folder(out: Path) -> Iterator[Path]:
    """A temporary folder beside `out` that takes its place when the block ends well and vanishes when it does not."""
    beside = out.with_name(f".{out.name}.{os.getpid()}.tmp")
    try:
        beside.mkdir(parents=True)
        yield beside
        os.replace(beside, out)
    except (OSError, SafetensorError) as error:
        reason = getattr(error, "strerror", None) or error
        raise UserError(f"cannot write {out}: {reason}; choose a writable place with free space") from error
    finally:
        shutil.rmtree(beside, ignore_errors=True)


def check_folders(source: Path, out: Path) -> None:
    if not out.name:
        raise UserError(f"--out {str(out)!r} names no folder; give one that does not exist yet")
    if out.is_dir() and any(out.iterdir()) or out.exists() and not out.is_dir():
        raise UserError(f"{out} already exists; remove it or choose another --out")
    if load_quantization(source) is not None:
        raise UserError(f"{source} is quantised already; give the model's original folder")


def quantize_folder(source: Path, out: Path, device: str) -> int:
    """Write the quantised model. -> bytes written."""
    model, places, files = plan_loading(source)
    weights = {f"{name}.weight" for name, layer in model.named_modules() if isinstance(layer, nn.Linear)}
    tied = "lm_head.weight" not in places
    with atomic_folder(out) as beside:
        copy_small_files(source, beside)
        writer = ShardWriter(beside)
        for tensors, name in read_tensors(places, files, "quantising"):
            tensor = tensors.get_tensor(name)
            if places[name].parameter in weights:
                writer.add_all(quantized_tensors(name, tensor.to(device)))
            else:
                writer.add(name, tensor)
            if tied and name == "model.embed_tokens.weight":
                writer.add_all(quantized_tensors("lm_head.weight", tensor.to(device)))
        writer.flush()
    return writer.bytes


def quantized_tensors(name: str, weight: Tensor) -> dict[str, Tensor]:
    """The tensors that take the place of `name`, a weight [out, in] or some rows of it."""
    if not weight.isfinite().all():
        raise UserError(f"tensor {name} holds values that are not finite; the checkpoint is damaged, download it again")
    q, scale = quantize_int8(weight)
    return {name: q, f"{name.removesuffix('weight')}scale": scale}


def copy_small_files(source: Path, target: Path) -> None:
    """All but the weights, with the marker of the quantisation in config.json."""
    for path in sorted(source.iterdir()):
        if path.is_file() and not path.name.startswith(".") and not path.name.endswith(WEIGHT_FILES):
            shutil.copyfile(path, target / path.name)
    config = json.loads((source / "config.json").read_text(encoding="utf-8"))
    marker = {"quant_method": QUANT_METHOD, "mode": "int8"}
    text = json.dumps(config | {"quantization_config": marker}, indent=2, ensure_ascii=False)
    (target / "config.json").write_text(text + "\n", encoding="utf-8")


# ------------------------------------------------------------------------------------------------------------ perplexity

def read_windows(source: Path, texts: list[Path], count: int) -> list[Tensor]:
    """The first `count` windows of each text, int64 [T], T at most WINDOW and at least 2."""
    tokenizer = Tokenizer.load(source)
    windows = []
    for path in texts:
        ids = tokenizer.encode(read_text(path))
        windows += [window for window in torch.tensor(ids).split(WINDOW)[:count] if len(window) > 1]
    if not windows:
        raise UserError("the --data texts have fewer than two tokens; give longer ones")
    return windows


@torch.inference_mode()
def perplexity(model: Transformer, windows: list[Tensor], task: str) -> float:
    """Of every token of the windows but each first one, given those before it, read densely."""
    device = model.tok_embeddings.weight.device
    total, count = 0.0, 0
    for ids in tqdm(windows, desc=task, unit="window", delay=2, disable=None):
        ids = ids.to(device)
        x, cos, sin = model.embed(ids[None], torch.arange(len(ids), device=device)[None])
        for layer in model.layers:
            x = layer.prompt(x, cos, sin)[0]
        for hidden, following in zip(x[0, :-1].split(256), ids[1:].split(256), strict=True):  # all logits would fill memory
            logprobs = model.logits(hidden[None])[0].float().log_softmax(dim=-1)
            total -= logprobs.gather(-1, following[:, None]).sum().item()
        count += len(ids) - 1
    return math.exp(total / count)


def measure(folder: Path, windows: list[Tensor], device: str, dtype: torch.dtype, task: str) -> float:
    """The perplexity of the model in `folder`, whose memory is free again afterwards."""
    model = load_model(folder, device, dtype)
    limit = min(model.args.max_position, model.args.sliding_window or WINDOW)
    return perplexity(model, [window[:limit] for window in windows], task)


# --------------------------------------------------------------------------------------------------------------- command

def parse_options() -> argparse.Namespace:
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--checkpoint_path", type=Path, required=True, help="folder with config.json and safetensors")
    add("--out", type=Path, required=True, help="the folder to make")
    add("--mode", choices=("int8",), default="int8")
    add("--data", type=Path, nargs="+", default=[], help="text files: print their perplexity before and after")
    add("--windows", type=int, default=2, help=f"windows of {WINDOW} tokens that are read of each text (default 2)")
    add("--device", default=default_device())
    add("--precision", choices=("float32", "bfloat16"),
        help="of the perplexity; default: bfloat16 on a GPU, float32 on a CPU")
    options = parser.parse_args()
    if options.windows < 1:
        raise UserError(f"--windows {options.windows} is out of range; it must be at least 1")
    check_device(options.device)
    if options.precision is None:
        options.precision = "bfloat16" if options.device.startswith("cuda") else "float32"
    return options


def main() -> None:
    options = parse_options()
    source, out = options.checkpoint_path, options.out
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
