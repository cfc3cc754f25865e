"""Text to token ids and back, for folders in Hugging Face's layout and for those that hold the model's original tokenizer.

Hugging Face's: transformers' AutoTokenizer, which defines what the files beside a vocabulary mean. A `tokenizer.model` alone:
tiktoken (Llama 3) or sentencepiece (Llama 2, Mistral), as the models' own code reads it. Decoding is shared: every token stands
for some bytes, so that streamed text and text decoded at once cannot differ.
"""
import base64
import codecs
import json
import os
import re
import reprlib
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hashfast.common import UserError, time_limit

os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")  # with it, a later fork prints a warning

Messages = list[dict[str, Any]]  # of a chat: {"role", "content"} each

VOCABULARIES = ("tokenizer.json", "tokenizer.model", "original/tokenizer.model", "vocab.json", "tekken.json")
# With one of these beside it, a tokenizer.model is in Hugging Face's layout.
SETTINGS = ("tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", "chat_template.jinja")
LARGEST_VOCABULARY = 2 ** 24
TEMPLATE_SECONDS = 10.0  # after which a chat template is taken to have no end
# Tokens that end a text or a turn. Configs often name only one of those that a model really emits.
END_TOKENS = ("</s>", "<|end_of_text|>", "<|eom_id|>", "<|eot_id|>", "<|im_end|>", "<|endoftext|>")

LLAMA3_SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
LLAMA3_RANKS = 128_000
LLAMA3_SPECIAL = [
    "<|begin_of_text|>", "<|end_of_text|>", "<|reserved_special_token_0|>", "<|reserved_special_token_1|>",
    "<|finetune_right_pad_id|>", "<|reserved_special_token_2|>", "<|start_header_id|>", "<|end_header_id|>",
    "<|eom_id|>", "<|eot_id|>", "<|python_tag|>", *(f"<|reserved_special_token_{i}|>" for i in range(3, 248)),
]
# Byte-level vocabularies write printable Latin-1 bytes as themselves, the other bytes as the characters from U+0100 on.
PRINTABLE = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
BYTE_OF_CHAR = {chr(byte): byte for byte in PRINTABLE}
BYTE_OF_CHAR |= {chr(0x100 + i): byte for i, byte in enumerate(sorted(set(range(256)) - set(PRINTABLE)))}


@dataclass(frozen=True)
class _Backend:
    """What differs between the kinds of tokenizers."""

    encode: Callable[[str, bool], list[int]]  # (text, whether special tokens in it count as such) -> ids without bos
    pieces: dict[int, bytes]  # what each id stands for; nothing for special tokens
    stop_ids: set[int]
    bos_id: int | None
    eos_id: int | None
    start: list[int]  # what begins a text: bos or nothing
    drops_first_space: bool = False  # encoding puts a space before the text, so decoding takes it away
    chat_text: Callable[[Messages], str] | None = None


