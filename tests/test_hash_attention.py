"""The references, which define the method, against independent few-line versions; signature files."""
import itertools
import json
from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file, save_file

from hashfast import hash_attention as ha
from hashfast.common import UserError
from hashfast.hash_attention import HashConfig
from hashfast.model import Fingerprint, RopeScaling
from hashfast.runtime import signatures as files

MODEL = Fingerprint(n_layer=2, n_head=6, n_kv_head=2, head_dim=16, rope_theta=1e4, vocab_size=50)
CONFIGS = [HashConfig(), HashConfig(bits=64, query_bits=2), HashConfig(bits=128, query_bits=1), HashConfig(query_bits=8),
           HashConfig(query_bits=1, depth=3, hidden=8, share="query")]


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)


def lengths(*values):
    return torch.tensor(values, dtype=torch.int32)


def test_popcount_counts_every_bit():
    x = torch.cat([torch.randint(-2 ** 31, 2 ** 31, (500,)), torch.tensor([0, -1, 2 ** 31 - 1, -2 ** 31])]).int()
    assert ha.popcount(x).tolist() == [(value & 0xFFFFFFFF).bit_count() for value in x.tolist()]


def test_packing_is_little_endian():
    bits = torch.zeros(64, dtype=torch.bool)
    bits[[0, 31, 33]] = True
    assert ha.pack_bits(bits).tolist() == [1 - 2 ** 31, 2]


