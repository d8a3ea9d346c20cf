"""The operator on the fused TPU kernels: from the public arrays to the kernels' own, and back."""

import math
from typing import NamedTuple

import jax
import jax.numpy as jnp

from nha_jax.ops.rope import Rope, apply_rope
from nha_jax.ops.splash import splash_full_attention
from nha_jax.ops.state import (
    NHAState,
    Timeline,
    Tokens,
    build_timeline,
    last_real,
    next_state,
    of_last_segment,
)
from nha_jax.ops.types import NHAOutput, Options
from pallas.tpu import (
    BlockSizes,
    Spec,
    default_block_sizes,
    expand_table,
    fused_attention,
    pack_rows,
)

LANES = 128
SLOT_TILE = 16
LARGEST_HEAD, MOST_SLOTS = 256, 128
NARROW = 256  # the widest window that the fused kernel covers alone, if a step has as many rows


def tpu_unsupported(
    query: jax.Array,
    key: jax.Array,
    value: jax.Array,
    log_decay: jax.Array,
    *,
    rope: Rope | None,
    segment_ids: jax.Array | None,
    initial_state: NHAState | None,
    options: Options,
) -> str | None:
    """Why the kernels can't serve this call, in a line; None if they can."""
    if query.dtype not in (jnp.bfloat16, jnp.float32):
        return f"its kernels take bfloat16 and float32, got query of {query.dtype}"
    for name, x in (("key", key), ("value", value)):
        if x.shape[3] > LARGEST_HEAD:
            return f"its kernels take heads of up to {LARGEST_HEAD}, got {name} of {x.shape[3]}"
    if log_decay.shape[3] > MOST_SLOTS:
        return f"its kernels take up to {MOST_SLOTS} slots, got log_decay of {log_decay.shape[3]}"
    if options.scale < 0:
        return f"its kernels take a scale of at least 0, got {options.scale}"
    return None


def tpu_attention(
    query: jax.Array,
    key: jax.Array,
    value: jax.Array,
    log_decay: jax.Array,
    *,
    rope: Rope | None,
    segment_ids: jax.Array | None,
    initial_state: NHAState | None,
    options: Options,
    interpret: bool = False,
) -> NHAOutput:
    """`nha_attention` by the fused kernels; shapes as there. No gradient flows to the rope tables.

    interpret: run them on the CPU.
    """
    B, T, Hq, _ = query.shape
    Hkv, V, M = key.shape[2], value.shape[3], log_decay.shape[3]
    W = options.window_size
    empty = jnp.zeros((B, Hkv, M, key.shape[3])), jnp.zeros((B, Hkv, M, V))
    if W is None or (W >= T and initial_state is None):  # nothing leaves the window
        timeline = build_timeline(
            Tokens(key, apply_rope(key, rope), value, log_decay), segment_ids, initial_state, None
        )
        out, weight = splash_full_attention(
            apply_rope(query, rope),
            timeline,
            num_slots=M,
            options=options,
            interpret=interpret,
        )
        slots = empty
    else:
        out, weight, slots, timeline = _windowed(
            query, key, value, log_decay, rope, segment_ids, initial_state, options, interpret
        )
    if segment_ids is not None:
        real = (segment_ids != 0)[:, :, None]
        out = jnp.where(real[..., None], out, 0)
        weight = None if weight is None else jnp.where(real, weight, 0)
    state = None
    if options.return_state:
        state = next_state(timeline, T, slots, segment_ids, initial_state, W)
    return NHAOutput(out.astype(query.dtype), state, weight if options.return_slot_weight else None)


class _Rows(NamedTuple):
    """The kernels' N rows: the call's T behind the state's ring, if there is one."""

    query: jax.Array  # [B, N, Hq, K]
    tokens: Tokens  # [B, N, Hkv, .]
    run: jax.Array  # [B, N], as in `Timeline`
    real: jax.Array  # [B, N]
    last: jax.Array  # [B], the last real row; -1 if there is none
    rope: Rope | None
    rotated_query: jax.Array | None  # None: the kernels rotate
    segments: bool


