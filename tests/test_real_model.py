"""SmolLM2-135M-Instruct on a real book: sane perplexity, and signatures that lose little of it."""
import json
import math
from pathlib import Path

import pytest
import torch
from safetensors import safe_open

from hashfast.common import WEIGHTS
from hashfast.model import SparseSettings
from hashfast.runtime.checkpoint import load_model
from hashfast.runtime.decode import Decoder, prefill
from hashfast.runtime.sampling import Sampling
from hashfast.runtime.signatures import load_signatures, random_encoders
from hashfast.runtime.tokenizer import Tokenizer

ROOT = Path(__file__).parent.parent
CHECKPOINT, BOOK = ROOT / "checkpoints" / "smollm2-135m-instruct", ROOT / "data" / "alice29.txt"
CONTEXT, LAST, ROWS = 3072, 96, 4

pytestmark = pytest.mark.skipif(not (CHECKPOINT.exists() and BOOK.exists()), reason="run scripts/quickstart.sh first")


@pytest.fixture(scope="module")
def real():
    model = load_model(CHECKPOINT, "cpu", torch.float32)
    ids = Tokenizer.load(CHECKPOINT).encode(BOOK.read_text())[1000:1000 + CONTEXT]
    return model, torch.tensor(ids)


@torch.inference_mode()
def likelihood(model, ids, settings=None) -> float:
    """Mean log-likelihood of the last LAST tokens, a part of them in each of ROWS sequences whose prompts are cached."""
    model.set_sparse(settings)
    steps, total = LAST // ROWS, 0.0
    starts = CONTEXT - LAST - 1 + steps * torch.arange(ROWS)
    decoder = Decoder(model, ROWS, Sampling(temperature=0), compiled=False)
    for i in range(steps):
        decoder.start(ids[starts + i], starts + i)
        decoder.step()
        total += decoder.logits.log_softmax(-1).gather(-1, ids[starts + i + 1, None]).sum().item()
    return total / LAST


def test_perplexity_dense_learned_and_random(real, capsys):
    model, ids = real
    encoders, about = load_signatures(WEIGHTS / "smollm2-135m-instruct.safetensors", model.fingerprint())
    assert about["recipe"] == "listwise" and about["model"]["norms"] == model.fingerprint().norms
    assert capsys.readouterr().err == ""
    settings = SparseSettings(256, sink=64, recent=128)
    model.setup_caches(ROWS, CONTEXT, encoders, settings)
    prefill(model, ids, ROWS)
    found = {"dense": likelihood(model, ids), "learned": likelihood(model, ids, settings)}
    for layer, encoder in zip(model.layers, random_encoders(encoders[0].config, model.fingerprint()), strict=True):
        cache = layer.attention.cache
        layer.attention.encoder = encoder
        cache.signatures.copy_(encoder.encode_keys(cache.k[:1]).expand_as(cache.signatures))
    found["random"] = likelihood(model, ids, settings)
    ratio = {name: math.exp(found["dense"] - value) for name, value in found.items()}
    assert 15 < math.exp(-found["dense"]) < 35
    assert ratio["learned"] < 1.05
    assert ratio["learned"] < ratio["random"]


def test_signatures_were_not_trained_on_the_evaluated_texts():
    _, about = load_signatures(WEIGHTS / "smollm2-135m-instruct.safetensors",
                               load_model(CHECKPOINT, "meta", torch.float32).fingerprint())
    evaluated = json.loads((ROOT / "results" / "quality_ppl.json").read_text())["rows"][0]["per_text"]
    assert not {Path(name).stem for name in about["data"]} & {*evaluated, BOOK.stem}


@pytest.mark.parametrize("path", sorted(WEIGHTS.glob("*.safetensors")), ids=lambda path: path.stem)
def test_shipped_signatures_say_how_they_came_to_be(path: Path):
    with safe_open(path, framework="pt") as file:
        about = json.loads(file.metadata()["hashfast"])
    assert path.stem.startswith(("smollm2-135m-instruct", "qwen2.5-coder-"))
    assert {"recipe", "steps", "context", "seed", "data", "held_out", "environment"} <= about.keys()
    evaluated = {name for result in (ROOT / "results").glob("quality_ppl*.json")
                 for name in json.loads(result.read_text())["rows"][0]["per_text"]}
    assert len(evaluated) == 6 and not {Path(name).stem for name in about["data"]} & evaluated
