"""GGUF files converted, tiny ones: the converted folder must be the model that was written, as transformers reads it."""
import json
import shutil
from pathlib import Path

import gguf
import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, PreTrainedModel, Qwen2Config

from hashfast import common
from hashfast.commands import convert_gguf
from hashfast.runtime import gguf as converter

ROOT = Path(__file__).parents[2]
SMOLLM2 = ROOT / "checkpoints" / "smollm2-135m-instruct"
BOOK = ROOT / "data" / "alice29.txt"

LETTERS = [chr(c) for c in range(33, 127)] + [chr(c) for c in range(161, 173)] + [chr(c) for c in range(174, 256)]
BYTES = LETTERS + [chr(256 + i) for i in range(256 - len(LETTERS))]  # the 256 characters that byte-level BPE writes bytes as
MERGES = ["h e", "l l", "he ll", "hell o", "Ġ w", "Ġw o", "1 2", "' s", "Ġ Ġ"]
WORDS = BYTES + [merge.replace(" ", "") for merge in MERGES]
SPECIAL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
TOKENS = WORDS + SPECIAL + ["<tool>", "[PAD]"]
TYPES = [gguf.TokenType.NORMAL] * len(WORDS) + [gguf.TokenType.CONTROL] * len(SPECIAL)
TYPES += [gguf.TokenType.USER_DEFINED, gguf.TokenType.UNUSED]
BOS, START, END = (TOKENS.index(token) for token in SPECIAL)
VOCAB = len(TOKENS) + 2  # embeddings are often rounded up
TEMPLATE = "{% for m in messages %}<|im_start|>{{ m['content'] }}<|im_end|>{% endfor %}"

RENAMED = {
    "model.embed_tokens": "token_embd",
    "model.norm": "output_norm",
    "lm_head": "output",
    "model.layers": "blk",
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}


def tiny_model(arch: str, tied: bool) -> PreTrainedModel:
    """A random model with two layers; every weight counts, the norms and biases too."""
    torch.manual_seed(0)
    config = (LlamaConfig if arch == "llama" else Qwen2Config)(
        vocab_size=VOCAB,
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=16,
        max_position_embeddings=128,
        rope_theta=5000.0,
        rms_norm_eps=1e-5,
        tie_word_embeddings=tied,
    )
    model = AutoModelForCausalLM.from_config(config).eval()
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, mean=float(parameter.dim() == 1), std=0.2)
    return model


