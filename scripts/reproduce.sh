#!/usr/bin/env bash
# Measure the results again: each part writes its files and plots in results/, and at the end the tables of README.md and
# results/README.md are made anew.
# usage: bash scripts/reproduce.sh {attention,decode,prefill,speculate,parity,quality,all}...
#
# It needs an NVIDIA GPU (for the figures as they stand, an H200) and the environment that scripts/quickstart.sh made; with
# PYTHON=python3 it uses one of yours. attention, decode, prefill and speculate need nothing else: their weights are random.
#   parity    two or four GPUs for tensor parallelism, else left out with a line; for speculation MODEL and PROMPT
#   quality   BOOKS; for everything at 32K tokens MODEL and TRAIN as well
#   BOOKS     a folder of long .txt files (32K tokens for MODEL) that no signature was trained on
#   PLAYS     a glob of plays, long .txt files; default: data/asyoulik.txt, of which 32K tokens make one window
#   TRAIN     a folder of other long .txt files, for the signatures of MODEL that are compared with its own
#   MODEL     a checkpoint folder made for 32K tokens (python -m hashfast download Qwen/Qwen2.5-Coder-1.5B-Instruct --out ...)
#   SIGNATURES  its signatures (python train_hash.py); default: weights/<the folder's name>.safetensors
#   PROMPT    a text file of about 31,000 of its tokens;  DRAFT: a smaller checkpoint of the same vocabulary
#   RESULTS   another folder than results/; the READMEs are then left alone
[[ "${1:-}" != --help && "${1:-}" != -h ]] || { sed -n '2,/^[^#]/s/^# \{0,1\}//p' "$0"; exit; }
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
# of the code as it is now: the first results file that is written over would make it "dirty"
HASHFAST_COMMIT=${HASHFAST_COMMIT:-$(git describe --always --dirty --abbrev=12 2>/dev/null || echo unknown)}
export HASHFAST_COMMIT

PYTHON=${PYTHON:-.venv/bin/python}
RESULTS=${RESULTS:-results}
gpus=$(nvidia-smi --query-gpu=name --format=csv,noheader 2>/dev/null || true)
name=$(head -n 1 <<<"$gpus" | sed -E 's/^NVIDIA //; s/ [0-9]+GB.*//' | tr 'A-Z ' 'a-z-')
name=${name:-gpu} # h200, and of "NVIDIA H100 80GB HBM3" h100
small=checkpoints/smollm2-135m-instruct
MODEL=${MODEL:-}
PLAYS=${PLAYS:-data/asyoulik.txt}
SIGNATURES=${SIGNATURES:-weights/$(basename "${MODEL:-none}").safetensors}

die() {
    echo "error: $*" >&2
    exit 2
}

"$PYTHON" -c "" >/dev/null 2>&1 || die "cannot run $PYTHON; run scripts/quickstart.sh first, or name a Python with PYTHON="

run() {
    echo "+ $*" >&2
    "$PYTHON" "$@"
}

attention() {
    run -m hashfast bench attention --json "$RESULTS/attention_$name.json"
    run -m hashfast bench plot "$RESULTS/attention_$name.json"
}

decode() {
    run -m hashfast bench decode --json "$RESULTS/decode_$name.json"
    run -m hashfast bench decode --model qwen3-4b --shapes 1x32768 8x32768 --no_warm_start \
        --json "$RESULTS/decode_qwen3_$name.json"
    run -m hashfast bench latency --json "$RESULTS/latency_$name.json"
    run -m hashfast bench transformers --json "$RESULTS/transformers_$name.json"
    run -m hashfast bench ragged --json "$RESULTS/ragged_$name.json"
    run -m hashfast bench plot "$RESULTS/decode_$name.json" "$RESULTS/latency_$name.json"
}

prefill() {
    run -m hashfast bench prefill --json "$RESULTS/prefill_$name.json"
}

speculate() {
    run -m hashfast bench speculate --json "$RESULTS/speculate_$name.json"
}

parity() {
    local ranks k folder="$RESULTS/raw" shapes="1x32768 8x32768" files
    local torchrun=(-m torch.distributed.run --standalone --nproc_per_node)
    # shellcheck disable=SC2086  # shapes are words
    run -m hashfast bench decode --shapes $shapes --no_warm_start --json "$folder/plain_$name.json"
    run -m hashfast bench decode --shapes 1x32768 --quantize int8 --attention hash \
        --no_warm_start --json "$folder/int8_$name.json"
    files=("$folder/plain_$name.json" "$folder/int8_$name.json")
    for ranks in 2 4; do
        if [ "$(wc -l <<<"$gpus")" -ge $ranks ]; then
            # shellcheck disable=SC2086
            run "${torchrun[@]}" $ranks -m hashfast bench decode --shapes $shapes --json "$folder/tp${ranks}_$name.json"
            files+=("$folder/tp${ranks}_$name.json")
        else
            echo "tensor parallelism of $ranks is left out: it needs as many GPUs" >&2
        fi
    done
    if [ "$(wc -l <<<"$gpus")" -ge 4 ]; then
        run "${torchrun[@]}" 4 -m hashfast bench decode --model llama-3.1-70b --shapes 1x32768 --steps 30 \
            --json "$RESULTS/decode_70b_$name.json"
    fi
    if [ -n "$MODEL" ]; then
        local answer=(generate.py --checkpoint_path "$MODEL" --prompt_file "$PROMPT" --max_new_tokens 384 --ignore_eos
            --temperature 0 --compile --no_stream)
        run "${answer[@]}" --save "$folder/generate_dense.json"
        files+=("$folder/generate_dense.json")
        for k in 2 4; do
            run "${answer[@]}" --speculate self --speculate_k $k --sparsity 32 --signatures "$SIGNATURES" \
                --save "$folder/generate_self$k.json"
            files+=("$folder/generate_self$k.json")
        done
        if [ -n "${DRAFT:-}" ]; then
            run "${answer[@]}" --draft_checkpoint_path "$DRAFT" --save "$folder/generate_draft.json"
            files+=("$folder/generate_draft.json")
        fi
    else
        echo "speculation with real weights is left out: it needs MODEL" >&2
    fi
    run -m hashfast bench parity "${files[@]}" --json "$RESULTS/parity_$name.json"
}

