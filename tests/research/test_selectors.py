"""Selectors: the budget is kept to the token, what must be in is in, the best is found, bounds are bounds."""
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from conftest import gpu_only
from torch.utils._python_dispatch import TorchDispatchMode

from hashfast.hash_attention import HashConfig
from hashfast.model import Attention, Fingerprint, KVCache, ModelArgs, Transformer
from hashfast.research import selectors as token_selectors
from hashfast.research.selectors import (
    CODE_BITS,
    H2O,
    PAGE,
    TABLES,
    CalibratedHash,
    DoubleSparsity,
    Hash,
    MagicPIG,
    Multipole,
    Oracle,
    OracleGroup,
    OracleMax,
    Quest,
    Random,
    Selector,
    Streaming,
    dot_products,
    make_methods,
)
from hashfast.runtime.signatures import load_signatures, random_encoders, save_signatures

B, HQ, HKV, S, D = 2, 6, 2, 200, 32
SINK, RECENT, BUDGET = 4, 10, 40
ARGS = ModelArgs(1, HQ * D, HQ, HKV, D, 8, 10, 1e-5, 1e4)
NAMES = ("hash", "hash_query", "oracle", "oracle_group", "oracle_max", "streaming", "quest", "double_sparsity", "random",
         "h2o", "magicpig", "multipole")
PLAIN = {"oracle": Oracle, "oracle_group": OracleGroup, "oracle_max": OracleMax, "quest": Quest,
         "double_sparsity": DoubleSparsity, "h2o": H2O, "magicpig": MagicPIG}


def make(name: str, k: torch.Tensor) -> Selector:
    if name.startswith("hash"):
        config = HashConfig(share="query" if name == "hash_query" else "kv")
        return Hash(SINK, RECENT, random_encoders(config, Fingerprint(1, HQ, HKV, D, 1e4, 10))[0], k)
    if name in PLAIN:
        return PLAIN[name](SINK, RECENT, k)
    if name == "multipole":
        return Multipole(SINK, RECENT, k, k.flip(3))
    return Streaming(SINK, RECENT) if name == "streaming" else Random(SINK, RECENT, seed=3)


@pytest.fixture
def tensors() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """q [B, Hq, D], k [B, Hkv, S, D] with NaN where nothing was written, seq_lens [B]."""
    generator = torch.Generator().manual_seed(0)
    q, k = torch.randn(B, HQ, D, generator=generator), torch.randn(B, HKV, S, D, generator=generator)
    lengths = torch.tensor([187, 187], dtype=torch.int32)
    k[:, :, 187:] = float("nan")
    return q, k, lengths


def choose(name: str, q: torch.Tensor, k: torch.Tensor, lengths: torch.Tensor, budget: int = BUDGET) -> torch.Tensor:
    """Build from all tokens but the last seven, then step through those."""
    selector = make(name, k)
    selector.budget = budget
    start = int(lengths[0]) - 7
    for row in range(B):
        selector.build(k, row, start)
    for length in range(start + 1, int(lengths[0]) + 1):
        indices = selector(q, k, torch.full_like(lengths, length))
    return indices


@pytest.mark.parametrize("name", NAMES)
def test_budget_sink_and_recent(name: str, tensors: tuple) -> None:
    indices = choose(name, *tensors)
    heads = HQ if make(name, tensors[1]).share == "query" else HKV
    assert indices.dtype == torch.int32 and indices.shape == (B, heads, BUDGET)
    for row in indices.flatten(0, 1).tolist():
        assert len(set(row)) == BUDGET and set(row) >= {*range(SINK), *range(187 - RECENT, 187)}
        assert min(row) >= 0 and max(row) < 187


@pytest.mark.parametrize("name", NAMES)
def test_all_tokens_within_the_budget(name: str, tensors: tuple) -> None:
    for row in choose(name, *tensors, budget=S).flatten(0, 1).tolist():
        assert sorted(row) == [-1] * (S - 187) + list(range(187))


