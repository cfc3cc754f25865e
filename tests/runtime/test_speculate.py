"""Speculative decoding: the tokens and the distribution of dense decoding, whatever is drafted."""
import dataclasses
import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from conftest import COMPILED, GPU, Ran, gpu_only
from torch import Tensor

from hashfast.hash_attention import HashConfig
from hashfast.model import ModelArgs, SparseSettings, Transformer
from hashfast.ops.quant_linear import Int8Linear, quantize_int8, swap_linears
from hashfast.runtime.checkpoint import load_model
from hashfast.runtime.decode import Decoder, decode, prefill
from hashfast.runtime.sampling import Sampling, probabilities, sample
from hashfast.runtime.signatures import random_encoders
from hashfast.runtime.speculate import Speculator, accept_greedy, accept_sampled, leading

ARGS = ModelArgs(n_layer=3, dim=48, n_head=6, n_kv_head=2, head_dim=16, intermediate_size=64, vocab_size=90, norm_eps=1e-5,
                 rope_theta=1e4, max_position=512, qkv_bias=True)
SMALLER = ModelArgs(n_layer=1, dim=32, n_head=2, n_kv_head=1, head_dim=16, intermediate_size=32, vocab_size=90, norm_eps=1e-5,
                    rope_theta=1e4, max_position=512)
SETTINGS = SparseSettings(24, sink=4, recent=8, dense_layers=1)
GREEDY = Sampling(temperature=0)
PROMPTS = [[7], list(range(20, 60)), [3, 1, 4, 1, 5, 9, 2, 6] * 3]
LENGTH = 128


def random_transformer(args: ModelArgs, seed: int) -> Transformer:
    torch.manual_seed(seed)
    model = Transformer(args).eval().requires_grad_(False)
    for parameter in model.parameters():
        parameter.mul_(2)  # distinct logits, so that rounding does not decide a greedy token
    return model


@pytest.fixture(scope="module")
def model() -> Transformer:
    return random_transformer(ARGS, 0)


@pytest.fixture(scope="module")
def noisy(model: Transformer) -> Transformer:
    """A draft model that often agrees with `model`: the same but for some noise."""
    torch.manual_seed(1)
    noisy = random_transformer(ARGS, 0)
    for parameter in noisy.parameters():
        parameter.add_(0.02 * parameter.std(correction=0) * torch.randn_like(parameter))
    return noisy


@torch.inference_mode()
def first_tokens(model: Transformer, prompts: list[list[int]], sampling: Sampling = GREEDY) -> Tensor:
    device = model.tok_embeddings.weight.device
    logits = [prefill(model, torch.tensor(ids, device=device), 1, row=row) for row, ids in enumerate(prompts)]
    return sample(torch.stack(logits), sampling)


def until_end(tokens: list[int], stop_ids: tuple) -> list[int]:
    at = next((i for i, token in enumerate(tokens) if token in stop_ids), len(tokens))
    return tokens[:at + 1]


def dense_greedy(model: Transformer, ids: list[int], count: int) -> list[int]:
    model.setup_caches(1, LENGTH)
    decoder = Decoder(model, 1, GREEDY, compiled=False)
    return [row[0] for row in decode(decoder, first_tokens(model, [ids]), len(ids), count)]


def speculator_for(model: Transformer, drafter: str, batch: int, k: int, noisy: Transformer | None = None,
                   stop_ids: tuple = (), sampling: Sampling = GREEDY, compiled: bool = False,
                   settings: SparseSettings = SETTINGS) -> Speculator:
    """Of `model` with caches of LENGTH, drafting as named: self, draft, draft-hash, smaller (which is seldom right)."""
    draft = {"self": model, "draft": noisy, "draft-hash": noisy, "smaller": random_transformer(SMALLER, 2)}[drafter]
    hashed = drafter in ("self", "draft-hash")
    encoders = random_encoders(HashConfig(), draft.fingerprint()) if hashed else None
    model.setup_caches(batch, LENGTH + k)
    draft.setup_caches(batch, LENGTH + k, encoders, settings if hashed else None)
    decoder = Decoder(model, batch, sampling, compiled, stop_ids)
    speculator = Speculator(decoder, draft, k, settings if hashed else None, compiled)
    speculator.prepare()
    return speculator


