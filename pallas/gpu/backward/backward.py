"""The backward of the operator: what its launches are given, and in which order.

The forward leaves the output, its log-sum-exp, the slot weight and the slots at the chunks' starts;
everything else is computed again. With p the softmax's weights of a row and dp the gradients of p,
the gradients of the row's logits are

    p (dp - delta),        delta = sum p dp = out . d_out

The slot weight omega, the sum of p over the slots, with the cotangent w adds w to the slots' dp,
and so omega w to delta. If its gradient is to reach the slots' logits only (spec.weight "slots"),
(1 - omega) w is added to their dp instead, and nothing to delta. Either way the gradients of the
slots' logits are p (dp - (delta - (1 - omega) w)), with a dp that knows nothing of w.

The launches, where there is a window:
  window_query_gradients.py  d_query, and the window's part of delta
  window_token_gradients.py  d_key, d_value
and where there are slots:
  forward/gates.py           the chunks' gates
  slot_query_gradients.py    d_query, and the logits' gradients and weights for the next two
  state_gradients.py         the gradients of the slots at the chunks' ends, and of the initial ones
  slot_token_gradients.py    d_key, d_value, d_log_decay

For the window delta is made of the output, which is rounded to bfloat16. That will not do for the
slots: strong gates make them nearly equal, and then dp - delta is smaller than delta's rounding. So
their delta is a sum of what the launches themselves multiply: slot_query_gradients adds its own
part to the window's.
"""

from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp

from pallas.gpu.backward.slot_query_gradients import slot_query_gradients
from pallas.gpu.backward.slot_token_gradients import slot_token_gradients
from pallas.gpu.backward.state_gradients import state_gradients
from pallas.gpu.backward.window_query_gradients import window_query_gradients
from pallas.gpu.backward.window_token_gradients import window_token_gradients
from pallas.gpu.block_sizes import BlockSizes
from pallas.gpu.forward.gates import chunk_gates
from pallas.gpu.spec import CallSpec

Arrays = dict[str, jax.Array]
Pair = tuple[jax.Array, jax.Array]  # of keys and values

SEGMENTS = ("query_segment", "token_segment")
TABLES = ("cos", "sin")


class Saved(NamedTuple):
    """What the forward leaves; shapes as in `Fused`."""

    out: jax.Array
    lse: jax.Array
    slot_weight: jax.Array
    starts: Pair | None  # [B, Hkv, Tq / C, D, M] bfloat16 each


def backward(
    inputs: Arrays,
    constants: Arrays,
    saved: Saved,
    d_out: jax.Array,
    d_slot_weight: jax.Array | None,
    d_end: Pair | None,
    *,
    spec: CallSpec,
    block_sizes: BlockSizes,
    interpret: Any = False,
) -> Arrays:
    """The gradients of `fused_attention`'s inputs, by their names and in their dtypes.

    Args:
      inputs, constants, spec, block_sizes, interpret: those of `fused_attention`.
      saved: what its forward left.
      d_out: the output's cotangent.
      d_slot_weight: the slot weight's, with spec.weight.
      d_end: that of the slots at the end, with spec.state. All are shaped as in `Fused`.
    """
    options = {"spec": spec, "block_sizes": block_sizes, "interpret": interpret}
    rows = {"d_out": d_out, "lse": saved.lse}
    delta = _delta(saved, d_out, d_slot_weight, spec)
    if spec.window == 0:
        grads: Arrays = {}
        delta_beside_slots = jnp.zeros_like(saved.lse)
    else:
        arrays = rows | {"delta": delta}
        grads, delta_beside_slots = _window_gradients(inputs, constants, arrays, options)
    if saved.starts is not None:
        if d_slot_weight is not None:
            delta_beside_slots -= (1 - saved.slot_weight) * d_slot_weight
        rows |= {"slot_weight": saved.slot_weight, "delta_beside_slots": delta_beside_slots}
        grads |= _slot_gradients(inputs, constants, rows, saved.starts, d_end, grads, options)
    unread = {"window_query", "window_key", "value"} - grads.keys()
    return grads | {name: jnp.zeros_like(inputs[name]) for name in unread}


def _window_gradients(
    inputs: Arrays, constants: Arrays, rows: Arrays, options: dict[str, Any]
) -> tuple[Arrays, jax.Array]:
    """The gradients of what the window reads, by the inputs' names, and its part of delta.

    rows: d_out and the numbers of each row.
    """
    arrays = {name: inputs[name] for name in ("window_query", "window_key", "value")} | rows
    arrays |= {name: constants[name] for name in SEGMENTS + TABLES if name in constants}
    queries = window_query_gradients(arrays, **options)
    tokens = window_token_gradients(arrays, **options)
    grads = {"window_query": queries.query, "window_key": tokens.key, "value": tokens.value}
    return grads, queries.window_delta


def _slot_gradients(
    inputs: Arrays,
    constants: Arrays,
    rows: Arrays,
    starts: Pair,
    d_end: Pair | None,
    window: Arrays,
    options: dict[str, Any],
) -> Arrays:
    """The gradients of what the slots read, by the inputs' names.

    rows: d_out and the numbers of each row. window: the gradients of what the window reads, which
    are added where the slots read the same.
    """
    spec, interpret = options["spec"], options["interpret"]
    names = {x: slots_name(inputs, x) for x in ("query", "key", "value")}
    of_window = {x: window[name] for x, name in names.items() if name in window}
    reach = constants.get("token_reaches_end"), constants.get("start_reaches_end")
    gates = chunk_gates(inputs["log_decay"], *reach, ahead=spec.ahead, interpret=interpret)
    arrays = {x: inputs[name] for x, name in names.items()}
    arrays |= {"start_key": starts[0], "start_value": starts[1]}
    masks = (*SEGMENTS, "slot_access")
    arrays |= {name: constants[name] for name in masks if name in constants}
    queries = slot_query_gradients(
        arrays | rows, gates, of_window.pop("query", None), spec=spec, interpret=interpret
    )
    states = state_gradients(
        arrays["query"],
        rows["d_out"],
        queries.d_logits_to_start,
        queries.weights_to_start,
        gates,
        d_end,
        **options,
    )
    arrays |= {
        "d_out": rows["d_out"],
        "d_logits": queries.d_logits_to_reference,
        "weights": queries.weights_to_reference,
        "d_end_key": states.key,
        "d_end_value": states.value,
    }
    tokens = slot_token_gradients(arrays, gates, of_window, **options)
    grads = dict(zip(names.values(), (queries.query, tokens.key, tokens.value), strict=True))
    grads["log_decay"] = tokens.log_decay
    if states.last is not None:
        grads |= dict(zip(("start_key", "start_value"), states.last, strict=True))
    return grads


def slots_input(inputs: Arrays, name: Literal["query", "key"]) -> jax.Array:
    """The query or key that the slots read: their own, if they have one, or the window's."""
    return inputs[slots_name(inputs, name)]


def slots_name(inputs: Arrays, name: str) -> str:
    """The name of the input that the slots read as `name`."""
    return name if name in inputs else f"window_{name}"


def _delta(
    saved: Saved, d_out: jax.Array, d_slot_weight: jax.Array | None, spec: CallSpec
) -> jax.Array:
    """delta, [B, Hq, Tq] float32, of the rounded output."""
    product = saved.out.astype(jnp.float32) * d_out.astype(jnp.float32)
    delta = jnp.sum(product, -1).swapaxes(1, 2)
    if d_slot_weight is not None and spec.weight == "all":
        delta += saved.slot_weight * d_slot_weight
    return delta
