"""GGUF files (Llama or Qwen2 architecture) to folders in the Hugging Face layout.

Quantised tensors are dequantised; the tokenizer is rebuilt from the vocabulary and merges inside the file.
"""
import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import torch
from safetensors.torch import save_file
from tokenizers import AddedToken, Regex, Tokenizer, decoders, normalizers, pre_tokenizers, processors
from tokenizers.models import BPE
from tqdm import tqdm

from hashfast.common import UserError, atomic_folder

ARCHITECTURES = {"llama": "LlamaForCausalLM", "qwen2": "Qwen2ForCausalLM"}
MOST_ENTRIES = 2 ** 16  # fields or tensors of a file
MOST_ELEMENTS = 2 ** 22  # of an array: tokens or merges
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
END_OF_TURN = ("<|im_end|>", "<|endoftext|>")  # chat models stop at either, but a GGUF file names only one as its end token
MERGE = "merge a split file first (gguf-split --merge), or download it again"
QWEN2_WORDS = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)


# what the metadata of these architectures may say; anything else could change the maths and is refused
KNOWN_FIELDS = {
    "block_count", "context_length", "embedding_length", "feed_forward_length", "vocab_size", "attention.head_count",
    "attention.head_count_kv", "attention.key_length", "attention.value_length", "attention.layer_norm_rms_epsilon",
    "attention.sliding_window", "rope.freq_base", "rope.dimension_count", "rope.scaling.type", "rope.scaling.factor",
    "rope.scaling.original_context_length", "rope.scaling.finetuned",
}


class BoundedReader(gguf.GGUFReader):
    """Refuses counts that no model has, before it goes through them."""

    def _build_fields(self, offs: int, count: int) -> int:
        return super()._build_fields(offs, self._checked(count, MOST_ENTRIES))

    def _build_tensor_info(self, offs: int, count: int) -> tuple[int, list]:
        return super()._build_tensor_info(offs, self._checked(count, MOST_ENTRIES))

    def _get_field_parts(self, orig_offs: int, raw_type: int) -> tuple:
        if raw_type == gguf.GGUFValueType.ARRAY:  # its elements' type, their count, then they
            self._checked(self._get(orig_offs + 4, np.uint64)[0], min(MOST_ELEMENTS, len(self.data) - orig_offs))
        return super()._get_field_parts(orig_offs, raw_type)

    @staticmethod
    def _checked(count: int, most: int) -> int:
        if count > most:
            raise ValueError(f"a count of {count} where {most} at most can be")
        return int(count)


class GGUF:
    """An open GGUF file: its metadata by key and its tensors by name."""

    def __init__(self, path: Path) -> None:
        self.path = path
        if not path.is_file():
            raise UserError(f"no such file: {path}; give the path of a .gguf file")
        try:
            reader = BoundedReader(path)
        except OSError as error:
            raise UserError(f"cannot read {path}: {error.strerror or error}; check the file's permissions") from error
        except Exception as error:  # the reader meets bad bytes with whatever numpy happens to raise
            raise UserError(f"{path} is not a whole GGUF file ({error}); download it again") from error
        self.fields = reader.fields
        self.tensors = {tensor.name: tensor for tensor in reader.tensors}
        self.arch = ""
        self.arch = str(self.get("general.architecture"))

    def error(self, what: str, todo: str) -> UserError:
        return UserError(f"{what} in {self.path}; {todo}")

    def get(self, key: str, *default: Any) -> Any:
        """The value of `key`, `{arch}` standing for the architecture; an error when it is absent and has no default."""
        key = key.replace("{arch}", self.arch)
        if key in self.fields:
            return self.fields[key].contents()
        if not default:
            raise self.error(f"no {key}", "convert the original model to GGUF again")
        return default[0]


