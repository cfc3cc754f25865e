"""Generate text: load, prefill the prompt, decode with dense or hash attention, stream, report.

    python generate.py --checkpoint_path checkpoints/smollm2-135m-instruct --prompt "Once upon a time" --compile
    python generate.py --checkpoint_path ... --prompt_file book.txt --chat --attention hash --sparsity 16 --signatures FILE
"""
import argparse
import contextlib
import functools
import hashlib
import json
import math
import os
import resource
import shutil
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import NoReturn

import torch
from torch import Tensor

from checkpoint import PRESETS, load_model, random_model
from common import UserError, atomic_path, default_device, environment, run_command
from decode import Decoder, Sampling, decode, prefill, sample
from hash_attention import HashConfig, load_signatures, random_encoders
from model import SparseSettings, Transformer, TransformerBlock
from tokenizer import TextStream, Tokenizer

LARGEST = 2 ** 24  # of counts on the command line: beyond any model's context, and safe in int32


# ------------------------------------------------------------------------------------------------------------------- run

@dataclass
class Sample:
    """One run over a batch: new tokens per sequence (end tokens included) and its times in seconds."""
    tokens: list[list[int]]
    prefill_s: float
    decode_s: float
    steps: int


def synchronize(device: str) -> None:
    if device.startswith("cuda"):
        torch.cuda.synchronize()


class Session:
    """A loaded model with caches and a decode step; runs prompts through it."""

    def __init__(self, options: argparse.Namespace, model: Transformer, tokenizer: Tokenizer | None, length: int,
                 settings: SparseSettings | None, encoders: list | None) -> None:
        self.options, self.model, self.tokenizer, self.length = options, model, tokenizer, length
        self.settings = settings
        model.setup_caches(options.batch_size, length, encoders, settings)
        self.sampling = Sampling(options.temperature, options.top_k)
        self.decoder = Decoder(model, options.batch_size, self.sampling, options.compile)
        self.compile_s = self.decoder.prepare()
        if options.compile_prefill:
            self.compile_s += self.prepare_prefill()
        self.cached: list[int] = []  # tokens in the cache, for prompts that go on from it

    def prepare_prefill(self) -> float:
        """Compile prefill but for attention, once for all layers and lengths. Writes the first cache rows. -> seconds."""
        started = time.perf_counter()
        compiled = torch.compile(TransformerBlock.prefill, dynamic=True)
        for layer in self.model.layers:
            layer.attention.prefill = torch.compiler.disable(layer.attention.prefill)  # Dynamo cannot trace its mask
            layer.prefill = functools.partial(compiled, layer)
        prefill(self.model, torch.zeros(min(16, self.length), dtype=torch.int64, device=self.decoder.token.device), 1)
        return time.perf_counter() - started

    def first_token(self, ids: list[int]) -> Tensor:
        """Put a prompt into the cache -> the first new token of every sequence, int64 [B].

        What the cache already holds of it is kept. The last `sparse_tail` tokens go through decode steps.
        """
        kept = 0
        for old, new in zip(self.cached, ids[:-1], strict=False):
            if old != new:
                break
            kept += 1
        tail = min(self.options.sparse_tail, len(ids) - kept - 1)
        device = self.decoder.token.device
        prompt = torch.tensor(ids, dtype=torch.int64, device=device)
        body = len(ids) - tail
        logits = prefill(self.model, prompt[kept:body], self.options.batch_size, kept)
        self.cached = list(ids)
        if tail == 0:
            return sample(logits.expand(self.options.batch_size, -1), self.sampling)
        for i in range(body, len(ids)):
            self.decoder.start(prompt[i].expand(self.options.batch_size), i)
            self.decoder.step()
        return self.decoder.token[:, 0].clone()

    def run(self, ids: list[int], emit: Callable[[int], None]) -> Sample:
        """Prefill and decode one prompt, handing the first sequence's new tokens to `emit` as they come."""
        options, decoder = self.options, self.decoder
        stop_ids = frozenset() if options.ignore_eos or self.tokenizer is None else self.tokenizer.stop_ids
        synchronize(options.device)
        started = time.perf_counter()
        first = self.first_token(ids)
        synchronize(options.device)
        prefilled = time.perf_counter()
        tokens: list[list[int]] = [[] for _ in range(options.batch_size)]
        running = [True] * options.batch_size
        steps = 0
        for row in decode(decoder, first, len(ids), min(options.max_new_tokens, self.length - len(ids))):
            steps += 1
            for i, token in enumerate(row):
                if running[i]:
                    tokens[i].append(token)
                    running[i] = token not in stop_ids
                    if i == 0:
                        emit(token)
            if not any(running):
                break
        synchronize(options.device)
        self.cached = ids + tokens[0][:-1]  # the newest token has no K and V yet
        return Sample(tokens, prefilled - started, time.perf_counter() - prefilled, steps - 1)

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

