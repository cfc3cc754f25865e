"""Real tokenizers against the libraries they come from: ids, text and streams must be equal."""
import base64
import importlib.util
import json
import random
import unicodedata
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import sentencepiece
import tiktoken
import tokenizers
import transformers
from tokenizers import AddedToken, Regex, decoders, models, normalizers, pre_tokenizers, processors

from hashfast.common import UserError
from hashfast.runtime.tokenizer import TextStream, Tokenizer

TEXTS = [
    "",
    " ",
    "Hello world",
    "  two leading spaces, and three trailing   ",
    "def f(x: int) -> str:\n\tif x >= 10_000:\n\t\treturn f'{x!r}'\n    # comment\n\n\n    pass\r\n",
    "\t\ttabs\n\n\nnewlines \n mixed\r\n \t",
    "emoji 😀 👩‍👩‍👧‍👦 👍🏽 🏳️‍🌈 🇨🇦 ❤️",
    "中文分词测试：我们在北京大学学习。日本語もOK、한국어도.",
    "Zażółć gęślą jaźń, naïve café, Ελληνικά, русский, עברית, العربية, हिन्दी, ไทย",
    "cafe\u0301 A\u030a ﬁ ½ ① ™ \u00a0nbsp \u200bzero\ufeff \u2028 \x00\x01\x7f",
    "I'M we've DON'T it'll 's 12345678 3.14159 1e-10 ½",
    "rare 𒀀𒁀 𝔘𝔫𝔦𝔠𝔬𝔡𝔢 🜁 ꙮ",
    "▁ the sentencepiece space ▁▁ and Ġ Ċ",
    "<s>[INST] x [/INST]</s> <|begin_of_text|><|eot_id|> <|im_start|>user<|im_end|><|endoftext|> <unk> <0x0A>",
    "a" * 300 + " " * 300 + "\n" * 50,
]
CHAT = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": "What is 1+1? 😀"},
    {"role": "assistant", "content": "It is 2."},
    {"role": "user", "content": "  And in 中文?\n"},
]
CHATML = (
    "{% for message in messages %}{% if loop.first and message['role'] != 'system' %}"
    "{{ '<|im_start|>system\nYou are Qwen, created by Alibaba Cloud. You are a helpful assistant.<|im_end|>\n' }}{% endif %}\n"
    "    {% set text = message['content'] %}\n"
    "{{ '<|im_start|>' + message['role'] + '\n' + text + '<|im_end|>' + '\n' }}{% endfor %}\n"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
MISTRAL_V1_CHAT = (
    "{{ bos_token }}{% for message in messages %}{% if (message['role'] == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('Conversation roles must alternate user/assistant/user/assistant/...') }}{% endif %}"
    "{% if message['role'] == 'user' %}{{ '[INST] ' + message['content'] + ' [/INST]' }}"
    "{% else %}{{ message['content'] + eos_token }}{% endif %}{% endfor %}"
)
MISTRAL_V3_CHAT = MISTRAL_V1_CHAT.replace("' [/INST]'", "'[/INST]'").replace("{% else %}{{", "{% else %}{{ ' ' +")
LLAMA3_PATTERN = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
QWEN_PATTERN = LLAMA3_PATTERN.replace("{1,3}", "")
QWEN_SPECIAL = {"<|endoftext|>": 151643, "<|im_start|>": 151644, "<|im_end|>": 151645}


@dataclass
class Case:
    """A tokenizer of ours and the library it must agree with (ids without bos; text without special tokens)."""

    ours: Tokenizer
    encode: Callable[[str], list[int]]
    decode: Callable[[list[int]], str]
    folder: Path
    library: transformers.PreTrainedTokenizerFast | None = None  # of those with a tokenizer.json

    @property
    def drops_first_space(self) -> bool:
        return self.folder.name.startswith("mistral")


def package_file(package: str, name: str) -> Path:
    """A data file of a development package, which need not be importable."""
    spec = importlib.util.find_spec(package)
    if spec is None or not spec.submodule_search_locations:
        pytest.skip(f"development package {package} is not installed")
    return Path(spec.submodule_search_locations[0]) / name


def checkpoint(folder: Path, name: str, content: bytes, **configs: dict[str, Any]) -> Path:
    """A checkpoint folder with one tokenizer file and JSON files."""
    (folder / name).parent.mkdir(parents=True, exist_ok=True)
    (folder / name).write_bytes(content)
    for config, values in configs.items():
        (folder / f"{config}.json").write_text(json.dumps(values))
    return folder


def read_ranks(path: Path) -> dict[bytes, int]:
    return {base64.b64decode(token): int(rank) for token, rank in map(bytes.split, path.read_bytes().splitlines())}


def byte_level_tokenizer(ranks: dict[bytes, int], special: dict[str, int], pattern: str) -> tokenizers.Tokenizer:
    """The tokenizer.json form of tiktoken ranks: tiktoken merges any two parts that make a token, the lowest rank first."""
    kept = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    chars = {byte: chr(byte) for byte in kept} | {b: chr(256 + i) for i, b in enumerate(sorted(set(range(256)) - set(kept)))}
    names = {token: "".join(chars[byte] for byte in token) for token in ranks}
    merges = [(names[token[:i]], names[token[i:]]) for token in sorted(ranks, key=ranks.__getitem__)
              for i in range(1, len(token)) if token[:i] in ranks and token[i:] in ranks]
    vocabulary = {names[token]: rank for token, rank in ranks.items()}
    tokenizer = tokenizers.Tokenizer(models.BPE(vocabulary, merges, ignore_merges=True))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Split(Regex(pattern), "isolated"), pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    in_order = sorted(special, key=special.__getitem__)
    tokenizer.add_tokens([AddedToken(token, special=True, normalized=False) for token in in_order])
    assert all(tokenizer.token_to_id(token) == id for token, id in special.items())
    return tokenizer


def tiny_tokenizer() -> bytes:
    """A tokenizer.json of 256 bytes and ChatML's tokens."""
    special = {token: 256 + i for i, token in enumerate(QWEN_SPECIAL)}
    return byte_level_tokenizer({bytes([byte]): byte for byte in range(256)}, special, QWEN_PATTERN).to_str().encode()


def sentencepiece_like_tokenizer(model: sentencepiece.SentencePieceProcessor) -> tokenizers.Tokenizer:
    """The tokenizer.json form of a sentencepiece BPE model, as transformers makes it with legacy=False."""
    vocabulary = {model.id_to_piece(id): id for id in range(model.vocab_size())}
    control = [model.id_to_piece(id) for id in range(model.vocab_size()) if model.is_control(id) or model.is_unknown(id)]
    merges = [
        (token[:i], token[i:])
        for token, id in sorted(vocabulary.items(), key=lambda item: -model.get_score(item[1]))
        if token not in control and not model.is_byte(id)
        for i in sorted(range(1, len(token)), key=lambda i: (vocabulary.get(token[:i], 0), vocabulary.get(token[i:], 0)))
        if token[:i] in vocabulary and token[i:] in vocabulary
    ]
    tokenizer = tokenizers.Tokenizer(models.BPE(vocabulary, merges, unk_token="<unk>", fuse_unk=True, byte_fallback=True))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first", split=False)
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    tokenizer.add_tokens([AddedToken(token, special=True, normalized=False) for token in control])
    return tokenizer


def add_bos(tokenizer: tokenizers.Tokenizer, token: str) -> None:
    ids = [(token, tokenizer.token_to_id(token))]
    tokenizer.post_processor = processors.TemplateProcessing(f"{token} $A", special_tokens=ids)


def json_case(folder: Path) -> Case:
    reference = transformers.PreTrainedTokenizerFast.from_pretrained(folder)
    return Case(
        Tokenizer.load(folder),
        lambda text: reference(text, add_special_tokens=False).input_ids,
        lambda ids: reference.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False),
        folder,
        reference,
    )


