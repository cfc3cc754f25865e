"""The decode loop: prefill prompts, then one captured step per token; every command that decodes runs this one."""
import time
from collections.abc import Callable, Collection, Iterator

import torch
from torch import Tensor

from hashfast.model import PrefillSettings, Transformer, TransformerBlock
from hashfast.ops.prompt_attention import piece_sizes
from hashfast.ops.prompt_selection import prefix_rows
from hashfast.progress import Progress
from hashfast.runtime.sampling import Sampling, sample

PREFILL_CHUNK = {"cpu": 2048, "cuda": 4096}  # prompt tokens read at a time, by kind of device


def compile_parts(device: torch.device, *parts: Callable) -> list[Callable]:
    """Each of the functions that make up a decode step, compiled once for every shape it is called with."""
    # on a GPU the tuning also turns products of one row (GEMV) that ops/linear.py leaves to Inductor into Triton kernels
    tuning = {"coordinate_descent_tuning": True} if device.type == "cuda" else None
    return [torch.compile(part, fullgraph=True, dynamic=False, options=tuning) for part in parts]


def capture(step: Callable[[], None], reset: Callable[[], None]) -> torch.cuda.CUDAGraph:
    """One step as a CUDA graph, after one that compiles. reset() is called before each, outside the graph."""
    side = torch.cuda.Stream()  # capture needs a warm-up away from the default stream
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        reset()
        step()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    reset()
    with torch.cuda.graph(graph):
        step()
    torch.cuda.synchronize()
    return graph


