"""The model `hashfast` of lm-evaluation-harness (0.4.13): its `hf` model, enabled, whose scores come from decode steps too.

    hashfast lm-eval run --model hashfast --model_args pretrained=FOLDER,signatures=FILE,sparsity=16 --tasks ...

The harness's own `hf` with an enabled model generates by signatures as well, but reads the texts that it scores densely.
"""
from typing import Any

import torch
from lm_eval.api.registry import register_model
from lm_eval.models.huggingface import HFLM
from torch import Tensor
from tqdm import tqdm

from hashfast.common import UserError
from hashfast.integrations.transformers import CACHE, enable, new_cache


@register_model("hashfast")
class HashfastLM(HFLM):
    """HFLM's arguments, those of `enable`, and `tail`: last tokens of a prompt that are decoded, not read densely."""

    def __init__(self, pretrained: Any, signatures: str | None = None, budget: int | None = None, sparsity: float | None = None,
                 sink: int = 64, recent: int = 128, tail: int = 64, **kwargs: Any) -> None:
        if str(kwargs.get("batch_size", 1)).startswith("auto"):
            raise UserError("--batch_size auto is not supported with --model hashfast; give a number")
        super().__init__(pretrained, **kwargs)
        self.tail = tail
        enable(self.model, signatures, budget, sparsity, sink, recent)

    def _loglikelihood_tokens(self, requests: list[tuple[tuple[str, str] | None, list[int], list[int]]],
                              disable_tqdm: bool = False, override_bs: int | None = None) -> list[tuple[float, bool]]:
        """Of each (texts, context ids, continuation ids): the continuation's log-likelihood, and whether it is greedy."""
        longest = max((len(request[2]) for request in requests), default=1)
        if longest > self.max_length:
            raise UserError(f"a continuation of this task has {longest} tokens, but at most max_length={self.max_length} fit")
        answers: list[tuple[float, bool]] = [(0.0, True)] * len(requests)
        order = sorted(range(len(requests)), key=lambda i: -len(requests[i][1]) - len(requests[i][2]))
        size = override_bs or self.batch_size
        for first in tqdm(range(0, len(order), size), desc="score", unit="batch", disable=disable_tqdm or self.rank != 0):
            batch = order[first:first + size]
            texts = [(requests[i][1] + requests[i][2])[-(self.max_length + 1):] for i in batch]
            for i, answer in zip(batch, self.score(texts, [len(requests[i][2]) for i in batch]), strict=True):
                answers[i] = answer
                if requests[i][0] is not None:
                    self.cache_hook.add_partial("loglikelihood", requests[i][0], answer)
        return answers

    @torch.no_grad()
    def score(self, texts: list[list[int]], counts: list[int]) -> list[tuple[float, bool]]:
        """The last `counts` tokens of each text, of two tokens at least: the log-likelihood, and whether they are greedy."""
        starts = [max(1, len(text) - count - self.tail) for text, count in zip(texts, counts, strict=True)]
        longest, steps = max(starts), max(len(text) - start for text, start in zip(texts, starts, strict=True))
        ids = torch.zeros(len(texts), longest + steps, dtype=torch.int64)  # starts end at `longest`, texts where they end
        mask = torch.ones_like(ids)
        for row, (text, start) in enumerate(zip(texts, starts, strict=True)):
            ids[row, longest - start:longest - start + len(text)] = torch.tensor(text)
            mask[row, :longest - start] = 0
        ids, mask = ids.to(self.device), mask.to(self.device)
        positions = (mask.cumsum(1) - 1).clamp(min=0)
        cache = new_cache(self.model, len(texts), longest + steps - 1, padded=min(starts) < longest)
        scores, greedy = [], []
        for step in range(steps):
            read = slice(0, longest) if step == 0 else slice(longest + step - 1, longest + step)
            logits = self.model(input_ids=ids[:, read], attention_mask=mask[:, :read.stop], position_ids=positions[:, read],
                                use_cache=True, logits_to_keep=1, **{CACHE: cache}).logits[:, -1].float()
            target = ids[:, read.stop, None]
            scores.append(logits.log_softmax(-1).gather(1, target)[:, 0])
            greedy.append(logits.argmax(-1) == target[:, 0])
        return [self.sum_up(torch.stack(scores)[:len(text) - start, row], torch.stack(greedy)[:len(text) - start, row], count)
                for row, (text, start, count) in enumerate(zip(texts, starts, counts, strict=True))]

    @staticmethod
    def sum_up(scores: Tensor, greedy: Tensor, count: int) -> tuple[float, bool]:
        return scores[-count:].sum().item(), bool(greedy[-count:].all())
