"""An implementation on a case, and its results against the definition's in float64."""

import contextlib
import functools
from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from nha_jax.extras import import_extra
from nha_jax.ops import NHAOutput, NHAState, nha_attention
from nha_jax.ops.backends import Backend, get
from nha_jax.testing.cases import Case, Inputs, make_inputs


def attend(
    case: Case, arrays: Mapping[str, Any], rest: Mapping[str, Any], *, implementation: str | None
) -> NHAOutput:
    """Calls `nha_attention` on the arrays of an `Inputs`; its result, slot weight included."""
    state = None
    if case.state:
        fields = {name: arrays[name] for name in NHAState._fields[:6]}
        ids = jnp.ones(case.B, jnp.int32)
        state = NHAState(**fields, length=rest["length"], segment_id=ids)
    result = nha_attention(
        *(arrays[name] for name in ("query", "key", "value", "log_decay")),
        window_size=case.window_size,
        rope=rest["rope"],
        scale=case.scale,
        segment_ids=rest["segment_ids"],
        slot_feature_map=case.slot_feature_map,
        slot_delay=case.slot_delay,
        empty_slots=case.empty_slots,
        initial_state=state,
        return_state=case.return_state,
        return_slot_weight=True,
        slot_weight_gradient=case.slot_weight_gradient,
        implementation=implementation,
        kernel_options=case.kernel_options,
    )
    assert isinstance(result, NHAOutput)
    return result


def attend_with_gradients(
    case: Case, inputs: Inputs, *, implementation: str | None
) -> dict[str, Any]:
    """Calls `attend` and takes the gradient of a loss of all that it returns.

    Returns:
        out, slot_weight, state (by field; empty without one), and gradient (by name of
        `Inputs.arrays`).
    """

    def loss(arrays: dict[str, Any]) -> tuple[jax.Array, NHAOutput]:
        result = attend(case, arrays, inputs.rest, implementation=implementation)
        assert result.slot_weight is not None
        total = jnp.vdot(result.out, inputs.cotangents["out"].astype(result.out.dtype))
        total += jnp.vdot(result.slot_weight, inputs.cotangents["slot_weight"])
        # The state's slots take part in the loss, so that gradients flow through them too.
        if result.state is not None:
            total += jnp.sum(jnp.sin(result.state.slot_key))
            total += jnp.sum(jnp.cos(result.state.slot_value))
        return total, result

    gradients, result = jax.grad(loss, has_aux=True)(inputs.arrays)
    return {
        "out": result.out,
        "slot_weight": result.slot_weight,
        "state": {} if result.state is None else result.state._asdict(),
        "gradient": gradients,
    }


# By the backend rather than its name: another one may be registered under the same name.
@functools.partial(jax.jit, static_argnames=("case", "backend"))
def _compiled(inputs: Inputs, *, case: Case, backend: Backend) -> dict[str, Any]:
    return attend_with_gradients(case, inputs, implementation=backend.name)


def run(
    case: Case, implementation: str, dtype: str, inputs: Inputs | None = None
) -> dict[str, np.ndarray]:
    """Computes what `attend_with_gradients` does, compiled, in one dtype.

    Args:
        case: what is called.
        implementation: which does it; the definition, "reference", is computed on the host.
        dtype: of query, key and value: "float32", "bfloat16", or "float64", the oracle's.
        inputs: the case's; None: `make_inputs(case)`.

    Returns:
        float64 arrays by name, such as "out", "state/slot_key" or "gradient/query".

    Raises:
        ValueError: there is no such implementation.
        NotImplementedError: it cannot serve the case.
    """
    inputs = make_inputs(case) if inputs is None else inputs
    # The definition is computed on the host, whatever device is to be held against it.
    on_host = implementation == "reference"
    device = jax.default_device(jax.devices("cpu")[0]) if on_host else contextlib.nullcontext()
    with device, jax.enable_x64(dtype == "float64"):
        result = _compiled(inputs.on_device(dtype), case=case, backend=get(implementation))
        return {name: np.asarray(x, np.float64) for name, x in _by_path(result).items()}


def _by_path(tree: Any) -> dict[str, Any]:
    leaves, _ = jax.tree_util.tree_flatten_with_path(tree)
    return {jax.tree_util.keystr(path, simple=True, separator="/"): leaf for path, leaf in leaves}


