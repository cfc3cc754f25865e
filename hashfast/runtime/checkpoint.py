"""Models from folders in the Hugging Face layout (config.json and safetensors), and models of random weights.

Everything is checked before memory is taken. A field of config.json that changes the maths and is not supported is an error, an
unknown one a warning; an absent one has transformers' default. A tensor that is missing, unknown or of another shape is an
error.
"""
import contextlib
import functools
import json
import math
import os
import reprlib
import sys
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from tqdm import tqdm

from hashfast.common import UserError, read_file
from hashfast.model import ModelArgs, RopeScaling, Transformer
from hashfast.ops.quant_linear import swap_linears
from hashfast.runtime import distributed, tensor_parallel
from hashfast.runtime.memory import available_memory

MODEL_TYPES = ("llama", "mistral", "qwen2", "qwen3")
FLOAT_TYPES = ("BF16", "F16", "F32", "F64")  # safetensors' names; anything else is a quantised checkpoint

# What transformers writes into config.json beside the shape of the model: training, generation, labels, bookkeeping.
HARMLESS = frozenset("""
    _attn_implementation _attn_implementation_autoset _attn_implementation_internal _commit_hash _flash_attn_2_enabled
    _name_or_path attention_dropout attn_implementation bad_words_ids begin_suppress_tokens bos_token_id cache_implementation
    chunk_size_feed_forward decoder_start_token_id diversity_penalty do_sample dtype early_stopping embd_pdrop
    encoder_no_repeat_ngram_size eos_token_id exponential_decay_length_penalty finetuning_task forced_bos_token_id
    forced_eos_token_id gradient_checkpointing hidden_dropout id2label initializer_range is_decoder is_llama_config label2id
    length_penalty max_length max_new_tokens min_length model_max_length name_or_path
    no_repeat_ngram_size num_beam_groups num_beams num_labels num_return_sequences output_attentions output_hidden_states
    output_scores pad_token_id prefix pretraining_tp problem_type remove_invalid_values repetition_penalty resid_pdrop
    return_dict return_dict_in_generate sep_token_id suppress_tokens task_specific_params temperature tf_legacy_loss
    tie_encoder_decoder tie_last_hidden_states tokenizer_class top_k top_p torch_dtype torchscript transformers.js_config
    transformers_version typical_p unsloth_fixed unsloth_version use_bfloat16 use_cache use_flash_attention_2 use_return_dict
""".split())

# Fields that change the maths, with the values under which they change nothing.
FIXED: dict[str, tuple[Any, ...]] = {
    "add_cross_attention": (False,),
    "alibi": (False,),
    "attention_multiplier": (),
    "attention_sinks": (False,),
    "attn_logit_softcapping": (),
    "bias": (False,),
    "clip_qkv": (),
    "dual_chunk_attention_config": (),
    "embedding_multiplier": (1,),
    "final_logit_softcapping": (),
    "hidden_act": ("silu", "swish"),
    "is_causal": (True,),
    "is_encoder_decoder": (False,),
    "logit_scale": (1,),
    "logits_scaling": (1,),
    "mlp_bias": (False,),
    "no_rope_layers": ([],),
    "num_experts": (0,),
    "num_local_experts": (0,),
    "parallel_attn": (False,),
    "per_layer_config": ({},),
    "position_embedding_type": ("rope", "rotary"),
    "pruned_heads": ({},),
    "qk_layernorm": (False,),
    "qk_norm": (False,),
    "query_pre_attn_scalar": (),
    "residual_multiplier": (1,),
    "rope_interleaved": (False,),
    "rotary_pct": (1,),
    "scale_depth": (),
    "scale_emb": (1,),
    "use_alibi": (False,),
    "use_bias": (False,),
    "use_mrope": (False,),
    "use_parallel_residual": (False,),
    "use_qk_norm": (False,),
}
FIXED_BY_TYPE: dict[str, dict[str, tuple[Any, ...]]] = {
    "llama": {"attention_bias": (True, False), "sliding_window": (), "use_sliding_window": (False,)},
    "mistral": {"attention_bias": (False,), "use_sliding_window": (False,)},
    "qwen2": {"attention_bias": (True, False)},  # means nothing to Qwen2: q, k and v are biased, o is not
    "qwen3": {"attention_bias": (True, False)},
}
QUANTISED = ("quantization_config", "quantization", "compression_config")
QUANT_METHOD = "hashfast"  # the quant_method of quantization_config in what `hashfast quantize` writes
INTEGER_TYPES = {torch.int8: "I8"}

