"""The launch that finds the slots' query gradients, against its formulas in float64.

NPROC=16 JAX_PLATFORMS=cpu python -m tests.support.gpu.slot_query_gradients INDEX...

See process.py.
"""

import functools
from collections.abc import Callable
from typing import Any

import jax
import numpy as np

from nha_jax.testing import relative_error
from pallas.gpu.backward.slot_query_gradients import SlotQueryGradients, slot_query_gradients
from tests.support.gpu.process import HOPPER, report
from tests.support.gpu.slot_formulas import Case, Chunks, Inputs, make_inputs
from tests.support.ops.interpreters import GPU_INTERPRETER

TOLERANCE = 1e-2  # relative Frobenius; the operands are rounded to 2^-9

ORDINARY = [
    Case(M=16, slots=12, G=2, masked=True, ahead=0, gate="mixed"),
    Case(gate="-inf"),
]
REST = [
    Case(D=128, M=128, slots=128, masked=True, gate="-1000"),
    Case(D=128, M=64, H=2, G=2, B=2),
    Case(M=128, slots=100, ahead=0, gate="mixed", masked=True),
    Case(D=128, M=16, slots=16, G=2, gate="normaliser-0.1"),
    Case(M=32, slots=32, gate="-1000", masked=True),
    Case(M=128, slots=128, gate="mixed", window=0, ahead=0),
    Case(M=16, slots=16, window=0, ahead=0, masked=True),
    Case(D=256, H=2, G=2, masked=True, gate="mixed"),
    Case(D=256, M=128, slots=100, ahead=0, masked=True, gate="-1000"),
    Case(D=256, M=128, slots=128, G=2, window=0, ahead=0),
    Case(D=256, M=16, slots=16, gate="-inf"),
    Case(D=256, window=0, ahead=0, masked=True),
    Case(D=192, G=2, gate="-1000"),
    Case(D=192, M=128, slots=128, masked=True),
    Case(D=192, M=32, slots=32, window=0, ahead=0),
]
ADDED = [
    Case(M=16, slots=16, G=2, masked=True, added=("query",)),
    Case(D=128, M=64, H=2, G=2, B=2, gate="mixed", added=("query",)),
    Case(D=256, M=128, slots=100, ahead=0, masked=True, gate="-1000", added=("query",)),
]
CASES = ORDINARY + REST + ADDED


def run(inputs: Inputs, *, case: Case, interpret: Any) -> SlotQueryGradients:
    names = "query", "d_out", "key", "value", "lse", "slot_weight", "delta_beside_slots"
    return slot_query_gradients(
        inputs.arrays(*names),
        inputs.gates,
        inputs.window_gradients.get("query"),
        spec=case.spec,
        interpret=interpret,
    )


def lower_for_cuda(run: Callable[[Inputs], Any], inputs: Inputs) -> None:
    """Raises what Mosaic does: the interpreter knows no layouts, and runs what Mosaic refuses."""
    with jax.sharding.use_abstract_mesh(HOPPER):
        traced = jax.jit(run).trace(inputs)
        assert "mosaic_gpu" in traced.lower(lowering_platforms=("cuda",)).as_text()


def assert_near(name: str, actual: jax.Array, expected: np.ndarray) -> None:
    error = relative_error(np.asarray(actual, np.float64), expected)
    assert error < TOLERANCE, f"{name}: error {error:.2e}"


def check(case: Case) -> None:
    """Lowers the kernel for CUDA, and raises AssertionError if a result is too far off."""
    inputs = make_inputs(case)
    lower_for_cuda(functools.partial(run, case=case, interpret=False), inputs)
    actual = jax.jit(functools.partial(run, case=case, interpret=GPU_INTERPRETER))(inputs)
    chunks = Chunks(inputs, case.spec)
    expected = chunks.queries(inputs.lse, inputs.delta_beside_slots)
    for name, x in actual._asdict().items():
        y = getattr(expected, name)
        if name in case.added:
            y = y + np.asarray(inputs.window_gradients[name], np.float64)
        if name.endswith("_to_reference"):  # up to 2^93 in some rows: those alone would be compared
            decay = chunks.back(np.broadcast_to(chunks.row_decay, chunks.rows(y).shape))
            x, y = np.asarray(x, np.float64) / decay, y / decay
        assert_near(name, x, y)


if __name__ == "__main__":
    report(CASES, check)
