"""One token of generation in one launch: evict, update the slots, read, write the ring's entry.

The arrays of the state are aliased: of the rings only the entry that the new token replaces is
written, and of the ring of keys that are not rotated, and of the decays, only that entry is read
(of decays laid out with the entries innermost, the 128 entries around it). Full attention has
neither of these two, nor slots.
Heads are not cut out of the ring's [rows, H, .] blocks: all queries meet all rows of all heads in
one product, and the logits of other heads are masked. Matrix units have the time for it.
"""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from pallas.constants import MASKED_LOGIT
from pallas.decode_types import DecodeState, DecodeToken
from pallas.tpu.arithmetic import apply_feature_map, matmul, matmul_nt, to_column

LANES = 128
BLOCK_BYTES = 2**20  # of a ring's block


def decode_unsupported(state: DecodeState) -> str | None:
    """Why the kernel can't serve this state, in a line; None if it can."""
    (R, H, K), V = state.rotated_key.shape[1:], state.value.shape[3]
    if K % LANES or V % LANES:
        return f"its kernel takes heads of a multiple of 128, got keys of {K} and values of {V}"
    if H % 8 and H not in (2, 4):
        return f"its kernel takes 2, 4 or a multiple of 8 heads, got {H}"
    if state.slots is not None and state.slots.slot_key.shape[2] % 8:
        return f"its kernel takes slots in multiples of 8, got {state.slots.slot_key.shape[2]}"
    if R == 0 or _ring_rows(state) == 0:
        return f"its kernel cannot cut a ring of {R} entries into blocks"
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
    """out [B, Hq, V] in the query's dtype, and the state after the token.

    Args:
      entry: [B] int32, the ring entry that the token replaces; what it held enters the slots.
      length: [B] int32, the tokens before it. The rows' entry holds a token if that is R or more.
      active: [B] int32, 0 or 1: of rows with 0 out is 0, and the state stays.
      num_slots: M, also where the state has none.
      mask_empty: slots that no token has entered are not read.
      feature_map: of keys that enter the slots.
    """
    B, Hq, _ = token.rotated_query.shape
    R, V = state.value.shape[1], state.value.shape[3]
    rows = _ring_rows(state)
    turned = state.slots is not None and _is_turned(state.slots.log_decay)
    if turned:
        state = _transpose_decay(state, (0, 2, 3, 1))
    read, written = _state_specs(state, rows, turned)
    first = 3 + len(jax.tree.leaves(token))  # of the state among the operands, behind the scalars
    out, state = pl.pallas_call(
        functools.partial(
            _kernel,
            scale=scale,
            num_slots=num_slots,
            mask_empty=mask_empty,
            entries=R,
            feature_map=feature_map,
        ),
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=3,
            grid=(B, R // rows),
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
        compiler_params=pltpu.CompilerParams(dimension_semantics=("parallel", "arbitrary")),
        interpret=interpret,
        name="nha_decode",
    )(entry, length, active, token, state)
    return out, _transpose_decay(state, (0, 3, 1, 2)) if turned else state


def _state_specs(state: DecodeState, rows: int, turned: bool) -> tuple[Any, Any]:
    """As trees: the blocks of the state that are read, of the rings `rows` entries, and written."""
    written = jax.tree.map(_entry, state)
    if state.slots is not None:
        slots = written.slots._replace(
            slot_key=_whole(state.slots.slot_key), slot_value=_whole(state.slots.slot_value)
        )
        if turned:
            slots = slots._replace(log_decay=_entry_lanes(state.slots.log_decay))
        written = written._replace(slots=slots)
    rings = {name: _ring(getattr(state, name), rows) for name in ("rotated_key", "value")}
    return written._replace(**rings), written


def _transpose_decay(state: DecodeState, axes: tuple[int, ...]) -> DecodeState:
    assert state.slots is not None
    log_decay = state.slots.log_decay.transpose(axes)
    return state._replace(slots=state.slots._replace(log_decay=log_decay))


def _ring_rows(state: DecodeState) -> int:
    """The most entries of a block that divide the ring evenly; 0 if there is no such number."""
    R, H, K = state.rotated_key.shape[1:]
    most = BLOCK_BYTES // (H * max(K, state.value.shape[3]) * state.value.dtype.itemsize)
    return next((n for n in range(min(R, most), 0, -1) if R % n == 0 and n * H % LANES == 0), 0)


def _whole(x) -> pl.BlockSpec:
    """All of a batch row."""
    return pl.BlockSpec((1, *x.shape[1:]), lambda b, j, *_: (b, *(0,) * (len(x.shape) - 1)))


def _entry(ring: jax.Array) -> pl.BlockSpec:
    """The entry that the token replaces."""
    return pl.BlockSpec((1, 1, *ring.shape[2:]), lambda b, j, entry, *_: (b, entry[b], 0, 0))


def _is_turned(log_decay: jax.Array) -> bool:
    """Whether XLA keeps [B, R, H, M] with R innermost: it does where that saves padding of M.

    To ask for another layout would copy the ring, twice a step where a step is its own program.
    """
    return log_decay.shape[3] % LANES != 0 and log_decay.shape[1] % LANES == 0


def _entry_lanes(ring: jax.Array) -> pl.BlockSpec:
    """Of [B, H, M, R], the lanes around the entry that the token replaces."""

    def index(b, j, entry, *_):
        return b, 0, 0, lax.div(entry[b], LANES)

    return pl.BlockSpec((1, *ring.shape[1:3], LANES), index)


def _ring(ring: jax.Array, rows: int) -> pl.BlockSpec:
    """The ring in blocks, from the one with the entry on: the slots' update needs that first."""

    def index(b, j, entry, *_):
        return b, lax.rem(lax.div(entry[b], rows) + j, ring.shape[1] // rows), 0, 0

    return pl.BlockSpec((1, rows, *ring.shape[2:]), index)


def _kernel(
    entry_of, length_of, active_of, token, state, out, after, top, mass, total,
    *, scale: float, num_slots: int, mask_empty: bool, entries: int, feature_map: str,
):  # fmt: skip
    b, step = pl.program_id(0), pl.program_id(1)
    entry, length, active = entry_of[b], length_of[b], active_of[b] != 0
    rows, H = state.value.shape[1:3]
    block = lax.rem(lax.div(entry, rows) + step, pl.num_programs(1))
    softmax = _Softmax(top, mass, total)

    @pl.when(step == 0)
    def _():
        logits = scale * matmul_nt(token.rotated_query[0], token.rotated_key[0])
        softmax.start(_mask(logits, lambda column: column, H), token.value[0])
        row = lax.rem(entry, rows)
        if state.slots is not None:
            now = _Now(entry, active, active & (length >= entries))
            _update_slots(token, state, after, now, state.value[0, row], feature_map)
            logits, values = _read_slots(token, after, scale)
            if mask_empty:
                filled = length + active.astype(jnp.int32) > entries
                logits = jnp.where(filled, logits, MASKED_LOGIT)
            softmax.add(logits, values)
        elif not mask_empty:
            softmax.add_zeros(num_slots)
        for target, new, old in (
            (after.rotated_key, token.rotated_key, state.rotated_key),
            (after.value, token.value, state.value),
        ):
            target[0, 0] = jnp.where(active, new[0], old[0, row])

    logits = scale * matmul_nt(token.rotated_query[0], state.rotated_key[0].reshape(rows * H, -1))
    logits = _mask(logits, lambda column: lax.rem(column, H), H)
    column = lax.broadcasted_iota(jnp.int32, logits.shape, 1)
    position = block * rows + lax.div(column, H)
    logits = jnp.where((position < length) & (position != entry), logits, MASKED_LOGIT)
    softmax.add(logits, state.value[0].reshape(rows * H, -1))

    @pl.when(step == pl.num_programs(1) - 1)
    def _():
        result = total[...] / mass[...]
        out[0] = jnp.where(active, result, 0.0).astype(out.dtype)


class _Now(NamedTuple):
    """Scalars of a batch row."""

    entry: jax.Array
    active: jax.Array
    leaves: jax.Array  # whether the token in the entry enters the slots


def _update_slots(token, state, after, now: _Now, old_value: jax.Array, feature_map: str) -> None:
    """Lets the entry's token, of value [H, V], into the slots, and the new token into the rings."""
    before, result = state.slots, after.slots
    old_key = before.key[0, 0]
    result.key[0, 0] = jnp.where(now.active, token.slots.key[0], old_key)
    leaving_key = apply_feature_map(old_key.astype(jnp.float32), feature_map)
    leaving_value = old_value.astype(jnp.float32)
    for h in range(old_key.shape[0]):
        new = token.slots.log_decay[0, h : h + 1]
        old = _swap_decay(before.log_decay, result.log_decay, h, new, now.entry, now.active)
        gate = jnp.where(now.leaves, old, 0)
        result.slot_key[0, h] = _enter(before.slot_key[0, h], gate, leaving_key[h : h + 1])
        result.slot_value[0, h] = _enter(before.slot_value[0, h], gate, leaving_value[h : h + 1])


def _read_slots(token, after, scale: float) -> tuple[jax.Array, jax.Array]:
    """Logits [Hq, H * M] of all heads' slots, those of other heads hidden, and values."""
    H, M = after.slots.slot_key.shape[1:3]
    keys, values = (
        x[0].reshape(H * M, -1).astype(token.slots.query.dtype)
        for x in (after.slots.slot_key, after.slots.slot_value)
    )
    logits = scale * matmul_nt(token.slots.query[0], keys)
    return _mask(logits, lambda column: lax.div(column, M), H), values


def _swap_decay(before, after, h: int, new: jax.Array, entry, active) -> jax.Array:
    """Writes head h's new decays [1, M] in active rows; returns those replaced, [M, 1].

    before, after: the entry [1, 1, H, M], or the lanes around it, [1, H, M, 128].
    """
    if before.shape[1] == 1:
        old = before[0, 0, h : h + 1]
        after[0, 0, h : h + 1] = jnp.where(active, new, old)
        return to_column(old)
    lanes = before[0, h]
    here = lax.broadcasted_iota(jnp.int32, lanes.shape, 1) == lax.rem(entry, LANES)
    after[0, h] = jnp.where(here & active, to_column(new), lanes)
    return jnp.sum(jnp.where(here, lanes, 0.0), axis=1, keepdims=True)


def _enter(slots: jax.Array, gate: jax.Array, row: jax.Array) -> jax.Array:
    """The slots [M, .] of a head after a token entered: log decays [M, 1], row [1, .]."""
    decay = jnp.exp(gate)
    write = -jnp.tanh(gate / 2) * (decay + 1)  # 1 - decay, exact for a small gate
    return decay * slots + write * row


def _mask(logits: jax.Array, head_of, heads: int) -> jax.Array:
    """[Hq, columns]: hides the columns of other heads than the row's."""
    group = logits.shape[0] // heads
    query = lax.broadcasted_iota(jnp.int32, logits.shape, 0)
    column = lax.broadcasted_iota(jnp.int32, logits.shape, 1)
    return jnp.where(lax.div(query, group) == head_of(column), logits, MASKED_LOGIT)


class _Softmax:
    """A softmax over parts that come one after the other; its three arrays live in VMEM."""

    def __init__(self, top, mass, total):
        self.top, self.mass, self.total = top, mass, total

    def start(self, logits: jax.Array, values: jax.Array) -> None:
        """logits [Hq, n], in every row one that is not hidden; values [n, V]."""
        self.top[...] = jnp.max(logits, axis=1, keepdims=True)
        weights = jnp.exp(logits - self.top[...])
        self.mass[...] = jnp.sum(weights, axis=1, keepdims=True)
        self.total[...] = matmul(weights.astype(values.dtype), values)

    def add(self, logits: jax.Array, values: jax.Array) -> None:
        """As `start`, but all may be hidden."""
        top = jnp.maximum(self.top[...], jnp.max(logits, axis=1, keepdims=True))
        weights, kept = jnp.exp(logits - top), jnp.exp(self.top[...] - top)
        self.top[...] = top
        self.mass[...] = kept * self.mass[...] + jnp.sum(weights, axis=1, keepdims=True)
        self.total[...] = kept * self.total[...] + matmul(weights.astype(values.dtype), values)

    def add_zeros(self, count: int) -> None:
        """As `add`, of as many columns whose logits and values are 0."""
        top = jnp.maximum(self.top[...], 0.0)
        kept = jnp.exp(self.top[...] - top)
        self.top[...] = top
        self.mass[...] = kept * self.mass[...] + count * jnp.exp(-top)
        self.total[...] = kept * self.total[...]
