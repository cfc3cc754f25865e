"""Signatures of others: the converted encoders compute what their own layout says."""
import io
import pickle
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import save_file

from hashfast.commands import convert_hashattention
from hashfast.common import UserError, run_command
from hashfast.hash_attention import HashConfig, score_reference
from hashfast.model import Fingerprint
from hashfast.runtime.checkpoint import load_model
from hashfast.runtime.foreign_signatures import convert
from hashfast.runtime.signatures import load_signatures

MODEL = Fingerprint(n_layer=2, n_head=4, n_kv_head=2, head_dim=16, rope_theta=1e4, vocab_size=100)


def networks(heads: int = 4, layers: int = 2, depth: int = 3, bits: int = 32, dim: int = 16) -> dict[str, torch.Tensor]:
    torch.manual_seed(0)
    widths = [dim, *[24] * (depth - 1), bits]
    state = {}
    for layer in range(layers):
        for side in "qk":
            for head in range(heads):
                for j in range(depth):
                    name = f"{layer}.learning_to_hash_transformation_{side}.{head}.{2 * j}"
                    state[f"{name}.weight"] = torch.randn(widths[j + 1], widths[j])
                    state[f"{name}.bias"] = torch.randn(widths[j + 1])
    return state


def code(state: dict[str, torch.Tensor], layer: int, side: str, head: int, x: torch.Tensor) -> torch.Tensor:
    """Signs of one network's outputs. x [n, D] -> [n, bits] of 1 and -1."""
    for j in (0, 2, 4):
        name = f"{layer}.learning_to_hash_transformation_{side}.{head}.{j}"
        x = F.linear(x if j == 0 else F.silu(x), state[f"{name}.weight"], state[f"{name}.bias"])
    return torch.where(x > 0, 1, -1)


def layouts(state: dict[str, torch.Tensor]) -> dict[str, dict]:
    nested: dict[int, dict] = {0: {}, 1: {}}
    for name, tensor in state.items():
        layer, rest = name.split(".", 1)
        nested[int(layer)][rest] = tensor
    return {"flat": state, "nested": nested, "prefixed": {f"model.layers.{name}": tensor for name, tensor in state.items()}}


