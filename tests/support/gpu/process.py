"""Runs cases of the GPU kernels in processes of their own, in Mosaic's GPU interpreter.

NPROC=16 JAX_PLATFORMS=cpu python -m MODULE INDEX...    # MODULE is one of those here with `CASES`

prints "INDEX: ok" or "INDEX: error" for each. The interpreter runs every warpgroup in a thread that
waits for others. XLA has as many threads as the machine has cores unless NPROC, which is read once
when jax starts, says otherwise: with too few the interpreter hangs.
"""

import os
import subprocess
import sys
from collections.abc import Callable, Sequence
from typing import Any

import jax
from jax._src.pallas.mosaic_gpu.interpret import gpu_callbacks
from jax.sharding import AbstractDevice, AbstractMesh

THREADS = {"NPROC": "16", "JAX_PLATFORMS": "cpu"}

HOPPER = AbstractMesh(
    (), (), abstract_device=AbstractDevice("NVIDIA H100 80GB HBM3", platform="gpu", num_cores=132)
)
"""A mesh of a GPU that is not there: what is traced under it can be lowered for it."""


def run_cases(indices: Sequence[int], module: str) -> dict[int, str]:
    """Runs some cases of a module in one process: "ok", or what went wrong, by index."""
    finished = subprocess.run(
        [sys.executable, "-m", module, *map(str, indices)],
        env=os.environ | THREADS,
        capture_output=True,
        text=True,
    )
    lines = [line.split(": ", 1) for line in finished.stdout.splitlines() if ": " in line]
    results = {int(index): result for index, result in lines if index.isdigit()}
    died = f"no result; the process ended with {finished.stderr[-2000:]}"
    return {index: results.get(index, died) for index in indices}


def report(cases: Sequence[Any], check: Callable[[Any], None]) -> None:
    """Checks the cases whose indices are the program's arguments, and prints the results."""
    jax.config.update("jax_disable_most_optimizations", True)  # as tests/conftest.py has it
    for index in map(int, sys.argv[1:]):
        gpu_callbacks.reset_gpu_interpret_mode_state()
        try:
            check(cases[index])
        except Exception as error:
            message = str(error).replace("\n", " ")
            print(f"{index}: {type(error).__name__}: {message[-2000:]}", flush=True)
        else:
            print(f"{index}: ok", flush=True)
        jax.clear_caches()
