"""A warpgroup of the output pass: one query head's rows of a chunk."""

import functools

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas.gpu.gates import LOG2E
from pallas.gpu.in_chunk import InChunk
from pallas.gpu.masks import by_row, in_window, iota
from pallas.gpu.matmul import Matmul
from pallas.gpu.place import Place
from pallas.gpu.producer import Refs
from pallas.gpu.spec import CHUNK, GATE_BLOCKS, LOGITS, ROW, Spec

LOWEST = -1e30  # below every logit, and finite: a row that sees nothing has no NaN


class Consumer(InChunk):
    """Reads what `producer.produce` fetches."""

    def __init__(self, refs: Refs, shared: Refs, place: Place, matmul: Matmul, spec: Spec, me):
        super().__init__(shared, place, matmul, spec)
        self.refs, self.me = refs, me
        self.warpgroups, _, self.D = shared["rotated_query"].shape

    def run(self) -> None:
        shared, spec = self.shared, self.spec
        if spec.masked:
            plgpu.barrier_wait(shared["facts_loaded"])
        if spec.slots:
            self._build_falls()
        plgpu.barrier_wait(shared["queries_loaded"].at[self.me])
        carry = self._slots() if spec.slots else self._empty_slots()
        _, slot_top, slot_mass = carry
        out, top, mass = lax.fori_loop(0, self.place.blocks, self._block, carry)
        self._store(out, top, mass, slot_mass * jnp.exp2(slot_top - top))

    def _empty_slots(self) -> tuple[jax.Array, jax.Array, jax.Array]:
        """Without slots to read: the empty ones have logit 0 and value 0."""
        empty = self.spec.empty_slots
        full = lambda x: plgpu.layout_cast(jnp.full(CHUNK, x, jnp.float32), ROW)  # noqa: E731
        out = plgpu.layout_cast(jnp.zeros((CHUNK, self.D), jnp.float32), LOGITS)
        return out, full(0.0 if empty else LOWEST), full(float(empty))

    # The slots

    def _build_falls(self) -> None:
        """s_j exp(R - G_j) for each block's reference R, by all warpgroups together."""
        shared = self.shared
        plgpu.barrier_wait(shared["gates_loaded"])
        panels = shared["cumulative"].shape[0]
        for panel in range(panels):
            G = plgpu.load(shared["cumulative"].at[panel], layout=LOGITS)
            write = plgpu.load(shared["last_fall"].at[panel], layout=LOGITS).astype(jnp.float32)
            if self.warpgroups > 1:  # the last falls take the place of s
                _meet(shared["writes_read"])
            for warpgroup in range(self.warpgroups):
                blocks = range(warpgroup, GATE_BLOCKS, self.warpgroups)
                build = functools.partial(self._build_some, blocks, panel, G, write)
                pl.when(self.me == warpgroup)(build)
        plgpu.commit_smem()
        if self.warpgroups > 1:
            _meet(shared["falls_ready"])

    def _build_some(self, blocks: range, panel: int, G: jax.Array, write: jax.Array) -> None:
        for block in blocks:
            self._falls(block, panel)[...] = self._fall(block, panel, G, write)

    def _falls(self, block: int, panel: int):
        if block == GATE_BLOCKS - 1:
            return self.shared["last_fall"].at[panel]
        return self.shared["falls"].at[block, panel]

    def _slots(self) -> tuple[jax.Array, jax.Array, jax.Array]:
        """The slots at the chunk's start, and the first block's tokens that entered them.

        Returns what the online softmax goes on from: sum of p times values [C, D], the logits'
        maximum [C] and the sum of p [C].
        """
        shared = self.shared
        panels = range(shared["cumulative"].shape[0])
        plgpu.barrier_wait(shared["keys_loaded"])
        plgpu.barrier_wait(shared["block_loaded"].at[0])
        logits = self._slot_logits(panels)
        plgpu.barrier_arrive(shared["slot_keys_read"])
        top = jnp.maximum(logits[0].max(axis=1), LOWEST)
        for x in logits[1:]:
            top = jnp.maximum(top, x.max(axis=1))
        p_slots = [jnp.exp2(x - by_row(top, x.shape[1])) for x in logits]
        mass = p_slots[0].sum(axis=1)
        for p in p_slots[1:]:
            mass += p.sum(axis=1)

        within: jax.Array | None = None
        carried = []
        for panel, p in zip(panels, p_slots, strict=True):
            carried.append((p * self._from_start(panel)).astype(jnp.bfloat16))
            within = self._gather(panel, p * self._rise(panel), within)
        assert within is not None
        entered = self._entered()
        p_tokens = jnp.where(entered, within, 0.0).astype(jnp.bfloat16)
        plgpu.barrier_wait(shared["slot_values_loaded"])
        out = self.matmul(
            lambda: [
                *((carried[i], shared["slots"].at[i].T) for i in panels),
                (p_tokens, shared["value"].at[0]),
            ],
            (CHUNK, self.D),
        )
        return out, top, mass

    def _slot_logits(self, panels: range) -> list[jax.Array]:
        """a, for each panel [C, its slots]."""
        shared, me = self.shared, self.me
        scores = self.matmul(lambda: [(shared["query"].at[me], shared["key"].T)], (CHUNK, CHUNK))
        scores = jnp.where(self._entered(), scores, 0.0)
        return [self._panel_logits(panel, scores) for panel in panels]

    def _panel_logits(self, panel: int, scores: jax.Array) -> jax.Array:
        shared, spec = self.shared, self.spec
        a = self._to_slots(
            panel, scores, lambda: [(shared["query"].at[self.me], shared["slots"].at[panel])]
        )
        return self._hide(panel, a * (spec.scale * LOG2E))

    # The window

    def _in_window(self, block) -> jax.Array:
        """[C, C], whatever their segments."""
        place = self.place
        row = iota(CHUNK, 0) + place.first_row
        token = iota(CHUNK, 1) + (place.first_token + block * CHUNK)  # on the timeline
        return in_window(self.spec, row, token)

    def _window_logits(self, stage, mask: jax.Array) -> jax.Array:
        shared = self.shared
        b = self.matmul(
            lambda: [(shared["rotated_query"].at[self.me], shared["rotated_key"].at[stage].T)],
            (CHUNK, CHUNK),
        )
        return jnp.where(mask, b * (self.spec.scale * LOG2E), -jnp.inf)

    def _block(self, block, carry):
        """One more block of the window's tokens, by online softmax."""
        out, top, mass = carry
        shared = self.shared
        stage = lax.rem(block, jnp.int32(shared["value"].shape[0]))
        if self.spec.slots:  # the first block is here already
            pl.when(block > 0)(lambda: plgpu.barrier_wait(shared["block_loaded"].at[stage]))
        else:
            plgpu.barrier_wait(shared["block_loaded"].at[stage])
        mask = self._in_window(block)
        if self.spec.masked:
            mask &= self._same_segment(stage)
        logits = self._window_logits(stage, mask)
        new_top = jnp.maximum(top, logits.max(axis=1))
        shrink = jnp.exp2(top - new_top)
        p = jnp.exp2(logits - by_row(new_top, CHUNK))
        mass = mass * shrink + p.sum(axis=1)
        out = self.matmul(
            lambda: [(p.astype(jnp.bfloat16), shared["value"].at[stage])],
            (CHUNK, self.D),
            out * by_row(shrink, self.D),
        )
        plgpu.barrier_arrive(shared["block_read"].at[stage])
        return out, new_top, mass

    def _store(self, out, top, mass, slot_mass) -> None:
        """The query's place in shared memory takes the output."""
        shared, refs, place, me = self.shared, self.refs, self.place, self.me
        safe = jnp.where(mass > 0.0, mass, 1.0)  # padding has none
        buffer = shared["rotated_query"].at[me]
        buffer[...] = (out / by_row(safe, self.D)).astype(jnp.bfloat16)
        shared["log_mass"].at[me][...] = (top + jnp.log(safe) * LOG2E) / LOG2E
        shared["slot_weight"].at[me][...] = slot_mass / safe
        plgpu.commit_smem()
        head = place.heads + me
        plgpu.copy_smem_to_gmem(buffer, refs["out"].at[place.batch, place.rows, head])
        for name in ("log_mass", "slot_weight"):
            target = refs[name].at[place.batch, head, place.rows]
            plgpu.copy_smem_to_gmem(shared[name].at[me], target)
        plgpu.wait_smem_to_gmem(0)


def _meet(barrier) -> None:
    """All consumers wait for each other."""
    plgpu.barrier_arrive(barrier)
    plgpu.barrier_wait(barrier)
