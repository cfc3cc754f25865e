# Sourced by quickstart.sh and test.sh, from the repository's root: `setup_venv requirements.txt` makes .venv with those
# packages. Everything that is downloaded, cached or compiled stays in this folder; nothing needs root.

die() {
    echo "error: $*" >&2
    exit 2
}

mkdir -p .cache/tmp 2>/dev/null || die "cannot write in $PWD; copy the repository to a folder of your own"
export TMPDIR="$PWD/.cache/tmp" XDG_CACHE_HOME="$PWD/.cache" HF_HOME="$PWD/.cache/huggingface" MPLCONFIGDIR="$PWD/.cache/matplotlib"
export TORCHINDUCTOR_CACHE_DIR="$PWD/.cache/inductor" TRITON_CACHE_DIR="$PWD/.cache/triton" CUDA_CACHE_PATH="$PWD/.cache/cuda"
export PIP_NO_CACHE_DIR=1 PIP_DISABLE_PIP_VERSION_CHECK=1
setup_log=.cache/setup.log

find_python() { # print a Python that is new enough
    local candidate candidates=(python3 python3.14 python3.13 python3.12 python3.11 python3.10)
    [ -z "${PYTHON:-}" ] || candidates=("$PYTHON")
    for candidate in "${candidates[@]}"; do
        if "$candidate" -c 'import sys; sys.exit(sys.version_info < (3, 10))' 2>/dev/null; then
            echo "$candidate"
            return
        fi
    done
    die "${PYTHON:-python3} is not Python 3.10 or newer; install one, or name it: PYTHON=/path/to/python3 bash $0"
}

pip_install() {
    .venv/bin/python -m pip install --quiet "$@" >>"$setup_log" 2>&1 && return
    if grep -qE 'No space left' "$setup_log"; then
        die "the disk is full; free some space (5 GB, with a GPU 12 GB) and run this again"
    elif grep -qE 'NewConnectionError|NameResolutionError|ConnectTimeout|ProxyError|Network is unreachable' "$setup_log"; then
        die "cannot reach the Python package index; check the network and run this again (details: $setup_log)"
    fi
    die "pip failed: $(grep '^ERROR' "$setup_log" | tail -n 1) (details: $setup_log)"
}

setup_venv() { # $1: a requirements file
    local python device=cpu stamp=".venv/$1.stamp" wanted torch cpu_index=https://download.pytorch.org/whl/cpu
    if nvidia-smi -L 2>/dev/null | grep -q '^GPU'; then device=gpu; fi
    wanted="$device $(cat requirements*.txt | sha256sum)"
    if [ "$(cat "$stamp" 2>/dev/null)" = "$wanted" ]; then return; fi

    # a GPU needs another build of torch than the one without
    if [ $device = gpu ] && compgen -G '.venv/lib/python*/site-packages/torch-*+cpu.dist-info' >/dev/null; then rm -rf .venv; fi
    : >"$setup_log"
    if ! .venv/bin/python -m pip --version >/dev/null 2>&1; then
        python=$(find_python)
        "$python" -c 'import ensurepip, venv' 2>/dev/null ||
            die "$python has no venv module; install it (Debian and Ubuntu: python3-venv) or name another Python with PYTHON="
        "$python" -m venv --clear .venv >>"$setup_log" 2>&1 || die "cannot make .venv: $(tail -n 1 "$setup_log")"
    fi
    echo "installing $1 into .venv (once; some minutes)"
    torch=$(grep '^torch==' requirements.txt)
    if [ $device = cpu ] && ! .venv/bin/python -m pip show --quiet torch 2>/dev/null &&
        timeout 5 .venv/bin/python -c "import urllib.request as r; r.urlopen('$cpu_index/torch/')" 2>/dev/null; then
        pip_install --no-deps --index-url "$cpu_index" "$torch" # a tenth of the size of the build on PyPI
    fi
    pip_install -r "$1"
    echo "$wanted" >"$stamp"
}
