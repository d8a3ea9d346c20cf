"""The fused forward: slots, window, rotary embedding and one softmax in one pass over the tokens.

With symbols as in `spec.py`, S0 the slots at the chunk's start, s = 1 - exp(decay), G the
cumulative decay and a, b the logits of slots and window:

    a_r = exp(G_r) (q_r . SK0) + sum_{i <= r + d} (q_r . k_i) s_i exp(G_r - G_i)
    o_r = (p_r exp(G_r)) SV0 + sum_i P_ri v_i
    P_ri = sum_m p_rm s_im exp(G_rm - G_im) for i <= r + d, and the window's p beyond
"""

import dataclasses
import functools
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from pallas.constants import MASKED_LOGIT
from pallas.tpu.arithmetic import (
    LOG2E,
    apply_feature_map,
    by_head,
    flat,
    join,
    matmul,
    matmul_nt,
    matmul_tn,
    overlay,
    scaled,
    to_column,
    to_row,
    widen,
)
from pallas.tpu.chunk_tokens import (
    Tokens,
    chunk_segments,
    emit,
    own_blocks,
    rotated_queries,
    rows_of,
    stack_heads,
    unstack_heads,
)
from pallas.tpu.gates import Gates
from pallas.tpu.grid import Grid
from pallas.tpu.launch import Arrays, Output, launch
from pallas.tpu.masks import Masks
from pallas.tpu.spec import CallSpec


def forward(
    inputs: Arrays, spec: CallSpec, *, group: int, skew: int, save: bool, interpret: bool
) -> Arrays:
    """The kernel's call.

    inputs: query [B, T, H * G * K], key [B, T, H * K], value [B, T, H * V], log_decay [B, H, M, T]
    float32; with spec.rope, rope_table [1 or B, T, 2 K] float32 (`expand_table` of the rotation
    times the root of scale * log2(e)), and, if spec.wide_window, token_rope_table, the keys'; with
    spec.rotated, rotated_query and rotated_key; with spec.segments, row_segments [B, 8, T] float32
    (`pack_row_segments`) and chunk_segments [B, T / C, 256 + chunk_tokens] float32
    (`pack_chunk_segments`); with spec.state, slots [B, H, M, K + V] float32. T is a multiple of
    spec.step_rows, K and V of 128.

    Returns out [B, T, H * G * V] and lse [B, H, G, T] float32 (base 2); with spec.slot_weight,
    slot_weight [B, H, G, T]; with spec.state, end [B, H, M, K + V]; with `save`, starts
    [B, H, T/(C N), M, K + V], the slots at the start of every grid step.
    """
    grid = Grid.of(inputs, spec)
    B, H, T, K, V, M = grid.B, grid.H, grid.T, grid.K, grid.V, grid.M
    dtype, wide = inputs["query"].dtype, jnp.float32
    outputs = {
        "out": Output((B, T, H * spec.group * V), dtype, grid.tokens(spec.group * V)),
        "lse": Output((B, H, spec.group, T), wide, grid.lanes(spec.group)),
    }
    if spec.slot_weight:
        outputs["slot_weight"] = outputs["lse"]
    if spec.state:
        outputs["end"] = Output((B, H, M, K + V), wide, grid.slots())
    if save:
        outputs["starts"] = Output((B, H, grid.steps, M, K + V), wide, grid.starts())
    scratch = {"slots": pltpu.VMEM((grid.heads, M, K + V), wide)}
    if spec.halo:
        scratch |= {
            name: pltpu.VMEM((grid.heads, spec.halo, size), kind)
            for name, size, kind in (
                ("key", K, dtype), ("rotated_key", K, dtype), ("value", V, dtype),
                ("decay", M, wide),
            )
        }  # fmt: skip
    return launch(
        functools.partial(_kernel, spec=spec, group=group, skew=skew),
        (inputs, grid.input_specs(inputs)),
        name="nha_forward",
        grid=grid.shape,
        parallel=2,
        outputs=outputs,
        scratch=scratch,
        interpret=interpret,
    )


def _kernel(refs, outs, past, *, spec: CallSpec, group: int, skew: int):
    step, head = pl.program_id(2), pl.program_id(3)
    halos = ["key", "rotated_key", "value", "decay"] if spec.halo else []

    @pl.when(step == 0)
    def _():
        for ref in (past[name] for name in ("slots", *halos)):
            ref[head] = jnp.zeros(ref.shape[1:], ref.dtype)
        if spec.state:
            past["slots"][head] = refs["slots"][0, 0]

    tokens = Tokens(spec, own_blocks(refs, spec), {name: past[name][head] for name in halos})
    tokens.issue()  # the transpositions and rotations, long in coming, ahead of all else
    shared = _Step(refs, outs, tokens, spec, step, slots=past["slots"][head])
    if "starts" in outs:
        outs["starts"][0, 0, 0] = shared.slots
    emit([_Chunk(n, shared).stages() for n in range(spec.chunks)], group, skew)
    past["slots"][head] = shared.slots
    if spec.state:
        outs["end"][0, 0] = shared.slots
    for name in halos:
        past[name][head] = tokens.cat(name, spec.chunks, spec.halo)


@dataclasses.dataclass
class _Step:
    """What the chunks of a grid step share."""

    refs: Any
    outs: Any
    tokens: Tokens
    spec: CallSpec
    index: jax.Array  # of the step
    slots: jax.Array  # [M, K + V], at the start of the next chunk


