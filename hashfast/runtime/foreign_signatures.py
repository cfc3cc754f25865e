"""Signatures that others trained, as encoders of ours: HashAttention's networks or HATA's matrices.

HashAttention (arXiv 2412.14468), one file for all layers: for every layer and query head
`{layer}.learning_to_hash_transformation_{q,k}.{head}.{0,2,4}.{weight,bias}`, linear layers [out, in] with SiLU between them;
as one flat dictionary (anything may stand before the layer's number) or as {layer: dictionary of that layer}. Or, as published
(*.hat_weights.pkl), {layer: {query_matrix, query_bias, key_matrix, key_bias}}, each a list with one [Hq, in, out] or [Hq, out]
per layer of the networks.
HATA (arXiv 2506.02572): one tensor [Hkv, D, bits] per layer, each in a file whose name ends in the layer's number
(hash_weight_layer_02.pt), or one tensor [n_layer, Hkv, D, bits]. Layers that are not there (HATA leaves the first ones dense)
get random projections and a warning: run with --dense_layers.

Files are safetensors, or those of torch.save or pickle, of which tensors and plain containers alone are read.
"""
import io
import pickle
import re
import sys
import zipfile
from collections import OrderedDict
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor

from hashfast.common import UserError
from hashfast.hash_attention import HashConfig, HashEncoder
from hashfast.model import Fingerprint
from hashfast.runtime.signatures import random_encoders

NETWORK = re.compile(r"(?:.*\.)?(\d+)\.learning_to_hash_transformation_([qk])\.(\d+)\.(\d+)\.(weight|bias)")


class TensorUnpickler(pickle.Unpickler):
    """Reads what pickle.dump wrote of tensors in plain containers; a file that wants to call anything else is refused."""
    allowed = {
        ("collections", "OrderedDict"): OrderedDict,
        ("torch._utils", "_rebuild_tensor_v2"): torch._utils._rebuild_tensor_v2,
        ("torch.storage", "_load_from_bytes"): lambda saved: torch.load(io.BytesIO(saved), "cpu", weights_only=True),
    }

    def find_class(self, module: str, name: str) -> object:
        if (module, name) not in self.allowed:
            raise pickle.UnpicklingError(f"it calls {module}.{name}")
        return self.allowed[module, name]


def read(path: Path) -> dict | list | Tensor:
    """What a safetensors, torch.save or, named .pkl, pickle.dump file holds, without running anything in it."""
    if not path.is_file():
        raise UserError(f"no such file: {path}; give what HashAttention or HATA saved")
    try:
        if path.suffix == ".safetensors":
            return load_file(path)
        if path.suffix == ".pkl" and not zipfile.is_zipfile(path):
            with path.open("rb") as file:
                return TensorUnpickler(file).load()
        return torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # a damaged or hostile file may raise anything
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        if reason.startswith("Weights only load failed"):  # torch goes on to say how to run what is in it
            reason = "it holds more than tensors"
        raise UserError(f"cannot read {path} ({reason}); give a safetensors file, or a torch.save or pickle file of tensors "
                        "alone") from error


def flat_names(held: dict, prefix: str = "") -> dict[str, Tensor]:
    """{"a": {"b": tensor}} -> {"a.b": tensor}; layers may be integers."""
    flat = {}
    for name, value in held.items():
        if isinstance(value, dict):
            flat |= flat_names(value, f"{prefix}{name}.")
        elif isinstance(value, Tensor):
            flat[f"{prefix}{name}"] = value.float()
    return flat


# --------------------------------------------------------------------------------------------------------- HashAttention

def hashattention(tensors: dict[str, Tensor], model: Fingerprint, path: Path) -> list[HashEncoder]:
    """Encoders of every layer from the named weights of one network per query head."""
    found = {}  # (layer, q or k, head, place in the network, weight or bias): tensor
    for name, tensor in tensors.items():
        match = NETWORK.fullmatch(name)
        if match:
            layer, side, head, place, part = match.groups()
            found[int(layer), side, int(head), int(place), part] = tensor
    places = sorted({key[3] for key in found})
    if places != list(range(0, 2 * len(places), 2)) or not 1 <= len(places) <= 3:
        raise UserError(f"{path} has layers at places {places} of its networks; 0, 2 and 4 (SiLU between them) can be read")
    layers = 1 + max(key[0] for key in found)
    if layers != model.n_layer:
        raise UserError(f"{path} is of another model: it has {layers} layers, this model {model.n_layer}; "
                        "give the --checkpoint_path it was trained for")

    def stack(layer: int, side: str, place: int, part: str) -> Tensor:
        try:
            heads = torch.stack([found[layer, side, head, place, part] for head in range(model.n_head)])
        except (KeyError, RuntimeError) as error:
            raise UserError(f"{path}, layer {layer}: {part} {place} of {side} is missing, or of unequal shape, in some of the "
                            f"{model.n_head} query heads; give the whole file") from error
        return heads.transpose(1, 2) if part == "weight" else heads

    last = found.get((0, "k", 0, places[-1], "weight"))
    first = found.get((0, "k", 0, 0, "weight"))
    if first is None or last is None:
        raise UserError(f"{path} has no key network for head 0 of layer 0; give the whole file")
    hidden = len(first) if len(places) > 1 else HashConfig.hidden
    config = HashConfig(len(last), query_bits=1, depth=len(places), hidden=hidden, share="query")
    encoders = []
    for layer in range(model.n_layer):
        state = {f"{side}.{j}.{part}": stack(layer, side[0], place, part)
                 for side in ("key", "query") for j, place in enumerate(places) for part in ("weight", "bias")}
        encoders.append(filled(config, model, state, f"{path}, layer {layer}"))
    return encoders


