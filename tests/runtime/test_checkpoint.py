"""Checkpoints as transformers writes them against what is loaded; every damaged or unsupported one is a one-line error."""
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

from hashfast.common import UserError
from hashfast.model import ModelArgs, RopeScaling, Transformer, rope_frequencies
from hashfast.runtime import checkpoint
from hashfast.runtime.checkpoint import PRESETS, load_args, load_model, random_model

LLAMA3 = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
          "original_max_position_embeddings": 64}
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64}
SIZES = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2,
         "vocab_size": 40, "max_position_embeddings": 256}
FAMILIES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("Llama", {}),
    "llama-mha": ("Llama", {"num_key_value_heads": 4}),
    "llama-tied-llama3": ("Llama", {"tie_word_embeddings": True, "rope_parameters": LLAMA3 | {"rope_theta": 500000.0}}),
    "mistral": ("Mistral", {"sliding_window": None, "head_dim": 16}),
    "qwen2": ("Qwen2", {}),
    "llama-biased": ("Llama", {"attention_bias": True}),
    "qwen3": ("Qwen3", {"head_dim": 16}),
    "qwen2-tied": ("Qwen2", {"tie_word_embeddings": True, "num_key_value_heads": 1}),
}
# A config.json as the Hub has them (transformers 4), of a model small enough to save.
LLAMA_V4 = {"architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_act": "silu", "rms_norm_eps": 1e-5,
            "rope_theta": 10000.0, "rope_scaling": None, "tie_word_embeddings": False, "torch_dtype": "bfloat16",
            "transformers_version": "4.43.0", **SIZES}
QWEN_V4 = LLAMA_V4 | {"architectures": ["Qwen2ForCausalLM"], "model_type": "qwen2", "use_sliding_window": False,
                      "sliding_window": 128, "max_window_layers": 1}
QWEN3_V4 = QWEN_V4 | {"architectures": ["Qwen3ForCausalLM"], "model_type": "qwen3", "attention_bias": False}
MISTRAL_V4 = LLAMA_V4 | {"architectures": ["MistralForCausalLM"], "model_type": "mistral", "sliding_window": None}


def saved(folder: Path, family: str = "llama", **save: Any) -> dict[str, torch.Tensor]:
    """Save a tiny random model with transformers; returns its tensors."""
    kind, extra = FAMILIES[family]
    config = getattr(transformers, f"{kind}Config")(**SIZES | extra)
    torch.manual_seed(0)
    model = getattr(transformers, f"{kind}ForCausalLM")(config)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.1)
    model.save_pretrained(folder, **save)
    return {name: tensor.detach() for name, tensor in model.state_dict().items()}


def written(folder: Path, config: Any) -> Path:
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def assert_equal(model: torch.nn.Module, tensors: dict[str, torch.Tensor], dtype: torch.dtype = torch.float32) -> None:
    """Every parameter of `model` against the tensors of a transformers state dict, by hand-written names."""
    expected = {
        "tok_embeddings.weight": tensors["model.embed_tokens.weight"],
        "norm.weight": tensors["model.norm.weight"],
        "output.weight": tensors["lm_head.weight"],
    }
    for i in range(SIZES["num_hidden_layers"]):
        hf, ours = f"model.layers.{i}.", f"layers.{i}."
        for kind in ("weight", "bias"):
            if f"{hf}self_attn.q_proj.{kind}" in tensors:
                expected[f"{ours}attention.wqkv.{kind}"] = torch.cat([tensors[f"{hf}self_attn.{x}_proj.{kind}"] for x in "qkv"])
        for theirs, name in (("o_proj.weight", "wo.weight"), ("o_proj.bias", "wo.bias"), ("q_norm.weight",) * 2,
                             ("k_norm.weight",) * 2):
            if f"{hf}self_attn.{theirs}" in tensors:
                expected[f"{ours}attention.{name}"] = tensors[f"{hf}self_attn.{theirs}"]
        expected[f"{ours}feed_forward.w13.weight"] = torch.cat([tensors[f"{hf}mlp.{x}_proj.weight"] for x in ("gate", "up")])
        expected[f"{ours}feed_forward.w2.weight"] = tensors[f"{hf}mlp.down_proj.weight"]
        expected[f"{ours}attention_norm.weight"] = tensors[f"{hf}input_layernorm.weight"]
        expected[f"{ours}ffn_norm.weight"] = tensors[f"{hf}post_attention_layernorm.weight"]
    found = dict(model.named_parameters(remove_duplicate=False))
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        assert found[name].dtype == dtype
        assert torch.equal(found[name], tensor.to(dtype)), name


