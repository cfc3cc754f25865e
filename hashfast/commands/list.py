"""What there is: presets for random weights, signature files, and which of these checkpoints each file is for.

    python -m hashfast list checkpoints/*
"""
import json
from pathlib import Path

from safetensors import SafetensorError, safe_open

from hashfast.common import WEIGHTS, Parser, UserError
from hashfast.runtime.checkpoint import PRESETS, plan_loading
from hashfast.runtime.signatures import differences


def signature_files(folder: Path) -> dict[Path, dict]:
    """The signature files in a folder, and what each says of itself."""
    files = {}
    for path in sorted(folder.glob("*.safetensors")):
        try:
            with safe_open(path, framework="pt") as file:
                files[path] = json.loads((file.metadata() or {})["hashfast"])
        except (SafetensorError, OSError, KeyError, ValueError):
            continue  # some other safetensors file
    return files


def describe(about: dict) -> str:
    config, model = about["config"], about["model"]
    share = "KV head" if config["share"] == "kv" else "query head"
    return (f"{about.get('recipe', 'unknown')}, {config['bits']} bits a {share}, {model['n_layer']} layers, "
            f"{model['n_head']}/{model['n_kv_head']} heads of {model['head_dim']}, vocabulary {model['vocab_size']}")


def main() -> None:
    parser = Parser(description=__doc__.splitlines()[0])
    parser.add_argument("checkpoints", type=Path, nargs="*", help="checkpoint folders to match signature files with")
    parser.add_argument("--signatures", type=Path, default=WEIGHTS, help="folder of signature files (default: those that ship)")
    options = parser.parse_args()
    files = signature_files(options.signatures)
    print("presets (generate --random_weights):", ", ".join(PRESETS))
    print(f"\nsignature files in {options.signatures}:")
    for path, about in files.items():
        print(f"  {path.name:56} {describe(about)}")
    for folder in options.checkpoints:
        try:
            fingerprint = plan_loading(folder)[0].fingerprint()  # without weights: their hash is compared at load
        except UserError as error:
            print(f"\n{folder}: {error}")
            continue
        names = [path.name for path, about in files.items() if not differences(about["model"], fingerprint)]
        print(f"\n{folder}: {', '.join(names) or 'no signature file; train one with `hashfast train`'}")
