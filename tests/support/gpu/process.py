"""Cases in processes of their own, in Mosaic's GPU interpreter.

python -m MODULE INDEX...    of the module's `CASES`; prints "INDEX: ok" or "INDEX: error"

The interpreter runs every warpgroup in a thread that waits for others, and XLA has no more threads
than the machine has cores, unless NPROC, read once when jax starts, says so: with too few it hangs.
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


def run_cases(indices: list[int], module: str) -> dict[int, str]:
    """What became of each of the module's cases: "ok", or what went wrong."""
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
    """What such a process does: checks the cases that its arguments name."""
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
