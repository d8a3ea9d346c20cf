"""The operator on the fused TPU kernels."""

import dataclasses
import functools
import importlib.util
from typing import NamedTuple

import jax
import jax.numpy as jnp

from nha_jax.ops.rope import Rope, apply_rope
from nha_jax.ops.state import (
    Carried,
    Tokens,
    build_timeline,
    last_real,
    next_state,
    of_last_segment,
)
from nha_jax.ops.tpu.arrays import (
    flatten_decay,
    flatten_heads,
    join_slots,
    rotation_table,
    split_slots,
)
from nha_jax.ops.tpu.splash import splash_full_attention
from nha_jax.ops.types import NHAOutput, Options
from nha_jax.ops.validation import beyond_kernels
from pallas.tpu import (
    BlockSizes,
    CallSpec,
    default_block_sizes,
    fused_attention,
    pack_chunk_segments,
    pack_row_segments,
)

LARGEST_HEAD, MOST_SLOTS = 256, 128
NARROW = 256  # the widest window that the fused kernel covers alone, if a step has as many rows


@functools.cache
def can_compile_for_tpus() -> bool:
    """Where nobody can, tracing the TPU kernels as well would only cost time.

    And it would cost the derivatives that kernels lack: forward mode, and those of gradients.
    """
    return importlib.util.find_spec("libtpu") is not None or jax.default_backend() == "tpu"


def tpu_unsupported(
    query: jax.Array,
    key: jax.Array,
    value: jax.Array,
    log_decay: jax.Array,
    *,
    options: Options,
) -> str | None:
    """Why the kernels can't serve this call, in a line; None if they can."""
    if query.dtype not in (jnp.bfloat16, jnp.float32):
        return f"its kernels take bfloat16 and float32, got query of {query.dtype}"
    if reason := beyond_kernels(key, value, log_decay, LARGEST_HEAD, MOST_SLOTS):
        return reason
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
    carried: Carried | None,
    options: Options,
    interpret: bool = False,
) -> NHAOutput:
    """`nha_attention` by the fused kernels; shapes as there. No gradient flows to the rope tables.

    interpret: run the kernels on the CPU.
    """
    T, W = query.shape[1], options.window_size
    nothing_leaves = W is None or (W >= T and carried is None)
    windowed = _windowed if log_decay.shape[3] else _window_alone
    attend = _full if nothing_leaves else windowed
    out, state, weight = attend(
        query, key, value, log_decay, rope, segment_ids, carried, options, interpret
    )
    return NHAOutput(out.astype(query.dtype), state, weight)


def _full(query, key, value, log_decay, rope, segment_ids, carried, options, interpret):
    T, W = query.shape[1], options.window_size
    tokens = Tokens(key, apply_rope(key, rope), value, log_decay.astype(jnp.float32))
    timeline = build_timeline(tokens, segment_ids, carried, None)
    B, H, M = key.shape[0], key.shape[2], log_decay.shape[3]
    out, weight = splash_full_attention(
        apply_rope(query, rope), timeline, num_slots=M, options=options, interpret=interpret
    )
    state = None
    if options.return_state:
        empty = (
            jnp.zeros((B, H, M, key.shape[3]), jnp.float32),
            jnp.zeros((B, H, M, value.shape[3]), jnp.float32),
        )
        state = next_state(timeline, T, empty, segment_ids, carried, W)
    if segment_ids is not None:
        real = timeline.real[:, -T:, None]
        out, weight = jnp.where(real[..., None], out, 0), jnp.where(real, weight, 0)
    return NHAOutput(out, state, weight if options.return_slot_weight else None)


class _Rows(NamedTuple):
    """The kernels' N rows: the call's T, behind the tokens carried over if there are any."""

    query: jax.Array  # [B, N, Hq, K]
    tokens: Tokens  # [B, N, Hkv, .]
    run: jax.Array  # [B, N], as in `Timeline`
    real: jax.Array  # [B, N]
    last: jax.Array  # [B], the last real row; -1 if there is none
    rope: Rope | None
    rotated_query: jax.Array | None  # None: the kernels rotate, by `rope`, or nothing does
    segments: bool  # who sees whom is not just a matter of order

    @property
    def num_rows(self) -> int:
        return self.run.shape[1]