def run(speculator: Speculator, prompts: list[list[int]], count: int) -> list[list[int]]:
    """New tokens of every prompt; checks that `emit` hears them too, each sequence's last one as such."""
    model, heard = speculator.target.model, [[] for _ in prompts]
    first = first_tokens(model, prompts)
    speculator.read_prompts(prompts, 0, 16)
    tokens, steps = speculator.decode_all(prompts, first, count, lambda i, token, last: heard[i].append((token, last)))
    assert heard == [[(token, j == len(row) - 1) for j, token in enumerate(row)] for row in tokens]
    assert steps == max(map(len, tokens)) - 1
    return tokens


# --------------------------------------------------------------------------------------------------------------- greedy

DRAFTERS = ["self", "draft", "draft-hash", "smaller"]
RUNS = {f"{name}-{drafter}-{k}": (prompts, drafter, k) for name, prompts in (("single", PROMPTS[1:2]), ("ragged", PROMPTS))
        for drafter in DRAFTERS for k in (1, 3, 5)}
THINNED = ("ragged-self-5", "ragged-draft-3", "ragged-draft-hash-3", "ragged-smaller-1", "single-self-3", "single-draft-5",
           "single-draft-hash-1")


@pytest.mark.parametrize(("prompts", "drafter", "k"), [RUNS[name] for name in (RUNS if GPU else THINNED)])
def test_greedy_tokens_are_those_of_dense_decoding(model, noisy, prompts, drafter, k):
    expected = [dense_greedy(model, ids, 50) for ids in prompts]
    speculator = speculator_for(model, drafter, len(prompts), k, noisy)
    assert run(speculator, prompts, 50) == expected
    report = speculator.report()
    assert report["rounds"] == speculator.rounds < 50 + len(prompts)
    assert 0 <= report["accepted_per_verify"] < k
    if drafter != "smaller":  # drafts are accepted and refused, or this shows little
        assert report["accepted_histogram"][0] > 0 < report["accepted_histogram"][k]
    # all tokens but the first of each are accounted for; the last round of a sequence may have dropped some
    given = sum((n + 1) * times for n, times in enumerate(report["accepted_histogram"]))
    assert 49 * len(prompts) <= given <= (49 + k) * len(prompts)


def test_quantised_weights() -> None:
    model = random_transformer(dataclasses.replace(ARGS, dim=64), 0)
    swapped = Transformer(model.args).eval().requires_grad_(False)
    swap_linears(swapped)
    for name, layer in swapped.named_modules():
        if isinstance(layer, Int8Linear):
            linear = model.get_submodule(name)
            for part, value in zip(("weight", "scale"), quantize_int8(linear.weight), strict=True):
                getattr(layer, part).copy_(value)
            if linear.bias is not None:
                layer.bias.copy_(linear.bias)
    expected = [dense_greedy(swapped, ids, 30) for ids in PROMPTS]
    assert run(speculator_for(swapped, "self", len(PROMPTS), 3), PROMPTS, 30) == expected


@pytest.mark.parametrize("k", [1, 5])
@pytest.mark.parametrize("drafter", ["self", "draft"])
def test_sequences_end_in_different_rounds(model, noisy, drafter, k):
    free = [dense_greedy(model, ids, 50) for ids in PROMPTS]
    stop_ids = (free[0][6], free[1][13])
    expected = [until_end(tokens, stop_ids) for tokens in free]
    assert len(set(map(len, expected))) == 3 and max(map(len, expected)) > 13
    speculator = speculator_for(model, drafter, 3, k, noisy, stop_ids)
    assert run(speculator, PROMPTS, 50) == expected
    # a second run on the same caches: nothing of the first is left over
    assert run(speculator, PROMPTS[::-1], 50) == expected[::-1]
    ends = [len(ids) + len(tokens) - 1 for ids, tokens in zip(PROMPTS[::-1], expected[::-1], strict=True)]
    assert speculator.seq_lens.tolist() == ends


def test_a_first_token_that_ends_the_sequence(model):
    free = [dense_greedy(model, ids, 20) for ids in PROMPTS]
    stop_ids = (free[1][0],)
    speculator = speculator_for(model, "self", 3, 3, stop_ids=stop_ids)
    assert run(speculator, PROMPTS, 20) == [until_end(tokens, stop_ids) for tokens in free]
    assert run(speculator, PROMPTS, 1) == [tokens[:1] for tokens in free] and not speculator.left.any()


