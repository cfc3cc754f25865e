"""The decode loop: prefill prompts, then one captured step per token. generate.py, eval.py and bench.py all run this."""
import time
from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor
from tqdm import tqdm

import tp
from model import SparseSettings, Transformer, TransformerBlock

PREFILL_CHUNK = 2048


@dataclass(frozen=True)
class Sampling:
    """temperature 0 is greedy; top_k None keeps the whole vocabulary."""
    temperature: float = 0.8
    top_k: int | None = 200


def sample(logits: Tensor, sampling: Sampling) -> Tensor:
    """logits [B, vocab] -> token ids int64 [B]."""
    if sampling.temperature < 1e-6:  # the logits would overflow
        return logits.argmax(dim=-1)
    logits = logits.float() / sampling.temperature
    if sampling.top_k is not None:
        kept = logits.topk(min(sampling.top_k, logits.shape[-1]), dim=-1).values[:, -1:]
        logits = logits.masked_fill(logits < kept, float("-inf"))
    # the Gumbel trick draws from the distribution without the host sync that torch.multinomial needs
    noise = torch.empty_like(logits).exponential_(1)
    return tp.from_first((logits.softmax(dim=-1) / noise).argmax(dim=-1))


class Decoder:
    """The decode step of a model with its static inputs: one CUDA graph on a GPU, compiled blocks on a CPU.

    token int64 [B, 1]: the token that the next step reads; a step leaves the token it chose here.
    seq_lens int32 [B]: tokens in the cache; a step adds one, `active` ones that is.
    active int32 [B]: 0 once a sequence has read one of `stop_ids`: its token and length then stay as they are, and a step
        writes the K and V of its end token again, in the same place.
    logits [B, vocab]: what the last step computed.
    """

    def __init__(self, model: Transformer, batch: int, sampling: Sampling, compiled: bool,
                 stop_ids: Collection[int] = ()) -> None:
        device = model.tok_embeddings.weight.device
        self.model, self.sampling = model, sampling
        self.token = torch.zeros(batch, 1, dtype=torch.int64, device=device)
        self.seq_lens = torch.zeros(batch, dtype=torch.int32, device=device)
        self.active = torch.ones_like(self.seq_lens)
        self.stop_ids = torch.tensor(sorted(stop_ids) or [-1], device=device)  # -1 is no token
        self.block: Callable = TransformerBlock.forward
        self.stem, self.head = self._stem, self._head
        if compiled:
            # one block is compiled and serves all layers; the stem and the head are small. On a GPU the tuning also turns
            # products of one row into Triton kernels, which take in the norms around them.
            tuning = {"coordinate_descent_tuning": True} if device.type == "cuda" else None
            self.block, self.stem, self.head = (torch.compile(part, fullgraph=True, dynamic=False, options=tuning)
                                                for part in (self.block, self.stem, self.head))
        self.graph: torch.cuda.CUDAGraph | None = None

    def _stem(self, token: Tensor, seq_lens: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        return self.model.embed(token, (seq_lens - 1)[:, None])

    def _head(self, x: Tensor, token: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        logits = self.model.logits(x)[:, -1]
        ended = (token == self.stop_ids).any(dim=-1, keepdim=True)  # [B, 1]
        return logits, torch.where(ended, token, sample(logits, self.sampling)[:, None]), 1 - ended[:, 0].int()

    def _step(self) -> None:
        self.seq_lens += self.active
        x, cos, sin = self.stem(self.token, self.seq_lens)
        for layer in self.model.layers:
            x = self.block(layer, x, cos, sin, self.seq_lens)
        self.logits, chosen, active = self.head(x, self.token)
        self.token.copy_(chosen)
        self.active.copy_(active)

    @torch.inference_mode()
    def prepare(self) -> float:
        """Compile, and capture the graph on a GPU. Writes cache row 0, so call it before the prefill. -> seconds."""
        started = time.perf_counter()
        if self.token.is_cuda:
            side = torch.cuda.Stream()  # capture needs a warm-up away from the default stream
            side.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(side):
                self.seq_lens.zero_()
                self._step()
            torch.cuda.current_stream().wait_stream(side)
            self.graph = torch.cuda.CUDAGraph()
            self.seq_lens.zero_()
            with torch.cuda.graph(self.graph):
                self._step()
            torch.cuda.synchronize()
        else:
            self.seq_lens.zero_()
            self._step()
        return time.perf_counter() - started

    def start(self, token: Tensor, lengths: int | Tensor) -> None:
        """The next step reads `token` (int64 [B]) with `lengths` tokens in the cache: of every sequence, or int [B]."""
        self.token.copy_(token[:, None])
        self.seq_lens[:] = lengths
        self.active.fill_(1)

    @torch.inference_mode()
    def step(self) -> None:
        if self.graph is None:
            self._step()
        else:
            self.graph.replay()


def synchronize(device: str) -> None:
    if device.startswith("cuda"):
        torch.cuda.synchronize()


@torch.inference_mode()
def prefill(model: Transformer, ids: Tensor, batch: int, start: int = 0, chunk: int = PREFILL_CHUNK, row: int = 0) -> Tensor:
    """Fill `batch` cache rows from `row` on with one prompt, ids int64 [T] at `start` -> logits of its last position [vocab].

    It is read once, `chunk` tokens at a time, and copied.
    """
    end = start + len(ids)
    with tqdm(total=len(ids), desc="prefill", unit="tok", delay=2, leave=False, disable=None) as progress:
        for part in ids.split(chunk):
            logits = model.prefill(part, row, start)
            start += len(part)
            progress.update(len(part))
    if batch > 1:
        for layer in model.layers:
            for buffer in layer.attention.cache.buffers():
                buffer[row + 1:row + batch, :, :end] = buffer[row:row + 1, :, :end]
    return logits


def decode(decoder: Decoder, first: Tensor, lengths: int | Tensor, count: int) -> Iterator[list[int]]:
    """Yield `first` (int64 [B]) and the tokens after it, `count` steps of one token id per sequence.

    `lengths`: prompt tokens in the cache, of every sequence or int [B]. After an end token a sequence repeats it.

    On a GPU the host is always one step behind: it reads a token while the next step runs, so it never holds a step up.
    """
    decoder.start(first, lengths)
    if not first.is_cuda:
        yield first.tolist()
        for _ in range(count - 1):
            decoder.step()
            yield decoder.token[:, 0].tolist()
        return
    host = torch.empty(count, len(first), dtype=torch.int64, pin_memory=True)
    arrived = [torch.cuda.Event() for _ in range(count)]
    for i in range(count):
        if i > 0:
            decoder.step()
        host[i].copy_(decoder.token[:, 0], non_blocking=True)
        arrived[i].record()
        if i > 0:
            arrived[i - 1].synchronize()
            yield host[i - 1].tolist()
    arrived[-1].synchronize()
    yield host[-1].tolist()


def decode_all(decoder: Decoder, first: Tensor, lengths: Tensor, count: int, stop_ids: Collection[int],
               emit: Callable[[int, int, bool], None]) -> tuple[list[list[int]], int]:
    """Decode until every sequence has ended or has `count` tokens -> new tokens of each (end token included), steps run.

    emit(sequence, token, whether it is that sequence's last) is called for each token.
    """
    tokens: list[list[int]] = [[] for _ in range(len(first))]
    running = range(len(first))
    steps = 0
    for row in decode(decoder, first, lengths, count):
        steps += 1
        for i in running:
            tokens[i].append(row[i])
            emit(i, row[i], row[i] in stop_ids or steps == count)
        running = [i for i in running if row[i] not in stop_ids]
        if not running:
            break
    synchronize(str(first.device))
    return tokens, steps - 1  # the first token came from the prefill


def tokens_read(settings: SparseSettings | None, model: Transformer, length: float) -> float:
    """Tokens whose K and V one decode step reads, mean over the layers, at a cache of `length` tokens."""
    if settings is None:
        return length
    dense = min(settings.dense_layers, model.args.n_layer) / model.args.n_layer
    return dense * length + (1 - dense) * min(settings.budget, length)


def bytes_per_step(model: Transformer, settings: SparseSettings | None, length: float, batch: int) -> int:
    """Bytes that one decode step must read at a cache of `length`: weights once, K, V and signatures per sequence."""
    args, weight = model.args, model.tok_embeddings.weight
    weights = sum(p.numel() * p.element_size() for p in model.parameters())
    if all(p is not weight for p in model.output.parameters()):
        weights -= weight.numel() * weight.element_size()  # of the input table a step reads one row
    row = 2 * args.n_kv_head * args.head_dim * weight.element_size()  # K and V of one token, without share="query"
    signatures = 0
    for layer in model.layers:
        encoder = layer.attention.encoder
        if encoder is not None and layer.attention.sparse is not None:
            signatures += encoder.n_signature_head * encoder.config.words * 4 * length
    return int(weights + batch * (args.n_layer * row * tokens_read(settings, model, length) + signatures))
