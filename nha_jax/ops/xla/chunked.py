"""Native Hybrid Attention in plain XLA: a scan over groups of chunks, linear in time and memory.

A chunk of C rows reads one buffer `cat = [the W rows before; the chunk]`. Row r of the chunk sees
columns 0..r of it through the slots (they entered W rows later) and columns r+1..r+W through the
window: the two are complementary, so one product P @ cat_value serves both. With a `slot_delay` E
below W the slots' columns are W-E..W-E+r, and the weights of those that both see add up.
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.ad_checkpoint import checkpoint_name

from nha_jax.ops.rope import Rope, apply_rope
from nha_jax.ops.state import Past, Slots, Tokens, compute_dtype, empty_slots
from nha_jax.ops.timeline import (
    Timeline,
    build_timeline,
    keep_last_segment,
    next_state,
    nothing_leaves,
)
from nha_jax.ops.types import NHAOutput, Options
from nha_jax.ops.xla.full import full_attention
from nha_jax.ops.xla.gates import ChunkGates, chunk_gates
from pallas.constants import OUT, STARTS

NARROW = 256  # the widest window that short chunks serve


class ChunkPlan(NamedTuple):
    """How T rows are cut into steps of several chunks: static, hashable."""

    window: int  # W
    delay: int  # rows after its own in which a token enters the slots, at most W
    chunk: int  # C, rows of a chunk
    chunks: int  # chunks a step, side by side
    steps: int

    @property
    def rows(self) -> int:
        """Rows of a step."""
        return self.chunk * self.chunks


class ReadTokens(NamedTuple):
    """What queries read, [B, H, W + rows, .] each; row W + t is token t.

    With it goes `token_segment` [B, 1, W + rows], the segments of these rows' tokens.
    """

    slot_key: jax.Array
    rotated_key: jax.Array
    value: jax.Array


class QueryRows(NamedTuple):
    """What belongs to one query row, cut into steps: the leading axis is `steps`, N chunks a step.

    The einsums below name the axes b, h, n (chunks), g (G), t and j (rows of a chunk), i (rows
    read), m (slots), k and v.
    """

    slot_query: jax.Array  # [B, H, N, G, C, K]
    rotated_query: jax.Array  # [B, H, N, G, C, K]
    log_decay: jax.Array  # [B, H, N, C, M], of the token that enters in this row's turn


class Segments(NamedTuple):
    """Numbers of segments, cut into steps: who may see whom."""

    query: jax.Array  # [B, N, C]
    slots: jax.Array  # [B, N, C], the segment that the slots belong to after the row's turn
    reads_own_slots: jax.Array  # [B, N, C] bool, they hold a token of the query's segment
    start: jax.Array  # [B, N], the segment of the slots at the chunk's start


def chunked_attention(
    query: jax.Array,
    key: jax.Array,
    value: jax.Array,
    log_decay: jax.Array,
    *,
    rope: Rope | None,
    segment_ids: jax.Array | None,
    past: Past | None,
    options: Options,
) -> NHAOutput:
    """Computes `nha_attention` in chunks; shapes as there.

    Memory is linear in T, time is O(T (W + C)).
    """
    B, T, Hq, _ = query.shape
    M, W = log_decay.shape[-1], options.window_size
    tokens = Tokens(key, apply_rope(key, rope), value, log_decay.astype(compute_dtype(query)))
    rotated_query = apply_rope(query, rope)
    timeline = build_timeline(tokens, segment_ids, past, W, slot_delay=options.slot_delay)
    slots = empty_slots(key, value, M)
    if nothing_leaves(options.delay, T, past is not None):
        out, weight = full_attention(rotated_query, timeline, num_slots=M, options=options)
    else:
        assert W is not None
        assert options.delay is not None
        plan = _plan(T, W, options.delay, num_slots=M, num_heads=B * Hq)
        read, token_segment, rows, segments = _cut(query, rotated_query, timeline, plan, options)
        # As constants they make XLA on CPUs (0.12.0) read what nobody wrote, in a single step.
        slots = lax.optimization_barrier(slots if past is None else past.slots)
        out, weight, slots, _ = _scan(plan, options, read, token_segment, rows, slots, segments)
        slots = keep_last_segment(slots, timeline)
        # [steps, B, H, N, G, C, V] -> [B, T, Hq, V]
        out = out.transpose(1, 0, 3, 5, 2, 4, 6).reshape(B, -1, Hq, value.shape[3])[:, :T]
        weight = weight.transpose(1, 0, 3, 5, 2, 4).reshape(B, -1, Hq)[:, :T]
    state = next_state(timeline, slots, segment_ids, past) if options.return_state else None
    return NHAOutput(out.astype(query.dtype), state, weight if options.return_slot_weight else None)


def _plan(T: int, W: int, delay: int, *, num_slots: int, num_heads: int) -> ChunkPlan:
    """Chooses the sizes, as measured on a CPU.

    Short chunks spend least on gates. Several side by side fill a machine that few heads leave
    idle, and spare steps; where many heads fill it, they only leave its cache, and a step of a CPU
    has just the rows without which the slots that it stores for the gradient would be larger than
    what it reads. A wide window, which each step copies, fills the machine by itself.

    Args:
        T, W, delay: the call's tokens, its window and its slot delay.
        num_slots: M.
        num_heads: query heads of all rows of the batch.
    """
    if W > NARROW:
        chunk, chunks = 64, 1
    elif jax.default_backend() != "cpu" or (T <= 256 and num_heads <= 8):
        chunk, chunks = 32, 8 if T <= 256 else 4
    else:
        chunk, chunks = 16, max(1, -(-num_slots // 32), min(4, 8 // num_heads))
    chunk = min(chunk, 1 << (T - 1).bit_length())
    chunks = min(chunks, -(-T // chunk))
    return ChunkPlan(W, delay, chunk, chunks, -(-T // (chunk * chunks)))


def _cut(
    query: jax.Array,
    rotated_query: jax.Array,
    timeline: Timeline,
    plan: ChunkPlan,
    options: Options,
) -> tuple[ReadTokens, jax.Array, QueryRows, Segments]:
    """Cuts time into steps of N chunks of C rows, padded to whole steps."""
    B, T = query.shape[:2]
    C, N, steps = plan.chunk, plan.chunks, plan.steps
    rows = plan.rows * steps

    def pad(x):
        return jnp.pad(x, ((0, 0), (0, rows - T), *((0, 0),) * (x.ndim - 2)))

    def cut(x):  # [B, rows, ...] -> [B, steps, N, C, ...]
        return x.reshape(B, steps, N, C, *x.shape[2:])

    def cut_query(x):  # [B, T, Hq, K] -> [steps, B, H, N, G, C, K]
        H = timeline.tokens.key.shape[2]
        return cut(pad(x.reshape(B, T, H, -1, x.shape[-1]))).transpose(1, 0, 4, 2, 5, 3, 6)

    key, rotated_key, value, log_decay = timeline.tokens
    read = ReadTokens(*(
        pad(x).swapaxes(1, 2) for x in (options.feature_map(key), rotated_key, value)
    ))  # fmt: skip
    enters = timeline.entering(timeline.enters)[..., None, None]
    log_decay = jnp.where(enters, timeline.entering(log_decay), 0)
    query_rows = QueryRows(
        slot_query=cut_query(options.feature_map(query)),
        rotated_query=cut_query(rotated_query),
        log_decay=cut(pad(log_decay)).transpose(1, 0, 4, 2, 3, 5),
    )
    slots = cut(timeline.slot_segment(timeline.first_to_enter, rows))
    start = jnp.pad(slots[..., -1].reshape(B, -1), ((0, 0), (1, 0)))[:, :-1]
    segments = Segments(
        query=cut(pad(timeline.row_segment[:, -T:])).swapaxes(0, 1),
        slots=slots.swapaxes(0, 1),
        reads_own_slots=cut(pad(timeline.reads_own_slots)).swapaxes(0, 1),
        start=start.reshape(B, steps, N).swapaxes(0, 1),
    )
    return read, pad(timeline.token_segment)[:, None], query_rows, segments


@functools.partial(jax.custom_jvp, nondiff_argnums=(0, 1))
def _scan(
    plan: ChunkPlan,
    options: Options,
    read: ReadTokens,
    token_segment: jax.Array,
    rows: QueryRows,
    slots: Slots,
    segments: Segments,
) -> tuple[jax.Array, jax.Array, Slots, Slots]:
    """All steps in turn.

    Returns out [steps, B, H, N, G, C, V], the slot weight (no V), the slots after the last step,
    and those at the start of each, [steps, B, H, M, .].
    """

    def step(slots, x):
        index, rows, segments = x
        now, seen = _at_step((read, token_segment), index, plan)
        out, weight, after = _step(plan, options, now, seen, rows, slots, segments)
        return after, (out, weight, slots)

    index = jnp.arange(plan.steps, dtype=jnp.int32)
    after, (out, weight, starts) = lax.scan(step, slots, (index, rows, segments))
    return out, weight, after, starts


@_scan.defjvp
def _scan_jvp(plan, options, primals, tangents):
    """The derivative: a second scan, of tangents alone, that computes each step again.

    The steps' reads overlap: left to autodiff, either every overlap is stored for the gradient, W
    rows a step, or each step adds a cotangent of the whole read. Here a step gets the tangents of
    its own rows, and those of the W rows before from the step before it; so the transpose, which
    is the gradient, hands the cotangents of the W rows on to the step that they belong to.
    """
    read, token_segment, rows, _, segments = primals
    d_read, _, d_rows, d_slots, _ = tangents
    out, weight, after, starts = _scan(plan, options, *primals)
    # What a rematerialised layer saves, by the kernels' names, to be spared this scan.
    out = checkpoint_name(out, OUT)
    starts = jax.tree.map(lambda x: checkpoint_name(x, STARTS), starts)

    # Nothing is stored of a step but what comes from outside: it reads inside.
    @functools.partial(jax.checkpoint, prevent_cse=False)
    def tangents_of_step(read, token_segment, index, rows, start, segments, tangents):
        now, seen = _at_step((read, token_segment), index, plan)
        now = jax.tree.map(lambda x: x.astype(compute_dtype(x)), now)

        def run(read, rows, slots):
            return _step(plan, options, read, seen, rows, slots, segments)

        return jax.jvp(run, (now, rows, start), tangents)[1]

    def step(carry, x):
        d_slots, d_before = carry
        index, rows, start, segments, d_own, d_rows = x
        d_now = jax.tree.map(
            lambda before, own: jnp.concatenate([before, own.astype(before.dtype)], axis=2),
            d_before,
            d_own,
        )
        d_out, d_weight, d_after = tangents_of_step(
            read, token_segment, index, rows, start, segments, (d_now, d_rows, d_slots)
        )
        d_before = jax.tree.map(lambda d: d[:, :, plan.rows :], d_now)
        return (d_after, d_before), (d_out, d_weight, d_slots)

    def split(d):  # [B, H, W + Tp, .] -> [B, H, W, .] and [steps, B, H, rows, .]
        before, own = d[:, :, : plan.window], d[:, :, plan.window :]
        own = own.reshape(*d.shape[:2], plan.steps, plan.rows, d.shape[3])
        # In the compute dtype, in which the cotangents of the rows are added up.
        return before.astype(compute_dtype(d)), jnp.moveaxis(own, 2, 0)

    d_before, d_own = (ReadTokens(*x) for x in zip(*map(split, d_read), strict=True))
    (d_after, _), (d_out, d_weight, d_starts) = lax.scan(
        step,
        (d_slots, d_before),
        (jnp.arange(plan.steps, dtype=jnp.int32), rows, starts, segments, d_own, d_rows),
    )
    return (out, weight, after, starts), (d_out, d_weight, d_after, d_starts)


def _at_step(tree, index: jax.Array, plan: ChunkPlan):
    """What step `index` reads: along axis 2, the W rows before its own, and its own."""
    start, size = index * plan.rows, plan.window + plan.rows
    return jax.tree.map(lambda x: lax.dynamic_slice_in_dim(x, start, size, axis=2), tree)


def _step(
    plan: ChunkPlan,
    options: Options,
    read: ReadTokens,
    token_segment: jax.Array,
    rows: QueryRows,
    slots: Slots,
    segments: Segments,
) -> tuple[jax.Array, jax.Array, Slots]:
    """Computes N chunks side by side.

    Returns out [B, H, N, G, C, V], the slot weight [B, H, N, G, C] and the next slots.

    With c_t the cumulative log decay inside the chunk and S0 the slots at its start:
        a_t = exp(c_t) (scale q_t . SK0) + sum_{j<=t} (scale q_t . k_j) s_j exp(c_t - c_j)
        o_t = (p_t exp(c_t)) SV0 + sum_{j<=t} (sum_m p_t s_j exp(c_t - c_j)) v_j + window
    """
    W, before = plan.window, plan.window - plan.delay
    narrow, wide = rows.slot_query.dtype, rows.log_decay.dtype
    # Rounding scores and their cotangents to bfloat16 costs the query's gradient most of its
    # digits where slots are nearly equal, and saves no time: a step's operands are small.
    read, rows = jax.tree.map(lambda x: x.astype(wide), (read, rows))
    # Without the barrier XLA computes the gates again inside each of their many consumers.
    gates = lax.optimization_barrier(chunk_gates(rows.log_decay))
    slot_key = _cut_rows(read.slot_key, plan, before)
    rotated_key, value = (_cut_read(x, plan) for x in (read.rotated_key, read.value))
    slot_value = _cut_rows(read.value, plan, before)
    starts, slots = _chunk_slots(gates, slot_key, slot_value, slots, segments)

    # [B, 1, N, 1, C, ...]: broadcast over heads
    together = (segments.slots[:, :, None, :] == segments.query[..., None])[:, None, :, None]
    reads_start = (segments.start[..., None] == segments.query)[:, None, :, None, :, None]
    from_start = jnp.where(reads_start, gates.from_start[:, :, :, None], 0)
    scores = options.scale * jnp.einsum("bhngtk,bhnjk->bhngtj", rows.slot_query, slot_key)
    a = gates.spread(jnp.where(together, scores, 0))
    start_scores = options.scale * jnp.einsum("bhngtk,bhnmk->bhngtm", rows.slot_query, starts[0])
    a += from_start * start_scores
    if options.empty_slots == "mask":
        a = jnp.where(segments.reads_own_slots[:, None, :, None, :, None], a, -jnp.inf)
    if W:
        b = options.scale * jnp.einsum("bhngtk,bhnik->bhngti", rows.rotated_query, rotated_key)
        b = jnp.where(_window_mask(segments, token_segment, plan)[:, None, :, None], b, -jnp.inf)
    else:  # not a mask of nothing, which XLA would compute as it compiles, for seconds
        b = jnp.zeros((*a.shape[:-1], 0), wide)

    tops = (jnp.max(x, -1, initial=-jnp.inf) for x in (a, b))
    top = lax.stop_gradient(jnp.maximum(*tops))[..., None]
    top = jnp.where(jnp.isfinite(top), top, 0)  # rows of padding see nothing
    pa, pb = jnp.exp(a - top), jnp.exp(b - top)
    slot_mass = jnp.sum(pa, axis=-1)
    window_mass = jnp.sum(pb, axis=-1)
    mass = _above_zero(slot_mass + window_mass)
    weight_mass = mass
    if options.slot_weight_gradient == "slots":
        weight_mass = _above_zero(slot_mass + lax.stop_gradient(window_mass))
    slot_p = jnp.where(together, gates.gather(pa), 0)
    p = pb + jnp.pad(slot_p, [(0, 0)] * (slot_p.ndim - 1) + [(before, plan.delay)]) if W else slot_p
    out = jnp.einsum("bhngti,bhniv->bhngtv", p, value)
    out += jnp.einsum("bhngtm,bhnmv->bhngtv", pa * from_start, starts[1])
    return (out / mass[..., None]).astype(narrow), slot_mass / weight_mass, slots


def _above_zero(mass: jax.Array) -> jax.Array:
    return jnp.where(mass > 0, mass, 1)


def _chunk_slots(
    gates: ChunkGates, slot_key: jax.Array, value: jax.Array, slots: Slots, segments: Segments
) -> tuple[Slots, Slots]:
    """The slots at each chunk's start, [B, H, N, M, .], and after the last chunk, [B, H, M, .]."""
    ends = segments.slots[:, :, -1]  # the segment that the slots belong to at the chunk's end
    writes = (segments.slots == ends[..., None])[:, None, :, :, None]
    to_end = jnp.where(writes, gates.to_end, 0)
    keep = jnp.where((segments.start == ends)[:, None, :, None], gates.total, 0)[..., None]

    def chain(x, start):
        added = jnp.einsum("bhnjm,bhnjd->bhnmd", to_end, x)
        states = [start]
        for n in range(x.shape[2]):
            states.append(keep[:, :, n] * states[-1] + added[:, :, n])
        return jnp.stack(states[:-1], axis=2), states[-1]

    (start_key, key), (start_value, value) = chain(slot_key, slots[0]), chain(value, slots[1])
    return (start_key, start_value), (key, value)


