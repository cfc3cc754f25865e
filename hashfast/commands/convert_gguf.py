"""Turn a GGUF file (Llama or Qwen2 architecture) into a folder in the Hugging Face layout.

usage: python -m hashfast convert-gguf model.gguf checkpoints/model [--dtype bfloat16]
"""
from pathlib import Path

from hashfast.common import Parser
from hashfast.progress import Progress


def main() -> None:
    parser = Parser(description=__doc__.splitlines()[0])
    parser.add_argument("gguf_file", type=Path, help="the file to read")
    parser.add_argument("out_folder", type=Path, help="the folder to make")
    parser.add_argument("--dtype", choices=("float32", "bfloat16", "float16"), default="bfloat16", help="of the weights")
    args = parser.parse_args()
    with Progress("starting"):
        from hashfast.runtime.gguf import convert

    convert(args.gguf_file, args.out_folder, args.dtype)
    print(f"{args.out_folder} is ready")
