"""The backward of the operator: window and slots by kernels of their own, given the denominator.

With p the softmax's weights and dp the gradients of what they multiply, the logits' gradients are
p (dp - delta), delta_r = sum p dp = out_r . out_grad_r. The slot weight omega = sum of p over the
slots adds its cotangent w to the slots' dp, and so omega w to delta. If it pulls the slots' logits
only, it adds (1 - omega) w to their dp, and nothing to delta.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from pallas.gpu.block_sizes import BlockSizes
from pallas.gpu.gates import Gates, chunk_gates
from pallas.gpu.output_pass import Facts
from pallas.gpu.slot_queries import slot_queries
from pallas.gpu.slot_tokens import slot_tokens
from pallas.gpu.spec import Spec
from pallas.gpu.state_grads import state_grads
from pallas.gpu.window_queries import window_queries
from pallas.gpu.window_tokens import window_tokens

Arrays = dict[str, jax.Array]
Pair = tuple[jax.Array, jax.Array]  # of keys and values


class Saved(NamedTuple):
    """What the forward leaves; shapes as in `Fused`."""

    out: jax.Array
    log_mass: jax.Array
    slot_weight: jax.Array | None
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
    facts = facts_of(constants)
    of_slots, of_window = _deltas(saved, out_grad, weight_grad, spec)
    if spec.window == 0:
        names = "rotated_query", "rotated_key", "value"
        grads = {name: jnp.zeros_like(inputs[name]) for name in names}
    else:
        arrays = inputs["rotated_query"], inputs["rotated_key"], inputs["value"], out_grad
        rows = saved.log_mass, of_window, facts
        tokens = window_tokens(*arrays, *rows, **launch)
        grads = {
            "rotated_query": window_queries(*arrays, *rows, **launch),
            "rotated_key": tokens.rotated_key,
            "value": tokens.value,
        }
    if saved.starts is None:
        return grads

    gates = gates_of(inputs, constants)
    arrays = inputs["query"], out_grad, inputs["key"], inputs["value"]
    rows = saved.log_mass, of_slots
    queries = slot_queries(
        *arrays, *rows, gates, saved.starts, facts, spec=spec, interpret=interpret
    )
    started = queries.logits_start, queries.weights_start
    states = state_grads(inputs["query"], out_grad, *started, gates, end_grad, **launch)
    tokens = slot_tokens(
        *arrays,
        (queries.logits_rise, queries.logits_start),
        (queries.weights_rise, queries.weights_start),
        inputs["log_decay"],
        constants.get("written"),
        gates,
        saved.starts,
        (states.key, states.value),
        facts,
        **launch,
    )
    grads |= {"query": queries.query, "log_decay": tokens.log_decay}
    grads["key"] = _in_place(tokens.key, inputs["key"].shape[1], spec)
    value = _in_place(tokens.value, inputs["value"].shape[1], spec)
    grads["value"] = grads["value"] + value
    if spec.state:
        grads |= {"start_key": states.start_key, "start_value": states.start_value}
    return grads


def facts_of(constants: Arrays) -> Facts | None:
    if "query_run" not in constants:
        return None
    return Facts(constants["query_run"], constants["visible"], constants.get("reads"))


def gates_of(inputs: Arrays, constants: Arrays) -> Gates:
    return chunk_gates(inputs["log_decay"], constants.get("written"), constants.get("kept"))


def _deltas(
    saved: Saved, out_grad: jax.Array, weight_grad: jax.Array | None, spec: Spec
) -> tuple[jax.Array, jax.Array]:
    """What is subtracted from dp, of the slots and of the window: [B, H * G, N] float32."""
    product = saved.out.astype(jnp.float32) * out_grad.astype(jnp.float32)
    delta = jnp.sum(product, -1).swapaxes(1, 2)
    if weight_grad is None or saved.slot_weight is None:
        return delta, delta
    if spec.weight == "slots":
        return delta - (1 - saved.slot_weight) * weight_grad, delta
    delta += saved.slot_weight * weight_grad
    return delta - weight_grad, delta


def _in_place(x: jax.Array, rows: int, spec: Spec) -> jax.Array:
    """The timeline's first rows [B, N, H, D] -> [B, P, H, D], as the arrays have them."""
    x = x[:, spec.ahead :]
    return jnp.pad(x, ((0, 0), (0, rows - x.shape[1]), (0, 0), (0, 0)))
