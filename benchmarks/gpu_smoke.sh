#!/usr/bin/env bash
# Smoke test of a GPU machine, two minutes: imports TransformerEngine, checks packed attention, trains some steps.
#   benchmarks/gpu_smoke.sh [--toy]         PYTHON=... chooses the interpreter
set -euo pipefail
cd "$(dirname "$0")/.."
PYTHON=${PYTHON:-python3}
export PYTHONPATH="$PWD${PYTHONPATH:+:$PYTHONPATH}"
if [[ ${1:-} != --toy ]]; then
    "$PYTHON" -c 'import torch, transformer_engine.pytorch as te; print("TransformerEngine imports,", torch.cuda.get_device_name())'
fi
exec "$PYTHON" benchmarks/gpu_smoke.py "$@"
