"""Attention recall: of encoders on captures, and of selectors while a model decodes."""
from pathlib import Path

import pytest
import torch
from captured import RECENT, SHAPE, SINK, structured
from eval_inputs import PROSE, config, make_files

from hashfast.common import UserError
from hashfast.hash_attention import HashConfig, select_tokens_reference
from hashfast.names import SELECTORS
from hashfast.research.recall import attention_recall, recall, recall_curve
from hashfast.research.training import attention_weights
from hashfast.runtime.signatures import random_encoders


@pytest.mark.parametrize("share", ["kv", "query"])
def test_recall_grows_with_the_budget_to_all(share: str) -> None:
    q, k = structured(5)
    positions = torch.tensor([350, 399])
    encoder = random_encoders(HashConfig(share=share), SHAPE)[0]
    shares = [attention_recall({"random": encoder}, q[:, positions], k, positions, budget, SINK, RECENT)
              for budget in (16, 100, 400)]
    for name in ("random", "oracle"):
        values = [s[name] for s in shares]
        assert values[0] < values[1] < values[2] and values[2] == pytest.approx(1, abs=1e-5)
    assert shares[0]["window"] == pytest.approx(shares[2]["window"])


def test_the_curve_is_what_each_budget_selects() -> None:
    q, k = structured(5)
    positions = torch.tensor([250, 399])
    encoder = random_encoders(HashConfig(), SHAPE)[0]
    weights = attention_weights(q[:, positions], k, positions)
    budgets = [SINK + RECENT, 40, 41, 300]
    curve = recall_curve(encoder, weights, q[:, positions], k, positions, budgets, SINK, RECENT)
    planes = encoder.encode_queries(q[:, positions].transpose(0, 1))
    signatures = encoder.encode_keys(k[None]).expand(2, -1, -1, -1)
    for column, budget in zip(curve.T, budgets, strict=True):
        indices = select_tokens_reference(planes, signatures, (positions + 1).int(), budget, SINK, RECENT, shift=encoder.shift)
        for head in range(2):
            masses = [weights[2 * head + g, i, indices[i, head][indices[i, head] >= 0].long()].sum()
                      for i in range(2) for g in range(2)]
            torch.testing.assert_close(column[head], torch.stack(masses).mean())


# --------------------------------------------------------------------------------------------------------------- decoding

@pytest.fixture(scope="module")
def files(tiny_checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    return make_files(tiny_checkpoint, tmp_path_factory.mktemp("recall"))


def test_recall_of_a_batch_is_the_mean_of_its_texts(files: dict[str, Path], tmp_path: Path) -> None:
    given = config(files, selectors=("hash", "quest"), ratios=(4,), batch_size=2)
    paths = [tmp_path / f"part{i}.txt" for i in range(3)]
    for i, path in enumerate(paths):
        path.write_text(PROSE[30 * i:])
    means = [torch.tensor([row["mass_by_head"] for row in recall(given, data, last=6, top=10)])
             for data in (paths, *([path] for path in paths))]
    torch.testing.assert_close(means[0], torch.stack(means[1:]).mean(dim=0), rtol=1e-4, atol=1e-5)


def test_recall(files: dict[str, Path], tmp_path: Path) -> None:
    rows = list(recall(config(files, selectors=SELECTORS, ratios=(1, 4)), [files["text"]], 6, 10, tmp_path / "recall.png"))
    assert (tmp_path / "recall.png").read_bytes().startswith(b"\x89PNG")
    assert len(rows) == 2 * (len(SELECTORS) + 1)  # dense is no run of its own; hash and hash_calibrated are two each
    mass = {(row["selector"], row["recipe"]): torch.tensor(row["mass_by_head"]) for row in rows if row["ratio"] == 4}
    oracle = mass.pop(("oracle", None))
    assert oracle.shape == (2, 2)
    # its heads have budgets of their own
    mass = {name: share for name, share in mass.items() if name[0] != "hash_calibrated"}
    for name, share in mass.items():
        assert (share <= oracle + 1e-6).all(), name
        if name[0] not in ("oracle_group", "quest", "double_sparsity", "magicpig") and name[1] != "query":
            assert (share <= mass["oracle_group", None] + 1e-6).all(), name
    for row in rows:
        if row["ratio"] == 1:
            assert row["mass"] == pytest.approx(1, abs=1e-5) and row["recall"] == pytest.approx(1)
        if row["selector"] == "oracle":
            assert row["recall"] == pytest.approx(1)


def test_dense_alone_has_nothing_to_measure(files: dict[str, Path]) -> None:
    with pytest.raises(UserError, match="besides dense"):
        list(recall(config(files, selectors=("dense",)), [files["text"]], 6, 10))
