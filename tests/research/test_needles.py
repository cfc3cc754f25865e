"""Synthetic retrieval documents: repeatable, of the asked length, answerable from their text."""
import re
from collections import Counter

import pytest

from hashfast.common import UserError
from hashfast.research.needles import TASKS, make_needle

FILLER = " ".join(f"This is plain sentence number {i}, and it says nothing of note." for i in range(300))


@pytest.mark.parametrize("task", TASKS)
def test_repeatable_and_of_the_asked_length(task: str) -> None:
    needle = make_needle(task, 8000, FILLER, seed=3)
    assert needle == make_needle(task, 8000, FILLER, seed=3)
    assert needle != make_needle(task, 8000, FILLER, seed=4)
    assert 0.97 * 8000 < len(needle.text) <= 8000
    assert needle.text == needle.context + needle.question + " " + ", ".join(needle.answers)


def test_train_and_eval_documents_differ_at_equal_seeds() -> None:
    for task in TASKS:
        train, measured = (make_needle(task, 3000, FILLER, seed=0, split=split) for split in ("train", "eval"))
        assert train.answers != measured.answers and train.question[:20] == measured.question[:20]


def test_length_function_is_used() -> None:
    def words(text: str) -> int:
        return len(text.split())

    needle = make_needle("multi_key", 700, FILLER, seed=0, length=words)
    assert 670 < words(needle.text) <= 700


def test_filler_is_repeated_where_it_is_short() -> None:
    short = " ".join(FILLER.split(". ")[0] + "." for _ in range(25))
    assert len(make_needle("single", 20_000, short, seed=0).text) > 19_000


@pytest.mark.parametrize("task", ["single", "multi_key", "every_line_key"])
@pytest.mark.parametrize("seed", range(5))
def test_code_is_found_by_its_key(task: str, seed: int) -> None:
    needle = make_needle(task, 6000, FILLER, seed)
    key = re.search(r"access code of (\S+) in", needle.question)[1]
    codes = re.findall(r"access code of (\S+) is (\d+)\.", needle.context)
    assert {"single": 1, "multi_key": 4}.get(task, len(needle.context.splitlines())) == len(codes) == len({k for k, _ in codes})
    assert (dict(codes)[key],) == needle.answers


def test_depth_moves_the_fact_alone() -> None:
    documents = {depth: make_needle("single", 6000, FILLER, 2, depth=depth) for depth in (0, 0.25, 0.5, 1)}
    fact = re.search(r"The access code of \S+ is \d+\.", documents[0].context)[0]
    rest = set()
    for depth, needle in documents.items():
        before, after = needle.context.split(fact)
        assert len(before) / (len(before) + len(after)) == pytest.approx(depth, abs=0.02)
        rest.add(" ".join((before + after).split()))
    assert len(rest) == 1 and make_needle("single", 6000, FILLER, 2).answers == documents[1].answers
    assert documents[0].context.startswith(fact) and documents[1].context.endswith(fact)


def test_uuids() -> None:
    needle = make_needle("uuids", 6000, FILLER, seed=1)
    key = re.search(r"key (\S+) in", needle.question)[1]
    pairs = dict(re.findall(r"Key (\S+): value (\S+)\.", needle.context))
    assert len(pairs) > 50 and (pairs[key],) == needle.answers
    assert re.fullmatch(r"[0-9a-f]{8}(-[0-9a-f]{4}){3}-[0-9a-f]{12}", key)


def test_values_are_asked_for_in_the_order_of_the_text() -> None:
    needle = make_needle("multi_value", 6000, FILLER, seed=1)
    assert tuple(re.findall(r"One access code of \S+ is (\d+)\.", needle.context)) == needle.answers
    assert len(needle.answers) == 4


@pytest.mark.parametrize("seed", range(5))
def test_variables_follow_the_chain(seed: int) -> None:
    needle = make_needle("variable_tracking", 6000, FILLER, seed)
    values: dict[str, str] = {}
    for name, source in re.findall(r"VAR (\w+) = (?:VAR )?(\w+)\.", needle.context):
        values[name] = values.get(source, source)
    asked = re.search(r"value (\d+) in", needle.question)[1]
    assert len(values) == 8
    assert tuple(name for name, value in values.items() if value == asked) == needle.answers


def test_common_words_are_the_most_common() -> None:
    needle = make_needle("common_words", 6000, FILLER, seed=1)
    counts = Counter(re.findall(r"\d+\. (\S+)", needle.context))
    assert {word for word, _ in counts.most_common(5)} == set(needle.answers)
    assert counts.most_common(6)[5][1] * 3 < counts.most_common(5)[4][1]


def test_every_line_key_has_enough_names() -> None:
    context = make_needle("every_line_key", 1_000_000, FILLER, seed=0).context
    keys = re.findall(r"access code of (\S+) is", context)
    assert len(keys) > 15_000 and len(set(keys)) == len(keys)


def test_mistakes() -> None:
    with pytest.raises(UserError, match="no retrieval task 'haystack'"):
        make_needle("haystack", 1000, FILLER, 0)
    with pytest.raises(UserError, match="does not fit"):
        make_needle("uuids", 100, FILLER, 0)
    with pytest.raises(UserError, match="too short"):
        make_needle("single", 1000, "One sentence. Two.", 0)
    with pytest.raises(ValueError, match="split"):
        make_needle("single", 1000, FILLER, 0, split="test")
    with pytest.raises(ValueError, match="depth"):
        make_needle("uuids", 1000, FILLER, 0, depth=0.5)
