"""Generate text: load, prefill the prompt, decode with dense or hash attention, stream, report.

    python generate.py --checkpoint_path checkpoints/smollm2-135m-instruct --prompt "Once upon a time" --compile
    python generate.py --checkpoint_path ... --prompt_file book.txt --chat --attention hash --sparsity 16
    python generate.py --checkpoint_path ... --prompts questions.jsonl --max_seq_length auto --json
    python generate.py --checkpoint_path ... --prompt_file book.txt --speculate self --sparsity 32 --compile
    python generate.py --checkpoint_path ... --interactive --system "Answer briefly."
"""
# Modules that need torch are imported where they are used: `--help` and most mistakes do not wait for it.
import argparse
import contextlib
import hashlib
import json
import math
import os
import resource
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from hashfast.common import (
    Parser,
    UserError,
    atomic_path,
    can_compile,
    check_writable,
    environment,
    find_device,
    read_file,
    run_command,
)
from hashfast.progress import Progress
from hashfast.runtime.prompts import Display, NewText, encode, read_lines, read_text, system_message, visible

if TYPE_CHECKING:
    from hashfast.hash_attention import HashEncoder
    from hashfast.model import Fingerprint, PrefillSettings, Transformer
    from hashfast.runtime.session import Sample, Session
    from hashfast.runtime.tokenizer import Tokenizer

LARGEST = 2 ** 24  # of counts on the command line: beyond any model's context, and safe in int32
LARGEST_K = 64  # drafted tokens per round
DEFAULT_K = 4
HELP = """/reset  start the conversation again
/quit   leave, as an empty line does
/help   this
Ctrl-C stops an answer; the conversation goes on."""


# ---------------------------------------------------------------------------------------------------------------- report

def peak_memory_gib(device: str) -> float:
    """Most memory that this process has held: on the GPU, or resident on the host for a CPU run."""
    import torch
    if device.startswith("cuda"):
        return torch.cuda.max_memory_allocated() / 2 ** 30
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2 ** 20


