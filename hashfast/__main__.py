"""The commands: `python -m hashfast COMMAND ...` in a clone, `hashfast COMMAND ...` once installed."""
import importlib
import os
import sys

import hashfast
from hashfast.common import UserError, run_command

COMMANDS = {
    "generate": ("hashfast.generate", "load a model, prefill a prompt, decode, print"),
    "train": ("hashfast.train_hash", "train signatures for a frozen model"),
    "eval": ("hashfast.commands.eval", "quality: perplexity, retrieval, recall, tasks of lm-evaluation-harness"),
    "lm-eval": ("hashfast.commands.lm_eval", "lm-evaluation-harness with the model hashfast, on transformers"),
    "bench": ("hashfast.commands.bench", "latency: attention, decode steps, prefill, speculation; plots and tables"),
    "quantize": ("hashfast.commands.quantize", "write a checkpoint with quantised linear layers"),
    "download": ("hashfast.commands.download", "fetch a model from Hugging Face"),
    "convert-gguf": ("hashfast.commands.convert_gguf", "a GGUF file to a checkpoint folder"),
    "convert-hashattention": ("hashfast.commands.convert_hashattention", "signatures trained by HashAttention or HATA"),
    "ablations": ("hashfast.commands.ablations", "what each choice of the method is worth on a model"),
    "list": ("hashfast.commands.list", "presets, signature files, and which checkpoint each fits"),
}


def usage() -> str:
    lines = [f"  {name:22} {about}" for name, (_, about) in COMMANDS.items()]
    return "\n".join(["usage: hashfast COMMAND ...", "", *lines, "", "`hashfast COMMAND --help` lists a command's flags."])


def run_named() -> None:
    """Run the command that the first word names."""
    name = sys.argv[1] if len(sys.argv) > 1 else "--help"
    if name in ("--help", "-h"):
        print(usage())
    elif name == "--version":
        print(f"hashfast {hashfast.__version__}")
    elif name in COMMANDS:
        sys.argv[:2] = [f"hashfast {name}"]
        importlib.import_module(COMMANDS[name][0]).main()
    else:
        raise UserError(f"no command {name!r}; choose from {', '.join(COMMANDS)}")


def main() -> None:
    run = run_command
    if "TORCHELASTIC_RUN_ID" in os.environ:
        from hashfast.runtime.distributed import run_ranks as run
    run(run_named)


if __name__ == "__main__":
    main()
