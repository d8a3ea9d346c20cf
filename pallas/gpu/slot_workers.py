"""The two warpgroups of `slot_tokens`, whose docstring has the formulas.

X^T and L^T are computed, with tokens for rows: the 16 rows of a gate block are then columns, and
its products have 16 columns or contract 16, not the whole chunk with zeros. A contraction may be
as short as a tile of shared memory is wide, so all operands lie 16 columns to a tile.
"""

import math

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas.gpu.gates import FLOOR
from pallas.gpu.in_chunk import MAX_EXPONENT, gate_block, iota
from pallas.gpu.matmul import Matmul
from pallas.gpu.spec import CHUNK, COLUMN, GATE_BLOCKS, GATE_ROWS, LOGITS, ROW, Spec

SIDES = ("key", "value")
LEAST_WRITE = 2.0**-60  # stands for s = 0
FLOOR_ODDS = 1 / math.expm1(-FLOOR)  # e / s; at less, nothing inside a chunk goes by the decay


class Worker:
    """A warpgroup at some slots of a chunk and KV head."""

    FALLS: tuple[int, ...]  # the gate blocks whose falls it builds

    def __init__(self, refs: dict, shared: dict, spec: Spec, matmul: Matmul):
        self.refs, self.shared, self.spec, self.matmul = refs, shared, spec, matmul
        self.stages, _, self.D = shared["rows"].shape
        self.width = shared["rise"].shape[2]
        self.b, self.chunk = lax.axis_index("batch"), lax.axis_index("chunk")
        panels = jnp.int32(refs["cumulative"].shape[3] // self.width)
        self.panel = lax.rem(lax.axis_index("panel"), panels)
        self.h = lax.div(lax.axis_index("panel"), panels)
        self.first = self.chunk * CHUNK
        self.own = pl.ds(self.first, CHUNK)
        self.columns = pl.ds(self.panel * self.width, self.width)
        self.gates_shape = CHUNK, self.width
        self.zero: int | jax.Array = 0

    def forget_addresses(self) -> None:
        """Reads a 0 that is not known when compiling.

        Else the compiler keeps the many addresses of the products' operands from one use to the
        next, in registers that others need.
        """
        self.zero = self.shared["zero"][0]

    def build_falls(self) -> None:
        shared = self.shared
        plgpu.barrier_wait(shared["gates_loaded"])
        G = plgpu.load(shared["cumulative"], layout=LOGITS)
        write = jnp.maximum(self.wide(shared["part"].at[self.zero]), LEAST_WRITE)
        for block in self.FALLS:
            reference = plgpu.load(shared["references"].at[block], layout=COLUMN)
            exponent = self.in_rows(reference) - G
            fall = write * jnp.exp2(jnp.minimum(exponent, MAX_EXPONENT))
            shared["falls"].at[self.zero + block][...] = fall.astype(jnp.bfloat16)
        plgpu.commit_smem()
        plgpu.barrier_arrive(shared["falls_ready"])
        plgpu.barrier_wait(shared["falls_ready"])

    def wait_for_head(self, item):
        """The stage of a head's rows; items are the heads of the first side, then of the second."""
        stage = lax.rem(item, jnp.int32(self.stages))
        plgpu.barrier_wait(self.shared["head_loaded"].at[stage])
        self.forget_addresses()
        return stage + self.zero

    def leave_head(self, stage) -> None:
        plgpu.commit_smem()
        plgpu.barrier_arrive(self.shared["head_read"].at[stage])

    def entered(self, block: int, *, turned: bool) -> jax.Array:
        """[C, 16], which of a gate block's tokens are in a row's slots.

        turned: of tokens and a gate block's rows.
        """
        ahead = iota(GATE_ROWS, 0) - iota(GATE_ROWS, 1)
        first = block * GATE_ROWS
        entered = ahead <= first if turned else ahead >= first
        if self.spec.masked:
            names = ("visible", "query_run") if turned else ("query_run", "visible")
            of_rows = plgpu.load(self.shared[names[0]], layout=ROW)
            of_columns = self.shared[names[1]].at[pl.ds(first, GATE_ROWS)]
            of_columns = plgpu.load(of_columns, layout=COLUMN)
            shape = CHUNK, GATE_ROWS
            of_rows = lax.broadcast_in_dim(of_rows, shape, [0])
            entered &= of_rows == lax.broadcast_in_dim(of_columns, shape, [1])
        return entered

    def masked_blocks(self, scores: jax.Array, *, turned: bool) -> list[jax.Array]:
        """[C, C] in four of [C, 16] bfloat16, zeros where nothing entered."""
        blocks = []
        for block in range(GATE_BLOCKS):
            first = block * GATE_ROWS
            columns = lax.slice(scores, (0, first), (CHUNK, first + GATE_ROWS))
            columns = jnp.where(self.entered(block, turned=turned), columns, 0.0)
            blocks.append(columns.astype(jnp.bfloat16))
        return blocks

    def sum_rows(self, x: jax.Array, *, parts: int, earlier: bool) -> jax.Array:
        """[C, slots]: for each row the sum over the earlier rows, or over the later.

        parts: bfloat16 numbers that make up one of x.
        """
        shared, total = self.shared, None
        for _ in range(parts):
            part = x.astype(jnp.bfloat16)
            x = x - part.astype(jnp.float32)
            plgpu.commit_smem()  # all have multiplied the part before
            shared["part"].at[self.zero][...] = part
            plgpu.commit_smem()
            total = self.matmul(
                lambda: [
                    (
                        shared["triangle"].at[self.zero]
                        if earlier
                        else shared["triangle"].at[self.zero].T,
                        shared["part"].at[self.zero],
                    )
                ],
                self.gates_shape,
                total,
            )
        return total

    def add(self, name: str, x: jax.Array) -> None:
        """In shared memory, for registers are short."""
        self.shared[name][...] = plgpu.load(self.shared[name], layout=LOGITS) + x

    def wide(self, ref) -> jax.Array:
        return plgpu.load(ref, layout=LOGITS).astype(jnp.float32)

    def in_rows(self, x: jax.Array) -> jax.Array:
        return lax.broadcast_in_dim(x, self.gates_shape, [1])


class TokenGrads(Worker):
    """Fetches what both read; finds dx, and what of dg goes by way of the chunk's end."""

    FALLS = (0, 1)

    def run(self) -> None:
        shared, group = self.shared, self.spec.group
        self._load_gates()
        self._load_side(0)
        for item in range(self.stages):
            self._load_head(jnp.int32(item), item)
        earlier = jnp.where(iota(CHUNK, 1) < iota(CHUNK, 0), 1.0, 0.0)
        shared["triangle"].at[self.zero][...] = earlier.astype(jnp.bfloat16)
        shared["zero"][...] = plgpu.layout_cast(
            jnp.zeros(shared["zero"].shape, jnp.int32), plgpu.Layout.WG_STRIDED((128,), 1)
        )
        self.build_falls()
        for side, name in enumerate(SIDES):
            plgpu.barrier_wait(shared["side_loaded"])
            self.forget_addresses()
            self._to_end(side)
            grad = self.matmul(
                lambda: [(shared["to_end"].at[self.zero], shared["slot_grads"].at[self.zero].T)],
                (CHUNK, self.D),
            )
            grad = lax.fori_loop(side * group, (side + 1) * group, self._head, grad)
            plgpu.barrier_wait(shared["side_read"])
            self.forget_addresses()
            shared["tokens"].at[self.zero][...] = grad.astype(jnp.bfloat16)  # in their place
            plgpu.commit_smem()
            target = self.refs[name + "_grad"].at[self.panel, self.b, self.own, self.h]
            plgpu.copy_smem_to_gmem(shared["tokens"].at[self.zero], target)
            plgpu.wait_smem_to_gmem(0, wait_read_only=True)
            if side + 1 < len(SIDES):
                self._load_side(side + 1)
        plgpu.wait_smem_to_gmem(0)

    def _to_end(self, side: int) -> None:
        """What goes by way of the slots at the chunk's end, by one side; in the place of G."""
        shared = self.shared
        through = jnp.zeros(self.width, jnp.float32)
        for first in range(0, self.D, CHUNK):
            features = pl.ds(first, CHUNK)
            slots, grads = (
                self.wide(shared[x].at[self.zero, features]) for x in ("slots", "slot_grads")
            )
            through += (slots * grads).sum(axis=0)
        through *= plgpu.load(shared["total"], layout=COLUMN)
        ending = self.matmul(
            lambda: [(shared["tokens"].at[self.zero], shared["slot_grads"].at[self.zero])],
            self.gates_shape,
        )
        ending *= self.wide(shared["to_end"].at[self.zero])
        grad = self.in_rows(through) - ending * self.wide(shared["odds"])
        if side:
            grad += plgpu.load(shared["cumulative"], layout=LOGITS)
        shared["cumulative"][...] = grad
        self.add("cumulative", self.sum_rows(ending, parts=2, earlier=True))
        if side:
            plgpu.commit_smem()
            plgpu.barrier_arrive(shared["ends_ready"])

    def _head(self, item, grad: jax.Array) -> jax.Array:
        """dx with one more head."""
        shared, stage = self.shared, self.wait_for_head(item)
        for block in range(GATE_BLOCKS):
            rows = pl.ds(block * GATE_ROWS, GATE_ROWS)
            gathered = self.matmul(
                lambda block=block, rows=rows: [
                    (shared["falls"].at[self.zero + block], shared["rise"].at[stage, rows].T)
                ],
                (CHUNK, GATE_ROWS),
            )
            gathered = jnp.where(self.entered(block, turned=True), gathered, 0.0)
            gathered = gathered.astype(jnp.bfloat16)
            grad = self.matmul(
                lambda x=gathered, rows=rows: [(x, shared["rows"].at[stage, rows])],
                (CHUNK, self.D),
                grad,
            )
        self.leave_head(stage)
        plgpu.barrier_wait(shared["head_read"].at[stage])
        more = item + self.stages < len(SIDES) * self.spec.group
        pl.when(more)(lambda: self._load_head(item + self.stages, stage))
        return grad

    def _load_gates(self) -> None:
        refs, shared, b, h = self.refs, self.shared, self.b, self.h
        loaded = shared["gates_loaded"]
        targets = {
            "cumulative": shared["cumulative"],
            "write": shared["part"].at[0],
            "to_end": shared["to_end"].at[0],
            "odds": shared["odds"],
        }
        for name, target in targets.items():
            gate = refs[name].at[b, self.own, h, self.columns]
            plgpu.copy_gmem_to_smem(gate, target, loaded)
        total = refs["total"].at[b, h, self.chunk, self.columns]
        plgpu.copy_gmem_to_smem(total, shared["total"], loaded)
        for block in range(GATE_BLOCKS):
            middle = self.first + block * GATE_ROWS + GATE_ROWS // 2 - 1
            reference = refs["cumulative"].at[b, middle, h, self.columns]
            plgpu.copy_gmem_to_smem(reference, shared["references"].at[block], loaded)
        if self.spec.masked:
            plgpu.copy_gmem_to_smem(refs["query_run"].at[b, self.own], shared["query_run"], loaded)
            visible = refs["visible"].at[b, self._token_rows()]
            plgpu.copy_gmem_to_smem(visible, shared["visible"], loaded)

    def _load_side(self, side: int) -> None:
        refs, shared, name, loaded = self.refs, self.shared, SIDES[side], self.shared["side_loaded"]
        tokens = refs[name].at[self.b, self._token_rows(), self.h]
        plgpu.copy_gmem_to_smem(tokens, shared["tokens"].at[self.zero], loaded)
        for source, target in (("start_", "slots"), ("end_", "slot_grads")):
            features = pl.ds(0, self.D)
            states = refs[source + name].at[self.b, self.h, self.chunk, features, self.columns]
            plgpu.copy_gmem_to_smem(states, shared[target].at[0], loaded)

    def _token_rows(self):
        return pl.ds(jnp.maximum(self.first - self.spec.ahead, 0), CHUNK)

    def _load_head(self, item, stage) -> None:
        shared, group = self.shared, jnp.int32(self.spec.group)
        head = self.h * group + lax.rem(item, group)

        def load(rows, rise, start):
            loaded = shared["head_loaded"].at[stage]
            source = self.refs[rows].at[self.b, self.own, head]
            plgpu.copy_gmem_to_smem(source, shared["rows"].at[stage], loaded)
            for name, target in ((rise, "rise"), (start, "start")):
                source = self.refs[name].at[self.b, self.own, head, self.columns]
                plgpu.copy_gmem_to_smem(source, shared[target].at[stage], loaded)

        pl.when(item < group)(lambda: load("query", "logits_rise", "logits_start"))
        pl.when(item >= group)(lambda: load("out_grad", "weights_rise", "weights_start"))


class DecayGrads(Worker):
    """Finds the rest of dg, inside the chunk."""

    FALLS = (2, 3)

    def run(self) -> None:
        shared, group = self.shared, self.spec.group
        self.build_falls()
        zeros = plgpu.layout_cast(jnp.zeros(self.gates_shape, jnp.float32), LOGITS)
        shared["row_sums"][...] = zeros
        sums = zeros
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
        shared = self.shared
        scores = self.matmul(
            lambda: [(shared["rows"].at[stage], shared["tokens"].at[self.zero].T)], (CHUNK, CHUNK)
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
            lambda: [(shared["rows"].at[stage], shared["slots"].at[self.zero])], self.gates_shape
        )
        self.add("row_sums", carried * self.wide(shared["start"].at[stage]))

    def _of_tokens(self, stage, sums: jax.Array) -> jax.Array:
        shared = self.shared
        scores = self.matmul(
            lambda: [(shared["tokens"].at[self.zero], shared["rows"].at[stage].T)], (CHUNK, CHUNK)
        )
        for block, columns in enumerate(self.masked_blocks(scores, turned=True)):
            rows = pl.ds(block * GATE_ROWS, GATE_ROWS)
            product = self.matmul(
                lambda x=columns, rows=rows: [(x, shared["rise"].at[stage, rows])],
                self.gates_shape,
            )
            sums += product * self.wide(shared["falls"].at[self.zero + block])
        return sums

    def _store(self, of_tokens: jax.Array) -> None:
        shared = self.shared
        self.forget_addresses()
        plgpu.barrier_wait(shared["ends_ready"])  # and the other is done with `sum_rows`
        inside = plgpu.load(shared["row_sums"], layout=LOGITS) - of_tokens
        inside += self.sum_rows(inside, parts=3, earlier=False)
        odds = self.wide(shared["odds"])
        inside = jnp.where(odds > FLOOR_ODDS, inside - odds * of_tokens, 0.0)
        shared["cumulative"][...] = inside + plgpu.load(shared["cumulative"], layout=LOGITS)
        plgpu.commit_smem()
        target = self.refs["decay_grad"].at[self.b, self.own, self.h, self.columns]
        plgpu.copy_smem_to_gmem(shared["cumulative"], target)
        plgpu.wait_smem_to_gmem(0)
