"""Tensor parallelism: two ranks on gloo compute what one process computes, and speak with one voice.

Run as a script under torchrun this file is a rank: `work` and `gpu` write what `compute` gives, `fail` fails in rank 1 alone.
"""
import contextlib
import functools
import io
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from hashfast import generate
from hashfast.common import UserError
from hashfast.hash_attention import HashConfig, HashEncoder
from hashfast.model import ModelArgs, SparseSettings
from hashfast.runtime import distributed, tensor_parallel
from hashfast.runtime.checkpoint import PRESETS, load_model, random_model
from hashfast.runtime.decode import Decoder, decode, prefill
from hashfast.runtime.quantize import quantize_folder
from hashfast.runtime.sampling import Sampling
from hashfast.runtime.signatures import load_signatures, random_encoders, save_signatures

ROOT = Path(__file__).parents[2]
MODELS = ("llama", "qwen2", "llama-biased", "mistral", "qwen3")  # the first has a tokenizer
HEAD_DIMS = {"llama": 8, "qwen2": 64, "llama-biased": 8, "mistral": 8, "qwen3": 16}
MODES = ("dense", "hash", "sampled")
MODES_OF = {"llama": MODES, "qwen2": (*MODES, "compiled")}  # the others: dense and hash
PROMPTS = [[7], list(range(40, 80))]
STEPS = 24
TURNS = ["Hello", "And then?", ""]


# ------------------------------------------------------------------------------------------------------ what a rank runs

def compute(folder: Path, modes: tuple[str, ...] = MODES, device: str = "cpu") -> dict[str, Tensor]:
    """Tokens and last logits of a ragged batch of each mode, and the parameters, of this rank or of a single process."""
    model = load_model(folder, device, torch.float32)
    results = {f"parameter {name}": parameter.data.clone() for name, parameter in model.named_parameters()}
    encoders = tensor_parallel.shard_encoders(load_signatures(folder / "signatures.safetensors", model.fingerprint())[0])
    for mode in modes:
        if mode == "dense":
            model.setup_caches(2, 80)
        else:
            model.setup_caches(2, 80, encoders, SparseSettings(16, sink=4, recent=4, dense_layers=1))
        if mode == "one_shot":
            distributed.use_one_shot(2 * model.args.dim, torch.float32)
        torch.manual_seed(distributed.rank())  # ranks that draw differently must agree all the same
        decoder = Decoder(model, 2, Sampling(temperature=1.0 if mode == "sampled" else 0), mode in ("compiled", "one_shot"))
        decoder.prepare()
        with torch.inference_mode():
            prompts = [torch.tensor(ids, device=device) for ids in PROMPTS]
            first = torch.stack([prefill(model, ids, 1, row=row) for row, ids in enumerate(prompts)])
        rows = decode(decoder, first.argmax(-1), torch.tensor([len(ids) for ids in PROMPTS], device=device), STEPS)
        results[f"{mode} tokens"] = torch.tensor(list(rows)).T.contiguous()
        results[f"{mode} prefill"], results[f"{mode} logits"] = first, decoder.logits.contiguous()
    return {name: tensor.cpu() for name, tensor in results.items()}


def converse(folder: Path) -> str:
    """Stdout of an --interactive session, in which rank 0 alone has somebody at the keyboard."""
    sys.argv = ["generate.py", "--checkpoint_path", str(folder), "--device", "cpu", "--interactive", "--temperature", "0",
                "--max_new_tokens", "8", "--ignore_eos"]
    sys.stdin = io.StringIO("\n".join(TURNS) + "\n" if distributed.rank() == 0 else "")
    out = io.StringIO()
    with contextlib.redirect_stdout(out):
        generate.main()
    return out.getvalue()


def work(folder: Path) -> None:
    for name in MODELS:
        save_file(compute(folder / name, MODES_OF.get(name, MODES[:2])), folder / f"{name}-{distributed.rank()}.safetensors")
    (folder / f"chat-{distributed.rank()}.txt").write_text(converse(folder / "llama"))
    print("done")


def gpu(folder: Path) -> None:
    tensors = compute(folder / "qwen2", (*MODES, "compiled", "one_shot"), "cuda")
    save_file(tensors, folder / f"gpu-{distributed.rank()}.safetensors")


def fail() -> None:
    if distributed.rank() == 1:
        raise UserError("this rank has run out of luck")
    distributed.all_min(0)


