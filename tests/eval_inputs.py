"""What tests of measuring share: a text, two signature files, a configuration of the tiny model."""
from pathlib import Path

import torch

from hashfast.hash_attention import HashConfig
from hashfast.research.evaluator import EvalConfig
from hashfast.runtime.checkpoint import load_model
from hashfast.runtime.signatures import random_encoders, save_signatures

CONTEXT, SINK, RECENT = 160, 4, 8
PROSE = " ".join(f"Line {i} tells of {i * 7919 % 97} boats." for i in range(60))


def make_files(checkpoint: Path, folder: Path) -> dict[str, Path]:
    """The checkpoint as "model", a "text", and untrained signatures, "kv" and "query" (one per query head)."""
    (folder / "prose.txt").write_text(PROSE)
    fingerprint = load_model(checkpoint, "cpu", torch.float32).fingerprint()
    for name, config in {"kv": HashConfig(), "query": HashConfig(query_bits=1, depth=2, share="query")}.items():
        heads = config.signature_heads(fingerprint.n_head, fingerprint.n_kv_head)
        about = {"recipe": name, "budgets": {"8": [[1.5] * heads, [0.5] * heads]}}
        save_signatures(folder / f"{name}.safetensors", random_encoders(config, fingerprint, 1), fingerprint, about)
    return {"model": checkpoint, "text": folder / "prose.txt", "kv": folder / "kv.safetensors",
            "query": folder / "query.safetensors"}


def config(files: dict[str, Path], **changes: object) -> EvalConfig:
    shared = {"context": CONTEXT, "signatures": (files["kv"], files["query"]), "sink": SINK, "recent": RECENT}
    return EvalConfig(files["model"], **shared | changes)
