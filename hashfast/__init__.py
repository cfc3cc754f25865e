"""hashfast: decoding in native PyTorch whose attention reads the few tokens that learned bit signatures select.

    import torch, hashfast
    folder = "checkpoints/smollm2-135m-instruct"
    model = hashfast.load_model(folder, "cpu", torch.float32)
    tokenizer = hashfast.Tokenizer.load(folder)
    signatures = hashfast.WEIGHTS / "smollm2-135m-instruct.safetensors"
    encoders, about = hashfast.load_signatures(signatures, model.fingerprint())
    settings = hashfast.SparseSettings(budget=512)  # tokens read per step; without encoders and settings: dense attention
    session = hashfast.Session(model, tokenizer, 4096, encoders, settings, hashfast.DecodeOptions(temperature=0))
    print(session.generate(open("book.txt").read()[:10000], max_new_tokens=64))

The names below are imported when they are first used, so that `import hashfast` itself loads neither torch nor triton.
"""
import importlib
from typing import Any

__version__ = "0.1.0"

_WHERE = {
    "HashConfig": "hash_attention",
    "HashEncoder": "hash_attention",
    "select_tokens": "hash_attention",
    "sparse_attention": "hash_attention",
    "SparseSettings": "model",
    "WEIGHTS": "common",
    "load_signatures": "runtime.signatures",
    "load_model": "runtime.checkpoint",
    "Tokenizer": "runtime.tokenizer",
    "Decoder": "runtime.decode",
    "DecodeOptions": "runtime.session",
    "Session": "runtime.session",
    "enable": "integrations.transformers",
    "disable": "integrations.transformers",
}
__all__ = list(_WHERE)


def __getattr__(name: str) -> Any:
    if name not in _WHERE:
        raise AttributeError(f"module 'hashfast' has no attribute {name!r}")
    return getattr(importlib.import_module(f"hashfast.{_WHERE[name]}"), name)


def __dir__() -> list[str]:
    return sorted([*globals(), *_WHERE])
