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
from pathlib import Path

import torch

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
from hashfast.hash_attention import HashConfig, HashEncoder
from hashfast.model import Transformer
from hashfast.research.budgets import calibrated
from hashfast.runtime import distributed, tensor_parallel
from hashfast.runtime.checkpoint import PRESETS, load_model, random_model
from hashfast.runtime.decode import PREFILL_CHUNK
from hashfast.runtime.memory import bytes_per_step, context_limit, plan_memory, sparse_settings, tokens_read
from hashfast.runtime.prompts import Display, NewText, encode, read_lines, read_text
from hashfast.runtime.session import DecodeOptions, Sample, Session
from hashfast.runtime.signatures import load_signatures, random_encoders
from hashfast.runtime.speculate import LARGEST_K, load_draft
from hashfast.runtime.tokenizer import Tokenizer

LARGEST = 2 ** 24  # of counts on the command line: beyond any model's context, and safe in int32
DEFAULT_K = 4  # drafted tokens per round


# ---------------------------------------------------------------------------------------------------------------- report

def peak_memory_gib(device: str) -> float:
    """Most memory that this process has held: on the GPU, or resident on the host for a CPU run."""
    if device.startswith("cuda"):
        return torch.cuda.max_memory_allocated() / 2 ** 30
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2 ** 20