@pytest.mark.parametrize("name", NAMES)
def test_sequences_of_different_lengths_are_chosen_for_alone(name: str, tensors: tuple) -> None:
    q, k, _ = tensors
    starts, lengths = (150, 97), torch.tensor([157, 104], dtype=torch.int32)
    together = make(name, k)
    together.budget = BUDGET
    for row in (0, 1, 1, 0):  # built again, as for a next batch
        together.build(k, row, starts[row])
    for back in range(6, -1, -1):
        found = together(q, k, lengths - back)
    for row in range(B):
        alone = make(name, k[row:row + 1])
        alone.budget = BUDGET
        alone.build(k[row:row + 1], 0, starts[row])
        for back in range(6, -1, -1):
            wanted = alone(q[row:row + 1], k[row:row + 1], lengths[row:row + 1] - back)
        assert torch.equal(found[row].sort().values, wanted[0].sort().values)


class Devices(TorchDispatchMode):
    """Notes which devices the tensors of every operation are on."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: set[str] = set()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        parts = [*args, *(part for arg in args if isinstance(arg, list | tuple) for part in arg), result]
        self.seen |= {part.device.type for part in parts if isinstance(part, torch.Tensor)}
        return result


@pytest.mark.parametrize("name", NAMES)
def test_a_step_leaves_the_device_at_no_point(name: str) -> None:
    """The meta device has no values: what a CUDA graph could not capture (reading one, a shape that depends on one, a tensor
    of the host) fails here too."""
    k = torch.zeros(B, HKV, S, D, device="meta")
    selector = make(name, torch.zeros(B, HKV, S, D)).to("meta")
    if name.startswith("hash"):
        selector.encoder.to("meta")
    selector.budget = BUDGET
    with Devices() as devices, torch.no_grad():
        q, seq_lens = torch.zeros(B, HQ, D, device="meta"), torch.zeros(B, dtype=torch.int32, device="meta")
        indices, attended = selector(q, k, seq_lens), selector.attend(q, k, k, seq_lens)
    assert devices.seen == {"meta"} and indices.shape[-1] == BUDGET and attended.shape == q.shape


@gpu_only
@pytest.mark.parametrize("name", NAMES)
def test_a_captured_step_chooses_what_the_cpu_does(name: str, tensors: tuple) -> None:
    """In bfloat16, in sequences of different lengths; at another length the graph chooses anew."""
    q, k, lengths = tensors[0].bfloat16(), tensors[1].bfloat16(), torch.tensor([157, 104], dtype=torch.int32)
    found = {}
    for device in ("cpu", "cuda"):
        selector = make(name, k).to(device)
        if name.startswith("hash"):
            selector.encoder.to(device)
        selector.budget = BUDGET
        if name == "double_sparsity":  # no prefill has told it of queries, and channels of equal size come in any order
            selector.query_size += 1 + torch.arange(D, device=device)
        if name == "h2o":
            selector.prompt += 100 * torch.arange(S, 0, -1, device=device)
        queries, keys, seq_lens = q.to(device), k.to(device), lengths.to(device)
        for row in range(B):
            selector.build(keys, row, 90)
        for _ in range(2):  # on a GPU compiles what there is to compile
            found[device] = selector(queries, keys, seq_lens)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = selector(queries, keys, seq_lens)
    seq_lens -= 3
    graph.replay()
    shorter = captured.clone()
    seq_lens += 3
    graph.replay()
    if name in ("magicpig", "multipole"):  # the sign of a product near 0, the nearer of two centroids may differ
        found["cpu"] = found["cuda"].cpu()
    # the tokens of a page have one bound, and which of the last page's are taken is open
    unit = PAGE if name == "quest" else 1
    assert torch.equal((captured.cpu() // unit).sort().values, (found["cpu"] // unit).sort().values)
    assert not torch.equal(shorter.sort().values, captured.sort().values)


@pytest.mark.parametrize("name", NAMES)
def test_building_at_the_end_is_stepping_there(name: str, tensors: tuple) -> None:
    q, k, lengths = tensors
    if name in ("double_sparsity", "h2o", "magicpig", "multipole"):
        pytest.skip("its channels, evictions, mean or clusters are those of the prompt")
    selector = make(name, k)
    selector.budget = BUDGET
    for row in range(B):
        selector.build(k, row, 187)
    assert torch.equal(selector(q, k, lengths).sort().values, choose(name, q, k, lengths).sort().values)


def test_oracle_takes_the_largest_products(tensors: tuple) -> None:
    q, k, lengths = tensors
    products = dot_products(q, k).flatten(1, 2)[..., SINK:187 - RECENT]
    wanted = products.topk(BUDGET - SINK - RECENT).indices + SINK
    indices = choose("oracle", *tensors)
    for b in range(B):
        for h in range(HQ):
            assert set(wanted[b, h].tolist()) <= set(indices[b, h].tolist())


@pytest.mark.parametrize("name, of_group", [("oracle_group", torch.sum), ("oracle_max", torch.amax)])
def test_group_oracles_take_the_largest_weights(name: str, of_group: Callable, tensors: tuple) -> None:
    q, k, lengths = tensors
    weights = of_group((dot_products(q, k)[..., :187] * D ** -0.5).softmax(dim=-1), dim=2)[..., SINK:187 - RECENT]
    wanted = weights.topk(BUDGET - SINK - RECENT).indices + SINK
    indices = choose(name, *tensors)
    for b in range(B):
        for h in range(HKV):
            assert set(wanted[b, h].tolist()) <= set(indices[b, h].tolist())


def test_the_largest_weight_of_any_head_is_another_choice(tensors: tuple) -> None:
    assert not torch.equal(choose("oracle_max", *tensors).sort().values, choose("oracle_group", *tensors).sort().values)


def test_streaming_takes_the_newest(tensors: tuple) -> None:
    wanted = [*range(SINK), *range(187 - BUDGET + SINK, 187)]
    assert (choose("streaming", *tensors).sort().values == torch.tensor(wanted)).all()


def test_quest_bounds_the_products(tensors: tuple) -> None:
    q, k, lengths = tensors
    selector = make("quest", k)
    for row in range(B):
        selector.build(k, row, 180)
    for length in range(181, 188):
        bound = selector.scores(q, k, torch.full_like(lengths, length))
    products = dot_products(q, k).flatten(1, 2)
    assert (bound[..., :187] >= products[..., :187] - 1e-5).all()
    pages = bound[..., :187 // PAGE * PAGE].unflatten(-1, (-1, PAGE))
    assert (pages == pages[..., :1]).all() and not torch.isinf(pages).any()


def test_double_sparsity_is_exact_where_its_channels_are_all_that_count(tensors: tuple) -> None:
    q, k, lengths = tensors
    q, channels = q.clone(), torch.tensor([3, 8, 17, 30])  # D / 8
    q[..., [c for c in range(D) if c not in channels]] = 0
    selector = make("double_sparsity", k)
    for row in range(B):
        selector.query_size[row] = q[row].abs().unflatten(0, (HKV, -1)).sum(dim=1)
        selector.build(k, row, 187)
    assert (selector.channels.sort().values == channels).all()
    torch.testing.assert_close(selector.scores(q, k, lengths)[..., :187], dot_products(q, k).flatten(1, 2)[..., :187])


def test_double_sparsity_is_told_of_the_prompts_queries() -> None:
    generator = torch.Generator().manual_seed(1)
    attention = Attention(ARGS)
    attention.cache = KVCache(B, S, ARGS, None, torch.device("cpu"), torch.float32)
    selector = attention.selector = DoubleSparsity(SINK, RECENT, attention.cache.k)
    q, k = torch.randn(2, 90, HQ, D, generator=generator), torch.randn(2, HKV, 90, D, generator=generator)
    for prompt in (0, 1):  # the second one replaces the first
        for start, end in ((0, 64), (64, 90)):
            padding = torch.randn(1, 3, HQ, D, generator=generator)
            queries = torch.cat((q[prompt:prompt + 1, start:end], padding), dim=1)  # padding is not observed
            keys = F.pad(k[prompt:prompt + 1, :, start:end], (0, 0, 0, 3))
            attention.prefill(queries, keys, keys, None, None, 1, start, end - start)
    torch.testing.assert_close(selector.query_size[1], q[1].abs().sum(dim=0).unflatten(0, (HKV, -1)).sum(dim=1))
    assert not selector.query_size[0].any()


def test_h2o_accumulates_the_prompts_attention(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(token_selectors, "ROWS_AT_ONCE", 25)
    generator = torch.Generator().manual_seed(1)
    attention = Attention(ARGS)
    attention.cache = KVCache(B, S, ARGS, None, torch.device("cpu"), torch.float32)
    selector = attention.selector = H2O(SINK, RECENT, attention.cache.k)
    q, k = torch.randn(2, 90, HQ, D, generator=generator), torch.randn(2, HKV, 90, D, generator=generator)
    for prompt in (0, 1):  # the second one replaces the first
        for start, end in ((0, 64), (64, 90)):
            keys = k[prompt:prompt + 1, :, start:end]
            attention.prefill(q[prompt:prompt + 1, start:end], keys, keys, None, None, 1, start, end - start)
    logits = torch.einsum("thgd,hsd->hgts", q[1].unflatten(1, (HKV, -1)), k[1]) * D ** -0.5
    weights = logits.masked_fill(torch.ones(90, 90).triu(1).bool(), float("-inf")).softmax(-1)
    torch.testing.assert_close(selector.prompt[1, :, :90], weights.sum(dim=(1, 2)))
    assert not selector.prompt[0].any() and not selector.prompt[1, :, 90:].any()


def test_h2o_evicts_for_good(tensors: tuple) -> None:
    """Against one token at a time by hand, and once more from where it began."""
    _, k, _ = tensors
    selector = H2O(SINK, RECENT, k)
    selector.prompt[:, :, :150] = torch.rand(B, HKV, 150, generator=torch.Generator().manual_seed(2))
    for row in range(B):
        selector.build(k, row, 150)
    selector.budget = BUDGET
    queries = 3 * torch.randn(37, B, HQ, D, generator=torch.Generator().manual_seed(3))
    found = [selector(query, k, torch.full((B,), 151 + i, dtype=torch.int32)) for i, query in enumerate(queries)]
    again = [selector(query, k, torch.full((B,), 151 + i, dtype=torch.int32)) for i, query in enumerate(queries)]
    assert all(map(torch.equal, found, again))
    total, left = selector.prompt[1, 0].tolist(), {*range(150)}
    for i, query in enumerate(queries):
        length = 151 + i
        left.add(length - 1)
        must = {*range(SINK), *range(length - RECENT, length)}
        left = must | {*sorted(left - must, key=lambda token: -total[token])[:BUDGET - len(must)]}
        assert {*found[i][1, 0].tolist()} == left
        tokens = sorted(left)
        weights = (query[1, :HQ // HKV] @ k[1, 0, tokens].T * D ** -0.5).softmax(-1).sum(dim=0)
        for token, weight in zip(tokens, weights.tolist(), strict=True):
            total[token] += weight


def dense(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, length: int) -> torch.Tensor:
    return F.scaled_dot_product_attention(q[:, :, None], k[:, :, :length], v[:, :, :length], enable_gqa=True)[:, :, 0]


@pytest.mark.parametrize("name", ["h2o", "magicpig", "multipole", "quest"])
def test_attention_within_the_budget_is_dense(name: str, tensors: tuple) -> None:
    q, k, lengths = tensors
    selector = make(name, k)
    selector.budget = S
    for row in range(B):
        selector.build(k, row, 180)
    for length in range(181, 188):
        attended = selector.attend(q, k, k.flip(3), torch.full_like(lengths, length))
    torch.testing.assert_close(attended, dense(q, k, k.flip(3), 187))


@gpu_only
@pytest.mark.parametrize("name", ["h2o", "magicpig", "multipole"])
def test_compiled_attention_is_the_same(name: str, tensors: tuple) -> None:
    q, k, lengths = (tensor.cuda() for tensor in tensors)
    found = []
    for compiled in (True, False):
        selector = make(name, k)
        selector.budget = BUDGET
        for row in range(B):
            selector.build(k, row, 180)
        attend = torch.compile(selector.attend, fullgraph=True, dynamic=False) if compiled else selector.attend
        with torch.inference_mode():
            found.append(attend(q, k, k.flip(3), lengths))
    torch.testing.assert_close(*found, rtol=1e-3, atol=1e-3)


def test_magicpig_draws_by_chance_and_weighs_by_it(tensors: tuple) -> None:
    q, k, lengths = tensors
    q, k = q[:1], F.normalize(k[:1], dim=-1) + 0.7
    drawn = torch.zeros(HQ, 187)
    for seed in range(60):
        selector = MagicPIG(SINK, RECENT, k, seed)
        selector.build(k, 0, 186)
        drawn += (selector.scores(q, k, lengths[:1])[0, :, :187] > 0) / 60  # met twice, and not the first token
    keys = (k[0, :, :187] - k[0, :, :186].mean(dim=1, keepdim=True)).repeat_interleave(HQ // HKV, dim=0)
    cosine = F.cosine_similarity(q[0, :, None], keys, dim=-1)
    meet = (1 - cosine.acos() / torch.pi) ** CODE_BITS
    chance = torch.distributions.Binomial(TABLES, meet).log_prob(torch.ones(())).exp()
    chance = 1 - (1 - meet) ** TABLES - chance
    assert (drawn - chance)[:, 1:].abs().mean() < 0.05 and abs((drawn - chance)[:, 1:].mean()) < 0.005
    # the last seed's sample, at a budget that the tables more than fill, against weights by hand
    selector.budget = 24
    scores = selector.scores(q, k, lengths[:1])[0, :, :187]
    attended = selector.attend(q, k, k, lengths[:1])[0]
    for head in range(HQ):
        order = scores[head, SINK:187 - RECENT].argsort(descending=True)[:24 - SINK - RECENT] + SINK
        left = (scores[head, order] / S).ceil()
        assert left.min() >= 1
        used = TABLES + 1 - left.min()
        p = meet[head, order].double()
        twice = 1 - (1 - p) ** used - used * p * (1 - p) ** (used - 1)
        own = k[0, head // (HQ // HKV)].double()
        tokens = torch.cat((order, torch.tensor([*range(SINK), *range(187 - RECENT, 187)])))
        weights = (own[tokens] @ q[0, head].double() * D ** -0.5).exp() / torch.cat((twice, torch.ones(SINK + RECENT)))
        torch.testing.assert_close(attended[head].double(), weights @ own[tokens] / weights.sum(), rtol=1e-3, atol=1e-4)


def test_magicpig_leaves_out_what_it_has_not_drawn(tensors: tuple) -> None:
    """A query that no key is like draws nothing: sink and recent alone are attended to, whatever the budget has room for."""
    q, k, lengths = tensors
    k[:, :, :187] = k[:, :, :1] + 0.01 * k[:, :, :187]
    q = -(k[:, :, 100] - k[:, :, :187].mean(dim=2)).repeat_interleave(HQ // HKV, dim=1)
    selector = MagicPIG(SINK, RECENT, k)
    for row in range(B):
        selector.build(k, row, 187)
    selector.codes[:, :, SINK:187 - RECENT] = (selector.encode(q)[:, ::HQ // HKV, None] + 1)  # of no table the query's
    selector.budget = BUDGET
    edge = [*range(SINK), *range(187 - RECENT, 187)]
    torch.testing.assert_close(selector.attend(q, k, k, lengths), dense(q, k[:, :, edge], k[:, :, edge], len(edge)))


def test_multipole_is_exact_where_clusters_are_points(tensors: tuple) -> None:
    """Keys of 16 each at one place, with one value: centroids stand for them without loss, also for a token that joins one."""
    q, _, lengths = tensors
    points = torch.randn(B, HKV, 12, D, generator=torch.Generator().manual_seed(4))
    k = points[:, :, [i // 16 for i in range(186)] + [3] + [0] * 13]
    v = k.flip(3).contiguous()
    selector = Multipole(SINK, RECENT, k, v)
    for row in range(B):
        selector.build(k, row, 186)
    selector.budget = BUDGET
    torch.testing.assert_close(selector.attend(q, k, v, lengths), dense(q, k, v, 187))
    plain = Selector.attend(selector, q, k, v, lengths)
    assert (plain - dense(q, k, v, 187)).abs().max() > 0.01
    chosen = selector(q, k, lengths)[0, 0]
    weights = (q[0, :HQ // HKV] @ k[0, 0, :187].T * D ** -0.5).softmax(-1).sum(dim=0)  # the budget is the best places'
    free = [token for token in chosen.tolist() if SINK <= token < 187 - RECENT]
    best = weights[SINK:187 - RECENT].topk(len(free)).values
    torch.testing.assert_close(weights[free].sort(descending=True).values, best)


def test_random_depends_on_the_seed_and_the_step(tensors: tuple) -> None:
    q, k, lengths = tensors
    sets = []
    for seed, length in ((0, 187), (0, 187), (1, 187), (0, 186)):
        selector = Random(SINK, RECENT, seed)
        selector.budget = BUDGET
        sets.append(selector(q, k, torch.full_like(lengths, length)).sort().values)
    assert torch.equal(sets[0], sets[1]) and not torch.equal(sets[0], sets[2]) and not torch.equal(sets[0], sets[3])
    assert not torch.equal(sets[0][:, 0], sets[0][:, 1])
    counts = torch.zeros(S)
    for seed in range(300):
        selector = Random(SINK, RECENT, seed)
        selector.budget = BUDGET
        counts.scatter_add_(0, selector(q, k, lengths)[0, 0].long(), torch.ones(BUDGET))
    middle = counts[SINK:187 - RECENT] / 300
    assert middle.mean().item() == pytest.approx((BUDGET - SINK - RECENT) / (187 - SINK - RECENT)) and middle.std() < 0.05


def test_bytes_per_token() -> None:
    k = torch.zeros(1, HKV, 32, D)
    wanted = {name: 2 * D if name.startswith("oracle") else 4 for name in NAMES}
    wanted |= {"h2o": 4, "magicpig": CODE_BITS * TABLES / 8, "multipole": D / 4}
    wanted |= {"hash_query": 4 * HQ / HKV, "streaming": 0, "quest": D / 4, "double_sparsity": D / 4, "random": 0}
    assert {name: make(name, k).bytes_per_token for name in NAMES} == wanted


def test_calibrated_budgets_are_spread_over_layers_and_heads(tensors: tuple[torch.Tensor, torch.Tensor, torch.Tensor]) -> None:
    """The mean over layers and heads is the budget, and a head's tokens are the best of its own number."""
    q, k, lengths = tensors
    budget, about = SINK + RECENT + 3 * 64, {"budgets": {"2": [[0.0, 2.0], [1.5, 0.5]]}}
    encoder = random_encoders(HashConfig(), Fingerprint(1, HQ, HKV, D, 1e4, 10))[0]
    counts = []
    for layer in range(2):
        selector = CalibratedHash(SINK, RECENT, encoder, torch.zeros(B, HKV, 1000, D), about, layer, 0)
        selector.set_budget(budget, 1000)
        keys = torch.randn(B, HKV, 1000, D, generator=torch.Generator().manual_seed(layer))
        for row in range(B):
            selector.build(keys, row, 999)
        indices = selector(q, keys, torch.full_like(lengths, 1000))  # [B, Hs, K]
        assert indices.shape[2] == SINK + RECENT + 64 * 5  # of the head with the most, whichever layer it is in
        counts.append((indices >= 0).sum(dim=-1))
        even = Hash(SINK, RECENT, encoder, keys)
        for head in range(HKV):
            even.signatures.copy_(selector.signatures)
            even.set_budget(int(counts[-1][0, head]), 1000)
            alone = even(q, keys, torch.full_like(lengths, 1000))[:, head].sort().values
            chosen = indices[:, head].sort(descending=True).values[:, :alone.shape[1]].sort().values
            assert torch.equal(alone, chosen)
    counts = torch.stack(counts)  # [2, B, Hs]
    assert (counts.float().mean(dim=(0, 2)) == budget).all() and counts.unique().numel() == 4


def files_for(model: Transformer, folder: Path) -> dict[str, Path]:
    files = {}
    for share in ("kv", "query"):
        files[share] = folder / f"{share}.safetensors"
        config = HashConfig(share=share)
        save_signatures(files[share], random_encoders(config, model.fingerprint()), model.fingerprint(), {"recipe": share})
    return files


def test_files_are_read_once_and_selectors_share_their_signatures(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = Transformer(replace(ARGS, n_layer=2))
    model.setup_caches(1, 64)
    files, read = files_for(model, tmp_path), []
    monkeypatch.setattr(token_selectors, "load_signatures", lambda path, like: read.append(path) or load_signatures(path, like))
    methods = make_methods(["hash", "hash_calibrated"], model, SINK, RECENT, list(files.values()), 128, 0, 0)
    assert read == list(files.values())
    assert [(method.selector, method.recipe) for method in methods] == [
        ("hash", "kv"), ("hash", "query"), ("hash_calibrated", "kv"), ("hash_calibrated", "query")]
    for share in files:
        assert len({method.layers[0].signatures.data_ptr() for method in methods if method.recipe == share}) == 1
    assert methods[0].layers[0].signatures.data_ptr() != methods[0].layers[1].signatures.data_ptr()
