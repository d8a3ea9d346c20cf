"""The walk through a KV head's chunks that finds the slots at their borders, or their gradients.

A thread block walks the chunks of 64 features of the keys or of the values, with those features of
the slots, S, in registers in float32. An item is a head's rows of a chunk, and one matrix product:

    S_next = total_chunk S + sum over the chunk's items of rows^T weights           [64, M]

Inputs (of keys and of values):
  rows_*      [B, T, heads, D] bfloat16
  weights_*   [B, Tq, heads, M] bfloat16; or one array, weights, for both
  total       [B, Hkv, Tq / C, M] float32
  first_*     [B, Hkv, D, M] float32, S before the walk; without it S is 0
Outputs:
  key, value  [B, Hkv, Tq / C, D, M] bfloat16, S before each chunk of the walk
  last_*      [B, Hkv, D, M] float32, S after the walk, if asked for

One warpgroup, which fetches some items ahead of its products.

| barrier       | arrivals (number)                              | waits         | how often    |
| ------------- | ---------------------------------------------- | ------------- | ------------ |
| loaded[stage] | the copies of an item's rows, weights and      | the warpgroup | once an item |
|               | total (3)                                      |               |              |
| wide_loaded   | the copy of first_* (1)                        | the warpgroup | once         |
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas.gpu.spec import ALIGNED, CHUNK, COLUMN, LOGITS, SIDES, tile
from pallas.gpu.warpgroup.chunk_index import entering_rows
from pallas.gpu.warpgroup.launch import Refs, launch
from pallas.gpu.warpgroup.masks import by_column
from pallas.gpu.warpgroup.matmul import Matmul

FEATURES = 64  # of a block: the rows of a warpgroup's product


class States(NamedTuple):
    """The walk's outputs."""

    key: jax.Array
    value: jax.Array
    last: tuple[jax.Array, jax.Array] | None