def _windowed(query, key, value, log_decay, rope, segment_ids, carried, options, interpret):
    T, Hq = query.shape[1:3]
    log_decay = log_decay.astype(jnp.float32)
    if carried is None:
        rows = _rows_of_call(query, Tokens(key, key, value, log_decay), rope, segment_ids)
    else:
        tokens = Tokens(key, apply_rope(key, rope), value, log_decay)
        rows = _rows_with_past(query, tokens, rope, segment_ids, carried)
    spec, block_sizes = _plan(rows, options, carried is not None)
    # For all tokens to enter the slots, a window that is not aligned needs some rows more.
    more = spec.halo_padding if spec.state else 0
    padding = more + -(rows.num_rows + more) % spec.step_rows
    fused = fused_attention(
        _inputs(rows, spec, padding, carried),
        _constants(rows, spec, padding, options),
        spec=spec,
        block_sizes=block_sizes,
        interpret=interpret,
    )
    B, N, V = query.shape[0], rows.num_rows, value.shape[3]
    out = fused.out.reshape(B, N + padding, Hq, -1)[:, N - T : N, :, :V]
    weight = state = None
    if fused.slot_weight is not None:  # [B, Hkv, G, N'] -> [B, T, Hq]
        weight = fused.slot_weight.transpose(0, 3, 1, 2).reshape(B, -1, Hq)[:, N - T : N]
    if options.return_state and fused.end is not None:
        tokens = Tokens(key, apply_rope(key, rope), value, log_decay)
        timeline = build_timeline(tokens, segment_ids, carried, options.window_size)
        slots = split_slots(fused.end, log_decay.shape[3], key.shape[3], V)
        slots = of_last_segment(slots, timeline, T)
        state = next_state(timeline, T, slots, segment_ids, carried, options.window_size)
    return NHAOutput(out, state, weight)


def _window_alone(query, key, value, log_decay, rope, segment_ids, carried, options, interpret):
    """`_windowed` without slots: the kernels have at least one, which is then never read."""

    def one_slot(x, axis):
        return jnp.zeros((*x.shape[:axis], 1, *x.shape[axis + 1 :]), jnp.float32)

    if carried is not None:
        carried = carried._replace(
            slots=tuple(one_slot(x, 2) for x in carried.slots),
            tokens=carried.tokens._replace(log_decay=one_slot(carried.tokens.log_decay, 3)),
        )
    options = dataclasses.replace(options, read_slots=False)
    out, state, weight = _windowed(
        query, key, value, one_slot(log_decay, 3), rope, segment_ids, carried, options, interpret
    )
    if state is not None:
        state = state._replace(
            slot_key=state.slot_key[:, :, :0],
            slot_value=state.slot_value[:, :, :0],
            window_log_decay=state.window_log_decay[..., :0],
        )
    return NHAOutput(out, state, weight)


def _rows_of_call(
    query: jax.Array, tokens: Tokens, rope: Rope | None, segment_ids: jax.Array | None
) -> _Rows:
    timeline = build_timeline(tokens, segment_ids, None, None)
    last = last_real(timeline, query.shape[1])
    segments = segment_ids is not None
    return _Rows(query, tokens, timeline.run, timeline.real, last, rope, None, segments)


def _rows_with_past(
    query: jax.Array,
    tokens: Tokens,
    rope: Rope | None,
    segment_ids: jax.Array | None,
    carried: Carried,
) -> _Rows:
    """The tokens before are rows of their own, whose queries are zeros and go nowhere.

    Their keys were rotated when they came, so the call's keys and queries are rotated here as well.
    """
    W = carried.real.shape[1]
    timeline = build_timeline(tokens, segment_ids, carried, W)
    behind = functools.partial(jnp.pad, pad_width=((0, 0), (W, 0), (0, 0), (0, 0)))
    return _Rows(
        behind(query),
        timeline.tokens,
        timeline.run,
        timeline.real,
        W + last_real(timeline, query.shape[1]),
        None,
        behind(apply_rope(query, rope)),
        segments=True,
    )