@pytest.fixture(scope="session")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("checkpoints")


@pytest.fixture(scope="session")
def llama3(root: Path) -> Case:
    """Meta's file, beside Meta's own code."""
    path = package_file("llama_models", "llama3/tokenizer.model")
    library = pytest.importorskip("llama_models.llama3.tokenizer", reason="development package llama_models").Tokenizer(path)
    folder = checkpoint(root / "llama3", "original/tokenizer.model", path.read_bytes())
    return Case(
        Tokenizer.load(folder),
        lambda text: library.encode(text, bos=False, eos=False),
        lambda ids: library.decode([id for id in ids if id < 128_000]),
        folder,
    )


@pytest.fixture(scope="session")
def llama3_json(root: Path, llama3: Case) -> Case:
    special = pytest.importorskip("llama_models.llama3.tokenizer").Tokenizer.get_instance().special_tokens
    tokenizer = byte_level_tokenizer(read_ranks(llama3.folder / "original/tokenizer.model"), special, LLAMA3_PATTERN)
    add_bos(tokenizer, "<|begin_of_text|>")
    config = {
        "bos_token": "<|begin_of_text|>",
        "eos_token": "<|eot_id|>",
        "chat_template": "{{- bos_token }}\n{%- set today = strftime_now('%Y') %}\n{%- for m in messages %}"
        "{{- '<|start_header_id|>' + m['role'] + '<|end_header_id|>\n\n' + today + m['content'] | trim + '<|eot_id|>' }}"
        "{%- endfor %}\n{%- if add_generation_prompt %}"
        "{{- '<|start_header_id|>assistant<|end_header_id|>\n\n' }}{%- endif %}",
    }
    generation = {"bos_token_id": 128000, "eos_token_id": [128001, 128008, 128009]}
    content = tokenizer.to_str().encode()
    return json_case(
        checkpoint(root / "llama3_json", "tokenizer.json", content, tokenizer_config=config, generation_config=generation)
    )


