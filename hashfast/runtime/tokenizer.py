"""Text to token ids and back, for the three tokenizer files that checkpoints carry.

`tokenizer.json` (Hugging Face), sentencepiece's `tokenizer.model`, and Llama 3's `tokenizer.model` (tiktoken ranks).
Each is read by its own library, which encodes. Decoding is shared: every token stands for some bytes, so that streamed
text and text decoded at once cannot differ.
"""
import base64
import codecs
import json
import os
import re
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any

from hashfast.common import UserError

os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")  # with it, a later fork prints a warning

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
LLAMA3_CHAT = (
    "{{ bos_token }}{% for message in messages %}"
    "<|start_header_id|>{{ message['role'] }}<|end_header_id|>\n\n{{ message['content'] | trim }}<|eot_id|>"
    "{% endfor %}{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}"  # jinja2 drops a final bare newline
)
# Mistral Instruct with tokenizers v2 and v3 (7B since v0.3), where [INST] is one token. The system prompt joins the last turn.
MISTRAL_CHAT = (
    "{{ bos_token }}{% for message in messages %}"
    "{% if message['role'] == 'user' %}[INST] "
    "{% if loop.last and messages[0]['role'] == 'system' %}{{ messages[0]['content'] }}\n\n{% endif %}"
    "{{ message['content'] }}[/INST]"
    "{% elif message['role'] == 'assistant' and not loop.last %} {{ message['content'] }}</s>"
    "{% elif loop.last or not loop.first or message['role'] != 'system' %}"
    "{{ raise_exception('roles are user and assistant, system only first, and user last') }}"
    "{% endif %}{% endfor %}"
)
# Byte-level vocabularies write printable Latin-1 bytes as themselves, the other bytes as the characters from U+0100 on.
PRINTABLE = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
BYTE_OF_CHAR = {chr(byte): byte for byte in PRINTABLE}
BYTE_OF_CHAR |= {chr(0x100 + i): byte for i, byte in enumerate(sorted(set(range(256)) - set(PRINTABLE)))}


