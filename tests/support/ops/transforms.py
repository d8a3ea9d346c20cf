"""Every transformation of JAX on every implementation of the operator, held against float64.

    uv run python -m tests.support.ops.transforms

prints the table of docs/operator.md: what works, to the suite's tolerances, and what is refused.
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AxisType, PartitionSpec

from nha_jax.layers.remat import remat_policy
from nha_jax.ops import NHAState, nha_attention
from nha_jax.testing import relative_error

B, T, H, G, K, V, M = 2, 6, 1, 2, 4, 2, 3
WINDOWS = (2, None)  # through slots and window; full attention, which is code of its own
IMPLEMENTATIONS = ("reference", "xla", "pallas_tpu")
TOLERANCE = {"reference": 5e-6, "xla": 5e-6, "pallas_tpu": 5e-4}  # the suite's, in float32
SECOND_DERIVATIVES = 2e-5  # the definition's own, in float32, are up to 2e-6 off here

Arrays = dict[str, jax.Array]
Attend = Callable[..., Arrays]  # of arrays and, optionally, segment ids
SEGMENT_IDS = np.array([[1, 1, 1, 2, 2, 2], [1, 1, 0, 0, 1, 1]], np.int32)  # [B, T]


class Inputs(NamedTuple):
    """Of the operator, whose floating arguments are in one dict, the rope's and state's too."""

    arrays: Arrays
    tangents: Arrays
    cotangents: Arrays  # of what `attend` gives


def make_inputs(window_size: int | None, dtype: str) -> Inputs:
    """Draws the same numbers for every dtype; the state is of a row that is full, and one not."""
    rng = np.random.default_rng(0)

    def normal(*shape: int) -> np.ndarray:
        return rng.standard_normal(shape).astype(np.float32)

    R = T if window_size is None else window_size
    entering = 0 if window_size is None else R
    arrays = {
        "query": normal(B, T, H * G, K),
        "key": normal(B, T, H, K),
        "value": normal(B, T, H, V),
        "log_decay": -np.abs(normal(B, T, H, M)),
        "cos": normal(B, T, K // 2),
        "sin": normal(B, T, K // 2),
        "slot_key": normal(B, H, M, K),
        "slot_value": normal(B, H, M, V),
        "window_key": normal(B, entering, H, K),
        "window_rotated_key": normal(B, R, H, K),
        "window_value": normal(B, R, H, V),
        "window_log_decay": -np.abs(normal(B, entering, H, M)),
    }
    tangents = {name: normal(*x.shape) for name, x in arrays.items()}
    cotangents = {
        "out": normal(B, T, H * G, V),
        "slot_weight": normal(B, T, H * G),
        "slot_key": normal(B, H, M, K),
    }
    return Inputs(*jax.tree.map(lambda x: jnp.asarray(x, dtype), (arrays, tangents, cotangents)))


def operator(implementation: str, window_size: int | None) -> Attend:
    """The operator as a function of its floating arrays alone."""
    full = window_size is None
    lengths = [T - 3, T - 1] if full else [window_size - 1, window_size + 3]

    def attend(arrays: Arrays, segment_ids: Any = SEGMENT_IDS) -> Arrays:
        state = NHAState(
            **{name: arrays[name] for name in NHAState._fields[:6]},
            length=jnp.array(lengths, jnp.int32),
            segment_id=jnp.ones(B, jnp.int32),
        )
        result = nha_attention(
            *(arrays[name] for name in ("query", "key", "value", "log_decay")),
            window_size=window_size,
            rope=(arrays["cos"], arrays["sin"]),
            segment_ids=jnp.asarray(segment_ids),
            initial_state=state,
            return_state=True,
            return_slot_weight=True,
            implementation=implementation,
        )
        return {
            "out": result.out,
            "slot_weight": result.slot_weight,
            "slot_key": result.state.slot_key,
        }

    return attend


def dot(x: Arrays, y: Arrays) -> jax.Array:
    return sum(jnp.vdot(x[name], y[name]) for name in x)


def loss_of(attend: Attend, inputs: Inputs) -> Callable[[Arrays], jax.Array]:
    return lambda arrays: dot(jax.tree.map(jnp.sin, attend(arrays)), inputs.cotangents)


def two(arrays: Any) -> Any:
    """Two of each array, stacked, that differ."""
    return jax.tree.map(lambda x: jnp.stack([x, 0.5 * x]), arrays)


def mapped_over(*names: str) -> Callable[[Attend, Inputs], Any]:
    """Results and gradient of a map over some arguments alone: what hangs on no other is whole."""

    def run(attend: Attend, inputs: Inputs) -> Any:
        axes = {name: 0 if name in names else None for name in inputs.arrays}
        mapped = inputs.arrays | two({name: inputs.arrays[name] for name in names})
        found, pullback = jax.vjp(jax.vmap(attend, (axes,)), mapped)
        return found, pullback(two(inputs.cotangents))

    return run


def mapped_over_segments(attend: Attend, inputs: Inputs) -> Any:
    ids = np.stack([SEGMENT_IDS, SEGMENT_IDS[::-1]])
    mapped = jax.vmap(attend, (None, 0))
    found, pullback = jax.vjp(lambda arrays: mapped(arrays, ids), inputs.arrays)
    return found, pullback(two(inputs.cotangents))


def along(attend: Attend, inputs: Inputs) -> Callable[[jax.Array], jax.Array]:
    """A few outputs as a function of two numbers, for whole Jacobians."""

    def moved(x: jax.Array) -> jax.Array:
        arrays = dict(inputs.arrays)
        for number, name in zip(x, ("query", "log_decay"), strict=True):
            arrays[name] += number * inputs.tangents[name] * (1 if name == "query" else 0.01)
        return attend(arrays)["out"].sum((0, 2))[-2:]  # [2, V]

    return moved


def checkpointed(remat: str) -> Callable[[Attend, Inputs], Any]:
    def run(attend: Attend, inputs: Inputs) -> Any:
        policy = remat_policy(remat)
        return jax.grad(jax.checkpoint(loss_of(attend, inputs), policy=policy))(inputs.arrays)

    return run


def scanned(attend: Attend, inputs: Inputs) -> Any:
    """The gradient of a loop of two calls, each on the output of the one before."""

    def loss(arrays: Arrays) -> jax.Array:
        def step(value, _):
            out = attend(arrays | {"value": value})["out"]
            return out[:, :, :H], jnp.sum(out)

        return jnp.sum(jax.lax.scan(step, arrays["value"], None, length=2)[1])

    return jax.grad(loss)(inputs.arrays)


def on_a_mesh(attend: Attend, inputs: Inputs) -> Any:
    """The gradient through a `jax.shard_map` of the caller's."""
    mesh = jax.make_mesh((1,), ("rows",), axis_types=(AxisType.Auto,))
    rows = PartitionSpec("rows")
    divided = jax.shard_map(attend, mesh=mesh, in_specs=rows, out_specs=rows, check_vma=False)
    return jax.grad(loss_of(divided, inputs))(inputs.arrays)


