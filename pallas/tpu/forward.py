"""The fused forward: slots, window, rotary embedding and one softmax in one pass over the tokens.

With symbols as in `chunk.py`, S0 the slots at the chunk's start, s = 1 - exp(decay), G the
cumulative decay and a, b the logits of slots and window:

    a_r = exp(G_r) (q_r . SK0) + sum_{i <= r + d} (q_r . k_i) s_i exp(G_r - G_i)
    o_r = (p_r exp(G_r)) SV0 + sum_i P_ri v_i
    P_ri = sum_m p_rm s_im exp(G_rm - G_im) for i <= r + d, and the window's p beyond
"""

import functools
from collections.abc import Iterator

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from pallas.tpu.chunk import (
    LOG2E,
    MASKED,
    Facts,
    Gates,
    Masks,
    Spec,
    Tokens,
    apply_feature_map,
    by_head,
    decay_blocks,
    emit,
    facts_blocks,
    flat,
    join,
    matmul,
    matmul_nt,
    matmul_tn,
    overlay,
    rotate,
    scaled,
    to_column,
    to_row,
    widen,
)
from pallas.tpu.grid import Grid

Arrays = dict[str, jax.Array]


def forward(
    inputs: Arrays, spec: Spec, *, group: int, skew: int, save: bool, interpret, vmem: int
) -> Arrays:
    """The kernel's call.

    inputs: query [B, T, H * G * K], key [B, T, H * K], value [B, T, H * V], log_decay [B, H, M, T]
    float32; with spec.rope, table [1 or B, T, 2 K] float32 (`expand_table` of the rotation times
    the root of scale * log2(e)), and, if spec.wide, entering_table, the keys'; with spec.rotated,
    rotated_query and rotated_key; with spec.segments, facts [B, 8, T] float32 (`pack_facts`) and
    visible [B, T / C, 256 + width] float32 (`pack_visible`); with spec.state, slots
    [B, H, M, K + V] float32. T is a multiple of C * N, K and V of 128.

    Returns out [B, T, H * G * V] and lse [B, H, G, T] float32 (base 2); with spec.weight,
    slot_weight [B, H, G, T]; with spec.state, end [B, H, M, K + V]; with `save`, starts
    [B, H, T/(C N), M, K + V], the slots at the start of every grid step.
    """
    grid = Grid.of(inputs, spec)
    B, H, T, K, V, M = grid.B, grid.H, grid.T, grid.K, grid.V, grid.M
    dtype, wide = inputs["query"].dtype, jnp.float32
    shapes = {
        "out": ((B, T, H * spec.group * V), dtype, grid.tokens(spec.group * V)),
        "lse": ((B, H, spec.group, T), wide, grid.lanes(spec.group)),
    }
    if spec.weight:
        shapes["slot_weight"] = shapes["lse"]
    if spec.state:
        shapes["end"] = ((B, H, M, K + V), wide, grid.slots())
    if save:
        shapes["starts"] = ((B, H, grid.steps, M, K + V), wide, grid.starts())
    kernel = functools.partial(_kernel, spec=spec, group=group, skew=skew)
    heads = grid.heads
    scratch = {"slots": pltpu.VMEM((heads, M, K + V), wide)}
    if spec.halo:
        scratch |= {
            "key": pltpu.VMEM((heads, spec.halo, K), dtype),
            "rotated_key": pltpu.VMEM((heads, spec.halo, K), dtype),
            "value": pltpu.VMEM((heads, spec.halo, V), dtype),
            "decay": pltpu.VMEM((heads, spec.halo, M), wide),
        }
    return pl.pallas_call(
        kernel,
        grid=grid.shape,
        in_specs=[grid.input_specs(inputs)],
        out_specs=[{name: block for name, (_, _, block) in shapes.items()}],
        out_shape=[{n: jax.ShapeDtypeStruct(s, t) for n, (s, t, _) in shapes.items()}],
        scratch_shapes=[scratch],
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("parallel", "parallel", "arbitrary", "arbitrary"),
            vmem_limit_bytes=vmem,
        ),
        interpret=interpret,
        name="nha_forward",
    )(inputs)[0]


