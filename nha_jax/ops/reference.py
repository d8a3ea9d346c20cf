"""The definition of Native Hybrid Attention, one token at a time (arXiv 2510.07019).

Every other implementation is held against this one. It takes any float dtype (float64 under
`jax.enable_x64`) and spends T x T memory on the window's logits: for small T.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from nha_jax.ops.backends import Backend
from nha_jax.ops.rope import Rope, apply_rope
from nha_jax.ops.state import NHAState, Past, Tokens, compute_dtype, empty_slots, resize_state
from nha_jax.ops.timeline import Timeline, build_timeline, next_state, nothing_leaves
from nha_jax.ops.types import NHAOutput, Options


def reference_attention(
    query: jax.Array,
    key: jax.Array,
    value: jax.Array,
    log_decay: jax.Array,
    *,
    rope: Rope | None,
    segment_ids: jax.Array | None,
    past: Past | None,
    options: Options,
) -> NHAOutput:
    """Computes `nha_attention` by the per-token recurrence; shapes as there.

    At step t of a segment, with s = 1 - exp(log_decay), and slot_delay for W if there is one:
        S_t = exp(log_decay_j) S_{t-1} + s_j [key_j ; value_j]   for j = t - W, if it exists
        a_t = scale feature_map(query_t) . SK_t                  the M slots
        b_t = scale rotated(query_t) . rotated(key_i)            t - W < i <= t
        o_t = softmax([a_t ; b_t]) [SV_t ; value_i]
    """
    tokens = Tokens(key, apply_rope(key, rope), value, log_decay)
    return _recurrence(query, apply_rope(query, rope), tokens, segment_ids, past, options)


@jax.default_matmul_precision("highest")
def _recurrence(
    query: jax.Array,
    rotated_query: jax.Array,
    tokens: Tokens,
    segment_ids: jax.Array | None,
    past: Past | None,
    options: Options,
) -> NHAOutput:
    B, T, Hq, K = query.shape
    Hkv, W = tokens.key.shape[2], options.window_size
    dtype = compute_dtype(query)
    tokens = tokens._replace(log_decay=tokens.log_decay.astype(dtype))
    timeline = build_timeline(tokens, segment_ids, past, W, slot_delay=options.slot_delay)
    wide = timeline.tokens.map(lambda x: x.astype(dtype))
    groups = (B, T, Hkv, Hq // Hkv, K)
    slot_query = options.feature_map(query.reshape(groups).astype(dtype))
    rotated_query = rotated_query.reshape(groups).astype(dtype)
    b = jnp.where(
        _in_window(timeline)[:, :, None, None],
        options.scale * jnp.einsum("bthgk,bnhk->tbhgn", rotated_query, wide.rotated_key),
        -jnp.inf,
    )  # [T, B, Hkv, G, R + T]
    # At step t enters the token W back, or slot_delay back; none if W is everything.
    written = (wide.key, wide.value, wide.log_decay)
    if nothing_leaves(options.delay, T, past is not None):
        entering = (*(x[:, -T:] for x in written), jnp.zeros((B, T), bool))
    else:
        entering = (*map(timeline.entering, written), timeline.reads_own_slots)

    slots = empty_slots(tokens.key, tokens.value, tokens.log_decay.shape[3])
    if past is not None and W is not None:
        slots = past.slots[0].astype(dtype), past.slots[1].astype(dtype)
    rows = (slot_query, entering, timeline.segment[:, -T:], timeline.query_real)
    slot_query, *rest = jax.tree.map(lambda x: x.swapaxes(0, 1), rows)  # time first
    (slots, _), (out, weight) = jax.lax.scan(
        _step(wide.value, options),
        (slots, jnp.zeros(B, jnp.int32)),
        (slot_query, b, *rest),
    )
    # [T, B, Hkv, G, ...] -> [B, T, Hq, ...]
    out = out.swapaxes(0, 1).reshape(B, T, Hq, tokens.value.shape[3]).astype(query.dtype)
    weight = weight.swapaxes(0, 1).reshape(B, T, Hq)
    state = next_state(timeline, slots, segment_ids, past) if options.return_state else None
    return NHAOutput(out, state, weight if options.return_slot_weight else None)


def _step(values: jax.Array, options: Options) -> Callable[..., Any]:
    """Builds a step of the recurrence over the call's tokens, whose values are [B, R + T, Hkv, V].

    It carries the slots and the number of their segment.
    """

    def step(carry, x):
        (slot_key, slot_value), current = carry
        q, b, (k, v, g, enters), segment, real = x
        starts = (real & (segment != current))[:, None, None, None]
        slot_key, slot_value = (jnp.where(starts, 0, s) for s in (slot_key, slot_value))
        decay = jnp.exp(g)[..., None]  # [B, Hkv, M, 1]
        write = -jnp.expm1(g)[..., None]
        writes = (real & enters)[:, None, None, None]
        feature = options.feature_map(k)[:, :, None]  # [B, Hkv, 1, K]
        slot_key = jnp.where(writes, decay * slot_key + write * feature, slot_key)
        slot_value = jnp.where(writes, decay * slot_value + write * v[:, :, None], slot_value)

        a = options.scale * jnp.einsum("bhgk,bhmk->bhgm", q, slot_key)
        if options.empty_slots == "mask":
            a = jnp.where(enters[:, None, None, None], a, -jnp.inf)
        M, padding = a.shape[-1], ~real[:, None, None, None]
        p = _softmax(jnp.concatenate([a, b], axis=-1), padding)
        weight = p
        if options.slot_weight_gradient == "slots":
            still = jax.lax.stop_gradient(b)
            weight = _softmax(jnp.concatenate([a, still], axis=-1), padding)
        out = jnp.einsum("bhgm,bhmv->bhgv", p[..., :M], slot_value)
        out += jnp.einsum("bhgn,bnhv->bhgv", p[..., M:], values)
        carry = (slot_key, slot_value), jnp.where(real, segment, current)
        return carry, (out, jnp.sum(weight[..., :M], axis=-1))

    return step


def _in_window(timeline: Timeline) -> jax.Array:
    """[T, B, R + T] bool: the rows of its segment in each query's window."""
    index = jnp.arange(timeline.num_rows, dtype=jnp.int32)
    row, now = index[None], index[:, None]
    inside = row <= now
    if timeline.window_size is not None:
        inside &= row > now - timeline.window_size
    own = timeline.token_segment[:, None, :] == timeline.segment[:, :, None]
    return (inside[None] & own)[:, -timeline.num_tokens :].swapaxes(0, 1)


