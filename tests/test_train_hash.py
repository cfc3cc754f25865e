"""Training of signatures: it learns, it repeats, and what it writes is what generate.py loads."""
import copy
import random
import sys
from pathlib import Path

import pytest
import torch
from tokenizers import Tokenizer as Backend
from tokenizers import decoders, models, pre_tokenizers

from hashfast import train_hash
from hashfast.common import UserError, run_command
from hashfast.hash_attention import HashConfig, HashEncoder, select_tokens_reference
from hashfast.model import Fingerprint
from hashfast.research.recipes import RECIPES, Listwise, ListwiseEach
from hashfast.runtime.checkpoint import load_model
from hashfast.runtime.signatures import load_signatures, random_encoders, round_weights, save_signatures
from hashfast.train_hash import (
    Partial,
    Sequence,
    Standard,
    attention_recall,
    attention_weights,
    recall_curve,
    selectable_region,
    train_layer,
)

SHAPE = Fingerprint(n_layer=1, n_head=4, n_kv_head=2, head_dim=16, rope_theta=1e4, vocab_size=256)
SINK, RECENT = 4, 8


def structured(seed: int, length: int = 400) -> tuple[torch.Tensor, torch.Tensor]:
    """Queries [4, T, 16] and keys [2, T, 16] whose match lies in 4 of 16 channels; the keys are loud in all the others."""
    generator = torch.Generator().manual_seed(seed)
    q = torch.zeros(4, length, 16)
    wanted = torch.randn(2, length, 4, generator=generator).sign() * 3  # the two heads of a group want about the same
    q[..., :4] = wanted.repeat_interleave(2, dim=0) + 0.5 * torch.randn(4, length, 4, generator=generator)
    k = torch.randn(2, length, 16, generator=generator) * 4 + 1
    k[..., :4] = torch.randn(2, length, 4, generator=generator) * 2
    return q, k


def trained(recipe: str, seed: int = 0, steps: int = 80, device: str = "cpu", **config) -> tuple[HashEncoder, list[float]]:
    queries, keys = zip(*([x.to(device) for x in structured(s)] for s in range(3)), strict=True)
    shape = HashConfig(**{**vars(RECIPES[recipe].config), **config})
    encoder = random_encoders(shape, SHAPE)[0].to(device)
    return train_layer(RECIPES[recipe], encoder, list(queries), list(keys), [0, 0, 20], steps, SINK, RECENT, seed)


def caught(encoder: HashEncoder) -> dict[str, float]:
    q, k = structured(99)
    positions = torch.arange(300, 400, 5)
    untrained = random_encoders(encoder.config, SHAPE, seed=1)[0]
    return attention_recall({"random": untrained, "trained": encoder}, q[:, positions], k, positions, 64, SINK, RECENT)


# ----------------------------------------------------------------------------------------------------------------- train

@pytest.mark.parametrize("config", [{}, {"bits": 64}, {"query_bits": 1}, {"depth": 2}, {"share": "query"}])
def test_listwise_learns(config: dict) -> None:
    encoder, losses = trained("listwise", **config)
    assert len(losses) == 80 and sum(losses[-10:]) < 0.9 * sum(losses[:10])
    share = caught(encoder)
    assert share["window"] < share["random"] < share["oracle"]
    assert share["trained"] > share["random"] + 0.5 * (share["oracle"] - share["random"])
    assert not any(parameter.requires_grad for parameter in encoder.parameters())


def test_16_bits_are_32_whose_upper_half_never_counts() -> None:
    encoder = trained("listwise", bits=16)[0]
    q, k = structured(99)
    signatures, planes = encoder.encode_keys(k[None]), encoder.encode_queries(q[None, :, 300])
    assert signatures.shape[-1] == planes.shape[-1] == 1 and planes.any()
    assert signatures.any() and not (signatures >> 16).any() and not (planes >> 16).any()
    share = caught(encoder)
    assert share["trained"] > share["random"] + 0.4 * (share["oracle"] - share["random"])
    with pytest.raises(UserError, match="16 signature bits need query_bits of at least 2"):
        HashConfig(bits=16, query_bits=1)


def test_hashattention_learns() -> None:
    encoder, losses = trained("hashattention", steps=40)
    assert encoder.config == HashConfig(query_bits=1, depth=3, share="query")
    assert sum(losses[-10:]) < 0.9 * sum(losses[:10])
    share = caught(encoder)
    assert share["trained"] > share["random"] + 0.5 * (share["oracle"] - share["random"])


