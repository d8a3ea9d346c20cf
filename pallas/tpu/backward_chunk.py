"""A chunk of the fused backward, stage by stage.

Symbols as in `spec.py` and `forward.py`; D = d_out value^T, dS the gradient of the slots at the
chunk's end, and, with the forward's weights w_rj = s_j exp(G_r - G_j):

    a = exp(G) (q SK0^T) + sum_j (q k^T)_rj w_rj     da = exp(G) (d_out SV0^T) + sum_j D_rj w_rj
    ds = scale pa (da - delta)                       db = pb (D - delta)
    A_rj = sum_m pa w_rj                             L_rj = sum_m ds w_rj

and of the slot weight omega = sum pa, its cotangent dw adds dw to da (and so to delta); if only the
slots' logits are to be pulled, dw (1 - omega) is added to da and nothing to delta.

The same map gives a and da, and its transpose A and L: the pairs are stacked and share the gates.

    dq = (ds exp(G)) SK0 + L k + rotate_back(db rotated_k)
    dk = L^T q + (s exp(G_C - G)) dSK + rotate_back(db^T rotated_q),  dv = P^T d_out + ... dSV
    dg_j = x1 + sum_{r >= j} (R_r - s_r Y_r) - exp(g_j) Y_j

with R_r = sum over the heads of ds a + pa da, Y_j the gradient of s_j, x1 = sum(dS * S_end). dg is
a difference of sums that nearly cancel when decays are strong, so R, Y and x1 are made of the very
operands, rounded, that enter the products: what cancels in exact arithmetic then cancels here.
"""

import dataclasses
import functools
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental.pallas import tpu as pltpu

from pallas.constants import MASKED_LOGIT
from pallas.tpu.arithmetic import (
    LOG2E,
    apply_feature_map,
    by_head,
    feature_map_pullback,
    flat,
    join,
    matmul,
    matmul_nt,
    matmul_tn,
    overlay,
    reverse_cumulative_sum,
    rotate_back,
    scaled,
    to_column,
    to_row,
    widen,
)
from pallas.tpu.chunk_tokens import (
    Tokens,
    chunk_segments,
    rotated_queries,
    rows_of,
    stack_heads,
    unstack_heads,
)
from pallas.tpu.gates import Gates, floor_of
from pallas.tpu.launch import Arrays
from pallas.tpu.masks import Masks
from pallas.tpu.segments import where_entering
from pallas.tpu.spec import CallSpec


@dataclasses.dataclass
class Step:
    """What the chunks of a grid step share.

    Fields:
      slots: [M, K + V], at the start of the next chunk whose forward is to come.
      carry: what the later chunks add to the gradients of this one's tokens (`_overlap_add`), and
        of the slots at its end.
      decays: the gradients [C, M] of the chunks' decays, as far as they are known.
    """

    refs: Any
    outs: Any
    tokens: Tokens
    spec: CallSpec
    index: jax.Array  # of the step
    slots: jax.Array
    carry: Arrays
    decays: list[jax.Array] = dataclasses.field(default_factory=list)