@pytest.mark.parametrize("count", [2, 3, 4, 5, 6])
def test_any_number_of_tokens(model, count):
    """The cache is no longer than it must be: prompt, new tokens and k."""
    ids = PROMPTS[1]
    k = 3
    speculator = speculator_for(model, "self", 1, k)
    model.setup_caches(1, len(ids) + count + k - 1, random_encoders(HashConfig(), model.fingerprint()), SETTINGS)
    model.set_sparse(None)
    tokens = run(speculator, [ids], count)
    assert tokens == [dense_greedy(model, ids, count)]


# ---------------------------------------------------------------------------------------------------------------- cache

def bits(signatures: Tensor) -> Tensor:
    return (signatures[..., None] >> torch.arange(32)) & 1


@torch.inference_mode()
def test_verified_tokens_leave_the_keys_and_signatures_of_dense_decoding(model):
    """Not those that the drafts wrote, which this budget makes differ; nor are the poisoned rows past the end read."""
    speculator = speculator_for(model, "self", 3, 3)
    first = first_tokens(model, PROMPTS)
    for layer in model.layers:
        cache = layer.attention.cache
        for row, ids in enumerate(PROMPTS):
            cache.k[row, :, len(ids):], cache.v[row, :, len(ids):] = float("nan"), float("nan")
            if cache.signatures is not None:
                cache.signatures[row, :, len(ids):] = -1
    tokens, _ = speculator.decode_all(PROMPTS, first, 40, lambda *new: None)
    lengths = speculator.seq_lens.tolist()
    assert 0 < speculator.report()["accepted_per_verify"] < 3
    ours = [layer.attention.cache for layer in model.layers]
    encoders = [layer.attention.encoder for layer in model.layers]
    drafted_otherwise = 0
    for row, (ids, new, length) in enumerate(zip(PROMPTS, tokens, lengths, strict=True)):
        model.setup_caches(1, LENGTH)
        prefill(model, torch.tensor(ids + new[:-1]), 1)
        assert length == len(ids) + 39
        for layer, cache, encoder in zip(model.layers, ours, encoders, strict=True):
            for name in ("k", "v"):
                dense = getattr(layer.attention.cache, name)[0, :, :length]
                torch.testing.assert_close(getattr(cache, name)[row, :, :length], dense, rtol=1e-4, atol=1e-4)
            if encoder is None:
                continue
            codes = encoder.key_codes(cache.k[row:row + 1, :, :length])[0]
            clear = codes.abs() > 1e-4
            assert torch.equal(bits(cache.signatures[row, :, :length]).flatten(2)[clear], (codes > 0).int()[clear])
            drafted_otherwise += 1
    assert drafted_otherwise == 2 * 3  # layers with signatures, sequences


@torch.inference_mode()
def test_drafting_writes_other_signatures(model):
    """What the test above would find if verifying left the drafts' signatures in place."""
    speculator = speculator_for(model, "self", 1, 5)
    ids = PROMPTS[1]
    speculator.start([ids], first_tokens(model, [ids]), torch.tensor([50]))
    last = model.layers[-1].attention.cache
    drafted, _ = speculator.draft_tokens()
    rows = slice(len(ids) + 1, len(ids) + 5)
    before = last.signatures[:, :, rows].clone()
    speculator.verify(drafted)
    assert not torch.equal(before, last.signatures[:, :, rows])


@torch.inference_mode()
def test_a_step_of_several_tokens_is_dense_and_one_token_is_sparse(model):
    ids = torch.tensor(PROMPTS[1])
    encoders = random_encoders(HashConfig(), model.fingerprint())
    logits = {}
    for sparse in (None, SETTINGS):
        for count in (1, 4):
            model.setup_caches(1, 64, encoders, SETTINGS)
            model.set_sparse(sparse)
            model.prefill(ids[:-count])
            logits[sparse, count] = model(ids[None, -count:], torch.tensor([len(ids)], dtype=torch.int32))[0, -1]
    assert torch.equal(logits[None, 4], logits[SETTINGS, 4])
    torch.testing.assert_close(logits[None, 4], logits[None, 1], rtol=1e-4, atol=1e-4)
    assert not torch.allclose(logits[None, 1], logits[SETTINGS, 1], rtol=1e-2, atol=1e-2)


