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
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas.gpu.gates import LOG2E, Gates
from pallas.gpu.in_chunk import InChunk, by_row
from pallas.gpu.launch import Refs
from pallas.gpu.matmul import Matmul, Operands
from pallas.gpu.output_pass import Facts
from pallas.gpu.place import Place
from pallas.gpu.producer import fetch_slots
from pallas.gpu.spec import CHUNK, GATE_BLOCKS, GATE_ROWS, LOGITS, PANEL, ROW, Spec, tile

WHOLE = 64  # slots that are worked on at once; of more, a panel at a time


class SlotQueries(NamedTuple):
    """bfloat16: [B, N, H * G, D] the gradient of the query, else [B, N, H * G, M]."""

    query: jax.Array
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
    *,
    spec: Spec,
    interpret: Any = False,
) -> SlotQueries:
    """The kernel's call.

    query, out_grad: [B, N, H * G, D] bfloat16, as the slots see the query; N is a multiple of C.
    key, value: [B, P, H, D] bfloat16, the timeline without its first spec.ahead rows. log_mass, of
    base e, slot_weight, omega, and rest: [B, H * G, N] float32. starts: [B, H, N / C, D, M]
    bfloat16 each. facts: with spec.masked.
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
    outputs = dict.fromkeys(SlotQueries._fields, weights)
    outputs["query"] = jax.ShapeDtypeStruct((B, N, heads, D), jnp.bfloat16)

    def kernel(*refs, **shared):
        names = [*inputs, *(f"{name}_grad" if name == "query" else name for name in outputs)]
        place = Place(spec, warpgroups=1)
        matmul = Matmul(bool(interpret), shared.get("buffer"))
        QuerySide(dict(zip(names, refs, strict=True)), shared, place, matmul, spec).run()

    call = plgpu.kernel(
        kernel,
        out_type=list(outputs.values()),
        grid=(N // CHUNK, heads, B),
        grid_names=("chunk", "heads", "batch"),
        scratch_types=_scratch(spec, D, M, interpret=bool(interpret)),
        compiler_params=plgpu.CompilerParams(approx_math=True),
        kernel_name="nha_slot_queries",
        interpret=interpret,
    )
    return SlotQueries(*call(*inputs.values()))


def _scratch(spec: Spec, D: int, M: int, *, interpret: bool) -> dict[str, Any]:
    """Shared memory, and a barrier whose arrivals are the copies into it."""
    narrow, wide = jnp.bfloat16, jnp.float32
    panel = M if M <= WHOLE else PANEL
    panels = M // panel
    tokens = plgpu.SMEM((CHUNK, D), narrow, transforms=tile(min(D, panel)))
    slots = plgpu.SMEM((panels, D, panel), narrow, transforms=tile(panel))
    row = plgpu.SMEM((CHUNK,), wide)
    scratch = {
        **dict.fromkeys(("query", "out_grad", "key", "value"), tokens),
        **dict.fromkeys(("start_key", "start_value"), slots),
        **dict.fromkeys(("log_mass", "slot_weight", "rest"), row),
        "cumulative": plgpu.SMEM((panels, CHUNK, panel), wide, transforms=tile(panel, 4)),
        "references": plgpu.SMEM((GATE_BLOCKS, M), wide),
        "write": plgpu.SMEM((panels, CHUNK, panel), narrow, transforms=tile(panel)),
        "falls": plgpu.SMEM((GATE_BLOCKS, CHUNK, panel), narrow, transforms=tile(panel)),
        "loaded": plgpu.Barrier(num_arrivals=7 + GATE_BLOCKS + 4 * panels + 3 * spec.masked),
    }
    if panels > 1:
        scratch["into_tokens"] = plgpu.SMEM((CHUNK, CHUNK), wide, transforms=tile(CHUNK, 4))
        scratch["delta"] = row
    if spec.masked:
        scratch["query_run"] = scratch["reads"] = plgpu.SMEM((CHUNK,), jnp.int32)
        scratch["visible"] = plgpu.SMEM((1, CHUNK), jnp.int32)
    if interpret:
        scratch["buffer"] = plgpu.SMEM((CHUNK, CHUNK), narrow)
    return scratch


class QuerySide(InChunk):
    """A query head's rows of a chunk."""

    def __init__(self, refs: Refs, shared: Refs, place: Place, matmul: Matmul, spec: Spec):
        super().__init__(shared, place, matmul, spec)
        self.refs = refs

    def run(self) -> None:
        shared = self.shared
        self._fetch()
        plgpu.barrier_wait(shared["loaded"])
        panels = shared["cumulative"].shape[0]
        if panels == 1:
            self._store_query(self._panel(0, None))
            return
        self._sum_delta(panels)
        none = jnp.zeros((CHUNK, CHUNK), jnp.float32)
        into_tokens = shared["into_tokens"]  # in registers there is no room for it
        into_tokens[...] = plgpu.layout_cast(none, LOGITS)

        @pl.loop(jnp.int32(0), jnp.int32(panels))
        def _(panel):
            into_tokens[...] = self._panel(panel, into_tokens)

        self._store_query(plgpu.load(into_tokens, layout=LOGITS))

    def _fetch(self) -> None:
        refs, shared, place = self.refs, self.shared, self.place
        b, head, loaded = place.batch, place.heads, shared["loaded"]
        tokens = place.token_rows(0)
        self._fetch_gates(loaded)
        for name in ("query", "out_grad"):
            plgpu.copy_gmem_to_smem(refs[name].at[b, place.rows, head], shared[name], loaded)
        for name in ("key", "value"):
            plgpu.copy_gmem_to_smem(refs[name].at[b, tokens, place.kv_head], shared[name], loaded)
        if self.spec.masked:
            for name in ("query_run", "reads"):
                plgpu.copy_gmem_to_smem(refs[name].at[b, place.rows], shared[name], loaded)
            visible = refs["visible"].at[b, tokens]
            plgpu.copy_gmem_to_smem(visible, shared["visible"].at[0], loaded)
        for name in ("start_key", "start_value"):
            fetch_slots(refs[name], shared[name], place, loaded)
        for name in ("log_mass", "slot_weight", "rest"):
            rows = refs[name].at[b, head, place.rows]
            plgpu.copy_gmem_to_smem(rows, shared[name], loaded)

    def _fetch_gates(self, loaded: Any) -> None:
        refs, shared, place = self.refs, self.shared, self.place
        for name in ("cumulative", "write"):
            panels, _, width = shared[name].shape
            for panel in range(panels):
                slots = pl.ds(panel * width, width)
                gate = refs[name].at[place.batch, place.rows, place.kv_head, slots]
                plgpu.copy_gmem_to_smem(gate, shared[name].at[panel], loaded)
        for block in range(GATE_BLOCKS):
            middle = place.first_row + block * GATE_ROWS + GATE_ROWS // 2 - 1
            reference = refs["cumulative"].at[place.batch, middle, place.kv_head]
            plgpu.copy_gmem_to_smem(reference, shared["references"].at[block], loaded)

    def _entered_products(self, rows: str, tokens: str) -> jax.Array:
        """S or D, [C, C] bfloat16."""
        shared = self.shared
        x = self.matmul(lambda: [(shared[rows], shared[tokens].T)], (CHUNK, CHUNK))
        return jnp.where(self._entered(), x, 0.0).astype(jnp.bfloat16)

    def _falls(self, block: int, panel):
        return self.shared["falls"].at[block]

    def _build_falls(self, panel) -> None:
        """And G - R in the place of G, with R of the row's block."""
        shared = self.shared
        G = plgpu.load(shared["cumulative"].at[panel], layout=LOGITS)
        write = plgpu.load(shared["write"].at[panel], layout=LOGITS).astype(jnp.float32)
        for block in range(GATE_BLOCKS):
            self._falls(block, panel)[...] = self._fall(block, panel, G, write)
        shared["cumulative"].at[panel][...] = G - self._own_reference(panel, G.shape)
        plgpu.commit_smem()

    def _rise(self, panel) -> jax.Array:
        return jnp.exp2(plgpu.load(self.shared["cumulative"].at[panel], layout=LOGITS))

    def _reference_decay(self, panel) -> jax.Array:
        """exp(R), in the rows that read the slots at the chunk's start."""
        shape = self.shared["cumulative"].shape[1:]
        decay = jnp.exp2(self._own_reference(panel, shape))
        if self.spec.masked:
            decay = jnp.where(self._reads(shape) > 1, decay, 0.0)
        return decay

    def _to_slots(self, panel, scores: jax.Array, carried: Operands) -> jax.Array:
        """rise * (exp(R) * carried + spread(scores)): less to hold than with exp(G).

        Where exp(R) underflows exp(G) is below 2^-33.
        """
        shape = self.shared["cumulative"].shape[1:]
        start = self.matmul(carried, shape) * self._reference_decay(panel)
        return self._spread(panel, scores, shape[1], start) * self._rise(panel)

    def _sum_delta(self, panels: int) -> None:
        """delta into its place: a panel's needs all the others', and so all are computed twice."""
        cumulative = self.shared["cumulative"]

        def add(panel, sums):
            p, dp = self._weights(panel)
            G = plgpu.load(cumulative.at[panel], layout=LOGITS)
            cumulative.at[panel][...] = G + self._own_reference(panel, G.shape)
            plgpu.commit_smem()  # all have read the falls, whose place the next panel's take
            return sums[0] + (p * dp).sum(axis=1), sums[1] + p.sum(axis=1)

        zeros = plgpu.layout_cast(jnp.zeros(CHUNK, jnp.float32), ROW)
        self.shared["delta"][...] = self._delta(*lax.fori_loop(0, panels, add, (zeros, zeros)))
        plgpu.commit_smem()

    def _delta(self, total: jax.Array, mass: jax.Array) -> jax.Array:
        """Of the sums of p dp and of p; a row that reads nothing has none."""
        mean = total / jnp.where(mass > 0.0, mass, 1.0)
        return self._row("slot_weight") * mean + self._row("rest")

    def _weights(self, panel) -> tuple[jax.Array, jax.Array]:
        """p and dp of a panel, [C, its slots].

        S and D are computed for each: held, they would be registers that the rest needs.
        """
        shared = self.shared
        self._build_falls(panel)
        scores = self._entered_products("query", "key")
        a = self._to_slots(
            panel, scores, lambda: [(shared["query"], shared["start_key"].at[panel])]
        )
        a = self._hide(panel, a * (self.spec.scale * LOG2E))
        p = jnp.exp2(a - by_row(self._row("log_mass") * LOG2E, a.shape[1]))
        products = self._entered_products("out_grad", "value")
        dp = self._to_slots(
            panel, products, lambda: [(shared["out_grad"], shared["start_value"].at[panel])]
        )
        return p, dp

    def _panel(self, panel, into_tokens: Any) -> jax.Array:
        """L of this panel, before its mask, added to `into_tokens` if it is a reference."""
        shared = self.shared
        plgpu.wait_smem_to_gmem(0, wait_read_only=True)  # the last panel's stores left their places
        p, dp = self._weights(panel)
        if into_tokens is None:
            delta = self._delta((p * dp).sum(axis=1), p.sum(axis=1))
        else:
            delta = self._row("delta")
        ds = p * (dp - by_row(delta, p.shape[1])) * self.spec.scale
        rise = self._rise(panel)
        start = rise * self._reference_decay(panel)
        shared["write"].at[panel][...] = (ds * start).astype(jnp.bfloat16)
        ds_rise = (ds * rise).astype(jnp.bfloat16)
        so_far = None if into_tokens is None else plgpu.load(into_tokens, layout=LOGITS)
        result = self._gather(panel, ds_rise, so_far)
        rise = self._rise(panel)  # again, not held
        start = rise * self._reference_decay(panel)
        self._store_panel(
            panel, {"logits_rise": ds_rise, "weights_rise": p * rise, "weights_start": p * start}
        )
        return result

    def _row(self, name: str) -> jax.Array:
        return plgpu.load(self.shared[name], layout=ROW)

    def _place_of(self, name: str, panel):
        """In shared memory: that of s, which is no longer needed, for dq, else of the falls."""
        if name == "logits_start":
            return self.shared["write"].at[panel]
        return self._falls(SlotQueries._fields.index(name) - 1, panel)

    def _store_panel(self, panel, results: dict[str, jax.Array]) -> None:
        """Beside ds exp(G), which is in its place."""
        place, width = self.place, self.shared["cumulative"].shape[2]
        for name, x in results.items():
            self._place_of(name, panel)[...] = x.astype(jnp.bfloat16)
        plgpu.commit_smem()
        for name in (*results, "logits_start"):
            slots = pl.ds(panel * width, width)
            target = self.refs[name].at[place.batch, place.rows, place.heads, slots]
            plgpu.copy_smem_to_gmem(self._place_of(name, panel), target)

    def _store_query(self, into_tokens: jax.Array) -> None:
        """dq, through the place of the values."""
        shared, place = self.shared, self.place
        L = jnp.where(self._entered(), into_tokens, 0.0).astype(jnp.bfloat16)
        panels = range(shared["write"].shape[0])
        dq = self.matmul(
            lambda: [
                *((shared["write"].at[i], shared["start_key"].at[i].T) for i in panels),
                (L, shared["key"]),
            ],
            shared["query"].shape,
        )
        shared["value"][...] = dq.astype(jnp.bfloat16)
        plgpu.commit_smem()
        target = self.refs["query_grad"].at[place.batch, place.rows, place.heads]
        plgpu.copy_smem_to_gmem(shared["value"], target)
        plgpu.wait_smem_to_gmem(0)
