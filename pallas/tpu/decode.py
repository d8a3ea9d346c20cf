"""One token of generation in one launch: evict, update the slots, read, write the ring's entry.

The arrays of the state are aliased: of the four rings only the entry that the new token replaces is
written, and of the ring of keys that are not rotated, and of the decays, only that entry is read
(of decays laid out with the entries innermost, the 128 entries around it).
Heads are not cut out of the ring's [rows, H, .] blocks: all queries meet all rows of all heads in
one product, and the logits of other heads are masked. Matrix units have the time for it.
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from pallas.tpu.arithmetic import apply_feature_map, matmul, matmul_nt, to_column

LANES = 128
HIDDEN = -1e30
BLOCK_BYTES = 2**20  # of a ring's block


class DecodeToken(NamedTuple):
    """The new token of each batch row."""

    slot_query: jax.Array  # [B, Hq, K], the feature map applied
    rotated_query: jax.Array  # [B, Hq, K]
    key: jax.Array  # [B, H, K]
    rotated_key: jax.Array  # [B, H, K]
    value: jax.Array  # [B, H, V]
    log_decay: jax.Array  # [B, H, M] float32


class DecodeState(NamedTuple):
    """The arrays that are updated in place; R ring entries."""

    slot_key: jax.Array  # [B, H, M, K] float32
    slot_value: jax.Array  # [B, H, M, V] float32
    key: jax.Array  # [B, R, H, K]
    rotated_key: jax.Array  # [B, R, H, K]
    value: jax.Array  # [B, R, H, V]
    log_decay: jax.Array  # [B, R, H, M] float32


def decode_unsupported(state: DecodeState) -> str | None:
    """Why the kernel can't serve this state, in a line; None if it can."""
    H, M, K = state.slot_key.shape[1:]
    R, V = state.value.shape[1], state.value.shape[3]
    if K % LANES or V % LANES:
        return f"its kernel takes heads of a multiple of 128, got keys of {K} and values of {V}"
    if H % 8 or M % 8:
        return f"its kernel takes heads and slots in multiples of 8, got {H} heads, {M} slots"
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
    evicts: bool,
    mask_empty: bool,
    feature_map: str,
    interpret: pltpu.InterpretParams | bool = False,
) -> tuple[jax.Array, DecodeState]:
    """out [B, Hq, V] in the query's dtype, and the state after the token.

    Args:
      entry: [B] int32, the ring entry that the token replaces.
      length: [B] int32, the tokens before it. The rows' entry holds a token if that is R or more.
      active: [B] int32, 0 or 1: of rows with 0 out is 0, and the state stays.
      evicts: the token that is replaced enters the slots.
      mask_empty: slots that no token has entered are not read.
      feature_map: of keys that enter the slots.
    """
    B, Hq, _ = token.rotated_query.shape
    V = token.value.shape[2]
    R, rows = state.key.shape[1], _ring_rows(state)
    blocks = R // rows
    token_specs = [_whole(x) for x in token]
    slot_specs = [_whole(state.slot_key), _whole(state.slot_value)]
    key_entry, rotated_entry, value_entry, decay_entry = (_entry(x) for x in state[2:])
    turned = _is_turned(state.log_decay)
    if turned:
        state = state._replace(log_decay=state.log_decay.transpose(0, 2, 3, 1))
        decay_entry = _entry_lanes(state.log_decay)
    rings = [_ring(state.rotated_key, rows, blocks), _ring(state.value, rows, blocks)]
    operands = [*token, *state]
    first = 3 + len(token)  # of the state among the operands, behind the scalars
    result = pl.pallas_call(
        functools.partial(
            _kernel,
            scale=scale,
            evicts=evicts,
            mask_empty=mask_empty,
            entries=R,
            feature_map=feature_map,
        ),
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=3,
            grid=(B, blocks),
            in_specs=[*token_specs, *slot_specs, key_entry, *rings, decay_entry],
            out_specs=[
                _whole(jax.ShapeDtypeStruct((B, Hq, V), jnp.float32)),
                *slot_specs,
                key_entry,
                rotated_entry,
                value_entry,
                decay_entry,
            ],
            scratch_shapes=[
                pltpu.VMEM((Hq, 1), jnp.float32),
                pltpu.VMEM((Hq, 1), jnp.float32),
                pltpu.VMEM((Hq, V), jnp.float32),
            ],
        ),
        out_shape=[
            jax.ShapeDtypeStruct((B, Hq, V), token.rotated_query.dtype),
            *(jax.ShapeDtypeStruct(x.shape, x.dtype) for x in state),
        ],
        input_output_aliases={first + i: 1 + i for i in range(len(state))},
        compiler_params=pltpu.CompilerParams(dimension_semantics=("parallel", "arbitrary")),
        interpret=interpret,
        name="nha_decode",
    )(entry, length, active, *operands)
    after = DecodeState(*result[1:])
    if turned:
        after = after._replace(log_decay=after.log_decay.transpose(0, 3, 1, 2))
    return result[0], after


