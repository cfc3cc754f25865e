"""Budgets that follow the need: nothing is lost or invented, and the division is the best there is."""
import itertools
from pathlib import Path

import pytest
import torch

from hashfast.common import UserError
from hashfast.hash_attention import HashConfig
from hashfast.model import SparseSettings
from hashfast.research import budgets
from hashfast.research.budgets import UNIT, budgets_for, calibrate, calibrated, curve_units, divide, falling
from hashfast.runtime.checkpoint import load_model
from hashfast.runtime.signatures import random_encoders, save_signatures

WINDOW = 192


def curves(heads: int, length: int, seed: int = 0, concave: bool = True) -> torch.Tensor:
    """Recall of 1 .. length units, growing towards 1."""
    gains = torch.rand(heads, length, generator=torch.Generator().manual_seed(seed)) * torch.logspace(0, -2, heads)[:, None]
    if concave:
        gains = gains.sort(dim=1, descending=True).values
    return gains.cumsum(dim=1) / gains.sum()


def test_falling_slopes_are_the_concave_hull() -> None:
    assert falling([3.0, 2.0, 2.0, 1.0]) == [3.0, 2.0, 2.0, 1.0]
    assert falling([1.0, 5.0, 0.0]) == [3.0, 3.0, 0.0]
    assert falling([0.0, 0.0, 6.0]) == [2.0, 2.0, 2.0]
    assert falling([]) == []


@pytest.mark.parametrize("seed", range(5))
def test_division_of_concave_curves_is_the_best(seed: int) -> None:
    measured = curves(3, 6, seed)
    units = divide(measured, 3)
    assert units.sum() == 9 and units.min() >= 1 and units.max() <= 6

    def total(choice: tuple[int, ...]) -> float:
        return sum(float(measured[head, count - 1]) for head, count in enumerate(choice))

    best = max(total(choice) for choice in itertools.product(range(1, 7), repeat=3) if sum(choice) == 9)
    assert total(tuple(units.tolist())) == pytest.approx(best)


def test_division_of_any_curves_keeps_the_sum_and_looks_past_a_flat_start() -> None:
    units = divide(curves(5, 12, concave=False), 4)
    assert units.sum() == 20 and units.min() >= 1 and units.max() <= 12
    late = torch.tensor([[0.0, 0.0, 0.9, 0.9], [0.1, 0.2, 0.21, 0.22]])
    assert divide(late, 2).tolist() == [3, 1]


def test_equal_heads_get_equal_budgets() -> None:
    same = curves(1, 16).expand(6, -1)
    assert divide(same, 4).tolist() == [4] * 6
    shares = calibrate(same.reshape(2, 3, 16), 4096, WINDOW)
    assert shares == {ratio: [[1.0] * 3] * 2 for ratio in ("8",)}  # 4096 / 16 leaves one unit to choose: nothing to divide
    assert budgets_for({"budgets": shares}, 512, 4096, WINDOW) == ((512,) * 3,) * 2


def test_shares_and_tokens_agree() -> None:
    context = 16384
    measured = curves(6, curve_units(context, WINDOW)).view(2, 3, -1)
    shares = calibrate(measured, context, WINDOW)
    assert list(shares) == ["8", "16", "32"]
    for ratio in shares:
        assert sum(map(sum, shares[ratio])) == pytest.approx(6)
        budget = context // int(ratio)
        tokens = budgets_for({"budgets": shares}, budget, context, WINDOW)
        assert sum(map(sum, tokens)) == 6 * budget
        assert all((each - WINDOW) % UNIT == 0 and WINDOW + UNIT <= each for heads in tokens for each in heads)
        count = (budget - WINDOW) // UNIT
        expected = divide(measured.flatten(0, 1)[:, :budgets.MOST * count], count)
        assert torch.tensor(tokens).flatten().tolist() == (WINDOW + UNIT * expected).tolist()
    assert len(set(itertools.chain(*budgets_for({"budgets": shares}, 2048, context, WINDOW)))) > 1


@pytest.mark.parametrize("budget", [256, 300, 512, 1000, 4096])
@pytest.mark.parametrize("dense_layers", [0, 1, 3])
def test_any_budget_keeps_its_mean(budget: int, dense_layers: int) -> None:
    shares = {"16": [[0.0, 2.5], [0.3, 1.2], [0.0, 2.0]], "64": [[1.0] * 2] * 3}
    tokens = budgets_for({"budgets": shares}, budget, 16 * budget, WINDOW, dense_layers)
    assert len(tokens) == 3 and tokens[:dense_layers] == ((budget, budget),) * dense_layers
    sparse = list(itertools.chain(*tokens[dense_layers:]))
    whole = WINDOW + UNIT * ((budget - WINDOW) // UNIT)
    assert sum(sparse) == whole * len(sparse)
    assert all(each >= WINDOW + UNIT for each in sparse)


def test_the_nearest_ratio_is_taken() -> None:
    about = {"budgets": {"16": [[2.0, 0.0]], "64": [[0.0, 2.0]]}}
    at = {ratio: budgets_for(about, 1024, 1024 * ratio, WINDOW)[0] for ratio in (4, 16, 30, 40, 500)}
    assert at[4] == at[16] == at[30] == (1792, 256)
    assert at[40] == at[500] == (256, 1792)


def test_settings_are_clamped_to_the_cache() -> None:
    about = {"budgets": {"16": [[2.0, 0.0], [1.5, 0.5]]}}
    settings = calibrated(SparseSettings(512, 64, 128), about, 8192, 9000)
    assert settings == SparseSettings(768, 64, 128, budgets=((768, 256), (640, 384)))
    assert calibrated(SparseSettings(512, 64, 128), about, 700, 700).budget == 700
    assert calibrated(SparseSettings(512, 64, 128, dense_layers=2), about, 8192, 9000).budget == 512


def test_signatures_without_a_calibration() -> None:
    for about in ({}, {"budgets": {}}):
        with pytest.raises(UserError, match="no calibrated budgets"):
            budgets_for(about, 512, 8192, WINDOW)


def test_the_command_line_spreads_the_budget(tiny_checkpoint: Path, tmp_path: Path, command) -> None:
    model = load_model(tiny_checkpoint).fingerprint()
    file = tmp_path / "signatures.safetensors"
    save_signatures(file, random_encoders(HashConfig(), model), model, {"budgets": {"8": [[0.0, 2.0], [0.5, 1.5]]}})
    flags = ("--checkpoint_path", tiny_checkpoint, "--prompt_ids", ",".join(["7"] * 300), "--max_new_tokens", 8,
             "--temperature", 0, "--json", "--attention", "hash", "--budget", 204, "--sink", 4, "--recent", 8)
    result = command(*flags, "--signatures", file, "--budgets", "calibrated").json
    assert result["budgets"] == [[76, 308], [140, 268]] and result["budget"] == 308
    assert result["tokens_read"] == (76 + 303 + 140 + 268) / 4  # a cache of 303 halfway
    even = command(*flags, "--signatures", file).json
    assert even["budgets"] is None and even["budget"] == 204
    ran = command(*flags, "--budgets", "calibrated")
    assert ran.code == 2 and "these signatures hold no calibrated budgets" in ran.err