@pytest.fixture(scope="session")
def qwen25(root: Path) -> Case:
    """Qwen2.5's vocabulary from Alibaba's own package, with tiktoken and Qwen's pattern as the judge."""
    ranks = read_ranks(package_file("dashscope", "resources/qwen.tiktoken"))
    tokenizer = byte_level_tokenizer(ranks, QWEN_SPECIAL, QWEN_PATTERN)
    tokenizer.normalizer = normalizers.NFC()
    library = tiktoken.Encoding("qwen", pat_str=QWEN_PATTERN, mergeable_ranks=ranks, special_tokens=QWEN_SPECIAL)
    folder = checkpoint(
        root / "qwen25",
        "tokenizer.json",
        tokenizer.to_str().encode(),
        tokenizer_config={
            "add_bos_token": False,
            "bos_token": None,
            "eos_token": {"__type": "AddedToken", "content": "<|im_end|>", "special": True},
            "pad_token": "<|endoftext|>",
            "chat_template": CHATML,
        },
        config={"bos_token_id": 151643, "eos_token_id": 151645},
    )
    return Case(
        Tokenizer.load(folder),
        lambda text: library.encode(unicodedata.normalize("NFC", text), allowed_special="all"),
        lambda ids: library.decode([id for id in ids if id < 151_643]),
        folder,
        transformers.PreTrainedTokenizerFast.from_pretrained(folder),
    )


@pytest.fixture(scope="session")
def smollm2() -> Case:
    folder = Path(__file__).parents[2] / "checkpoints/smollm2-135m-instruct"
    if not (folder / "tokenizer.json").is_file():
        pytest.skip(f"no {folder.name} in checkpoints/ (the quick start in README.md makes it)")
    return json_case(folder)


def sentencepiece_case(folder: Path, name: str) -> Case:
    content = package_file("mistral_common", f"data/{name}").read_bytes()
    library = sentencepiece.SentencePieceProcessor(model_proto=content)
    return Case(Tokenizer.load(checkpoint(folder, "tokenizer.model", content)), library.encode, library.decode, folder)


@pytest.fixture(scope="session")
def mistral_v1(root: Path) -> Case:
    return sentencepiece_case(root / "mistral_v1", "tokenizer.model.v1")


