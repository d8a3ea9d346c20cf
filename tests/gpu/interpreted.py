"""The operator's suite on the GPU kernels, in a process of its own.

python -m tests.gpu.interpreted INDEX...    of `CASES`; prints "INDEX: ok" or "INDEX: error"

The interpreter runs every warpgroup in a thread that waits for others, and XLA has no more threads
than the machine has cores, unless NPROC, read once when jax starts, says so: with too few it hangs.
"""

import os
import subprocess
import sys

import jax
import jax.numpy as jnp
from jax._src.pallas.mosaic_gpu.interpret import gpu_callbacks
from jax.sharding import AbstractDevice, AbstractMesh

from tests.ops import cases, test_attention
from tests.ops.cases import Case

THREADS = {"NPROC": "16", "JAX_PLATFORMS": "cpu"}

HOPPER = AbstractMesh(
    (), (), abstract_device=AbstractDevice("NVIDIA H100 80GB HBM3", platform="gpu", num_cores=132)
)

ORDINARY = [
    Case(T=70, window="16", G=2, M=20, K=60, V=40, B=1, gate="-inf", segments=True, state=True),
    Case(T=128, window="64", M=64, K=64, V=64, B=1, gate="mixed", rope="yarn", segments=True),
    Case(T=90, window="None", B=1, segments=True, empty_slots="mask", rope="rows"),
    Case(T=66, window="0", B=1, slot_feature_map="silu", gate="normaliser-0.1"),
]
MORE = [
    Case(T=128, window="64", M=64, K=64, V=64, B=1, gate="mixed", rope="yarn"),
    Case(T=130, window="64", G=4, K=128, V=128, B=1, M=128, gate="-1000", rope="yarn"),
    Case(T=90, window="16", M=0, state=True),
    Case(T=90, window="16", M=0, slot_weight_gradient="slots"),
    Case(T=90, window="16", G=2, M=32, state=True, slot_weight_gradient="slots"),
    Case(T=90, window="None", G=2, slot_weight_gradient="slots"),
    Case(T=66, window="0", M=64, K=128, V=64, segments=True, slot_weight_gradient="slots"),
]
CASES = ORDINARY + MORE + test_attention.SUITE


def run_cases(indices: list[int], module: str = "tests.gpu.interpreted") -> dict[int, str]:
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


def lower_for_cuda(case: Case, inputs: dict) -> None:
    """The interpreter knows no layouts: what it runs may still not compile."""
    is_wide = {"log_decay", "window_log_decay", "slot_key", "slot_value"}
    arrays = {
        name: jnp.asarray(x, jnp.float32 if name in is_wide else jnp.bfloat16)
        for name, x in inputs["arrays"].items()
    }
    rest = jax.tree.map(jnp.asarray, inputs["rest"])
    cotangents = jax.tree.map(jnp.asarray, inputs["cotangents"])
    with jax.sharding.use_abstract_mesh(HOPPER):
        traced = cases._run.trace(arrays, rest, cotangents, case=case, implementation="pallas_gpu")
        program = traced.lower(lowering_platforms=("cuda",)).as_text()
    assert "mosaic_gpu" in program or "__cudnn$fmha" in program
    jax.clear_caches()


def main() -> None:
    jax.config.update("jax_disable_most_optimizations", True)  # as tests/conftest.py has it
    for index in map(int, sys.argv[1:]):
        inputs = cases.make_inputs(CASES[index])
        gpu_callbacks.reset_gpu_interpret_mode_state()
        try:
            lower_for_cuda(CASES[index], inputs)
            test_attention.check(CASES[index], "pallas_gpu", "bfloat16", inputs)
        except Exception as error:
            message = str(error).replace("\n", " ")
            print(f"{index}: {type(error).__name__}: {message[-2000:]}", flush=True)
        else:
            print(f"{index}: ok", flush=True)
        jax.clear_caches()


if __name__ == "__main__":
    main()
