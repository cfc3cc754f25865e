"""Generate text: load, prefill the prompt, decode with dense or hash attention, stream, report.

    python generate.py --checkpoint_path checkpoints/smollm2-135m-instruct --prompt "Once upon a time" --compile
    python generate.py --checkpoint_path ... --prompt_file book.txt --chat --attention hash --sparsity 16 --signatures FILE
    python generate.py --checkpoint_path ... --prompts questions.jsonl --max_seq_length auto --json
    python generate.py --checkpoint_path ... --prompt_file book.txt --speculate self --sparsity 32 --signatures FILE --compile
"""
import argparse
import contextlib
import hashlib
import json
import math
import resource
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from hashfast.common import (
    Parser,
    UserError,
    atomic_path,
    can_compile,
    check_device,
    check_writable,
    default_device,
    environment,
)
from hashfast.hash_attention import HashConfig
from hashfast.model import SparseSettings, Transformer
from hashfast.ops.quant_linear import Quantization
from hashfast.research.budgets import calibrated
from hashfast.runtime import distributed, speculate, tensor_parallel
from hashfast.runtime.checkpoint import PRESETS, load_model, random_model
from hashfast.runtime.decode import PREFILL_CHUNK, Decoder, decode_all, prefill, prepare_prefill, synchronize
from hashfast.runtime.memory import bytes_per_step, cache_bytes_per_token, prefill_bytes, tokens_read, weight_bytes
from hashfast.runtime.prompts import Display, NewText, read_lines, read_prompts, read_tokenizer
from hashfast.runtime.sampling import Sampling, sample
from hashfast.runtime.signatures import load_signatures, random_encoders
from hashfast.runtime.speculate import Speculator
from hashfast.runtime.tokenizer import Tokenizer

LARGEST = 2 ** 24  # of counts on the command line: beyond any model's context, and safe in int32


# ------------------------------------------------------------------------------------------------------------------- run

@dataclass
class Sample:
    """One run over a batch: new tokens per sequence (end tokens included) and its times in seconds."""
    tokens: list[list[int]]
    prefill_s: float
    decode_s: float
    steps: int


