"""The interpreters in which the operator's suite runs the kernels."""

import contextlib

import jax
from jax.experimental.pallas import mosaic_gpu as plgpu
from jax.experimental.pallas import tpu as pltpu

from nha_jax.testing import Case

INTERPRETER = pltpu.InterpretParams(detect_races=True, uninitialized_memory="nan")
GPU_INTERPRETER = plgpu.InterpretGPUParams(detect_races=True, uninitialized_memory="nan")


def interpreter(case: Case, implementation: str) -> contextlib.AbstractContextManager:
    """Our kernels' is strict; the library's of full attention is not made for it.

    On a GPU the GPU's kernels run as they are.
    """
    if implementation == "pallas_gpu":
        if jax.default_backend() == "gpu":
            return contextlib.nullcontext()
        return plgpu.force_gpu_interpret_mode(GPU_INTERPRETER)
    nothing_leaves = case.window_size is None or (case.window_size >= case.T and not case.state)
    if nothing_leaves:
        return contextlib.nullcontext()
    return pltpu.force_tpu_interpret_mode(INTERPRETER)  # a race raises
