"""The backward of the operator: window and slots by kernels of their own, given the denominator.

With p the softmax's weights and dp the gradients of what they multiply, the logits' gradients are
p (dp - delta), delta_r = sum p dp = out_r . d_out_r. The slot weight omega = sum of p over the
slots adds its cotangent w to the slots' dp, and so omega w to delta. If it pulls the slots' logits
only, it adds (1 - omega) w to their dp, and nothing to delta. Either way the slots' ds is
p (dp - (delta - (1 - omega) w)).

For the window delta is made of the output, which is rounded to bfloat16. That will not do for the
slots: strong gates make them nearly equal, and then dp - delta is smaller than delta's rounding.
Their kernel sums its own part of delta, and `window_query_gradients` the window's.
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
from pallas.gpu.spec import CallSpec, Segments
from pallas.gpu.warpgroup.rotation import Rotation

Arrays = dict[str, jax.Array]
Pair = tuple[jax.Array, jax.Array]  # of keys and values


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

    d_out, d_slot_weight, d_end: the cotangents of out, of the slot weight, with spec.weight,
      and of the slots at the end, with spec.state; shapes as in `Fused`.
    """
    launch = {"spec": spec, "block_sizes": block_sizes, "interpret": interpret}
    delta = _window_delta(saved, d_out, d_slot_weight, spec)
    segments = segments_of(constants)
    rotation = rotation_of(constants)
    grads, rest = _window(inputs, saved.lse, delta, segments, rotation, d_out, launch)
    if saved.starts is not None:
        if d_slot_weight is not None:
            rest -= (1 - saved.slot_weight) * d_slot_weight
        grads |= _slots(inputs, constants, saved, grads, rest, segments, d_out, d_end, launch)
    unread = {"window_query", "window_key", "value"} - grads.keys()
    return grads | {name: jnp.zeros_like(inputs[name]) for name in unread}


def _window(
    inputs: Arrays,
    lse: jax.Array,
    delta: jax.Array,
    segments: Segments | None,
    rotation: Rotation | None,
    d_out: jax.Array,
    launch: dict[str, Any],
) -> tuple[Arrays, jax.Array]:
    """The gradients, if there is a window, and its part of the slots' delta."""
    if launch["spec"].window == 0:
        return {}, jnp.zeros_like(lse)
    arrays = inputs["window_query"], inputs["window_key"], inputs["value"]
    launch = launch | {"lse": lse, "delta": delta, "segments": segments, "rotation": rotation}
    query, pulled = window_query_gradients(*arrays, d_out, **launch)
    key, value = window_token_gradients(*arrays, d_out, **launch)
    return {"window_query": query, "window_key": key, "value": value}, pulled


def _slots(
    inputs: Arrays,
    constants: Arrays,
    saved: Saved,
    window: Arrays,
    rest: jax.Array,
    segments: Segments | None,
    d_out: jax.Array,
    d_end: Pair | None,
    launch: dict[str, Any],
) -> Arrays:
    """The gradients of what the slots read; added to the `window`'s, where it reads the same."""
    spec, interpret, starts = launch["spec"], launch["interpret"], saved.starts
    assert starts is not None
    names = {x: slots_name(inputs, x) for x in ("query", "key", "value")}
    query, key, value = (inputs[name] for name in names.values())
    window = {x: window[name] for x, name in names.items() if name in window}
    decays = (
        inputs["log_decay"],
        constants.get("token_reaches_end"),
        constants.get("start_reaches_end"),
    )
    gates = chunk_gates(*decays, ahead=spec.ahead, interpret=interpret)
    queries = slot_query_gradients(
        query,
        d_out,
        key,
        value,
        saved.lse,
        saved.slot_weight,
        rest,
        gates,
        starts,
        segments,
        window.pop("query", None),
        spec=spec,
        interpret=interpret,
    )
    started = queries.d_logits_to_start, queries.weights_to_start
    states = state_gradients(query, d_out, *started, gates, d_end, **launch)
    tokens = slot_token_gradients(
        query,
        d_out,
        key,
        value,
        queries.d_logits_to_reference,
        queries.weights_to_reference,
        gates,
        starts,
        (states.key, states.value),
        segments,
        window,
        **launch,
    )
    grads = dict(zip(names.values(), (queries.query, tokens.key, tokens.value), strict=True))
    grads["log_decay"] = tokens.log_decay
    if states.last is not None:
        grads |= dict(zip(("start_key", "start_value"), states.last, strict=True))
    return grads


def slots_input(inputs: Arrays, name: Literal["query", "key"]) -> jax.Array:
    """As the slots read it."""
    return inputs[slots_name(inputs, name)]


def slots_name(inputs: Arrays, name: str) -> str:
    """Of the input that the slots read."""
    return name if name in inputs else f"window_{name}"


def rotation_of(constants: Arrays) -> Rotation | None:
    return Rotation(constants["cos"], constants["sin"]) if "cos" in constants else None


def segments_of(constants: Arrays) -> Segments | None:
    if "query_segment" not in constants:
        return None
    return Segments(
        constants["query_segment"], constants["token_segment"], constants.get("slot_access")
    )


def _window_delta(
    saved: Saved, d_out: jax.Array, d_slot_weight: jax.Array | None, spec: CallSpec
) -> jax.Array:
    """What is subtracted from the window's dp: [B, Hq, Tq] float32."""
    product = saved.out.astype(jnp.float32) * d_out.astype(jnp.float32)
    delta = jnp.sum(product, -1).swapaxes(1, 2)
    if d_slot_weight is not None and spec.weight == "all":
        delta += saved.slot_weight * d_slot_weight
    return delta
