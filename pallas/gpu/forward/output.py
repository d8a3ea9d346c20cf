"""Slots, window and one softmax: the output of a chunk's rows, given the slots at its start.

With symbols as in `spec.py`, S0 the slots at the chunk's start, a and b the logits of slots and
window, p the softmax's weights of a row:

    a_r = exp(c_r) (q_r . SK0) + sum_{j <= r} (q_r . k_j) s_j exp(c_r - c_j)
    o_r = (p_r exp(c_r)) SV0 + sum_i w_ri v_i
    w_ri = sum_m p_rm s_im exp(c_rm - c_im) for i <= r, and the window's p beyond

`decays.py` says how the decays within the chunk are multiplied.

Inputs:
  window_query            [B, Tq, Hq, D] bfloat16, of the window's logits; C divides Tq
  window_key, value       [B, Tk, Hkv, D] bfloat16, the timeline without its first spec.ahead rows;
                          Tk reaches as far as whole blocks of C do
  query, key              with spec.slots: shaped alike, of the slots' logits
  log_decay               with spec.slots: [B, Tq, Hkv, M] float32, as for `fused_attention`
  start_key, start_value  with spec.slots: [B, Hkv, Tq / C, D, M] bfloat16, at the chunks' starts
  query_segment, ..       with spec.masked: of `Segments`
  cos, sin                of `Rotation`: window_query and window_key are to be rotated
Outputs:
  out                     [B, Tq, Hq, D] bfloat16
  lse                     [B, Hq, Tq] float32, the log-sum-exp of a row's logits; base e
  slot_weight             [B, Hq, Tq] float32

Warpgroups of a thread block, which has a chunk's rows of one or two query heads:
  compute (`output_compute.py`)  one a query head: its slots, its window, one online softmax
  fetch (`output_fetch.py`)      the last: copies what the others read, and rotates what of it the
                                 window reads

The slots come first, in panels of up to 32: all keys, and then all values. Then the window comes,
in blocks of C tokens. Heads of more than 128 would not fit shared memory all at once: of the keys
and, with many slots, of the queries, what the window reads comes where the slots' was, when that is
read. Where both read the same arrays, the second copy of a query or key comes from the L2 cache: it
lies otherwise, and is rotated.

| barrier                  | arrivals (number)                      | waits     | how often        |
| ------------------------ | -------------------------------------- | --------- | ---------------- |
| segments_loaded          | copies of query_segment and, with      | compute   | once, with       |
|                          | slots, of slot_access and              |           | spec.masked      |
|                          | token_segment (1 or 3)                 |           |                  |
| query_loaded[w]          | the copy of its query (1)              | compute w | once             |
| key_loaded               | the copy of key (1)                    | compute   | once             |
| key_read                 | every compute warpgroup                | fetch     | once, with D >   |
|                          |                                        |           | 128              |
| decay_loaded[stage]      | the copy of log decays (1)             | compute   | once a panel     |
| decay_read[stage]        | every compute warpgroup                | fetch     | once a panel     |
| slots_loaded[stage]      | the copy of slots (1)                  | compute   | twice a panel    |
| slots_read[stage]        | every compute warpgroup                | fetch     | twice a panel    |
| token_decays_read        | every compute warpgroup, done with the | compute   | once a panel,    |
|                          | last panel's                           |           | with two heads   |
| token_decays_ready       | every compute warpgroup, the first     | compute   | once a panel,    |
|                          | having built this panel's              |           | with two heads   |
| window_query_copied[w]   | the copy (1)                           | fetch     | once, with cos   |
| window_query_loaded[w]   | the copy; with cos, fetch, having      | compute w | once             |
|                          | rotated it (1)                         |           |                  |
| window_key_copied[stage] | the copy (1)                           | fetch     | once a block,    |
|                          |                                        |           | with cos         |
| window_key_loaded[stage] | the copy; with cos, fetch, having      | compute   | once a block     |
|                          | rotated it (1); with spec.masked also  |           |                  |
|                          | the copy of token_segment (2)          |           |                  |
| window_key_read[stage]   | every compute warpgroup                | fetch     | once a block     |
| value_loaded[stage]      | the copy (1)                           | compute   | once a block     |
| value_read[stage]        | every compute warpgroup                | fetch     | once a block     |
"""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas.gpu.block_sizes import BlockSizes
from pallas.gpu.forward.output_compute import ComputeWarpgroup
from pallas.gpu.forward.output_fetch import FetchWarpgroup
from pallas.gpu.spec import CHUNK, GATE_BLOCKS, PANEL, CallSpec, tile
from pallas.gpu.warpgroup.addresses import ZERO
from pallas.gpu.warpgroup.chunk_index import ChunkIndex
from pallas.gpu.warpgroup.launch import Refs, check_shared_memory, launch
from pallas.gpu.warpgroup.matmul import Matmul
from pallas.gpu.warpgroup.rotation import halves_tile