def _kernel(refs, outs, past, *, spec: Spec, group: int, skew: int):
    step, head = pl.program_id(2), pl.program_id(3)
    halos = ["key", "rotated_key", "value", "decay"] if spec.halo else []
    kept = ["slots", *halos]

    @pl.when(step == 0)
    def _():
        for ref in (past[name] for name in kept):
            ref[head] = jnp.zeros(ref.shape[1:], ref.dtype)
        if spec.state:
            past["slots"][head] = refs["slots"][0, 0]

    tokens = _load(refs, past, head, spec)
    tokens.issue()  # the transpositions and rotations, long in coming, ahead of all else
    slots = [past["slots"][head]]
    if "starts" in outs:
        outs["starts"][0, 0, 0] = slots[0]
    chunks = [_chunk(n, refs, outs, tokens, slots, step, spec) for n in range(spec.chunks)]
    emit(chunks, group, skew)
    past["slots"][head] = slots[0]
    if spec.state:
        outs["end"][0, 0] = slots[0]
    for name in halos:
        past[name][head] = tokens.cat(name, spec.chunks, spec.halo)


def _load(refs, past, head, spec: Spec) -> Tokens:
    """rotated_key, key (feature-mapped), value, decay."""
    rows = lambda n: slice(n * spec.chunk, (n + 1) * spec.chunk)  # noqa: E731
    dtype = refs["key"].dtype

    def rotated_key(n):
        if spec.rotated:
            return refs["rotated_key"][0, rows(n)]
        key = refs["key"][0, rows(n)]
        return rotate(key, refs[spec.tables[-1]][0, rows(n)]).astype(dtype) if spec.rope else key

    own = {
        "rotated_key": rotated_key,
        "key": lambda n: apply_feature_map(refs["key"][0, rows(n)], spec.feature_map),
        "value": lambda n: refs["value"][0, rows(n)],
        "decay": decay_blocks(refs["log_decay"], spec, dtype),
    }
    if spec.segments:
        own |= facts_blocks(refs["facts"], spec)
    halos = ("key", "rotated_key", "value", "decay") if spec.halo else ()
    return Tokens(spec, own, {name: past[name][head] for name in halos})


