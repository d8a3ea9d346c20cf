"""The operator on the fused TPU kernels."""

import dataclasses
from typing import NamedTuple

import jax
import jax.numpy as jnp

from nha_jax.ops.rope import Rope, apply_rope
from nha_jax.ops.state import Past, Tokens, empty_slots
from nha_jax.ops.timeline import (
    Timeline,
    at_offset,
    build_timeline,
    keep_last_segment,
    next_state,
    nothing_leaves,
)
from nha_jax.ops.tpu.arrays import (
    flatten_decay,
    flatten_heads,
    join_slots,
    rotation_table,
    split_slots,
)
from nha_jax.ops.tpu.plan import CallShape, plan
from nha_jax.ops.tpu.splash import splash_full_attention
from nha_jax.ops.types import NHAOutput, Options
from pallas.tpu import (
    CallSpec,
    fused_attention,
    pack_chunk_segments,
    pack_row_segments,
)


class _Call(NamedTuple):
    """A call of the operator, as `Backend.attend` has it."""

    query: jax.Array
    key: jax.Array
    value: jax.Array
    log_decay: jax.Array
    rope: Rope | None
    segment_ids: jax.Array | None
    past: Past | None
    options: Options
    interpret: bool

    @property
    def rotated_tokens(self) -> Tokens:
        rotated_key = apply_rope(self.key, self.rope)
        return Tokens(self.key, rotated_key, self.value, self.log_decay.astype(jnp.float32))


def tpu_attention(
    query: jax.Array,
    key: jax.Array,
    value: jax.Array,
    log_decay: jax.Array,
    *,
    rope: Rope | None,
    segment_ids: jax.Array | None,
    past: Past | None,
    options: Options,
    interpret: bool = False,
) -> NHAOutput:
    """Computes `nha_attention` by the fused kernels; shapes as there.

    No gradient flows to the rope tables.

    Args:
      interpret: run the kernels on the CPU.
    """
    call = _Call(query, key, value, log_decay, rope, segment_ids, past, options, interpret)
    if nothing_leaves(options.window_size, query.shape[1], past is not None):
        out, state, weight = _attend_full(call)
    elif log_decay.shape[3]:
        out, state, weight = _attend_window(call)
    else:
        out, state, weight = _attend_window_alone(call)
    return NHAOutput(out.astype(query.dtype), state, weight)


def _attend_full(call: _Call) -> NHAOutput:
    """Attends where no token leaves the window: full attention, by the library's kernel."""
    options = call.options
    timeline = build_timeline(call.rotated_tokens, call.segment_ids, call.past, options.window_size)
    num_slots = call.log_decay.shape[3]
    out, weight = splash_full_attention(
        apply_rope(call.query, call.rope),
        timeline,
        num_slots=num_slots,
        options=options,
        interpret=call.interpret,
    )
    state = None
    if options.return_state:
        slots = empty_slots(call.key, call.value, num_slots)
        state = next_state(timeline, slots, call.segment_ids, call.past)
    if call.segment_ids is not None:
        real = timeline.query_real[..., None]
        out, weight = jnp.where(real[..., None], out, 0), jnp.where(real, weight, 0)
    return NHAOutput(out, state, weight if options.return_slot_weight else None)


class _Rows(NamedTuple):
    """The rows of the kernels: the call's T, behind those of the past if there is one."""

    query: jax.Array  # [B, rows, Hq, K]
    timeline: Timeline  # of these rows
    rope: Rope | None
    rotated_query: jax.Array | None  # None: the kernels rotate, by `rope`, or nothing does
    segments: bool  # who sees whom is not just a matter of order


def _attend_window(call: _Call) -> NHAOutput:
    """Attends through slots and window, by the fused kernel (and one for a wide window's rest)."""
    options, T, Hq = call.options, *call.query.shape[1:3]
    rows = _rows_of_call(call) if call.past is None else _rows_with_past(call)
    num_rows = rows.timeline.num_rows
    tokens = rows.timeline.tokens
    shape = CallShape.of(
        rows.query, tokens.key, tokens.value, tokens.log_decay,
        rope=rows.rope is not None, segments=rows.segments, past=call.past is not None,
    )  # fmt: skip
    spec, block_sizes = plan(shape, options)
    # For all tokens to enter the slots, a window that is not aligned needs some rows more.
    more = spec.halo_padding if spec.state else 0
    padding = more + -(num_rows + more) % spec.step_rows
    fused = fused_attention(
        _inputs(rows, spec, padding, call.past),
        _constants(rows, spec, padding, options),
        spec=spec,
        block_sizes=block_sizes,
        interpret=call.interpret,
    )
    B, V = call.query.shape[0], call.value.shape[3]
    own = slice(num_rows - T, num_rows)
    out = fused.out.reshape(B, num_rows + padding, Hq, -1)[:, own, :, :V]
    weight = state = None
    if fused.slot_weight is not None:  # [B, Hkv, G, rows] -> [B, T, Hq]
        weight = fused.slot_weight.transpose(0, 3, 1, 2).reshape(B, -1, Hq)[:, own]
    if options.return_state and fused.end is not None:
        timeline = build_timeline(
            call.rotated_tokens, call.segment_ids, call.past, options.window_size
        )
        slots = split_slots(fused.end, call.log_decay.shape[3], call.key.shape[3], V)
        slots = keep_last_segment(slots, timeline)
        state = next_state(timeline, slots, call.segment_ids, call.past)
    return NHAOutput(out, state, weight)