# distance MODEL FILE CONTEXT BATCH RATIOS SIGNATURES...: the table of all selectors by KL to dense, over novels, code and plays
distance() {
    local model=$1 file=$2 context=$3 batch=$4 ratios=$5
    # shellcheck disable=SC2086  # ratios are words
    run -m hashfast eval ppl --checkpoint_path "$model" --signatures "${@:6}" --context "$context" --last 256 --windows 2 \
        --kinds "novels=$BOOKS/*.txt" code=package:{torch,sympy,networkx,asyncio} "dialogue=$PLAYS" --batch_size "$batch" \
        --ratios $ratios --json "$RESULTS/$file" --selector hash oracle oracle_group oracle_max streaming h2o quest \
        double_sparsity magicpig multipole lsh
}

quality() {
    run -m hashfast.commands.fetch_quickstart
    distance $small quality_ppl.json 8192 8 "8 16 32" weights/smollm2-135m-instruct{,-hashattention,-hata}.safetensors
    run -m hashfast eval recall --checkpoint_path $small --signatures weights/smollm2-135m-instruct.safetensors --data "$BOOKS"/*.txt \
        --context 4096 --last 16 --selector hash oracle_group quest lsh streaming --ratios 16 --json "$RESULTS/recall.json"
    run -m hashfast ablations --checkpoint_path $small --data "$BOOKS"/*.txt --context 2048 --sink 4 --recent 12 \
        --sequences 12 --steps 150 --layers 4 14 24 --json "$RESULTS/ablations.json"
    if [ -z "$MODEL" ]; then
        echo "quality at 32K tokens is left out: it needs MODEL" >&2
        return
    fi
    local variant file own=weights/$(basename "$MODEL")
    for variant in "64bit --bits 64" "hashattention --recipe hashattention" "hata --recipe hata"; do
        file=$own-${variant%% *}.safetensors
        # shellcheck disable=SC2086  # flags are words
        [ -f "$file" ] || run train_hash.py --checkpoint_path "$MODEL" --data "$TRAIN"/*.txt --context 32768 --out "$file" \
            ${variant#* }
    done
    local shared=(--checkpoint_path "$MODEL" --data "$BOOKS"/*.txt) others=(oracle_group quest double_sparsity lsh streaming) context
    local compared=("$SIGNATURES" "$own-64bit.safetensors" "$own-hashattention.safetensors" "$own-hata.safetensors")
    distance "$MODEL" quality_ppl_32k.json 32768 6 "8 16 32 64" "${compared[@]}"
    for context in 16 32; do
        run -m hashfast eval needles "${shared[@]}" --signatures "${compared[@]}" --context $((1024 * context)) --batch_size 16 \
            --ratios 16 32 --selector hash "${others[@]}" --json "$RESULTS/quality_needles_${context}k.json"
    done
    if "$PYTHON" -c "import lm_eval, wonderwords, nltk" >/dev/null 2>&1; then
        for context in 16 32; do
            run -m hashfast eval lm --checkpoint_path "$MODEL" --signatures "$SIGNATURES" --context $((1024 * context)) --ratios 16 32 \
                --tasks niah_single_1 niah_multikey_2 niah_multikey_3 ruler_vt ruler_cwe ruler_fwe --limit 50 --chat \
                --metadata "{\"max_seq_lengths\":[$((1024 * context))]}" --json "$RESULTS/quality_ruler_${context}k.json"
        done
    else
        echo "RULER is left out: it needs pip install lm-eval wonderwords nltk" >&2
    fi
    run -m hashfast eval grid "${shared[@]}" --signatures "$SIGNATURES" --batch_size 20 --ratios 16 --json "$RESULTS/needle_grid.json"
}

parts=" attention decode prefill speculate parity quality "
[ $# -gt 0 ] || die "say what to measure: one or more of${parts}all"
for part in "$@"; do
    case $part in quality | all)
        [ -d "${BOOKS:-}" ] || die "quality needs BOOKS=a folder of long .txt files that no signature was trained on"
        [ -z "$MODEL" ] || [ -d "${TRAIN:-}" ] || die "MODEL's quality needs TRAIN=a folder of other long .txt files" ;;
    esac
    case $part in parity | all)
        [ -z "$MODEL" ] || [ -f "${PROMPT:-}" ] || die "MODEL's speculation needs PROMPT=a text file of about 31,000 tokens" ;;
    esac
    [ "$part" = all ] || [[ $parts == *" $part "* ]] || die "no part $part; there are${parts}all"
done
for part in "$@"; do
    # shellcheck disable=SC2086  # parts are words
    if [ "$part" = all ]; then for each in $parts; do $each; done; else $part; fi
done
if [ "$RESULTS" = results ]; then run -m hashfast bench report --write README.md results/README.md; else run -m hashfast bench report --results "$RESULTS"; fi
