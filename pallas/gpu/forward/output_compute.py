"""The compute warpgroups of `output.py`, whose docstring has the formulas and the barriers."""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas.constants import MASKED_LOGIT
from pallas.gpu.spec import CHUNK, GATE_BLOCKS, LOG2E, LOGITS, ROW, CallSpec
from pallas.gpu.warpgroup.addresses import OpaqueZero
from pallas.gpu.warpgroup.chunk_index import ChunkIndex
from pallas.gpu.warpgroup.decays import (
    FLOOR,
    gather,
    own_reference,
    spread,
    start_decay,
    store_references,
    token_decay,
    write_of,
)
from pallas.gpu.warpgroup.launch import Refs
from pallas.gpu.warpgroup.masks import by_row, entered, hide_slots, iota, same_segment, sees
from pallas.gpu.warpgroup.matmul import Matmul, Operands
from pallas.gpu.warpgroup.row_sums import store_chosen, store_parts, store_zeros, sum_rows


class Softmax(NamedTuple):
    """An online softmax of the chunk's rows over what they have seen so far, in units of log 2."""

    total: jax.Array  # sum of p times what it weighs: of values [C, D], or p itself [C, C]
    maximum: jax.Array  # [C], of the logits
    denominator: jax.Array  # [C], sum of p