class _Chunk:
    """One chunk's work; the stages leave to each other what they set as attributes."""

    def __init__(self, n: int, step: _Step):
        self.n, self.step, self.spec, self.rows = n, step, step.spec, rows_of(n, step.spec)

    def stages(self) -> Iterator[None]:
        for stage in (
            self._start, self._write_slots, self._slot_logits, self._softmax, self._probabilities,
            self._store,
        ):  # fmt: skip
            stage()
            yield

    def _start(self) -> None:
        n, spec, refs, tokens = self.n, self.spec, self.step.refs, self.step.tokens
        self.entering = tokens.cat("key", n, spec.entering_tokens)
        self.value = tokens.cat("value", n, spec.chunk_tokens)
        self.dtype = self.value.dtype
        self.rotated_query = rotated_queries(refs, self.rows, spec)
        query = stack_heads(refs["query"], self.rows, spec.group)
        self.query = apply_feature_map(query, spec.feature_map)
        self.segments = chunk_segments(refs, tokens, n, spec)
        self.masks = Masks(spec, self.segments, n, self.step.index)
        self.scores = by_head(matmul_nt(self.query, self.entering), spec.group)  # [G, C, columns]
        self.gates = Gates(tokens.cat("decay", n, spec.entering_tokens), spec, self.dtype)

    def _write_slots(self) -> None:
        C, gates, segments, dtype = self.spec.chunk, self.gates, self.segments, self.dtype
        to_end, keep = gates.write[:C] * gates.to_end, jnp.exp2(gates.end)
        self.carried = jnp.exp2(gates.rows)
        if segments is not None:
            to_end, keep = (
                segments.where_token_reaches_end(to_end),
                segments.where_start_reaches_end(keep),
            )
            self.carried = segments.where_row_sees_start(self.carried)
        keep = to_column(keep)
        entered = jnp.concatenate([self.entering[:C], self.value[:C]], 1)
        added = matmul_tn(to_end.astype(dtype), entered)
        self.b = None
        if self.spec.has_window:
            rotated_key = self.step.tokens.cat("rotated_key", self.n, self.spec.chunk_tokens)
            self.b = by_head(matmul_nt(self.rotated_query, rotated_key), self.spec.group)
        K = self.entering.shape[1]
        self.start_key, self.start_value = (
            x.astype(dtype) for x in (self.step.slots[:, :K], self.step.slots[:, K:])
        )
        self.step.slots = keep * self.step.slots + added

    def _slot_logits(self) -> None:
        G, gates = self.spec.group, self.gates
        masked = jnp.where(self.masks.entering, self.scores, 0.0)
        self.weights = [gates.weight(i) for i in range(len(gates.blocks))]
        self.rises = [gates.rise(i) for i in range(len(gates.blocks))]
        a = by_head(matmul_nt(self.query, self.start_key), G) * self.carried
        a += join([
            by_head(matmul(flat(masked[:, block, extent]).astype(self.dtype), weight), G) * rise
            for block, extent, weight, rise in zip(
                gates.blocks, gates.extents, self.weights, self.rises, strict=True
            )
        ], 1)  # fmt: skip
        self.a = a * (self.spec.scale * LOG2E)

    def _softmax(self) -> None:
        a, b = self.masks.slot_logits(self.a), self.b
        if b is not None:
            b = jnp.where(self.masks.window, scaled(b, self.spec.window_scale), MASKED_LOGIT)
        logits = overlay(jnp.maximum, a, b, MASKED_LOGIT)
        if self.segments is not None:  # then all p are 0, here and in the backward
            logits = overlay(jnp.maximum, logits, self.segments.least_max[None], MASKED_LOGIT)
        self.top = jnp.max(logits, -1, keepdims=True)
        self.pa = jnp.exp2(a - self.top)
        self.pb = None if b is None else jnp.exp2(b - self.top)
        self.mass = jnp.sum(overlay(jnp.add, self.pa, self.pb, 0.0), -1, keepdims=True)
        if self.segments is not None:
            self.mass = jnp.maximum(self.mass, 0.5)  # padding has none
        self.inverse = pltpu.reciprocal(self.mass, approx=self.dtype != jnp.float32)

    def _probabilities(self) -> None:
        G, width, dtype = self.spec.group, self.spec.chunk_tokens, self.dtype
        self.out = matmul(flat(self.pa * self.carried).astype(dtype), self.start_value)
        within = [
            matmul_nt(flat(self.pa[:, block] * rise).astype(dtype), weight)
            for block, weight, rise in zip(self.gates.blocks, self.weights, self.rises, strict=True)
        ]
        p = join([widen(by_head(x, G), width) for x in within], 1)
        self.p = jnp.where(self.masks.slots, p, 0.0 if self.pb is None else self.pb)

    def _store(self) -> None:
        outs, rows = self.step.outs, self.rows
        out = self.out + matmul(flat(self.p).astype(self.dtype), self.value)
        unstack_heads(outs["out"], rows, by_head(out, self.spec.group) * self.inverse)
        outs["lse"][0, 0, :, rows] = to_row(self.top + jnp.log2(self.mass))
        if self.spec.slot_weight:
            weight = jnp.sum(self.pa, -1, keepdims=True) * self.inverse
            outs["slot_weight"][0, 0, :, rows] = to_row(weight)
