"""The warpgroup of the output pass that fetches what the others read."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas.gpu.launch import Refs
from pallas.gpu.place import Place


def produce(refs: Refs, shared: Refs, place: Place) -> None:
    """Copies a chunk's operands to shared memory, in the order in which they are needed."""
    _fetch_queries(refs, shared, place)
    panels = panel_stages = 0
    if "key_loaded" in shared:
        key = refs["key"].at[place.batch, place.token_rows(0), place.kv_head]
        plgpu.copy_gmem_to_smem(key, shared["key"], shared["key_loaded"])
        panel_stages, panels = shared["slot_key"].shape[0], shared["slot_value"].shape[0]
        for panel in range(panel_stages):
            _fetch_panel(refs, shared, place, panel)
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
    if "slot_value" in shared:
        loaded = shared["slot_values_loaded"]
        fetch_slots(refs["start_value"], shared["slot_value"], place, loaded)
    for panel in range(panel_stages, panels):
        plgpu.barrier_wait(shared["panel_read"].at[panel % panel_stages])
        _fetch_panel(refs, shared, place, panel)

    @pl.loop(jnp.int32(0), jnp.maximum(place.blocks - stages, 0))
    def _(block):
        plgpu.barrier_wait(shared["block_read"].at[lax.rem(block, jnp.int32(stages))])
        _fetch_block(refs, shared, place, block + stages)

    # Every completion of a barrier must be waited for.
    for panel in range(panels - panel_stages, panels):
        plgpu.barrier_wait(shared["panel_read"].at[panel % panel_stages])

    @pl.loop(jnp.maximum(place.blocks - stages, 0), jnp.int32(place.blocks))
    def _(block):
        plgpu.barrier_wait(shared["block_read"].at[lax.rem(block, jnp.int32(stages))])


def _fetch_queries(refs: Refs, shared: Refs, place: Place) -> None:
    names = [name for name in ("query", "rotated_query") if name in shared]
    for i in range(shared["rotated_query"].shape[0]):
        for name in names:
            queries = refs[name].at[place.batch, place.rows, place.heads + i]
            plgpu.copy_gmem_to_smem(queries, shared[name].at[i], shared["queries_loaded"].at[i])


def _fetch_panel(refs: Refs, shared: Refs, place: Place, panel: int) -> None:
    """Some slots' keys at the chunk's start, and their decays in the chunk."""
    stages, _, width = shared["slot_key"].shape
    stage = panel % stages
    loaded, slots = shared["panel_loaded"].at[stage], pl.ds(panel * width, width)
    decay = refs["log_decay"].at[place.batch, place.token_rows(0), place.kv_head, slots]
    plgpu.copy_gmem_to_smem(decay, shared["log_decay"].at[stage], loaded)
    _fetch_slots_of(panel, refs["start_key"], shared["slot_key"].at[stage], place, loaded)


def fetch_slots(starts: Any, slots: Any, place: Place, loaded: Any) -> None:
    """The slots at the chunk's start, of keys or of values, in panels."""
    for panel in range(slots.shape[0]):
        _fetch_slots_of(panel, starts, slots.at[panel], place, loaded)


def _fetch_slots_of(panel: int, starts: Any, slots: Any, place: Place, loaded: Any) -> None:
    features, width = slots.shape
    of_panel = (pl.ds(0, features), pl.ds(panel * width, width))
    source = starts.at[place.batch, place.kv_head, place.chunk, *of_panel]
    plgpu.copy_gmem_to_smem(source, slots, loaded)


def _fetch_block(refs: Refs, shared: Refs, place: Place, block: int | jax.Array) -> None:
    stage = lax.rem(jnp.int32(block), jnp.int32(shared["value"].shape[0]))
    rows, loaded = place.token_rows(block), shared["block_loaded"].at[stage]
    for name in ("rotated_key", "value"):
        tokens = refs[name].at[place.batch, rows, place.kv_head]
        plgpu.copy_gmem_to_smem(tokens, shared[name].at[stage], loaded)
    if "visible" in shared:
        visible = refs["visible"].at[place.batch, rows]
        plgpu.copy_gmem_to_smem(visible, shared["visible"].at[stage], loaded)