class Tokenizer:
    """The tokenizer of one checkpoint.

    `vocab_size` is the number of token ids (a model's output may be padded beyond it), `bos_id` the token that begins a
    text or None, `eos_id` the one that the tokenizer itself names as the end or None, and `stop_ids` are all tokens at which
    generation should end.
    """

    vocab_size: int
    bos_id: int | None
    eos_id: int | None
    stop_ids: frozenset[int]

    def __init__(self, backend: _Backend, stop_ids: Iterable[int]) -> None:
        self._backend = backend
        self.vocab_size = max(backend.pieces) + 1
        if self.vocab_size > LARGEST_VOCABULARY:
            raise ValueError(f"token id {self.vocab_size - 1} is beyond any vocabulary")
        self.bos_id = backend.bos_id
        self.eos_id = backend.eos_id
        self.stop_ids = frozenset({*backend.stop_ids, *stop_ids})

    @classmethod
    def load(cls, folder: str | Path) -> "Tokenizer":
        """The tokenizer of the checkpoint in `folder`, and the end tokens that generation_config.json and config.json name.

        No code from the folder runs, and nothing is downloaded. Raises UserError if there is no tokenizer, or a file cannot
        be understood.
        """
        folder = Path(folder)
        path = next((folder / name for name in VOCABULARIES if (folder / name).is_file()), None)
        if path is None:
            raise UserError(f"no tokenizer in {folder}: looked for {', '.join(VOCABULARIES)}; download the model's own")
        content = _read(path)
        ends = [*_end_ids(folder / "generation_config.json"), *_end_ids(folder / "config.json")]
        has_settings = [_read_json(folder / name) is not None for name in SETTINGS[:3]]  # transformers' errors name no file
        original = path.name == "tokenizer.model" and not (any(has_settings) or (folder / SETTINGS[3]).is_file())
        try:
            if path.parent == folder and not original:
                backend = _huggingface(folder)
            elif re.match(rb"[A-Za-z0-9+/]+=* \d+\r?\n", content):
                backend = _llama3(content)
            else:
                backend = _sentencepiece(content)
            return cls(backend, ends)
        except Exception as error:  # the libraries raise whatever they like, down to plain Exception
            reason = " ".join(f"{type(error).__name__} {error}".split()).removeprefix("ValueError ").removeprefix("Exception ")
            raise UserError(f"cannot read tokenizer {path}: {reason[:300]}; download the model's own") from error

    def encode(self, text: str, bos: bool = True, special: bool = False) -> list[int]:
        """The ids of `text`, begun with the bos token if `bos` and the model uses one. No eos token is added.

        Special tokens written out in the text are parsed in Hugging Face's layout, as transformers does, and are ordinary
        text with an original tokenizer.model, as in Llama's and Mistral's own code, unless `special`. Raises UserError for a
        text that is not valid Unicode.
        """
        return (self._backend.start if bos else []) + self._backend.encode(_checked(text), special)

    def encode_chat(self, messages: Messages) -> list[int]:
        """The ids that ask the model for its turn after `messages` ({"role", "content"} each), by its chat template.

        The template says whether bos comes first. Raises UserError if the checkpoint has no chat template, or it refuses
        the messages.
        """
        return self.encode(self.chat_text(messages), bos=False, special=True)

    def chat_text(self, messages: Messages) -> str:
        """What `encode_chat` encodes, as text."""
        if self._backend.chat_text is None:
            raise UserError("this checkpoint has no chat template (chat_template in tokenizer_config.json); use a plain prompt")
        try:
            with time_limit(TEMPLATE_SECONDS):
                return self._backend.chat_text(messages)
        except Exception as error:  # a template can fail like any code: bad syntax, a missing role, None + str
            reason = " ".join(str(error).split())
            raise UserError(f"the chat template refuses these messages: {reason}; check their roles and order") from error

    def decode(self, ids: Iterable[int]) -> str:
        """The text of `ids` without special tokens; bytes that are not UTF-8 become U+FFFD."""
        stream = TextStream(self)
        return "".join([*map(stream.put, ids), stream.end()])


class TextStream:
    """Decodes ids as they come; the parts together are what `Tokenizer.decode` gives for all of them.

    A sentencepiece text has no leading space, so to continue a text, put the ids of its beginning as well.
    """

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._pieces = tokenizer._backend.pieces
        self._drop_space = tokenizer._backend.drops_first_space
        self._utf8 = codecs.getincrementaldecoder("utf-8")("replace")

    def put(self, id: int) -> str:
        """The whole characters that `id` completes, often none; ids beyond the vocabulary have no text."""
        piece = self._pieces.get(id, b"")
        if piece and self._drop_space:
            self._drop_space = False
            piece = piece.removeprefix(b" ")
        return self._utf8.decode(piece)

    def end(self) -> str:
        """What is left of an unfinished character: U+FFFD or nothing."""
        return self._utf8.decode(b"", final=True)


# ---------------------------------------------------------------------------------------------------------- Hugging Face

