"""Sampling, and on a GPU the captured step: one graph for every length, equal to the reference on the CPU."""
import copy

import pytest
import torch
from conftest import gpu_only

from hashfast.hash_attention import HashConfig
from hashfast.model import ModelArgs, SparseSettings, Transformer
from hashfast.runtime.decode import Decoder, decode, prefill
from hashfast.runtime.sampling import Sampling, argmax, sample
from hashfast.runtime.signatures import random_encoders

ARGS = ModelArgs(n_layer=3, dim=96, n_head=6, n_kv_head=2, head_dim=64, intermediate_size=128, vocab_size=200, norm_eps=1e-5,
                 rope_theta=1e4, max_position=2048)
SETTINGS = SparseSettings(96, sink=8, recent=16)


@pytest.fixture
def model():
    torch.manual_seed(0)
    model = Transformer(ARGS).eval().requires_grad_(False)
    for parameter in model.parameters():
        parameter.mul_(2)  # distinct logits, so that rounding does not decide a greedy token
    return model


def run(model, device, compiled, sampling, prompts, count):
    """Tokens after each prompt, all from one Decoder."""
    model = copy.deepcopy(model).to(device)
    model.setup_caches(1, 1024, random_encoders(HashConfig(), model.fingerprint()), SETTINGS)
    decoder = Decoder(model, 1, sampling, compiled)
    decoder.prepare()
    tokens = []
    with torch.inference_mode():
        for ids in prompts:
            first = prefill(model, ids.to(device), 1).argmax()[None]
            tokens.append([row[0] for row in decode(decoder, first, len(ids), count)])
    return tokens


def test_temperature_zero_is_greedy():
    logits = torch.randn(5, 50)
    assert torch.equal(sample(logits, Sampling(temperature=0)), logits.argmax(-1))


@pytest.mark.parametrize("n", [127, 128, 1280])
def test_argmax(n):
    x = torch.randn(3, 5, n)
    x[0, 0] = 1.0  # the first of equals
    assert torch.equal(argmax(x), x.argmax(dim=-1))


def test_samples_follow_the_distribution():
    torch.manual_seed(0)
    logits = torch.tensor([2.0, 1.0, 0.0, -1.0])
    drawn = sample(logits.expand(20_000, 4), Sampling(temperature=0.7, top_k=3))
    share = drawn.bincount(minlength=4) / 20_000
    expected = torch.cat([(logits[:3] / 0.7).softmax(0), torch.zeros(1)])
    assert (share - expected).abs().max() < 0.015 and share[3] == 0


@gpu_only
@pytest.mark.parametrize("compiled", [False, True])
def test_the_captured_step_equals_the_reference_at_every_length(model, compiled):
    prompts = [torch.randint(0, 200, (length,)) for length in (500, 3, 95, 96, 97)]
    on_cpu = run(model, "cpu", False, Sampling(temperature=0), prompts, 40)
    assert run(model, "cuda", compiled, Sampling(temperature=0), prompts, 40) == on_cpu


@gpu_only
def test_sampling_draws_anew_at_every_replay(model):
    prompt = [torch.randint(0, 200, (50,))]
    tokens = run(model, "cuda", True, Sampling(temperature=5.0), prompt, 60)[0]
    assert len(set(tokens)) > 20


@gpu_only
def test_a_token_is_one_graph_launch_and_no_synchronisation(model):
    model = model.cuda()
    model.setup_caches(1, 256, random_encoders(HashConfig(), model.fingerprint()), SETTINGS)
    decoder = Decoder(model, 1, Sampling(temperature=0), compiled=True)
    decoder.prepare()
    with torch.profiler.profile() as profiler:
        for _ in range(10):
            decoder.step()
    calls = {event.key: event.count for event in profiler.key_averages()}
    assert calls["cudaGraphLaunch"] == 10
    assert calls.get("cudaStreamSynchronize", 0) == 0
    assert not any("LaunchKernel" in name for name in calls)
