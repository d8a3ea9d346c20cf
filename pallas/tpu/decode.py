"""One token of generation in one launch: a token enters the slots, the new one takes its entry.

Symbols and arrays as in `pallas/decode_types.py`. Inputs:

    entry, length, active  [B] int32, prefetched, because they say which blocks are fetched
    token                  a DecodeToken
    state                  a DecodeState, whose arrays are updated in place

Outputs: out [B, Hq, V], in the query's dtype, and the state after the token.

Scratch, of the softmax over parts (`_RunningSoftmax`): row_max and row_sum [Hq, 1], total [Hq, V],
float32.

Grid (B, blocks of the ring): of the two rings that the window reads, rotated keys and values, all
entries are read, a block of `_block_entries` at a time. The first grid step of a batch row gets the
block with the entry that the new token replaces. It begins the softmax with the new token, lets the
replaced one enter the slots, reads the slots, and writes the new token to its entry. Every step
reads its block of the ring, without that entry; the last one divides.

Of the rings that only the slots need, keys that are not rotated and decays, the entry alone is
read, and of all rings the entry alone is written. XLA may keep the ring of decays with its entries
innermost: there it is the 128 entries around the entry (`_entries_innermost`).

Heads are not cut out of the ring's [entries, Hkv, .] blocks: the queries of all heads meet the keys
of all heads in one product, and the logits of other heads are masked. Matrix units have the time.
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from pallas.constants import MASKED_LOGIT
from pallas.decode_types import DecodeState, DecodeToken
from pallas.tpu.arithmetic import LANES, apply_feature_map, matmul, matmul_nt, to_column
from pallas.tpu.launch import VMEM_BYTES, in_place_semantics, tiled_bytes

BLOCK_BYTES = 2**20  # at most, of a block of a ring
BUFFER_BYTES = VMEM_BYTES * 3 // 4  # at most, of all blocks twice; the rest is for values between


def decode_unsupported(state: DecodeState) -> str | None:
    """Says in a line why the kernel cannot serve this state; None if it can.

    It takes K and V in multiples of 128; 2, 4 or a multiple of 8 key/value heads; slots in
    multiples of 8; a ring that is cut evenly into blocks of no more than `BLOCK_BYTES`; and blocks
    that take no more than `BUFFER_BYTES` together.
    """
    (R, Hkv, K), V = state.rotated_key.shape[1:], state.value.shape[3]
    if K % LANES or V % LANES:
        return f"its kernel takes heads of a multiple of 128, got keys of {K} and values of {V}"
    if Hkv % 8 and Hkv not in (2, 4):
        return f"its kernel takes 2, 4 or a multiple of 8 heads, got {Hkv}"
    if state.slots is not None and state.slots.slot_key.shape[2] % 8:
        return f"its kernel takes slots in multiples of 8, got {state.slots.slot_key.shape[2]}"
    if R == 0 or _block_entries(state) == 0:
        return f"its kernel cannot cut a ring of {R} entries into blocks"
    if (needed := _buffer_bytes(state)) > BUFFER_BYTES:
        M = 0 if state.slots is None else state.slots.slot_key.shape[2]
        return (
            f"its kernel would need {needed >> 20} MiB of VMEM, over {BUFFER_BYTES >> 20}, for a"
            f" batch row of {Hkv} heads of {K} and {V} with {M} slots"
        )
    return None


def decode_attention(
    token: DecodeToken,
    state: DecodeState,
    entry: jax.Array,
    length: jax.Array,
    active: jax.Array,
    *,
    scale: float,
    num_slots: int,
    mask_empty: bool,
    feature_map: str,
    interpret: pltpu.InterpretParams | bool = False,
) -> tuple[jax.Array, DecodeState]:
    """Launches the kernel for a state that `decode_unsupported` lets pass.

    Args:
      entry: [B] int32, the ring entry that the token replaces; what it held enters the slots.
      length: [B] int32, the tokens before it. The entry holds a token if that is R or more.
      active: [B] int32, 0 or 1; where it is 0, out is 0 and the state stays.
      scale: of the logits.
      num_slots: M, also where the state has no slots.
      mask_empty: slots that no token has entered are not read.
      feature_map: of keys that enter the slots.
      interpret: run the kernel on the CPU.

    Returns out [B, Hq, V] in the query's dtype, and the state after the token.
    """
    B, Hq, _ = token.rotated_query.shape
    R, V = state.value.shape[1], state.value.shape[3]
    entries = _block_entries(state)
    innermost = state.slots is not None and _entries_innermost(state.slots.log_decay)
    if innermost:
        state = _transpose_decay(state, (0, 2, 3, 1))
    read, written = _state_specs(state, entries, innermost)
    first = 3 + len(jax.tree.leaves(token))  # of the state among the operands
    out, state = pl.pallas_call(
        functools.partial(
            _kernel,
            scale=scale,
            num_slots=num_slots,
            mask_empty=mask_empty,
            ring_entries=R,
            feature_map=feature_map,
        ),
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=3,
            grid=(B, R // entries),
            in_specs=[jax.tree.map(_whole, token), read],
            out_specs=[_whole(jax.ShapeDtypeStruct((B, Hq, V), jnp.float32)), written],
            scratch_shapes=[
                pltpu.VMEM((Hq, 1), jnp.float32),
                pltpu.VMEM((Hq, 1), jnp.float32),
                pltpu.VMEM((Hq, V), jnp.float32),
            ],
        ),
        out_shape=[
            jax.ShapeDtypeStruct((B, Hq, V), token.rotated_query.dtype),
            jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), state),
        ],
        input_output_aliases={first + i: 1 + i for i in range(len(jax.tree.leaves(state)))},
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=in_place_semantics(B), vmem_limit_bytes=VMEM_BYTES
        ),
        interpret=interpret,
        name="nha_decode",
    )(entry, length, active, token, state)
    return out, _transpose_decay(state, (0, 3, 1, 2)) if innermost else state


def _state_specs(state: DecodeState, entries: int, innermost: bool) -> tuple[Any, Any]:
    """The blocks of the state that are read, of the window's rings `entries`, and written."""
    written = jax.tree.map(_entry, state)
    if state.slots is not None:
        slots = written.slots._replace(
            slot_key=_whole(state.slots.slot_key), slot_value=_whole(state.slots.slot_value)
        )
        if innermost:
            slots = slots._replace(log_decay=_lanes_around_entry(state.slots.log_decay))
        written = written._replace(slots=slots)
    rings = {name: _ring(getattr(state, name), entries) for name in ("rotated_key", "value")}
    return written._replace(**rings), written


