"""Prompts in, text out: prompt files and token ids, and the text of new tokens as they come."""
import json
import re
import sys
from pathlib import Path
from typing import Any

from hashfast.common import UserError, read_file, text_of
from hashfast.runtime.tokenizer import TextStream, Tokenizer

STDIN_LIMIT = 2 ** 28  # bytes: a text for any model, and less than memory
WANTED = "give a UTF-8 text file"
CONTROL = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]")  # but for tabs and newlines

# ----------------------------------------------------------------------------------------------------------------- in

def read_lines(path: Path) -> dict[int, str | list[dict] | list[int]]:
    """What the lines of a --prompts file give, by number: a text, the messages of a chat, or token ids; blank ones nothing."""
    prompts = {}
    for number, line in enumerate(read_text(path).split("\n"), 1):
        if not line.strip():
            continue
        try:
            fields = json.loads(line)
            (name,) = {"prompt", "messages", "ids"} & fields.keys()
            value = fields[name]
            if name == "messages":
                value = [plain_message(message) for message in value]
                good = True
            else:
                good = isinstance(value, str) if name == "prompt" else all(type(token) is int for token in value)
            if not good or not value:
                raise ValueError(value)
        except (ValueError, LookupError, TypeError, AttributeError, RecursionError) as error:
            raise UserError(f"{path} line {number} is no prompt; give a JSON object with one of prompt (a text), messages "
                            "(objects with role and content) and ids (numbers)") from error
        prompts[number] = value
    return prompts


def plain_message(message: dict[str, Any]) -> dict[str, Any]:
    """A message whose content is text: parts {"type": "text", "text": ..} are joined, null is no text. Else ValueError."""
    content = message["content"]
    texts = ["" if content is None else content]
    if isinstance(content, list):
        texts = [part["text"] if isinstance(part, dict) and part.get("type", "text") == "text" else part for part in content]
    if not isinstance(message["role"], str) or not all(isinstance(text, str) for text in texts):
        raise ValueError(f"a message needs a role and a content of text alone, not {str(message)[:80]}")
    return message | {"content": "".join(texts)}


def encode(source: str | list[dict] | list[int], tokenizer: Tokenizer | None, vocab_size: int, chat: bool = False,
           system: str | None = None) -> tuple[list[int], bool]:
    """Token ids of a text (with `chat` a user's message, after `system`), of messages or as they are; whether they are a chat.

    UserError where there are none or one is outside the vocabulary.
    """
    if chat and isinstance(source, str):
        source = [*system_message(system), {"role": "user", "content": source}]
    ids, is_chat = source, not isinstance(source, str) and isinstance(source[0], dict)
    if is_chat:
        try:
            ids = tokenizer.encode_chat([plain_message(message) for message in source])
        except (ValueError, LookupError) as error:
            raise UserError(f"{error}; give messages with role and content") from error
    elif isinstance(source, str):
        ids = tokenizer.encode(source)
    if not ids:
        raise UserError("the prompt is empty; give at least one token")
    for token in ids:
        if not 0 <= token < vocab_size:
            raise UserError(f"token id {token} is outside the model's vocabulary; give ids from 0 to {vocab_size - 1}, "
                            "or text with the model's own tokenizer")
    return ids, is_chat


def system_message(system: str | None) -> list[dict[str, str]]:
    """How a chat begins: with the system prompt, if there is one."""
    return [] if system is None else [{"role": "system", "content": system}]


def read_text(path: Path) -> str:
    """The text of a file in UTF-8, with or without a byte order mark; `-` is standard input. UserError where there is none."""
    if str(path) == "-":
        from hashfast.runtime.distributed import on_first  # of several ranks one alone may read it; imports torch
        path, content = "standard input", on_first(_read_stdin)
    else:
        content = read_file(path, WANTED)
    text = text_of(content, path, WANTED)
    if not text.strip():
        raise UserError(f"{path} is empty; give a file with text")
    return text


def _read_stdin() -> bytes:
    try:
        content = sys.stdin.buffer.read(STDIN_LIMIT + 1)
    except OSError as error:
        raise UserError(f"cannot read standard input: {error.strerror}; {WANTED}") from error
    if len(content) > STDIN_LIMIT:
        raise UserError(f"standard input is longer than {STDIN_LIMIT} bytes; give less text")
    return content


# ------------------------------------------------------------------------------------------------------------------ out

class NewText(TextStream):
    """The text that new tokens add to that of `prompt`, end tokens left out; up to the first of the texts in `stop`.

    The prompt counts because sentencepiece drops the space before the first word of a text, not of its continuation.
    """

    def __init__(self, tokenizer: Tokenizer, prompt: list[int], stop: tuple[str, ...] = ()) -> None:
        super().__init__(tokenizer)
        self.stop_ids = tokenizer.stop_ids
        self.stop: tuple[str, ...] = ()
        for token in prompt:
            self.put(token)
        self.stop = stop
        self.stopped = False
        self._held = ""  # what may turn out to be the beginning of a stop text

    def put(self, id: int) -> str:
        return "" if id in self.stop_ids else self._until_stop(super().put(id))

    def end(self) -> str:
        return self._until_stop(super().end(), final=True)

    def _until_stop(self, text: str, final: bool = False) -> str:
        if not self.stop:
            return text
        if self.stopped:
            return ""
        text = self._held + text
        found = [at for at in map(text.find, self.stop) if at >= 0]
        self.stopped = bool(found)
        end = min(found) if found else len(text)
        if not found and not final:
            end -= max(n for stop in self.stop for n in range(len(stop)) if text.endswith(stop[:n]))
        self._held = text[end:]
        return text[:end]

    def whole(self, ids: list[int]) -> str:
        return "".join([*map(self.put, ids), self.end()])


def visible(text: str) -> str:
    """`text` for stdout: on a terminal, which would obey them, control characters are escaped."""
    return CONTROL.sub(lambda match: repr(match[0])[1:-1], text) if sys.stdout.isatty() else text


class Display:
    """Prints new text: of a single prompt its first sequence as it comes; of several each when it has ended, as `[i] text`.

    first: the number i of the first of several; None: a single prompt.
    """

    def __init__(self, tokenizer: Tokenizer, contexts: list[list[int]], stop: tuple[str, ...] = (),
                 first: int | None = None) -> None:
        self.streams = [NewText(tokenizer, context, stop) for context in contexts]
        self.texts = ["" if first is None else f"[{first + i}] " for i in range(len(contexts))]
        self.is_one = first is None

    def put(self, i: int, token: int, last: bool) -> None:
        if self.is_one:
            if i == 0:
                print(visible(self.streams[0].put(token)), end="", flush=True)
                if last:
                    print(visible(self.streams[0].end()))
        elif i < len(self.streams):
            self.texts[i] += self.streams[i].put(token)
            if last:
                print(visible(self.texts[i] + self.streams[i].end()), flush=True)
