"""The backward of the operator: window and slots by kernels of their own, given the denominator.

With p the softmax's weights and dp the gradients of what they multiply, the logits' gradients are
p (dp - delta), delta_r = sum p dp = out_r . out_grad_r. The slot weight omega = sum of p over the
slots adds its cotangent w to the slots' dp, and so omega w to delta. If it pulls the slots' logits
only, it adds (1 - omega) w to their dp, and nothing to delta. Either way the slots' ds is
p (dp - (delta - (1 - omega) w)).

For the window delta is made of the output, which is rounded to bfloat16. That will not do for the
slots: strong gates make them nearly equal, and then dp - delta is smaller than delta's rounding.
Their kernel sums its own part of delta, and `window_queries` the window's.
"""

from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp

from pallas.gpu.backward.slot_queries import slot_queries
from pallas.gpu.backward.slot_tokens import slot_tokens
from pallas.gpu.backward.state_grads import state_grads
from pallas.gpu.backward.window_queries import window_queries
from pallas.gpu.backward.window_tokens import window_tokens
from pallas.gpu.block_sizes import BlockSizes
from pallas.gpu.forward.gates import chunk_gates
from pallas.gpu.forward.output_pass import Facts
from pallas.gpu.spec import Spec
from pallas.gpu.warpgroup.rotation import Rotation

Arrays = dict[str, jax.Array]
Pair = tuple[jax.Array, jax.Array]  # of keys and values


class Saved(NamedTuple):
    """What the forward leaves; shapes as in `Fused`."""

    out: jax.Array
    log_mass: jax.Array
    slot_weight: jax.Array
    starts: Pair | None  # [B, H, N / C, D, M] bfloat16 each


def backward(
    inputs: Arrays,
    constants: Arrays,
    saved: Saved,
    out_grad: jax.Array,
    weight_grad: jax.Array | None,
    end_grad: Pair | None,
    *,
    spec: Spec,
    block_sizes: BlockSizes,
    interpret: Any = False,
) -> Arrays:
    """The gradients of `fused_attention`'s inputs, by their names and in their dtypes.

    out_grad, weight_grad, end_grad: the cotangents of out, of the slot weight, with spec.weight,
      and of the slots at the end, with spec.state; shapes as in `Fused`.
    """
    launch = {"spec": spec, "block_sizes": block_sizes, "interpret": interpret}
    delta = _window_delta(saved, out_grad, weight_grad, spec)
    facts = facts_of(constants)
    rotation = rotation_of(constants)
    grads, rest = _window(inputs, saved.log_mass, delta, facts, rotation, out_grad, launch)
    if saved.starts is not None:
        if weight_grad is not None:
            rest -= (1 - saved.slot_weight) * weight_grad
        grads |= _slots(inputs, constants, saved, grads, rest, facts, out_grad, end_grad, launch)
    unread = {"window_query", "window_key", "value"} - grads.keys()
    return grads | {name: jnp.zeros_like(inputs[name]) for name in unread}


def _window(
    inputs: Arrays,
    log_mass: jax.Array,
    delta: jax.Array,
    facts: Facts | None,
    rotation: Rotation | None,
    out_grad: jax.Array,
    launch: dict[str, Any],
) -> tuple[Arrays, jax.Array]:
    """The gradients, if there is a window, and its part of the slots' delta."""
    if launch["spec"].window == 0:
        return {}, jnp.zeros_like(log_mass)
    arrays = inputs["window_query"], inputs["window_key"], inputs["value"]
    launch = launch | {"log_mass": log_mass, "delta": delta, "facts": facts, "rotation": rotation}
    query, pulled = window_queries(*arrays, out_grad, **launch)
    key, value = window_tokens(*arrays, out_grad, **launch)
    return {"window_query": query, "window_key": key, "value": value}, pulled


def _slots(
    inputs: Arrays,
    constants: Arrays,
    saved: Saved,
    window: Arrays,
    rest: jax.Array,
    facts: Facts | None,
    out_grad: jax.Array,
    end_grad: Pair | None,
    launch: dict[str, Any],
) -> Arrays:
    """The gradients of what the slots read; added to the `window`'s, where it reads the same."""
    spec, interpret, starts = launch["spec"], launch["interpret"], saved.starts
    assert starts is not None
    names = {x: slots_name(inputs, x) for x in ("query", "key", "value")}
    query, key, value = (inputs[name] for name in names.values())
    window = {x: window[name] for x, name in names.items() if name in window}
    decays = inputs["log_decay"], constants.get("written"), constants.get("kept")
    gates = chunk_gates(*decays, ahead=spec.ahead, interpret=interpret)
    queries = slot_queries(
        query,
        out_grad,
        key,
        value,
        saved.log_mass,
        saved.slot_weight,
        rest,
        gates,
        starts,
        facts,
        window.pop("query", None),
        spec=spec,
        interpret=interpret,
    )
    started = queries.logits_start, queries.weights_start
    states = state_grads(query, out_grad, *started, gates, end_grad, **launch)
    tokens = slot_tokens(
        query,
        out_grad,
        key,
        value,
        queries.logits_rise,
        queries.weights_rise,
        gates,
        starts,
        (states.key, states.value),
        facts,
        window,
        **launch,
    )
    grads = dict(zip(names.values(), (queries.query, tokens.key, tokens.value), strict=True))
    grads["log_decay"] = tokens.log_decay
    if states.start_key is not None and states.start_value is not None:
        grads |= {"start_key": states.start_key, "start_value": states.start_value}
    return grads


def slots_input(inputs: Arrays, name: Literal["query", "key"]) -> jax.Array:
    """As the slots read it."""
    return inputs[slots_name(inputs, name)]


def slots_name(inputs: Arrays, name: str) -> str:
    """Of the input that the slots read."""
    return name if name in inputs else f"window_{name}"


def rotation_of(constants: Arrays) -> Rotation | None:
    return Rotation(constants["cos"], constants["sin"]) if "cos" in constants else None


def facts_of(constants: Arrays) -> Facts | None:
    if "query_run" not in constants:
        return None
    return Facts(constants["query_run"], constants["visible"], constants.get("reads"))


def _window_delta(
    saved: Saved, out_grad: jax.Array, weight_grad: jax.Array | None, spec: Spec
) -> jax.Array:
    """What is subtracted from the window's dp: [B, H * G, N] float32."""
    product = saved.out.astype(jnp.float32) * out_grad.astype(jnp.float32)
    delta = jnp.sum(product, -1).swapaxes(1, 2)
    if weight_grad is not None and spec.weight == "all":
        delta += saved.slot_weight * weight_grad
    return delta