def is_published(content: dict | list | Tensor) -> bool:
    return isinstance(content, dict) and any(isinstance(layer, dict) and "key_matrix" in layer for layer in content.values())


def published(layers: dict[int, dict[str, list[Tensor]]], model: Fingerprint, path: Path) -> list[HashEncoder]:
    """Encoders of every layer from the lists of *.hat_weights.pkl."""
    if layers.keys() != {*range(model.n_layer)}:
        raise UserError(f"{path} is of another model: it has {len(layers)} layers, this model {model.n_layer}; "
                        "give the --checkpoint_path it was trained for")
    try:
        networks = [{f"{side}.{j}.{part}": tensor
                     for side in ("query", "key") for part, name in (("weight", "matrix"), ("bias", "bias"))
                     for j, tensor in enumerate(layers[layer][f"{side}_{name}"])} for layer in range(model.n_layer)]
        depth = len(layers[0]["key_matrix"])
        hidden = networks[0]["key.0.weight"].shape[2] if depth > 1 else HashConfig.hidden
        bits = networks[0][f"key.{depth - 1}.weight"].shape[2]
    except (LookupError, TypeError, AttributeError) as error:
        raise UserError(f"{path} lacks query_matrix, query_bias, key_matrix and key_bias, lists of [heads, in, out] and "
                        "[heads, out], in some layer; give the whole file") from error
    config = HashConfig(bits, query_bits=1, depth=depth, hidden=hidden, share="query")
    return [filled(config, model, state, f"{path}, layer {layer}") for layer, state in enumerate(networks)]


# ------------------------------------------------------------------------------------------------------------------ HATA

def hata(matrices: dict[int, Tensor], model: Fingerprint) -> list[HashEncoder]:
    """Encoders from one matrix [Hkv, D, bits] per layer, for keys and queries alike; random where there is none."""
    bits = {matrix.shape[-1] for matrix in matrices.values()}
    if len(bits) > 1:
        raise UserError(f"the layers have different numbers of bits: {sorted(bits)}; give matrices of one")
    outside = [layer for layer in matrices if layer >= model.n_layer]
    if outside:
        raise UserError(f"there are matrices of layer {max(outside)}, but this model has {model.n_layer} layers; "
                        "give the --checkpoint_path they were trained for")
    config = HashConfig(bits.pop(), query_bits=1)
    encoders = random_encoders(config, model)
    group = model.n_head // model.n_kv_head
    for layer, matrix in matrices.items():
        state = {"key.0.weight": matrix, "query.0.weight": matrix.repeat_interleave(group, dim=0),
                 "key.0.bias": torch.zeros(len(matrix), config.bits),
                 "query.0.bias": torch.zeros(group * len(matrix), config.bits)}
        encoders[layer] = filled(config, model, state, f"layer {layer}")
    missing = sorted(set(range(model.n_layer)) - set(matrices))
    if missing:
        print(f"warning: no matrices for layers {missing}, so random projections choose there; --dense_layers keeps the first "
              "ones dense", file=sys.stderr)
    return encoders


def hata_matrices(held: list[tuple[Path, dict | list | Tensor]]) -> dict[int, Tensor]:
    """layer: float32 [Hkv, D, bits] of one file for all layers, or of one file per layer."""
    matrices: dict[int, Tensor] = {}
    for path, content in held:
        tensors = list(content.values()) if isinstance(content, dict) else content
        if isinstance(tensors, list) and len(tensors) == 1:
            tensors = tensors[0]
        number = re.search(r"(\d+)$", path.stem)
        if isinstance(tensors, Tensor) and tensors.dim() == 4 and len(held) == 1:
            matrices |= dict(enumerate(tensors.detach().float()))
        elif isinstance(tensors, Tensor) and tensors.dim() == 3 and number:
            matrices[int(number[1])] = tensors.detach().float()
        else:
            raise UserError(f"{path} is neither of the layouts that can be read: HashAttention's named networks, one tensor "
                            "[n_layer, Hkv, D, bits], or [Hkv, D, bits] in a file whose name ends in the layer's number")
    return matrices


def filled(config: HashConfig, model: Fingerprint, state: dict[str, Tensor], where: str) -> HashEncoder:
    encoder = HashEncoder(config, model.n_head, model.n_kv_head, model.head_dim)
    try:
        encoder.load_state_dict(state)
    except RuntimeError as error:
        reason = " ".join(str(error).split()).removeprefix("Error(s) in loading state_dict for HashEncoder: ")
        raise UserError(f"{where}: these are of another model ({reason}); give the --checkpoint_path they were trained "
                        "for") from error
    return encoder


def convert(paths: list[Path], model: Fingerprint) -> tuple[str, list[HashEncoder]]:
    """-> the recipe's name and the encoder of each layer."""
    held = [(path, read(path)) for path in paths]
    names = flat_names(held[0][1]) if isinstance(held[0][1], dict) else {}
    if is_published(held[0][1]) or any(NETWORK.fullmatch(name) for name in names):
        if len(paths) > 1:
            raise UserError(f"{paths[0]} holds HashAttention's networks, of all layers in one file; give it alone")
        if is_published(held[0][1]):
            return "hashattention", published(held[0][1], model, paths[0])
        return "hashattention", hashattention(names, model, paths[0])
    return "hata", hata(hata_matrices(held), model)