def _buffer_bytes(state: DecodeState) -> int:
    """The bytes of VMEM of the state's blocks, each twice: one is copied as the other is used."""
    innermost = state.slots is not None and _entries_innermost(state.slots.log_decay)
    if innermost:
        state = jax.eval_shape(lambda x: _transpose_decay(x, (0, 2, 3, 1)), state)
    total = 0
    for specs in _state_specs(state, _block_entries(state), innermost):
        is_block = lambda x: isinstance(x, pl.BlockSpec)  # noqa: E731
        blocks = jax.tree.leaves(specs, is_leaf=is_block)
        for block, array in zip(blocks, jax.tree.leaves(state), strict=True):
            total += 2 * tiled_bytes(block.block_shape, array.dtype)
    return total


def _block_entries(state: DecodeState) -> int:
    """The most entries of a block that divide the ring evenly; 0 if there is no such number."""
    R, Hkv, K = state.rotated_key.shape[1:]
    most = BLOCK_BYTES // (Hkv * max(K, state.value.shape[3]) * state.value.dtype.itemsize)
    return next((n for n in range(min(R, most), 0, -1) if R % n == 0 and n * Hkv % LANES == 0), 0)


def _entries_innermost(log_decay: jax.Array) -> bool:
    """Whether XLA keeps [B, R, Hkv, M] with R innermost: it does where that saves padding of M.

    To ask for another layout would copy the ring, twice a step where a step is its own program.
    """
    return log_decay.shape[3] % LANES != 0 and log_decay.shape[1] % LANES == 0


def _transpose_decay(state: DecodeState, axes: tuple[int, ...]) -> DecodeState:
    assert state.slots is not None
    log_decay = state.slots.log_decay.transpose(axes)
    return state._replace(slots=state.slots._replace(log_decay=log_decay))


def _whole(x) -> pl.BlockSpec:
    """All of a batch row."""
    return pl.BlockSpec((1, *x.shape[1:]), lambda b, j, *_: (b, *(0,) * (len(x.shape) - 1)))


def _entry(ring: jax.Array) -> pl.BlockSpec:
    """The entry that the token replaces."""
    return pl.BlockSpec((1, 1, *ring.shape[2:]), lambda b, j, entry, *_: (b, entry[b], 0, 0))