def _huggingface(folder: Path) -> _Backend:
    """The folder's tokenizer by transformers, which takes a second to import: not before there is a text."""
    import transformers

    model, settings = (_read_json(folder / name) for name in ("config.json", "tokenizer_config.json"))
    config = None
    if model is None or (settings or {}).get("tokenizer_class"):
        # Beside a class only the model's type counts. To read the rest would import torch's compiler, another second.
        config = transformers.PreTrainedConfig(name_or_path=str(folder))
        config.model_type = (model or {}).get("model_type", "")
    # The key, whatever its value, keeps it from another library for Mistral where mistral-common happens to be installed.
    verbosity = transformers.logging.get_verbosity()
    transformers.logging.set_verbosity_error()  # its advice is for programmers
    try:
        loaded = transformers.AutoTokenizer.from_pretrained(
            folder, config=config, trust_remote_code=False, local_files_only=True, fix_mistral_regex=None)
    finally:
        transformers.logging.set_verbosity(verbosity)
    tokenizer = getattr(loaded, "backend_tokenizer", None)
    if tokenizer is None:
        raise ValueError(f"its class {type(loaded).__name__} does not run on the tokenizers library")
    tokenizer.no_truncation()
    tokenizer.no_padding()
    decoder = json.loads(tokenizer.decoder.__getstate__()) if tokenizer.decoder else {"type": "none"}
    steps = {step["type"]: step for step in decoder.get("decoders", [decoder])}
    if "ByteLevel" in steps:
        piece_bytes = _byte_level_bytes
    elif steps.keys() <= {"Replace", "ByteFallback", "Fuse", "Strip", "Metaspace"}:
        piece_bytes = _sentencepiece_bytes
    else:
        raise ValueError(f"only byte-level and sentencepiece decoders work, not {'+'.join(steps)}")
    pieces = {id: piece_bytes(token) for token, id in tokenizer.get_vocab(with_added_tokens=False).items()}
    added = tokenizer.get_added_tokens_decoder()
    pieces |= {id: b"" if token.special else token.content.encode() for id, token in added.items()}
    stop_ids = {id for id, token in added.items() if token.content in END_TOKENS} | {loaded.eos_token_id} - {None}
    start = [id for id in tokenizer.encode("").ids[:1] if id not in stop_ids]  # a few models end texts with eos
    metaspace = steps.get("Metaspace", {"prepend_scheme": "never"})
    return _Backend(
        # a batch, even of one, leaves the interpreter to other threads while it is encoded
        encode=lambda text, parse_special: tokenizer.encode_batch_fast([text], add_special_tokens=False)[0].ids,
        pieces=pieces,
        stop_ids=stop_ids,
        bos_id=start[0] if start else loaded.bos_token_id,
        eos_id=loaded.eos_token_id,
        start=start,
        drops_first_space="Strip" in steps or metaspace.get("prepend_scheme") != "never",
        chat_text=None if loaded.chat_template is None else
        lambda messages: loaded.apply_chat_template(messages, add_generation_prompt=True, tokenize=False),
    )


def _byte_level_bytes(token: str) -> bytes:
    try:
        return bytes(map(BYTE_OF_CHAR.__getitem__, token))
    except KeyError:
        return token.encode()


def _sentencepiece_bytes(token: str) -> bytes:
    byte = re.fullmatch("<0x([0-9A-F]{2})>", token)
    return bytes.fromhex(byte[1]) if byte else token.replace("▁", " ").encode()


# ------------------------------------------------------------------------------------------------------ original formats

def _llama3(content: bytes) -> _Backend:
    import tiktoken

    ranks = {base64.b64decode(token): int(rank) for token, rank in map(bytes.split, content.splitlines())}
    if sorted(ranks.values()) != list(range(LLAMA3_RANKS)):
        raise ValueError(f"{len(ranks)} tiktoken ranks are not Llama 3's {LLAMA3_RANKS}")
    special = {token: LLAMA3_RANKS + i for i, token in enumerate(LLAMA3_SPECIAL)}
    encoding = tiktoken.Encoding("llama3", pat_str=LLAMA3_SPLIT, mergeable_ranks=ranks, special_tokens=special)

    def encode(text: str, parse_special: bool) -> list[int]:
        allowed = set(special) if parse_special else set()
        return [id for part in _parts(text) for id in encoding.encode(part, allowed_special=allowed, disallowed_special=())]

    def chat_text(messages: Messages) -> str:
        turns = [*((turn["role"], turn["content"].strip() + "<|eot_id|>") for turn in messages), ("assistant", "")]
        return "<|begin_of_text|>" + "".join(f"<|start_header_id|>{role}<|end_header_id|>\n\n{text}" for role, text in turns)

    bos_id = special["<|begin_of_text|>"]
    return _Backend(
        encode=encode,
        pieces={rank: token for token, rank in ranks.items()} | dict.fromkeys(special.values(), b""),
        stop_ids={special[end] for end in END_TOKENS if end in special},
        bos_id=bos_id,
        eos_id=special["<|end_of_text|>"],
        start=[bos_id],
        chat_text=chat_text,
    )


