"""Signature files: the encoders of all layers, the model they belong to, and how they came to be."""
import contextlib
import json
import math
import sys
from dataclasses import asdict
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from hashfast.common import WEIGHTS, UserError, atomic_path
from hashfast.hash_attention import HashConfig, HashEncoder
from hashfast.model import Fingerprint, RMSNorm, Transformer
from hashfast.runtime.checkpoint import plan_loading, read_tensors


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


def model_outline(folder: Path) -> Transformer:
    """The model in `folder` on the meta device, all files checked, with its norms alone, so that it has its fingerprint."""
    model, places, files = plan_loading(folder)
    norms = {f"{name}.weight" for name, module in model.named_modules() if isinstance(module, RMSNorm)}
    wanted = {name: place for name, place in places.items() if place.parameter in norms}
    values = {wanted[name].parameter: tensors.get_tensor(name) for tensors, name in read_tensors(wanted, files, "reading")}
    model.load_state_dict(values, strict=False, assign=True)
    return model


def read_metadata(path: Path) -> dict:
    """What a signatures file says of itself. Raises what reading raises where it is none."""
    with safe_open(path, framework="pt") as file:
        return json.loads((file.metadata() or {})["hashfast"])


def signature_files(folder: Path = WEIGHTS) -> dict[Path, dict]:
    """The signature files in a folder, those that ship if none is given, and what each says of itself."""
    files = {}
    for path in sorted(folder.glob("*.safetensors")):
        with contextlib.suppress(SafetensorError, OSError, KeyError, ValueError, RecursionError):  # some other safetensors file
            files[path] = read_metadata(path)
    return files


def shipped_signatures(model: Fingerprint) -> Path | None:
    """The file that ships for a model: by the listwise recipe, one signature per KV head; of several the longest trained, as
    a clone's weights/ holds what its user trains. None where there is none."""
    fitting = {path: about for path, about in signature_files().items() if about.get("recipe") == "listwise"
               and about["config"]["share"] == "kv" and not differences(about["model"], model)}

    def tokens(path: Path) -> int:
        return math.prod(fitting[path].get(name, 0) for name in ("steps", "sequences", "context"))

    return max(fitting, key=tokens, default=None)


def _check_budgets(about: dict, config: HashConfig, model: Fingerprint) -> None:
    """ValueError unless budgets are {ratio: a share of 0 or more for each layer and signature head}, or absent."""
    heads = config.signature_heads(model.n_head, model.n_kv_head)
    for ratio, layers in (about.get("budgets") or {}).items():
        shares = torch.tensor(layers, dtype=torch.float64)
        if int(ratio) < 1 or shares.shape != (model.n_layer, heads) or not (shares.isfinite() & (shares >= 0)).all():
            raise ValueError(f"budgets for ratio {ratio} are not shares of {model.n_layer} layers and {heads} heads")


def load_signatures(path: str | Path, model: Fingerprint) -> tuple[list[HashEncoder], dict]:
    """Read what `save_signatures` wrote -> (one HashEncoder per layer, in float32, and the metadata).

    UserError where it is damaged or of a model of another shape; a line of warning where it is of one of the same shape and
    other norms or RoPE scaling. Files from before these two were stored say nothing of them.
    """
    path = Path(path)
    if not path.is_file():
        raise UserError(f"no signatures file at {path}; train one with train_hash.py or leave --signatures out")
    try:
        about = read_metadata(path)
        config = HashConfig(**about["config"])
        there = about["model"]
        Fingerprint(**there)  # complete, and nothing else
    except (SafetensorError, OSError, KeyError, TypeError, ValueError, RecursionError) as error:
        raise UserError(f"{path} is not a hashfast signatures file ({getattr(error, 'strerror', None) or repr(error)}); "
                        "make one with train_hash.py") from error
    for field, here in differences(there, model).items():
        if field not in ("norms", "rope_scaling"):
            raise UserError(f"{path} holds signatures of another model: {field} is {there[field]} there and {here} here; "
                            "use signatures trained on this model")
        print(f"warning: {path} is of another model of this shape: {field} is {there[field]} there and {here} here",
              file=sys.stderr)
    try:
        _check_budgets(about, config, model)
        return _read_encoders(path, config, model), about
    except (AttributeError, TypeError, ValueError, RuntimeError) as error:  # RuntimeError: wider than a tensor can be
        raise UserError(f"{path} is damaged: {error}; train the signatures again with train_hash.py") from error


def _read_encoders(path: Path, config: HashConfig, model: Fingerprint) -> list[HashEncoder]:
    """ValueError unless all tensors are there, finite floating-point numbers, and of the shape that `config` says."""
    with torch.device("meta"):  # a width that the file does not have takes no memory
        shapes = HashEncoder(config, model.n_head, model.n_kv_head, model.head_dim).state_dict()
    encoders = []
    with safe_open(path, framework="pt") as file:
        names = {f"layers.{i}.{name}": tensor for i in range(model.n_layer) for name, tensor in shapes.items()}
        if different := names.keys() ^ {*file.keys()}:
            raise ValueError(f"{min(different)} is {'missing' if min(different) in names else 'unknown'}")
        for name, tensor in names.items():
            if (shape := file.get_slice(name).get_shape()) != list(tensor.shape):
                raise ValueError(f"{name} is {shape}, not {list(tensor.shape)}")
        for i in range(model.n_layer):
            state = {name: file.get_tensor(f"layers.{i}.{name}") for name in shapes}
            for name, tensor in state.items():
                if not tensor.is_floating_point():
                    raise ValueError(f"layers.{i}.{name} holds integers")
                if not tensor.isfinite().all():
                    raise ValueError(f"layers.{i}.{name} holds NaN or infinity")
            encoder = HashEncoder(config, model.n_head, model.n_kv_head, model.head_dim)
            encoder.load_state_dict({name: tensor.float() for name, tensor in state.items()})
            encoders.append(encoder)
    return encoders