def interleave(weight: np.ndarray, heads: int) -> np.ndarray:
    """The row order of Llama's GGUF files: row 2i of a head was its row i, row 2i + 1 was row i + half."""
    size = len(weight) // heads
    return weight[[head * size + i + part for head in range(heads) for i in range(size // 2) for part in (0, size // 2)]]


def tensors_of(model: PreTrainedModel, arch: str) -> dict[str, np.ndarray]:
    """The model's weights, named and ordered as in a GGUF file."""
    tensors = {}
    for name, value in model.state_dict().items():
        if name == "lm_head.weight" and model.config.tie_word_embeddings:
            continue
        array = value.numpy()
        if arch == "llama" and ("q_proj" in name or "k_proj" in name):
            array = interleave(array, 4 if "q_proj" in name else 2)
        for theirs, ours in RENAMED.items():
            name = name.replace(theirs, ours)
        tensors[name] = array
    return tensors


def write_gguf(path: Path, arch: str, tensors: dict[str, np.ndarray], quantised: bool = False, **changes) -> Path:
    """A GGUF file of `tensors`; `changes` replace metadata by key (dots as __), None leaves one out."""
    meta = {
        f"{arch}.block_count": 2,
        f"{arch}.context_length": 128,
        f"{arch}.embedding_length": 64,
        f"{arch}.feed_forward_length": 96,
        f"{arch}.attention.head_count": 4,
        f"{arch}.attention.head_count_kv": 2,
        f"{arch}.attention.layer_norm_rms_epsilon": 1e-5,
        f"{arch}.rope.freq_base": 5000.0,
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": "smollm" if arch == "llama" else "qwen2",
        "tokenizer.ggml.tokens": TOKENS,
        "tokenizer.ggml.token_type": [int(kind) for kind in TYPES],
        "tokenizer.ggml.merges": MERGES,
        "tokenizer.ggml.bos_token_id": BOS,
        "tokenizer.ggml.eos_token_id": END,
        "tokenizer.ggml.padding_token_id": BOS,
        "tokenizer.ggml.add_bos_token": False,
        "tokenizer.chat_template": TEMPLATE,
    }
    meta |= {key.replace("__", "."): value for key, value in changes.items()}
    writer = gguf.GGUFWriter(path, arch)
    for key, value in meta.items():
        if isinstance(value, bool):
            writer.add_bool(key, value)
        elif isinstance(value, int):
            writer.add_uint32(key, value)
        elif isinstance(value, float):
            writer.add_float32(key, value)
        elif isinstance(value, str):
            writer.add_string(key, value)
        elif value is not None:
            writer.add_array(key, value)
    for name, value in tensors.items():
        if quantised and value.ndim == 2:
            kind = gguf.GGMLQuantizationType.Q8_0
            writer.add_tensor(name, gguf.quants.quantize(value, kind), raw_dtype=kind)
        else:
            writer.add_tensor(name, np.ascontiguousarray(value))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


@pytest.fixture(scope="module")
def llama_tensors() -> dict[str, np.ndarray]:
    return tensors_of(tiny_model("llama", tied=True), "llama")


def logits(model: PreTrainedModel) -> torch.Tensor:
    with torch.no_grad():
        return model(torch.arange(40)[None] * 5 % VOCAB).logits


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("arch", ["llama", "qwen2"])
def test_converted_model_is_the_model(tmp_path: Path, arch: str, tied: bool) -> None:
    model = tiny_model(arch, tied)
    file = write_gguf(tmp_path / "m.gguf", arch, tensors_of(model, arch))
    converter.convert(file, tmp_path / "out", "float32")
    loaded, info = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype="auto", output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"] and loaded.dtype == torch.float32
    torch.testing.assert_close(logits(loaded.eval()), logits(model), rtol=1e-5, atol=1e-5)

    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["tie_word_embeddings"] is tied and config["rope_theta"] == 5000.0 and config["rms_norm_eps"] == 1e-5
    assert config["architectures"] == [{"llama": "LlamaForCausalLM", "qwen2": "Qwen2ForCausalLM"}[arch]]
    assert config["head_dim"] == 16 and config["vocab_size"] == VOCAB and config["max_position_embeddings"] == 128
    generation = json.loads((tmp_path / "out" / "generation_config.json").read_text())
    assert generation == {"bos_token_id": BOS, "eos_token_id": [END, BOS], "pad_token_id": BOS}
    assert [path.name for path in tmp_path.iterdir() if path.name != "m.gguf"] == ["out"]


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_quantised_weights(tmp_path: Path, dtype: str) -> None:
    model = tiny_model("qwen2", tied=False)
    file = write_gguf(tmp_path / "m.gguf", "qwen2", tensors_of(model, "qwen2"), quantised=True)
    converter.convert(file, tmp_path / "out", dtype)
    converted = load_file(tmp_path / "out" / "model.safetensors")
    assert converted.keys() == model.state_dict().keys()
    for name, weight in model.state_dict().items():
        assert converted[name].dtype == converter.DTYPES[dtype]
        # a step of Q8_0 is 1/127 of the largest of 32 values
        torch.testing.assert_close(converted[name].float(), weight, rtol=0.01, atol=0.008)


def test_known_rows_are_unpermuted(tmp_path: Path, llama_tensors: dict[str, np.ndarray]) -> None:
    rows = np.repeat(np.arange(64, dtype=np.float32)[:, None], 64, axis=1)
    tensors = llama_tensors | {"blk.0.attn_q.weight": rows, "blk.0.attn_k.weight": rows[:32], "blk.0.attn_v.weight": rows[:32]}
    converter.convert(write_gguf(tmp_path / "m.gguf", "llama", tensors), tmp_path / "out", "float32")
    weights = load_file(tmp_path / "out" / "model.safetensors")
    column = {name: weights[f"model.layers.0.self_attn.{name}_proj.weight"][:, 0].tolist() for name in "qkv"}
    head = [*range(0, 16, 2), *range(1, 16, 2)]  # even rows, then odd rows
    assert column["q"] == [16 * i + row for i in range(4) for row in head]
    assert column["k"] == [16 * i + row for i in range(2) for row in head]
    assert column["v"] == list(range(32))


@pytest.mark.parametrize("arch", ["llama", "qwen2"])
def test_tokenizer(tmp_path: Path, arch: str) -> None:
    converter.convert(write_gguf(tmp_path / "m.gguf", arch, tensors_of(tiny_model(arch, True), arch)), tmp_path / "out")
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "out")
    assert tokenizer.tokenize("hello wo12's") == ["hello", "Ġwo", "1", "2", "'s"]  # no merge across digits
    assert tokenizer.tokenize("a<|im_end|><tool>[PAD]") == ["a", "<|im_end|>", "<tool>", "[", "P", "A", "D", "]"]
    for text in ("  two  spaces\n\n\ttab\r\n", "naïve 日本語 🙂", "<|im_start|>hello<tool>"):
        assert tokenizer.decode(tokenizer(text).input_ids) == text
    assert tokenizer.decode(tokenizer("<|im_start|>hello<tool>").input_ids, skip_special_tokens=True) == "hello<tool>"
    assert (tokenizer.eos_token_id, tokenizer.bos_token_id, tokenizer.pad_token_id) == (END, BOS, BOS)
    assert tokenizer("hello").input_ids == [TOKENS.index("hello")]
    chat = tokenizer.apply_chat_template([{"role": "user", "content": "hello"}], tokenize=False)
    assert chat == "<|im_start|>hello<|im_end|>"
    if arch == "qwen2":  # NFC: e and a combining accent are one letter
        assert tokenizer("e\u0301").input_ids == tokenizer("\u00e9").input_ids


def test_begin_token(tmp_path: Path, llama_tensors: dict[str, np.ndarray]) -> None:
    file = write_gguf(tmp_path / "m.gguf", "llama", llama_tensors, tokenizer__ggml__add_bos_token=True)
    converter.convert(file, tmp_path / "out")
    assert AutoTokenizer.from_pretrained(tmp_path / "out")("hello").input_ids == [BOS, TOKENS.index("hello")]
    file = write_gguf(tmp_path / "m.gguf", "llama", llama_tensors, tokenizer__ggml__bos_token_id=None)
    converter.convert(file, tmp_path / "none")
    assert json.loads((tmp_path / "none" / "config.json").read_text())["bos_token_id"] is None


def test_rope_scaling(tmp_path: Path, llama_tensors: dict[str, np.ndarray]) -> None:
    scaling = {"llama__rope__scaling__type": "yarn", "llama__rope__scaling__factor": 4.0}
    file = write_gguf(tmp_path / "m.gguf", "llama", llama_tensors, llama__rope__scaling__original_context_length=32, **scaling)
    converter.convert(file, tmp_path / "out")
    found = json.loads((tmp_path / "out" / "config.json").read_text())["rope_scaling"]
    assert found == {"rope_type": "yarn", "type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32}


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"tokenizer__ggml__pre": "llama-bpe"}, "pre-tokenizer llama-bpe"),
        ({"tokenizer__ggml__model": "llama"}, "tokenizer llama"),
        ({"tokenizer__ggml__tokens": TOKENS[:-1]}, "token types"),
        ({"tokenizer__ggml__eos_token_id": 5000}, "special tokens"),
        ({"tokenizer__ggml__eos_token_id": None}, "no tokenizer.ggml.eos_token_id"),
        ({"tokenizer__ggml__merges": ["no such"]}, "broken vocabulary"),
        ({"tokenizer__ggml__merges": ["unsplit"]}, "broken vocabulary"),
        ({"llama__block_count": 3}, "no tensor blk.2.attn_norm.weight"),
        ({"llama__block_count": 1}, "unknown tensors (blk.1."),
        ({"llama__block_count": None}, "no llama.block_count"),
        ({"llama__feed_forward_length": 64}, "instead of (64, 64)"),
        ({"llama__attention__head_count_kv": 3}, "4 heads and 3 key-value heads"),
        ({"llama__attention__head_count_kv": [2, 1]}, "key-value heads"),
        ({"llama__rope__dimension_count": 8}, "RoPE on 8 of 16"),
        ({"llama__rope__scaling__type": "longrope"}, "RoPE scaling 'longrope'"),
        ({"llama__attention__sliding_window": 64}, "sliding-window"),
    ],
)
def test_what_it_cannot_convert(tmp_path: Path, llama_tensors: dict[str, np.ndarray], changes: dict, words: str) -> None:
    file = write_gguf(tmp_path / "m.gguf", "llama", llama_tensors, **changes)
    with pytest.raises(common.UserError) as stop:
        converter.convert(file, tmp_path / "out")
    assert words in str(stop.value) and str(file) in str(stop.value) and "; " in str(stop.value)
    assert [path.name for path in tmp_path.iterdir()] == ["m.gguf"]