class Session:
    """A loaded model with caches and a decode step; runs prompts through it.

    draft: a smaller model that speculates; settings and encoders are its own then.
    """

    def __init__(self, options: argparse.Namespace, model: Transformer, tokenizer: Tokenizer | None, length: int,
                 settings: SparseSettings | None, encoders: list | None, draft: Transformer | None = None) -> None:
        self.options, self.model, self.tokenizer, self.length, self.settings = options, model, tokenizer, length, settings
        drafter, rows = draft or model, length + (options.speculate_k or 0)
        if distributed.world_size() > 1 and options.device == "cuda":
            tokens = options.batch_size * (1 + (options.speculate_k or 0))
            distributed.use_one_shot(tokens * model.args.dim, model.norm.weight.dtype)
        if draft is not None:
            model.setup_caches(options.batch_size, rows)
        drafter.setup_caches(options.batch_size, rows, encoders, settings)
        self.sampling = Sampling(options.temperature, options.top_k)
        self.stop_ids = frozenset() if options.ignore_eos or tokenizer is None else tokenizer.stop_ids
        self.decoder = Decoder(model, options.batch_size, self.sampling, options.compile, self.stop_ids)
        self.speculator: Speculator | None = None
        self.compile_s = 0.0
        if options.speculate is not None:
            self.speculator = Speculator(self.decoder, drafter, options.speculate_k, settings, options.compile)
            self.compile_s += self.speculator.prepare()
        if self.speculator is None or options.save or options.compare:  # teacher forcing goes step by step
            self.compile_s += self.decoder.prepare()
        # a GPU reads long prompts faster so; elsewhere compiling takes longer than it saves
        pays = options.compile and options.device.startswith("cuda") and length > options.prefill_chunk
        if options.compile_prefill or pays:
            self.compile_s += prepare_prefill(model, options.prefill_chunk)
        self.cached: list[int] = []  # tokens in the cache, for prompts that go on from it

    def first_token(self, prompts: list[list[int]]) -> Tensor:
        """Put prompts into the cache, one for all sequences or one for each -> the first new token of each, int64 [B].

        What the cache already holds of a single one is kept. The last `sparse_tail` tokens go through decode steps.
        """
        options, device = self.options, self.decoder.token.device
        cached = self.cached if len(prompts) == 1 else []
        same = [old == new for old, new in zip(cached, prompts[0][:-1], strict=False)]
        kept = [*same, False].index(False)
        tails = [min(options.sparse_tail, len(ids) - kept - 1) for ids in prompts]
        logits = torch.stack([
            prefill(self.model, torch.tensor(ids[kept:len(ids) - tail], device=device), options.batch_size // len(prompts),
                    kept, chunk=options.prefill_chunk, row=row)
            for row, (ids, tail) in enumerate(zip(prompts, tails, strict=True))])
        if self.speculator is not None:
            self.speculator.read_prompts(prompts, kept, options.prefill_chunk)
        self.cached = list(prompts[0]) if len(prompts) == 1 else []
        for back in range(max(tails), 0, -1):
            # a shorter tail waits at its first token, which is written again to the same place
            at = [len(ids) - min(back, max(tail, 1)) for ids, tail in zip(prompts, tails, strict=True)]
            tokens = torch.tensor([ids[i] for ids, i in zip(prompts, at, strict=True)], device=device)
            self.decoder.start(tokens.expand(options.batch_size), torch.tensor(at, device=device))
            self.decoder.step()
            logits = self.decoder.logits
        return sample(logits.expand(options.batch_size, -1), self.sampling)

    def run(self, ids: list[int], emit: Callable[[int], None]) -> Sample:
        """Prefill and decode one prompt, handing the first sequence's new tokens to `emit` as they come."""
        return self.run_batch([ids], lambda row, token, last: emit(token) if row == 0 else None)

    def run_batch(self, prompts: list[list[int]], emit: Callable[[int, int, bool], None]) -> Sample:
        """Prefill and decode one prompt for all sequences or one for each; `emit` as in decode_all."""
        synchronize(self.options.device)
        started = time.perf_counter()
        first = self.first_token(prompts)
        synchronize(self.options.device)
        prefilled = time.perf_counter()
        lengths = torch.tensor([len(ids) for ids in prompts], device=first.device)
        count = min(self.options.max_new_tokens, self.length - max(map(len, prompts)))
        if self.speculator is not None:
            tokens, steps = self.speculator.decode_all(prompts, first, count, emit)
        else:
            tokens, steps = decode_all(self.decoder, first, lengths, count, self.stop_ids, emit)
        if len(prompts) == 1:
            self.cached = prompts[0] + tokens[0][:-1]  # the newest token has no K and V yet
        return Sample(tokens, prefilled - started, time.perf_counter() - prefilled, steps)

    @torch.inference_mode()
    def teacher_force(self, ids: list[int], tokens: list[int]) -> tuple[float, float]:
        """Decode given tokens after the prompt in the cache -> (share that is this run's argmax, mean log-likelihood).

        The first token comes from the prompt's last logits, not from a decode step, and is not counted.
        """
        agree, total = 0, 0.0
        for i, (token, following) in enumerate(zip(tokens, tokens[1:], strict=False)):
            self.decoder.start(torch.full_like(self.decoder.token[:, 0], token), len(ids) + i)
            self.decoder.step()
            logprobs = self.decoder.logits[0].float().log_softmax(-1)
            agree += int(logprobs.argmax().item() == following)
            total += logprobs[following].item()
        self.cached = list(ids)
        return agree / (len(tokens) - 1), total / (len(tokens) - 1)


# ---------------------------------------------------------------------------------------------------------------- report

def peak_memory_gib(device: str) -> float:
    """Most memory that this process has held: on the GPU, or resident on the host for a CPU run."""
    if device.startswith("cuda"):
        return torch.cuda.max_memory_allocated() / 2 ** 30
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2 ** 20