@pytest.fixture(scope="session")
def mistral_v2(root: Path) -> Case:
    return sentencepiece_case(root / "mistral_v2", "mistral_instruct_tokenizer_240216.model.v2")


@pytest.fixture(scope="session")
def mistral_v3(root: Path) -> Case:
    return sentencepiece_case(root / "mistral_v3", "mistral_instruct_tokenizer_240323.model.v3")


@pytest.fixture(scope="session")
def mistral_v3_json(root: Path, mistral_v3: Case) -> Case:
    library = sentencepiece.SentencePieceProcessor(model_file=str(mistral_v3.folder / "tokenizer.model"))
    tokenizer = sentencepiece_like_tokenizer(library)
    add_bos(tokenizer, "<s>")
    config = {"add_bos_token": True, "bos_token": "<s>", "eos_token": "</s>", "legacy": False, "chat_template": MISTRAL_V3_CHAT}
    return json_case(
        checkpoint(root / "mistral_v3_json", "tokenizer.json", tokenizer.to_str().encode(), tokenizer_config=config)
    )


NAMES = ["llama3", "llama3_json", "qwen25", "smollm2", "mistral_v1", "mistral_v2", "mistral_v3", "mistral_v3_json"]


@pytest.fixture(params=NAMES)
def case(request: pytest.FixtureRequest) -> Case:
    return request.getfixturevalue(request.param)


def random_texts(count: int) -> list[str]:
    """Texts of pieces that tokenizers treat differently, in any order."""
    dice = random.Random(0)
    atoms = list("aZ9 \n\t\r.,'\"éß中文😀👍🏽\u200d\ufe0f\u0301▁Ġ_(){}")
    atoms += ["  ", "    ", "\n\n", "the", " is", "'ll", "123", "return", "🇨🇦"]
    return ["".join(dice.choices(atoms, k=dice.randint(1, 40))) for _ in range(count)]


def test_same_ids_and_text_as_the_library(case: Case) -> None:
    for text in TEXTS + random_texts(300):
        ids = case.ours.encode(text, bos=False)
        assert ids == case.encode(text), repr(text)
        assert case.ours.decode(ids) == case.decode(ids), repr(text)
        stream = TextStream(case.ours)
        parts = [stream.put(id) for id in ids]
        assert "".join(parts) == case.decode(ids) and stream.end() == "", repr(text)


def test_round_trip(case: Case) -> None:
    for text in TEXTS + random_texts(100):
        if "<|" in text or "▁" in text:  # parsed special tokens leave no text, and sentencepiece's ▁ leaves a space
            continue
        if (case.folder / "tokenizer.json").is_file() and case.drops_first_space:
            text = text.lstrip(" ")  # this form adds no space where there is one
        ids = case.ours.encode(text)
        assert case.ours.decode(ids) in (text, unicodedata.normalize("NFC", text)), repr(text)  # Qwen composes accents
        assert case.ours.decode([*ids, case.ours.vocab_size, *case.ours.stop_ids]) == case.ours.decode(ids)


def test_any_ids_stream_like_the_library(case: Case) -> None:
    """Models emit ids in any order, broken UTF-8 among them. sentencepiece counts broken bytes its own way, so not those."""
    dice = random.Random(1)
    first = case.ours.encode("x", bos=False)
    ids = [id for id in range(case.ours.vocab_size) if case.ours.decode([*first, id]) != "x"]  # special tokens have no text
    if case.drops_first_space:
        ids = [id for id in ids if "\ufffd" not in case.decode([id])]
    for _ in range(300):
        chosen = dice.choices(ids, k=dice.randint(1, 12))
        stream = TextStream(case.ours)
        assert "".join([*map(stream.put, chosen), stream.end()]) == case.decode(chosen) == case.ours.decode(chosen), chosen