@dataclass(frozen=True)
class _Backend:
    """What differs between the tokenizer files."""

    encode: Callable[[str, bool], list[int]]  # (text, whether special tokens in it count as such) -> ids without bos
    pieces: list[bytes]  # what each id stands for; nothing for special tokens
    special: dict[str, int]
    bos_id: int | None
    adds_bos: bool
    drops_first_space: bool = False  # encoding puts a space before the text, so decoding takes it away
    chat_template: str | None = None


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

    def __init__(self, backend: _Backend, config: dict[str, Any], model_configs: list[dict[str, Any]]) -> None:
        self._backend = backend
        self.vocab_size = len(backend.pieces)
        # What chat templates may use: bos_token, eos_token and the like, as strings.
        self._tokens = {
            name: token["content"] if isinstance(token, dict) else token
            for name, token in config.items()
            if name.endswith("_token") and isinstance(token, str | dict)
        }
        self.bos_id = backend.bos_id
        if "bos_token" in config:  # null says that the model has none
            self.bos_id = backend.special.get(self._tokens.get("bos_token", ""))
        elif self.bos_id is not None:
            self._tokens["bos_token"] = next(token for token, id in backend.special.items() if id == self.bos_id)
        add_bos = config.get("add_bos_token")
        self._bos = [self.bos_id] if self.bos_id is not None and (backend.adds_bos if add_bos is None else add_bos) else []

        self.eos_id = backend.special.get(self._tokens.get("eos_token", ""))
        ends = {*END_TOKENS, self._tokens.get("eos_token")} & backend.special.keys()
        stop_ids = {backend.special[end] for end in ends}
        for eos in (model_config.get("eos_token_id") for model_config in model_configs):
            stop_ids |= set(eos if isinstance(eos, list) else [eos]) - {None}
        self.stop_ids = frozenset(stop_ids)

        template = config.get("chat_template")
        if isinstance(template, list):
            template = {named["name"]: named["template"] for named in template}.get("default")
        self._chat_template = template or backend.chat_template

    @classmethod
    def load(cls, folder: str | Path) -> "Tokenizer":
        """The tokenizer of the checkpoint in `folder`, from tokenizer.json or else (original/)tokenizer.model.

        tokenizer_config.json, chat_template.jinja, generation_config.json and config.json beside it are used where they
        exist. Raises UserError if there is no tokenizer file, or a file cannot be understood.
        """
        folder = Path(folder)
        names = ("tokenizer.json", "tokenizer.model", "original/tokenizer.model")
        path = next((folder / name for name in names if (folder / name).is_file()), None)
        if path is None:
            raise UserError(f"no tokenizer in {folder}: looked for {', '.join(names)}; download the model's own")
        content = _read(path)
        config = _read_json(folder / "tokenizer_config.json")
        jinja = folder / "chat_template.jinja"
        if jinja.is_file():
            config["chat_template"] = _read(jinja).decode(errors="replace")
        model_configs = [_read_json(folder / name) for name in ("generation_config.json", "config.json")]
        try:
            if path.name == "tokenizer.json":
                backend = _huggingface(content)
            elif re.match(rb"[A-Za-z0-9+/]+=* \d+\r?\n", content):
                backend = _llama3(content)
            else:
                backend = _sentencepiece(content, config.get("added_tokens_decoder", {}), bool(config.get("legacy")))
            return cls(backend, config, model_configs)
        except Exception as error:  # the three libraries raise whatever they like, down to plain Exception
            reason = f"{type(error).__name__} {error}".removeprefix("ValueError ").removeprefix("Exception ")
            raise UserError(f"cannot read tokenizer {path}: {reason}; download the model's own") from error

    def encode(self, text: str, bos: bool = True, special: bool = False) -> list[int]:
        """The ids of `text`, begun with the bos token if `bos` and the model uses one. No eos token is added.

        Special tokens written out in the text are parsed with tokenizer.json, as in transformers, and are ordinary text
        with both kinds of tokenizer.model, as in Llama's and Mistral's own code, unless `special`. Raises UserError for a
        text that is not valid Unicode.
        """
        return (self._bos if bos else []) + self._backend.encode(_checked(text), special)

    def encode_chat(self, messages: list[dict[str, Any]]) -> list[int]:
        """The ids that ask the model for its turn after `messages` ({"role", "content"} each), by its chat template.

        The template says whether bos comes first. Raises UserError if the checkpoint has no chat template, or it refuses
        the messages.
        """
        return self.encode(self.chat_text(messages), bos=False, special=True)

    def chat_text(self, messages: list[dict[str, Any]]) -> str:
        """What `encode_chat` encodes, as text."""
        if self._chat_template is None:
            raise UserError("this checkpoint has no chat template (chat_template in tokenizer_config.json); use a plain prompt")
        return _render(self._chat_template, messages, self._tokens)

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
        piece = self._pieces[id] if 0 <= id < len(self._pieces) else b""
        if piece and self._drop_space:
            self._drop_space = False
            piece = piece.removeprefix(b" ")
        return self._utf8.decode(piece)

    def end(self) -> str:
        """What is left of an unfinished character: U+FFFD or nothing."""
        return self._utf8.decode(b"", final=True)


def _huggingface(content: bytes) -> _Backend:
    import tokenizers

    tokenizer = tokenizers.Tokenizer.from_buffer(content)
    tokenizer.no_truncation()
    tokenizer.no_padding()
    decoder = json.loads(content).get("decoder") or {"type": "none"}
    steps = {step["type"]: step for step in decoder.get("decoders", [decoder])}
    if "ByteLevel" in steps:
        piece_bytes = _byte_level_bytes
    elif steps.keys() <= {"Replace", "ByteFallback", "Fuse", "Strip", "Metaspace"}:
        piece_bytes = _sentencepiece_bytes
    else:
        raise ValueError(f"only byte-level and sentencepiece decoders work, not {'+'.join(steps)}")
    vocabulary = tokenizer.get_vocab(with_added_tokens=False)
    added = tokenizer.get_added_tokens_decoder()
    pieces = [b""] * (max([*vocabulary.values(), *added]) + 1)
    for token, id in vocabulary.items():
        pieces[id] = piece_bytes(token)
    for id, token in added.items():
        pieces[id] = b"" if token.special else token.content.encode()
    special = {token.content: id for id, token in added.items()}
    metaspace = steps.get("Metaspace", {"prepend_scheme": "never"})
    around = tokenizer.encode("").tokens  # what the post-processor puts around every text: bos, or for a few models eos
    bos_id = special.get(around[0]) if around and around[0] not in END_TOKENS else None
    return _Backend(
        # a batch, even of one, leaves the interpreter to other threads while it is encoded
        encode=lambda text, parse_special: tokenizer.encode_batch_fast([text], add_special_tokens=False)[0].ids,
        pieces=pieces,
        special=special,
        bos_id=bos_id,
        adds_bos=bos_id is not None,
        drops_first_space="Strip" in steps or metaspace.get("prepend_scheme") != "never",
    )


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

    return _Backend(
        encode=encode,
        pieces=sorted(ranks, key=ranks.__getitem__) + [b""] * len(special),
        special=special,
        bos_id=special["<|begin_of_text|>"],
        adds_bos=True,
        chat_template=LLAMA3_CHAT,
    )