# What load_args reads or checks by itself.
SHAPE = frozenset("""
    architectures auto_map head_dim hidden_size intermediate_size layer_types max_position_embeddings max_sequence_length
    max_window_layers model_type num_attention_heads num_hidden_layers num_key_value_heads original_max_position_embeddings
    partial_rotary_factor quantization_config rms_norm_eps rope_parameters rope_scaling rope_theta sliding_window
    tie_word_embeddings use_sliding_window vocab_size
""".split())
# Absent, these have transformers' defaults. The others' are short enough to stand in the code.
DEFAULTED = ("hidden_size", "intermediate_size", "max_position_embeddings", "num_attention_heads", "num_hidden_layers",
             "num_key_value_heads", "rms_norm_eps", "vocab_size")

ROPE_COMMON = ("rope_type", "rope_theta", "partial_rotary_factor", "original_max_position_embeddings")
ROPE_FIELDS: dict[str, tuple[str, ...]] = {
    "default": (),
    "linear": ("factor",),
    "llama3": ("factor", "low_freq_factor", "high_freq_factor"),
    "yarn": ("factor", "attention_factor", "beta_fast", "beta_slow", "mscale", "mscale_all_dim", "truncate", "finetuned"),
}
# Fields of other kinds, which change the maths.
ROPE_FOREIGN = {"alpha", "full_attention", "llama_4_scaling_beta", "long_factor", "mrope_section", "short_factor",
                "sliding_attention", *(name for names in ROPE_FIELDS.values() for name in names)}

LLAMA_31_ROPE = RopeScaling("llama3", factor=8.0, original_max_position=8192)
PRESETS: dict[str, ModelArgs] = {
    "llama-3.1-8b": ModelArgs(32, 4096, 32, 8, 128, 14336, 128256, 1e-5, 500000.0, LLAMA_31_ROPE, max_position=131072),
    "llama-3.1-70b": ModelArgs(80, 8192, 64, 8, 128, 28672, 128256, 1e-5, 500000.0, LLAMA_31_ROPE, max_position=131072),
    "llama-3.2-1b": ModelArgs(16, 2048, 32, 8, 64, 8192, 128256, 1e-5, 500000.0,
                              RopeScaling("llama3", factor=32.0, original_max_position=8192), max_position=131072,
                              tie_embeddings=True),
    "mistral-7b": ModelArgs(32, 4096, 32, 8, 128, 14336, 32768, 1e-5, 1000000.0, max_position=32768),
    "qwen2.5-coder-1.5b": ModelArgs(28, 1536, 12, 2, 128, 8960, 151936, 1e-6, 1000000.0, max_position=32768, qkv_bias=True,
                                    tie_embeddings=True),
    "qwen3-4b": ModelArgs(36, 2560, 32, 8, 128, 9728, 151936, 1e-6, 1000000.0, max_position=40960, qk_norm=True,
                          tie_embeddings=True),
}


# ---------------------------------------------------------------------------------------------------------------- config