@torch.inference_mode()
def test_a_draft_model_reads_every_token(model):
    """With drafts that are always right (it is the same model) its cache has what a prefill gives, last drafts included."""
    twin = random_transformer(ARGS, 0)
    k, ids = 3, PROMPTS[1]
    model.setup_caches(1, LENGTH + k)
    twin.setup_caches(1, LENGTH + k)
    speculator = Speculator(Decoder(model, 1, GREEDY, False), twin, k, None, False)
    speculator.prepare()
    (tokens,) = run(speculator, [ids], 41)
    assert speculator.histogram == [0, 0, 0, 10]
    speculator.draft_tokens()  # reads the last draft of the last round
    written = [layer.attention.cache for layer in twin.layers]
    twin.setup_caches(1, LENGTH)
    prefill(twin, torch.tensor(ids + tokens), 1)
    for layer, cache in zip(twin.layers, written, strict=True):
        length = len(ids) + len(tokens)
        torch.testing.assert_close(cache.k[:, :, :length], layer.attention.cache.k[:, :, :length], rtol=1e-4, atol=1e-4)


# ---------------------------------------------------------------------------------------------------------- distribution

def chi_square(counts: Tensor, expected: Tensor) -> float:
    """Standard deviations that the statistic lies above its mean; cells that should be empty must be."""
    possible = expected > 0
    assert (counts[~possible] == 0).all()
    mass = expected[possible] * counts.sum()
    degrees = max(possible.sum().item() - 1, 1)
    return ((((counts[possible] - mass) ** 2 / mass).sum() - degrees) / (2 * degrees) ** 0.5).item()


def test_leading():
    assert leading(torch.tensor([[True, True], [True, False], [False, True], [False, False]])).tolist() == [2, 1, 0, 0]


def test_accept_greedy():
    choice = torch.tensor([[5, 6, 7], [5, 6, 7], [5, 6, 7]])
    accepted, following = accept_greedy(choice, torch.tensor([[5, 6], [5, 7], [6, 6]]))
    assert accepted.tolist() == [2, 1, 0] and following.tolist() == [7, 6, 5]


def skewed(*rows: list[float]) -> Tensor:
    weights = torch.tensor(rows)
    return weights / weights.sum(-1, keepdim=True)


CASES = {
    "close": (skewed([4, 3, 2, 1, 1]), skewed([3, 3, 3, 1, 1])),
    "q without mass where p has it": (skewed([4, 3, 2, 1, 1]), skewed([0, 5, 0, 1, 0])),
    "p without mass where q has it": (skewed([0, 3, 0, 1, 0]), skewed([4, 3, 2, 1, 1])),
    "disjoint": (skewed([0, 3, 0, 1, 0]), skewed([4, 0, 2, 0, 1])),
    "equal": (skewed([4, 3, 2, 1, 1]), skewed([4, 3, 2, 1, 1])),
    "certain": (skewed([0, 0, 1, 0, 0]), skewed([1, 1, 1, 1, 1])),
}


@pytest.mark.parametrize("case", CASES)
def test_accepted_tokens_are_distributed_as_p(case):
    """Three drafts, every p and q the same: each token given is distributed as p, whatever was accepted before it."""
    torch.manual_seed(0)
    p, q = (x[0] for x in CASES[case])
    n, k = 60_000, 3
    drafted = torch.multinomial(q.expand(n, -1), k, replacement=True)
    accepted, following = accept_sampled(p.expand(n, k + 1, -1), q.expand(n, k, -1), drafted)
    slot = torch.arange(k + 1)
    tokens = torch.where(slot < accepted[:, None], F.pad(drafted, (0, 1)), following[:, None])
    for i in range(k + 1):
        here = tokens[accepted >= i, i]  # those that were given one in this place
        if len(here) > 500:
            assert chi_square(here.bincount(minlength=5), p) < 4, i
    # the share of accepted drafts is the overlap of p and q
    overlap = torch.minimum(p, q).sum().item()
    expected = torch.tensor([overlap ** i * (1 - overlap) for i in range(k)] + [overlap ** k])
    assert ((accepted.bincount(minlength=k + 1) / n) - expected).abs().max() < 0.01