def _sentencepiece(content: bytes, added: dict[str, Any], legacy: bool) -> _Backend:
    import sentencepiece

    model = sentencepiece.SentencePieceProcessor(model_proto=content)
    tokens = [model.id_to_piece(id) for id in range(model.vocab_size())]
    special = {token: id for id, token in enumerate(tokens) if model.is_control(id) or model.is_unknown(id)}
    pieces = [b"" if token in special else _sentencepiece_bytes(token) for token in tokens]
    for id, token in ((int(id), token) for id, token in added.items()):
        if id >= len(tokens):  # the rest only repeat what the model file says
            pieces += [b""] * (id + 1 - len(pieces))
            pieces[id] = b"" if token.get("special") else token["content"].encode()
            special[token["content"]] = id
    split = re.compile("(" + "|".join(re.escape(token) for token in sorted(special, key=len, reverse=True)) + ")")
    # sentencepiece puts a space before every text. Templates write it out where it belongs, so after a special token it must
    # not come again, except for checkpoints made before that was settled, which say "legacy". A control character before
    # the text merges with nothing and takes the space upon itself.
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
                ids += model.encode(part) if legacy or not ids else model.encode(mark + part)[mark_length:]
        return ids

    return _Backend(
        encode=encode,
        pieces=pieces,
        special=special,
        bos_id=model.bos_id() if model.bos_id() >= 0 else None,
        adds_bos=True,
        drops_first_space=model.id_to_piece(model.encode("a")[0]).startswith("▁"),
        # Without [INST] it may be any model's; with [SYSTEM_PROMPT] it is a later Mistral with another format.
        chat_template=MISTRAL_CHAT if "[INST]" in special and "[SYSTEM_PROMPT]" not in special else None,
    )


def _parts(text: str) -> Iterator[str]:
    """`text` cut where tiktoken would run out of stack, at the places where Llama's own code cuts it."""
    for start in range(0, len(text), 400_000):
        block = text[start:start + 400_000]
        cuts = [0]
        for run in re.finditer(r"\s{25001,}|\S{25001,}", block):
            cuts += range(run.start() + 25_000, run.end(), 25_000)
        yield from (block[a:b] for a, b in zip(cuts, [*cuts[1:], len(block)], strict=True))


def _sentencepiece_bytes(token: str) -> bytes:
    byte = re.fullmatch("<0x([0-9A-F]{2})>", token)
    return bytes.fromhex(byte[1]) if byte else token.replace("▁", " ").encode()


def _byte_level_bytes(token: str) -> bytes:
    return bytes(BYTE_OF_CHAR[char] for char in token) if all(char in BYTE_OF_CHAR for char in token) else token.encode()


def _render(template: str, messages: list[dict[str, Any]], tokens: dict[str, str]) -> str:
    """The chat as text, as transformers renders it. Templates are code from strangers, hence the sandbox."""
    import jinja2
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    def raise_exception(message: str) -> None:
        raise jinja2.TemplateError(message)

    def tojson(value: Any, ensure_ascii: bool = False, **layout: Any) -> str:  # jinja2's own would escape HTML
        return json.dumps(value, ensure_ascii=ensure_ascii, **layout)

    environment = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols"])
    environment.filters["tojson"] = tojson
    environment.globals["raise_exception"] = raise_exception
    environment.globals["strftime_now"] = lambda form: datetime.now().strftime(form)
    try:
        return environment.from_string(template).render(messages=messages, add_generation_prompt=True, **tokens)
    except Exception as error:  # a template can fail like any code: bad syntax, a missing role, None + str
        raise UserError(f"the chat template refuses these messages: {error}; check their roles and order") from error


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


def _read_json(path: Path) -> dict[str, Any]:
    """The object in a JSON file, empty if there is no file."""
    if not path.is_file():
        return {}
    try:
        data = json.loads(_read(path))
    except ValueError as error:
        raise UserError(f"{path} is not JSON: {error}; download it again") from error
    if not isinstance(data, dict):
        raise UserError(f"{path} holds no JSON object; download it again")
    return data