class Fields:
    """Typed reading of one JSON object. Null counts as absent; errors name the field and `where` it stands."""

    def __init__(self, values: dict[str, Any], where: str) -> None:
        self.nulls = [name for name, value in values.items() if value is None]
        self.values = {name: value for name, value in values.items() if value is not None}
        self.unknown: list[str] = []
        self.where = where

    def whole(self, name: str, default: int | None = None, most: int = 2 ** 24) -> int:
        """A whole number from 1 to `most`; an error if it is absent and there is no default."""
        value = self._value(name, default)
        if type(value) is not int or not 1 <= value <= most:
            raise self.error(name, f"must be a whole number from 1 to {most}")
        return value

    def number(self, name: str, default: float | None = None, above: float = 0.0) -> float:
        """A number greater than `above`; an error if it is absent and there is no default."""
        value = self._value(name, default)
        if type(value) not in (int, float) or not above < value < 1e18:
            raise self.error(name, f"must be a number above {above:g}")
        return float(value)

    def flag(self, name: str, default: bool) -> bool:
        value = self._value(name, default)
        if type(value) is not bool:
            raise self.error(name, "must be true or false")
        return value

    def strings(self, name: str) -> list[str]:
        """A list of strings, empty if absent."""
        value = self.values.get(name, [])
        if not isinstance(value, list) or not all(isinstance(item, str) for item in value):
            raise self.error(name, "must be a list of strings")
        return value

    def mapping(self, name: str) -> dict[str, Any]:
        """An object, empty if absent."""
        value = self.values.get(name, {})
        if not isinstance(value, dict):
            raise self.error(name, "must be an object")
        return value

    def fixed(self, name: str, allowed: tuple[Any, ...]) -> None:
        """Refuse any value that is not one of `allowed`; absent is fine."""
        if name in self.values and self.values[name] not in allowed:
            wanted = " or ".join(json.dumps(value) for value in allowed) or "null"
            raise self.error(name, f"is not supported, only {wanted}: this model computes something else; use another model")

    def error(self, name: str, complaint: str) -> UserError:
        return UserError(f"{name} {complaint} (it is {reprlib.repr(self.values.get(name, 'absent'))} in {self.where})")

    def _value(self, name: str, default: Any) -> Any:
        if name not in self.values and default is None:
            raise UserError(f"{name} is missing in {self.where}; download config.json again")
        return self.values.get(name, default)


def load_args(folder: str | Path) -> ModelArgs:
    """The shape of the model in `folder`, from its config.json as transformers 4 or 5 writes it.

    One line of warning names the fields that are unknown. Raises UserError for what is damaged or unsupported, naming the
    field.
    """
    path = Path(folder) / "config.json"
    values = _read_json(path)
    kind = _model_type(Fields(values, str(path)))
    config = Fields(_defaults(path, values) | values, str(path))
    _refuse_unsupported(config, kind)

    n_layer = config.whole("num_hidden_layers", most=2 ** 13)
    dim = config.whole("hidden_size")
    n_head = config.whole("num_attention_heads", most=2 ** 13)
    n_kv_head = config.whole("num_key_value_heads", n_head, most=2 ** 13)  # null: one for each query head
    if n_head % n_kv_head:
        raise config.error("num_attention_heads", f"must be a multiple of num_key_value_heads ({n_kv_head})")
    if kind != "qwen3" and "head_dim" not in config.values and dim % n_head:
        raise config.error("hidden_size", f"must be a multiple of num_attention_heads ({n_head}) where head_dim is absent")
    head_dim = config.whole("head_dim", 128 if kind == "qwen3" else dim // n_head, most=2 ** 13)  # transformers' defaults
    if head_dim % 2:
        raise UserError(f"head_dim must be even for RoPE (it is {head_dim} in {path}); use another model")
    max_position = config.whole("max_position_embeddings", most=2 ** 31)
    rope_theta, rope_scaling = read_rope(config, max_position)
    if rope_scaling is not None and rope_scaling.kind == "yarn":
        # Qwen's recipe adds yarn to a config whose max_position_embeddings stays the length before scaling.
        max_position = max(max_position, int(rope_scaling.factor * rope_scaling.original_max_position))
    elif rope_scaling is not None and rope_scaling.kind == "linear":
        # So it is with linear, by transformers' convention; the length after scaling is max_sequence_length, if that is there.
        scaled = min(int(rope_scaling.factor * max_position), 2 ** 31)
        max_position = max(max_position, config.whole("max_sequence_length", scaled, most=2 ** 31))
    _warn_unknown(tuple(config.unknown), config.where)
    biased = kind in ("llama", "qwen3") and config.flag("attention_bias", False)
    return ModelArgs(
        n_layer=n_layer,
        dim=dim,
        n_head=n_head,
        n_kv_head=n_kv_head,
        head_dim=head_dim,
        intermediate_size=config.whole("intermediate_size"),
        vocab_size=config.whole("vocab_size"),
        norm_eps=config.number("rms_norm_eps"),
        rope_theta=rope_theta,
        rope_scaling=rope_scaling,
        max_position=max_position,
        sliding_window=_sliding_window(config, kind, n_layer),
        qkv_bias=biased or kind == "qwen2",
        out_bias=biased,
        qk_norm=kind == "qwen3",
        tie_embeddings=config.flag("tie_word_embeddings", False),
    )


def _defaults(path: Path, values: dict[str, Any]) -> dict[str, Any]:
    """What transformers makes of the fields of DEFAULTED that config.json lacks. It is imported (2 s) only where one does."""
    absent = [name for name in DEFAULTED if name not in values]
    if not absent:
        return {}
    from transformers import AutoConfig
    try:
        config = AutoConfig.from_pretrained(path.parent, trust_remote_code=False, local_files_only=True)
    except Exception as error:  # its validation raises what it likes
        reason = " ".join(str(error).split())
        raise UserError(f"cannot fill in {', '.join(absent)}, absent in {path}: {reason[:300]}; correct the file") from error
    return {name: getattr(config, name) for name in absent}


@functools.cache  # once a process, however often a folder is read
def _warn_unknown(names: tuple[str, ...], where: str) -> None:
    if names and distributed.rank() == 0:
        print(f"warning: unknown field{'s' * (len(names) > 1)} {', '.join(names)} in {where} ignored", file=sys.stderr)


def _read_json(path: Path) -> dict[str, Any]:
    wanted = "give a folder in the Hugging Face layout"
    try:
        path.stat()
    except FileNotFoundError as error:
        lacking = f"no {path.name} in {path.parent}" if path.parent.is_dir() else f"no folder {path.parent}"
        raise UserError(f"{lacking}; {wanted}") from error
    except (OSError, ValueError):
        pass  # read_file says it
    content = read_file(path, wanted)
    try:
        values = json.loads(content)
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path} is not valid JSON ({error}); download it again") from error
    if not isinstance(values, dict):
        raise UserError(f"{path} holds a {type(values).__name__}, not an object; download it again")
    return values


