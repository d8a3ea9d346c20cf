"""The fetch warpgroup of `output.py`: it copies what the others read, and rotates some of it."""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas.gpu.warpgroup.chunk_index import ChunkIndex
from pallas.gpu.warpgroup.launch import Refs
from pallas.gpu.warpgroup.rotation import arrival, rotate_copied

Block = int | jax.Array  # a block of the window's tokens, by its number


class FetchWarpgroup:
    """Copies a chunk's operands to shared memory, in the order in which they are needed."""

    def __init__(self, refs: Refs, shared: Refs, index: ChunkIndex):
        self.refs, self.shared, self.index = refs, shared, index
        self.stages = shared["value"].shape[0]  # blocks of the window in flight
        self.has_slots = "key" in shared
        if self.has_slots:
            self.decay_stages, self.slot_stages = (
                shared[name].shape[0] for name in ("cumulative", "slots")
            )
            self.panels = shared["weights_to_start"].shape[1]

    def run(self) -> None:
        index, shared = self.index, self.shared
        if self.has_slots:
            self._fetch_query("query")
            key = self.refs["key"].at[index.batch, index.token_rows(0), index.kv_head]
            plgpu.copy_gmem_to_smem(key, shared["key"], shared["key_loaded"])
        if "segments_loaded" in shared:
            self._fetch_segments()
        if self.has_slots:
            self._begin_slots()
        share_place = "queries" in shared  # the window's query comes after the slots'
        if not share_place:
            self._fetch_query("window_query")
        self._begin_blocks(self._fetch_value)
        if "keys" in shared:
            plgpu.barrier_wait(shared["key_read"])
        self._begin_blocks(self._fetch_window_key)
        if not share_place:
            self._rotate_query()
        self._begin_blocks(self._rotate_key)
        if self.has_slots:
            self._end_slots()
        self._end_blocks()

    # The window's blocks

    def _begin_blocks(self, fetch: Callable[[Block], Any]) -> None:
        for block in range(self.stages):
            pl.when(block < self.index.blocks)(functools.partial(fetch, block))

    def _end_blocks(self) -> None:
        """Waits until a block is read, and fetches what takes its place, if more come."""

        @pl.loop(jnp.int32(0), jnp.int32(self.index.blocks))
        def _(block):
            stage, ahead = lax.rem(block, jnp.int32(self.stages)), block + self.stages
            more = ahead < self.index.blocks
            plgpu.barrier_wait(self.shared["window_key_read"].at[stage])
            pl.when(more)(functools.partial(self._fetch_window_key, ahead))
            plgpu.barrier_wait(self.shared["value_read"].at[stage])
            pl.when(more)(functools.partial(self._fetch_value, ahead))
            pl.when(more)(functools.partial(self._rotate_key, ahead))

    def _fetch_window_key(self, block: Block) -> None:
        index, shared = self.index, self.shared
        rows, stage = index.token_rows(block), self._stage(block)
        tokens = self.refs["window_key"].at[index.batch, rows, index.kv_head]
        loaded = shared["window_key_loaded"]
        copied = arrival(shared, "window_key", loaded)
        plgpu.copy_gmem_to_smem(tokens, shared["window_key"].at[stage], copied.at[stage])
        if "token_segment" in shared:
            segment = self.refs["token_segment"].at[index.batch, rows]
            target = shared["token_segment"].at[1 + stage]
            plgpu.copy_gmem_to_smem(segment, target, loaded.at[stage])

    def _fetch_value(self, block: Block) -> None:
        index, shared = self.index, self.shared
        rows, stage = index.token_rows(block), self._stage(block)
        tokens = self.refs["value"].at[index.batch, rows, index.kv_head]
        target, loaded = shared["value"].at[stage], shared["value_loaded"].at[stage]
        plgpu.copy_gmem_to_smem(tokens, target, loaded)

    def _rotate_key(self, block: Block) -> None:
        where = self.index.batch, self.index.token_rows(block)
        loaded = self.shared["window_key_loaded"]
        stage = self._stage(block)
        rotate_copied(self.refs, self.shared, "window_key", stage, *where, loaded)

    def _stage(self, block: Block) -> jax.Array:
        return lax.rem(jnp.int32(block), jnp.int32(self.stages))

    # The slots' panels: all keys, then all values

    def _begin_slots(self) -> None:
        for item in range(self.slot_stages):
            if item < self.decay_stages:
                self._fetch_decay(item)
            self._fetch_slots(item)

    def _end_slots(self) -> None:
        """Waits until a panel is read, and fetches what takes its place.

        It waits for the last ones too: every completion of a barrier must be waited for.
        """
        shared, panels = self.shared, self.panels
        for item in range(2 * panels):
            plgpu.barrier_wait(shared["slots_read"].at[item % self.slot_stages])
            if item + self.slot_stages < 2 * panels:
                self._fetch_slots(item + self.slot_stages)
            if item < panels:
                plgpu.barrier_wait(shared["decay_read"].at[item % self.decay_stages])
                if item + self.decay_stages < panels:
                    self._fetch_decay(item + self.decay_stages)
            if "queries" in shared and item == panels - 1:  # all the slots' keys are multiplied
                self._fetch_query("window_query")
            if "queries" in shared and item == panels:
                self._rotate_query()

    def _fetch_decay(self, panel: int) -> None:
        index, (_, _, width) = self.index, self.shared["cumulative"].shape
        stage, slots = panel % self.decay_stages, pl.ds(panel * width, width)
        decay = self.refs["log_decay"].at[index.batch, index.token_rows(0), index.kv_head, slots]
        target, loaded = (self.shared[x].at[stage] for x in ("cumulative", "decay_loaded"))
        plgpu.copy_gmem_to_smem(decay, target, loaded)

    def _fetch_slots(self, item: int) -> None:
        index, (_, features, width) = self.index, self.shared["slots"].shape
        stage = item % self.slot_stages
        starts = self.refs["start_key" if item < self.panels else "start_value"]
        of_panel = pl.ds(0, features), pl.ds(item % self.panels * width, width)
        source = starts.at[index.batch, index.kv_head, index.chunk, *of_panel]
        target, loaded = (self.shared[x].at[stage] for x in ("slots", "slots_loaded"))
        plgpu.copy_gmem_to_smem(source, target, loaded)

    # The chunk's rows

    def _fetch_query(self, name: str) -> None:
        index, queries = self.index, self.shared[name]
        copied = arrival(self.shared, name, self.shared[name + "_loaded"])
        for i in range(queries.shape[0]):
            source = self.refs[name].at[index.batch, index.rows, index.heads + i]
            plgpu.copy_gmem_to_smem(source, queries.at[i], copied.at[i])

    def _rotate_query(self) -> None:
        where = self.index.batch, self.index.positions
        loaded = self.shared["window_query_loaded"]
        for i in range(self.shared["window_query"].shape[0]):
            rotate_copied(self.refs, self.shared, "window_query", i, *where, loaded)

    def _fetch_segments(self) -> None:
        """What the rows, and the tokens that enter the slots in the chunk, belong to."""
        refs, shared, index = self.refs, self.shared, self.index
        loaded = shared["segments_loaded"]
        for name in ("query_segment", "slot_access"):
            if name in shared:
                source = refs[name].at[index.batch, index.rows]
                plgpu.copy_gmem_to_smem(source, shared[name], loaded)
        if self.has_slots:
            segment = refs["token_segment"].at[index.batch, index.token_rows(0)]
            plgpu.copy_gmem_to_smem(segment, shared["token_segment"].at[0], loaded)