def model_config(file: GGUF, dtype: str) -> dict[str, Any]:
    """config.json, with the field names of transformers 4."""
    if file.arch not in ARCHITECTURES:
        raise file.error(f"unsupported architecture {file.arch!r}", f"use a model of one of these: {', '.join(ARCHITECTURES)}")
    for key in file.fields:
        if key.startswith(f"{file.arch}.") and key.removeprefix(f"{file.arch}.") not in KNOWN_FIELDS:
            raise file.error(f"unsupported field {key}", "use a model without it, or download the original model")
    embedding = file.tensors.get("token_embd.weight")
    if embedding is None:
        raise file.error("no tensor token_embd.weight", MERGE)
    hidden, context = file.get("{arch}.embedding_length"), file.get("{arch}.context_length")
    heads = file.get("{arch}.attention.head_count")
    kv_heads = file.get("{arch}.attention.head_count_kv", heads)
    if not isinstance(heads, int) or not isinstance(kv_heads, int) or min(heads, kv_heads) < 1 or heads % kv_heads:
        raise file.error(f"{heads} heads and {kv_heads} key-value heads", "use a model with one whole ratio in all layers")
    head_dim = file.get("{arch}.attention.key_length", hidden // heads)
    rotary = file.get("{arch}.rope.dimension_count", head_dim)
    if rotary != head_dim:
        raise file.error(f"RoPE on {rotary} of {head_dim} dimensions of a head", "use a model that rotates all of them")
    window = file.get("{arch}.attention.sliding_window", context)
    if window < context:
        raise file.error(f"unsupported sliding-window attention of {window} tokens", "use a model without it")
    layers = file.get("{arch}.block_count")
    if not isinstance(layers, int) or not 1 <= layers <= len(file.tensors):
        raise file.error(f"{layers} layers and {len(file.tensors)} tensors", MERGE)
    config = {
        "architectures": [ARCHITECTURES[file.arch]],
        "model_type": file.arch,
        "hidden_size": hidden,
        "intermediate_size": file.get("{arch}.feed_forward_length"),
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "head_dim": head_dim,
        "hidden_act": "silu",
        "max_position_embeddings": context,
        # GGUF keeps 32-bit floats: 9.999999747e-06 was 1e-05
        "rms_norm_eps": float(f"{file.get('{arch}.attention.layer_norm_rms_epsilon'):.6g}"),
        "rope_theta": float(f"{file.get('{arch}.rope.freq_base', 10000.0):.6g}"),
        "vocab_size": int(embedding.shape[1]),
        "tie_word_embeddings": "output.weight" not in file.tensors,
        "bos_token_id": file.get("tokenizer.ggml.bos_token_id", None),
        "eos_token_id": file.get("tokenizer.ggml.eos_token_id"),
        "torch_dtype": dtype,
    }
    scaling = rope_scaling(file)
    return config | ({"rope_scaling": scaling} if scaling else {})


def rope_scaling(file: GGUF) -> dict[str, Any] | None:
    """The rope_scaling entry of config.json, or None for plain rotary embeddings."""
    if "rope_freqs.weight" in file.tensors:
        raise file.error("RoPE factors per frequency, which config.json cannot express,", "download the original model instead")
    kind = file.get("{arch}.rope.scaling.type", "none")
    if kind == "none":
        return None
    if kind not in ("linear", "yarn"):
        raise file.error(f"unsupported RoPE scaling {kind!r}", "use a model with none, linear or yarn")
    scaling = {"rope_type": kind, "type": kind, "factor": float(file.get("{arch}.rope.scaling.factor"))}
    if kind == "yarn":
        scaling["original_max_position_embeddings"] = file.get("{arch}.rope.scaling.original_context_length")
    return scaling


def expected_tensors(config: dict[str, Any]) -> Iterator[tuple[str, str, tuple[int, ...], int]]:
    """Each tensor: name in the GGUF file, name in Hugging Face's layout, shape, heads to un-permute (0: leave as it is)."""
    hidden, inner, vocab = config["hidden_size"], config["intermediate_size"], config["vocab_size"]
    heads, kv_heads = config["num_attention_heads"], config["num_key_value_heads"]
    q_rows, kv_rows = heads * config["head_dim"], kv_heads * config["head_dim"]
    llama = config["model_type"] == "llama"  # Llama's query and key rows are stored for interleaved RoPE, Qwen2's are not
    yield "token_embd.weight", "model.embed_tokens.weight", (vocab, hidden), 0
    for layer in range(config["num_hidden_layers"]):
        here, there = f"blk.{layer}", f"model.layers.{layer}"
        yield f"{here}.attn_norm.weight", f"{there}.input_layernorm.weight", (hidden,), 0
        for short, rows, permuted in (("q", q_rows, heads), ("k", kv_rows, kv_heads), ("v", kv_rows, 0)):
            yield f"{here}.attn_{short}.weight", f"{there}.self_attn.{short}_proj.weight", (rows, hidden), permuted * llama
            if not llama:
                yield f"{here}.attn_{short}.bias", f"{there}.self_attn.{short}_proj.bias", (rows,), 0
        yield f"{here}.attn_output.weight", f"{there}.self_attn.o_proj.weight", (hidden, q_rows), 0
        yield f"{here}.ffn_norm.weight", f"{there}.post_attention_layernorm.weight", (hidden,), 0
        yield f"{here}.ffn_gate.weight", f"{there}.mlp.gate_proj.weight", (inner, hidden), 0
        yield f"{here}.ffn_up.weight", f"{there}.mlp.up_proj.weight", (inner, hidden), 0
        yield f"{here}.ffn_down.weight", f"{there}.mlp.down_proj.weight", (hidden, inner), 0
    yield "output_norm.weight", "model.norm.weight", (hidden,), 0
    if not config["tie_word_embeddings"]:
        yield "output.weight", "lm_head.weight", (vocab, hidden), 0


def unpermute(weight: torch.Tensor, heads: int) -> torch.Tensor:
    """Rows of each head from interleaved RoPE order (x0 y0 x1 y1 ...) to half-split order (x0 x1 ... y0 y1 ...)."""
    rows, columns = weight.shape
    return weight.view(heads, rows // heads // 2, 2, columns).transpose(1, 2).reshape(rows, columns)


def check_tensors(file: GGUF, config: dict[str, Any]) -> None:
    """Every tensor that the model needs is there with its shape, and no other: an ignored one would change the output."""
    expected = {name: shape for name, _, shape, _ in expected_tensors(config)}
    for name, shape in expected.items():
        if name not in file.tensors:
            raise file.error(f"no tensor {name}", MERGE)
        found = tuple(int(size) for size in reversed(file.tensors[name].shape))
        if found != shape:
            raise file.error(f"tensor {name} of shape {found} instead of {shape}", "download the file again")
    extra = sorted(file.tensors.keys() - expected.keys())
    if extra:
        raise file.error(f"unknown tensors ({', '.join(extra[:3])})", "use a model of the plain architecture")


def convert_tensors(file: GGUF, config: dict[str, Any], dtype: torch.dtype) -> dict[str, torch.Tensor]:
    """The weights under their Hugging Face names; one tensor at a time is in float32."""
    weights = {}
    for name, new_name, shape, heads in tqdm(list(expected_tensors(config)), desc="converting", unit="tensor", disable=None):
        tensor = file.tensors[name]
        try:
            values = gguf.quants.dequantize(tensor.data, tensor.tensor_type).astype(np.float32, copy=False)
        except NotImplementedError as error:
            what = f"tensor {name} of the unsupported type {tensor.tensor_type.name}"
            raise file.error(what, "use a file with another quantisation") from error
        weight = torch.tensor(values).view(shape)
        if heads:
            weight = unpermute(weight, heads)
        weights[new_name] = weight.to(dtype).contiguous()
    return weights


def build_tokenizer(file: GGUF, config: dict[str, Any]) -> tuple[Tokenizer, dict[str, Any]]:
    """tokenizer.json's tokenizer and the content of tokenizer_config.json."""
    model, kind = file.get("tokenizer.ggml.model"), file.get("tokenizer.ggml.pre", "none")
    if model != "gpt2" or kind not in ("smollm", "qwen2"):
        raise file.error(f"unsupported tokenizer {model} with pre-tokenizer {kind}", "use a model with smollm or qwen2")
    tokens, types = file.get("tokenizer.ggml.tokens"), file.get("tokenizer.ggml.token_type")
    if len(tokens) != len(types) or len(tokens) > config["vocab_size"]:
        what = f"{len(tokens)} tokens, {len(types)} token types and {config['vocab_size']} embeddings"
        raise file.error(what, "convert the original model to GGUF again")
    bos, eos = config["bos_token_id"], config["eos_token_id"]
    pad = file.get("tokenizer.ggml.padding_token_id", eos)
    if not {bos, eos, pad} <= {None, *range(len(tokens))}:
        what = f"special tokens {bos}, {eos}, {pad} outside the vocabulary of {len(tokens)}"
        raise file.error(what, "convert the original model to GGUF again")
    # the fillers that round a vocabulary up are no text that a user may write
    vocab = {token: i for i, token in enumerate(tokens) if types[i] != gguf.TokenType.UNUSED}
    try:
        merges = [(left, right) for left, right in (merge.split(" ") for merge in file.get("tokenizer.ggml.merges"))]
        tokenizer = Tokenizer(BPE(vocab=vocab, merges=merges, fuse_unk=False, byte_fallback=False))
    except Exception as error:  # tokenizers raises plain Exception for a merge outside the vocabulary
        raise file.error(f"broken vocabulary ({error})", "download the file again") from error
    for i, token in enumerate(tokens):
        if types[i] in (gguf.TokenType.CONTROL, gguf.TokenType.USER_DEFINED):
            control = bool(types[i] == gguf.TokenType.CONTROL)
            tokenizer.add_tokens([AddedToken(token, special=control, normalized=False)])
    if kind == "smollm":
        words = [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    else:
        tokenizer.normalizer = normalizers.NFC()
        words = [
            pre_tokenizers.Split(Regex(QWEN2_WORDS), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(words)
    tokenizer.decoder = decoders.ByteLevel()
    add_bos = bos is not None and bool(file.get("tokenizer.ggml.add_bos_token", False))
    if add_bos:
        start, both = [tokens[bos], "$A"], [tokens[bos], "$A", f"{tokens[bos]}:1", "$B:1"]
        tokenizer.post_processor = processors.TemplateProcessing(start, both, [(tokens[bos], bos)])
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "add_bos_token": add_bos,
        "bos_token": None if bos is None else tokens[bos],
        "eos_token": tokens[eos],
        "pad_token": tokens[pad],
        "model_max_length": config["max_position_embeddings"],
        "clean_up_tokenization_spaces": False,
    }
    if template := file.get("tokenizer.chat_template", ""):
        settings["chat_template"] = template
    return tokenizer, settings


def convert(source: Path, target: Path, dtype: str = "bfloat16") -> None:
    """Write the folder `target` from the GGUF file `source`: complete, or not at all."""
    target = target.resolve()
    if target.exists() and (not target.is_dir() or any(target.iterdir())):
        raise UserError(f"{target} already exists; remove it or choose another output folder")
    file = GGUF(source)
    try:
        config = model_config(file, dtype)
        check_tensors(file, config)
        tokenizer, settings = build_tokenizer(file, config)
    except (TypeError, ValueError) as error:
        raise file.error(f"a field of the wrong type ({error})", "download it again") from error
    ends = [config["eos_token_id"]]
    ends += [i for i in map(tokenizer.token_to_id, END_OF_TURN) if i is not None and i not in ends]
    pad = tokenizer.token_to_id(settings["pad_token"])
    generation = {"bos_token_id": config["bos_token_id"], "eos_token_id": ends, "pad_token_id": pad}
    with atomic_folder(target) as beside:
        size = sum(int(tensor.n_elements) for tensor in file.tensors.values()) * DTYPES[dtype].itemsize
        free = shutil.disk_usage(beside).free
        if free < size * 1.02:  # the tokenizer and the configuration are small beside the weights
            raise UserError(f"{target} needs {size / 1e9:.1f} GB and its disk has {free / 1e9:.1f} GB; free some space")
        save_file(convert_tensors(file, config, DTYPES[dtype]), beside / "model.safetensors", metadata={"format": "pt"})
        tokenizer.save(str(beside / "tokenizer.json"))
        for name, content in (("config", config), ("tokenizer_config", settings), ("generation_config", generation)):
            (beside / f"{name}.json").write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
        # safetensors lets its owner alone read it: give it the permissions that files have here
        shutil.copymode(beside / "config.json", beside / "model.safetensors")