def report(options: argparse.Namespace, session: Session, prompts: list[list[int]], samples: list[Sample],
           texts: list[str]) -> dict:
    """Everything that a run measured, as --json prints it. What is of each prompt is a list where there are several."""
    model = session.model
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
    """Rates and memory, on stderr so that stdout is the text."""
    rate = f"{result['decode_tok_s']:.1f} tok/s, {result['ms_per_token']:.1f} ms/token" if result["ms_per_token"] else "-"
    tokens = result["prompt_tokens"] if isinstance(result["prompt_tokens"], int) else sum(result["prompt_tokens"])
    print(f"prefill: {tokens} tokens in {result['prefill_s']:.2f} s ({result['prefill_tok_s']:.0f} tok/s)\n"
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
    add("--quantize", choices=("int8",), help="of --random_weights; `hashfast quantize` is for checkpoints")
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
    add("--speculate", choices=("self", "draft"), help="draft tokens and verify them; self: by hash attention (answers stay "
        "those of dense attention), draft: by --draft_checkpoint_path")
    add("--speculate_k", type=int, help=f"tokens drafted per round (default {DEFAULT_K})")
    add("--draft_checkpoint_path", type=Path, help="a smaller model of the same vocabulary")
    add("--draft_attention", choices=("dense", "hash"), help="how the draft model reads (default dense)")
    add("--draft_signatures", type=Path, help="its signatures")
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
    ranges["speculate_k"] = (1, LARGEST_K)
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
        raise UserError("--quantize is for --random_weights; make a quantised folder with `hashfast quantize` and load that")
    if isinstance(options.max_seq_length, str) and options.max_seq_length != "auto":
        raise UserError(f"--max_seq_length {options.max_seq_length} is neither a number nor auto")
    options.lines = read_lines(options.prompts) if options.prompts is not None else []
    options.has_text = options.prompt_file is not None or (options.prompt_ids is None and isinstance(options.prompt, str))
    if options.lines:
        options.has_text = not all(isinstance(line[0], int) for line in options.lines)
    if options.random_weights is not None and options.has_text:
        raise UserError("random weights have no tokenizer; give --prompt NUMBER or --prompt_ids 1,2,3")
    check_speculation(options)
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
    least, options.budget = options.sink + options.recent, options.budget or 2048
    if is_hash and options.sparsity is None and options.budget < least:
        raise UserError(f"--budget {options.budget} is less than --sink {options.sink} plus --recent {options.recent}; "
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


def check_speculation(options: argparse.Namespace) -> None:
    """Refuse flags at odds with each other; fill in the defaults. `options.signatures` become those of whoever drafts."""
    if options.draft_checkpoint_path is not None:
        options.speculate = options.speculate or "draft"
    if options.speculate == "draft" and options.draft_checkpoint_path is None:
        raise UserError("--speculate draft needs a smaller model; give --draft_checkpoint_path FOLDER, or --speculate self")
    is_hash = options.draft_attention == "hash"
    clashes = [
        (options.speculate is None, "nothing is drafted without --speculate or --draft_checkpoint_path", ("speculate_k",)),
        (options.speculate != "draft", "only a draft model has these", ("draft_attention", "draft_signatures")),
        (options.speculate == "self", "--speculate self drafts without a second model", ("draft_checkpoint_path",)),
        (options.speculate == "draft" and not is_hash, "--draft_attention is dense", ("draft_signatures",)),
        (options.speculate == "draft", "--signatures would be the verifying model's; give --draft_signatures", ("signatures",)),
        (options.speculate is not None, "drafts are verified by dense attention", ("sparse_tail",)),
    ]
    for clash, reason, flags in clashes:
        for flag in flags:
            if clash and getattr(options, flag):
                raise UserError(f"{reason}; leave --{flag} out")
    if options.speculate is not None and options.attention == "hash":
        raise UserError("drafts are verified by dense attention; leave --attention hash out")
    options.speculate_k = 0 if options.speculate is None else options.speculate_k or DEFAULT_K
    options.signatures = options.signatures or options.draft_signatures


# --------------------------------------------------------------------------------------------------------------- reading

def read_tokenizer(options: argparse.Namespace) -> Tokenizer | None:
    """The checkpoint's tokenizer; None where there is none and the prompt needs none."""
    if options.random_weights is not None:
        return None
    try:
        return Tokenizer.load(options.checkpoint_path)
    except UserError:
        if options.has_text:
            raise
        return None


def read_prompts(options: argparse.Namespace, tokenizer: Tokenizer | None, vocab_size: int) -> list[tuple[list[int], bool]]:
    """Token ids of each prompt, and whether it is a chat."""
    source = options.prompt if options.prompt_file is None else read_text(options.prompt_file)
    if options.prompt_ids is not None:
        try:
            source = [int(part) for part in options.prompt_ids.split(",")]
        except ValueError as error:
            raise UserError(f"--prompt_ids {options.prompt_ids!r} is not a list of numbers such as 1,2,3") from error
    elif isinstance(source, int):
        source = torch.randint(vocab_size, (source,), generator=torch.Generator().manual_seed(options.seed)).tolist()
    prompts = []
    for number, line in enumerate(options.lines or [source], 1):
        try:
            prompts.append(encode(line, tokenizer, vocab_size, options.chat))
        except UserError as error:
            raise UserError(f"{options.prompts} line {number}: {error}") from error if options.lines else error
    return prompts


def cache_length(options: argparse.Namespace, model: Transformer, prompt_tokens: int) -> int:
    """Tokens that the cache must hold (auto: at most), checked against the flags and the model."""
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


def load_encoders(options: argparse.Namespace, model: Transformer) -> tuple[list[HashEncoder], dict]:
    """-> the encoder of each layer, and what their file says of them."""
    if options.signatures is not None:
        encoders, about = load_signatures(options.signatures, model.fingerprint())
        return tensor_parallel.shard_encoders(encoders), about
    print("warning: no --signatures file, so random projections choose the tokens; train one with train_hash.py",
          file=sys.stderr)
    return tensor_parallel.shard_encoders(random_encoders(HashConfig(), model.fingerprint(), options.seed)), {}


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


# ------------------------------------------------------------------------------------------------------------------ run

def read_turn() -> str:
    try:
        return input("\n> ")
    except EOFError:
        return ""


def chat(session: Session, max_new_tokens: int) -> None:
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
        if left < max_new_tokens:
            print(f"note: {left} of {session.length} tokens are left; the conversation ends with them", file=sys.stderr)
        answer = session.run([ids], max_new_tokens, Display(session.tokenizer, [[]]).put)
        messages.append({"role": "assistant", "content": NewText(session.tokenizer, []).whole(answer.tokens[0])})


def main() -> None:
    options = parse_options()
    torch.manual_seed(options.seed)
    dtype = getattr(torch, options.precision)
    if options.random_weights is not None:
        model = random_model(options.random_weights, options.device, dtype, options.seed, options.quantize)
    else:
        model = load_model(options.checkpoint_path, options.device, dtype)
    tokenizer = read_tokenizer(options)
    read = [] if options.interactive else read_prompts(options, tokenizer, model.args.vocab_size)
    prompts = [ids for ids, _ in read]
    longest = max(map(len, prompts), default=0)
    length = cache_length(options, model, longest)
    before = read_comparison(options, prompts[0], model.args.vocab_size) if options.compare else None
    draft = None
    if options.speculate == "draft":
        draft = load_draft(options.draft_checkpoint_path, model, tokenizer, length)
    encoders, about = load_encoders(options, draft or model) if options.is_hash else (None, {})
    models = [model, draft] if draft is not None else [model]
    needed = longest + options.max_new_tokens
    length = plan_memory(models, encoders, length, needed if options.max_seq_length == "auto" else length, options.batch_size,
                         options.prefill_chunk, options.speculate_k, options.dense_layers)
    tokens = length if options.interactive else needed
    rows = length + options.speculate_k  # of the caches, as Session makes them
    settings = None
    if encoders is not None:
        settings = sparse_settings(rows, tokens, options.budget, options.sparsity, options.sink, options.recent,
                                   options.dense_layers)
    if options.budgets == "calibrated":
        settings = tensor_parallel.shard_settings(calibrated(settings, about, tokens, rows))
    session = Session(model, tokenizer, length, encoders, settings, DecodeOptions(
        options.batch_size, options.temperature, options.top_k, options.ignore_eos, options.compile, options.compile_prefill,
        options.prefill_chunk, options.sparse_tail, options.speculate_k), draft)
    if options.interactive:
        chat(session, options.max_new_tokens)
        return

    contexts = [[] if is_chat else ids for ids, is_chat in read]  # an answer in a chat is a text of its own
    samples: list[Sample] = []
    texts: list[str] = []
    profiler = torch.profiler.profile() if options.profile is not None else contextlib.nullcontext()
    for i in range(options.num_samples):
        session.cached = []  # every sample pays for its own prefill
        show = Display(tokenizer, contexts).put if tokenizer is not None and not options.no_stream else lambda *new: None
        with profiler if i == options.num_samples - 1 else contextlib.nullcontext():
            samples.append(session.run(prompts, options.max_new_tokens, show))
        if tokenizer is not None:
            texts += [NewText(tokenizer, contexts[row % len(contexts)]).whole(tokens)
                      for row, tokens in enumerate(samples[-1].tokens)]
    if options.no_stream and not options.json:
        print("\n".join(texts))
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
        saved = result | {"log_likelihood": session.teacher_force(prompts[0], tokens)[1] if len(tokens) > 1 else None}
        if distributed.rank() == 0:
            with atomic_path(options.save) as beside:
                beside.write_text(json.dumps(saved))
    if options.json:
        print(json.dumps(result))


if __name__ == "__main__":
    distributed.run_ranks(main)