def tokens_read(settings: SparseSettings | None, model: Transformer, length: int) -> float:
    """Tokens whose K and V one decode step reads, mean over the layers, at a cache of `length` tokens."""
    if settings is None:
        return length
    dense = min(settings.dense_layers, model.args.n_layer) / model.args.n_layer
    return dense * length + (1 - dense) * min(settings.budget, length)


def bytes_per_step(model: Transformer, settings: SparseSettings | None, length: int, batch: int) -> int:
    """Bytes that one decode step must read at a cache of `length`: weights once, K, V and signatures per sequence."""
    args, weight = model.args, model.tok_embeddings.weight
    weights = sum(p.numel() * p.element_size() for p in model.parameters())
    if not args.tie_embeddings:
        weights -= weight.numel() * weight.element_size()  # of the input table a step reads one row
    row = 2 * args.n_kv_head * args.head_dim * weight.element_size()  # K and V of one token, without share="query"
    signatures = 0
    for layer in model.layers:
        encoder = layer.attention.encoder
        if encoder is not None and layer.attention.sparse is not None:
            signatures += encoder.n_signature_head * encoder.config.words * 4 * length
    return int(weights + batch * (args.n_layer * row * tokens_read(settings, model, length) + signatures))


def peak_memory_gib(device: str) -> float:
    """Most memory that this process has held: on the GPU, or resident on the host for a CPU run."""
    if device.startswith("cuda"):
        return torch.cuda.max_memory_allocated() / 2 ** 30
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2 ** 20