def test_unknown_architecture_and_tensors(tmp_path: Path, llama_tensors: dict[str, np.ndarray]) -> None:
    with pytest.raises(common.UserError, match="unsupported architecture 'gemma'"):
        converter.convert(write_gguf(tmp_path / "m.gguf", "gemma", {}), tmp_path / "out")
    with pytest.raises(common.UserError, match="no tensor token_embd.weight"):
        converter.convert(write_gguf(tmp_path / "m.gguf", "llama", {"x": np.ones(1, np.float32)}), tmp_path / "out")
    factors = llama_tensors | {"rope_freqs.weight": np.ones(8, np.float32)}
    with pytest.raises(common.UserError, match="RoPE factors"):
        converter.convert(write_gguf(tmp_path / "m.gguf", "llama", factors), tmp_path / "out")


@pytest.mark.parametrize("size", [0, 3, 30, 2000, 20_000, -1])
def test_truncated_file(tmp_path: Path, llama_tensors: dict[str, np.ndarray], size: int) -> None:
    whole = write_gguf(tmp_path / "m.gguf", "llama", llama_tensors).read_bytes()
    (tmp_path / "cut.gguf").write_bytes(whole[:size])
    with pytest.raises(common.UserError, match="not a whole GGUF file"):
        converter.convert(tmp_path / "cut.gguf", tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_bad_paths_are_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture) -> None:
    (tmp_path / "junk.gguf").write_bytes(b"not a model" * 1000)
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "mine").touch()
    for source, target, words in (
        ("none.gguf", "out", "no such file"),
        (".", "out", "no such file"),
        ("junk.gguf", "out", "not a whole GGUF file"),
        ("junk.gguf", "full", "already exists"),
        ("junk.gguf", "junk.gguf", "already exists"),
    ):
        monkeypatch.setattr("sys.argv", ["convert_gguf.py", str(tmp_path / source), str(tmp_path / target)])
        with pytest.raises(SystemExit) as stop:
            common.run_command(convert_gguf.main)
        lines = capsys.readouterr().err.splitlines()
        assert stop.value.code == 2 and len(lines) == 1 and lines[0].startswith("error: ") and words in lines[0]