class ComputeWarpgroup:
    """The rows of one query head of a chunk, to which `output_fetch.py` fetches what they read.

    The slots come in panels. A panel's gates pass through one of some stages, and so do its keys
    and, in a second round, its values.
    """

    def __init__(
        self, refs: Refs, shared: Refs, index: ChunkIndex, matmul: Matmul, spec: CallSpec, me
    ):
        """me: the warpgroup's number, and the query head's from `index.heads`."""
        self.refs, self.shared, self.index = refs, shared, index
        self.matmul, self.spec, self.me = matmul, spec, me
        self.warpgroups, _, self.D = shared["window_query"].shape
        if spec.slots:
            self.width = shared["cumulative"].shape[2]
            self.panels = refs["log_decay"].shape[3] // self.width
            self.zero = OpaqueZero(shared["zero"].at[me])

    def run(self) -> None:
        shared, spec = self.shared, self.spec
        if spec.masked:
            plgpu.barrier_wait(shared["segments_loaded"])
        slots = self._read_slots() if spec.slots else self._empty_slots()
        plgpu.barrier_wait(shared["window_query_loaded"].at[self.me])
        softmax = lax.fori_loop(0, self.index.blocks, self._read_block, slots)
        self._store(softmax, slots.denominator * jnp.exp2(slots.maximum - softmax.maximum))

    def _empty_slots(self) -> Softmax:
        """Without slots to read: the empty ones have logit 0 and value 0."""
        empty = self.spec.empty_slots
        return Softmax(_zeros(self.D), _full(0.0 if empty else MASKED_LOGIT), _full(float(empty)))

    # The slots

    def _read_slots(self) -> Softmax:
        """Reads the slots at the chunk's start, and the first block's tokens that have entered.

        Every panel's weights come first, then the values: total is of the values.
        """
        shared, me = self.shared, self.me
        self.zero.store()
        plgpu.barrier_wait(shared["query_loaded"].at[me])
        plgpu.barrier_wait(shared["key_loaded"])
        scores = self.matmul(lambda: [(shared["query"].at[me], shared["key"].T)], (CHUNK, CHUNK))
        # In shared memory: else the compiler masks them before the loop, and holds four copies.
        by_token = shared["by_token"].at[me]
        by_token[...] = jnp.where(self._entered(), scores, 0.0).astype(jnp.bfloat16)
        if "keys" in shared:
            plgpu.barrier_arrive(shared["key_read"])

        @pl.when(me == 0)
        def _():
            store_chosen(iota(CHUNK, 1) <= iota(CHUNK, 0), shared["up_to_row"])

        nothing = Softmax(_zeros(CHUNK), _full(MASKED_LOGIT), _full(0.0))
        softmax = lax.fori_loop(0, self.panels, self._weigh_panel, nothing)
        # Read, not made again: the compiler would keep the mask until here.
        mask = plgpu.load(shared["up_to_row"], layout=LOGITS) > 0
        if self.spec.masked:
            mask &= self._same_segment(0)
        by_token[...] = jnp.where(mask, softmax.total, 0.0).astype(jnp.bfloat16)
        plgpu.commit_smem()

        values = lax.fori_loop(0, self.panels, self._add_panel_values, _zeros(self.D))
        plgpu.barrier_wait(shared["value_loaded"].at[0])
        of_tokens = lambda: [(shared["by_token"].at[me], shared["value"].at[0])]  # noqa: E731
        return softmax._replace(total=self.matmul(of_tokens, (CHUNK, self.D), values))

    def _weigh_panel(self, panel, softmax: Softmax) -> Softmax:
        """One more panel; total is what its p give the chunk's tokens, not masked yet."""
        total, maximum, denominator = softmax
        shared, me = self.shared, self.me
        zero = self.zero.renew()
        stage = lax.rem(panel, jnp.int32(shared["cumulative"].shape[0])) + zero
        slot_stage = self._slot_stage(panel) + zero
        plgpu.barrier_wait(shared["decay_loaded"].at[stage])
        build = functools.partial(self._build_decays, stage)
        if self.warpgroups == 1:
            build()
        else:
            _meet(shared["token_decays_read"])
            pl.when(me == 0)(build)
            _meet(shared["token_decays_ready"])
        plgpu.barrier_wait(shared["slots_loaded"].at[slot_stage])
        a = self._products(
            stage,
            plgpu.load(shared["by_token"].at[me], layout=LOGITS),
            lambda: [(shared["query"].at[me + zero], shared["slots"].at[slot_stage])],
        )
        plgpu.barrier_arrive(shared["slots_read"].at[slot_stage])
        first_slot, padded_slots = panel * self.width, self.panels * self.width
        a *= self.spec.scale * LOG2E
        a = hide_slots(a, first_slot, padded_slots, self._slot_access(), self.spec)
        new_maximum = jnp.maximum(maximum, a.max(axis=1))
        shrink = jnp.exp2(maximum - new_maximum)
        shared["shrink"].at[me, panel][...] = shrink
        p = jnp.exp2(a - by_row(new_maximum, self.width))
        denominator = denominator * shrink + p.sum(axis=1)
        to_start = (p * self._start_decay(stage)).astype(jnp.bfloat16)
        shared["weights_to_start"].at[me, panel][...] = to_start
        to_reference = (p * self._row_decay(stage)).astype(jnp.bfloat16)
        total = gather(to_reference, self._token_decays, self.matmul, total * by_row(shrink, CHUNK))
        plgpu.commit_smem()  # of the sums, before log decays take their place
        plgpu.barrier_arrive(shared["decay_read"].at[stage])
        return Softmax(total, new_maximum, denominator)

    def _build_decays(self, stage) -> None:
        """Finds c, its references and the token decays of the panel in a stage."""
        shared, token_decays = self.shared, self.shared["token_decays"]
        cumulative_ref = shared["cumulative"].at[stage]
        nothing = self.index.first_row < self.spec.ahead  # no tokens enter yet
        pl.when(nothing)(lambda: store_zeros(cumulative_ref))
        log_decay = plgpu.load(cumulative_ref, layout=LOGITS)
        parts = lambda i: token_decays.at[i]  # noqa: E731
        store_parts(jnp.maximum(log_decay, FLOOR) * LOG2E, parts)  # where the token decays will be
        plgpu.commit_smem()
        cumulative = sum_rows(lambda: shared["up_to_row"], parts, self.matmul)
        write = write_of(plgpu.load(cumulative_ref, layout=LOGITS))
        cumulative_ref[...] = cumulative  # where log_decay was
        references = self._references(stage)
        store_references(cumulative, references)
        for block in range(GATE_BLOCKS):
            token_decays.at[block][...] = token_decay(write, cumulative, references(block))
        plgpu.commit_smem()

    def _products(self, stage, scores: jax.Array, with_slots: Operands) -> jax.Array:
        """[C, slots], the queries times a panel's keys as they are after each row's token.

        scores: the queries times the keys of the chunk's tokens. with_slots: the queries, and the
        slots' keys at the chunk's start.
        """
        products = spread(scores, self._token_decays, self.width, self.matmul)
        products *= self._row_decay(stage)
        of_start = self.matmul(with_slots, (CHUNK, self.width))
        return products + of_start * self._start_decay(stage)

    def _add_panel_values(self, panel, total: jax.Array) -> jax.Array:
        shared, me = self.shared, self.me
        stage = self._slot_stage(self.panels + panel)
        shrink = plgpu.load(shared["shrink"].at[me, panel], layout=ROW)
        plgpu.barrier_wait(shared["slots_loaded"].at[stage])
        total = self.matmul(
            lambda: [(shared["weights_to_start"].at[me, panel], shared["slots"].at[stage].T)],
            (CHUNK, self.D),
            total * by_row(shrink, self.D),
        )
        plgpu.barrier_arrive(shared["slots_read"].at[stage])
        return total

    def _slot_stage(self, item):
        """item: a panel of keys, or of values, which follow the keys'."""
        return lax.rem(item, jnp.int32(self.shared["slots"].shape[0]))

    def _references(self, stage):
        slots = pl.ds(stage * self.width, self.width)
        return lambda block: self.shared["references"].at[block, slots]

    def _token_decays(self, block: int):
        return self.shared["token_decays"].at[self.zero.value + block]

    def _row_decay(self, stage) -> jax.Array:
        cumulative = plgpu.load(self.shared["cumulative"].at[stage], layout=LOGITS)
        return jnp.exp2(cumulative - own_reference(self._references(stage), self.width))

    def _start_decay(self, stage) -> jax.Array:
        cumulative = plgpu.load(self.shared["cumulative"].at[stage], layout=LOGITS)
        return start_decay(cumulative, self._slot_access())

    def _slot_access(self) -> Any | None:
        return self.shared["slot_access"] if self.spec.masked else None

    def _entered(self) -> jax.Array:
        """[C, C], the first block's tokens that are in the row's slots."""
        mask = entered(self.index)
        return mask & self._same_segment(0) if self.spec.masked else mask

    # The window

    def _read_block(self, block, softmax: Softmax) -> Softmax:
        """One more block of the window's tokens."""
        total, maximum, denominator = softmax
        shared = self.shared
        stage = lax.rem(block, jnp.int32(shared["value"].shape[0]))
        plgpu.barrier_wait(shared["window_key_loaded"].at[stage])
        mask = sees(self.spec, self.index, block)
        if self.spec.masked:
            mask &= self._same_segment(1 + stage)
        b = self.matmul(
            lambda: [(shared["window_query"].at[self.me], shared["window_key"].at[stage].T)],
            (CHUNK, CHUNK),
        )
        b = jnp.where(mask, b * (self.spec.scale * LOG2E), -jnp.inf)
        if self.spec.masked:
            plgpu.commit_smem()  # of what was read, before a copy takes its place
        plgpu.barrier_arrive(shared["window_key_read"].at[stage])
        new_maximum = jnp.maximum(maximum, b.max(axis=1))
        shrink = jnp.exp2(maximum - new_maximum)
        p = jnp.exp2(b - by_row(new_maximum, CHUNK))
        denominator = denominator * shrink + p.sum(axis=1)
        if self.spec.slots:  # the first block is here already
            pl.when(block > 0)(lambda: plgpu.barrier_wait(shared["value_loaded"].at[stage]))
        else:
            plgpu.barrier_wait(shared["value_loaded"].at[stage])
        total = self.matmul(
            lambda: [(p.astype(jnp.bfloat16), shared["value"].at[stage])],
            (CHUNK, self.D),
            total * by_row(shrink, self.D),
        )
        plgpu.barrier_arrive(shared["value_read"].at[stage])
        return Softmax(total, new_maximum, denominator)

    def _same_segment(self, stage) -> jax.Array:
        """[C, C]; the first stage is of the slots' tokens, the window's follow."""
        return same_segment(self.shared["query_segment"], self.shared["token_segment"].at[stage])

    def _store(self, softmax: Softmax, of_slots: jax.Array) -> None:
        """Writes the results; the output passes through the query's place in shared memory.

        of_slots: the slots' part of the denominator.
        """
        shared, refs, index, me = self.shared, self.refs, self.index, self.me
        total, maximum, denominator = softmax
        safe = jnp.where(denominator > 0.0, denominator, 1.0)  # padding has none
        buffer = shared["window_query"].at[me]
        buffer[...] = (total / by_row(safe, self.D)).astype(jnp.bfloat16)
        shared["lse"].at[me][...] = (maximum + jnp.log(safe) * LOG2E) / LOG2E
        shared["slot_weight"].at[me][...] = of_slots / safe
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
    """Makes the compute warpgroups wait for each other."""
    plgpu.barrier_arrive(barrier)
    plgpu.barrier_wait(barrier)