def walk_states(
    inputs: dict[str, jax.Array],
    *,
    name: str,
    stages: int,
    last: bool,
    ahead: int = 0,
    group: int = 1,
    reverse: bool = False,
    interpret: Any = False,
) -> States:
    """The walk of `inputs`, named and shaped as above.

    name: the kernel's. stages: items in flight, at most. last: whether last_* are returned; with
    first_* they are. ahead: the rows begin so much before their chunk. group: items of a chunk.
    reverse: from the last chunk. interpret: as for `launch`.
    """
    narrow, wide = jnp.bfloat16, jnp.float32
    D = inputs["rows_key"].shape[3]
    B, Hkv, chunks, M = inputs["total"].shape
    stages = min(stages, chunks * group)
    outputs = dict.fromkeys(SIDES, jax.ShapeDtypeStruct((B, Hkv, chunks, D, M), narrow))
    scratch = {
        "rows": plgpu.SMEM((stages, CHUNK, FEATURES), narrow, transforms=tile(min(FEATURES, M))),
        "weights": plgpu.SMEM((stages, CHUNK, M), narrow, transforms=tile(M)),
        "total": plgpu.SMEM((stages, max(M, ALIGNED)), wide),
        "slots": plgpu.SMEM((2, FEATURES, M), narrow, transforms=tile(M)),
        "loaded": plgpu.Barrier(num_arrivals=3, num_barriers=stages),
    }
    if last:
        shape = jax.ShapeDtypeStruct((B, Hkv, D, M), wide)
        outputs |= {"last_key": shape, "last_value": shape}
        scratch["wide"] = plgpu.SMEM((FEATURES, M), wide, transforms=tile(M, 4))
        scratch["wide_loaded"] = plgpu.Barrier()
    matmul = Matmul(bool(interpret))
    key, value, *after = launch(
        lambda refs, shared: _Walk(refs, shared, ahead, group, reverse, matmul).run(),
        inputs,
        outputs,
        scratch,
        grid={"features": 2 * D // FEATURES, "head": Hkv, "batch": B},
        warpgroups=1,
        name=name,
        interpret=interpret,
    )
    return States(key, value, (after[0], after[1]) if last else None)


class _Walk:
    """A block's way through the chunks."""

    def __init__(
        self, refs: Refs, shared: Refs, ahead: int, group: int, reverse: bool, matmul: Matmul
    ):
        self.refs, self.shared, self.matmul = refs, shared, matmul
        self.ahead, self.group, self.reverse = ahead, group, reverse
        self.b, self.h, self.block = (lax.axis_index(x) for x in ("batch", "head", "features"))
        self.chunks, self.M = refs["total"].shape[2:]
        self.stages, self.blocks = shared["rows"].shape[0], refs["rows_key"].shape[3] // FEATURES
        self.features = pl.ds(lax.rem(self.block, jnp.int32(self.blocks)) * FEATURES, FEATURES)

    def run(self) -> None:
        for stage in range(self.stages):
            self._load(jnp.int32(stage), stage)
        if "first_key" in self.refs:
            wide, loaded = self.shared["wide"], self.shared["wide_loaded"]
            self._for_side(
                lambda side: plgpu.copy_gmem_to_smem(self._wide("first_" + side), wide, loaded)
            )
            plgpu.barrier_wait(loaded)
            slots = plgpu.load(wide, layout=LOGITS)
        else:
            slots = plgpu.layout_cast(jnp.zeros((FEATURES, self.M), jnp.float32), LOGITS)
        slots = lax.fori_loop(0, self.chunks, self._chunk, slots)
        if "last_key" in self.refs:
            wide = self.shared["wide"]
            wide[...] = slots
            plgpu.commit_smem()
            self._for_side(lambda side: plgpu.copy_smem_to_gmem(wide, self._wide("last_" + side)))
        plgpu.wait_smem_to_gmem(0)

    def _chunk(self, step, slots: jax.Array) -> jax.Array:
        """Stores S before a chunk, and returns that after it."""
        shared, first = self.shared, step * self.group
        stage, buffer = self._stage(first), shared["slots"].at[lax.rem(step, jnp.int32(2))]
        plgpu.wait_smem_to_gmem(1, wait_read_only=True)  # the store two chunks ago left its buffer
        buffer[...] = slots.astype(jnp.bfloat16)
        plgpu.barrier_wait(shared["loaded"].at[stage])
        decayed = slots * by_column(plgpu.load(self._total(stage), layout=COLUMN))
        plgpu.commit_smem()  # of the slots, and of the read total, before copies touch them
        at = self.b, self.h, self._chunk_of(step), self.features
        self._for_side(lambda x: plgpu.copy_smem_to_gmem(buffer, self.refs[x].at[*at]))
        slots = self._add_item(first, stage, decayed)

        def add_head(i, slots):
            stage = self._stage(first + i)
            plgpu.barrier_wait(shared["loaded"].at[stage])
            return self._add_item(first + i, stage, slots)

        return lax.fori_loop(1, self.group, add_head, slots) if self.group > 1 else slots

    def _add_item(self, item, stage, slots: jax.Array) -> jax.Array:
        """S with an item's product, whose place in shared memory a later item takes."""
        rows, weights = self.shared["rows"], self.shared["weights"]
        shape = FEATURES, self.M
        slots = self.matmul(lambda: [(rows.at[stage].T, weights.at[stage])], shape, slots)
        plgpu.commit_smem()  # all warps have multiplied what the next copies overwrite
        more = item + self.stages < self.chunks * self.group
        pl.when(more)(lambda: self._load(item + self.stages, stage))
        return slots

    def _load(self, item, stage) -> None:
        """Fetches an item: the chunks in the walk's order, the heads of each in turn."""
        step, head = item, self.h
        if self.group > 1:
            step = lax.div(item, jnp.int32(self.group))
            head = self.h * self.group + lax.rem(item, jnp.int32(self.group))
        chunk, loaded = self._chunk_of(step), self.shared["loaded"].at[stage]
        own = self.b, pl.ds(chunk * CHUNK, CHUNK), head
        rows = entering_rows(chunk * CHUNK, self.ahead) if self.ahead else own[1]

        def load(target: str, source: Any) -> None:
            plgpu.copy_gmem_to_smem(source, self.shared[target].at[stage], loaded)

        def load_side(x: str) -> None:
            load("rows", self.refs[f"rows_{x}"].at[self.b, rows, head, self.features])
            if f"weights_{x}" in self.refs:
                load("weights", self.refs[f"weights_{x}"].at[*own])

        self._for_side(load_side)
        if "weights" in self.refs:
            load("weights", self.refs["weights"].at[*own])
        total = self.refs["total"].at[self.b, self.h, chunk]
        plgpu.copy_gmem_to_smem(total, self._total(stage), loaded)

    def _chunk_of(self, step):
        return self.chunks - 1 - step if self.reverse else step

    def _stage(self, item):
        return lax.rem(item, jnp.int32(self.stages))

    def _total(self, stage):
        return self.shared["total"].at[stage, pl.ds(0, self.M)]

    def _wide(self, name: str):
        return self.refs[name].at[self.b, self.h, self.features]

    def _for_side(self, do: Callable[[str], Any]) -> None:
        """do("key") or do("value"), by the block's features."""
        pl.when(self.block < self.blocks)(functools.partial(do, "key"))
        pl.when(self.block >= self.blocks)(functools.partial(do, "value"))