def test_both_forms_of_a_tokenizer_agree(llama3: Case, llama3_json: Case, mistral_v3: Case, mistral_v3_json: Case) -> None:
    for text in TEXTS + random_texts(300):
        if "<|" not in text:  # only tokenizer.json parses special tokens, and only tokenizer.model adds a space to a space
            assert llama3.ours.encode(text) == llama3_json.ours.encode(text), repr(text)
            text = text.lstrip(" ▁")
            assert mistral_v3.ours.encode(text) == mistral_v3_json.ours.encode(text), repr(text)


def test_stream_holds_back_unfinished_characters(llama3: Case, mistral_v3: Case) -> None:
    for tokenizer in (llama3.ours, mistral_v3.ours):
        ids = tokenizer.encode("𒀀", bos=False)
        stream = TextStream(tokenizer)
        assert [part for part in map(stream.put, ids[:-1]) if part] == [] and len(ids) > 2
        assert stream.put(ids[-1]) == "𒀀" and stream.end() == ""
        for id in ids[:-1]:
            assert "\ufffd" not in stream.put(id)
        assert stream.end() == "\ufffd"


def test_stream_keeps_the_space_inside_a_text(mistral_v3: Case) -> None:
    tokenizer = mistral_v3.ours
    ids = tokenizer.encode("Hello big world")
    stream = TextStream(tokenizer)
    assert [stream.put(id) for id in ids] == ["", "Hello", " big", " world"]
    assert tokenizer.decode(ids[2:]) == "big world"


@pytest.mark.parametrize("name, bos_id, stop_ids, vocab_size", [
    ("llama3", 128000, {128001, 128008, 128009}, 128256),
    ("llama3_json", 128000, {128001, 128008, 128009}, 128256),
    ("qwen25", None, {151643, 151645}, 151646),
    ("smollm2", 1, {0, 2}, 49152),
    ("mistral_v1", 1, {2}, 32000),
    ("mistral_v2", 1, {2}, 32768),
    ("mistral_v3", 1, {2}, 32768),
    ("mistral_v3_json", 1, {2}, 32768),
])
def test_special_ids(
    name: str, bos_id: int | None, stop_ids: set[int], vocab_size: int, request: pytest.FixtureRequest
) -> None:
    tokenizer = request.getfixturevalue(name).ours
    assert (tokenizer.bos_id, tokenizer.stop_ids, tokenizer.vocab_size) == (bos_id, stop_ids, vocab_size)
    start = [] if name in ("qwen25", "smollm2") else [bos_id]
    assert tokenizer.encode("x") == start + tokenizer.encode("x", bos=False)


def test_ids_agree_with_the_config_in_any_form(mistral_v3: Case, tmp_path: Path) -> None:
    content = tiny_tokenizer()
    bare = Tokenizer.load(checkpoint(tmp_path / "bare", "tokenizer.json", content))
    assert (bare.bos_id, bare.stop_ids, bare.encode("x")) == (None, {256, 258}, bare.encode("x", bos=False))
    with pytest.raises(UserError, match="no chat template"):
        bare.encode_chat(CHAT)
    with_bos = tokenizers.Tokenizer.from_str(content.decode())
    add_bos(with_bos, "<|im_start|>")
    # tokenizer.json decides whether a text begins with it
    config = {"bos_token": {"__type": "AddedToken", "content": "<|im_start|>"}, "add_bos_token": False}
    folder = checkpoint(tmp_path / "bos", "tokenizer.json", with_bos.to_str().encode(), tokenizer_config=config,
                        config={"eos_token_id": 7})
    assert Tokenizer.load(folder).encode("x") == [257, *bare.encode("x")]
    assert (Tokenizer.load(folder).bos_id, Tokenizer.load(folder).stop_ids) == (257, {7, 256, 258})
    content = (mistral_v3.folder / "tokenizer.model").read_bytes()
    for flag in (False, True):
        config = {"tokenizer_class": "LlamaTokenizer", "add_bos_token": flag}
        folder = checkpoint(tmp_path / f"sp{flag}", "tokenizer.model", content, tokenizer_config=config)
        assert Tokenizer.load(folder).encode("x") == [1] * flag + mistral_v3.encode("x")


