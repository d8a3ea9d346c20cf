"""The query side of the slots' backward: of a chunk's rows, given the slots at its start.

With symbols as in `spec.py` and `in_chunk.py`, S0 the slots at the chunk's start, E0 = exp(c) the
decay since then, do the gradient of the output, and `entered` the tokens that a row finds in its
slots; the sums run over the row's slots:

    S = entered * q k^T                             D = entered * do v^T
    a = scale (E0 (q SK0) + row_decay spread(S))         dp = E0 (do SV0) + row_decay spread(D)
    p = exp(a - lse)                           ds = scale p (dp - delta)
    delta = omega mean(dp) + rest                   mean(dp) = sum(p dp) / sum(p)
    L = entered * gather(ds row_decay)                   dq = (ds E0) SK0^T + L k

The slots may all hold nearly the same. Then ds and its sum are small differences, in which all that
dp's have in common must cancel, their rounding included: only a mean of the very dp and p does so.
omega, the slots' share of the softmax, and rest, what is not of the slots, are given in float32.

A warpgroup works on the rows of one query head, a panel of slots at a time. ds and p go out as they
are multiplied, in bfloat16 and with the decay that they carry, for the kernels of the key side.

Where the window reads the same queries, their gradients are added here: the window's comes to the
place of q, after the last product with it.

A block reads k twice. Of more than 64 slots delta comes first: what is computed for p and dp is
computed twice, and S0 and c are read twice, half of SK0 three times. That comes from the L2 cache.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas.gpu.backward.slot_query_places import SIDES, QueryPlaces, query_scratch
from pallas.gpu.forward.gates import Gates
from pallas.gpu.spec import CHUNK, GATE_BLOCKS, LOG2E, LOGITS, ROW, CallSpec, Segments
from pallas.gpu.warpgroup.chunk_index import ChunkIndex
from pallas.gpu.warpgroup.decays import gather, own_reference, spread, start_decay, token_decay
from pallas.gpu.warpgroup.launch import Refs, launch
from pallas.gpu.warpgroup.masks import by_row, entered, hide_slots, same_segment
from pallas.gpu.warpgroup.matmul import Matmul


class SlotQueries(NamedTuple):
    """bfloat16: [B, Tq, Hq, D] the gradient of the query, else [B, Tq, Hq, M]."""

    query: jax.Array  # with the window's, where that is given
    d_logits_to_reference: jax.Array  # ds exp(c - c_ref), c_ref of the row's block
    weights_to_reference: jax.Array  # p exp(c - c_ref)
    d_logits_to_start: jax.Array  # ds exp(c), 0 in rows that do not read the chunk's first slots
    weights_to_start: jax.Array  # p exp(c), likewise


def slot_queries(
    query: jax.Array,
    d_out: jax.Array,
    key: jax.Array,
    value: jax.Array,
    lse: jax.Array,
    slot_weight: jax.Array,
    rest: jax.Array,
    gates: Gates,
    starts: tuple[jax.Array, jax.Array],
    segments: Segments | None,
    d_query: jax.Array | None,
    *,
    spec: CallSpec,
    interpret: Any = False,
) -> SlotQueries:
    """The kernel's call.

    query, d_out: [B, Tq, Hq, D] bfloat16, as the slots see the query; Tq is a multiple of C.
    key, value: [B, Tk, Hkv, D] bfloat16, the timeline without its first spec.ahead rows. lse, of
    base e, slot_weight, omega, and rest: [B, Hq, Tq] float32. starts: [B, Hkv, Tq / C, D, M]
    bfloat16 each. segments: with spec.masked. d_query: what is added to the query's gradient, in
    its place and as it is, or None.
    interpret: as for `fused_attention`.
    """
    B, Tq, heads, D = query.shape
    M = gates.cumulative.shape[3]
    inputs = {"query": query, "d_out": d_out, "key": key, "value": value}
    inputs |= {"lse": lse, "slot_weight": slot_weight, "rest": rest}
    inputs |= {"cumulative": gates.cumulative, "write": gates.write}
    inputs |= {"start_key": starts[0], "start_value": starts[1]}
    if segments is not None:
        inputs |= segments.arrays(slots=True)
    weights = jax.ShapeDtypeStruct((B, Tq, heads, M), jnp.bfloat16)
    outputs = dict.fromkeys(SlotQueries._fields[1:], weights)
    updated = {}
    if d_query is None:
        outputs["d_query"] = jax.ShapeDtypeStruct((B, Tq, heads, D), jnp.bfloat16)
    else:
        updated["d_query"] = d_query

    def kernel(refs: Refs, shared: Refs) -> None:
        index = ChunkIndex(spec, warpgroups=1)
        matmul = Matmul(bool(interpret), shared.get("buffer"))
        QuerySide(refs, shared, index, matmul, spec, adds=bool(updated)).run()

    *of_slots, grad = launch(
        kernel,
        inputs,
        outputs,
        query_scratch(spec, D, M, adds=bool(updated), interpret=bool(interpret)),
        grid={"chunk": Tq // CHUNK, "heads": heads, "batch": B},
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
        self.zero.renew()
        self._store_query(into_tokens)

    def _multiply_tokens(self) -> None:
        """S and D, [C, C] bfloat16; then the first slots take the places of the tokens."""
        shared = self.shared
        for rows, side in zip(("query", "d_out"), SIDES, strict=True):
            operands = lambda rows=rows, side=side: [(self._rows(rows), shared[side].T)]  # noqa: E731
            x = jnp.where(self._entered(), self.matmul(operands, (CHUNK, CHUNK)), 0.0)
            shared[f"{side}_scores"][...] = x.astype(jnp.bfloat16)
        plgpu.commit_smem()
        for panel in range(self.stages):
            self._fetch_slots(panel)

    def _build_token_decays(self, panel) -> None:
        """And c - c_ref in the place of c, with c_ref of the row's block."""
        self.zero.renew()
        shared, stage = self.shared, self._stage(panel)
        plgpu.barrier_wait(shared["gates_loaded"].at[stage])
        cumulative = plgpu.load(shared["cumulative"].at[stage], layout=LOGITS)
        write = plgpu.load(shared["write"].at[panel], layout=LOGITS).astype(jnp.float32)
        for block in range(GATE_BLOCKS):
            reference = self._references(panel)(block)
            self._token_decays(block)[...] = token_decay(write, cumulative, reference)
        reference = own_reference(self._references(panel), self.width)
        shared["cumulative"].at[stage][...] = cumulative - reference
        plgpu.commit_smem()

    def _row_decay(self, panel) -> jax.Array:
        row_decay = self.shared["cumulative"].at[self._stage(panel)]
        return jnp.exp2(plgpu.load(row_decay, layout=LOGITS))

    def _reference_decay(self, panel) -> jax.Array:
        """exp(c_ref), in the rows that read the slots at the chunk's start."""
        return start_decay(own_reference(self._references(panel), self.width), self._slot_access())

    def _references(self, panel):
        slots = pl.ds(panel * self.width, self.width)
        return lambda block: self.shared["references"].at[block, slots]

    def _slot_access(self) -> Any | None:
        return self.shared["slot_access"] if self.spec.masked else None

    def _entered(self) -> jax.Array:
        """[C, C], the chunk's tokens that are in the row's slots."""
        mask, shared = entered(self.index), self.shared
        if self.spec.masked:
            mask &= same_segment(shared["query_segment"], shared["token_segment"].at[0])
        return mask

    def _products(self, panel, rows: str, side: str) -> jax.Array:
        """Of q with a panel of slots' keys, as after each row's token, or of do with their values.

        row_decay * (exp(c_ref) * start + spread(scores)): less to hold than with exp(c). Where
        exp(c_ref) underflows exp(c) is below 2^-33.
        """
        shared, stage = self.shared, self._stage(panel)
        plgpu.barrier_wait(shared[f"slot_{side}s_loaded"].at[stage])
        self.zero.renew()
        start = self.matmul(
            lambda: [(self._rows(rows), shared[f"slot_{side}s"].at[stage])], (CHUNK, self.width)
        )
        start *= self._reference_decay(panel)
        scores = plgpu.load(shared[f"{side}_scores"], layout=LOGITS)
        products = spread(scores, self._token_decays, self.width, self.matmul, start)
        return products * self._row_decay(panel)

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
        self._build_token_decays(panel)
        a = self._products(panel, "query", "key")
        slots = panel * self.width, self.panels * self.width
        a = hide_slots(a * (self.spec.scale * LOG2E), *slots, self._slot_access(), self.spec)
        p = jnp.exp2(a - by_row(self._row("lse") * LOG2E, a.shape[1]))
        return p, self._products(panel, "d_out", "value")

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
        row_decay = self._row_decay(panel)
        start = row_decay * self._reference_decay(panel)
        shared["write"].at[panel][...] = (ds * start).astype(jnp.bfloat16)
        ds_to_reference = (ds * row_decay).astype(jnp.bfloat16)
        self.zero.renew()
        into_tokens = gather(ds_to_reference, self._token_decays, self.matmul, into_tokens)
        row_decay = self._row_decay(panel)  # again, not held
        start = row_decay * self._reference_decay(panel)
        self._store_panel(
            panel,
            {
                "d_logits_to_reference": ds_to_reference,
                "weights_to_reference": p * row_decay,
                "weights_to_start": p * start,
            },
        )
        if self.panels > 1:
            self._fetch_next(self.panels + panel)
        return into_tokens

    def _row(self, name: str) -> jax.Array:
        return plgpu.load(self._numbers(name), layout=ROW)

    def _place_of(self, name: str, panel):
        """In shared memory: for dq that of s, no longer needed, else that of the token decays."""
        if name == "d_logits_to_start":
            return self.shared["write"].at[panel]
        return self._token_decays(SlotQueries._fields.index(name) - 1)

    def _store_panel(self, panel, results: dict[str, jax.Array]) -> None:
        """Beside ds exp(c), which is in its place."""
        index = self.index
        for name, x in results.items():
            self._place_of(name, panel)[...] = x.astype(jnp.bfloat16)
        plgpu.commit_smem()
        for name in (*results, "d_logits_to_start"):
            where = index.batch, index.rows, index.heads, self._slots(panel)
            plgpu.copy_smem_to_gmem(self._place_of(name, panel), self.refs[name].at[*where])

    def _slot_keys(self, panel: int):
        """At the end, SK0 of a panel: the last are still where they were."""
        kept = panel >= self.panels - self.stages
        return self.shared["slot_keys" if kept else "slot_values"].at[panel % self.stages]

    def _store_query(self, into_tokens: jax.Array) -> None:
        """dq, through the place of q."""
        shared, index = self.shared, self.index
        L = jnp.where(self._entered(), into_tokens, 0.0).astype(jnp.bfloat16)
        plgpu.barrier_wait(shared["loaded_again"])
        dq = self.matmul(
            lambda: [
                *((shared["write"].at[i], self._slot_keys(i).T) for i in range(self.panels)),
                (L, self._rows("d_out")),  # k is there now
            ],
            shared["query"].shape[1:],
        )
        if self.adds:  # what is there now
            dq += plgpu.load(self._rows("query"), layout=LOGITS).astype(jnp.float32)
        self._rows("query")[...] = dq.astype(jnp.bfloat16)
        plgpu.commit_smem()
        target = self.refs["d_query"].at[index.batch, index.rows, index.heads]
        plgpu.copy_smem_to_gmem(self._rows("query"), target)
        plgpu.wait_smem_to_gmem(0)
