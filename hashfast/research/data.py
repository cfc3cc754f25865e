"""Sequences to train signatures on and to measure them: stretches of books, and synthetic retrieval documents."""
import glob
import importlib.util
import os
import random
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from hashfast.common import UserError, read_file, text_of
from hashfast.research.needles import make_needle
from hashfast.runtime.prompts import read_text

HELD_OUT = 2  # sequences kept out of training, of books and of retrieval documents each
# common_words is left out: its answer is a count over the whole list, which no selection of tokens finds
NEEDLE_TASKS = ("multi_key", "every_line_key", "uuids", "variable_tracking", "multi_value", "single")


@dataclass(frozen=True)
class DataConfig:
    """context: tokens per sequence. sequences: to train on. needles: share of them that are retrieval documents, 0 to 1."""
    context: int = 8192
    sequences: int = 16
    needles: float = 0.3
    seed: int = 0


@dataclass(frozen=True)
class Sequence:
    """Token ids [1, T]; the last `question` of them are a question about the text and its answer (0: a book)."""
    ids: Tensor
    question: int = 0


def read_texts(patterns: list[str]) -> dict[str, str]:
    """The texts of all files that the names or globs give, by path, in sorted order."""
    paths: set[str] = set()
    for pattern in patterns:
        found = [pattern] if Path(pattern).exists() else glob.glob(pattern, recursive=True)
        if not found:
            raise UserError(f"--data {pattern} names no file; give text files or quoted globs")
        paths.update(found)
    texts = {}
    for path in sorted(paths):
        wanted = "give text files in UTF-8 to --data"
        texts[path] = text_of(read_file(path, wanted), path, wanted)
    return texts


def named_texts(paths: list[Path]) -> dict[str, str]:
    """The texts of these files by their names, without suffix."""
    texts: dict[str, str] = {}
    for path in paths:
        if path.stem in texts:
            raise UserError(f"there are two texts of the name {path.stem}, by which they are told apart; rename one")
        texts[path.stem] = read_text(path)
    return texts


def package_source(name: str, characters: int) -> str:
    """The beginning of the .py files of an installed package, or of the standard library's, in the order of their paths."""
    spec = importlib.util.find_spec(name)
    if spec is None or not spec.submodule_search_locations:
        raise UserError(f"package:{name} is no package of this environment; install it, or name another")
    parts, missing = [], characters
    for path in sorted(Path(spec.submodule_search_locations[0]).rglob("*.py")):
        if missing <= 0:
            break
        parts.append(path.read_text(encoding="utf-8", errors="replace")[:missing])
        missing -= len(parts[-1])
    return "".join(parts)


def read_kinds(sources: list[str], characters: int) -> dict[str, dict[str, str]]:
    """Texts by kind and name, from KIND=GLOB (text files) and KIND=package:NAME (`package_source`); a kind may come again."""
    kinds: dict[str, dict[str, str]] = {}
    for source in sources:
        kind, _, pattern = source.partition("=")
        if not kind or not pattern or kind == "all":
            raise UserError(f"--kinds {source} is no KIND=GLOB or KIND=package:NAME; write e.g. novels='books/*.txt'")
        package = pattern.removeprefix("package:")
        paths = sorted(glob.glob(pattern, recursive=True))
        if package != pattern:
            found = {package: package_source(package, characters)}
        elif paths:
            found = named_texts([Path(path) for path in paths])
        else:
            raise UserError(f"--kinds {source} names no file; give text files or quoted globs")
        if twice := [name for texts in kinds.values() for name in texts if name in found]:
            raise UserError(f"--kinds gives the text {twice[0]} twice; name each once")
        kinds.setdefault(kind, {}).update(found)
    return kinds


def make_sequences(texts: dict[str, str], encode: Callable[[str], list[int]],
                   config: DataConfig) -> tuple[list[Sequence], dict[str, list[Sequence]]]:
    """-> sequences to train on, and those held out by kind ("books", and "needles" where some are trained on)."""
    n_needle = round(config.needles * config.sequences)
    kept = HELD_OUT if n_needle else 0
    books = book_sequences(texts, encode, config.sequences - n_needle + HELD_OUT, config.context, config.seed)
    needles = needle_sequences(texts, encode, n_needle + kept, config.context, config.seed)
    held_out = {"books": books[:HELD_OUT]} | ({"needles": needles[:kept]} if kept else {})
    return books[HELD_OUT:] + needles[kept:], held_out


def book_sequences(texts: dict[str, str], encode: Callable[[str], list[int]], count: int, context: int,
                   seed: int) -> list[Sequence]:
    """`count` stretches of `context` tokens that do not overlap, from one text after the other."""
    parts = -(-count // len(texts))

    def make(i: int) -> Sequence:
        path, text = list(texts.items())[i % len(texts)]
        size = len(text) // parts
        part = text[i // len(texts) * size:][:size]
        start = random.Random(f"book {seed} {i}").randrange(max(1, size - 8 * context))  # a token is seldom over 8 characters
        ids = encode(part[start:start + 6 * context])  # enough for most prose, and a third of the time
        if len(ids) < context + 8:  # the cut may have changed the last tokens
            ids = encode(part[start:start + 16 * context])
        if len(ids) < context:
            raise UserError(f"{path} is too short: {parts} stretches of {context} tokens are needed of each text; "
                            "give more text to --data, fewer --sequences or a smaller --context")
        return Sequence(torch.tensor([ids[:context]]))

    return in_threads(make, count)


def needle_sequences(texts: dict[str, str], encode: Callable[[str], list[int]], count: int, context: int,
                     seed: int) -> list[Sequence]:
    """`count` synthetic retrieval documents of at most `context` tokens, from the train split of needles.py."""
    def make(i: int) -> Sequence:
        filler = list(texts.values())[-1 - i % len(texts)]
        needle = make_needle(NEEDLE_TASKS[i % len(NEEDLE_TASKS)], context, filler, seed * 100_003 + i, "train",
                             lambda text: len(encode(text)))
        ids = encode(needle.text)
        return Sequence(torch.tensor([ids]), question=len(ids) - len(encode(needle.context)))

    return in_threads(make, count)


def in_threads(make: Callable[[int], Sequence], count: int) -> list[Sequence]:
    """make(0) .. make(count - 1). Tokenizers release the interpreter lock."""
    with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:
        return list(pool.map(make, range(count)))