@pytest.mark.parametrize("eos", ["2", 2.0, True, [[1]], {"id": 1}])
def test_end_tokens_of_a_wrong_type(eos: Any, tmp_path: Path) -> None:
    for name in ("config", "generation_config"):
        folder = checkpoint(tmp_path / name, "tokenizer.json", tiny_tokenizer(), **{name: {"eos_token_id": eos}})
        with pytest.raises(UserError, match=f"eos_token_id must be a token id or a list of them .*{name}.json"):
            Tokenizer.load(folder)


def test_added_tokens_of_a_sentencepiece_checkpoint(mistral_v1: Case, tmp_path: Path) -> None:
    added = {"32000": {"content": "<|im_end|>", "special": True}, "32001": {"content": "<|im_start|>", "special": True}}
    config = {"added_tokens_decoder": added, "eos_token": "<|im_end|>", "chat_template": CHATML}
    content = (mistral_v1.folder / "tokenizer.model").read_bytes()
    tokenizer = Tokenizer.load(checkpoint(tmp_path, "tokenizer.model", content, tokenizer_config=config))
    ids = tokenizer.encode_chat([{"role": "user", "content": "Hi"}])
    assert tokenizer.vocab_size == 32002 and tokenizer.stop_ids == {2, 32000}
    assert [id for id in ids if id >= 32000] == [32001, 32000, 32001, 32000, 32001]
    assert tokenizer.decode(ids).endswith("user\nHi\nassistant\n")


@pytest.mark.parametrize("name", ["llama3_json", "qwen25", "smollm2", "mistral_v3_json"])
def test_chat_like_transformers(name: str, request: pytest.FixtureRequest) -> None:
    case = request.getfixturevalue(name)
    reference = case.library
    for messages in (CHAT, CHAT[1:], CHAT[1:2]) if "mistral" not in name else (CHAT[1:], CHAT[1:2]):
        expected = reference.apply_chat_template(messages, add_generation_prompt=True, tokenize=True, return_dict=False)
        assert case.ours.encode_chat(messages) == expected
    for text in TEXTS:
        assert case.ours.encode(text) == reference(text).input_ids, repr(text)
        assert case.ours.decode(reference(text).input_ids) == case.decode(reference(text).input_ids), repr(text)


def test_chat_without_tokenizer_config(llama3: Case, mistral_v1: Case, mistral_v2: Case, mistral_v3: Case) -> None:
    formats = pytest.importorskip("llama_models.llama3.chat_format", reason="development package llama_models")
    messages = pytest.importorskip("llama_models.datatypes").RawMessage
    library = formats.ChatFormat(formats.Tokenizer.get_instance())
    stripped = [messages(role=turn["role"], content=turn["content"].strip()) for turn in CHAT]  # as Llama 3's templates do
    assert llama3.ours.encode_chat(CHAT) == library.encode_dialog_prompt(stripped).tokens
    for version, case in (("v2", mistral_v2), ("v3", mistral_v3)):
        for chat in (CHAT, CHAT[1:], CHAT[1:2]):
            assert case.ours.encode_chat(chat) == mistral_chat(version, chat)
    for chat in (CHAT[:1], CHAT[:3], [{"role": "tool", "content": "x"}, *CHAT[1:2]]):
        with pytest.raises(UserError, match="roles are"):
            mistral_v3.ours.encode_chat(chat)
    with pytest.raises(UserError, match="no chat template"):
        mistral_v1.ours.encode_chat(CHAT)


def mistral_chat(version: str, chat: list[dict[str, str]]) -> list[int]:
    """What Mistral's own code makes of a chat."""
    mistral = pytest.importorskip("mistral_common.tokens.tokenizers.mistral", reason="development package mistral_common")
    request = pytest.importorskip("mistral_common.protocol.instruct.request").ChatCompletionRequest
    library = getattr(mistral.MistralTokenizer, version)()
    return library.encode_chat_completion(request(messages=chat)).tokens


