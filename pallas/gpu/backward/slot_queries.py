"""The query side of the slots' backward: of a chunk's rows, given the slots at its start.

With symbols as in `spec.py` and `in_chunk.py`, S0 the slots at the chunk's start, E0 = exp(G) the
decay since then, do the gradient of the output, and `entered` the tokens that a row finds in its
slots; the sums run over the row's slots:

    S = entered * q k^T                             D = entered * do v^T
    a = scale (E0 (q SK0) + rise spread(S))         dp = E0 (do SV0) + rise spread(D)
    p = exp(a - log_mass)                           ds = scale p (dp - delta)
    delta = omega mean(dp) + rest                   mean(dp) = sum(p dp) / sum(p)
    L = entered * gather(ds rise)                   dq = (ds E0) SK0^T + L k

The slots may all hold nearly the same. Then ds and its sum are small differences, in which all that
dp's have in common must cancel, their rounding included: only a mean of the very dp and p does so.
omega, the slots' share of the softmax, and rest, what is not of the slots, are given in float32.

A warpgroup works on the rows of one query head, a panel of slots at a time. ds and p go out as they
are multiplied, in bfloat16 and with the decay that they carry, for the kernels of the key side.

Where the window reads the same queries, their gradients are added here: the window's comes to the
place of q, after the last product with it.

A block reads k twice. Of more than 64 slots delta comes first: what is computed for p and dp is
computed twice, and S0 and G are read twice, half of SK0 three times. That comes from the L2 cache.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas.gpu.backward.slot_query_places import SIDES, QueryPlaces, query_scratch
from pallas.gpu.forward.gates import LOG2E, Gates
from pallas.gpu.forward.output_pass import Facts
from pallas.gpu.spec import CHUNK, GATE_BLOCKS, LOGITS, ROW, Spec
from pallas.gpu.warpgroup.launch import Refs, launch
from pallas.gpu.warpgroup.masks import by_row
from pallas.gpu.warpgroup.matmul import Matmul
from pallas.gpu.warpgroup.place import Place


class SlotQueries(NamedTuple):
    """bfloat16: [B, N, H * G, D] the gradient of the query, else [B, N, H * G, M]."""

    query: jax.Array  # with the window's, where that is given
    logits_rise: jax.Array  # ds exp(G - R), R of the row's block
    weights_rise: jax.Array  # p exp(G - R)
    logits_start: jax.Array  # ds exp(G), 0 in rows that do not read the slots at the chunk's start
    weights_start: jax.Array  # p exp(G), likewise


def slot_queries(
    query: jax.Array,
    out_grad: jax.Array,
    key: jax.Array,
    value: jax.Array,
    log_mass: jax.Array,
    slot_weight: jax.Array,
    rest: jax.Array,
    gates: Gates,
    starts: tuple[jax.Array, jax.Array],
    facts: Facts | None,
    query_grad: jax.Array | None,
    *,
    spec: Spec,
    interpret: Any = False,
) -> SlotQueries:
    """The kernel's call.

    query, out_grad: [B, N, H * G, D] bfloat16, as the slots see the query; N is a multiple of C.
    key, value: [B, P, H, D] bfloat16, the timeline without its first spec.ahead rows. log_mass, of
    base e, slot_weight, omega, and rest: [B, H * G, N] float32. starts: [B, H, N / C, D, M]
    bfloat16 each. facts: with spec.masked. query_grad: what is added to the query's gradient, in
    its place and as it is, or None.
    interpret: as for `fused_attention`.
    """
    B, N, heads, D = query.shape
    M = gates.cumulative.shape[3]
    inputs = {"query": query, "out_grad": out_grad, "key": key, "value": value}
    inputs |= {"log_mass": log_mass, "slot_weight": slot_weight, "rest": rest}
    inputs |= {"cumulative": gates.cumulative, "write": gates.write}
    inputs |= {"start_key": starts[0], "start_value": starts[1]}
    if facts is not None:
        assert facts.reads is not None
        inputs |= {"query_run": facts.query, "visible": facts.visible, "reads": facts.reads}
    weights = jax.ShapeDtypeStruct((B, N, heads, M), jnp.bfloat16)
    outputs = dict.fromkeys(SlotQueries._fields[1:], weights)
    updated = {}
    if query_grad is None:
        outputs["query_grad"] = jax.ShapeDtypeStruct((B, N, heads, D), jnp.bfloat16)
    else:
        updated["query_grad"] = query_grad

    def kernel(refs: Refs, shared: Refs) -> None:
        place = Place(spec, warpgroups=1)
        matmul = Matmul(bool(interpret), shared.get("buffer"))
        QuerySide(refs, shared, place, matmul, spec, adds=bool(updated)).run()

    *of_slots, grad = launch(
        kernel,
        inputs,
        outputs,
        query_scratch(spec, D, M, adds=bool(updated), interpret=bool(interpret)),
        grid={"chunk": N // CHUNK, "heads": heads, "batch": B},
        warpgroups=1,
        name="nha_slot_queries",
        interpret=interpret,
        updated=updated,
    )
    return SlotQueries(grad, *of_slots)


class QuerySide(QueryPlaces):
    """A query head's rows of a chunk."""

    def run(self) -> None:
        shared = self.shared
        self._fetch_first()
        plgpu.barrier_wait(shared["loaded"])
        self._multiply_tokens()
        if self.panels == 1:
            self._store_query(self._panel(0, None))
            return
        self._sum_delta()
        none = plgpu.layout_cast(jnp.zeros((CHUNK, CHUNK), jnp.float32), LOGITS)
        into_tokens = lax.fori_loop(0, self.panels, self._panel, none)
        self._forget_addresses()
        self._store_query(into_tokens)

    def _multiply_tokens(self) -> None:
        """S and D, [C, C] bfloat16; then the first slots take the places of the tokens."""
        shared = self.shared
        for rows, side in zip(("query", "out_grad"), SIDES, strict=True):
            operands = lambda rows=rows, side=side: [(self._rows(rows), shared[side].T)]  # noqa: E731
            x = jnp.where(self._entered(), self.matmul(operands, (CHUNK, CHUNK)), 0.0)
            shared[f"{side}_scores"][...] = x.astype(jnp.bfloat16)
        plgpu.commit_smem()
        for panel in range(self.stages):
            self._fetch_slots(panel)

    def _build_falls(self, panel) -> None:
        """And G - R in the place of G, with R of the row's block."""
        self._forget_addresses()
        shared, stage = self.shared, self._stage(panel)
        plgpu.barrier_wait(shared["gates_loaded"].at[stage])
        G = plgpu.load(shared["cumulative"].at[stage], layout=LOGITS)
        write = plgpu.load(shared["write"].at[panel], layout=LOGITS).astype(jnp.float32)
        for block in range(GATE_BLOCKS):
            self._falls(block, panel)[...] = self._fall(block, panel, G, write)
        shared["cumulative"].at[stage][...] = G - self._own_reference(panel, G.shape)
        plgpu.commit_smem()

    def _rise(self, panel) -> jax.Array:
        rise = self.shared["cumulative"].at[self._stage(panel)]
        return jnp.exp2(plgpu.load(rise, layout=LOGITS))

    def _reference_decay(self, panel) -> jax.Array:
        """exp(R), in the rows that read the slots at the chunk's start."""
        shape = CHUNK, self.width
        decay = jnp.exp2(self._own_reference(panel, shape))
        if self.spec.masked:
            decay = jnp.where(self._reads(shape) > 1, decay, 0.0)
        return decay

    def _products(self, panel, rows: str, side: str) -> jax.Array:
        """Of q with a panel of slots' keys, as after each row's token, or of do with their values.

        rise * (exp(R) * carried + spread(scores)): less to hold than with exp(G). Where exp(R)
        underflows exp(G) is below 2^-33.
        """
        shared, stage = self.shared, self._stage(panel)
        plgpu.barrier_wait(shared[f"slot_{side}s_loaded"].at[stage])
        self._forget_addresses()
        start = self.matmul(
            lambda: [(self._rows(rows), shared[f"slot_{side}s"].at[stage])], (CHUNK, self.width)
        )
        start *= self._reference_decay(panel)
        scores = plgpu.load(shared[f"{side}_scores"], layout=LOGITS)
        return self._spread(panel, scores, self.width, start) * self._rise(panel)

    def _sum_delta(self) -> None:
        """delta into its place: a panel's needs all the others', and so all are computed twice."""

        def add(panel, sums):
            p, dp = self._weights(panel)
            plgpu.commit_smem()  # all have read what the next panels take the places of
            self._fetch_next(panel)
            return sums[0] + (p * dp).sum(axis=1), sums[1] + p.sum(axis=1)

        zeros = plgpu.layout_cast(jnp.zeros(CHUNK, jnp.float32), ROW)
        total, mass = lax.fori_loop(0, self.panels, add, (zeros, zeros))
        self._numbers("delta")[...] = self._delta(total, mass)
        plgpu.commit_smem()

    def _delta(self, total: jax.Array, mass: jax.Array) -> jax.Array:
        """Of the sums of p dp and of p; a row that reads nothing has none."""
        mean = total / jnp.where(mass > 0.0, mass, 1.0)
        return self._row("slot_weight") * mean + self._row("rest")

    def _weights(self, panel) -> tuple[jax.Array, jax.Array]:
        """p and dp of a panel, [C, its slots]."""
        self._build_falls(panel)
        a = self._products(panel, "query", "key")
        a = self._hide(panel, a * (self.spec.scale * LOG2E))
        p = jnp.exp2(a - by_row(self._row("log_mass") * LOG2E, a.shape[1]))
        return p, self._products(panel, "out_grad", "value")

    def _panel(self, panel, into_tokens: jax.Array | None) -> jax.Array:
        """L of this panel, before its mask, added to that of the panels before."""
        shared = self.shared
        plgpu.wait_smem_to_gmem(0, wait_read_only=True)  # the last panel's stores left their places
        p, dp = self._weights(panel)
        pl.when(panel == self.panels - 1)(self._fetch_again)
        if self.panels == 1:
            delta = self._delta((p * dp).sum(axis=1), p.sum(axis=1))
        else:
            delta = self._row("delta")
        ds = p * (dp - by_row(delta, p.shape[1])) * self.spec.scale
        rise = self._rise(panel)
        start = rise * self._reference_decay(panel)
        shared["write"].at[panel][...] = (ds * start).astype(jnp.bfloat16)
        ds_rise = (ds * rise).astype(jnp.bfloat16)
        self._forget_addresses()
        into_tokens = self._gather(panel, ds_rise, into_tokens)
        rise = self._rise(panel)  # again, not held
        start = rise * self._reference_decay(panel)
        self._store_panel(
            panel, {"logits_rise": ds_rise, "weights_rise": p * rise, "weights_start": p * start}
        )
        if self.panels > 1:
            self._fetch_next(self.panels + panel)
        return into_tokens

    def _row(self, name: str) -> jax.Array:
        return plgpu.load(self._numbers(name), layout=ROW)

    def _place_of(self, name: str, panel):
        """In shared memory: that of s, which is no longer needed, for dq, else of the falls."""
        if name == "logits_start":
            return self.shared["write"].at[panel]
        return self._falls(SlotQueries._fields.index(name) - 1, panel)

    def _store_panel(self, panel, results: dict[str, jax.Array]) -> None:
        """Beside ds exp(G), which is in its place."""
        place = self.place
        for name, x in results.items():
            self._place_of(name, panel)[...] = x.astype(jnp.bfloat16)
        plgpu.commit_smem()
        for name in (*results, "logits_start"):
            where = place.batch, place.rows, place.heads, self._slots(panel)
            plgpu.copy_smem_to_gmem(self._place_of(name, panel), self.refs[name].at[*where])

    def _slot_keys(self, panel: int):
        """At the end, SK0 of a panel: the last are still where they were."""
        kept = panel >= self.panels - self.stages
        return self.shared["slot_keys" if kept else "slot_values"].at[panel % self.stages]

    def _store_query(self, into_tokens: jax.Array) -> None:
        """dq, through the place of q."""
        shared, place = self.shared, self.place
        L = jnp.where(self._entered(), into_tokens, 0.0).astype(jnp.bfloat16)
        plgpu.barrier_wait(shared["loaded_again"])
        dq = self.matmul(
            lambda: [
                *((shared["write"].at[i], self._slot_keys(i).T) for i in range(self.panels)),
                (L, self._rows("out_grad")),  # k is there now
            ],
            shared["query"].shape[1:],
        )
        if self.adds:  # what is there now
            dq += plgpu.load(self._rows("query"), layout=LOGITS).astype(jnp.float32)
        self._rows("query")[...] = dq.astype(jnp.bfloat16)
        plgpu.commit_smem()
        target = self.refs["query_grad"].at[place.batch, place.rows, place.heads]
        plgpu.copy_smem_to_gmem(self._rows("query"), target)
        plgpu.wait_smem_to_gmem(0)