def report(options: argparse.Namespace, session: "Session", prompts: list[list[int]], samples: "list[Sample]",
           texts: list[str]) -> dict:
    """Everything that a run measured, as --json prints it. What is of each prompt is a list where there are several."""
    from hashfast.runtime.decode import pairs_read
    from hashfast.runtime.memory import bytes_per_step, tokens_read

    model = session.model
    last, batch = samples[-1], session.options.batch
    decode_s = sum(s.decode_s for s in samples)
    steps = sum(s.steps for s in samples)
    models = {model, model if session.speculator is None else session.speculator.draft}
    caches = [layer.attention.cache for each in models for layer in each.layers]
    kv_bytes = sum(c.k.nbytes + c.v.nbytes for c in caches)
    ms = 1000 * decode_s / steps if steps else None
    lengths, hashes = [len(ids) for ids in prompts], [prompt_hash(ids) for ids in prompts]
    length = sum(lengths) / len(prompts) + last.steps // -(-len(prompts) // batch) // 2
    speculator, settings = session.speculator, session.settings
    read = settings if speculator is None else None  # drafts are verified by dense attention
    moved = bytes_per_step(model, settings, length, batch) if ms and speculator is None else None
    prefill = session.options.prefill
    dense = sum(layer.attention.encoder is None for layer in model.layers) / len(model.layers)
    return {
        "model": options.random_weights or options.checkpoint_path.resolve().name,
        "prompt_tokens": lengths if len(prompts) > 1 else lengths[0],
        "prompt_sha256": hashes if len(prompts) > 1 else hashes[0],
        "new_tokens": [tokens for s in samples for tokens in s.tokens],
        "text": texts,
        "prefill_s": last.prefill_s,
        "prefill_tok_s": sum(lengths) / last.prefill_s,
        "prefill": prefill.mode,
        "prefill_sparsity": prefill.sparsity if prefill.mode == "hash" else 1,
        "pairs_read": sum(pairs_read(n, prefill, dense) for n in lengths) / len(lengths),
        "tokens_reused": last.reused,
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
    """Rates and memory, on stderr so that stdout is the text."""
    rate = f"{result['decode_tok_s']:.1f} tok/s, {result['ms_per_token']:.1f} ms/token" if result["ms_per_token"] else "-"
    tokens = result["prompt_tokens"] if isinstance(result["prompt_tokens"], int) else sum(result["prompt_tokens"])
    how = f", {result['pairs_read']:.1%} of all pairs read" if result["prefill"] == "hash" else ""
    how += f", {result['tokens_reused']} tokens from --prompt_cache" if result["tokens_reused"] else ""
    print(f"prefill: {tokens} tokens in {result['prefill_s']:.2f} s ({result['prefill_tok_s']:.0f} tok/s){how}\n"
          f"decode:  {rate}" + (f" ({result['bandwidth_gb_s']:.1f} GB/s)" if result["bandwidth_gb_s"] else "") +
          f", {result['attention']}, {result['tokens_read']:.0f} tokens read per step\n"
          f"memory:  {result['peak_memory_gib']:.2f} GiB at most; K and V {result['kv_bytes'] / 2 ** 20:.1f} MiB, "
          f"signatures {result['signature_bytes'] / 2 ** 20:.1f} MiB; compiled in {result['compile_s']:.1f} s", file=sys.stderr)
    if result.get("accepted_per_verify") is not None:
        print(f"drafts:  {result['accepted_per_verify']:.2f} of {result['speculate_k']} accepted in {result['rounds']} rounds; "
              f"0 to {result['speculate_k']}: {' '.join(map(str, result['accepted_histogram']))} times", file=sys.stderr)


def comparison_column(result: dict) -> list[str]:
    """One run in the table of --compare. Only the later one has been measured against the other."""
    rate = f"{result['decode_tok_s']:.1f}" if result["decode_tok_s"] else "-"
    name = result.get("speculate", result["attention"])
    return [f"{name:s}", f"{result['prefill_tok_s']:.0f}", rate, f"{result['tokens_read']:.0f}",
            f"{result['peak_memory_gib']:.2f}", f"{result.get('agreement', 1):.3f}", f"{result.get('perplexity_ratio', 1):.3f}"]


ROWS = {  # of the table of --compare
    "": "",
    "prefill tok/s": "prompt tokens read per second",
    "decode tok/s": "new tokens written per second",
    "tokens read per step": "whose keys and values a new token attends to",
    "peak memory GiB": "of the whole process",
    "same argmax": "share of the first run's tokens that this one would have chosen in its place",
    "perplexity ratio": "how much more these tokens surprise this run than the first; 1 is nothing lost",
}


def print_comparison(before: dict, now: dict) -> None:
    """A small table of an earlier run beside this one, what its rows mean, and a verdict in words."""
    print(f"\n{now['prompt_tokens']} prompt tokens, {len(before['new_tokens'][0])} new ones, {now['device']}, {now['dtype']}")
    for row in zip(ROWS, comparison_column(before), comparison_column(now), ROWS.values(), strict=True):
        print("{:22}{:>8}{:>8}   {}".format(*row).rstrip())
    print(f"\n{verdict(before, now)}")


def verdict(before: dict, now: dict) -> str:
    """What the table of --compare says, in a sentence."""
    first, second = (comparison_column(result)[0] for result in (before, now))
    speed = "decoding at an unknown speed"
    if before["decode_tok_s"] and now["decode_tok_s"]:
        speed = f"decoding at {now['decode_tok_s'] / before['decode_tok_s']:.2f} times its speed"
    ratio = now["perplexity_ratio"]
    words = ((1.01, "nothing to speak of"), (1.05, "little"), (1.2, "something"))
    lost = next((words for limit, words in words if ratio <= limit), "much")
    return (f"verdict: {second} reads {now['tokens_read'] / before['tokens_read']:.0%} of the tokens that {first} reads, "
            f"{speed}, and would have chosen {now['agreement']:.0%} of its tokens; {lost} is lost (perplexity x {ratio:.3f}).")


# ----------------------------------------------------------------------------------------------------------------- flags

def int_or_str(text: str) -> int | str:
    try:
        return int(text)
    except ValueError:
        return text


def parse_options(argv: list[str] | None = None) -> argparse.Namespace:
    parser = Parser(description=__doc__)
    add = parser.add_argument_group("model").add_argument
    add("--checkpoint_path", type=Path, metavar="FOLDER",
        help="folder with config.json, safetensors and the tokenizer, or owner/name on Hugging Face")
    add("--random_weights", metavar="PRESET", help="no checkpoint, random weights, for latency; `hashfast list` names presets")
    add("--quantize", choices=("int8",), help="of --random_weights; `hashfast quantize` is for checkpoints")
    add("--precision", choices=("float32", "bfloat16"), help="default: bfloat16 on a GPU, float32 on a CPU")
    add("--device", help="cpu, cuda or cuda:N; default: a GPU where there is one")

    group = parser.add_argument_group("prompt", "one of the first four; - as a text or a file is standard input")
    prompts = group.add_mutually_exclusive_group()
    prompts.add_argument("--prompt", metavar="TEXT", default="Hello, my name is",
                         help="with --random_weights: how many random tokens")
    prompts.add_argument("--prompt_file", type=Path, metavar="FILE", help="a text file")
    prompts.add_argument("--prompt_ids", metavar="IDS", help="token ids: 1,2,3 (needs no tokenizer)")
    prompts.add_argument("--prompts", type=Path, metavar="FILE",
                         help="many: one JSON object a line with prompt (text), messages or ids")
    add = group.add_argument
    add("--chat", action="store_true", help="wrap the prompt in the model's chat template")
    add("--interactive", action="store_true", help="chat in turns; the cache is kept between them")
    add("--system", metavar="TEXT", help="what a chat begins with")

    add = parser.add_argument_group("answer").add_argument
    add("--max_new_tokens", type=int, metavar="N", default=200, help="tokens of an answer at most")
    add("--temperature", type=float, metavar="T", default=0.8, help="0 is greedy")
    add("--top_k", type=int, metavar="K", default=200, help="draw from the K likeliest tokens")
    add("--top_p", type=float, metavar="P", default=1.0, help="draw from the fewest tokens of probability P together")
    add("--stop", action="append", metavar="TEXT", help="end the answer before this text; may be given again")
    add("--ignore_eos", action="store_true", help="go on after an end token")
    add("--seed", type=int, metavar="N", default=1234, help="the same seed draws the same tokens")
    add("--num_samples", type=int, metavar="N", default=1, help="answers, one after the other")

    add = parser.add_argument_group("attention").add_argument
    add("--attention", choices=("dense", "hash"), default="dense",
        help="a new token attends to all tokens, or to those that signatures select")
    add("--signatures", type=Path, metavar="FILE",
        help="that train_hash.py wrote; default: the one that ships for this model, else random projections")
    sizes = parser.add_argument_group("what hash attention reads")
    add = sizes.add_mutually_exclusive_group().add_argument
    add("--budget", type=int, metavar="N", help="tokens attended per KV head (default: 2048)")
    add("--sparsity", type=float, metavar="R", help="budget = 1/R of prompt and new tokens, in steps of 64")
    add = sizes.add_argument
    add("--budgets", choices=("even", "calibrated"), default="even",
        help="the same for every layer and head, or of the same mean as --signatures were calibrated")
    add("--sink", type=int, metavar="N", default=64, help="first tokens, always attended")
    add("--recent", type=int, metavar="N", default=128, help="last tokens, always attended")
    add("--dense_layers", type=int, metavar="N", default=0, help="first layers that stay dense")
    add("--prefill", choices=("dense", "hash"), default="dense", help="the prompt is read whole, or as signatures select")
    add("--prefill_sparsity", type=float, metavar="R", help="with --prefill hash: a chunk reads 1/R of what is before it "
        "(default: 16)")
    add("--prefill_tail", type=int, metavar="N", help="with --prefill hash: last prompt tokens that read everything "
        "(default: 256)")
    add("--sparse_tail", type=int, metavar="N", default=0, help="last prompt tokens that are decoded sparsely too")

    add = parser.add_argument_group("speculation").add_argument
    add("--speculate", choices=("self", "draft"), help="draft tokens and verify them; self: by hash attention (answers stay "
        "those of dense attention), draft: by --draft_checkpoint_path")
    add("--speculate_k", type=int, metavar="K", help=f"tokens drafted per round (default: {DEFAULT_K})")
    add("--draft_checkpoint_path", type=Path, metavar="FOLDER", help="a smaller model of the same vocabulary")
    add("--draft_attention", choices=("dense", "hash"), help="how the draft model reads (default: dense)")
    add("--draft_signatures", type=Path, metavar="FILE", help="its signatures")

    add = parser.add_argument_group("speed and memory").add_argument
    add("--compile", action="store_true", help="compile the decode step: a minute at first, cached later")
    add("--compile_prefill", action="store_true", help="compile prefill too; for long prompts on a GPU --compile does")
    add("--batch_size", type=int, metavar="N", help="sequences decoded together: of one prompt (default: 1), or of --prompts "
        "(default: as many as fit)")
    add("--max_seq_length", type=int_or_str, metavar="N", help="cache length, or auto: what fits; default: prompt + new tokens")
    add("--prefill_chunk", type=int, metavar="N", help="prompt tokens read at a time (default: 4096 on a GPU, 2048 on a CPU); "
        "with --prefill hash they choose together (4096)")
    add("--prompt_cache", type=Path, metavar="FILE", help="keep the prompt's K and V here; a later prompt that begins alike "
        "reads on from them")
    add("--prompt_cache_ro", action="store_true", help="use --prompt_cache and do not write it")

    add = parser.add_argument_group("output").add_argument
    add("--no_stream", action="store_true", help="print the texts when all are done; with --json only there")
    add("--json", action="store_true", help="the last line of stdout is one JSON object")
    add("--save", type=Path, metavar="FILE", help="write that object to a file")
    add("--compare", type=Path, metavar="FILE", help="a --save file of the same prompt: put its tokens in, print a table")
    add("--profile", type=Path, metavar="FILE", help="write a Chrome trace of the last sample")
    return check_options(parser.parse_args(argv))


def check_options(options: argparse.Namespace) -> argparse.Namespace:
    """Refuse flags out of range or at odds with each other, and files that cannot be read; all that needs no torch.

    `options.sources` becomes what the prompts are given as, by their lines in --prompts.
    """
    ranges = {"seed": (0, 2 ** 63 - 1), "temperature": (0, 1e3), "sparsity": (1, 1e9), "prefill_sparsity": (1, 1e9),
              "top_p": (1e-6, 1)}
    counts = ("num_samples", "max_new_tokens", "batch_size", "top_k", "max_seq_length", "prefill_chunk", "budget")
    ranges |= dict.fromkeys(counts, (1, LARGEST))
    ranges["speculate_k"] = (1, LARGEST_K)
    ranges |= dict.fromkeys(("sink", "recent", "dense_layers", "sparse_tail", "prefill_tail"), (0, LARGEST))
    for flag, (low, high) in ranges.items():
        check_range(flag, getattr(options, flag), low, high)

    for flag in ("save", "profile", *([] if options.prompt_cache_ro else ["prompt_cache"])):
        check_writable(f"--{flag}", getattr(options, flag))
    if (options.checkpoint_path is None) == (options.random_weights is None):
        raise UserError("give either --checkpoint_path FOLDER or --random_weights PRESET")
    if options.quantize is not None and options.random_weights is None:
        raise UserError("--quantize is for --random_weights; make a quantised folder with `hashfast quantize` and load that")
    if isinstance(options.max_seq_length, str) and options.max_seq_length != "auto":
        raise UserError(f"--max_seq_length {options.max_seq_length} is neither a number nor auto")
    check_speculation(options)
    options.is_hash = "hash" in (options.attention, options.draft_attention) or options.speculate == "self"
    options.stop = tuple(options.stop or ())
    if "" in options.stop:
        raise UserError("--stop is empty; give a text")
    options.sources = read_sources(options)
    options.has_text = options.interactive or not all(isinstance(source, int) or isinstance(source[0], int)
                                                      for source in options.sources.values())
    if options.random_weights is not None and options.has_text:
        raise UserError("random weights have no tokenizer; give --prompt NUMBER or --prompt_ids 1,2,3")
    is_chat = options.chat or options.interactive
    clashes = [
        (not options.has_text, "a prompt of token ids is no chat", ("chat",)),
        (not is_chat, "a system prompt is part of a chat: give --chat or --interactive", ("system",)),
        (options.random_weights is not None, "random weights have no text", ("stop",)),
        (options.interactive, "--interactive shows a chat alone",
         ("prompt_ids", "prompt_file", "prompts", "profile", "json", "save")),
        (options.interactive or options.prompts, "--compare repeats a single prompt", ("compare",)),
        (not options.is_hash, "--attention is dense, which reads all tokens", ("budget", "sparsity")),
        (not options.is_hash and options.prefill == "dense", "--attention is dense, which reads all tokens", ("signatures",)),
        (options.prefill == "dense", "--prefill is dense", ("prefill_sparsity", "prefill_tail")),
        (options.prompt_cache is None, "there is no --prompt_cache", ("prompt_cache_ro",)),
    ]
    check_clashes(options, clashes)
    if options.interactive and ((options.batch_size or 1) > 1 or options.num_samples > 1):
        raise UserError("--interactive serves one sequence; leave --batch_size and --num_samples out")
    if options.budgets == "calibrated" and not options.is_hash:
        raise UserError("--budgets calibrated needs --attention hash and --signatures FILE, which holds the calibration")
    least, options.budget = options.sink + options.recent, options.budget or 2048
    if options.is_hash and options.sparsity is None and options.budget < least:
        raise UserError(f"--budget {options.budget} is less than --sink {options.sink} plus --recent {options.recent}; "
                        f"give at least {least}")
    return options


def check_range(flag: str, value: float | str | None, low: float, high: float) -> None:
    if isinstance(value, int | float) and not low <= value <= high:
        raise UserError(f"--{flag} {value} is out of range; it must be from {low} to {high}")


def check_clashes(options: argparse.Namespace, clashes: list[tuple[object, str, tuple[str, ...]]]) -> None:
    """(whether, why, flags) -> UserError where one of the flags is given."""
    for clash, reason, flags in clashes:
        for flag in flags:
            if clash and getattr(options, flag) not in (None, False, ()):
                raise UserError(f"{reason}; leave --{flag} out")


def check_speculation(options: argparse.Namespace) -> None:
    """Refuse flags at odds with each other; fill in the defaults. `options.signatures` become those of whoever drafts."""
    if options.draft_checkpoint_path is not None:
        options.speculate = options.speculate or "draft"
    if options.speculate == "draft" and options.draft_checkpoint_path is None:
        raise UserError("--speculate draft needs a smaller model; give --draft_checkpoint_path FOLDER, or --speculate self")
    is_hash = options.draft_attention == "hash"
    check_clashes(options, [
        (options.speculate is None, "nothing is drafted without --speculate or --draft_checkpoint_path", ("speculate_k",)),
        (options.speculate != "draft", "only a draft model has these", ("draft_attention", "draft_signatures")),
        (options.speculate == "self", "--speculate self drafts without a second model", ("draft_checkpoint_path",)),
        (options.speculate == "draft" and not is_hash, "--draft_attention is dense", ("draft_signatures",)),
        (options.speculate == "draft", "--signatures would be the verifying model's; give --draft_signatures", ("signatures",)),
        (options.speculate is not None, "drafts are verified by dense attention", ("sparse_tail",)),
    ])
    if options.speculate == "draft" and options.prefill == "hash":
        raise UserError("--prefill hash needs the verifying model's signatures, but only the draft has some; leave it out")
    if options.speculate is not None and options.attention == "hash":
        raise UserError("drafts are verified by dense attention; leave --attention hash out")
    options.speculate_k = 0 if options.speculate is None else options.speculate_k or DEFAULT_K
    options.signatures = options.signatures or options.draft_signatures


def read_sources(options: argparse.Namespace) -> dict[int, str | list[dict] | list[int] | int]:
    """What each prompt is given as, by its line in --prompts: a text, messages, token ids, or how many random ones."""
    if options.interactive:
        return {}
    if options.prompts is not None:
        return read_lines(options.prompts)
    if options.prompt_file is not None:
        return {1: read_text(options.prompt_file)}
    if options.prompt_ids is not None:
        try:
            return {1: [int(part) for part in options.prompt_ids.split(",")]}
        except ValueError as error:
            raise UserError(f"--prompt_ids {options.prompt_ids!r} is not a list of numbers such as 1,2,3") from error
    if options.random_weights is not None and isinstance(count := int_or_str(options.prompt), int):
        check_range("prompt", count, 1, LARGEST)
        return {1: count}
    if not options.prompt:
        raise UserError("the prompt is empty; give at least one token")
    return {1: read_text(Path("-")) if options.prompt == "-" else options.prompt}


# --------------------------------------------------------------------------------------------------------------- reading

def settle_device(options: argparse.Namespace) -> None:
    """Fill in what depends on the machine. UserError where it has no such device."""
    import torch

    from hashfast.model import PrefillSettings
    from hashfast.runtime import distributed
    from hashfast.runtime.decode import PREFILL_CHUNK

    options.device = find_device(options.device)
    distributed.check_device(options.device)
    if options.precision is None:
        options.precision = "bfloat16" if options.device.startswith("cuda") else "float32"
    if options.prefill == "hash":
        options.prefill_chunk = options.prefill_chunk or PrefillSettings.chunk
    options.prefill_chunk = options.prefill_chunk or PREFILL_CHUNK[torch.device(options.device).type]
    if (options.compile or options.compile_prefill) and not can_compile(options.device):
        options.compile = options.compile_prefill = False


def prefill_settings(options: argparse.Namespace) -> "PrefillSettings":
    from hashfast.model import PrefillSettings

    if options.prefill == "dense":
        return PrefillSettings()
    tail = PrefillSettings.tail if options.prefill_tail is None else options.prefill_tail
    return PrefillSettings("hash", options.prefill_sparsity or PrefillSettings.sparsity, options.prefill_chunk, tail)


def read_tokenizer(options: argparse.Namespace) -> "Tokenizer | None":
    """The checkpoint's tokenizer; None where there is none and the prompt needs none."""
    from hashfast.runtime.tokenizer import Tokenizer

    if options.random_weights is not None:
        return None
    try:
        return Tokenizer.load(options.checkpoint_path)
    except UserError:
        if options.has_text or options.stop:
            raise
        return None


def encode_prompts(options: argparse.Namespace, tokenizer: "Tokenizer | None", vocab_size: int) -> list[tuple[list[int], bool]]:
    """Token ids of each prompt, and whether it is a chat."""
    import torch

    prompts = []
    for line, source in options.sources.items():
        if isinstance(source, int):
            source = torch.randint(vocab_size, (source,), generator=torch.Generator().manual_seed(options.seed)).tolist()
        try:
            prompts.append(encode(source, tokenizer, vocab_size, options.chat, options.system))
        except UserError as error:
            raise UserError(f"{options.prompts} line {line}: {error}") from error if options.prompts else error
    return prompts


def cache_length(options: argparse.Namespace, model: "Transformer", prompt_tokens: int) -> int:
    """Tokens that the cache must hold (auto: at most), checked against the flags and the model."""
    from hashfast.runtime.memory import context_limit

    limit = context_limit(model)
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


def load_encoders(options: argparse.Namespace, model: "Fingerprint") -> "tuple[list[HashEncoder], dict]":
    """-> the encoder of each layer, and what their file says of them."""
    from hashfast.hash_attention import HashConfig
    from hashfast.runtime.signatures import load_signatures, random_encoders, shipped_signatures

    path = options.signatures
    if path is None and options.random_weights is None:
        path = shipped_signatures(model)
        if path is not None:
            print(f"signatures: {path}", file=sys.stderr)
    if path is not None:
        return load_signatures(path, model)
    print("warning: no signatures for this model, so random projections choose the tokens; train some with train_hash.py",
          file=sys.stderr)
    return random_encoders(HashConfig(), model, options.seed), {}


def read_comparison(options: argparse.Namespace, ids: list[int], vocab_size: int) -> dict:
    """The run in the --compare file, after checks that it can be repeated here."""
    path = options.compare
    try:
        before = json.loads(read_file(path, "give a file that --save wrote"))
        comparison_column(before)
        tokens = before["new_tokens"][0]
        same = before["prompt_sha256"] == prompt_hash(ids) and all(0 <= token < vocab_size for token in tokens)
        if len(tokens) > 1:
            math.exp(before["log_likelihood"])
    except (ValueError, LookupError, TypeError, AttributeError, OverflowError, RecursionError) as error:
        reason = f"{type(error).__name__}: {error}"
        raise UserError(f"cannot use --compare {path} ({reason}); give a file that --save wrote") from error
    if before.get("temperature") != 0:
        raise UserError(f"--compare {path} was sampled, so its tokens are not that run's choices; save one of --temperature 0")
    if not same:
        raise UserError(f"--compare {path} is of another prompt or model; run both with the same")
    if not 2 <= len(tokens) <= options.max_new_tokens:
        raise UserError(f"--compare {path} has {len(tokens)} new tokens; save 2 or more and give that --max_new_tokens here")
    return before


# ------------------------------------------------------------------------------------------------------------------ run

def read_turn() -> str:
    try:
        return input("\n> ")
    except EOFError:
        return ""


def chat(session: "Session", max_new_tokens: int, system: str | None) -> None:
    """Turns on the terminal until an empty line; only what is new of a turn is prefilled."""
    from hashfast.runtime import distributed

    if sys.stdin.isatty():
        print("/help lists commands; an empty line ends the conversation", file=sys.stderr)
    messages = system_message(system)
    while True:
        turn = distributed.on_first(read_turn).strip()
        if turn in ("", "/quit"):
            return
        if turn == "/reset":
            messages = system_message(system)
        elif turn.startswith("/") and turn[1:].isalpha():
            print(HELP if turn == "/help" else f"no command {turn}; there are\n{HELP}", file=sys.stderr)
        else:
            messages.append({"role": "user", "content": turn})
            text = answer(session, messages, max_new_tokens)
            if text is None:
                messages.pop()
            else:
                messages.append({"role": "assistant", "content": text})


def answer(session: "Session", messages: list[dict], max_new_tokens: int) -> str | None:
    """The next turn of the model, printed as it comes; Ctrl-C cuts it off. None where that came before its first token."""
    from hashfast.runtime import distributed

    ids = session.tokenizer.encode_chat(messages)
    left = session.length - len(ids)
    if left <= 0:
        raise UserError(f"the conversation of {len(ids)} tokens has filled the cache of {session.length}; "
                        "start again with a larger --max_seq_length")
    if left < max_new_tokens:
        print(f"note: {left} of {session.length} tokens are left; the conversation ends with them", file=sys.stderr)
    stop = session.options.stop
    display, tokens = Display(session.tokenizer, [[]], stop), []

    def show(i: int, token: int, last: bool) -> None:
        tokens.append(token)
        display.put(i, token, last)

    try:
        session.run([ids], max_new_tokens, show)
    except KeyboardInterrupt:
        if distributed.world_size() > 1:  # the ranks would stop at different tokens
            raise
        print()
        if not tokens:
            return None
    return NewText(session.tokenizer, [], stop).whole(tokens)


def answer_all(session: "Session", prompts: list[list[int]], contexts: list[list[int]],
               options: argparse.Namespace) -> "Sample":
    """New tokens for each prompt, or for each sequence of a single one. Batches that are not full repeat their last prompt."""
    from hashfast.runtime.session import Sample

    size = min(session.options.batch, len(prompts))
    parts = []
    for first in range(0, len(prompts), size):
        session.cached = []  # every sample pays for its own prefill
        group = prompts[first:first + size]
        show = lambda *new: None  # noqa: E731
        if session.tokenizer is not None and not options.no_stream:
            number = None if len(prompts) == 1 else first
            show = Display(session.tokenizer, contexts[first:first + size], options.stop, number).put
        part = session.run(group + group[-1:] * (size - len(group)), options.max_new_tokens, show)
        if len(group) < size:
            part.tokens = part.tokens[:len(group)]
        parts.append(part)
    return Sample([tokens for part in parts for tokens in part.tokens], sum(part.prefill_s for part in parts),
                  sum(part.decode_s for part in parts), sum(part.steps for part in parts), max(part.reused for part in parts))


def main() -> None:
    options = parse_options()
    with Progress("starting"):
        import torch

        from hashfast.research.budgets import budgets_for, calibrated
        from hashfast.runtime import distributed, tensor_parallel
        from hashfast.runtime.checkpoint import load_model, random_model
        from hashfast.runtime.hub import checkpoint_folder
        from hashfast.runtime.memory import largest_batch, plan_memory, sparse_settings
        from hashfast.runtime.session import DecodeOptions, Session
        from hashfast.runtime.signatures import model_outline
        from hashfast.runtime.speculate import check_draft

    settle_device(options)
    torch.manual_seed(options.seed)
    dtype = getattr(torch, options.precision)

    # all that can be wrong, before weights are read
    for name in ("checkpoint_path", "draft_checkpoint_path"):
        if getattr(options, name) is not None:
            setattr(options, name, checkpoint_folder(getattr(options, name)))
    path, draft_path = options.checkpoint_path, options.draft_checkpoint_path
    if path is None:
        model = random_model(options.random_weights, options.device, dtype, options.seed, options.quantize)
    else:
        model = model_outline(path)
    tokenizer = read_tokenizer(options)
    read = encode_prompts(options, tokenizer, model.args.vocab_size)
    prompts = [ids for ids, _ in read]
    longest = max(map(len, prompts), default=0)
    needed = longest + options.max_new_tokens
    length = cache_length(options, model, longest)
    before = read_comparison(options, prompts[0], model.args.vocab_size) if options.compare else None
    drafter = model
    if draft_path is not None:
        drafter = model_outline(draft_path)
        check_draft(draft_path, drafter, model, tokenizer, length)
    needs_signatures = options.is_hash or options.prefill == "hash"
    encoders, about = load_encoders(options, drafter.fingerprint()) if needs_signatures else (None, {})
    if options.budgets == "calibrated":
        budgets_for(about, options.budget, needed, options.sink + options.recent)

    if path is not None:
        model = load_model(path, options.device, dtype)
    draft = load_model(draft_path, options.device, dtype) if draft_path is not None else None
    models = [model, draft] if draft is not None else [model]
    encoders = tensor_parallel.shard_encoders(encoders) if encoders is not None else None
    batch = options.batch_size or 1
    prefill = prefill_settings(options)
    gathered = prefill.gathered(length)
    if len(prompts) > 1:
        fits = options.batch_size or largest_batch(models, encoders, needed, len(prompts), options.prefill_chunk,
                                                   options.speculate_k, options.dense_layers, gathered)
        batch = min(fits, len(prompts))
    length = plan_memory(models, encoders, length, needed if options.max_seq_length == "auto" else length, batch,
                         options.prefill_chunk, options.speculate_k, options.dense_layers, gathered)
    if batch < len(prompts):
        print(f"{len(prompts)} prompts, {batch} at a time", file=sys.stderr)
    tokens = length if options.interactive else needed
    rows = length + options.speculate_k  # of the caches, as Session makes them
    settings = None
    if options.is_hash:
        settings = sparse_settings(rows, tokens, options.budget, options.sparsity, options.sink, options.recent,
                                   options.dense_layers)
    if options.budgets == "calibrated":
        settings = tensor_parallel.shard_settings(calibrated(settings, about, tokens, rows))
    session = Session(model, tokenizer, length, encoders, settings, DecodeOptions(
        batch, options.temperature, options.top_k, options.ignore_eos, options.compile, options.compile_prefill,
        options.prefill_chunk, options.sparse_tail, options.speculate_k, options.top_p, options.stop,
        prefill, options.prompt_cache, options.prompt_cache_ro), draft)
    if options.interactive:
        chat(session, options.max_new_tokens, options.system)
        return

    contexts = [[] if is_chat else ids for ids, is_chat in read]  # an answer in a chat is a text of its own
    samples: list[Sample] = []
    texts: list[str] = []
    profiler = torch.profiler.profile() if options.profile is not None else contextlib.nullcontext()
    for i in range(options.num_samples):
        with profiler if i == options.num_samples - 1 else contextlib.nullcontext():
            samples.append(answer_all(session, prompts, contexts, options))
        if tokenizer is not None:
            texts += [NewText(tokenizer, contexts[row % len(contexts)], options.stop).whole(tokens)
                      for row, tokens in enumerate(samples[-1].tokens)]
    if options.no_stream and not options.json:
        print(visible("\n".join(texts)))
    if options.profile is not None and distributed.rank() == 0:
        with atomic_path(options.profile) as beside:
            profiler.export_chrome_trace(str(beside))
    result = report(options, session, prompts, samples, texts)
    print_summary(result)
    if before is not None:
        agreement, likelihood = session.teacher_force(prompts[0], before["new_tokens"][0])
        result |= {"agreement": agreement, "perplexity_ratio": math.exp(before["log_likelihood"] - likelihood)}
        print_comparison(before, result)
    if options.save is not None:
        tokens = samples[-1].tokens[0]
        likelihood = session.teacher_force(prompts[0], tokens)[1] if len(prompts) == 1 and len(tokens) > 1 else None
        if distributed.rank() == 0:
            with atomic_path(options.save) as beside:
                beside.write_text(json.dumps(result | {"log_likelihood": likelihood}))
    if options.json:
        print(json.dumps(result))


if __name__ == "__main__":
    if "TORCHELASTIC_RUN_ID" in os.environ:
        from hashfast.runtime.distributed import run_ranks as run_command
    run_command(main)