def test_full_disk_leaves_nothing(tmp_path: Path, llama_tensors: dict[str, np.ndarray], monkeypatch) -> None:
    file = write_gguf(tmp_path / "m.gguf", "llama", llama_tensors)
    monkeypatch.setattr(converter, "save_file", lambda *args, **kwargs: (_ for _ in ()).throw(OSError(28, "No space left")))
    with pytest.raises(common.UserError, match="No space left"):
        converter.convert(file, tmp_path / "out")
    monkeypatch.setattr(shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(10, 9, 1))
    with pytest.raises(common.UserError, match="free some space"):
        converter.convert(file, tmp_path / "out")
    assert [path.name for path in tmp_path.iterdir()] == ["m.gguf"]


@pytest.mark.skipif(not (SMOLLM2.exists() and BOOK.exists()), reason="run scripts/quickstart.sh first")
def test_real_model_predicts_a_book() -> None:
    """With the rows of the queries and keys in the wrong order the perplexity is about 380."""
    tokenizer = AutoTokenizer.from_pretrained(SMOLLM2)
    model = AutoModelForCausalLM.from_pretrained(SMOLLM2, dtype=torch.float32)
    text = BOOK.read_text()
    assert tokenizer.decode(tokenizer(text).input_ids) == text
    ids = tokenizer(text[2000:12000], return_tensors="pt").input_ids[:, :400]
    with torch.no_grad():
        assert 10 < model(ids, labels=ids).loss.exp() < 35
