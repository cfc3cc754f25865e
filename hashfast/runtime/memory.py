"""What a model, its caches and a decode step take: tokens read, bytes read, bytes held; and the plan that fits them in."""
import math
import sys
from pathlib import Path

import torch
from torch import nn

from hashfast.common import UserError
from hashfast.hash_attention import HashEncoder
from hashfast.model import SparseSettings, Transformer
from hashfast.runtime import distributed

MOST_SEQUENCES = 64  # decoded together: a step of more is bound by compute, and each prompt waits longer for its text

# ---------------------------------------------------------------------------------------------------------------- a step


def tokens_read(settings: SparseSettings | None, model: Transformer, length: float) -> float:
    """Tokens whose K and V one decode step reads, mean over the layers, at a cache of `length` tokens."""
    if settings is None:
        return length
    n_layer, dense = model.args.n_layer, min(settings.dense_layers, model.args.n_layer)
    budgets = settings.budgets or ((settings.budget,),) * n_layer
    read = [sum(min(budget, length) for budget in heads) / len(heads) for heads in budgets[dense:]]
    return (dense * length + sum(read)) / n_layer


def bytes_per_step(model: Transformer, settings: SparseSettings | None, length: float, batch: int) -> int:
    """Bytes that one decode step must read at a cache of `length`: weights once, K, V and signatures per sequence."""
    args, weight = model.args, model.tok_embeddings.weight
    weights = weight_bytes(model)
    if all(p is not weight for p in model.output.parameters()):
        weights -= weight.numel() * weight.element_size()  # of the input table a step reads one row
    row = 2 * args.n_kv_head * args.head_dim * weight.element_size()  # K and V of one token, without share="query"
    signatures = 0
    for layer in model.layers:
        encoder = layer.attention.encoder
        if encoder is not None and layer.attention.sparse is not None:
            signatures += encoder.n_signature_head * encoder.config.words * 4 * length
    return int(weights + batch * (args.n_layer * row * tokens_read(settings, model, length) + signatures))


# ------------------------------------------------------------------------------------------------------------------ held

def cache_bytes_per_token(model: Transformer, encoders: list | None, batch: int, dense_layers: int = 0) -> tuple[int, int]:
    """Bytes that K and V, and signatures, of one token in each of `batch` sequences take in the caches of all layers."""
    args = model.args
    row = batch * 2 * args.n_kv_head * args.head_dim * model.tok_embeddings.weight.element_size() * args.n_layer
    return row, batch * sum(e.n_signature_head * e.config.words * 4 for e in (encoders or [])[dense_layers:])


def weight_bytes(model: Transformer) -> int:
    return sum(p.numel() * p.element_size() for p in model.parameters())


def prefill_bytes(model: Transformer, chunk: int, gathered: int = 0) -> int:
    """An upper estimate of what reading `chunk` prompt tokens at a time takes, whatever the prompt's length.

    Activations peak in the feed-forward: gate and up, their product, the residual and norm; float32 copies where not fused.
    Of quantised weights many rows are multiplied by a copy in full. gathered: cached tokens whose K and V are copied for a
    chunk that is read sparsely.
    """
    args = model.args
    weights = 0 if isinstance(model.layers[0].feed_forward.w13, nn.Linear) else 2 * args.intermediate_size * args.dim
    heads = (args.n_head + 2 * args.n_kv_head) * args.head_dim
    elements = chunk * (4 * args.intermediate_size + 8 * args.dim + 2 * heads) + weights
    elements += gathered * 2 * args.n_kv_head * args.head_dim
    return elements * model.tok_embeddings.weight.element_size()


