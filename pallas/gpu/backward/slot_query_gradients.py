"""The gradients of the slots' queries, and what the launches after it read of logits and weights.

With symbols as in `spec.py` and `decays.py`, S0 the slots at the chunk's start (SK0 their keys, SV0
their values), do the gradient of the output, and `entered` the tokens that a row finds in its
slots; the sums run over the row's slots:

    A = entered * q k^T                                  B = entered * do v^T
    a = scale (exp(c) (q SK0) + row_decay spread(A))     dp = exp(c) (do SV0) + row_decay spread(B)
    p = exp(a - lse)                                     ds = scale p (dp - delta)
    delta = omega mean(dp) + delta_beside_slots          mean(dp) = sum(p dp) / sum(p)
    L = entered * gather(ds row_decay)                   dq = (ds exp(c)) SK0^T + L k

The slots may all hold nearly the same. Then ds and its sum are small differences, in which all that
dp's have in common must cancel, their rounding included: only a mean of the very dp and p does so.
omega, the slots' part of the softmax, and delta_beside_slots are given in float32.

Inputs:
  query, d_out            [B, Tq, Hq, D] bfloat16, as the slots read the query; C divides Tq
  key, value              [B, Tk, Hkv, D] bfloat16, the timeline without its first spec.ahead rows
  lse, slot_weight,       [B, Hq, Tq] float32; lse of base e; slot_weight is omega;
  delta_beside_slots      the rest of delta, see `backward.py`
  cumulative, write       of `Gates`
  start_key, start_value  [B, Hkv, Tq / C, D, M] bfloat16, at the chunks' starts
  query_segment, ..       with spec.masked: of `Segments`
Outputs: of `SlotQueryGradients`, as they are multiplied later: in bfloat16 and with the decay that
they carry. Where the window reads the same queries, its gradient d_query is given, and updated: it
comes to the place of q after the last product with it, and dq is added.

One warpgroup (`slot_query_compute.py`), which fetches for itself (`slot_query_memory.py`), has the
rows of one query head. Up to 64 slots are worked on at once. With more it is a panel at a time, two
are in shared memory, and delta comes first: what is computed for p and dp is computed twice, and S0
and c are read twice, half of SK0 three times. That comes from the L2 cache.

The slots take the places of the tokens, once A and B are computed: beside them, heads of 256 have
no room. For dq, k comes again, to the place of do, what is gone of SK0, to that of SV0, and what dq
is added to, to the place of q.

| barrier                   | arrivals (number), for which the warpgroup waits     | how often    |
| ------------------------- | ---------------------------------------------------- | ------------ |
| loaded                    | the copies of q, do, k, v, three numbers of each     | once         |
|                           | row, s of each panel (1 or 4), four c_ref and, with  |              |
|                           | spec.masked, three of segments                       |              |
| gates_loaded[stage]       | the copy of c (1)                                    | once a panel |
| slot_keys_loaded[stage]   | the copy of a panel of SK0 (1)                       | once a panel |
| slot_values_loaded[stage] | the copy of a panel of SV0 (1)                       | once a panel |
| loaded_again              | the copies of k, of d_query if given, and of what is | once         |
|                           | gone of SK0 (0 or 2 panels)                          |              |

With several panels "once a panel" is twice: once for delta, once for the results.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from pallas.gpu.backward.slot_query_compute import SlotQueryWarpgroup
from pallas.gpu.backward.slot_query_memory import SlotQueryMemory, query_scratch
from pallas.gpu.forward.gates import Gates
from pallas.gpu.spec import CHUNK, CallSpec
from pallas.gpu.warpgroup.chunk_index import ChunkIndex
from pallas.gpu.warpgroup.launch import Refs, launch
from pallas.gpu.warpgroup.matmul import Matmul


class SlotQueryGradients(NamedTuple):
    """The launch's outputs, bfloat16: query [B, Tq, Hq, D], the others [B, Tq, Hq, M]."""

    query: jax.Array  # with the window's, where that is given
    d_logits_to_reference: jax.Array  # ds exp(c - c_ref), c_ref of the row's block
    weights_to_reference: jax.Array  # p exp(c - c_ref)
    d_logits_to_start: jax.Array  # ds exp(c), 0 in rows that do not read the chunk's first slots
    weights_to_start: jax.Array  # p exp(c), likewise


def slot_query_gradients(
    inputs: dict[str, jax.Array],
    gates: Gates,
    d_query: jax.Array | None,
    *,
    spec: CallSpec,
    interpret: Any = False,
) -> SlotQueryGradients:
    """The gradient of the query, and the other outputs above.

    Args:
      inputs: named and shaped as above, but for those of gates.
      gates: as `chunk_gates` returns them.
      d_query: the window's gradient of the query, [B, Tq, Hq, D] bfloat16, or None.
      interpret: as for `launch`.
    """
    B, Tq, heads, D = inputs["query"].shape
    M = gates.cumulative.shape[3]
    inputs = inputs | {"cumulative": gates.cumulative, "write": gates.write}
    weights = jax.ShapeDtypeStruct((B, Tq, heads, M), jnp.bfloat16)
    outputs = dict.fromkeys(SlotQueryGradients._fields[1:], weights)
    updated = {}
    if d_query is None:
        outputs["d_query"] = jax.ShapeDtypeStruct((B, Tq, heads, D), jnp.bfloat16)
    else:
        updated["d_query"] = d_query

    def kernel(refs: Refs, shared: Refs) -> None:
        index = ChunkIndex(spec)
        memory = SlotQueryMemory(refs, shared, index, adds=bool(updated))
        SlotQueryWarpgroup(memory, Matmul(bool(interpret), shared.get("buffer")), spec).run()

    *of_slots, grad = launch(
        kernel,
        inputs,
        outputs,
        query_scratch(spec, D, M, adds=bool(updated), interpret=bool(interpret)),
        grid={"chunk": Tq // CHUNK, "heads": heads, "batch": B},
        warpgroups=1,
        name="nha_slot_queries",
        interpret=interpret,
        updated=updated,
    )
    return SlotQueryGradients(grad, *of_slots)