class Decoder:
    """The decode step of a model with its static inputs: one CUDA graph on a GPU, compiled blocks on a CPU.

    token int64 [B, 1]: the token that the next step reads; a step leaves the token it chose here.
    seq_lens int32 [B]: tokens in the cache; a step adds one, `active` ones that is.
    active int32 [B]: 0 once a sequence has read one of `stop_ids`: its token and length then stay as they are, and a step
        writes the K and V of its end token again, in the same place.
    logits [B, vocab]: what the last step computed; hidden [B, 1, d]: from what, before the last norm.
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
        if compiled:  # one block is compiled and serves all layers; the stem and the head are small
            self.block, self.stem, self.head = compile_parts(device, self.block, self.stem, self.head)
        self.graph: torch.cuda.CUDAGraph | None = None

    # Both change the step's state themselves: copies made outside of what is compiled would be kernels of their own.

    def _stem(self, token: Tensor, seq_lens: Tensor, active: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        seq_lens += active
        return self.model.stem(token, seq_lens)

    def _head(self, x: Tensor, token: Tensor, active: Tensor) -> Tensor:
        logits = self.model.logits(x)[:, -1]
        ended = (token == self.stop_ids).any(dim=-1, keepdim=True)  # [B, 1]
        token.copy_(torch.where(ended, token, sample(logits, self.sampling)[:, None]))
        active.copy_(1 - ended[:, 0].int())
        return logits

    def _step(self) -> None:
        x, cos, sin = self.stem(self.token, self.seq_lens, self.active)
        for layer in self.model.layers:
            x = self.block(layer, x, cos, sin, self.seq_lens)
        self.hidden, self.logits = x, self.head(x, self.token, self.active)

    @torch.inference_mode()
    def prepare(self) -> float:
        """Compile, and capture the graph on a GPU. Writes cache row 0, so call it before the prefill. -> seconds."""
        started = time.perf_counter()
        if self.token.is_cuda:
            self.graph = capture(self._step, self.seq_lens.zero_)
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


def prompt_chunks(start: int, end: int, chunk: int, settings: PrefillSettings | None) -> Iterator[tuple[int, int, bool]]:
    """(first, last, whether it is read sparsely) of the chunks of tokens start .. end, the last ones of a prompt.

    Chunks that are read sparsely end at multiples of their size, whatever was cached before; then comes the tail.
    """
    if settings is not None and settings.mode == "hash":
        chunk = settings.chunk
        body = max(start, end - settings.tail)
        while start < body:
            last = min(start - start % chunk + chunk, body)
            yield start, last, True
            start = last
    for first in range(start, end, chunk):
        yield first, min(first + chunk, end), False


def pairs_read(length: int, settings: PrefillSettings, dense_share: float = 0.0) -> float:
    """The share of all pairs of a token and one before or at it that are read of a prompt of `length` tokens.

    dense_share: of the layers, those that read everything (without an encoder).
    """
    pairs = 0
    for first, last, is_sparse in prompt_chunks(0, length, settings.chunk, settings):
        rows = prefix_rows(first, settings.chunk, settings.sparsity, length) if is_sparse else None
        count = last - first
        pairs += count * (first if rows is None else rows.count) + count * (count + 1) // 2
    return dense_share + (1 - dense_share) * pairs / (length * (length + 1) // 2)


@torch.inference_mode()
def prefill(model: Transformer, ids: Tensor, batch: int, start: int = 0, chunk: int | None = None, row: int = 0,
            settings: PrefillSettings | None = None) -> Tensor:
    """Fill `batch` cache rows from `row` on with one prompt, ids int64 [T] at `start` -> logits of its last position [vocab].

    It is read once, `chunk` tokens at a time (default: what prefill is compiled for, or PREFILL_CHUNK), and copied.
    settings: of mode "hash": read sparsely, in its chunks.
    """
    end = start + len(ids)
    chunk = chunk or model.static_chunk or PREFILL_CHUNK[ids.device.type]
    with Progress("prefill", len(ids), "tok") as progress:
        for first, last, is_sparse in prompt_chunks(start, end, chunk, settings):
            logits = model.prefill(ids[first - start:last - start], row, first, settings if is_sparse else None)
            progress.done += last - first
    if batch > 1:
        for layer in model.layers:
            for buffer in layer.attention.cache.rows():
                buffer[row + 1:row + batch, :, :end] = buffer[row:row + 1, :, :end]
    return logits


@torch.inference_mode()
def prepare_prefill(model: Transformer, chunk: int | None = None, settings: PrefillSettings | None = None) -> float:
    """Compile prefill for the caches of the model, whose first rows it writes. -> seconds."""
    started = time.perf_counter()
    cache = model.layers[0].attention.cache
    device, length = cache.k.device, cache.k.shape[2]
    if settings is not None and settings.mode == "dense":
        settings = None
    chunk = min(settings.chunk if settings is not None else chunk or PREFILL_CHUNK[device.type], length)
    model.compile_prefill(chunk)
    # one chunk compiles; on a GPU later ones see a prefix in every size of piece, as kernels may have to be made for each
    sizes = piece_sizes(chunk) if device.type == "cuda" else []
    if settings is not None:  # the first chunk that reads as many rows, and the second, which reads the first whole
        sizes = [chunk, *(max(int((size - chunk) * settings.sparsity // chunk + 1), 2) * chunk for size in sizes)]
    for start in [0, *(size for size in sizes if size + chunk <= length)]:
        model.prefill(torch.zeros(chunk, dtype=torch.int64, device=device), start=start, settings=settings)
    synchronize(device.type)
    return time.perf_counter() - started


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
               emit: Callable[[int, int, bool], bool | None]) -> tuple[list[list[int]], int]:
    """Decode until every sequence has ended or has `count` tokens -> new tokens of each (end token included), steps run.

    emit(sequence, token, whether it is that sequence's last) is called for each token; where it returns True, it is the last.
    """
    tokens: list[list[int]] = [[] for _ in range(len(first))]
    running = list(range(len(first)))
    steps = 0
    for row in decode(decoder, first, lengths, count):
        steps += 1
        still = []
        for i in running:
            tokens[i].append(row[i])
            if not emit(i, row[i], row[i] in stop_ids or steps == count) and row[i] not in stop_ids:
                still.append(i)
        running = still
        if not running:
            break
    synchronize(str(first.device))
    return tokens, steps - 1  # the first token came from the prefill
