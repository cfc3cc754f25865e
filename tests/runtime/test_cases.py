"""Checkpoint folders as people have them, of kinds that are easily read wrongly. The right answers by transformers stand here
as literals, and transformers is run again."""
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from conftest import CHATML, Ran
from safetensors.torch import load_file, save_file
from sentencepiece import sentencepiece_model_pb2
from tokenizers.pre_tokenizers import ByteLevel

from hashfast.runtime import distributed, tensor_parallel
from hashfast.runtime.checkpoint import load_model
from hashfast.runtime.quantize import quantize_folder
from hashfast.runtime.tokenizer import Tokenizer

# ------------------------------------------------------------------------------------------------------------ tokenizers

BASIC = ["<unk>", "<s>", "</s>"]
TURNS = ["<|im_start|>", "<|im_end|>"]
LETTERS = list("▁Hiuserantohl")
MERGES = [("H", "i"), ("▁", "Hi"), ("e", "r"), ("l", "l")]
WORDS = LETTERS + ["".join(merge) for merge in MERGES]
BYTES = [f"<0x{i:02X}>" for i in range(256)]
TEMPLATES = {
    "chatml": CHATML,
    "generation": "{% for m in messages %}{{ m.role }}{% if m.role == 'assistant' %}{% generation %}{{ m.content }}"
                  "{% endgeneration %}{% else %}{{ m.content }}<|im_end|>{% endif %}{% endfor %}<|im_start|>",
    "tools": "{% if tools is not none or documents is not none %}You may call tools.{% endif %}{{ messages[0].content }}",
    "ends": "{{ bos_token }}{% for m in messages %}{{ m.role }}{{ m.content }}{{ eos_token }}{% endfor %}",
}


def as_json(tokens: list[str], special: list[str], merges: list[tuple[str, str]], **parts: Any) -> str:
    """A tokenizer.json of BPE over `tokens`, those of `special` among them."""
    flags = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": True}
    model = {"type": "BPE", "dropout": None, "unk_token": None, "continuing_subword_prefix": None, "end_of_word_suffix": None,
             "fuse_unk": True, "byte_fallback": False, "ignore_merges": False, "merges": [list(merge) for merge in merges],
             "vocab": {token: id for id, token in enumerate(tokens)}} | parts.pop("model", {})
    return json.dumps({"version": "1.0", "truncation": None, "padding": None, "normalizer": None, "pre_tokenizer": None,
                       "post_processor": None, "decoder": None, "model": model,
                       "added_tokens": [{"id": tokens.index(token), "content": token} | flags for token in special]} | parts)


def byte_level(*special: str) -> str:
    """Special tokens, the 256 bytes, "er" and "us"."""
    split = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True}
    tokens = [*special, *sorted(ByteLevel.alphabet()), "er", "us"]
    return as_json(tokens, [*special], [("e", "r"), ("u", "s")], pre_tokenizer=split, decoder=split)


def llama_like(*special: str, prepend: bool = False) -> str:
    """As Llama 2's: special tokens, bytes, WORDS; the space before a text by a pre-tokenizer, or in the older way."""
    space = {"type": "Sequence", "normalizers": [{"type": "Prepend", "prepend": "▁"},
                                                 {"type": "Replace", "pattern": {"String": " "}, "content": "▁"}]}
    first = {"type": "Metaspace", "replacement": "▁", "prepend_scheme": "first", "split": False}
    steps = [{"type": "Replace", "pattern": {"String": "▁"}, "content": " "}, {"type": "ByteFallback"}, {"type": "Fuse"},
             {"type": "Strip", "content": " ", "start": 1, "stop": 0}]
    start = {"SpecialToken": {"id": "<s>", "type_id": 0}}
    bos = {"type": "TemplateProcessing", "single": [start, {"Sequence": {"id": "A", "type_id": 0}}],
           "pair": [start, {"Sequence": {"id": "A", "type_id": 0}}, {"Sequence": {"id": "B", "type_id": 1}}],
           "special_tokens": {"<s>": {"id": "<s>", "ids": [1], "tokens": ["<s>"]}}}
    return as_json([*BASIC, *special, *BYTES, *WORDS], [*BASIC, *special], MERGES,
                   model={"unk_token": "<unk>", "byte_fallback": True}, decoder={"type": "Sequence", "decoders": steps},
                   post_processor=bos, **{"normalizer": space} if prepend else {"pre_tokenizer": first})


def old_llama_like() -> str:
    return llama_like(*TURNS, prepend=True)


