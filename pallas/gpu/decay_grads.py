"""The warpgroup of `slot_tokens` that finds the decays' gradients inside the chunk."""

import math

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas.gpu.gates import FLOOR
from pallas.gpu.in_chunk import gate_block
from pallas.gpu.row_sums import store_zeros
from pallas.gpu.slot_worker import SIDES, Worker
from pallas.gpu.spec import CHUNK, GATE_BLOCKS, GATE_ROWS, LOGITS

FLOOR_ODDS = 1 / math.expm1(-FLOOR)  # e / s; at less, nothing inside a chunk goes by the decay


class DecayGrads(Worker):
    """Finds the first line of dg: R is summed in shared memory, sY in registers, of which R would
    be too much, and adds the second, which `TokenGrads` leaves.
    """

    FALLS = (2, 3)

    def run(self) -> None:
        shared, group = self.shared, self.spec.group
        self.build_falls()
        sums = plgpu.layout_cast(jnp.zeros(self.gates_shape, jnp.float32), LOGITS)
        shared["row_sums"][...] = sums
        for side in range(len(SIDES)):
            plgpu.barrier_wait(shared["side_loaded"])
            self.forget_addresses()
            sums = lax.fori_loop(side * group, (side + 1) * group, self._head, sums)
            plgpu.commit_smem()
            plgpu.barrier_arrive(shared["side_read"])
        self._store(sums)

    def _head(self, item, sums: jax.Array) -> jax.Array:
        """sY with one more head, and R, in its place."""
        stage = self.wait_for_head(item)
        self._add_rows(stage)
        sums = self._of_tokens(stage, sums)
        self.leave_head(stage)
        return sums

    def _add_rows(self, stage) -> None:
        """R. A row's block is that of its warp: of the four products each warp's rows need one."""
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
                    yield rows, shared["falls"].at[self.zero + block, of_tokens]

        spread = self.matmul(lambda: list(operands()), self.gates_shape)
        self.add("row_sums", spread * self.wide(shared["rise"].at[stage]))
        carried = self.matmul(
            lambda: [(shared["rows"].at[stage], self.operand("slots"))], self.gates_shape
        )
        self.add("row_sums", carried * self.wide(shared["start"].at[stage]))

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
            lambda: [(scores, self.shared["rise"].at[stage, rows])], self.gates_shape
        )
        return pulled * self.wide(self.shared["falls"].at[self.zero + block])

    def _store(self, of_tokens: jax.Array) -> None:
        shared = self.shared
        self.forget_addresses()
        plgpu.barrier_wait(shared["ends_ready"])  # and the other is done with `sum_rows`
        inside = plgpu.load(shared["row_sums"], layout=LOGITS) - of_tokens
        inside += self.sum_rows(inside, parts=3, earlier=False)
        odds = self.wide(shared["odds"])
        inside = jnp.where(odds > FLOOR_ODDS, inside - odds * of_tokens, 0.0)
        shared["cumulative"][...] = inside + plgpu.load(shared["cumulative"], layout=LOGITS)
        first = self.first - self.spec.ahead
        pl.when(first < 0)(lambda: store_zeros(shared["cumulative"]))
        plgpu.commit_smem()
        # What is of no token takes the place of the last tokens', which never enter.
        first += jnp.where(first < 0, self.refs["decay_grad"].shape[1], 0)
        rows = pl.ds(first, CHUNK)
        target = self.refs["decay_grad"].at[self.b, rows, self.h, self.columns]
        plgpu.copy_smem_to_gmem(shared["cumulative"], target)
        plgpu.wait_smem_to_gmem(0)
