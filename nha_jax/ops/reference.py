"""The definition of Native Hybrid Attention, one token at a time (arXiv 2510.07019).

Every other implementation is held against this one. It takes any float dtype (float64 under
`jax.enable_x64`) and spends T x T memory on the window's logits: for small T.
"""

import jax
import jax.numpy as jnp

from nha_jax.ops.rope import Rope, apply_rope
from nha_jax.ops.state import Carried, Timeline, Tokens, build_timeline, next_state
from nha_jax.ops.types import NHAOutput, Options, compute_dtype


@jax.default_matmul_precision("highest")
def reference_attention(
    query: jax.Array,
    key: jax.Array,
    value: jax.Array,
    log_decay: jax.Array,
    *,
    rope: Rope | None,
    segment_ids: jax.Array | None,
    carried: Carried | None,
    options: Options,
) -> NHAOutput:
    """`nha_attention` by the per-token recurrence; shapes as there.

    At step t of a segment, with s = 1 - exp(log_decay):
        S_t = exp(log_decay_j) S_{t-1} + s_j [key_j ; value_j]   for j = t - W, if it exists
        a_t = scale feature_map(query_t) . SK_t                  the M slots
        b_t = scale rotated(query_t) . rotated(key_i)            t - W < i <= t
        o_t = softmax([a_t ; b_t]) [SV_t ; value_i]
    """
    B, T, Hq, K = query.shape
    Hkv, V, M = key.shape[2], value.shape[-1], log_decay.shape[-1]
    W = options.window_size
    dtype = compute_dtype(query)
    tokens = Tokens(key, apply_rope(key, rope), value, log_decay.astype(dtype))
    timeline = build_timeline(tokens, segment_ids, carried, W)
    run, real = timeline.run[:, -T:], timeline.real[:, -T:]  # [B, T]
    past_key, past_rotated_key, past_value, past_log_decay = (
        x.astype(dtype) for x in timeline.tokens
    )
    query_groups = query.reshape(B, T, Hkv, Hq // Hkv, K)
    slot_query = options.feature_map(query_groups.astype(dtype))
    rotated_query = apply_rope(query, rope).reshape(query_groups.shape).astype(dtype)

    window_logits = jnp.where(
        _visible(timeline, T, W)[:, :, None, None],
        options.scale * jnp.einsum("bthgk,bnhk->tbhgn", rotated_query, past_rotated_key),
        -jnp.inf,
    )  # [T, B, Hkv, G, R + T]
    # At step t enters row t of the timeline, the token W back; none if W is everything.
    enters = jnp.zeros((B, T), bool)
    if W is not None:
        enters = timeline.real[:, :T] & (timeline.run[:, :T] == run)
    entering = (past_key[:, :T], past_value[:, :T], past_log_decay[:, :T], enters)

    def step(carry, x):
        (slot_key, slot_value), current_run = carry
        q, b, (k, v, g, enters), run, real = x
        starts = (real & (run != current_run))[:, None, None, None]
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
        p = _softmax(jnp.concatenate([a, b], axis=-1), real[:, None, None, None])
        weight = p
        if options.slot_weight_gradient == "slots":
            still = jax.lax.stop_gradient(b)
            weight = _softmax(jnp.concatenate([a, still], axis=-1), real[:, None, None, None])
        out = jnp.einsum("bhgm,bhmv->bhgv", p[..., :M], slot_value)
        out += jnp.einsum("bhgn,bnhv->bhgv", p[..., M:], past_value)
        carry = (slot_key, slot_value), jnp.where(real, run, current_run)
        return carry, (out, jnp.sum(weight[..., :M], axis=-1))

    slots = jnp.zeros((B, Hkv, M, K), dtype), jnp.zeros((B, Hkv, M, V), dtype)
    if carried is not None and W is not None:
        slots = carried.slots[0].astype(dtype), carried.slots[1].astype(dtype)
    slot_query, entering, run, real = jax.tree.map(
        lambda x: x.swapaxes(0, 1), (slot_query, entering, run, real)
    )  # time first
    (slots, _), (out, weight) = jax.lax.scan(
        step,
        (slots, jnp.zeros(B, jnp.int32)),
        (slot_query, window_logits, entering, run, real),
    )
    # [T, B, Hkv, G, ...] -> [B, T, Hq, ...]
    out = out.swapaxes(0, 1).reshape(B, T, Hq, V).astype(query.dtype)
    weight = weight.swapaxes(0, 1).reshape(B, T, Hq)
    state = None
    if options.return_state:
        state = next_state(timeline, T, slots, segment_ids, carried, W)
    return NHAOutput(out, state, weight if options.return_slot_weight else None)


def _visible(timeline: Timeline, T: int, window_size: int | None) -> jax.Array:
    """[T, B, R + T]: the rows of its segment in each query's window."""
    num_rows = timeline.run.shape[1]
    row, now = jnp.arange(num_rows), jnp.arange(num_rows - T, num_rows)[:, None]
    inside = row <= now
    if window_size is not None:
        inside &= row > now - window_size
    same = timeline.run[:, None, :] == timeline.run[:, -T:, None]
    return (inside & same & timeline.real[:, None]).swapaxes(0, 1)


def _softmax(logits: jax.Array, real: jax.Array) -> jax.Array:
    """Softmax of real rows; padding, which sees nothing, gets zeros (and finite gradients)."""
    return jnp.where(real, jax.nn.softmax(jnp.where(real, logits, 0.0), axis=-1), 0.0)