def test_hata_learns_one_map_without_bias() -> None:
    encoder, losses = trained("hata", steps=40)
    assert encoder.config == HashConfig(bits=128, query_bits=1)
    assert sum(losses[-10:]) < 0.9 * sum(losses[:10])
    assert torch.equal(encoder.query[0].weight, encoder.key[0].weight.repeat_interleave(2, dim=0))
    assert not encoder.key[0].bias.any() and not encoder.query[0].bias.any()
    assert caught(encoder)["trained"] > 0.5


def test_seed_decides() -> None:
    first, again, other = (trained("listwise", seed, steps=5) for seed in (1, 1, 2))
    assert first[1] == again[1] != other[1]
    for name, tensor in first[0].state_dict().items():
        assert torch.equal(tensor, again[0].state_dict()[name])
    assert not torch.equal(first[0].key[0].weight, other[0].key[0].weight)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("recipe", RECIPES)
def test_gpu_trains_as_the_cpu(recipe: str) -> None:
    here, there = trained(recipe, steps=10)[1], trained(recipe, steps=10, device="cuda")
    assert there[1] == pytest.approx(here, rel=1e-2)
    assert there[0].key[0].weight.is_cuda
    cpu, gpu = caught(trained(recipe)[0]), caught(trained(recipe, device="cuda")[0].cpu())
    assert gpu["trained"] == pytest.approx(cpu["trained"], abs=0.03)


def test_folded_standardisation_changes_nothing() -> None:
    torch.manual_seed(0)
    q, k = structured(0)
    encoder = HashEncoder(HashConfig(depth=2, share="query"), 4, 2, 16)
    for parameter in encoder.parameters():
        parameter.normal_()
    q = q + 0.1 * torch.randn_like(q)  # a channel that never changes has no scale to fold
    for x, codes, layer in ((q, encoder.query_codes, encoder.query[0]), (k, encoder.key_codes, encoder.key[0])):
        standard = Standard.of([x[:, :100], x[:, 100:]])
        assert standard(x).mean(dim=1).abs().max() < 1e-4 and (standard(x).std(dim=1, correction=0) - 1).abs().max() < 1e-3
        expected = codes(standard(x)[None])
        standard.fold(layer)
        assert torch.equal(layer.weight, layer.weight.half().float())
        torch.testing.assert_close(codes(x[None]), expected, atol=1e-2 * expected.std().item(), rtol=0)


def test_rounding_keeps_the_codes_of_a_channel_far_from_zero() -> None:
    """Its mean is 300 deviations, as in some models' keys."""
    k = torch.randn(2, 400, 16, generator=torch.Generator().manual_seed(0))
    k[..., 3] += 300
    encoder = random_encoders(HashConfig(), SHAPE)[0]
    standard = Standard.of([k])
    expected = encoder.key_codes(standard(k)[None])
    standard.fold(encoder.key[0])
    round_weights(encoder)
    assert ((encoder.key_codes(k[None]) > 0) == (expected > 0)).float().mean() > 0.998


def test_heads_that_choose_in_turn_learn() -> None:
    encoder, losses = trained("listwise_each")
    assert encoder.config == HashConfig() and sum(losses[-10:]) < 0.9 * sum(losses[:10])
    share = caught(encoder)
    assert share["trained"] > share["random"] + 0.5 * (share["oracle"] - share["random"])


@pytest.mark.parametrize("recipe", [Listwise, ListwiseEach])
def test_loss_is_cross_entropy_of_the_groups_mass(recipe: type[Listwise]) -> None:
    q, k = structured(0, length=120)
    positions = torch.tensor([100, 110])
    weights, selectable = attention_weights(q[:, positions], k, positions), selectable_region(positions, 120, SINK, RECENT)
    encoder = random_encoders(HashConfig(), SHAPE)[0]
    training = recipe(encoder)
    loss = training(q[:, positions], k, weights, selectable, progress=0.5)
    expected = []
    for h in range(2):
        for i, position in enumerate(positions.tolist()):
            chosen = slice(SINK, position + 1 - RECENT)
            codes = encoder.query_codes(q[None])[0, 2 * h:2 * h + 2, position]
            masses = weights[2 * h:2 * h + 2, i, chosen]
            pairs = [(codes.sum(dim=0), masses.sum(dim=0))]
            for code, mass in zip(codes, masses, strict=True) if recipe is ListwiseEach else pairs:
                score = torch.tanh(2 * encoder.key_codes(k[None])[0, h]) @ code * training.log_scale[h].exp().squeeze()
                expected.append(-(mass / mass.sum() * score[chosen].log_softmax(dim=0)).sum())
    torch.testing.assert_close(loss, torch.stack(expected).mean())


