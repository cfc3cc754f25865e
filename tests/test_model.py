"""The model against Hugging Face transformers, and decode steps against prefill."""
from dataclasses import replace

import pytest
import torch

from hashfast.common import UserError
from hashfast.hash_attention import HashConfig, select_tokens
from hashfast.model import SparseSettings
from hashfast.ops.quant_linear import dequantize_int8
from hashfast.runtime.checkpoint import load_model
from hashfast.runtime.decode import Decoder, decode, prefill
from hashfast.runtime.memory import bytes_per_step, tokens_read
from hashfast.runtime.quantize import quantize_folder
from hashfast.runtime.sampling import Sampling
from hashfast.runtime.signatures import random_encoders

transformers = pytest.importorskip("transformers")

SHAPE = dict(hidden_size=96, intermediate_size=128, num_hidden_layers=3, num_attention_heads=6, num_key_value_heads=2,
             vocab_size=120, max_position_embeddings=256, initializer_range=0.1)
LLAMA3 = dict(rope_type="llama3", factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0, original_max_position_embeddings=32,
              rope_theta=10000.0)
YARN = dict(rope_type="yarn", factor=4.0, original_max_position_embeddings=64, rope_theta=10000.0)
LINEAR = dict(rope_type="linear", factor=2.0, rope_theta=10000.0)
CONFIGS = {
    "llama": lambda: transformers.LlamaConfig(**SHAPE),
    "llama-tied": lambda: transformers.LlamaConfig(**SHAPE, tie_word_embeddings=True),
    "llama-llama3": lambda: transformers.LlamaConfig(**SHAPE, rope_parameters=LLAMA3),
    "llama-yarn": lambda: transformers.LlamaConfig(**SHAPE, rope_parameters=YARN),
    "llama-linear": lambda: transformers.LlamaConfig(**SHAPE, rope_parameters=LINEAR),
    "mistral": lambda: transformers.MistralConfig(**SHAPE, head_dim=32, sliding_window=None),
    "llama-biased": lambda: transformers.LlamaConfig(**SHAPE, attention_bias=True),
    "qwen2": lambda: transformers.Qwen2Config(**SHAPE),
    "qwen3": lambda: transformers.Qwen3Config(**SHAPE, head_dim=32, attention_bias=True),
}


@pytest.fixture(params=CONFIGS)
def pair(request, tmp_path):
    """A tiny random model of transformers and ours, loaded from what it saved."""
    torch.manual_seed(0)
    theirs = transformers.AutoModelForCausalLM.from_config(CONFIGS[request.param]()).float().eval()
    for name, parameter in theirs.named_parameters():
        if name.endswith(("bias", "q_norm.weight", "k_norm.weight")):
            parameter.data.normal_(mean=name.endswith("weight"))
    theirs.save_pretrained(tmp_path)
    return theirs, load_model(tmp_path, "cpu", torch.float32).eval()


@torch.inference_mode()
def test_logits_equal_transformers(pair):
    theirs, ours = pair
    ids = torch.randint(0, 120, (150,))
    expected = theirs(ids[None]).logits[0]
    ours.setup_caches(2, 160)
    assert (ours.prefill(ids[:70], row=1) - expected[69]).abs().max() < 1e-4
    assert (ours.prefill(ids[70:100], row=1, start=70) - expected[99]).abs().max() < 1e-4
    ours.prefill(ids[:90], row=0)
    for step in range(20):  # two sequences of different lengths in one decode step
        tokens = torch.stack([ids[90 + step], ids[100 + step]])[:, None]
        logits = ours(tokens, torch.tensor([91 + step, 101 + step], dtype=torch.int32))[:, 0]
        assert (logits[0] - expected[90 + step]).abs().max() < 1e-4
        assert (logits[1] - expected[100 + step]).abs().max() < 1e-4


@torch.inference_mode()
def test_several_tokens_in_one_step_equal_transformers(pair):
    theirs, ours = pair
    ids = torch.randint(0, 120, (40,))
    ours.setup_caches(1, 64)
    ours.prefill(ids[:30])
    logits = ours(ids[None, 30:], torch.tensor([40], dtype=torch.int32))[0]
    assert (logits - theirs(ids[None]).logits[0, 30:]).abs().max() < 1e-4


def greedy(model, ids, count, encoders=None, sparse=None):
    model.setup_caches(1, len(ids) + count, encoders, sparse)
    decoder = Decoder(model, 1, Sampling(temperature=0), compiled=False)
    with torch.inference_mode():
        first = prefill(model, ids, 1).argmax()[None]
        return [row[0] for row in decode(decoder, first, len(ids), count)]


def test_greedy_tokens_equal_transformers(pair):
    theirs, ours = pair
    ids = torch.randint(0, 120, (40,))
    theirs.generation_config.eos_token_id = None
    expected = theirs.generate(ids[None], attention_mask=torch.ones_like(ids[None]), max_new_tokens=64, do_sample=False)
    assert greedy(ours, ids, 64) == expected[0, 40:].tolist()


