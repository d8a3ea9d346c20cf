"""Slots, window and one softmax: the output of a chunk's rows, given the slots at its start.

With symbols as in `spec.py`, S0 the slots at the chunk's start, s = 1 - exp(decay), c the chunk's
cumulative decay, a and b the logits of slots and window:

    a_r = exp(c_r) (q_r . SK0) + sum_{j <= r} (q_r . k_j) s_j exp(c_r - c_j)
    o_r = (p_r exp(c_r)) SV0 + sum_i P_ri v_i
    P_ri = sum_m p_rm s_im exp(c_rm - c_im) for i <= r, and the window's p beyond

`in_chunk.py` says how the decays within the chunk are multiplied.

A thread block has a warpgroup for each of its query heads, and one that fetches what they share,
and rotates what of it the window reads.

The slots come first, in panels, all keys and then all values, then the window. Heads of more than
128 would not fit shared memory all at once: of the keys and, with many slots, of the queries, what
the window reads comes where the slots' was, when that is read. Where both read the same arrays, the
second copy of a query or key comes from the L2 cache: it lies otherwise, and is rotated.
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
from pallas.gpu.forward.output_fetch import fetch
from pallas.gpu.spec import CHUNK, GATE_BLOCKS, PANEL, CallSpec, Segments, tile
from pallas.gpu.warpgroup.addresses import ZERO
from pallas.gpu.warpgroup.chunk_index import ChunkIndex
from pallas.gpu.warpgroup.launch import Refs, check_shared_memory, launch
from pallas.gpu.warpgroup.matmul import Matmul
from pallas.gpu.warpgroup.rotation import Rotation, halves_tile

COMPUTE_REGISTERS, FETCH_REGISTERS = 232, 40  # of a thread, with two compute warpgroups;
# ptxas ignores them where jax finds nvJitLink (C7504), and all warpgroups have 168.
SLOT_BYTES = 32 * 1024  # of slots in flight
WIDE_HEAD = 192  # from here on, keys take turns in one place of shared memory, and with
MANY_SLOTS = 128  # or more of these, so do queries
TURNS = {"keys": ("key", "window_key"), "queries": ("query", "window_query")}


class Result(NamedTuple):
    out: jax.Array  # [B, Tq, Hq, D] bfloat16
    lse: jax.Array  # [B, Hq, Tq] float32, the log-sum-exp of a row's logits; base e
    slot_weight: jax.Array  # [B, Hq, Tq] float32


def output_pass(
    query: jax.Array | None,
    window_query: jax.Array,
    key: jax.Array | None,
    window_key: jax.Array,
    value: jax.Array,
    log_decay: jax.Array | None,
    starts: tuple[jax.Array, jax.Array] | None,
    segments: Segments | None,
    rotation: Rotation | None,
    *,
    spec: CallSpec,
    block_sizes: BlockSizes,
    interpret: Any = False,
) -> Result:
    """The kernel's call.

    query, window_query: [B, Tq, Hq, D] bfloat16, of the slots' and of the window's logits; Tq is
    a multiple of C. key, window_key, value: [B, Tk, Hkv, D], the timeline without its first
    spec.ahead rows; Tk reaches as far as whole blocks of C do. log_decay: [B, Tq, Hkv, M]
    float32, as for `fused_attention`. starts: [B, Hkv, Tq / C, D, M], the slots' keys and
    values at the chunks' starts. Without spec.slots query, key, log_decay and starts are None,
    without spec.masked segments are. rotation: of window_query and window_key; None: they are
    rotated.
    interpret: as for `fused_attention`.

    Raises ValueError if block_sizes' warpgroups or stages of such heads don't fit.
    """
    B, Tq, heads, D = window_query.shape
    warpgroups = block_sizes.warpgroups
    if warpgroups > 1 and D >= WIDE_HEAD:
        raise ValueError(
            f"BlockSizes: warpgroups must be 1 for heads of more than 128, got {warpgroups} for {D}"
        )
    inputs = {"window_query": window_query, "window_key": window_key, "value": value}
    if query is not None and key is not None and log_decay is not None and starts is not None:
        inputs |= {"query": query, "key": key, "log_decay": log_decay}
        inputs |= {"start_key": starts[0], "start_value": starts[1]}
    if segments is not None:
        inputs |= segments.arrays(slots="query" in inputs)
    if rotation is not None:
        inputs |= rotation._asdict()
    outputs = {
        "out": jax.ShapeDtypeStruct((B, Tq, heads, D), jnp.bfloat16),
        "lse": jax.ShapeDtypeStruct((B, heads, Tq), jnp.float32),
        "slot_weight": jax.ShapeDtypeStruct((B, heads, Tq), jnp.float32),
    }
    M = log_decay.shape[3] if log_decay is not None else 0
    result = launch(
        functools.partial(_kernel, spec=spec, interpret=bool(interpret)),
        inputs,
        outputs,
        _scratch(spec, block_sizes, D, M, rotates=rotation is not None, interpret=bool(interpret)),
        grid={"chunk": Tq // CHUNK, "heads": heads // warpgroups, "batch": B},
        warpgroups=warpgroups + 1,
        name="nha_output",
        interpret=interpret,
    )
    return Result(*result)


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
            for turns in ("keys", "queries") if M >= MANY_SLOTS else ("keys",):
                scratch[turns] = plgpu.RefUnion(*(scratch.pop(name) for name in TURNS[turns]))
    check_shared_memory(scratch, "stages", block_sizes.stages)
    if interpret:
        scratch["buffer"] = plgpu.SMEM((warpgroups, CHUNK, CHUNK), jnp.bfloat16)
    return scratch


def _window_scratch(spec: CallSpec, block_sizes: BlockSizes, D: int, M: int) -> Refs:
    """What there is with and without slots, M of them."""
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
        scratch["token_segment"] = plgpu.SMEM(
            (1 + stages, CHUNK), jnp.int32
        )  # the slots' tokens first
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
        "cumulative": _tiled(decay_stages, CHUNK, panel, dtype=jnp.float32),  # log decays at first
        "p_start": _tiled(warpgroups, panels, CHUNK, panel),
        "shrink": plgpu.SMEM((warpgroups, panels, CHUNK), jnp.float32),
        "between": _tiled(warpgroups, CHUNK, CHUNK),  # scores, then weights, of rows and tokens
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
    for turns, names in TURNS.items():
        if turns in shared:
            shared |= dict(zip(names, shared[turns], strict=True))
    warpgroups = shared["window_query"].shape[0]
    me = lax.axis_index("wg")
    index = ChunkIndex(spec, warpgroups)
    limited = (
        warpgroups > 1
    )  # one compute warpgroup and the fetch warpgroup have all the registers they can name

    @pl.when(me == warpgroups)
    def _():
        if limited:
            plgpu.set_max_registers(FETCH_REGISTERS, action="decrease")
        fetch(refs, shared, index)

    @pl.when(me < warpgroups)
    def _():
        if limited:
            plgpu.set_max_registers(COMPUTE_REGISTERS, action="increase")
        matmul = Matmul(interpret, shared["buffer"].at[me] if interpret else None)
        ComputeWarpgroup(refs, shared, index, matmul, spec, me).run()
