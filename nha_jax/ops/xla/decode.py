"""The decode step in plain XLA: constant time and memory for a finite window."""

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax import lax

from nha_jax.ops.state import NHAState, Tokens
from nha_jax.ops.types import Options

BLOCK = 256  # ring entries that a CPU multiplies at once


def decode_xla(
    query: jax.Array,
    rotated_query: jax.Array,
    token: Tokens,
    state: NHAState,
    active: jax.Array,
    *,
    options: Options,
) -> tuple[jax.Array, NHAState]:
    """Computes `nha_jax.ops.backends.Backend.decode`; shapes as there."""
    B, _, Hq, K = query.shape
    Hkv, M, W, R = token.key.shape[2], token.log_decay.shape[3], options.window_size, state.capacity
    dtype = token.log_decay.dtype
    batch, entry = jnp.arange(B, dtype=jnp.int32), state.length % max(R, 1)
    length = state.length + active.astype(jnp.int32)
    now = token.map(lambda x: x[:, 0])  # [B, Hkv, .]
    # Read before the rings are written, or XLA would keep a copy of them for it.
    back = options.slot_delay
    delayed = _at_entry(state, (entry - back) % max(R, 1)) if back else None
    replaced, delayed, ring = lax.optimization_barrier(
        (_at_entry(state, entry), delayed, state.tokens)
    )
    slot_key, slot_value = state.slot_key, state.slot_value
    if W is not None:
        # The token W back enters the slots: the ring entry that the new token replaces. With a
        # slot_delay it is the one so many back, which stays in the ring.
        entering = now if options.delay == 0 else (delayed or replaced)
        slot_key, slot_value = _write_slots(state, entering, active, options)

    def write(ring, x, old):
        if old is None:
            return ring
        x = jnp.where(active[:, None, None], x, old)
        return ring.at[batch, entry].set(x, unique_indices=True)

    ring = Tokens(*map(write, ring, now, replaced))

    rotated_query = rotated_query.reshape(B, Hkv, Hq // Hkv, K)
    if W is None:
        a = jnp.zeros((B, Hkv, Hq // Hkv, M), dtype)
    else:
        slot_query = options.feature_map(query.reshape(B, Hkv, Hq // Hkv, K).astype(dtype))
        a = options.scale * jnp.einsum("bhgk,bhmk->bhgm", slot_query, slot_key)
    b = options.scale * _window_logits(rotated_query, ring.rotated_key, dtype)
    if options.empty_slots == "mask":
        filled = (length > options.delay) if options.delay is not None else jnp.zeros(B, bool)
        a = jnp.where(filled[:, None, None, None], a, -jnp.inf)
    seen = jnp.arange(R, dtype=jnp.int32)[None] < length[:, None]
    b = jnp.where(seen[:, None, None], b, -jnp.inf)
    p = jax.nn.softmax(jnp.concatenate([a, b], axis=-1), axis=-1)
    out = _window_sum(p[..., M:], ring.value, seen, dtype)
    if W is not None:
        out += jnp.einsum("bhgm,bhmv->bhgv", p[..., :M], slot_value)
    out = jnp.where(active[:, None, None, None], out, 0.0).astype(query.dtype)
    after = NHAState(slot_key, slot_value, *ring, length=length, segment_id=state.segment_id)
    return out.reshape(B, 1, Hq, token.value.shape[3]), after


def _window_logits(query: jax.Array, keys: jax.Array, dtype: jnp.dtype) -> jax.Array:
    """[B, H, G, R], of queries [B, H, G, K] and a ring [B, R, H, K].

    A product per head would first copy the ring, heads outermost. So the queries meet all heads'
    keys at once, each with zeros for the heads that are not its own.
    """
    B, H, G, K = query.shape
    own = jnp.eye(H, dtype=bool)[:, None, :, None]
    spread = jnp.where(own, query[:, :, :, None], 0).reshape(B, H * G, H * K)
    keys = keys.reshape(B, keys.shape[1], H * K)
    logits = jnp.einsum("bqk,brk->bqr", spread, keys, preferred_element_type=dtype)
    return logits.reshape(B, H, G, keys.shape[1])


def _window_sum(
    weights: jax.Array, values: jax.Array, seen: jax.Array, dtype: jnp.dtype
) -> jax.Array:
    """[B, H, G, V], of weights [B, H, G, R] and a ring [B, R, H, V]; as in `_window_logits`.

    Entries that are not `seen` [B, R] are zeros: they may hold NaN, and a weight of 0 keeps that.
    TPUs and GPUs can put the zeros in as they multiply. A CPU would copy the ring for it, and does
    it block by block.
    """
    B, H, G, R = weights.shape
    V = values.shape[3]
    weights = weights.reshape(B, H * G, R).astype(values.dtype)
    multiply = functools.partial(_sum_of_seen, dtype=dtype)
    sums = lax.platform_dependent(
        weights,
        values.reshape(B, R, H * V),
        seen,
        cpu=functools.partial(_by_blocks, multiply),
        default=multiply,
    )
    own = jnp.eye(H, dtype=bool)[:, None, :, None]
    return jnp.sum(jnp.where(own, sums.reshape(B, H, G, H, V), 0), axis=3)


def _sum_of_seen(
    weights: jax.Array, values: jax.Array, seen: jax.Array, *, dtype: jnp.dtype
) -> jax.Array:
    """[B, q, v], of weights [B, q, R], values [B, R, v] and which of them count, [B, R]."""
    values = jnp.where(seen[..., None], values, 0)
    return jnp.einsum("bqr,brv->bqv", weights, values, preferred_element_type=dtype)


def _by_blocks(
    multiply: Callable[..., jax.Array], weights: jax.Array, values: jax.Array, seen: jax.Array
) -> jax.Array:
    """Adds up `_sum_of_seen` over blocks of BLOCK entries; the last ones overlap."""
    R = values.shape[1]
    size = min(R, BLOCK)

    def add(i: jax.Array, total: jax.Array) -> jax.Array:
        start = jnp.minimum(i * size, R - size)
        cut = functools.partial(lax.dynamic_slice_in_dim, start_index=start, slice_size=size)
        row = start + jnp.arange(size, dtype=jnp.int32)
        new = row >= i * size  # the block before had the others
        part = multiply(cut(weights, axis=2), cut(values, axis=1), cut(seen, axis=1) & new[None])
        return total + part

    nothing = jax.eval_shape(multiply, weights, values, seen)
    return lax.fori_loop(0, -(-R // max(size, 1)), add, jnp.zeros(nothing.shape, nothing.dtype))


def _at_entry(state: NHAState, entry: jax.Array) -> Tokens:
    """Reads one entry [B] of each row's ring; None for the arrays that have no entries."""
    batch = jnp.arange(entry.shape[0], dtype=jnp.int32)
    return state.tokens.map(lambda x: x[batch, entry] if x.shape[1] else None)


def _write_slots(
    state: NHAState, token: Tokens, active: jax.Array, options: Options
) -> tuple[jax.Array, jax.Array]:
    """Returns the slots [B, Hkv, M, .] after the token [B, Hkv, .] entered, if there was one.

    Slots that no token has entered before are zeros, whatever they hold.
    """
    decay = jnp.exp(token.log_decay)[..., None]
    write = -jnp.expm1(token.log_decay)[..., None]
    feature = options.feature_map(token.key.astype(decay.dtype))[:, :, None]
    delay = state.capacity if options.slot_delay is None else options.slot_delay
    active, filled, enters = (
        x[:, None, None, None] for x in (active, state.length > delay, state.length >= delay)
    )

    def update(slots: jax.Array, entering: jax.Array) -> jax.Array:
        before = jnp.where(filled, slots, 0)
        after = jnp.where(enters, decay * before + write * entering, before)
        return jnp.where(active, after, slots)

    value = token.value.astype(decay.dtype)[:, :, None]
    return update(state.slot_key, feature), update(state.slot_value, value)
