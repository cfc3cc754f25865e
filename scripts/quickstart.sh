#!/usr/bin/env bash
# From nothing to generated text: environment, a small real model, a book, then dense and hash-sparse decoding of one prompt.
# usage: bash scripts/quickstart.sh        (PYTHON=python3.12 bash scripts/quickstart.sh chooses the Python)
[[ "${1:-}" != --help && "${1:-}" != -h ]] || { sed -n '2,/^[^#]/s/^# \{0,1\}//p' "$0"; exit; }
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
source scripts/setup_venv.sh
setup_venv requirements.txt

.venv/bin/python -m hashfast.commands.fetch_quickstart

generate=(
    .venv/bin/python generate.py
    --checkpoint_path checkpoints/smollm2-135m-instruct
    --prompt_file checkpoints/alice-question.txt
    --chat --max_new_tokens 128 --temperature 0 --compile
)
"${generate[@]}" --attention dense --save checkpoints/quickstart-dense.json
"${generate[@]}" --attention hash --sparsity 16 --signatures weights/smollm2-135m-instruct.safetensors \
    --compare checkpoints/quickstart-dense.json