def _chunk(
    n: int, refs, outs, tokens: Tokens, slots: list[jax.Array], step, spec: Spec
) -> Iterator[None]:
    """One chunk, a stage at a time; `slots` holds the slots at the start of the next one."""
    C, G = spec.chunk, spec.group
    rows = slice(n * C, (n + 1) * C)
    entering = tokens.cat("key", n, spec.columns)
    value = tokens.cat("value", n, spec.width)
    K, dtype = entering.shape[1], value.dtype
    query = join([refs["query"][0, rows, g * K : (g + 1) * K] for g in range(G)], 0)
    rotated = query
    if spec.rotated:
        rotated = join([refs["rotated_query"][0, rows, g * K : (g + 1) * K] for g in range(G)], 0)
    if spec.rope:
        rotated = flat(rotate(by_head(query, G), refs["table"][0, rows])).astype(dtype)
    query = apply_feature_map(query, spec.feature_map)
    facts = Facts(tokens, refs["visible"][0, n : n + 1], n, spec) if spec.segments else None
    masks = Masks(spec, facts)
    window_mask = masks.window if spec.segments else since_start(masks.window, n, step, spec)

    scores = by_head(matmul_nt(query, entering), G)  # [G, C, columns]
    gates = Gates(tokens.cat("decay", n, spec.columns), spec, dtype)
    yield

    to_end, keep = gates.write[:C] * gates.to_end, jnp.exp2(gates.end)
    carried = jnp.exp2(gates.rows)
    if facts is not None:
        to_end, keep = facts.written(to_end), facts.kept(keep)
        carried = facts.carried(carried)
    keep = to_column(keep)
    added = matmul_tn(to_end.astype(dtype), jnp.concatenate([entering[:C], value[:C]], 1))
    b = None
    if spec.has_window:
        rotated_key = tokens.cat("rotated_key", n, spec.width)
        b = by_head(matmul_nt(rotated, rotated_key), G)  # [G, C, width]
    start_key, start_value = slots[0][:, :K].astype(dtype), slots[0][:, K:].astype(dtype)
    slots[0] = keep * slots[0] + added
    yield

    masked = jnp.where(masks.causal, scores, 0.0)
    weights = [gates.weight(i) for i in range(len(gates.blocks))]
    rises = [gates.rise(i) for i in range(len(gates.blocks))]
    a = by_head(matmul_nt(query, start_key), G) * carried
    a += join([
        by_head(matmul(flat(masked[:, block, extent]).astype(dtype), weight), G) * rise
        for block, extent, weight, rise in zip(
            gates.blocks, gates.extents, weights, rises, strict=True
        )
    ], 1)  # fmt: skip
    a *= spec.scale * LOG2E
    yield

    a = mask_slots(a, n, step, facts, spec)
    if b is not None:
        b = jnp.where(window_mask, scaled(b, spec.window_scale), MASKED)
    top = jnp.max(overlay(jnp.maximum, a, b, MASKED), -1, keepdims=True)
    pa = jnp.exp2(a - top)
    pb = None if b is None else jnp.exp2(b - top)
    mass = jnp.sum(overlay(jnp.add, pa, pb, 0.0), -1, keepdims=True)
    inverse = pltpu.reciprocal(mass, approx=dtype != jnp.float32)
    yield

    out = matmul(flat(pa * carried).astype(dtype), start_value)
    p = join([
        widen(by_head(matmul_nt(flat(pa[:, block] * rise).astype(dtype), weight), G), spec.width)
        for block, weight, rise in zip(gates.blocks, weights, rises, strict=True)
    ], 1)  # fmt: skip
    p = jnp.where(masks.slots, p, 0.0 if pb is None else pb)
    yield

    out = by_head(out + matmul(flat(p).astype(dtype), value), G) * inverse
    V = value.shape[1]
    for g in range(G):
        outs["out"][0, rows, g * V : (g + 1) * V] = out[g].astype(dtype)
    outs["lse"][0, 0, :, rows] = to_row(top + jnp.log2(mass))
    if spec.weight:
        outs["slot_weight"][0, 0, :, rows] = to_row(jnp.sum(pa, -1, keepdims=True) * inverse)
    yield


def mask_slots(a: jax.Array, n: int, step, facts: Facts | None, spec: Spec) -> jax.Array:
    """Slot logits [G, C, M] without those that are padding, or still empty if they are masked."""
    if spec.slots < a.shape[-1]:
        a = jnp.where(lax.broadcasted_iota(jnp.int32, a.shape, 2) < spec.slots, a, MASKED)
    if not spec.mask_empty:
        return a
    if facts is not None:
        return jnp.where(facts.enters[:, : a.shape[2]], a, MASKED)
    if n * spec.chunk >= spec.window and not spec.wide:
        return a
    row = lax.broadcasted_iota(jnp.int32, (spec.chunk, 1), 0)
    return jnp.where(row >= spec.window - step * spec.rows - n * spec.chunk, a, MASKED)


def since_start(mask: jax.Array, n: int, step, spec: Spec) -> jax.Array:
    """The mask [C, width] without the columns of cat that lie before the sequence."""
    before = spec.window if spec.wide else spec.halo
    if n * spec.chunk >= before and not spec.wide:
        return mask
    column = lax.broadcasted_iota(jnp.int32, mask.shape, 1)
    return mask & (column >= before - step * spec.rows - n * spec.chunk)
