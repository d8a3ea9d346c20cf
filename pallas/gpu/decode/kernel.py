"""What a thread block of the decode kernel does; `launch.py` lists its arrays and barriers.

All arithmetic outside the caches' dtype is float32 on the ordinary units: a few queries would leave
the matrix units nearly empty, and reading the state takes longer than any of it. The rows of slots
and of the ring come in tiles of four: each of a warpgroup's four warps has one row of a tile, whose
features are spread over its lanes. Every warp keeps a softmax of its own over the rows that it saw.
They lie in shared memory, where they are joined at the end.

Shapes: G query heads of the block's key/value head, K and V features of keys and values, M slots,
R ring entries, n tiles. Logits are in units of log 2.
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
from pallas.gpu.spec import LOG2E
from pallas.gpu.warpgroup.launch import Refs

LANES = 32
MOST_FEATURES = 128  # of a row that a warp reads in one step: 16 bytes a lane in float32


@dataclasses.dataclass(frozen=True)
class DecodeSpec:
    """The static facts of a call.

    Fields:
      group: G.
      slots: M.
      reads_slots: the state has slots; without, M slots of zeros take part unless mask_empty.
      entries: R; 0: the state has no ring.
      scale, mask_empty, feature_map: as for `decode_attention`.
    """

    group: int
    slots: int
    reads_slots: bool
    entries: int
    scale: float
    mask_empty: bool
    feature_map: str


class RegisterLayouts:
    """How tiles of rows, and what is summed from them, lie in registers."""

    def __init__(self, features: int):
        width = min(features, MOST_FEATURES)
        tiling = plgpu.Tiling(((1, TILE, width), (width // LANES,)))
        tiles: Any = plgpu.Layout.TILED(tiling, warp_dims=(-3,), lane_dims=(-2,), vector_dim=-1)
        self.tiles = tiles  # [n, 4, features]
        self.tile = tiles.reduce(0)  # [4, features]
        self.rows = tiles.reduce(2)  # [n, 4]
        self.row = self.tile.reduce(1)  # [4]
        self.features = self.tile.reduce(0)  # [features]
        # All of it in every warp, so that sums over rows stay within a thread.
        tiling = plgpu.Tiling(((4, 1, TILE, width), (width // LANES,)))
        copies: Any = plgpu.Layout.TILED(tiling, warp_dims=(-5,), lane_dims=(-2,), vector_dim=-1)
        self.whole = copies.reduce(0)  # [n, 4, features]
        self.whole_rows = self.whole.reduce(2)  # [n, 4]


class WarpSoftmax(NamedTuple):
    """A query head's softmax over the rows that each of a warpgroup's four warps has seen."""

    top: jax.Array  # [4], the largest logit
    mass: jax.Array  # [4], the sum of p = exp2(logit - top)
    total: jax.Array  # [4, V], the sum of p times the values


class KeysValues(NamedTuple):
    """Keys and values of slots or ring entries; n >= 2, for Mosaic finds no layout of one tile."""

    key: jax.Array  # [n, 4, K]
    value: jax.Array  # [n, 4, V]
    visible: jax.Array | None  # [n, 4] bool; None: all are visible


def decode_kernel(refs: Refs, shared: Refs, spec: DecodeSpec, sizes: DecodeSizes) -> None:
    """The kernel's body: refs and shared by name, as `launch.py` lists them."""
    block = _ThreadBlock(refs, shared, spec, sizes)
    active = refs["active"][block.batch] != 0
    pl.when(active)(block.run)
    pl.when(jnp.logical_not(active) & (block.me == 0))(block.clear)


