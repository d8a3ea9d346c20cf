"""The warpgroup of `slot_query_gradients.py`, whose docstring has the formulas and the barriers."""

from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas.gpu.backward.slot_query_memory import SlotQueryMemory
from pallas.gpu.spec import CHUNK, GATE_BLOCKS, LOG2E, LOGITS, ROW, SIDES, CallSpec
from pallas.gpu.warpgroup.decays import gather, own_reference, spread, start_decay, token_decay
from pallas.gpu.warpgroup.masks import by_row, entered, hide_slots, same_segment
from pallas.gpu.warpgroup.matmul import Matmul


class SlotQueryWarpgroup:
    """The warpgroup that has a query head's rows of a chunk, and all of its slots."""

    def __init__(self, memory: SlotQueryMemory, matmul: Matmul, spec: CallSpec):
        self.memory, self.matmul, self.spec = memory, matmul, spec
        self.refs, self.shared, self.index = memory.refs, memory.shared, memory.index
        self.panels, self.width = memory.panels, memory.width

    def run(self) -> None:
        self.memory.fetch_first()
        plgpu.barrier_wait(self.shared["loaded"])
        self._multiply_tokens()
        if self.panels == 1:
            self._store_query(self._panel(0, None))
            return
        self._sum_delta()
        none = plgpu.layout_cast(jnp.zeros((CHUNK, CHUNK), jnp.float32), LOGITS)
        into_tokens = lax.fori_loop(0, self.panels, self._panel, none)
        self.memory.zero.renew()
        self._store_query(into_tokens)

    def _multiply_tokens(self) -> None:
        """Finds A and B, [C, C] bfloat16; then the first slots take the places of the tokens."""
        shared, rows_of = self.shared, self.memory.rows
        for rows, side in zip(("query", "d_out"), SIDES, strict=True):
            operands = lambda rows=rows, side=side: [(rows_of(rows), shared[side].T)]  # noqa: E731
            x = jnp.where(self._entered(), self.matmul(operands, (CHUNK, CHUNK)), 0.0)
            shared[f"{side}_scores"][...] = x.astype(jnp.bfloat16)
        plgpu.commit_smem()
        for panel in range(self.memory.stages):
            self.memory.fetch_slots(panel)

    def _sum_delta(self) -> None:
        """Stores delta, a sum over all panels, before the panels' results are found."""

        def add(panel, sums):
            p, dp = self._weights(panel)
            plgpu.commit_smem()  # all have read what the next panels take the places of
            self.memory.fetch_next(panel)
            return sums[0] + (p * dp).sum(axis=1), sums[1] + p.sum(axis=1)

        zeros = plgpu.layout_cast(jnp.zeros(CHUNK, jnp.float32), ROW)
        total, mass = lax.fori_loop(0, self.panels, add, (zeros, zeros))
        self.memory.numbers("delta")[...] = self._delta(total, mass)
        plgpu.commit_smem()

    def _delta(self, total: jax.Array, mass: jax.Array) -> jax.Array:
        """delta, given the sums of p dp and of p, which are 0 in a row that reads no slots."""
        mean = total / jnp.where(mass > 0.0, mass, 1.0)
        return self._row("slot_weight") * mean + self._row("delta_beside_slots")

    def _panel(self, panel, into_tokens: jax.Array | None) -> jax.Array:
        """One panel's results; returns its L, not masked yet, added to the panels' before."""
        shared, memory = self.shared, self.memory
        plgpu.wait_smem_to_gmem(0, wait_read_only=True)  # the last panel's stores left their places
        p, dp = self._weights(panel)
        pl.when(panel == self.panels - 1)(memory.fetch_again)
        if self.panels == 1:
            delta = self._delta((p * dp).sum(axis=1), p.sum(axis=1))
        else:
            delta = self._row("delta")
        ds = p * (dp - by_row(delta, p.shape[1])) * self.spec.scale
        row_decay = self._row_decay(panel)
        start = row_decay * self._reference_decay(panel)
        shared["write"].at[panel][...] = (ds * start).astype(jnp.bfloat16)
        ds_to_reference = (ds * row_decay).astype(jnp.bfloat16)
        memory.zero.renew()
        into_tokens = gather(ds_to_reference, memory.token_decays, self.matmul, into_tokens)
        row_decay = self._row_decay(panel)  # again, not held
        start = row_decay * self._reference_decay(panel)
        results = {
            "d_logits_to_reference": ds_to_reference,
            "weights_to_reference": p * row_decay,
            "weights_to_start": p * start,
        }
        self._store_panel(panel, results)
        if self.panels > 1:
            memory.fetch_next(self.panels + panel)
        return into_tokens

    def _weights(self, panel) -> tuple[jax.Array, jax.Array]:
        """p and dp of a panel, [C, its slots]."""
        self._build_token_decays(panel)
        a = self._products(panel, "query", "key")
        slots = panel * self.width, self.panels * self.width
        a = hide_slots(a * (self.spec.scale * LOG2E), *slots, self._slot_access(), self.spec)
        p = jnp.exp2(a - by_row(self._row("lse") * LOG2E, a.shape[1]))
        return p, self._products(panel, "d_out", "value")

    def _build_token_decays(self, panel) -> None:
        """Stores a panel's token decays, and in place of c, c minus the row's own c_ref."""
        shared, memory = self.shared, self.memory
        memory.zero.renew()
        stage = memory.stage(panel)
        plgpu.barrier_wait(shared["gates_loaded"].at[stage])
        cumulative = plgpu.load(shared["cumulative"].at[stage], layout=LOGITS)
        write = plgpu.load(shared["write"].at[panel], layout=LOGITS).astype(jnp.float32)
        for block in range(GATE_BLOCKS):
            reference = memory.references(panel)(block)
            memory.token_decays(block)[...] = token_decay(write, cumulative, reference)
        reference = own_reference(memory.references(panel), self.width)
        shared["cumulative"].at[stage][...] = cumulative - reference
        plgpu.commit_smem()

    def _products(self, panel, rows: str, side: str) -> jax.Array:
        """Rows (q or do, by name) times the slots' keys or values as each row finds them.

        Computed as row_decay * (exp(c_ref) * start + spread(scores)), which needs fewer registers
        than with exp(c). Where exp(c_ref) underflows, exp(c) is below 2^-33.
        """
        shared, memory = self.shared, self.memory
        stage, slots = memory.stage(panel), shared[f"slot_{side}s"]
        plgpu.barrier_wait(shared[f"slot_{side}s_loaded"].at[stage])
        memory.zero.renew()
        start = self.matmul(lambda: [(memory.rows(rows), slots.at[stage])], (CHUNK, self.width))
        start *= self._reference_decay(panel)
        scores = plgpu.load(shared[f"{side}_scores"], layout=LOGITS)
        products = spread(scores, memory.token_decays, self.width, self.matmul, start)
        return products * self._row_decay(panel)

    def _row_decay(self, panel) -> jax.Array:
        exponent = self.shared["cumulative"].at[self.memory.stage(panel)]  # c - c_ref by now
        return jnp.exp2(plgpu.load(exponent, layout=LOGITS))

    def _reference_decay(self, panel) -> jax.Array:
        """exp(c_ref), in the rows that read the slots at the chunk's start."""
        reference = own_reference(self.memory.references(panel), self.width)
        return start_decay(reference, self._slot_access())

    def _slot_access(self) -> Any | None:
        return self.shared["slot_access"] if self.spec.masked else None

    def _entered(self) -> jax.Array:
        """[C, C], the chunk's tokens that are in the row's slots."""
        mask, shared = entered(self.index), self.shared
        if self.spec.masked:
            mask &= same_segment(shared["query_segment"], shared["token_segment"].at[0])
        return mask

    def _row(self, name: str) -> jax.Array:
        return plgpu.load(self.memory.numbers(name), layout=ROW)

    def _store_panel(self, panel, results: dict[str, jax.Array]) -> None:
        """Writes a panel's results, and d_logits_to_start, which `_panel` left in the place of s.

        The results pass through the places of the token decays, which are no longer needed.
        """
        index, memory = self.index, self.memory
        places = {name: memory.token_decays(i) for i, name in enumerate(results)}
        for name, x in results.items():
            places[name][...] = x.astype(jnp.bfloat16)
        plgpu.commit_smem()
        places["d_logits_to_start"] = self.shared["write"].at[panel]
        for name, place in places.items():
            where = index.batch, index.rows, index.heads, memory.slots(panel)
            plgpu.copy_smem_to_gmem(place, self.refs[name].at[*where])

    def _store_query(self, into_tokens: jax.Array) -> None:
        """Finds dq, and writes it through the place of q."""
        shared, index, memory = self.shared, self.index, self.memory
        L = jnp.where(self._entered(), into_tokens, 0.0).astype(jnp.bfloat16)
        plgpu.barrier_wait(shared["loaded_again"])
        dq = self.matmul(
            lambda: [
                *((shared["write"].at[i], memory.slot_keys(i).T) for i in range(self.panels)),
                (L, memory.rows("d_out")),  # k is there now
            ],
            shared["query"].shape[1:],
        )
        if memory.adds:  # what is there now
            dq += plgpu.load(memory.rows("query"), layout=LOGITS).astype(jnp.float32)
        memory.rows("query")[...] = dq.astype(jnp.bfloat16)
        plgpu.commit_smem()
        target = self.refs["d_query"].at[index.batch, index.rows, index.heads]
        plgpu.copy_smem_to_gmem(memory.rows("query"), target)
        plgpu.wait_smem_to_gmem(0)