@pytest.mark.parametrize("config", CONFIGS, ids=str)
def test_score_sums_the_weights_of_agreeing_bits(config):
    (encoder, _) = files.random_encoders(config, MODEL)
    q, k = torch.randn(3, 6, 16), torch.randn(3, 2, 40, 16)
    planes, signatures = encoder.encode_queries(q), encoder.encode_keys(k)
    Hs = encoder.n_signature_head
    assert planes.shape == (3, Hs, 1 + config.planes(6 // Hs), config.words)
    assert signatures.shape == (3, Hs, 40, config.words)
    weights = ha.query_weights(encoder.query_codes(q[:, :, None]).squeeze(2).unflatten(1, (Hs, 6 // Hs)), config)
    agree = (encoder.key_codes(k) > 0) == (weights > 0)[:, :, None]
    assert torch.equal(ha.score_reference(planes, signatures).long(), (agree * weights.abs()[:, :, None]).sum(-1))


def test_one_bit_queries_rank_by_summed_hamming_similarity():
    encoder = files.random_encoders(HashConfig(query_bits=1), MODEL)[0]
    q, k = torch.randn(1, 6, 16), torch.randn(1, 2, 40, 16)
    score = ha.score_reference(encoder.encode_queries(q), encoder.encode_keys(k))
    signs = encoder.query_codes(q[:, :, None]).squeeze(2).unflatten(1, (2, 3)) > 0  # [1, 2, 3, 32]
    similarity = (signs[:, :, :, None] == (encoder.key_codes(k) > 0)[:, :, None]).sum(dim=(2, 4))  # [1, 2, 40]
    difference = score - similarity  # a constant for each query
    assert (difference == difference[:, :, :1]).all()


def test_query_weights_scale_to_the_largest_code():
    codes = torch.tensor([[[[4.0, -2.0, 0.2, 0.0]]]])
    assert ha.query_weights(codes, HashConfig()).tolist() == [[[7, -4, 0, 0]]]  # 7.5 is clamped, -3.75 and 0.375 rounded
    assert ha.query_weights(torch.zeros(1, 1, 1, 4), HashConfig()).tolist() == [[[0, 0, 0, 0]]]
    assert ha.query_weights(codes, HashConfig(query_bits=1)).tolist() == [[[1, -1, 1, -1]]]


@pytest.mark.parametrize(("config", "group", "shift"), [
    (HashConfig(), 4, 0), (HashConfig(query_bits=1), 1, 0), (HashConfig(bits=64), 4, 1), (HashConfig(bits=128), 4, 2),
    (HashConfig(query_bits=8), 4, 4)])
def test_shift_keeps_the_upper_half_in_the_bins(config, group, shift):
    assert config.shift(group) == shift


def selected_by_sorting(score, total, length, budget, sink, recent, shift):
    """The definition, token by token."""
    if length <= budget:
        return set(range(length))
    always = set(range(sink)) | set(range(length - recent, length))
    bins = {i: min(max((int(score[i]) - total // 2) >> shift, 0), 63) for i in range(length) if i not in always}
    return always | set(sorted(bins, key=lambda i: (-bins[i], i))[:budget - len(always)])


@pytest.mark.parametrize(("sink", "recent", "budget"), [(4, 8, 20), (0, 0, 7), (4, 8, 12), (64, 128, 256)])
def test_selection_is_the_definition(sink, recent, budget):
    config = HashConfig()
    planes = ha.weight_planes(torch.randint(-7, 8, (4, 2, 32)), 3)
    signatures = torch.randint(-2 ** 31, 2 ** 31, (4, 2, 300, 1)).int()
    seq_lens = lengths(1, 13, 299, 300)
    indices = ha.select_tokens(planes, signatures, seq_lens, budget, sink, recent, shift=config.shift(3))
    assert indices.shape == (4, 2, budget) and indices.dtype == torch.int32
    score = ha.score_reference(planes, signatures)
    place = 2 ** torch.arange(3)
    totals = (ha.popcount(planes[:, :, 1:]).sum(-1) * place).sum(-1)
    for b, h in itertools.product(range(4), range(2)):
        expected = selected_by_sorting(score[b, h], int(totals[b, h]), int(seq_lens[b]), budget, sink, recent, 0)
        got = [i for i in indices[b, h].tolist() if i >= 0]
        assert len(got) == len(set(got)) and set(got) == expected


def test_budgets_per_head_and_ties():
    planes = torch.zeros(1, 2, 4, 1, dtype=torch.int32)  # all scores equal: position decides
    indices = ha.select_tokens(planes, torch.zeros(1, 2, 50, 1, dtype=torch.int32), lengths(40), lengths(6, 10), 2, 3, K=12)
    assert sorted(indices[0, 0].tolist()) == [-1] * 6 + [0, 1, 2, 37, 38, 39]
    assert sorted(indices[0, 1].tolist()) == [-1] * 2 + [0, 1, 2, 3, 4, 5, 6, 37, 38, 39]
    with pytest.raises(ValueError, match="K is required"):
        ha.select_tokens(planes, torch.zeros(1, 2, 50, 1, dtype=torch.int32), lengths(40), lengths(6, 10), 2, 3)


@pytest.mark.parametrize("Hs", [2, 6])
def test_sparse_attention_is_softmax_over_the_selected(Hs):
    q, k, v = torch.randn(3, 6, 16), torch.randn(3, 2, 30, 16), torch.randn(3, 2, 30, 16)
    indices = torch.stack([torch.stack([torch.randperm(30)[:9] for _ in range(Hs)]) for _ in range(3)]).int()
    indices[:, :, 7:] = -1
    indices[0, 0] = -1
    poisoned = [x.clone() for x in (k, v)]
    used = torch.zeros(3, 2, 30, dtype=torch.bool)
    for b, h, i in itertools.product(range(3), range(Hs), range(7)):
        if indices[b, h, i] >= 0:
            used[b, h // (Hs // 2), indices[b, h, i]] = True
    for cache in poisoned:
        cache[~used] = float("nan")
    out, lse = ha.sparse_attention(q, *poisoned, indices, scale=0.3)
    for b, head in itertools.product(range(3), range(6)):
        rows = [i for i in indices[b, head // (6 // Hs)].tolist() if i >= 0]
        if not rows:
            assert (out[b, head] == 0).all() and lse[b, head] == float("-inf")
            continue
        scores = k[b, head // 3, rows] @ q[b, head] * 0.3
        torch.testing.assert_close(out[b, head], scores.softmax(0) @ v[b, head // 3, rows])
        torch.testing.assert_close(lse[b, head], scores.logsumexp(0))


def test_dense_attention_is_causal_at_each_length():
    q, k, v = torch.randn(2, 3, 6, 16), torch.randn(2, 2, 30, 16), torch.randn(2, 2, 30, 16)
    seq_lens = lengths(3, 20)
    for b in range(2):
        k[b, :, seq_lens[b]:] = v[b, :, seq_lens[b]:] = float("nan")
    out, lse = ha.dense_attention(q, k, v, seq_lens)
    for b, t, head in itertools.product(range(2), range(3), range(6)):
        end = int(seq_lens[b]) - 2 + t
        scores = k[b, head // 3, :end] @ q[b, t, head] / 4
        torch.testing.assert_close(out[b, t, head], scores.softmax(0) @ v[b, head // 3, :end])
        torch.testing.assert_close(lse[b, t, head], scores.logsumexp(0))


@pytest.mark.parametrize("config", CONFIGS, ids=str)
def test_signatures_survive_their_file(config, tmp_path):
    encoders = files.random_encoders(config, MODEL, seed=3)
    files.save_signatures(tmp_path / "s.safetensors", encoders, MODEL, {"recipe": "none"})
    loaded, about = files.load_signatures(tmp_path / "s.safetensors", MODEL)
    assert about["recipe"] == "none" and loaded[0].config == config
    for encoder, again in zip(encoders, loaded, strict=True):
        files.round_weights(encoder)
        for name, tensor in encoder.state_dict().items():
            assert torch.equal(tensor, again.state_dict()[name])
    weight, tensors = encoders[0].key[0].weight, load_file(tmp_path / "s.safetensors")
    assert weight.dtype == torch.float32 and torch.equal(weight, weight.half().float())
    assert tensors["layers.0.key.0.weight"].dtype == torch.float16
    assert list(tmp_path.iterdir()) == [tmp_path / "s.safetensors"]


def test_foreign_or_broken_signature_files_are_refused(tmp_path):
    path = tmp_path / "s.safetensors"
    with pytest.raises(UserError, match="no signatures file"):
        files.load_signatures(path, MODEL)
    path.write_bytes(b"junk")
    with pytest.raises(UserError, match="not a hashfast signatures file"):
        files.load_signatures(path, MODEL)
    save_file({"x": torch.zeros(1)}, path)
    with pytest.raises(UserError, match="not a hashfast signatures file"):
        files.load_signatures(path, MODEL)
    files.save_signatures(path, files.random_encoders(HashConfig(), MODEL), MODEL, {})
    other = Fingerprint(2, 6, 2, 16, 5e5, 50)
    with pytest.raises(UserError, match="another model: rope_theta"):
        files.load_signatures(path, other)
    tensors = load_file(path)
    del tensors["layers.1.key.0.bias"]
    save_file(tensors, path, metadata={"hashfast": json.dumps({"config": {}, "model": vars(MODEL)})})
    with pytest.raises(UserError, match=r"layers\.1\.key\.0\.bias is missing"):
        files.load_signatures(path, MODEL)


def test_signatures_of_another_model_of_the_same_shape_warn(tmp_path, capsys):
    path, yarn = tmp_path / "s.safetensors", RopeScaling("yarn", 4.0, 64)
    here = replace(MODEL, norms="aa", rope_scaling=yarn)
    encoders = files.random_encoders(HashConfig(), MODEL)
    files.save_signatures(path, encoders, here, {})
    for silent in (here, replace(here, norms=None)):  # a model without weights has no hash
        files.load_signatures(path, silent)
        assert capsys.readouterr().err == ""
    for field, value in (("norms", "bb"), ("rope_scaling", None), ("rope_scaling", replace(yarn, factor=2.0))):
        files.load_signatures(path, replace(here, **{field: value}))
        said = capsys.readouterr().err
        assert said.startswith(f"warning: {path} is of another model of this shape: {field} is ") and said.count("\n") == 1
    # a file from before they were stored
    about = {"config": {}, "model": {name: value for name, value in vars(MODEL).items() if value is not None}}
    save_file(load_file(path), path, metadata={"hashfast": json.dumps(about)})
    files.load_signatures(path, here)
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize("wrong", [{"bits": 48}, {"query_bits": 0}, {"query_bits": 9}, {"depth": 4}, {"hidden": 0},
                                   {"share": "layer"}])
def test_unknown_shapes_of_signatures_are_refused(wrong):
    with pytest.raises(UserError):
        HashConfig(**wrong)
