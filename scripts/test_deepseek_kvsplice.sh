#!/usr/bin/env bash
# Benchmark and quality of a model in one go, with and without the splice.
#
#   scripts/test_deepseek_kvsplice.sh                                       the embedded default, SmolLM2-135M as MLA
#   scripts/test_deepseek_kvsplice.sh --model deepseek-ai/DeepSeek-V2-Lite
#
# From the environment: PYTHON names the interpreter (python), OUTPUT the folder for results (results); BENCHMARK_ARGS and
# QUALITY_ARGS are passed on to benchmark_deepseek_kvsplice.py and eval_deepseek_quality.py.
set -euo pipefail

model=demo
while [ $# -gt 0 ]; do
    case "$1" in
        --model)
            [ $# -ge 2 ] || { echo "--model needs a folder or hub name" >&2; exit 2; }
            model=$2
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
output=${OUTPUT:-results}
# The arguments are meant to be split into words.
# shellcheck disable=SC2086
"$python" "$scripts/benchmark_deepseek_kvsplice.py" --model "$model" --output "$output" ${BENCHMARK_ARGS:-}
# shellcheck disable=SC2086
"$python" "$scripts/eval_deepseek_quality.py" --model "$model" --output "$output" ${QUALITY_ARGS:-}
