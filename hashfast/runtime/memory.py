"""What a model, its caches and a decode step take: tokens read, bytes read, bytes held."""
from torch import nn

from hashfast.model import SparseSettings, Transformer


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


def cache_bytes_per_token(model: Transformer, encoders: list | None, batch: int, dense_layers: int = 0) -> tuple[int, int]:
    """Bytes that K and V, and signatures, of one token in each of `batch` sequences take in the caches of all layers."""
    args = model.args
    row = batch * 2 * args.n_kv_head * args.head_dim * model.tok_embeddings.weight.element_size() * args.n_layer
    return row, batch * sum(e.n_signature_head * e.config.words * 4 for e in (encoders or [])[dense_layers:])


def weight_bytes(model: Transformer) -> int:
    return sum(p.numel() * p.element_size() for p in model.parameters())


def prefill_bytes(model: Transformer, chunk: int) -> int:
    """An upper estimate of what reading `chunk` prompt tokens at a time takes, whatever the prompt's length.

    The widest moment is the feed-forward: gate and up, their product, the residual and norm; float32 copies where not fused.
    Of quantised weights many rows are multiplied by a copy in full.
    """
    args = model.args
    weights = 0 if isinstance(model.layers[0].feed_forward.w13, nn.Linear) else 2 * args.intermediate_size * args.dim
    heads = (args.n_head + 2 * args.n_kv_head) * args.head_dim
    numbers = chunk * (4 * args.intermediate_size + 8 * args.dim + 2 * heads) + weights
    return numbers * model.tok_embeddings.weight.element_size()
