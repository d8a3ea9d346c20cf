"""The warpgroup of `slot_tokens` that finds the tokens' gradients, and fetches for both."""

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas.gpu.in_chunk import iota
from pallas.gpu.slot_worker import SIDES, Worker
from pallas.gpu.spec import CHUNK, COLUMN, GATE_BLOCKS, GATE_ROWS, LOGITS


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
        self.operand("triangle")[...] = earlier.astype(jnp.bfloat16)
        shared["zero"][...] = plgpu.layout_cast(
            jnp.zeros(shared["zero"].shape, jnp.int32), plgpu.Layout.WG_STRIDED((128,), 1)
        )
        self.build_falls()
        for side, name in enumerate(SIDES):
            plgpu.barrier_wait(shared["side_loaded"])
            self.forget_addresses()
            self._to_end(side)
            grad = self.matmul(
                lambda: [(self.operand("to_end"), self.operand("slot_grads").T)],
                (CHUNK, self.D),
            )
            grad = lax.fori_loop(side * group, (side + 1) * group, self._head, grad)
            plgpu.barrier_wait(shared["side_read"])
            self.forget_addresses()
            self.operand("tokens")[...] = grad.astype(jnp.bfloat16)  # in their place
            plgpu.commit_smem()
            target = self.refs[name + "_grad"].at[self.panel, self.b, self.own, self.h]
            plgpu.copy_smem_to_gmem(self.operand("tokens"), target)
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
            lambda: [(self.operand("tokens"), self.operand("slot_grads"))],
            self.gates_shape,
        )
        ending *= self.wide(self.operand("to_end"))
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
        stage = self.wait_for_head(item)
        for block in range(GATE_BLOCKS):
            grad = self._of_block(block, stage, grad)
        self.leave_head(stage)
        plgpu.barrier_wait(self.shared["head_read"].at[stage])
        more = item + self.stages < len(SIDES) * self.spec.group
        pl.when(more)(lambda: self._load_head(item + self.stages, stage))
        return grad

    def _of_block(self, block: int, stage, grad: jax.Array) -> jax.Array:
        """dx with the rows of one more gate block."""
        shared, rows = self.shared, pl.ds(block * GATE_ROWS, GATE_ROWS)
        gathered = self.matmul(
            lambda: [(shared["falls"].at[self.zero + block], shared["rise"].at[stage, rows].T)],
            (CHUNK, GATE_ROWS),
        )
        gathered = jnp.where(self.entered(block, turned=True), gathered, 0.0)
        gathered = gathered.astype(jnp.bfloat16)
        return self.matmul(
            lambda: [(gathered, shared["rows"].at[stage, rows])], (CHUNK, self.D), grad
        )

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
        plgpu.copy_gmem_to_smem(tokens, self.operand("tokens"), loaded)
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