def _attend_window_alone(call: _Call) -> NHAOutput:
    """Attends without slots: the kernels have at least one, which is then never read."""

    def one_slot(x, axis):
        return jnp.zeros((*x.shape[:axis], 1, *x.shape[axis + 1 :]), jnp.float32)

    past = call.past
    if past is not None:
        past = past._replace(
            slots=tuple(one_slot(x, 2) for x in past.slots),
            tokens=past.tokens._replace(log_decay=one_slot(past.tokens.log_decay, 3)),
        )
    options = dataclasses.replace(call.options, read_slots=False)
    out, state, weight = _attend_window(
        call._replace(log_decay=one_slot(call.log_decay, 3), past=past, options=options)
    )
    if state is not None:
        state = state._replace(
            slot_key=state.slot_key[:, :, :0],
            slot_value=state.slot_value[:, :, :0],
            window_log_decay=state.window_log_decay[..., :0],
        )
    return NHAOutput(out, state, weight)


def _rows_of_call(call: _Call) -> _Rows:
    tokens = Tokens(call.key, call.key, call.value, call.log_decay.astype(jnp.float32))
    window_size = call.options.window_size
    timeline = build_timeline(tokens, call.segment_ids, None, window_size, leading_rows=False)
    return _Rows(call.query, timeline, call.rope, None, call.segment_ids is not None)


def _rows_with_past(call: _Call) -> _Rows:
    """Gives the tokens before rows of their own, whose queries are zeros and whose output is cut.

    Their keys were rotated when they came, so the call's keys and queries are rotated here as well.
    """
    window_size = call.options.window_size
    timeline = build_timeline(call.rotated_tokens, call.segment_ids, call.past, window_size)
    before = ((0, 0), (timeline.rows_before, 0), (0, 0), (0, 0))
    rotated_query = jnp.pad(apply_rope(call.query, call.rope), before)
    return _Rows(jnp.pad(call.query, before), timeline, None, rotated_query, segments=True)


def _inputs(rows: _Rows, spec: CallSpec, padding: int, past: Past | None) -> dict[str, jax.Array]:
    """Lays out what the kernels differentiate."""
    key, rotated_key, value, log_decay = rows.timeline.tokens
    inputs = {
        "query": flatten_heads(rows.query, padding, halves=True),
        "key": flatten_heads(key, padding, halves=True),
        "value": flatten_heads(value, padding, halves=False),
        "log_decay": flatten_decay(log_decay, padding),
    }
    if spec.rotated:
        assert rows.rotated_query is not None
        inputs["rotated_query"] = flatten_heads(rows.rotated_query, padding, halves=True)
        inputs["rotated_key"] = flatten_heads(rotated_key, padding, halves=True)
    if spec.state:
        slots = empty_slots(key, value, log_decay.shape[3]) if past is None else past.slots
        inputs["slots"] = join_slots(slots)
    return inputs


def _constants(rows: _Rows, spec: CallSpec, padding: int, options: Options) -> dict[str, jax.Array]:
    """Lays out what the kernels do not differentiate: segments and the rotation's table."""
    constants: dict[str, jax.Array] = {}
    if spec.segments:
        constants |= _segments(rows.timeline, spec, padding, options.read_slots)
    if spec.rope:
        assert rows.rope is not None
        constants["rope_table"] = rotation_table(rows.rope, spec.scale, padding)
    return constants


FIRST_SEGMENT = 2
"""The kernels' number of a timeline's segment 0, so that 1 is a `PADDING_ROW` and 0 `NO_TOKEN`."""


def _segments(
    timeline: Timeline, spec: CallSpec, padding: int, read_slots: bool
) -> dict[str, jax.Array]:
    """Lays out the segments of rows, of the tokens of chunks, and of the slots, for the kernels."""
    C, halo = spec.chunk, spec.window if spec.wide_window else spec.halo
    N = timeline.num_rows + padding
    token_segment = timeline.token_segment + FIRST_SEGMENT

    def slot_segment(offset):  # [B, N], after the turn of the token in row t + offset
        return timeline.slot_segment(offset, N) + FIRST_SEGMENT

    row_segment = at_offset(timeline.row_segment + FIRST_SEGMENT, 0, N, outside=1)
    tokens = at_offset(token_segment, -halo, N + spec.chunk_tokens, outside=0)
    read = [tokens[:, i : i + N].reshape(-1, N // C, C) for i in range(0, spec.chunk_tokens, C)]
    entered_from = -spec.window if spec.wide_window else 0
    constants = {
        "row_segments": pack_row_segments(
            row_segment=row_segment,
            slot_segment=slot_segment(-halo),
            slots_filled=(at_offset(token_segment, -spec.window, N, outside=0) == row_segment)
            & read_slots,
            enters=at_offset(timeline.enters, entered_from, N, outside=False),
        ),
        "chunk_segments": pack_chunk_segments(
            jnp.concatenate(read, axis=-1)[..., : spec.chunk_tokens],
            slot_segment(-halo - 1)[:, ::C],
            slot_segment(-halo + C - 1)[:, ::C],
        ),
    }
    if spec.wide_window:
        constants["query_segment"] = row_segment[:, None]
        constants["token_segment"] = at_offset(token_segment, 0, N, outside=0)[:, None]
    return {name: x.astype(jnp.float32) for name, x in constants.items()}