def _model_type(config: Fields) -> str:
    kind = config.values.get("model_type")
    if kind not in MODEL_TYPES:
        named = "is missing" if kind is None else f"{reprlib.repr(kind)} is not supported"
        raise UserError(f"model_type {named} in {config.where}; use one of {', '.join(MODEL_TYPES)}")
    return kind


def _refuse_unsupported(config: Fields, kind: str) -> None:
    """Refuse every field that changes what the model computes; note those that are unknown."""
    for name in QUANTISED:
        if name in config.values and _quantization(config) is None:
            raise UserError(f"{name} in {config.where}: quantised checkpoints are not supported; use the model's original one")
    for name, allowed in (FIXED | FIXED_BY_TYPE[kind]).items():
        config.fixed(name, allowed)
    for name in config.strings("architectures"):
        if name.lower() != f"{kind}forcausallm":
            raise UserError(f"architectures names {name!r} in {config.where}; only causal language models of type {kind} work")
    for name in config.mapping("auto_map"):
        if name.startswith("AutoModel"):
            raise UserError(f"auto_map names code of the model's own for {name} in {config.where}; delete the field if "
                            "transformers runs the model without that code")
    known = HARMLESS | SHAPE | FIXED.keys() | FIXED_BY_TYPE[kind].keys()
    config.unknown += [name for name in config.values if name not in known]


def load_quantization(folder: str | Path) -> str | None:
    """int8 where `hashfast quantize` made the model in `folder`, else None. Raises UserError."""
    path = Path(folder) / "config.json"
    return _quantization(Fields(_read_json(path), str(path)))


def _quantization(config: Fields) -> str | None:
    if config.mapping("quantization_config").get("quant_method") != QUANT_METHOD:
        return None
    fields = Fields(config.mapping("quantization_config"), f"{config.where}, quantization_config")
    mode = fields.values.get("mode")
    if mode != "int8":
        raise fields.error("mode", "must be int8 (int4 was removed after commit 7388dfa); run `hashfast quantize` on the "
                           "original model")
    return mode


def _sliding_window(config: Fields, kind: str, n_layer: int) -> int | None:
    """The window of those layers that have one, None where no layer has. Defaults are transformers' own."""
    layer_types = config.strings("layer_types")
    known = ("full_attention",) if kind == "llama" else ("full_attention", "sliding_attention")
    for name in layer_types:
        if name not in known:
            raise UserError(f"layer_types holds {name!r} in {config.where}; only {' and '.join(known)} are supported")
    if layer_types and len(layer_types) != n_layer:
        raise config.error("layer_types", f"must have one entry per layer ({n_layer})")
    if kind == "llama" or "sliding_window" in config.nulls:
        return None
    if kind in ("qwen2", "qwen3"):
        slides = "sliding_attention" in layer_types
        if not layer_types:
            slides = n_layer > config.number("max_window_layers", 28, above=-1)  # the layers below it attend to everything
        if not config.flag("use_sliding_window", False) or not slides:
            return None
    return config.whole("sliding_window", 4096, most=2 ** 31)


