"""What there is: presets for random weights, signature files, models here, and which signatures fit which.

    python -m hashfast list                 the models in checkpoints/
    python -m hashfast list FOLDER..        these
"""
from pathlib import Path

from hashfast.common import WEIGHTS, Parser, UserError
from hashfast.progress import Progress


def describe(about: dict) -> str:
    config, model = about["config"], about["model"]
    share = "KV head" if config["share"] == "kv" else "query head"
    return (f"{about.get('recipe', 'unknown')}, {config['bits']} bits a {share}, {model['n_layer']} layers, "
            f"{model['n_head']}/{model['n_kv_head']} heads of {model['head_dim']}, vocabulary {model['vocab_size']}")


def find_models(folder: Path) -> list[Path]:
    """The checkpoints in a folder, and those of an owner/name one below."""
    return sorted(path.parent for pattern in ("*/config.json", "*/*/config.json") for path in folder.glob(pattern))


def main() -> None:
    parser = Parser(description=__doc__)
    parser.add_argument("checkpoints", type=Path, nargs="*", help="models' folders (default: those in checkpoints/)")
    parser.add_argument("--signatures", type=Path, default=WEIGHTS, help="folder of signature files (default: those that ship)")
    options = parser.parse_args()
    with Progress("starting"):
        from hashfast.runtime.checkpoint import PRESETS
        from hashfast.runtime.signatures import differences, model_outline, signature_files

    files = signature_files(options.signatures)
    print("presets (generate --random_weights):", ", ".join(PRESETS))
    print(f"\nsignature files in {options.signatures}:")
    for path, about in files.items():
        print(f"  {path.name:56} {describe(about)}")
    models = options.checkpoints or find_models(Path("checkpoints"))
    if not models:
        print("\nno models in checkpoints/; `hashfast download` fetches one")
    for folder in models:
        try:
            fingerprint = model_outline(folder).fingerprint()
        except UserError as error:
            print(f"\n{folder}: {error}")
            continue
        names = [path.name for path, about in files.items() if not differences(about["model"], fingerprint)]
        print(f"\n{folder}: {', '.join(names) or 'no signature file; train one with `hashfast train`'}")