def forward_over_reverse(attend: Attend, inputs: Inputs) -> Any:
    gradient = jax.grad(loss_of(attend, inputs))
    return jax.jvp(gradient, (inputs.arrays,), (inputs.tangents,))[1]


def reverse_over_reverse(attend: Attend, inputs: Inputs) -> Any:
    gradient = jax.grad(loss_of(attend, inputs))
    return jax.grad(lambda arrays: dot(gradient(arrays), inputs.tangents))(inputs.arrays)


def reverse_over_forward(attend: Attend, inputs: Inputs) -> Any:
    loss = loss_of(attend, inputs)
    return jax.grad(lambda x: jax.jvp(loss, (x,), (inputs.tangents,))[1])(inputs.arrays)


STATE = NHAState._fields[:6]
TRANSFORMATIONS: dict[str, Callable[[Attend, Inputs], Any]] = {
    "jit": lambda attend, inputs: attend(inputs.arrays),
    "grad": lambda attend, inputs: jax.grad(loss_of(attend, inputs))(inputs.arrays),
    "value_and_grad": lambda attend, inputs: jax.value_and_grad(loss_of(attend, inputs))(
        inputs.arrays
    ),
    "vjp": lambda attend, inputs: jax.vjp(attend, inputs.arrays)[1](inputs.cotangents),
    "jacrev": lambda attend, inputs: jax.jacrev(along(attend, inputs))(jnp.zeros(2)),
    "grad of checkpoint, remat: full": checkpointed("full"),
    "grad of checkpoint, remat: operator": checkpointed("operator"),
    "grad of checkpoint, remat: dots": checkpointed("dots"),
    "vmap over query": mapped_over("query"),
    "vmap over key": mapped_over("key"),
    "vmap over value": mapped_over("value"),
    "vmap over log_decay": mapped_over("log_decay"),
    "vmap over rope": mapped_over("cos", "sin"),
    "vmap over segment_ids": mapped_over_segments,
    "vmap over initial_state": mapped_over(*STATE),
    "vmap of vmap": lambda attend, inputs: jax.vmap(jax.vmap(attend))(two(two(inputs.arrays))),
    "grad of vmap": lambda attend, inputs: jax.grad(
        lambda arrays: jnp.sum(jax.vmap(loss_of(attend, inputs))(arrays))
    )(two(inputs.arrays)),
    "vmap of grad": lambda attend, inputs: jax.vmap(jax.grad(loss_of(attend, inputs)))(
        two(inputs.arrays)
    ),
    "grad of scan": scanned,
    "grad of shard_map": on_a_mesh,
    "jvp": lambda attend, inputs: jax.jvp(attend, (inputs.arrays,), (inputs.tangents,)),
    "linearize": lambda attend, inputs: jax.linearize(attend, inputs.arrays)[1](inputs.tangents),
    "jacfwd": lambda attend, inputs: jax.jacfwd(along(attend, inputs))(jnp.zeros(2)),
    "jvp of grad (forward over reverse)": forward_over_reverse,
    "grad of grad (reverse over reverse)": reverse_over_reverse,
    "grad of jvp (reverse over forward)": reverse_over_forward,
}