def _windowed(query, key, value, log_decay, rope, segment_ids, initial_state, options, interpret):
    B, T, Hq, K = query.shape
    Hkv, V, M = key.shape[2], value.shape[3], log_decay.shape[3]
    W = options.window_size
    log_decay = log_decay.astype(jnp.float32)
    tokens = Tokens(key, key, value, log_decay)
    timeline = None
    if options.return_state or initial_state is not None:
        rotated = tokens._replace(rotated_key=apply_rope(key, rope))
        timeline = build_timeline(rotated, segment_ids, initial_state, W)
    if initial_state is None:
        rows = _rows_of_call(query, tokens, rope, segment_ids)
    else:
        rows = _rows_with_ring(query, timeline, rope, T)
    spec, block_sizes = _plan(rows, options, Hq // Hkv, M, initial_state is not None)
    padding = -(-(rows.run.shape[1] + spec.shift * spec.state) // spec.rows) * spec.rows
    padding -= rows.run.shape[1]
    constants = _who_sees_whom(rows, spec, padding) if spec.segments else {}
    inputs = _arrays(rows, padding, spec)
    if spec.rope:
        constants["table"] = _table(rows.rope, spec, padding, inputs["key"].shape[2] // Hkv)
    if spec.state:
        slots = (jnp.zeros((B, Hkv, M, K)), jnp.zeros((B, Hkv, M, V)))
        if initial_state is not None:
            slots = (initial_state.slot_key, initial_state.slot_value)
        inputs["slots"] = _join_slots(*slots)
    fused = fused_attention(
        inputs,
        constants,
        spec=spec,
        block_sizes=block_sizes,
        interpret=interpret,
    )
    N = rows.run.shape[1]
    out = fused.out.reshape(B, N + padding, Hq, -1)[:, N - T : N, :, :V]
    weight = None
    if fused.slot_weight is not None:
        weight = fused.slot_weight.transpose(0, 3, 1, 2).reshape(B, -1, Hq)[:, N - T : N]
    slots = None
    if fused.end is not None:
        slots = of_last_segment(_split_slots(fused.end, M, K, V), timeline, T)
    return out, weight, slots, timeline


def _rows_of_call(
    query: jax.Array, tokens: Tokens, rope: Rope | None, segment_ids: jax.Array | None
) -> _Rows:
    T = query.shape[1]
    timeline = build_timeline(tokens, segment_ids, None, None)
    last = last_real(timeline, T)
    segments = segment_ids is not None
    return _Rows(query, tokens, timeline.run, timeline.real, last, rope, None, segments)


def _rows_with_ring(query: jax.Array, timeline: Timeline, rope: Rope | None, T: int) -> _Rows:
    """The ring's tokens are rows of their own, whose queries ask for nothing.

    Its keys were rotated when they came, so the call's keys and queries are here as well.
    """
    W = timeline.run.shape[1] - T
    pad = lambda x: jnp.pad(x, ((0, 0), (W, 0), (0, 0), (0, 0)))  # noqa: E731
    return _Rows(
        pad(query),
        timeline.tokens,
        timeline.run,
        timeline.real,
        W + last_real(timeline, T),
        None,
        pad(apply_rope(query, rope)),
        segments=True,
    )


def _plan(
    rows: _Rows, options: Options, group: int, slots: int, has_state: bool
) -> tuple[Spec, BlockSizes]:
    W, N = options.window_size, rows.run.shape[1]
    block_sizes = options.block_sizes or default_block_sizes(group)
    chunks = min(block_sizes.chunks_per_step, 1 << (-(-N // block_sizes.chunk) - 1).bit_length())
    spec = Spec(
        group=group,
        slots=slots,
        window=W,
        wide=min(NARROW, block_sizes.chunk * block_sizes.chunks_per_step) < W,
        chunk=block_sizes.chunk,
        chunks=chunks,
        scale=options.scale,
        rope=rows.rope is not None and W > 0,
        rotated=rows.rotated_query is not None and W > 0,
        feature_map=options.slot_feature_map,
        mask_empty=options.empty_slots == "mask",
        segments=rows.segments,
        state=has_state or options.return_state,
        weight=options.return_slot_weight,
    )
    return spec, block_sizes


def _arrays(rows: _Rows, padding: int, spec: Spec) -> dict[str, jax.Array]:
    """The kernels' differentiable inputs; decays are 0 where no token enters the slots."""
    log_decay = rows.tokens.log_decay
    if spec.segments or spec.state:
        # After the last real row nothing enters: the slots stay as it left them.
        last = rows.last[:, None] - spec.window
        enters = rows.real & (jnp.arange(rows.run.shape[1]) <= last)
        log_decay = jnp.where(enters[..., None, None], log_decay, 0)

    def flat(x, dim):  # [B, N, H, D] -> [B, N', H * D']
        x = jnp.pad(x, ((0, 0), (0, padding), (0, 0), (0, 0)))
        return dim(x).reshape(*x.shape[:2], -1)

    M = log_decay.shape[3]
    missing = -M % SLOT_TILE
    log_decay = jnp.pad(log_decay, ((0, 0), (0, padding), (0, 0), (0, missing)))
    inputs = {
        "query": flat(rows.query, _pad_halves),
        "key": flat(rows.tokens.key, _pad_halves),
        "value": flat(rows.tokens.value, _pad_last),
        "log_decay": log_decay.transpose(0, 2, 3, 1),
    }
    if spec.rotated:
        inputs["rotated_query"] = flat(rows.rotated_query, _pad_halves)
        inputs["rotated_key"] = flat(rows.tokens.rotated_key, _pad_halves)
    return inputs


def _pad_last(x: jax.Array) -> jax.Array:
    missing = -x.shape[-1] % LANES
    return jnp.pad(x, (*((0, 0),) * (x.ndim - 1), (0, missing))) if missing else x


def _pad_halves(x: jax.Array) -> jax.Array:
    """Each half of the last axis to half a multiple of 128: the rotation pairs stay K'/2 apart."""
    K = x.shape[-1]
    if not K % LANES:
        return x
    if K % 2:  # not rotated
        return _pad_last(x)
    missing = (-K % LANES) // 2
    halves = x.reshape(*x.shape[:-1], 2, K // 2)
    halves = jnp.pad(halves, (*((0, 0),) * (halves.ndim - 1), (0, missing)))
    return halves.reshape(*x.shape[:-1], K + 2 * missing)


def _drop_halves(x: jax.Array, K: int) -> jax.Array:
    """The inverse of `_pad_halves`."""
    if K % 2:
        return x[..., :K]
    halves = x.reshape(*x.shape[:-1], 2, -1)[..., : K // 2]
    return halves.reshape(*x.shape[:-1], K)


def _join_slots(slot_key: jax.Array, slot_value: jax.Array) -> jax.Array:
    """-> [B, H, M', K' + V']."""
    slots = jnp.concatenate([_pad_halves(slot_key), _pad_last(slot_value)], -1)
    return jnp.pad(slots, ((0, 0), (0, 0), (0, -slots.shape[2] % SLOT_TILE), (0, 0)))


def _split_slots(slots: jax.Array, M: int, K: int, V: int) -> tuple[jax.Array, jax.Array]:
    """The inverse of `_join_slots`."""
    wide_key = -(-K // LANES) * LANES
    slots = slots[:, :, :M]
    return _drop_halves(slots[..., :wide_key], K), slots[..., wide_key:][..., :V]


def _table(rope: Rope, spec: Spec, padding: int, wide_key: int) -> jax.Array:
    """[1 or B, N', 2 K'] float32: the kernels' table, times the root of scale * log2(e)."""
    half = wide_key // 2

    def part(table):
        table = table if table.ndim == 3 else table[None]
        missing = half - table.shape[2]
        return jnp.pad(table.astype(jnp.float32), ((0, 0), (0, padding), (0, missing)))

    root = math.sqrt(spec.scale * math.log2(math.e))
    return expand_table(part(rope[0]), part(rope[1])) * root


def _who_sees_whom(rows: _Rows, spec: Spec, padding: int) -> dict[str, jax.Array]:
    """The kernels' constants of segments."""
    B, N = rows.run.shape
    W, C, halo = spec.window, spec.chunk, spec.window if spec.wide else spec.halo
    last = rows.last[:, None] - W  # the last token to enter the slots

    def at(x, index, outside):  # x [B, N] at index [n], or a constant beyond the rows
        inside = (index >= 0) & (index < N)
        return jnp.where(inside, x[:, jnp.clip(index, 0, N - 1)], outside)

    def run_entered(index):  # of the last token to have entered when index had its turn
        index = jnp.minimum(index, last)  # [B, n]
        run = jnp.take_along_axis(rows.run, jnp.clip(index, 0, N - 1), axis=1)
        return jnp.where(index >= 0, run, 0)

    visible = jnp.where(rows.real, rows.run, -1)
    row = jnp.arange(N + padding)
    start = row // C * C - halo  # the first row of the chunk's cat
    run = at(rows.run, row, -2)
    carried, ended = run_entered(start - 1), run_entered(start + C - 1)
    facts = pack_rows(
        run,
        carried=carried == run,
        enters=at(visible, row - W, -1) == run,
        keep=carried == ended,
        writes=run_entered(row - halo) == ended,
    )
    cat = jnp.arange(0, N + padding, C)[:, None] - halo + jnp.arange(spec.width)
    constants = {
        "facts": facts.reshape(B, -1, C),
        "visible": at(visible, cat.reshape(-1), -1).reshape(B, -1, spec.width),
    }
    if spec.wide:
        constants["query_run"] = run[:, None]
        constants["key_run"] = at(visible, row, -1)[:, None]
    return {name: x.astype(jnp.float32) for name, x in constants.items()}