def report(session: Session, prompts: list[list[int]], samples: list[Sample], texts: list[str]) -> dict:
    """Everything that a run measured, as --json prints it. What is of each prompt is a list where there are several."""
    options, model = session.options, session.model
    last = samples[-1]
    decode_s = sum(s.decode_s for s in samples)
    steps = sum(s.steps for s in samples)
    models = {model, model if session.speculator is None else session.speculator.draft}
    caches = [layer.attention.cache for each in models for layer in each.layers]
    kv_bytes = sum(c.k.nbytes + c.v.nbytes for c in caches)
    ms = 1000 * decode_s / steps if steps else None
    lengths, hashes = [len(ids) for ids in prompts], [prompt_hash(ids) for ids in prompts]
    length = sum(lengths) / len(prompts) + last.steps // 2
    speculator, settings = session.speculator, session.settings
    read = settings if speculator is None else None  # drafts are verified by dense attention
    moved = bytes_per_step(model, settings, length, options.batch_size) if ms and speculator is None else None
    return {
        "model": options.random_weights or options.checkpoint_path.resolve().name,
        "prompt_tokens": lengths if len(prompts) > 1 else lengths[0],
        "prompt_sha256": hashes if len(prompts) > 1 else hashes[0],
        "new_tokens": [tokens for s in samples for tokens in s.tokens],
        "text": texts,
        "prefill_s": last.prefill_s,
        "prefill_tok_s": sum(lengths) / last.prefill_s,
        "decode_tok_s": sum(len(tokens) - 1 for s in samples for tokens in s.tokens) / decode_s if ms else None,
        "ms_per_token": ms,
        "bandwidth_gb_s": moved / ms / 1e6 if moved else None,
        "compile_s": session.compile_s,
        "peak_memory_gib": peak_memory_gib(options.device),
        "kv_bytes": kv_bytes,
        "signature_bytes": sum(c.signatures.nbytes for c in caches if c.signatures is not None),
        "attention": options.attention,
        "temperature": options.temperature,
        "budget": settings.budget if settings else None,
        "budgets": settings.budgets if settings else None,
        "tokens_read": tokens_read(read, model, length),
        "ranks": model.args.ranks,
        "device": options.device,
        "dtype": options.precision,
        "versions": environment(),
    } | (speculator.report() if speculator is not None else {})


def prompt_hash(ids: list[int]) -> str:
    return hashlib.sha256(" ".join(map(str, ids)).encode()).hexdigest()


def print_summary(result: dict) -> None:
    """The few numbers that a person wants, on stderr so that stdout is the text."""
    rate = f"{result['decode_tok_s']:.1f} tok/s, {result['ms_per_token']:.1f} ms/token" if result["ms_per_token"] else "-"
    tokens = result["prompt_tokens"] if isinstance(result["prompt_tokens"], int) else sum(result["prompt_tokens"])
    print(f"prefill: {tokens} tokens in {result['prefill_s']:.2f} s ({result['prefill_tok_s']:.0f} tok/s)\n"
          f"decode:  {rate}" + (f" ({result['bandwidth_gb_s']:.1f} GB/s)" if result["bandwidth_gb_s"] else "") +
          f", {result['attention']}, {result['tokens_read']:.0f} tokens read per step\n"
          f"memory:  {result['peak_memory_gib']:.2f} GiB at most; K and V {result['kv_bytes'] / 2 ** 20:.1f} MiB, "
          f"signatures {result['signature_bytes'] / 2 ** 20:.1f} MiB; compiled in {result['compile_s']:.1f} s", file=sys.stderr)
    if "speculate" in result:
        speculate.print_report(result)


def comparison_column(result: dict) -> list[str]:
    """One run in the table of --compare. Only the later one has been measured against the other."""
    rate = f"{result['decode_tok_s']:.1f}" if result["decode_tok_s"] else "-"
    name = result.get("speculate", result["attention"])
    return [f"{name:s}", f"{result['prefill_tok_s']:.0f}", rate, f"{result['tokens_read']:.0f}",
            f"{result['peak_memory_gib']:.2f}", f"{result.get('agreement', 1):.3f}", f"{result.get('perplexity_ratio', 1):.3f}"]


def print_comparison(before: dict, now: dict) -> None:
    """A small table of an earlier run beside this one."""
    names = ["", "prefill tok/s", "decode tok/s", "tokens read per step", "peak memory GiB", "same argmax (teacher-forced)",
             "perplexity ratio"]
    print(f"\n{now['prompt_tokens']} prompt tokens, {len(before['new_tokens'][0])} new ones, {now['device']}, {now['dtype']}")
    for row in zip(names, comparison_column(before), comparison_column(now), strict=True):
        print("{:30}{:>10}{:>10}".format(*row))


# --------------------------------------------------------------------------------------------------------------- command

def int_or_str(text: str) -> int | str:
    try:
        return int(text)
    except ValueError:
        return text