COMPUTE_REGISTERS, FETCH_REGISTERS = 232, 40  # of a thread, with two compute warpgroups;
# ptxas ignores them where jax finds nvJitLink (C7504), and all warpgroups have 168.
SLOT_BYTES = 32 * 1024  # of slots in flight
WIDE_HEAD = 192  # from here on keys share one place in shared memory, and with
MANY_SLOTS = 128  # or more of these, so do queries
PLACES = {"keys": ("key", "window_key"), "queries": ("query", "window_query")}  # in turn


class Outputs(NamedTuple):
    """The kernel's outputs, as above."""

    out: jax.Array
    lse: jax.Array
    slot_weight: jax.Array


def chunk_outputs(
    inputs: dict[str, jax.Array],
    *,
    spec: CallSpec,
    block_sizes: BlockSizes,
    interpret: Any = False,
) -> Outputs:
    """The output, its log-sum-exp and its slot weight, of `inputs` named and shaped as above.

    Raises:
      ValueError: block_sizes' warpgroups or stages of such heads don't fit.
    """
    B, Tq, heads, D = inputs["window_query"].shape
    M = inputs["log_decay"].shape[3] if spec.slots else 0
    warpgroups, interpreted = block_sizes.warpgroups, bool(interpret)
    if warpgroups > 1 and D >= WIDE_HEAD:
        raise ValueError(
            f"BlockSizes: warpgroups must be 1 for heads of more than 128, got {warpgroups} for {D}"
        )
    outputs = {
        "out": jax.ShapeDtypeStruct((B, Tq, heads, D), jnp.bfloat16),
        "lse": jax.ShapeDtypeStruct((B, heads, Tq), jnp.float32),
        "slot_weight": jax.ShapeDtypeStruct((B, heads, Tq), jnp.float32),
    }
    result = launch(
        functools.partial(_kernel, spec=spec, interpret=interpreted),
        inputs,
        outputs,
        _scratch(spec, block_sizes, D, M, rotates="cos" in inputs, interpret=interpreted),
        grid={"chunk": Tq // CHUNK, "heads": heads // warpgroups, "batch": B},
        warpgroups=warpgroups + 1,
        name="nha_output",
        one_warpgroup_reduces=True,
        interpret=interpret,
    )
    return Outputs(*result)


def _scratch(
    spec: CallSpec, block_sizes: BlockSizes, D: int, M: int, *, rotates: bool, interpret: bool
) -> Refs:
    """Shared memory and barriers."""
    warpgroups = block_sizes.warpgroups
    scratch = _window_scratch(spec, block_sizes, D, M)
    if rotates:
        for name in ("window_query", "window_key"):
            shape = scratch[name].shape
            scratch[name] = plgpu.SMEM(shape, jnp.bfloat16, transforms=halves_tile(D))
            scratch[name + "_copied"] = plgpu.Barrier(num_barriers=shape[0])
    if M:
        scratch |= _slot_scratch(warpgroups, D, M)
        if D >= WIDE_HEAD:
            scratch["key_read"] = plgpu.Barrier(num_arrivals=warpgroups)
            for place in ("keys", "queries") if M >= MANY_SLOTS else ("keys",):
                scratch[place] = plgpu.RefUnion(*(scratch.pop(name) for name in PLACES[place]))
    check_shared_memory(scratch, "stages", block_sizes.stages)
    if interpret:
        scratch["buffer"] = plgpu.SMEM((warpgroups, CHUNK, CHUNK), jnp.bfloat16)
    return scratch


def _window_scratch(spec: CallSpec, block_sizes: BlockSizes, D: int, M: int) -> Refs:
    """What there is with and without slots."""
    warpgroups, stages = block_sizes.warpgroups, block_sizes.stages
    scratch = {
        "window_query": _tiled(warpgroups, CHUNK, D),
        "window_key": _tiled(stages, CHUNK, D),
        "value": _tiled(stages, CHUNK, D),
        "lse": plgpu.SMEM((warpgroups, CHUNK), jnp.float32),
        "slot_weight": plgpu.SMEM((warpgroups, CHUNK), jnp.float32),
        "window_query_loaded": plgpu.Barrier(num_barriers=warpgroups),
        "window_key_loaded": plgpu.Barrier(num_arrivals=1 + spec.masked, num_barriers=stages),
        "window_key_read": plgpu.Barrier(num_arrivals=warpgroups, num_barriers=stages),
        "value_loaded": plgpu.Barrier(num_barriers=stages),
        "value_read": plgpu.Barrier(num_arrivals=warpgroups, num_barriers=stages),
    }
    if spec.masked:
        scratch["query_segment"] = plgpu.SMEM((CHUNK,), jnp.int32)
        # The first is of the tokens that enter the slots in the chunk.
        scratch["token_segment"] = plgpu.SMEM((1 + stages, CHUNK), jnp.int32)
        scratch["segments_loaded"] = plgpu.Barrier(num_arrivals=3 if M else 1)
        if M:
            scratch["slot_access"] = plgpu.SMEM((CHUNK,), jnp.int32)
    return scratch


def _slot_scratch(warpgroups: int, D: int, M: int) -> Refs:
    panel = min(M, PANEL)
    panels = M // panel
    slot_stages = min(2 * panels, SLOT_BYTES // (2 * D * panel))
    decay_stages = min(panels, 2)
    return {
        "query": _tiled(warpgroups, CHUNK, D, columns=min(D, panel)),
        "key": _tiled(CHUNK, D, columns=min(D, panel)),
        "slots": _tiled(slot_stages, D, panel),  # the panels of the keys, then of the values
        "cumulative": _tiled(decay_stages, CHUNK, panel, dtype=jnp.float32),  # log decays, then c
        "weights_to_start": _tiled(warpgroups, panels, CHUNK, panel),
        "shrink": plgpu.SMEM((warpgroups, panels, CHUNK), jnp.float32),
        "by_token": _tiled(warpgroups, CHUNK, CHUNK),  # scores of the chunk's tokens, then weights
        "up_to_row": _tiled(CHUNK, CHUNK, columns=panel),
        "token_decays": _tiled(GATE_BLOCKS, CHUNK, panel),
        "references": plgpu.SMEM((GATE_BLOCKS, decay_stages * panel), jnp.float32),
        "zero": plgpu.SMEM((warpgroups, *ZERO.shape), ZERO.dtype),
        "query_loaded": plgpu.Barrier(num_barriers=warpgroups),
        "key_loaded": plgpu.Barrier(),
        "slots_loaded": plgpu.Barrier(num_barriers=slot_stages),
        "slots_read": plgpu.Barrier(num_arrivals=warpgroups, num_barriers=slot_stages),
        "decay_loaded": plgpu.Barrier(num_barriers=decay_stages),
        "decay_read": plgpu.Barrier(num_arrivals=warpgroups, num_barriers=decay_stages),
        "token_decays_read": plgpu.Barrier(num_arrivals=warpgroups),
        "token_decays_ready": plgpu.Barrier(num_arrivals=warpgroups),
    }


def _tiled(*shape: int, dtype: Any = jnp.bfloat16, columns: int | None = None) -> Any:
    layout = tile(columns or shape[-1], jnp.dtype(dtype).itemsize)
    return plgpu.SMEM(shape, dtype, transforms=layout)


def _kernel(refs: Refs, shared: Refs, *, spec: CallSpec, interpret: bool) -> None:
    for place, names in PLACES.items():
        if place in shared:
            shared |= dict(zip(names, shared[place], strict=True))
    warpgroups = shared["window_query"].shape[0]
    me = lax.axis_index("wg")
    index = ChunkIndex(spec, warpgroups)
    # One compute warpgroup and the fetch warpgroup have all the registers that they can name.
    limited = warpgroups > 1

    @pl.when(me == warpgroups)
    def _():
        if limited:
            plgpu.set_max_registers(FETCH_REGISTERS, action="decrease")
        FetchWarpgroup(refs, shared, index).run()

    @pl.when(me < warpgroups)
    def _():
        if limited:
            plgpu.set_max_registers(COMPUTE_REGISTERS, action="increase")
        matmul = Matmul(interpret, shared["buffer"].at[me] if interpret else None)
        ComputeWarpgroup(refs, shared, index, matmul, spec, me).run()