def read_rope(config: Fields, max_position: int) -> tuple[float, RopeScaling | None]:
    """Base and scaling of RoPE, from the fields of transformers 4 (rope_theta, rope_scaling) and 5 (rope_parameters)."""
    top = {name: config.values[name] for name in ROPE_COMMON[1:] if name in config.values}
    merged: dict[str, Any] = {}
    for source in (top, config.mapping("rope_scaling"), config.mapping("rope_parameters")):
        for name, value in source.items():
            name = "rope_type" if name == "type" else name
            if value is not None and merged.setdefault(name, value) != value:
                raise UserError(f"RoPE's {name} is given twice in {config.where}, as {reprlib.repr(merged[name])} and as "
                                f"{reprlib.repr(value)}; keep one")
    rope = Fields(merged, f"{config.where}, RoPE")
    kind = merged.get("rope_type", "default")
    if not isinstance(kind, str) or kind not in ROPE_FIELDS:
        raise UserError(f"RoPE type {reprlib.repr(kind)} in {config.where} is not supported; only {', '.join(ROPE_FIELDS)} are")
    for name in merged.keys() - {*ROPE_COMMON, *ROPE_FIELDS[kind]}:
        if name in ROPE_FOREIGN:
            raise UserError(f"field {name!r} is not of RoPE type {kind} in {config.where}; use another model")
        config.unknown.append(name)
    rope.fixed("partial_rotary_factor", (1,))
    rope.fixed("finetuned", (True,))  # false asks YaRN's own code for its dynamic form
    theta = rope.number("rope_theta", 10000.0, above=1.0)
    if kind == "default":
        return theta, None
    original = rope.whole("original_max_position_embeddings", max_position, most=2 ** 31)
    if kind == "linear":
        return theta, RopeScaling(kind, rope.number("factor"))
    if kind == "llama3":
        low, high = rope.number("low_freq_factor"), rope.number("high_freq_factor")
        if low >= high:
            raise rope.error("high_freq_factor", f"must be greater than low_freq_factor ({low:g})")
        return theta, RopeScaling(kind, rope.number("factor"), original, low_freq_factor=low, high_freq_factor=high)
    return theta, _yarn(rope, original, max_position)


def _yarn(rope: Fields, original: int, max_position: int) -> RopeScaling:
    """Yarn's parameters with the defaults of transformers; mscale and mscale_all_dim become an attention_factor."""
    factor = rope.number("factor", max_position / original)
    gain = rope.number("attention_factor") if "attention_factor" in rope.values else None
    mscale, mscale_all_dim = rope.number("mscale", 0.0, above=-1), rope.number("mscale_all_dim", 0.0, above=-1)
    if gain is None and mscale and mscale_all_dim:
        log = 0.1 * math.log(max(factor, 1.0))
        gain = (mscale * log + 1.0) / (mscale_all_dim * log + 1.0)
    fast, slow = rope.number("beta_fast", 32.0), rope.number("beta_slow", 1.0)
    if slow > fast:
        raise UserError(f"beta_fast ({fast:g}) must not be less than beta_slow ({slow:g}) in {rope.where}; correct the file")
    return RopeScaling("yarn", factor, original, beta_fast=fast, beta_slow=slow, attention_factor=gain,
                       truncate=rope.flag("truncate", True))


# --------------------------------------------------------------------------------------------------------------- weights

@dataclass(frozen=True)
class Place:
    """Where a checkpoint's tensor goes: rows `start` .. `start + rows` of a parameter."""
    parameter: str
    start: int
    rows: int


