"""What `slot_token_gradients.py` holds in shared memory, and the copies that bring it."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas.gpu.spec import ALIGNED, CHUNK, GATE_BLOCKS, GATE_ROWS, SIDES, CallSpec, tile
from pallas.gpu.warpgroup.addresses import ZERO, OpaqueZero
from pallas.gpu.warpgroup.chunk_index import EnteringIndex
from pallas.gpu.warpgroup.decays import fetch_references
from pallas.gpu.warpgroup.launch import Refs

ROWS = {"key": ("query", "d_logits"), "value": ("d_out", "weights")}
"""By side, the inputs that y and w of the formulas are."""


def token_scratch(stages: int, D: int, width: int, *, masked: bool, interpret: bool) -> Refs:
    """Shared memory and barriers for `stages` items and `width` slots.

    All operands of products lie 16 columns to a tile, so that products may contract 16.
    """
    narrow, wide = jnp.bfloat16, jnp.float32

    def tiled(*shape: int) -> Any:
        return plgpu.SMEM(shape, narrow, transforms=tile(GATE_ROWS))

    scratch = {
        "rows": tiled(stages, CHUNK, D),  # y, or what is added to dx
        "row_weights": tiled(stages, CHUNK, width),  # w
        "item_loaded": plgpu.Barrier(num_arrivals=2, num_barriers=stages),
        "item_read": plgpu.Barrier(num_arrivals=2, num_barriers=stages),
        "tokens": tiled(1, CHUNK, D),  # x, then dx
        "slots": tiled(1, D, width),  # S0; in the end parts of sums
        "d_slots": tiled(1, D, width),  # dS
        "side_loaded": plgpu.Barrier(num_arrivals=3),
        "side_read": plgpu.Barrier(num_arrivals=1),
        # c, then to_end E, then dg
        "cumulative": plgpu.SMEM((CHUNK, width), wide, transforms=tile(width, 4)),
        "row_sums": plgpu.SMEM((CHUNK, width), wide, transforms=tile(width, 4)),
        "references": plgpu.SMEM((GATE_BLOCKS, max(width, ALIGNED)), wide),
        "total": plgpu.SMEM((width,), wide),
        "to_end": tiled(1, CHUNK, width),
        "odds": tiled(CHUNK, width),
        "gates_loaded": plgpu.Barrier(num_arrivals=4 + GATE_BLOCKS + 3 * masked),
        "token_decays": tiled(GATE_BLOCKS, CHUNK, width),  # f
        "token_decays_ready": plgpu.Barrier(num_arrivals=2),
        "d_total": plgpu.SMEM((width,), wide),  # S0 . dS
        "zero": ZERO,
        "ends_ready": plgpu.Barrier(num_arrivals=1),
    }
    if masked:
        for name in ("query_segment", "token_segment", "slot_access"):
            scratch[name] = plgpu.SMEM((CHUNK,), jnp.int32)
    if interpret:
        scratch["buffer"] = plgpu.SMEM((2, CHUNK, CHUNK), narrow)
    return scratch


class SlotTokenMemory:
    """A thread block's arrays as one of its warpgroups sees them, and the copies into them.

    Items take turns in the stages: for each side the rows of each query head of the group, and
    then, if it is added to the side's, the window's gradient.

    Attributes:
      refs, shared: arrays and barriers, by name.
      index: the tokens and the slots.
      added: for each side, whether the window's gradient is added.
      group: query heads, G.
      stages: items in flight.
      D, width: features, and slots of the block.
      zero: the warpgroup's `OpaqueZero`, which `operand`, `token_decays` and stages contain.
    """

    def __init__(self, refs: Refs, shared: Refs, spec: CallSpec, added: tuple[bool, ...]):
        self.refs, self.shared, self.added, self.group = refs, shared, added, spec.group
        self.stages, _, self.D = shared["rows"].shape
        self.width = shared["row_weights"].shape[2]
        panels = refs["cumulative"].shape[3] // self.width
        self.index = EnteringIndex(spec, panels, self.width, refs["d_log_decay"].shape[1])
        self.zero = OpaqueZero(shared["zero"])

    def operand(self, name: str) -> Any:
        """An array that products read and that has one buffer."""
        return self.shared[name].at[self.zero.value]

    def token_decays(self, block: int, *tokens: Any) -> Any:
        """f of a gate block, for all of the chunk's tokens or a slice of them."""
        return self.shared["token_decays"].at[self.zero.value + block, *tokens]

    def references(self, block) -> Any:
        """c_ref of a gate block."""
        return self.shared["references"].at[block, pl.ds(0, self.width)]

    def d_tokens(self, side: int) -> Any:
        """The side's gradient in the device's memory, where the window's is before."""
        where = self.index.panel, self.index.batch, self.index.written, self.index.head
        return self.refs["d_" + SIDES[side]].at[*where]

    # Items

    def first_item(self, side: int) -> int:
        """The side's first item. `len(SIDES)` for a side gives the number of items."""
        return side * self.group + sum(self.added[:side])

    def window_item(self, side: int) -> int:
        """The item that is the window's gradient of a side."""
        return self.first_item(side) + self.group

    def wait_for_item(self, item) -> int | jax.Array:
        """Waits until an item is loaded, and returns its stage."""
        stage = lax.rem(jnp.int32(item), jnp.int32(self.stages))
        plgpu.barrier_wait(self.shared["item_loaded"].at[stage])
        return stage + self.zero.renew()

    def leave_item(self, stage) -> None:
        """Says that this warpgroup has read a stage's item."""
        plgpu.commit_smem()
        plgpu.barrier_arrive(self.shared["item_read"].at[stage])

    def fetch_next_item(self, item, stage) -> None:
        """Fetches what takes an item's place, once both warpgroups have read it."""
        plgpu.barrier_wait(self.shared["item_read"].at[stage])
        more = item + self.stages < self.first_item(len(SIDES))
        pl.when(more)(lambda: self.fetch_item(item + self.stages, stage))

    def fetch_item(self, item, stage) -> None:
        """Copies an item to a stage, whatever it is."""
        for side, name in enumerate(SIDES):
            head = item - self.first_item(side)
            is_head = (head >= 0) & (head < self.group)
            pl.when(is_head)(functools.partial(self._fetch_head, head, *ROWS[name], stage))
            if self.added[side]:
                is_window = head == self.group
                pl.when(is_window)(functools.partial(self._fetch_window, side, stage))

    def _fetch_head(self, head, rows: str, row_weights: str, stage) -> None:
        """Copies y and w of a query head of the group."""
        index, loaded = self.index, self.shared["item_loaded"].at[stage]
        head = index.head * self.group + head
        source = self.refs[rows].at[index.batch, index.rows, head]
        plgpu.copy_gmem_to_smem(source, self.shared["rows"].at[stage], loaded)
        source = self.refs[row_weights].at[index.batch, index.rows, head, index.slots]
        plgpu.copy_gmem_to_smem(source, self.shared["row_weights"].at[stage], loaded)

    def _fetch_window(self, side: int, stage) -> None:
        """Copies the window's gradient, in two halves: item_loaded counts two copies an item."""
        loaded = self.shared["item_loaded"].at[stage]
        for half in range(2):
            rows = pl.ds(half * (CHUNK // 2), CHUNK // 2)
            target = self.shared["rows"].at[stage, rows]
            plgpu.copy_gmem_to_smem(self.d_tokens(side).at[rows], target, loaded)

    # What both sides' items meet

    def fetch_gates(self) -> None:
        """Copies the chunk's gates, references and segments."""
        refs, shared, index = self.refs, self.shared, self.index
        b, h, loaded = index.batch, index.head, shared["gates_loaded"]
        targets = {
            "cumulative": shared["cumulative"],
            "to_end": shared["to_end"].at[0],
            "odds": shared["odds"],
        }
        for name, target in targets.items():
            gate = refs[name].at[b, index.rows, h, index.slots]
            plgpu.copy_gmem_to_smem(gate, target, loaded)
        total = refs["total"].at[b, h, index.chunk, index.slots]
        plgpu.copy_gmem_to_smem(total, shared["total"], loaded)
        fetch_references(
            lambda row: refs["cumulative"].at[b, row, h, index.slots],
            index.first_row,
            self.references,
            loaded,
        )
        if "query_segment" in shared:
            for name in ("query_segment", "slot_access"):
                plgpu.copy_gmem_to_smem(refs[name].at[b, index.rows], shared[name], loaded)
            token_segment = refs["token_segment"].at[b, index.read]
            plgpu.copy_gmem_to_smem(token_segment, shared["token_segment"], loaded)

    def fetch_states(self, side: int) -> None:
        """Copies S0 and dS of a side."""
        index, loaded = self.index, self.shared["side_loaded"]
        for prefix, target in (("start_", "slots"), ("d_end_", "d_slots")):
            states = self.refs[prefix + SIDES[side]].at[index.batch, index.head, index.chunk]
            states = states.at[pl.ds(0, self.D), index.slots]
            plgpu.copy_gmem_to_smem(states, self.shared[target].at[0], loaded)

    def fetch_tokens(self, side: int) -> None:
        """Copies x of a side."""
        index = self.index
        tokens = self.refs[SIDES[side]].at[index.batch, index.read, index.head]
        plgpu.copy_gmem_to_smem(tokens, self.operand("tokens"), self.shared["side_loaded"])