def test_places_have_distributions_of_their_own():
    """p and q of each place matter there and nowhere else, in sequences of different drafts side by side."""
    torch.manual_seed(0)
    n = 60_000
    p = probabilities(torch.randn(3, 12) * 2, Sampling(0.7, top_k=7))
    q = probabilities(torch.randn(2, 12) * 2, Sampling(0.7, top_k=4))
    drafted = torch.stack([torch.multinomial(row, n, replacement=True) for row in q], dim=1)
    accepted, following = accept_sampled(p.expand(n, -1, -1), q.expand(n, -1, -1), drafted)
    assert accepted.bincount(minlength=3).min() > 500
    tokens = torch.where(torch.arange(3) < accepted[:, None], F.pad(drafted, (0, 1)), following[:, None])
    for i in range(3):
        assert chi_square(tokens[accepted >= i, i].bincount(minlength=12), p[i]) < 4, i


def test_a_wrong_rule_is_found():
    """Resampling from p instead of what is left of it: the test above would see it."""
    torch.manual_seed(0)
    p, q = (x[0] for x in CASES["close"])
    drafted = torch.multinomial(q.expand(60_000, -1), 1, replacement=True)
    accepted, _ = accept_sampled(p.expand(60_000, 2, -1), q.expand(60_000, 1, -1), drafted)
    wrong = torch.where(accepted > 0, drafted[:, 0], torch.multinomial(p.expand(60_000, -1), 1)[:, 0])
    assert chi_square(wrong.bincount(minlength=5), p) > 20


LOOPS = [(drafter, sampling) for sampling in (Sampling(1.0, None), Sampling(0.8, top_k=4))
         for drafter in ("self", "smaller", "draft")]


@pytest.mark.parametrize(("drafter", "sampling"), LOOPS if GPU else LOOPS[:2] + LOOPS[-1:])
@torch.inference_mode()
def test_the_whole_loop_keeps_the_distribution(drafter, sampling):
    """Two tokens after a given one: all pairs as often as dense decoding would give them."""
    tiny = dataclasses.replace(ARGS, n_layer=2, vocab_size=6)
    model, noisy = random_transformer(tiny, 3), random_transformer(tiny, 3)
    for parameter in noisy.parameters():
        parameter.add_(0.1 * parameter.abs().mean() * torch.randn_like(parameter))
    small = random_transformer(dataclasses.replace(SMALLER, vocab_size=6), 4)
    draft = {"self": model, "draft": noisy, "smaller": small}[drafter]
    n, k, ids, first = 12_000, 2, [0, 1, 2, 3, 4, 5] * 3, 2
    settings = SparseSettings(6, sink=1, recent=2) if drafter == "self" else None
    model.setup_caches(n, len(ids) + 3 + k)
    draft.setup_caches(n, len(ids) + 3 + k, random_encoders(HashConfig(), draft.fingerprint()) if settings else None, settings)
    speculator = Speculator(Decoder(model, n, sampling, False), draft, k, settings, False)
    prefill(model, torch.tensor(ids), n)
    torch.manual_seed(0)
    speculator.read_prompts([ids], 0, 64)
    tokens, _ = speculator.decode_all([ids], torch.full((n,), first), 3, lambda *new: None)
    pairs = torch.tensor(tokens)
    assert pairs.shape == (n, 3) and (pairs[:, 0] == first).all()
    assert min(speculator.histogram) > 100  # all outcomes of a round occur
    counts = (pairs[:, 1] * 6 + pairs[:, 2]).bincount(minlength=36)

    model.setup_caches(1, 32)
    p = probabilities(prefill(model, torch.tensor([*ids, first]), 1), sampling)
    then = [probabilities(prefill(model, torch.tensor([*ids, first, token]), 1), sampling) for token in range(6)]
    assert chi_square(counts, (p[:, None] * torch.stack(then)).flatten()) < 4


# ---------------------------------------------------------------------------------------------------------- compilation