@pytest.mark.parametrize(("pair", "share"), [("llama", "query"), ("llama-yarn", "kv"), ("llama-biased", "kv"),
                                             ("mistral", "kv"), ("qwen2", "kv"), ("qwen3", "kv")], indirect=["pair"])
def test_a_budget_of_the_whole_cache_gives_dense_tokens(pair, share):
    ids = torch.randint(0, 120, (40,))
    ours = pair[1]
    encoders = random_encoders(HashConfig(share=share), ours.fingerprint())
    assert greedy(ours, ids, 48, encoders, SparseSettings(88, sink=4, recent=8)) == greedy(ours, ids, 48)


@pytest.mark.parametrize("pair", ["llama", "mistral", "qwen2"], indirect=True)
def test_a_small_budget_reads_less_and_changes_logits(pair):
    ours = pair[1]
    ids = torch.randint(0, 120, (120,))
    encoders = random_encoders(HashConfig(), ours.fingerprint())
    lengths = torch.tensor([121], dtype=torch.int32)
    with torch.inference_mode():
        ours.setup_caches(1, 128, encoders, SparseSettings(32, sink=4, recent=8))
        ours.prefill(ids)
        sparse = ours(torch.tensor([[5]]), lengths)
        ours.set_sparse(None)
        dense = ours(torch.tensor([[5]]), lengths)
        ours.set_sparse(SparseSettings(32, sink=4, recent=8, dense_layers=0))
        again = ours(torch.tensor([[5]]), lengths)
    assert torch.equal(sparse, again)
    assert not torch.allclose(sparse, dense)


