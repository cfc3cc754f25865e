"""The command quantize: folders that load, perplexity, refusals in one line."""
import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from hashfast.commands import quantize
from hashfast.common import UserError
from hashfast.ops.quant_linear import Int8Linear, dequantize_int8, quantize_int8
from hashfast.research.perplexity import perplexity, read_windows
from hashfast.runtime.checkpoint import load_model, load_quantization, random_model
from hashfast.runtime.memory import bytes_per_step, prefill_bytes

ROOT = Path(__file__).parents[2]
CHECKPOINT, BOOK = ROOT / "checkpoints" / "smollm2-135m-instruct", ROOT / "data" / "alice29.txt"

pytestmark = pytest.mark.usefixtures("seeded")


@pytest.fixture
def run(in_process) -> Callable[..., tuple[int, str, str]]:
    """run(flag, ...) runs the command in this process, on the CPU -> exit code, stdout, stderr."""
    return lambda *flags: in_process(quantize.main, "quantize.py", "--device", "cpu", *flags)


def test_folder_loads_and_generates(tiny_checkpoint, tmp_path, run, command):
    code, out, err = run("--checkpoint_path", tiny_checkpoint, "--out", tmp_path / "q", "--mode", "int8")
    assert code == 0 and "is ready" in out, err
    assert load_quantization(tmp_path / "q") == "int8" and load_quantization(tiny_checkpoint) is None
    model, original = (load_model(folder, dtype=torch.float32) for folder in (tmp_path / "q", tiny_checkpoint))
    assert (tmp_path / "q" / "tokenizer.json").read_bytes() == (tiny_checkpoint / "tokenizer.json").read_bytes()
    for name, layer in original.named_modules():
        if isinstance(layer, torch.nn.Linear):  # wqkv and w13 are put together from several tensors
            got = model.get_submodule(name)
            int8, scale = quantize_int8(layer.weight)
            assert isinstance(got, Int8Linear)
            assert torch.equal(got.weight, int8) and torch.equal(got.scale, scale.float()), name
    assert torch.equal(model.tok_embeddings.weight, original.tok_embeddings.weight)
    assert bytes_per_step(model, None, 1, 1) < bytes_per_step(original, None, 1, 1) * 0.4
    flags = ("--prompt", "abc", "--max_new_tokens", 8, "--temperature", 0, "--json")
    assert len(command("--checkpoint_path", tmp_path / "q", *flags).tokens[0]) >= 1


def test_tied_qwen_with_biases_in_shards(tmp_path, run, monkeypatch):
    transformers = pytest.importorskip("transformers")
    config = transformers.Qwen2Config(hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4,
                                      num_key_value_heads=2, vocab_size=40, tie_word_embeddings=True, initializer_range=0.3)
    made = transformers.Qwen2ForCausalLM(config)
    for name, parameter in made.named_parameters():
        if name.endswith("bias"):
            parameter.data.normal_()
    made.save_pretrained(tmp_path / "model")
    monkeypatch.setattr("hashfast.runtime.quantize.SHARD_BYTES", 10_000)
    code, _, err = run("--checkpoint_path", tmp_path / "model", "--out", tmp_path / "q")
    assert code == 0, err
    files = sorted((tmp_path / "q").glob("*.safetensors"))
    assert len(files) > 2
    model, original = (load_model(tmp_path / folder, dtype=torch.float32) for folder in ("q", "model"))
    assert torch.equal(model.layers[1].attention.wqkv.bias, original.layers[1].attention.wqkv.bias)
    assert isinstance(model.output, Int8Linear) and isinstance(model.tok_embeddings, torch.nn.Embedding)
    assert torch.equal(model.output.weight, quantize_int8(original.tok_embeddings.weight)[0])
    # the tiny model's logits stay close to those of the weights that the integers stand for
    for name, layer in original.named_modules():
        if isinstance(layer, torch.nn.Linear):
            got = model.get_submodule(name)
            layer.weight = torch.nn.Parameter(dequantize_int8(got.weight, got.scale), requires_grad=False)
    tokens = torch.randint(40, (20,))
    logits = []
    for each in (model, original):
        each.setup_caches(1, 32)
        logits.append(each.prefill(tokens))
    torch.testing.assert_close(*logits, atol=1e-4, rtol=1e-4)


def test_perplexity_is_that_of_transformers(tiny_checkpoint, tmp_path, run):
    transformers = pytest.importorskip("transformers")
    text = tmp_path / "text.txt"
    text.write_text("the quick brown fox " * 20)
    (window,) = read_windows(tiny_checkpoint, [text], 2)
    model = transformers.AutoModelForCausalLM.from_pretrained(tiny_checkpoint, dtype=torch.float32).eval()
    with torch.inference_mode():
        expected = model(window[None], labels=window[None]).loss.exp().item()
    got = perplexity(load_model(tiny_checkpoint, dtype=torch.float32), [window], "test")
    assert got == pytest.approx(expected, rel=1e-4)
    code, out, err = run("--checkpoint_path", tiny_checkpoint, "--out", tmp_path / "q", "--mode", "int8", "--data", text)
    assert code == 0 and f"perplexity {expected:.2f}"[:13] in out and "ratio" in out, err


