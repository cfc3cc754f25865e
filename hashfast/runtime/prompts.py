"""Prompts in, text out: prompt files and token ids, and the text of new tokens as they come."""
import json
from pathlib import Path

from hashfast.common import UserError
from hashfast.runtime.tokenizer import TextStream, Tokenizer


def read_lines(path: Path) -> list[str | list[dict] | list[int]]:
    """What each line of a --prompts file gives: a text, the messages of a chat, or token ids."""
    prompts = []
    for number, line in enumerate(read_text(path).rstrip().split("\n"), 1):
        try:
            fields = json.loads(line)
            (name,) = {"prompt", "messages", "ids"} & fields.keys()
            value = fields[name]
            if name == "messages":
                good = all(isinstance(message[key], str) for message in value for key in ("role", "content"))
            else:
                good = isinstance(value, str) if name == "prompt" else all(type(token) is int for token in value)
            if not good or not value:
                raise ValueError(value)
        except (ValueError, LookupError, TypeError, AttributeError, RecursionError) as error:
            raise UserError(f"{path} line {number} is no prompt; give a JSON object with one of prompt (a text), messages "
                            "(objects with role and content) and ids (numbers)") from error
        prompts.append(value)
    return prompts


def encode(source: str | list[dict] | list[int], tokenizer: Tokenizer | None, vocab_size: int,
           chat: bool = False) -> tuple[list[int], bool]:
    """Token ids of a text (with `chat` as a user's message), of messages or as they are; and whether they are a chat.

    UserError where there are none or one is outside the vocabulary.
    """
    if chat and isinstance(source, str):
        source = [{"role": "user", "content": source}]
    ids, is_chat = source, not isinstance(source, str) and isinstance(source[0], dict)
    if is_chat or isinstance(source, str):
        ids = tokenizer.encode_chat(source) if is_chat else tokenizer.encode(source)
    if not ids:
        raise UserError("the prompt is empty; give at least one token")
    for token in ids:
        if not 0 <= token < vocab_size:
            raise UserError(f"token id {token} is outside the model's vocabulary; give ids from 0 to {vocab_size - 1}, "
                            "or text with the model's own tokenizer")
    return ids, is_chat


def read_text(path: Path) -> str:
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"cannot read {path}: {getattr(error, 'strerror', None) or error}; give a UTF-8 text file") from error
    if not text.strip():
        raise UserError(f"{path} is empty; give a file with text")
    return text


class NewText(TextStream):
    """The text that new tokens add to that of `prompt`, end tokens left out.

    The prompt counts because sentencepiece drops the space before the first word of a text, not of its continuation.
    """

    def __init__(self, tokenizer: Tokenizer, prompt: list[int]) -> None:
        super().__init__(tokenizer)
        self.stop_ids = tokenizer.stop_ids
        for token in prompt:
            self.put(token)

    def put(self, id: int) -> str:
        return "" if id in self.stop_ids else super().put(id)

    def whole(self, ids: list[int]) -> str:
        return "".join([*map(self.put, ids), self.end()])


class Display:
    """Prints new text: of a single prompt its first sequence as it comes; of several each when it has ended, as `[i] text`."""

    def __init__(self, tokenizer: Tokenizer, contexts: list[list[int]]) -> None:
        self.streams = [NewText(tokenizer, context) for context in contexts]
        self.texts = [f"[{i}] " for i in range(len(contexts))]

    def put(self, i: int, token: int, last: bool) -> None:
        if len(self.streams) > 1:
            self.texts[i] += self.streams[i].put(token)
            if last:
                print(self.texts[i] + self.streams[i].end(), flush=True)
        elif i == 0:
            print(self.streams[0].put(token), end="", flush=True)
            if last:
                print(self.streams[0].end())