def sentencepiece_model() -> bytes:
    """The same vocabulary as a tokenizer.model, without special tokens of chats."""
    proto = sentencepiece_model_pb2.ModelProto()
    kinds = proto.SentencePiece
    for i, token in enumerate([*BASIC, *BYTES, *WORDS]):
        kind = kinds.UNKNOWN if i == 0 else kinds.CONTROL if i < 3 else kinds.BYTE if token in BYTES else kinds.NORMAL
        score = -float(i) if kind == kinds.NORMAL and len(token) > 1 else -1000.0 - i
        proto.pieces.add(piece=token, score=score if kind == kinds.NORMAL else 0.0, type=kind)
    trainer, normalizer = proto.trainer_spec, proto.normalizer_spec
    trainer.model_type, trainer.byte_fallback, trainer.vocab_size = trainer.BPE, True, len(proto.pieces)
    trainer.unk_id, trainer.bos_id, trainer.eos_id, trainer.pad_id = 0, 1, 2, -1
    normalizer.name, normalizer.add_dummy_prefix, normalizer.remove_extra_whitespaces = "identity", True, False
    return proto.SerializeToString()


def written(folder: Path, vocabulary: str | bytes, **files: dict[str, Any]) -> Path:
    folder.mkdir()
    name = "tokenizer.json" if isinstance(vocabulary, str) else "tokenizer.model"
    (folder / name).write_bytes(vocabulary.encode() if isinstance(vocabulary, str) else vocabulary)
    for file, values in ({"config": {"model_type": "llama"}} | files).items():
        (folder / f"{file}.json").write_text(json.dumps(values))
    return folder


