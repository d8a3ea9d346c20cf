"""What `slot_query_gradients.py` holds in shared memory, and the copies that bring it."""

from typing import Any

import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas.gpu.spec import ALIGNED, CHUNK, GATE_BLOCKS, PANEL, SIDES, CallSpec, tile
from pallas.gpu.warpgroup.addresses import ZERO, OpaqueZero
from pallas.gpu.warpgroup.chunk_index import ChunkIndex
from pallas.gpu.warpgroup.decays import fetch_references
from pallas.gpu.warpgroup.launch import Refs

WHOLE = 64  # slots that are worked on at once; of more, a panel at a time
STAGES = 2  # panels in shared memory at a time, where there are more
GIVEN = ("lse", "slot_weight", "delta_beside_slots")  # numbers of each row
NUMBERS = (*GIVEN, "delta")


def query_scratch(spec: CallSpec, D: int, M: int, *, adds: bool, interpret: bool) -> Refs:
    """Shared memory, and the barriers of the copies into it.

    adds: whether dq is added to a gradient that is given.
    """
    narrow, wide = jnp.bfloat16, jnp.float32
    panel = M if M <= WHOLE else PANEL
    panels = M // panel  # 1, or 2 * STAGES: at the end half of SK0 is here, and half fetched again
    stages = min(panels, STAGES)
    tokens = plgpu.SMEM((CHUNK, D), narrow, transforms=tile(min(D, panel)))
    rows = plgpu.SMEM((1, CHUNK, D), narrow, transforms=tile(min(D, panel)))
    slots = plgpu.SMEM((stages, D, panel), narrow, transforms=tile(panel))
    scores = plgpu.SMEM((CHUNK, CHUNK), narrow, transforms=tile(CHUNK))
    copied = plgpu.Barrier(num_arrivals=1, num_barriers=stages)
    scratch = {
        **dict.fromkeys(("query", "d_out"), rows),
        **dict.fromkeys(SIDES, plgpu.RefUnion(tokens, [slots, scores])),
        "numbers": plgpu.SMEM((len(NUMBERS), CHUNK), wide),
        "zero": ZERO,
        "cumulative": plgpu.SMEM((stages, CHUNK, panel), wide, transforms=tile(panel, 4)),
        "references": plgpu.SMEM((GATE_BLOCKS, max(M, ALIGNED)), wide),
        "write": plgpu.SMEM((panels, CHUNK, panel), narrow, transforms=tile(panel)),
        "token_decays": plgpu.SMEM((GATE_BLOCKS, CHUNK, panel), narrow, transforms=tile(panel)),
        "loaded": plgpu.Barrier(num_arrivals=7 + GATE_BLOCKS + panels + 3 * spec.masked),
        **dict.fromkeys(("gates_loaded", "slot_keys_loaded", "slot_values_loaded"), copied),
        "loaded_again": plgpu.Barrier(num_arrivals=1 + adds + panels - stages),
    }
    if spec.masked:
        scratch["query_segment"] = scratch["slot_access"] = plgpu.SMEM((CHUNK,), jnp.int32)
        scratch["token_segment"] = plgpu.SMEM((1, CHUNK), jnp.int32)
    if interpret:
        scratch["buffer"] = plgpu.SMEM((CHUNK, CHUNK), narrow)
    return scratch


