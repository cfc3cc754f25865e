"""Turn signatures that others trained into a file for --signatures: HashAttention's networks or HATA's matrices.

usage: python -m hashfast convert-hashattention FILE.. --checkpoint_path checkpoints/model --out weights/model.safetensors

hashfast/runtime/foreign_signatures.py says which files can be read.
"""
from dataclasses import asdict
from pathlib import Path

from hashfast.common import Parser, check_writable
from hashfast.progress import Progress


def main() -> None:
    parser = Parser(description=__doc__.splitlines()[0])
    parser.add_argument("files", type=Path, nargs="+", metavar="FILE", help="one for all layers, or HATA's one per layer")
    parser.add_argument("--checkpoint_path", type=Path, required=True, help="the model they were trained for")
    parser.add_argument("--out", type=Path, required=True, help="the signatures file to write")
    args = parser.parse_args()
    check_writable("--out", args.out)
    with Progress("starting"):
        from hashfast.runtime.foreign_signatures import convert
        from hashfast.runtime.hub import checkpoint_folder
        from hashfast.runtime.signatures import model_outline, save_signatures

    model = model_outline(checkpoint_folder(args.checkpoint_path)).fingerprint()
    recipe, encoders = convert(args.files, model)
    save_signatures(args.out, encoders, model, {"recipe": recipe, "converted_from": [path.name for path in args.files]})
    print(f"{args.out}: {recipe}, {asdict(encoders[0].config)}")
