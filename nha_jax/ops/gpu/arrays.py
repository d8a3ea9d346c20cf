"""A call's arrays as the GPU kernels take them.

Query rows are padded to Tq, whole chunks of C = 64, token rows to Tk, as far as whole blocks of C
reach; keys and values to heads of D, a multiple of 64; slots to a power of two.
"""

from typing import NamedTuple, TypeGuard

import jax
import jax.numpy as jnp

from nha_jax.ops.rope import Rope, apply_rope
from nha_jax.ops.state import Past, Tokens, empty_slots
from nha_jax.ops.timeline import NO_TOKEN, PADDING_ROW, Timeline
from nha_jax.ops.types import Options
from pallas.gpu import CHUNK, BlockSizes, CallSpec, default_block_sizes

Arrays = dict[str, jax.Array]

ROTATED_BLOCKS = 3  # the most that a chunk reads, for the kernels to rotate them: W up to 128
ROTATED_HEADS = (64, 128, 256)  # with 192, halves of 96 lie such that the output pass would spill


class KernelArrays(NamedTuple):
    """What `pallas.gpu.fused_attention` takes."""

    inputs: Arrays  # differentiated
    constants: Arrays


def lay_out(
    query: jax.Array,
    tokens: Tokens,
    timeline: Timeline,
    rope: Rope | None,
    segment_ids: jax.Array | None,
    past: Past | None,
    spec: CallSpec,
    options: Options,
) -> KernelArrays:
    """Lays out a call's query [B, T, Hq, K], its tokens and its timeline for the kernels."""
    source = tokens if spec.ahead else timeline.tokens
    constants: Arrays = {}
    if _rotated_by_kernels(rope, tokens, past, spec):
        constants, rope = _rotation(rope, query.shape[1], spec), None
        source = source._replace(rotated_key=source.key)  # which they are still to rotate
    inputs = _window_inputs(apply_rope(query, rope), source, spec)
    if spec.masked:
        constants |= _window_segments(timeline, spec)
    if spec.slots:
        all_real = segment_ids is None and past is None
        inputs |= _slot_inputs(source, timeline, past, spec, all_real=all_real)
        if rope is not None or past is not None or options.slot_feature_map != "identity":
            inputs |= _slot_tokens(query, source, spec, options)
        if spec.masked:
            constants |= _slot_segments(timeline, spec, options)
    return KernelArrays(inputs, constants)


def default_sizes(tokens: Tokens, slots: int) -> BlockSizes:
    """The kernels' block sizes for these heads; slots is M, 0 where none are read."""
    D = _head_dim(tokens)
    return default_block_sizes(D, _padded_slots(slots, D) if slots else 0)


def _rotated_by_kernels(
    rope: Rope | None, tokens: Tokens, past: Past | None, spec: CallSpec
) -> TypeGuard[Rope]:
    """Whether they rotate the window's queries and keys, so that nobody writes rotated copies.

    They rotate a key for each chunk that reads it, and halves of a head that is not padded. The
    keys of the past come rotated.
    """
    if rope is None or past is not None or spec.blocks is None:
        return False
    K = tokens.key.shape[3]
    return spec.blocks <= ROTATED_BLOCKS and _head_dim(tokens) == K and K in ROTATED_HEADS


def _rotation(rope: Rope, T: int, spec: CallSpec) -> Arrays:
    """The rope tables, by the token rows that the kernels read."""
    _, Tk = _padded_rows(T, spec)
    before = spec.offset - spec.ahead  # rows of nothing

    def by_token(x: jax.Array) -> jax.Array:
        x = x.astype(jnp.float32).reshape(-1, *x.shape[-2:])
        return _pad(jnp.pad(x, ((0, 0), (before, 0), (0, 0))), rows=Tk)

    cos, sin = map(by_token, rope)
    return {"cos": cos, "sin": sin}


def _window_inputs(window_query: jax.Array, source: Tokens, spec: CallSpec) -> Arrays:
    """What every call of the kernels reads."""
    Tq, Tk = _padded_rows(window_query.shape[1], spec)
    D = _head_dim(source)
    return {
        "window_query": _pad(window_query, rows=Tq, last=D),
        "window_key": _pad(source.rotated_key, rows=Tk, last=D),
        "value": _pad(source.value, rows=Tk, last=D),
    }


