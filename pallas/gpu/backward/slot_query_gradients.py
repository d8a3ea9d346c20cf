"""The gradients of the slots' queries, and what the launches after it read of logits and weights.

With symbols as in `spec.py` and `decays.py`, S0 the slots at the chunk's start, E0 = exp(c) the
decay since then, do the gradient of the output, and `entered` the tokens that a row finds in its
slots; the sums run over the row's slots:

    S = entered * q k^T                                D = entered * do v^T
    a = scale (E0 (q SK0) + row_decay spread(S))       dp = E0 (do SV0) + row_decay spread(D)
    p = exp(a - lse)                                   ds = scale p (dp - delta)
    delta = omega mean(dp) + rest                      mean(dp) = sum(p dp) / sum(p)
    L = entered * gather(ds row_decay)                 dq = (ds E0) SK0^T + L k

The slots may all hold nearly the same. Then ds and its sum are small differences, in which all that
dp's have in common must cancel, their rounding included: only a mean of the very dp and p does so.
omega, the slots' share of the softmax, and rest, what is not of the slots, are given in float32.

Inputs:
  query, d_out            [B, Tq, Hq, D] bfloat16, as the slots read the query; C divides Tq
  key, value              [B, Tk, Hkv, D] bfloat16, the timeline without its first spec.ahead rows
  lse, slot_weight, rest  [B, Hq, Tq] float32; lse of base e; slot_weight is omega
  cumulative, write       of `Gates`
  start_key, start_value  [B, Hkv, Tq / C, D, M] bfloat16, at the chunks' starts
  query_segment, ..       with spec.masked: of `Segments`
Outputs: of `SlotQueryGradients`, as they are multiplied later: in bfloat16 and with the decay that
they carry. Where the window reads the same queries, its gradient d_query is given, and updated: it
comes to the place of q after the last product with it, and dq is added.

One warpgroup (`slot_query_compute.py`), which fetches for itself (`slot_query_memory.py`), has
the rows of one query head. Up to 64 slots are worked on at once. Of more a panel at a time is, two
are in shared memory, and delta comes first: what is computed for p and dp is computed twice, and S0
and c are read twice, half of SK0 three times. That comes from the L2 cache.

The slots take the places of the tokens, once S and D are computed: beside them, heads of 256 have
no room. For dq, k comes again, to the place of do, what is gone of SK0, to that of SV0, and what dq
is added to, to the place of q.

| barrier                   | arrivals (number)                  | waits         | how often       |
| ------------------------- | ---------------------------------- | ------------- | --------------- |
| loaded                    | the copies of q, do, k, v, three   | the warpgroup | once            |
|                           | numbers of each row, s of each     |               |                 |
|                           | panel (1 or 4), four c_ref and,    |               |                 |
|                           | with spec.masked, three of         |               |                 |
|                           | segments                           |               |                 |
| gates_loaded[stage]       | the copy of c (1)                  | the warpgroup | once a panel;   |
|                           |                                    |               | of several,     |
|                           |                                    |               | twice           |
| slot_keys_loaded[stage]   | the copy of slots (1)              | the warpgroup | as gates_loaded |
| slot_values_loaded[stage] | the copy of slots (1)              | the warpgroup | as gates_loaded |
| loaded_again              | the copies of k, of d_query if     | the warpgroup | once            |
|                           | given, and of what is gone of SK0  |               |                 |
|                           | (0 or 2 panels)                    |               |                 |
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from pallas.gpu.backward.slot_query_compute import SlotQueryWarpgroup
from pallas.gpu.backward.slot_query_memory import SlotQueryMemory, query_scratch
from pallas.gpu.forward.gates import Gates
from pallas.gpu.spec import CHUNK, CallSpec, Segments
from pallas.gpu.warpgroup.chunk_index import ChunkIndex
from pallas.gpu.warpgroup.launch import Refs, launch
from pallas.gpu.warpgroup.matmul import Matmul


class SlotQueryGradients(NamedTuple):
    """bfloat16: [B, Tq, Hq, D] the gradient of the query, else [B, Tq, Hq, M]."""

    query: jax.Array  # with the window's, where that is given
    d_logits_to_reference: jax.Array  # ds exp(c - c_ref), c_ref of the row's block
    weights_to_reference: jax.Array  # p exp(c - c_ref)
    d_logits_to_start: jax.Array  # ds exp(c), 0 in rows that do not read the chunk's first slots
    weights_to_start: jax.Array  # p exp(c), likewise


def slot_query_gradients(
    query: jax.Array,
    d_out: jax.Array,
    key: jax.Array,
    value: jax.Array,
    lse: jax.Array,
    slot_weight: jax.Array,
    rest: jax.Array,
    gates: Gates,
    starts: tuple[jax.Array, jax.Array],
    segments: Segments | None,
    d_query: jax.Array | None,
    *,
    spec: CallSpec,
    interpret: Any = False,
) -> SlotQueryGradients:
    """The gradient of the query, and the other outputs above, of the inputs above.

    gates: as `chunk_gates` returns them. starts: of keys and values. segments: with spec.masked.
    d_query: the window's gradient of the query, [B, Tq, Hq, D] bfloat16, or None. interpret: as for
    `launch`.
    """
    B, Tq, heads, D = query.shape
    M = gates.cumulative.shape[3]
    inputs = {"query": query, "d_out": d_out, "key": key, "value": value}
    inputs |= {"lse": lse, "slot_weight": slot_weight, "rest": rest}
    inputs |= {"cumulative": gates.cumulative, "write": gates.write}
    inputs |= {"start_key": starts[0], "start_value": starts[1]}
    if segments is not None:
        inputs |= segments.arrays(slots=True)
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
