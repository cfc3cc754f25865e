"""A checkpoint's linear layers in 8 bits: a folder that loads like any other. The layers are in ops/quant_linear.py."""
import json
import shutil
from pathlib import Path

from safetensors.torch import save_file
from torch import Tensor, nn

from hashfast.common import UserError, atomic_folder
from hashfast.ops.quant_linear import quantize_int8
from hashfast.runtime.checkpoint import QUANT_METHOD, load_quantization, plan_loading, read_tensors

SHARD_BYTES = 2 ** 30  # of quantised tensors that wait in memory for their file
WEIGHT_FILES = (".safetensors", ".safetensors.index.json", ".bin", ".bin.index.json", ".pth", ".pt", ".gguf", ".h5", ".msgpack")


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
