"""Turn a GGUF file (Llama or Qwen2 architecture) into a folder in the Hugging Face layout.

usage: python -m hashfast convert-gguf model.gguf checkpoints/model [--dtype bfloat16]
"""
from pathlib import Path

from hashfast.common import Parser
from hashfast.runtime.gguf import DTYPES, convert


def main() -> None:
    parser = Parser(description=__doc__.splitlines()[0])
    parser.add_argument("gguf_file", type=Path)
    parser.add_argument("out_folder", type=Path)
    parser.add_argument("--dtype", choices=DTYPES, default="bfloat16")
    args = parser.parse_args()
    convert(args.gguf_file, args.out_folder, args.dtype)
    print(f"{args.out_folder} is ready")