PLAIN = {"tokenizer_class": "PreTrainedTokenizerFast"}
LLAMA = {"tokenizer_class": "LlamaTokenizer", "bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
ENDS = LLAMA | {"eos_token": "<|im_end|>"}
SPECIAL = {"lstrip": False, "rstrip": False, "normalized": False, "single_word": False, "special": True}
ADDED = {"added_tokens_decoder": {str(276 + i): {"content": token} | SPECIAL for i, token in enumerate(TURNS)}}

# name: (the folder's files, its template, None: the text "Hi there" is encoded) -> ids and stop tokens
CASES: dict[str, tuple[Callable[[], str | bytes], dict[str, Any], str | None, list[int], set[int]]] = {
    "generation tag": (lambda: byte_level(*TURNS), {"tokenizer_config": PLAIN}, "generation",
        [259, 258, 41, 74, 1, 0], {1}),
    "tools and documents are none": (lambda: byte_level(*TURNS), {"tokenizer_config": PLAIN}, "tools",
        [41, 74], {1}),
    "special_tokens_map alone": (lambda: byte_level("<s>", "<e>"),
        {"tokenizer_config": PLAIN, "special_tokens_map": {"bos_token": "<s>", "eos_token": {"content": "<e>"} | SPECIAL}},
        "ends", [0, 259, 258, 41, 74, 1], {1}),
    "added_tokens": (byte_level,
        {"tokenizer_config": PLAIN | {"eos_token": "<|im_end|>"}, "added_tokens": {"<|im_end|>": 258, "<|im_start|>": 259}},
        "chatml", [259, 257, 256, 198, 39, 72, 258, 198, 259, 64, 82, 82, 72, 82, 83, 64, 77, 83], {258}),
    "added_tokens_decoder": (byte_level,
        {"tokenizer_config": PLAIN | {"added_tokens_decoder": {"258": {"content": "<|im_end|>"} | SPECIAL,
                                                               "259": {"content": "<|im_start|>"} | SPECIAL}}},
        "chatml", [259, 257, 256, 198, 39, 72, 258, 198, 259, 64, 82, 82, 72, 82, 83, 64, 77, 83], {258}),
    "additional_special_tokens": (byte_level, {"tokenizer_config": PLAIN | {"additional_special_tokens": TURNS}},
        "chatml", [258, 257, 256, 198, 39, 72, 259, 198, 258, 64, 82, 82, 72, 82, 83, 64, 77, 83], {259}),
    "add_prefix_space false": (llama_like, {"tokenizer_config": LLAMA | {"add_prefix_space": False}}, None,
        [1, 272, 259, 268, 270, 274, 264], {2}),
    "prefix space": (llama_like, {"tokenizer_config": LLAMA}, None,
        [1, 273, 259, 268, 270, 274, 264], {2}),
    "Prepend, legacy false": (old_llama_like, {"tokenizer_config": ENDS | {"legacy": False}}, "chatml",
        [3, 264, 265, 276, 15, 274, 4, 15, 3, 268, 265, 265, 263, 265, 270, 268, 269, 270], {2, 4}),
    "Prepend, legacy true": (old_llama_like, {"tokenizer_config": ENDS | {"legacy": True}}, "chatml",
        [3, 261, 264, 265, 276, 15, 274, 4, 261, 15, 3, 261, 268, 265, 265, 263, 265, 270, 268, 269, 270], {2, 4}),
    "Prepend, legacy absent": (old_llama_like, {"tokenizer_config": ENDS}, "chatml",
        [3, 264, 265, 276, 15, 274, 4, 15, 3, 268, 265, 265, 263, 265, 270, 268, 269, 270], {2, 4}),
    "model, special_tokens_map alone": (sentencepiece_model,
        {"special_tokens_map": {"bos_token": "<s>", "eos_token": "<|im_end|>", "additional_special_tokens": TURNS}}, None,
        [272, 259, 268, 270, 274, 264], {2, 276}),
    "model, special_tokens_map": (sentencepiece_model,
        {"tokenizer_config": {"tokenizer_class": "LlamaTokenizer"}, "special_tokens_map": {"eos_token": "<|im_end|>"}}, "ends",
        [1, 262, 263, 274, 272, 276], {2, 276}),
    "model, added_tokens": (sentencepiece_model,
        {"tokenizer_config": ENDS, "added_tokens": {"<|im_start|>": 276, "<|im_end|>": 277}}, "chatml",
        [276, 262, 263, 274, 13, 272, 277, 13, 276, 266, 263, 263, 261, 263, 268, 266, 267, 268], {2, 277}),
    "model, added_tokens_decoder": (sentencepiece_model, {"tokenizer_config": ENDS | ADDED}, "chatml",
        [276, 262, 263, 274, 13, 272, 277, 13, 276, 266, 263, 263, 261, 263, 268, 266, 267, 268], {2, 277}),
    "model, additional_special_tokens": (sentencepiece_model,
        {"tokenizer_config": ENDS | {"additional_special_tokens": TURNS}}, "chatml",
        [277, 262, 263, 274, 13, 272, 276, 13, 277, 266, 263, 263, 261, 263, 268, 266, 267, 268], {276}),
    "model, add_prefix_space false": (sentencepiece_model, {"tokenizer_config": LLAMA | {"add_prefix_space": False}}, None,
        [272, 259, 268, 270, 274, 264], {2}),
    "model, legacy true": (sentencepiece_model, {"tokenizer_config": ENDS | ADDED | {"legacy": True}}, "chatml",
        [276, 259, 262, 263, 274, 13, 272, 277, 259, 13, 276, 259, 266, 263, 263, 261, 263, 268, 266, 267, 268], {2, 277}),
}


@pytest.mark.parametrize("name", CASES)
def test_tokenizer(name: str, tmp_path: Path) -> None:
    vocabulary, files, template, ids, stop_ids = CASES[name]
    folder = written(tmp_path / "case", vocabulary(), **files)
    if template is not None:
        (folder / "chat_template.jinja").write_text(TEMPLATES[template])
    tokenizer, library = Tokenizer.load(folder), transformers.AutoTokenizer.from_pretrained(folder)
    messages = [{"role": "user", "content": "Hi"}]
    if template is None:
        found, expected = tokenizer.encode("Hi there"), library("Hi there").input_ids
    else:
        expected = library.apply_chat_template(messages, add_generation_prompt=True, tokenize=True, return_dict=False)
        found = tokenizer.encode_chat(messages)
    assert found == ids == expected and tokenizer.stop_ids == stop_ids
    assert library.eos_token_id in (None, *stop_ids)
    assert tokenizer.decode(ids) == library.decode(ids, skip_special_tokens=True)


# ---------------------------------------------------------------------------------------------------------------- models

CONFIG = {"architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_size": 32, "intermediate_size": 48,
          "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2, "vocab_size": 64, "rms_norm_eps": 1e-5,
          "max_position_embeddings": 512, "rope_theta": 10000.0, "tie_word_embeddings": False, "eos_token_id": None}


def model(folder: Path, extra: dict[str, torch.Tensor] | None = None, **fields: Any) -> Path:
    """A random Llama with `extra` tensors; a field of ... is left out of its config.json."""
    config = {name: value for name, value in (CONFIG | fields).items() if value is not ...}
    generator = torch.Generator().manual_seed(0)
    shapes = {"model.embed_tokens": (64, 32), "model.norm": (32,)}
    shapes |= {} if config["tie_word_embeddings"] else {"lm_head": (64, 32)}
    for i in range(2):
        shapes |= {f"model.layers.{i}.{name}": shape for name, shape in {
            "input_layernorm": (32,), "post_attention_layernorm": (32,), "self_attn.q_proj": (32, 32), "mlp.up_proj": (48, 32),
            "self_attn.k_proj": (16, 32), "self_attn.v_proj": (16, 32), "self_attn.o_proj": (32, 32), "mlp.gate_proj": (48, 32),
            "mlp.down_proj": (32, 48)}.items()}
    weights = {f"{name}.weight": torch.ones(shape) if len(shape) == 1 else torch.randn(shape, generator=generator) * 0.3
               for name, shape in shapes.items()}
    folder.mkdir()
    save_file(weights | (extra or {}), folder / "model.safetensors", metadata={"format": "pt"})
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def by_transformers(folder: Path, prompt: list[int]) -> list[int]:
    library = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    ids = library.generate(torch.tensor([prompt]), attention_mask=torch.ones(1, len(prompt), dtype=torch.long),
                           max_new_tokens=8, do_sample=False, pad_token_id=0)
    return ids[0, len(prompt):].tolist()


def own_head() -> dict[str, torch.Tensor]:
    return {"lm_head.weight": torch.randn(64, 32, generator=torch.Generator().manual_seed(9)) * 0.3}


CACHES = {f"model.layers.{i}.self_attn.rotary_emb.{name}": torch.ones(1, 1, 512, 8)
          for i in range(2) for name in ("cos_cached", "sin_cached", "inv_freq")}
# name: (prompt, tensors, fields of config.json, new tokens, what is warned of)
MODELS: dict[str, tuple[list[int], dict[str, torch.Tensor], dict[str, Any], list[int], str]] = {
    "tied with a head of its own": ([10, 50, 9, 20, 33], own_head(), {"tie_word_embeddings": True},
        [61, 1, 25, 24, 0, 33, 1, 49], ""),
    "derived buffers": ([44, 13, 25, 9], CACHES, {},
        [29, 19, 9, 9, 9, 9, 9, 9], ""),
    "linear RoPE, unscaled length": ([7] * 200, {},
        {"max_position_embeddings": 128, "max_sequence_length": 512, "rope_scaling": {"type": "linear", "factor": 4.0}},
        [6, 14, 6, 14, 10, 43, 6, 14], ""),
    "no max_position_embeddings": ([5, 60, 21, 17, 9, 14], {}, {"max_position_embeddings": ...},
        [9, 22, 9, 9, 9, 9, 43, 24], ""),
    "unknown fields": ([8, 20, 31, 15, 6], {}, {"pad_token": "<pad>", "neftune_noise_alpha": None, "trainer_note": "kept"},
        [57, 19, 54, 54, 13, 49, 5, 49], "unknown fields pad_token, trainer_note in "),
}


@pytest.mark.parametrize("name", MODELS)
def test_model(name: str, command: Callable[..., Ran], tmp_path: Path) -> None:
    prompt, extra, fields, tokens, warning = MODELS[name]
    folder = model(tmp_path / "case", extra, **fields)
    ran = command("--checkpoint_path", folder, "--prompt_ids", ",".join(map(str, prompt)), "--temperature", 0,
                  "--max_new_tokens", 8, "--json")
    assert ran.tokens == [tokens] == [by_transformers(folder, prompt)]
    assert warning in ran.err and ran.err.count("warning") == bool(warning)


def test_a_head_of_its_own_is_kept_by_ranks_and_by_quantize(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    head = own_head()["lm_head.weight"]
    folder = model(tmp_path / "case", own_head(), tie_word_embeddings=True)
    quantize_folder(folder, tmp_path / "int8", "cpu")
    saved = load_file(tmp_path / "int8" / "model-00001.safetensors")
    torch.testing.assert_close(saved["lm_head.weight"] * saved["lm_head.scale"].float()[:, None], head, atol=0.01, rtol=0)
    output = load_model(tmp_path / "int8", dtype=torch.float32).output
    assert torch.equal(output.weight, saved["lm_head.weight"])
    monkeypatch.setattr(distributed, "world_size", lambda: 2)
    monkeypatch.setattr(tensor_parallel, "parallelize", lambda model: model)  # collectives need a second process
    for rank in range(2):
        monkeypatch.setattr(distributed, "rank", lambda rank=rank: rank)
        assert torch.equal(load_model(folder, dtype=torch.float32).output.weight, head[32 * rank:32 * (rank + 1)])
