"""Native Hybrid Attention in plain XLA: a scan over groups of chunks, linear in time and memory.

A chunk of C rows reads one buffer `cat = [the W rows before; the chunk]`. Row r of the chunk sees
columns 0..r of it through the slots (they entered W rows later) and columns r+1..r+W through the
window: the two are complementary, so one product P @ cat_value serves both.
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.ad_checkpoint import checkpoint_name

from nha_jax.ops.rope import Rope, apply_rope
from nha_jax.ops.state import (
    Carried,
    Slots,
    Timeline,
    Tokens,
    build_timeline,
    last_real,
    next_state,
    of_last_segment,
)
from nha_jax.ops.types import NHAOutput, Options, compute_dtype
from nha_jax.ops.xla.full import full_attention
from nha_jax.ops.xla.gates import ChunkGates, chunk_gates

NARROW = 256  # the widest window that short chunks serve


class Blocks(NamedTuple):
    """How T rows are cut: static, hashable."""

    window: int  # W
    chunk: int  # C rows
    group: int  # N chunks a step
    steps: int

    @property
    def rows(self) -> int:
        """Rows a step."""
        return self.chunk * self.group


class Past(NamedTuple):
    """What queries read: row W + t is token t, [B, H, W + rows, .] each.

    With it goes `visible` [B, 1, W + rows], its rows' segment numbers, -1 where there is no token.
    """

    slot_key: jax.Array
    rotated_key: jax.Array
    value: jax.Array


class Rows(NamedTuple):
    """What belongs to one query row, cut in groups: leading axis `steps`."""

    slot_query: jax.Array  # [B, H, N, G, C, K]
    rotated_query: jax.Array  # [B, H, N, G, C, K]
    log_decay: jax.Array  # [B, H, N, C, M], of the token that enters at this row


class Runs(NamedTuple):
    """Segment numbers, cut in groups: who may see whom."""

    query: jax.Array  # [B, N, C]
    entering: jax.Array  # [B, N, C], of the token that enters at this row
    enters: jax.Array  # [B, N, C] bool, the slots hold a token of the query's segment
    carried: jax.Array  # [B, N], of the slots at the chunk's start


def chunked_attention(
    query: jax.Array,
    key: jax.Array,
    value: jax.Array,
    log_decay: jax.Array,
    *,
    rope: Rope | None,
    segment_ids: jax.Array | None,
    carried: Carried | None,
    options: Options,
) -> NHAOutput:
    """`nha_attention` in chunks; shapes as there. Memory is linear in T, cost T * (W + C)."""
    B, T, Hq, K = query.shape
    Hkv, V, M = key.shape[2], value.shape[-1], log_decay.shape[-1]
    dtype = compute_dtype(query)
    tokens = Tokens(key, apply_rope(key, rope), value, log_decay.astype(dtype))
    rotated_query = apply_rope(query, rope)
    empty_slots = jnp.zeros((B, Hkv, M, K), dtype), jnp.zeros((B, Hkv, M, V), dtype)
    W = options.window_size
    if W is None or (W >= T and carried is None):  # nothing leaves the window
        timeline = build_timeline(tokens, segment_ids, carried, None)
        out, weight = full_attention(rotated_query, timeline, num_slots=M, options=options)
        slots = empty_slots
    else:
        timeline = build_timeline(tokens, segment_ids, carried, W)
        blocks = _cut(T, W)
        past, visible, rows, runs = _prepare(query, rotated_query, timeline, blocks, options)
        slots = empty_slots if carried is None else carried.slots
        out, weight, slots = _scan(blocks, options, past, visible, rows, slots, runs)
        slots = of_last_segment(slots, timeline, T)
        # [steps, B, H, N, G, C, V] -> [B, T, Hq, V]
        out = out.transpose(1, 0, 3, 5, 2, 4, 6).reshape(B, -1, Hq, V)[:, :T]
        weight = weight.transpose(1, 0, 3, 5, 2, 4).reshape(B, -1, Hq)[:, :T]
    real = timeline.real[:, -T:, None]
    out = jnp.where(real[..., None], out, 0).astype(query.dtype)
    state = None
    if options.return_state:
        state = next_state(timeline, T, slots, segment_ids, carried, W)
    return NHAOutput(out, state, jnp.where(real, weight, 0) if options.return_slot_weight else None)


def _cut(T: int, W: int) -> Blocks:
    """Measured on a CPU. Short chunks spend least on gates, and a group of them fills the machine;
    a wide window fills it by itself, and a group would only copy it more often.
    """
    chunk, group = (32, 8) if W <= NARROW else (64, 1)
    chunk = min(chunk, 1 << (T - 1).bit_length())
    group = min(group, -(-T // chunk))
    return Blocks(W, chunk, group, -(-T // (chunk * group)))


def _prepare(
    query: jax.Array,
    rotated_query: jax.Array,
    timeline: Timeline,
    blocks: Blocks,
    options: Options,
) -> tuple[Past, jax.Array, Rows, Runs]:
    """Cuts time into steps of N chunks of C rows, padded to whole ones."""
    B, T = query.shape[:2]
    C, N, steps = blocks.chunk, blocks.group, blocks.steps
    padding = blocks.rows * steps - T

    def pad(x, mode="constant"):
        return jnp.pad(x, ((0, 0), (0, padding), *((0, 0),) * (x.ndim - 2)), mode)

    def cut(x, mode="constant"):  # [B, T, ...] -> [B, steps, N, C, ...]
        return pad(x, mode).reshape(B, steps, N, C, *x.shape[2:])

    def cut_query(x):  # [B, T, Hq, K] -> [steps, B, H, N, G, C, K]
        H = timeline.tokens.key.shape[2]
        return cut(x.reshape(B, T, H, -1, x.shape[-1])).transpose(1, 0, 4, 2, 5, 3, 6)

    key, rotated_key, value, log_decay = timeline.tokens
    past = Past(*(
        pad(x).swapaxes(1, 2) for x in (options.feature_map(key), rotated_key, value)
    ))  # fmt: skip

    # At row t enters row t of the timeline, the token W back; none after the last real token, so
    # that the slots stay as that one left them.
    row, last = jnp.arange(T), last_real(timeline, T)[:, None]
    query_run, entering_run, entering_real = (
        timeline.run[:, -T:],
        jnp.where(
            last >= 0,
            jnp.take_along_axis(timeline.run, jnp.minimum(row, last), axis=1, mode="clip"),
            0,
        ),
        timeline.real[:, :T],
    )
    log_decay = jnp.where((entering_real & (row <= last))[..., None, None], log_decay[:, :T], 0)
    rows = Rows(
        slot_query=cut_query(options.feature_map(query)),
        rotated_query=cut_query(rotated_query),
        log_decay=cut(log_decay).transpose(1, 0, 4, 2, 3, 5),
    )
    entering = cut(entering_run, "edge")
    before = jnp.pad(entering[..., -1].reshape(B, -1), ((0, 0), (1, 0)))[:, :-1]
    runs = Runs(
        query=cut(query_run).swapaxes(0, 1),
        entering=entering.swapaxes(0, 1),
        enters=cut(entering_real & (entering_run == query_run)).swapaxes(0, 1),
        carried=before.reshape(B, steps, N).swapaxes(0, 1),
    )
    visible = pad(jnp.where(timeline.real, timeline.run, -1))[:, None]
    return past, visible, rows, runs


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _scan(
    blocks: Blocks,
    options: Options,
    past: Past,
    visible: jax.Array,
    rows: Rows,
    slots: Slots,
    runs: Runs,
):
    """All steps in turn: out [steps, B, H, N, G, C, V], slot weight (no V), and the last slots.

    The gradient is written out, step by step in reverse with each step computed again, because
    the steps' pasts overlap: left to autodiff, either every overlap is stored, W rows a step, or
    each step adds a cotangent of the whole past.
    """
    return _forward(blocks, options, past, visible, rows, slots, runs)[0]


def _forward(blocks, options, past, visible, rows, slots, runs):
    def step(slots, x):
        index, rows, runs = x
        now, seen = _at_step((past, visible), index, blocks)
        out, weight, after = _step(blocks, options, now, seen, rows, slots, runs)
        return after, (out, weight, slots)

    after, (out, weight, starts) = lax.scan(step, slots, (jnp.arange(blocks.steps), rows, runs))
    return (out, weight, after), starts


def _scan_fwd(blocks, options, past, visible, rows, slots, runs):
    (out, weight, after), starts = _forward(blocks, options, past, visible, rows, slots, runs)
    # What a rematerialised layer saves, by the kernels' names, to be spared this scan.
    starts = jax.tree.map(lambda x: checkpoint_name(x, "nha_starts"), starts)
    result = checkpoint_name(out, "nha_out"), weight, after
    return result, (past, visible, rows, starts, runs)


def _scan_bwd(blocks, options, saved, cotangents):
    past, visible, rows, starts, runs = saved
    d_out, d_weight, d_slots = cotangents
    W = blocks.window

    def step(carry, x):
        d_slots, d_shared = carry  # d_shared: the W rows of this step's past that later ones read
        index, rows, start, runs, d_out, d_weight = x
        now, seen = _at_step((past, visible), index, blocks)
        _, pullback = jax.vjp(
            lambda past, rows, slots: _step(blocks, options, past, seen, rows, slots, runs),
            now,
            rows,
            start,
        )
        d_past, d_rows, d_slots = pullback((d_out, d_weight, d_slots))
        d_past = jax.tree.map(
            lambda d, shared: jnp.concatenate([
                d[:, :, : blocks.rows].astype(shared.dtype), d[:, :, blocks.rows :] + shared
            ], axis=2),
            d_past, d_shared,
        )  # fmt: skip
        d_done = jax.tree.map(lambda d, x: d[:, :, W:].astype(x.dtype), d_past, past)
        return (d_slots, jax.tree.map(lambda d: d[:, :, :W], d_past)), (d_done, d_rows)

    d_shared = jax.tree.map(
        lambda x: jnp.zeros((*x.shape[:2], W, x.shape[3]), compute_dtype(x)), past
    )
    (d_slots, d_first), (d_past, d_rows) = lax.scan(
        step,
        (d_slots, d_shared),
        (jnp.arange(blocks.steps), rows, starts, runs, d_out, d_weight),
        reverse=True,
    )

    def join(first, later):  # [B, H, W, .] and [steps, B, H, rows, .] -> [B, H, W + Tp, .]
        later = jnp.moveaxis(later, 0, 2).reshape(*first.shape[:2], -1, first.shape[3])
        return jnp.concatenate([first.astype(later.dtype), later], axis=2)

    return jax.tree.map(join, d_first, d_past), None, d_rows, d_slots, None


_scan.defvjp(_scan_fwd, _scan_bwd)


def _at_step(tree, index: jax.Array, blocks: Blocks):
    """The past of step `index`: along axis 2, the W rows before its own, and those."""
    start, size = index * blocks.rows, blocks.window + blocks.rows
    return jax.tree.map(lambda x: lax.dynamic_slice_in_dim(x, start, size, axis=2), tree)


def _step(
    blocks: Blocks,
    options: Options,
    past: Past,
    visible: jax.Array,
    rows: Rows,
    slots: Slots,
    runs: Runs,
) -> tuple[jax.Array, jax.Array, Slots]:
    """N chunks side by side: out [B, H, N, G, C, V], slot weight [B, H, N, G, C], next slots.

    With G_t the cumulative log decay inside the chunk and S0 the slots at its start:
        a_t = exp(G_t) (scale q_t . SK0) + sum_{j<=t} (scale q_t . k_j) s_j exp(G_t - G_j)
        o_t = (p_t exp(G_t)) SV0 + sum_{j<=t} (sum_m p_t s_j exp(G_t - G_j)) v_j + window
    """
    W, C = blocks.window, blocks.chunk
    narrow, wide = rows.slot_query.dtype, rows.log_decay.dtype
    # Rounding scores and their cotangents to bfloat16 costs the query's gradient most of its
    # digits where slots are nearly equal, and saves no time: a step's operands are small.
    past, rows = jax.tree.map(lambda x: x.astype(wide), (past, rows))
    # Without the barrier XLA computes the gates again inside each of their many consumers.
    gates = lax.optimization_barrier(chunk_gates(rows.log_decay))
    slot_key = _cut_past(past.slot_key, blocks)[..., :C, :]
    rotated_key, value = (_cut_past(x, blocks) for x in (past.rotated_key, past.value))
    starts, slots = _chunk_slots(gates, slot_key, value[..., :C, :], slots, runs)

    # [B, 1, N, 1, C, ...]: broadcast over heads
    together = (runs.entering[:, :, None, :] == runs.query[..., None])[:, None, :, None]
    carried = (runs.carried[..., None] == runs.query)[:, None, :, None, :, None]
    from_start = jnp.where(carried, gates.from_start[:, :, :, None], 0)
    scores = options.scale * jnp.einsum("bhngtk,bhnjk->bhngtj", rows.slot_query, slot_key)
    a = gates.spread(jnp.where(together, scores, 0))
    carry_scores = options.scale * jnp.einsum("bhngtk,bhnmk->bhngtm", rows.slot_query, starts[0])
    a += from_start * carry_scores
    if options.empty_slots == "mask":
        a = jnp.where(runs.enters[:, None, :, None, :, None], a, -jnp.inf)
    b = options.scale * jnp.einsum("bhngtk,bhnik->bhngti", rows.rotated_query, rotated_key)
    b = jnp.where(_window_mask(runs, visible, blocks)[:, None, :, None], b, -jnp.inf)

    top = lax.stop_gradient(jnp.maximum(jnp.max(a, -1, initial=-jnp.inf), jnp.max(b, -1)))[
        ..., None
    ]
    top = jnp.where(jnp.isfinite(top), top, 0)  # rows of padding see nothing
    pa, pb = jnp.exp(a - top), jnp.exp(b - top)
    slot_mass = jnp.sum(pa, axis=-1)
    window_mass = jnp.sum(pb, axis=-1)
    mass = _above_zero(slot_mass + window_mass)
    weight_mass = mass
    if options.slot_weight_gradient == "slots":
        weight_mass = _above_zero(slot_mass + lax.stop_gradient(window_mass))
    slot_p = jnp.where(together, gates.gather(pa), 0)
    p = pb + jnp.pad(slot_p, [(0, 0)] * (slot_p.ndim - 1) + [(0, W)])
    out = jnp.einsum("bhngti,bhniv->bhngtv", p, value)
    out += jnp.einsum("bhngtm,bhnmv->bhngtv", pa * from_start, starts[1])
    return (out / mass[..., None]).astype(narrow), slot_mass / weight_mass, slots


def _above_zero(mass: jax.Array) -> jax.Array:
    return jnp.where(mass > 0, mass, 1)


def _chunk_slots(
    gates: ChunkGates, slot_key: jax.Array, value: jax.Array, slots: Slots, runs: Runs
) -> tuple[Slots, Slots]:
    """The slots at each chunk's start, [B, H, N, M, .], and after the last chunk, [B, H, M, .]."""
    ends = runs.entering[:, :, -1]  # the segment that the slots belong to at the chunk's end
    writes = (runs.entering == ends[..., None])[:, None, :, :, None]
    to_end = jnp.where(writes, gates.to_end, 0)
    keep = jnp.where((runs.carried == ends)[:, None, :, None], gates.total, 0)[..., None]

    def chain(x, start):
        added = jnp.einsum("bhnjm,bhnjd->bhnmd", to_end, x)
        states = [start]
        for n in range(x.shape[2]):
            states.append(keep[:, :, n] * states[-1] + added[:, :, n])
        return jnp.stack(states[:-1], axis=2), states[-1]

    (start_key, key), (start_value, value) = chain(slot_key, slots[0]), chain(value, slots[1])
    return (start_key, start_value), (key, value)


def _cut_past(x: jax.Array, blocks: Blocks) -> jax.Array:
    """[B, H, W + N C, ...] -> [B, H, N, W + C, ...], overlapping."""
    size = blocks.window + blocks.chunk
    starts = range(0, blocks.rows, blocks.chunk)
    return jnp.stack([x[:, :, start : start + size] for start in starts], axis=2)


def _window_mask(runs: Runs, visible: jax.Array, blocks: Blocks) -> jax.Array:
    """[B, N, C, W + C]: the W rows up to its own that are of the query's segment."""
    W, C = blocks.window, blocks.chunk
    row, column = np.arange(C)[:, None], np.arange(W + C)
    inside = jnp.asarray((column > row) & (column <= row + W))
    visible = _cut_past(visible, blocks)[:, 0]  # [B, N, W + C]
    return inside & (visible[:, :, None] == runs.query[..., None])