def load_model(folder: str | Path, device: str | torch.device = "cpu", dtype: torch.dtype = torch.bfloat16) -> Transformer:
    """The model in `folder` on `device`, its weights converted to `dtype` while they are read one by one.

    Of several ranks each reads and holds its own part (runtime/tensor_parallel.py).

    Weights are read from safetensors, one file or many, with or without their index. Raises UserError.
    """
    folder, device = Path(folder), _device(device)
    model, places, files = plan_loading(folder)
    if distributed.world_size() > 1:
        _refuse_ranks(load_quantization(folder))
        model = _meta_model(tensor_parallel.shard_args(model.args, distributed.world_size()))
        places = _places(model)
    _materialise(model, device, dtype)
    parameters = dict(model.named_parameters())
    for tensors, name in read_tensors(places, files, "loading"):
        place = places[name]
        part = parameters[place.parameter].narrow(0, place.start, place.rows)
        tensor_parallel.read_part(tensors, name, part, distributed.rank())
    return tensor_parallel.parallelize(model)


def plan_loading(folder: Path) -> tuple[Transformer, dict[str, Place], list[Path]]:
    """The model in `folder` without storage, where its tensors go, and the files that hold them, all checked."""
    args, quantization = load_args(folder), load_quantization(folder)
    files = _weight_files(folder)
    if args.tie_embeddings and quantization is None and _has_own_head(files):
        args = replace(args, tie_embeddings=False)
    model = _meta_model(args, quantization)
    places = _places(model)
    _check_tensors(model, places, files)
    return model, places, files


def _has_own_head(files: list[Path]) -> bool:
    """Whether there is an output table other than the input's: transformers keeps it, whatever tie_word_embeddings says."""
    with contextlib.ExitStack() as stack:
        tables = {}
        for file in files:
            tensors = stack.enter_context(_opened(file))
            for name in {"model.embed_tokens.weight", "lm_head.weight"} & {*tensors.keys()}:
                tables[name] = tensors.get_slice(name)
        shapes = [table.get_shape() for table in tables.values() if table.get_dtype() in FLOAT_TYPES]
        if len(shapes) < 2 or shapes[0] != shapes[1]:  # another shape or type is refused later
            return False
        a, b = tables.values()
        return any(bool((a[i:i + 4096] != b[i:i + 4096]).any()) for i in range(0, shapes[0][0], 4096))


def read_tensors(places: dict[str, Place], files: list[Path], task: str) -> Iterator[tuple[safe_open, str]]:
    """Every tensor of `places`, as an open file and its name there, one by one under a progress bar called `task`."""
    with tqdm(total=len(places), desc=task, unit="tensor", delay=2, disable=None) as progress:
        for file in files:
            with _opened(file) as tensors:
                for name in tensors.offset_keys():
                    if name in places:
                        yield tensors, name
                        progress.update()


def _refuse_ranks(quantization: str | None) -> None:
    if quantization is not None and distributed.world_size() > 1:
        raise UserError(f"{quantization} weights are not shared out over {distributed.world_size()} ranks; start one, or "
                        "use the original model")


def random_model(preset: str, device: str | torch.device = "cpu", dtype: torch.dtype = torch.bfloat16,
                 seed: int = 0, quantization: str | None = None) -> Transformer:
    """A model of random weights in the shape of `preset` (one of PRESETS): normal of deviation 0.02, norms 1.

    quantization "int8": random integers, with scales that give the same deviation around 0. The same seed gives the same
    weights on the same kind of device, and each rank weights of its own. Raises UserError.
    """
    if preset not in PRESETS:
        raise UserError(f"unknown preset {preset!r}; use one of {', '.join(PRESETS)}")
    if quantization not in (None, "int8"):
        raise UserError(f"unknown quantization {quantization!r}; use int8")
    device = _device(device)
    _refuse_ranks(quantization)
    model = _meta_model(tensor_parallel.shard_args(PRESETS[preset], distributed.world_size()), quantization)
    _materialise(model, device, dtype)
    generator = torch.Generator(device).manual_seed(seed + distributed.rank())
    for name, parameter in model.named_parameters():
        if name.endswith("norm.weight"):
            parameter.fill_(1.0)
        elif parameter.dtype == torch.int8:
            parameter.random_(-127, 128, generator=generator)
        elif name.endswith("scale"):  # uniform integers deviate by their range / sqrt 12
            parameter.fill_(0.02 / 73.6)
        else:
            parameter.normal_(0.0, 0.02, generator=generator)
    return tensor_parallel.parallelize(model)


