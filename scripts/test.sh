#!/usr/bin/env bash
# The test suite in its own environment, with the real weights it needs. Arguments go to pytest: bash scripts/test.sh -k model
[[ "${1:-}" != --help && "${1:-}" != -h ]] || { sed -n '2,/^[^#]/s/^# \{0,1\}//p' "$0"; exit; }
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
source scripts/setup_venv.sh
setup_venv requirements-dev.txt

.venv/bin/python -m hashfast.commands.fetch_quickstart
.venv/bin/python -m ruff check --quiet .
# two processes of one thread each: threads that wait for each other's small products spin
OMP_NUM_THREADS=1 exec .venv/bin/python -m pytest -n 2 --dist loadfile --no-loadscope-reorder "$@"
