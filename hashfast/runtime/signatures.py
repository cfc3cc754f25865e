"""Signature files: the encoders of all layers, the model they belong to, and how they came to be."""
import json
import sys
from dataclasses import asdict
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from hashfast.common import UserError, atomic_path
from hashfast.hash_attention import HashConfig, HashEncoder
from hashfast.model import Fingerprint


def random_encoders(config: HashConfig, model: Fingerprint, seed: int = 0) -> list[HashEncoder]:
    """Untrained signatures: seeded random projections (LSH), the query heads of a group sharing their key's matrix."""
    generator = torch.Generator().manual_seed(seed)
    encoders = []
    for _ in range(model.n_layer):
        encoder = HashEncoder(config, model.n_head, model.n_kv_head, model.head_dim)
        for key, query in zip(encoder.key, encoder.query, strict=True):
            key.weight.normal_(std=key.weight.shape[1] ** -0.5, generator=generator)
            query.weight.copy_(key.weight.repeat_interleave(encoder.group, dim=0))
        for last in (encoder.key[-1], encoder.query[-1]):
            last.weight[..., config.bits:] = 0
        encoders.append(encoder)
    return encoders


def round_weights(module: nn.Module) -> None:
    """Make the weights of an encoder, or of one layer of it, the values that a signatures file holds of them."""
    for name, parameter in module.named_parameters():
        parameter.copy_(_stored(name, parameter))


def _stored(name: str, tensor: Tensor) -> Tensor:
    """Weights are stored as float16; biases, which are few and large where a channel's mean is folded into them, as float32."""
    largest = torch.finfo(torch.float16).max  # a channel that hardly ever changes has weights beyond it
    return tensor.detach().clamp(-largest, largest).half() if name.endswith("weight") else tensor.detach()


def save_signatures(path: str | Path, encoders: list[HashEncoder], model: Fingerprint, provenance: dict) -> None:
    """Write the encoders of all layers, their config, the model's fingerprint and how they came to be, as safetensors.

    Weights are rounded to float16, half the size; `round_weights` does that to encoders that are to be judged before.
    """
    tensors = {f"layers.{i}.{name}": _stored(name, tensor).cpu().contiguous()
               for i, encoder in enumerate(encoders) for name, tensor in encoder.state_dict().items()}
    about = {**provenance, "config": asdict(encoders[0].config), "model": asdict(model)}
    with atomic_path(path) as beside:
        save_file(tensors, beside, metadata={"hashfast": json.dumps(about)})


def differences(there: dict, model: Fingerprint) -> dict:
    """The model's values of what a file's fingerprint says otherwise; what either does not know is no difference."""
    return {field: here for field, here in asdict(model).items()
            if here != there.get(field, here) and not (field == "norms" and None in (here, there[field]))}


def load_signatures(path: str | Path, model: Fingerprint) -> tuple[list[HashEncoder], dict]:
    """Read what `save_signatures` wrote -> (one HashEncoder per layer, in float32, and the metadata).

    UserError where it is of a model of another shape; a line of warning where it is of one of the same shape and other norms or
    RoPE scaling. Files from before these two were stored say nothing of them.
    """
    path = Path(path)
    if not path.is_file():
        raise UserError(f"no signatures file at {path}; train one with train_hash.py or leave --signatures out")
    try:
        with safe_open(path, framework="pt") as file:
            about = json.loads(file.metadata()["hashfast"])
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (not a dict)
        config = HashConfig(**about["config"])
        there = about["model"]
        Fingerprint(**there)  # complete, and nothing else
    except (SafetensorError, KeyError, TypeError, ValueError) as error:
        raise UserError(f"{path} is not a hashfast signatures file ({type(error).__name__}: {error}); "
                        "make one with train_hash.py") from error
    for field, here in differences(there, model).items():
        if field not in ("norms", "rope_scaling"):
            raise UserError(f"{path} holds signatures of another model: {field} is {there[field]} there and {here} here; "
                            "use signatures trained on this model")
        print(f"warning: {path} is of another model of this shape: {field} is {there[field]} there and {here} here",
              file=sys.stderr)
    encoders = []
    for i in range(model.n_layer):
        encoder = HashEncoder(config, model.n_head, model.n_kv_head, model.head_dim)
        prefix = f"layers.{i}."
        state = {name.removeprefix(prefix): tensor.float() for name, tensor in tensors.items() if name.startswith(prefix)}
        try:
            encoder.load_state_dict(state)
        except RuntimeError as error:
            reason = " ".join(str(error).split())
            raise UserError(f"{path}, layer {i}: {reason}; train the signatures again with train_hash.py") from error
        encoders.append(encoder)
    return encoders, about
