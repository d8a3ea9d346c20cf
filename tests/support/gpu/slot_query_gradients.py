"""The query side of the slots' backward against its formulas in float64. See process.py.

python -m tests.support.gpu.slot_query_gradients INDEX...    of `CASES`
"""

import functools

import jax
import numpy as np

from pallas.gpu.backward.slot_query_gradients import slot_query_gradients
from tests.support.gpu import slot_formulas
from tests.support.gpu.process import HOPPER, report
from tests.support.gpu.slot_formulas import Case, Chunks, Inputs
from tests.support.ops.cases import GPU_INTERPRETER, relative_error

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


def query_side(inputs: Inputs, *, case: Case, interpret):
    return slot_query_gradients(
        inputs.query,
        inputs.d_out,
        inputs.key,
        inputs.value,
        inputs.lse,
        inputs.slot_weight,
        inputs.rest,
        inputs.gates,
        inputs.starts,
        inputs.segments,
        inputs.window_gradients.get("query"),
        spec=case.spec,
        interpret=interpret,
    )


def lower_for_cuda(run, inputs: Inputs) -> None:
    """The interpreter knows no layouts: what it runs may still not compile."""
    with jax.sharding.use_abstract_mesh(HOPPER):
        traced = jax.jit(run).trace(inputs)
        assert "mosaic_gpu" in traced.lower(lowering_platforms=("cuda",)).as_text()


def assert_near(name: str, actual: jax.Array, expected: np.ndarray) -> None:
    error = relative_error(np.asarray(actual, np.float64), expected)
    assert error < TOLERANCE, f"{name}: error {error:.2e}"


def check(case: Case) -> None:
    inputs = slot_formulas.make_inputs(case)
    lower_for_cuda(functools.partial(query_side, case=case, interpret=False), inputs)
    run = jax.jit(functools.partial(query_side, case=case, interpret=GPU_INTERPRETER))
    actual = run(inputs)
    chunks = Chunks(inputs, case.spec)
    expected = chunks.queries(inputs.lse, inputs.rest)
    for name, x in actual._asdict().items():
        y = getattr(expected, name)
        if name in case.added:
            y = y + np.asarray(inputs.window_gradients[name], np.float64)
        if name.endswith("_to_reference"):  # up to 2^93 in some rows: those alone would be compared
            rise = chunks.back(np.broadcast_to(chunks.rise, chunks.rows(y).shape))
            x, y = np.asarray(x, np.float64) / rise, y / rise
        assert_near(name, x, y)


if __name__ == "__main__":
    report(CASES, check)
