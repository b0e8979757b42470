#!/usr/bin/env bash
# Everything to be measured on a GPU, in one go, into one folder to be sent back.
#
#   scripts/gpu_check.sh                    on the first CUDA or ROCm device: correctness, bandwidth, decode against stock
#   scripts/gpu_check.sh --dry-run          the same commands at tiny shapes on a CPU: their figures mean nothing
#   scripts/gpu_check.sh --output FOLDER    the folder for the results (results)
#
# It installs nothing: pip install -e '.[bench,gpu]' first. From the environment: PYTHON names the interpreter (python).
set -euo pipefail

dry_run=
output=results
while [ $# -gt 0 ]; do
    case "$1" in
        --dry-run)
            dry_run=yes
            shift
            ;;
        --output)
            [ $# -ge 2 ] || { echo "--output needs a folder" >&2; exit 2; }
            output=$2
            shift 2
            ;;
        -h | --help)
            sed -n '2,8s/^# \{0,1\}//p' "$0"
            exit 0
            ;;
        *)
            echo "unknown argument: $1 (see --help)" >&2
            exit 2
            ;;
    esac
done

scripts=$(cd "$(dirname "$0")" && pwd)
python=${PYTHON:-python}

require() {
    local problem
    if ! problem=$("$python" -c "import $1" 2>&1); then
        echo "Something is not installed for $python (${problem##*$'\n'}): pip install -e '.[bench,gpu]'" >&2
        exit 1
    fi
}

require torch
if [ -n "$dry_run" ]; then
    # Before anything imports Triton: functions that it has compiled and those of the interpreter do not mix.
    export TRITON_INTERPRET=1
    kernels=(--dry_run)
    decode=(--device cpu --dtype float32 --layers 1 --contexts 32 --repeats 1 --steps 1 --bandwidth_mb 1)
    recipes=(stock "rank R/2")
    models=(mini)
else
    if ! "$python" -c "import sys, torch; sys.exit(not torch.cuda.is_available())"; then
        echo "No GPU: PyTorch finds no CUDA or ROCm device here. Nothing was measured; --dry-run does without one." >&2
        exit 1
    fi
    kernels=(--bandwidth_mb 512)
    decode=(--device cuda --dtype bfloat16 --layers 2 --contexts 4096 16384 65536 --batch_sizes 1 8)
    recipes=(stock "full rank" "rank R/2" "packed 4x")
    models=(v2-lite v3)
fi

require "triton, kvsplice_hf.bench"

mkdir -p "$output"
folder=$(mktemp -d "$output/gpu-check-$(date +%Y%m%d-%H%M%S)-XXXX")
failed=()

# What a program prints goes to NAME.log (tables and messages) and NAME.json (its last line); its own folder beside them.
measure() {
    local name=$1
    shift
    echo "$name: $*" >&2
    if ! TQDM_DISABLE=1 "$python" "$@" --output "$folder" >"$folder/$name.out" 2>"$folder/$name.log"; then
        failed+=("$name")
        echo "$name failed; its last words: $(tail -n 1 "$folder/$name.log")" >&2
    fi
    tail -n 1 "$folder/$name.out" >"$folder/$name.json"
    rm "$folder/$name.out"
    printf '\n## %s\n\n```\n' "$name" >>"$folder/results.md"
    cat "$folder/$name.log" >>"$folder/results.md"
    printf '```\n' >>"$folder/results.md"
}

"$python" -c "from torch.utils.collect_env import main; main()" >"$folder/environment.txt"
{
    printf '# GPU check%s\n\n```\n' "${dry_run:+ (dry run: the figures mean nothing)}"
    cat "$folder/environment.txt"
    printf '```\n'
} >"$folder/results.md"
measure kernels "$scripts/measure/gpu_kernels.py" "${kernels[@]}"
for model in "${models[@]}"; do
    measure "decode-$model" "$scripts/measure/decode.py" --geometry "$model" "${decode[@]}" --recipes "${recipes[@]}"
done

archive="$folder.tar.gz"
tar -czf "$archive" -C "$(dirname "$folder")" "$(basename "$folder")"
echo "The results are in $folder. Please send $archive back, as an attachment to an issue of this project." >&2
if [ ${#failed[@]} -gt 0 ]; then
    echo "Failed: ${failed[*]}. The results are worth sending all the same." >&2
    exit 1
fi
echo "$folder"