class Chunk:
    """One chunk's work; the stages leave to each other what they set as attributes."""

    def __init__(self, n: int, step: Step):
        self.n, self.step, self.spec, self.rows = n, step, step.spec, rows_of(n, step.spec)
        self.dtype = step.refs["value"].dtype
        self.K, self.V = (step.refs[name].shape[2] for name in ("key", "value"))

    def forward_stages(self) -> Iterator[None]:
        """The chunk's gates, and the slots at its start and end."""
        for stage in (self._gate, self._write_slots, self._pass_slots_on):
            stage()
            yield

    def backward_stages(self) -> Iterator[None]:
        for stage in (
            self._start, self._slot_logits, self._softmax, self._probabilities, self._tokens,
            self._finish,
        ):  # fmt: skip
            stage()
            yield

    def _gate(self) -> None:
        decay = self.step.tokens.cat("decay", self.n, self.spec.entering_tokens)
        self.gates = Gates(decay, self.spec, self.dtype)

    def _write_slots(self) -> None:
        C, tokens = self.spec.chunk, self.step.tokens
        self.to_end, keep = self.gates.to_end, jnp.exp2(self.gates.end)
        self.segments = chunk_segments(self.step.refs, tokens, self.n, self.spec)
        if self.segments is not None:
            self.to_end, keep = (
                self.segments.where_token_reaches_end(self.to_end),
                self.segments.where_start_reaches_end(keep),
            )
        self.written = (self.gates.write[:C] * self.to_end).astype(self.dtype)
        self.keep = to_column(keep)
        entered = jnp.concatenate([tokens.cat(name, self.n, C) for name in ("key", "value")], 1)
        self.added = matmul_tn(self.written, entered)

    def _pass_slots_on(self) -> None:
        start = self.step.slots
        self.start_key, self.start_value = (
            x.astype(self.dtype) for x in (start[:, : self.K], start[:, self.K :])
        )
        self.end = self.step.slots = self.keep * start + self.added

    def _start(self) -> None:
        n, spec, refs, tokens = self.n, self.spec, self.step.refs, self.step.tokens
        self.entering = tokens.cat("key", n, spec.entering_tokens)
        self.value = tokens.cat("value", n, spec.chunk_tokens)
        self.rotated_key = tokens.cat("rotated_key", n, spec.chunk_tokens)
        self.raw_query = stack_heads(refs["query"], self.rows, spec.group)
        self.d_out = stack_heads(refs["out_cotangent"], self.rows, spec.group)
        self.rotated_query = rotated_queries(refs, self.rows, spec)
        self.query = apply_feature_map(self.raw_query, spec.feature_map)
        self.scores = by_head(matmul_nt(self.query, self.entering), spec.group)  # [G, C, columns]
        self.products = by_head(matmul_nt(self.d_out, self.value), spec.group)  # D, [G, C, width]
        self.lse = self._row_column("lse")

    def _slot_logits(self) -> None:
        spec, gates, G = self.spec, self.gates, self.spec.group
        self.masks = Masks(spec, self.segments, self.n, self.step.index)
        self.carried = jnp.exp2(gates.rows)
        if self.segments is not None:
            self.carried = self.segments.where_row_sees_start(self.carried)
        size = range(len(gates.blocks))
        self.weights, self.rises = [gates.weight(i) for i in size], [gates.rise(i) for i in size]
        masked = [
            jnp.where(self.masks.entering, x[..., : spec.entering_tokens], 0.0)
            for x in (self.scores, self.products)
        ]
        self.stacked = [
            jnp.concatenate([flat(x[:, block, extent]) for x in masked], 0).astype(self.dtype)
            for block, extent in zip(gates.blocks, gates.extents, strict=True)
        ]
        self.carried_a = by_head(matmul_nt(self.query, self.start_key), G)  # [G, C, M]
        self.carried_da = by_head(matmul_nt(self.d_out, self.start_value), G)
        self.spread = [matmul(x, w) for x, w in zip(self.stacked, self.weights, strict=True)]
        if spec.has_window:
            self.b = by_head(matmul_nt(self.rotated_query, self.rotated_key), G)  # [G, C, width]
        self.half = G * gates.blocks[0].stop
        self.a, self.da = (
            x * self.carried
            + join([
                by_head(y[part], G) * rise
                for y, rise in zip(self.spread, self.rises, strict=True)
            ], 1)
            for x, part in (
                (self.carried_a, slice(0, self.half)), (self.carried_da, slice(self.half, None))
            )
        )  # fmt: skip

    def _softmax(self) -> None:
        spec, da, products = self.spec, self.da, self.products
        logits = self.masks.slot_logits(self.a * (spec.scale * LOG2E))
        pa = jnp.exp2(logits - self.lse)
        d_weight = self._row_column("weight_cotangent") if spec.slot_weight else 0.0
        if spec.has_window:
            b = jnp.where(self.masks.window, scaled(self.b, spec.window_scale), MASKED_LOGIT)
            self.pb = jnp.exp2(b - self.lse)
        if spec.wide_window:
            delta = self._row_column("delta")
        else:
            share = self.pb * products if spec.has_window else None
            pulled = da if spec.pull_slots_only else da + d_weight
            delta = jnp.sum(overlay(jnp.add, pa * pulled, share, 0.0), -1, keepdims=True)
        ds = pa * ((da + (d_weight - delta)) * spec.scale)
        if spec.has_window:
            self.db = flat(self.pb * ((products - delta) * spec.window_slope)).astype(self.dtype)
        self.ds_carried, self.pa_carried = (
            flat(x * self.carried).astype(self.dtype) for x in (ds, pa)
        )
        self.pairs = [
            jnp.concatenate([flat(x[:, block] * rise) for x in (ds, pa)], 0).astype(self.dtype)
            for block, rise in zip(self.gates.blocks, self.rises, strict=True)
        ]

    def _probabilities(self) -> None:
        spec, G, half, dtype = self.spec, self.spec.group, self.half, self.dtype
        self.into_rows = self._into_rows()
        gathered = [matmul_nt(x, w) for x, w in zip(self.pairs, self.weights, strict=True)]
        d_scores = join(
            [widen(by_head(x[:half], G), spec.entering_tokens) for x in gathered], 1
        )  # L
        self.d_scores = flat(jnp.where(self.masks.entering, d_scores, 0.0)).astype(dtype)
        p = join([widen(by_head(x[half:], G), spec.chunk_tokens) for x in gathered], 1)  # A, then P
        p = jnp.where(self.masks.slots, p, self.pb if spec.has_window else 0.0)
        self.p = flat(p).astype(dtype)
        self.per_block = [matmul_tn(x, y) for x, y in zip(self.stacked, self.pairs, strict=True)]
        self.d_start = jnp.concatenate(
            [matmul_tn(self.ds_carried, self.query), matmul_tn(self.pa_carried, self.d_out)], 1
        )
        if spec.has_window:
            self.d_rotated_query = by_head(matmul(self.db, self.rotated_key), G)
            self.d_rotated_key = matmul_tn(self.db, self.rotated_query)  # [width, K]

    def _into_rows(self) -> jax.Array:
        """R, [C, M]."""
        wide, G = jnp.float32, self.spec.group
        within = [
            jnp.sum((pair.astype(wide) * x).reshape(2 * G, -1, x.shape[1]), 0)
            for pair, x in zip(self.pairs, self.spread, strict=True)
        ]
        carried = (
            by_head(self.ds_carried.astype(wide), G) * self.carried_a
            + by_head(self.pa_carried.astype(wide), G) * self.carried_da
        )
        return join(within, 0) + jnp.sum(carried, 0)

    def _tokens(self) -> None:
        C, K, carry = self.spec.chunk, self.K, self.step.carry
        d_end = carry["slots"]
        d_end_key, d_end_value = (x.astype(self.dtype) for x in (d_end[:, :K], d_end[:, K:]))
        d_end_narrow = jnp.concatenate([d_end_key, d_end_value], 1)
        into_end = jnp.sum(d_end_narrow.astype(jnp.float32) * self.end, -1, keepdims=True)
        self.into_end = to_row(into_end)  # x1
        carry["slots"] = self.keep * d_end + self.d_start

        d_query = matmul(self.ds_carried, self.start_key) + matmul(self.d_scores, self.entering)
        self.d_query = by_head(d_query, self.spec.group)
        written = matmul(self.written, d_end_narrow)  # [C, K + V]
        d_key = matmul_tn(self.d_scores, self.query)  # [columns, K]
        d_value = matmul_tn(self.p, self.d_out)  # [width, V]
        self.d_key, self.d_value = (
            _add_to_first(x, y) for x, y in ((d_key, written[:, :K]), (d_value, written[:, K:]))
        )
        self.ending = matmul_nt(self.entering[:C], d_end_key)
        self.ending += matmul_nt(self.value[:C], d_end_value)  # [C, M]

    def _finish(self) -> None:
        d_decay = self._decay_gradient()
        self._store_tokens()
        self._store_decays(d_decay)

    def _decay_gradient(self) -> jax.Array:
        """[columns, M]."""
        gates, spec = self.gates, self.spec
        falls = [gates.fall(i) for i in range(len(gates.blocks))]
        d_write = _sum_blocks(self.per_block, falls, gates, spec)
        weights = [x.astype(jnp.float32) for x in self.weights]
        rounded = _sum_blocks(self.per_block, weights, gates, spec)
        d_write = _add_to_first(d_write, self.ending * self.to_end)
        rounded = _add_to_first(rounded, self.ending * self.written.astype(jnp.float32))
        d_decay = reverse_cumulative_sum(_at_tokens(self.into_rows, spec) - rounded)
        d_decay -= (1.0 - gates.write) * d_write
        d_decay = _add_to_first(d_decay, self.into_end, spec.chunk)
        decay = self.step.tokens.cat("decay", self.n, spec.entering_tokens)
        return jnp.where(decay > floor_of(self.dtype), d_decay, 0.0)

    def _store_tokens(self) -> None:
        spec, rows, refs, outs, carry = (
            self.spec, self.rows, self.step.refs, self.step.outs, self.step.carry
        )  # fmt: skip
        raw_query = by_head(self.raw_query, spec.group)
        d_query = feature_map_pullback(self.d_query, raw_query, spec.feature_map)
        d_key = _overlap_add(self.d_key, carry, "key", spec)
        d_key = feature_map_pullback(d_key, refs["key"][0, rows], spec.feature_map)
        if spec.has_window:
            d_rotated_query = self.d_rotated_query
            d_rotated_key = _overlap_add(self.d_rotated_key, carry, "rotated_key", spec)
            if spec.rotated:
                unstack_heads(outs["rotated_query"], rows, d_rotated_query)
                outs["rotated_key"][0, rows] = d_rotated_key.astype(self.dtype)
            elif spec.rope:
                d_query += rotate_back(d_rotated_query, refs["rope_table"][0, rows])
                d_key += rotate_back(d_rotated_key, refs[spec.rope_tables[-1]][0, rows])
            else:
                d_query += d_rotated_query
                d_key += d_rotated_key
        unstack_heads(outs["query"], rows, d_query)
        outs["key"][0, rows] = d_key.astype(self.dtype)
        d_value = _overlap_add(self.d_value, carry, "value", spec)
        outs["value"][0, rows] = d_value.astype(self.dtype)

    def _store_decays(self, d_decay: jax.Array) -> None:
        """A tile of 128 lanes at a time, once all its chunks are known."""
        spec, refs, decays = self.spec, self.step.refs, self.step.decays
        decays.insert(0, _overlap_add(d_decay, self.step.carry, "log_decay", spec))
        lanes, first = min(128, spec.step_rows), self.rows.start
        if first % lanes:
            return
        tile = slice(first, first + lanes)
        turned = join(decays[: lanes // spec.chunk], 0).T
        if spec.segments:
            turned = where_entering(turned, refs["row_segments"][0, :, tile])
        self.step.outs["log_decay"][0, 0, :, tile] = turned

    def _row_column(self, name: str) -> jax.Array:
        """The chunk's rows of [1, 1, G, rows] -> [G, C, 1]."""
        return to_column(self.step.refs[name][0, 0, :, self.rows][:, None, :])


def _add_to_first(x: jax.Array, y: jax.Array, rows: int | None = None) -> jax.Array:
    """y added to the first rows of x, as many as y has, or `rows`."""
    rows = y.shape[0] if rows is None else rows
    if x.shape[0] == rows:
        return x + y
    return jnp.concatenate([x[:rows] + y, x[rows:]], 0)


def _sum_blocks(
    per_block: list[jax.Array], factors: list[jax.Array], gates: Gates, spec: CallSpec
) -> jax.Array:
    """[columns, M]: the blocks' products, each up to its last column, summed."""
    size, parts = gates.blocks[0].stop, []
    for first in range(0, spec.entering_tokens, size):
        rows = slice(first, first + size)
        terms = [
            x[rows] * factor[rows]
            for x, factor, extent in zip(per_block, factors, gates.extents, strict=True)
            if first < extent.stop
        ]
        parts.append(functools.reduce(jnp.add, terms))
    return join(parts, 0)


def _at_tokens(x: jax.Array, spec: CallSpec) -> jax.Array:
    """Row r of [C, M] to the last token that it finds in the slots, row r + d of [columns, M]."""
    if not spec.halo_padding:
        return x
    padded = jnp.concatenate(
        [x, jnp.zeros((spec.entering_tokens - spec.chunk, x.shape[1]), x.dtype)], 0
    )
    return pltpu.roll(padded, spec.halo_padding, 0)


def _overlap_add(x: jax.Array, carry: Arrays, name: str, spec: CallSpec) -> jax.Array:
    """The chunk's own [C, D] of the gradients x of cat's first rows, with the later chunks' share.

    carry[name], [halo, D], is what the later chunks have added to the rows of cat from the C-th on;
    it becomes what this chunk and they add to the halo.
    """
    if not spec.halo:
        return x
    C, more = spec.chunk, carry[name]
    parts = [x[:C]]
    if x.shape[0] > C:
        parts.append(x[C:] + more[: x.shape[0] - C])
    if x.shape[0] - C < spec.halo:
        parts.append(more[x.shape[0] - C :])
    total = join(parts, 0)
    carry[name] = total[: spec.halo]
    return total[spec.halo :]
