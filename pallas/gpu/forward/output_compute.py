"""A warpgroup of the output pass: one query head's rows of a chunk."""

import functools

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas.constants import MASKED_LOGIT
from pallas.gpu.forward.gates import FLOOR, LOG2E
from pallas.gpu.spec import CHUNK, GATE_BLOCKS, GATE_ROWS, LOGITS, ROW, CallSpec
from pallas.gpu.warpgroup.addresses import store_zero
from pallas.gpu.warpgroup.chunk_index import ChunkIndex
from pallas.gpu.warpgroup.in_chunk import InChunk
from pallas.gpu.warpgroup.launch import Refs
from pallas.gpu.warpgroup.masks import by_row, in_window, iota
from pallas.gpu.warpgroup.matmul import Matmul
from pallas.gpu.warpgroup.row_sums import store_chosen, store_parts, store_zeros, sum_rows, write_of


class ComputeWarpgroup(InChunk):
    """Reads what `output_fetch.fetch` fetches; `shared` has the decays of some panels at a time.

    A panel's stage stands for the panel in `InChunk`. The segments of the first block's tokens are
    the first of `token_segment`; the stages' follow.
    """

    def __init__(
        self, refs: Refs, shared: Refs, index: ChunkIndex, matmul: Matmul, spec: CallSpec, me
    ):
        super().__init__(shared, index, matmul, spec)
        self.refs, self.me = refs, me
        self.zero: int | jax.Array = 0
        self.warpgroups, _, self.D = shared["window_query"].shape

    def run(self) -> None:
        shared, spec = self.shared, self.spec
        if spec.masked:
            plgpu.barrier_wait(shared["segments_loaded"])
        carry = self._slots() if spec.slots else self._empty_slots()
        plgpu.barrier_wait(shared["window_query_loaded"].at[self.me])
        _, slot_top, slot_mass = carry
        out, top, mass = lax.fori_loop(0, self.index.blocks, self._block, carry)
        self._store(out, top, mass, slot_mass * jnp.exp2(slot_top - top))

    def _empty_slots(self) -> tuple[jax.Array, jax.Array, jax.Array]:
        """Without slots to read: the empty ones have logit 0 and value 0."""
        empty = self.spec.empty_slots
        return _zeros(self.D), _full(0.0 if empty else MASKED_LOGIT), _full(float(empty))

    # The slots

    def _panels(self) -> tuple[int, int]:
        width = self.shared["cumulative"].shape[2]
        return self.refs["log_decay"].shape[3] // width, width

    def _token_decays(self, block: int, panel):
        return self.shared["token_decays"].at[self.zero + block]

    def _build_token_decays(self, stage) -> None:
        """c, its references and the token_decays of the panel in a stage."""
        shared = self.shared
        token_decays = shared["token_decays"]
        nothing = self.index.first_row < self.spec.ahead  # no tokens enter yet
        pl.when(nothing)(lambda: store_zeros(shared["cumulative"].at[stage]))
        log_decay = plgpu.load(shared["cumulative"].at[stage], layout=LOGITS)
        decay = jnp.maximum(log_decay, FLOOR) * LOG2E
        parts = lambda i: token_decays.at[i]  # noqa: E731
        store_parts(decay, parts)  # where the token_decays will be
        plgpu.commit_smem()
        cumulative = sum_rows(lambda: shared["up_to_row"], parts, self.matmul)
        write = write_of(plgpu.load(shared["cumulative"].at[stage], layout=LOGITS))
        shared["cumulative"].at[stage][...] = cumulative  # where log_decay was
        row, width = iota(cumulative.shape[1], 0), cumulative.shape[1]
        slots = pl.ds(stage * width, width)
        for block in range(GATE_BLOCKS):
            middle = block * GATE_ROWS + GATE_ROWS // 2 - 1
            reference = jnp.where(row == middle, cumulative, 0.0).sum(
                axis=0
            )  # a row can't be loaded alone
            shared["references"].at[block, slots][...] = reference
        for block in range(GATE_BLOCKS):
            token_decays.at[block][...] = self._token_decay(block, stage, cumulative, write)
        plgpu.commit_smem()

    def _slots(self) -> tuple[jax.Array, jax.Array, jax.Array]:
        """The slots at the chunk's start, and the first block's tokens that entered them.

        An online softmax, a panel of slots after the other: first the weights, then the values.
        Returns what it goes on from: sum of p times values [C, D], the logits' maximum [C] and the
        sum of p [C].
        """
        shared, me = self.shared, self.me
        store_zero(shared["zero"].at[me])
        plgpu.barrier_wait(shared["query_loaded"].at[me])
        plgpu.barrier_wait(shared["key_loaded"])
        scores = self.matmul(lambda: [(shared["query"].at[me], shared["key"].T)], (CHUNK, CHUNK))
        # In shared memory: else the compiler masks them before the loop, and holds four copies.
        between = shared["between"].at[me]
        between[...] = jnp.where(self._entered(), scores, 0.0).astype(jnp.bfloat16)
        if "keys" in shared:
            plgpu.barrier_arrive(shared["key_read"])

        @pl.when(me == 0)
        def _():
            store_chosen(iota(CHUNK, 1) <= iota(CHUNK, 0), shared["up_to_row"])

        carry = _zeros(CHUNK), _full(MASKED_LOGIT), _full(0.0)
        within, top, mass = lax.fori_loop(0, self._panels()[0], self._panel, carry)
        # Read, not made again: the compiler would keep the mask until here.
        entered = plgpu.load(shared["up_to_row"], layout=LOGITS) > 0
        if self.spec.masked:
            entered &= self._same_segment(0)
        between[...] = jnp.where(entered, within, 0.0).astype(jnp.bfloat16)
        plgpu.commit_smem()

        out = lax.fori_loop(0, self._panels()[0], self._slot_values, _zeros(self.D))
        plgpu.barrier_wait(shared["value_loaded"].at[0])
        p_tokens = lambda: [(shared["between"].at[me], shared["value"].at[0])]  # noqa: E731
        return self.matmul(p_tokens, (CHUNK, self.D), out), top, mass

    def _slot_values(self, panel, out: jax.Array) -> jax.Array:
        """Adds those of one more panel."""
        shared, me = self.shared, self.me
        stage = self._slot_stage(self._panels()[0] + panel)
        shrink = plgpu.load(shared["shrink"].at[me, panel], layout=ROW)
        plgpu.barrier_wait(shared["slots_loaded"].at[stage])
        out = self.matmul(
            lambda: [(shared["p_start"].at[me, panel], shared["slots"].at[stage].T)],
            (CHUNK, self.D),
            out * by_row(shrink, self.D),
        )
        plgpu.barrier_arrive(shared["slots_read"].at[stage])
        return out

    def _slot_stage(self, item):
        return lax.rem(item, jnp.int32(self.shared["slots"].shape[0]))

    def _panel(self, panel, carry):
        """The weights of one more panel; `within`: the first block's, before its mask."""
        within, top, mass = carry
        shared, me, width = self.shared, self.me, self._panels()[1]
        self.zero = shared["zero"].at[me][0]
        stage = lax.rem(panel, jnp.int32(shared["cumulative"].shape[0])) + self.zero
        slot_stage = self._slot_stage(panel) + self.zero
        plgpu.barrier_wait(shared["decay_loaded"].at[stage])
        build = functools.partial(self._build_token_decays, stage)
        if self.warpgroups == 1:
            build()
        else:
            _meet(shared["token_decays_read"])
            pl.when(me == 0)(build)
            _meet(shared["token_decays_ready"])
        plgpu.barrier_wait(shared["slots_loaded"].at[slot_stage])
        a = self._to_slots(
            stage,
            plgpu.load(shared["between"].at[me], layout=LOGITS),
            lambda: [(shared["query"].at[me + self.zero], shared["slots"].at[slot_stage])],
        )
        plgpu.barrier_arrive(shared["slots_read"].at[slot_stage])
        a = self._hide(panel, a * (self.spec.scale * LOG2E))
        new_top = jnp.maximum(top, a.max(axis=1))
        shrink = jnp.exp2(top - new_top)
        shared["shrink"].at[me, panel][...] = shrink
        p = jnp.exp2(a - by_row(new_top, width))
        mass = mass * shrink + p.sum(axis=1)
        shared["p_start"].at[me, panel][...] = (p * self._from_start(stage)).astype(jnp.bfloat16)
        p_decayed = (p * self._row_decay(stage)).astype(jnp.bfloat16)
        within = self._gather(stage, p_decayed, within * by_row(shrink, CHUNK))
        plgpu.commit_smem()  # of the sums, before log decays take their place
        plgpu.barrier_arrive(shared["decay_read"].at[stage])
        return within, new_top, mass

    # The window

    def _in_window(self, block) -> jax.Array:
        """[C, C], whatever their segments."""
        index = self.index
        row = iota(CHUNK, 0) + index.first_row
        token = iota(CHUNK, 1) + (index.first_token + block * CHUNK)  # on the timeline
        return in_window(self.spec, row, token)

    def _window_logits(self, stage, mask: jax.Array) -> jax.Array:
        shared = self.shared
        b = self.matmul(
            lambda: [(shared["window_query"].at[self.me], shared["window_key"].at[stage].T)],
            (CHUNK, CHUNK),
        )
        return jnp.where(mask, b * (self.spec.scale * LOG2E), -jnp.inf)

    def _block(self, block, carry):
        """One more block of the window's tokens, by online softmax."""
        out, top, mass = carry
        shared = self.shared
        stage = lax.rem(block, jnp.int32(shared["value"].shape[0]))
        plgpu.barrier_wait(shared["window_key_loaded"].at[stage])
        mask = self._in_window(block)
        if self.spec.masked:
            mask &= self._same_segment(1 + stage)
        logits = self._window_logits(stage, mask)
        if self.spec.masked:
            plgpu.commit_smem()  # of what was read, before a copy takes its place
        plgpu.barrier_arrive(shared["window_key_read"].at[stage])
        new_top = jnp.maximum(top, logits.max(axis=1))
        shrink = jnp.exp2(top - new_top)
        p = jnp.exp2(logits - by_row(new_top, CHUNK))
        mass = mass * shrink + p.sum(axis=1)
        if self.spec.slots:  # the first block is here already
            pl.when(block > 0)(lambda: plgpu.barrier_wait(shared["value_loaded"].at[stage]))
        else:
            plgpu.barrier_wait(shared["value_loaded"].at[stage])
        out = self.matmul(
            lambda: [(p.astype(jnp.bfloat16), shared["value"].at[stage])],
            (CHUNK, self.D),
            out * by_row(shrink, self.D),
        )
        plgpu.barrier_arrive(shared["value_read"].at[stage])
        return out, new_top, mass

    def _store(self, out, top, mass, slot_mass) -> None:
        """The query's place in shared memory takes the output."""
        shared, refs, index, me = self.shared, self.refs, self.index, self.me
        safe = jnp.where(mass > 0.0, mass, 1.0)  # padding has none
        buffer = shared["window_query"].at[me]
        buffer[...] = (out / by_row(safe, self.D)).astype(jnp.bfloat16)
        shared["lse"].at[me][...] = (top + jnp.log(safe) * LOG2E) / LOG2E
        shared["slot_weight"].at[me][...] = slot_mass / safe
        plgpu.commit_smem()
        head = index.heads + me
        plgpu.copy_smem_to_gmem(buffer, refs["out"].at[index.batch, index.rows, head])
        for name in ("lse", "slot_weight"):
            target = refs[name].at[index.batch, head, index.rows]
            plgpu.copy_smem_to_gmem(shared[name].at[me], target)
        plgpu.wait_smem_to_gmem(0)


def _zeros(columns: int) -> jax.Array:
    return plgpu.layout_cast(jnp.zeros((CHUNK, columns), jnp.float32), LOGITS)


def _full(x: float) -> jax.Array:
    return plgpu.layout_cast(jnp.full(CHUNK, x, jnp.float32), ROW)


def _meet(barrier) -> None:
    """All compute warpgroups wait for each other."""
    plgpu.barrier_arrive(barrier)
    plgpu.barrier_wait(barrier)