# --------------------------------------------------------------------------------------------------------------- loading

@pytest.mark.parametrize("family", FAMILIES)
def test_parameters_and_logits_equal(family: str, tmp_path: Path) -> None:
    tensors = saved(tmp_path, family)
    model = load_model(tmp_path, dtype=torch.float32)
    assert_equal(model, tensors)
    assert (model.output.weight is model.tok_embeddings.weight) == model.args.tie_embeddings
    assert not any(parameter.requires_grad for parameter in model.parameters())
    tokens = torch.randint(SIZES["vocab_size"], (150,), generator=torch.Generator().manual_seed(1))
    reference = transformers.AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32).eval()
    model.setup_caches(1, 256)
    with torch.inference_mode():
        torch.testing.assert_close(model.prefill(tokens), reference(tokens[None]).logits[0, -1], atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_dtype_is_converted(dtype: torch.dtype, tmp_path: Path) -> None:
    tensors = saved(tmp_path)
    assert_equal(load_model(tmp_path, dtype=dtype), tensors, dtype)


@pytest.mark.parametrize("index", [True, False])
def test_sharded(index: bool, tmp_path: Path) -> None:
    tensors = saved(tmp_path, max_shard_size="10KB")
    assert len(list(tmp_path.glob("model-*.safetensors"))) > 2
    save_file({"tok_embeddings.weight": torch.ones(2)}, tmp_path / "consolidated.safetensors")
    if not index:
        (tmp_path / "model.safetensors.index.json").unlink()
    assert_equal(load_model(tmp_path, dtype=torch.float32), tensors)


def test_harmless_extra_tensors(tmp_path: Path) -> None:
    tensors = saved(tmp_path, "qwen2-tied")
    file = tmp_path / "model.safetensors"
    caches = {f"model.layers.0.self_attn.rotary_emb.{name}": torch.ones(4) for name in ("inv_freq", "cos_cached", "sin_cached")}
    extra = {"lm_head.weight": tensors["model.embed_tokens.weight"].clone()} | caches
    save_file(load_file(file) | extra, file)
    model = load_model(tmp_path, dtype=torch.float32)
    assert_equal(model, tensors)
    assert model.args.tie_embeddings and model.output.weight is model.tok_embeddings.weight
    own = tensors["model.embed_tokens.weight"].clone()
    own[-1, -1] += 1
    save_file(load_file(file) | {"lm_head.weight": own}, file)  # transformers keeps what is there
    assert_equal(load_model(tmp_path, dtype=torch.float32), tensors | {"lm_head.weight": own})


def test_peak_host_memory(tmp_path: Path) -> None:
    """Five shards of 48 MB of float32: the peak is the model in bfloat16 and 1.2 shards, not the whole checkpoint.

    Nothing of it imports transformers, which takes a second or two.
    """
    sizes = {"hidden_size": 1024, "intermediate_size": 3072, "num_hidden_layers": 5, "num_attention_heads": 8,
             "num_key_value_heads": 4, "vocab_size": 128}
    written(tmp_path, LLAMA_V4 | sizes)
    layer = {"input_layernorm": (1024,), "post_attention_layernorm": (1024,), "self_attn.q_proj": (1024, 1024),
             "self_attn.k_proj": (512, 1024), "self_attn.v_proj": (512, 1024), "self_attn.o_proj": (1024, 1024),
             "mlp.gate_proj": (3072, 1024), "mlp.up_proj": (3072, 1024), "mlp.down_proj": (1024, 3072)}
    for i in range(5):
        shard = {f"model.layers.{i}.{name}.weight": torch.ones(shape) for name, shape in layer.items()}
        if i == 0:
            shard |= {"model.embed_tokens.weight": torch.ones(128, 1024), "model.norm.weight": torch.ones(1024),
                      "lm_head.weight": torch.ones(128, 1024)}
        save_file(shard, tmp_path / f"model-0000{i + 1}-of-00005.safetensors")
    largest = max(file.stat().st_size for file in tmp_path.glob("*.safetensors"))
    script = """
import sys, torch
from pathlib import Path
from hashfast.runtime import checkpoint
from hashfast.runtime.tokenizer import Tokenizer
def peak():
    return 1024 * int(next(line for line in open("/proc/self/status") if line.startswith("VmHWM")).split()[1])
torch.ones(1 << 20).bfloat16().sum()  # what torch takes or imports once is not counted
checkpoint.plan_loading(Path(sys.argv[1]))
before = peak()
model = checkpoint.load_model(sys.argv[1])
print(peak() - before, sum(p.nbytes for p in model.parameters()), "transformers" in sys.modules)
"""
    if not Path("/proc/self/status").exists():
        pytest.skip("the peak is read from /proc")
    root = str(Path(checkpoint.__file__).parents[2])
    result = subprocess.run([sys.executable, "-c", script, str(tmp_path)], capture_output=True, text=True, check=True,
                            env=os.environ | {"PYTHONPATH": root})
    *sizes, imported = result.stdout.split()
    peak, model = map(int, sizes)
    assert imported == "False"
    assert peak - model < 1.2 * largest, f"{(peak - model) / 1e6:.0f} MB beside the model; largest shard {largest / 1e6:.0f} MB"


def test_random_model(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(PRESETS, "tiny", ModelArgs(2, 64, 4, 2, 16, 96, 128, 1e-5, 10000.0, qkv_bias=True, tie_embeddings=True))
    model, again, other = random_model("tiny"), random_model("tiny"), random_model("tiny", seed=1, dtype=torch.float32)
    for (name, a), b, c in zip(model.named_parameters(), again.parameters(), other.parameters(), strict=True):
        assert a.dtype == torch.bfloat16 and c.dtype == torch.float32
        assert torch.equal(a, b)
        if name.endswith("norm.weight"):
            assert (a == 1).all()
        else:
            assert not torch.equal(a.float(), c)
    assert other.layers[0].feed_forward.w13.weight.std().item() == pytest.approx(0.02, rel=0.1)
    assert model.output.weight is model.tok_embeddings.weight
    with pytest.raises(UserError, match="'gpt-5'.*llama-3.1-8b"):
        random_model("gpt-5")


def test_preset_sizes() -> None:
    """Parameter counts of the models' cards."""
    counts = {}
    for name, args in PRESETS.items():
        counts[name] = sum(p.numel() for p in checkpoint._meta_model(args).parameters())
    assert counts == {"llama-3.1-8b": 8030261248, "llama-3.1-70b": 70553706496, "llama-3.2-1b": 1235814400,
                      "mistral-7b": 7248023552, "qwen2.5-coder-1.5b": 1543714304, "qwen3-4b": 4022468096}


# --------------------------------------------------------------------------------------------------------------- configs

LINEAR_OLD, LINEAR_NEW = {"type": "linear", "factor": 2.0}, {"rope_type": "linear", "factor": 2.0, "rope_theta": 10000.0}


@pytest.mark.parametrize("old, new, expected", [
    ({}, {"rope_type": "default", "rope_theta": 10000.0}, None),
    ({"rope_scaling": LINEAR_OLD}, LINEAR_NEW, RopeScaling("linear", 2.0)),
    ({"rope_scaling": LLAMA3}, LLAMA3 | {"rope_theta": 10000}, RopeScaling("llama3", 8.0, 64)),
    ({"rope_scaling": {"type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64}}, YARN | {"rope_theta": 10000.0},
     RopeScaling("yarn", 4.0, 64)),
])
def test_both_spellings(old: dict[str, Any], new: dict[str, Any], expected: RopeScaling | None, tmp_path: Path) -> None:
    version4 = load_args(written(tmp_path / "4", LLAMA_V4 | old))
    config = {name: value for name, value in LLAMA_V4.items() if name not in ("rope_theta", "rope_scaling", "torch_dtype")}
    version5 = load_args(written(tmp_path / "5", config | {"dtype": "bfloat16", "rope_parameters": new}))
    assert version4 == version5
    assert version4.rope_scaling == expected


@pytest.mark.parametrize("scaling", [
    {}, LINEAR_OLD, LLAMA3, YARN, YARN | {"attention_factor": 1.5}, YARN | {"mscale": 0.7, "mscale_all_dim": 0.3},
    YARN | {"mscale": 0.7}, YARN | {"beta_fast": 16, "beta_slow": 2, "truncate": False},
    {"type": "yarn", "factor": 4.0}, {"rope_type": "yarn", "factor": None, "original_max_position_embeddings": 64},
    {name: value for name, value in LLAMA3.items() if name != "original_max_position_embeddings"},
])
@pytest.mark.parametrize("head_dim", [8, 64])
def test_rope_equals_transformers(scaling: dict[str, Any], head_dim: int, tmp_path: Path) -> None:
    folder = written(tmp_path, QWEN_V4 | {"rope_theta": 1000000.0, "rope_scaling": scaling or None, "head_dim": head_dim})
    reference = transformers.models.qwen2.modeling_qwen2.Qwen2RotaryEmbedding(transformers.AutoConfig.from_pretrained(folder))
    inv_freq, gain = rope_frequencies(load_args(folder))
    torch.testing.assert_close(inv_freq, reference.inv_freq, rtol=1e-6, atol=0)
    assert gain == pytest.approx(reference.attention_scaling)


@pytest.mark.parametrize("config", [
    LLAMA_V4 | {"rope_theta": 500000.0, "max_position_embeddings": 131072, "rope_scaling": LLAMA3 | {
        "original_max_position_embeddings": 8192}},
    QWEN_V4 | {"rope_theta": 1000000.0, "max_position_embeddings": 131072, "rope_scaling": YARN | {
        "original_max_position_embeddings": 32768}},
], ids=["llama3", "yarn"])
def test_angles_to_128k_equal_transformers(config: dict[str, Any], tmp_path: Path) -> None:
    folder = written(tmp_path, config | {"head_dim": 64})
    args = load_args(folder)
    name = "Llama" if config["model_type"] == "llama" else "Qwen2"
    module = getattr(transformers.models, name.lower())
    reference = getattr(getattr(module, f"modeling_{name.lower()}"), f"{name}RotaryEmbedding")(
        transformers.AutoConfig.from_pretrained(folder))
    positions = torch.tensor([[0, 1, 8191, 8192, 32767, 32768, 65535, 131071]])
    expected = reference(torch.zeros(1, 1), positions)  # its halves repeat
    for ours, theirs in zip(Transformer(args).rope(positions), expected, strict=True):
        torch.testing.assert_close(ours, theirs[..., :32], rtol=1e-4, atol=1e-4)


def test_qwen_yarn_recipe(tmp_path: Path) -> None:
    """The model card of Qwen2.5 has yarn added to a config whose max_position_embeddings is the length before scaling."""
    scaling = {"factor": 4.0, "original_max_position_embeddings": 32768, "type": "yarn"}
    args = load_args(written(tmp_path, QWEN_V4 | {"max_position_embeddings": 32768, "rope_scaling": scaling}))
    assert args.rope_scaling == RopeScaling("yarn", 4.0, 32768)
    assert args.max_position == 131072


@pytest.mark.parametrize("config, window", [
    (LLAMA_V4, None),
    (MISTRAL_V4, None),
    (MISTRAL_V4 | {"sliding_window": 128}, 128),
    ({name: value for name, value in MISTRAL_V4.items() if name != "sliding_window"}, 4096),
    (QWEN_V4, None),
    (QWEN_V4 | {"use_sliding_window": True}, 128),
    (QWEN_V4 | {"use_sliding_window": True, "max_window_layers": 2}, None),
    (QWEN_V4 | {"use_sliding_window": True, "layer_types": ["full_attention"] * 2}, None),
    (QWEN_V4 | {"use_sliding_window": True, "layer_types": ["full_attention", "sliding_attention"]}, 128),
    (QWEN_V4 | {"sliding_window": None, "use_sliding_window": True}, None),
    (QWEN3_V4, None),
    (QWEN3_V4 | {"use_sliding_window": True}, 128),
])
def test_sliding_window(config: dict[str, Any], window: int | None, tmp_path: Path) -> None:
    assert load_args(written(tmp_path, config)).sliding_window == window


def test_fields_of_real_configs(tmp_path: Path) -> None:
    """What transformers 4 saves of its defaults, and what popular repositories add, changes nothing."""
    plain = load_args(written(tmp_path, LLAMA_V4))
    noise = {"_name_or_path": "x", "add_cross_attention": False, "attention_bias": False, "attention_dropout": 0.0,
             "bad_words_ids": None, "bos_token_id": 1, "chunk_size_feed_forward": 0, "cross_attention_hidden_size": None,
             "do_sample": False, "eos_token_id": [1, 2], "head_dim": 8, "id2label": {"0": "LABEL_0"}, "initializer_range": 0.02,
             "is_decoder": False, "is_encoder_decoder": False, "is_llama_config": True, "max_length": 20, "mlp_bias": False,
             "output_attentions": False, "pad_token_id": None, "pretraining_tp": 1, "pruned_heads": {}, "return_dict": True,
             "rope_interleaved": False, "temperature": 1.0, "top_k": 50, "torchscript": False, "use_cache": True,
             "transformers.js_config": {"dtype": "q4"}, "unsloth_fixed": True, "quantization_config": None, "some_null": None}
    assert load_args(written(tmp_path, LLAMA_V4 | noise)) == plain
    without = {name: value for name, value in LLAMA_V4.items() if name not in ("rope_theta", "num_key_value_heads")}
    assert load_args(written(tmp_path, without)).n_kv_head == 4  # as the first Llama configs were


def test_head_dim_and_biases_of_qwen3_and_llama(tmp_path: Path) -> None:
    """Absent fields are those of transformers' Qwen3Config: heads of 128, no biases."""
    plain = load_args(written(tmp_path, QWEN3_V4))
    assert (plain.head_dim, plain.qk_norm, plain.qkv_bias, plain.out_bias) == (128, True, False, False)
    for config in (QWEN3_V4, LLAMA_V4):
        biased = load_args(written(tmp_path, config | {"attention_bias": True, "head_dim": 16}))
        assert (biased.head_dim, biased.qk_norm, biased.qkv_bias, biased.out_bias) == (16, config is QWEN3_V4, True, True)


@pytest.mark.parametrize("config", [LLAMA_V4, MISTRAL_V4, QWEN_V4], ids=["llama", "mistral", "qwen2"])
def test_absent_fields_have_the_defaults_of_transformers(config: dict[str, Any], tmp_path: Path) -> None:
    sizes = {"num_attention_heads": 64, "hidden_size": 2048}
    bare = {name: config[name] for name in ("model_type", "architectures", "tie_word_embeddings")} | sizes
    args, library = load_args(written(tmp_path, bare)), transformers.AutoConfig.from_pretrained(tmp_path)
    assert (args.n_layer, args.intermediate_size, args.vocab_size, args.n_kv_head, args.head_dim, args.norm_eps) == (
        library.num_hidden_layers, library.intermediate_size, library.vocab_size, library.num_key_value_heads, 32,
        library.rms_norm_eps)
    assert (args.max_position, args.rope_theta) == (library.max_position_embeddings, library.rope_parameters["rope_theta"])
    assert args.sliding_window == library.sliding_window if config is not LLAMA_V4 else args.sliding_window is None


def test_unknown_fields_are_named_in_one_line(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    noise = {"secret_sauce": 1, "pad_token": "<pad>", "neftune_noise_alpha": None}
    folder = written(tmp_path, LLAMA_V4 | noise | {"rope_scaling": LINEAR_OLD | {"note": 1}})
    assert load_args(folder) == load_args(written(tmp_path / "plain", LLAMA_V4 | {"rope_scaling": LINEAR_OLD}))
    load_args(folder)
    assert capsys.readouterr().err == f"warning: unknown fields secret_sauce, pad_token, note in {folder}/config.json ignored\n"


@pytest.mark.parametrize("said, length", [(None, 512), (300, 300), (256, 256)])
def test_linear_scaling_lengthens_the_context(said: int | None, length: int, tmp_path: Path) -> None:
    config = LLAMA_V4 | {"max_sequence_length": said, "rope_scaling": LINEAR_OLD}
    assert load_args(written(tmp_path, config)).max_position == length


# ------------------------------------------------------------------------------------------------------------ bad configs

BAD_CONFIGS: list[tuple[Any, str]] = [
    ([1], "list"),
    ({}, "model_type is missing"),
    ({"model_type": "gpt2"}, "'gpt2'.*llama, mistral, qwen2, qwen3"),
    ({"model_type": ["llama"]}, "model_type"),
    *((LLAMA_V4 | fields, match) for fields, match in [
        ({"hidden_size": None}, "hidden_size is missing"),
        ({"hidden_size": "32"}, "hidden_size must be a whole number.*'32'"),
        ({"hidden_size": 32.5}, "hidden_size"),
        ({"hidden_size": 33}, "hidden_size must be a multiple of num_attention_heads"),
        ({"hidden_size": True}, "hidden_size"),
        ({"hidden_size": 2 ** 20, "num_attention_heads": 2}, "head_dim must be a whole number"),
        ({"num_hidden_layers": 0}, "num_hidden_layers"),
        ({"num_hidden_layers": 10 ** 9}, "num_hidden_layers"),
        ({"num_key_value_heads": 3}, "num_attention_heads must be a multiple of num_key_value_heads"),
        ({"head_dim": 7}, "head_dim must be even"),
        ({"hidden_size": 12}, "head_dim must be even"),
        ({"vocab_size": -1}, "vocab_size"),
        ({"intermediate_size": [1]}, "intermediate_size"),
        ({"rms_norm_eps": "1e-5"}, "rms_norm_eps"),
        ({"rms_norm_eps": float("nan")}, "rms_norm_eps"),
        ({"rope_theta": -1.0}, "rope_theta"),
        ({"rope_theta": 10 ** 400}, "rope_theta"),
        ({"max_position_embeddings": None}, "max_position_embeddings is missing"),
        ({"max_sequence_length": "long", "rope_scaling": LINEAR_OLD}, "max_sequence_length"),
        ({"tie_word_embeddings": "yes"}, "tie_word_embeddings must be true or false"),
        ({"architectures": "LlamaForCausalLM"}, "architectures must be a list"),
        ({"architectures": ["LlamaForSequenceClassification"]}, "LlamaForSequenceClassification"),
        ({"auto_map": {"AutoModelForCausalLM": "modeling.Mine"}}, "auto_map.*AutoModelForCausalLM"),
        ({"hidden_act": "gelu"}, "hidden_act.*'gelu'"),
        ({"attention_bias": 1}, "attention_bias"),
        ({"mlp_bias": True}, "mlp_bias"),
        ({"num_local_experts": 8}, "num_local_experts"),
        ({"attention_multiplier": 0.5}, "attention_multiplier"),
        ({"logits_scaling": 8.0}, "logits_scaling"),
        ({"qk_norm": True}, "qk_norm"),
        ({"rope_interleaved": True}, "rope_interleaved"),
        ({"pruned_heads": {"0": [1]}}, "pruned_heads"),
        ({"sliding_window": 64}, "sliding_window"),
        ({"layer_types": ["full_attention", "sliding_attention"]}, "layer_types.*sliding_attention"),
        ({"layer_types": ["full_attention"]}, "layer_types must have one entry per layer"),
        ({"quantization_config": {"bits": 4}}, "quantization_config.*original"),
        ({"partial_rotary_factor": 0.5}, "partial_rotary_factor"),
        ({"alibi": True}, "alibi"),
        ({"rope_scaling": 2.0}, "rope_scaling must be an object"),
        ({"rope_scaling": {"type": "dynamic", "factor": 2.0}}, "'dynamic'"),
        ({"rope_scaling": {"rope_type": "longrope", "long_factor": []}}, "'longrope'"),
        ({"rope_scaling": {"type": "mrope", "mrope_section": [1]}}, "'mrope'"),
        ({"rope_scaling": {"type": ["linear"]}}, "RoPE type"),
        ({"rope_scaling": {"factor": 2.0}}, "field 'factor' is not of RoPE type default"),
        ({"rope_scaling": {"type": "linear"}}, "factor is missing"),
        ({"rope_scaling": {"type": "linear", "factor": "2"}}, "factor"),
        ({"rope_scaling": {"type": "linear", "rope_type": "yarn", "factor": 2.0}}, "rope_type is given twice"),
        ({"rope_parameters": {"rope_type": "default", "rope_theta": 500.0}}, "rope_theta is given twice"),
        ({"rope_scaling": LLAMA3 | {"high_freq_factor": 1.0}}, "high_freq_factor"),
        ({"rope_scaling": YARN | {"beta_fast": 0.5}}, "beta_fast"),
        ({"rope_scaling": YARN | {"finetuned": False}}, "finetuned"),
        ({"rope_scaling": YARN | {"llama_4_scaling_beta": 0.1}}, "llama_4_scaling_beta"),
        ({"rope_parameters": {"full_attention": {"rope_type": "default"}}}, "full_attention"),
    ]),
    (MISTRAL_V4 | {"attention_bias": True}, "attention_bias"),
    (MISTRAL_V4 | {"sliding_window": "wide"}, "sliding_window"),
    ({name: value for name, value in MISTRAL_V4.items() if name != "num_key_value_heads"},  # transformers makes it 8
     "must be a multiple of num_key_value_heads .8."),
    ({name: value for name, value in LLAMA_V4.items() if name != "vocab_size"} | {"hidden_size": "32"},
     "cannot fill in vocab_size, absent in .*hidden_size"),
    (QWEN_V4 | {"use_sliding_window": 1}, "use_sliding_window"),
    (QWEN_V4 | {"use_mrope": True}, "use_mrope"),
    (QWEN_V4 | {"dual_chunk_attention_config": {"chunk_size": 8}}, "dual_chunk_attention_config"),
    (QWEN_V4 | {"layer_types": ["linear_attention"] * 2}, "linear_attention"),
]


@pytest.mark.parametrize("config, match", BAD_CONFIGS, ids=[match[:40] for _, match in BAD_CONFIGS])
def test_bad_config(config: Any, match: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=match) as error:
        load_args(written(tmp_path, config))
    assert str(tmp_path / "config.json") in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("text", [b"", b'{"model_type": "lla', b"\xff\xfe{}", b"[" * 100000],
                         ids=["empty", "cut", "utf16", "deep"])
def test_damaged_config(text: bytes, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_bytes(text)
    with pytest.raises(UserError, match="config.json is not valid JSON"):
        load_args(tmp_path)


def test_no_config(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no config.json in"):
        load_args(tmp_path)
    with pytest.raises(UserError, match="no folder .*nowhere"):
        load_model(tmp_path / "nowhere")
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match="file"):
        load_args(tmp_path / "file")


# ------------------------------------------------------------------------------------------------------------ bad weights

def changed(folder: Path, remove: str = "", **tensors: torch.Tensor) -> None:
    """Rewrite the tiny model in `folder` without the tensor `remove` and with `tensors` (dots written as __)."""
    file = folder / "model.safetensors"
    content = load_file(file) | {name.replace("__", "."): tensor for name, tensor in tensors.items()}
    save_file({name: tensor for name, tensor in content.items() if name != remove}, file)


@pytest.mark.parametrize("family, change, match", [
    ("llama", {"remove": "model.layers.1.mlp.up_proj.weight"}, "lacks tensor model.layers.1.mlp.up_proj.weight;"),
    ("llama", {"remove": "lm_head.weight"}, "lacks tensor lm_head.weight"),
    ("llama", {"model__layers__0__self_attn__q_proj__bias": torch.ones(32)}, r"tensor model.layers.0.self_attn.q_proj.bias"),
    ("llama", {"model__layers__2__mlp__up_proj__weight": torch.ones(48, 32)}, r"model.layers.2.mlp.up_proj.weight"),
    ("llama", {"model__norm__weight": torch.ones(31)}, r"model.norm.weight in .*model.safetensors is \[31\].*\[32\]"),
    ("llama", {"model__norm__weight": torch.ones(32, 1)}, r"model.norm.weight"),
    ("llama", {"model__norm__weight": torch.ones(32, dtype=torch.int8)}, r"model.norm.weight.* is I8: quantised"),
    ("llama", {"model__norm__weight": torch.ones(32).to(torch.float8_e4m3fn)}, r"model.norm.weight.* is F8_E4M3: quantised"),
    ("qwen2", {"remove": "model.layers.0.self_attn.k_proj.bias"}, "model.layers.0.self_attn.k_proj.bias"),
    ("qwen2-tied", {"lm_head__weight": torch.ones(39, 32)}, r"lm_head.weight in .* is \[39, 32\]"),
])
def test_bad_tensors(family: str, change: dict[str, Any], match: str, tmp_path: Path) -> None:
    saved(tmp_path, family)
    changed(tmp_path, **change)
    with pytest.raises(UserError, match=match) as error:
        load_model(tmp_path)
    assert "\n" not in str(error.value)


def test_many_missing_tensors_are_counted(tmp_path: Path) -> None:
    saved(tmp_path)
    save_file({"wte.weight": torch.ones(2)}, tmp_path / "model.safetensors")
    with pytest.raises(UserError, match="lacks tensors model.embed_tokens.weight, .* and 18 more"):
        load_model(tmp_path)


@pytest.mark.parametrize("damage", ["cut", "empty", "pointer", "folder"])
def test_damaged_weights(damage: str, tmp_path: Path) -> None:
    saved(tmp_path)
    file = tmp_path / "model.safetensors"
    content = file.read_bytes()
    file.unlink()
    if damage == "folder":
        file.mkdir()
    else:
        file.write_bytes({"cut": content[:-100], "empty": b"", "pointer": b"version https://git-lfs.github.com/spec/v1\n"}[damage])
    with pytest.raises(UserError, match="cannot read .*model.safetensors.*(damaged or incomplete|not a regular file)"):
        load_model(tmp_path)


def test_no_weights(tmp_path: Path) -> None:
    written(tmp_path, LLAMA_V4)
    with pytest.raises(UserError, match="no weights in .*download"):
        load_model(tmp_path)
    (tmp_path / "pytorch_model.bin").touch()
    with pytest.raises(UserError, match="no weights in .*pytorch_model.bin.*convert.*safetensors"):
        load_model(tmp_path)


def test_bad_shards(tmp_path: Path) -> None:
    saved(tmp_path, max_shard_size="10KB")
    index = tmp_path / "model.safetensors.index.json"
    first = sorted(tmp_path.glob("model-*.safetensors"))[0]
    content = first.read_bytes()
    first.unlink()
    with pytest.raises(UserError, match=f"no file .*{first.name}"):
        load_model(tmp_path)
    first.write_bytes(content)
    index.write_text('{"weight_map": {"x": "../model.safetensors"}}')
    with pytest.raises(UserError, match="no file"):
        load_model(tmp_path)
    for text in ("{}", '{"weight_map": []}', '{"weight_map": {"x": 1}}', "{", "[]"):
        index.write_text(text)
        with pytest.raises(UserError, match="index.json"):
            load_model(tmp_path)
    index.unlink()
    (tmp_path / "model-copy.safetensors").write_bytes(content)
    with pytest.raises(UserError, match=f"is in {first.name} and in .*model-copy.safetensors"):
        load_model(tmp_path)


def test_not_enough_memory(tmp_path: Path) -> None:
    written(tmp_path, LLAMA_V4)
    with pytest.raises(UserError, match=r"the weights need [\d.]+ GB but [\d.]+ GB are free on cpu"):
        checkpoint._materialise(checkpoint._meta_model(ModelArgs(1, 2 ** 20, 8, 8, 128, 2 ** 22, 128, 1e-5, 10000.0)),
                                torch.device("cpu"), torch.bfloat16)


@pytest.mark.parametrize("device", ["tpu-9", "cuda:99"])
def test_unknown_device(device: str, tmp_path: Path) -> None:
    saved(tmp_path)
    with pytest.raises(UserError, match=device):
        load_model(tmp_path, device)