@pytest.mark.parametrize("sampling", [GREEDY, Sampling(0.8, 20)], ids=["greedy", "sampled"])
def test_every_part_is_compiled_once(tiny_checkpoint, sampling):
    """No graph break (fullgraph) and no recompilation over two batches; greedy tokens are those of dense decoding."""
    model = load_model(tiny_checkpoint, "cpu", torch.float32)
    torch._dynamo.reset()
    counters = torch._dynamo.utils.counters
    counters.clear()
    settings = SparseSettings(COMPILED["budget"], COMPILED["sink"], COMPILED["recent"])
    speculator = speculator_for(model, "self", COMPILED["batch"], COMPILED["length"] - LENGTH, sampling=sampling, compiled=True,
                                settings=settings)
    assert counters["stats"]["unique_graphs"] == 6  # stem and block for 1 and for 3 tokens, proposing, judging
    batches = [PROMPTS, PROMPTS[::-1]]
    tokens = [run(speculator, prompts, 30) for prompts in batches]
    assert counters["stats"]["unique_graphs"] == 6 and not counters["graph_break"]
    if sampling.greedy:
        assert tokens == [[dense_greedy(model, ids, 30) for ids in prompts] for prompts in batches]


# -------------------------------------------------------------------------------------------------------------- on a GPU

WIDE = dataclasses.replace(ARGS, head_dim=64)


@gpu_only
@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize("k", [1, 4])
@pytest.mark.parametrize("drafter", ["self", "draft", "draft-hash"])
def test_captured_rounds_give_the_tokens_of_the_reference(drafter, k, compiled):
    torch._dynamo.reset()
    on_cpu = random_transformer(WIDE, 0)
    stop_ids = (dense_greedy(on_cpu, PROMPTS[0], 50)[9],)
    expected = [until_end(dense_greedy(on_cpu, ids, 50), stop_ids) for ids in PROMPTS]
    model, noisy = random_transformer(WIDE, 0).cuda(), random_transformer(WIDE, 0).cuda()
    for parameter in noisy.parameters():
        parameter.add_(0.02 * parameter.std(correction=0) * torch.randn_like(parameter))
    speculator = speculator_for(model, drafter, 3, k, noisy, stop_ids, compiled=compiled)
    assert run(speculator, PROMPTS, 50) == expected
    assert run(speculator, PROMPTS[::-1], 50) == expected[::-1]
    assert speculator.histogram[0] > 0 < speculator.histogram[k]


@gpu_only
@pytest.mark.parametrize("sampling", [GREEDY, Sampling(5.0, None)], ids=["greedy", "sampled"])
def test_a_round_is_one_graph_launch_and_no_synchronisation(sampling):
    torch._dynamo.reset()
    speculator = speculator_for(random_transformer(WIDE, 0).cuda(), "self", 1, 4, sampling=sampling, compiled=True)
    speculator.start([[1] * 20], torch.ones(1, dtype=torch.int64, device="cuda"), torch.full((1,), 60, device="cuda"))
    torch.cuda.synchronize()
    with torch.profiler.profile() as profiler:
        for _ in range(10):
            speculator.round()
    calls = {event.key: event.count for event in profiler.key_averages()}
    assert calls["cudaGraphLaunch"] == 10
    assert calls.get("cudaStreamSynchronize", 0) == 0
    # a graph that draws is handed the random generator's seed and offset before each replay
    launches = sum(count for name, count in calls.items() if "LaunchKernel" in name)
    assert launches == 0 if sampling.greedy else launches <= 2 * 10


@gpu_only
def test_replays_draw_anew():
    torch._dynamo.reset()
    model = random_transformer(WIDE, 0).cuda()
    speculator = speculator_for(model, "self", 1, 3, sampling=Sampling(5.0, None), compiled=True)
    (tokens,) = run(speculator, [PROMPTS[1]], 60)
    assert len(set(tokens)) > 20


# -------------------------------------------------------------------------------------------------------- command line

HASH = ("--budget", 16, "--sink", 4, "--recent", 4)


@pytest.fixture
def cli(command: Callable[..., Ran], tiny_checkpoint: Path) -> Callable[..., Ran]:
    """cli(flag, ...) continues a text greedily with the tiny model, and prints JSON."""
    def cli(*flags: object, prompt: tuple = ("--prompt", "The quick brown fox jumps over the lazy dog.")) -> Ran:
        return command("--checkpoint_path", tiny_checkpoint, *prompt, "--temperature", 0, "--max_new_tokens", 24, "--json",
                       *flags)
    return cli


