"""Synthetic retrieval documents: facts hidden in a long text, a question at its end, the answer.

The tasks follow those of RULER (arXiv 2404.06654, section 3) in spirit; wording and word lists are this project's own. A
document depends on its arguments alone. `split` is part of the seed, so that the documents signatures are trained on
("train") and those of measurements ("eval") never share a random stream, whatever the seeds.
"""
import random
import re
from collections.abc import Callable
from dataclasses import dataclass

from hashfast.common import UserError

TASKS = ("single", "multi_key", "every_line_key", "uuids", "multi_value", "variable_tracking", "common_words")

FIRST = ("amber brisk calm dusty eager faint gentle hollow icy jolly keen lofty mellow narrow olive proud quiet rusty "
         "silent tidy upper velvet windy young").split()
SECOND = ("apple birch cedar delta ember forest granite harbor island juniper kettle lantern marble nectar orchid pepper "
          "quartz river saddle timber umber valley walnut zephyr").split()
THIRD = ("anchor basket candle drum engine feather garden hammer inkwell jacket ladder mirror needle oven pillow quiver "
         "ribbon saucer table urn violin wagon yacht zipper").split()


@dataclass(frozen=True)
class Needle:
    """One document: `context` holds the facts, `question` is about them, `answers` are what a right answer contains, in order.

    `question` ends where the answer begins; `text` is the whole, for training and for teacher-forced scores.
    """
    task: str
    context: str
    question: str
    answers: tuple[str, ...]

    @property
    def answer(self) -> str:
        return " " + ", ".join(self.answers)

    @property
    def text(self) -> str:
        return self.context + self.question + self.answer


def make_needle(task: str, target_length: int, filler: str, seed: int, split: str = "eval",
                length: Callable[[str], int] = len, depth: float | None = None) -> Needle:
    """A document whose whole text is at most `target_length` long as `length` counts, and nearly that.

    length: characters by default; give `lambda text: len(tokenizer.encode(text))` for tokens.
    filler: prose to hide facts in, read from a random sentence on and around its end if need be. The tasks whose every line
    is a fact (every_line_key, uuids, common_words) do not use it.
    depth: where the fact of "single" lies, 0 (first) to 1 (last); all else is that of the seed. None: anywhere.
    """
    if task not in TASKS:
        raise UserError(f"no retrieval task {task!r}; choose from {', '.join(TASKS)}")
    if split not in ("train", "eval"):
        raise ValueError(f"split is 'train' or 'eval', not {split!r}")
    if depth is not None and task != "single":
        raise ValueError(f"depth is for the task 'single', not {task!r}")
    rng = random.Random(f"{split} {task} {seed}")
    lines = {"every_line_key": _every_line_key, "uuids": _uuids, "common_words": _common_words}
    if task in lines:
        return _largest(lambda n: lines[task](random.Random(f"{split} {task} {seed}"), n), target_length, length)
    hidden = {"single": _single, "multi_key": _multi_key, "multi_value": _multi_value, "variable_tracking": _variables}
    facts, question, answers = hidden[task](rng)
    sentences = _sentences(filler, rng)
    depths = sorted(rng.random() for _ in facts) if depth is None else [depth]  # where facts lie, as shares of the filler

    def hide(n: int) -> Needle:
        places = [int(depth * (n + 1)) for depth in depths]
        parts = [sentences[i % len(sentences)] for i in range(n)]
        for fact, place in zip(reversed(facts), reversed(places), strict=True):
            parts.insert(place, fact)
        return Needle(task, " ".join(parts), question, answers)

    return _largest(hide, target_length, length)


