"""The gradients of the slots at the end of every chunk: the recurrence of the states, backwards.

    dS_{n-1} = total_n dS_n + sum over the heads and rows of x_r (p_r exp(c_r))        [D, M]

where x is the query and p the logits' gradient for the slots' keys, and x the output's gradient and
p the softmax's weights for their values; dS_n is the gradient of the slots at the end of chunk n.

The kernel, "nha_state_grads", is the walk of `state_walk.py`, where its inputs, outputs and
barriers are: over the rows of the group's query heads, from the last chunk.
"""

from typing import Any

import jax

from pallas.gpu.block_sizes import BlockSizes
from pallas.gpu.forward.gates import Gates
from pallas.gpu.spec import CallSpec
from pallas.gpu.warpgroup.state_walk import States, walk_states


def state_gradients(
    query: jax.Array,
    d_out: jax.Array,
    d_logits_to_start: jax.Array,
    weights_to_start: jax.Array,
    gates: Gates,
    d_end: tuple[jax.Array, jax.Array] | None,
    *,
    spec: CallSpec,
    block_sizes: BlockSizes,
    interpret: Any = False,
) -> States:
    """The gradients of the slots at the chunks' ends, and with spec.state of the initial slots.

    query, d_out: [B, Tq, Hq, D] bfloat16. d_logits_to_start, weights_to_start: p exp(c) of keys and
    of values, [B, Tq, Hq, M] bfloat16. d_end: with spec.state the gradients of the slots after the
    last chunk, [B, Hkv, D, M] float32; None: zero.
    """
    inputs = {"rows_key": query, "rows_value": d_out}
    inputs |= {"weights_key": d_logits_to_start, "weights_value": weights_to_start}
    inputs["total"] = gates.total
    if d_end is not None:
        inputs |= {"first_key": d_end[0], "first_value": d_end[1]}
    return walk_states(
        inputs,
        name="nha_state_grads",
        stages=block_sizes.state_stages,
        last=spec.state,
        group=spec.group,
        reverse=True,
        interpret=interpret,
    )