@pytest.mark.parametrize("version, template, legacy", [("v1", MISTRAL_V1_CHAT, True), ("v3", MISTRAL_V3_CHAT, False)])
def test_chat_template_with_sentencepiece(
    version: str, template: str, legacy: bool, request: pytest.FixtureRequest, tmp_path: Path
) -> None:
    case = request.getfixturevalue(f"mistral_{version}")
    config = {"bos_token": "<s>", "eos_token": "</s>", "legacy": legacy, "chat_template": template,
              "tokenizer_class": "LlamaTokenizer"}
    content = (case.folder / "tokenizer.model").read_bytes()
    tokenizer = Tokenizer.load(checkpoint(tmp_path, "tokenizer.model", content, tokenizer_config=config))
    if version == "v1":
        assert tokenizer.encode_chat(CHAT[1:2]) == mistral_chat(version, CHAT[1:2])
    else:
        for messages in (CHAT[1:], CHAT[1:2]):
            ids = tokenizer.encode_chat(messages)
            assert ids == mistral_chat(version, messages)
            assert ids == request.getfixturevalue("mistral_v3_json").ours.encode_chat(messages)
    with pytest.raises(UserError, match="must alternate"):
        tokenizer.encode_chat(CHAT)


def test_chat_template_forms(tmp_path: Path) -> None:
    content = tiny_tokenizer()
    templates = [{"name": "tool_use", "template": "tools"}, {"name": "default", "template": "{{ messages | tojson }}"}]
    folder = checkpoint(tmp_path, "tokenizer.json", content, tokenizer_config={"chat_template": templates})
    chat = [{"role": "user", "content": "<é&'>"}]
    assert Tokenizer.load(folder).encode_chat(chat) == [*json.dumps(chat, ensure_ascii=False).encode()]
    jinja = "{% for m in messages %}\n    {% if loop.index > 1 %}{% break %}{% endif %}\n{{ m.content }}{% endfor %}é"
    (folder / "chat_template.jinja").write_text(jinja, encoding="utf-8")
    assert Tokenizer.load(folder).encode_chat(chat * 2) == [*"<é&'>é".encode()]
    for bad in ("{% if %}", "{{ messages.append(1) }}", "{{ messages[0]['content'] + 1 }}", "{{ raise_exception('no') }}"):
        (folder / "chat_template.jinja").write_text(bad)
        with pytest.raises(UserError, match="chat template"):
            Tokenizer.load(folder).encode_chat(chat)


def test_runs_too_long_for_tiktoken(llama3: Case) -> None:
    for text in (" " * 120_000, "x" * 60_001 + " " * 25_001 + "y", "word " * 90_000):
        assert llama3.ours.encode(text, bos=False) == llama3.encode(text)
        assert llama3.ours.decode(llama3.ours.encode(text)) == text


def test_errors(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no tokenizer in"):
        Tokenizer.load(tmp_path / "nowhere")
    wordpiece = tokenizers.Tokenizer(models.WordPiece({"[UNK]": 0}, unk_token="[UNK]"))
    wordpiece.decoder = decoders.WordPiece()
    junk = {
        "tokenizer.model": [b"", b"\x00\xff junk", b"<html>404</html>", b"aGk= 0\n", b"aGk= 0\naGk=\n", b"\xff" * 1000],
        "tokenizer.json": [b"", b"{}", b"[]", b"\xff\xfe", b'{"model": 1}', b"version git-lfs", wordpiece.to_str().encode()],
    }
    for name, contents in junk.items():
        for i, content in enumerate(contents):
            folder = checkpoint(tmp_path / f"{name}{i}", name, content)
            with pytest.raises(UserError, match=name) as caught:
                Tokenizer.load(folder)
            assert "\n" not in str(caught.value)
    content = tiny_tokenizer()
    folder = checkpoint(tmp_path / "config", "tokenizer.json", content)
    (folder / "tokenizer_config.json").write_text("{")
    with pytest.raises(UserError, match="tokenizer_config.json"):
        Tokenizer.load(folder)
    (folder / "tokenizer_config.json").unlink()
    with pytest.raises(UserError, match="Unicode"):
        Tokenizer.load(folder).encode("a\ud800")