def _lanes_around_entry(ring: jax.Array) -> pl.BlockSpec:
    """The 128 entries around the one that the token replaces, of [B, Hkv, M, R]."""

    def index(b, j, entry, *_):
        return b, 0, 0, lax.div(entry[b], LANES)

    return pl.BlockSpec((1, *ring.shape[1:3], LANES), index)


def _ring(ring: jax.Array, entries: int) -> pl.BlockSpec:
    """The ring in blocks, from the one with the entry on: the slots' update needs that first."""

    def index(b, j, entry, *_):
        return b, lax.rem(lax.div(entry[b], entries) + j, ring.shape[1] // entries), 0, 0

    return pl.BlockSpec((1, entries, *ring.shape[2:]), index)


def _kernel(
    entry_of, length_of, active_of, token, state, out, after, row_max, row_sum, total,
    *, scale: float, num_slots: int, mask_empty: bool, ring_entries: int, feature_map: str,
):  # fmt: skip
    b, step = pl.program_id(0), pl.program_id(1)
    entry, length, active = entry_of[b], length_of[b], active_of[b] != 0
    entries, Hkv = state.value.shape[1:3]
    block = lax.rem(lax.div(entry, entries) + step, pl.num_programs(1))
    softmax = _RunningSoftmax(row_max, row_sum, total)

    @pl.when(step == 0)
    def _():
        logits = scale * matmul_nt(token.rotated_query[0], token.rotated_key[0])
        softmax.start(_mask_heads(logits, lambda column: column, Hkv), token.value[0])
        entry_in_block = lax.rem(entry, entries)
        if state.slots is not None:
            row = _BatchRow(
                entry,
                active,
                enters=active & (length >= ring_entries),
                unused=active & (length <= ring_entries),
            )
            _update_slots(token, state, after, row, state.value[0, entry_in_block], feature_map)
            logits, values = _read_slots(token, after, scale)
            if mask_empty:
                filled = length + active.astype(jnp.int32) > ring_entries
                logits = jnp.where(filled, logits, MASKED_LOGIT)
            softmax.add(logits, values)
        elif not mask_empty:
            softmax.add_zeros(num_slots)
        for target, new, old in (
            (after.rotated_key, token.rotated_key, state.rotated_key),
            (after.value, token.value, state.value),
        ):
            target[0, 0] = jnp.where(active, new[0], old[0, entry_in_block])

    query = token.rotated_query[0]
    logits = scale * matmul_nt(query, state.rotated_key[0].reshape(entries * Hkv, -1))
    logits = _mask_heads(logits, lambda column: lax.rem(column, Hkv), Hkv)
    column = lax.broadcasted_iota(jnp.int32, logits.shape, 1)
    position = block * entries + lax.div(column, Hkv)
    logits = jnp.where((position < length) & (position != entry), logits, MASKED_LOGIT)
    softmax.add(logits, _written_values(state.value[0], block * entries, length))

    @pl.when(step == pl.num_programs(1) - 1)
    def _():
        result = total[...] / row_sum[...]
        out[0] = jnp.where(active, result, 0.0).astype(out.dtype)


class _BatchRow(NamedTuple):
    """Scalars of a batch row."""

    entry: jax.Array
    active: jax.Array
    enters: jax.Array  # whether the token in the entry enters the slots
    unused: jax.Array  # whether no token has entered them before: they are zeros


def _written_values(values: jax.Array, first: jax.Array, length: jax.Array) -> jax.Array:
    """Values [entries, Hkv, V] of the ring from entry `first` on as [entries * Hkv, V].

    Entries that no token has written are zeros: they may hold NaN, and a weight of 0 keeps that.
    """
    entries, Hkv, V = values.shape
    x = values.reshape(entries * Hkv, V)
    entry = first + lax.div(lax.broadcasted_iota(jnp.int32, x.shape, 0), Hkv)
    return jnp.where(entry < length, x.astype(jnp.float32), 0.0).astype(x.dtype)


def _update_slots(
    token, state, after, row: _BatchRow, old_value: jax.Array, feature_map: str
) -> None:
    """Lets the entry's token, of value [Hkv, V], enter the slots, and writes the slots' rings."""
    before, result = state.slots, after.slots
    old_key = before.key[0, 0]
    result.key[0, 0] = jnp.where(row.active, token.slots.key[0], old_key)
    entering_key = apply_feature_map(old_key.astype(jnp.float32), feature_map)
    entering_value = old_value.astype(jnp.float32)
    for h in range(old_key.shape[0]):
        new = token.slots.log_decay[0, h : h + 1]
        old = _swap_decay(before.log_decay, result.log_decay, h, new, row)
        for target, slots, entering in (
            (result.slot_key, before.slot_key, entering_key),
            (result.slot_value, before.slot_value, entering_value),
        ):
            target[0, h] = _enter(slots[0, h], old, entering[h : h + 1], row)


def _swap_decay(before, after, h: int, new: jax.Array, row: _BatchRow) -> jax.Array:
    """Writes head h's new log decays [1, M] if the row is active; returns the old ones, [M, 1].

    before, after: the entry [1, 1, Hkv, M], or the lanes around it, [1, Hkv, M, 128].
    """
    if before.shape[1] == 1:
        old = before[0, 0, h : h + 1]
        after[0, 0, h : h + 1] = jnp.where(row.active, new, old)
        return to_column(old)
    lanes = before[0, h]
    here = lax.broadcasted_iota(jnp.int32, lanes.shape, 1) == lax.rem(row.entry, LANES)
    after[0, h] = jnp.where(here & row.active, to_column(new), lanes)
    return jnp.sum(jnp.where(here, lanes, 0.0), axis=1, keepdims=True)


def _enter(slots: jax.Array, log_decay: jax.Array, token: jax.Array, row: _BatchRow) -> jax.Array:
    """The slots [M, .] of a head after a token [1, .] entered, if it does; log_decay [M, 1]."""
    decay = jnp.exp(log_decay)
    write = -jnp.tanh(log_decay / 2) * (decay + 1)  # 1 - decay, exact for a small log decay
    before = jnp.where(row.unused, 0.0, slots)
    return jnp.where(row.enters, decay * before + write * token, before)


def _read_slots(token, after, scale: float) -> tuple[jax.Array, jax.Array]:
    """Logits [Hq, Hkv * M] of all heads' slots, those of other heads masked, and their values."""
    Hkv, M = after.slots.slot_key.shape[1:3]
    keys, values = (
        x[0].reshape(Hkv * M, -1).astype(token.slots.query.dtype)
        for x in (after.slots.slot_key, after.slots.slot_value)
    )
    logits = scale * matmul_nt(token.slots.query[0], keys)
    return _mask_heads(logits, lambda column: lax.div(column, M), Hkv), values


def _mask_heads(
    logits: jax.Array, head_of: Callable[[jax.Array], jax.Array], heads: int
) -> jax.Array:
    """Masks, in [Hq, columns], the columns of other key/value heads than the row's.

    head_of: from columns to their key/value heads.
    """
    group = logits.shape[0] // heads
    query = lax.broadcasted_iota(jnp.int32, logits.shape, 0)
    column = lax.broadcasted_iota(jnp.int32, logits.shape, 1)
    return jnp.where(lax.div(query, group) == head_of(column), logits, MASKED_LOGIT)


class _RunningSoftmax:
    """A softmax over parts that come one after the other, on three arrays in VMEM."""

    def __init__(self, row_max, row_sum, total):
        """Takes references: row_max and row_sum [Hq, 1], and total [Hq, V], not yet divided."""
        self._row_max, self._row_sum, self._total = row_max, row_sum, total

    def start(self, logits: jax.Array, values: jax.Array) -> None:
        """Begins with logits [Hq, n], of which each row has one unmasked, and values [n, V]."""
        self._row_max[...] = jnp.max(logits, axis=1, keepdims=True)
        p = jnp.exp(logits - self._row_max[...])
        self._row_sum[...] = jnp.sum(p, axis=1, keepdims=True)
        self._total[...] = matmul(p.astype(values.dtype), values)

    def add(self, logits: jax.Array, values: jax.Array) -> None:
        """Adds a part, of which all logits may be masked; shapes as of `start`."""
        row_max = jnp.maximum(self._row_max[...], jnp.max(logits, axis=1, keepdims=True))
        p, rescale = jnp.exp(logits - row_max), jnp.exp(self._row_max[...] - row_max)
        self._row_max[...] = row_max
        self._row_sum[...] = rescale * self._row_sum[...] + jnp.sum(p, axis=1, keepdims=True)
        self._total[...] = rescale * self._total[...] + matmul(p.astype(values.dtype), values)

    def add_zeros(self, count: int) -> None:
        """Adds `count` columns whose logits and values are 0."""
        row_max = jnp.maximum(self._row_max[...], 0.0)
        rescale = jnp.exp(self._row_max[...] - row_max)
        self._row_max[...] = row_max
        self._row_sum[...] = rescale * self._row_sum[...] + count * jnp.exp(-row_max)
        self._total[...] = rescale * self._total[...]
