"""The slots at the start of every chunk: S_next = total S + sum_j to_end_j x_j, x a key or value.

The kernel, "nha_states", is the walk of `state_walk.py`, where its inputs, outputs and barriers
are: over the keys and values that enter the slots, from the first chunk.
"""

from typing import Any

import jax

from pallas.gpu.block_sizes import BlockSizes
from pallas.gpu.forward.gates import EndGates
from pallas.gpu.spec import CallSpec
from pallas.gpu.warpgroup.state_walk import States, walk_states


def chunk_states(
    key: jax.Array,
    value: jax.Array,
    gates: EndGates,
    initial: tuple[jax.Array, jax.Array] | None,
    *,
    spec: CallSpec,
    block_sizes: BlockSizes,
    interpret: Any = False,
) -> States:
    """The slots at the chunks' starts, and with spec.state after the last chunk.

    key, value: [B, Tk, Hkv, D] bfloat16, the timeline without its first spec.ahead rows; at row t
    enters token row t. initial: with spec.state the slots at the start, [B, Hkv, D, M] float32.
    """
    inputs = {"rows_key": key, "rows_value": value, "weights": gates.to_end, "total": gates.total}
    if initial is not None:
        inputs |= {"first_key": initial[0], "first_value": initial[1]}
    return walk_states(
        inputs,
        name="nha_states",
        stages=block_sizes.state_stages,
        last=spec.state,
        ahead=spec.ahead,
        interpret=interpret,
    )