def _window_segments(timeline: Timeline, spec: CallSpec) -> Arrays:
    """The segments of query rows and token rows."""
    T = timeline.num_tokens
    Tq, Tk = _padded_rows(T, spec)
    return {
        "query_segment": _pad(timeline.row_segment[:, -T:], rows=Tq, value=PADDING_ROW),
        "token_segment": _pad(timeline.token_segment[:, spec.ahead :], rows=Tk, value=NO_TOKEN),
    }


def _slot_tokens(query: jax.Array, source: Tokens, spec: CallSpec, options: Options) -> Arrays:
    """What the slots read and are made of, where it is not what the window reads."""
    Tq, Tk = _padded_rows(query.shape[1], spec)
    D = _head_dim(source)
    return {
        "query": _pad(options.feature_map(query), rows=Tq, last=D),
        "key": _pad(options.feature_map(source.key), rows=Tk, last=D),
    }


def _slot_inputs(
    source: Tokens, timeline: Timeline, past: Past | None, spec: CallSpec, *, all_real: bool
) -> Arrays:
    """What the slots forget, and start from.

    In row t's turn the token in row t of the timeline enters, which is W before.

    Args:
      all_real: no row is padding.
    """
    T = timeline.num_tokens
    Tq, _ = _padded_rows(T, spec)
    D = _head_dim(source)
    M = _padded_slots(spec.slots, D)
    log_decay = source.log_decay[:, :T]
    if not all_real:
        enters = timeline.enters[:, spec.ahead : spec.ahead + T]
        log_decay = jnp.where(enters[..., None, None], log_decay, 0)
    inputs = {"log_decay": _pad(log_decay, rows=Tq, last=M)}
    if spec.state:
        slots = empty_slots(source.key, source.value, spec.slots) if past is None else past.slots
        for name, x in zip(("start_key", "start_value"), slots, strict=True):
            x = _pad(x, last=D).swapaxes(2, 3)  # [B, H, M, .] -> [B, H, D, M']
            inputs[name] = _pad(x, last=M)
    return inputs


def _slot_segments(timeline: Timeline, spec: CallSpec, options: Options) -> Arrays:
    """Who reads the slots, and what they hold at the chunks' ends."""
    T = timeline.num_tokens
    Tq, _ = _padded_rows(T, spec)
    slots = timeline.slot_segment(0, Tq).reshape(-1, Tq // CHUNK, CHUNK)
    end = slots[..., -1]
    start = jnp.pad(end, ((0, 0), (1, 0)))[:, :-1]
    own = timeline.reads_own_slots
    readable = timeline.query_real if options.empty_slots == "attend" else own
    reads_start = timeline.segment[:, -T:] == jnp.repeat(start, CHUNK, axis=1)[:, :T]
    reads = jnp.where(readable, 1 + reads_start.astype(jnp.int32), 0)
    return {
        "slot_access": _pad(reads, rows=Tq),
        "token_reaches_end": (slots == end[..., None]).reshape(-1, Tq),
        "start_reaches_end": start == end,
    }


def _padded_rows(T: int, spec: CallSpec) -> tuple[int, int]:
    """Tq and Tk."""
    Tq = -(-T // CHUNK) * CHUNK
    if spec.blocks is None:
        return Tq, -(-(Tq + spec.offset) // CHUNK) * CHUNK
    return Tq, Tq + (spec.blocks - 1) * CHUNK - spec.ahead


def _head_dim(tokens: Tokens) -> int:
    """D: keys and values are padded to the same multiple of 64."""
    return -(-max(tokens.key.shape[3], tokens.value.shape[3]) // 64) * 64


def _padded_slots(M: int, D: int) -> int:
    """A power of 2. With 16 and the widest heads a kernel of the backward would spill registers."""
    return max(16 if D <= 192 else 32, 1 << (M - 1).bit_length())


def _pad(
    x: jax.Array, *, rows: int | None = None, last: int | None = None, value: int = 0
) -> jax.Array:
    """Pads axis 1 to `rows` and the last axis to `last`, each at its end."""
    widths = [(0, 0)] * x.ndim
    if rows is not None:
        x = x[:, :rows]
        widths[1] = (0, rows - x.shape[1])
    if last is not None:
        widths[-1] = (0, last - x.shape[-1])
    return jnp.pad(x, widths, constant_values=value)