def _ring_rows(state: DecodeState) -> int:
    """The most entries of a block that divide the ring evenly; 0 if there is no such number."""
    R, H, K = state.key.shape[1:]
    most = BLOCK_BYTES // (H * max(K, state.value.shape[3]) * state.key.dtype.itemsize)
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


def _ring(ring: jax.Array, rows: int, blocks: int) -> pl.BlockSpec:
    """The ring in blocks, from the one with the entry on: the slots' update needs that first."""

    def index(b, j, entry, *_):
        return b, lax.rem(lax.div(entry[b], rows) + j, blocks), 0, 0

    return pl.BlockSpec((1, rows, *ring.shape[2:]), index)


def _kernel(
    entry_of, length_of, active_of,
    slot_query, rotated_query, key, rotated_key, value, log_decay,
    slot_key, slot_value, old_key, ring_key, ring_value, old_decay,
    out, slot_key_after, slot_value_after,
    key_after, rotated_key_after, value_after, decay_after,
    top, mass, total,
    *, scale: float, evicts: bool, mask_empty: bool, entries: int, feature_map: str,
):  # fmt: skip
    b, step = pl.program_id(0), pl.program_id(1)
    entry, length, active = entry_of[b], length_of[b], active_of[b] != 0
    rows, H = ring_key.shape[1:3]
    block = lax.rem(lax.div(entry, rows) + step, pl.num_programs(1))
    softmax = _Softmax(top, mass, total)

    @pl.when(step == 0)
    def _():
        old_rotated, old_value = (x[0, lax.rem(entry, rows)] for x in (ring_key, ring_value))
        for target, new, old in (
            (key_after, key, old_key[0, 0]),
            (rotated_key_after, rotated_key, old_rotated),
            (value_after, value, old_value),
        ):
            target[0, 0] = jnp.where(active, new[0], old)
        leaves = active & (length >= entries) & evicts
        leaving_key = apply_feature_map(old_key[0, 0].astype(jnp.float32), feature_map)
        leaving_value = old_value.astype(jnp.float32)
        for h in range(H):
            new = log_decay[0, h : h + 1]
            gate = jnp.where(leaves, _swap_decay(old_decay, decay_after, h, new, entry, active), 0)
            slot_key_after[0, h] = _enter(slot_key[0, h], gate, leaving_key[h : h + 1])
            slot_value_after[0, h] = _enter(slot_value[0, h], gate, leaving_value[h : h + 1])
        dtype = rotated_query.dtype
        logits = scale * matmul_nt(rotated_query[0], rotated_key[0])
        softmax.start(_mask(logits, lambda column: column, H), value[0])
        M = slot_key.shape[2]
        slot_keys, slot_values = (
            x[0].reshape(H * M, -1).astype(dtype) for x in (slot_key_after, slot_value_after)
        )
        logits = _mask(
            scale * matmul_nt(slot_query[0], slot_keys), lambda column: lax.div(column, M), H
        )
        if mask_empty:
            filled = (length + active.astype(jnp.int32) > entries) & evicts
            logits = jnp.where(filled, logits, HIDDEN)
        softmax.add(logits, slot_values)

    logits = scale * matmul_nt(rotated_query[0], ring_key[0].reshape(rows * H, -1))
    logits = _mask(logits, lambda column: lax.rem(column, H), H)
    column = lax.broadcasted_iota(jnp.int32, logits.shape, 1)
    position = block * rows + lax.div(column, H)
    logits = jnp.where((position < length) & (position != entry), logits, HIDDEN)
    softmax.add(logits, ring_value[0].reshape(rows * H, -1))

    @pl.when(step == pl.num_programs(1) - 1)
    def _():
        result = total[...] / mass[...]
        out[0] = jnp.where(active, result, 0.0).astype(out.dtype)


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
    return jnp.where(lax.div(query, group) == head_of(column), logits, HIDDEN)


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