class Tolerance(NamedTuple):
    """Of relative Frobenius errors, against the definition in float64 on the same inputs."""

    outputs: float
    gradients: float


TOLERANCES: Mapping[str, Tolerance] = {
    "float64": Tolerance(1e-12, 1e-12),
    "float32": Tolerance(5e-6, 5e-6),
    "bfloat16": Tolerance(1e-2, 1e-2),
}
"""By dtype, what plain XLA is held to; docs/testing.md says where it comes from."""


def relative_error(x: np.ndarray, expected: np.ndarray, zero: float = 1e-9) -> float:
    """Computes |x - expected| / |expected|, of Frobenius norms.

    Args:
        x, expected: arrays of one shape. Infinities must be the same in both, or the error is inf.
        zero: where the root mean square of `expected` is below this, that of `x` is the error.
    """
    same_infinities = np.where(np.isinf(expected), x == expected, True)
    if not np.all(same_infinities):
        return np.inf
    finite = np.isfinite(expected)
    x, expected = np.where(finite, x, 0), np.where(finite, expected, 0)
    rms = np.sqrt(np.mean(expected**2)) if expected.size else 0.0
    if rms < zero:
        return float(np.sqrt(np.mean(x**2))) if x.size else 0.0
    return float(np.linalg.norm(x - expected) / np.linalg.norm(expected))


def assert_close(
    results: Any,
    expected: Any,
    tolerance: Tolerance,
    exceptions: Mapping[str, float] | None = None,
) -> None:
    """Holds every array within its tolerance.

    Args:
        results, expected: trees of arrays, of one structure and the same shapes.
        tolerance: for all arrays: `gradients` for those under the name "gradient", `outputs` else.
        exceptions: tolerances by name, such as "gradient/query", that go before.

    Raises:
        AssertionError: structures or shapes differ, or arrays are too far off; it names all.
        ImportError: the package chex is not installed.
    """
    import_extra("chex").assert_trees_all_equal_shapes(results, expected)
    found, wanted = _by_path(results), _by_path(expected)
    bounds = {
        name: tolerance.gradients if name.startswith("gradient/") else tolerance.outputs
        for name in wanted
    } | dict(exceptions or {})
    errors = {
        name: relative_error(np.asarray(found[name]), np.asarray(wanted[name])) for name in wanted
    }
    wrong = {name: f"{error:.1e}" for name, error in errors.items() if not error <= bounds[name]}
    if wrong:
        raise AssertionError(f"relative Frobenius errors above {tolerance}: {wrong}")


def assert_matches_reference(
    case: Case,
    implementation: str,
    dtype: str = "float32",
    *,
    inputs: Inputs | None = None,
    tolerance: Tolerance | None = None,
) -> None:
    """Holds an implementation against the definition in float64 on the same, rounded, inputs.

    Args:
        case: what is called.
        implementation: the name of one, maybe of one that `nha_jax.ops.backends.register` added.
        dtype: of query, key and value.
        inputs: the case's; None: `make_inputs(case)`.
        tolerance: None: that of the dtype in `TOLERANCES`.

    Raises:
        AssertionError: an output, a field of the state or a gradient is too far off.
        ValueError, NotImplementedError, ImportError: see `run` and `assert_close`.
    """
    tolerance = TOLERANCES[dtype] if tolerance is None else tolerance
    inputs = (make_inputs(case) if inputs is None else inputs).rounded(dtype)
    results = run(case, implementation, dtype, inputs)  # first: it may refuse the case
    expected = run(case, "reference", "float64", inputs)
    exceptions = {}
    if dtype == "float32" and _nearly_equal_slots(case):
        plain = run(case, "reference", "float32", inputs)["gradient/query"]
        error = relative_error(plain, expected["gradient/query"])
        exceptions["gradient/query"] = max(tolerance.gradients, 4 * error)
    assert_close(results, expected, tolerance, exceptions)


def _nearly_equal_slots(case: Case) -> bool:
    """Slots only, and gates so strong that all of them hold nearly the last token.

    The query's gradient is then a small difference of large, nearly equal terms: the definition
    itself, in float32, is 5e-6 to 6e-5 off, and no implementation can be held to less.
    """
    return case.window == "0" and case.gate == "normaliser-0.1"