def _largest(build: Callable[[int], Needle], target_length: int, length: Callable[[str], int]) -> Needle:
    """The document of the most parts (sentences or lines) that fits; found by estimate, then by bisection."""
    def fits(n: int) -> bool:
        return length(build(n).text) <= target_length

    low, high = 1, 2
    if not fits(low):
        raise UserError(f"a retrieval document does not fit into a length of {target_length}; give a longer one")
    while fits(high):
        low, high = high, 2 * high
    while high - low > max(1, low // 200):
        middle = (low + high) // 2
        low, high = (middle, high) if fits(middle) else (low, middle)
    return build(low)


def _sentences(filler: str, rng: random.Random) -> list[str]:
    sentences = re.split(r"(?<=[.!?])\s+", " ".join(filler.split()))
    if len(sentences) < 20:
        raise UserError("the filler text of retrieval documents is too short; give prose of at least 20 sentences")
    start = rng.randrange(len(sentences))
    return sentences[start:] + sentences[:start]


def _keys(rng: random.Random, n: int) -> list[str]:
    """n different three-word names; past the 13,824 of them with a number behind."""
    every = [f"{a}-{b}-{c}" for a in FIRST for b in SECOND for c in THIRD]
    rng.shuffle(every)
    return [every[i % len(every)] + (f"-{i // len(every)}" if i >= len(every) else "") for i in range(n)]


def _code(rng: random.Random) -> str:
    return str(rng.randrange(1_000_000, 10_000_000))


def _code_question(key: str) -> str:
    return f"\n\nQuestion: What is the access code of {key} in the text above?\nAnswer: The access code of {key} is"


def _single(rng: random.Random) -> tuple[list[str], str, tuple[str, ...]]:
    key, code = _keys(rng, 1)[0], _code(rng)
    return [f"The access code of {key} is {code}."], _code_question(key), (code,)


def _multi_key(rng: random.Random) -> tuple[list[str], str, tuple[str, ...]]:
    codes = {key: _code(rng) for key in _keys(rng, 4)}
    key = rng.choice(list(codes))
    return [f"The access code of {k} is {code}." for k, code in codes.items()], _code_question(key), (codes[key],)


def _multi_value(rng: random.Random) -> tuple[list[str], str, tuple[str, ...]]:
    key, codes = _keys(rng, 1)[0], [_code(rng) for _ in range(4)]
    question = (f"\n\nQuestion: The text above gives four access codes of {key}. What are they, in order?"
                f"\nAnswer: The four access codes of {key} are")
    return [f"One access code of {key} is {code}." for code in codes], question, tuple(codes)


def _variables(rng: random.Random) -> tuple[list[str], str, tuple[str, ...]]:
    """Two chains of four variables, each set from the one before; which of them hold the first one's value?"""
    letters = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"
    names = ["".join(rng.choice(letters) for _ in range(4)) + str(i) for i in range(8)]
    value, other = rng.sample(range(10_000, 100_000), 2)
    chains = []
    for chain, first in ((names[:4], value), (names[4:], other)):
        chains.append([f"VAR {chain[0]} = {first}."] + [f"VAR {b} = VAR {a}." for a, b in zip(chain, chain[1:], strict=False)])
    facts = [fact for pair in zip(*chains, strict=True) for fact in pair]
    question = (f"\n\nQuestion: Which four variables hold the value {value} in the text above, through a chain of assignments?"
                f"\nAnswer: The variables that hold the value {value} are")
    return facts, question, tuple(names[:4])


def _every_line_key(rng: random.Random, n: int) -> Needle:
    codes = {key: _code(rng) for key in _keys(rng, n)}
    key = rng.choice(list(codes))
    context = "\n".join(f"The access code of {k} is {code}." for k, code in codes.items())
    return Needle("every_line_key", context, _code_question(key), (codes[key],))


def _uuids(rng: random.Random, n: int) -> Needle:
    def uuid() -> str:
        digits = f"{rng.getrandbits(128):032x}"
        return "-".join((digits[:8], digits[8:12], digits[12:16], digits[16:20], digits[20:]))

    pairs = [(uuid(), uuid()) for _ in range(n)]
    key, value = rng.choice(pairs)
    question = f"\n\nQuestion: Which value belongs to the key {key} in the text above?\nAnswer: The value of {key} is"
    return Needle("uuids", "\n".join(f"Key {k}: value {v}." for k, v in pairs), question, (value,))


def _common_words(rng: random.Random, n: int) -> Needle:
    """n numbered words: half of them are five names over and over, the other half names that occur seldom."""
    names = [f"{a}-{b}" for a in FIRST for b in SECOND]
    rng.shuffle(names)
    words = [names[i % 5] for i in range(n // 2)] + [rng.choice(names[5:]) for _ in range(n - n // 2)]
    rng.shuffle(words)
    question = "\n\nQuestion: Which five words are the most common in the list above?\nAnswer: The five most common words are"
    return Needle("common_words", " ".join(f"{i + 1}. {word}" for i, word in enumerate(words)), question, tuple(names[:5]))
