"""The warpgroup of the output pass that fetches what the others read."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas.gpu.place import Place
from pallas.gpu.spec import CHUNK

Refs = dict[str, Any]


def produce(refs: Refs, shared: Refs, place: Place) -> None:
    """Copies a chunk's operands to shared memory, in the order in which they are needed."""
    if "gates_loaded" in shared:
        fetch_gates(refs, shared, place, "last_fall")
    _fetch_queries(refs, shared, place)
    if "keys_loaded" in shared:
        loaded = shared["keys_loaded"]
        keys = refs["key"].at[place.batch, place.token_rows(0), place.kv_head]
        plgpu.copy_gmem_to_smem(keys, shared["key"], loaded)
        fetch_slots(refs["start_key"], shared["slots"], place, loaded)
    if "facts_loaded" in shared:
        for name in ("query_run", "reads"):
            if name not in shared:
                continue
            fact = refs[name].at[place.batch, place.rows]
            plgpu.copy_gmem_to_smem(fact, shared[name], shared["facts_loaded"])

    stages = shared["value"].shape[0]
    for stage in range(stages):
        fetch = functools.partial(_fetch_block, refs, shared, place, stage)
        pl.when(stage < place.blocks)(fetch)
    if "slot_keys_read" in shared:  # the slots' values take the place of their keys
        plgpu.barrier_wait(shared["slot_keys_read"])
        fetch_slots(refs["start_value"], shared["slots"], place, shared["slot_values_loaded"])

    @pl.loop(jnp.int32(0), jnp.maximum(place.blocks - stages, 0))
    def _(block):
        plgpu.barrier_wait(shared["block_read"].at[lax.rem(block, jnp.int32(stages))])
        _fetch_block(refs, shared, place, block + stages)

    # Every completion of a barrier must be waited for.
    @pl.loop(jnp.maximum(place.blocks - stages, 0), jnp.int32(place.blocks))
    def _(block):
        plgpu.barrier_wait(shared["block_read"].at[lax.rem(block, jnp.int32(stages))])


def fetch_gates(refs: Refs, shared: Refs, place: Place, write: str) -> None:
    """The chunk's cumulative decays, the blocks' references, and s to the place named `write`."""
    b, h, loaded = place.batch, place.kv_head, shared["gates_loaded"]
    for name, target in (("cumulative", "cumulative"), ("write", write)):
        panels, _, width = shared[target].shape
        for panel in range(panels):
            slots = pl.ds(panel * width, width)
            gate = refs[name].at[b, place.rows, h, slots]
            plgpu.copy_gmem_to_smem(gate, shared[target].at[panel], loaded)
    blocks = shared["references"].shape[0]
    rows = CHUNK // blocks
    for block in range(blocks):
        middle = place.first_row + block * rows + rows // 2 - 1
        reference = refs["cumulative"].at[b, middle, h]
        plgpu.copy_gmem_to_smem(reference, shared["references"].at[block], loaded)


def _fetch_queries(refs: Refs, shared: Refs, place: Place) -> None:
    names = [name for name in ("query", "rotated_query") if name in shared]
    for i in range(shared["rotated_query"].shape[0]):
        for name in names:
            queries = refs[name].at[place.batch, place.rows, place.heads + i]
            plgpu.copy_gmem_to_smem(queries, shared[name].at[i], shared["queries_loaded"].at[i])


def fetch_slots(starts: Any, slots: Any, place: Place, loaded: Any) -> None:
    """The slots at the chunk's start, of keys or of values, in panels."""
    panels, features, width = slots.shape
    for panel in range(panels):
        of_panel = (pl.ds(0, features), pl.ds(panel * width, width))
        source = starts.at[place.batch, place.kv_head, place.chunk, *of_panel]
        plgpu.copy_gmem_to_smem(source, slots.at[panel], loaded)


def _fetch_block(refs: Refs, shared: Refs, place: Place, block: int | jax.Array) -> None:
    stage = lax.rem(jnp.int32(block), jnp.int32(shared["value"].shape[0]))
    rows, loaded = place.token_rows(block), shared["block_loaded"].at[stage]
    for name in ("rotated_key", "value"):
        tokens = refs[name].at[place.batch, rows, place.kv_head]
        plgpu.copy_gmem_to_smem(tokens, shared[name].at[stage], loaded)
    if "visible" in shared:
        visible = refs["visible"].at[place.batch, rows]
        plgpu.copy_gmem_to_smem(visible, shared["visible"].at[stage], loaded)
