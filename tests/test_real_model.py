"""SmolLM2-135M-Instruct on a real book: sane perplexity, and signatures that lose little of it."""
import json
from pathlib import Path

import pytest
import torch
from safetensors import safe_open

from hashfast.model import SparseSettings
from hashfast.runtime.checkpoint import load_model
from hashfast.runtime.decode import Decoder, prefill
from hashfast.runtime.sampling import Sampling
from hashfast.runtime.signatures import load_signatures, random_encoders
from hashfast.runtime.tokenizer import Tokenizer

ROOT = Path(__file__).parent.parent
CHECKPOINT, BOOK = ROOT / "checkpoints" / "smollm2-135m-instruct", ROOT / "data" / "alice29.txt"
CONTEXT, LAST = 3072, 96

pytestmark = pytest.mark.skipif(not (CHECKPOINT.exists() and BOOK.exists()), reason="run scripts/quickstart.sh first")


@pytest.fixture(scope="module")
def real():
    model = load_model(CHECKPOINT, "cpu", torch.float32)
    ids = Tokenizer.load(CHECKPOINT).encode(BOOK.read_text())[1000:1000 + CONTEXT]
    return model, torch.tensor(ids)


def perplexity(real, encoders=None, settings=None) -> float:
    model, ids = real
    model.setup_caches(1, CONTEXT, encoders, settings)
    decoder = Decoder(model, 1, Sampling(temperature=0), compiled=False)
    prefill(model, ids[:-LAST], 1)
    total = torch.zeros(())
    for i in range(CONTEXT - LAST, CONTEXT - 1):
        decoder.start(ids[i:i + 1], i)
        decoder.step()
        total += decoder.logits[0].log_softmax(-1)[ids[i + 1]]
    return (-total / (LAST - 1)).exp().item()


def test_perplexity_dense_learned_and_random(real):
    dense = perplexity(real)
    assert 15 < dense < 35
    encoders, about = load_signatures(ROOT / "weights" / "smollm2-135m-instruct.safetensors", real[0].fingerprint())
    assert about["recipe"] == "listwise"
    settings = SparseSettings(256, sink=64, recent=128)
    learned = perplexity(real, encoders, settings)
    random = perplexity(real, random_encoders(encoders[0].config, real[0].fingerprint()), settings)
    assert learned / dense < 1.05
    assert learned < random


def test_signatures_were_not_trained_on_the_evaluated_texts():
    _, about = load_signatures(ROOT / "weights" / "smollm2-135m-instruct.safetensors",
                               load_model(CHECKPOINT, "meta", torch.float32).fingerprint())
    evaluated = json.loads((ROOT / "results" / "quality_ppl.json").read_text())["rows"][0]["per_text"]
    assert not {Path(name).stem for name in about["data"]} & {*evaluated, BOOK.stem}


@pytest.mark.parametrize("path", sorted((ROOT / "weights").glob("*.safetensors")), ids=lambda path: path.stem)
def test_shipped_signatures_say_how_they_came_to_be(path: Path):
    with safe_open(path, framework="pt") as file:
        about = json.loads(file.metadata()["hashfast"])
    assert path.stem.startswith(("smollm2-135m-instruct", "qwen2.5-coder-"))
    assert {"recipe", "steps", "context", "seed", "data", "held_out", "environment"} <= about.keys()
    evaluated = {name for result in (ROOT / "results").glob("quality_ppl*.json")
                 for name in json.loads(result.read_text())["rows"][0]["per_text"]}
    assert len(evaluated) == 6 and not {Path(name).stem for name in about["data"]} & evaluated