# ----------------------------------------------------------------------------------------------------------------- tests

def torchrun(*command: object, ranks: int = 2) -> subprocess.CompletedProcess:
    """`command` in two processes, as a user starts it."""
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(ranks)]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "TORCHINDUCTOR_COMPILE_THREADS": "1"}
    return subprocess.run([*launcher, *map(str, command)], cwd=ROOT, env=environment, capture_output=True, text=True,
                          errors="replace", timeout=300)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory, tiny_checkpoint: Path) -> Path:
    """Models with signatures, and what two ranks computed of them."""
    transformers = pytest.importorskip("transformers")
    folder = tmp_path_factory.mktemp("tp")
    shutil.copytree(tiny_checkpoint, folder / "llama")  # signatures are written beside it
    torch.manual_seed(0)
    sizes = dict(hidden_size=48, intermediate_size=72, num_hidden_layers=2, num_attention_heads=6, num_key_value_heads=2,
                 vocab_size=101, max_position_embeddings=512, initializer_range=0.3)
    for kind, config in {"qwen2": transformers.Qwen2Config(**sizes, head_dim=64, tie_word_embeddings=True),
                         "llama-biased": transformers.LlamaConfig(**sizes, attention_bias=True),
                         "mistral": transformers.MistralConfig(**sizes, sliding_window=None),
                         "qwen3": transformers.Qwen3Config(**sizes, head_dim=16)}.items():
        model = transformers.AutoModelForCausalLM.from_config(config)
        for name, parameter in model.named_parameters():
            if name.endswith(("bias", "q_norm.weight", "k_norm.weight")):
                parameter.data.normal_(mean=name.endswith("weight"))
        model.save_pretrained(folder / kind)
    for name in MODELS:
        hash_config = HashConfig(bits=64, share="query") if name == "qwen2" else HashConfig()
        whole = load_model(folder / name, "cpu", torch.float32).fingerprint()
        save_signatures(folder / name / "signatures.safetensors", random_encoders(hash_config, whole), whole, {})
    ran = torchrun(__file__, "work", folder)
    assert ran.returncode == 0, ran.stderr
    assert ran.stdout == "done\n"
    return folder


@pytest.fixture(scope="module")
def ranks(folder: Path) -> dict[str, list[dict[str, Tensor]]]:
    return {name: [load_file(folder / f"{name}-{rank}.safetensors") for rank in range(2)] for name in MODELS}


@pytest.fixture(scope="module")
def alone(folder: Path) -> dict[str, dict[str, Tensor]]:
    return {name: compute(folder / name, MODES if name in MODES_OF else MODES[:2]) for name in MODELS}


@pytest.mark.parametrize(("name", "mode"), [(name, mode) for name in MODELS for mode in MODES_OF.get(name, MODES[:2])
                                            if mode != "compiled"])
def test_two_ranks_compute_what_one_does(name: str, mode: str, ranks: dict, alone: dict) -> None:
    first, second = ranks[name]
    for what in ("tokens", "prefill", "logits"):
        assert torch.equal(first[f"{mode} {what}"], second[f"{mode} {what}"])
    torch.testing.assert_close(first[f"{mode} prefill"], alone[name][f"{mode} prefill"], rtol=1e-4, atol=1e-4)
    if mode != "sampled":
        assert torch.equal(first[f"{mode} tokens"], alone[name][f"{mode} tokens"])
        torch.testing.assert_close(first[f"{mode} logits"], alone[name][f"{mode} logits"], rtol=1e-4, atol=1e-4)


def test_the_compiled_block_holds_the_collectives(ranks: dict, alone: dict) -> None:
    """As one graph: the decoder compiles with fullgraph=True."""
    for rank in ranks["qwen2"]:
        assert torch.equal(rank["compiled tokens"], alone["qwen2"]["hash tokens"])
        torch.testing.assert_close(rank["compiled logits"], alone["qwen2"]["hash logits"], rtol=1e-4, atol=1e-4)


@pytest.mark.gpu
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
def test_captured_steps_on_two_gpus(folder: Path) -> None:
    ran = torchrun(__file__, "gpu", folder)
    assert ran.returncode == 0, ran.stderr
    first, second = (load_file(folder / f"gpu-{rank}.safetensors") for rank in range(2))
    alone = compute(folder / "qwen2", MODES, "cuda")
    for mode, same in {"dense": "dense", "hash": "hash", "compiled": "hash", "one_shot": "hash"}.items():
        assert torch.equal(first[f"{mode} tokens"], alone[f"{same} tokens"])
        torch.testing.assert_close(first[f"{mode} logits"], alone[f"{same} logits"], rtol=1e-3, atol=1e-3)
    for key in (key for key in first if key.endswith(("tokens", "logits"))):
        assert torch.equal(first[key], second[key])