class _ThreadBlock:
    """A batch row's key/value head, as one of a thread block's warpgroups serves it.

    Attributes:
      me: the warpgroup's number in its thread block.
      reader: its number among all warpgroups that share the ring, of which there are `readers`.
      tiles: tiles of the ring that it reads at once, a panel.
      keys, values: layouts of registers.
    """

    def __init__(self, refs: Refs, shared: Refs, spec: DecodeSpec, sizes: DecodeSizes):
        self.refs, self.shared, self.spec, self.sizes = refs, shared, spec, sizes
        self.split, self.head, self.batch = (
            lax.axis_index(name) for name in ("split", "head", "batch")
        )
        self.me = lax.axis_index("wg")
        self.length = refs["length"][self.batch]
        self.entry = refs["entry"][self.batch]
        self.V = refs["new_value"].shape[2]
        self.keys = RegisterLayouts(refs["rotated_query"].shape[2])
        self.values = RegisterLayouts(self.V)
        self.reader = self.split * sizes.warpgroups + self.me
        self.readers = sizes.splits * sizes.warpgroups
        self.tiles = sizes.rows // TILE

    def run(self) -> None:
        """Serves an active row."""
        spec = self.spec
        if spec.entries:
            pl.when(self._writes_ring)(self._load_new_entries)
        # The ring's first panel is asked for before anything waits.
        ring = self._load_panel(self.reader) if spec.entries else None
        pl.loop(0, spec.group)(self._start_softmax)
        if spec.reads_slots:
            self._update_and_read_slots()
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
            pl.when(self._writes_ring)(self._store_new_entries)

    def clear(self) -> None:
        """Writes zeros as the output of a row that is not active."""
        zeros = plgpu.layout_cast(jnp.zeros(self.V, jnp.float32), self.values.features)
        pl.loop(0, self.spec.group)(lambda g: self._write_out(g, zeros, zeros))

    # The slots

    def _update_and_read_slots(self) -> None:
        """Updates this warpgroup's slots, and reads them, a few tiles at a time."""
        mine = self.spec.slots // (TILE * self.sizes.warpgroups)
        steps = -(-mine // self.sizes.slot_tiles)
        first = 0
        for step in range(steps):
            tiles = (mine + step) // steps
            slots = self._update_slots(pl.ds(self.me * mine + first, tiles), tiles)
            self._attend("query", slots)
            first += tiles

    def _update_slots(self, some: Any, tiles: int) -> KeysValues:
        """Adds the token that leaves the ring to some tiles of slots, and returns those.

        That is the token of the entry to be replaced, or, without a ring, the new token.
        """
        refs, spec, b, h = self.refs, self.spec, self.batch, self.head
        slots = {
            "slot_key": _load(refs["slot_key"].at[b, h, some], self.keys.tiles),
            "slot_value": _load(refs["slot_value"].at[b, h, some], self.values.tiles),
        }
        if spec.entries:
            key = refs["key"].at[b, *self._tile_and_row, h]
            value = refs["value"].at[b, *self._tile_and_row, h]
            log_decay = refs["log_decay"].at[b, self.entry, h, some]
        else:
            key, value = refs["new_key"].at[b, h], refs["new_value"].at[b, h]
            log_decay = refs["new_log_decay"].at[b, h, some]
        log_decay = _load(log_decay, self.keys.rows)
        decay = jnp.exp(log_decay)
        write = -jnp.tanh(log_decay / 2) * (decay + 1)  # 1 - decay, exact also near 0
        filled = self._all_slots_if(self.length > spec.entries, tiles)
        leaves = self._all_slots_if(self.length >= spec.entries, tiles)
        key = _load(key, self.keys.features).astype(jnp.float32)
        value = _load(value, self.values.features).astype(jnp.float32)
        entering = {
            "slot_key": _apply_feature_map(key, spec.feature_map),
            "slot_value": value,
        }
        for name, old in slots.items():
            row = lax.broadcast_in_dim(entering[name], old.shape, [2])
            # What no token has written may hold NaN, and 0 * NaN is NaN.
            old = _where_rows(filled, old, jnp.zeros_like(old))
            new = _over_features(decay, old) * old + _over_features(write, old) * row
            new = _where_rows(leaves, new, old)
            refs[name].at[b, h, some][...] = new
            slots[name] = new
        visible = None
        if spec.mask_empty:
            visible = self._all_slots_if(self.length + 1 > spec.entries, tiles)
        return KeysValues(slots["slot_key"], slots["slot_value"], visible)

    def _all_slots_if(self, condition: jax.Array, tiles: int) -> jax.Array:
        """[tiles, 4] bool: all slots, or none of them."""
        return self._row_numbers(tiles) < jnp.where(condition, self.spec.slots, 0)

    # The ring

    @property
    def _tile_and_row(self) -> tuple[jax.Array, jax.Array]:
        """The tile of the ring that holds the entry to be replaced, and its row there."""
        return lax.div(self.entry, jnp.int32(TILE)), lax.rem(self.entry, jnp.int32(TILE))

    def _new_token(self) -> KeysValues:
        """Two tiles of copies of the new token; only the first reader's first row is visible."""
        b, h = self.batch, self.head
        key = _load(self.refs["new_rotated_key"].at[b, h], self.keys.features)
        value = _load(self.refs["new_value"].at[b, h], self.values.features)
        key = lax.broadcast_in_dim(key, (2, TILE, *key.shape), [2])
        value = lax.broadcast_in_dim(value, (2, TILE, *value.shape), [2])
        # Without these casts Mosaic searches for layouts for minutes.
        key = plgpu.layout_cast(key, self.keys.tiles)
        value = plgpu.layout_cast(value, self.values.tiles)
        return KeysValues(key, value, self._row_numbers(2) < jnp.where(self.reader == 0, 1, 0))

    def _load_panel(self, panel: jax.Array) -> KeysValues:
        """A panel of the ring.

        Entries are not visible that an earlier panel had, that hold nothing yet, or that the new
        token replaces.
        """
        first = jnp.minimum(panel * self.tiles, self.spec.entries // TILE - self.tiles)
        where = self.batch, pl.ds(first, self.tiles), slice(None), self.head
        position = self._row_numbers(self.tiles) + first * TILE
        visible = (position < self.length) & (position != self.entry)
        return KeysValues(
            _load(self.refs["rotated_key"].at[*where], self.keys.tiles),
            _load(self.refs["value"].at[*where], self.values.tiles),
            visible & (position >= panel * self.sizes.rows),
        )

    def _attend_to_rest_of_ring(self) -> None:
        """Reads every `readers`-th panel after the first one read, as far as there are tokens."""
        rows, R = self.sizes.rows, self.spec.entries
        if rows * self.readers >= R:
            return
        panels = lax.div(jnp.minimum(self.length, R) + (rows - 1), jnp.int32(rows))
        turns = lax.div(panels - self.reader + (self.readers - 1), jnp.int32(self.readers))

        @pl.loop(jnp.int32(1), turns)
        def _(turn):
            panel = self._load_panel(self.reader + turn * self.readers)
            self._attend("rotated_query", panel)

    def _load_new_entries(self) -> None:
        """Starts to copy the new token to shared memory, on its way to the ring."""
        for name, target in self.shared["entries"].items():
            source = self.refs[f"new_{name}"].at[self.batch, self.head]
            plgpu.copy_gmem_to_smem(source, target, self.shared["entries_loaded"])

    def _store_new_entries(self) -> None:
        """Writes the new token to the ring, once all have read the token that it replaces."""
        plgpu.barrier_wait(self.shared["entries_loaded"])
        plgpu.commit_smem()  # the copies run by themselves, and must come after those reads
        for name, source in self.shared["entries"].items():
            place = (self.entry,) if name == "log_decay" else self._tile_and_row
            plgpu.copy_smem_to_gmem(source, self.refs[name].at[self.batch, *place, self.head])
        plgpu.wait_smem_to_gmem(0)

    @property
    def _writes_ring(self) -> jax.Array:
        """Whether this is the one warpgroup that writes the ring's entry.

        With several splits it belongs to the one that reads that part of the ring.
        """
        panel = lax.div(self.entry, jnp.int32(self.sizes.rows))
        owner = lax.div(lax.rem(panel, jnp.int32(self.readers)), jnp.int32(self.sizes.warpgroups))
        return (self.me == 0) & (self.split == owner)

    # The softmax

    def _start_softmax(self, g: jax.Array) -> None:
        """Stores a softmax over no rows.

        Where the state has no slots but empty ones take part, the first reader's first warp starts
        with M logits of 0 whose values are 0.
        """
        full = lambda x: plgpu.layout_cast(jnp.full(TILE, x, jnp.float32), self.values.row)  # noqa: E731
        zeros = jnp.zeros((TILE, self.V), jnp.float32)
        top, mass = full(MASKED_LOGIT), full(0.0)
        if not self.spec.reads_slots and not self.spec.mask_empty and self.spec.slots:
            row = plgpu.broadcasted_iota(jnp.int32, (TILE,), 0, layout=self.values.row)
            first = row < jnp.where(self.reader == 0, 1, 0)
            top = jnp.where(first, full(0.0), top)
            mass = jnp.where(first, full(float(self.spec.slots)), mass)
        self._store_softmax(g, WarpSoftmax(top, mass, plgpu.layout_cast(zeros, self.values.tile)))

    def _store_softmax(self, g: jax.Array, softmax: WarpSoftmax) -> None:
        for name, x in softmax._asdict().items():
            self.shared[name].at[g, self.me][...] = x

    def _load_softmax(self, g: jax.Array) -> WarpSoftmax:
        top, mass, total = (self.shared[name].at[g, self.me] for name in WarpSoftmax._fields)
        row, tile = self.values.row, self.values.tile
        return WarpSoftmax(_load(top, row), _load(mass, row), _load(total, tile))

    def _attend(self, query: str, rows: KeysValues) -> None:
        """Adds these rows to the softmax of every query head, one head after the other.

        query: the name of the queries that multiply their keys.
        """
        key, value = rows.key.astype(jnp.float32), rows.value.astype(jnp.float32)

        @pl.loop(0, self.spec.group)
        def _(g):
            q = self.refs[query].at[self.batch, self.head * self.spec.group + g]
            q = _load(q, self.keys.features).astype(jnp.float32) * (self.spec.scale * LOG2E)
            logits = (key * lax.broadcast_in_dim(q, key.shape, [2])).sum(axis=2)
            logits = plgpu.layout_cast(logits, self.values.rows)
            softmax = _add_rows(self._load_softmax(g), logits, value, rows.visible)
            self._store_softmax(g, softmax)

    def _store_out(self, g: jax.Array) -> None:
        """Joins the [warpgroups, 4] warps' softmaxes of a query head, and writes its output.

        Every warp reads all of them: a sum that crosses warps would pass through scratch memory
        that Mosaic shares between the warpgroups of a block, which join different heads at once.
        """
        total = _load(self.shared["total"].at[g], self.values.whole)
        top = _load(self.shared["top"].at[g], self.values.whole_rows)
        top = plgpu.layout_cast(_over_features(top, total), self.values.whole)
        mass = _load(self.shared["mass"].at[g], self.values.whole_rows)
        highest = top.max(axis=0).max(axis=0)
        weight = jnp.exp2(top - lax.broadcast_in_dim(highest, top.shape, [2]))
        mass = (weight * _over_features(mass, total)).sum(axis=0).sum(axis=0)
        out = (weight * total).sum(axis=0).sum(axis=0)
        out /= jnp.maximum(mass, 1e-30)  # a split may see nothing
        self._write_out(g, out, highest + jnp.log2(mass))

    def _write_out(self, g: jax.Array, out: jax.Array, lse: jax.Array) -> None:
        """Writes a query head's output [V], and its lse [V], all equal, if that is asked for."""
        head = self.head * self.spec.group + g
        if "lse" in self.refs:
            self.refs["lse"].at[self.batch, self.split, head][...] = lse
            target = self.refs["out"].at[self.batch, self.split, head]
        else:
            target = self.refs["out"].at[self.batch, head]
        target[...] = out.astype(target.dtype)

    def _row_numbers(self, tiles: int) -> jax.Array:
        """[tiles, 4]: the rows, counted from 0."""
        tile, row = (
            plgpu.broadcasted_iota(jnp.int32, (tiles, TILE), axis, layout=self.values.rows)
            for axis in (0, 1)
        )
        return tile * TILE + row


def _add_rows(
    softmax: WarpSoftmax, logits: jax.Array, value: jax.Array, visible: jax.Array | None
) -> WarpSoftmax:
    """Returns a query head's softmax with more rows: logits [n, 4], value [n, 4, V]."""
    if visible is not None:
        logits = jnp.where(visible, logits, MASKED_LOGIT)
    top = jnp.maximum(softmax.top, logits.max(axis=0))
    p = jnp.exp2(logits - lax.broadcast_in_dim(top, logits.shape, [1]))
    if visible is not None:
        p = jnp.where(visible, p, 0.0)
        value = _where_rows(visible, value, jnp.zeros_like(value))
    shrink = jnp.exp2(softmax.top - top)
    mass = softmax.mass * shrink + p.sum(axis=0)
    total = (_over_features(p, value) * value).sum(axis=0)
    return WarpSoftmax(top, mass, _over_features(shrink, total) * softmax.total + total)


def _load(ref: Any, layout: Any) -> jax.Array:
    return plgpu.load(ref, layout=layout, optimized=False)


def _over_features(x: jax.Array, like: jax.Array) -> jax.Array:
    """Repeats x over features: [n, 4] -> [n, 4, features], or [4] -> [4, features]."""
    return lax.broadcast_in_dim(x, like.shape, list(range(x.ndim)))


def _where_rows(rows: jax.Array, x: jax.Array, other: jax.Array) -> jax.Array:
    """Chooses x [n, 4, features] in the rows [n, 4] bool, and `other` elsewhere.

    By numbers: Mosaic repeats no bool over features.
    """
    chosen = _over_features(jnp.where(rows, 1.0, 0.0), x)
    return jnp.where(chosen > 0.5, x, other)


def _apply_feature_map(x: jax.Array, name: str) -> jax.Array:
    match name:
        case "silu":
            return x * (1.0 / (1.0 + jnp.exp2(-x * LOG2E)))
        case "relu":
            return jnp.maximum(x, 0.0)
    return x
