"""What the query side of the slots' backward holds in shared memory, and how it gets there.

Symbols as in `slot_queries.py`. Of more than 64 slots a panel at a time is worked on, and two are
here. The slots take the places of the tokens, once S and D are computed: beside them, heads of 256
have no room. For dq, k comes again, to the place of do, what is gone of SK0, to that of SV0, and
what dq is added to, to the place of q.
"""

from typing import Any

import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas.gpu.spec import ALIGNED, CHUNK, GATE_BLOCKS, PANEL, CallSpec, tile
from pallas.gpu.warpgroup.addresses import ZERO, OpaqueZero
from pallas.gpu.warpgroup.chunk_index import ChunkIndex
from pallas.gpu.warpgroup.decays import fetch_references
from pallas.gpu.warpgroup.launch import Refs
from pallas.gpu.warpgroup.matmul import Matmul

WHOLE = 64  # slots that are worked on at once; of more, a panel at a time
STAGES = 2  # panels in shared memory at a time, where there are more
SIDES = ("key", "value")
GIVEN = ("lse", "slot_weight", "rest")  # numbers of each row
NUMBERS = (*GIVEN, "delta")


def query_scratch(spec: CallSpec, D: int, M: int, *, adds: bool, interpret: bool) -> dict[str, Any]:
    """Shared memory, and barriers whose arrivals are the copies into it.

    adds: there is a gradient to add to.
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


def _named(shared: Refs) -> Refs:
    """What shares a place, by name: the tokens, then some slots and the products of the tokens."""
    named = {}
    for side in SIDES:
        named[side], (named[f"slot_{side}s"], named[f"{side}_scores"]) = shared[side]
    return named


class QueryPlaces:
    """A query head's rows of a chunk, and what is computed with them.

    A turn is a panel of slots; of more than one panel, all have a turn for delta first.
    """

    def __init__(
        self,
        refs: Refs,
        shared: Refs,
        index: ChunkIndex,
        matmul: Matmul,
        spec: CallSpec,
        *,
        adds: bool,
    ):
        self.refs, self.shared, self.index = refs, shared | _named(shared), index
        self.matmul, self.spec, self.adds = matmul, spec, adds
        self.panels, _, self.width = shared["write"].shape
        self.stages = shared["cumulative"].shape[0]
        self.zero = OpaqueZero(shared["zero"])

    def _stage(self, panel):
        if self.stages == 1:
            return self.zero.value
        return lax.rem(jnp.int32(panel), jnp.int32(self.stages))

    def _rows(self, name: str):
        return self.shared[name].at[self.zero.value]

    def _token_decays(self, block: int):
        return self.shared["token_decays"].at[self.zero.value + block]

    def _numbers(self, name: str):
        return self.shared["numbers"].at[NUMBERS.index(name)]

    def _fetch_first(self) -> None:
        refs, shared, index = self.refs, self.shared, self.index
        b, head, loaded = index.batch, index.heads, shared["loaded"]
        for name in ("query", "d_out"):
            plgpu.copy_gmem_to_smem(refs[name].at[b, index.rows, head], self._rows(name), loaded)
        for name in SIDES:
            self._fetch_tokens(name, shared[name], loaded)
        for stage in range(self.stages):
            self._fetch_gates(stage)
        for panel in range(self.panels):
            write = refs["write"].at[b, index.rows, index.kv_head, self._slots(panel)]
            plgpu.copy_gmem_to_smem(write, shared["write"].at[panel], loaded)
        fetch_references(
            lambda row: refs["cumulative"].at[b, row, index.kv_head],
            index.first_row,
            lambda block: shared["references"].at[block, pl.ds(0, self.panels * self.width)],
            loaded,
        )
        if self.spec.masked:
            for name in ("query_segment", "slot_access"):
                plgpu.copy_gmem_to_smem(refs[name].at[b, index.rows], shared[name], loaded)
            token_segment = refs["token_segment"].at[b, index.token_rows(0)]
            plgpu.copy_gmem_to_smem(token_segment, shared["token_segment"].at[0], loaded)
        for name in GIVEN:
            rows = refs[name].at[b, head, index.rows]
            plgpu.copy_gmem_to_smem(rows, self._numbers(name), loaded)
        self.zero.store()

    def _slots(self, panel):
        return pl.ds(panel * self.width, self.width)

    def _fetch_tokens(self, name: str, target: Any, loaded: Any) -> None:
        index = self.index
        tokens = self.refs[name].at[index.batch, index.token_rows(0), index.kv_head]
        plgpu.copy_gmem_to_smem(tokens, target, loaded)

    def _fetch_gates(self, panel) -> None:
        shared, index, stage = self.shared, self.index, self._stage(panel)
        slots = self._slots(panel)
        gates = self.refs["cumulative"].at[index.batch, index.rows, index.kv_head, slots]
        target, loaded = shared["cumulative"].at[stage], shared["gates_loaded"].at[stage]
        plgpu.copy_gmem_to_smem(gates, target, loaded)

    def _fetch_slots(self, panel) -> None:
        for side in SIDES:
            loaded = self.shared[f"slot_{side}s_loaded"].at[self._stage(panel)]
            self._fetch_slots_to(f"slot_{side}s", side, panel, loaded)

    def _fetch_slots_to(self, where: str, side: str, panel, loaded: Any) -> None:
        index = self.index
        target = self.shared[where].at[self._stage(panel)]
        of_panel = pl.ds(0, target.shape[0]), self._slots(panel)
        slots = self.refs[f"start_{side}"].at[index.batch, index.kv_head, index.chunk, *of_panel]
        plgpu.copy_gmem_to_smem(slots, target, loaded)

    def _fetch_next(self, turn) -> None:
        """What takes this turn's places, when all have read them."""

        @pl.when(turn + self.stages < 2 * self.panels)
        def _():
            panel = lax.rem(turn + self.stages, jnp.int32(self.panels))
            self._fetch_gates(panel)
            self._fetch_slots(panel)

    def _fetch_again(self) -> None:
        """What dq is made of and is not here, after the last panel's dp."""
        plgpu.commit_smem()
        index, again = self.index, self.shared["loaded_again"]
        self._fetch_tokens("key", self._rows("d_out"), again)
        if self.adds:
            d_query = self.refs["d_query"].at[index.batch, index.rows, index.heads]
            plgpu.copy_gmem_to_smem(d_query, self._rows("query"), again)
        for panel in range(self.panels - self.stages):
            self._fetch_slots_to("slot_values", "key", panel, again)
