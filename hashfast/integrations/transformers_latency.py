"""Latency of transformers' generate: hash attention beside SDPA and FlashAttention, random weights."""
import statistics
import time
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from torch._dynamo.utils import counters
from transformers import AutoModelForCausalLM, LlamaConfig, PreTrainedModel, Qwen2Config, Qwen3Config
from transformers.utils import is_flash_attn_2_available

from hashfast.hash_attention import HashConfig
from hashfast.integrations.transformers import NAME, disable, enable, fingerprint
from hashfast.model import ModelArgs
from hashfast.research.latency import skip_on_oom
from hashfast.runtime.checkpoint import PRESETS
from hashfast.runtime.decode import synchronize
from hashfast.runtime.signatures import random_encoders


def random_transformers(args: ModelArgs, device: str, dtype: torch.dtype) -> PreTrainedModel:
    """A model of transformers with random weights."""
    rope: dict[str, Any] = {"rope_type": "default", "rope_theta": args.rope_theta}
    if args.rope_scaling is not None:
        scaling = args.rope_scaling
        rope |= {"rope_type": scaling.kind, "factor": scaling.factor, "low_freq_factor": scaling.low_freq_factor,
                 "high_freq_factor": scaling.high_freq_factor,
                 "original_max_position_embeddings": scaling.original_max_position}
    kind = Qwen3Config if args.qk_norm else Qwen2Config if args.qkv_bias else LlamaConfig
    config = kind(hidden_size=args.dim, intermediate_size=args.intermediate_size, num_hidden_layers=args.n_layer,
                  num_attention_heads=args.n_head, num_key_value_heads=args.n_kv_head, head_dim=args.head_dim,
                  vocab_size=args.vocab_size, rms_norm_eps=args.norm_eps, rope_parameters=rope,
                  max_position_embeddings=args.max_position, tie_word_embeddings=args.tie_embeddings, use_cache=True,
                  bos_token_id=None, eos_token_id=None, pad_token_id=None)
    with torch.device(device):
        return AutoModelForCausalLM.from_config(config, dtype=dtype).eval()


class Clock:
    """A stopping criterion that never stops: the time after each new token."""

    def __init__(self, device: str) -> None:
        self.device = device
        self.times: list[float] = []

    def __call__(self, ids: Tensor, scores: Any, **kwargs: Any) -> Tensor:
        synchronize(self.device)
        self.times.append(time.perf_counter())
        return torch.zeros(len(ids), dtype=torch.bool, device=ids.device)


def time_generate(model: PreTrainedModel, name: str, batch: int, context: int, implementation: str, sparsity: float,
                  steps: int) -> dict:
    """One row: the second of two equal calls of generate, the first of which compiles. Static caches and CUDA graphs, but for
    FlashAttention, which transformers runs with a dynamic one."""
    device = str(model.device)
    options: dict[str, Any] = {"max_new_tokens": steps, "do_sample": False}
    if implementation == NAME:
        enable(model, random_encoders(HashConfig(), fingerprint(model)), sparsity=sparsity)
    else:
        model.set_attn_implementation(implementation)
        options["cache_implementation"] = "static" if implementation == "sdpa" else None
    ids = torch.randint(model.config.vocab_size, (batch, context), device=device)
    try:
        for _ in range(2):
            graphs, clock = counters["stats"]["unique_graphs"], Clock(device)
            if device.startswith("cuda"):
                torch.cuda.empty_cache()
                torch.cuda.reset_peak_memory_stats()
            synchronize(device)
            begin = time.perf_counter()
            model.generate(ids, stopping_criteria=[clock], **options)
    finally:
        disable(model)
        model.__dict__.pop("_previous_max_cache_length", None)  # the next shape's static cache may be shorter
    peak = torch.cuda.max_memory_allocated() / 2 ** 30 if device.startswith("cuda") else None
    times = [1000 * (b - a) for a, b in zip(clock.times, clock.times[1:], strict=False)]
    return {"model": name, "context": context, "batch": batch, "implementation": implementation,
            "sparsity": sparsity if implementation == NAME else None, "ms_per_token": statistics.median(times),
            "first_token_s": clock.times[0] - begin, "peak_gib": peak,
            "recompilations": counters["stats"]["unique_graphs"] - graphs}


def transformers_rows(preset: str, shapes: list[tuple[int, int]], implementations: list[str], sparsity: float, steps: int,
                      device: str = "cuda") -> Iterator[dict]:
    """Rows for each (batch, context) and implementation; FlashAttention only where it is installed."""
    model = random_transformers(PRESETS[preset], device, torch.bfloat16)
    for batch, context in shapes:
        for implementation in implementations:
            if implementation != "flash_attention_2" or is_flash_attn_2_available():
                with skip_on_oom(f"{batch} x {context} {implementation}"):
                    yield time_generate(model, preset, batch, context, implementation, sparsity, steps)
                if device.startswith("cuda"):
                    torch.compiler.reset()  # the graphs hold the cache of this row
