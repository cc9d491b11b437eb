#!/usr/bin/env bash
# Every GPU benchmark on one GPU, under nine minutes on an H100 by its limits: prints all tables, and writes them into
# $OUT (default ./benchmark-results). A benchmark that fails or takes too long is said at the end, and the others go on.
#   benchmarks/gpu_all.sh [--toy]           PYTHON=... chooses the interpreter
set -uo pipefail
cd "$(dirname "$0")/.."
PYTHON=${PYTHON:-python3}
OUT=${OUT:-./benchmark-results}
export PYTHONPATH="$PWD${PYTHONPATH:+:$PYTHONPATH}"
export PYTORCH_CUDA_ALLOC_CONF=${PYTORCH_CUDA_ALLOC_CONF:-expandable_segments:True}
toy=("$@")
few=()
if [[ ${1:-} == --toy ]]; then few=(--steps 1); fi
mkdir -p "$OUT"
failed=()

# run SECONDS WORDS...: one benchmark, within its share of the nine minutes (of the toy, within ten minutes).
run() {
    local limit=$1
    shift
    [[ ${toy[0]:-} == --toy ]] && limit=600
    echo "== $*"
    timeout "$limit" "$PYTHON" "benchmarks/$1" "${@:2}" --out "$OUT" "${toy[@]}" || failed+=("$* (status $?)")
}

run 80 gpu_smoke.py
run 110 gpu_step.py "${few[@]}"
run 70 gpu_published_way.py "${few[@]}"
run 50 gpu_profile.py
if [[ ${toy[0]:-} == --toy ]]; then
    run 0 gpu_fp8.py --losses 2 "${few[@]}"
    run 0 decoding.py --images 4 --rounds 1
else
    run 150 gpu_fp8.py --losses 200
    run 60 decoding.py --images 64 --rounds 3
fi

echo "== results in $OUT"
if ((${#failed[@]})); then
    printf 'failed: %s\n' "${failed[@]}" >&2
    exit 1
fi