def _device(device: str | torch.device) -> torch.device:
    """The device for a model; a GPU becomes the current one, on which Triton's kernels run. UserError where it is not there."""
    try:
        device = torch.device(device)
    except RuntimeError as error:
        raise UserError(f"unknown device {device!r}; use cpu or cuda") from error
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise UserError(f"no device {device}: {torch.cuda.device_count()} GPUs are visible; use another, or cpu")
    if device.index is not None and device.type == "cuda":
        torch.cuda.set_device(device)
    return device


def _meta_model(args: ModelArgs, quantization: str | None = None) -> Transformer:
    """The model without storage. Its parameters want no gradient: this project trains encoders beside frozen models."""
    with torch.device("meta"):
        model = Transformer(args).requires_grad_(False).eval()
    if quantization is not None:
        swap_linears(model)
    return model


def _materialise(model: Transformer, device: torch.device, dtype: torch.dtype) -> None:
    """Give the parameters of a meta model uninitialised storage. UserError where memory does not suffice."""
    tied = _is_tied(model)
    parameters = dict(model.named_parameters())  # names a tied parameter once
    dtypes = {name: dtype if parameter.is_floating_point() else parameter.dtype for name, parameter in parameters.items()}
    _check_memory(sum(parameter.numel() * dtypes[name].itemsize for name, parameter in parameters.items()), device)
    empty = {name: torch.empty(parameter.shape, device=device, dtype=dtypes[name]) for name, parameter in parameters.items()}
    model.load_state_dict(empty, strict=False, assign=True)
    if tied:
        model.output.weight = model.tok_embeddings.weight


def _is_tied(model: Transformer) -> bool:
    """Whether input and output share one table; a quantised output is a copy of its own."""
    return model.output.weight is model.tok_embeddings.weight


def _check_memory(needed: int, device: torch.device) -> None:
    """UserError if `device` has fewer than `needed` bytes free; silent where that cannot be known."""
    free = available_memory(device)
    if free is not None and needed > free:
        raise UserError(f"the weights need {needed / 1e9:.1f} GB but {free / 1e9:.1f} GB are free on {device}; "
                        "use a smaller model or dtype, or stop what else runs there")


def _places(model: Transformer) -> dict[str, Place]:
    """Every tensor that a checkpoint of this model must hold, by its name there."""
    args = model.args
    q, kv, ffn = args.n_head * args.head_dim, args.n_kv_head * args.head_dim, args.intermediate_size
    places = {
        "model.embed_tokens.weight": Place("tok_embeddings.weight", 0, args.vocab_rows),
        "model.norm.weight": Place("norm.weight", 0, args.dim),
    }
    if not _is_tied(model):
        places["lm_head.weight"] = Place("output.weight", 0, args.vocab_rows)
    for i in range(args.n_layer):
        theirs, ours = f"model.layers.{i}.", f"layers.{i}."
        places[theirs + "input_layernorm.weight"] = Place(ours + "attention_norm.weight", 0, args.dim)
        places[theirs + "post_attention_layernorm.weight"] = Place(ours + "ffn_norm.weight", 0, args.dim)
        for kind in ("weight", "bias") if args.qkv_bias else ("weight",):
            wqkv = f"{ours}attention.wqkv.{kind}"
            places[f"{theirs}self_attn.q_proj.{kind}"] = Place(wqkv, 0, q)
            places[f"{theirs}self_attn.k_proj.{kind}"] = Place(wqkv, q, kv)
            places[f"{theirs}self_attn.v_proj.{kind}"] = Place(wqkv, q + kv, kv)
        places[theirs + "self_attn.o_proj.weight"] = Place(ours + "attention.wo.weight", 0, args.dim)
        if args.out_bias:
            places[theirs + "self_attn.o_proj.bias"] = Place(ours + "attention.wo.bias", 0, args.dim)
        for name in ("q_norm", "k_norm") if args.qk_norm else ():
            places[f"{theirs}self_attn.{name}.weight"] = Place(f"{ours}attention.{name}.weight", 0, args.head_dim)
        places[theirs + "mlp.gate_proj.weight"] = Place(ours + "feed_forward.w13.weight", 0, ffn)
        places[theirs + "mlp.up_proj.weight"] = Place(ours + "feed_forward.w13.weight", ffn, ffn)
        places[theirs + "mlp.down_proj.weight"] = Place(ours + "feed_forward.w2.weight", 0, args.dim)
    parameters = dict(model.named_parameters())
    for name, place in list(places.items()):  # what an int8 weight has beside it, row for row
        if (parameter := f"{place.parameter.removesuffix('weight')}scale") in parameters:
            places[f"{name.removesuffix('weight')}scale"] = Place(parameter, place.start, place.rows)
    return places


