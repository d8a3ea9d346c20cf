"""The decode step in plain XLA: constant time and memory for a finite window."""

import jax
import jax.numpy as jnp
from jax import lax

from nha_jax.ops.state import NHAState, Tokens
from nha_jax.ops.types import Options


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
    batch, entry = jnp.arange(B), state.length % max(R, 1)
    length = state.length + active.astype(jnp.int32)
    now = token.map(lambda x: x[:, 0])  # [B, Hkv, .]
    # Read before the rings are written, or XLA would keep a copy of them for it.
    replaced, ring = lax.optimization_barrier(
        (state.tokens.map(lambda x: x[batch, entry] if x.shape[1] else None), state.tokens)
    )
    slot_key, slot_value = state.slot_key, state.slot_value
    if W is not None:
        # The token W back enters the slots: the ring entry that the new token replaces.
        slot_key, slot_value = _write_slots(state, replaced if W else now, active, options)

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
        filled = (length > R) & (W is not None)
        a = jnp.where(filled[:, None, None, None], a, -jnp.inf)
    seen = jnp.arange(R) < length[:, None]
    b = jnp.where(seen[:, None, None], b, -jnp.inf)
    p = jax.nn.softmax(jnp.concatenate([a, b], axis=-1), axis=-1)
    # An entry that no token has written may hold NaN, of which a weight of 0 would make NaN.
    out = _window_sum(p[..., M:], jnp.where(seen[..., None, None], ring.value, 0), dtype)
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


def _window_sum(weights: jax.Array, values: jax.Array, dtype: jnp.dtype) -> jax.Array:
    """[B, H, G, V], of weights [B, H, G, R] and a ring [B, R, H, V]; as in `_window_logits`."""
    B, H, G, R = weights.shape
    V = values.shape[3]
    weights = weights.reshape(B, H * G, R).astype(values.dtype)
    values = values.reshape(B, R, H * V)
    sums = jnp.einsum("bqr,brv->bqv", weights, values, preferred_element_type=dtype)
    own = jnp.eye(H, dtype=bool)[:, None, :, None]
    return jnp.sum(jnp.where(own, sums.reshape(B, H, G, H, V), 0), axis=3)


def _write_slots(
    state: NHAState, token: Tokens, active: jax.Array, options: Options
) -> tuple[jax.Array, jax.Array]:
    """Returns the slots [B, Hkv, M, .] after the token [B, Hkv, .] entered, if there was one.

    Slots that no token has entered before are zeros, whatever they hold.
    """
    decay = jnp.exp(token.log_decay)[..., None]
    write = -jnp.expm1(token.log_decay)[..., None]
    feature = options.feature_map(token.key.astype(decay.dtype))[:, :, None]
    active, filled, enters = (
        x[:, None, None, None]
        for x in (active, state.length > state.capacity, state.length >= state.capacity)
    )

    def update(slots: jax.Array, entering: jax.Array) -> jax.Array:
        before = jnp.where(filled, slots, 0)
        after = jnp.where(enters, decay * before + write * entering, before)
        return jnp.where(active, after, slots)

    return update(state.slot_key, feature), update(state.slot_value, token.value[:, :, None])