def _softmax(logits: jax.Array, padding: jax.Array) -> jax.Array:
    """Softmax of real rows; padding, which sees nothing, gets zeros (and finite gradients)."""
    weights = jax.nn.softmax(jnp.where(padding, 0.0, logits), axis=-1)
    return jnp.where(padding, 0.0, weights)


def reference_decode(
    query: jax.Array,
    rotated_query: jax.Array,
    token: Tokens,
    state: NHAState,
    active: jax.Array,
    *,
    options: Options,
) -> tuple[jax.Array, NHAState]:
    """Computes `Backend.decode` as a call of one token that goes on from the state."""
    result = _recurrence(query, rotated_query, token, None, state.past(options.slot_delay), options)
    after = result.state
    assert after is not None
    if options.window_size is None:
        after = resize_state(after, state.capacity)

    def where_active(x: jax.Array, otherwise: jax.Array) -> jax.Array:
        return jnp.where(active.reshape(-1, *(1,) * (x.ndim - 1)), x, otherwise)

    out = where_active(result.out, jnp.zeros_like(result.out))
    return out, NHAState(*map(where_active, after, state))


class ReferenceBackend(Backend):
    """The definition itself: slow, and exact in any float dtype."""

    name = "reference"
    takes_slot_delay = True
    attend = staticmethod(reference_attention)
    decode = staticmethod(reference_decode)

    def decode_unsupported(self, query, state, options) -> None:
        return None


BACKEND = ReferenceBackend()
