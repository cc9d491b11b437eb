#!/usr/bin/env bash
# Runs all GPU benchmarks on one GPU, limited to ten minutes on an H100: prints all tables and writes them into $OUT
# (default ./benchmark-results). Benchmarks that fail or exceed their time limit are listed at the end.
#   benchmarks/gpu_all.sh [--toy]           PYTHON=... chooses the interpreter
set -uo pipefail
cd "$(dirname "$0")/.." || exit
PYTHON=${PYTHON:-python3}
OUT=${OUT:-./benchmark-results}
export PYTHONPATH="$PWD${PYTHONPATH:+:$PYTHONPATH}"
export PYTORCH_CUDA_ALLOC_CONF=${PYTORCH_CUDA_ALLOC_CONF:-expandable_segments:True}
steps=(--steps 5)
fewer=(--steps 3)
losses=(--losses 200)
photos=(--images 32 --rounds 2)
toy=()
if [[ ${1:-} == --toy ]]; then
    steps=(--steps 1) fewer=(--steps 1) losses=(--losses 2) photos=(--images 4 --rounds 1) toy=(--toy)
fi
mkdir -p "$OUT"
failed=()

# run SECONDS SCRIPT OPTIONS...: runs one benchmark with a time limit (ten minutes for the toy).
run() {
    local limit=$1
    shift
    ((${#toy[@]})) && limit=600
    echo "== $*"
    timeout "$limit" "$PYTHON" "benchmarks/$1" "${@:2}" --out "$OUT" "${toy[@]}" || failed+=("$* (status $?)")
}

# The most important ones first, in case the time is cut short.
run 80 gpu_smoke.py
run 120 gpu_step.py "${steps[@]}"
run 70 gpu_published_way.py "${steps[@]}"
run 130 gpu_fp8.py "${fewer[@]}" "${losses[@]}"
run 40 gpu_profile.py
run 55 gpu_variants.py "${fewer[@]}"
run 40 decoding.py "${photos[@]}"
run 40 experts.py "${steps[@]}"

echo "== results in $OUT"
if ((${#failed[@]})); then
    printf 'failed: %s\n' "${failed[@]}" >&2
    exit 1
fi