def parse_options(argv: list[str] | None = None) -> argparse.Namespace:
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--checkpoint_path", type=Path, help="folder with config.json, safetensors and the tokenizer")
    add("--random_weights", metavar="PRESET", help=f"no checkpoint, random weights, for latency: {', '.join(PRESETS)}")
    add("--quantize", choices=("int8", "int4"), help="of --random_weights; quantize.py is for checkpoints")
    prompts = parser.add_mutually_exclusive_group()
    prompts.add_argument("--prompt", type=int_or_str, default="Hello, my name is", help="text, or how many random tokens")
    prompts.add_argument("--prompt_file", type=Path, help="a text file")
    prompts.add_argument("--prompt_ids", help="token ids: 1,2,3 (needs no tokenizer)")
    prompts.add_argument("--prompts", type=Path, help="a batch: one JSON object a line with prompt (text), messages or ids")
    add("--chat", action="store_true", help="wrap the prompt in the model's chat template")
    add("--interactive", action="store_true", help="chat in turns; the cache is kept between them")
    add("--num_samples", type=int, default=1)
    add("--max_new_tokens", type=int, default=200)
    add("--batch_size", type=int, help="sequences decoded together from one prompt (default 1); with --prompts its lines")
    add("--top_k", type=int, default=200)
    add("--temperature", type=float, default=0.8, help="0 is greedy")
    add("--seed", type=int, default=1234)
    add("--ignore_eos", action="store_true", help="go on after an end token")
    add("--max_seq_length", type=int_or_str, help="cache length, or auto: what fits; default: prompt + new tokens")
    add("--prefill_chunk", type=int, help="prompt tokens read at a time (default: 4096 on a GPU, 2048 on a CPU)")
    add("--attention", choices=("dense", "hash"), default="dense")
    add("--signatures", type=Path, help="file that train_hash.py wrote")
    sizes = parser.add_mutually_exclusive_group()
    sizes.add_argument("--budget", type=int, help="tokens attended per KV head (default 2048)")
    sizes.add_argument("--sparsity", type=float, help="budget = 1/SPARSITY of prompt and new tokens, in steps of 64")
    add("--budgets", choices=("even", "calibrated"), default="even",
        help="the same for every layer and head, or of the same mean as --signatures were calibrated (default: even)")
    add("--sink", type=int, default=64, help="first tokens, always attended")
    add("--recent", type=int, default=128, help="last tokens, always attended")
    add("--dense_layers", type=int, default=0, help="first layers that stay dense")
    add("--sparse_tail", type=int, default=0, help="last prompt tokens that are decoded sparsely too")
    speculate.add_options(add)
    add("--compile", action="store_true")
    add("--compile_prefill", action="store_true", help="compile prefill too; for long prompts on a GPU --compile does")
    add("--precision", choices=("float32", "bfloat16"), help="default: bfloat16 on a GPU, float32 on a CPU")
    add("--device", default=default_device())
    add("--profile", type=Path, help="write a Chrome trace of the last sample here")
    add("--json", action="store_true", help="the last line of stdout is one JSON object")
    add("--save", type=Path, help="write that object to a file")
    add("--compare", type=Path, help="a --save file of the same prompt: teacher-force its tokens, print a table")
    add("--no_stream", action="store_true", help="print the texts when all are done; with --json only there")
    return check_options(parser.parse_args(argv))


