#!/usr/bin/env bash
# On a machine with a Hopper GPU: are the kernels right, and how fast are they? Within ten minutes.
#
#   benchmarks/gpu_check.sh [FOLDER]         # default: gpu_check; both logs and the figures
#   benchmarks/gpu_check.sh --toy [FOLDER]   # no GPU: the script itself, at toy size
#
# PYTHON is the command to run, "python" by default, e.g. PYTHON="uv run --extra cuda python". It
# needs what the tests need; flash-linear-attention and torch, for the contest, may be missing.
set -uo pipefail
cd "$(dirname "$0")/.."
python=${PYTHON:-python}
toy=
if [ "${1:-}" = --toy ]; then
    toy="--toy --rounds 1"
    shift
fi
folder=${1:-gpu_check}
mkdir -p "$folder"
export PYTHONPATH=$PWD${PYTHONPATH:+:$PYTHONPATH} PYTHONUNBUFFERED=1
failed=0

echo "== Numerics: the compiled kernels against float64 on the host"
if [ "$toy" ]; then
    export JAX_PLATFORMS=cpu NPROC=16
    numerics=($python -m tests.support.gpu.interpreted 2)
else
    nvidia-smi --query-gpu=name,driver_version,memory.total --format=csv
    # Several processes share the device, and the definition is computed on the host.
    export JAX_PLATFORMS=cuda,cpu XLA_PYTHON_CLIENT_PREALLOCATE=false
    numerics=(timeout 270 $python -m pytest -m gpu -n "${WORKERS:-12}" -v --tb=short -rf tests/pallas/gpu)
fi
"${numerics[@]}" 2>&1 | tee "$folder/numerics.log" || failed=1

echo "== Speed: side by side"
unset JAX_PLATFORMS
$python benchmarks/operator_gpu.py $toy --seconds 200 --json "$folder/operator_gpu.json" 2>&1 |
    tee "$folder/speed.md" || failed=1
exit $failed
