"""The state that carries Native Hybrid Attention from one call to the next."""

from typing import NamedTuple

import jax
import jax.numpy as jnp


class NHAState(NamedTuple):
    """What a layer remembers of each batch row after its last real (non-padding) token.

    B rows, Hkv heads, M slots, R ring entries (R = window_size; for `window_size=None` R is the
    number of tokens there is room for, and the slots stay zero). The token with index i of its
    segment sits at ring entry `i % R`.
    """

    slot_key: jax.Array  # [B, Hkv, M, K] float32
    slot_value: jax.Array  # [B, Hkv, M, V] float32
    window_key: jax.Array  # [B, R, Hkv, K], not rotated: what will enter the slots
    window_rotated_key: jax.Array  # [B, R, Hkv, K], rotated: what the window's logits read
    window_value: jax.Array  # [B, R, Hkv, V]
    window_log_decay: jax.Array  # [B, R, Hkv, M] float32
    length: jax.Array  # [B] int32, tokens so far of the row's current segment
    segment_id: jax.Array  # [B] int32, id of the row's current segment


def init_state(
    batch_size: int,
    *,
    num_kv_heads: int,
    num_slots: int,
    key_dim: int,
    value_dim: int,
    window_size: int | None,
    dtype: jax.typing.DTypeLike,
    max_length: int | None = None,
) -> NHAState:
    """An empty state. `max_length`, required for `window_size=None` only, is the room it has."""
    capacity = window_size if window_size is not None else max_length
    if capacity is None:
        raise ValueError("init_state: window_size=None keeps every token, so it needs max_length")
    ring = (batch_size, capacity, num_kv_heads)
    return NHAState(
        slot_key=jnp.zeros((batch_size, num_kv_heads, num_slots, key_dim), jnp.float32),
        slot_value=jnp.zeros((batch_size, num_kv_heads, num_slots, value_dim), jnp.float32),
        window_key=jnp.zeros((*ring, key_dim), dtype),
        window_rotated_key=jnp.zeros((*ring, key_dim), dtype),
        window_value=jnp.zeros((*ring, value_dim), dtype),
        window_log_decay=jnp.zeros((*ring, num_slots), jnp.float32),
        length=jnp.zeros(batch_size, jnp.int32),
        segment_id=jnp.ones(batch_size, jnp.int32),
    )
