"""Training of one layer: every recipe learns, a seed decides, captures are what the model computes."""
from pathlib import Path

import pytest
import torch
from captured import RECENT, SHAPE, SINK, structured
from conftest import gpu_only

from hashfast.common import UserError
from hashfast.hash_attention import HashConfig, HashEncoder
from hashfast.research.data import Sequence
from hashfast.research.recall import attention_recall
from hashfast.research.recipes import RECIPES, Listwise
from hashfast.research.training import (
    Standard,
    TrainConfig,
    attention_weights,
    capture,
    selectable_region,
    train_layer,
)
from hashfast.runtime.checkpoint import load_model
from hashfast.runtime.signatures import random_encoders, round_weights


def trained(recipe: str, seed: int = 0, steps: int = 80, device: str = "cpu", **config) -> tuple[HashEncoder, list[float]]:
    queries, keys = zip(*([x.to(device) for x in structured(s)] for s in range(3)), strict=True)
    shape = HashConfig(**{**vars(RECIPES[recipe].config), **config})
    encoder = random_encoders(shape, SHAPE)[0].to(device)
    return train_layer(encoder, list(queries), list(keys), [0, 0, 20], TrainConfig(recipe, steps, SINK, RECENT, seed))


def recall(encoder: HashEncoder) -> dict[str, float]:
    q, k = structured(99)
    positions = torch.arange(300, 400, 5)
    untrained = random_encoders(encoder.config, SHAPE, seed=1)[0]
    return attention_recall({"random": untrained, "trained": encoder}, q[:, positions], k, positions, 64, SINK, RECENT)


@pytest.mark.parametrize("config", [{}, {"bits": 64}, {"query_bits": 1}, {"depth": 2}, {"share": "query"}])
def test_listwise_learns(config: dict) -> None:
    encoder, losses = trained("listwise", **config)
    assert len(losses) == 80 and sum(losses[-10:]) < 0.9 * sum(losses[:10])
    share = recall(encoder)
    assert share["window"] < share["random"] < share["oracle"]
    assert share["trained"] > share["random"] + 0.5 * (share["oracle"] - share["random"])
    assert not any(parameter.requires_grad for parameter in encoder.parameters())


def test_16_bits_are_32_whose_upper_half_never_counts() -> None:
    encoder = trained("listwise", bits=16)[0]
    q, k = structured(99)
    signatures, planes = encoder.encode_keys(k[None]), encoder.encode_queries(q[None, :, 300])
    assert signatures.shape[-1] == planes.shape[-1] == 1 and planes.any()
    assert signatures.any() and not (signatures >> 16).any() and not (planes >> 16).any()
    share = recall(encoder)
    assert share["trained"] > share["random"] + 0.4 * (share["oracle"] - share["random"])
    with pytest.raises(UserError, match="16 signature bits need query_bits of at least 2"):
        HashConfig(bits=16, query_bits=1)


def test_hashattention_learns() -> None:
    encoder, losses = trained("hashattention", steps=40)
    assert encoder.config == HashConfig(query_bits=1, depth=3, share="query")
    assert sum(losses[-10:]) < 0.9 * sum(losses[:10])
    share = recall(encoder)
    assert share["trained"] > share["random"] + 0.5 * (share["oracle"] - share["random"])


def test_hata_learns_one_map_without_bias() -> None:
    encoder, losses = trained("hata", steps=40)
    assert encoder.config == HashConfig(bits=128, query_bits=1)
    assert sum(losses[-10:]) < 0.9 * sum(losses[:10])
    assert torch.equal(encoder.query[0].weight, encoder.key[0].weight.repeat_interleave(2, dim=0))
    assert not encoder.key[0].bias.any() and not encoder.query[0].bias.any()
    assert recall(encoder)["trained"] > 0.5


def test_seed_decides() -> None:
    first, again, other = (trained("listwise", seed, steps=5) for seed in (1, 1, 2))
    assert first[1] == again[1] != other[1]
    for name, tensor in first[0].state_dict().items():
        assert torch.equal(tensor, again[0].state_dict()[name])
    assert not torch.equal(first[0].key[0].weight, other[0].key[0].weight)


@gpu_only
@pytest.mark.parametrize("recipe", RECIPES)
def test_gpu_trains_as_the_cpu(recipe: str) -> None:
    here, there = trained(recipe, steps=10)[1], trained(recipe, steps=10, device="cuda")
    assert there[1] == pytest.approx(here, rel=1e-2)
    assert there[0].key[0].weight.is_cuda
    cpu, gpu = recall(trained(recipe)[0]), recall(trained(recipe, device="cuda")[0].cpu())
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


def test_loss_is_cross_entropy_of_the_groups_mass() -> None:
    q, k = structured(0, length=120)
    positions = torch.tensor([100, 110])
    weights, selectable = attention_weights(q[:, positions], k, positions), selectable_region(positions, 120, SINK, RECENT)
    encoder = random_encoders(HashConfig(), SHAPE)[0]
    training = Listwise(encoder)
    loss = training(q[:, positions], k, weights, selectable, progress=0.5)
    expected = []
    for h in range(2):
        for i, position in enumerate(positions.tolist()):
            chosen = slice(SINK, position + 1 - RECENT)
            code = encoder.query_codes(q[None])[0, 2 * h:2 * h + 2, position].sum(dim=0)
            mass = weights[2 * h:2 * h + 2, i, chosen].sum(dim=0)
            score = torch.tanh(2 * encoder.key_codes(k[None])[0, h]) @ code * training.log_scale[h].exp().squeeze()
            expected.append(-(mass / mass.sum() * score[chosen].log_softmax(dim=0)).sum())
    torch.testing.assert_close(loss, torch.stack(expected).mean())


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


def test_capture_is_what_the_model_computes(tiny_checkpoint: Path) -> None:
    model = load_model(tiny_checkpoint, "cpu", torch.float32)
    ids = torch.randint(0, 256, (60,))
    model.setup_caches(1, 60)
    with torch.inference_mode():
        model.prefill(ids)
    captured = list(capture(model, [Sequence(ids[None]), Sequence(ids[None, :40])]))
    assert len(captured) == 2
    for layer, (queries, keys, values) in zip(model.layers, captured, strict=True):
        assert queries[0].shape == (4, 60, 8) and queries[1].shape == (4, 40, 8)
        torch.testing.assert_close(keys[0], layer.attention.cache.k[0])
        torch.testing.assert_close(values[0], layer.attention.cache.v[0])
        torch.testing.assert_close(keys[1], keys[0][:, :40], atol=1e-5, rtol=1e-4)
