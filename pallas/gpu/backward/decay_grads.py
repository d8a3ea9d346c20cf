"""The warpgroup of `slot_token_gradients` that finds the decays' gradients inside the chunk."""

import math

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas.gpu.backward.slot_worker import SIDES, Worker
from pallas.gpu.spec import CHUNK, COLUMN, GATE_BLOCKS, GATE_ROWS, LOGITS
from pallas.gpu.warpgroup.decays import FLOOR, gate_block, own_reference, start_decay
from pallas.gpu.warpgroup.masks import by_column, iota
from pallas.gpu.warpgroup.row_sums import store_zeros, sum_rows_by_parts

FLOOR_ODDS = 1 / math.expm1(-FLOOR)  # e / s; at less, nothing inside a chunk goes by the decay


class DecayGrads(Worker):
    """Finds the decays' gradients: row_sum is summed in shared memory, sY in registers, which have
    no room for both. Adds the part by way of the chunk's end, whose products `TokenGrads` leaves.
    """

    TOKEN_DECAY_BLOCKS = (2, 3)

    def run(self) -> None:
        shared = self.shared
        self.build_token_decays()
        sums = plgpu.layout_cast(jnp.zeros(self.gates_shape, jnp.float32), LOGITS)
        shared["row_sums"][...] = sums
        for side in range(len(SIDES)):
            plgpu.barrier_wait(shared["side_loaded"])
            self.zero.renew()
            sums = self.over_heads(side, self._head, sums)
            if self.added[side]:
                self.leave(self.wait_for(self.first_item(side) + self.spec.group))
            plgpu.commit_smem()
            plgpu.barrier_arrive(shared["side_read"])
        self._store(sums)

    def _head(self, item, sums: jax.Array) -> jax.Array:
        """sY with one more head, and row_sum, in its place."""
        stage = self.wait_for(item)
        self._add_rows(stage)
        sums = self._of_tokens(stage, sums)
        self.leave(stage)
        return sums

    def _add_rows(self, stage) -> None:
        """Adds to row_sum. A gate block's rows are a warp's, which needs one of four products."""
        shared = self.shared
        scores = self.matmul(
            lambda: [(shared["rows"].at[stage], self.operand("tokens").T)], (CHUNK, CHUNK)
        )
        blocks = self.masked_blocks(scores, turned=False)

        def operands():
            for block in range(GATE_BLOCKS):
                mine = gate_block(GATE_ROWS) == block
                for tokens in range(block + 1):
                    rows = jnp.where(mine, blocks[tokens], jnp.bfloat16(0))
                    of_tokens = pl.ds(tokens * GATE_ROWS, GATE_ROWS)
                    yield rows, shared["token_decays"].at[self.zero.value + block, of_tokens]

        spread = self.matmul(lambda: list(operands()), self.gates_shape)
        spread *= self.wide(shared["row_weights"].at[stage])
        shared["row_sums"][...] = self._load("row_sums") + spread
        of_start = self.matmul(
            lambda: [(shared["rows"].at[stage], self.operand("slots"))], self.gates_shape
        )
        of_start *= self._from_start() * self.wide(shared["row_weights"].at[stage])
        shared["row_sums"][...] = self._load("row_sums") + of_start

    def _from_start(self) -> jax.Array:
        """exp(c_ref) of the row's block, in the rows that read the slots at the chunk's start."""
        reference = own_reference(lambda x: self.reference(self.zero.value + x), self.width)
        slot_access = self.shared["slot_access"] if self.spec.masked else None
        return start_decay(reference, slot_access)

    def _of_tokens(self, stage, sums: jax.Array) -> jax.Array:
        shared = self.shared
        scores = self.matmul(
            lambda: [(self.operand("tokens"), shared["rows"].at[stage].T)], (CHUNK, CHUNK)
        )
        for block, columns in enumerate(self.masked_blocks(scores, turned=True)):
            sums += self._of_block(block, stage, columns)
        return sums

    def _of_block(self, block: int, stage, scores: jax.Array) -> jax.Array:
        rows = pl.ds(block * GATE_ROWS, GATE_ROWS)
        pulled = self.matmul(
            lambda: [(scores, self.shared["row_weights"].at[stage, rows])], self.gates_shape
        )
        return pulled * self.wide(self.shared["token_decays"].at[self.zero.value + block])

    def _store(self, of_tokens: jax.Array) -> None:
        """dg: its sums in the place of row_sum and of wS E, for registers are short."""
        shared, odds = self.shared, lambda: self.wide(shared["odds"])
        self.zero.renew()
        plgpu.barrier_wait(shared["ends_ready"])  # and the other needs no more of the slots
        shared["row_sums"][...] = self._load("row_sums") - of_tokens
        d_total = plgpu.load(shared["d_total"], layout=COLUMN)
        d_total *= plgpu.load(shared["total"], layout=COLUMN)
        d_log_to_end = self._load("cumulative")
        inside = jnp.where(odds() > FLOOR_ODDS, of_tokens, 0.0)
        shared["cumulative"][...] = by_column(d_total) - odds() * (inside + d_log_to_end)
        later = self._sum_rows(d_log_to_end, parts=2, earlier=True)
        shared["cumulative"][...] = self._load("cumulative") + later
        inside = self._sum_rows(self._load("row_sums"), parts=3, earlier=False)
        inside = jnp.where(odds() > FLOOR_ODDS, inside + self._load("row_sums"), 0.0)
        shared["cumulative"][...] = self._load("cumulative") + inside
        pl.when(self.index.first_row < self.spec.ahead)(lambda: store_zeros(shared["cumulative"]))
        plgpu.commit_smem()
        where = self.index.batch, self.index.written, self.index.head, self.index.slots
        target = self.refs["d_log_decay"].at[*where]
        plgpu.copy_smem_to_gmem(shared["cumulative"], target)
        plgpu.wait_smem_to_gmem(0)

    def _load(self, name: str) -> jax.Array:
        return plgpu.load(self.shared[name], layout=LOGITS)

    def _sum_rows(self, x: jax.Array, *, parts: int, earlier: bool) -> jax.Array:
        """[C, slots]: for each row the sum over the earlier rows, or over the later.

        parts: bfloat16 numbers that make up one of x. They lie in the slots' place.
        """
        row, other = iota(CHUNK, 0), iota(CHUNK, 1)
        place = self.zero.value, pl.ds(0, CHUNK)
        return sum_rows_by_parts(
            other < row if earlier else other > row,
            x,
            parts,
            lambda: self.shared["slots"].at[place],
            self.matmul,
        )
