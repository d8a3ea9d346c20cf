"""What a thread block of the decode kernel does.

All arithmetic is float32 outside the matrix units: a few queries leave those nothing to win, and
memory is the bound. Rows of slots and of the ring come in tiles of four, a row to each warp, a
head's features over its lanes; rows are read whole, and each warp has a softmax of its own, of the
rows that it saw, in shared memory, where they meet at the end.

G query heads, K and V features, M slots, R entries of the ring. Logits are in units of log 2.
"""

import dataclasses
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas.constants import MASKED_LOGIT
from pallas.gpu.decode.sizes import TILE, DecodeSizes
from pallas.gpu.forward.gates import LOG2E

LANES = 32
MOST_FEATURES = 128  # of a row that a warp takes at once: 16 bytes a lane in float32

Refs = dict[str, Any]


@dataclasses.dataclass(frozen=True)
class DecodeSpec:
    """The static segments of a call.

    Fields:
      group: G.
      slots: M.
      reads_slots: the state has slots; else M zeros stand for them, unless mask_empty.
      entries: R; 0: there is no ring.
      scale, mask_empty, feature_map: as of `decode_attention`.
    """

    group: int
    slots: int
    reads_slots: bool
    entries: int
    scale: float
    mask_empty: bool
    feature_map: str