def _weight_files(folder: Path) -> list[Path]:
    """The safetensors files that make up the model: one, those of the index, or those that look like its shards."""
    if (folder / "model.safetensors").exists():
        return [folder / "model.safetensors"]
    index = folder / "model.safetensors.index.json"
    if index.exists():
        names = _read_json(index).get("weight_map")
        if not isinstance(names, dict) or not names or not all(isinstance(name, str) for name in names.values()):
            raise UserError(f"{index} has no weight_map of tensor names to file names; delete it or download it again")
        files = [folder / name for name in sorted(set(names.values()))]
        for file in files:
            if file.parent != folder or not file.is_file():
                raise UserError(f"no file {file}, which {index.name} names; download it")
        return files
    # Mistral ships the same weights again in a layout of its own, as consolidated*.safetensors.
    files = sorted(file for file in folder.glob("*.safetensors") if not file.name.startswith("consolidated"))
    files = [file for file in files if file.name.startswith("model-")] or files
    if not files:
        kinds = (".safetensors", ".bin", ".pth", ".pt", ".gguf")
        others = sorted(file.name for file in folder.iterdir() if file.suffix in kinds)
        found = f" (only {', '.join(others[:3])})" if others else ""
        raise UserError(f"no weights in {folder}: model.safetensors or model-*.safetensors is wanted{found}; "
                        + ("convert the model to the Hugging Face layout with safetensors" if others else "download them"))
    return files


def _opened(file: Path) -> safe_open:
    if not file.is_file() or not os.access(file, os.R_OK):
        reason = "permission denied; let this user read it" if file.is_file() else "not a regular file; download it again"
        raise UserError(f"cannot read {file}: {reason}")
    try:
        return safe_open(file, framework="pt", device="cpu")
    except (SafetensorError, OSError) as error:
        raise UserError(f"cannot read {file}: {error}; it is damaged or incomplete, download it again") from error


def _check_tensors(model: Transformer, places: dict[str, Place], files: list[Path]) -> None:
    """Compare the headers of `files` with what the model needs, before memory is taken."""
    parameters = dict(model.named_parameters())
    wanted = {name: [place.rows, *parameters[place.parameter].shape[1:]] for name, place in places.items()}
    types = {name: INTEGER_TYPES.get(parameters[place.parameter].dtype) for name, place in places.items()}
    # A tied model may be saved with its output weights all the same, equal to the input's.
    checked = {"lm_head.weight": wanted["model.embed_tokens.weight"]} | wanted
    seen: dict[str, str] = {}
    extra = []
    for file in files:
        with _opened(file) as tensors:
            for name in tensors.offset_keys():
                if name in seen:
                    raise UserError(f"tensor {name} is in {seen[name]} and in {file}; remove the file that is not the model's")
                seen[name] = file.name
                if name in checked:
                    header = tensors.get_slice(name)
                    if header.get_shape() != checked[name]:
                        raise UserError(f"tensor {name} in {file} is {header.get_shape()}, but config.json makes it "
                                        f"{checked[name]}; take both from the same model")
                    if integer := types.get(name):
                        if header.get_dtype() != integer:
                            raise UserError(f"tensor {name} in {file} is {header.get_dtype()}, but quantization_config "
                                            f"makes it {integer}; run `hashfast quantize` again")
                    elif header.get_dtype() not in FLOAT_TYPES:
                        raise UserError(f"tensor {name} in {file} is {header.get_dtype()}: quantised checkpoints are not "
                                        "supported; use the model's original one")
                elif ".rotary_emb." not in name:  # old checkpoints keep frequencies and caches that the config gives
                    extra.append(name)
    if missing := [name for name in wanted if name not in seen]:
        raise UserError(f"{files[0].parent} lacks {_some(missing)}; download all files of the model")
    if extra:
        raise UserError(f"{files[0].parent} holds {_some(extra)}, unknown to this kind of model; use an unmodified checkpoint")


def _some(names: list[str]) -> str:
    rest = f" and {len(names) - 3} more" if len(names) > 3 else ""
    return f"tensor{'s' if len(names) > 1 else ''} {', '.join(names[:3])}{rest}"