def check_options(options: argparse.Namespace) -> argparse.Namespace:
    """Refuse flags out of range or at odds with each other; fill in what depends on the device."""
    ranges = {"seed": (0, 2 ** 63 - 1), "temperature": (0, 1e3), "sparsity": (1, 1e9), "prompt": (1, LARGEST)}
    counts = ("num_samples", "max_new_tokens", "batch_size", "top_k", "max_seq_length", "prefill_chunk", "budget")
    ranges |= dict.fromkeys(counts, (1, LARGEST))
    ranges["speculate_k"] = (1, speculate.LARGEST_K)
    ranges |= dict.fromkeys(("sink", "recent", "dense_layers", "sparse_tail"), (0, LARGEST))
    for flag, (low, high) in ranges.items():
        value = getattr(options, flag)
        if isinstance(value, int | float) and not low <= value <= high:
            raise UserError(f"--{flag} {value} is out of range; it must be from {low} to {high}")

    for flag in ("save", "profile"):
        check_writable(f"--{flag}", getattr(options, flag))
    if (options.checkpoint_path is None) == (options.random_weights is None):
        raise UserError("give either --checkpoint_path FOLDER or --random_weights PRESET")
    if options.quantize is not None and options.random_weights is None:
        raise UserError("--quantize is for --random_weights; make a quantised folder with quantize.py and load that")
    if isinstance(options.max_seq_length, str) and options.max_seq_length != "auto":
        raise UserError(f"--max_seq_length {options.max_seq_length} is neither a number nor auto")
    options.lines = read_lines(options.prompts) if options.prompts is not None else []
    options.has_text = options.prompt_file is not None or (options.prompt_ids is None and isinstance(options.prompt, str))
    if options.lines:
        options.has_text = not all(isinstance(line[0], int) for line in options.lines)
    if options.random_weights is not None and options.has_text:
        raise UserError("random weights have no tokenizer; give --prompt NUMBER or --prompt_ids 1,2,3")
    speculate.check_options(options)
    is_hash = "hash" in (options.attention, options.draft_attention) or options.speculate == "self"
    clashes = [
        (not options.has_text, "a prompt of token ids is no chat", ("chat", "interactive")),
        (options.interactive, "--interactive shows a chat alone", ("prompt_file", "prompts", "profile", "json", "save")),
        (options.interactive or options.lines, "--compare repeats a single prompt", ("compare",)),
        (not is_hash, "--attention is dense, which reads all tokens", ("signatures", "budget", "sparsity")),
    ]
    for clash, reason, flags in clashes:
        for flag in flags:
            if clash and getattr(options, flag) not in (None, False):
                raise UserError(f"{reason}; leave --{flag} out")
    if options.lines and options.batch_size not in (None, len(options.lines)):
        raise UserError(f"{options.prompts} has {len(options.lines)} prompts; leave --batch_size {options.batch_size} out")
    options.batch_size = options.batch_size or max(len(options.lines), 1)
    if options.interactive and (options.batch_size > 1 or options.num_samples > 1):
        raise UserError("--interactive serves one sequence; leave --batch_size and --num_samples out")
    if options.budgets == "calibrated" and options.signatures is None:
        raise UserError("--budgets calibrated needs --attention hash and --signatures FILE, which holds the calibration")
    least, budget = options.sink + options.recent, options.budget or 2048
    if is_hash and options.sparsity is None and budget < least:
        raise UserError(f"--budget {budget} is less than --sink {options.sink} plus --recent {options.recent}; "
                        f"give at least {least}")
    options.is_hash = is_hash
    check_device(options.device)
    distributed.check_device(options.device)
    if options.precision is None:
        options.precision = "bfloat16" if options.device.startswith("cuda") else "float32"
    options.prefill_chunk = options.prefill_chunk or PREFILL_CHUNK[torch.device(options.device).type]
    if (options.compile or options.compile_prefill) and not can_compile(options.device):
        options.compile = options.compile_prefill = False
    return options


def cache_length(options: argparse.Namespace, model: Transformer, prompt_tokens: int) -> int:
    """Tokens that the cache must hold (auto: at most), checked against the flags and the model."""
    limit = min(model.args.max_position, model.args.sliding_window or model.args.max_position)
    needed = prompt_tokens + options.max_new_tokens
    length = options.max_seq_length or (limit if options.interactive else needed)
    if length == "auto":
        length = max(limit, needed)
    if needed > length:
        raise UserError(f"{prompt_tokens} prompt and {options.max_new_tokens} new tokens do not fit --max_seq_length {length}; "
                        f"give --max_seq_length {needed}, a shorter prompt or fewer --max_new_tokens")
    if options.checkpoint_path is not None and length > limit:
        raise UserError(f"{length} tokens are more than the model's {limit} (max_position_embeddings or sliding_window in "
                        "config.json); shorten the prompt, --max_new_tokens or --max_seq_length")
    return length


def sparse_settings(options: argparse.Namespace, length: int, tokens: int) -> SparseSettings:
    """Resolve --budget or --sparsity for prompt and new tokens together (`tokens`) and a cache of `length`."""
    budget = options.budget or 2048
    if options.sparsity is not None:
        budget = max(64 * math.ceil(tokens / options.sparsity / 64), options.sink + options.recent + 64)
    return SparseSettings(min(budget, length), options.sink, options.recent, options.dense_layers)


