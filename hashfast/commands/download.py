"""Download a model from Hugging Face: safetensors weights, configuration and tokenizer, nothing else.

usage: python -m hashfast download meta-llama/Llama-3.1-8B-Instruct [--out checkpoints/...] [--token hf_...] [--revision main]
"""
from pathlib import Path

from hashfast.common import Parser
from hashfast.progress import Progress


def main() -> None:
    parser = Parser(description="Download a model from Hugging Face.")
    parser.add_argument("repo", help="owner/name on Hugging Face")
    parser.add_argument("--out", type=Path, help="the folder to make (default: checkpoints/owner/name)")
    parser.add_argument("--token", help="access token for gated and private models (default: HF_TOKEN, or the login)")
    parser.add_argument("--revision", help="branch, tag or commit (default: main)")
    args = parser.parse_args()
    with Progress("starting"):
        from hashfast.runtime.hub import CHECKPOINTS, download

    out = args.out or CHECKPOINTS / args.repo
    download(args.repo, out, args.token, args.revision)
    print(f"{out} is ready")