@pytest.mark.parametrize("layout", ["flat", "nested", "prefixed", "safetensors"])
def test_hashattention_scores(layout: str, tmp_path: Path) -> None:
    state = networks()
    if layout == "safetensors":
        path = tmp_path / "weights.safetensors"
        save_file(state, path)
    else:
        path = tmp_path / "weights.pt"
        torch.save(layouts(state)[layout], path)
    recipe, encoders = convert([path], MODEL)
    assert recipe == "hashattention" and encoders[0].config == HashConfig(32, 1, depth=3, hidden=24, share="query")
    q, k = torch.randn(1, 4, 16), torch.randn(1, 2, 30, 16)
    for layer, encoder in enumerate(encoders):
        score = score_reference(encoder.encode_queries(q), encoder.encode_keys(k))  # [1, Hq, 30]
        for head in range(4):
            agree = code(state, layer, "k", head, k[0, head // 2]) == code(state, layer, "q", head, q[0, head:head + 1])
            assert torch.equal(score[0, head], agree.sum(dim=-1, dtype=torch.int32))


def published(heads: int = 4, layers: int = 2, depth: int = 3, bits: int = 32, dim: int = 16) -> dict[int, dict[str, list]]:
    """What HashAttention's own *.hat_weights.pkl hold."""
    torch.manual_seed(0)
    widths = [dim, *[24] * (depth - 1), bits]
    return {layer: {f"{side}_{part}": [torch.randn(heads, *(widths[j:j + 2] if part == "matrix" else widths[j + 1:j + 2]))
                                       for j in range(depth)]
                    for side in ("query", "key") for part in ("matrix", "bias")} for layer in range(layers)}


@pytest.mark.parametrize("depth, bits, writer", [(3, 32, pickle.dump), (2, 64, pickle.dump), (1, 32, pickle.dump),
                                                 (3, 32, torch.save)])
def test_published_scores(depth: int, bits: int, writer, tmp_path: Path) -> None:
    """Theirs: the products of the signs of each head's networks, x @ matrix + bias with SiLU between."""
    layers, path = published(depth=depth, bits=bits), tmp_path / "llama3.1-8b-patch.64K.v1.hat_weights.pkl"
    with path.open("wb") as file:
        writer(layers, file)
    recipe, encoders = convert([path], MODEL)
    assert recipe == "hashattention" and encoders[0].config == HashConfig(bits, 1, depth, 24 if depth > 1 else 128, "query")

    def signs(x: torch.Tensor, matrices: list[torch.Tensor], biases: list[torch.Tensor]) -> torch.Tensor:
        for j, (matrix, bias) in enumerate(zip(matrices, biases, strict=True)):
            x = (x if j == 0 else F.silu(x)) @ matrix + bias[:, None]
        return x.sign()

    q, k = torch.randn(1, 4, 16), torch.randn(1, 2, 30, 16)
    for layer, encoder in zip(layers.values(), encoders, strict=True):
        theirs = (signs(q[0, :, None], layer["query_matrix"], layer["query_bias"])
                  @ signs(k[0].repeat_interleave(2, dim=0), layer["key_matrix"], layer["key_bias"]).mT)[:, 0]
        score = score_reference(encoder.encode_queries(q), encoder.encode_keys(k))[0]  # of agreeing bits
        assert torch.equal(2 * score - bits, theirs.int())


@pytest.mark.parametrize("layout", ["file per layer", "one tensor"])
def test_hata_scores(layout: str, tmp_path: Path, capsys) -> None:
    torch.manual_seed(0)
    matrices = torch.randn(2, 2, 16, 64, dtype=torch.bfloat16, requires_grad=True)
    paths = [tmp_path / "hash.pt"]
    if layout == "one tensor":
        torch.save(matrices, paths[0])
    else:
        paths = [tmp_path / f"hash_weight_layer_{i:02d}.pt" for i in range(2)]
        for path, matrix in zip(reversed(paths), reversed(matrices), strict=True):
            torch.save(matrix.detach().clone(), path)
    recipe, encoders = convert(paths[::-1], MODEL)
    assert recipe == "hata" and encoders[1].config == HashConfig(64, 1) and not capsys.readouterr().err
    q, k = torch.randn(1, 4, 16), torch.randn(1, 2, 30, 16)
    for matrix, encoder in zip(matrices.detach().float(), encoders, strict=True):
        score = score_reference(encoder.encode_queries(q), encoder.encode_keys(k))  # [1, Hkv, 30]
        for head in range(2):
            key = k[0, head] @ matrix[head] > 0
            distance = sum((key != (q[0, 2 * head + g] @ matrix[head] > 0)).sum(dim=-1) for g in range(2))
            # ranking by score is ranking by the summed Hamming distance: the two differ by a constant
            assert len((2 * score[0, head] + 2 * distance).unique()) == 1


def test_hata_without_its_first_layers(tmp_path: Path, capsys) -> None:
    path = tmp_path / "hash_weight_layer_01.pt"
    torch.save(torch.ones(2, 16, 32), path)
    encoders = convert([path], MODEL)[1]
    assert "no matrices for layers [0]" in capsys.readouterr().err
    assert encoders[1].key[0].weight.eq(1).all() and not encoders[0].key[0].weight.eq(1).any()


class Payload:
    def __reduce__(self):
        return (print, ("this ran",))


@pytest.mark.parametrize("content, words", [
    (networks(heads=3), "some of the 4 query heads"),
    (networks(layers=3), "it has 3 layers, this model 2"),
    (networks(dim=8), "of another model (size mismatch"),
    (networks(bits=48), "signature bits must be"),
    ({name: tensor for name, tensor in networks().items() if ".2." not in name.split("_")[-1][2:]}, "at places [0, 4]"),
    ({name: tensor for name, tensor in networks().items() if name != "1.learning_to_hash_transformation_q.2.4.bias"},
     "layer 1: bias 4 of q is missing"),
    (torch.zeros(3, 2, 16, 32), "matrices of layer 2"),
    (torch.zeros(2, 3, 16, 32), "of another model (size mismatch"),
    (torch.zeros(2, 16, 32), "neither of the layouts"),
    ({"a": torch.zeros(2, 16, 32), "b": torch.zeros(2, 16, 32)}, "neither of the layouts"),
    ({"a": Payload()}, "(it holds more than tensors)"),
])
def test_other_layouts_are_refused(content, words: str, tmp_path: Path, capsys) -> None:
    path = tmp_path / "weights.pt"
    torch.save(content, path)
    with pytest.raises(UserError) as error:
        convert([path], MODEL)
    assert words in str(error.value) and "\n" not in str(error.value)
    assert "this ran" not in capsys.readouterr().out


def changed(**lists) -> dict:
    """`published` with other values in layer 1."""
    layers = published()
    layers[1] |= lists
    return layers


class Storage:
    """A tensor's bytes as pickle writes them, but that they call something when they are read."""

    def __reduce__(self):
        saved = io.BytesIO()
        torch.save(Payload(), saved)
        return torch.storage._load_from_bytes, (saved.getvalue(),)


@pytest.mark.parametrize("content, words", [
    (published(heads=3), "of another model (size mismatch"),
    (published(layers=3), "it has 3 layers, this model 2"),
    (published(bits=48), "signature bits must be"),
    (published(depth=4), "depth must be 1 to 3"),
    (changed(key_bias=[torch.zeros(4, 32)]), "of another model (Missing key(s)"),
    (changed(key_bias=None), "lacks query_matrix, query_bias, key_matrix and key_bias"),
    (changed(query_bias=["x", "y", "z"]), "layer 1: these are of another model"),
    ({0: published()[0], 1: {}}, "lacks query_matrix"),
    (changed(key_bias=Payload()), "(it calls builtins.print)"),
    (changed(key_bias=[Storage()]), "(it holds more than tensors)"),
    (["nothing"], "neither of the layouts"),
])
def test_other_pickles_are_refused(content, words: str, tmp_path: Path, capsys) -> None:
    path = tmp_path / "model.hat_weights.pkl"
    path.write_bytes(pickle.dumps(content))
    with pytest.raises(UserError) as error:
        convert([path], MODEL)
    assert words in str(error.value) and "\n" not in str(error.value)
    assert "this ran" not in capsys.readouterr().out


@pytest.mark.parametrize("content", [b"", b"\x80\x04", pickle.dumps(published())[:5000], b"\x80\x04\x8e" + b"\xff" * 8,
                                     b"cos\nsystem\n(S'echo this ran'\ntR.", b"\x80\x04}\x94(K\x00K\x01u0."])
def test_damaged_pickles(content: bytes, tmp_path: Path, capfd) -> None:
    (tmp_path / "a.pkl").write_bytes(content)
    with pytest.raises(UserError, match="cannot read|neither of the layouts"):
        convert([tmp_path / "a.pkl"], MODEL)
    assert "this ran" not in capfd.readouterr().out


def test_files_that_are_no_weights(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no such file"):
        convert([tmp_path / "nothing.pt"], MODEL)
    for name in ("a.pt", "a.safetensors"):
        (tmp_path / name).write_bytes(b"no weights")
        with pytest.raises(UserError, match="cannot read"):
            convert([tmp_path / name], MODEL)


def test_the_command_writes_what_loads(tiny_checkpoint: Path, tmp_path: Path, monkeypatch, capsys) -> None:
    model = load_model(tiny_checkpoint).fingerprint()
    given, out = tmp_path / "weights.pt", tmp_path / "out.safetensors"
    torch.save(networks(heads=model.n_head, layers=model.n_layer, dim=model.head_dim), given)
    monkeypatch.setattr(sys, "argv", ["convert", str(given), "--checkpoint_path", str(tiny_checkpoint), "--out", str(out)])
    run_command(convert_hashattention.main)
    encoders, about = load_signatures(out, model)
    assert (about["recipe"], about["converted_from"]) == ("hashattention", ["weights.pt"])
    expected = torch.load(given)["1.learning_to_hash_transformation_k.3.2.weight"]
    assert torch.equal(encoders[1].key[1].weight[3], expected.T.half().float())
