"""Perplexity of a checkpoint on the beginnings of texts, read densely: what quantising cost."""
import math
from pathlib import Path

import torch
from torch import Tensor
from tqdm import tqdm

from hashfast.common import UserError
from hashfast.model import Transformer
from hashfast.runtime.checkpoint import load_model
from hashfast.runtime.prompts import read_text
from hashfast.runtime.tokenizer import Tokenizer

WINDOW = 2048  # tokens of a text that are read together


def read_windows(source: Path, texts: list[Path], count: int) -> list[Tensor]:
    """The first `count` windows of each text, int64 [T], T at most WINDOW and at least 2."""
    tokenizer = Tokenizer.load(source)
    windows = []
    for path in texts:
        ids = tokenizer.encode(read_text(path))
        windows += [window for window in torch.tensor(ids).split(WINDOW)[:count] if len(window) > 1]
    if not windows:
        raise UserError("the --data texts have fewer than two tokens; give longer ones")
    return windows


@torch.inference_mode()
def perplexity(model: Transformer, windows: list[Tensor], task: str) -> float:
    """Of every token of the windows but each first one, given those before it, read densely."""
    device = model.tok_embeddings.weight.device
    total, count = 0.0, 0
    for ids in tqdm(windows, desc=task, unit="window", delay=2, disable=None):
        ids = ids.to(device)
        x, cos, sin = model.embed(ids[None], torch.arange(len(ids), device=device)[None])
        for layer in model.layers:
            x = layer.prompt(x, cos, sin)[0]
        for hidden, following in zip(x[0, :-1].split(256), ids[1:].split(256), strict=True):  # all logits would fill memory
            logprobs = model.logits(hidden[None])[0].float().log_softmax(dim=-1)
            total -= logprobs.gather(-1, following[:, None]).sum().item()
        count += len(ids) - 1
    return math.exp(total / count)


def measure(folder: Path, windows: list[Tensor], device: str, dtype: torch.dtype, task: str) -> float:
    """The perplexity of the model in `folder`, whose memory is free again afterwards."""
    model = load_model(folder, device, dtype)
    limit = min(model.args.max_position, model.args.sliding_window or WINDOW)
    return perplexity(model, [window[:limit] for window in windows], task)