def load_encoders(options: argparse.Namespace, model: Transformer) -> tuple[list, dict]:
    """-> the encoder of each layer, and what their file says of them."""
    if options.signatures is not None:
        encoders, about = load_signatures(options.signatures, model.fingerprint())
        return tensor_parallel.shard_encoders(encoders), about
    print("warning: no --signatures file, so random projections choose the tokens; train one with train_hash.py",
          file=sys.stderr)
    return tensor_parallel.shard_encoders(random_encoders(HashConfig(), model.fingerprint(), options.seed)), {}


def plan_memory(options: argparse.Namespace, models: list[Transformer], length: int, needed: int,
                encoders: list | None) -> int:
    """Print what weights and caches of `length` tokens take, or refuse, before they are allocated -> the caches' length.

    With --max_seq_length auto that is as much of `length` as fits, `needed` at least.
    """
    batch = options.batch_size
    row = sum(cache_bytes_per_token(model, None, batch)[0] for model in models)
    signature_row = cache_bytes_per_token(models[-1], encoders, batch, options.dense_layers)[1]
    # a large prefill chunk takes more than free_memory leaves
    chunk = max(prefill_bytes(model, min(options.prefill_chunk, length)) for model in models)
    free = distributed.all_min(free_memory(options.device) - max(0, chunk - 2 ** 30))
    fits = max(free // (row + signature_row) - (options.speculate_k or 0), 0)  # drafts need rows past the last token
    if options.max_seq_length == "auto":
        length = max(needed, min(length, fits))
    if length > fits:
        raise UserError(f"the caches for {batch} x {length} tokens take {(row + signature_row) * length / 2 ** 30:.1f} GiB, "
                        f"{free / 2 ** 30:.1f} GiB are free for them, and at most {fits} tokens fit; "
                        "shorten the prompt, --max_new_tokens or --max_seq_length, or use a smaller --batch_size")
    each = f" of each of {distributed.world_size()} ranks" if distributed.world_size() > 1 else ""
    print(f"memory plan{each}: weights {sum(map(weight_bytes, models)) / 2 ** 30:.2f} GiB, "
          f"K and V {row * length / 2 ** 30:.2f} GiB, signatures "
          f"{signature_row * length / 2 ** 20:.1f} MiB for {f'{batch} x ' if batch > 1 else ''}{length} tokens, "
          f"work {chunk / 2 ** 30:.2f} GiB at most; up to {fits} tokens fit", file=sys.stderr)
    return length


def free_memory(device: str) -> int:
    """Bytes free for caches on the device: a tenth, 1 GiB at most, is left to what a prefill chunk and a step work with."""
    free = sys.maxsize
    if device.startswith("cuda"):
        free = torch.cuda.mem_get_info()[0]
    else:
        for line in Path("/proc/meminfo").read_text().splitlines():
            if line.startswith("MemAvailable"):
                free = int(line.split()[1]) * 1024 // distributed.world_size()  # the ranks share it
    return free - min(free // 10, 2 ** 30)


def read_comparison(options: argparse.Namespace, ids: list[int], vocab_size: int) -> dict:
    """The run in the --compare file, after checks that it can be repeated here."""
    path = options.compare
    try:
        before = json.loads(path.read_text(encoding="utf-8"))
        comparison_column(before)
        tokens = before["new_tokens"][0]
        same = before["prompt_sha256"] == prompt_hash(ids) and all(0 <= token < vocab_size for token in tokens)
        if len(tokens) > 1:
            math.exp(before["log_likelihood"])
    except (OSError, ValueError, LookupError, TypeError, AttributeError, OverflowError) as error:
        reason = f"{type(error).__name__}: {error}"
        raise UserError(f"cannot use --compare {path} ({reason}); give a file that --save wrote") from error
    if before.get("temperature") != 0:
        raise UserError(f"--compare {path} was sampled, so its tokens are not that run's choices; save one of --temperature 0")
    if not same:
        raise UserError(f"--compare {path} is of another prompt or model; run both with the same")
    if not 2 <= len(tokens) <= options.max_new_tokens:
        raise UserError(f"--compare {path} has {len(tokens)} new tokens; save 2 or more and give that --max_new_tokens here")
    return before


def read_turn() -> str:
    try:
        return input("\n> ")
    except EOFError:
        return ""


def chat(session: Session) -> None:
    """Turns on the terminal until an empty line; only what is new of a turn is prefilled."""
    messages: list[dict] = []
    while True:
        turn = distributed.on_first(read_turn)
        if not turn.strip():
            return
        messages.append({"role": "user", "content": turn})
        ids = session.tokenizer.encode_chat(messages)
        left = session.length - len(ids)
        if left <= 0:
            raise UserError(f"the conversation of {len(ids)} tokens has filled the cache of {session.length}; "
                            "start again with a larger --max_seq_length")
        if left < session.options.max_new_tokens:
            print(f"note: {left} of {session.length} tokens are left; the conversation ends with them", file=sys.stderr)
        stream = NewText(session.tokenizer, [])
        answer = session.run(ids, stream.show)
        print(stream.end())
        messages.append({"role": "assistant", "content": NewText(session.tokenizer, []).whole(answer.tokens[0])})


def main() -> None:
    options = parse_options()
    torch.manual_seed(options.seed)
    dtype = getattr(torch, options.precision)
    if options.random_weights is not None:
        quantization = Quantization(options.quantize) if options.quantize else None
        model = random_model(options.random_weights, options.device, dtype, options.seed, quantization)
    else:
        model = load_model(options.checkpoint_path, options.device, dtype)
    tokenizer = read_tokenizer(options)
    read = [] if options.interactive else read_prompts(options, tokenizer, model.args.vocab_size)
    prompts = [ids for ids, _ in read]
    longest = max(map(len, prompts), default=0)
    length = cache_length(options, model, longest)
    before = read_comparison(options, prompts[0], model.args.vocab_size) if options.compare else None
    draft = speculate.load_draft(options, model, tokenizer, length) if options.speculate == "draft" else None
    encoders, about = load_encoders(options, draft or model) if options.is_hash else (None, {})
    models = [model, draft] if draft is not None else [model]
    length = plan_memory(options, models, length, longest + options.max_new_tokens, encoders)
    tokens = length if options.interactive else longest + options.max_new_tokens
    rows = length + (options.speculate_k or 0)  # of the caches, as Session makes them
    settings = sparse_settings(options, rows, tokens) if encoders is not None else None
    if options.budgets == "calibrated":
        settings = tensor_parallel.shard_settings(calibrated(settings, about, tokens, rows))
    session = Session(options, model, tokenizer, length, settings, encoders, draft)
    if options.interactive:
        chat(session)
        return

    contexts = [[] if is_chat else ids for ids, is_chat in read]  # an answer in a chat is a text of its own
    samples: list[Sample] = []
    texts: list[str] = []
    profiler = torch.profiler.profile() if options.profile is not None else contextlib.nullcontext()
    for i in range(options.num_samples):
        session.cached = []  # every sample pays for its own prefill
        show = Display(tokenizer, contexts).put if tokenizer is not None and not options.no_stream else lambda *new: None
        with profiler if i == options.num_samples - 1 else contextlib.nullcontext():
            samples.append(session.run_batch(prompts, show))
        if tokenizer is not None:
            texts += [NewText(tokenizer, contexts[row % len(contexts)]).whole(tokens)
                      for row, tokens in enumerate(samples[-1].tokens)]
    if options.no_stream and not options.json:
        print("\n".join(texts))
    if options.profile is not None and distributed.rank() == 0:
        with atomic_path(options.profile) as beside:
            profiler.export_chrome_trace(str(beside))
    result = report(session, prompts, samples, texts)
    print_summary(result)
    if before is not None:
        agreement, likelihood = session.teacher_force(prompts[0], before["new_tokens"][0])
        result |= {"agreement": agreement, "perplexity_ratio": math.exp(before["log_likelihood"] - likelihood)}
        print_comparison(before, result)
    if options.save is not None:
        tokens = samples[-1].tokens[0]
        saved = result | {"log_likelihood": session.teacher_force(prompts[0], tokens)[1] if len(tokens) > 1 else None}
        if distributed.rank() == 0:
            with atomic_path(options.save) as beside:
                beside.write_text(json.dumps(saved))
    if options.json:
        print(json.dumps(result))


if __name__ == "__main__":
    distributed.run_ranks(main)