class Layouts:
    """How arrays lie in registers; features is that of the heads they belong to."""

    def __init__(self, features: int):
        width = min(features, MOST_FEATURES)
        tiling = plgpu.Tiling(((1, TILE, width), (width // LANES,)))
        tiles: Any = plgpu.Layout.TILED(tiling, warp_dims=(-3,), lane_dims=(-2,), vector_dim=-1)
        self.tiles = tiles  # [n, 4, features]
        self.tile = tiles.reduce(0)  # [4, features]
        self.rows = tiles.reduce(2)  # [n, 4]
        self.row = self.tile.reduce(1)  # [4]
        self.features = self.tile.reduce(0)  # [features]


class Softmax(NamedTuple):
    """Of a query head, over the rows that each of a warpgroup's warps has seen."""

    top: jax.Array  # [4], the largest logit
    mass: jax.Array  # [4], the sum of p
    total: jax.Array  # [4, V], the sum of p times the values


class Rows(NamedTuple):
    """Of the slots or the ring, in n tiles; n is at least 2, of 1 Mosaic finds no layouts."""

    key: jax.Array  # [n, 4, K]
    value: jax.Array  # [n, 4, V]
    visible: jax.Array | None  # [n, 4] bool; None: all are


def decode_kernel(refs: Refs, shared: Refs, spec: DecodeSpec, sizes: DecodeSizes) -> None:
    """The kernel's body; refs by name, as `decode_attention` calls them, the rows in tiles."""
    block = _Block(refs, shared, spec, sizes)
    active = refs["active"][block.batch] != 0
    pl.when(active)(block.run)
    pl.when(jnp.logical_not(active) & (block.me == 0))(block.clear)


class _Block:
    def __init__(self, refs: Refs, shared: Refs, spec: DecodeSpec, sizes: DecodeSizes):
        self.refs, self.shared, self.spec, self.sizes = refs, shared, spec, sizes
        self.split, self.head, self.batch = (
            lax.axis_index(name) for name in ("split", "head", "batch")
        )
        self.me = lax.axis_index("wg")
        self.length = refs["length"][self.batch]
        self.entry = refs["entry"][self.batch]
        self.V = refs["new_value"].shape[2]
        self.keys, self.values = Layouts(refs["rotated_query"].shape[2]), Layouts(self.V)
        self.worker = self.split * sizes.warpgroups + self.me
        self.workers = sizes.splits * sizes.warpgroups
        self.tiles = sizes.rows // TILE

    def run(self) -> None:
        spec = self.spec
        if spec.entries:
            pl.when(self._writes_entries)(self._load_entries)
        # What all of it waits for is asked for first.
        ring = self._load_ring(self.worker) if spec.entries else None
        pl.loop(0, spec.group)(self._start)
        if spec.reads_slots:
            mine = spec.slots // (TILE * self.sizes.warpgroups)
            chunks = -(-mine // self.sizes.slot_tiles)
            first = 0
            for chunk in range(chunks):
                tiles = (mine + chunk) // chunks
                rows = self._update_slots(pl.ds(self.me * mine + first, tiles), tiles)
                self._attend("query", rows)
                first += tiles
        if ring is not None:
            self._attend("rotated_query", self._new_token())
            self._attend("rotated_query", ring)
            self._attend_to_rest_of_ring()
        plgpu.barrier_arrive(self.shared["parts_stored"])
        plgpu.barrier_wait(self.shared["parts_stored"])

        @pl.loop(0, spec.group)
        def _(g):
            mine = lax.rem(g, jnp.int32(self.sizes.warpgroups)) == self.me
            pl.when(mine)(lambda: self._store_out(g))

        if spec.entries:
            pl.when(self._writes_entries)(self._store_entries)

    def clear(self) -> None:
        """Of a row that is not active."""
        zeros = plgpu.layout_cast(jnp.zeros(self.V, jnp.float32), self.values.features)
        pl.loop(0, self.spec.group)(lambda g: self._write(g, zeros, zeros))

    # The slots

    def _update_slots(self, some: Any, tiles: int) -> Rows:
        """Lets the entry's token, or without a ring the new one, into some tiles of slots."""
        refs, spec, b, h = self.refs, self.spec, self.batch, self.head
        slots = {
            "slot_key": _load(refs["slot_key"].at[b, h, some], self.keys.tiles),
            "slot_value": _load(refs["slot_value"].at[b, h, some], self.values.tiles),
        }
        if spec.entries:
            key = refs["key"].at[b, *self._place, h]
            value = refs["value"].at[b, *self._place, h]
            log_decay = refs["log_decay"].at[b, self.entry, h, some]
        else:
            key, value = refs["new_key"].at[b, h], refs["new_value"].at[b, h]
            log_decay = refs["new_log_decay"].at[b, h, some]
        log_decay = _load(log_decay, self.keys.rows)
        leaves = self.length >= spec.entries
        decay = jnp.exp(log_decay)
        write = -jnp.tanh(log_decay / 2) * (decay + 1)  # 1 - decay, exact for a small one's log
        if spec.entries:  # no row is below 0: of them none is written
            left = self._rows(tiles) < jnp.where(leaves, spec.slots, 0)
            decay, write = jnp.where(left, decay, 1.0), jnp.where(left, write, 0.0)
        key = _load(key, self.keys.features).astype(jnp.float32)
        value = _load(value, self.values.features).astype(jnp.float32)
        entering = {
            "slot_key": _apply_feature_map(key, spec.feature_map),
            "slot_value": value,
        }
        for name, old in slots.items():
            row = lax.broadcast_in_dim(entering[name], old.shape, [2])
            new = _over_features(decay, old) * old + _over_features(write, old) * row
            refs[name].at[b, h, some][...] = new
            slots[name] = new
        visible = None
        if spec.mask_empty:
            filled = self.length + 1 > spec.entries
            visible = self._rows(tiles) < jnp.where(filled, spec.slots, 0)
        return Rows(slots["slot_key"], slots["slot_value"], visible)

    # The ring

    @property
    def _place(self) -> tuple[jax.Array, jax.Array]:
        """Of the entry: its tile, and the row of it."""
        return lax.div(self.entry, jnp.int32(TILE)), lax.rem(self.entry, jnp.int32(TILE))

    def _new_token(self) -> Rows:
        """The first worker's first row."""
        b, h = self.batch, self.head
        key = _load(self.refs["new_rotated_key"].at[b, h], self.keys.features)
        value = _load(self.refs["new_value"].at[b, h], self.values.features)
        key = lax.broadcast_in_dim(key, (2, TILE, *key.shape), [2])
        value = lax.broadcast_in_dim(value, (2, TILE, *value.shape), [2])
        # Without these casts Mosaic searches for layouts for minutes.
        key = plgpu.layout_cast(key, self.keys.tiles)
        value = plgpu.layout_cast(value, self.values.tiles)
        return Rows(key, value, self._rows(2) < jnp.where(self.worker == 0, 1, 0))

    def _load_ring(self, panel: jax.Array) -> Rows:
        """The panel's entries, but those read before, not yet filled, or to be replaced."""
        first = jnp.minimum(panel * self.tiles, self.spec.entries // TILE - self.tiles)
        where = self.batch, pl.ds(first, self.tiles), slice(None), self.head
        position = self._rows(self.tiles) + first * TILE
        visible = (position < self.length) & (position != self.entry)
        return Rows(
            _load(self.refs["rotated_key"].at[*where], self.keys.tiles),
            _load(self.refs["value"].at[*where], self.values.tiles),
            visible & (position >= panel * self.sizes.rows),
        )

    def _attend_to_rest_of_ring(self) -> None:
        """The panels behind the first, this worker's, as far as there are tokens."""
        rows, R = self.sizes.rows, self.spec.entries
        if rows * self.workers >= R:
            return
        panels = lax.div(jnp.minimum(self.length, R) + (rows - 1), jnp.int32(rows))
        turns = lax.div(panels - self.worker + (self.workers - 1), jnp.int32(self.workers))

        @pl.loop(jnp.int32(1), turns)
        def _(turn):
            panel = self._load_ring(self.worker + turn * self.workers)
            self._attend("rotated_query", panel)

    def _load_entries(self) -> None:
        """Of the new token, on their way to the ring."""
        for name, target in self.shared["entries"].items():
            source = self.refs[f"new_{name}"].at[self.batch, self.head]
            plgpu.copy_gmem_to_smem(source, target, self.shared["entries_loaded"])

    def _store_entries(self) -> None:
        """After all have read what they replace."""
        plgpu.barrier_wait(self.shared["entries_loaded"])
        plgpu.commit_smem()  # the copies, which run by themselves, come after those reads
        for name, source in self.shared["entries"].items():
            place = (self.entry,) if name == "log_decay" else self._place
            plgpu.copy_smem_to_gmem(source, self.refs[name].at[self.batch, *place, self.head])
        plgpu.wait_smem_to_gmem(0)

    @property
    def _writes_entries(self) -> jax.Array:
        """One warpgroup does; of several splits, of that whose part of the ring it is."""
        panel = lax.div(self.entry, jnp.int32(self.sizes.rows))
        owner = lax.div(lax.rem(panel, jnp.int32(self.workers)), jnp.int32(self.sizes.warpgroups))
        return (self.me == 0) & (self.split == owner)

    # The softmax

    def _start(self, g: jax.Array) -> None:
        """Of no rows, or of the zeros that stand for slots, in the first worker's first warp."""
        full = lambda x: plgpu.layout_cast(jnp.full(TILE, x, jnp.float32), self.values.row)  # noqa: E731
        zeros = jnp.zeros((TILE, self.V), jnp.float32)
        top, mass = full(MASKED_LOGIT), full(0.0)
        if not self.spec.reads_slots and not self.spec.mask_empty and self.spec.slots:
            row = plgpu.broadcasted_iota(jnp.int32, (TILE,), 0, layout=self.values.row)
            first = row < jnp.where(self.worker == 0, 1, 0)
            top = jnp.where(first, full(0.0), top)
            mass = jnp.where(first, full(float(self.spec.slots)), mass)
        self._keep(g, Softmax(top, mass, plgpu.layout_cast(zeros, self.values.tile)))

    def _keep(self, g: jax.Array, softmax: Softmax) -> None:
        for name, x in softmax._asdict().items():
            self.shared[name].at[g, self.me][...] = x

    def _kept(self, g: jax.Array) -> Softmax:
        top, mass, total = (self.shared[name].at[g, self.me] for name in Softmax._fields)
        row, tile = self.values.row, self.values.tile
        return Softmax(_load(top, row), _load(mass, row), _load(total, tile))

    def _attend(self, query: str, rows: Rows) -> None:
        """All queries to these rows, one by one: a product of theirs alone would fill no units."""
        key, value = rows.key.astype(jnp.float32), rows.value.astype(jnp.float32)

        @pl.loop(0, self.spec.group)
        def _(g):
            q = self.refs[query].at[self.batch, self.head * self.spec.group + g]
            q = _load(q, self.keys.features).astype(jnp.float32) * (self.spec.scale * LOG2E)
            logits = (key * lax.broadcast_in_dim(q, key.shape, [2])).sum(axis=2)
            logits = plgpu.layout_cast(logits, self.values.rows)
            self._keep(g, _add(self._kept(g), logits, value, rows.visible))

    def _store_out(self, g: jax.Array) -> None:
        """Joins all warps' parts, [warpgroups, 4] of them."""
        total = _load(self.shared["total"].at[g], self.values.tiles)
        top = _load(self.shared["top"].at[g], self.values.rows)
        top = plgpu.layout_cast(_over_features(top, total), self.values.tiles)
        mass = _load(self.shared["mass"].at[g], self.values.rows)
        highest = top.max(axis=0).max(axis=0)
        weight = jnp.exp2(top - lax.broadcast_in_dim(highest, top.shape, [2]))
        mass = (weight * _over_features(mass, total)).sum(axis=0).sum(axis=0)
        out = (weight * total).sum(axis=0).sum(axis=0)
        out /= jnp.maximum(mass, 1e-30)  # a split may see nothing
        self._write(g, out, highest + jnp.log2(mass))

    def _write(self, g: jax.Array, out: jax.Array, lse: jax.Array) -> None:
        """[V] each."""
        head = self.head * self.spec.group + g
        if "lse" in self.refs:
            self.refs["lse"].at[self.batch, self.split, head][...] = lse
            target = self.refs["out"].at[self.batch, self.split, head]
        else:
            target = self.refs["out"].at[self.batch, head]
        target[...] = out.astype(target.dtype)

    def _rows(self, tiles: int) -> jax.Array:
        """[tiles, 4], their indices."""
        tile, row = (
            plgpu.broadcasted_iota(jnp.int32, (tiles, TILE), axis, layout=self.values.rows)
            for axis in (0, 1)
        )
        return tile * TILE + row


def _add(
    softmax: Softmax, logits: jax.Array, value: jax.Array, visible: jax.Array | None
) -> Softmax:
    """Of a query head, more rows seen: logits [n, 4], value [n, 4, V]."""
    if visible is not None:
        logits = jnp.where(visible, logits, MASKED_LOGIT)
    top = jnp.maximum(softmax.top, logits.max(axis=0))
    p = jnp.exp2(logits - lax.broadcast_in_dim(top, logits.shape, [1]))
    if visible is not None:
        p = jnp.where(visible, p, 0.0)
    shrink = jnp.exp2(softmax.top - top)
    mass = softmax.mass * shrink + p.sum(axis=0)
    total = (_over_features(p, value) * value).sum(axis=0)
    return Softmax(top, mass, _over_features(shrink, total) * softmax.total + total)


def _load(ref: Any, layout: Any) -> jax.Array:
    return plgpu.load(ref, layout=layout, optimized=False)


def _over_features(x: jax.Array, like: jax.Array) -> jax.Array:
    """[n, 4] -> [n, 4, features], or [4] -> [4, features]."""
    return lax.broadcast_in_dim(x, like.shape, list(range(x.ndim)))


def _apply_feature_map(x: jax.Array, name: str) -> jax.Array:
    match name:
        case "silu":
            return x * (1.0 / (1.0 + jnp.exp2(-x * LOG2E)))
        case "relu":
            return jnp.maximum(x, 0.0)
    return x
