"""Budgets per layer and head with a fixed sum: heads whose attention is spread over many tokens read more, the others fewer.

train_hash.py measures recall against budget on held-out sequences; `divide` allocates units of budget where recall gains most,
and the signatures file keeps the result as shares. `budgets_for` turns shares into tokens, before decoding: a step's shapes
stay static.

A budget is the window (sink and recent) and units of 64 selected tokens, of which every head has at least one. A share is a
head's part of the units above that one, with mean 1 over all heads.
"""
import math
from dataclasses import replace

import torch
from torch import Tensor

from hashfast.common import UserError
from hashfast.model import SparseSettings

UNIT = 64
MOST = 3  # cap of a head's selected tokens, as a multiple of the mean: rows of indices are padded to it, and 4 gain little
RATIOS = (8, 16, 32, 64)  # of the context to the budget that shares are made for


def falling(gains: list[float]) -> list[float]:
    """The slopes of the concave hull of a curve with these slopes (pool adjacent violators)."""
    pools: list[tuple[float, int]] = []  # mean, count
    for gain in gains:
        mean, count = gain, 1
        while pools and pools[-1][0] < mean:
            before, n = pools.pop()
            mean, count = (before * n + mean * count) / (n + count), n + count
        pools.append((mean, count))
    return [mean for mean, count in pools for _ in range(count)]


def divide(curves: Tensor, units: int) -> Tensor:
    """Allocate `units` units per head on average so that the heads' summed recall is the largest.

    curves float32 [heads, J]: recall of 1 .. J units, J >= units -> int64 [heads], each 1 .. J, their sum heads * units.
    Greedy on the slopes of each curve's concave hull: optimal where the curves are concave.
    """
    slopes = torch.tensor([falling(row) for row in curves.double().diff(dim=1).tolist()], dtype=torch.float64)
    # by unit first, so that heads of equal slopes take turns
    best = slopes.T.flatten().sort(descending=True, stable=True).indices[:len(curves) * (units - 1)]
    return 1 + torch.bincount(best % len(curves), minlength=len(curves))


def calibrate(curves: Tensor, context: int, window: int) -> dict[str, list[list[float]]]:
    """Shares for each ratio at which a head has more than one unit. curves [n_layer, Hs, J] -> ratio: [n_layer][Hs]."""
    shares = {}
    for ratio in RATIOS:
        units = mean_units(context // ratio, window)
        if units < 2:
            break
        above = divide(curves.flatten(0, 1)[:, :MOST * units], units) - 1
        shares[str(ratio)] = (above / (units - 1)).view(curves.shape[:2]).tolist()
    return shares


def mean_units(budget: int, window: int) -> int:
    return max(1, (budget - window) // UNIT)


def curve_units(context: int, window: int) -> int:
    """J, the units up to which curves are needed; no more than the context has."""
    return max(1, min(MOST * mean_units(context // RATIOS[0], window), (context - window) // UNIT))


def budgets_for(about: dict, budget: int, tokens: int, window: int, dense_layers: int = 0) -> tuple[tuple[int, ...], ...]:
    """Tokens of each layer and signature head, `budget` on average over the layers that are not dense, in whole units.

    about: a signatures file's metadata; of its shares those of the ratio nearest to tokens / budget are taken.
    """
    shares = about.get("budgets")
    if not shares:
        raise UserError("these signatures hold no calibrated budgets; train_hash.py --calibrate --out FILE measures them "
                        "(with a longer --context where it stored none), or use --budgets even")
    nearest = min(shares, key=lambda ratio: abs(math.log(int(ratio) * budget / tokens)))
    wanted = torch.tensor(shares[nearest], dtype=torch.float64)
    n_layer, heads = wanted.shape
    wanted = wanted[dense_layers:].flatten()
    above = mean_units(budget, window) - 1
    wanted = wanted * (above / wanted.mean().clamp(min=1e-9))
    units = wanted.floor()
    left = above * len(wanted) - int(units.sum()) if wanted.any() else 0
    units[(wanted - units).sort(descending=True, stable=True).indices[:left]] += 1
    sparse = (window + UNIT * (1 + units)).long().view(-1, heads).tolist()
    return tuple((budget,) * heads for _ in range(min(dense_layers, n_layer))) + tuple(tuple(row) for row in sparse)


def calibrated(settings: SparseSettings, about: dict, tokens: int, length: int) -> SparseSettings:
    """`settings`, its budget spread over layers and heads as `budgets_for` says, for a cache of `length` tokens."""
    spread = budgets_for(about, settings.budget, tokens, settings.sink + settings.recent, settings.dense_layers)
    spread = tuple(tuple(min(budget, length) for budget in heads) for heads in spread)
    return replace(settings, budget=max(map(max, spread[settings.dense_layers:]), default=settings.budget), budgets=spread)