def run(name: str, implementation: str, window_size: int | None, dtype: str) -> list[np.ndarray]:
    """The arrays that a transformation of the operator gives, in float64."""
    with jax.enable_x64(dtype == "float64"):
        inputs = make_inputs(window_size, dtype)
        transformed = functools.partial(
            TRANSFORMATIONS[name], operator(implementation, window_size)
        )
        return [np.asarray(x, np.float64) for x in jax.tree.leaves(jax.jit(transformed)(inputs))]


@functools.cache
def expected(name: str, window_size: int | None) -> list[np.ndarray]:
    """What the definition gives in float64."""
    return run(name, "reference", window_size, "float64")


def error(name: str, implementation: str, window_size: int | None) -> float:
    """The largest relative error of the arrays that a transformation gives."""
    found = run(name, implementation, window_size, "float32")
    pairs = zip(found, expected(name, window_size), strict=True)
    return max(relative_error(x, wanted) for x, wanted in pairs)


def outcome(name: str, implementation: str) -> str:
    """The entry of the table: "works" to the tolerance, or "refused" by the error that says why.

    Raises AssertionError if it is neither.
    """
    outcomes = {_outcome(name, implementation, window_size) for window_size in WINDOWS}
    assert len(outcomes) == 1, (name, implementation, outcomes)
    return outcomes.pop()


def _outcome(name: str, implementation: str, window_size: int | None) -> str:
    try:
        found = error(name, implementation, window_size)
    except NotImplementedError as refusal:
        said = str(refusal)
    else:
        tolerance = (
            SECOND_DERIVATIVES if " over " in name.partition("(")[2] else TOLERANCE[implementation]
        )
        assert found < tolerance, (name, implementation, window_size, found)
        return "works"
    assert f"implementation={implementation!r} has" in said, said
    assert 'implementation="xla"' in said, said
    return "refused"


def table() -> str:
    """The table of docs/operator.md."""
    columns = [f"`{name}`" for name in IMPLEMENTATIONS]
    lines = [["transformation", *columns], ["---"] * (1 + len(columns))]
    for name in TRANSFORMATIONS:
        lines.append([f"{name}", *(outcome(name, x) for x in IMPLEMENTATIONS)])
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


if __name__ == "__main__":
    print(table())