def _plan(rows: _Rows, options: Options, has_state: bool) -> tuple[CallSpec, BlockSizes]:
    W = options.window_size
    assert W is not None
    group = rows.query.shape[2] // rows.tokens.key.shape[2]
    segments = rows.segments or options.return_state or not options.read_slots
    block_sizes = options.block_sizes or default_block_sizes(group, segments)
    chunks = -(-rows.num_rows // block_sizes.chunk)
    spec = CallSpec(
        group=group,
        slots=rows.tokens.log_decay.shape[3],
        window=W,
        wide_window=min(NARROW, block_sizes.chunk * block_sizes.chunks_per_step) < W,
        chunk=block_sizes.chunk,
        chunks=min(block_sizes.chunks_per_step, 1 << (chunks - 1).bit_length()),
        scale=options.scale,
        rope=rows.rope is not None and W > 0,
        rotated=rows.rotated_query is not None and W > 0,
        feature_map=options.slot_feature_map,
        mask_empty=options.empty_slots == "mask" or not options.read_slots,
        segments=segments,
        state=has_state or options.return_state,
        slot_weight=options.return_slot_weight,
        pull_slots_only=options.slot_weight_gradient == "slots",
    )
    return spec, block_sizes


def _inputs(
    rows: _Rows, spec: CallSpec, padding: int, carried: Carried | None
) -> dict[str, jax.Array]:
    """What the kernels differentiate."""
    key, rotated_key, value, log_decay = rows.tokens
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
        B, H, M = log_decay.shape[0], log_decay.shape[2], log_decay.shape[3]
        if carried is None:
            zeros = functools.partial(jnp.zeros, dtype=jnp.float32)
            slots = zeros((B, H, M, key.shape[3])), zeros((B, H, M, value.shape[3]))
        else:
            slots = carried.slots
        inputs["slots"] = join_slots(slots)
    return inputs


def _constants(rows: _Rows, spec: CallSpec, padding: int, options: Options) -> dict[str, jax.Array]:
    read_slots = options.read_slots
    constants = _who_sees_whom(rows, spec, padding, read_slots) if spec.segments else {}
    if spec.rope:
        assert rows.rope is not None
        constants["rope_table"] = rotation_table(rows.rope, spec.scale, padding)
    return constants


def _who_sees_whom(
    rows: _Rows, spec: CallSpec, padding: int, read_slots: bool
) -> dict[str, jax.Array]:
    """The kernels' constants of segments: whose the rows, the chunks' tokens and the slots are.

    Segments are numbered from 2; 1 is of padding and of rows beyond the last, 0 of tokens that no
    one reads.
    """
    C, halo = spec.chunk, spec.window if spec.wide_window else spec.halo
    N = rows.num_rows + padding
    number = rows.run + 2
    visible = jnp.where(rows.real, number, 0)
    last = rows.last[:, None] - spec.window  # the last token to enter the slots
    in_the_end = jnp.where(
        last >= 0, jnp.take_along_axis(number, jnp.maximum(last, 0), axis=1), 2
    )  # [B, 1]

    def entered(offset):  # [B, N], of the last token to have entered when t + offset had its turn
        turn = jnp.arange(N) + offset
        return jnp.where(turn > last, in_the_end, _at_offset(number, offset, N, outside=2))

    # After the last real row nothing enters: the slots stay as it left them.
    written = rows.real & (jnp.arange(rows.num_rows) <= last)
    run = _at_offset(jnp.where(rows.real, number, 1), 0, N, outside=1)
    tokens = _at_offset(visible, -halo, N + spec.chunk_tokens, outside=0)
    cat = [tokens[:, i : i + N].reshape(-1, N // C, C) for i in range(0, spec.chunk_tokens, C)]
    constants = {
        "row_segments": pack_row_segments(
            row_segment=run,
            slot_segment=entered(-halo),
            slots_filled=(_at_offset(visible, -spec.window, N, outside=0) == run) & read_slots,
            enters=_at_offset(written, -spec.window if spec.wide_window else 0, N, outside=False),
        ),
        "chunk_segments": pack_chunk_segments(
            jnp.concatenate(cat, axis=-1)[..., : spec.chunk_tokens],
            entered(-halo - 1)[:, ::C],
            entered(-halo + C - 1)[:, ::C],
        ),
    }
    if spec.wide_window:
        constants["query_segment"] = run[:, None]
        constants["token_segment"] = _at_offset(visible, 0, N, outside=0)[:, None]
    return {name: x.astype(jnp.float32) for name, x in constants.items()}


def _at_offset(x: jax.Array, offset: int, rows: int, *, outside: int) -> jax.Array:
    """x [B, n] at t + offset, [B, rows]; slices, because gathers are slow on a TPU."""
    before = max(-offset, 0)
    after = max(rows + offset - x.shape[1], 0)
    padded = jnp.pad(x, ((0, 0), (before, after)), constant_values=outside)
    return jax.lax.slice_in_dim(padded, offset + before, offset + before + rows, axis=1)