class SlotQueryMemory:
    """The arrays of a query head's rows of a chunk, by name, and their copies.

    A turn is a panel of slots. With more than one panel, all have a turn for delta first.

    Attributes:
      shared: what `query_scratch` describes. What shares a place has names of its own: a side's
        tokens ("key", "value"), then some of its slots ("slot_keys", "slot_values") and the
        products of the tokens ("key_scores", "value_scores").
      panels, width: how many panels of slots there are, and the slots of each.
      stages: panels in shared memory at a time.
      zero: the `OpaqueZero` that `rows`, `token_decays` and `stage` contain.
    """

    def __init__(self, refs: Refs, shared: Refs, index: ChunkIndex, *, adds: bool):
        """adds: as for `query_scratch`."""
        self.refs, self.index, self.shared = refs, index, dict(shared)
        for side in SIDES:
            tokens, (slots, scores) = shared[side]
            self.shared |= {side: tokens, f"slot_{side}s": slots, f"{side}_scores": scores}
        self.panels, _, self.width = shared["write"].shape
        self.stages = shared["cumulative"].shape[0]
        self.zero = OpaqueZero(shared["zero"])
        self.adds = adds

    def rows(self, name: str):
        """q or do, by name, or what takes their place."""
        return self.shared[name].at[self.zero.value]

    def numbers(self, name: str):
        """A number of each row, by its name in `NUMBERS`."""
        return self.shared["numbers"].at[NUMBERS.index(name)]

    def token_decays(self, block: int):
        """The token decays of a gate block."""
        return self.shared["token_decays"].at[self.zero.value + block]

    def references(self, panel):
        """A function of a gate block: where c_ref of the panel's slots lies."""
        slots = self.slots(panel)
        return lambda block: self.shared["references"].at[block, slots]

    def slots(self, panel):
        """The panel's slice of the slots."""
        return pl.ds(panel * self.width, self.width)

    def stage(self, panel):
        if self.stages == 1:
            return self.zero.value
        return lax.rem(jnp.int32(panel), jnp.int32(self.stages))

    def slot_keys(self, panel: int):
        """SK0 of a panel, at the end: the last panels' are still where they were."""
        is_here = panel >= self.panels - self.stages
        return self.shared["slot_keys" if is_here else "slot_values"].at[panel % self.stages]

    def fetch_first(self) -> None:
        """Fetches rows and tokens with their numbers and segments, and the first panels' gates."""
        refs, shared, index = self.refs, self.shared, self.index
        b, head, loaded = index.batch, index.heads, shared["loaded"]
        for name in ("query", "d_out"):
            plgpu.copy_gmem_to_smem(refs[name].at[b, index.rows, head], self.rows(name), loaded)
        for name in SIDES:
            self._fetch_tokens(name, shared[name], loaded)
        for stage in range(self.stages):
            self._fetch_gates(stage)
        for panel in range(self.panels):
            write = refs["write"].at[b, index.rows, index.kv_head, self.slots(panel)]
            plgpu.copy_gmem_to_smem(write, shared["write"].at[panel], loaded)
        fetch_references(
            lambda row: refs["cumulative"].at[b, row, index.kv_head],
            index.first_row,
            lambda block: shared["references"].at[block, pl.ds(0, self.panels * self.width)],
            loaded,
        )
        if "query_segment" in shared:
            for name in ("query_segment", "slot_access"):
                plgpu.copy_gmem_to_smem(refs[name].at[b, index.rows], shared[name], loaded)
            token_segment = refs["token_segment"].at[b, index.token_rows(0)]
            plgpu.copy_gmem_to_smem(token_segment, shared["token_segment"].at[0], loaded)
        for name in GIVEN:
            rows = refs[name].at[b, head, index.rows]
            plgpu.copy_gmem_to_smem(rows, self.numbers(name), loaded)
        self.zero.store()

    def fetch_slots(self, panel) -> None:
        """Fetches a panel's keys and values at the chunk's start."""
        for side in SIDES:
            loaded = self.shared[f"slot_{side}s_loaded"].at[self.stage(panel)]
            self._fetch_slots_to(f"slot_{side}s", side, panel, loaded)

    def fetch_next(self, turn) -> None:
        """Fetches the panel that takes this turn's place, which all warps have read."""

        @pl.when(turn + self.stages < 2 * self.panels)
        def _():
            panel = lax.rem(turn + self.stages, jnp.int32(self.panels))
            self._fetch_gates(panel)
            self.fetch_slots(panel)

    def fetch_again(self) -> None:
        """Fetches what dq is made of and is no longer here, after the last panel's dp."""
        plgpu.commit_smem()
        index, again = self.index, self.shared["loaded_again"]
        self._fetch_tokens("key", self.rows("d_out"), again)
        if self.adds:
            d_query = self.refs["d_query"].at[index.batch, index.rows, index.heads]
            plgpu.copy_gmem_to_smem(d_query, self.rows("query"), again)
        for panel in range(self.panels - self.stages):
            self._fetch_slots_to("slot_values", "key", panel, again)

    def _fetch_tokens(self, name: str, target: Any, loaded: Any) -> None:
        index = self.index
        tokens = self.refs[name].at[index.batch, index.token_rows(0), index.kv_head]
        plgpu.copy_gmem_to_smem(tokens, target, loaded)

    def _fetch_gates(self, panel) -> None:
        shared, index, stage = self.shared, self.index, self.stage(panel)
        slots = self.slots(panel)
        gates = self.refs["cumulative"].at[index.batch, index.rows, index.kv_head, slots]
        target, loaded = shared["cumulative"].at[stage], shared["gates_loaded"].at[stage]
        plgpu.copy_gmem_to_smem(gates, target, loaded)

    def _fetch_slots_to(self, where: str, side: str, panel, loaded: Any) -> None:
        index = self.index
        target = self.shared[where].at[self.stage(panel)]
        of_panel = pl.ds(0, target.shape[0]), self.slots(panel)
        slots = self.refs[f"start_{side}"].at[index.batch, index.kv_head, index.chunk, *of_panel]
        plgpu.copy_gmem_to_smem(slots, target, loaded)