def test_random_models(command, monkeypatch):
    from hashfast.model import ModelArgs
    from hashfast.runtime import checkpoint
    args = ModelArgs(2, 64, 4, 2, 16, 96, 50, 1e-5, 1e4, max_position=128)
    monkeypatch.setitem(checkpoint.PRESETS, "tiny", args)
    model = random_model("tiny", dtype=torch.float32, quantization="int8")
    plain = random_model("tiny", dtype=torch.float32)  # whose widest weights are multiplied without a copy
    assert prefill_bytes(model, 7) == prefill_bytes(plain, 7) + plain.layers[0].feed_forward.w13.weight.nbytes
    w2 = model.layers[0].feed_forward.w2
    dense = dequantize_int8(w2.weight, w2.scale)
    assert dense.std().item() == pytest.approx(0.02, rel=0.05) and abs(dense.mean().item()) < 0.002
    run = command("--random_weights", "tiny", "--quantize", "int8", "--prompt", 5, "--max_new_tokens", 4, "--json")
    assert len(run.tokens[0]) == 4
    with pytest.raises(UserError, match="unknown quantization 'int4'"):
        random_model("tiny", quantization="int4")


# --------------------------------------------------------------------------------------------------------------- errors

def test_refusals(checkpoint_copy, tmp_path, run, command):
    source, out = checkpoint_copy(), tmp_path / "q"
    flags = ("--checkpoint_path", source, "--out", out)
    code, _, err = run(*flags, "--mode", "int4")
    assert code == 2 and "--mode: invalid choice: 'int4'" in err
    assert "no folder" in run("--checkpoint_path", tmp_path / "none", "--out", out)[2]
    assert "cannot read" in run(*flags, "--data", tmp_path / "none.txt")[2]
    assert not out.exists() and not list(tmp_path.glob(".q*"))
    assert run(*flags)[0] == 0
    assert "already exists" in run(*flags)[2]
    code, _, err = run("--checkpoint_path", out, "--out", tmp_path / "again")
    assert code == 2 and "quantised already" in err and err.count("\n") == 1
    code, _, err = command("--checkpoint_path", source, "--quantize", "int8")
    assert code == 2 and "`hashfast quantize`" in err


def test_nothing_half_written_and_no_nan(checkpoint_copy, tmp_path, run):
    source = checkpoint_copy()
    tensors = load_file(source / "model.safetensors")
    tensors["model.layers.1.mlp.down_proj.weight"][3, 4] = float("nan")
    save_file(tensors, source / "model.safetensors")
    code, _, err = run("--checkpoint_path", source, "--out", tmp_path / "q", "--mode", "int8")
    assert code == 2 and "model.layers.1.mlp.down_proj.weight" in err
    assert not list(tmp_path.glob("*q*"))


def test_damaged_quantised_folders(tiny_checkpoint, tmp_path, run):
    out = tmp_path / "q"
    run("--checkpoint_path", tiny_checkpoint, "--out", out)
    config = json.loads((out / "config.json").read_text())
    for change, complaint in (({"mode": "int4", "groupsize": 32}, "mode must be int8 .int4 was removed after commit 7388dfa"),
                              ({"mode": "int3"}, "mode must be int8"), ({"quant_method": "gptq"}, "not supported")):
        (out / "config.json").write_text(json.dumps(config | {"quantization_config": config["quantization_config"] | change}))
        with pytest.raises(UserError, match=complaint):
            load_model(out)
    (out / "config.json").write_text(json.dumps(config))
    (file,) = out.glob("*.safetensors")
    with safe_open(file, "pt") as tensors:
        values = {name: tensors.get_tensor(name) for name in tensors.keys()}
    save_file(values | {"lm_head.weight": values["lm_head.weight"].float()}, file)
    with pytest.raises(UserError, match="lm_head.weight.* is F32, but quantization_config makes it I8"):
        load_model(out)


# ----------------------------------------------------------------------------------------------------------- real model

@pytest.mark.slow
@pytest.mark.skipif(not (CHECKPOINT.exists() and BOOK.exists()), reason="run scripts/fetch_quickstart.py first")
def test_real_model(tmp_path, run):
    """int8 keeps the perplexity."""
    text = tmp_path / "text.txt"
    text.write_text(BOOK.read_text()[3000:3700])
    code, out, err = run("--checkpoint_path", CHECKPOINT, "--out", tmp_path / "int8", "--data", text)
    assert code == 0, err
    assert abs(float(out.split("ratio ")[1].split()[0]) - 1) < 0.01, out
