"""A prompt file: K, V and signatures of a prompt that was read, for later prompts that begin with the same tokens.

safetensors: `ids` int32 [N]; of each layer `layers.{i}.k` and `v` [Hkv, N, D], with an encoder `signatures` int32 [Hs, N, W].
Metadata key `hashfast_prompt`: JSON of what these depend on (`identity`). Each rank has a file of its own.
"""
import hashlib
import itertools
import json
import shutil
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from hashfast.common import UserError, atomic_path
from hashfast.model import PrefillSettings, Transformer
from hashfast.runtime import distributed

_KEY = "hashfast_prompt"
_PIECE = 2 ** 26  # bytes copied at a time
_DTYPES = {torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16", torch.int32: "I32"}


def identity(model: Transformer, settings: PrefillSettings) -> dict[str, object]:
    """What K, V and signatures of given tokens depend on, as JSON has it."""
    layer = model.layers[0].feed_forward.w13
    about = {"format": 1, **asdict(model.fingerprint()), "ranks": model.args.ranks,
             "precision": str(model.tok_embeddings.weight.dtype).removeprefix("torch."),
             "weights": "float" if isinstance(layer, nn.Linear) else type(layer).__name__,
             "signatures": hash_signatures(model), "prefill": settings.mode}
    if settings.mode == "hash":
        about |= {"prefill_sparsity": float(settings.sparsity), "prefill_chunk": settings.chunk}
    return json.loads(json.dumps(about))


def hash_signatures(model: Transformer) -> str | None:
    """SHA-256 of all encoders and the layers that have one; None where none has."""
    digest, some = hashlib.sha256(), False
    for i, layer in enumerate(model.layers):
        encoder = layer.attention.encoder
        for name, tensor in (encoder.state_dict() if encoder is not None else {}).items():
            digest.update(f"{i} {name} {encoder.config}".encode())
            digest.update(tensor.float().cpu().numpy().tobytes())
            some = True
    return digest.hexdigest()[:16] if some else None


def common_beginning(a: list[int], b: list[int]) -> int:
    """Tokens that both begin with."""
    return next((i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))


class PromptCache:
    """The prompt file of a session, whose model has its caches.

    path: one file, which need not be there yet unless read_only, where it is never written.
    UserError, before anything is read, where the file is of another model, precision, RoPE, signatures or way to read prompts.
    """

    def __init__(self, path: Path, model: Transformer, settings: PrefillSettings, read_only: bool = False) -> None:
        if distributed.world_size() > 1:
            path = path.with_name(f"{path.name}.{distributed.rank()}-of-{distributed.world_size()}")
        self.path, self.model, self.settings, self.read_only = path, model, settings, read_only
        self.about = identity(model, settings)
        self.ids: list[int] = []  # in the file
        if path.exists():
            self.ids = self._check()
        elif read_only:
            raise UserError(f"no prompt file at {path}; leave --prompt_cache_ro out to make it")

    def _open(self) -> safe_open:
        return safe_open(self.path, framework="pt", device=str(self.model.tok_embeddings.weight.device))

    def _check(self) -> list[int]:
        """The tokens in the file, which must be of this session's kind."""
        try:
            with self._open() as file:
                about = json.loads(file.metadata()[_KEY])
                ids = file.get_tensor("ids").tolist()
                missing = self._tensors(0, 0).keys() - set(file.keys())
            if missing:
                raise ValueError(f"{min(missing)} is not in it")
            differing = [name for name in self.about.keys() | about.keys() if self.about.get(name) != about.get(name)]
        except (SafetensorError, OSError, LookupError, TypeError, ValueError, AttributeError) as error:
            raise UserError(f"{self.path} is not a whole prompt file ({type(error).__name__}: {error}); delete it, or give "
                            "another --prompt_cache") from error
        if differing:
            name = min(differing, key=[*about, *self.about].index)
            raise UserError(f"{self.path} was not read as this run would: {name} is {about.get(name)} there and "
                            f"{self.about.get(name)} here; give another --prompt_cache, or the flags it was made with")
        return ids

    def _tensors(self, row: int, length: int) -> dict[str, Tensor]:
        """The first `length` tokens of a row of the caches, [heads, length, ..], by their names in the file."""
        return {f"layers.{i}.{name}": buffer[row, :, :length] for i, layer in enumerate(self.model.layers)
                for name, buffer in zip(("k", "v", "signatures"), layer.attention.cache.rows(), strict=False)}

    def _whole(self, ids: list[int]) -> int:
        """Tokens of a prompt whose K and V depend on no later ones: all but the last, which is read for its logits; where
        prompts are read sparsely whole chunks before the tail."""
        if self.settings.mode == "dense":
            return len(ids) - 1
        return max(len(ids) - max(self.settings.tail, 1), 0) // self.settings.chunk * self.settings.chunk

    def _shared(self, prompts: list[list[int]]) -> list[int]:
        """What all prompts begin with, as far as a file may hold it: a single dense prompt as a whole."""
        count = min(common_beginning(prompts[0], ids) for ids in prompts)
        if self.settings.mode == "hash":
            count = min(count, *map(self._whole, prompts))
        return prompts[0][:count]

    def load(self, prompts: list[list[int]]) -> int:
        """Put what all prompts share with the file into the first cache rows, one for each -> tokens of it.

        prompts: as far as they are prefilled. At least one token of each is left.
        """
        count = min(min(common_beginning(self.ids, ids), self._whole(ids)) for ids in prompts)
        if self.settings.mode == "hash":
            count -= count % self.settings.chunk
        count = distributed.all_min(count)
        if count == 0:
            return 0
        with self._open() as file:
            for name, target in self._tensors(0, count).items():
                there = file.get_slice(name)
                for head, first, last in pieces(target):
                    target[head, first:last] = there[head:head + 1, first:last][0]
        for row in range(1, len(prompts)):
            for target, source in zip(self._tensors(row, count).values(), self._tensors(0, count).values(), strict=True):
                target.copy_(source)
        return count

    def check_room(self, prompts: list[list[int]]) -> None:
        """UserError, before a prompt is read, where the disk has no room for it."""
        if not self._is_due(prompts):
            return
        need = sum(tensor.nbytes for tensor in self._tensors(0, len(self._shared(prompts))).values())
        folder = next(folder for folder in self.path.absolute().parents if folder.exists())
        free = shutil.disk_usage(folder).free
        if need > free:
            raise UserError(f"--prompt_cache {self.path} would take {need / 2 ** 30:.1f} GiB and {free / 2 ** 30:.1f} GiB are "
                            "free there; give a place with room, or leave it out")

    def _is_due(self, prompts: list[list[int]]) -> bool:
        """Whether what prompts share is worth writing: the file has less than three quarters of it."""
        shared = self._shared(prompts)
        return not self.read_only and common_beginning(self.ids, shared) < 0.75 * len(shared)

    def save(self, prompts: list[list[int]]) -> None:
        """Write what the prompts share, which is in the first row of the caches, unless the file has most of it."""
        if not self._is_due(prompts):
            return
        self.check_room(prompts)
        shared = self._shared(prompts)
        ids, tensors = torch.tensor(shared, dtype=torch.int32), self._tensors(0, len(shared))
        with atomic_path(self.path) as beside, open(beside, "wb") as file:
            file.write(header({"ids": ids, **tensors}, {_KEY: json.dumps(self.about)}))
            file.write(ids.numpy().data)
            for tensor in tensors.values():
                for head, first, last in pieces(tensor):
                    file.write(tensor[head, first:last].contiguous().cpu().view(torch.uint8).numpy().data)
        self.ids = shared


def pieces(tensor: Tensor) -> Iterator[tuple[int, int, int]]:
    """(head, first, last) of the parts of [heads, N, ..] that are copied at a time."""
    step = max(1, _PIECE // max(tensor[0, :1].nbytes, 1))
    starts = range(0, tensor.shape[1], step)
    return ((head, first, min(first + step, tensor.shape[1])) for head, first in itertools.product(range(len(tensor)), starts))


def header(tensors: dict[str, Tensor], metadata: dict[str, str]) -> bytes:
    """What a safetensors file has before the tensors' bytes, which follow one after the other."""
    about: dict[str, object] = {"__metadata__": metadata}
    end = 0
    for name, tensor in tensors.items():
        about[name] = {"dtype": _DTYPES[tensor.dtype], "shape": list(tensor.shape), "data_offsets": [end, end + tensor.nbytes]}
        end += tensor.nbytes
    text = json.dumps(about).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text