def report(session: Session, ids: list[int], samples: list[Sample], texts: list[str]) -> dict:
    """Everything that a run measured, as --json prints it."""
    options, model = session.options, session.model
    last = samples[-1]
    decode_s = sum(s.decode_s for s in samples)
    steps = sum(s.steps for s in samples)
    caches = [layer.attention.cache for layer in model.layers]
    kv_bytes = sum(c.k.nbytes + c.v.nbytes for c in caches)
    ms = 1000 * decode_s / steps if steps else None
    return {
        "prompt_tokens": len(ids),
        "prompt_sha256": prompt_hash(ids),
        "new_tokens": [tokens for s in samples for tokens in s.tokens],
        "text": texts,
        "prefill_s": last.prefill_s,
        "prefill_tok_s": len(ids) / last.prefill_s,
        "decode_tok_s": 1000 * options.batch_size / ms if ms else None,
        "ms_per_token": ms,
        "bandwidth_gb_s": bytes_per_step(model, session.settings, len(ids) + last.steps // 2, options.batch_size) / ms / 1e6
        if ms else None,
        "compile_s": session.compile_s,
        "peak_memory_gib": peak_memory_gib(options.device),
        "kv_bytes": kv_bytes,
        "signature_bytes": sum(c.signatures.nbytes for c in caches if c.signatures is not None),
        "attention": options.attention,
        "budget": session.settings.budget if session.settings else None,
        "tokens_read": tokens_read(session.settings, model, len(ids) + last.steps // 2),
        "device": options.device,
        "dtype": options.precision,
        "versions": environment(),
    }


def prompt_hash(ids: list[int]) -> str:
    return hashlib.sha256(" ".join(map(str, ids)).encode()).hexdigest()


def print_summary(result: dict) -> None:
    """The few numbers that a person wants, on stderr so that stdout is the text."""
    rate = f"{result['decode_tok_s']:.1f} tok/s, {result['ms_per_token']:.1f} ms/token" if result["ms_per_token"] else "-"
    print(f"prefill: {result['prompt_tokens']} tokens in {result['prefill_s']:.2f} s ({result['prefill_tok_s']:.0f} tok/s)\n"
          f"decode:  {rate}" + (f" ({result['bandwidth_gb_s']:.1f} GB/s)" if result["bandwidth_gb_s"] else "") +
          f", {result['attention']}, {result['tokens_read']:.0f} tokens read per step\n"
          f"memory:  {result['peak_memory_gib']:.2f} GiB at most; K and V {result['kv_bytes'] / 2 ** 20:.1f} MiB, "
          f"signatures {result['signature_bytes'] / 2 ** 20:.1f} MiB; compiled in {result['compile_s']:.1f} s", file=sys.stderr)


def comparison_column(result: dict) -> list[str]:
    """One run in the table of --compare. Only the later one has been measured against the other."""
    rate = f"{result['decode_tok_s']:.1f}" if result["decode_tok_s"] else "-"
    return [f"{result['attention']:s}", f"{result['prefill_tok_s']:.0f}", rate, f"{result['tokens_read']:.0f}",
            f"{result['peak_memory_gib']:.2f}", f"{result.get('agreement', 1):.3f}", f"{result.get('perplexity_ratio', 1):.3f}"]


def print_comparison(before: dict, now: dict) -> None:
    """A small table of an earlier run beside this one."""
    names = ["", "prefill tok/s", "decode tok/s", "tokens read per step", "peak memory GiB", "same argmax (teacher-forced)",
             "perplexity ratio"]
    print(f"\n{now['prompt_tokens']} prompt tokens, {len(before['new_tokens'][0])} new ones, {now['device']}, {now['dtype']}")
    for row in zip(names, comparison_column(before), comparison_column(now), strict=True):
        print("{:30}{:>10}{:>10}".format(*row))


# --------------------------------------------------------------------------------------------------------------- command

class Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise UserError(f"{message}; --help lists what there is")


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
    prompts = parser.add_mutually_exclusive_group()
    prompts.add_argument("--prompt", type=int_or_str, default="Hello, my name is", help="text, or how many random tokens")
    prompts.add_argument("--prompt_file", type=Path, help="a text file")
    prompts.add_argument("--prompt_ids", help="token ids: 1,2,3 (needs no tokenizer)")
    add("--chat", action="store_true", help="wrap the prompt in the model's chat template")
    add("--interactive", action="store_true", help="chat in turns; the cache is kept between them")
    add("--num_samples", type=int, default=1)
    add("--max_new_tokens", type=int, default=200)
    add("--batch_size", type=int, default=1, help="sequences decoded together, all from the same prompt")
    add("--top_k", type=int, default=200)
    add("--temperature", type=float, default=0.8, help="0 is greedy")
    add("--seed", type=int, default=1234)
    add("--ignore_eos", action="store_true", help="go on after an end token")
    add("--max_seq_length", type=int, help="cache length; default: prompt + new tokens")
    add("--attention", choices=("dense", "hash"), default="dense")
    add("--signatures", type=Path, help="file that train_hash.py wrote")
    sizes = parser.add_mutually_exclusive_group()
    sizes.add_argument("--budget", type=int, help="tokens attended per KV head (default 2048)")
    sizes.add_argument("--sparsity", type=float, help="budget = 1/SPARSITY of prompt and new tokens, in steps of 64")
    add("--sink", type=int, default=64, help="first tokens, always attended")
    add("--recent", type=int, default=128, help="last tokens, always attended")
    add("--dense_layers", type=int, default=0, help="first layers that stay dense")
    add("--sparse_tail", type=int, default=0, help="last prompt tokens that are decoded sparsely too")
    add("--compile", action="store_true")
    add("--compile_prefill", action="store_true")
    add("--precision", choices=("float32", "bfloat16"), help="default: bfloat16 on a GPU, float32 on a CPU")
    add("--device", default=default_device())
    add("--profile", type=Path, help="write a Chrome trace of the last sample here")
    add("--json", action="store_true", help="the last line of stdout is one JSON object")
    add("--save", type=Path, help="write that object to a file")
    add("--compare", type=Path, help="a --save file of the same prompt: teacher-force its tokens, print a table")
    add("--no_stream", action="store_true")
    return check_options(parser.parse_args(argv))


def check_options(options: argparse.Namespace) -> argparse.Namespace:
    """Refuse flags out of range or at odds with each other; fill in what depends on the device."""
    ranges = {"seed": (0, 2 ** 63 - 1), "temperature": (0, 1e3), "sparsity": (1, 1e9), "prompt": (1, LARGEST)}
    ranges |= dict.fromkeys(("num_samples", "max_new_tokens", "batch_size", "top_k", "max_seq_length", "budget"), (1, LARGEST))
    ranges |= dict.fromkeys(("sink", "recent", "dense_layers", "sparse_tail"), (0, LARGEST))
    for flag, (low, high) in ranges.items():
        value = getattr(options, flag)
        if isinstance(value, int | float) and not low <= value <= high:
            raise UserError(f"--{flag} {value} is out of range; it must be from {low} to {high}")

    if (options.checkpoint_path is None) == (options.random_weights is None):
        raise UserError("give either --checkpoint_path FOLDER or --random_weights PRESET")
    has_text = options.prompt_file is not None or (options.prompt_ids is None and isinstance(options.prompt, str))
    if options.random_weights is not None and has_text:
        raise UserError("random weights have no tokenizer; give --prompt NUMBER or --prompt_ids 1,2,3")
    clashes = [
        (not has_text, "a prompt of token ids is no chat", ("chat", "interactive")),
        (options.interactive, "--interactive shows a chat alone", ("prompt_file", "profile", "json", "save", "compare")),
        (options.attention == "dense", "--attention is dense, which reads all tokens", ("signatures", "budget", "sparsity")),
    ]
    for clash, reason, flags in clashes:
        for flag in flags:
            if clash and getattr(options, flag) not in (None, False):
                raise UserError(f"{reason}; leave --{flag} out")
    if options.interactive and (options.batch_size > 1 or options.num_samples > 1):
        raise UserError("--interactive serves one sequence; leave --batch_size and --num_samples out")
    if options.device != "cpu" and not (options.device.startswith("cuda") and torch.cuda.is_available()):
        raise UserError(f"--device {options.device} is not there; this machine has: {default_device()}")
    if options.precision is None:
        options.precision = "bfloat16" if options.device.startswith("cuda") else "float32"
    compiler = os.environ.get("CXX", "g++")  # as Inductor chooses it
    if (options.compile or options.compile_prefill) and options.device == "cpu" and shutil.which(compiler) is None:
        print(f"warning: no C++ compiler ({compiler}) found, so nothing is compiled", file=sys.stderr)
        options.compile = options.compile_prefill = False
    return options


def read_tokenizer(options: argparse.Namespace) -> Tokenizer | None:
    """The checkpoint's tokenizer; None where there is none and the prompt needs none."""
    if options.random_weights is not None:
        return None
    try:
        return Tokenizer.load(options.checkpoint_path)
    except UserError:
        if options.prompt_ids is None:
            raise
        return None


def read_prompt(options: argparse.Namespace, tokenizer: Tokenizer | None, vocab_size: int) -> list[int]:
    """The prompt's token ids."""
    if options.prompt_ids is not None:
        try:
            ids = [int(part) for part in options.prompt_ids.split(",")]
        except ValueError as error:
            raise UserError(f"--prompt_ids {options.prompt_ids!r} is not a list of numbers such as 1,2,3") from error
    elif options.prompt_file is None and isinstance(options.prompt, int):
        generator = torch.Generator().manual_seed(options.seed)
        ids = torch.randint(vocab_size, (options.prompt,), generator=generator).tolist()
    else:
        text = options.prompt if options.prompt_file is None else read_text(options.prompt_file)
        ids = tokenizer.encode_chat([{"role": "user", "content": text}]) if options.chat else tokenizer.encode(text)
    if not ids:
        raise UserError("the prompt is empty; give at least one token")
    for token in ids:
        if not 0 <= token < vocab_size:
            raise UserError(f"token id {token} is outside the model's vocabulary; give ids from 0 to {vocab_size - 1}, "
                            "or text with the model's own tokenizer")
    return ids


def read_text(path: Path) -> str:
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"cannot read {path}: {getattr(error, 'strerror', None) or error}; give a UTF-8 text file") from error
    if not text.strip():
        raise UserError(f"{path} is empty; give a file with text")
    return text


def cache_length(options: argparse.Namespace, model: Transformer, prompt_tokens: int) -> int:
    """Tokens that the cache must hold, checked against the flags and the model."""
    limit = min(model.args.max_position, model.args.sliding_window or model.args.max_position)
    needed = prompt_tokens + options.max_new_tokens
    length = options.max_seq_length or (limit if options.interactive else needed)
    if needed > length:
        raise UserError(f"{prompt_tokens} prompt and {options.max_new_tokens} new tokens do not fit --max_seq_length {length}; "
                        f"give --max_seq_length {needed}, a shorter prompt or fewer --max_new_tokens")
    if options.checkpoint_path is not None and length > limit:
        raise UserError(f"{length} tokens are more than the model's {limit} (max_position_embeddings or sliding_window in "
                        "config.json); shorten the prompt, --max_new_tokens or --max_seq_length")
    return length


def sparse_settings(options: argparse.Namespace, length: int, tokens: int) -> SparseSettings:
    """Resolve --budget or --sparsity for prompt and new tokens together (`tokens`) and a cache of `length`."""
    least = options.sink + options.recent
    budget = options.budget or 2048
    if options.sparsity is not None:
        budget = max(64 * math.ceil(tokens / options.sparsity / 64), least + 64)
    elif budget < least:
        raise UserError(f"--budget {budget} is less than --sink {options.sink} plus --recent {options.recent}; "
                        f"give at least {least}")
    return SparseSettings(min(budget, length), options.sink, options.recent, options.dense_layers)


def load_encoders(options: argparse.Namespace, model: Transformer) -> list:
    if options.signatures is not None:
        return load_signatures(options.signatures, model.fingerprint())[0]
    print("warning: no --signatures file, so random projections choose the tokens; train one with train_hash.py",
          file=sys.stderr)
    return random_encoders(HashConfig(), model.fingerprint(), options.seed)


def check_memory(options: argparse.Namespace, model: Transformer, length: int, encoders: list | None) -> None:
    """Refuse caches that do not fit before they are allocated, naming the longest context that does."""
    args, weight = model.args, model.tok_embeddings.weight
    per_token = 2 * args.n_kv_head * args.head_dim * weight.element_size() * args.n_layer
    if encoders is not None:
        per_token += sum(e.n_signature_head * e.config.words * 4 for e in encoders[options.dense_layers:])
    per_token *= options.batch_size
    free = free_memory(options.device)
    if per_token * length > free:
        raise UserError(f"the caches for {options.batch_size} x {length} tokens take {per_token * length / 2 ** 30:.1f} GiB, "
                        f"{free / 2 ** 30:.1f} GiB are free, and at most {int(free // per_token)} tokens fit; "
                        "shorten the prompt, --max_new_tokens or --max_seq_length, or use a smaller --batch_size")


def free_memory(device: str) -> int:
    """Bytes free on the device."""
    if device.startswith("cuda"):
        return torch.cuda.mem_get_info()[0]
    for line in Path("/proc/meminfo").read_text().splitlines():
        if line.startswith("MemAvailable"):
            return int(line.split()[1]) * 1024
    return sys.maxsize


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
    if not same:
        raise UserError(f"--compare {path} is of another prompt or model; run both with the same")
    if not 2 <= len(tokens) <= options.max_new_tokens:
        raise UserError(f"--compare {path} has {len(tokens)} new tokens; save 2 or more and give that --max_new_tokens here")
    return before


class NewText(TextStream):
    """The text that new tokens add to that of `prompt`, end tokens left out.

    The prompt counts because sentencepiece drops the space before the first word of a text, not of its continuation.
    """

    def __init__(self, tokenizer: Tokenizer, prompt: list[int]) -> None:
        super().__init__(tokenizer)
        self.stop_ids = tokenizer.stop_ids
        for token in prompt:
            self.put(token)

    def put(self, id: int) -> str:
        return "" if id in self.stop_ids else super().put(id)

    def show(self, id: int) -> None:
        print(self.put(id), end="", flush=True)

    def whole(self, ids: list[int]) -> str:
        return "".join([*map(self.put, ids), self.end()])


def chat(session: Session) -> None:
    """Turns on the terminal until an empty line; only what is new of a turn is prefilled."""
    messages: list[dict] = []
    while True:
        try:
            turn = input("\n> ")
        except EOFError:
            return
        if not turn.strip():
            return
        messages.append({"role": "user", "content": turn})
        ids = session.tokenizer.encode_chat(messages)
        if len(ids) >= session.length:
            raise UserError(f"the conversation of {len(ids)} tokens has filled the cache of {session.length}; "
                            "start again with a larger --max_seq_length")
        stream = NewText(session.tokenizer, [])
        answer = session.run(ids, stream.show)
        print(stream.end())
        messages.append({"role": "assistant", "content": NewText(session.tokenizer, []).whole(answer.tokens[0])})


def main() -> None:
    options = parse_options()
    torch.manual_seed(options.seed)
    dtype = getattr(torch, options.precision)
    if options.random_weights is not None:
        model = random_model(options.random_weights, options.device, dtype, options.seed)
    else:
        model = load_model(options.checkpoint_path, options.device, dtype)
    if options.device.startswith("cuda"):
        torch.cuda.set_device(model.tok_embeddings.weight.device)  # kernels run on the current one
    tokenizer = read_tokenizer(options)
    ids = [] if options.interactive else read_prompt(options, tokenizer, model.args.vocab_size)
    length = cache_length(options, model, len(ids))
    before = read_comparison(options, ids, model.args.vocab_size) if options.compare else None
    settings = encoders = None
    if options.attention == "hash":
        tokens = length if options.interactive else len(ids) + options.max_new_tokens
        settings = sparse_settings(options, length, tokens)
        encoders = load_encoders(options, model)
    check_memory(options, model, length, encoders)
    session = Session(options, model, tokenizer, length, settings, encoders)
    if options.interactive:
        chat(session)
        return

    context = [] if options.chat else ids  # an answer is a text of its own
    samples: list[Sample] = []
    texts: list[str] = []
    profiler = torch.profiler.profile() if options.profile is not None else contextlib.nullcontext()
    for i in range(options.num_samples):
        session.cached = []  # every sample pays for its own prefill
        stream = NewText(tokenizer, context) if tokenizer is not None and not options.no_stream else None
        with profiler if i == options.num_samples - 1 else contextlib.nullcontext():
            samples.append(session.run(ids, stream.show if stream is not None else lambda token: None))
        if stream is not None:
            print(stream.end())
        if tokenizer is not None:
            texts += [NewText(tokenizer, context).whole(tokens) for tokens in samples[-1].tokens]
    if options.profile is not None:
        with atomic_path(options.profile) as beside:
            profiler.export_chrome_trace(str(beside))
    result = report(session, ids, samples, texts)
    print_summary(result)
    if before is not None:
        agreement, likelihood = session.teacher_force(ids, before["new_tokens"][0])
        result |= {"agreement": agreement, "perplexity_ratio": math.exp(before["log_likelihood"] - likelihood)}
        print_comparison(before, result)
    if options.save is not None:
        tokens = samples[-1].tokens[0]
        saved = result | {"log_likelihood": session.teacher_force(ids, tokens)[1] if len(tokens) > 1 else None}
        with atomic_path(options.save) as beside:
            beside.write_text(json.dumps(saved))
    if options.json:
        print(json.dumps(result))


if __name__ == "__main__":
    run_command(main)