def test_the_runs_differ_where_they_should(alone: dict) -> None:
    """Or the comparisons above would show little."""
    for results in alone.values():
        assert len(set(results["dense tokens"].flatten().tolist())) > 5
        assert not torch.equal(results["dense tokens"], results["hash tokens"])
        assert not torch.equal(results.get("sampled tokens", results["dense tokens"]), results["hash tokens"])


@pytest.mark.parametrize("name", MODELS)
def test_shards_make_up_the_tensors(name: str, ranks: dict, alone: dict) -> None:
    widths = [heads * HEAD_DIMS[name] for heads in ((4, 2, 2) if name == "llama" else (6, 2, 2))]  # of q, k and v
    vocab_size = 259 if name == "llama" else 101
    parameters = [{key.replace(".layer.", "."): value for key, value in rank.items() if key.startswith("parameter ")}
                  for rank in ranks[name]]  # a row-parallel layer wraps a plain one
    whole = {key: value for key, value in alone[name].items() if key.startswith("parameter ")}
    assert parameters[0].keys() == parameters[1].keys() == whole.keys()
    for key, expected in whole.items():
        parts = [rank[key] for rank in parameters]
        if "wqkv" in key:
            pieces = zip(*(part.split([width // 2 for width in widths]) for part in parts), strict=True)
            made = torch.cat([torch.cat(pair) for pair in pieces])
        elif "w13" in key:
            made = torch.cat([torch.cat(pair) for pair in zip(*(part.chunk(2) for part in parts), strict=True)])
        elif "wo.bias" in key:  # one rank's, or the sum would hold it twice
            made = parts[0]
            assert not parts[1].any()
        elif "wo." in key or "w2." in key:
            made = torch.cat(parts, dim=1)
        elif "norm" in key:
            assert torch.equal(*parts)
            made = parts[0]
        else:
            made = torch.cat(parts)
            assert len(made) == vocab_size + 1 and not made[vocab_size:].any()  # odd: one row of padding
            made = made[:vocab_size]
        assert torch.equal(made, expected), key


def test_a_chat_is_read_by_one_rank(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", sys.argv)
    monkeypatch.setattr(sys, "stdin", sys.stdin)
    expected = converse(folder / "llama")
    assert expected.count("\n> ") == 3 and len(expected) > 20
    # the other rank is silent by its stdout; here that is a file, to see that it said the same but for the question
    said = [(folder / f"chat-{rank}.txt").read_text() for rank in range(2)]
    assert said[0] == expected and said[1] == expected.replace("\n> ", "")


@pytest.mark.parametrize("config", [HashConfig(), HashConfig(query_bits=1, depth=3, share="query")])
def test_a_ranks_encoder_is_that_of_its_heads(config: HashConfig) -> None:
    torch.manual_seed(0)
    whole = HashEncoder(config, 12, 4, 16)
    for parameter in whole.parameters():
        parameter.normal_()
    k, q = torch.randn(2, 4, 5, 16), torch.randn(2, 12, 16)
    parts = [tensor_parallel.shard_encoder(whole, rank, 2) for rank in range(2)]
    made = torch.cat([part.encode_keys(keys) for part, keys in zip(parts, k.chunk(2, dim=1), strict=True)], dim=1)
    assert torch.equal(made, whole.encode_keys(k))
    made = torch.cat([part.encode_queries(queries) for part, queries in zip(parts, q.chunk(2, dim=1), strict=True)], dim=1)
    assert torch.equal(made, whole.encode_queries(q))
    assert parts[0].shift == whole.shift


def test_what_cannot_be_shared_is_refused() -> None:
    args = ModelArgs(2, 32, 16, 4, 8, 24, 100, 1e-5, 1e4)
    part = tensor_parallel.shard_args(args, 4)
    assert (part.n_head, part.n_kv_head, part.intermediate_size, part.vocab_size, part.vocab_rows) == (4, 1, 6, 100, 25)
    assert tensor_parallel.shard_args(args, 1) == args
    for ranks in (3, 8):
        with pytest.raises(UserError, match=f"{ranks} ranks cannot share 4 KV heads .* start 1 or 2 or 4 "):
            tensor_parallel.shard_args(args, ranks)
    for preset in ("llama-3.1-8b", "llama-3.1-70b"):
        assert all(tensor_parallel.shard_args(PRESETS[preset], n).ranks == n for n in (1, 2, 4, 8))


def test_quantised_weights_are_refused(tiny_checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    quantize_folder(tiny_checkpoint, tmp_path / "int8", "cpu")
    monkeypatch.setattr(distributed, "world_size", lambda: 2)
    for load in (lambda: load_model(tmp_path / "int8"), lambda: random_model("llama-3.1-70b", quantization="int8")):
        with pytest.raises(UserError, match="^int8 weights are not shared out over 2 ranks; "):
            load()


def test_the_last_rank_may_have_no_tokens(tmp_path: Path) -> None:
    """Of 5 rows, four ranks have 2, 2, 1 and 0."""
    from safetensors import safe_open
    whole = torch.randn(5, 3)
    save_file({"table": whole}, tmp_path / "t.safetensors")
    with safe_open(tmp_path / "t.safetensors", framework="pt") as tensors:
        parts = [torch.full((2, 3), float("nan")) for _ in range(4)]
        for rank, part in enumerate(parts):
            tensor_parallel.read_part(tensors, "table", part, rank)
    assert torch.equal(torch.cat(parts), torch.cat([whole, torch.zeros(3, 3)]))


# ---------------------------------------------------------------------------------------------------------- command line

def test_the_command_line_speaks_once(tmp_path: Path, folder: Path, command: Callable) -> None:
    prompts = tmp_path / "prompts.jsonl"
    prompts.write_text("".join(json.dumps({"ids": ids}) + "\n" for ids in PROMPTS))
    flags = ["--checkpoint_path", folder / "llama", "--prompts", prompts, "--max_new_tokens", 12, "--temperature", 0, "--json",
             "--attention", "hash", "--signatures", folder / "llama" / "signatures.safetensors", "--budget", 16, "--sink", 4,
             "--recent", 4, "--sparse_tail", 5, "--ignore_eos", "--max_seq_length", "auto", "--prefill", "hash",
             "--prefill_sparsity", 4, "--prefill_chunk", 8, "--prefill_tail", 2]
    expected = command(*flags)
    ran = torchrun("generate.py", "--device", "cpu", *flags, "--save", tmp_path / "saved.json")
    assert ran.returncode == 0, ran.stderr
    result = json.loads(ran.stdout.splitlines()[-1])
    assert ran.stdout.splitlines()[:-1] == expected.out.splitlines()[:-1]
    assert result["new_tokens"] == expected.tokens and result["ranks"] == 2
    assert result["kv_bytes"] * 2 == expected.json["kv_bytes"]  # of each rank
    assert result["signature_bytes"] * 2 == expected.json["signature_bytes"]
    assert json.loads((tmp_path / "saved.json").read_text())["new_tokens"] == expected.tokens
    assert [path.name for path in tmp_path.glob("*saved*")] == ["saved.json"]
    assert ran.stderr.count("memory plan of each of 2 ranks") == 1 and ran.stderr.count("prefill:") == 1


def test_a_mistake_is_one_line_for_all(folder: Path) -> None:
    ran = torchrun("generate.py", "--device", "cpu", "--random_weights", "qwen2.5-coder-1.5b", "--prompt_ids", "1", ranks=3)
    errors = [line for line in ran.stderr.splitlines() if line.startswith("error: ")]
    assert ran.returncode != 0 and ran.stdout == ""
    assert errors == ["error: 3 ranks cannot share 2 KV heads and an intermediate size of 8960 evenly; "
                      "start 1 or 2 (torchrun --nproc_per_node)"]
    assert ran.stderr.count("exitcode  : 2") == 3 or "exitcode  : -15" in ran.stderr  # torchrun may end the silent ones


def test_a_rank_that_fails_alone_is_heard_and_ends_all() -> None:
    ran = torchrun(__file__, "fail")
    assert ran.returncode != 0 and "rank 1 failed\nerror: this rank has run out of luck\n" in ran.stderr


if __name__ == "__main__":
    part = {"work": work, "gpu": gpu, "fail": fail}[sys.argv[1]]
    distributed.run_ranks(functools.partial(part, *map(Path, sys.argv[2:])))
