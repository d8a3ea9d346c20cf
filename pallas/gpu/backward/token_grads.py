"""The warpgroup of `slot_token_gradients.py` that fetches, and finds the tokens' gradients."""

import functools

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas.gpu.backward.slot_worker import SIDES, Worker
from pallas.gpu.spec import CHUNK, COLUMN, GATE_BLOCKS, GATE_ROWS, LOGITS
from pallas.gpu.warpgroup.decays import fetch_references
from pallas.gpu.warpgroup.masks import iota


class TokenGrads(Worker):
    """Fetches what both read; finds dx, and the products of dg by way of the chunk's end."""

    TOKEN_DECAY_BLOCKS = (0, 1)

    def run(self) -> None:
        shared = self.shared
        self._load_gates()
        self._load_states(0)
        self._load_tokens(0)
        for item in range(self.stages):
            self._load_item(jnp.int32(item), item)
        self.zero.store()
        self.build_token_decays()
        for side, name in enumerate(SIDES):
            plgpu.barrier_wait(shared["side_loaded"])
            self.zero.renew()
            self._to_end(side)
            grad = self.matmul(
                lambda: [(self.operand("to_end"), self.operand("d_slots").T)],
                (CHUNK, self.D),
            )
            grad = self.over_heads(side, self._head, grad)
            if self.spec.ahead:  # nothing ahead of the tokens has a gradient
                is_token = iota(self.D, 0) + self.index.first_row >= self.spec.ahead
                grad = jnp.where(is_token, grad, 0.0)
            if self.added[side]:
                grad = self._add(self.first_item(side) + self.spec.group, grad)
            plgpu.barrier_wait(shared["side_read"])
            self.zero.renew()
            more = side + 1 < len(SIDES)
            if more:
                self._load_states(side + 1)
            self.operand("tokens")[...] = grad.astype(jnp.bfloat16)  # in their place
            plgpu.commit_smem()
            plgpu.copy_smem_to_gmem(self.operand("tokens"), self._grad(name))
            plgpu.wait_smem_to_gmem(0, wait_read_only=True)
            if more:
                self._load_tokens(side + 1)
        plgpu.wait_smem_to_gmem(0)

    def _to_end(self, side: int) -> None:
        """S0 . dS and wS E with one more side, in the place of c the latter."""
        shared = self.shared

        def add_features(block, products):
            place = self.zero.value, pl.ds(block * CHUNK, CHUNK)
            slots, grads = (self.wide(shared[x].at[place]) for x in ("slots", "d_slots"))
            return products + slots * grads

        products = plgpu.layout_cast(jnp.zeros(self.gates_shape, jnp.float32), LOGITS)
        products = lax.fori_loop(0, self.D // CHUNK, add_features, products)
        d_total = products.sum(axis=0)
        d_log_to_end = self.matmul(
            lambda: [(self.operand("tokens"), self.operand("d_slots"))],
            self.gates_shape,
        )
        d_log_to_end *= self.wide(self.operand("to_end"))
        if side:
            d_total += plgpu.load(shared["d_total"], layout=COLUMN)
            d_log_to_end += plgpu.load(shared["cumulative"], layout=LOGITS)
        shared["d_total"][...] = d_total
        shared["cumulative"][...] = d_log_to_end
        if side:
            plgpu.commit_smem()
            plgpu.barrier_arrive(shared["ends_ready"])

    def _head(self, item, grad: jax.Array) -> jax.Array:
        """dx with one more head."""
        stage = self.wait_for(item)
        for block in range(GATE_BLOCKS):
            grad = self._of_block(block, stage, grad)
        self._leave(item, stage)
        return grad

    def _add(self, item, grad: jax.Array) -> jax.Array:
        """dx with what it is added to: by a product with 1, for which nothing more is held."""
        stage = self.wait_for(item)
        one = jnp.where(iota(CHUNK, 0) == iota(CHUNK, 1), 1.0, 0.0).astype(jnp.bfloat16)
        grad = self.matmul(lambda: [(one, self.shared["rows"].at[stage])], (CHUNK, self.D), grad)
        self._leave(item, stage)
        return grad

    def _leave(self, item, stage) -> None:
        """And fetch what takes its place."""
        self.leave(stage)
        plgpu.barrier_wait(self.shared["item_read"].at[stage])
        more = item + self.stages < self.first_item(len(SIDES))
        pl.when(more)(lambda: self._load_item(item + self.stages, stage))

    def _of_block(self, block: int, stage, grad: jax.Array) -> jax.Array:
        """dx with the rows of one more gate block."""
        shared, rows = self.shared, pl.ds(block * GATE_ROWS, GATE_ROWS)
        gathered = self.matmul(
            lambda: [
                (
                    shared["token_decays"].at[self.zero.value + block],
                    shared["row_weights"].at[stage, rows].T,
                )
            ],
            (CHUNK, GATE_ROWS),
        )
        gathered = jnp.where(self.entered(block, turned=True), gathered, 0.0)
        gathered = gathered.astype(jnp.bfloat16)
        return self.matmul(
            lambda: [(gathered, shared["rows"].at[stage, rows])], (CHUNK, self.D), grad
        )

    def _load_gates(self) -> None:
        refs, shared, b, h = self.refs, self.shared, self.index.batch, self.index.head
        loaded = shared["gates_loaded"]
        targets = {
            "cumulative": shared["cumulative"],
            "to_end": shared["to_end"].at[0],
            "odds": shared["odds"],
        }
        for name, target in targets.items():
            gate = refs[name].at[b, self.index.rows, h, self.index.slots]
            plgpu.copy_gmem_to_smem(gate, target, loaded)
        total = refs["total"].at[b, h, self.index.chunk, self.index.slots]
        plgpu.copy_gmem_to_smem(total, shared["total"], loaded)
        fetch_references(
            lambda row: refs["cumulative"].at[b, row, h, self.index.slots],
            self.index.first_row,
            self.reference,
            loaded,
        )
        if self.spec.masked:
            for name in ("query_segment", "slot_access"):
                plgpu.copy_gmem_to_smem(refs[name].at[b, self.index.rows], shared[name], loaded)
            token_segment = refs["token_segment"].at[b, self.index.read]
            plgpu.copy_gmem_to_smem(token_segment, shared["token_segment"], loaded)

    def _load_states(self, side: int) -> None:
        loaded = self.shared["side_loaded"]
        for source, target in (("start_", "slots"), ("d_end_", "d_slots")):
            where = self.index.batch, self.index.head, self.index.chunk
            states = self.refs[source + SIDES[side]].at[*where]
            states = states.at[pl.ds(0, self.D), self.index.slots]
            plgpu.copy_gmem_to_smem(states, self.shared[target].at[0], loaded)

    def _load_tokens(self, side: int) -> None:
        tokens = self.refs[SIDES[side]].at[self.index.batch, self.index.read, self.index.head]
        plgpu.copy_gmem_to_smem(tokens, self.operand("tokens"), self.shared["side_loaded"])

    def _grad(self, name: str):
        """In the device's memory."""
        where = self.index.panel, self.index.batch, self.index.written, self.index.head
        return self.refs["d_" + name].at[*where]

    def _load_item(self, item, stage) -> None:
        shared, group = self.shared, self.spec.group
        loaded = shared["item_loaded"].at[stage]

        def load_head(index, rows, row_weights):
            head = self.index.head * group + index
            source = self.refs[rows].at[self.index.batch, self.index.rows, head]
            plgpu.copy_gmem_to_smem(source, shared["rows"].at[stage], loaded)
            where = self.index.batch, self.index.rows, head, self.index.slots
            source = self.refs[row_weights].at[*where]
            plgpu.copy_gmem_to_smem(source, shared["row_weights"].at[stage], loaded)

        def load_grad(name):
            for half in range(2):  # a stage waits for two copies
                rows = pl.ds(half * (CHUNK // 2), CHUNK // 2)
                target = shared["rows"].at[stage, rows]
                plgpu.copy_gmem_to_smem(self._grad(name).at[rows], target, loaded)

        for side, arrays in enumerate((("query", "logits"), ("d_out", "weights"))):
            index = item - self.first_item(side)
            is_head = (index >= 0) & (index < group)
            pl.when(is_head)(functools.partial(load_head, index, *arrays))
            if self.added[side]:
                pl.when(index == group)(functools.partial(load_grad, SIDES[side]))