# ------------------------------------------------------------------------------------------------------------- measuring

def test_attention_weights_and_region() -> None:
    q, k = structured(0, length=50)
    positions = torch.tensor([3, 49, 20])
    weights = attention_weights(q[:, positions], k, positions)
    for i, position in enumerate(positions.tolist()):
        expected = torch.softmax(k[1, :position + 1] @ q[3, position] / 4, dim=0)
        torch.testing.assert_close(weights[3, i, :position + 1], expected)
        assert not weights[3, i, position + 1:].any()
    region = selectable_region(positions, 50, SINK, RECENT)
    assert region.sum(dim=1).tolist() == [0, 50 - SINK - RECENT, 21 - SINK - RECENT]
    assert not region[1, SINK - 1] and region[1, SINK] and region[1, 50 - RECENT - 1] and not region[1, 50 - RECENT]


@pytest.mark.parametrize("share", ["kv", "query"])
def test_caught_mass_grows_with_the_budget_to_all(share: str) -> None:
    q, k = structured(5)
    positions = torch.tensor([350, 399])
    encoder = random_encoders(HashConfig(share=share), SHAPE)[0]
    shares = [attention_recall({"random": encoder}, q[:, positions], k, positions, budget, SINK, RECENT)
              for budget in (16, 100, 400)]
    for name in ("random", "oracle"):
        values = [s[name] for s in shares]
        assert values[0] < values[1] < values[2] and values[2] == pytest.approx(1, abs=1e-5)
    assert shares[0]["window"] == pytest.approx(shares[2]["window"])


def test_caught_curve_is_what_each_budget_selects() -> None:
    q, k = structured(5)
    positions = torch.tensor([250, 399])
    encoder = random_encoders(HashConfig(), SHAPE)[0]
    weights = attention_weights(q[:, positions], k, positions)
    budgets = [SINK + RECENT, 40, 41, 300]
    curve = recall_curve(encoder, weights, q[:, positions], k, positions, budgets, SINK, RECENT)
    planes = encoder.encode_queries(q[:, positions].transpose(0, 1))
    signatures = encoder.encode_keys(k[None]).expand(2, -1, -1, -1)
    for column, budget in zip(curve.T, budgets, strict=True):
        indices = select_tokens_reference(planes, signatures, (positions + 1).int(), budget, SINK, RECENT, shift=encoder.shift)
        for head in range(2):
            caught = [weights[2 * head + g, i, indices[i, head][indices[i, head] >= 0].long()].sum()
                      for i in range(2) for g in range(2)]
            torch.testing.assert_close(column[head], torch.stack(caught).mean())


# --------------------------------------------------------------------------------------------------------------- command