@pytest.mark.parametrize("pair", ["llama", "llama-biased", "mistral", "qwen2", "qwen3"], indirect=True)
@torch.inference_mode()
def test_int8_rounds_the_weights_and_nothing_else(pair, tmp_path):
    """Logits are those of the float model with the weights that the integers stand for, and near the float model's own."""
    ours = pair[1]
    quantize_folder(tmp_path, tmp_path / "int8", "cpu")
    rounded = load_model(tmp_path / "int8", "cpu", torch.float32)
    ids = torch.randint(0, 120, (40,))

    def logits(model):
        """Of a prompt's last token and of a decode step."""
        model.setup_caches(1, 40)
        return torch.stack([model.prefill(ids[:39]), model(ids[None, 39:], torch.tensor([40], dtype=torch.int32))[0, 0]])

    got, unrounded = logits(rounded), logits(ours)
    assert (got - unrounded).norm() < 0.1 * unrounded.norm()
    for name, layer in ours.named_modules():
        if isinstance(layer, torch.nn.Linear):
            int8 = rounded.get_submodule(name)
            layer.weight.copy_(dequantize_int8(int8.weight, int8.scale))
    torch.testing.assert_close(got, logits(ours), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("pair", ["qwen3"], indirect=True)
def test_one_compilation_serves_every_layer_length_and_prompt(pair):
    """No graph break (fullgraph) and no recompilation over 200 steps and two prompts of different lengths, with biases,
    norms of q and k, and uneven budgets."""
    ours = pair[1]
    settings = SparseSettings(32, sink=4, recent=8, budgets=((16, 32), (20, 14), (30, 30)))
    hashed = (random_encoders(HashConfig(), ours.fingerprint()), settings)
    torch._dynamo.reset()
    counters = torch._dynamo.utils.counters
    counters.clear()
    ours.setup_caches(1, 256, *hashed)
    decoder = Decoder(ours, 1, Sampling(temperature=0), compiled=True)
    decoder.prepare()
    assert counters["stats"]["unique_graphs"] == 3  # the stem, one block for all layers, the head
    prompts = [(torch.randint(0, 120, (40,)), 201), (torch.randint(0, 120, (11,)), 30)]
    tokens = []
    for ids, count in prompts:
        first = prefill(ours, ids, 1).argmax()[None]
        tokens.append([row[0] for row in decode(decoder, first, len(ids), count)])
    assert counters["stats"]["unique_graphs"] == 3
    assert not counters["graph_break"]
    assert tokens == [greedy(ours, ids, count, *hashed) for ids, count in prompts]


@pytest.mark.parametrize("pair", ["llama"], indirect=True)
def test_every_layer_and_head_reads_its_own_budget(pair):
    ours = pair[1]
    ids = torch.randint(0, 120, (100,))
    budgets = ((16, 40), (20, 14), (101, 12))
    encoders = random_encoders(HashConfig(), ours.fingerprint())
    settings = SparseSettings(101, sink=4, recent=8, budgets=budgets)
    ours.setup_caches(1, 128, encoders, settings)
    with torch.inference_mode():
        ours.prefill(ids)
        ours(torch.tensor([[5]]), torch.tensor([101], dtype=torch.int32))
    seen = []
    for layer in ours.layers:
        attention = layer.attention
        assert attention.budgets.dtype == torch.int32
        q = torch.randn(1, 6, 16)
        indices = select_tokens(attention.encoder.encode_queries(q), attention.cache.signatures,
                                torch.tensor([101], dtype=torch.int32), attention.budgets, 4, 8, K=attention.sparse.budget)
        assert indices.shape == (1, 2, 101)
        seen.append(tuple((indices[0] >= 0).sum(dim=-1).tolist()))
    assert tuple(seen) == budgets
    assert tokens_read(settings, ours, 1000) == pytest.approx((16 + 40 + 20 + 14 + 101 + 12) / 6)
    assert tokens_read(settings, ours, 30) == pytest.approx((16 + 30 + 20 + 14 + 30 + 12) / 6)
    assert tokens_read(replace(settings, dense_layers=2), ours, 1000) == pytest.approx((2000 + 113 / 2) / 3)
    ours.set_sparse(SparseSettings(32, sink=4, recent=8))
    assert all(layer.attention.budgets is None for layer in ours.layers)


@pytest.mark.parametrize("pair", ["llama"], indirect=True)
def test_settings_decide_which_layers_are_sparse(pair):
    """Those that the caches were made for and those that come later, an equal setting without new tensors."""
    ours = pair[1]
    settings = SparseSettings(32, sink=4, recent=8, dense_layers=1, budgets=((1, 1), (32, 16), (12, 20)))
    ours.setup_caches(1, 64, random_encoders(HashConfig(), ours.fingerprint()), SparseSettings(32, sink=4, recent=8))
    attentions = [layer.attention for layer in ours.layers]
    assert all(attention.encoder is not None and attention.sparse is not None for attention in attentions)
    ours.set_sparse(settings)
    assert [attention.sparse for attention in attentions] == [None, settings, settings]
    assert bytes_per_step(ours, None, 50, 1) - bytes_per_step(ours, settings, 50, 1) == 256 * (50 - 24 + 50 - 16)  # K and V
    before = [attention.budgets for attention in attentions]
    ours.set_sparse(None)
    ours.set_sparse(replace(settings))  # a captured step reads the tensors
    assert all(attention.budgets is budgets for attention, budgets in zip(attentions, before, strict=True))


def test_budgets_that_selection_cannot_keep_are_refused():
    SparseSettings(8, sink=4, recent=8)  # the cache is shorter than sink and recent
    SparseSettings(8, sink=4, recent=8, budgets=((8, 8),))
    for wrong in ({"budget": 0}, {"budgets": ((16, 11),)}, {"budgets": ((16, 0),)}, {"budgets": ((33, 16),)}):
        with pytest.raises(UserError):
            SparseSettings(**{"budget": 32, "sink": 4, "recent": 8, **wrong})


@pytest.mark.parametrize("pair", ["llama"], indirect=True)
def test_selectors_observe_prompts_and_go_with_the_caches(pair):
    class Observer(torch.nn.Module):
        def observe(self, q, k, row, start):
            seen.append((q.shape, k.shape, row, start))

    ours, seen, attention = pair[1], [], pair[1].layers[1].attention
    ours.setup_caches(2, 64)
    attention.selector = Observer()
    with torch.inference_mode():
        ours.prefill(torch.arange(20), row=1)
        ours.prefill(torch.arange(9), row=1, start=20)
    assert seen == [((1, 20, 6, 16), (1, 2, 20, 16), 1, 0), ((1, 9, 6, 16), (1, 2, 9, 16), 1, 20)]
    ours.setup_caches(1, 64)
    assert attention.selector is None


@pytest.mark.parametrize("pair", ["llama-yarn"], indirect=True)
def test_fingerprint(pair, tmp_path):
    """The hash of the norms is of their values in bfloat16, whatever the weights' type; a random norm changes it."""
    theirs, ours = pair
    print_ = ours.fingerprint()
    assert print_ == load_model(tmp_path, "cpu", torch.bfloat16).fingerprint() and print_.rope_scaling.kind == "yarn"
    assert load_model(tmp_path, "meta").fingerprint() == replace(print_, norms=None)
    quantize_folder(tmp_path, tmp_path / "int8", "cpu")
    assert load_model(tmp_path / "int8", "cpu").fingerprint() == print_
    ours.layers[2].ffn_norm.weight[5] = 1.5
    assert ours.fingerprint() == replace(print_, norms=ours.hash_norms()) != print_


@pytest.mark.parametrize("pair", ["llama"], indirect=True)
def test_equal_budgets_of_all_heads_change_nothing(pair):
    ours = pair[1]
    ids = torch.randint(0, 120, (100,))
    encoders = random_encoders(HashConfig(), ours.fingerprint())
    even = greedy(ours, ids, 20, encoders, SparseSettings(24, sink=4, recent=8))
    assert greedy(ours, ids, 20, encoders, SparseSettings(40, sink=4, recent=8, budgets=((24, 24),) * 3)) == even
    assert greedy(ours, ids, 20, encoders, SparseSettings(40, sink=4, recent=8, budgets=((12, 40),) * 3)) != even