def _cut_read(x: jax.Array, plan: ChunkPlan) -> jax.Array:
    """[B, H, W + N C, ...] -> [B, H, N, W + C, ...], overlapping.

    By chunks, or by parts of C rows of the window, whichever are fewer.
    """
    W, C = plan.window, plan.chunk
    if plan.chunks <= W // C:
        starts = range(0, plan.rows, C)
        return jnp.stack([x[:, :, start : start + W + C] for start in starts], axis=2)
    parts = [_cut_rows(x, plan, start)[:, :, :, : W - start] for start in range(0, W, C)]
    return jnp.concatenate([*parts, _cut_rows(x, plan, W)], axis=3)


def _cut_rows(x: jax.Array, plan: ChunkPlan, start: int) -> jax.Array:
    """[B, H, W + N C, ...] -> [B, H, N, C, ...], each chunk's rows from `start` on."""
    rows = x[:, :, start : start + plan.rows]
    return rows.reshape(*x.shape[:2], plan.chunks, plan.chunk, *x.shape[3:])


def _window_mask(segments: Segments, token_segment: jax.Array, plan: ChunkPlan) -> jax.Array:
    """[B, N, C, W + C]: the W rows up to its own that are of the query's segment."""
    W, C = plan.window, plan.chunk
    row, column = np.arange(C)[:, None], np.arange(W + C)[None]
    inside = jnp.asarray((column > row) & (column <= row + W))
    token_segment = _cut_read(token_segment, plan)[:, 0]  # [B, N, W + C]
    return inside[None, None] & (token_segment[:, :, None] == segments.query[..., None])