WORDS = "river stone cloud lamp table window garden winter letter captain silver morning forest answer bread".split()


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny random model with a byte tokenizer, and two texts to train on."""
    transformers = pytest.importorskip("transformers")
    folder = tmp_path_factory.mktemp("model")
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        hidden_size=64, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2, vocab_size=256,
        max_position_embeddings=1024, initializer_range=0.2)
    transformers.LlamaForCausalLM(config).save_pretrained(folder)
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    backend = Backend(models.BPE(vocab={letter: i for i, letter in enumerate(alphabet)}, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    backend.save(str(folder / "tokenizer.json"))
    rng = random.Random(0)
    for name in ("one.txt", "two.txt"):
        (folder / name).write_text(" ".join(" ".join(rng.choices(WORDS, k=8)).capitalize() + "." for _ in range(200)))
    return folder


def command(monkeypatch: pytest.MonkeyPatch, folder: Path, out: Path, *flags: str) -> None:
    monkeypatch.setattr(sys, "argv", [
        "train_hash.py", "--checkpoint_path", str(folder), "--data", str(folder / "*.txt"), "--out", str(out),
        "--device", "cpu", "--precision", "float32", "--context", "768", "--sequences", "4", "--needles", "0.5",
        "--steps", "20", "--sink", "4", "--recent", "8", *flags])
    run_command(train_hash.main)


def test_capture_is_what_the_model_computes(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = load_model(folder, "cpu", torch.float32)
    ids = torch.randint(0, 256, (100,))
    model.setup_caches(1, 100)
    with torch.inference_mode():
        model.prefill(ids)
    captured = list(train_hash.capture(model, [Sequence(ids[None]), Sequence(ids[None, :40])]))
    assert len(captured) == 2
    for layer, (queries, keys, values) in zip(model.layers, captured, strict=True):
        assert queries[0].shape == (4, 100, 16) and queries[1].shape == (4, 40, 16)
        torch.testing.assert_close(keys[0], layer.attention.cache.k[0])
        torch.testing.assert_close(values[0], layer.attention.cache.v[0])
        torch.testing.assert_close(keys[1], keys[0][:, :40], atol=1e-5, rtol=1e-4)


def test_command_writes_what_loads(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys) -> None:
    out = tmp_path / "new" / "signatures.safetensors"
    command(monkeypatch, folder, out)
    encoders, about = load_signatures(out, load_model(folder).fingerprint())
    assert len(encoders) == 2 and encoders[0].config == HashConfig()
    assert (about["recipe"], about["needles"], about["data"], about["seed"]) == ("listwise", 2, ["one.txt", "two.txt"], 0)
    for kind in ("books", "needles"):
        layers = about["held_out"]["mass"][kind]
        assert len(layers) == 2
        assert all(0 < share["window"] <= share["trained"] <= share["oracle"] + 1e-6 for share in layers)
    printed = [line.split() for line in capsys.readouterr().out.splitlines()]
    assert printed[1][:3] == ["layer", "books:", "window,"] and [line[0] for line in printed[2:5]] == ["0", "1", "mean"]


def test_what_is_judged_is_what_the_file_holds(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    judged = []
    judge = train_hash.judge_layer
    monkeypatch.setattr(train_hash, "judge_layer", lambda encoders, *rest: judged.append(
        copy.deepcopy(encoders["trained"])) or judge(encoders, *rest))
    out = tmp_path / "out.safetensors"
    command(monkeypatch, folder, out, "--depth", "2", "--hidden", "24", "--steps", "3", "--needles", "0")
    encoders, _ = load_signatures(out, load_model(folder).fingerprint())
    assert encoders[0].config == HashConfig(depth=2, hidden=24) and encoders[0].key[0].weight.shape == (2, 16, 24)
    for ours, held in zip(judged, encoders, strict=True):
        assert all(torch.equal(ours.state_dict()[name], tensor) for name, tensor in held.state_dict().items())


def test_calibration_leaves_signatures_as_they_are(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out, fingerprint = tmp_path / "out.safetensors", load_model(folder).fingerprint()
    save_signatures(out, random_encoders(HashConfig(bits=64), fingerprint, 5), fingerprint, {"recipe": "mine"})
    command(monkeypatch, folder, out, "--calibrate", "--context", "1024", "--needles", "0")
    encoders, about = load_signatures(out, fingerprint)
    for ours, theirs in zip(encoders, random_encoders(HashConfig(bits=64), fingerprint, 5), strict=True):
        assert torch.equal(ours.key[0].weight, theirs.key[0].weight.half().float())
    # 1024 / 16 leaves no second unit to choose, and 128 at 1/8 one
    assert about["recipe"] == "mine" and about["budgets"] == {} and len(about["held_out"]["mass"]["books"]) == 2


def test_layers_left_out_stay_random(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out = tmp_path / "signatures.safetensors"
    command(monkeypatch, folder, out, "--layers", "1", "--needles", "0", "--bits", "64")
    model = load_model(folder).fingerprint()
    encoders, about = load_signatures(out, model)
    untrained = random_encoders(HashConfig(bits=64), model, 0)
    assert torch.equal(encoders[0].key[0].weight, untrained[0].key[0].weight.half().float())
    assert not torch.equal(encoders[1].key[0].weight, untrained[1].key[0].weight.half().float())
    assert list(about["held_out"]["mass"]) == ["books"] and about["layers"] == [1]


def test_an_interrupted_run_goes_on_and_ends_the_same(folder: Path, tmp_path: Path, monkeypatch, capsys) -> None:
    whole, out = tmp_path / "whole.safetensors", tmp_path / "out.safetensors"
    partial = tmp_path / "out.safetensors.partial"
    flags = ("--steps", "3", "--needles", "0.25")
    command(monkeypatch, folder, whole, *flags)

    trained_layers = []
    train = train_hash.train_layer

    def interrupted(*args):
        trained_layers.append(args[-1])
        if len(trained_layers) == 2:
            raise KeyboardInterrupt
        return train(*args)

    monkeypatch.setattr(train_hash, "train_layer", interrupted)
    with pytest.raises(SystemExit):
        command(monkeypatch, folder, out, *flags)
    assert [path.name for path in partial.iterdir()] == ["0.safetensors"] and not out.exists()

    with pytest.raises(SystemExit) as stop:
        command(monkeypatch, folder, out, "--needles", "0.25", "--steps", "4", "--resume")
    assert stop.value.code == 2 and len(trained_layers) == 2
    assert "is of a run with steps 3, not 4; give the same arguments" in capsys.readouterr().err

    command(monkeypatch, folder, out, *flags, "--resume")
    assert trained_layers == [0, 1, 1] and not partial.exists()
    fingerprint = load_model(folder).fingerprint()
    (ours, about), (theirs, expected) = load_signatures(out, fingerprint), load_signatures(whole, fingerprint)
    for a, b in zip(ours, theirs, strict=True):
        assert all(torch.equal(a.state_dict()[name], tensor) for name, tensor in b.state_dict().items())
    assert [about[key] for key in ("held_out", "budgets")] == [expected[key] for key in ("held_out", "budgets")]


def test_without_resume_a_run_starts_again(folder: Path, tmp_path: Path) -> None:
    out = tmp_path / "out.safetensors"
    Partial(out, {"steps": 3}, resume=False).save(0, {"a": torch.ones(2)}, {"found": 1})
    tensors, found = Partial(out, {"steps": 3}, resume=True).load(0)
    assert tensors["a"].tolist() == [1, 1] and found == {"found": 1}
    assert Partial(out, {"steps": 3}, resume=True).load(1) is None
    (tmp_path / "out.safetensors.partial" / "1.safetensors").write_bytes(b"cut")
    with pytest.raises(UserError, match="is damaged"):
        Partial(out, {"steps": 3}, resume=True).load(1)
    assert Partial(out, {"steps": 3}, resume=False).load(0) is None


@pytest.mark.parametrize("flags, words", [
    (("--sequences", "0"), "--sequences must be at least 1"),
    (("--steps", "0"), "--steps must be at least 1"),
    (("--needles", "1.5"), "--needles must be 0 to 1"),
    (("--recent", "0"), "--recent at least 1"),
    (("--context", "100"), "too few tokens to choose among"),
    (("--context", "2048"), "over the model's 1024"),
    (("--layers", "2"), "--layers 2 is not a layer"),
    (("--bits", "48"), "signature bits must be"),
    (("--query_bits", "9"), "query_bits must be"),
    (("--depth", "4"), "encoder depth must be"),
    (("--hidden", "64"), "--hidden is the width of inner layers"),
    (("--depth", "2", "--hidden", "0"), "width of inner layers must be at least 1"),
    (("--data", "nowhere/*.txt"), "names no file"),
    (("--data", "."), "cannot read"),
    (("--seed", "-1"), "--seed must be 0 to"),
    (("--out", "."), "--out . cannot be written"),
    (("--out", "train_hash.py/x"), "--out train_hash.py/x cannot be written"),
    (("--sequences", "50", "--needles", "0"), "is too short"),
    (("--checkpoint_path", "nowhere"), "nowhere"),
    (("--device", "abacus"), "abacus"),
])
def test_mistakes_are_one_line(folder: Path, tmp_path: Path, monkeypatch, capsys, flags: tuple[str, ...], words: str) -> None:
    with pytest.raises(SystemExit) as stop:
        command(monkeypatch, folder, tmp_path / "out", *flags)
    assert stop.value.code == 2 and not (tmp_path / "out").exists()
    printed = capsys.readouterr().err.strip().splitlines()[-1]
    assert printed.startswith("error: ") and words in printed


def test_stretches_of_one_text_do_not_overlap() -> None:
    text = "".join(chr(0x4E00 + i) for i in range(4000))  # every character once
    sequences = train_hash.book_sequences({"a": text, "b": text[::-1]}, lambda s: [ord(c) for c in s], 6, 100, seed=0)
    starts = [int(sequence.ids[0, 0]) for sequence in sequences]
    assert len(set(starts)) == 6
    seen = torch.cat([sequence.ids[0] for sequence in sequences[::2]])
    assert len(seen.unique()) == len(seen) == 300


def test_every_pattern_must_name_a_file(tmp_path: Path) -> None:
    (tmp_path / "a[1].txt").write_text("one")  # a name that is no glob of itself
    (tmp_path / "b.txt").write_text("two")
    assert list(train_hash.read_texts([str(tmp_path / "a[1].txt"), str(tmp_path / "b*")]).values()) == ["one", "two"]
    with pytest.raises(UserError, match="c.txt names no file"):
        train_hash.read_texts([str(tmp_path / "b.txt"), str(tmp_path / "c.txt")])


def test_text_that_is_not_utf8(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(UserError, match="a.txt as UTF-8"):
        train_hash.read_texts([str(tmp_path / "a.txt")])
