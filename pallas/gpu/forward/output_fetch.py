"""The warpgroup of the output pass that fetches what the others read, and rotates it."""

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas.gpu.warpgroup.chunk_index import ChunkIndex
from pallas.gpu.warpgroup.launch import Refs
from pallas.gpu.warpgroup.rotation import arrival, rotate_copied

Fetch = Callable[[Refs, Refs, ChunkIndex, int | jax.Array], None]


def fetch(refs: Refs, shared: Refs, index: ChunkIndex) -> None:
    """Copies a chunk's operands to shared memory, in the order in which they are needed."""
    has_slots = "key" in shared
    if has_slots:
        _fetch_query(refs, shared, index, "query")
        key = refs["key"].at[index.batch, index.token_rows(0), index.kv_head]
        plgpu.copy_gmem_to_smem(key, shared["key"], shared["key_loaded"])
    if "segments_loaded" in shared:
        _fetch_segments(refs, shared, index)
    if has_slots:
        _begin_slots(refs, shared, index)
    turns = "queries" in shared
    if not turns:
        _fetch_query(refs, shared, index, "window_query")
    _begin_blocks(refs, shared, index, _fetch_value)
    if "keys" in shared:
        plgpu.barrier_wait(shared["key_read"])
    _begin_blocks(refs, shared, index, _fetch_window_key)
    if not turns:
        _rotate_query(refs, shared, index)
    _begin_blocks(refs, shared, index, _rotate_key)
    if has_slots:
        _end_slots(refs, shared, index)

    stages = shared["value"].shape[0]

    @pl.loop(jnp.int32(0), jnp.int32(index.blocks))
    def _(block):
        stage, ahead = lax.rem(block, jnp.int32(stages)), block + stages
        for name, fetch in (("window_key", _fetch_window_key), ("value", _fetch_value)):
            plgpu.barrier_wait(shared[name + "_read"].at[stage])
            pl.when(ahead < index.blocks)(functools.partial(fetch, refs, shared, index, ahead))
        pl.when(ahead < index.blocks)(functools.partial(_rotate_key, refs, shared, index, ahead))


def _begin_blocks(refs: Refs, shared: Refs, index: ChunkIndex, fetch: Fetch) -> None:
    for block in range(shared["value"].shape[0]):
        pl.when(block < index.blocks)(functools.partial(fetch, refs, shared, index, block))


def _begin_slots(refs: Refs, shared: Refs, index: ChunkIndex) -> None:
    decay_stages, slot_stages = shared["cumulative"].shape[0], shared["slots"].shape[0]
    for item in range(slot_stages):
        if item < decay_stages:
            _fetch_decay(refs, shared, index, item)
        _fetch_slots(refs, shared, index, item)


def _end_slots(refs: Refs, shared: Refs, index: ChunkIndex) -> None:
    """Waits for the last ones too: every completion of a barrier must be waited for."""
    decay_stages, slot_stages = shared["cumulative"].shape[0], shared["slots"].shape[0]
    panels = shared["p_start"].shape[1]
    for item in range(2 * panels):
        plgpu.barrier_wait(shared["slots_read"].at[item % slot_stages])
        if item + slot_stages < 2 * panels:
            _fetch_slots(refs, shared, index, item + slot_stages)
        if item < panels:
            plgpu.barrier_wait(shared["decay_read"].at[item % decay_stages])
            if item + decay_stages < panels:
                _fetch_decay(refs, shared, index, item + decay_stages)
        if "queries" in shared and item == panels - 1:  # all the slots' keys are multiplied
            _fetch_query(refs, shared, index, "window_query")
        if "queries" in shared and item == panels:
            _rotate_query(refs, shared, index)


def _fetch_query(refs: Refs, shared: Refs, index: ChunkIndex, name: str) -> None:
    copied = arrival(shared, name, shared[name + "_loaded"])
    for i in range(shared[name].shape[0]):
        queries = refs[name].at[index.batch, index.rows, index.heads + i]
        plgpu.copy_gmem_to_smem(queries, shared[name].at[i], copied.at[i])


def _rotate_query(refs: Refs, shared: Refs, index: ChunkIndex) -> None:
    where, loaded = (index.batch, index.positions), shared["window_query_loaded"]
    for i in range(shared["window_query"].shape[0]):
        rotate_copied(refs, shared, "window_query", i, *where, loaded)


def _rotate_key(refs: Refs, shared: Refs, index: ChunkIndex, block: int | jax.Array) -> None:
    where, loaded = (index.batch, index.token_rows(block)), shared["window_key_loaded"]
    rotate_copied(refs, shared, "window_key", _stage_of(block, shared), *where, loaded)


def _fetch_segments(refs: Refs, shared: Refs, index: ChunkIndex) -> None:
    loaded = shared["segments_loaded"]
    for name in ("query_segment", "slot_access"):
        if name in shared:
            fact = refs[name].at[index.batch, index.rows]
            plgpu.copy_gmem_to_smem(fact, shared[name], loaded)
    if "key" in shared:
        token_segment = refs["token_segment"].at[index.batch, index.token_rows(0)]
        plgpu.copy_gmem_to_smem(token_segment, shared["token_segment"].at[0], loaded)


def _fetch_decay(refs: Refs, shared: Refs, index: ChunkIndex, panel: int) -> None:
    stages, _, width = shared["cumulative"].shape
    stage, slots = panel % stages, pl.ds(panel * width, width)
    decay = refs["log_decay"].at[index.batch, index.token_rows(0), index.kv_head, slots]
    loaded = shared["decay_loaded"].at[stage]
    plgpu.copy_gmem_to_smem(decay, shared["cumulative"].at[stage], loaded)


def _fetch_slots(refs: Refs, shared: Refs, index: ChunkIndex, item: int) -> None:
    """A panel of the slots at the chunk's start; the keys' panels, then the values'."""
    stages, features, width = shared["slots"].shape
    stage, panels = item % stages, shared["p_start"].shape[1]
    starts = refs["start_key"] if item < panels else refs["start_value"]
    of_panel = (pl.ds(0, features), pl.ds(item % panels * width, width))
    source = starts.at[index.batch, index.kv_head, index.chunk, *of_panel]
    plgpu.copy_gmem_to_smem(source, shared["slots"].at[stage], shared["slots_loaded"].at[stage])


def _fetch_window_key(refs: Refs, shared: Refs, index: ChunkIndex, block: int | jax.Array) -> None:
    rows, stage = index.token_rows(block), _stage_of(block, shared)
    tokens = refs["window_key"].at[index.batch, rows, index.kv_head]
    loaded = shared["window_key_loaded"]
    copied = arrival(shared, "window_key", loaded)
    plgpu.copy_gmem_to_smem(tokens, shared["window_key"].at[stage], copied.at[stage])
    if "token_segment" in shared:
        token_segment = refs["token_segment"].at[index.batch, rows]
        plgpu.copy_gmem_to_smem(
            token_segment, shared["token_segment"].at[1 + stage], loaded.at[stage]
        )


def _fetch_value(refs: Refs, shared: Refs, index: ChunkIndex, block: int | jax.Array) -> None:
    rows, stage = index.token_rows(block), _stage_of(block, shared)
    tokens = refs["value"].at[index.batch, rows, index.kv_head]
    plgpu.copy_gmem_to_smem(tokens, shared["value"].at[stage], shared["value_loaded"].at[stage])


def _stage_of(block: int | jax.Array, shared: Refs) -> jax.Array:
    return lax.rem(jnp.int32(block), jnp.int32(shared["value"].shape[0]))