def _parts(text: str) -> Iterator[str]:
    """`text` cut where tiktoken would run out of stack, at the places where Llama's own code cuts it."""
    for start in range(0, len(text), 400_000):
        block = text[start:start + 400_000]
        cuts = [0]
        for run in re.finditer(r"\s{25001,}|\S{25001,}", block):
            cuts += range(run.start() + 25_000, run.end(), 25_000)
        yield from (block[a:b] for a, b in zip(cuts, [*cuts[1:], len(block)], strict=True))


def _sentencepiece(content: bytes) -> _Backend:
    import sentencepiece

    model = sentencepiece.SentencePieceProcessor(model_proto=content)
    tokens = [model.id_to_piece(id) for id in range(model.vocab_size())]
    special = {token: id for id, token in enumerate(tokens) if model.is_control(id) or model.is_unknown(id)}
    split = re.compile("(" + "|".join(re.escape(token) for token in sorted(special, key=len, reverse=True)) + ")")
    # sentencepiece puts a space before every text, but after a special token there is none. A control character before the
    # text merges with nothing and takes the space upon itself.
    mark = "\x01"
    mark_length = len(model.encode(mark))

    def encode(text: str, parse_special: bool) -> list[int]:
        if not parse_special:
            return model.encode(text)
        ids: list[int] = []
        for part in filter(None, split.split(text)):
            if part in special:
                ids.append(special[part])
            else:
                ids += model.encode(mark + part)[mark_length:] if ids else model.encode(part)
        return ids

    bos_id = model.bos_id() if model.bos_id() >= 0 else None
    return _Backend(
        encode=encode,
        pieces={id: b"" if token in special else _sentencepiece_bytes(token) for id, token in enumerate(tokens)},
        stop_ids={special[end] for end in END_TOKENS if end in special},
        bos_id=bos_id,
        eos_id=model.eos_id() if model.eos_id() >= 0 else None,
        start=[] if bos_id is None else [bos_id],
        drops_first_space=model.id_to_piece(model.encode("a")[0]).startswith("▁"),
        # Without [INST] it may be any model's; with [SYSTEM_PROMPT] it is a later Mistral with another format.
        chat_text=_mistral_chat if "[INST]" in special and "[SYSTEM_PROMPT]" not in special else None,
    )


def _mistral_chat(messages: Messages) -> str:
    """Mistral Instruct with tokenizers v2 and v3 (7B since v0.3), where [INST] is one token. The system prompt joins the last
    turn."""
    system = messages[0]["content"] + "\n\n" if messages[0]["role"] == "system" else ""
    turns = messages[bool(system):]
    if {turn["role"] for turn in turns} - {"user", "assistant"} or not turns or turns[-1]["role"] != "user":
        raise ValueError("roles are user and assistant, system only first, and user last")
    text = "<s>"
    for turn in turns:
        if turn["role"] == "user":
            text += f"[INST] {system if turn is turns[-1] else ''}{turn['content']}[/INST]"
        else:
            text += f" {turn['content']}</s>"
    return text


# ----------------------------------------------------------------------------------------------------------------- files

def _end_ids(path: Path) -> list[int]:
    """The end tokens that a config names: an id, a list of ids, or none."""
    eos = (_read_json(path) or {}).get("eos_token_id")
    ids = [] if eos is None else eos if isinstance(eos, list) else [eos]
    if not all(type(id) is int for id in ids):
        raise UserError(f"eos_token_id must be a token id or a list of them (it is {reprlib.repr(eos)} in {path}); correct it")
    return ids


def _checked(text: str) -> str:
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise UserError(f"the text is not valid Unicode at character {error.start}; give it as UTF-8") from error
    return text


def _read(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror}; check that it is there and readable") from error


def _read_json(path: Path) -> dict[str, Any] | None:
    """The object in a JSON file; None if there is no file."""
    if not path.is_file():
        return None
    try:
        data = json.loads(_read(path))
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path} is not JSON: {error}; download it again") from error
    if not isinstance(data, dict):
        raise UserError(f"{path} holds no JSON object; download it again")
    return data
