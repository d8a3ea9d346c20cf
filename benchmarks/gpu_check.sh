#!/usr/bin/env bash
# Checks the kernels on a machine with a Hopper GPU, and times them, within ten minutes.
#
#   benchmarks/gpu_check.sh [FOLDER]         # FOLDER gets both logs and the figures; gpu_check
#   benchmarks/gpu_check.sh --toy [FOLDER]   # without a GPU: tries the script itself, at toy size
#
# PYTHON is the command that runs Python, "python" by default; e.g. "uv run --extra cuda python". It
# must know what the tests need. torch and flash-linear-attention are timed beside the kernels if
# they are there.
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
    numerics=($python -m tests.support.gpu.ordinary 3)
else
    nvidia-smi --query-gpu=name,driver_version,memory.total --format=csv
    # Several processes share the GPU; what the kernels are held against is computed on the host.
    export JAX_PLATFORMS=cuda,cpu XLA_PYTHON_CLIENT_PREALLOCATE=false
    numerics=(timeout 270 $python -m pytest -m gpu -n "${WORKERS:-12}" -v --tb=short -rf)
    numerics+=(tests/pallas/gpu)
fi
"${numerics[@]}" 2>&1 | tee "$folder/numerics.log" || failed=1

echo "== Speed: side by side"
unset JAX_PLATFORMS
$python benchmarks/operator_gpu.py $toy --seconds 200 --json "$folder/operator_gpu.json" 2>&1 |
    tee "$folder/speed.md" || failed=1
exit $failed