@pytest.fixture
def draft_checkpoint(tiny_checkpoint: Path, tmp_path: Path) -> Callable[..., Path]:
    """draft_checkpoint(field=value) -> a random model of one layer with the tiny checkpoint's tokenizer."""
    def make(**fields: object) -> Path:
        transformers = pytest.importorskip("transformers")
        folder = tmp_path / "draft"
        torch.manual_seed(5)
        shape = dict(hidden_size=32, intermediate_size=64, num_hidden_layers=1, num_attention_heads=4, num_key_value_heads=2,
                     vocab_size=259, max_position_embeddings=512, initializer_range=0.3, bos_token_id=None, eos_token_id=257)
        transformers.LlamaForCausalLM(transformers.LlamaConfig(**shape | fields)).save_pretrained(folder)
        for name in ("tokenizer.json", "tokenizer_config.json"):
            shutil.copy(tiny_checkpoint / name, folder / name)
        return folder
    return make


def test_self_speculation_of_a_text_and_of_a_batch(cli, tmp_path):
    dense = cli()
    ran = cli("--speculate", "self", *HASH)
    assert "no signatures for this model, so random projections" in ran.err and " of 4 accepted in " in ran.err
    result = ran.json
    assert result["new_tokens"] == dense.tokens and result["text"] == dense.json["text"]
    assert ran.out.splitlines()[0] == dense.out.splitlines()[0]
    assert (result["speculate"], result["speculate_k"], result["budget"], result["attention"]) == ("self", 4, 16, "dense")
    assert result["rounds"] == sum(result["accepted_histogram"]) > 0 and len(result["accepted_histogram"]) == 5
    mean = sum(i * n for i, n in enumerate(result["accepted_histogram"])) / result["rounds"]
    assert result["accepted_per_verify"] == pytest.approx(mean)
    assert result["signature_bytes"] > 0 and result["bandwidth_gb_s"] is None and result["tokens_read"] > 44

    file = tmp_path / "prompts.jsonl"
    file.write_text("".join(json.dumps({"ids": ids}) + "\n" for ids in ([7], [72, 101, 108], list(range(40, 80)))))
    flags = ("--speculate", "self", "--speculate_k", 3, *HASH, "--num_samples", 2)
    batch = cli("--prompts", file, *flags, prompt=())
    assert batch.tokens == 2 * cli("--prompts", file, prompt=()).tokens
    assert {line[:4] for line in batch.out.splitlines()[:-1] if line.startswith("[")} >= {"[0] ", "[1] ", "[2] "}


@pytest.mark.parametrize("flags", [(), ("--draft_attention", "hash", *HASH), ("--speculate", "draft", "--speculate_k", 2)])
def test_a_draft_model(flags, cli, draft_checkpoint):
    result = cli("--draft_checkpoint_path", draft_checkpoint(), *flags).json
    assert result["new_tokens"] == cli().tokens
    assert result["speculate"] == "draft" and result["budget"] == (16 if "hash" in flags else None)
    assert result["kv_bytes"] > cli("--speculate", "self").json["kv_bytes"]  # the caches of both models
    assert (result["signature_bytes"] > 0) == ("hash" in flags)


def test_a_text_shorter_than_sink_and_recent(cli, draft_checkpoint):
    """The budget is clamped to the caches, which have a few rows more than the text."""
    dense = cli().tokens
    assert cli("--speculate", "self").tokens == dense
    assert cli("--draft_checkpoint_path", draft_checkpoint(), "--draft_attention", "hash").tokens == dense


@pytest.mark.parametrize("flags", [(), ("--compile", "--batch_size", COMPILED["batch"], "--max_seq_length", LENGTH,
                                        "--speculate_k", COMPILED["length"] - LENGTH)])
def test_compared_with_a_dense_run(flags, cli, tmp_path):
    """Teacher forcing runs the dense step, although the model drafts sparsely; a saved run is like a dense one."""
    torch._dynamo.reset()
    saved = tmp_path / "dense.json"
    dense = cli("--save", saved, "--ignore_eos").json
    mine = tmp_path / "self.json"
    ran = cli("--speculate", "self", *HASH, *flags, "--ignore_eos", "--compare", saved, "--save", mine)
    assert ran.json["agreement"] == 1 and ran.json["perplexity_ratio"] == pytest.approx(1, abs=1e-4)
    assert ["dense", "self"] in [line.split() for line in ran.out.splitlines()]
    before = json.loads(saved.read_text()), json.loads(mine.read_text())
    assert before[0]["log_likelihood"] == pytest.approx(before[1]["log_likelihood"], abs=1e-4)
    assert ran.tokens == dense["new_tokens"] * len(ran.tokens)


