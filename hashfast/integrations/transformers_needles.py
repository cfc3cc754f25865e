"""Retrieval documents answered by an enabled transformers model: those of `hashfast eval needles`, one at a time."""
import functools
import math
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import torch
from transformers import PreTrainedModel

from hashfast.common import UserError
from hashfast.integrations.transformers import CACHE, binding_window, enable, new_cache
from hashfast.integrations.transformers_capture import load
from hashfast.research.evaluator import EvalConfig
from hashfast.research.tasks import EXTRA, Question, is_right, make_question
from hashfast.runtime.prompts import read_text
from hashfast.runtime.tokenizer import Tokenizer


@torch.no_grad()
def greedy_answer(model: PreTrainedModel, question: Question) -> list[int]:
    """The context is read densely; the question and the answer go through decode steps, as in research/tasks.py."""
    ids, asked, new = question.ids[None].to(model.device), len(question.ids) - question.answer, question.answer + EXTRA
    options = {"use_cache": True, "logits_to_keep": 1, CACHE: new_cache(model, 1, asked + new, padded=False)}
    logits = model(ids[:, :question.context], **options).logits
    for i in range(question.context, asked):
        logits = model(ids[:, i:i + 1], **options).logits
    answer = [logits[0, -1].argmax()]
    while len(answer) < new:
        answer.append(model(answer[-1].view(1, 1), **options).logits[0, -1].argmax())
    return torch.stack(answer).tolist()


def needles(config: EvalConfig, data: list[Path], tasks: list[str], samples: int) -> Iterator[dict]:
    """A row per task, signatures file and ratio: right answers of `samples` documents."""
    model = load(config.checkpoint_path, config.device, getattr(torch, config.precision))
    longest = min(model.config.max_position_embeddings, binding_window(model) or config.context)
    if config.context > longest:
        raise UserError(f"--context {config.context} is more than the model's {longest}; give less")
    tokenizer = Tokenizer.load(config.checkpoint_path)
    source = SimpleNamespace(tokenizer=tokenizer, read_text=functools.cache(read_text), config=config)
    for task in tasks:
        questions = [make_question(source, data, task, config.context, i) for i in range(samples)]
        for signatures in config.signatures:
            for ratio in config.ratios:
                budget = min(config.context, max(math.ceil(config.context / ratio), config.sink + config.recent))
                enable(model, signatures, budget, sink=config.sink, recent=config.recent)
                right = [is_right(tokenizer, greedy_answer(model, question), question.needle) for question in questions]
                print(f"{config.context:6} {task:18} {signatures.stem} 1/{ratio:<3} exact {sum(right):3} of {samples}",
                      flush=True)
                yield {"model": config.checkpoint_path.resolve().name, "context": config.context, "task": task,
                       "selector": "hash", "signatures": signatures.name, "ratio": ratio, "budget": budget,
                       "backend": "transformers", "exact": sum(right), "samples": samples, "per_sample": right}
