"""The operator on the Mosaic GPU kernels; JAX differentiates what prepares their arrays."""

import warnings
from typing import Any, TypeGuard

import jax
import jax.numpy as jnp
from jax.experimental.pallas import mosaic_gpu as plgpu

from nha_jax.ops.gpu.cudnn import cudnn_attention
from nha_jax.ops.gpu.support import gpu_unsupported, served_by_cudnn
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
from nha_jax.ops.types import NHAOutput, Options
from nha_jax.ops.xla.chunked import chunked_attention
from pallas.gpu import CHUNK, BlockSizes, CallSpec, default_block_sizes, fused_attention

Arrays = dict[str, jax.Array]

ROTATED_BLOCKS = 3  # the most that a chunk reads, for the kernels to rotate them: W up to 128
ROTATED_HEADS = (64, 128, 256)  # with 192, halves of 96 lie such that the output pass would spill


def gpu_attention(
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
    """`nha_attention` by the kernels, or by cuDNN where it serves; shapes as there.

    What neither serves runs as plain XLA, with a warning that says why. Where the kernels rotate,
    no gradient flows to the rope tables.

    interpret: run the kernels on the CPU.
    """
    arrays = query, key, value, log_decay
    past = carried is not None
    if served_by_cudnn(*arrays[:3], segment_ids=segment_ids, has_past=past, options=options):
        return cudnn_attention(*arrays, rope=rope, options=options)
    rest: dict[str, Any] = {"rope": rope, "segment_ids": segment_ids}
    rest |= {"carried": carried, "options": options}
    if reason := gpu_unsupported(*arrays, options=options):
        warnings.warn(f"implementation='pallas_gpu': {reason}: running 'xla'", stacklevel=2)
        return chunked_attention(*arrays, **rest)
    return _by_kernels(*arrays, **rest, interpret=interpret)


def _by_kernels(
    query: jax.Array,
    key: jax.Array,
    value: jax.Array,
    log_decay: jax.Array,
    *,
    rope: Rope | None,
    segment_ids: jax.Array | None,
    carried: Carried | None,
    options: Options,
    interpret: bool,
) -> NHAOutput:
    T, M, W = query.shape[1], log_decay.shape[3], options.window_size
    rope = None if W == 0 else rope  # which only the window's logits know
    tokens = Tokens(key, apply_rope(key, rope), value, log_decay.astype(jnp.float32))
    nothing_leaves = W is None or (W >= T and carried is None)
    timeline = build_timeline(tokens, segment_ids, carried, None if nothing_leaves else W)
    has_slots = M > 0 and not nothing_leaves
    spec = CallSpec(
        group=query.shape[2] // key.shape[2],
        slots=M if has_slots else 0,
        empty_slots=M if nothing_leaves and options.empty_slots == "attend" else 0,
        window=None if nothing_leaves else W,
        offset=timeline.run.shape[1] - T,
        ahead=0 if W is None or nothing_leaves or carried is not None else _rows_ahead(W, T),
        scale=float(options.scale),
        masked=segment_ids is not None or carried is not None or options.empty_slots == "mask",
        state=has_slots and (carried is not None or options.return_state),
        weight=options.slot_weight_gradient if options.return_slot_weight else None,
    )
    source = tokens if spec.ahead else timeline.tokens
    constants: Arrays = {}
    if _rotated_by_kernels(rope, tokens, carried, spec):
        constants, rope = _rotation(rope, T, spec), None
        source = source._replace(rotated_key=source.key)  # which they are still to rotate
    inputs = _window_inputs(apply_rope(query, rope), source, spec)
    if spec.masked:
        constants |= _window_facts(timeline, T, spec)
    if has_slots:
        all_real = segment_ids is None and carried is None
        inputs |= _slot_inputs(source, timeline, carried, T, spec, all_real=all_real)
        if rope is not None or carried is not None or options.slot_feature_map != "identity":
            inputs |= _slot_tokens(query, source, spec, options)
        if spec.masked:
            constants |= _slot_facts(timeline, T, spec, options)
    fused = fused_attention(
        inputs,
        constants,
        spec=spec,
        block_sizes=_block_sizes(tokens, spec.slots),
        interpret=plgpu.InterpretGPUParams() if interpret else False,
    )
    real = timeline.real[:, -T:, None]
    out = jnp.where(real[..., None], fused.out[:, :T, :, : value.shape[3]], 0)
    weight = jnp.where(real, fused.slot_weight.swapaxes(1, 2)[:, :T], 0)
    state = None
    if options.return_state:
        slots = _empty(tokens, M)
        if fused.end is not None:  # [B, H, D, M'] -> [B, H, M, .]
            dims = key.shape[3], value.shape[3]
            ends = (x[:, :, :dim, :M] for x, dim in zip(fused.end, dims, strict=True))
            end_key, end_value = (x.swapaxes(2, 3) for x in ends)
            slots = of_last_segment((end_key, end_value), timeline, T)
        state = next_state(timeline, T, slots, segment_ids, carried, W)
    return NHAOutput(out, state, weight if options.return_slot_weight else None)


def _rows_ahead(W: int, T: int) -> int:
    """The timeline's W rows of nothing, if the kernels can do without them: then keys and values
    are read where they lie, and are not copied.
    """
    return W if W % CHUNK == 0 and T % CHUNK == 0 else 0


def _rotated_by_kernels(
    rope: Rope | None, tokens: Tokens, carried: Carried | None, spec: CallSpec
) -> TypeGuard[Rope]:
    """Whether they rotate the window's queries and keys, so that nobody writes rotated copies.

    They rotate a key for each chunk that reads it, and halves of a head that is not padded. The
    keys of the past come rotated.
    """
    if rope is None or carried is not None or spec.blocks is None:
        return False
    K = tokens.key.shape[3]
    return spec.blocks <= ROTATED_BLOCKS and _head_dim(tokens) == K and K in ROTATED_HEADS


def _rotation(rope: Rope, T: int, spec: CallSpec) -> Arrays:
    """The tables, by the token rows that the kernels read."""
    _, P = _padded_rows(T, spec)
    before = spec.offset - spec.ahead  # rows of nothing

    def by_token(x: jax.Array) -> jax.Array:
        x = x.astype(jnp.float32).reshape(-1, *x.shape[-2:])
        return _pad(jnp.pad(x, ((0, 0), (before, 0), (0, 0))), rows=P)

    cos, sin = map(by_token, rope)
    return {"cos": cos, "sin": sin}


def _window_inputs(window_query: jax.Array, source: Tokens, spec: CallSpec) -> Arrays:
    """What every call of the kernels reads; N query rows and P token rows, whole chunks."""
    N, P = _padded_rows(window_query.shape[1], spec)
    D = _head_dim(source)
    return {
        "window_query": _pad(window_query, rows=N, last=D),
        "window_key": _pad(source.rotated_key, rows=P, last=D),
        "value": _pad(source.value, rows=P, last=D),
    }


def _window_facts(timeline: Timeline, T: int, spec: CallSpec) -> Arrays:
    """Who sees whom."""
    N, P = _padded_rows(T, spec)
    query_run = jnp.where(timeline.real, timeline.run, -2)[:, -T:]
    visible = jnp.where(timeline.real, timeline.run, -1)[:, spec.ahead :]
    return {
        "query_segment": _pad(query_run, rows=N, value=-2),
        "token_segment": _pad(visible, rows=P, value=-1),
    }


def _slot_tokens(query: jax.Array, source: Tokens, spec: CallSpec, options: Options) -> Arrays:
    """What the slots read and are made of, where it is not what the window reads."""
    N, P = _padded_rows(query.shape[1], spec)
    D = _head_dim(source)
    return {
        "query": _pad(options.feature_map(query), rows=N, last=D),
        "key": _pad(options.feature_map(source.key), rows=P, last=D),
    }


def _slot_inputs(
    source: Tokens,
    timeline: Timeline,
    carried: Carried | None,
    T: int,
    spec: CallSpec,
    *,
    all_real: bool,
) -> Arrays:
    """What slots forget, and start from. At row t enters the timeline's row t, the token W back;
    nothing does after the last real token, so that the slots stay as that one left them.

    all_real: no row is padding.
    """
    N, _ = _padded_rows(T, spec)
    D = _head_dim(source)
    M = _padded_slots(spec.slots, D)
    log_decay = source.log_decay[:, :T]
    if not all_real:
        row, last = spec.ahead + jnp.arange(T), last_real(timeline, T)[:, None]
        enters = timeline.real[:, spec.ahead : spec.ahead + T] & (row <= last)
        log_decay = jnp.where(enters[..., None, None], log_decay, 0)
    inputs = {"log_decay": _pad(log_decay, rows=N, last=M)}
    if spec.state:
        slots = _empty(source, spec.slots) if carried is None else carried.slots
        for name, x in zip(("start_key", "start_value"), slots, strict=True):
            x = _pad(x, last=D).swapaxes(2, 3)  # [B, H, M, .] -> [B, H, D, M']
            inputs[name] = _pad(x, last=M)
    return inputs


def _slot_facts(timeline: Timeline, T: int, spec: CallSpec, options: Options) -> Arrays:
    """Who reads the slots, and what they hold.

    `run`: whose they are once a row's token has entered; `start` and `end`: at the chunks'.
    """
    N, _ = _padded_rows(T, spec)
    row, last = jnp.arange(T), last_real(timeline, T)[:, None]
    run = jnp.take_along_axis(timeline.run[:, :T], jnp.minimum(row, last), axis=1, mode="clip")
    run = jnp.where(last >= 0, run, 0)
    run = jnp.pad(run, ((0, 0), (0, N - T)), mode="edge").reshape(-1, N // CHUNK, CHUNK)
    end = run[..., -1]
    start = jnp.pad(end, ((0, 0), (1, 0)))[:, :-1]
    own = timeline.run[:, -T:]
    enters = timeline.real[:, :T] & (timeline.run[:, :T] == own)
    visible = timeline.real[:, -T:] if options.empty_slots == "attend" else enters
    carries = own == jnp.repeat(start, CHUNK, axis=1)[:, :T]
    reads = jnp.where(visible, 1 + carries.astype(jnp.int32), 0)
    return {
        "slot_access": _pad(reads, rows=N),
        "token_reaches_end": (run == end[..., None]).reshape(-1, N),
        "start_reaches_end": start == end,
    }


def _empty(tokens: Tokens, M: int) -> Slots:
    """[B, H, M, K] and [B, H, M, V] float32."""
    key, value = (
        jnp.zeros((x.shape[0], x.shape[2], M, x.shape[3]), jnp.float32)
        for x in (tokens.key, tokens.value)
    )
    return key, value


def _padded_rows(T: int, spec: CallSpec) -> tuple[int, int]:
    """N and P."""
    N = -(-T // CHUNK) * CHUNK
    if spec.blocks is None:
        return N, -(-(N + spec.offset) // CHUNK) * CHUNK
    return N, N + (spec.blocks - 1) * CHUNK - spec.ahead


def _head_dim(tokens: Tokens) -> int:
    """D: keys and values are padded to the same multiple of 64."""
    return -(-max(tokens.key.shape[3], tokens.value.shape[3]) // 64) * 64


def _padded_slots(M: int, D: int) -> int:
    """A power of 2. With 16 and the widest heads a kernel of the backward would spill registers."""
    return max(16 if D <= 192 else 32, 1 << (M - 1).bit_length())


def _block_sizes(tokens: Tokens, slots: int) -> BlockSizes:
    D = _head_dim(tokens)
    return default_block_sizes(D, _padded_slots(slots, D) if slots else 0)


def _pad(
    x: jax.Array, *, rows: int | None = None, last: int | None = None, value: int = 0
) -> jax.Array:
    """Axis 1 to `rows`, the last to `last`, each at its end."""
    widths = [(0, 0)] * x.ndim
    if rows is not None:
        x = x[:, :rows]
        widths[1] = (0, rows - x.shape[1])
    if last is not None:
        widths[-1] = (0, last - x.shape[-1])
    return jnp.pad(x, widths, constant_values=value)