def test_sampling_several_sequences(cli):
    tokens = cli("--speculate", "self", *HASH, "--temperature", 1.5, "--batch_size", 3, "--ignore_eos").tokens
    assert [len(row) for row in tokens] == [24] * 3 and len(set(map(tuple, tokens))) == 3


@pytest.mark.parametrize("drafter", ["self", "draft"])
def test_turns_of_a_chat(drafter, command, tiny_checkpoint, draft_checkpoint, monkeypatch):
    """What a later turn finds in the caches goes on as in dense decoding."""
    def shown(*flags: object) -> str:
        turns = iter(["Hello", "And now?", "Go on.", ""])
        monkeypatch.setattr("builtins.input", lambda prompt: next(turns))
        return command("--checkpoint_path", tiny_checkpoint, "--interactive", "--temperature", 0, "--max_new_tokens", 30,
                       *flags).out
    how = ("--speculate", "self", *HASH) if drafter == "self" else ("--draft_checkpoint_path", draft_checkpoint())
    dense = shown()
    assert shown(*how) == dense and len(dense) > 30


MISTAKES = [
    (("--speculate", "draft"), "needs a smaller model; give --draft_checkpoint_path"),
    (("--speculate_k", 3), "nothing is drafted without --speculate or --draft_checkpoint_path; leave --speculate_k out"),
    (("--speculate", "self", "--speculate_k", 0), "--speculate_k 0 is out of range"),
    (("--speculate", "self", "--speculate_k", 65), "--speculate_k 65 is out of range"),
    (("--speculate", "self", "--draft_checkpoint_path", "x"), "without a second model; leave --draft_checkpoint_path out"),
    (("--speculate", "self", "--draft_attention", "hash"), "only a draft model has these; leave --draft_attention out"),
    (("--speculate", "self", "--attention", "hash"), "verified by dense attention; leave --attention hash out"),
    (("--speculate", "self", "--sparse_tail", 3), "verified by dense attention; leave --sparse_tail out"),
    (("--speculate", "self", "--budget", 16), "--budget 16 is less than --sink 64 plus --recent 128"),
    (("--draft_checkpoint_path", "x", "--draft_signatures", "y"), "--draft_attention is dense; leave --draft_signatures out"),
    (("--draft_checkpoint_path", "x", "--signatures", "y"), "give --draft_signatures; leave --signatures out"),
    (("--draft_checkpoint_path", "x", "--budget", 300), "--attention is dense, which reads all tokens; leave --budget out"),
    (("--draft_checkpoint_path", "nowhere"), "no folder nowhere"),
    (("--draft_signatures", "y"), "only a draft model has these; leave --draft_signatures out"),
]


@pytest.mark.parametrize(("flags", "message"), MISTAKES)
def test_mistakes(flags, message, cli):
    ran = cli(*flags)
    assert ran.code == 2 and ran.out == "" and ran.err.count("\n") == 1 and message in ran.err, ran.err


def test_a_draft_model_that_does_not_fit(cli, draft_checkpoint):
    for fields, message in [
        (dict(vocab_size=300), "its vocabulary has 300 tokens, the model's 259; give a model of the same family"),
        (dict(max_position_embeddings=64), "cannot draft in 68 tokens: it is made for 64"),
    ]:
        ran = cli("--draft_checkpoint_path", draft_checkpoint(**fields))
        assert ran.code == 2 and ran.out == "" and message in ran.err, ran.err
    folder = draft_checkpoint()
    vocabulary = json.loads((folder / "tokenizer.json").read_text())
    ids = vocabulary["model"]["vocab"]
    ids["A"], ids["B"] = ids["B"], ids["A"]
    (folder / "tokenizer.json").write_text(json.dumps(vocabulary))
    ran = cli("--draft_checkpoint_path", folder)
    assert ran.code == 2 and "its tokens stand for other text; give a model of the same family" in ran.err, ran.err