def available_memory(device: torch.device) -> int | None:
    """Bytes free on the device, for a CPU those of the machine; None where that cannot be known."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    meminfo = Path("/proc/meminfo")
    if device.type != "cpu" or not meminfo.exists():
        return None
    lines = dict(line.split(":") for line in meminfo.read_text().splitlines())
    return int(lines["MemAvailable"].split()[0]) * 1024


def free_memory(device: torch.device) -> int:
    """Bytes free for caches on the device: a tenth, 1 GiB at most, is left to what a prefill chunk and a step work with."""
    free = available_memory(device)
    if free is None:
        return sys.maxsize
    if device.type == "cpu":
        free //= distributed.world_size()  # the ranks share it
    return free - min(free // 10, 2 ** 30)


# ------------------------------------------------------------------------------------------------------------------ plan

def context_limit(model: Transformer) -> int:
    """Tokens that a model is made for: beyond them it sees unknown positions, or a window slides that is not supported."""
    return min(model.args.max_position, model.args.sliding_window or model.args.max_position)


def sparse_settings(length: int, tokens: int, budget: int = 2048, sparsity: float | None = None, sink: int = 64,
                    recent: int = 128, dense_layers: int = 0) -> SparseSettings:
    """What hash steps read in caches of `length`: `budget` tokens, or 1 / `sparsity` of `tokens`, those of prompt and answer,
    rounded up to 64 and at least 64 more than `sink` and `recent`."""
    if sparsity is not None:
        budget = max(64 * math.ceil(tokens / sparsity / 64), sink + recent + 64)
    return SparseSettings(min(budget, length), sink, recent, dense_layers)


def _room(models: list[Transformer], encoders: list[HashEncoder] | None, length: int, batch: int, chunk: int,
          dense_layers: int, gathered: int) -> tuple[int, int, int, int]:
    """Bytes of K and V and of signatures per token of all sequences, of work, and free for caches."""
    row = sum(cache_bytes_per_token(model, None, batch)[0] for model in models)
    signature_row = cache_bytes_per_token(models[-1], encoders, batch, dense_layers)[1]
    # a large prefill chunk takes more than free_memory leaves
    work = max(prefill_bytes(model, min(chunk, length), gathered) for model in models)
    free = distributed.all_min(free_memory(models[0].tok_embeddings.weight.device) - max(0, work - 2 ** 30))
    return row, signature_row, work, free


def largest_batch(models: list[Transformer], encoders: list[HashEncoder] | None, length: int, count: int, chunk: int,
                  spare: int = 0, dense_layers: int = 0, gathered: int = 0) -> int:
    """How many of `count` sequences of `length` tokens are decoded together: as many as fit, MOST_SEQUENCES at most."""
    row, signature_row, _, free = _room(models, encoders, length, 1, chunk, dense_layers, gathered)
    return max(1, min(count, MOST_SEQUENCES, free // ((row + signature_row) * (length + spare))))


def plan_memory(models: list[Transformer], encoders: list[HashEncoder] | None, length: int, needed: int, batch: int, chunk: int,
                spare: int = 0, dense_layers: int = 0, gathered: int = 0) -> int:
    """Print what weights and caches of `length` tokens take, or refuse, before they are allocated -> the caches' length.

    That is as much of `length` as fits, and no less than `needed`. encoders: the last model's.  chunk: prompt tokens read at a
    time.  spare: rows past the last token, which drafts need.  gathered: as of `prefill_bytes`.
    """
    row, signature_row, work, free = _room(models, encoders, length, batch, chunk, dense_layers, gathered)
    fits = max(free // (row + signature_row) - spare, 0)
    length = max(needed, min(length, fits))
    if length > fits:
        raise UserError(f"the caches for {batch} x {length} tokens take {(row + signature_row) * length / 2 ** 30:.1f} GiB, "
                        f"{free / 2 ** 30:.1f} GiB are free for them, and at most {fits} tokens fit; "
                        "shorten the prompt, --max_new_tokens or --max_seq_length, or use a smaller --batch_size")
    each = f" of each of {distributed.world_size()} ranks" if distributed.world_size() > 1 else ""
    print(f"memory plan{each}: weights {sum(map(weight_bytes, models)) / 2 ** 30:.2f} GiB, "
          f"K and V {row * length / 2 ** 30:.2f} GiB, signatures "
          f"{signature_row * length / 2 ** 20:.1f} MiB for {f'{batch} x ' if batch > 1 else ''}{length} tokens, "
          f"work {work / 2 ** 30:.2f} GiB at most; up to {fits} tokens fit", file=sys.stderr)
    return length
